"""AugMix: each operation against the Python imaging library's own, and the reference's chains of them."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from test_augment import some_pixels
from torch import Tensor

from mixmo_core import augment, augmix
from mixmo_core.augmix import CHAINS, LONGEST, OPERATIONS, Draws, draw, of_repeats, operate

NAMES = list(OPERATIONS)
DIRECTED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def imaging_library(image: Any, name: str, *, backwards: bool) -> Any:
    """The reference's operation at its strength: 3 of 30 steps from the least to the most."""
    value = {"posterize": 4.4, "rotate": 3.0, "solarize": 25.6, "shear_x": 0.03, "shear_y": 0.03,
             "translate_x": 0.045 * image.size[0], "translate_y": 0.045 * image.size[1]}.get(name, 0.0)  # fmt: skip
    if backwards and name in DIRECTED:
        value = -value
    maps = {"shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
            "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value)}  # fmt: skip
    if name in maps:
        return image.transform(image.size, Image.Transform.AFFINE, maps[name])
    others: dict[str, Callable[[], Any]] = {
        "identity": lambda: image,
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, int(value)),
        "rotate": lambda: image.rotate(value),
        "solarize": lambda: ImageOps.solarize(image, value),
        "invert": lambda: ImageOps.invert(image),
    }
    return others[name]()


def to_image(pixels_CHW: Tensor) -> Any:
    return Image.fromarray(np.asarray(pixels_CHW.permute(1, 2, 0).squeeze(2)))


def to_pixels(image: Any) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def kinds_of_images(dataset: str) -> Tensor:
    """Noise, dark, few colours, one colour, one colour and a pixel: what equalize tells apart."""
    noise = some_pixels(dataset, 6)
    dark = (noise.double() / 255).pow(5).mul(255).to(torch.uint8)
    one = torch.full_like(noise[:1], 77)
    speck = one.clone()
    speck[..., 2, 3] = 200
    return torch.cat([noise, dark, noise // 64 * 10, one, speck, 255 - one])


@pytest.mark.parametrize("dataset", ["digits", "synthetic", "cifar10", "tiny_imagenet"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_equal_the_imaging_librarys_to_the_bit(dataset: str, name: str) -> None:
    pixels = kinds_of_images(dataset)
    for backwards in (False, True):
        operation = NAMES.index(name) + backwards * len(NAMES)
        ours = operate(pixels.long(), torch.full((len(pixels),), operation))
        for before, after in zip(pixels, ours, strict=True):
            theirs = imaging_library(to_image(before), name, backwards=backwards)
            assert torch.equal(after, to_pixels(theirs).long())
    if dataset in ("cifar10", "tiny_imagenet"):  # 3 degrees, or 4.5 % of 8 pixels, move nothing
        assert torch.equal(ours, pixels.long()) == (name == "identity")


@pytest.mark.shared
def test_operations_equal_the_imaging_librarys_on_real_images(shared_data: Path) -> None:
    """The first hundred of CIFAR-10: they lie in one tiled picture."""
    rows = pyarrow.parquet.ParquetFile(shared_data / "cifar10-test.parquet").iter_batches(
        batch_size=1, columns=["webp"]
    )
    tiled = to_pixels(Image.open(io.BytesIO(next(rows)["webp"][0].as_py())).convert("RGB"))
    pixels = tiled.view(3, 10, 32, 10, 32).permute(1, 3, 0, 2, 4).reshape(100, 3, 32, 32)
    for operation, name in enumerate(NAMES * 2):
        ours = operate(pixels.long(), torch.full((100,), operation))
        for before, after in zip(pixels, ours, strict=True):
            theirs = imaging_library(to_image(before), name, backwards=operation >= len(NAMES))
            assert torch.equal(after, to_pixels(theirs).long()), name


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_chains_are_those_of_the_reference(dataset: str) -> None:
    """Image by image with the imaging library: operations one after another, each chain normalised, then blended."""
    M, B = 2, 6
    pixels, draws = some_pixels(dataset, M, B), draw((M, B), torch.Generator().manual_seed(2))
    ours = augmix.apply(pixels, draws, dataset)
    for m, j in itertools.product(range(M), range(B)):
        mixed = torch.zeros_like(ours[m, j])
        for operations, weight in zip(draws.operations[m, j].tolist(), draws.weights[m, j].tolist(), strict=True):
            image = to_image(pixels[m, j])
            for operation in operations:
                image = imaging_library(image, NAMES[operation % len(NAMES)], backwards=operation >= len(NAMES))
            mixed += weight * augment.normalise(to_pixels(image), dataset)
        blend = float(draws.blend[m, j])
        expected = (1 - blend) * augment.normalise(pixels[m, j], dataset) + blend * mixed
        torch.testing.assert_close(ours[m, j], expected, rtol=0, atol=1e-5)


def test_an_image_of_nothing_but_identities_stays_as_it_is() -> None:
    pixels = some_pixels("synthetic", 4)
    draws = Draws(torch.zeros(4, CHAINS, LONGEST, dtype=torch.int64), torch.full((4, CHAINS), 1 / 3), torch.rand(4))
    torch.testing.assert_close(
        augmix.apply(pixels, draws, "synthetic"), augment.normalise(pixels, "synthetic"), rtol=0, atol=1e-6
    )


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_have_the_distributions_of_the_reference() -> None:
    """False alarms: each figure is held to five standard errors, and the seed is fixed."""
    number = 20_000
    draws = draw((number,), torch.Generator().manual_seed(0))
    assert draws.operations.shape == (number, CHAINS, LONGEST)
    drawn = draws.operations[:, :, 0].flatten().bincount(minlength=20)
    expected = number * CHAINS / 20
    assert len(drawn) == 20
    assert (drawn - expected).abs().max() < 5 * expected**0.5
    # At a place all chains reach, a tenth of the operations is the identity; a quarter of the chains ends at each.
    for place, reached in enumerate((1, 0.75, 0.5, 0.25)):
        identities = (draws.operations[:, :, place] % len(NAMES) == 0).double()
        assert float(identities.mean()) == pytest.approx(1 - 0.9 * reached, abs=5 * 0.5 / (number * CHAINS) ** 0.5)
    torch.testing.assert_close(draws.weights.sum(dim=1), torch.ones(number))
    # A weight of Dirichlet(1, 1, 1) is from Beta(1, 2): mean 1/3, variance 1/18; a blend is uniform.
    assert float(draws.weights[:, 0].mean()) == pytest.approx(1 / 3, abs=5 * (1 / 18 / number) ** 0.5)
    assert float(draws.weights[:, 0].var()) == pytest.approx(1 / 18, rel=0.05)
    assert float(draws.blend.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / number) ** 0.5)
    assert float(draws.blend.var()) == pytest.approx(1 / 12, rel=0.05)


def test_repeats_of_an_image_have_the_chains_of_its_first_slot() -> None:
    indices_MB = torch.tensor([[5, 3, 5, 8, 3, 5], [3, 3, 8, 8, 5, 5]])
    draws = draw((2, 6), torch.Generator().manual_seed(0))
    shared = of_repeats(draws, indices_MB)
    first = torch.tensor([[0, 1, 0, 3, 1, 0], [0, 0, 2, 2, 4, 4]])
    for m in range(2):
        assert torch.equal(shared.operations[m], draws.operations[m, first[m]])
        assert torch.equal(shared.weights[m], draws.weights[m, first[m]])
        assert torch.equal(shared.blend[m], draws.blend[m, first[m]])
    assert len(set(draws.blend.flatten().tolist())) == 12
