"""Objects: whole, created once, swapped only by those who know what they replace. In a folder, and in a bucket."""

import errno
import fcntl
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.parquet as pq
import pytest

from orchestrator.errors import UnreachableError
from orchestrator.store import ResultStore
from orchestrator.store import objects as folders
from orchestrator.store.objects import Folder, Objects


def open_place(place: str) -> Objects:
    return ResultStore.open(place).folder


@pytest.fixture
def objects(place: str) -> Objects:
    return open_place(place)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "root")


def held(objects: Objects, key: str) -> bytes | None:
    stored = objects.read(key)
    return stored.data if stored else None


class TestContract:
    """What every kind of place does for its callers."""

    def test_an_object_is_what_was_put_last(self, objects: Objects) -> None:
        assert objects.read("a/b") is None
        objects.put("a/b", b"one")
        objects.put("a/b", b"two")
        stored = objects.read("a/b")
        assert stored is not None
        assert (stored.data, stored.digest) == (b"two", hashlib.sha256(b"two").hexdigest())
        assert objects.digest("a/b") == stored.digest
        assert (objects.read("a/b/c"), objects.digest("a/x")) == (None, None)
        objects.delete("a/b")
        objects.delete("a/b")
        assert objects.read("a/b") is None

    def test_an_empty_object_and_a_large_one_come_back(self, objects: Objects) -> None:
        large = os.urandom(3_000_001)
        objects.put("empty", b"")
        objects.put("large", large)
        assert (held(objects, "empty"), held(objects, "large")) == (b"", large)

    def test_an_object_is_created_once(self, objects: Objects, tmp_path: Path) -> None:
        (tmp_path / "local").write_bytes(b"two")
        assert objects.create("a", b"one")
        assert not objects.create("a", b"two")
        assert not objects.create("a", b"one")  # also with the same content: only one made it
        assert not objects.upload("a", tmp_path / "local")
        assert objects.upload("b", tmp_path / "local")
        assert (held(objects, "a"), held(objects, "b")) == (b"one", b"two")

    def test_what_has_not_changed_is_not_sent_again(self, objects: Objects) -> None:
        missing = objects.changed("a", None)
        assert missing is not None
        assert missing.stored is None
        assert objects.changed("a", missing.mark) is None
        objects.put("a", b"one")
        first = objects.changed("a", missing.mark)
        assert first is not None
        assert first.stored is not None
        assert (first.stored.data, first.stored) == (b"one", objects.read("a"))
        assert objects.changed("a", first.mark) is None
        objects.put("a", b"two")
        second = objects.changed("a", first.mark)
        assert second is not None
        assert second.stored is not None
        assert second.stored.data == b"two"
        objects.delete("a")
        gone = objects.changed("a", second.mark)
        assert gone is not None
        assert (gone.stored, gone.mark) == (None, missing.mark)

    def test_only_who_knows_the_object_swaps_it(self, objects: Objects) -> None:
        assert objects.swap("a", b"x", "unknown") is None
        first = objects.swap("a", b"1", None)
        assert objects.swap("a", b"x", None) is None
        second = objects.swap("a", b"2", first)
        stored = objects.read("a")
        assert stored is not None
        assert (stored.tag, stored.data) == (second, b"2")
        assert objects.swap("a", b"x", first) is None
        assert held(objects, "a") == b"2"
        objects.delete("a")
        assert objects.swap("a", b"x", second) is None
        assert objects.read("a") is None

    def test_of_many_who_create_at_once_one_wins(self, objects: Objects) -> None:
        won = in_threads(lambda number: objects.create("a", b"%d" % number))
        assert sum(won) == 1
        assert held(objects, "a") == b"%d" % won.index(True)

    def test_of_many_swaps_at_once_one_wins(self, objects: Objects) -> None:
        """Eight threads count to forty together: none is lost."""
        objects.put("count", b"0")

        def count(_: int) -> bool:
            for _ in range(5):
                while True:
                    stored = objects.read("count")
                    assert stored is not None
                    if objects.swap("count", b"%d" % (int(stored.data) + 1), stored.tag):
                        break
            return True

        assert all(in_threads(count))
        assert held(objects, "count") == b"40"

    def test_names_are_sorted_and_unfinished_ones_hidden(self, objects: Objects) -> None:
        for key in ("x/b", "x/a", "x/.hidden", "x/deep/c", "y"):
            objects.put(key, b"")
        assert (objects.names("x"), objects.names("x", folders=True)) == (["a", "b"], ["deep"])
        assert (objects.names("nothing"), objects.names("x/a")) == ([], [])
        assert (objects.names(""), objects.names("", folders=True)) == (["y"], ["x"])

    def test_sizes_are_of_every_object_at_any_depth(self, objects: Objects) -> None:
        for key, data in {"x/a": b"1", "x/deep/er/b": b"four", "x/.hidden": b"", "x/.in/c": b"1", "xy": b"12"}.items():
            objects.put(key, data)
        assert objects.sizes("x") == {"x/a": 1, "x/deep/er/b": 4}
        assert objects.sizes("") == {"x/a": 1, "x/deep/er/b": 4, "xy": 2}
        assert (objects.sizes("nothing"), objects.sizes("x/a")) == ({}, {})

    def test_more_names_than_one_answer_holds_are_listed(self, objects: Objects) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: objects.put(f"many/{number:04}", b""), range(1003)))
        assert objects.names("many") == [f"{number:04}" for number in range(1003)]
        assert len(objects.sizes("many")) == 1003

    def test_odd_names_are_kept(self, objects: Objects) -> None:
        for name in ("a b", "a+b", "a%20b", "ä", "a=b&c"):
            objects.put(f"odd/{name}", name.encode())
            assert held(objects, f"odd/{name}") == name.encode()
        assert len(objects.names("odd")) == 5

    def test_a_download_is_taken_only_if_it_is_right(self, objects: Objects, tmp_path: Path) -> None:
        objects.put("a", b"1")
        digest = objects.digest("a")
        assert objects.download("a", tmp_path / "no", lambda _: False) == digest
        assert not (tmp_path / "no").exists()
        assert objects.download("a", tmp_path / "new" / "yes", lambda got: got == digest) == digest
        assert (tmp_path / "new" / "yes").read_bytes() == b"1"
        assert objects.download("b", tmp_path / "none", lambda _: True) is None
        assert not list(tmp_path.rglob(".*.tmp"))

    def test_age_is_told_by_the_clock_of_the_place(self, objects: Objects) -> None:
        objects.put("x/a", b"1")
        assert 0 <= objects.clock("x/a") - objects.modified("x/a") < 60
        assert objects.modified("nothing") == 0
        assert objects.names("x") == ["a"]

    def test_a_place_that_can_be_written_is_left_as_it_was(self, objects: Objects) -> None:
        objects.probe()
        objects.tidy("")
        assert (objects.names(""), objects.names("", folders=True)) == ([], [])

    def test_arrow_reads_it_in_place(self, objects: Objects) -> None:
        table = pa.table({"number": [1, 2]})
        for name in ("a", "b"):
            objects.put(f"x/{name}.parquet", parquet(table))
        objects.put("x/.hidden", b"no Parquet")
        filesystem, path = objects.filesystem()
        read = dataset.dataset(f"{path}/x", filesystem=filesystem).to_table()
        assert sorted(read.column("number").to_pylist()) == [1, 1, 2, 2]
        assert filesystem.get_file_info(f"{path}/x/c.parquet").type.name == "NotFound"

    def test_a_pickle_finds_it_again(self, objects: Objects) -> None:
        objects.put("a", b"1")
        assert held(pickle.loads(pickle.dumps(objects)), "a") == b"1"

    def test_another_process_finds_it_by_its_uri(self, objects: Objects) -> None:
        objects.put("a", b"1")
        assert held(open_place(objects.uri), "a") == b"1"


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def in_threads(act: Callable[[int], bool]) -> list[bool]:
    """What eight threads make of it at once."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(act, range(8)))


# ------------------------------------------------------------------------------------------------- a folder, by itself


def test_an_object_is_created_once_without_links(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "local").write_bytes(b"two")
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert not folder.upload("a", tmp_path / "local")
    assert folder.upload("b", tmp_path / "local")
    assert [folder.path(name).read_bytes() for name in ("a", "b")] == [b"one", b"two"]


def test_a_lock_that_is_never_freed_is_reported(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = folder.swap("a", b"1", None)
    monkeypatch.setattr(folders, "PATIENCE_S", 0.05)
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
