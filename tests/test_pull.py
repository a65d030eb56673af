"""`mixmo pull`: whole tables of one moment, in files that other tools read, from a folder and from a bucket."""

import io
import json
import math
import resource
import signal
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import DEAD, NOTHING, advance, at, begin, content, epoch, finished, in_a_folder, some_logits, trial

from orchestrator import cli, pull
from orchestrator.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from orchestrator.pull import Format, as_csv
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, to_table
from orchestrator.store import DamagedError, ResultStore

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mixmo(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process: its code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        return (int(ended.value.code or 0), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


def read(file: Path) -> pa.Table:
    """Any of the formats, in the types of the store."""
    if file.suffix == ".parquet":
        return pq.read_table(file, partitioning=None)
    with pa.memory_map(str(file)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_files_are_the_tables_of_the_store(store: ResultStore, tmp_path: Path, kind: Format) -> None:
    finished(store)
    copy = pull.pull(store, ["made"], tmp_path / "new" / "out", format=kind)
    assert [(each.path.name, each.rows) for each in copy.files] == [
        (f"trials.{kind}", 2), (f"epochs.{kind}", 6), ("made.yaml", None),
    ]  # fmt: skip
    assert all(each.path.stat().st_size == each.size for each in copy.files)
    assert read(copy.files[0].path).equals(store.trials("made"))
    assert read(copy.files[1].path).equals(store.epochs("made"))
    assert copy.files[2].path.read_text() == "name: made\n"
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(
        each.path.name for each in copy.files
    )
    assert (copy.sweeps, copy.notes) == ([pull.SweepState("made", "finished", 2, 2)], [])


def test_several_sweeps_stand_one_below_the_other(store: ResultStore, tmp_path: Path) -> None:
    finished(store)
    with store.writer("other", sweep_text="name: other\n") as writer:
        advance(writer, trial(sweep="other"), 1)
    copy = pull.pull(store, ["other", "made", "other"], tmp_path / "out")
    trials = read(copy.files[0].path)
    assert trials.column("sweep").to_pylist() == ["other", "made", "made"]
    assert read(copy.files[1].path).num_rows == 1 + 6
    assert [each.path.name for each in copy.files[2:]] == ["other.yaml", "made.yaml"]
    assert [state.state for state in copy.sweeps] == ["stopped", "finished"]


def test_a_sweep_that_runs_is_copied_as_it_stands(store: ResultStore, tmp_path: Path) -> None:
    """Killed once and begun again: the rows of the first attempt beyond what was reached are not there."""
    writer = begin(store, process=DEAD)
    for number in (1, 2, 3):
        advance(writer, trial(), number, seq=number)
    for number in (1, 2):
        advance(writer, trial(1), number, seq=number)
    writer.flush(force=True)
    with begin(store) as writer:
        advance(writer, trial(1), 1, seq=3, attempt=2)
        writer.put([trial(2)])
        writer.flush(force=True)
        copy = pull.pull(store, ["made"], tmp_path / "out")
        assert copy.sweeps == [pull.SweepState("made", "running", 1, 3)]
        rows = read(copy.files[1].path).select(["trial_id", "epoch", "attempt"]).to_pylist()
        wanted = [
            (trial().trial_id, 1, 1),
            (trial().trial_id, 2, 1),
            (trial().trial_id, 3, 1),
            (trial(1).trial_id, 1, 2),
        ]
        assert sorted(tuple(each.values()) for each in rows) == sorted(wanted)


def test_logits_come_along_where_there_are_some(store: ResultStore, tmp_path: Path) -> None:
    keys = [store.attempt(trial(seed).trial_id, 1, 1, "token").put_logits(some_logits()) for seed in range(3)]
    with begin(store) as writer:
        rows = [advance(writer, trial(seed), 3, seq=seed) for seed in range(4)]
        writer.put([row.replace(logits=key) for row, key in zip(rows[:3], keys, strict=True)])
    store.folder.put(keys[1], b"junk")
    store.folder.delete(keys[2])
    copy = pull.pull(store, ["made"], tmp_path / "out", logits=True)
    (file,) = [each.path for each in copy.files if each.path.suffix == ".npz"]
    assert file == tmp_path / "out" / "logits" / f"{trial(0).trial_id}.npz"
    with np.load(file) as held:
        assert np.array_equal(held["logits_MNK"], some_logits().logits_MNK)
    assert [note.split(" are ")[0] for note in copy.notes] == [
        f"the logits of {trial(seed).trial_id}" for seed in (1, 2)
    ]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_there_is_replaced_only_when_that_is_wanted(store: ResultStore, tmp_path: Path) -> None:
    finished(store)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "epochs.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"has epochs.csv already: --yes replaces"):
        pull.pull(store, ["made"], tmp_path, format="csv")
    assert not (tmp_path / "trials.csv").exists()
    assert (tmp_path / "epochs.csv").read_text() == "mine"
    pull.pull(store, ["made"], tmp_path, format="csv", force=True)
    assert len(pd.read_csv(tmp_path / "epochs.csv")) == 6
    assert (tmp_path / "notes.txt").read_text() == "mine"


@in_a_folder
@pytest.mark.parametrize("inside", ["", "sweeps/made", "pulled"])
def test_results_are_never_pulled_into_themselves(store: ResultStore, inside: str) -> None:
    finished(store)
    before = content(store, "sweeps/made/trials.parquet")
    with pytest.raises(RefusedError, match="lies in the results themselves"):
        pull.pull(store, ["made"], Path(store.uri) / inside, force=True)
    assert content(store, "sweeps/made/trials.parquet") == before


def test_what_cannot_be_a_folder_or_a_sweep_is_refused(store: ResultStore, tmp_path: Path) -> None:
    finished(store)
    (tmp_path / "file").write_text("")
    for dest, message in (("file", "this is a file"), ("s3://bucket/x", "a folder of this machine")):
        with pytest.raises(UsageError, match=message):
            pull.pull(store, ["made"], tmp_path / dest if dest == "file" else Path(dest))
    with pytest.raises(NotFoundError, match="no sweep mad"):
        pull.pull(store, ["made", "mad"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_sweep_is_told_and_nothing_is_written(store: ResultStore, tmp_path: Path) -> None:
    finished(store)
    (part,) = store.snapshot("made").header.parts
    store.folder.put(f"sweeps/made/epochs/{part}", b"junk")
    with pytest.raises(DamagedError, match=r"made cannot be pulled.*no Parquet file.*`mixmo verify made`"):
        pull.pull(store, ["made"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_sweep_file_and_a_damaged_lease_cost_no_rows(store: ResultStore, tmp_path: Path) -> None:
    with begin(store) as writer:
        advance(writer, trial(), 1)
    store.folder.delete("sweeps/made/sweep.yaml")
    store.folder.put("sweeps/made/lease.json", b"junk")
    copy = pull.pull(store, ["made"], tmp_path / "out")
    assert [each.path.name for each in copy.files] == ["trials.parquet", "epochs.parquet"]
    assert copy.sweeps[0].state == "unknown"
    assert copy.notes[0].startswith("made.yaml is left out")


def test_a_full_disk_leaves_what_was_there(store: ResultStore, tmp_path: Path) -> None:
    """The kernel plays the full disk: files may not grow past some bytes, which `trials` and `epochs` need more of."""
    finished(store)
    pull.pull(store, ["made"], tmp_path / "out", format="arrow")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["trials.arrow"]) - 1, limits[1]))
    try:
        with pytest.raises(UnreachableError, match=r"cannot write .*: File too large.*name another folder"):
            pull.pull(store, ["made"], tmp_path / "out", format="arrow", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ----------------------------------------------------------------------------------------------------------------- CSV


def test_csv_is_read_back_by_pandas_and_polars(tmp_path: Path) -> None:
    metrics = {**NOTHING, "loss": math.nan, "top1": 0.5, "nll": math.inf}
    awkward = 'line one\nnan,"quoted", nan\n,nan,'
    rows = [trial(0, metrics=metrics, error=awkward), trial(1, metrics={**metrics, "loss": 0.25}), trial(2)]
    epochs = [epoch(trial(seed), 1, seq=seed) for seed in range(3)]
    (tmp_path / "trials.csv").write_bytes(as_csv(to_table(rows, TRIALS_SCHEMA)))
    (tmp_path / "epochs.csv").write_bytes(as_csv(to_table(epochs, EPOCHS_SCHEMA)))

    pandas = pd.read_csv(tmp_path / "trials.csv", dtype={"trial_id": str})
    assert pandas.loss.isna().tolist() == [True, False, True]
    assert (pandas.loss[1], pandas.nll[0], pandas.error[0]) == (0.25, math.inf, awkward)
    assert json.loads(pandas.optim_decay_at[0]) == list(rows[0].config["optim_decay_at"])

    polars = pl.read_csv(tmp_path / "trials.csv", schema_overrides={"trial_id": pl.String})
    assert polars.schema["loss"] == polars.schema["nll"] == pl.Float64
    assert polars["loss"].is_nan().to_list() == [True, False, None]
    assert (polars["error"][0], polars["trial_id"].to_list()) == (awkward, [row.trial_id for row in rows])

    times = [each.updated_at for each in epochs]
    parsed = pd.read_csv(tmp_path / "epochs.csv", parse_dates=["updated_at"]).updated_at
    assert [each.to_pydatetime() for each in parsed] == times
    read = pl.read_csv(tmp_path / "epochs.csv", try_parse_dates=True)["updated_at"]
    assert [each.replace(tzinfo=UTC) for each in read.to_list()] == times


WORDS = st.text(st.sampled_from('nan,"\n aN'), max_size=12)


@given(
    st.lists(st.tuples(WORDS, st.none() | st.floats(), st.none() | st.lists(st.floats(0, 1), max_size=2)), min_size=1)
)
def test_words_and_numbers_are_not_taken_for_each_other_in_csv(rows: list[tuple[Any, Any, Any]]) -> None:
    words, numbers, lists = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({
        "word": words, "number": pa.array(numbers, pa.float64()), "list": pa.array(lists, pa.list_(pa.float64())),
    })  # fmt: skip
    types = {"word": pl.String, "number": pl.Float64, "list": pl.String}
    back = pl.read_csv(io.BytesIO(as_csv(table)), schema_overrides=types)
    assert back["word"].to_list() == words
    assert [repr(each) for each in back["number"].to_list()] == [repr(each) for each in numbers]
    assert [json.loads(each) if each else None for each in back["list"].to_list()] == lists


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(store: ResultStore, tmp_path: Path, mixmo: Command) -> None:
    finished(store)
    code, out, err = mixmo("pull", "made", tmp_path / "out", "--results", store.uri)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{tmp_path}/out/trials.parquet  2 rows", f"{tmp_path}/out/epochs.parquet  6 rows", f"{tmp_path}/out/made.yaml",
    ]  # fmt: skip
    code, out, err = mixmo("pull", "made", tmp_path / "out", "--results", store.uri)
    assert (code, out) == (2, "")
    assert "--yes" in err
    code, out, _ = mixmo("pull", "made", tmp_path / "out", "--results", store.uri, "--yes", "--json")
    told = json.loads(out)
    assert (code, told["schema"]) == (0, "mixmo.pull/1")
    assert [each["rows"] for each in told["files"]] == [2, 6, None]
    assert told["sweeps"] == [{"sweep": "made", "state": "finished", "ended": 2, "trials": 2}]


@in_a_folder
def test_the_command_says_that_a_sweep_still_runs(store: ResultStore, tmp_path: Path, mixmo: Command) -> None:
    with begin(store) as writer:
        advance(writer, trial(), 3)
        writer.put([trial(1)])
        writer.flush(force=True)
        code, _, err = mixmo("pull", "made", tmp_path / "out", "--results", store.uri)
        assert (code, err) == (0, "note: made still runs: 1 of 2 trials have ended. Pull again later for the rest\n")
    at(store, "sweeps/made/trials.parquet").write_bytes(b"junk")
    code, out, err = mixmo("pull", "made", tmp_path / "two", "--results", store.uri)
    assert (code, out) == (7, "")
    assert "`mixmo verify made`" in err


def test_the_command_wants_a_folder(mixmo: Command) -> None:
    code, _, err = mixmo("pull", "made")
    assert (code, err) == (2, "mixmo: name the sweeps and then a folder: mixmo pull made FOLDER\n")
