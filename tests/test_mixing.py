"""Kappa, masks, mix and loss weights: their laws, and the numbers of the reference implementation."""

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmo_core import mixing
from mixmo_core.config import MixingConfig, MixingMethod

OF_ANY_NUMBER: tuple[MixingMethod, ...] = ("sum", "linear", "cutmix")
METHODS: tuple[MixingMethod, ...] = get_args(MixingMethod)
PER_CHANNEL = ("channel", "channel_split", "patchup_hard", "patchup_soft")


def tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values))


def draw(
    method: MixingMethod,
    M: int,
    B: int,
    shape: tuple[int, int, int] = (3, 16, 16),
    *,
    p: float = 0.5,
    seed: int = 0,
    alpha: float = 2.0,
) -> mixing.Mixture:
    generator = torch.Generator().manual_seed(seed)
    config = MixingConfig(method=method, alpha=alpha)
    return mixing.draw(config, M, B, *shape, p=p, generator=generator, device="cpu")


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.shared
def test_boxes_equal_the_reference(golden: Callable[[str], Any]) -> None:
    rows = golden("cutmix_boxes.npz")["rows"]
    for height, width in {(int(row[0]), int(row[1])) for row in rows}:
        here = tensor(rows[(rows[:, 0] == height) & (rows[:, 1] == width)])
        centres = here[:, 3].long(), here[:, 4].long()
        corners = torch.stack(mixing.box(height, width, here[:, 2], *centres), dim=1)
        assert torch.equal(corners, here[:, 5:9].long())
        masks_BHW = mixing.rectangles(height, width, here[:, 2], *centres)
        torch.testing.assert_close(masks_BHW.mean(dim=(1, 2)).double(), here[:, 9], rtol=0, atol=1e-6)


@pytest.mark.shared
def test_realised_kappa_is_distributed_as_the_reference(golden: Callable[[str], Any]) -> None:
    """Clipping takes Beta(2, 2) far off: the mean area of a box is 0.307, not 0.5."""
    mean, realised, std, empty, below_half, largest = golden("cutmix_kappa_distribution.npz")["summary"]
    mixture = draw("cutmix", 2, 20_000, (1, 32, 32), p=1, seed=3)
    kappa_B = mixture.kappa_MB[mixture.kappa_MB.mean(dim=1).argmin()]  # of the role that has the box
    assert float(kappa_B.mean()) == pytest.approx(realised, abs=5 * std / math.sqrt(20_000))
    assert float(kappa_B.std()) == pytest.approx(std, abs=0.005)
    assert float((kappa_B < 0.5).float().mean()) == pytest.approx(below_half, abs=0.012)
    assert float((kappa_B == 0).float().mean()) == pytest.approx(empty, abs=5e-4)
    assert float(kappa_B.max()) == pytest.approx(largest, abs=0.05)
    assert mean == pytest.approx(0.5, abs=0.01)


@pytest.mark.shared
def test_mixes_of_two_equal_the_reference(golden: Callable[[str], Any]) -> None:
    """With injected masks, also those of its noise, which no trial can have."""
    recorded = golden("mixing_blocks_m2.npz")
    features_MBCHW = torch.stack([tensor(recorded["l0"]), tensor(recorded["l1"])])
    for name in recorded["names"].tolist():
        mask = tensor(recorded[f"{name}_mask0"]).float()
        masks_MBCHW = torch.stack([mask, 1 - mask]).unsqueeze(1).expand(-1, 3, -1, -1, -1)
        torch.testing.assert_close(
            mixing.mix(features_MBCHW, masks_MBCHW), tensor(recorded[f"{name}_out"]), rtol=1e-6, atol=1e-6
        )
        if bool((mask == mask[:1]).all()):  # one map for all channels
            torch.testing.assert_close(
                mixing.mix(features_MBCHW, masks_MBCHW[:, :, 0]), tensor(recorded[f"{name}_out"]), rtol=1e-6, atol=1e-6
            )
        assert float(mask.mean()) == pytest.approx(float(recorded[f"{name}_kappa_used"]), abs=1e-6)
    assert len(recorded["names"]) == 44


