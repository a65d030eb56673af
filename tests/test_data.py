"""Datasets, the folders they come from, and the batch-repetition sampler."""

import hashlib
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import made_cifar
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mixmo_core import data
from mixmo_core.config import DATASETS, DataConfig, EvaluateConfig, TrialConfig, training_images, validation_images
from mixmo_core.data import DatasetError, arrange, batch_repetition, check, corrupted, fetch, load, needed, subset

DatasetName = Literal["digits", "cifar10", "cifar100", "synthetic"]


@pytest.fixture(autouse=True)
def forget() -> None:
    made_cifar.forget()


def fingerprint(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


# -------------------------------------------------------------------------------------------- digits and synthetic


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_the_arrays_are_what_config_says(dataset: DatasetName) -> None:
    shape = DATASETS[dataset]
    for images, number in zip(load(DataConfig(dataset=dataset)), (shape.train_images, shape.test_images), strict=True):
        assert images.pixels_NCHW.shape == (number, shape.channels, shape.size, shape.size)
        assert images.pixels_NCHW.dtype == torch.uint8
        assert images.pixels_NCHW.is_contiguous()
        assert images.labels_N.dtype == torch.int64
        assert len(images) == number
        assert set(images.labels_N.tolist()) == set(range(shape.classes))


def test_the_arrays_never_change() -> None:
    """Another split or other noise would be another dataset: raise its number in NUMERICS, then these."""
    names: tuple[DatasetName, ...] = ("digits", "synthetic")
    pinned = {
        name: [
            fingerprint(images.pixels_NCHW, images.labels_N)
            for images in load(DataConfig(dataset=name, train_images=300))
        ]
        for name in names
    }
    assert pinned == {
        "digits": ["7e467b7f23b28775", "9119134ae51c0efb"],
        "synthetic": ["35899db16636f6cd", "1bf8a047da791973"],
    }


def test_digits_are_scikit_learns_split_without_overlap() -> None:
    from sklearn.datasets import load_digits

    train, test = load(DataConfig(dataset="digits"))
    assert test.labels_N.bincount().tolist() == [36] * 10
    both = torch.cat((train.pixels_NCHW, test.pixels_NCHW)).reshape(-1, 64).double() * (16 / 255)
    labels = torch.cat((train.labels_N, test.labels_N))
    ours = Counter(zip(map(bytes, both.round().to(torch.uint8).numpy()), labels.tolist(), strict=True))
    original = load_digits()
    assert ours == Counter(zip(map(bytes, original.data.astype(np.uint8)), original.target.tolist(), strict=True))
    assert train.pixels_NCHW.max() == 255


def test_synthetic_can_be_learnt_but_not_at_a_glance() -> None:
    train, test = load(DataConfig(dataset="synthetic"))
    x, x_test = train.pixels_NCHW.flatten(1).double(), test.pixels_NCHW.flatten(1).double()
    prototypes = torch.stack([x[train.labels_N == k].mean(dim=0) for k in range(10)])
    assert (torch.cdist(x_test, prototypes).argmin(dim=1) == test.labels_N).double().mean() > 0.9
    mean_colours = torch.stack([x[train.labels_N == k].reshape(-1, 3, 256).mean(dim=(0, 2)) for k in range(10)])
    by_colour = torch.cdist(x_test.reshape(-1, 3, 256).mean(dim=2), mean_colours).argmin(dim=1)
    assert (by_colour == test.labels_N).double().mean() < 0.9


# --------------------------------------------------------------------------------------- subsets and the validation


@given(st.integers(2, 12), st.integers(10, 300), st.integers(0, 2**32), st.data())
def test_subsets_are_nested_and_parts_do_not_overlap(classes: int, number: int, seed: int, more: st.DataObject) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, number)
    few = more.draw(st.integers(1, number))
    many = more.draw(st.integers(few, number))
    splits: tuple[data.Split, ...] = ("test", "validation")
    for split in splits:
        small, big = subset(labels, few, split), subset(labels, many, split)
        for part, whole in zip(small, big, strict=True):
            assert set(part) <= set(whole)
            assert sorted(set(part)) == part.tolist()
        assert not set(big[0]) & set(big[1])
        assert len(big[0]) + len(big[1]) == many
        assert len(big[1]) == (many // 10 if split == "validation" else 0)


@given(st.integers(2, 30), st.integers(1, 30), st.data())
def test_subsets_are_balanced_over_the_classes(classes: int, per_class: int, more: st.DataObject) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    images = more.draw(st.integers(1, len(labels)))
    counts = np.bincount(labels[subset(labels, images, "test")[0]], minlength=classes)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("classes", [10, 100, 200])
def test_the_validation_split_is_balanced_over_the_classes(classes: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), 50))
    held_out = np.bincount(labels[subset(labels, len(labels), "validation")[1]], minlength=classes)
    assert held_out.tolist() == [5] * classes


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("images", ["all", 300, 64])
def test_as_many_images_are_trained_on_as_config_says(split: data.Split, images: Any) -> None:
    config = TrialConfig(
        data=DataConfig(dataset="digits", train_images=images, batch_size=16), evaluate=EvaluateConfig(split=split)
    )
    train, evaluate = load(config.data, split=split)
    assert len(train) == training_images(config)
    assert len(evaluate) == (360 if split == "test" else validation_images(config.data))


