"""Masks for two images: each against its definition, against the reference's recorded masks, and in law.

The tests of chance have fixed seeds. `far` states how far from its expectation a mean may be: five standard errors, so
one true test in 1.7 million would fail under a seed of chance.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mixmo_core import masks
from mixmo_core.config import MixingMethod

METHODS = [method for method in get_args(MixingMethod) if method not in ("sum", "linear", "cutmix")]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(method: str, kappa: float, B: int, shape: tuple[int, int, int] = (16, 32, 32), seed: int = 0) -> Tensor:
    return masks.first_mask(method, torch.full((B,), kappa, dtype=torch.float64), shape, seeded(seed))


def shares(method: str, kappa: float, B: int, shape: tuple[int, int, int] = (16, 32, 32), seed: int = 0) -> Tensor:
    """What each of B masks covers, (B)."""
    return drawn(method, kappa, B, shape, seed).flatten(1).mean(dim=1)


def far(std: float, B: int) -> float:
    return 5 * std / math.sqrt(B)


sizes = st.integers(8, 64)
ratios = st.floats(0, 1)


# ------------------------------------------------------------------------------------------------------------ CowMix


@given(H=sizes, W=sizes, sigma=st.floats(4, 16), coverage=st.floats(0.2, 0.8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_a_cow_mask_is_that_of_the_whole_kernel(H: int, W: int, sigma: float, coverage: float, seed: int) -> None:
    """All 97 x 97 taps, normalised, in double precision, as the reference convolves."""
    noise_HW = torch.randn(H, W, generator=seeded(seed))
    taps = torch.arange(-48, 49, dtype=torch.float64)
    line = torch.exp(-(taps**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    smooth_HW = functional.conv2d(noise_HW.double()[None, None], torch.outer(line, line)[None, None], padding=48)[0, 0]
    quantile = NormalDist(float(smooth_HW.mean()), float(smooth_HW.std())).inv_cdf(coverage)
    mask_HW = masks.cow(torch.tensor([coverage]), torch.tensor([sigma]), noise_HW[None])[0]
    # A pixel whose value is the threshold's to single precision may fall on either side of it.
    clear_HW = (smooth_HW - quantile).abs() > 1e-4 * smooth_HW.std()
    assert torch.equal(mask_HW[clear_HW], (smooth_HW <= quantile).float()[clear_HW])
    assert int(clear_HW.sum()) > 0.9 * H * W


def test_slots_of_a_cow_batch_do_not_mix() -> None:
    coverage_B, sigma_B = torch.tensor([0.3, 0.7, 0.5]), torch.tensor([4.0, 16.0, 9.0])
    noise_BHW = torch.randn(3, 33, 20, generator=seeded(0))
    together_BHW = masks.cow(coverage_B, sigma_B, noise_BHW)
    for b in range(3):
        alone_HW = masks.cow(coverage_B[b : b + 1], sigma_B[b : b + 1], noise_BHW[b : b + 1])[0]
        assert float((together_BHW[b] != alone_HW).float().mean()) < 0.01


def test_cow_coverage_is_that_of_the_reference_whatever_kappa() -> None:
    """1,500 masks of the reference's definition at 32 x 32 had the mean 0.493, the deviation 0.158, and their 1st, 50th
    and 99th percentiles at 0.210, 0.488 and 0.785. Its estimates are good to 0.02, five of their standard errors.
    """
    for kappa in (0.1, 0.9):
        covered_B = shares("cowmix", kappa, 6000)
        assert float(covered_B.mean()) == pytest.approx(0.5, abs=far(0.158, 6000))  # noise has no sign
        assert float(covered_B.std()) == pytest.approx(0.158, abs=0.015)
        expected = torch.tensor([0.210, 0.5, 0.785])
        torch.testing.assert_close(covered_B.quantile(torch.tensor([0.01, 0.5, 0.99])), expected, rtol=0, atol=0.02)


# -------------------------------------------------------------------------------------------------------------- FMix


def test_fmix_frequencies_fall_with_their_cube() -> None:
    """The mean power of a frequency f is f^-6. Each mean is one of 2 x 4000 squared normals: its relative deviation is
    1/63, five of which are 0.08.
    """
    images_BHW = masks.low_frequencies(torch.randn(4000, 24, 33, 2, generator=seeded(1)))
    assert images_BHW.shape == (4000, 24, 33)
    power_HW = torch.fft.fft2(images_BHW.double()).abs().square().mean(dim=0)
    for row, column in ((1, 0), (0, 2), (3, 4), (-2, 5), (11, 16)):
        frequency = math.hypot(row / 24, column / 33)
        assert float(power_HW[row, column]) == pytest.approx(frequency**-6, rel=0.08), (row, column)


def test_fmix_images_are_no_smoother_one_way_than_the_other() -> None:
    power_HW = torch.fft.fft2(masks.low_frequencies(torch.randn(4000, 16, 16, 2, generator=seeded(2)))).abs() ** 2
    torch.testing.assert_close(power_HW.mean(0), power_HW.mean(0).T, rtol=0.16, atol=1e-3)  # two errors as above


@given(H=sizes, W=sizes, kappa=ratios, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_fmix_covers_kappa_up_to_one_pixel(H: int, W: int, kappa: float, seed: int) -> None:
    ones_B = drawn("fmix", kappa, 4, (1, H, W), seed).sum(dim=(1, 2))
    assert set(ones_B.tolist()) <= {math.floor(kappa * H * W), math.ceil(kappa * H * W)}


def test_fmix_rounds_up_as_often_as_down() -> None:
    ones_B = drawn("fmix", 0.3, 4000, (1, 9, 9), seed=3).sum(dim=(1, 2))  # 24.3 pixels
    assert float((ones_B == 25).float().mean()) == pytest.approx(0.5, abs=far(0.5, 4000))


@given(values=st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6, unique=True), count=st.integers(0, 6))
def test_the_largest_are_the_largest(values: list[float], count: int) -> None:
    mask_BHW = masks.largest(torch.tensor(values).view(1, 2, 3), torch.tensor([count]))
    chosen = {value for value, is_in in zip(values, mask_BHW.flatten().tolist(), strict=True) if is_in}
    assert chosen == set(sorted(values, reverse=True)[:count])


# ---------------------------------------------------------------------------------------------------- cuts of one axis


@given(size=sizes, kappa=ratios)
def test_an_axis_is_cut_as_the_reference_cuts_it(size: int, kappa: float) -> None:
    kappa_B = torch.full((2,), kappa, dtype=torch.float64)
    plain, flipped = masks.split(kappa_B, torch.tensor([False, True]), size).tolist()
    first, last = int(kappa * size), int((1 - kappa) * size)
    assert plain == [1.0] * first + [0.0] * (size - first)
    assert flipped == [0.0] * (size - last) + [1.0] * last


@pytest.mark.shared
@pytest.mark.parametrize(("method", "axis"), [("stackchannel", 0), ("stackhorizontal", 1), ("stackvertical", 2)])
def test_cuts_equal_the_reference(method: str, axis: int, golden: Callable[[str], Any]) -> None:
    recorded = golden("mixing_blocks_m2.npz")
    flips = set()
    for number in range(4):
        line = torch.from_numpy(recorded[f"{method}_{number}_mask0"]).movedim(axis, 0)
        assert bool((line == line[:, :1, :1]).all())
        kappa_B = torch.full((2,), float(recorded[f"{method}_{number}_kappa_requested"]), dtype=torch.float64)
        ours = masks.split(kappa_B, torch.tensor([False, True]), len(line))
        matching = [flipped for flipped in (0, 1) if torch.equal(ours[flipped], line[:, 0, 0])]
        assert matching
        flips.update(matching)
    assert flips == ({0, 1} if method == "stackchannel" else {0})  # what the recorded coins happen to show


@pytest.mark.parametrize(("method", "axis"), [("channel_split", 0), ("horizontal", 1), ("vertical", 2)])
def test_cuts_are_flipped_every_other_time(method: str, axis: int) -> None:
    shape = (5, 12, 9)
    masks_B = drawn(method, 0.7, 4000, shape)
    masks_BCHW = (masks_B if masks_B.dim() == 4 else masks_B.unsqueeze(1)).expand(4000, *shape)
    line_BS = masks_BCHW.movedim(axis + 1, 1)[:, :, 0, 0]
    assert torch.equal(
        masks_BCHW.movedim(axis + 1, 1), line_BS[:, :, None, None].expand_as(masks_BCHW.movedim(axis + 1, 1))
    )
    starts_B = line_BS[:, 0]
    assert float(starts_B.mean()) == pytest.approx(0.5, abs=far(0.5, 4000))
    # The share is int(kappa size) / size, or int((1 - kappa) size) / size where flipped.
    size = shape[axis]
    expected_B = torch.where(starts_B == 1, int(0.7 * size) / size, int((1 - 0.7) * size) / size)
    torch.testing.assert_close(line_BS.mean(dim=1), expected_B.float())


# ---------------------------------------------------------------------------------------------------------- channels


def test_the_number_of_chosen_channels_is_binomial() -> None:
    """Chi-squared over the counts of 16 channels, of which at most 13 are likely enough to count: it is above 50 in
    three of a million tests.
    """
    for kappa in (0.3, 0.5, 0.9):
        masks_BCHW = drawn("channel", kappa, 8000, seed=4)
        assert masks_BCHW.shape == (8000, 16, 1, 1)
        counts = torch.bincount(masks_BCHW.sum(dim=(1, 2, 3)).long(), minlength=17)
        expected = [8000 * math.comb(16, n) * kappa**n * (1 - kappa) ** (16 - n) for n in range(17)]
        cells = [(float(seen), mean) for seen, mean in zip(counts, expected, strict=True) if mean > 5]
        assert sum((seen - mean) ** 2 / mean for seen, mean in cells) < 50
        assert sum(seen for seen, _ in cells) > 0.99 * 8000


# ----------------------------------------------------------------------------------------------------------- PatchUp


def test_a_seed_makes_a_block_that_ends_at_the_border() -> None:
    uniform_BCHW = torch.ones(2, 2, 12, 10)
    uniform_BCHW[0, 0, 5, 4] = uniform_BCHW[1, 1, 0, 9] = 0
    blocks_BCHW = masks.blocks(torch.full((2,), 0.5, dtype=torch.float64), uniform_BCHW)
    expected_BCHW = torch.zeros(2, 2, 12, 10)
    expected_BCHW[0, 0, 2:9, 1:8] = expected_BCHW[1, 1, :4, 6:] = 1
    assert torch.equal(blocks_BCHW, expected_BCHW)


@pytest.mark.shared
@pytest.mark.parametrize("method", ["patchuphard", "patchuphard2d", "patchupsoft"])
def test_blocks_equal_the_reference(method: str, golden: Callable[[str], Any]) -> None:
    """Its masks are redrawn from seeds: every place whose whole block, as far as it is on the map, is covered."""
    recorded = golden("mixing_blocks_m2.npz")
    for number in range(4):
        mask_CHW = torch.from_numpy(recorded[f"{method}_{number}_mask0"])
        kappa_B = torch.tensor([float(recorded[f"{method}_{number}_kappa_requested"])], dtype=torch.float64)
        seeds_CHW = -functional.max_pool2d(-(mask_CHW == 1).float(), 7, stride=1, padding=3)
        ours_BCHW = masks.blocks(kappa_B, 1 - seeds_CHW[None])
        if method == "patchupsoft":
            ours_BCHW = masks.soft(ours_BCHW, kappa_B)
        torch.testing.assert_close(ours_BCHW[0], mask_CHW, rtol=0, atol=1e-6)
        assert bool((mask_CHW == mask_CHW[:1]).all()) == (method == "patchuphard2d")


@pytest.mark.parametrize(("kappa", "recorded"), [(0.2, 0.24), (0.5, 0.49), (0.8, 0.66)])
@pytest.mark.parametrize("method", ["patchup_hard", "patchup_hard_2d"])
def test_blocks_cover_what_they_cover_in_the_reference(method: str, kappa: float, recorded: float) -> None:
    """Recorded to two digits at 32 x 32; the exact mean is that of 1 - (1 - gamma)^n over places with n seeds near."""
    near_HW = functional.avg_pool2d(torch.ones(1, 1, 32, 32, dtype=torch.float64), 7, stride=1, padding=3)[0, 0] * 49
    gamma = kappa * 32**2 / (49 * 26**2)
    exact = float((1 - (1 - gamma) ** near_HW).mean())
    assert exact == pytest.approx(recorded, abs=0.0051)
    covered_B = shares(method, kappa, 1500, (4, 32, 32), seed=5)
    assert float(covered_B.mean()) == pytest.approx(exact, abs=far(float(covered_B.std()), 1500))


def test_soft_blocks_are_hard_blocks_over_kappa() -> None:
    soft_BCHW, hard_BCHW = (drawn(method, 0.3, 20, seed=6) for method in ("patchup_soft", "patchup_hard"))
    torch.testing.assert_close(soft_BCHW, hard_BCHW + (1 - hard_BCHW) * 0.3)


def test_only_the_hard_2d_blocks_are_alike_in_all_channels() -> None:
    assert drawn("patchup_hard_2d", 0.5, 3).shape == (3, 32, 32)
    for method in ("patchup_hard", "patchup_soft"):
        masks_BCHW = drawn(method, 0.5, 3)
        assert masks_BCHW.shape == (3, 16, 32, 32)
        assert len({tuple(each) for each in masks_BCHW.view(3 * 16, -1).tolist()}) == 3 * 16


# ------------------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
def test_how_many_numbers_are_drawn_depends_on_shapes_alone(method: str) -> None:
    """The generator is left in the same state whatever kappa is."""
    states = []
    for kappa in (0.0, 0.37, 1.0):
        generator = seeded(7)
        masks.first_mask(method, torch.full((5,), kappa, dtype=torch.float64), (4, 16, 9), generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("method", METHODS)
def test_every_slot_has_a_mask_of_its_own(method: str) -> None:
    """Two of six cuts of 16 rows may agree, never all."""
    kappa_B = torch.linspace(0.3, 0.7, 6, dtype=torch.float64)
    masks_B = masks.first_mask(method, kappa_B, (16, 16, 16), seeded(8))
    assert len(masks_B) == 6
    assert len({tuple(each) for each in masks_B.flatten(1).tolist()}) > 2
