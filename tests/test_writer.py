"""The promises of the store: nothing lost, doubled, changed or seen half-written, whatever is killed whenever."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import DEAD, ELSEWHERE, NOW, advance, at, begin, epoch, in_a_folder, keys, reached, top1, trial

from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.rows import TrialRow, epoch_rows
from orchestrator.store import (
    DamagedError,
    Folder,
    LeaseLostError,
    Process,
    ResultStore,
    SweepWriter,
    merge,
)
from orchestrator.store import writer as writing
from orchestrator.store.objects import Stored

# ----------------------------------------------------------------------------------------------- writing in small steps


def test_a_flush_is_rare_unless_forced_and_writes_only_what_changed(store: ResultStore) -> None:
    with begin(store) as writer:
        assert not writer.flush(force=True)
        writer.put([trial()])
        assert writer.flush()
        before = store.folder.modified("sweeps/made/epochs/live-1.parquet")
        writer.put([trial(1)])
        assert not writer.flush()
        assert writer.flush(force=True)
        assert store.folder.modified("sweeps/made/epochs/live-1.parquet") == before
        assert len(store.trial_rows("made")) == 2


def test_many_parts_become_one_and_the_old_ones_outlive_it_by_an_hour(store: ResultStore) -> None:
    clock = [NOW]
    with begin(store, now=lambda: clock[0]) as writer:
        for seed in range(20):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
            writer.flush(force=True)
        parts = store.snapshot("made").header.parts
        assert len(parts) < writing.MERGED_AT
        assert sum(parts.values()) == 60
        assert len(store.folder.names("sweeps/made/epochs")) == 1 + 20 + 2
        clock[0] += timedelta(seconds=writing.OUTLIVES_S + 1)
        writer.close(done=True)
    assert {*store.folder.names("sweeps/made/epochs")} == {"live-1.parquet", *store.snapshot("made").header.parts}
    assert len(keys(store)) == 60
    assert store.verify("made") == []


@pytest.mark.parametrize("harm", [None, b"junk"], ids=["missing", "damaged"])
def test_a_part_that_is_lost_does_not_stop_the_writing(store: ResultStore, harm: bytes | None) -> None:
    """It keeps its name in the footer, so that `verify` tells; the other parts are merged without it."""
    with begin(store) as writer:
        for seed in range(2 * writing.MERGED_AT + 1):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
            writer.flush(force=True)
            if seed == 2:
                lost = min(store.snapshot("made").header.parts)
                key = f"sweeps/made/epochs/{lost}"
                store.folder.put(key, harm) if harm else store.folder.delete(key)
        writer.close(done=True)
    parts = store.snapshot("made").header.parts
    assert lost in parts
    assert sorted(parts.values()) == [3, 24, 24]
    with pytest.raises(DamagedError, match=lost):
        store.epochs("made")
    faults = store.verify("made")
    assert {fault.kind for fault in faults} <= {"missing", "damaged", "rows"}
    assert lost in faults[0].text


def test_a_live_file_that_grows_is_sealed_though_its_trials_run(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LIVE_BYTES", 5000)
    with begin(store) as writer:
        row = trial(epochs=300)
        for number in range(1, 60):
            row = advance(writer, row, number, seq=number)
            writer.flush(force=True)
        assert store.snapshot("made").header.parts
        assert [number for _, number in keys(store)] == list(range(1, 60))


def test_a_snapshot_from_memory_is_the_one_that_readers_get(store: ResultStore) -> None:
    with begin(store, now=lambda: NOW) as writer:
        writer.put([trial(), trial(1)])
        advance(writer, trial(), 1)
        writer.event("started", "here")
        before = writer.snapshot()
        writer.flush(force=True)
        after = store.snapshot("made")
        assert (before.rows, before.live, before.events) == (after.rows, after.live, tuple(after.events))
        assert before.header.totals == after.header.totals


# ---------------------------------------------------------------------------------------- killed at every single step


class Crash(BaseException):
    """The process dies here."""


class DyingFolder(Folder):
    """Dies before or after one change of the store; every change before that has happened."""

    def __init__(self, root: Path, at: int, *, before: bool) -> None:
        super().__init__(root)
        self._left, self._before, self._inside = at, before, False

    def _step(self, change: Callable[[], Any]) -> Any:
        if self._inside:
            return change()
        self._left -= 1
        if self._left < 0:
            raise Crash
        dies = self._left == 0
        if dies and self._before:
            raise Crash
        self._inside = True
        try:
            done = change()
        finally:
            self._inside = False
        if dies:
            raise Crash
        return done

    def put(self, key: str, data: bytes) -> None:
        self._step(lambda: Folder.put(self, key, data))

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._step(lambda: Folder.create(self, key, data)))

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        done: str | None = self._step(lambda: Folder.swap(self, key, data, tag))
        return done

    def delete(self, key: str) -> None:
        self._step(lambda: Folder.delete(self, key))


Acknowledged = dict[tuple[str, int], int]
"""(trial, epoch) and the attempt of its row, for what a flush has confirmed."""


def life(store: ResultStore, process: Process, acknowledged: Acknowledged, hours: Iterator[int]) -> None:
    """A driver's life: it takes over, begins or resumes three trials, and finishes them one after the other."""
    clock = lambda: NOW + timedelta(hours=next(hours))  # noqa: E731
    writer = begin(store, process=process, now=clock)
    held = {row.trial_id: row for row in writer.rows}
    rows = [held.get(row.trial_id, row) for row in map(trial, range(3))]
    rows = [row if row.state == "TERMINATED" else row.replace(state="PENDING", seq=row.seq + 1) for row in rows]
    writer.put(rows)
    writer.flush(force=True)
    for row in rows:
        again = row
        while again.epoch < 3:
            again = advance(writer, again, again.epoch + 1, seq=again.seq + 1, attempt=row.attempts + 1)
            writer.flush(force=True)
            acknowledged |= {(again.trial_id, number): again.attempt for number in range(1, again.epoch + 1)}
    writer.close(done=True)


