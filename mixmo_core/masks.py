"""Masks for two images: of every pixel, and of every channel where they differ, the share of the first image.

`first_mask` draws them for all methods that mix exactly two images; the rectangles of CutMix, which mix more and pixels
too, are in `mixing`. The definitions are those of MixMo's reference implementation, which adapts each method to feature
maps, except for FMix, which it lacks. All slots of a batch are made at once, and nothing waits for the device.

Axes: B batch · C channels · H, W height and width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mixmo_core.config import PATCHUP_BLOCK

COW_COVERAGE = (0.2, 0.8)
"""CowMix: between these lies the share of the map that a mask is to cover, uniformly."""
COW_SIGMA = (4.0, 16.0)
"""CowMix: between these lies the deviation of the Gaussian, in pixels, uniformly in its logarithm."""
COW_REACH = 48
"""CowMix: the Gaussian is cut off at so many pixels, three times its largest deviation, whatever its own is."""
FMIX_DECAY = 3
"""FMix: the amplitude of a frequency f falls as 1 / f^3."""


def first_mask(method: str, kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Masks in fp32 on the generator's device, for maps of `shape` (C, H, W): (B, H, W), or (B, C, H, W) for the
    methods that treat every channel on its own (channel, channel_split, patchup_hard, patchup_soft). An axis along
    which all is alike has length 1.

    `kappa_B`, fp64, is the share that is asked for; few methods meet it, and cowmix does not ask. KeyError for a method
    that is not made of masks for two images.
    """
    return _DRAWS[method](kappa_B, shape, generator)


# ------------------------------------------------------------------------------------------------------------ CowMix


def cow(coverage_B: Tensor, sigma_B: Tensor, noise_BHW: Tensor) -> Tensor:
    """Spots like those of a cow, (B, H, W): where noise, smoothed by a Gaussian, is below a threshold.

    CowMix: French, Oliver, Salimans, "Milking CowMask for semi-supervised image classification", 2020. The threshold is
    the quantile of a normal distribution that has the mean and the deviation of the smoothed map itself. Both scale
    with the kernel, so how the kernel is normalised does not matter, and here it is not.
    """
    H, W = noise_BHW.shape[1:]
    smooth_BHW = _gaussians(sigma_B, H) @ noise_BHW @ _gaussians(sigma_B, W)
    std_B11, mean_B11 = torch.std_mean(smooth_BHW, dim=(1, 2), keepdim=True)
    below_B = math.sqrt(2) * torch.erfinv(2 * coverage_B - 1)
    return (smooth_BHW <= mean_B11 + below_B.view(-1, 1, 1) * std_B11).float()


def _gaussians(sigma_B: Tensor, size: int) -> Tensor:
    """Symmetric band matrices (B, size, size) that smooth a line of pixels, beyond whose ends lie zeros.

    A Gaussian in two dimensions is one along the columns, then one along the rows. The reference convolves with all
    97 x 97 taps, once for every channel, which takes it 30 to 230 ms a mask at 32 x 32 on a CPU core. This way it takes
    0.02 (benchmarks/results/masks.json).
    """
    place = torch.arange(size, device=sigma_B.device)
    distance = place.view(-1, 1) - place
    bands_BSS = torch.exp(-0.5 * (distance / sigma_B.view(-1, 1, 1)) ** 2)
    return bands_BSS.masked_fill(distance.abs() > COW_REACH, 0.0)


