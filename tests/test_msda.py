"""Mixup, CutMix and ResizeMix of pixels: what is seen, what it is called, and how often."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mixmo_core import mixing
from mixmo_core.config import DataConfig
from mixmo_core.msda import Draws, draw, mix, pixel_masks, settled
from mixmo_core.step import weighted_loss

METHODS = ["mixup", "cutmix", "resizemix"]


def drawn(
    method: Any, shape: tuple[int, int] = (2, 50), *, dataset: Any = "synthetic", seed: int = 0, **more: Any
) -> Draws:
    config = DataConfig(dataset=dataset, msda=method, **more)
    return draw(config, 100, shape, torch.Generator().manual_seed(seed))


def even(M: int, B: int, size: int) -> Tensor:
    """The mixing block's masks where nothing is hidden more than anything else."""
    return torch.full((M, B, size, size), 1 / M)


# ----------------------------------------------------------------------------------------------------- the reference


@pytest.mark.shared
def test_targets_equal_the_reference(golden: Callable[[str], Any]) -> None:
    """All 30 recorded cases: shares, who was swapped, and the weighted soft targets, from the recorded masks."""
    recorded = golden("dataset_targets_cifar.npz")
    names = recorded["names"].tolist()
    assert len(names) == 30
    swaps = 0
    for name in names:
        case = {key.removeprefix(f"{name}_"): recorded[key] for key in recorded.files if key.startswith(f"{name}_")}
        kappa_MB = torch.from_numpy(case["kappas"]).float().unsqueeze(1)
        # Constant masks are as they were in memory: rounded to half precision, which the shares do not show.
        main_BHW = torch.from_numpy(case["mask_member0"]).float().expand(1, 32, 32)
        labels_MP = torch.from_numpy(recorded["labels"])[torch.from_numpy(case["dataset_indices"]).view(2, -1)]
        shares_MBL = torch.ones(2, 1, 1)
        if labels_MP.shape[1] == 2:
            masks = [torch.from_numpy(case[f"msda_mask_member{m}"]).float().expand(1, 32, 32) for m in (0, 1)]
            before_MBHW = torch.stack(masks)
            masks_MBHW, shares_MBL = settled(before_MBHW, torch.stack([main_BHW, 1 - main_BHW]), keep_main=True)
            for m in (0, 1):
                swapped = bool(case[f"msda_swapped_member{m}"])
                swaps += swapped
                if labels_MP[m, 0] != labels_MP[m, 1]:
                    expected_BHW = 1 - before_MBHW[m] if swapped else before_MBHW[m]
                    assert torch.equal(masks_MBHW[m], expected_BHW), (name, m)
        root = 1.0 if name.startswith("mimo") else 3.0
        weights_M1 = mixing.loss_weights(kappa_MB, root)
        targets_MK = torch.zeros(2, 10).scatter_add_(1, labels_MP, weights_M1 * shares_MBL[:, 0])
        for m in (0, 1):
            torch.testing.assert_close(targets_MK[m], torch.from_numpy(case[f"target{m}"]), rtol=0, atol=1e-6)
        # The loss is the cross entropy with these targets.
        logits_MBK = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0))
        expected = -(targets_MK.unsqueeze(1) * logits_MBK.log_softmax(2)).sum()
        loss = weighted_loss(logits_MBK, labels_MP.unsqueeze(1), kappa_MB, root, shares_MBL)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert swaps > 10


# --------------------------------------------------------------------------------------------- shares of two labels


