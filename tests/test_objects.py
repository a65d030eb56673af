"""Objects under a folder: whole, created once, swapped only by those who know what they replace."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from orchestrator.errors import UnreachableError
from orchestrator.store import objects
from orchestrator.store.objects import Folder, Stored, tag_of


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "root")


def test_an_object_is_what_was_put_last(folder: Folder) -> None:
    assert folder.read("a/b") is None
    folder.put("a/b", b"one")
    folder.put("a/b", b"two")
    stored = folder.read("a/b")
    assert stored == Stored(b"two", tag_of(folder.path("a/b")))
    assert folder.digest("a/b") == stored.tag
    assert (folder.read("a/b/c"), folder.digest("a/x")) == (None, None)
    folder.delete("a/b")
    folder.delete("a/b")
    assert folder.read("a/b") is None


@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_an_object_is_created_once(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "local").write_bytes(b"two")
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert not folder.upload("a", tmp_path / "local")
    assert folder.upload("b", tmp_path / "local")
    assert [folder.path(name).read_bytes() for name in ("a", "b")] == [b"one", b"two"]


def test_only_who_knows_the_object_swaps_it(folder: Folder) -> None:
    first = folder.swap("a", b"1", None)
    assert folder.swap("a", b"x", None) is None
    second = folder.swap("a", b"2", first)
    assert second is not None
    assert folder.swap("a", b"x", first) is None
    assert folder.path("a").read_bytes() == b"2"


def test_of_many_swaps_at_once_one_wins(folder: Folder) -> None:
    """Eight threads count to forty together: none is lost."""
    folder.put("count", b"0")

    def count() -> None:
        for _ in range(5):
            while True:
                held = folder.read("count")
                assert held is not None
                if folder.swap("count", b"%d" % (int(held.data) + 1), held.tag):
                    break

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.path("count").read_bytes() == b"40"


def test_a_lock_that_is_never_freed_is_reported(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = folder.swap("a", b"1", None)
    monkeypatch.setattr(objects, "PATIENCE_S", 0.05)
    with folder.path(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnreachableError, match=r"holds .*\.lock and does not move"):
            folder.swap("a", b"2", tag)
    assert folder.swap("a", b"2", tag)


def test_a_file_system_without_locks_is_written_all_the_same(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert folder.swap("a", b"1", None)


def test_names_are_sorted_and_unfinished_ones_hidden(folder: Folder) -> None:
    for key in ("x/b", "x/a", "x/.hidden", "x/deep/c"):
        folder.put(key, b"")
    assert (folder.names("x"), folder.names("x", folders=True)) == (["a", "b"], ["deep"])
    assert (folder.names("nothing"), folder.names("x/a")) == ([], [])


def test_what_a_killed_writer_left_is_deleted_after_an_hour(folder: Folder) -> None:
    folder.put("x/a", b"1")
    old, new = (folder.path("x") / f".a.{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    folder.tidy("x")
    folder.tidy("nothing")
    assert sorted(path.name for path in folder.path("x").iterdir()) == [".a.new.tmp", "a"]


def test_files_can_be_read_by_those_who_share_the_folder(folder: Folder) -> None:
    before = os.umask(0o022)
    try:
        folder.put("a", b"1")
    finally:
        os.umask(before)
    assert folder.path("a").stat().st_mode & 0o777 == 0o644


def test_a_download_is_taken_only_if_it_is_right(folder: Folder, tmp_path: Path) -> None:
    folder.put("a", b"1")
    tag = folder.digest("a")
    assert folder.download("a", tmp_path / "no", lambda _: False) == tag
    assert not (tmp_path / "no").exists()
    assert folder.download("a", tmp_path / "yes", lambda got: got == tag) == tag
    assert (tmp_path / "yes").read_bytes() == b"1"
    assert folder.download("b", tmp_path / "none", lambda _: True) is None


def test_faults_of_the_system_say_what_to_do_and_leave_nothing(folder: Folder) -> None:
    folder.put("a", b"1")
    with pytest.raises(UnreachableError, match=r"cannot write .*/a/b: File exists.*run the same command again"):
        folder.put("a/b", b"2")
    folder.path("d").mkdir()
    with pytest.raises(UnreachableError, match=r"cannot write .*/d: Is a directory"):
        folder.put("d", b"2")
    with pytest.raises(UnreachableError, match=r"cannot read .*/d: Is a directory"):
        folder.read("d")
    assert not list(folder.root.rglob("*.tmp"))


def test_age_is_told_by_the_clock_of_the_folder(folder: Folder) -> None:
    folder.put("a", b"1")
    assert 0 <= folder.clock("a") - folder.modified("a") < 60
    assert folder.modified("nothing") == 0
