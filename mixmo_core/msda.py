"""Mixed-sample augmentation of pixels, before the encoders: Mixup, CutMix and ResizeMix, batched on the device.

Each image, for itself, is mixed with a random image of the whole training set or left as it is. Inside MixMo an encoder
then reads an image with two labels, and the mixing block hides a part of it: the labels follow what is left to see.

Axes: B batch · M subnetworks · C channels · H, W height and width. A pixel mask (M, B, H, W) is the share of an image's
own pixel; the partner has the rest. The last axis of shares and labels, L, is the image's own, then the partner's.

Mixup: Zhang et al., ICLR 2018. CutMix: Yun et al., ICCV 2019. ResizeMix: Qin et al., arXiv 2012.11101. Departure from
the reference implementation: masks of the mixing block are read in fp32, where it rounds them to half precision
(for maps of half the image's size it even divides in it, so that a hidden image's labels are no numbers).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mixmo_core import mixing
from mixmo_core.config import DATASETS, DataConfig

RESIZEMIX_SIDES = (0.1, 0.8)
"""What ResizeMix makes of a partner's height and width, at least and at most. The bounds of its authors."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decided for each image: tensors (M, B) on the generator's device."""

    mixed: Tensor
    """bool: whether it is mixed at all."""
    partners: Tensor
    """int64: the position of the other image among those of the training."""
    rows: Tensor
    """int64: the centre of the box."""
    columns: Tensor
    lam: Tensor
    """float64: share of the image itself; for ResizeMix, of the area that is pasted over it."""

    def __getitem__(self, index: tuple[slice, slice]) -> "Draws":
        return Draws(*(each[index] for each in (self.mixed, self.partners, self.rows, self.columns, self.lam)))


class Mixed(NamedTuple):
    """Pixel masks, and the labels' shares that belong to them."""

    masks_MBHW: Tensor
    shares_MBL: Tensor


def draw(config: DataConfig, images: int, shape: tuple[int, int], generator: torch.Generator) -> Draws:
    """Draws for a batch of this shape (M, B). `images` is how many there are to be partners.

    `msda_probability` of the images are mixed. Their ratio is from Beta(`msda_alpha`, `msda_alpha`); ResizeMix draws
    the side of what is pasted from a uniform distribution instead.
    """
    device, size = generator.device, DATASETS[config.dataset].size
    mixed_MB = torch.rand(shape, generator=generator, device=device) < config.msda_probability
    partners_MB = torch.randint(images, shape, generator=generator, device=device)
    rows_MB, columns_MB = torch.randint(size, (2, *shape), generator=generator, device=device)
    if config.msda == "resizemix":
        least, most = RESIZEMIX_SIDES
        uniform_MB = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        lam_MB = (least + (most - least) * uniform_MB).square()
    else:
        lam_MB = beta(config.msda_alpha, shape, generator)
    return Draws(mixed_MB, partners_MB, rows_MB, columns_MB, lam_MB)


