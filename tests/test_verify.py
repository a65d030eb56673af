"""Every kind of fault, planted."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_rows import advance, content, epoch, reached, some_logits, trial

from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, EpochRow, TrialRow, epoch_rows, to_table, trial_rows
from orchestrator.store import Fault, ResultStore, verify

CONTENT = b"weights"
CHECKPOINT = f"epoch-00003-{hashlib.sha256(CONTENT).hexdigest()[:16]}.pt"


@pytest.fixture
def store(place: str, tmp_path: Path) -> ResultStore:
    """Two trials that finished; the first has a checkpoint and logits."""
    store = ResultStore.open(place, create=True)
    (tmp_path / CHECKPOINT).write_bytes(CONTENT)
    with store.writer("made", sweep_text="") as writer:
        for row in (trial(), trial(1)):
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
            if row.position == 0:
                attempt = store.attempt(row.trial_id, writer.fence, 1, "aa")
                key = attempt.put_file(tmp_path / CHECKPOINT, CHECKPOINT)
                writer.put([row.replace(checkpoint=key, logits=attempt.put_logits(some_logits()))])
        writer.close(done=True)
    assert store.verify("made") == []
    return store


def logits(store: ResultStore) -> str:
    return next(row.logits for row in store.trial_rows("made") if row.logits is not None)


LIVE, TRIALS, EVENTS = (f"sweeps/made/{name}.parquet" for name in ("epochs/live-1", "trials", "events"))


def part(store: ResultStore) -> str:
    """The key of the one part."""
    return f"sweeps/made/epochs/{next(iter(store.snapshot('made').header.parts))}"


def table_at(store: ResultStore, key: str) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(content(store, key))).read()


def put_table(store: ResultStore, key: str, table: pa.Table) -> None:
    data = pa.BufferOutputStream()
    pq.write_table(table, data)
    store.folder.put(key, data.getvalue().to_pybytes())


def cut(store: ResultStore, key: str) -> None:
    store.folder.put(key, content(store, key)[:-9])


def flip(store: ResultStore, key: str) -> None:
    """One bit of a number, as a disk may lose it."""
    data = bytearray(content(store, key))
    file = pq.ParquetFile(pa.BufferReader(bytes(data)))
    chunk = file.metadata.row_group(0).column(file.schema_arrow.names.index("top1"))
    data[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 1
    store.folder.put(key, bytes(data))


def change_trials(store: ResultStore, change: Callable[[list[TrialRow]], list[TrialRow]]) -> None:
    table = table_at(store, TRIALS)
    changed = to_table(change(trial_rows(table)), TRIALS_SCHEMA)
    put_table(store, TRIALS, changed.replace_schema_metadata(table.schema.metadata))


def change_epochs(store: ResultStore, change: Callable[[list[EpochRow]], list[EpochRow]]) -> None:
    """In the part, and nowhere else."""
    put_table(store, LIVE, EPOCHS_SCHEMA.empty_table())
    rows = change(epoch_rows(table_at(store, part(store))))
    put_table(store, part(store), to_table(rows, EPOCHS_SCHEMA))


def first(rows: list[Any], **changes: Any) -> list[Any]:
    return [replace(rows[0], **changes), *rows[1:]]


PLANTED: dict[str, tuple[Callable[[ResultStore], object], list[str], str]] = {
    "a trial that is not finished": (
        lambda s: change_trials(s, lambda rows: first(rows, state="RUNNING")), ["unfinished"], "still RUNNING",
    ),
    "an epoch that is missing": (
        lambda s: change_epochs(s, lambda rows: [*rows[:1], *rows[2:]]), ["rows"], "has rows of 1, 3",
    ),
    "the last epoch missing": (
        lambda s: change_epochs(s, lambda rows: [*rows[:2], *rows[3:]]), ["rows"], "has rows of 1-2",
    ),
    "no epochs at all": (lambda s: change_epochs(s, lambda rows: rows[3:]), ["rows"], "has rows of no epoch"),
    "an epoch too many": (
        lambda s: change_epochs(s, lambda rows: [*rows, replace(rows[2], epoch=4)]), ["rows"], "row of epoch 4",
    ),
    "epochs of no trial": (lambda s: change_trials(s, lambda rows: rows[:1]), ["rows"], "no row in trials"),
    "a trial twice": (lambda s: change_trials(s, lambda rows: [*rows, rows[0]]), ["duplicate"], "2 rows in trials"),
    "an epoch twice": (
        lambda s: change_epochs(s, lambda rows: [*rows, rows[0]]), ["duplicate"], "2 rows of epoch 1",
    ),
    "two contents with one order": (
        lambda s: put_table(
            s, LIVE, to_table([replace(epoch_rows(table_at(s, part(s)))[0], wall_s=-1.0)], EPOCHS_SCHEMA)
        ), ["duplicate"], "have one order",
    ),
    "a metric that its epoch contradicts": (
        lambda s: change_trials(s, lambda rows: first(rows, metrics={**rows[0].metrics, "top1": 0.99})),
        ["metrics"], "top1 is 0.99",
    ),
    "a metric that its epoch lacks": (
        lambda s: change_trials(s, lambda rows: first(rows, metrics={**rows[0].metrics, "ece": 0.1})),
        ["metrics"], "ece is 0.1",
    ),
    "a checkpoint that is gone": (
        lambda s: s.discard(s.checkpoints(trial().trial_id)[0]), ["checkpoint"], "is not there",
    ),
    "a checkpoint that is damaged": (
        lambda s: s.folder.put(s.checkpoints(trial().trial_id)[0], b"x"), ["checkpoint"], "is damaged",
    ),
    "logits that are gone": (lambda s: s.folder.delete(logits(s)), ["logits"], "is not there"),
    "logits that are damaged": (lambda s: s.folder.put(logits(s), b"x"), ["logits"], "is damaged"),
    "a part that is gone": (lambda s: s.folder.delete(part(s)), ["missing"], "is named but not there"),
    "a live file that is gone": (lambda s: s.folder.delete(LIVE), ["missing"], "is named but not there"),
    "a part that is cut short": (
        lambda s: cut(s, part(s)), ["damaged"], "is no Parquet file",
    ),
    "trials that are cut short": (
        lambda s: cut(s, TRIALS), ["damaged"], "is no Parquet file",
    ),
    "a bit of a part": (lambda s: flip(s, part(s)), ["damaged"], "is not what was written"),
    "a bit of the trials": (lambda s: flip(s, TRIALS), ["damaged"], "is not what was written"),
    "a part of another kind": (
        lambda s: put_table(s, part(s), pa.table({"a": [1]})), ["damaged"], "was not written by mixmo",
    ),
    "a lease that is none": (
        lambda s: s.folder.put("sweeps/made/lease.json", b"[]"), ["damaged"], "is no lease",
    ),
    "events that are none": (
        lambda s: put_table(s, EVENTS, pa.table({"a": [1]})),
        ["damaged"], "events.parquet was not written by mixmo",
    ),
    "a sweep file that is gone": (
        lambda s: s.folder.delete("sweeps/made/sweep.yaml"), ["missing"], "sweep.yaml is not there",
    ),
    "a part that nothing names": (
        lambda s: s.folder.put("sweeps/made/epochs/part-1-000007.parquet", content(s, part(s))),
        ["unnamed"], "part-1-000007.parquet is named by nothing",
    ),
    "a file that is not ours": (
        lambda s: s.folder.put("sweeps/made/notes.txt", b"x"), ["unnamed"], "notes.txt is no file of mixmo",
    ),
    "a folder that is not ours": (
        lambda s: s.folder.put("sweeps/made/plots/a.png", b"x"), ["unnamed"], "plots/ is no file of mixmo",
    ),
    "a stranger among the epochs": (
        lambda s: s.folder.put("sweeps/made/epochs/a.csv", b"x"), ["unnamed"], "epochs/a.csv is no file of mixmo",
    ),
    "a stranger among the files of an attempt": (
        lambda s: s.folder.put(f"trials/{trial().trial_id}/1-1-aa/core.1", b"x"), ["unnamed"], "core.1 is no file",
    ),
    "a file beside the attempts": (
        lambda s: s.folder.put(f"trials/{trial().trial_id}/notes", b"x"), ["unnamed"], "notes is no file of an attempt",
    ),
    "a trial that no sweep has": (
        lambda s: s.attempt("f" * 12, 1, 1, "aa").put_log(0, "x"), ["unnamed"], "belongs to no trial",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(store: ResultStore, fault: str) -> None:
    plant, kinds, text = PLANTED[fault]
    plant(store)
    found = store.verify("made")
    assert set(kinds) <= {each.kind for each in found}
    assert text in " ".join(each.text for each in found)
    if "part that is" not in fault and fault != "a part of another kind":  # with it all its rows are missed
        assert {each.kind for each in found} == set(kinds), found
        assert len(found) == 1
    assert all(isinstance(each, Fault) and each.advice for each in found)


def test_what_only_looks_like_a_fault_is_none(store: ResultStore) -> None:
    """A trial of another sweep, one that failed early, one that runs, and a metric that is not a number."""
    with store.writer("made", sweep_text="") as writer:
        writer.put([trial(2).replace(cached_from="other", state="TERMINATED", epoch=3)])
        advance(writer, trial(3), 1, seq=9)
        lost = advance(writer, trial(4), 2, seq=9)
        writer.put([lost.replace(state="ERROR", epoch=0, seq=10)])
        row = trial(5, epochs=1)
        broken = replace(epoch(row, 1, seq=9), metrics={**epoch(row, 1).metrics, "loss": float("nan")})
        writer.add([broken])
        writer.put([reached(row, 1, seq=9, metrics=broken.metrics)])
        writer.flush(force=True)
        assert store.verify("made") == []


def test_what_others_of_the_project_keep_there_is_no_fault(store: ResultStore) -> None:
    """Commands, claims, and what attempts leave that were killed: logs, and checkpoints that a newer one replaced."""
    attempt = store.attempt(trial().trial_id, 1, 2, "bb")
    attempt.put_log(0, "killed")
    store.folder.put(attempt.path_of(CHECKPOINT), CONTENT)
    for key in ("sweeps/made/commands/a.json", "sweeps/made/claims/b.json", "claims/c.json"):
        store.folder.put(key, b"{}")
    assert store.verify("made") == []


def test_a_sweep_without_trials_has_no_fault(place: str) -> None:
    store = ResultStore.open(place, create=True)
    with store.writer("made", sweep_text=""):
        pass
    assert store.verify("made") == []


def test_the_quick_look_misses_nothing_that_the_close_look_finds(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every planted fault of rows is found without the columns' verdict too, and no other."""
    told: list[str] = []
    for fault, (plant, _, _) in PLANTED.items():
        if not set(PLANTED[fault][1]) & {"rows", "duplicate", "metrics"}:
            continue
        kept = {key: content(store, key) for key in (part(store), LIVE, TRIALS)}
        plant(store)
        close = store.verify("made")  # rows are few here
        with monkeypatch.context() as patch:
            patch.setattr(verify, "FEW", 0)
            assert store.verify("made", on_many=lambda: told.append(fault)) == close, fault  # noqa: B023
        assert fault in told
        for key, data in kept.items():
            store.folder.put(key, data)


