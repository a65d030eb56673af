"""One optimisation step, from the positions of images to updated weights, on the device that holds the images.

Axes: B batch · M subnetworks · C channels · H, W height and width · K classes.

Nothing in a step waits for the device, and nothing is brought to it but seeds: a step can be recorded once and replayed
(`mixmo_core.capture`). Chance is counter-based: what a step draws follows from (seed, number of the step, purpose)
alone, so a resumed trial draws what an uninterrupted one would.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixmo_core import augment, augmix, mixing, msda, networks
from mixmo_core.config import STEM_CHANNELS, TrialConfig, map_size
from mixmo_core.data import Images


class Purpose(IntEnum):
    """What is drawn. Fewer than eight: `draw_seed` gives it three bits."""

    ORDER = 0
    """Of the images, once an epoch."""
    AUGMENTATION = 1
    """Crop and flip of the images of the batch."""
    MIXING = 2
    MSDA = 3
    """Mixed-sample augmentation, with the crop and flip of partners from outside the batch; Manifold Mixup."""
    AUGMIX = 4


def draw_seed(seed: int, number: int, purpose: Purpose) -> int:
    """The 64-bit seed of what is drawn for a purpose in step (or epoch) `number` of a trial.

    The upper half hashes the trial's seed. The lower half is a bijection of (number, purpose) for each seed: PyTorch's
    CPU generator reads only those 32 bits, and no two draws of a trial may share them by accident. Unique up to 2^29
    steps. The hashes are the finalisers of splitmix64 and of MurmurHash3.
    """
    hashed = _splitmix64(seed)
    return (hashed & 0xFFFFFFFF00000000) | _murmur32((number << 3 | purpose) ^ (hashed & 0xFFFFFFFF))


def _splitmix64(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


def _murmur32(value: int) -> int:
    value &= 0xFFFFFFFF
    value = ((value ^ value >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ value >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ value >> 16


def autocast(config: TrialConfig, device: torch.device) -> AbstractContextManager[object]:
    """The arithmetic of the trial's network: weights, batch statistics, mixing and loss stay in fp32 in any case."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


class Targets(NamedTuple):
    """What each subnetwork is to predict for each slot."""

    labels: Tensor
    """int64 (M, B); (M, B, L) where a slot has L labels."""
    shares_MBL: Tensor | None = None
    """How much of each label."""


def weighted_loss(
    logits_MBK: Tensor, labels: Tensor, kappa_MB: Tensor, root: float, shares_MBL: Tensor | None = None
) -> Tensor:
    """Cross entropies, each times its weight (`mixing.loss_weights`), summed over subnetworks, mean over slots.

    `labels` is (M, B), or (M, B, L) where each of L labels has a share of the cross entropy. A sum over subnetworks,
    so M of them have M times the loss of a single network (the reference's choice, to which its learning rates
    belong). Where all share one classifier their logits are equal, and this is M times the cross entropy with one
    interpolated label: each image's share is its weight over M, so with a root of 1 it is kappa.
    """
    weights_MB = mixing.loss_weights(kappa_MB, root)
    if shares_MBL is not None:
        log_MBL = functional.log_softmax(logits_MBK, dim=2).gather(2, labels)
        entropy_MB = -(shares_MBL * log_MBL).sum(dim=2)
    else:
        entropy_MB = functional.cross_entropy(logits_MBK.flatten(0, 1), labels.flatten(), reduction="none").view_as(
            labels
        )
    return (weights_MB * entropy_MB).sum(dim=0).mean()


def by_kappa(targets: Targets, kappa_MB: Tensor) -> tuple[Targets, Tensor]:
    """Targets and kappas of each slot in the order of falling kappa, equal ones as they are.

    For M classifiers on one encoder, whose images have no other order: classifier m predicts the m-th largest.
    """
    order_MB = kappa_MB.argsort(dim=0, descending=True, stable=True)
    slots_B = torch.arange(kappa_MB.shape[1], device=kappa_MB.device)
    shares_MBL = None if targets.shares_MBL is None else targets.shares_MBL[order_MB, slots_B]
    return Targets(targets.labels[order_MB, slots_B], shares_MBL), kappa_MB[order_MB, slots_B]


