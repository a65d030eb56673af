"""The mixing block: how much of each image (kappa), where (masks), the mix itself, and what each loss then weighs.

MixMo: Ramé, Sun, Cord, "MixMo: Mixing Multiple Inputs for Multiple Outputs via Deep Subnetworks", ICCV 2021.
Axes: B batch · M subnetworks · C channels · H, W height and width. Masks sum to 1 over M at every pixel.

Departures from the reference implementation, none of which its recorded outputs can show: masks stay in fp32 (it
rounds them to half precision, so its features are mixed by a kappa up to 2.4e-4 off the one its loss uses), draws come
from a generator that is passed in (its data loader's workers repeat each other's), and PatchUp mixes every channel by
its own mask (see `masks`). Its noise masks, which no configuration of it can use, are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixmo_core.config import MixingConfig
from mixmo_core.masks import first_mask


class Mixture(NamedTuple):
    """How one batch is mixed."""

    masks: Tensor
    """(M, B, H, W), or (M, B, C, H, W) for the methods that treat every channel on its own. Not to be written to:
    axes along which all is alike may share their memory."""
    kappa_MB: Tensor
    """The mean of each mask over all that it covers, which can be far from what was drawn."""

    def slots(self, which: slice) -> "Mixture":
        """Of some slots of the batch only, such as those of one worker."""
        return Mixture(self.masks[:, which], self.kappa_MB[:, which])


def mix(features_MBCHW: Tensor | Sequence[Tensor], masks: Tensor) -> Tensor:
    """M encoded images as one map, M * sum over m of mask_m * features_m, shape (B, C, H, W).

    The factor M restores the magnitude of a plain sum, which is what the core network gets in evaluation. `masks` is
    (M, B, H, W), or (M, B, C, H, W) where channels differ. The arithmetic is that of the masks (fp32), the result has
    the type of the features.
    """
    scaled = masks * len(masks)
    if scaled.dim() == 4:
        scaled = scaled.unsqueeze(2)
    mixed_BCHW = features_MBCHW[0] * scaled[0]
    for features_BCHW, mask in zip(features_MBCHW[1:], scaled[1:], strict=True):
        mixed_BCHW = torch.addcmul(mixed_BCHW, features_BCHW, mask)
    return mixed_BCHW.to(features_MBCHW[0].dtype)


def loss_weights(kappa_MB: Tensor, root: float) -> Tensor:
    """How much each subnetwork's loss counts: M * kappa^(1/r) / sum of kappa^(1/r). Sums to M for every slot.

    MixMo, section 3.3, with root r. The reference scales the targets by it, which gives the same gradient.
    """
    powered_MB = kappa_MB ** (1 / root)
    return len(kappa_MB) * powered_MB / powered_MB.sum(dim=0)


def probability(epoch: int, epochs: int, p: float) -> float:
    """Chance that a batch of this epoch (1 is the first) is mixed by binary masks.

    It is p, and falls linearly to 0 over the last twelfth of the training, so that the network ends on maps that look
    like the plain sums of evaluation.
    """
    done = epoch / epochs
    return p if done < 11 / 12 else p * (1 - done) / (1 - 11 / 12)


def box(height: int, width: int, lam: Tensor, centre_row: Tensor, centre_col: Tensor) -> tuple[Tensor, ...]:
    """Corners (row0, col0, row1, col1) of CutMix rectangles; rows row0 to row1 - 1 and columns likewise are inside.

    `lam`, float64 and of any shape, is the share of the map that a rectangle covers before it is clipped; the centres
    are integers in [0, height) and [0, width). CutMix: Yun et al., ICCV 2019, with the reference's truncations: a side
    of odd length loses one pixel.
    """
    side = lam.sqrt()
    half_rows = (height * side).to(torch.int64) // 2
    half_cols = (width * side).to(torch.int64) // 2
    return (
        (centre_row - half_rows).clamp(0, height),
        (centre_col - half_cols).clamp(0, width),
        (centre_row + half_rows).clamp(0, height),
        (centre_col + half_cols).clamp(0, width),
    )


def rectangles(height: int, width: int, lam_B: Tensor, centre_row_B: Tensor, centre_col_B: Tensor) -> Tensor:
    """Masks (B, height, width) in fp32: 1 inside the box of each slot, else 0."""
    row0, col0, row1, col1 = (corner.view(-1, 1) for corner in box(height, width, lam_B, centre_row_B, centre_col_B))
    rows, cols = (torch.arange(size, device=lam_B.device) for size in (height, width))
    inside_rows_BH = (rows >= row0) & (rows < row1)
    inside_cols_BW = (cols >= col0) & (cols < col1)
    return (inside_rows_BH.unsqueeze(2) & inside_cols_BW.unsqueeze(1)).float()


def linear_masks(kappa_MB: Tensor, height: int, width: int) -> Tensor:
    """Constant masks (M, B, height, width): every pixel is kappa_m of image m."""
    return kappa_MB.float()[..., None, None].expand(-1, -1, height, width)


def cutmix_masks(kappa_MB: Tensor, rectangles_BHW: Tensor) -> Tensor:
    """Masks (M, B, H, W): the rectangle is image 0; outside of it the others are mixed linearly.

    For M = 2 this is CutMix. For M > 2 images 1 to M - 1 share the outside in proportion to their kappa.
    """
    if len(kappa_MB) == 2:
        return torch.stack([rectangles_BHW, 1 - rectangles_BHW])
    rest_MB = kappa_MB[1:] / kappa_MB[1:].sum(dim=0)
    outside_MBHW = rest_MB.float()[..., None, None] * (1 - rectangles_BHW)
    return torch.cat([rectangles_BHW.unsqueeze(0), outside_MBHW])


def draw(  # noqa: PLR0917 -- the axes, in their order
    config: MixingConfig,
    M: int,
    B: int,
    C: int,
    H: int,
    W: int,
    *,
    p: float | Tensor,
    generator: torch.Generator,
    device: torch.device | str,
) -> Mixture:
    """Kappa and masks of a batch of encoded images, C maps of H x W each. Binary or linear, and who gets which role,
    are drawn once for the whole batch; kappa and the mask are drawn for each slot.

    `p` is the probability of the method's own masks in this epoch (see `probability`); linear ones are used otherwise.
    Nothing here waits for the device: both kinds of mask are made and one is chosen there. How many numbers are asked
    of the generator depends on the shapes alone. Masks are fp32, and sum to 1 over M at every pixel.
    """
    if M == 1 or config.method == "sum":
        kappa_MB = torch.full((M, B), 1 / M, device=device)
        return Mixture(linear_masks(kappa_MB, H, W), kappa_MB)
    drawn_MB = _draw_kappa(config.alpha, M, B, generator)
    masks, kappa_MB = linear_masks(drawn_MB, 1, 1), drawn_MB.float()
    if config.method != "linear":
        cut = _draw_cut(config.method, drawn_MB, (C, H, W), generator)
        binary = torch.rand((), generator=generator, device=generator.device) < p
        masks = torch.where(binary, cut, masks if cut.dim() == 4 else masks.unsqueeze(2))
        kappa_MB = torch.where(binary, cut.mean(dim=tuple(range(2, cut.dim()))), kappa_MB)
    roles = torch.rand(M, generator=generator, device=generator.device).argsort()
    shape = (M, B, H, W) if masks.dim() == 4 else (M, B, C, H, W)
    return Mixture(masks[roles].to(device).expand(shape), kappa_MB[roles].to(device))


def _draw_kappa(alpha: float, M: int, B: int, generator: torch.Generator) -> Tensor:
    """Mixing ratios (M, B) in fp64: each column from a symmetric Dirichlet, or 1 / M where alpha is 0."""
    if alpha == 0:
        return torch.full((M, B), 1 / M, dtype=torch.float64, device=generator.device)
    concentration = torch.full((B, M), alpha, dtype=torch.float64, device=generator.device)
    return torch._sample_dirichlet(concentration, generator=generator).T


def _draw_cut(method: str, kappa_MB: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The method's own masks, role 0 first: (M, B, H, W) or (M, B, C, H, W), with 1 for axes along which all is
    alike.
    """
    if method == "cutmix":
        return cutmix_masks(kappa_MB, _draw_rectangles(kappa_MB[0], *shape[1:], generator))
    assert len(kappa_MB) == 2, f"{method} mixes two images; the config refuses more"
    first = first_mask(method, kappa_MB[0], shape, generator)
    return torch.stack([first, 1 - first])


def _draw_rectangles(lam_B: Tensor, H: int, W: int, generator: torch.Generator) -> Tensor:
    rows_B, cols_B = (torch.randint(size, lam_B.shape, generator=generator, device=generator.device) for size in (H, W))
    return rectangles(H, W, lam_B, rows_B, cols_B)
