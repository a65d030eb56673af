"""The tables of a sweep: merged, compacted, encoded and read, whatever is killed or written meanwhile."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import DEAD, ELSEWHERE, NOW, advance, begin, content, epoch, finished, keys, reached, top1, trial
from test_writer import Acknowledged, Crash, DyingFolder, life, promised

from orchestrator.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from orchestrator.rows import (
    EPOCHS_SCHEMA,
    METRIC_COLUMNS,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    to_table,
)
from orchestrator.store import Folder, LeaseLostError, ResultStore, SweepWriter, merge
from orchestrator.store import writer as writing
from orchestrator.store.objects import Stored
from orchestrator.store.tables import encode

TRIALS = "sweeps/made/trials.parquet"


def in_parts(store: ResultStore, count: int = 5, first: int = 0, **given: Any) -> None:
    """A sweep with so many trials more that is done, each of them in a part of its own."""
    with begin(store, **given) as writer:
        for seed in range(first, first + count):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=3 * seed + number)
            writer.flush(force=True)
        writer.close(done=True)


def everything(store: ResultStore) -> tuple[pa.Table, list[Any]]:
    """What readers get, but for the fence, which rises with every driver and every compaction."""
    return store.epochs("made"), [row.replace(fence=0) for row in store.trial_rows("made")]


# ------------------------------------------------------------------------------------------------------------- merging

ROWS = st.lists(
    st.builds(
        lambda seed, number, fence, attempt, seq: replace(
            epoch(trial(seed), number, seq=seq, attempt=attempt), fence=fence
        ),
        st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.integers(1, 2), st.integers(0, 5),
    ),
    max_size=30, unique_by=lambda row: (row.trial_id, row.epoch, row.order),
)  # fmt: skip


@given(rows=ROWS, cuts=st.lists(st.integers(0, 30), max_size=4), data=st.data())
def test_merging_is_the_same_however_rows_are_spread_and_in_whatever_steps(
    rows: list[EpochRow], cuts: list[int], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    edges = [0, *sorted(cuts), len(rows)]
    tables = [to_table(shuffled[a:b], EPOCHS_SCHEMA) for a, b in itertools.pairwise(edges) if shuffled[a:b]]
    at_once = merge(tables)
    assert epoch_rows(at_once) == newest(rows)
    assert merge([merge(tables[:2]), *tables[2:]]).equals(at_once)
    assert merge([at_once]).equals(at_once)


@given(rows=ROWS, limit=st.integers(0, 5))
def test_merging_hides_what_is_beyond_the_epoch_reached(rows: list[EpochRow], limit: int) -> None:
    known = trial(0).trial_id
    found = epoch_rows(merge([to_table(rows, EPOCHS_SCHEMA)], {known: limit}))
    assert found == [row for row in newest(rows) if row.trial_id != known or row.epoch <= limit]


STEPS = st.lists(st.sampled_from(["epoch", "epoch", "flush", "compact", "kill", "hour"]), min_size=5, max_size=25)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_any_order_of_adding_writing_compacting_and_dying_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Two trials advance by turns; what was flushed before a kill is there after it, and nothing else changes it."""
    store = ResultStore(Folder(tmp_path_factory.mktemp("law")))
    now = [NOW]
    flushed: dict[str, int] = {}
    lives = 0

    def new_life() -> tuple[SweepWriter, list[Any]]:
        nonlocal lives
        lives += 1
        writer = begin(store, process=replace(DEAD, started=str(lives)), now=lambda: now[0])
        held = {row.trial_id: row for row in writer.rows}
        return writer, [held.get(row.trial_id, row) for row in (trial(0, epochs=9), trial(1, epochs=9))]

    writer, rows = new_life()
    for number, step in enumerate(steps, 1):
        if step == "epoch" and rows[0].epoch < 9:
            rows = [advance(writer, rows[0], rows[0].epoch + 1, seq=number), *rows[1:]][::-1]
        elif step == "flush":
            writer.flush(force=True)
            flushed = {row.trial_id: row.epoch for row in rows}
        elif step == "kill":
            writer, rows = new_life()
            assert {row.trial_id: row.epoch for row in rows if row.epoch} == {k: v for k, v in flushed.items() if v}
        elif step == "compact":
            writer.compact()
            flushed = {row.trial_id: row.epoch for row in rows}
        else:
            now[0] += timedelta(seconds=writing.OUTLIVES_S + 1)
    writer.close()
    expected = sorted((row.trial_id, n) for row in rows for n in range(1, row.epoch + 1))
    assert keys(store) == expected
    assert all(row.metrics["top1"] == top1(row.trial_id, row.epoch) for row in store.epoch_rows("made"))
    assert store.verify("made") == []


