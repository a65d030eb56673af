"""The masks of a sweep's mixing blocks, and images that they mix: what `figures` draws as a gallery. Loads torch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mixmo_core import data
from mixmo_core.config import DATASETS, TrialConfig, map_size
from mixmo_core.mixing import draw, mix
from orchestrator.rows import TrialRow, config_of
from orchestrator.studies import Sample

DRAWS = 5
MOST = 8
"""Mixing blocks of one gallery."""


def samples(rows: Sequence[TrialRow], folder: Path | None = None) -> list[Sample]:
    """A sample of each mixing block among some trials, in the order of the sweep; none where all trials have one
    subnetwork.

    The images are the first test images of different classes, read from `folder` where the dataset needs files. Where
    they are not to be had, made ones stand for them.
    """
    blocks: dict[tuple[str, int, float, int], TrialConfig] = {}
    for row in sorted(rows, key=lambda row: row.position):
        if (row.config.get("model_subnetworks") or 1) > 1:
            config = config_of(row)
            kind = (config.mixing.method, config.model.subnetworks, config.mixing.alpha, map_size(config))
            blocks.setdefault(kind, config)
    alphas = {alpha for _, _, alpha, _ in blocks}
    return [_sample(config, folder, tells_alpha=len(alphas) > 1) for config in list(blocks.values())[:MOST]]


def _sample(config: TrialConfig, folder: Path | None, *, tells_alpha: bool) -> Sample:
    M, size = config.model.subnetworks, map_size(config)
    images_MCHW, is_made = _images(config, folder)
    images_MCHW = functional.adaptive_avg_pool2d(images_MCHW, size)
    C = images_MCHW.shape[1]
    generator = torch.Generator().manual_seed(0)
    mixture = draw(config.mixing, M, DRAWS, C, size, size, p=1.0, generator=generator, device="cpu")
    mixed_BCHW = mix(images_MCHW.unsqueeze(1).expand(-1, DRAWS, -1, -1, -1), mixture.masks) / M
    masks = mixture.masks if mixture.masks.dim() == 5 else mixture.masks.unsqueeze(2)
    shades_M = torch.linspace(1, 0, M)
    alpha = f", alpha {config.mixing.alpha:g}" if tells_alpha else ""
    return Sample(
        name=f"{config.mixing.method}, {M} images{alpha}",
        images_MHWC=_channels_last(images_MCHW).numpy(),
        masks_DHWC=_channels_last((masks * shades_M.view(M, 1, 1, 1, 1)).sum(dim=0)).numpy(),
        mixed_DHWC=_channels_last(mixed_BCHW).clamp(0, 1).numpy(),
        kappas=tuple(tuple(kappa_M) for kappa_M in mixture.kappa_MB.T.tolist()),
        is_made=is_made,
    )


def _channels_last(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.permute(0, 2, 3, 1).contiguous()


def _images(config: TrialConfig, folder: Path | None) -> tuple[Tensor, bool]:
    """M images (M, C, H, W) in [0, 1] of different classes, as far as there are so many; whether they are made up."""
    M, shape = config.model.subnetworks, DATASETS[config.data.dataset]
    try:
        _, test = data.load(config.data, folder=folder)
    except data.DatasetError:
        return torch.stack([_made(m, shape.channels, shape.size) for m in range(M)]), True
    labels = test.labels_N.tolist()
    firsts = [labels.index(label) for label in dict.fromkeys(labels)]
    return test.pixels_NCHW[[firsts[m % len(firsts)] for m in range(M)]] / 255, False


def _made(number: int, channels: int, size: int) -> Tensor:
    """A picture unlike those of other numbers: a disc, stripes, squares, a slope, each in a colour of its own."""
    place = (torch.arange(size) + 0.5) / size
    y, x = place.view(-1, 1), place.view(1, -1)
    disc = 1 - (8 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)).clamp(0, 1)
    stripes = 0.5 + 0.5 * torch.sin(4 * torch.pi * (x + y))
    squares = ((4 * x).floor() + (4 * y).floor()) % 2
    shape_HW = (disc, stripes, squares, y)[number % 4].expand(size, size)
    colours = torch.tensor([[0.2, 0.5, 1.0], [1.0, 0.6, 0.1], [0.3, 0.9, 0.4], [0.9, 0.4, 0.8]])[number % 4, :channels]
    return (0.15 + 0.85 * shape_HW) * colours.view(-1, 1, 1)
