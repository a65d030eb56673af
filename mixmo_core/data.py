"""Datasets as arrays that live on the device, and the batch-repetition sampler.

`digits` and `synthetic` need no files. The others lie in a folder that the user names, in the layout in which they are
published: `cifar-10-batches-py/`, `cifar-100-python/`, `tiny-imagenet-200/`, and `CIFAR-10-C/` or `CIFAR-100-C/` for
the corrupted test images. What is drawn here (the subset of the
training images, the validation split, the synthetic images) comes from raw PCG64 output, whose stream NumPy promises
never to change, and not from a generator's methods, whose streams it may.
"""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixmo_core.config import DATASETS, DataConfig, TrialConfig

Split = Literal["test", "validation"]
Pixels = npt.NDArray[np.uint8]
"""(N, C, H, W)."""
Labels = npt.NDArray[np.int64]

DIGITS_SEED = 1
SUBSET_SEED = 2
SYNTHETIC_SEED = 3
"""Constants of the datasets, never of a trial: another value would be another dataset."""


class DatasetError(ValueError):
    """A dataset whose files are missing, incomplete or not what was published."""


@dataclass(frozen=True, slots=True)
class Images:
    pixels_NCHW: Tensor
    """uint8, on the device."""
    labels_N: Tensor
    """int64, on the device."""

    def __len__(self) -> int:
        return len(self.labels_N)


# ------------------------------------------------------------------------------------------ what has to be in a folder

_MD5 = {
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "cifar100": {
        "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
        "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
    },
    "cifar10_c": {
        "CIFAR-10-C/brightness.npy": "0a81ef75e0b523c3383219c330a85d48",
        "CIFAR-10-C/contrast.npy": "3c8262171c51307f916c30a3308235a8",
        "CIFAR-10-C/defocus_blur.npy": "7d1322666342a0702b1957e92f6254bc",
        "CIFAR-10-C/elastic_transform.npy": "9421657c6cd452429cf6ce96cc412b5f",
        "CIFAR-10-C/fog.npy": "7b397314b5670f825465fbcd1f6e9ccd",
        "CIFAR-10-C/frost.npy": "31f6ab3bce1d9934abfb0cc13656f141",
        "CIFAR-10-C/gaussian_blur.npy": "c33370155bc9b055fb4a89113d3c559d",
        "CIFAR-10-C/gaussian_noise.npy": "ecaf8b9a2399ffeda7680934c33405fd",
        "CIFAR-10-C/glass_blur.npy": "7361fb4019269e02dbf6925f083e8629",
        "CIFAR-10-C/impulse_noise.npy": "2090e01c83519ec51427e65116af6b1a",
        "CIFAR-10-C/jpeg_compression.npy": "2b9cc4c864e0193bb64db8d7728f8187",
        "CIFAR-10-C/labels.npy": "c439b113295ed5254878798ffe28fd54",
        "CIFAR-10-C/motion_blur.npy": "fffa5f852ff7ad299cfe8a7643f090f4",
        "CIFAR-10-C/pixelate.npy": "0f14f7e2db14288304e1de10df16832f",
        "CIFAR-10-C/saturate.npy": "1cfae0964219c5102abbb883e538cc56",
        "CIFAR-10-C/shot_noise.npy": "3a7239bb118894f013d9bf1984be7f11",
        "CIFAR-10-C/snow.npy": "bb238de8555123da9c282dea23bd6e55",
        "CIFAR-10-C/spatter.npy": "8a5a3903a7f8f65b59501a6093b4311e",
        "CIFAR-10-C/speckle_noise.npy": "ef00b87611792b00df09c0b0237a1e30",
        "CIFAR-10-C/zoom_blur.npy": "6ea8e63f1c5cdee1517533840641641b",
    },
    "cifar100_c": {
        "CIFAR-100-C/brightness.npy": "f22d7195aecd6abb541e27fca230c171",
        "CIFAR-100-C/contrast.npy": "322bb385f1d05154ee197ca16535f71e",
        "CIFAR-100-C/defocus_blur.npy": "d923e3d9c585a27f0956e2f2ad832564",
        "CIFAR-100-C/elastic_transform.npy": "a0792bd6581f6810878be71acedfc65a",
        "CIFAR-100-C/fog.npy": "4efc7ebd5e82b028bdbe13048e3ea564",
        "CIFAR-100-C/frost.npy": "3a39c6823bdfaa0bf8b12fe7004b8117",
        "CIFAR-100-C/gaussian_blur.npy": "5204ba0d557839772ef5a4196a052c3e",
        "CIFAR-100-C/gaussian_noise.npy": "ecc4d366eac432bdf25c024086f5e97d",
        "CIFAR-100-C/glass_blur.npy": "0bf384f38e5ccbf8dd479d9059b913e1",
        "CIFAR-100-C/impulse_noise.npy": "3b3c210ddfa0b5cb918ff4537a429fef",
        "CIFAR-100-C/jpeg_compression.npy": "c851b7f1324e1d2ffddeb76920576d11",
        "CIFAR-100-C/labels.npy": "bb4026e9ce52996b95f439544568cdb2",
        "CIFAR-100-C/motion_blur.npy": "732a7e2e54152ff97c742d4c388c5516",
        "CIFAR-100-C/pixelate.npy": "96c00c60f144539e14cffb02ddbd0640",
        "CIFAR-100-C/saturate.npy": "c0697e9fdd646916a61e9c312c77bf6b",
        "CIFAR-100-C/shot_noise.npy": "b0a1fa6e1e465a747c1b204b1914048a",
        "CIFAR-100-C/snow.npy": "0237be164583af146b7b144e73b43465",
        "CIFAR-100-C/spatter.npy": "12ccf41d62564d36e1f6a6ada5022728",
        "CIFAR-100-C/speckle_noise.npy": "e3f215b1a0f9fd9fd6f0d1cf94a7ce99",
        "CIFAR-100-C/zoom_blur.npy": "0204613400c034a81c4830d5df81cb82",
    },
}
"""The published files. torchvision checks the same sums of CIFAR, but to import it takes seconds and torch; those of
CIFAR-C are the ones that torch-uncertainty checks.
"""