# ---------------------------------------------------------------------------------------------------------- compaction


def test_compaction_leaves_one_file_and_deletes_the_others_an_hour_later(store: ResultStore) -> None:
    clock = [NOW]
    in_parts(store, now=lambda: clock[0])
    before = everything(store)
    sources = set(store.snapshot("made").header.parts)
    with store.writer("made", sweep_text=store.sweep_file("made"), now=lambda: clock[0]) as writer:
        done = writer.compact()
    header = store.snapshot("made").header
    assert (done.parts_before, done.parts_after, done.rows, done.unread) == (5, 1, 15, [])
    assert (list(header.parts.values()), header.done) == ([15], True)
    assert sources <= set(store.folder.names("sweeps/made/epochs"))
    assert 0 < done.bytes_after < done.bytes_before
    assert done.bytes_waiting >= done.bytes_before
    assert everything(store)[1] == before[1]
    assert everything(store)[0].equals(before[0])
    clock[0] += timedelta(seconds=writing.OUTLIVES_S + 1)
    with store.writer("made", sweep_text=store.sweep_file("made"), now=lambda: clock[0]) as writer:
        again = writer.compact()
    assert (again.parts_before, again.parts_after) == (1, 1)
    assert again.bytes_deleted >= done.bytes_before
    assert not sources & set(store.folder.names("sweeps/made/epochs"))
    assert store.snapshot("made").header.parts == header.parts
    assert everything(store)[0].equals(before[0])
    assert store.verify("made") == []


def test_compaction_is_refused_while_a_driver_runs_and_of_a_sweep_that_there_is_not(store: ResultStore) -> None:
    with pytest.raises(NotFoundError):
        store.compact("made")
    assert store.sweeps() == []
    with begin(store, process=ELSEWHERE) as writer:
        writer.put([trial()])
        with pytest.raises(RefusedError, match="is being run by"):
            store.compact("made")


def test_compaction_leaves_out_what_cannot_be_read_and_says_so(store: ResultStore) -> None:
    in_parts(store)
    lost = min(store.snapshot("made").header.parts)
    store.folder.put(f"sweeps/made/epochs/{lost}", b"junk")
    done = store.compact("made")
    assert (done.unread, done.parts_before, done.parts_after) == ([lost], 5, 2)
    assert lost in store.snapshot("made").header.parts


def test_compaction_keeps_the_rows_of_trials_that_are_not_done(store: ResultStore) -> None:
    with begin(store, process=DEAD) as writer:
        row = advance(writer, trial(1), 1, seq=1)
        advance(writer, row, 2, seq=2)
    in_parts(store, 1)
    expected = keys(store)
    assert store.compact("made").parts_after == 1
    assert keys(store) == expected
    assert not store.snapshot("made").header.done or len(expected) == 5


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_at_any_step_of_a_compaction_loses_nothing(tmp_path: Path, before: bool) -> None:
    """Also at those that delete: the clock is two hours ahead of the parts that an earlier compaction replaced."""

    def compact(root: Path, step: int) -> int:
        folder = DyingFolder(root, step, before=before)
        late = lambda: NOW + timedelta(hours=2)  # noqa: E731
        with ResultStore(folder).writer("made", sweep_text="name: made\n", process=DEAD, now=late) as writer:
            writer.compact()
        return step - folder._left

    def prepared(root: Path) -> ResultStore:
        store = ResultStore(Folder(root))
        in_parts(store, 3, now=lambda: NOW)
        with store.writer("made", sweep_text="name: made\n", now=lambda: NOW) as writer:
            writer.compact()
        in_parts(store, 4, first=3, now=lambda: NOW)
        return store

    prepared(tmp_path / "whole")
    steps = compact(tmp_path / "whole", 10**6)
    assert steps > 8
    for step in range(1, steps + 1):
        store = prepared(tmp_path / str(step))
        wanted = everything(store)
        with pytest.raises(Crash):
            compact(tmp_path / str(step), step)
        assert everything(store)[0].equals(wanted[0])
        assert everything(store)[1] == wanted[1]
        assert store.snapshot("made").header.done
        done = store.compact("made")
        assert done.parts_after == 1
        assert everything(store)[0].equals(wanted[0])
        assert store.verify("made") == []


