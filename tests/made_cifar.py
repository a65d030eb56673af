"""CIFAR-10 and CIFAR-10-C of a few random images, in the layout and under the checksums that the code then expects."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from mixmo_core import config, data

TRAIN, TEST, SEVERITIES = 80, 10, 5


def write_cifar10(folder: Path, patch: pytest.MonkeyPatch, *, labels: list[int] | None = None) -> None:
    """`labels` are those of the test images."""
    base, generator = folder / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir(parents=True)
    patch.setitem(config.DATASETS, "cifar10", config.Dataset(TRAIN, TEST, classes=10, size=32))
    files: dict[str, dict[str, Any]] = {"batches.meta": {"label_names": [str(k) for k in range(10)]}}
    for name, number in [*((f"data_batch_{n}", TRAIN // 5) for n in range(1, 6)), ("test_batch", TEST)]:
        pixels = generator.integers(0, 256, (number, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": [index % 10 for index in range(number)]}
    if labels is not None:
        files["test_batch"]["labels"] = labels
    sums = {}
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    patch.setitem(data._MD5, "cifar10", {f"cifar-10-batches-py/{name}": md5 for name, md5 in sums.items()})
    patch.setattr(CIFAR10, "train_list", [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)])
    patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def write_cifar10_c(folder: Path, patch: pytest.MonkeyPatch, **instead: Any) -> dict[str, Any]:
    """The arrays by name; `instead` replaces some of them (`labels=...`, `fog=...`)."""
    base, generator = folder / "CIFAR-10-C", np.random.default_rng(1)
    base.mkdir(parents=True)
    number = TEST * SEVERITIES
    arrays: dict[str, Any] = {
        name: generator.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8) for name in data.CORRUPTIONS
    }
    arrays = {"labels": np.arange(number, dtype=np.uint8) % 10, **arrays, **instead}
    for name, array in arrays.items():
        np.save(base / f"{name}.npy", array)
    resum(folder, patch)
    return arrays


def resum(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """What lies there now is what was published."""
    files = sorted((folder / "CIFAR-10-C").glob("*.npy"))
    sums = {f"CIFAR-10-C/{path.name}": hashlib.md5(path.read_bytes()).hexdigest() for path in files}
    patch.setitem(data._MD5, "cifar10_c", sums)


def forget() -> None:
    """What one test loaded, another loads again."""
    for cached in (data._load, data._read, data._md5):
        cached.cache_clear()
