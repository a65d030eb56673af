"""Crop, flip and normalisation against torchvision's own, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as tv

from mixmo_core.augment import PREPARATION, Draws, _kept_constants, apply, draw, normalise, standard
from mixmo_core.config import DATASETS

NAMES = sorted(DATASETS)


def some_pixels(dataset: str, *leading: int, seed: int = 0) -> Tensor:
    shape = DATASETS[dataset]
    size = (*leading, shape.channels, shape.size, shape.size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def torchvision_result(image_CHW: Tensor, row: int, column: int, flip: bool, dataset: str) -> Tensor:
    """The reference's pipeline on a PIL image: crop and flip in the dataset's order, ToTensor, Normalize."""
    spec, size = PREPARATION[dataset], DATASETS[dataset].size
    image: Any = tv.to_pil_image(image_CHW)
    steps = [
        lambda image: tv.crop(tv.pad(image, [spec.pad], fill=0), row, column, size, size),
        lambda image: tv.hflip(image) if flip else image,
    ]
    for step in reversed(steps) if dataset == "tiny_imagenet" else steps:
        image = step(image)
    done: Tensor = tv.normalize(tv.to_tensor(image), list(spec.mean), list(spec.std))
    return done


@pytest.mark.parametrize("dataset", NAMES)
def test_equals_torchvision_to_the_bit_at_every_offset(dataset: str) -> None:
    reach = 2 * PREPARATION[dataset].pad + 1
    grid = torch.cartesian_prod(torch.arange(reach), torch.arange(reach), torch.arange(2))
    rows, columns, flips = grid.unbind(1)
    pixels = some_pixels(dataset, len(grid))
    ours = apply(pixels, Draws(rows, columns, flips.bool()), dataset)
    for index, (row, column, flip) in enumerate(grid.tolist()):
        assert torch.equal(ours[index], torchvision_result(pixels[index], row, column, bool(flip), dataset)), index


@pytest.mark.parametrize(
    ("dataset", "mean", "std"),
    [
        ("cifar10", (125.3 / 255, 123.0 / 255, 113.9 / 255), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (125.3 / 255, 123.0 / 255, 113.9 / 255), (0.2023, 0.1994, 0.2010)),
        ("tiny_imagenet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("synthetic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("digits", (0.5,), (0.5,)),
    ],
)
def test_normalisation_is_the_recipes(dataset: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    pixels = some_pixels(dataset, 3)
    expected = (pixels.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    result = normalise(pixels, dataset)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of the host's tensors to a device, for each of which it would be waited."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        return func(*args, **(kwargs or {}))


def test_normalisation_brings_its_kept_constants_to_a_device_once() -> None:
    """On the device that holds shapes only, which is no more the host than a GPU is."""
    pixels = some_pixels("cifar10", 2).to("meta")
    with _Copies() as control:  # type: ignore[no-untyped-call]
        torch.ones(2).to("meta")
    assert control.count == 1
    normalise(pixels, "cifar10")
    with _Copies() as copies:  # type: ignore[no-untyped-call]
        normalise(pixels, "cifar10")
    assert copies.count == 0


def test_kept_constants_that_an_evaluation_made_serve_a_training() -> None:
    pixels, weight = some_pixels("synthetic", 2), torch.ones(3, 3, 1, 1, requires_grad=True)
    _kept_constants.cache_clear()
    with torch.inference_mode():
        normalise(pixels, "synthetic")
    mean_C11, _ = _kept_constants(PREPARATION["synthetic"], pixels.device)
    torch.autograd.backward((weight * mean_C11).sum())
    assert weight.grad is not None


@pytest.mark.parametrize(("dataset", "pad", "flips"), [("cifar10", 4, True), ("cifar100", 4, True),
    ("tiny_imagenet", 4, True), ("digits", 1, False), ("synthetic", 2, True)])  # fmt: skip
def test_draws_cover_what_they_should_evenly(dataset: str, pad: int, flips: bool) -> None:
    number = 20_000
    drawn = draw(dataset, number, torch.Generator().manual_seed(0))
    for offsets in (drawn.rows, drawn.columns):
        counts = offsets.bincount(minlength=2 * pad + 1)
        assert len(counts) == 2 * pad + 1
        expected = number / (2 * pad + 1)
        assert (counts - expected).abs().max() < 5 * expected**0.5
    assert abs(drawn.flips.double().mean() - (0.5 if flips else 0)) < (0.02 if flips else 1e-12)
    together = torch.stack((drawn.rows.double(), drawn.columns.double(), drawn.flips.double()))[: 3 if flips else 2]
    independent = torch.corrcoef(together) - torch.eye(len(together))
    assert independent.abs().max() < 0.03


@pytest.mark.parametrize("dataset", NAMES)
def test_the_middle_offset_moves_nothing(dataset: str) -> None:
    pixels = some_pixels(dataset, 4)
    still = torch.full((4,), PREPARATION[dataset].pad)
    assert torch.equal(apply(pixels, Draws(still, still, torch.zeros(4, dtype=torch.bool)), dataset),
                       normalise(pixels, dataset))  # fmt: skip


@given(st.sampled_from(NAMES), st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4))
def test_a_share_of_the_draws_gives_that_share_of_the_images(dataset: str, seed: int, M: int, workers: int) -> None:
    pixels = some_pixels(dataset, M, 8, seed=seed)
    drawn = draw(dataset, (M, 8), torch.Generator().manual_seed(seed))
    whole = apply(pixels, drawn, dataset)
    for rank in range(workers):
        assert torch.equal(
            apply(pixels[:, rank::workers], drawn[:, rank::workers], dataset), whole[:, rank::workers]
        )  # fmt: skip


def test_what_is_cropped_from_outside_is_black() -> None:
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    corner = apply(white, Draws(torch.tensor([0]), torch.tensor([0]), torch.tensor([False])), "cifar10")
    black = normalise(torch.zeros_like(white), "cifar10")
    assert torch.equal(corner[:, :, :4], black[:, :, :4])
    assert torch.equal(corner[:, :, :, :4], black[:, :, :, :4])
    assert torch.equal(corner[:, :, 4:, 4:], normalise(white, "cifar10")[:, :, 4:, 4:])


def test_standard_draws_from_the_generator_alone_and_leaves_the_images_as_they_are() -> None:
    pixels = some_pixels("cifar10", 2, 5)
    before = pixels.clone()
    first = standard(pixels, "cifar10", torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    assert torch.equal(first, standard(pixels, "cifar10", torch.Generator().manual_seed(3)))
    assert not torch.equal(first, standard(pixels, "cifar10", torch.Generator().manual_seed(4)))
    assert torch.equal(first, apply(pixels, draw("cifar10", (2, 5), torch.Generator().manual_seed(3)), "cifar10"))
    assert torch.equal(pixels, before)
    assert first.shape == pixels.shape
