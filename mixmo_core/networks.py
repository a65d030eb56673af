"""M encoders, one core network, M classifiers: images in, one prediction for each of them out.

Axes: B batch · M subnetworks · C channels · H, W height and width · K classes · D features · L places in the core.

Two core networks, WRN-depth-width (Zagoruyko & Komodakis, 2016) and PreActResNet-18-width (He et al., 2016), as MixMo's
reference implementation builds them. Each differs from most others, and from the other: see `_WideBlock` and
`_PreActBlock`.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixmo_core.config import DATASETS, STEM_CHANNELS, All, TrialConfig
from mixmo_core.mixing import mix

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal that is cut off at 2 on both sides."""
WITHIN_TWO = math.erf(math.sqrt(2))
"""How much of a standard normal lies there."""
MIXING_POINTS = 3
"""L, the places of the core where Manifold Mixup may mix: its input, after its first group, after its second."""
ACTIVITY_THRESHOLDS = (0.2, 0.3, 0.4, 0.5)


def image_shape(config: TrialConfig) -> tuple[int, int]:
    """(channels, height and width) of the images that the network reads."""
    data = DATASETS[config.data.dataset]
    return data.channels, data.size


class HiddenMix(NamedTuple):
    """How a batch is mixed inside the core: Manifold Mixup, Verma et al., ICML 2019."""

    partner_B: Tensor
    """int64: the slot that each slot is mixed with."""
    lam_L: Tensor
    """Share of the slot's own map at each of the MIXING_POINTS: 1 everywhere but at the place drawn for the batch.

    All places are computed, so that which one was drawn is never read from the device.
    """

    def at(self, place: int, hidden_BCHW: Tensor) -> Tensor:
        lam = self.lam_L[place]
        mixed_BCHW = lam * hidden_BCHW + (1 - lam) * hidden_BCHW[self.partner_B]
        return mixed_BCHW.to(hidden_BCHW.dtype)


class _Norm(nn.Module):
    """Batch norm. `nn.BatchNorm2d` also counts its batches, one more operation a layer and step for nobody."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.batch_norm(
            x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum=0.1, eps=1e-5
        )


class _Conv(nn.Module):
    """A convolution without bias, 1x1 or 3x3 and padded. Its weights are drawn by `_initialise`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        shape = (outputs, inputs, kernel, kernel)
        # Channels last are faster on every device, and much so in bf16.
        self.weight = nn.Parameter(torch.empty(shape, memory_format=torch.channels_last))
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padding = self.weight.shape[2] // 2
        if self.stride > 1 and padding and x_BCHW.shape[2:] == (1, 1):
            # In bf16 on the CPU the strided kernel leaves the gradient of the taps that see padding alone unwritten.
            x_BCHW, padding = functional.pad(x_BCHW, (padding,) * 4), 0
        return functional.conv2d(x_BCHW, self.weight, stride=self.stride, padding=padding)