@settings(max_examples=25)
@given(st.sampled_from(METHODS), st.integers(0, 2**32), st.sampled_from([8, 16, 32, 64]))
def test_shares_of_a_single_network_are_those_of_its_pixels(method: str, seed: int, size: int) -> None:
    """White on black: the mixed image's mean is the share. Nothing is ever swapped."""
    dataset = {8: "digits", 16: "synthetic", 32: "cifar10", 64: "tiny_imagenet"}[size]
    draws = drawn(method, (1, 20), dataset=dataset, seed=seed)
    white, black = torch.ones(1, 20, 3, size, size), torch.zeros(1, 20, 3, size, size)
    mixed, shares_MBL = mix(white, black, draws, even(1, 20, size), method)
    torch.testing.assert_close(mixed.mean(dim=(2, 3, 4)), shares_MBL[..., 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(shares_MBL.sum(dim=2), torch.ones(1, 20), rtol=0, atol=1e-6)
    whole = (shares_MBL[..., 0] == 1) & (mixed == 1).all(dim=4).all(dim=3).all(dim=2)
    assert whole[~draws.mixed].all()


@settings(max_examples=25)
@given(st.sampled_from(["mixup", "cutmix"]), st.integers(0, 2**32), st.integers(2, 4), st.sampled_from([16, 8]))
def test_inside_mixmo_the_own_image_stays_major(method: str, seed: int, M: int, half: int) -> None:
    """Of what is seen, at full size (16) and under encoders that halve the maps (8). Shares sum to 1 where anything is
    seen, and are those of the white that the mixing block lets through.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(M, 30, half, half, generator=generator).softmax(dim=0)
    draws = drawn(method, (M, 30), seed=seed, msda_probability=1.0)
    white, black = torch.ones(M, 30, 3, 16, 16), torch.zeros(M, 30, 3, 16, 16)
    mixed, shares_MBL = mix(white, black, draws, seen, method)
    assert (shares_MBL[..., 0] >= 0.5 - 1e-6).all()
    torch.testing.assert_close(shares_MBL.sum(dim=2), torch.ones(M, 30), rtol=0, atol=1e-5)
    pooled = functional.avg_pool2d(mixed[:, :, 0], 16 // half)
    through = (pooled * seen).mean(dim=(2, 3)) / seen.mean(dim=(2, 3))
    torch.testing.assert_close(through, shares_MBL[..., 0], rtol=0, atol=1e-5)


def test_what_is_pasted_does_not_become_the_rest() -> None:
    """ResizeMix inside MixMo: the own image may be the minor part of what is seen."""
    draws = drawn("resizemix", (2, 200), msda_probability=1.0)
    seen = mixing.rectangles(16, 16, *(each.flatten() for each in (draws.lam, draws.rows, draws.columns)))
    seen_MBHW = seen.view(2, 200, 16, 16).clamp(min=0.01)
    masks_MBHW = pixel_masks(draws, 16, "resizemix")
    settled_MBHW, shares_MBL = settled(masks_MBHW, seen_MBHW, keep_main=False)
    assert torch.equal(settled_MBHW, masks_MBHW)
    assert (shares_MBL[..., 0] < 0.5).float().mean() > 0.2
    images, others = torch.ones(2, 200, 3, 16, 16), torch.zeros(2, 200, 3, 16, 16)
    assert torch.equal(mix(images, others, draws, seen_MBHW, "resizemix")[1], shares_MBL)


def test_a_hidden_image_has_no_target() -> None:
    hidden = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    shares_MBL = settled(pixel_masks(drawn("cutmix", (2, 3)), 16, "cutmix"), hidden, keep_main=True).shares_MBL
    assert (shares_MBL[0] == 0).all()
    torch.testing.assert_close(shares_MBL[1].sum(dim=1), torch.ones(3))
    halved = settled(pixel_masks(drawn("cutmix", (2, 3)), 16, "cutmix"), hidden[..., :8, :8], keep_main=True)
    assert torch.isfinite(halved.shares_MBL).all()  # the reference's are no numbers


def test_masks_that_differ_by_channel_count_by_their_mean() -> None:
    masks_MBHW = pixel_masks(drawn("cutmix", (2, 20)), 16, "cutmix")
    by_channel = torch.rand(2, 20, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(
        settled(masks_MBHW, by_channel, keep_main=True),
        settled(masks_MBHW, by_channel.mean(dim=2), keep_main=True),
        strict=True,
    ):
        assert torch.equal(mine, other)


# ------------------------------------------------------------------------------------------------------- mixed pixels


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_each_image_is_mixed_as_its_own_draws_say(method: str, M: int) -> None:
    """One image at a time in plain Python: the box of `mixing.box`, torch's `interpolate`, and inside MixMo the swap.

    CutMix shows the image itself in the box: for a single network, mostly the smaller part of what it reads.
    """
    B, size = 40, 16
    draws = drawn(method, (M, B), seed=4)
    images, partners = torch.randn(2, M, B, 3, size, size, generator=torch.Generator().manual_seed(1))
    mixed, shares_MBL = mix(images, partners, draws, even(M, B, size), method)
    for m, j in torch.cartesian_prod(torch.arange(M), torch.arange(B)).tolist():
        expected, partner, lam = images[m, j].clone(), partners[m, j], draws.lam[m, j]
        row0, col0, row1, col1 = (
            int(corner) for corner in mixing.box(size, size, lam, draws.rows[m, j], draws.columns[m, j])
        )
        area = (row1 - row0) * (col1 - col0)
        share = float(lam) if method == "mixup" else area / size**2
        if method == "resizemix":
            share = 1 - share
        if not draws.mixed[m, j]:
            share = 1.0
        elif method == "resizemix":
            if area:
                small = functional.interpolate(partner[None], (row1 - row0, col1 - col0), mode="bilinear")[0]
                expected[:, row0:row1, col0:col1] = small
        elif method == "mixup":
            share = max(share, 1 - share) if M > 1 else share
            expected = share * expected + (1 - share) * partner
        else:
            box = torch.zeros(size, size)
            box[row0:row1, col0:col1] = 1
            own = box if share >= 0.5 or M == 1 else 1 - box
            share = float(own.mean())
            expected = torch.where(own.bool(), expected, partner)
        torch.testing.assert_close(mixed[m, j], expected, rtol=0, atol=2e-5)
        assert shares_MBL[m, j].tolist() == pytest.approx([share, 1 - share], abs=1e-5)


def test_resizemix_pastes_the_whole_partner() -> None:
    """Its corners are the partner's corners, wherever the border cuts the box off."""
    draws = drawn("resizemix", (1, 300), dataset="cifar10", msda_probability=1.0)
    along = torch.linspace(0, 1, 32)
    partners = torch.stack([along.expand(32, 32), along.unsqueeze(1).expand(32, 32)]).expand(1, 300, 2, 32, 32)
    mixed, shares_MBL = mix(partners - 9, partners, draws, even(1, 300, 32), "resizemix")
    for j in (shares_MBL[0, :, 1] > 0.1).nonzero().flatten().tolist():
        pasted = mixed[0, j][mixed[0, j] > -5]
        assert float(pasted.min()) < 0.1
        assert float(pasted.max()) > 0.9


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_have_the_distributions_that_the_settings_say() -> None:
    """False alarms: each figure is held to five standard errors, and the seed is fixed."""
    number = 40_000
    draws = drawn("cutmix", (2, number // 2), msda_probability=0.3, msda_alpha=0.5)
    lam = draws.lam.flatten()
    for figure, mean, deviation in (
        (draws.mixed.double(), 0.3, 0.46),
        (draws.partners.double(), 49.5, 28.9),
        (draws.rows.double(), 7.5, 4.61),
        (draws.columns.double(), 7.5, 4.61),
        (lam, 0.5, 0.354),  # the variance of Beta(a, a) is 1 / (4 (2a + 1))
        ((lam - 0.5).square(), 1 / 8, 0.09),
    ):
        assert float(figure.mean()) == pytest.approx(mean, abs=5 * deviation / number**0.5)
    assert sorted(set(draws.partners.flatten().tolist())) == list(range(100))
    assert sorted(set(draws.rows.flatten().tolist())) == list(range(16))
    together = torch.stack([draws.mixed, draws.partners, draws.rows, draws.columns, draws.lam]).double().flatten(1)
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 5 / number**0.5
    sides = drawn("resizemix", (2, number // 2)).lam.sqrt()
    assert 0.1 <= float(sides.min()) < 0.101
    assert 0.799 < float(sides.max()) <= 0.8
    assert float(sides.mean()) == pytest.approx(0.45, abs=5 * 0.202 / number**0.5)


@pytest.mark.parametrize("method", METHODS)
def test_draws_come_from_the_generator_alone(method: str) -> None:
    first = drawn(method, seed=3)
    torch.manual_seed(1)
    assert torch.equal(first.lam, drawn(method, seed=3).lam)
    assert not torch.equal(first.lam, drawn(method, seed=4).lam)
    assert torch.equal(first[:, 1::3].partners, first.partners[:, 1::3])