@pytest.mark.shared
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_masks_and_mixes_of_three_equal_the_reference(method: str, number: int, golden: Callable[[str], Any]) -> None:
    recorded, name = golden("mixing_blocks_mN.npz"), f"M3_{method}_{number}"
    expected_MHW = tensor(recorded[f"{name}_masks"])[:, 0]
    kappa_MB = tensor(recorded[f"{name}_kappa_requested"]).view(3, 1).expand(-1, 2)
    if method == "mixup":
        masks_MBHW = mixing.linear_masks(kappa_MB, 16, 16)
    else:
        # Which role has the rectangle was shuffled after the draw: it is the one that holds only 0 and 1.
        first = next(m for m in range(3) if bool(((expected_MHW[m] == 0) | (expected_MHW[m] == 1)).all()))
        order = [first, *(m for m in range(3) if m != first)]
        rectangle_BHW = expected_MHW[first].expand(2, -1, -1)
        candidates = [mixing.cutmix_masks(kappa_MB[list(roles)], rectangle_BHW) for roles in permutations(range(3))]
        in_order = expected_MHW[order].unsqueeze(1)
        best = min(candidates, key=lambda masks: float((masks - in_order).abs().max()))
        masks_MBHW = torch.empty_like(best)
        masks_MBHW[order] = best
    torch.testing.assert_close(masks_MBHW, expected_MHW.unsqueeze(1).expand(-1, 2, -1, -1), rtol=1e-6, atol=1e-6)
    used_M = tensor(recorded[f"{name}_kappa_used"])
    torch.testing.assert_close(masks_MBHW.mean(dim=(2, 3))[:, 0].double(), used_M, rtol=1e-5, atol=1e-6)
    mixed_BCHW = mixing.mix(tensor(recorded["M3_l"]), masks_MBHW)
    torch.testing.assert_close(mixed_BCHW, tensor(recorded[f"{name}_out"]), rtol=1e-5, atol=1e-5)