class _LateStride(_Conv):
    """The strided 3x3 convolution of the wide ResNet, which pads maps of even size on the right and at the bottom only.

    Maps of odd size, on which the reference fails, are padded on all sides, as TensorFlow does it.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        H, W = x_BCHW.shape[2:]
        return functional.conv2d(functional.pad(x_BCHW, (W % 2, 1, H % 2, 1)), self.weight, stride=self.stride)


class _WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice; plus the shortcut.

    Unlike most wide ResNets the *second* convolution carries the stride, and the shortcut starts from the raw input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = _Norm(inputs), _Conv(inputs, outputs, 3)
        self.bn2 = _Norm(outputs)
        self.conv2 = _LateStride(outputs, outputs, 3, stride) if stride > 1 else _Conv(outputs, outputs, 3)
        self.shortcut = _Conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(functional.relu(self.bn1(x_BCHW), inplace=True))
        h_BCHW = self.conv2(functional.relu(self.bn2(h_BCHW), inplace=True))
        added: Tensor = h_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))
        return added


class _PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice; plus the shortcut.

    Unlike the wide block the *first* convolution carries the stride, and where the shortcut is a convolution it starts
    from the pre-activation, which is normed and cut off at 0. Where it is the identity it is the raw input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = _Norm(inputs), _Conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = _Norm(outputs), _Conv(outputs, outputs, 3)
        self.shortcut = _Conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = functional.relu(self.bn1(x_BCHW), inplace=True)
        h_BCHW = self.conv2(functional.relu(self.bn2(self.conv1(active_BCHW)), inplace=True))
        added: Tensor = h_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(active_BCHW))
        return added


class _Core(nn.Module):
    """Groups of blocks, each but the first of half the size of the one before; then the mean over the map."""

    def __init__(
        self, block: type[_WideBlock] | type[_PreActBlock], stem: int, widths: tuple[int, ...], blocks: int
    ) -> None:
        super().__init__()
        groups, channels = [], stem
        for group, outputs in enumerate(widths):
            strides = (2 if group else 1, *[1] * (blocks - 1))
            groups.append(
                nn.Sequential(*(block(channels if not b else outputs, outputs, s) for b, s in enumerate(strides)))
            )
            channels = outputs
        self.groups = nn.Sequential(*groups)
        # The reference's PreActResNet pools what its last block adds, without the usual norm and ReLU.
        self.bn = _Norm(channels) if block is _WideBlock else None
        self.features = channels

    def forward(self, x_BCHW: Tensor, hidden: HiddenMix | None = None) -> Tensor:
        for place, group in enumerate(self.groups):
            if hidden is not None and place < MIXING_POINTS:
                x_BCHW = hidden.at(place, x_BCHW)
            x_BCHW = group(x_BCHW)
        if self.bn is not None:
            x_BCHW = functional.relu(self.bn(x_BCHW), inplace=True)
        # A mean over whatever size is left: the 4x4 pool of the reference's PreActResNet at 64 px, and no other.
        return x_BCHW.mean(dim=(2, 3))


class MixMoNet(nn.Module):
    """Encoders, the mixing block, the core network, classifiers: M of each, or one for all M subnetworks (Table 3).

    In training mode `net(images_MBCHW, masks)` mixes M different images and returns logits (M, B, K): row m predicts
    image m. Where one classifier is shared its M rows are equal. `masks` is (M, B, H, W) or (M, B, C, H, W) of the
    encoded maps. `hidden` mixes slots inside the core besides.

    In evaluation mode `net(images_BCHW)` shows every encoder the same image and returns a row for each classifier: the
    M convolutions are summed into one, which is exact, since they are linear and mixing is then a plain sum. A shared
    encoder counts M times. Logits are fp32, or fp64 where the weights are.
    """

    def __init__(
        self,
        core: _Core,
        *,
        subnetworks: int,
        encoders: int,
        classifiers: int,
        channels: int,
        stem: int,
        stem_stride: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.core = core
        self.encoders = nn.Parameter(torch.empty(encoders, stem, channels, 3, 3))
        self.classifiers = nn.Parameter(torch.empty(classifiers, classes, core.features))
        self.classifier_biases = nn.Parameter(torch.zeros(classifiers, classes))
        self.subnetworks, self._stem_stride = subnetworks, stem_stride

    def forward(self, images: Tensor, masks: Tensor | None = None, hidden: HiddenMix | None = None) -> Tensor:
        mixed_BCHW = self._mixed(images, masks) if self.training else self._summed(images)
        features_BD = self.core(mixed_BCHW.contiguous(memory_format=torch.channels_last), hidden)
        logits = functional.linear(features_BD, self.classifiers.flatten(0, 1), self.classifier_biases.flatten())
        logits_MBK = logits.view(-1, *self.classifier_biases.shape).transpose(0, 1)
        if self.training and len(logits_MBK) < self.subnetworks:
            logits_MBK = logits_MBK.expand(self.subnetworks, -1, -1)
        return logits_MBK.to(torch.promote_types(logits_MBK.dtype, torch.float32))

    def summed_encoder(self) -> Tensor:
        """Weights (stem, C, 3, 3) of the one convolution that encodes an image as evaluation does."""
        return self.encoders.sum(dim=0) * (self.subnetworks // len(self.encoders))

    def _encoded(self, images_BCHW: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(images_BCHW, weight, stride=self._stem_stride, padding=1)

    def _mixed(self, images_MBCHW: Tensor, masks: Tensor | None) -> Tensor:
        M = self.subnetworks
        if images_MBCHW.dim() != 5 or len(images_MBCHW) != M:
            raise ValueError(
                f"in training mode images must be (subnetworks {M}, batch, channels, height, width), "
                f"got {tuple(images_MBCHW.shape)}"
            )
        if M == 1:
            return self._encoded(images_MBCHW[0], self.encoders[0])
        if masks is None:
            raise ValueError("in training mode a network with more than one subnetwork needs masks")
        if len(self.encoders) == 1:
            encoded = self._encoded(images_MBCHW.flatten(0, 1), self.encoders[0])
            return mix(encoded.view(M, -1, *encoded.shape[1:]), masks)
        return mix([self._encoded(x, w) for x, w in zip(images_MBCHW, self.encoders, strict=True)], masks)

    def _summed(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.dim() != 4:
            raise ValueError(
                f"in evaluation mode images must be (batch, channels, height, width), got {tuple(images_BCHW.shape)}"
            )
        return self._encoded(images_BCHW, self.summed_encoder())


def build(config: TrialConfig) -> MixMoNet:
    """The network of a trial, in training mode on the CPU. `config.seed` alone decides its weights; the global random
    state is neither read nor moved. Networks that differ in M, or in what they share, start from the same core.
    """
    net = _assemble(config)
    _initialise(net, torch.Generator().manual_seed(config.seed))
    return net


def _assemble(config: TrialConfig) -> MixMoNet:
    """The network of a trial, its weights not drawn yet."""
    model, data = config.model, DATASETS[config.data.dataset]
    stem = STEM_CHANNELS[model.arch]
    if model.arch == "wide_resnet":
        widths = tuple(model.width * each for each in (16, 32, 64))
        core, stem_stride = _Core(_WideBlock, stem, widths, (model.depth - 4) // 6), 1
    else:
        widths = tuple(model.width * each for each in (64, 128, 256, 512))
        core, stem_stride = _Core(_PreActBlock, stem, widths, 2), 2

    def count(asked: int | All) -> int:
        return model.subnetworks if asked == "all" else asked

    return MixMoNet(
        core,
        subnetworks=model.subnetworks,
        encoders=count(model.encoders),
        classifiers=count(model.classifiers),
        channels=data.channels,
        stem=stem,
        stem_stride=stem_stride,
        classes=data.classes,
    )


@torch.no_grad()
def _initialise(net: MixMoNet, generator: torch.Generator) -> None:
    """He et al., 2015: normal with variance 2 / fan_in, cut off at two (uncut) standard deviations. Biases stay 0.

    The classifiers of a PreActResNet, which has no norm before them, start small instead: N(0, 0.01^2), uncut.
    The reference cuts off by drawing up to four times, so one of its weights in 250,000 lies outside. Here each weight
    is one uniform number, put through the inverse of the cut normal's distribution function: torch's own
    `trunc_normal_` draws whole tensors again until all weights fit, which takes 8 to 17 times as long, and its
    numbers are others from version to version.
    """
    for parameter in (*net.core.parameters(), net.encoders, net.classifiers):
        if parameter.dim() < 2:
            continue
        if parameter is net.classifiers and net.core.bn is None:
            nn.init.normal_(parameter, std=0.01, generator=generator)
            continue
        fan_in = parameter.shape[-1] if parameter is net.classifiers else math.prod(parameter.shape[-3:])
        std = math.sqrt(2 / fan_in) / TRUNCATED_STD
        parameter.uniform_(-WITHIN_TWO, WITHIN_TWO, generator=generator).erfinv_().mul_(math.sqrt(2) * std)


# ------------------------------------------------------------------------------------------------- a finished network


@torch.no_grad()
def fold(net: MixMoNet) -> MixMoNet:
    """The single network that predicts what `net` does in evaluation mode: the mean of its M logit vectors, exactly.

    Encoders without bias of one image, a plain sum, linear classifiers and a mean of logits are all linear, so the
    encoders add up and the classifiers average. A copy in evaluation mode, on the device of `net` and of its type.

    What is lost: the subnetworks. There is one row of logits, so no accuracy of a single subnetwork, no diversity, and
    no mean of probabilities instead of logits. Trained further, it is a single network.
    """
    folded = copy.deepcopy(net).eval()
    folded.subnetworks = 1
    folded.encoders = nn.Parameter(net.summed_encoder().unsqueeze(0))
    folded.classifiers = nn.Parameter(net.classifiers.mean(dim=0, keepdim=True))
    folded.classifier_biases = nn.Parameter(net.classifier_biases.mean(dim=0, keepdim=True))
    return folded


@torch.no_grad()
def filter_activity(net: MixMoNet) -> dict[str, float]:
    """Share of the core's filters that do something: `filter_activity_20` to `_50`, fractions.

    A filter counts from an l1 norm above 20 (30, 40, 50) % of the largest in its layer; the shares are averaged over
    the 3x3 convolutions. MixMo, figure 4a and its appendix; the reference's notebook leaves the 1x1 shortcuts out, and
    so does this.
    """
    norms_by_layer = [weight.abs().sum(dim=(1, 2, 3)) for weight in net.core.parameters() if weight.shape[2:] == (3, 3)]
    shares = torch.stack(
        [torch.stack([(n > t * n.max()).double().mean() for t in ACTIVITY_THRESHOLDS]) for n in norms_by_layer]
    )
    names = [f"filter_activity_{round(100 * threshold)}" for threshold in ACTIVITY_THRESHOLDS]
    return dict(zip(names, shares.mean(dim=0).tolist(), strict=True))


# -------------------------------------------------------------------------------------------- the reference's weights


def reference_tensors(net: MixMoNet) -> dict[str, Tensor]:
    """Parameters and running statistics under the names of the reference implementation, as views of the network's."""
    named = dict(_reference_core(net.core))
    for m, weight in enumerate(net.encoders.detach()):
        named[f"list_conv1.{m}.weight" if len(net.encoders) > 1 else "conv1.weight"] = weight
    for m, (weight, bias) in enumerate(zip(net.classifiers.detach(), net.classifier_biases.detach(), strict=True)):
        classifier = f"list_fc.{m}" if len(net.classifiers) > 1 else "fc"
        named |= {f"{classifier}.weight": weight, f"{classifier}.bias": bias}
    return named


