"""Kappa, masks, mix and loss weights: their laws, and the numbers of the reference implementation."""

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmo_core import mixing
from mixmo_core.config import MixingConfig

Method = Literal["sum", "linear", "cutmix"]


def tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values))


def draw(method: Method, M: int, B: int, size: int = 16, *, p: float = 0.5, seed: int = 0, alpha: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    config = MixingConfig(method=method, alpha=alpha)
    return mixing.draw(config, M, B, size, size, p=p, generator=generator, device="cpu")


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
    mixture = draw("cutmix", 2, 20_000, 32, p=1, seed=3)
    kappa_B = mixture.kappa_MB[mixture.kappa_MB.mean(dim=1).argmin()]  # of the role that has the box
    assert float(kappa_B.mean()) == pytest.approx(realised, abs=5 * std / math.sqrt(20_000))
    assert float(kappa_B.std()) == pytest.approx(std, abs=0.005)
    assert float((kappa_B < 0.5).float().mean()) == pytest.approx(below_half, abs=0.012)
    assert float((kappa_B == 0).float().mean()) == pytest.approx(empty, abs=5e-4)
    assert float(kappa_B.max()) == pytest.approx(largest, abs=0.05)
    assert mean == pytest.approx(0.5, abs=0.01)


@pytest.mark.shared
def test_mixes_of_two_equal_the_reference(golden: Callable[[str], Any]) -> None:
    """With injected masks. The masks of the methods that are built are made here as well."""
    recorded = golden("mixing_blocks_m2.npz")
    features_MBCHW = torch.stack([tensor(recorded["l0"]), tensor(recorded["l1"])])
    for name in recorded["names"].tolist():
        mask = tensor(recorded[f"{name}_mask0"]).float()
        masks_MBCHW = torch.stack([mask, 1 - mask]).unsqueeze(1).expand(-1, 3, -1, -1, -1)
        torch.testing.assert_close(
            mixing.mix(features_MBCHW, masks_MBCHW), tensor(recorded[f"{name}_out"]), rtol=1e-6, atol=1e-6
        )
        if name.startswith(("mixup", "cutmix")):  # one map for all channels
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
    method=st.sampled_from(["sum", "linear", "cutmix"]),
    M=st.integers(1, 5),
    B=st.integers(1, 9),
    p=st.sampled_from([0.0, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_masks_sum_to_one_and_kappa_is_their_mean(
    method: Method, M: int, B: int, p: float, alpha: float, seed: int
) -> None:
    masks_MBHW, kappa_MB = draw(method, M, B, 8, p=p, seed=seed, alpha=alpha)
    assert masks_MBHW.shape == (M, B, 8, 8)
    assert masks_MBHW.dtype is kappa_MB.dtype is torch.float32
    assert bool(((masks_MBHW >= 0) & (masks_MBHW <= 1)).all())
    torch.testing.assert_close(masks_MBHW.sum(dim=0), torch.ones(B, 8, 8), rtol=0, atol=1e-6)
    torch.testing.assert_close(masks_MBHW.mean(dim=(2, 3)), kappa_MB, rtol=0, atol=1e-6)
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
    masks_MBHW, kappa_MB = draw("sum", 3, 2, 8)
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


def test_an_empty_rectangle_has_no_weight() -> None:
    weights_MB = mixing.loss_weights(torch.tensor([[0.0], [1.0]]), 3.0)
    assert weights_MB.flatten().tolist() == [0, 2]


def test_the_same_generator_draws_the_same() -> None:
    first, again, other = (draw("cutmix", 2, 8, p=1, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.masks_MBHW, again.masks_MBHW)
    assert torch.equal(first.kappa_MB, again.kappa_MB)
    assert not torch.equal(first.masks_MBHW, other.masks_MBHW)


def test_the_coin_and_the_roles_are_drawn_once_a_batch_and_kappa_for_each_slot() -> None:
    binary = swapped = 0
    for seed in range(400):
        masks_MBHW, kappa_MB = draw("cutmix", 2, 6, p=0.5, seed=seed)
        spread_B = masks_MBHW[0].amax(dim=(1, 2)) - masks_MBHW[0].amin(dim=(1, 2))
        is_binary = bool((spread_B == 1).any())
        # A linear mask is constant in every slot; a batch holds one kind only (a full or empty box aside).
        assert is_binary or bool((spread_B == 0).all())
        if is_binary:
            assert set(masks_MBHW.unique().tolist()) <= {0.0, 1.0}
            swapped += float(kappa_MB[0].mean()) > float(kappa_MB[1].mean())
        binary += is_binary
        assert len(kappa_MB[0].unique()) > 3
    # Five standard deviations of a fair coin thrown 400 (about 200) times.
    assert abs(binary - 200) < 50
    assert abs(swapped - binary / 2) < 36


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_probabilities_are_certain(p: float) -> None:
    for seed in range(30):
        masks_MBHW, _ = draw("cutmix", 2, 4, p=p, seed=seed)
        assert bool(((masks_MBHW == 0) | (masks_MBHW == 1)).all()) == (p == 1.0)


def test_kappa_is_dirichlet() -> None:
    """Variance of one ratio of a symmetric Dirichlet: (M - 1) / (M^2 (M alpha + 1))."""
    for M, alpha in ((2, 2.0), (3, 2.0), (2, 0.5)):
        kappa_MB = draw("linear", M, 20_000, 1, alpha=alpha).kappa_MB
        assert float(kappa_MB.mean()) == pytest.approx(1 / M, abs=1e-6)
        assert float(kappa_MB[0].var()) == pytest.approx((M - 1) / (M**2 * (M * alpha + 1)), rel=0.05)
    assert torch.equal(draw("linear", 4, 3, 1, alpha=0).kappa_MB, torch.full((4, 3), 0.25))


def test_a_method_that_is_not_built_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="cowmix"):
        mixing.draw(MixingConfig(method="cowmix"), 2, 2, 8, 8, p=0.5, generator=torch.Generator(), device="cpu")