def mixed_inside(targets: Targets, hidden: networks.HiddenMix) -> Targets:
    """What is to be predicted of images whose maps Manifold Mixup mixes: each slot's label and its partner's."""
    labels_MBL = torch.stack([targets.labels, targets.labels[:, hidden.partner_B]], dim=2)
    lam = hidden.lam_L.prod()  # 1 at all places but one
    return Targets(labels_MBL, torch.stack([lam, 1 - lam]).expand(labels_MBL.shape))


def optimiser(net: nn.Module, config: TrialConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum, with weight decay on every parameter, biases and batch norm included.

    The reference adds 3e-4 times the squared weights to the loss, whose gradient is that of a weight decay of 6e-4.
    The fused rule reads memory in order, whatever the strides: a gradient set by hand goes into the one there is.
    """
    optim = config.optim
    sgd = torch.optim.SGD(
        net.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.momentum > 0,
        fused=True,
    )
    if optim.momentum:  # 0 before the first step, which then is one like all others
        for parameter in net.parameters():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class Step:
    """Trains a network, one batch a call. `rank` of `workers` takes every workers-th slot of each batch and draws for
    all of them, so that the batch is the same however many workers share it.
    """

    def __init__(self, config: TrialConfig, net: nn.Module, images: Images, *, rank: int = 0, workers: int = 1) -> None:
        """`net` is in training mode, on the device of `images`; `DistributedDataParallel` where workers > 1."""
        self._config, self._net, self._images = config, net, images
        self._slots = slice(rank, None, workers)
        self._device = images.pixels_NCHW.device
        drawn = [purpose for purpose in Purpose if purpose is not Purpose.ORDER]
        self.generators = {purpose: torch.Generator(self._device) for purpose in drawn}
        self.optimiser = optimiser(net, config)
        self.total_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        """Sum of the losses of this rank's slots since it was last set to zero."""

    def __call__(self, indices_MB: Tensor, *, number: int, p: float, lr: float) -> None:
        """One step on these images. `number` counts the trial's steps from 1; `p` is the chance of binary masks."""
        self.begin(indices_MB, number=number, p=p, lr=lr)
        self.join()

    def begin(self, indices_MB: Tensor, *, number: int, p: float, lr: float) -> None:
        """As a call, but the step may still be under way beside what follows, until `join`."""
        self.seed(number)
        self.take(indices_MB, p, lr)

    def join(self) -> None:
        """What follows on the device comes after the step that was begun. So it does here in any case."""

    def seed(self, number: int) -> None:
        """Set chance to that of a step of the trial."""
        for purpose, generator in self.generators.items():
            generator.manual_seed(draw_seed(self._config.seed, number, purpose))

    def take(self, indices_MB: Tensor, p: float | Tensor, lr: float | Tensor) -> None:
        """All that the device does in a step: the same operations on tensors of the same shapes each time, whatever is
        drawn. `p` and `lr` may be there already, as fp32 tensors of no axes.
        """
        masks, kappa_MB = self._mixture(indices_MB, p)
        images_MBCHW, targets = self._gather(indices_MB, masks)
        hidden = None
        if self._config.data.msda == "manifold_mixup":
            hidden = self._hidden(indices_MB.shape[1])
            targets = mixed_inside(targets, hidden)
        with autocast(self._config, self._device):
            logits_MBK = self._net(images_MBCHW, masks, hidden)
        self.update(self._loss(logits_MBK, targets, kappa_MB), lr)

    def update(self, loss: Tensor, lr: float | Tensor) -> None:
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimiser.step()
        self.total_loss += loss.detach()

    def _loss(self, logits_MBK: Tensor, targets: Targets, kappa_MB: Tensor) -> Tensor:
        model = self._config.model
        if model.classifier_roles == "dominant" and model.encoders == 1 and model.classifiers == "all":
            targets, kappa_MB = by_kappa(targets, kappa_MB)
        root = self._config.mixing.weight_root
        return weighted_loss(logits_MBK, targets.labels, kappa_MB, root, targets.shares_MBL)

    def _gather(self, indices_MB: Tensor, masks: Tensor) -> tuple[Tensor, Targets]:
        """Images of this rank (M, B, C, H, W) in fp32, augmented and normalised, and what is to be predicted of them.
        `masks` are those of the mixing block, which decide what is seen of an image with two labels.
        """
        data, chains = self._config.data, self._chains(indices_MB)
        images_MBCHW, labels_MB = self._augmented(indices_MB, chains, self.generators[Purpose.AUGMENTATION])
        if data.msda in ("none", "manifold_mixup"):
            return images_MBCHW, Targets(labels_MB)
        generator = self.generators[Purpose.MSDA]
        M, B = indices_MB.shape
        draws = msda.draw(data, len(self._images), (M, B), generator)
        if chains is not None and M == 1:
            chains = augmix.draw((M, B), generator)[:, self._slots]
        partners_MBCHW, others_MB = self._augmented(draws.partners, chains, generator)
        images_MBCHW, shares_MBL = msda.mix(images_MBCHW, partners_MBCHW, draws[:, self._slots], masks, data.msda)
        return images_MBCHW, Targets(torch.stack([labels_MB, others_MB], dim=2), shares_MBL)

    def _hidden(self, B: int) -> networks.HiddenMix:
        """Manifold Mixup: one ratio and one place in the network for the batch, and a random order of its slots. With
        several workers a slot's partner is among the slots of its own worker, the only ones whose maps are there.
        """
        generator = self.generators[Purpose.MSDA]
        keys_B = torch.rand(B, generator=generator, device=self._device)
        drawn = torch.randint(networks.MIXING_POINTS, (), generator=generator, device=self._device)
        lam = msda.beta(self._config.data.msda_alpha, (), generator).float()
        places_L = torch.arange(networks.MIXING_POINTS, device=self._device)
        lam_L = lam.expand(places_L.shape).masked_fill(places_L != drawn, 1.0)
        return networks.HiddenMix(keys_B[self._slots].argsort(), lam_L)

    def _chains(self, indices_MB: Tensor) -> augmix.Draws | None:
        """The draws of AugMix for this rank. Inside MixMo the repeats of an image share theirs, and a partner has those
        of the image that it is mixed with, as in the reference; a single network's repeats and partners have their own.
        """
        if self._config.data.augmentation != "augmix":
            return None
        draws = augmix.draw(tuple(indices_MB.shape), self.generators[Purpose.AUGMIX])
        if len(indices_MB) > 1:
            draws = augmix.of_repeats(draws, indices_MB)
        return draws[:, self._slots]

    def _augmented(
        self, indices_MB: Tensor, chains: augmix.Draws | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The rank's share of the images at these positions, augmented and normalised, and their labels (M, B)."""
        dataset = self._config.data.dataset
        own_MB = indices_MB[:, self._slots]
        pixels_MBCHW, labels_MB = self._images.pixels_NCHW[own_MB], self._images.labels_N[own_MB]
        if self._config.data.augmentation == "none":
            return augment.normalise(pixels_MBCHW, dataset), labels_MB
        crops = augment.draw(dataset, tuple(indices_MB.shape), generator)[:, self._slots]
        if chains is None:
            return augment.apply(pixels_MBCHW, crops, dataset), labels_MB
        return augmix.apply(augment.crop(pixels_MBCHW, crops, dataset), chains, dataset), labels_MB

    def _mixture(self, indices_MB: Tensor, p: float | Tensor) -> mixing.Mixture:
        M, B = indices_MB.shape
        C, size = STEM_CHANNELS[self._config.model.arch], map_size(self._config)
        generator = self.generators[Purpose.MIXING]
        mixture = mixing.draw(self._config.mixing, M, B, C, size, size, p=p, generator=generator, device=self._device)
        return mixture.slots(self._slots)


class Due(NamedTuple):
    """A step that a trial is to take next, with what its host has worked out for it."""

    step: Step
    indices_MB: Tensor
    number: int
    p: float
    lr: float

    def begin(self) -> None:
        self.step.begin(self.indices_MB, number=self.number, p=self.p, lr=self.lr)

    def take(self) -> None:
        self.begin()
        self.step.join()


def side_by_side(dues: Sequence[Due]) -> list[Exception | None]:
    """Take the next steps of trials of one shape (`config.shape_of`), and tell of each what went wrong with it, if
    anything did.

    All are begun before the first is waited for: captured steps are then on the device at once, others one after the
    other. No trial reads what another writes, so each step is that of the trial alone, to the bit.
    """
    faults: list[Exception | None] = []
    for due in dues:
        try:
            due.begin()
        except Exception as error:  # its trial's, whatever it is: the others go on
            faults.append(error)
        else:
            faults.append(None)
    for due in dues:
        due.step.join()
    return faults