def test_a_warm_process_does_not_load_again() -> None:
    config = DataConfig(dataset="digits", train_images=100)
    first = load(config)
    again = load(DataConfig(dataset="digits", train_images=100, batch_size=10, augmentation="none"))
    assert first[0].pixels_NCHW.data_ptr() == again[0].pixels_NCHW.data_ptr()
    assert len(load(DataConfig(dataset="digits", train_images=200))[0]) == 200


# ------------------------------------------------------------------------------------------------ folders and checks


FILES = {"cifar-10-batches-py/data_batch_1": b"one", "cifar-10-batches-py/test_batch": b"two"}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CIFAR-10 of two short files, and the checksums that go with it."""
    monkeypatch.setitem(data._MD5, "cifar10", {name: hashlib.md5(text).hexdigest() for name, text in FILES.items()})
    folder = tmp_path / "published"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def test_a_folder_with_the_published_files_passes(published: Path) -> None:
    check("cifar10", published)


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_some_datasets_need_no_files(dataset: str) -> None:
    check(dataset, None)


def test_no_folder_says_how_to_get_one() -> None:
    with pytest.raises(DatasetError, match=r"cifar10 needs its files") as caught:
        check("cifar10", None)
    for advice in ("mixmo data get cifar10 DEST", "--data DEST", "MIXMO_DATA=DEST"):
        assert advice in str(caught.value)


def test_load_refuses_what_check_refuses(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cifar100 needs its files"):
        load(DataConfig(dataset="cifar100"))
    with pytest.raises(DatasetError, match="no folder cifar-100-python in it"):
        load(DataConfig(dataset="cifar100"), folder=tmp_path)


def test_a_missing_file_is_named(published: Path) -> None:
    (published / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(DatasetError, match=r"test_batch: No such file or directory\. Get it with `mixmo data get"):
        check("cifar10", published)


@pytest.mark.parametrize("damage", [b"twO", b"tw", b"", b"two two"])
def test_a_changed_file_is_named_even_after_a_check_that_passed(published: Path, damage: bytes) -> None:
    check("cifar10", published)
    path = published / "cifar-10-batches-py/test_batch"
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))  # a coarse clock could leave the time as it was
    with pytest.raises(DatasetError, match=r"test_batch: damaged, or not the published file"):
        check("cifar10", published)


def test_files_are_hashed_once_while_they_stay_the_same(published: Path) -> None:
    check("cifar10", published)
    check("cifar10", published)
    assert data._md5.cache_info().misses == len(FILES)


def test_the_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, reader in {"cifar10": CIFAR10, "cifar100": CIFAR100}.items():
        listed = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
        assert data._MD5[name] == {f"{reader.base_folder}/{file}": md5 for file, md5 in listed}
        assert data.FOLDERS[name] == reader.base_folder
        assert data.ARCHIVES[name] == reader.filename


def test_neither_torchvision_nor_scikit_learn_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, mixmo_core.data as d; d.check('digits', None); print({'torchvision', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("given_as", ["the folder above", "the folder", "the archive's folder", "the archive"])
def test_files_are_copied_from_a_folder(published: Path, tmp_path: Path, given_as: str) -> None:
    source = published
    if given_as == "the folder":
        source = published / "cifar-10-batches-py"
    if given_as.startswith("the archive"):
        source = tmp_path / "archives"
        source.mkdir()
        with tarfile.open(source / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(published / "cifar-10-batches-py", "cifar-10-batches-py")
    if given_as == "the archive":
        source /= "cifar-10-python.tar.gz"
    destination = tmp_path / "not" / "there" / "yet"
    assert fetch("cifar10", destination, source) == destination / "cifar-10-batches-py"
    assert {name: (destination / name).read_bytes() for name in FILES} == FILES
    check("cifar10", destination)


def test_what_is_there_already_is_not_fetched_again(published: Path) -> None:
    assert fetch("cifar10", published, source=published / "no such folder") == published / "cifar-10-batches-py"


def test_a_half_copied_folder_is_completed(published: Path, tmp_path: Path) -> None:
    half = tmp_path / "half" / "cifar-10-batches-py"
    half.mkdir(parents=True)
    (half / "test_batch").write_bytes(b"t")
    fetch("cifar10", tmp_path / "half", published)
    check("cifar10", tmp_path / "half")


def test_a_damaged_source_is_not_copied(published: Path, tmp_path: Path) -> None:
    (published / "cifar-10-batches-py/test_batch").write_bytes(b"wrong")
    with pytest.raises(DatasetError, match=r"test_batch: damaged.*Nothing was copied"):
        fetch("cifar10", tmp_path / "here", published)
    assert not list((tmp_path / "here").iterdir())


def test_a_damaged_archive_is_found_out(published: Path, tmp_path: Path) -> None:
    (published / "cifar-10-batches-py/test_batch").write_bytes(b"wrong")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(published / "cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(DatasetError, match=r"test_batch: damaged.*Delete .* and get cifar10 again"):
        fetch("cifar10", tmp_path / "here", tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 500, 1500])
@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet", "cifar100_c"])
def test_an_archive_that_was_cut_short_is_named(name: str, kept: int, tmp_path: Path) -> None:
    (tmp_path / "folder" / data.FOLDERS[name]).mkdir(parents=True)
    (tmp_path / "folder" / data.FOLDERS[name] / "file").write_bytes(np.random.PCG64(0).random_raw(1000).tobytes())
    archive = tmp_path / data.ARCHIVES[name]
    if archive.suffix == ".zip":
        shutil.make_archive(str(archive.with_suffix("")), "zip", tmp_path / "folder")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as made:
            made.add(tmp_path / "folder" / data.FOLDERS[name], data.FOLDERS[name])
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(DatasetError, match=rf"{archive.name}: damaged or cut short"):
        fetch(name, tmp_path / "here", archive)


def test_an_empty_source_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"neither the folder cifar-100-python nor the file cifar-100-python.tar.gz"):
        fetch("cifar100", tmp_path / "here", tmp_path)


@pytest.mark.parametrize("name", ["digits", "synthetic", "imagenet"])
def test_what_cannot_be_fetched_says_what_can(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{name}: nothing to get.*cifar100, tiny_imagenet, cifar10_c, cifar100_c"):
        fetch(name, tmp_path)


@pytest.mark.parametrize("name", list(data.FOLDERS))
def test_without_internet_the_way_around_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    nowhere = (tmp_path / "nowhere").as_uri()
    monkeypatch.setattr(CIFAR10, "url", nowhere)
    monkeypatch.setattr(CIFAR100, "url", nowhere)
    for each, (_, md5) in data._ORIGINS.items():
        monkeypatch.setitem(data._ORIGINS, each, (nowhere, md5))
    with pytest.raises(DatasetError, match=rf"could not be put into .*bring .*data get {name} .* --from ARCHIVE_OR"):
        fetch(name, tmp_path / "here")


def test_an_unwritable_destination_is_a_dataset_error(published: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="could not be put into"):
        fetch("cifar10", tmp_path / "file" / "below", published)


# ------------------------------------------------------------------------------------------------ what is in the files


def test_cifar_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    train, test = load(DataConfig(dataset="cifar10"), folder=tmp_path)
    assert (len(train), len(test)) == (80, 10)
    assert test.labels_N.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10], r"label 10 of image 9 is no class of cifar10, which has 0 to 9 \(1 such"),
        ([-1] * 10, r"label -1 of image 0 .*\(10 such labels\)"),
        ([0] * 9, r"labels of shape \(9,\), int64, should be 10 integers"),
    ],
)
def test_labels_that_are_no_class_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], what: str
) -> None:
    made_cifar.write_cifar10(tmp_path, monkeypatch, labels=labels)
    with pytest.raises(DatasetError, match=rf"cifar-10-batches-py: {what}.*Get it with `mixmo data get cifar10 DEST`"):
        load(DataConfig(dataset="cifar10"), folder=tmp_path)


def test_too_few_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = DATASETS["cifar10"]
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setitem(DATASETS, "cifar10", shape)
    with pytest.raises(DatasetError, match=r"train images of shape \(80, 3, 32, 32\), uint8, should be \(50000, 3, 32"):
        load(DataConfig(dataset="cifar10"), folder=tmp_path)


def test_a_file_that_breaks_after_the_check_is_a_dataset_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    check("cifar10", tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    with pytest.raises(DatasetError, match=r"cifar-10-batches-py: cannot be read .*mixmo data get cifar10"):
        load(DataConfig(dataset="cifar10"), folder=tmp_path)


# -------------------------------------------------------------------------------------------------------------- CIFAR-C


def test_the_checksums_name_every_corruption() -> None:
    for name in ("cifar10_c", "cifar100_c"):
        expected = {f"{data.FOLDERS[name]}/{each}.npy" for each in (*data.CORRUPTIONS, "labels")}
        assert set(data._MD5[name]) == expected
        assert len({*data._MD5[name].values()}) == 20
    assert len(set(data.CORRUPTIONS)) == 19
    assert set(data.CORRUPTIONS[data.STANDARD_CORRUPTIONS :]) == {
        "speckle_noise",
        "gaussian_blur",
        "spatter",
        "saturate",
    }


def test_a_trial_needs_the_corrupted_images_only_where_it_measures_them() -> None:
    cifar = TrialConfig(data=DataConfig(dataset="cifar10"), evaluate=EvaluateConfig(robustness="cifar_c"))
    assert needed(cifar) == ("cifar10", "cifar10_c")
    assert needed(TrialConfig(data=DataConfig(dataset="cifar10"))) == ("cifar10",)


def test_corrupted_images_are_read_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = made_cifar.write_cifar10_c(tmp_path, monkeypatch)
    found = corrupted("cifar10", tmp_path)
    assert len(found) == 19
    for name, images in zip(data.CORRUPTIONS, found, strict=True):
        assert isinstance(images.pixels_NHWC, np.memmap)
        parts = list(images.batches(20))
        assert [len(part) for part in parts] == [20, 20, 10]
        assert np.array_equal(torch.cat([part.pixels_NCHW for part in parts]), arrays[name].transpose(0, 3, 1, 2))
        labels = torch.cat([part.labels_N for part in parts])
        assert (labels.tolist(), labels.dtype) == (arrays["labels"].tolist(), torch.int64)


@given(images=st.integers(1, 40), workers=st.integers(1, 5), size=st.integers(1, 9))
def test_the_workers_share_every_file(images: int, workers: int, size: int) -> None:
    pixels = np.arange(images, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=-1)
    made = data.Corrupted(pixels, np.arange(images, dtype=np.int64))
    parts = [list(made.batches(size, rank=rank, workers=workers)) for rank in range(workers)]
    assert all(len(part) <= size for part in itertools.chain(*parts))
    seen = [label for part in itertools.chain(*parts) for label in part.labels_N.tolist()]
    assert seen == list(range(images))
    assert seen == [int(pixel) for part in itertools.chain(*parts) for pixel in part.pixels_NCHW[:, 1, 0, 0]]


def test_missing_corrupted_images_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"no folder CIFAR-100-C in it, so no cifar100_c") as caught:
        check("cifar100_c", tmp_path)
    for advice in ("mixmo data get cifar100_c DEST", "cifar-100-python", "no well-kept library", "robustness to none"):
        assert advice in str(caught.value)
    made_cifar.write_cifar10_c(tmp_path, monkeypatch)
    (tmp_path / "CIFAR-10-C" / "snow.npy").unlink()
    with pytest.raises(DatasetError, match=r"snow\.npy: No such file"):
        corrupted("cifar10", tmp_path)


def test_a_damaged_corrupted_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cifar.write_cifar10_c(tmp_path, monkeypatch)
    path = tmp_path / "CIFAR-10-C" / "fog.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"fog\.npy: damaged, or not the published file"):
        corrupted("cifar10", tmp_path)
    made_cifar.resum(tmp_path, monkeypatch)  # even if such a file had been published
    with pytest.raises(DatasetError, match=r"fog\.npy: not an array that can be read"):
        corrupted("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("instead", "what"),
    [
        ({"fog": np.zeros((50, 3, 32, 32), np.uint8)}, r"fog\.npy: .* \(50, 3, 32, 32\), uint8, should be \(50,"),
        ({"fog": np.zeros((40, 32, 32, 3), np.uint8)}, r"fog\.npy: an array of shape \(40, 32, 32, 3\)"),
        ({"fog": np.zeros((50, 32, 32, 3))}, r"fog\.npy: .*float64, should be .*uint8"),
        ({"fog": np.array([None, "x"])}, r"fog\.npy: not an array that can be read"),
        ({"labels": np.full(50, 10)}, r"labels\.npy: label 10 of image 0 is no class of cifar10_c, which has 0 to 9"),
        ({"labels": np.full(50, 0.5)}, r"labels\.npy: labels of shape \(50,\), float64, should be 50 integers"),
        ({"labels": np.zeros((50, 1), int)}, r"labels\.npy: labels of shape \(50, 1\)"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: dict[str, Any], what: str
) -> None:
    made_cifar.write_cifar10_c(tmp_path, monkeypatch, **instead)
    with pytest.raises(DatasetError, match=rf"{what}.*mixmo data get cifar10_c"):
        corrupted("cifar10", tmp_path)


@pytest.mark.parametrize("given_as", ["folder", "archive"])
def test_corrupted_images_are_fetched_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_as: str
) -> None:
    made_cifar.write_cifar10_c(tmp_path / "elsewhere", monkeypatch)
    source = tmp_path / "elsewhere" / "CIFAR-10-C"
    if given_as == "archive":
        source = tmp_path / "CIFAR-10-C.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "elsewhere" / "CIFAR-10-C", "CIFAR-10-C")
    assert fetch("cifar10_c", tmp_path / "here", source) == tmp_path / "here" / "CIFAR-10-C"
    assert len(corrupted("cifar10", tmp_path / "here")) == 19


# ----------------------------------------------------------------------------------------------------- Tiny ImageNet


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two classes in the original layout: three training images and one test image each, one of them grey."""
    base = tmp_path / "tiny-imagenet-200"
    generator = np.random.default_rng(0)
    (base / "val" / "images").mkdir(parents=True)
    (base / "wnids.txt").write_text("n02\nn01\n")
    annotations = []
    for name in ("n01", "n02"):
        (base / "train" / name / "images").mkdir(parents=True)
        for index in range(4):
            shape = (64, 64) if (name, index) == ("n02", 1) else (64, 64, 3)
            image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            if index < 3:
                image.save(base / "train" / name / "images" / f"{name}_{index}.JPEG")
            else:
                image.save(base / "val" / "images" / f"val_{name}.JPEG")
                annotations.append(f"val_{name}.JPEG\t{name}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    return base


def test_tiny_imagenet_is_read_in_its_original_layout(tiny: Path) -> None:
    (pixels, labels), (test_pixels, test_labels) = data._tiny_imagenet(tiny)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test_labels.tolist() == [0, 1]
    assert pixels.shape == (6, 3, 64, 64)
    for array, path in ((pixels[4], "train/n02/images/n02_1.JPEG"), (test_pixels[1], "val/images/val_n02.JPEG")):
        assert np.array_equal(array, np.asarray(Image.open(tiny / path).convert("RGB")).transpose(2, 0, 1))


def test_an_unreadable_image_is_named(tiny: Path) -> None:
    path = tiny / "train/n01/images/n01_0.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"n01_0\.JPEG: not an image that can be read"):
        data._tiny_imagenet(tiny)


def test_a_resized_image_is_named(tiny: Path) -> None:
    Image.new("RGB", (32, 48)).save(tiny / "train/n01/images/n01_0.JPEG")
    with pytest.raises(DatasetError, match=r"n01_0\.JPEG: 32x48 pixels, should be 64x64"):
        data._tiny_imagenet(tiny)


def test_annotations_that_are_cut_short_are_missing_images(tiny: Path) -> None:
    path = tiny / "val" / "val_annotations.txt"
    path.write_text(path.read_text()[:-25])
    faults = list(data._faults("tiny_imagenet", tiny.parent))
    assert faults[-1].endswith("val: incomplete, 1 images, should be 10000")
    path.write_bytes(b"\xff\xfe\x00")
    assert "is no text" in list(data._faults("tiny_imagenet", tiny.parent))[-1]


def test_part_of_tiny_imagenet_is_refused(tiny: Path) -> None:
    with pytest.raises(DatasetError, match=r"wnids\.txt: lists 2 classes, should be 200"):
        check("tiny_imagenet", tiny.parent)
    (tiny / "wnids.txt").write_text("".join(f"n{index:02}\n" for index in range(200)))
    with pytest.raises(DatasetError, match=r"train: incomplete, 6 images, should be 100000"):
        check("tiny_imagenet", tiny.parent)
    (tiny / "val" / "val_annotations.txt").unlink()
    faults = list(data._faults("tiny_imagenet", tiny.parent))
    assert faults[-1].endswith("val_annotations.txt: No such file or directory")


# -------------------------------------------------------------------------------------------------- batch repetition


def hold_to_the_rules(indices_SMB: Tensor, images: int, B: int, repetition: int, M: int, rho: float) -> None:
    distinct = -(-B // repetition)
    slots = distinct * repetition
    assert indices_SMB.shape == (images // distinct, M, slots)
    assert indices_SMB.dtype == torch.int64
    seen: Counter[int] = Counter()
    fixed = int(slots * rho)
    for batch in indices_SMB:
        counts = [Counter(each.tolist()) for each in batch]
        assert all(count == counts[0] for count in counts), "each subnetwork sees the same images"
        assert set(counts[0].values()) == {repetition}, "each image occurs `repetition` times"
        seen.update(counts[0])
        assert (batch[:, :fixed] == batch[0, :fixed]).all(), "the first slots are the same for all"
        starts = batch[0, :fixed:repetition].repeat_interleave(repetition)[:fixed]
        assert torch.equal(batch[0, :fixed], starts), "and repeats follow each other there"
    assert set(seen.values()) <= {repetition}, "no image is in two batches"
    assert set(seen) <= set(range(images))


GOLDEN_CASES = [(b, rho, M) for b in (1, 2, 3, 4) for rho in (0.0, 0.3, 1.0) for M in (2, 3)]


@pytest.mark.shared
@pytest.mark.parametrize(("b", "rho", "M"), GOLDEN_CASES)
def test_the_reference_and_we_keep_the_same_rules(golden: Callable[[str], Any], b: int, rho: float, M: int) -> None:
    recorded = torch.from_numpy(golden("batch_repetition.npz")[f"b{b}_rho{rho}_M{M}_idx"])
    hold_to_the_rules(recorded, 50, 16, b, M, rho)
    ours = batch_repetition(50, 16, b, M, input_repetition=rho, generator=torch.Generator().manual_seed(5))
    assert ours.shape == recorded.shape


@pytest.mark.shared
@pytest.mark.parametrize(("b", "rho", "M"), GOLDEN_CASES)
def test_the_references_permutations_give_its_batches(golden: Callable[[str], Any], b: int, rho: float, M: int) -> None:
    recorded = torch.from_numpy(golden("batch_repetition.npz")[f"b{b}_rho{rho}_M{M}_idx"])
    distinct = recorded.shape[2] // b
    batches_SB = torch.arange(len(recorded) * distinct).reshape(-1, distinct).repeat_interleave(b, dim=1)
    permutations = torch.empty_like(recorded)
    for step, batch in enumerate(recorded):
        # The first permutes the batch, every other permutes the first.
        for m, row in enumerate(batch):
            permutations[step, m] = permutation(batches_SB[step] if m == 0 else batch[0], row)
    assert torch.equal(permutations.sort().values, torch.arange(distinct * b).expand_as(permutations))
    assert torch.equal(arrange(batches_SB, permutations), recorded)
    if rho == 1:
        still = torch.arange(distinct * b).expand_as(permutations)
        assert torch.equal(arrange(batches_SB, still), recorded)


def permutation(source_B: Tensor, result_B: Tensor) -> Tensor:
    """One of the permutations with source[permutation] = result."""
    order = torch.empty_like(source_B)
    order[result_B.argsort(stable=True)] = source_B.argsort(stable=True)
    return order


@given(
    images=st.integers(1, 120), distinct=st.integers(1, 12), repetition=st.integers(1, 4), M=st.integers(1, 4),
    rho=st.sampled_from([0.0, 0.25, 0.5, 1.0]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_batches_keep_the_rules(images: int, distinct: int, repetition: int, M: int, rho: float, seed: int) -> None:
    B = distinct * repetition

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return batch_repetition(images, B, repetition, M, input_repetition=rho, generator=generator)

    indices = draw()
    hold_to_the_rules(indices, images, B, repetition, M, rho)
    assert torch.equal(indices, draw())


@pytest.mark.parametrize(("repetition", "expected"), [(1, 1 / 64), (4, 4 / 64)])
def test_subnetworks_meet_the_same_image_as_often_as_chance_has_it(repetition: int, expected: float) -> None:
    """Facts of the reference: with independent shuffles, P(same image) = b / B."""
    indices = batch_repetition(20_000, 64, repetition, 2, generator=torch.Generator().manual_seed(0))
    same = (indices[:, 0] == indices[:, 1]).double().mean().item()
    assert same == pytest.approx(expected, abs=5 * (expected / indices[:, 0].numel()) ** 0.5)


def test_every_image_is_as_likely_to_be_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    left_out = torch.zeros(10)
    for _ in range(2000):
        seen = batch_repetition(10, 8, 2, 2, generator=generator).flatten()
        left_out[torch.ones(10, dtype=torch.bool).index_fill(0, seen, False)] += 1
    assert left_out.sum() == 2000 * 2
    assert (left_out - 400).abs().max() < 5 * 400**0.5


# ---------------------------------------------------------------------------------------------------- the real images


@pytest.fixture(scope="session")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """CIFAR-10 byte for byte as published, laid out in a folder; and the function that reads the packed images."""
    folder = tmp_path_factory.mktemp("cifar")
    script = runpy.run_path(str(shared_data / "materialise.py"))
    script["cifar10"](folder, verify=True, npz=False)
    yield folder, lambda split: script["load"]("cifar10", split)
    shutil.rmtree(folder)  # pytest would keep the 180 MB of three runs


@pytest.mark.slow
@pytest.mark.shared
def test_real_cifar10(real: tuple[Path, Any], tmp_path: Path) -> None:
    folder, packed = real
    check("cifar10", folder)
    train, test = load(DataConfig(dataset="cifar10"), folder=folder)
    for images, split in ((train, "train"), (test, "test")):
        pixels, labels, _, _ = packed(split)
        assert np.array_equal(images.pixels_NCHW.numpy(), pixels.transpose(0, 3, 1, 2))
        assert np.array_equal(images.labels_N.numpy(), labels["label"])
    share = train.pixels_NCHW[::5].double() / 255
    torch.testing.assert_close(share.mean(dim=(0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=0.01,
                               rtol=0)  # fmt: skip

    few, held_out = load(DataConfig(dataset="cifar10", train_images=2000), split="validation", folder=folder)
    assert few.labels_N.bincount().tolist() == [180] * 10
    assert held_out.labels_N.bincount().tolist() == [20] * 10

    copied = fetch("cifar10", tmp_path / "copy", folder)
    damaged = copied / "data_batch_3"
    with damaged.open("r+b") as file:
        file.seek(10_000_000)
        byte = file.read(1)
        file.seek(10_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DatasetError, match="data_batch_3: damaged"):
        load(DataConfig(dataset="cifar10"), folder=tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")


@pytest.mark.shared
def test_the_subset_of_tiny_imagenet_is_refused_and_yet_readable(shared_data: Path, tmp_path: Path) -> None:
    runpy.run_path(str(shared_data / "materialise.py"))["tiny"](tmp_path, verify=True, npz=False)
    with pytest.raises(DatasetError, match=r"train: incomplete, 5000 images, should be 100000"):
        check("tiny_imagenet", tmp_path)
    (pixels, labels), (test_pixels, test_labels) = data._tiny_imagenet(tmp_path / "tiny-imagenet-200")
    assert pixels.shape == (5000, 3, 64, 64)
    assert test_pixels.shape == (2000, 3, 64, 64)
    assert np.bincount(labels).tolist() == [25] * 200
    assert np.bincount(test_labels).tolist() == [10] * 200
