"""One optimisation step, from the positions of images to updated weights, on the device that holds the images.

Axes: B batch · M subnetworks · C channels · H, W height and width · K classes.

Nothing in a step waits for the device. Chance is counter-based: what a step draws follows from (seed, number of the
step, purpose) alone, so a resumed trial draws what an uninterrupted one would.
"""

from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixmo_core import augment, mixing
from mixmo_core.config import STEM_CHANNELS, TrialConfig, map_size
from mixmo_core.data import Images


class Purpose(IntEnum):
    """What is drawn. Fewer than eight: `draw_seed` gives it three bits."""

    ORDER = 0
    """Of the images, once an epoch."""
    AUGMENTATION = 1
    MIXING = 2


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


def weighted_loss(logits_MBK: Tensor, labels_MB: Tensor, kappa_MB: Tensor, root: float) -> Tensor:
    """Cross entropies, each times its weight (`mixing.loss_weights`), summed over subnetworks, mean over slots.

    A sum over subnetworks, so M of them have M times the loss of a single network (the reference's choice, to which
    its learning rates belong).
    """
    weights_MB = mixing.loss_weights(kappa_MB, root)
    entropy_MB = functional.cross_entropy(logits_MBK.flatten(0, 1), labels_MB.flatten(), reduction="none").view_as(
        labels_MB
    )
    return (weights_MB * entropy_MB).sum(dim=0).mean()


def optimiser(net: nn.Module, config: TrialConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum, with weight decay on every parameter, biases and batch norm included.

    The reference adds 3e-4 times the squared weights to the loss, whose gradient is that of a weight decay of 6e-4.
    The fused rule reads memory in order, whatever the strides: a gradient set by hand goes into the one there is.
    """
    optim = config.optim
    return torch.optim.SGD(
        net.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.momentum > 0,
        fused=True,
    )


class Step:
    """Trains a network, one batch a call. `rank` of `workers` takes every workers-th slot of each batch and draws for
    all of them, so that the batch is the same however many workers share it.
    """

    def __init__(self, config: TrialConfig, net: nn.Module, images: Images, *, rank: int = 0, workers: int = 1) -> None:
        """`net` is in training mode, on the device of `images`; `DistributedDataParallel` where workers > 1."""
        self._config, self._net, self._images = config, net, images
        self._slots = slice(rank, None, workers)
        self._device = images.pixels_NCHW.device
        self._generator = torch.Generator(self._device)
        self.optimiser = optimiser(net, config)
        self.total_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        """Sum of the losses of this rank's slots since it was last set to zero."""

    def __call__(self, indices_MB: Tensor, *, number: int, p: float, lr: float) -> None:
        """One step on these images. `number` counts the trial's steps from 1; `p` is the chance of binary masks."""
        images_MBCHW, labels_MB = self._gather(indices_MB, number)
        masks, kappa_MB = self._mixture(indices_MB, number, p)
        with autocast(self._config, self._device):
            logits_MBK = self._net(images_MBCHW, masks)
        self.update(weighted_loss(logits_MBK, labels_MB, kappa_MB, self._config.mixing.weight_root), lr)

    def update(self, loss: Tensor, lr: float) -> None:
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimiser.step()
        self.total_loss += loss.detach()

    def _gather(self, indices_MB: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images of this rank (M, B, C, H, W) in fp32, augmented and normalised, and their labels (M, B)."""
        data = self._config.data
        own_MB = indices_MB[:, self._slots]
        pixels_MBCHW, labels_MB = self._images.pixels_NCHW[own_MB], self._images.labels_N[own_MB]
        if data.augmentation == "none":
            return augment.normalise(pixels_MBCHW, data.dataset), labels_MB
        draws = augment.draw(data.dataset, tuple(indices_MB.shape), self._seeded(number, Purpose.AUGMENTATION))
        return augment.apply(pixels_MBCHW, draws[:, self._slots], data.dataset), labels_MB

    def _mixture(self, indices_MB: Tensor, number: int, p: float) -> mixing.Mixture:
        M, B = indices_MB.shape
        C, size = STEM_CHANNELS[self._config.model.arch], map_size(self._config)
        generator = self._seeded(number, Purpose.MIXING)
        mixture = mixing.draw(self._config.mixing, M, B, C, size, size, p=p, generator=generator, device=self._device)
        return mixture.slots(self._slots)

    def _seeded(self, number: int, purpose: Purpose) -> torch.Generator:
        return self._generator.manual_seed(draw_seed(self._config.seed, number, purpose))