def test_readers_during_compactions_always_see_every_row(store: ResultStore) -> None:
    clock = [NOW]
    in_parts(store, 4, now=lambda: clock[0])
    stop, faults, looks, number = threading.Event(), [], [0], 4
    wanted = keys(store)

    def read() -> None:
        while not stop.is_set():
            try:
                assert set(wanted) <= set(keys(store))
                looks[0] += 1
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while looks[0] < 3 and not faults:  # each compaction deletes what the one before replaced
        clock[0] += timedelta(hours=2)
        with store.writer("made", sweep_text="name: made\n", now=lambda: clock[0]) as writer:
            writer.compact()
        in_parts(store, 2, first=number, now=lambda: clock[0])
        number += 2
    stop.set()
    reader.join()
    assert faults == []


# ---------------------------------------------------------------------------------------------------- as a sweep grows


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_parts_stay_few_and_a_row_is_rewritten_a_few_times_only(sizes: list[int]) -> None:
    """The rule by itself: a part is added, and what it says is merged is merged, as the writer does it."""
    parts: dict[str, int] = {}
    rewritten: dict[str, int] = {}
    for number, rows in enumerate(sizes):
        parts[str(number)], rewritten[str(number)] = rows, 0
        merging = writing._to_merge(parts, ())
        if merging:
            name = f"merged {number}"
            rewritten[name] = 1 + max(rewritten[each] for each in merging)
            parts[name] = sum(parts.pop(each) for each in merging)
    assert sum(parts.values()) == sum(sizes)
    digits = len(f"{sum(sizes):o}") + 1
    assert len(parts) <= writing.MERGED_AT * digits
    assert max(rewritten.values()) <= digits


def test_what_is_large_is_merged_no_more_while_a_sweep_runs() -> None:
    large = {str(number): writing.SETTLED_ROWS for number in range(20)}
    assert writing._to_merge(large, ()) == []
    assert len(writing._to_merge(large | {f"small {n}": 100 for n in range(8)}, ())) == 8
    assert writing._to_merge({str(n): 100 for n in range(8)}, {"3"}) == []