def test_a_lost_checkpoint_is_a_fault_only_where_it_was_the_last_word(store: ResultStore) -> None:
    """What is still to run goes on from the newest that is there; advice names nothing that does not help."""
    lost = f"trials/{'0' * 12}/1-1-aa/{CHECKPOINT}"
    with store.writer("made", sweep_text="") as writer:
        writer.put([reached(trial(2), 0, state="RUNNING", checkpoint=lost)])
        writer.put([reached(trial(3), 0, state="PENDING", checkpoint=lost)])
        writer.put([reached(trial(4), 0, state="ERROR", checkpoint=lost)])
    store.discard(store.checkpoints(trial().trial_id)[0])
    finished, failed = store.verify("made")
    assert (finished.kind, finished.trial_id, failed.trial_id) == ("checkpoint", trial().trial_id, trial(4).trial_id)
    assert "its numbers stand and nothing else is lost" in finished.advice
    assert "no command for that yet" in finished.advice
    assert "run again" in failed.advice
    assert "mixmo train" not in finished.advice + failed.advice


def test_a_checkpoint_that_a_newer_one_replaced_is_no_fault_of_a_trial_that_ended_unfinished(
    store: ResultStore,
) -> None:
    """Its driver was killed before it wrote what its gang had saved last; then it was cancelled."""
    row, content = trial(2), b"further"
    attempt = store.attempt(row.trial_id, 2, 1, "aa")
    lost = attempt.path_of(CHECKPOINT)
    with store.writer("made", sweep_text="") as writer:
        writer.put([reached(row, 0, state="CANCELLED", checkpoint=lost)])
    assert [fault.kind for fault in store.verify("made")] == ["checkpoint"]
    newer = attempt.path_of(f"epoch-00004-{hashlib.sha256(content).hexdigest()[:16]}.pt")
    store.folder.put(newer, content)
    assert store.verify("made") == []
    store.folder.put(newer, b"damaged")
    assert [fault.kind for fault in store.verify("made")] == ["checkpoint"]


def test_a_driver_at_work_is_not_faulted_for_what_it_has_yet_to_name(store: ResultStore) -> None:
    with store.writer("made", sweep_text="") as writer:
        store.folder.put(f"sweeps/made/epochs/part-{writer.fence}-000009.parquet", content(store, part(store)))
        assert store.verify("made") == []
    assert [fault.kind for fault in store.verify("made")] == ["unnamed"]
    with store.writer("made", sweep_text=""):
        pass
    assert store.verify("made") == []


def test_a_table_of_a_later_version_is_no_fault(store: ResultStore) -> None:
    table = table_at(store, part(store))
    put_table(store, part(store), table.append_column("colour", pa.array(["red"] * len(table))))
    assert store.verify("made") == []