FOLDERS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "tiny_imagenet": "tiny-imagenet-200",
    "cifar10_c": "CIFAR-10-C",
    "cifar100_c": "CIFAR-100-C",
}
"""The datasets that need files, and the folder that holds them as they are published."""

ARCHIVES = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "tiny_imagenet": "tiny-imagenet-200.zip",
    "cifar10_c": "CIFAR-10-C.tar",
    "cifar100_c": "CIFAR-100-C.tar",
}
_ORIGINS = {
    "tiny_imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    "cifar10_c": ("https://zenodo.org/record/2535967/files/CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100_c": ("https://zenodo.org/record/3555552/files/CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3"),
}
"""Where the authors of those that torchvision does not know publish the archive, and its MD5."""

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
"""Of CIFAR-C (Hendrycks and Dietterich, ICLR 2019): first the 15 that benchmarks count, then the 4 others."""
STANDARD_CORRUPTIONS = 15
_CLEAN = {"cifar10_c": "cifar10", "cifar100_c": "cifar100"}


def needed(config: TrialConfig) -> tuple[str, ...]:
    """The datasets that a trial reads: its own, and the corrupted test images where it measures robustness."""
    own = config.data.dataset
    return (own, f"{own}_c") if config.evaluate.robustness == "cifar_c" else (own,)


def check(dataset: str, folder: Path | None) -> None:
    """Raises DatasetError unless every file of the dataset is in `folder`, whole and as it was published.

    Meant to run before anything starts: it unpickles nothing. Files of CIFAR and CIFAR-C are held to their checksums
    (each file once per process, as long as its size and time of change stay the same), Tiny ImageNet's to their number.
    """
    if dataset not in FOLDERS:
        return
    if folder is None:
        raise DatasetError(f"{dataset} needs its files, and no folder was given. {_advice(dataset)}")
    if not (folder / FOLDERS[dataset]).is_dir():
        raise DatasetError(f"{folder}: no folder {FOLDERS[dataset]} in it, so no {dataset}. {_advice(dataset)}")
    fault = next(_faults(dataset, folder), None)
    if fault:
        raise DatasetError(f"{fault}. {_advice(dataset)}")


