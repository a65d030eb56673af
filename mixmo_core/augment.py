"""Crop, flip and normalise, batched on the device that holds the images: one gather, no loop over images.

Drawing and applying are apart: every worker of a trial draws for the whole batch and applies its own share, and a test
can hold `apply` to torchvision's transforms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a dataset's images reach the network: the reference's transforms, in its order."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    """Black pixels added on every side before the crop back to the original size."""
    flips: bool = True
    flips_first: bool = False
    """Flip, then crop; otherwise crop, then flip. The distribution is the same, the image of one draw is not."""


_CIFAR = Preparation(
    mean=(0.4913725490196078, 0.4823529411764706, 0.4466666666666667), std=(0.2023, 0.1994, 0.2010), pad=4
)
PREPARATION: dict[str, Preparation] = {
    "digits": Preparation(mean=(0.5,), std=(0.5,), pad=1, flips=False),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny_imagenet": Preparation(mean=(0.5,) * 3, std=(0.5,) * 3, pad=4, flips_first=True),
    "synthetic": Preparation(mean=(0.5,) * 3, std=(0.5,) * 3, pad=2),
}
"""The same mean and deviation for both CIFARs, as in the reference, although CIFAR-100's own differ a little."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decided for each image. The three tensors have the shape that was asked for."""

    rows: Tensor
    """int64 in 0 .. 2 pad: the crop's first row in the padded image. `pad` is the unmoved image."""
    columns: Tensor
    flips: Tensor
    """bool: mirrored left to right."""

    def __getitem__(self, index: Any) -> "Draws":
        """The draws of some of the images: `draws[:, rank::workers]`."""
        return Draws(self.rows[index], self.columns[index], self.flips[index])


def draw(dataset: str, shape: int | Sequence[int], generator: torch.Generator) -> Draws:
    """One draw for each image of a batch of this shape, on the generator's device."""
    spec = PREPARATION[dataset]
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    device = generator.device
    rows, columns = torch.randint(0, 2 * spec.pad + 1, (2, *size), generator=generator, device=device)
    flips = torch.rand(size, generator=generator, device=device) < (0.5 if spec.flips else 0.0)
    return Draws(rows, columns, flips)


def apply(pixels: Tensor, draws: Draws, dataset: str) -> Tensor:
    """Crops, flips and normalises `pixels` (..., C, H, W) uint8 -> float32. `draws` has the leading shape."""
    return normalise(crop(pixels, draws, dataset), dataset)


def crop(pixels: Tensor, draws: Draws, dataset: str) -> Tensor:
    """Crops and flips `pixels` (..., C, H, W). `draws` has the leading shape."""
    spec = PREPARATION[dataset]
    *leading, C, H, W = pixels.shape
    pixels_BCHW = pixels.reshape(-1, C, H, W)
    rows_B, columns_B, flips_B = (
        each.to(pixels.device, non_blocking=True).reshape(-1) for each in (draws.rows, draws.columns, draws.flips)
    )
    padded_width = W + 2 * spec.pad
    along_W = torch.arange(W, device=pixels.device)
    straight_BW = columns_B[:, None] + along_W
    # Padding is symmetric, so to flip and then crop is to read the padded row from its other end.
    mirrored_BW = padded_width - 1 - straight_BW if spec.flips_first else straight_BW.flip(-1)
    from_column_BW = torch.where(flips_B[:, None], mirrored_BW, straight_BW)
    from_row_BH = rows_B[:, None] + torch.arange(H, device=pixels.device)
    source_BN = (from_row_BH[:, :, None] * padded_width + from_column_BW[:, None, :]).reshape(-1, 1, H * W)
    padded_BCN = functional.pad(pixels_BCHW, (spec.pad,) * 4).flatten(2)
    return padded_BCN.gather(2, source_BN.expand(-1, C, -1)).reshape(*leading, C, H, W)


def standard(pixels: Tensor, dataset: str, generator: torch.Generator) -> Tensor:
    """A fresh random crop and, where a mirror image makes sense, flip of `pixels` (..., C, H, W), normalised."""
    return apply(pixels, draw(dataset, pixels.shape[:-3], generator), dataset)


def normalise(pixels: Tensor, dataset: str) -> Tensor:
    """`pixels` (..., C, H, W) uint8 -> float32: scaled to [0, 1], less the dataset's mean, over its deviation."""
    constants = _constants if torch.compiler.is_compiling() else _kept_constants  # what is traced is no tensor to keep
    mean_C11, std_C11 = constants(PREPARATION[dataset], pixels.device)
    return pixels.float().div_(255).sub_(mean_C11).div_(std_C11)


def _constants(spec: Preparation, device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.tensor((spec.mean, spec.std), dtype=torch.float32, device=device)[:, :, None, None]
    return both[0], both[1]


@cache
@torch.inference_mode(mode=False)
def _kept_constants(spec: Preparation, device: torch.device) -> tuple[Tensor, Tensor]:
    """For good: to bring numbers to a GPU is to wait for it, and what a captured step reads must not be freed."""
    return _constants(spec, device)