def _draw_cow(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    _, H, W = shape
    B = len(kappa_B)
    low, high = COW_COVERAGE
    coverage_B = low + (high - low) * _uniform(generator, B)
    narrow, wide = COW_SIGMA
    sigma_B = narrow * (wide / narrow) ** _uniform(generator, B)
    return cow(coverage_B, sigma_B, _normal(generator, B, H, W))


# -------------------------------------------------------------------------------------------------------------- FMix


def low_frequencies(noise_BHW2: Tensor) -> Tensor:
    """Smooth random images (B, H, W): the real part of a Fourier transform whose coefficients, complex normal numbers,
    are divided by frequency^3.

    FMix: Harris et al., "FMix: enhancing mixed sample data augmentation", 2020. Frequencies are in cycles per pixel;
    that of the constant part, which no threshold by rank sees, counts as the lowest other one. This is the paper's
    formula. The authors' code differs from it: one version takes rows of coefficients for real and imaginary parts,
    another has no imaginary parts.
    """
    H, W = noise_BHW2.shape[1:3]
    rows, cols = (torch.fft.fftfreq(size, device=noise_BHW2.device) for size in (H, W))
    frequency_HW = torch.hypot(rows.view(-1, 1), cols).clamp_min(1 / max(H, W))
    images_BHW: Tensor = torch.fft.ifft2(torch.view_as_complex(noise_BHW2) / frequency_HW**FMIX_DECAY).real
    return images_BHW


def largest(values_BHW: Tensor, count_B: Tensor) -> Tensor:
    """Masks (B, H, W): 1 where the count_B largest values of each slot are."""
    order_BP = values_BHW.flatten(1).argsort(dim=1, descending=True)
    chosen_BP = torch.arange(order_BP.shape[1], device=order_BP.device) < count_B.view(-1, 1)
    return torch.empty_like(values_BHW).flatten(1).scatter(1, order_BP, chosen_BP.float()).view_as(values_BHW)


def _draw_fmix(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The share kappa of the pixels, rounded up or down to a whole number of them by a fair coin, as the authors do."""
    _, H, W = shape
    B = len(kappa_B)
    images_BHW = low_frequencies(_normal(generator, B, H, W, 2))
    pixels_B = kappa_B * (H * W)
    return largest(images_BHW, torch.where(_coins(generator, B), pixels_B.ceil(), pixels_B.floor()))


# --------------------------------------------------------------------------------- horizontal, vertical, channel_split


def split(kappa_B: Tensor, flipped_B: Tensor, size: int) -> Tensor:
    """Masks (B, size) of one axis cut in two: 1 in the first int(kappa size) places, or, where flipped, in the last
    int((1 - kappa) size). So a flip also swaps whose share kappa is, as in the reference.
    """
    ones_B1 = (torch.where(flipped_B, 1 - kappa_B, kappa_B) * size).to(torch.int64).view(-1, 1)
    place = torch.arange(size, device=kappa_B.device)
    return torch.where(flipped_B.view(-1, 1), place >= size - ones_B1, place < ones_B1).float()


def _draw_split(kappa_B: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return split(kappa_B, _coins(generator, len(kappa_B)), size)


def _draw_rows(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return _draw_split(kappa_B, shape[1], generator)[:, :, None]


def _draw_columns(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return _draw_split(kappa_B, shape[2], generator)[:, None, :]


def _draw_channel_split(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return _draw_split(kappa_B, shape[0], generator)[:, :, None, None]


def _draw_channels(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Every channel belongs to the first image with probability kappa."""
    chosen_BC = _uniform(generator, len(kappa_B), shape[0]) < kappa_B.view(-1, 1)
    return chosen_BC.float()[:, :, None, None]


# ----------------------------------------------------------------------------------------------------------- PatchUp


def blocks(kappa_B: Tensor, uniform_BCHW: Tensor) -> Tensor:
    """Masks (B, C, H, W): 1 on the 7 x 7 blocks around seeds, which are where the uniform numbers fall below gamma.
    A block is a column of 7, each of whose places is then a row of 7.

    PatchUp: Faramarzi et al., 2020. gamma = kappa W^2 / (49 (W - 6)^2): kappa stands where PatchUp has a gamma of its
    own, so the blocks cover about, not exactly, the share kappa: 0.24, 0.49, 0.66 for 0.2, 0.5, 0.8 at 32 x 32.
    """
    W = uniform_BCHW.shape[-1]
    gamma_B = kappa_B * (W / (PATCHUP_BLOCK * (W - PATCHUP_BLOCK + 1))) ** 2
    seeds_BCHW = (uniform_BCHW < gamma_B.view(-1, 1, 1, 1)).float()
    reach = PATCHUP_BLOCK // 2
    tall_BCHW = functional.max_pool2d(seeds_BCHW, (PATCHUP_BLOCK, 1), stride=1, padding=(reach, 0))
    return functional.max_pool2d(tall_BCHW, (1, PATCHUP_BLOCK), stride=1, padding=(0, reach))


def soft(blocks_BCHW: Tensor, kappa_B: Tensor) -> Tensor:
    """Masks of soft PatchUp: 1 on the blocks, kappa outside."""
    return torch.where(blocks_BCHW > 0, blocks_BCHW, kappa_B.float().view(-1, 1, 1, 1))


def _draw_blocks(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Every channel has seeds of its own.

    The reference makes the same masks, then mixes all channels by that of the first, while its losses weigh by the mean
    of all: its kappa is not that of its features. Ours mixes each channel by its own mask, so that kappa is true. The
    same holds for soft PatchUp.
    """
    return blocks(kappa_B, _uniform(generator, len(kappa_B), *shape))


def _draw_shared_blocks(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return _draw_blocks(kappa_B, (1, *shape[1:]), generator)[:, 0]


def _draw_soft_blocks(kappa_B: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return soft(_draw_blocks(kappa_B, shape, generator), kappa_B)


# ------------------------------------------------------------------------------------------------------------ chance


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _coins(generator: torch.Generator, B: int) -> Tensor:
    return _uniform(generator, B) < 0.5


_DRAWS: dict[str, Callable[[Tensor, tuple[int, int, int], torch.Generator], Tensor]] = {
    "cowmix": _draw_cow,
    "fmix": _draw_fmix,
    "horizontal": _draw_rows,
    "vertical": _draw_columns,
    "channel": _draw_channels,
    "channel_split": _draw_channel_split,
    "patchup_hard": _draw_blocks,
    "patchup_hard_2d": _draw_shared_blocks,
    "patchup_soft": _draw_soft_blocks,
}
