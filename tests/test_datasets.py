"""Datasets in a bucket, copied once to each host."""

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import made_cifar
import pytest

from mixmo_core import data
from orchestrator import datasets
from orchestrator.errors import UnreachableError, UsageError
from orchestrator.store import ResultStore

FILES = sorted(
    f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")
)


class Lying(NamedTuple):
    """A dataset in a bucket, and the host that wants it."""

    place: str
    published: Path
    cache: Path

    def put(self, key: str, content: bytes) -> None:
        ResultStore.open(self.place).folder.put(key, content)

    def copied(self) -> Path:
        folder = datasets.on_this_host(["cifar10", "digits"], self.place)
        assert folder is not None
        assert folder == datasets.local(self.place)
        return folder


@pytest.fixture
def lying(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lying]:
    made_cifar.forget()
    made = Lying(bucket.replace("/some/results", "/data"), tmp_path / "published", tmp_path / "cache")
    made_cifar.write_cifar10(made.published, monkeypatch)
    monkeypatch.setenv("MIXMO_DATA_CACHE", str(made.cache))
    for key in FILES:
        made.put(key, (made.published / key).read_bytes())
    yield made
    made_cifar.forget()


def counted(lying: Lying, patch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are copied from here on."""
    from orchestrator.store.bucket import Bucket

    copied: list[str] = []
    download = Bucket.download

    def watched(self: Bucket, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        copied.append(key)
        return download(self, key, local, accept)

    patch.setattr(Bucket, "download", watched)
    return copied


def test_a_dataset_is_copied_once_and_only_what_is_missing_is_copied_again(
    lying: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = counted(lying, monkeypatch)
    datasets.check(["cifar10", "digits"], lying.place)
    folder = lying.copied()
    data.check("cifar10", folder)
    assert sorted(copied) == FILES
    lying.copied()
    assert len(copied) == len(FILES)
    (folder / FILES[0]).unlink()  # as a kill in the middle of a copy leaves it
    (folder / FILES[1]).write_bytes(b"half")
    lying.copied()
    assert sorted(copied[len(FILES) :]) == FILES[:2]
    data.check("cifar10", folder)


def _copy(place: str, sums: dict[str, str], start: Any, done: Any) -> None:
    """In a process of its own, which knows the made checksums."""
    data._MD5["cifar10"] = sums
    from orchestrator.store.bucket import Bucket

    download, copied = Bucket.download, 0

    def watched(self: Bucket, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        nonlocal copied
        copied += 1
        return download(self, key, local, accept)

    Bucket.download = watched  # type: ignore[method-assign]
    start.wait(120)
    folder = datasets.on_this_host(["cifar10"], place)
    data.check("cifar10", folder)
    done.put((copied, str(folder)))


def test_two_processes_that_start_at_once_share_one_copy(lying: Lying) -> None:
    spawn = multiprocessing.get_context("fork")
    start, done = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=_copy, args=(lying.place, data._MD5["cifar10"], start, done)) for _ in range(2)]
    for process in both:
        process.start()
    told = [done.get(timeout=180) for _ in both]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(copied for copied, _ in told) == [0, len(FILES)]
    assert len({folder for _, folder in told}) == 1


def test_an_object_that_was_cut_short_is_tried_again_and_then_named(
    lying: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (lying.published / FILES[2]).read_bytes()
    lying.put(FILES[2], whole[: len(whole) // 2])
    copied = counted(lying, monkeypatch)
    with pytest.raises(
        UnreachableError, match=rf"copied 3 times and is not what was published: .*{Path(FILES[2]).name}"
    ):
        lying.copied()
    assert copied.count(FILES[2]) == datasets.TRIES
    lying.put(FILES[2], whole)  # as the message says
    data.check("cifar10", lying.copied())


def test_an_answer_that_is_cut_short_once_costs_a_second_try(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.store.bucket import Bucket

    download, cut = Bucket.download, [FILES[3]]

    def once(self: Bucket, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        found = download(self, key, local, accept)
        if key in cut:
            cut.remove(key)
            os.truncate(local, 10)
        return found

    monkeypatch.setattr(Bucket, "download", once)
    data.check("cifar10", lying.copied())
    assert not cut


def test_an_archive_is_unpacked_held_to_its_checksums_and_gone(lying: Lying, bucket: str, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "cifar-10-python"), "gztar", lying.published)
    other = Lying(bucket.replace("/some/results", "/archives"), lying.published, lying.cache)
    other.put("cifar-10-python.tar.gz", Path(archive).read_bytes())
    folder = other.copied()
    data.check("cifar10", folder)
    assert not list(folder.glob("*.tar.gz"))


def test_what_is_not_in_the_bucket_is_refused_before_anything_starts(lying: Lying, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"holds neither cifar-100-python/ nor cifar-100-python.tar.gz, so no cifar100"
    ):
        datasets.check(["cifar10", "cifar100"], lying.place)
    with pytest.raises(UnreachableError, match="holds neither"):
        datasets.on_this_host(["cifar100"], lying.place)
    with pytest.raises(UsageError, match="cifar10 needs its files"):
        datasets.check(["cifar10"], None)
    assert datasets.on_this_host(["cifar10"], None) is None
    assert datasets.on_this_host(["cifar10"], str(lying.published)) == lying.published


def test_too_little_room_is_said_before_anything_is_copied(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = counted(lying, monkeypatch)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(UnreachableError, match=r"cifar10 needs \d+ MB, and 0 MB are free.*MIXMO_DATA_CACHE"):
        lying.copied()
    assert copied == []


def test_a_disk_that_fills_up_meanwhile_is_said_and_the_next_try_goes_on(
    lying: Lying, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", small], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("NO FULL DISK WAS TESTED: it takes the right to mount one")
    try:
        monkeypatch.setenv("MIXMO_DATA_CACHE", str(small))
        real = shutil.disk_usage("/")
        monkeypatch.setattr("shutil.disk_usage", lambda place: real)  # another fills it after the look
        with pytest.raises(UnreachableError, match=r"No space left on device.*[Mm]ake room"):
            lying.copied()
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        data.check("cifar10", lying.copied())
    finally:
        subprocess.run(["umount", small], check=True)
