"""What a trial costs: parameters, arithmetic and room, counted from the settings alone, before anything is built.

Only the standard library is imported; a test holds the counts to the built networks. Convolutions and linear layers
are counted, two operations for each multiplication. Batch norm, mixing and the optimiser are not: together they are
under two operations in a hundred from width 2 on.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mixmo_core.config import (
    DATASETS,
    STEM_CHANNELS,
    Dataset,
    ModelConfig,
    TrialConfig,
    map_size,
    training_images,
    validation_images,
)
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
    activations: int = 0
    """Values that one slot leaves for the backward pass."""


def _conv(inputs: int, outputs: int, kernel: int, size: int) -> _Layer:
    weights = inputs * outputs * kernel**2
    return _Layer(weights, weights * size**2)


def _norm(channels: int, size: int) -> _Layer:
    """Its own input is kept, and what it gives, cut off at 0, which the convolution after it reads."""
    return _Layer(2 * channels, 0, statistics=2 * channels, activations=2 * channels * size**2)


def _encoders(model: ModelConfig, data: Dataset, size: int) -> Iterator[_Layer]:
    one = _conv(data.channels, STEM_CHANNELS[model.arch], 3, size)
    count = model.subnetworks if model.encoders == "all" else model.encoders
    # A shared encoder has one set of weights and still reads all M images.
    kept = model.subnetworks * (data.channels * data.size**2 + STEM_CHANNELS[model.arch] * size**2)
    yield _Layer(one.parameters * count, one.macs * model.subnetworks, reads_images=True, activations=kept)


def _block(inputs: int, outputs: int, stride: int, size: int, *, first_strided: bool) -> Iterator[_Layer]:
    """Two 3x3 convolutions, of which the first or the second carries the stride, and a shortcut where shapes differ."""
    reduced = -(-size // stride)
    yield _norm(inputs, size)
    yield _conv(inputs, outputs, 3, reduced if first_strided else size)
    yield _norm(outputs, reduced if first_strided else size)
    padded = 0 if stride == 1 or first_strided else outputs * size**2  # the copy that the late stride reads
    yield replace(_conv(outputs, outputs, 3, reduced), activations=padded)
    if stride > 1 or inputs != outputs:
        yield _conv(inputs, outputs, 1, reduced)


def _core(model: ModelConfig, size: int) -> Iterator[_Layer]:
    wide, width, channels = model.arch == "wide_resnet", model.width, STEM_CHANNELS[model.arch]
    for group, outputs in enumerate((16, 32, 64) if wide else (64, 128, 256, 512)):
        for block in range((model.depth - 4) // 6 if wide else 2):
            stride = 2 if group and not block else 1
            yield from _block(channels, outputs * width, stride, size, first_strided=not wide)
            channels, size = outputs * width, -(-size // stride)
    if wide:
        yield _norm(channels, size)


def _layers(model: ModelConfig, data: Dataset, size: int) -> Iterator[_Layer]:
    yield from _encoders(model, data, size)
    yield from _core(model, size)
    features, count = (64 if model.arch == "wide_resnet" else 512) * model.width, _classifiers(model)
    yield _Layer((features + 1) * data.classes * count, features * data.classes * count)


def _classifiers(model: ModelConfig) -> int:
    return model.subnetworks if model.classifiers == "all" else model.classifiers


@dataclass(frozen=True, slots=True)
class _Network:
    """The sums over the layers of a network."""

    parameters: int
    statistics: int
    macs: int
    """For one slot, forward."""
    encoder_macs: int
    """Of these, where no gradient goes further back."""
    layers: int
    norms: int
    activations: int
    """Values that one slot leaves for the backward pass."""
    largest: int
    """The most that one layer leaves."""


def _network(config: TrialConfig) -> _Network:
    return _summed(config.model, DATASETS[config.data.dataset], map_size(config))


@functools.lru_cache(maxsize=4096)
def _summed(model: ModelConfig, data: Dataset, size: int) -> _Network:
    """The cells of a sweep are many, its networks few."""
    layers = list(_layers(model, data, size))
    return _Network(
        parameters=sum(layer.parameters for layer in layers),
        statistics=sum(layer.statistics for layer in layers),
        macs=sum(layer.macs for layer in layers),
        encoder_macs=sum(layer.macs for layer in layers if layer.reads_images),
        layers=len(layers),
        norms=sum(layer.statistics > 0 for layer in layers),
        activations=sum(layer.activations for layer in layers),
        largest=max(layer.activations for layer in layers),
    )


def parameters(config: TrialConfig) -> int:
    """Trained numbers of the network: what the optimiser moves."""
    return _network(config).parameters


def forward_flops(config: TrialConfig) -> float:
    """Operations of one forward pass for one slot: M images in, M predictions out."""
    return 2.0 * _network(config).macs


def step_flops(config: TrialConfig) -> float:
    """Operations of one optimisation step on a whole batch.

    A backward pass is two forward passes, one for the gradient of the weights and one for that of the inputs, which
    the encoders do not need.
    """
    network = _network(config)
    return 2.0 * (3 * network.macs - network.encoder_macs) * config.data.batch_size


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


def training_bytes(config: TrialConfig, workers: int = 1) -> int:
    """Bytes that a worker needs at least at the height of a training step: the images, weights, gradients, momenta,
    and what the forward pass keeps for the backward pass. What libraries take besides is not counted: a device
    context takes some hundred MB, and a convolution its scratch memory.
    """
    network, data, optim = _network(config), DATASETS[config.data.dataset], config.optim
    copies = 3 if optim.momentum else 2
    held_out = validation_images(config.data) if config.evaluate.split == "validation" else data.test_images
    images = (training_images(config) + held_out) * data.channels * data.size**2
    per_value = 2 if config.precision == "bf16" else _NUMBER_BYTES
    # At its height the backward pass holds the gradients of what one layer takes and gives.
    per_slot = (network.activations + network.largest) * per_value
    return images + copies * _NUMBER_BYTES * network.parameters + per_slot * -(-config.data.batch_size // workers)


def checkpoint_bytes(config: TrialConfig) -> int:
    """Bytes of the checkpoint after the last epoch: weights, momentum, running statistics, all epochs' metrics."""
    network, optim = _network(config), config.optim
    copies = 2 if optim.momentum else 1
    numbers = copies * network.parameters + network.statistics
    tensors = copies * (network.layers + network.norms) + 3 * network.norms  # a norm counts its batches besides
    evaluated = -(-optim.epochs // config.evaluate.every)
    metrics = _METRICS if _classifiers(config.model) > 1 else _METRICS - _OF_PAIRS
    values = evaluated * metrics + 2 * (optim.epochs - evaluated)  # all have a loss and a rate
    history = optim.epochs * _EPOCH_BYTES + values * _VALUE_BYTES
    return _NUMBER_BYTES * numbers + _FILE_BYTES + tensors * _TENSOR_BYTES + history


def logits_bytes(config: TrialConfig) -> int:
    """Bytes of a finished trial's logits, in half precision, with the labels of the images beside them."""
    data = DATASETS[config.data.dataset]
    images = validation_images(config.data) if config.evaluate.split == "validation" else data.test_images
    return images * (2 * _classifiers(config.model) * data.classes + 8) + 520
