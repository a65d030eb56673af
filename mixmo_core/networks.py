"""M encoders, one core network, M classifiers: images in, one prediction for each of them out.

Axes: B batch · M subnetworks · C channels · H, W height and width · K classes · D features.

The core is WRN-depth-width (Zagoruyko & Komodakis, 2016) as MixMo's reference implementation builds it, which differs
from most others: the *second* convolution of a block carries the stride and is padded on the right and at the bottom
only, and the shortcut starts from the raw input.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixmo_core.config import DATASETS, STEM_CHANNELS, TrialConfig
from mixmo_core.mixing import mix

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal that is cut off at 2 on both sides."""


def image_shape(config: TrialConfig) -> tuple[int, int]:
    """(channels, height and width) of the images that the network reads."""
    data = DATASETS[config.data.dataset]
    return data.channels, data.size


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
    """A convolution without bias. Its weights are drawn by `_initialise`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:
            return functional.conv2d(x_BCHW, self.weight, stride=self.stride)
        if self.stride == 1:
            return functional.conv2d(x_BCHW, self.weight, padding=1)
        return functional.conv2d(functional.pad(x_BCHW, (0, 1, 0, 1)), self.weight, stride=self.stride)


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice; plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = _Norm(inputs), _Conv(inputs, outputs, 3)
        self.bn2, self.conv2 = _Norm(outputs), _Conv(outputs, outputs, 3, stride)
        self.shortcut = _Conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(functional.relu(self.bn1(x_BCHW), inplace=True))
        h_BCHW = self.conv2(functional.relu(self.bn2(h_BCHW), inplace=True))
        added: Tensor = h_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))
        return added


class _WideResNet(nn.Module):
    def __init__(self, inputs: int, depth: int, width: int) -> None:
        super().__init__()
        groups, channels = [], inputs
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = []
            for block in range((depth - 4) // 6):
                blocks.append(_Block(channels, outputs, stride=2 if group and not block else 1))
                channels = outputs
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.bn = _Norm(channels)
        self.features = channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled_BD: Tensor = functional.relu(self.bn(self.groups(x_BCHW)), inplace=True).mean(dim=(2, 3))
        return pooled_BD


class MixMoNet(nn.Module):
    """M encoders, the mixing block, the core network, M classifiers.

    In training mode `net(images_MBCHW, masks)` mixes M different images and returns logits (M, B, K): row m predicts
    image m. In evaluation mode `net(images_BCHW)` shows every encoder the same image: the M convolutions are summed
    into one, which is exact, since they are linear and mixing is then a plain sum.
    """

    def __init__(self, M: int, channels: int, stem: int, core: _WideResNet, classes: int) -> None:
        super().__init__()
        self.core = core.to(memory_format=torch.channels_last)  # faster on every device, and much so in bf16
        self.encoders = nn.Parameter(torch.empty(M, stem, channels, 3, 3))
        self.classifiers = nn.Parameter(torch.empty(M, classes, core.features))
        self.classifier_biases = nn.Parameter(torch.zeros(M, classes))

    @property
    def subnetworks(self) -> int:
        return len(self.encoders)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        mixed_BCHW = self._mixed(images, masks) if self.training else self._summed(images)
        features_BD = self.core(mixed_BCHW.contiguous(memory_format=torch.channels_last))
        logits = functional.linear(features_BD, self.classifiers.flatten(0, 1), self.classifier_biases.flatten())
        return logits.view(-1, *self.classifier_biases.shape).transpose(0, 1).float()

    def _mixed(self, images_MBCHW: Tensor, masks: Tensor | None) -> Tensor:
        if images_MBCHW.dim() != 5 or len(images_MBCHW) != self.subnetworks:
            raise ValueError(
                f"in training mode images must be (subnetworks {self.subnetworks}, batch, channels, height, width), "
                f"got {tuple(images_MBCHW.shape)}"
            )
        maps = [functional.conv2d(x, w, padding=1) for x, w in zip(images_MBCHW, self.encoders, strict=True)]
        if self.subnetworks == 1:
            return maps[0]
        if masks is None:
            raise ValueError("in training mode a network with more than one subnetwork needs masks")
        return mix(maps, masks)

    def _summed(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.dim() != 4:
            raise ValueError(
                f"in evaluation mode images must be (batch, channels, height, width), got {tuple(images_BCHW.shape)}"
            )
        return functional.conv2d(images_BCHW, self.encoders.sum(dim=0), padding=1)


def build(config: TrialConfig) -> MixMoNet:
    """The network of a trial, in training mode on the CPU. `config.seed` alone decides its weights; the global random
    state is neither read nor moved. Networks that differ in M only start from the same core.
    """
    model, data = config.model, DATASETS[config.data.dataset]
    if model.arch != "wide_resnet" or "all" not in (model.encoders,) or "all" not in (model.classifiers,):
        raise NotImplementedError(f"model: {model}")
    stem = STEM_CHANNELS[model.arch]
    net = MixMoNet(model.subnetworks, data.channels, stem, _WideResNet(stem, model.depth, model.width), data.classes)
    _initialise(net, torch.Generator().manual_seed(config.seed))
    return net


def _initialise(net: MixMoNet, generator: torch.Generator) -> None:
    """He et al., 2015: normal with variance 2 / fan_in, cut off at two (uncut) standard deviations. Biases stay 0.

    The reference cuts off by drawing up to four times, so one of its weights in 250,000 lies outside.
    """
    for parameter in (*net.core.parameters(), net.encoders, net.classifiers):
        if parameter.dim() < 2:
            continue
        fan_in = parameter.shape[-1] if parameter is net.classifiers else math.prod(parameter.shape[-3:])
        std = math.sqrt(2 / fan_in) / TRUNCATED_STD
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)


def reference_tensors(net: MixMoNet) -> dict[str, Tensor]:
    """Parameters and running statistics under the names of the reference implementation, as views of the network's."""
    named = dict(_reference_core(net.core))
    for m in range(net.subnetworks):
        encoder, classifier = (f"list_conv1.{m}", f"list_fc.{m}") if net.subnetworks > 1 else ("conv1", "fc")
        named[f"{encoder}.weight"] = net.encoders.detach()[m]
        named[f"{classifier}.weight"] = net.classifiers.detach()[m]
        named[f"{classifier}.bias"] = net.classifier_biases.detach()[m]
    return named


def _reference_core(core: _WideResNet) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in core.state_dict().items():
        if name.startswith("groups."):
            _, group, rest = name.split(".", 2)
            yield f"layer{int(group) + 1}.{rest.replace('shortcut.', 'shortcut.0.')}", tensor
        else:
            yield name.replace("bn.", "bn1."), tensor


def load_reference(net: MixMoNet, state_dict: Mapping[str, Tensor]) -> None:
    """Takes over the weights of a network of the reference implementation, in place.

    Raises ValueError that names what is missing, unknown, or of another shape. `num_batches_tracked` is passed over.
    """
    ours = reference_tensors(net)
    given = {name: tensor for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}
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
