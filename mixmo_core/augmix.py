"""AugMix, batched on the device: an image is blended with a weighted mean of chains of operations on it.

Hendrycks et al., ICLR 2020, as MixMo's reference implementation has it: three chains, no term in the loss that holds
the predictions together, and the list of operations below at one fixed strength. Each operation equals the Python
imaging library's on 8-bit images, to the bit. They are of two kinds, and so one stage does any of them for all images
and chains at once: a table of 256 values for the colours, then a gather of pixels along an affine map.

Axes: P images · W chains · D operations of a chain · C channels · H, W height and width, N pixels.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixmo_core import augment

CHAINS = 3
LONGEST = 4
"""A chain has 1 to 4 operations: the reference draws both ends, AugMix's authors 1 to 3."""
STRENGTH = 3 / 30
"""How far an operation goes from the least to the most it may do."""
OPERATIONS: dict[str, tuple[float, float]] = {
    "identity": (0, 1),
    "equalize": (0, 1),
    "posterize": (4, 8),
    "rotate": (0, 30),
    "solarize": (0, 256),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 0.45),
    "translate_y": (0, 0.45),
    "invert": (0, 1),
}
"""The least and the most: bits that stay, degrees, threshold, slope, and part of the image's size."""
_NAMES = tuple(OPERATIONS)
_EQUALIZE = _NAMES.index("equalize")


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decided for each image: the leading shape is what was asked for."""

    operations: Tensor
    """int64 (..., W, D): positions in OPERATIONS, those of the other direction len(OPERATIONS) later."""
    weights: Tensor
    """float32 (..., W): the share of each chain."""
    blend: Tensor
    """float32 (...): the share of all chains; the image itself has the rest."""

    def __getitem__(self, index: Any) -> "Draws":
        """The draws of some of the images: `draws[:, rank::workers]`."""
        return Draws(self.operations[index], self.weights[index], self.blend[index])


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Draws:
    """One draw for each image of a batch of this shape, on the generator's device.

    Lengths, operations and directions are uniform; the weights are from Dirichlet(1, 1, 1), the blend from Beta(1, 1).
    """
    device, kinds = generator.device, len(OPERATIONS)
    lengths = torch.randint(1, LONGEST + 1, (*shape, CHAINS, 1), generator=generator, device=device)
    operations = torch.randint(2 * kinds, (*shape, CHAINS, LONGEST), generator=generator, device=device)
    left_out = torch.arange(LONGEST, device=device) >= lengths
    weights = torch.empty((*shape, CHAINS), device=device).exponential_(generator=generator)
    blend = torch.rand(shape, generator=generator, device=device)
    return Draws(operations.masked_fill(left_out, 0), weights / weights.sum(dim=-1, keepdim=True), blend)


def of_repeats(draws: Draws, indices_MB: Tensor) -> Draws:
    """The draws (M, B) with those of an image's first slot for all its slots, within each subnetwork.

    So the repeats of an image in a batch differ in crop and flip only, as in the reference.
    """
    same_MBB = indices_MB.unsqueeze(2) == indices_MB.unsqueeze(1)
    first_MB = same_MBB.int().argmax(dim=2)
    return draws[torch.arange(len(indices_MB), device=indices_MB.device).unsqueeze(1), first_MB]


def apply(pixels: Tensor, draws: Draws, dataset: str) -> Tensor:
    """AugMix of cropped and flipped `pixels` (..., C, S, S) uint8, normalised -> float32. `draws` has the leading
    shape.

    Every chain is normalised before it counts. Since the shares of an image sum to 1, that is the same as later.
    """
    *leading, C, S, _ = pixels.shape
    chains_PCSS = pixels.long().unsqueeze(-4).expand(*leading, CHAINS, C, S, S).reshape(-1, C, S, S)
    for operations_P in draws.operations.flatten(0, -2).unbind(-1):
        chains_PCSS = operate(chains_PCSS, operations_P)
    chains = augment.normalise(chains_PCSS.view(*leading, CHAINS, C, S, S), dataset)
    shares = (draws.weights * draws.blend.unsqueeze(-1))[..., None, None, None]
    itself = (1 - draws.blend)[..., None, None, None] * augment.normalise(pixels, dataset)
    return itself + (shares * chains).sum(dim=-4)


def operate(pixels_PCHW: Tensor, operations_P: Tensor) -> Tensor:
    """One operation on each of the images, which are as high as wide, their pixels 0 to 255 in int64: pixels look up
    colours, and indices are int64. `operations_P` is as in `Draws`.
    """
    _, C, _, S = pixels_PCHW.shape
    device = pixels_PCHW.device
    pixels_PCN = pixels_PCHW.flatten(2)
    equal_P11 = (operations_P % len(OPERATIONS) == _EQUALIZE)[:, None, None]
    tables_PCV = torch.where(equal_P11, _equalising(pixels_PCN), _tables(device)[operations_P].unsqueeze(1))
    coloured_PCN = tables_PCV.gather(2, pixels_PCN)
    from_x, x_by_x, x_by_y, from_y, y_by_x, y_by_y = _maps(S, device)[operations_P][..., None, None].unbind(1)
    along = torch.arange(S, dtype=torch.int32, device=device)
    x_PHW = (from_x + x_by_x * along + x_by_y * along.unsqueeze(1)) >> 16
    y_PHW = (from_y + y_by_x * along + y_by_y * along.unsqueeze(1)) >> 16
    inside_PHW = (x_PHW >= 0) & (x_PHW < S) & (y_PHW >= 0) & (y_PHW < S)
    source_P1N = (y_PHW.clamp(0, S - 1) * S + x_PHW.clamp(0, S - 1)).long().flatten(1).unsqueeze(1)
    moved_PCN = coloured_PCN.gather(2, source_P1N.expand(-1, C, -1))
    return moved_PCN.masked_fill_(~inside_PHW.flatten(1).unsqueeze(1), 0).view_as(pixels_PCHW)


def _equalising(pixels_PCN: Tensor) -> Tensor:
    """The table (P, C, 256) that makes each channel's histogram even, by the imaging library's integer rule: a step is
    a 255th of the pixels without those of the lightest colour. Where that is no pixel, nothing changes.
    """
    counts_PCV = pixels_PCN.new_zeros((*pixels_PCN.shape[:2], 256))
    counts_PCV.scatter_add_(2, pixels_PCN, pixels_PCN.new_ones(()).expand_as(pixels_PCN))
    values_V = torch.arange(256, device=pixels_PCN.device)
    lightest_PC1 = counts_PCV.gather(2, ((counts_PCV > 0) * values_V).argmax(dim=2, keepdim=True))
    step_PC1 = (pixels_PCN.shape[2] - lightest_PC1) // 255
    below_PCV = counts_PCV.cumsum(dim=2) - counts_PCV
    table_PCV = ((step_PC1 // 2 + below_PCV) // step_PC1.clamp(min=1)).clamp(max=255)
    return torch.where(step_PC1 > 0, table_PCV, values_V)


@cache  # for good: what a captured step reads must not be freed
def _tables(device: torch.device) -> Tensor:
    """What each operation makes of each of the 256 values, int64 (2 len(OPERATIONS), 256). Equalize depends on the
    image and is not in it.
    """
    threshold, bits = _strength("solarize"), int(_strength("posterize"))
    tables = {
        "posterize": [value & -(1 << 8 - bits) for value in range(256)],
        "solarize": [value if value < threshold else 255 - value for value in range(256)],
        "invert": [255 - value for value in range(256)],
    }
    return torch.tensor([tables.get(name, list(range(256))) for name in _NAMES * 2], device=device)


@cache
def _maps(size: int, device: torch.device) -> Tensor:
    """From where each operation takes the pixel at (x, y), in units of 2^-16 pixels, int32 (2 len(OPERATIONS), 6).

    The x of the source at (0, 0), its growth with x and with y, then the same of its y. Pixels are met in their
    centres and the result is rounded down: the nearest pixel. Outside of the image it is black.
    """
    rows = []
    for direction in (1, -1):
        for name in _NAMES:
            a, b, c, d, e, f = _affine(name, direction * _strength(name), size)
            rows.append([_fixed(value) for value in (c + a / 2 + b / 2, a, b, f + d / 2 + e / 2, d, e)])
    return torch.tensor(rows, dtype=torch.int32, device=device)  # enough for images of 4,096 pixels


def _fixed(value: float) -> int:
    return math.floor(value * 65536 + 0.5)


def _strength(name: str) -> float:
    least, most = OPERATIONS[name]
    return least + STRENGTH * (most - least)


def _affine(name: str, value: float, size: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    if name == "rotate":
        cos, sin, middle = math.cos(math.radians(value)), math.sin(math.radians(value)), size / 2
        return cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - cos - sin)
    shifts = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * size, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * size),
    }
    return shifts.get(name, (1, 0, 0, 0, 1, 0))
