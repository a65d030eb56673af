"""What readers get: rows, sweeps, events, and the row that holds where there are several."""

import itertools
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import NOW, advance, at, begin, content, epoch, finished, in_a_folder, keys, reached, trial

from orchestrator.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, EpochRow, State, epoch_rows, newest, to_table
from orchestrator.store import (
    DamagedError,
    ResultStore,
    merge,
    tables,
)

# ------------------------------------------------------------------------------------------------------ reading back


def test_rows_come_back_as_they_were_put(store: ResultStore) -> None:
    rows = finished(store)
    assert store.trial_rows("made") == [row.replace(fence=1) for row in rows]
    assert keys(store) == sorted((row.trial_id, number) for row in rows for number in (1, 2, 3))
    back = store.epoch_rows("made", rows[0].trial_id)
    assert back == [epoch(rows[0], number, seq=number, fence=1) for number in (1, 2, 3)]
    assert store.epochs("made").schema.equals(EPOCHS_SCHEMA)
    assert store.trials("made").schema.equals(TRIALS_SCHEMA)
    assert store.epoch_rows("made", "no such trial") == []


def test_a_sweep_is_listed_with_its_file_and_its_state(store: ResultStore) -> None:
    assert store.sweeps() == []
    finished(store)
    assert (store.sweeps(), store.sweep_file("made"), store.lease("made")) == (["made"], "name: made\n", None)
    header = store.snapshot("made").header
    assert (header.fence, header.done) == (1, True)
    assert header.totals == {
        "trials": 2, "states": {"TERMINATED": 2}, "cached": 0, "epochs": 6, "epochs_planned": 6, "gpu_seconds": 0.0,
    }  # fmt: skip
    assert sum(header.parts.values()) == 6


def test_what_is_not_there_is_not_found(store: ResultStore, tmp_path: Path) -> None:
    finished(store)
    with pytest.raises(NotFoundError, match="it has made"):
        store.trials("mode")
    with pytest.raises(NotFoundError, match="no name of a sweep"):
        store.trials("../made")
    with pytest.raises(NotFoundError, match="no trial"):
        store.find("zz")
    with pytest.raises(NotFoundError, match="begins 2 trial ids"):
        store.find("")
    with pytest.raises(NotFoundError, match="nothing has run"):
        ResultStore.open(tmp_path / "missing").sweep_file("made")


def test_a_trial_is_found_by_the_first_digits_of_its_id_in_every_sweep(store: ResultStore) -> None:
    rows = finished(store)
    with store.writer("other", sweep_text="") as other:
        other.put([rows[0].replace(cached_from="made")])
    assert [row.sweep for row in store.find(rows[0].trial_id[:8])] == ["made", "other"]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


def put_footer(path: Path, footer: str) -> None:
    rewrite(path, lambda table: table.replace_schema_metadata({"mixmo": footer}))


FOOTERS = (
    '{"parts": 3}', '{"parts": {"../../x": 3}}', '{"parts": {"part-1-000000.parquet": "3"}}', '{"fence": "1"}',
    '{"retired": {"../lease.json": "2026-11-21T12:00:00+00:00"}}', '{"retired": {"live-1.parquet": "x"}}',
)  # fmt: skip
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "junk": (lambda path: path.write_bytes(b"junk"), "is no Parquet file"),
    "another table": (lambda path: pq.write_table(pa.table({"a": [1]}), path), "it has no cell_id, digest, epochs, "),
    "a null id": (
        lambda path: rewrite(
            path, lambda t: t.drop(["trial_id"]).append_column("trial_id", pa.nulls(len(t), pa.string()))
        ),
        "it has no trial_id",
    ),
    "a column twice": (
        lambda path: rewrite(path, lambda t: t.append_column("digest", t.column("digest"))), "digest is there twice",
    ),
    "another type": (
        lambda path: rewrite(path, lambda t: t.drop(["epochs"]).append_column("epochs", pa.array(["x"] * len(t)))),
        "epochs is of type string, not int64",
    ),
    "no footer": (lambda path: rewrite(path, lambda t: t.replace_schema_metadata(None)), "footer is not ours"),
    **{f"the footer {footer}": (partial(put_footer, footer=footer), "footer is not ours") for footer in FOOTERS},
}  # fmt: skip


@in_a_folder
@pytest.mark.parametrize("harm", FOREIGN)
def test_a_damaged_sweep_is_told_in_one_line_and_blocks_no_other(store: ResultStore, harm: str) -> None:
    row = finished(store, trials=1)[0]
    with store.writer("other", sweep_text="") as other:
        other.put([trial(1)])
    assert store.damaged_sweeps() == {}
    FOREIGN[harm][0](at(store, "sweeps/other/trials.parquet"))
    for read in (store.trials, store.trial_rows, store.epochs, store.snapshot, store.all_trial_rows):
        with pytest.raises(DamagedError, match=FOREIGN[harm][1]) as caught:
            read("other")
        assert str(caught.value).startswith(f"{store}/sweeps/other/trials.parquet ")
        assert "\n" not in str(caught.value)
    assert [fault.kind for fault in store.verify("other")] == ["damaged"]
    assert list(store.damaged_sweeps()) == ["other"]
    assert store.verify("made") == []
    assert [each.sweep for each in store.all_trial_rows("made")] == ["made"]
    assert [each.sweep for each in store.find(row.trial_id.upper())] == ["made"]
    with pytest.raises(NotFoundError, match="not searched, since they are damaged: other"):
        store.find(trial(1).trial_id)