def changes_in_a_life(root: Path) -> int:
    folder = DyingFolder(root, 10**6, before=False)
    life(ResultStore(folder), DEAD, {}, iter(range(1000)))
    return 10**6 - folder._left


def promised(store: ResultStore, acknowledged: Acknowledged) -> None:
    """Everything that was acknowledged is there, once, and as it was."""
    try:
        found = store.epoch_rows("made")
        rows = {row.trial_id: row for row in store.trial_rows("made")}
    except NotFoundError:
        found, rows = [], {}
    assert len({(row.trial_id, row.epoch) for row in found}) == len(found)
    there = {(row.trial_id, row.epoch): row for row in found}
    assert set(acknowledged) <= set(there)
    assert all(row.metrics["top1"] == top1(*key) for key, row in there.items())
    for row in rows.values():
        assert [number for trial_id, number in there if trial_id == row.trial_id] == list(range(1, row.epoch + 1))
        assert row.metrics["top1"] == (top1(row.trial_id, row.epoch) if row.epoch else None)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_at_any_step_loses_nothing_and_the_same_command_continues(
    tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MERGED_AT", 2)
    steps = changes_in_a_life(tmp_path / "whole")
    assert steps > 30
    for step in range(1, steps + 1):
        root, acknowledged, hours = tmp_path / str(step), Acknowledged(), iter(range(1000))
        with pytest.raises(Crash):
            life(ResultStore(DyingFolder(root, step, before=before)), DEAD, acknowledged, hours)
        store = ResultStore(Folder(root))
        promised(store, acknowledged)
        life(store, replace(DEAD, started="2"), acknowledged, hours)
        promised(store, acknowledged)
        assert len(keys(store)) == 9
        assert store.verify("made") == []


def test_killed_again_and_again_it_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MERGED_AT", 2)
    draw, acknowledged, hours = random.Random(5), Acknowledged(), iter([0] * 10_000)
    for death in range(100):
        store = ResultStore(DyingFolder(tmp_path, draw.randint(1, 12), before=draw.random() < 0.5))
        try:
            life(store, replace(DEAD, started=str(death)), acknowledged, hours)
            break
        except Crash:
            promised(ResultStore(Folder(tmp_path)), acknowledged)
    assert death > 3
    assert len(keys(ResultStore(Folder(tmp_path)))) == 9
    assert ResultStore(Folder(tmp_path)).verify("made") == []


LIVES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from made_rows import advance, trial
from orchestrator.store import ResultStore
store = ResultStore.open(sys.argv[1], create=True)
with store.writer("made", sweep_text="") as writer:
    held = {row.trial_id: row for row in writer.rows}
    for row in [held.get(row.trial_id, row) for row in map(trial, range(int(sys.argv[3])))]:
        attempt = row.attempts + 1
        while row.epoch < 3:
            row = advance(writer, row, row.epoch + 1, seq=row.seq + 1, attempt=attempt)
            writer.flush(force=True)
            print(row.trial_id, row.epoch, flush=True)
    writer.close(done=True)
"""


def test_a_real_kill_at_a_random_moment_loses_nothing(tmp_path: Path) -> None:
    """`kill -9`, and at once the same command on the same host; the corpse is not even collected."""
    draw, acknowledged, alive = random.Random(3), set(), []
    command = [sys.executable, "-c", LIVES, str(tmp_path / "results"), str(Path(__file__).parent), "40"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:2]))}
    for life_number in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        alive.append(process)
        assert process.stdout is not None
        for _ in range(draw.randint(1, 25)):
            line = process.stdout.readline().split()
            acknowledged.add((line[0], int(line[1])))
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        lines = [line.split() for line in process.stdout if line.endswith("\n")]
        acknowledged |= {(line[0], int(line[1])) for line in lines}
        store = ResultStore.open(tmp_path / "results")
        assert acknowledged <= {(row.trial_id, row.epoch) for row in store.epoch_rows("made")}, life_number
    last = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert last.stdout
    for process in alive:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert len(keys(store)) == 120
    assert store.verify("made") == []


# ------------------------------------------------------------------------------------------- readers between two steps


class Watched(Folder):
    """Calls back after every change."""

    def __init__(self, root: Path, look: Callable[[], None]) -> None:
        super().__init__(root)
        self._look, self._inside = look, False

    def _after(self, change: Callable[[], Any]) -> Any:
        outer, self._inside = self._inside, True
        try:
            done = change()
        finally:
            self._inside = outer
        if not outer:
            self._look()
        return done

    def put(self, key: str, data: bytes) -> None:
        self._after(lambda: Folder.put(self, key, data))

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._after(lambda: Folder.create(self, key, data)))

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        done: str | None = self._after(lambda: Folder.swap(self, key, data, tag))
        return done


ONE_LINER = """
    select trial_id, epoch, top1 from '{0}/epochs/*.parquet' e join '{0}/trials.parquet' t using (trial_id)
    where e.epoch <= t.epoch
    qualify row_number() over (partition by trial_id, e.epoch order by e.fence desc, e.attempt desc, e.seq desc) = 1
"""


def test_the_documented_queries_are_right_after_every_single_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MERGED_AT", 2)
    acknowledged, looks = Acknowledged(), []
    folder = tmp_path / "sweeps" / "made"

    def look() -> None:
        store = ResultStore(Folder(tmp_path))
        promised(store, acknowledged)
        if store.sweeps():
            sql = ONE_LINER.format(folder).replace("trial_id, epoch, top1", "trial_id, e.epoch, e.top1")
            rows = duckdb.connect().execute(sql).fetchall()
            assert set(acknowledged) <= {(row[0], row[1]) for row in rows}
            assert len({(row[0], row[1]) for row in rows}) == len(rows)
            assert all(row[2] == top1(row[0], row[1]) for row in rows)
            frame = pd.read_parquet(folder / "epochs").sort_values(["fence", "attempt", "seq"])
            assert set(acknowledged) <= set(zip(frame.trial_id, frame.epoch, strict=True))
            looks.append(len(rows))

    life(ResultStore(Watched(tmp_path, look)), DEAD, acknowledged, iter(range(1000)))
    assert looks[-1] == 9
    assert len(looks) > 20


@in_a_folder
def test_who_listed_the_files_before_rows_moved_still_finds_them_all(store: ResultStore) -> None:
    """A query opens its files after it listed them; meanwhile a trial ends, and its rows go into a part."""
    with begin(store) as writer:
        row = advance(writer, advance(writer, trial(), 1, seq=1), 2, seq=2)
        writer.flush(force=True)
        listed = list(at(store, "sweeps/made/epochs").glob("*.parquet"))
        advance(writer, row, 3, seq=3)
        for number in (1, 2):
            writer.flush(force=True)
            advance(writer, trial(1), number, seq=4)
        rows = merge([pq.ParquetFile(path).read() for path in listed])
        assert [each.epoch for each in epoch_rows(rows) if each.trial_id == row.trial_id] == [1, 2, 3]


def test_rows_leave_the_live_file_in_time(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LINGER_S", 0.0)
    with begin(store) as writer:
        row = trial()
        for number in (1, 2, 3):
            row = advance(writer, row, number, seq=number)
        writer.flush(force=True)
        advance(writer, trial(1), 1, seq=4)
        writer.flush(force=True)
        assert {each.trial_id for each in store.snapshot("made").live} == {trial(1).trial_id}
        assert len(keys(store)) == 4


class Interleaved(Folder):
    """A reader's folder: before each of its reads the writer may take some steps."""

    def __init__(self, root: Path, steps: Iterator[Callable[[], None]], pace: Iterator[int]) -> None:
        super().__init__(root)
        self._steps, self._pace = steps, pace

    def _let(self) -> None:
        for _ in range(next(self._pace, 0)):
            next(self._steps, lambda: None)()

    def read(self, key: str) -> Stored | None:
        self._let()
        return super().read(key)

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        self._let()
        return super().names(prefix, folders=folders)


@settings(max_examples=12, deadline=None)
@given(pace=st.lists(st.integers(0, 3), min_size=10, max_size=40))
def test_a_reader_that_is_overtaken_between_its_reads_sees_one_consistent_state(
    tmp_path_factory: pytest.TempPathFactory, pace: list[int]
) -> None:
    root = tmp_path_factory.mktemp("interleaved")
    done: Acknowledged = {}

    def lives() -> Iterator[Callable[[], None]]:
        for number in range(2):
            writer = begin(ResultStore(Folder(root)), process=replace(DEAD, started=str(number)))
            rows = {row.trial_id: row for row in writer.rows}
            for row in [rows.get(row.trial_id, row) for row in map(trial, range(number + 1))]:
                again = row
                while again.epoch < 3:
                    again = advance(writer, again, again.epoch + 1, seq=again.seq + 1, attempt=row.attempts + 1)

                    def step(reached_now: TrialRow = again, own: SweepWriter = writer) -> None:
                        own.flush(force=True)
                        done.update({(reached_now.trial_id, n): 1 for n in range(1, reached_now.epoch + 1)})

                    yield step

    steps = lives()
    next(steps)()
    store = ResultStore(Interleaved(root, steps, iter(pace)))
    for _ in range(4):
        before = set(done)
        found = keys(store)
        assert before <= set(found)
        assert len(set(found)) == len(found)
        whole = {name: sum(name == each for each, _ in found) for name, _ in found}
        assert found == [(name, number) for name in sorted(whole) for number in range(1, 1 + whole[name])]


def test_readers_in_other_threads_never_fail(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MERGED_AT", 3)
    stop, faults, seen = threading.Event(), [], [0]
    with begin(store) as writer:
        writer.put([trial(seed) for seed in range(12)])
        writer.flush(force=True)

        def read() -> None:
            while not stop.is_set():
                try:
                    seen[0] = max(seen[0], len(keys(store)), len(store.snapshot("made").rows))
                except Exception as error:
                    faults.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for seed in range(12):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
                writer.flush(force=True)
        stop.set()
        reader.join()
    assert faults == []
    assert seen[0] >= 12


# -------------------------------------------------------------------------------------------------------------- faults


@in_a_folder
def test_a_full_disk_loses_nothing_and_writing_goes_on_when_there_is_room(store: ResultStore) -> None:
    """The limit on the size of a file stands for the disk: the kernel cuts the write short and refuses the rest."""
    with begin(store) as writer:
        writer.put([trial(seed) for seed in range(3)])
        row = advance(writer, trial(), 1, seq=1)
        writer.flush(force=True)
        advance(writer, row, 2, seq=2)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(UnreachableError, match="cannot write"):
                writer.flush(force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [number for _, number in keys(store)] == [1]
        assert not list(at(store, "").rglob("*.tmp"))
        assert writer.flush(force=True)
        assert [number for _, number in keys(store)] == [1, 2]


class Flaky(Folder):
    """Some changes fail, before they happen or after: the store took it, but nobody heard."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        super().__init__(root)
        self.draw, self.faults, self.quiet = draw, 0, True

    def put(self, key: str, data: bytes) -> None:
        chance = self.draw.random() if not self.quiet else 1.0
        if chance < 0.15:
            self.faults += 1
            raise UnreachableError("before")
        super().put(key, data)
        if chance < 0.3:
            self.faults += 1
            raise UnreachableError("after")


@pytest.mark.parametrize("seed", range(4))
def test_a_store_that_fails_now_and_then_costs_nothing(tmp_path: Path, seed: int) -> None:
    folder = Flaky(tmp_path, random.Random(seed))
    with begin(ResultStore(folder)) as writer:
        folder.quiet = False
        for number in range(1, 4):
            for row in map(trial, range(4)):
                advance(writer, row, number, seq=number)
                try:
                    writer.flush(force=True)
                    writer.renew()
                except UnreachableError:
                    pass
        folder.quiet = True
        writer.renew()
        writer.close(done=True)
    assert folder.faults > 2
    assert len(keys(ResultStore(Folder(tmp_path)))) == 12
    assert ResultStore(Folder(tmp_path)).verify("made") == []


class Pausing(Folder):
    """Stops before one change, lets something else happen, and goes on as if nothing had been."""

    def __init__(self, root: Path, at: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(root)
        self._left, self._meanwhile, self._inside = at, meanwhile, False

    def put(self, key: str, data: bytes) -> None:
        self._pause()
        super().put(key, data)

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        self._pause()
        self._inside = True  # the lock of the folder is held in there: nobody gets in between
        try:
            return super().swap(key, data, tag)
        finally:
            self._inside = False

    def create(self, key: str, data: bytes) -> bool:
        self._pause()
        return super().create(key, data)

    def _pause(self) -> None:
        if not self._inside:
            self._left -= 1
            if self._left == 0:
                self._meanwhile()


@pytest.mark.parametrize("at", range(2, 14))
def test_what_a_stale_driver_still_writes_is_ignored(tmp_path: Path, at: int) -> None:
    """The old driver sleeps before any of its writes; a new one finishes the sweep; the old one wakes up."""
    acknowledged: Acknowledged = {}
    store, after = ResultStore(Folder(tmp_path)), []

    def take_over() -> None:
        os.utime(tmp_path / "sweeps/made/lease.json", (0, 0))
        life(store, DEAD, acknowledged, iter(range(1000)))
        after.extend([store.trials("made"), store.epochs("made"), store.snapshot("made")])

    def old_life() -> None:
        writer = begin(ResultStore(Pausing(tmp_path, at, take_over)), process=ELSEWHERE)
        row = trial()
        for number in (1, 2, 3):
            row = reached(row, number, seq=50 + number, error=f"stale {number}")
            writer.add([replace(epoch(row, number, seq=50 + number, attempt=9), images_per_s=-1.0)])
            writer.put([row])
            writer.flush(force=True)
        writer.close(done=False)

    with pytest.raises(LeaseLostError):
        old_life()
    assert [store.trials("made"), store.epochs("made"), store.snapshot("made")] == after
    promised(store, acknowledged)
    assert {fault.kind for fault in store.verify("made")} <= {"unnamed"}


@pytest.mark.parametrize("learns", ["by writing", "by renewing"])
def test_who_has_lost_the_sweep_writes_nothing_more_however_often_it_tries(store: ResultStore, learns: str) -> None:
    """A driver flushes once more on its way out, whatever ended it."""
    old = begin(store, process=ELSEWHERE)
    row = reached(trial(), 1, seq=1)
    old.add([epoch(row, 1, seq=1)])
    old.put([row])
    old.flush(force=True)
    store.folder.delete("sweeps/made/lease.json")  # as if its time were over
    with begin(store) as new:
        new.put([reached(row, 1, seq=2).replace(state="CANCELLED")])
    after = [store.trials("made"), store.epochs("made"), store.snapshot("made")]
    if learns == "by renewing":
        with pytest.raises(LeaseLostError):
            old.renew()
    old.put([row.replace(state="TERMINATED", seq=3)])
    for _ in range(3):
        with pytest.raises(LeaseLostError):
            old.flush(force=True)
        assert [store.trials("made"), store.epochs("made"), store.snapshot("made")] == after
    with pytest.raises(LeaseLostError):
        old.close(done=True)
    assert [store.trials("made"), store.epochs("made"), store.snapshot("made")] == after