def beta(alpha: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws of this shape from Beta(alpha, alpha), in fp64."""
    concentration = torch.full((*shape, 2), alpha, dtype=torch.float64, device=generator.device)
    return torch._sample_dirichlet(concentration, generator=generator)[..., 0]


def mix(images_MBCHW: Tensor, partners_MBCHW: Tensor, draws: Draws, seen: Tensor, msda: str) -> tuple[Tensor, Tensor]:
    """The mixed images, and the shares (M, B, L) of their labels.

    Images and partners are normalised; `seen` are the masks of the mixing block (see `settled`). ResizeMix keeps the
    roles as they are drawn: its partner is a small whole image, which the rest around it cannot be.
    """
    if msda == "resizemix":
        partners_MBCHW = _pasted(partners_MBCHW, draws)
    masks_MBHW = pixel_masks(draws, images_MBCHW.shape[-1], msda)
    masks_MBHW, shares_MBL = settled(masks_MBHW, seen, keep_main=msda != "resizemix")
    masks_MB1HW = masks_MBHW.masked_fill(~draws.mixed[..., None, None], 1.0).unsqueeze(2)
    whole_L = torch.eye(2, device=shares_MBL.device)[0]
    shares_MBL = torch.where(draws.mixed[..., None], shares_MBL, whole_L)
    return masks_MB1HW * images_MBCHW + (1 - masks_MB1HW) * partners_MBCHW, shares_MBL


def pixel_masks(draws: Draws, size: int, msda: str) -> Tensor:
    """The share of each image's own pixels (M, B, size, size) as it was drawn, whether the image is mixed or not.

    Mixup: constant. CutMix: the image itself is inside the box, as in the reference. ResizeMix: it is outside.
    """
    if msda == "mixup":
        return draws.lam.float()[..., None, None].expand(-1, -1, size, size)
    flat = (each.flatten() for each in (draws.lam, draws.rows, draws.columns))
    boxes_MBHW = mixing.rectangles(size, size, *flat).view(*draws.lam.shape, size, size)
    return boxes_MBHW if msda == "cutmix" else 1 - boxes_MBHW


def settled(masks_MBHW: Tensor, seen: Tensor, *, keep_main: bool) -> Mixed:
    """The pixel masks that are used, and the shares of the two labels.

    A single network's shares are the mean of the mask and the rest. Inside MixMo they are parts of what the mixing
    block leaves to be seen of the mixed image, `seen` (M, B, h, w) being its masks, at the size of the image or half of
    it: then the pixel mask is averaged over 2x2. Where that makes the image itself less than half of what is seen and
    `keep_main` holds, the two change places, masks and shares. An image that is hidden altogether has shares of 0 (its
    loss has a weight of 0) except at half size.

    The reference's rules, `call_msda` in its loader. Where masks differ by channel, `seen` (M, B, C, h, w), the mean
    over the channels is meant; the reference takes the first channel, which may be hidden where the image is not.
    """
    if len(masks_MBHW) == 1:
        own_MB = masks_MBHW.mean(dim=(2, 3))
        return Mixed(masks_MBHW, torch.stack([own_MB, 1 - own_MB], dim=2))
    seen_MBHW = seen.mean(dim=2) if seen.dim() == 5 else seen
    visible_MB = seen_MBHW.mean(dim=(2, 3)) + 1e-8
    if seen_MBHW.shape[2:] == masks_MBHW.shape[2:]:
        parts = (masks_MBHW * seen_MBHW, (1 - masks_MBHW) * seen_MBHW)
        shares_MBL = torch.stack([part.mean(dim=(2, 3)) / visible_MB for part in parts], dim=2)
    else:
        own_MB = (functional.avg_pool2d(masks_MBHW, 2) * seen_MBHW).mean(dim=(2, 3)) / visible_MB
        shares_MBL = torch.stack([own_MB, 1 - own_MB], dim=2)
    if not keep_main:
        return Mixed(masks_MBHW, shares_MBL)
    swapped_MB1 = shares_MBL[..., :1] < 0.5
    return Mixed(
        torch.where(swapped_MB1.unsqueeze(3), 1 - masks_MBHW, masks_MBHW),
        torch.where(swapped_MB1, shares_MBL.flip(2), shares_MBL),
    )


def _pasted(images_MBCHW: Tensor, draws: Draws) -> Tensor:
    """Each image resized into its box, which is cut off at the border like CutMix's; outside of it anything.

    Bilinear between the nearest pixels, as `interpolate` does it. One resampling for the batch: a box's size is data.
    """
    H, W = images_MBCHW.shape[3:]
    flat = (each.flatten() for each in (draws.lam, draws.rows, draws.columns))
    row0_N, col0_N, row1_N, col1_N = mixing.box(H, W, *flat)
    along = []
    for size, start_N, end_N in ((H, row0_N, row1_N), (W, col0_N, col1_N)):
        length_N1 = (end_N - start_N).clamp(min=1).unsqueeze(1)  # an empty box shows nothing of what is read
        inside_NS = torch.arange(size, device=start_N.device) + 0.5 - start_N.unsqueeze(1)
        along.append(2 * inside_NS / length_N1 - 1)
    rows_NH, columns_NW = along
    grid = torch.stack(
        [columns_NW.unsqueeze(1).expand(-1, H, -1), rows_NH.unsqueeze(2).expand(-1, -1, W)], dim=3
    )  # (N, H, W, 2): x, then y, from -1 to 1 over the partner
    resized_NCHW = functional.grid_sample(images_MBCHW.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return resized_NCHW.view_as(images_MBCHW)