def _advice(dataset: str) -> str:
    advice = (
        f"Get it with `mixmo data get {dataset} DEST`, then point to it with `--data DEST` or MIXMO_DATA=DEST "
        f"(DEST holds {FOLDERS[dataset]})"
    )
    if dataset in _CLEAN:
        advice += (
            f". It is the folder that holds {FOLDERS[_CLEAN[dataset]]}. Only the published files are measured: no "
            f"well-kept library corrupts 32-pixel images at their severities. Or set evaluate.robustness to none"
        )
    return advice


def _faults(dataset: str, folder: Path) -> Iterator[str]:
    if dataset == "tiny_imagenet":
        yield from _tiny_faults(folder / FOLDERS[dataset])
        return
    for name, expected in _MD5[dataset].items():
        path = folder / name
        try:
            status = path.stat()
            got = _md5(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            yield f"{path}: {error.strerror or error}"
            continue
        if got != expected:
            yield f"{path}: damaged, or not the published file ({status.st_size} bytes, md5 {got} and not {expected})"


@lru_cache(maxsize=128)
def _md5(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _tiny_faults(base: Path) -> Iterator[str]:
    try:
        classes = len(_tiny_classes(base))
        if classes != 200:
            yield f"{base / 'wnids.txt'}: lists {classes} classes, should be 200"
        for name, paths in (("train", _tiny_train_files(base)), ("val", _tiny_test_files(base))):
            expected = DATASETS["tiny_imagenet"].train_images if name == "train" else 10_000
            present = sum(len(files) for files in paths.values())
            if present != expected:
                yield f"{base / name}: incomplete, {present} images, should be {expected}"
    except OSError as error:
        yield f"{error.filename or base}: {error.strerror or error}"
    except UnicodeDecodeError:
        yield f"{base}: damaged, wnids.txt or val_annotations.txt is no text"


# -------------------------------------------------------------------------------------------------------------- loading


def load(
    config: DataConfig, *, split: Split = "test", folder: Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Images, Images]:
    """The images to train on and the images to evaluate on, on the device.

    `config.train_images` of the training images are drawn by a fixed seed, balanced over the classes; fewer are a
    subset of more. `split="validation"` evaluates on a tenth of those, which then are not trained on; the test images
    are not touched. A process keeps what it loaded last, so the next trial on the same images gets the same tensors:
    do not write to them. Raises DatasetError as `check` does.
    """
    return _load(config.dataset, config.images, split, folder, str(device))


@lru_cache(maxsize=2)
def _load(dataset: str, images: int, split: Split, folder: Path | None, device: str) -> tuple[Images, Images]:
    train, test = _read(dataset, folder)
    chosen, held_out = subset(train[1], images, split)
    evaluate = test if split == "test" else (train[0][held_out], train[1][held_out])
    if len(chosen) < len(train[1]):
        train = train[0][chosen], train[1][chosen]
    return _to_device(train, device), _to_device(evaluate, device)


def _to_device(arrays: tuple[Pixels, Labels], device: str) -> Images:
    pixels, labels = (torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in arrays)
    return Images(pixels, labels)


def subset(labels_N: Labels, images: int, split: Split) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Positions, ascending, of the images to train on and of those held out for validation (none for `test`).

    The images are put in a fixed order in which the classes take turns. A subset is the beginning of that order, and
    every tenth image of it is for validation (`config.validation_images` counts them). So both parts are balanced, and
    both grow only at their ends.
    """
    chosen = _turns(labels_N, SUBSET_SEED)[:images]
    held_out = np.zeros(images, dtype=bool)
    if split == "validation":
        held_out[9::10] = True
    return np.sort(chosen[~held_out]), np.sort(chosen[held_out])


def _turns(labels_N: Labels, seed: int) -> npt.NDArray[np.intp]:
    """A fixed shuffle in which the classes take turns; each turn starts one class later than the one before, so that
    every tenth image is not always of the same class.
    """
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(len(labels_N)), kind="stable")
    by_class = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    counts = np.bincount(labels_N)
    turn = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (labels_N[by_class] - turn) % len(counts)
    return by_class[np.lexsort((place, turn))]


@lru_cache(maxsize=1)
def _read(dataset: str, folder: Path | None) -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    """All training images and all test images of a dataset."""
    check(dataset, folder)
    if dataset == "digits":
        return _digits()
    if dataset == "synthetic":
        return _synthetic()
    assert folder is not None  # check() has seen to it
    base, shape = folder / FOLDERS[dataset], DATASETS[dataset]
    if dataset == "tiny_imagenet":
        train, test = _tiny_imagenet(base)
    else:
        train, test = _cifar(dataset, folder, train=True), _cifar(dataset, folder, train=False)
    for part, number, (pixels, labels) in (("train", shape.train_images, train), ("test", shape.test_images, test)):
        expected = (number, shape.channels, shape.size, shape.size)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise DatasetError(
                f"{base}: {part} images of shape {pixels.shape}, {pixels.dtype}, should be {expected}, uint8. "
                f"{_advice(dataset)}"
            )
        _hold_labels(labels, number, dataset, base)
    return train, test


def _hold_labels(labels_N: npt.NDArray[Any], images: int, dataset: str, place: Path) -> None:
    """Raises DatasetError unless there is a label for every image, and each is a class of the dataset."""
    classes = DATASETS[_CLEAN.get(dataset, dataset)].classes
    if labels_N.shape != (images,) or labels_N.dtype.kind not in "iu":
        raise DatasetError(
            f"{place}: labels of shape {labels_N.shape}, {labels_N.dtype}, should be {images} integers. "
            f"{_advice(dataset)}"
        )
    wrong = np.flatnonzero((labels_N < 0) | (labels_N >= classes))
    if len(wrong):
        raise DatasetError(
            f"{place}: label {labels_N[wrong[0]]} of image {wrong[0]} is no class of {dataset}, which has 0 to "
            f"{classes - 1} ({len(wrong)} such labels). {_advice(dataset)}"
        )


def _digits() -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    """The 8x8 digits that come with scikit-learn, 0..16 scaled to 0..255; 36 of each class are test images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = _turns(labels, DIGITS_SEED)
    test, train = np.sort(order[:360]), np.sort(order[360:])
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def _synthetic() -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    """Ten coarse random patterns, one for each class, under heavy noise. Integer arithmetic: the same everywhere."""
    shape = DATASETS["synthetic"]
    bits = np.random.PCG64(SYNTHETIC_SEED)
    number, size = shape.train_images + shape.test_images, shape.size
    patterns = (bits.random_raw(shape.classes * 3 * 4 * 4) >> 56).astype(np.int64).reshape(-1, 3, 4, 4)
    patterns = patterns.repeat(size // 4, axis=-1).repeat(size // 4, axis=-2)
    labels = np.arange(number, dtype=np.int64) % shape.classes
    # The sum of four uniform bytes less its mean: roughly normal, with a deviation of 148.
    noise = (bits.random_raw(number * 3 * size * size * 4) >> 56).astype(np.int64).reshape(number, 3, size, size, 4)
    noisy = (patterns[labels] + (noise.sum(axis=-1) - 510)) // 2 + 64
    pixels = noisy.clip(0, 255).astype(np.uint8)
    cut = shape.train_images
    return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])


def _cifar(dataset: str, folder: Path, *, train: bool) -> tuple[Pixels, Labels]:
    try:
        files = _cifar_reader(dataset)(root=str(folder), train=train, download=False)
    except (OSError, RuntimeError, ValueError, LookupError) as error:  # changed since `check`, or cut short while read
        raise DatasetError(f"{folder / FOLDERS[dataset]}: cannot be read ({error}). {_advice(dataset)}") from error
    return np.ascontiguousarray(files.data.transpose(0, 3, 1, 2)), np.asarray(files.targets, dtype=np.int64)


def _cifar_reader(dataset: str) -> Any:
    from torchvision import datasets  # seconds, which a sweep on digits does not pay

    return datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100


def _tiny_classes(base: Path) -> list[str]:
    """The classes' names in alphabetical order, which gives them their numbers, as torchvision's ImageFolder does."""
    return sorted((base / "wnids.txt").read_text().split())


def _tiny_train_files(base: Path) -> dict[str, list[Path]]:
    return {name: sorted((base / "train" / name / "images").glob("*.JPEG")) for name in _tiny_classes(base)}


def _tiny_test_files(base: Path) -> dict[str, list[Path]]:
    """The official validation images, which everybody tests on: the test images' labels were never published."""
    files: dict[str, list[Path]] = {name: [] for name in _tiny_classes(base)}
    present = {path.name: path for path in (base / "val" / "images").glob("*.JPEG")}
    for line in (base / "val" / "val_annotations.txt").read_text().splitlines():
        image, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if image in present and name in files:
            files[name].append(present[image])
    return files


def _tiny_imagenet(base: Path) -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    return _decode(_tiny_train_files(base)), _decode(_tiny_test_files(base))


def _decode(files: dict[str, list[Path]]) -> tuple[Pixels, Labels]:
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_decode_one, (path for paths in files.values() for path in paths)))
    return np.stack(images), labels


