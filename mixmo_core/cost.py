"""What a trial costs: parameters and arithmetic, counted from the settings alone, before anything is built.

Only the standard library is imported; a test holds the counts to the built networks. Convolutions and linear layers
are counted, two operations for each multiplication. Batch norm, mixing and the optimiser are not: together they are
under two operations in a hundred from width 2 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mixmo_core.config import DATASETS, STEM_CHANNELS, TrialConfig, map_size, training_images


@dataclass(frozen=True, slots=True)
class _Layer:
    parameters: int
    macs: int
    """Multiplications for one slot, forward."""
    reads_images: bool = False
    """An encoder: nothing before it needs its gradient."""


def _conv(inputs: int, outputs: int, kernel: int, size: int) -> _Layer:
    weights = inputs * outputs * kernel**2
    return _Layer(weights, weights * size**2)


def _norm(channels: int) -> _Layer:
    return _Layer(2 * channels, 0)


def _encoders(config: TrialConfig) -> Iterator[_Layer]:
    data = DATASETS[config.data.dataset]
    one = _conv(data.channels, STEM_CHANNELS[config.model.arch], 3, map_size(config))
    count = config.model.subnetworks if config.model.encoders == "all" else config.model.encoders
    # A shared encoder has one set of weights and still reads all M images.
    yield _Layer(one.parameters * count, one.macs * config.model.subnetworks, reads_images=True)


def _block(inputs: int, outputs: int, stride: int, size: int, *, first_strided: bool) -> Iterator[_Layer]:
    """Two 3x3 convolutions, of which the first or the second carries the stride, and a shortcut where shapes differ."""
    reduced = -(-size // stride)
    yield _norm(inputs)
    yield _conv(inputs, outputs, 3, reduced if first_strided else size)
    yield _norm(outputs)
    yield _conv(outputs, outputs, 3, reduced)
    if stride > 1 or inputs != outputs:
        yield _conv(inputs, outputs, 1, reduced)


def _core(config: TrialConfig) -> Iterator[_Layer]:
    wide, width = config.model.arch == "wide_resnet", config.model.width
    size, channels = map_size(config), STEM_CHANNELS[config.model.arch]
    for group, outputs in enumerate((16, 32, 64) if wide else (64, 128, 256, 512)):
        for block in range((config.model.depth - 4) // 6 if wide else 2):
            stride = 2 if group and not block else 1
            yield from _block(channels, outputs * width, stride, size, first_strided=not wide)
            channels, size = outputs * width, -(-size // stride)
    if wide:
        yield _norm(channels)


def _layers(config: TrialConfig) -> Iterator[_Layer]:
    wide = config.model.arch == "wide_resnet"
    yield from _encoders(config)
    yield from _core(config)
    features, classes = (64 if wide else 512) * config.model.width, DATASETS[config.data.dataset].classes
    count = config.model.subnetworks if config.model.classifiers == "all" else config.model.classifiers
    yield _Layer((features + 1) * classes * count, features * classes * count)


def parameters(config: TrialConfig) -> int:
    """Trained numbers of the network: what the optimiser moves."""
    return sum(layer.parameters for layer in _layers(config))


def forward_flops(config: TrialConfig) -> float:
    """Operations of one forward pass for one slot: M images in, M predictions out."""
    return 2.0 * sum(layer.macs for layer in _layers(config))


def step_flops(config: TrialConfig) -> float:
    """Operations of one optimisation step on a whole batch.

    A backward pass is two forward passes, one for the gradient of the weights and one for that of the inputs, which
    the encoders do not need.
    """
    per_slot = sum((2 if layer.reads_images else 3) * 2.0 * layer.macs for layer in _layers(config))
    return per_slot * config.data.batch_size


def steps_per_epoch(config: TrialConfig) -> int:
    """Whole batches in one pass: every image occurs `repetition` times, and what does not fill a batch is dropped."""
    return training_images(config) * config.data.repetition // config.data.batch_size


def trial_flops(config: TrialConfig) -> float:
    """Operations of the whole training, evaluations left out."""
    return step_flops(config) * steps_per_epoch(config) * config.optim.epochs