class Ticking:
    """The clock of `time`, which goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(Folder):
    """Takes some seconds for every write, on a clock of its own."""

    ticking = Ticking()
    writes_s = 0.5
    away = False

    def put(self, key: str, data: bytes) -> None:
        self.ticking.now += self.writes_s
        if self.away:
            raise UnreachableError("away")
        super().put(key, data)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    folder = Slow(tmp_path)
    folder.ticking = Ticking()
    monkeypatch.setattr(writing, "time", folder.ticking)
    return folder


@pytest.mark.parametrize("writes_s", [0.02, 0.5, 5.0])
def test_writing_takes_a_twentieth_of_the_time_at_most(slow: Slow, writes_s: float) -> None:
    slow.writes_s = writes_s
    store, clock, spent = ResultStore(slow), slow.ticking, 0.0
    with begin(store) as writer:
        rows = [trial(seed, epochs=10**6) for seed in range(3)]
        writer.flush(force=True)
        began = clock.now
        for number in range(1, 201):
            rows = [advance(writer, row, number, seq=number) for row in rows[:1]] + rows[1:]
            writer.event("tick", "tock")
            before = clock.now
            writer.flush()
            spent += clock.now - before
            clock.now += 5.0
        assert spent > 0
        assert spent / (clock.now - began) < 0.05
        before = clock.now
        writer.close()  # it waits for no pause
        assert clock.now - before < 10 * writes_s
        assert len(keys(store)) == 200


def test_a_store_that_comes_back_is_written_to_within_half_a_minute(slow: Slow) -> None:
    store, clock = ResultStore(slow), slow.ticking
    with begin(store) as writer:
        slow.writes_s, slow.away = 40.0, True  # as long as a bucket's tries take
        advance(writer, trial(), 1, seq=1)
        with pytest.raises(UnreachableError):
            writer.flush(force=True)
        slow.writes_s, slow.away = 0.1, False
        assert not writer.flush()
        clock.now += writing.RETRY_S
        assert writer.flush()
        assert len(keys(store)) == 1


def test_only_the_pieces_of_the_trials_that_changed_are_made_anew(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(rows: Sequence[TrialRow], schema: pa.Schema) -> pa.Table:
        if schema is TRIALS_SCHEMA:
            made.append(len(rows))
        return to_table(rows, schema)

    monkeypatch.setattr(writing, "PIECE", 4)
    monkeypatch.setattr(writing, "to_table", counted)
    with begin(store) as writer:
        writer.put([trial(seed) for seed in range(18)])
        writer.flush(force=True)
        assert made == [4, 4, 4, 4, 2]
        writer.put([reached(trial(5), 1, seq=1)])
        writer.flush(force=True)
        assert made[5:] == [4]
        writer.forget([trial(0).trial_id])
        writer.flush(force=True)
        assert sum(made[6:]) == 17
    assert [row.position for row in store.trial_rows("made")] == list(range(1, 18))
    assert [row.epoch for row in store.trial_rows("made")] == [0] * 4 + [1] + [0] * 12


def test_where_rows_come_fast_only_so_many_linger_in_the_live_file(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LINGER_ROWS", 6)
    in_parts(store, 6)
    assert len(store.snapshot("made").live) == 9  # those that were sealed last, and two trials before
    assert len(keys(store)) == 18


# ------------------------------------------------------------------------------------------------------------ encoding


def curves(trials: int = 200, epochs: int = 100) -> pa.Table:
    """Learning curves that are as good as noise, of trials one after the other."""
    draw, rows = np.random.default_rng(0), []
    for seed in range(trials):
        noise = draw.random((epochs, 12))
        rows += [
            replace(
                epoch(trial(seed), number, seq=seed * epochs + number),
                metrics=dict(zip(METRIC_COLUMNS[:12], noise[number - 1].tolist(), strict=True)),
                wall_s=30 * number + noise[number - 1, 0], gpu_seconds=30 * number + noise[number - 1, 1],
                updated_at=NOW + timedelta(seconds=30 * number + noise[number - 1, 2]),
            )
            for number in range(1, epochs + 1)
        ]  # fmt: skip
    return merge([to_table(rows, EPOCHS_SCHEMA)])


def size(table: pa.Table, **options: Any) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return int(sink.getvalue().size)


def test_the_encoding_takes_half_the_bytes_of_a_plain_one() -> None:
    table = curves(50)
    ours = len(encode(table))
    assert ours < 0.56 * size(table, compression="none", use_dictionary=False)
    assert ours < 0.80 * size(table, compression="zstd")
    words = ["sweep", "trial_id"]
    floats = [spec.name for spec in table.schema if spec.type == pa.float64()]
    assert ours < size(table, compression="zstd", use_dictionary=words)
    assert ours < size(table, compression="zstd", use_dictionary=words, use_byte_stream_split=floats)
    assert pq.ParquetFile(pa.BufferReader(encode(table))).read().equals(table)


# ------------------------------------------------------------------------------------------------------------- reading


def test_only_the_columns_that_are_asked_for_are_read(store: ResultStore) -> None:
    in_parts(store, 3)
    whole = store.epochs("made")
    assert store.epochs("made", ["top1", "epoch"]).equals(whole.select(["top1", "epoch"]))
    assert store.epochs("made", []).num_columns == 0
    with pytest.raises(UsageError, match="have no colour; they have sweep"):
        store.epochs("made", ["epoch", "colour"])


def test_one_trial_is_read_from_the_row_groups_that_may_hold_it(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.store import tables

    monkeypatch.setattr(tables, "ROW_GROUP", 6)
    in_parts(store, 8)
    store.compact("made")
    (part,) = store.snapshot("made").header.parts
    file = pq.ParquetFile(pa.BufferReader(content(store, f"sweeps/made/epochs/{part}")))
    assert file.num_row_groups == 4
    ids = sorted({trial(seed).trial_id for seed in range(8)})
    for trial_id in ids:
        assert tables._groups_with(file.metadata, trial_id) == [ids.index(trial_id) // 2]
        assert [row.epoch for row in store.epoch_rows("made", trial_id)] == [1, 2, 3]
    assert store.epoch_rows("made", "0" * 12) == []


# ------------------------------------------------------------------------------- a place that cannot compare and swap


class Forgetful(Folder):
    """Its swap looks and then writes, as that of a bucket without If-Match; a test may come in between."""

    def __init__(self, root: Path, between: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self._between = between

    @property
    def atomic(self) -> bool:
        return False

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        held = self.read(key)
        if (held.tag if held else None) != tag:
            return None
        self._between(key)
        self.put(key, data)
        return Stored(data, "").digest


def overtaken(root: Path, meanwhile: Callable[[], None]) -> None:
    """An old driver is held up in the middle of a swap; the meanwhile happens, and then its trials land over it."""
    waiting = iter([meanwhile])

    def between(key: str) -> None:
        if key == TRIALS and len(store_rows()) == 1:
            next(waiting, lambda: None)()

    def store_rows() -> list[Any]:
        try:
            return [row for row in ResultStore(Folder(root)).trial_rows("made") if row.epoch]
        except NotFoundError:
            return []

    old = begin(ResultStore(Forgetful(root, between)), process=DEAD)
    old.put([trial(), trial(1)])
    advance(old, trial(), 1, seq=1)
    old.flush(force=True)
    advance(old, trial(1), 1, seq=2)
    old.flush(force=True)  # lands last
    advance(old, trial(1), 2, seq=3)
    with pytest.raises(LeaseLostError):
        old.flush(force=True)


def raw_fence(root: Path) -> int:
    from orchestrator.store.tables import SweepFiles

    return SweepFiles(Folder(root), "made")._trials("trials.parquet")[1].fence


def test_what_an_old_driver_overwrites_once_is_not_read_and_written_again_though_nothing_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticking()
    monkeypatch.setattr(writing, "time", clock)
    alive: list[SweepWriter] = []
    store = ResultStore(Forgetful(tmp_path))

    def meanwhile() -> None:
        new = begin(store)
        row = trial()
        for number in (1, 2, 3):
            row = advance(new, row, number, seq=10 + number, attempt=2)
        new.flush(force=True)
        assert not new.flush(force=True)
        alive.append(new)

    overtaken(tmp_path, meanwhile)
    (new,) = alive
    for _ in range(2):
        row = next(row for row in store.trial_rows("made") if row.trial_id == trial().trial_id)
        assert (row.state, row.epoch) == ("TERMINATED", 3)
        assert store.snapshot("made").header.fence == 2
        assert [number for _, number in keys(store)] == [1, 2, 3]
        if raw_fence(tmp_path) == 2:
            break
        assert [fault.kind for fault in store.verify("made")] == ["stale"]
        clock.now += writing.LOOK_S
        assert new.flush()  # one period later, with nothing new to say
    assert raw_fence(tmp_path) == 2
    assert store.verify("made") == []
    new.close()


def test_what_an_old_driver_overwrites_after_the_last_one_ended_is_lost_to_nobody(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    store = ResultStore(Forgetful(tmp_path))
    overtaken(tmp_path, lambda: life(store, replace(DEAD, started="2"), acknowledged, iter(range(1000))))
    assert raw_fence(tmp_path) == 1
    promised(store, acknowledged)
    assert {row.state for row in store.trial_rows("made")} == {"TERMINATED"}
    assert {fault.kind for fault in store.verify("made")} == {"stale", "unnamed"}  # its live file was deleted before
    assert store.compact("made").rows == 9
    assert raw_fence(tmp_path) == 3
    promised(store, acknowledged)
    assert store.verify("made") == []
    assert [name for name in store.folder.names("sweeps/made") if name.startswith("trials-")] == ["trials-3.parquet"]


def test_a_kill_at_any_step_loses_nothing_there_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(DyingFolder):
        atomic = Forgetful.atomic
        _between = staticmethod(lambda key: None)

        def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
            return Forgetful.swap(self, key, data, tag)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "MERGED_AT", 2)
    whole = Dying(tmp_path / "whole", 10**6, before=False)
    life(ResultStore(whole), DEAD, {}, iter(range(1000)))
    for step in range(1, 10**6 - whole._left, 3):
        root, acknowledged, hours = tmp_path / str(step), Acknowledged(), iter(range(1000))
        with pytest.raises(Crash):
            life(ResultStore(Dying(root, step, before=step % 2 == 1)), DEAD, acknowledged, hours)
        store = ResultStore(Forgetful(root))
        promised(store, acknowledged)
        life(store, replace(DEAD, started="2"), acknowledged, hours)
        promised(store, acknowledged)
        assert store.verify("made") == []


def test_a_place_that_compares_and_swaps_keeps_no_copies(store: ResultStore) -> None:
    finished(store)
    assert not store.snapshot("made").header.copied
    assert not [name for name in store.folder.names("sweeps/made") if name.startswith("trials-")]