def _decode_one(path: Path) -> Pixels:
    from torchvision.datasets.folder import pil_loader

    try:
        pixels = np.asarray(pil_loader(str(path)))
    except OSError as error:
        raise DatasetError(f"{path}: not an image that can be read ({error}). {_advice('tiny_imagenet')}") from error
    if pixels.shape != (64, 64, 3):
        raise DatasetError(
            f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, should be 64x64: not the original data"
        )
    return pixels.transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------- corrupted


@dataclass(frozen=True, slots=True)
class Corrupted:
    """The test images under one corruption at five severities. They stay on the disk until a batch of them is read."""

    pixels_NHWC: Pixels
    labels_N: Labels

    def batches(
        self, size: int, *, device: torch.device | str = "cpu", rank: int = 0, workers: int = 1
    ) -> Iterator[Images]:
        """One worker's share, `size` images at a time, on the device."""
        first, end = (len(self.labels_N) * each // workers for each in (rank, rank + 1))
        for start in range(first, end, size):
            part = slice(start, min(start + size, end))
            # Not a view: torch wants memory that can be written to.
            pixels_NCHW = np.array(self.pixels_NHWC[part].transpose(0, 3, 1, 2), order="C")
            yield _to_device((pixels_NCHW, self.labels_N[part]), str(device))


def corrupted(dataset: str, folder: Path | None) -> list[Corrupted]:
    """The published corrupted test images of `cifar10` or `cifar100`, in the order of CORRUPTIONS.

    Raises DatasetError as `check` does, and for arrays that are not (5 N, 32, 32, 3) uint8 or labels that are no class.
    """
    name = f"{dataset}_c"
    check(name, folder)
    assert folder is not None  # check() has seen to it
    base, size = folder / FOLDERS[name], DATASETS[dataset].size
    labels_N = _array(base / "labels.npy", name)
    _hold_labels(labels_N, labels_N.size, name, base / "labels.npy")
    labels_N = labels_N.astype(np.int64)
    shape = (len(labels_N), size, size, 3)
    found = []
    for corruption in CORRUPTIONS:
        path = base / f"{corruption}.npy"
        pixels_NHWC = _array(path, name)
        if pixels_NHWC.shape != shape or pixels_NHWC.dtype != np.uint8:
            raise DatasetError(
                f"{path}: an array of shape {pixels_NHWC.shape}, {pixels_NHWC.dtype}, should be {shape}, uint8. "
                f"{_advice(name)}"
            )
        found.append(Corrupted(pixels_NHWC, labels_N))
    return found


def _array(path: Path, dataset: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: not an array that can be read ({error}). {_advice(dataset)}") from error
    return array


# ------------------------------------------------------------------------------------------------- getting the files


def fetch(name: str, destination: Path, source: Path | None = None) -> Path:
    """Puts a dataset's files into `destination` and checks them; returns the folder that holds them.

    They are downloaded from their authors, or taken from `source`: a folder with the files, the folder above it, the
    published archive, or a folder with that. Nothing is done when they are there already; half-done work is done
    again. Raises DatasetError with what to do when it cannot be had.
    """
    if name not in FOLDERS:
        known = ", ".join(FOLDERS)
        raise DatasetError(f"{name}: nothing to get. digits and synthetic need no files; to be had are {known}")
    target = destination / FOLDERS[name]
    if target.is_dir() and next(_faults(name, destination), None) is None:
        return target
    try:
        destination.mkdir(parents=True, exist_ok=True)
        if source is None:
            _download(name, destination)
        else:
            _copy(name, destination, source)
    except DatasetError:
        raise
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for an archive with a wrong checksum
        raise DatasetError(
            f"{name} could not be put into {destination}: {error}. Where there is no internet, bring {FOLDERS[name]} "
            f"or {ARCHIVES[name]} from elsewhere and run `mixmo data get {name} {destination} --from ARCHIVE_OR_FOLDER`"
        ) from error
    fault = next(_faults(name, destination), None)
    if fault:
        raise DatasetError(f"{fault}. Delete {target} and get {name} again")
    return target


def _download(name: str, destination: Path) -> None:
    from torchvision import datasets

    if name in _ORIGINS:
        url, md5 = _ORIGINS[name]
        datasets.utils.download_and_extract_archive(
            url, str(destination), filename=ARCHIVES[name], md5=md5, remove_finished=True
        )
    else:
        _cifar_reader(name)(root=str(destination), download=True)


def _copy(name: str, destination: Path, source: Path) -> None:
    archive = source if source.is_file() else source / ARCHIVES[name]
    if archive.is_file():
        from torchvision.datasets.utils import extract_archive

        try:
            extract_archive(str(archive), str(destination))
        except (OSError, RuntimeError):
            raise
        except Exception as error:  # whatever an archive that was cut short makes of the many readers
            raise DatasetError(
                f"{archive}: damaged or cut short, it cannot be unpacked ({error}). Bring {name} again"
            ) from error
        return
    above = source.parent if source.name == FOLDERS[name] else source
    if not (above / FOLDERS[name]).is_dir():
        raise DatasetError(f"{source}: holds neither the folder {FOLDERS[name]} nor the file {ARCHIVES[name]}")
    fault = next(_faults(name, above), None)
    if fault:
        raise DatasetError(f"{fault}. Nothing was copied")
    shutil.copytree(above / FOLDERS[name], destination / FOLDERS[name], dirs_exist_ok=True)


# ---------------------------------------------------------------------------------------------------- batch repetition


def batch_repetition(
    images: int,
    batch_size: int,
    repetition: int,
    subnetworks: int,
    *,
    input_repetition: float = 0.0,
    generator: torch.Generator,
) -> Tensor:
    """An epoch's batches: positions of images (steps, M, B), int64, on the generator's device.

    A batch has B / repetition distinct images, each `repetition` times; images that do not fill a batch sit this epoch
    out. Each subnetwork sees the same images in an order of its own, except in the first `input_repetition` of the
    slots, where all see the same.
    """
    distinct = -(-batch_size // repetition)
    steps = images // distinct
    order = torch.randperm(images, generator=generator, device=generator.device)
    batches_SB = order[: steps * distinct].reshape(steps, distinct).repeat_interleave(repetition, dim=1)
    slots = distinct * repetition
    fixed = int(slots * input_repetition)
    keys = torch.rand((steps, subnetworks, slots - fixed), generator=generator, device=generator.device)
    shuffled = keys.argsort(dim=-1, stable=True) + fixed
    still = torch.arange(fixed, device=generator.device).expand(steps, subnetworks, fixed)
    return arrange(batches_SB, torch.cat((still, shuffled), dim=-1))


def arrange(batches_SB: Tensor, permutations_SMB: Tensor) -> Tensor:
    """Deals each batch out to the subnetworks: the first by its permutation, every other by permuting the first's."""
    first_SB = batches_SB.gather(1, permutations_SMB[:, 0])
    others = [first_SB.gather(1, each_SB) for each_SB in permutations_SMB.unbind(1)[1:]]
    return torch.stack((first_SB, *others), dim=1)
