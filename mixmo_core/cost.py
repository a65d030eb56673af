"""What a trial costs: parameters, arithmetic and room, counted from the settings alone, before anything is built.

Only the standard library is imported; a test holds the counts to the built networks. Convolutions and linear layers
are counted, two operations for each multiplication. Batch norm, mixing and the optimiser are not: together they are
under two operations in a hundred from width 2 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mixmo_core.config import DATASETS, STEM_CHANNELS, TrialConfig, map_size, training_images, validation_images
from mixmo_core.metrics import METRICS


@dataclass(frozen=True, slots=True)
class _Layer:
    parameters: int
    macs: int
    """Multiplications for one slot, forward."""
    reads_images: bool = False
    """An encoder: nothing before it needs its gradient."""
    statistics: int = 0
    """Running means and variances: numbers that are kept, but not trained."""


def _conv(inputs: int, outputs: int, kernel: int, size: int) -> _Layer:
    weights = inputs * outputs * kernel**2
    return _Layer(weights, weights * size**2)


def _norm(channels: int) -> _Layer:
    return _Layer(2 * channels, 0, statistics=2 * channels)


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
    count = _classifiers(config)
    yield _Layer((features + 1) * classes * count, features * classes * count)


def _classifiers(config: TrialConfig) -> int:
    return config.model.subnetworks if config.model.classifiers == "all" else config.model.classifiers


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


# ---------------------------------------------------------------------------------------------------------------- room

_NUMBER_BYTES = 4
"""Weights are kept in fp32 whatever they are multiplied in."""
_FILE_BYTES, _TENSOR_BYTES = 1_500, 310
"""Around the numbers: of a file, and of a tensor in it (measured with torch 2.11 to 2.13)."""
_EPOCH_BYTES, _VALUE_BYTES = 120, 25
"""Of an epoch in the history, and of each metric in it, which stands there and in the epoch's row."""
_METRICS = sum(not metric.name.startswith("cifar_c") for metric in METRICS)
_OF_PAIRS = 6
"""Metrics that compare the predictions of two classifiers."""


def checkpoint_bytes(config: TrialConfig) -> int:
    """Bytes of the checkpoint after the last epoch: weights, momentum, running statistics, all epochs' metrics."""
    layers, optim = list(_layers(config)), config.optim
    copies = 2 if optim.momentum else 1
    norms = sum(layer.statistics > 0 for layer in layers)
    numbers = copies * sum(layer.parameters for layer in layers) + sum(layer.statistics for layer in layers)
    tensors = copies * (len(layers) + norms) + 3 * norms  # a norm counts its batches besides
    evaluated = -(-optim.epochs // config.evaluate.every)
    metrics = _METRICS if _classifiers(config) > 1 else _METRICS - _OF_PAIRS
    values = evaluated * metrics + 2 * (optim.epochs - evaluated)  # all have a loss and a rate
    history = optim.epochs * _EPOCH_BYTES + values * _VALUE_BYTES
    return _NUMBER_BYTES * numbers + _FILE_BYTES + tensors * _TENSOR_BYTES + history


def logits_bytes(config: TrialConfig) -> int:
    """Bytes of a finished trial's logits, in half precision, with the labels of the images beside them."""
    data = DATASETS[config.data.dataset]
    images = validation_images(config.data) if config.evaluate.split == "validation" else data.test_images
    return images * (2 * _classifiers(config) * data.classes + 8) + 520