def _reference_core(core: _Core) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in core.state_dict().items():
        if name.startswith("groups."):
            _, group, rest = name.split(".", 2)
            yield f"layer{int(group) + 1}.{rest.replace('shortcut.', 'shortcut.0.')}", tensor
        else:
            yield name.replace("bn.", "bn1."), tensor


def load_reference(net: MixMoNet, state_dict: Mapping[str, Any]) -> None:
    """Takes over the weights of a network of the reference implementation, in place.

    `state_dict` is the network's, or the whole of a published checkpoint, which holds it as `classifier_state_dict`.
    Names may begin with `module.`, as `nn.DataParallel` writes them; `num_batches_tracked` is passed over.
    Raises ValueError that names what is missing, unknown, or of another shape; `net` is then as it was.
    """
    weights: Mapping[str, Tensor] = state_dict.get("classifier_state_dict", state_dict)
    ours = reference_tensors(net)
    given = {
        name.removeprefix("module."): tensor
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked")
    }
    faults = [f"missing: {name}" for name in ours.keys() - given.keys()]
    faults += [f"unknown: {name}" for name in given.keys() - ours.keys()]
    faults += [
        f"{name}: shape {tuple(given[name].shape)} instead of {tuple(ours[name].shape)}"
        for name in ours.keys() & given.keys()
        if given[name].shape != ours[name].shape
    ]
    if faults:
        raise ValueError("not the weights of this network:\n" + "\n".join(sorted(faults)))
    for name, tensor in ours.items():
        tensor.copy_(given[name])