@pytest.mark.shared
def test_loss_weights_equal_the_reference(golden: Callable[[str], Any]) -> None:
    recorded = golden("loss_weights.npz")
    kappa_B = tensor(recorded["kappa"])
    pairs_MB = torch.stack([kappa_B, 1 - kappa_B])
    for number, root in enumerate(recorded["r"].tolist()):
        for kappa_MB, expected_BM in (
            (pairs_MB, recorded["w_m2"][number]),
            (tensor(recorded["kappa_m3"]).T, recorded["w_m3"][number]),
            (tensor(recorded["kappa_m4"]).T, recorded["w_m4"][number]),
        ):
            torch.testing.assert_close(mixing.loss_weights(kappa_MB, root), tensor(expected_BM).T, rtol=1e-6, atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("epochs", [200, 300, 1200])
@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_probability_equals_the_reference(epochs: int, p: float, golden: Callable[[str], Any]) -> None:
    ours = [mixing.probability(epoch, epochs, p) for epoch in range(1, epochs + 1)]
    np.testing.assert_allclose(ours, golden("p_schedule.npz")[f"E{epochs}_p{p}"], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- the laws


@given(
    method=st.sampled_from(METHODS),
    M=st.integers(1, 5),
    B=st.integers(1, 9),
    shape=st.tuples(st.sampled_from([1, 5, 16]), st.integers(8, 64), st.integers(8, 64)),
    p=st.sampled_from([0.0, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_masks_sum_to_one_and_kappa_is_their_mean(
    method: MixingMethod, M: int, B: int, shape: tuple[int, int, int], p: float, alpha: float, seed: int
) -> None:
    M = M if method in OF_ANY_NUMBER else min(M, 2)
    masks, kappa_MB = draw(method, M, B, shape, p=p, seed=seed, alpha=alpha)
    assert masks.shape == (M, B, *(shape if method in PER_CHANNEL and M > 1 else shape[1:]))
    assert masks.dtype is kappa_MB.dtype is torch.float32
    assert bool(((masks >= 0) & (masks <= 1)).all())
    torch.testing.assert_close(masks.sum(dim=0), torch.ones(masks.shape[1:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(masks.flatten(2).mean(dim=2), kappa_MB, rtol=0, atol=1e-6)
    weights_MB = mixing.loss_weights(kappa_MB, 3.0)
    torch.testing.assert_close(weights_MB.sum(dim=0), torch.full((B,), float(M)), rtol=1e-5, atol=1e-5)
    assert torch.equal(weights_MB.argmax(dim=0), kappa_MB.argmax(dim=0)) or method == "sum" or M == 1 or alpha == 0


@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_box_lies_in_the_map_and_never_exceeds_its_share(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lam_B = torch.rand(20, generator=generator, dtype=torch.float64)
    rows_B, cols_B = (torch.randint(size, (20,), generator=generator) for size in (height, width))
    row0, col0, row1, col1 = mixing.box(height, width, lam_B, rows_B, cols_B)
    assert bool(
        ((row0 >= 0) & (row0 <= row1) & (row1 <= height) & (col0 >= 0) & (col0 <= col1) & (col1 <= width)).all()
    )
    masks_BHW = mixing.rectangles(height, width, lam_B, rows_B, cols_B)
    assert torch.equal(masks_BHW.sum(dim=(1, 2)).long(), (row1 - row0) * (col1 - col0))
    assert bool((masks_BHW.double().mean(dim=(1, 2)) <= lam_B + 1e-9).all())


def test_the_sum_is_a_plain_sum() -> None:
    features_MBCHW = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    masks_MBHW, kappa_MB = draw("sum", 3, 2, (4, 8, 8))
    torch.testing.assert_close(mixing.mix(features_MBCHW, masks_MBHW), features_MBCHW.sum(dim=0))
    torch.testing.assert_close(mixing.loss_weights(kappa_MB, 3.0), torch.ones(3, 2))


def test_mixing_is_in_fp32_whatever_the_features_are() -> None:
    features_MBCHW = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks_MBHW = torch.full((2, 2, 8, 8), 1 / 3)
    masks_MBHW[1] = 2 / 3
    mixed_BCHW = mixing.mix(features_MBCHW, masks_MBHW)
    assert mixed_BCHW.dtype is torch.bfloat16
    assert torch.equal(mixed_BCHW, mixing.mix(features_MBCHW.float(), masks_MBHW).bfloat16())


@pytest.mark.parametrize(("root", "first"), [(1.0, 0.4), (1e9, 1.0)])
def test_the_root_runs_from_proportional_to_equal(root: float, first: float) -> None:
    weights_MB = mixing.loss_weights(torch.tensor([[0.2], [0.8]], dtype=torch.float64), root)
    assert float(weights_MB[0, 0]) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("M", [2, 5])
def test_the_least_root_has_weights(M: int) -> None:
    """A smaller one is refused: at a root of 0.005 the powers of two equal kappas would both be 0 in fp32."""
    weights_MB = mixing.loss_weights(torch.full((M, 1), 1 / M), MixingConfig(weight_root=0.1).weight_root)
    torch.testing.assert_close(weights_MB, torch.ones(M, 1))
    for root in (0.09, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"weight_root must be at least 0\.1"):
            MixingConfig(weight_root=root)


def test_an_empty_rectangle_has_no_weight() -> None:
    weights_MB = mixing.loss_weights(torch.tensor([[0.0], [1.0]]), 3.0)
    assert weights_MB.flatten().tolist() == [0, 2]


@given(method=st.sampled_from(METHODS), B=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_mix_is_the_weighted_sum_of_the_maps(method: MixingMethod, B: int, seed: int) -> None:
    """Whichever axes the masks have: M times the sum of mask times map, over M, at each place."""
    features_MBCHW = torch.randn(2, B, 5, 9, 12, generator=torch.Generator().manual_seed(seed))
    masks, _ = draw(method, 2, B, (5, 9, 12), p=1.0, seed=seed)
    masks_MBCHW = (masks if masks.dim() == 5 else masks.unsqueeze(2)).expand_as(features_MBCHW)
    expected_BCHW = (2 * masks_MBCHW * features_MBCHW).sum(dim=0)
    torch.testing.assert_close(mixing.mix(features_MBCHW, masks), expected_BCHW, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- chance


@pytest.mark.parametrize(
    ("method", "kappa_B"),
    [("linear", [0.3321986, 0.4476848, 0.7651877, 0.6865904]), ("cutmix", [0.7011719, 0.609375, 0.59375, 0.7587891])],
)
def test_draws_are_pinned(method: MixingMethod, kappa_B: list[float]) -> None:
    """Other values would be other trainings under the same trial ids."""
    kappa_MB = draw(method, 2, 4, (16, 32, 32), p=1.0, seed=11).kappa_MB
    assert kappa_MB[0].tolist() == pytest.approx(kappa_B, abs=1e-6)


@pytest.mark.parametrize("method", METHODS[2:])
def test_the_same_generator_draws_the_same(method: MixingMethod) -> None:
    first, again, other = (draw(method, 2, 8, p=1, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.masks, again.masks)
    assert torch.equal(first.kappa_MB, again.kappa_MB)
    assert not torch.equal(first.masks, other.masks)


@pytest.mark.parametrize("method", METHODS[2:])
def test_the_coin_is_drawn_once_a_batch_and_kappa_for_each_slot(method: MixingMethod) -> None:
    """A linear mask lies strictly between 0 and 1 and is constant; those of all other methods touch 0 or 1."""
    own = 0
    for seed in range(200):
        masks, kappa_MB = draw(method, 2, 6, (16, 16, 16), p=0.3, seed=seed)
        flat_MBP = masks.flatten(2)
        touches_B = ((flat_MBP == 0) | (flat_MBP == 1)).any(dim=2).any(dim=0)
        if not touches_B.any():
            torch.testing.assert_close(flat_MBP, kappa_MB.unsqueeze(2).expand_as(flat_MBP))
        elif method == "patchup_soft":
            assert int(touches_B.sum()) > 3  # a slot without a seed is linear
        else:
            assert set(flat_MBP.flatten().tolist()) <= {0.0, 1.0}
        own += bool(touches_B.any())
        assert len(set(kappa_MB[0].tolist())) > 2
    # 200 coins of 0.3 have a deviation of 6.5: beyond five of them lie 6 in ten million.
    assert abs(own - 60) < 33


@pytest.mark.parametrize("method", ["cutmix", "patchup_soft"])
def test_two_roles_are_swapped_every_other_batch(method: MixingMethod) -> None:
    """The rectangles of a batch are its smaller half; the blocks of soft PatchUp belong to the role that has ones."""
    swapped = 0
    for seed in range(400):
        masks, kappa_MB = draw(method, 2, 24, p=1, seed=seed)
        ones_M = (masks == 1).flatten(1).any(dim=1)
        first = kappa_MB.mean(dim=1).argmin() if method == "cutmix" else ones_M.int().argmax()
        assert method == "cutmix" or ones_M.tolist() != [True, True]
        swapped += int(first)
    # 400 fair coins have a deviation of 10: beyond five of them lie 6 in ten million.
    assert abs(swapped - 200) < 50


def test_each_of_three_has_the_rectangle_in_every_third_batch() -> None:
    counts = [0, 0, 0]
    for seed in range(600):
        masks, _ = draw("cutmix", 3, 4, p=1, seed=seed)
        binary_M = ((masks == 0) | (masks == 1)).flatten(1).all(dim=1)
        assert int(binary_M.sum()) == 1
        counts[int(binary_M.int().argmax())] += 1
    # A deviation of 11.5 each: beyond five of them lie 6 in ten million.
    assert all(abs(count - 200) < 58 for count in counts)


@pytest.mark.parametrize("method", METHODS[2:])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_probabilities_are_certain(p: float, method: MixingMethod) -> None:
    for seed in range(20):
        masks, _ = draw(method, 2, 4, p=p, seed=seed)
        assert bool(((masks == 0) | (masks == 1)).any()) == (p == 1.0)


def test_kappa_is_dirichlet() -> None:
    """Variance of one ratio of a symmetric Dirichlet: (M - 1) / (M^2 (M alpha + 1))."""
    for M, alpha in ((2, 2.0), (3, 2.0), (2, 0.5)):
        kappa_MB = draw("linear", M, 20_000, (1, 1, 1), alpha=alpha).kappa_MB
        assert float(kappa_MB.mean()) == pytest.approx(1 / M, abs=1e-6)
        assert float(kappa_MB[0].var()) == pytest.approx((M - 1) / (M**2 * (M * alpha + 1)), rel=0.05)
    assert torch.equal(draw("linear", 4, 3, (1, 1, 1), alpha=0).kappa_MB, torch.full((4, 3), 0.25))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_takes_every_so_many_slots(method: MixingMethod) -> None:
    whole = draw(method, 2, 12, p=1, seed=3)
    for rank in range(3):
        own = whole.slots(slice(rank, None, 3))
        assert torch.equal(own.masks, whole.masks[:, rank::3])
        assert torch.equal(own.kappa_MB, own.masks.flatten(2).mean(dim=2)) or method in (
            "sum",
            "linear",
            "patchup_soft",
        )
        assert torch.equal(own.kappa_MB, whole.kappa_MB[:, rank::3])