@in_a_folder
def test_a_sweep_that_cannot_be_listed_blocks_no_other(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store, trials=1)
    at(store, "sweeps/locked").mkdir()
    listed = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(store.all_trial_rows()) == 1
    at(store, "sweeps/locked/trials.parquet").mkdir()
    assert list(store.damaged_sweeps()) == ["locked"]
    assert len(store.all_trial_rows()) == 1


def test_a_sweep_that_a_listing_does_not_show_yet_is_read_by_its_name(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that planned without its own rows would train finished trials again."""
    finished(store, trials=1)
    monkeypatch.setattr(type(store.folder), "names", lambda *_, **__: [])
    assert store.all_trial_rows() == []
    assert [each.sweep for each in store.all_trial_rows("made")] == ["made"]
    assert store.all_trial_rows("never begun") == store.all_trial_rows("begun-never") == []


@in_a_folder
def test_a_copy_of_a_sweep_beside_it_is_no_sweep(store: ResultStore) -> None:
    finished(store, trials=1)
    shutil.copytree(at(store, "sweeps/made"), at(store, "sweeps/made (copy)"))
    assert store.sweeps() == ["made"]
    assert len(store.find(trial().trial_id)) == 1


@pytest.mark.parametrize("name", ["events.parquet", "sweep.yaml"])
def test_a_small_object_that_is_damaged_is_told(store: ResultStore, name: str) -> None:
    finished(store, trials=1)
    store.folder.put(f"sweeps/made/{name}", b"\xff\xfe")
    with pytest.raises(DamagedError, match=name):
        store.sweep_file("made") if name == "sweep.yaml" else store.events("made")
    with begin(store) as writer:
        writer.event("note", "the next driver writes both anew")
    assert store.verify("made") == []


def test_an_error_of_damage_survives_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedError("a is damaged", "Mend it")))
    assert (str(error), error.what) == ("a is damaged. Mend it", "a is damaged")


def test_only_a_folder_is_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnreachableError, match="is a file"):
        ResultStore.open(tmp_path / "file")
    with pytest.raises(UnreachableError, match="cannot write"):
        ResultStore.open(tmp_path / "file" / "results", create=True)
    with pytest.raises(UsageError, match="folder"):
        ResultStore.open("gs://bucket/prefix")
    assert ResultStore.open(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"


def test_a_place_that_cannot_be_looked_at_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreachableError, match=r"cannot read .*: File name too long"):
        ResultStore.open(tmp_path / ("a" * 300))
    with pytest.raises(UnreachableError, match="names a folder"):
        ResultStore.open("~no-such-user/results")

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UnreachableError, match=r"cannot read .*results.*: Permission denied"):
        ResultStore.open(tmp_path / "results", create=True)


def test_events_are_kept_in_order_over_drivers_up_to_a_thousand(store: ResultStore) -> None:
    with begin(store, now=lambda: NOW) as writer:
        for number in range(600):
            writer.event("note", str(number), trial_id="0" * 12, cause="none")
    with begin(store) as writer:
        for number in range(600, 1100):
            writer.event("note", str(number))
    events = store.events("made")
    assert [int(event.text) for event in events] == list(range(100, 1100))
    assert (events[0].time, events[0].trial_id, events[0].cause, events[-1].cause) == (NOW, "0" * 12, "none", None)


def test_columns_of_other_versions_do_no_harm(store: ResultStore) -> None:
    """A reader takes files with fewer columns, and with more."""
    rows = finished(store)
    for key in ("trials.parquet", *(f"epochs/{name}" for name in store.snapshot("made").header.parts)):
        name, changed = f"sweeps/made/{key}", pa.BufferOutputStream()
        table = pq.ParquetFile(pa.BufferReader(content(store, name))).read()
        table = table.drop_columns(["ece"]).append_column("colour", pa.array(["red"] * len(table)))
        pq.write_table(table, changed)
        store.folder.put(name, changed.getvalue().to_pybytes())
    assert [row.trial_id for row in store.trial_rows("made")] == [row.trial_id for row in rows]
    assert len(keys(store)) == 6
    assert store.trials("made").schema.equals(TRIALS_SCHEMA)


@in_a_folder
def test_reading_loads_nothing_heavy(store: ResultStore) -> None:
    rows = finished(store)
    code = (
        "import sys; from orchestrator.store import ResultStore; s = ResultStore.open(sys.argv[1]); s.snapshot('made');"
        "s.find(sys.argv[2]); s.epochs('made'); s.lease('made');"
        "print(*{'torch', 'ray', 'boto3', 'pandas', 'duckdb', 'pyarrow.dataset', 'rich'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, store.uri, rows[0].trial_id]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------------------------------------------------- ordering

ROWS = st.lists(
    st.builds(
        lambda seed, number, fence, attempt, seq: epoch(trial(seed), number, seq=seq, attempt=attempt, fence=fence),
        st.integers(0, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3),
    ),
    max_size=20,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, cuts=st.lists(st.integers(0, 20), max_size=3), shuffle=st.randoms())
def test_the_highest_order_holds_however_the_rows_are_spread(
    rows: list[EpochRow], cuts: list[int], shuffle: random.Random
) -> None:
    expected = {(row.trial_id, row.epoch): row.order for row in newest(rows)}
    assert all(order == max(r.order for r in rows if (r.trial_id, r.epoch) == key) for key, order in expected.items())
    shuffle.shuffle(rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    merged = merge([to_table(rows[a:b], EPOCHS_SCHEMA) for a, b in itertools.pairwise(edges)])
    back = epoch_rows(merged)
    assert {(row.trial_id, row.epoch): row.order for row in back} == expected
    assert [(row.trial_id, row.epoch) for row in back] == sorted(expected)
    assert merge([merged, merged]).equals(merged)


def test_a_trial_that_begins_again_hides_the_epochs_it_has_yet_to_repeat(store: ResultStore) -> None:
    with begin(store) as writer:
        row = trial()
        for number in (1, 2):
            row = advance(writer, row, number, seq=number)
        advance(writer, row, 1, seq=3, attempt=2)
        writer.flush(force=True)
        assert [(each.epoch, each.attempt) for each in store.epoch_rows("made")] == [(1, 2)]
        assert store.epoch_rows("made", row.trial_id) == store.epoch_rows("made")
        assert store.rows_at_epoch("made", 2) == []
        assert store.rows_at_epoch("made", 1) == store.epoch_rows("made")
        advance(writer, row, 2, seq=4, attempt=2)
        writer.flush(force=True)
        assert [(each.epoch, each.attempt) for each in store.epoch_rows("made")] == [(1, 2), (2, 2)]
        assert store.epoch_rows("made", row.trial_id) == store.epoch_rows("made")


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, wanted=st.sets(st.integers(0, 30)), start=st.integers(0, 9), few=st.sampled_from([0, 2, 200]))
def test_rows_are_picked_as_they_stand(rows: list[EpochRow], wanted: set[int], start: int, few: int) -> None:
    """By trial and by epoch, of a table that is a piece of another, in stretches or by number."""
    table = to_table(rows, EPOCHS_SCHEMA).slice(min(start, len(rows)))
    rows = rows[start:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "FEW", few)
        for trial_id in {row.trial_id for row in rows} | {"none"}:
            assert epoch_rows(tables.only(table, trial_id)) == [row for row in rows if row.trial_id == trial_id]
        for number in {row.epoch for row in rows} | wanted:
            assert epoch_rows(tables.at_epoch(table, number)) == [row for row in rows if row.epoch == number]


def test_a_late_row_changes_nothing(store: ResultStore) -> None:
    rows = finished(store, trials=1)
    with begin(store) as writer:
        writer.put([reached(rows[0], 3, seq=9)])
        writer.put([reached(rows[0], 3, seq=4, error="late")])
        writer.add([epoch(rows[0], 3, seq=5), replace(epoch(rows[0], 3, seq=4), wall_s=-1.0)])
    assert store.trial_rows("made")[0].error is None
    assert store.epoch_rows("made")[-1].wall_s == 7.5


def test_a_finished_trial_stays_finished(store: ResultStore) -> None:
    rows = finished(store)
    with begin(store) as writer, pytest.raises(ValueError, match="finished"):
        writer.put([rows[0].replace(state="PENDING", seq=99)])
    assert {row.state for row in store.trial_rows("made")} == {"TERMINATED"}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "ERROR"])
def test_a_trial_that_was_stopped_early_may_go_on(store: ResultStore, state: State) -> None:
    with begin(store) as writer:
        writer.put([reached(trial(), 1, state="TERMINATED", stopped_early=True)])
    with begin(store) as writer:
        writer.put([writer.rows[0].replace(state=state, stopped_early=False, seq=1)])
    assert [(row.state, row.stopped_early) for row in store.trial_rows("made")] == [(state, False)]


def test_the_same_rows_again_change_nothing(store: ResultStore) -> None:
    """A driver that has nothing to do leaves the rows as they were, their fence included."""
    finished(store)
    before = store.trials("made")
    with begin(store) as writer:
        writer.put(writer.rows)
        writer.close(done=True)
    assert store.trials("made").equals(before)


def test_two_configs_with_one_id_are_refused(store: ResultStore) -> None:
    with begin(store) as writer:
        writer.put([trial()])
        with pytest.raises(RefusedError, match="share the trial id"):
            writer.put([trial().replace(digest="f" * 64)])


def test_only_a_trial_without_results_can_be_forgotten(store: ResultStore) -> None:
    finished(store, trials=1)
    with begin(store) as writer:
        writer.put([trial(7)])
        writer.forget(row.trial_id for row in [trial(0), trial(7), trial(8)])
    assert [row.trial_id for row in store.trial_rows("made")] == [trial(0).trial_id]
