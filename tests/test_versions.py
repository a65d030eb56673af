"""What earlier versions wrote stays readable, and what later ones will write is read as far as that is right.

`tests/golden/stores/<version>` holds a store that the version left, and what is to be found in it. MIXMO_RECORD=1 makes
that of the version at hand, where there is none.
"""

import contextlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import made_store
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_rows import advance, at, begin, content, finished, in_a_folder, keys, trial
from made_store import FINISHED, RUNNING, SWEEP

from mixmo_core import train
from mixmo_core.config import NUMERICS, parts, trial_id
from orchestrator import analysis, cli, pull, query, trained
from orchestrator.cli import guard
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, TrialRow, config_of
from orchestrator.store import DamagedError, ResultStore
from orchestrator.store.tables import LAYOUT, NewerError

STORES = Path(__file__).parent / "golden" / "stores"
VERSION = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["version"]

if os.environ.get("MIXMO_RECORD") and not (STORES / VERSION).exists():
    made_store.record(STORES / VERSION)


def test_this_version_has_left_a_store() -> None:
    assert (STORES / VERSION).is_dir(), "MIXMO_RECORD=1 pytest tests/test_versions.py writes it"


def test_stored_stores_are_small() -> None:
    for folder in STORES.iterdir():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2 << 20


@pytest.fixture(params=sorted(folder.name for folder in STORES.glob("*")))
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ResultStore, str]:
    """A copy of a store that a version left, and the JSON of what is in it."""
    shutil.copytree(STORES / request.param / "results", tmp_path / "results")
    return ResultStore.open(tmp_path / "results"), (STORES / request.param / "expected.json").read_text()


# ------------------------------------------------------------------------------------------------------------ backwards


def test_every_reader_reads_it(kept: tuple[ResultStore, str]) -> None:
    store, expected = kept
    assert made_store.found(store) == json.loads(expected)
    assert store.verify(SWEEP) == []
    assert store.lease(SWEEP) is None
    assert store.trials(SWEEP).schema.equals(TRIALS_SCHEMA)
    assert store.epochs(SWEEP).schema.equals(EPOCHS_SCHEMA)
    trials, epochs = store.tables(SWEEP)
    assert (trials.equals(store.trials(SWEEP)), epochs.equals(store.epochs(SWEEP))) == (True, True)
    loaded = analysis.load(store.uri)
    assert len(loaded.to_pandas("epochs")) == loaded.to_polars("epochs").height == len(epochs)


@contextlib.contextmanager
def as_it_reckoned(row: TrialRow) -> Iterator[None]:
    """With the version that each part's arithmetic had when the row was written."""
    with pytest.MonkeyPatch.context() as patch:
        for part, number in (each.split("=") for each in (row.numerics or "").split()):
            assert 1 <= int(number) <= NUMERICS[part]
            patch.setitem(NUMERICS, part, int(number))
        yield


def test_a_row_still_has_the_trial_id_that_it_had(kept: tuple[ResultStore, str]) -> None:
    """Else the trial would be trained again, as it should be only where its arithmetic has changed."""
    for row in kept[0].trial_rows(SWEEP):
        with as_it_reckoned(row):
            assert trial_id(config_of(row)) == row.trial_id
            current = parts(config_of(row))
        assert (trial_id(config_of(row)) == row.trial_id) == (current == parts(config_of(row)))


def test_its_network_predicts_what_it_did(kept: tuple[ResultStore, str]) -> None:
    store, _ = kept
    row = store.trial_rows(SWEEP)[FINISHED]
    found = trained.network(store, row.trial_id)
    assert found.is_finished
    measured = train.measure(found.net, found.config)
    assert measured["top1"] == pytest.approx(row.metrics["top1"], abs=0.01)


def test_a_training_goes_on_from_its_checkpoint(kept: tuple[ResultStore, str], tmp_path: Path) -> None:
    store, _ = kept
    row = store.trial_rows(SWEEP)[RUNNING]
    (key,) = store.checkpoints(row.trial_id)
    state = train.load(store.fetch(key, tmp_path / key.rpartition("/")[2]))
    assert (state["epoch"], state["part"]["step"], len(state["rows"])) == (2, 1, 1)
    with as_it_reckoned(row):
        (last,) = [epoch for epoch in train.train(config_of(row), resume=state) if isinstance(epoch, train.Epoch)]
    assert last.epoch == 2
    assert torch.isfinite(torch.tensor(last.metrics["loss"]))


def test_a_driver_goes_on_with_it(kept: tuple[ResultStore, str]) -> None:
    store, expected = kept
    before = json.loads(expected)
    with store.writer(SWEEP, sweep_text=made_store.TEXT) as writer:
        assert [row.trial_id for row in writer.rows] == [each[0] for each in before["trials"]]
        for row in writer.rows[RUNNING:]:
            for number in (1, 2):
                advance(writer, row.replace(attempt=3), number, seq=100 + number, attempt=3)
        writer.close(done=True)
    assert store.verify(SWEEP) == []
    assert {row.state for row in store.trial_rows(SWEEP)} == {"TERMINATED", "ERROR"}
    settled = [each for each in before["epochs"] if each[0] in (before["trials"][0][0], before["trials"][1][0])]
    after = [[r.trial_id, r.epoch, r.fence, r.attempt, r.metrics["top1"]] for r in store.epoch_rows(SWEEP)]
    assert all(each in after for each in settled)
    assert len(after) == len(settled) + 4


# ------------------------------------------------------------------------------------------------------------- forwards


def changed(store: ResultStore, key: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a table of the sweep `made` as another version would have; its footer stays."""
    name, sink = f"sweeps/made/{key}", pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(pa.BufferReader(content(store, name)))), sink)
    store.folder.put(name, sink.getvalue().to_pybytes())


def with_colours(table: pa.Table) -> pa.Table:
    """A column more, a higher version of the schema where it is told, and the columns in another order."""
    later = table.append_column("colour", pa.array(["red"] * len(table), pa.string()))
    if "schema_version" in table.schema.names:
        index = table.schema.names.index("schema_version")
        later = later.set_column(index, "schema_version", pa.array([7] * len(table), pa.int64()))
    return later.select(later.schema.names[::-1]).replace_schema_metadata(table.schema.metadata)


def later(store: ResultStore) -> None:
    """A finished sweep of a version whose tables have a column more."""
    for key in ("trials.parquet", "epochs/live-1.parquet", *(f"epochs/{part}" for part in epoch_parts(store))):
        changed(store, key, with_colours)


def epoch_parts(store: ResultStore) -> list[str]:
    return list(store.snapshot("made").header.parts)


def test_columns_of_a_later_version_are_left_out(store: ResultStore, tmp_path: Path) -> None:
    rows = finished(store)
    before = store.tables("made")
    later(store)
    trials, epochs = store.tables("made")
    assert (trials.schema.equals(TRIALS_SCHEMA), epochs.equals(before[1])) == (True, True)
    assert set(trials.column("schema_version").to_pylist()) == {7}
    assert [row.trial_id for row in store.trial_rows("made")] == [row.trial_id for row in rows]
    assert store.verify("made") == []
    pull.pull(store, ["made"], tmp_path / "out")
    assert "colour" not in pq.read_schema(tmp_path / "out" / "trials.parquet").names
    assert query.ask("from trials", query.tables(store, (), "from trials")).table.equals(trials)


@in_a_folder
def test_tools_that_read_the_files_take_those_of_two_versions(store: ResultStore) -> None:
    """The parts of the later version have a column more, whichever file they meet first."""
    finished(store)
    changed(store, f"epochs/{epoch_parts(store)[0]}", with_colours)
    folder = at(store, "sweeps/made/epochs")
    for fence in (0, 9):  # before and after, by name
        pq.write_table(EPOCHS_SCHEMA.empty_table(), folder / f"live-{fence}.parquet")
        pq.write_table(with_colours(EPOCHS_SCHEMA.empty_table()), folder / f"part-{fence}-000000.parquet")
    assert len(pd.read_parquet(folder).drop_duplicates(["trial_id", "epoch"])) == 6
    frame = pl.scan_parquet(folder / "*.parquet", missing_columns="insert", extra_columns="ignore").collect()
    assert frame.unique(["trial_id", "epoch"]).height == 6
    table = duckdb.connect().sql(f"from read_parquet('{folder}/*.parquet', union_by_name = true)").to_arrow_table()
    assert set(table.column("colour").to_pylist()) == {"red", None}


@pytest.mark.parametrize("key", ["trials.parquet", "epochs/live-1.parquet"])
def test_an_earlier_version_does_not_run_what_it_would_write_with_loss(store: ResultStore, key: str) -> None:
    finished(store)
    changed(store, key, with_colours)
    before = content(store, "sweeps/made/trials.parquet")
    with pytest.raises(NewerError, match=r"would lose by running it \(colour\).*Upgrade mixmo"):
        begin(store)
    assert content(store, "sweeps/made/trials.parquet") == before
    assert store.lease("made") is None
    assert len(keys(store)) == 6


@pytest.mark.parametrize("missing", ["logits", "ece", "hosts", "mixing_alpha"])
def test_what_an_earlier_version_did_not_write_is_null(store: ResultStore, missing: str) -> None:
    finished(store)
    for key in ("trials.parquet", *(f"epochs/{part}" for part in epoch_parts(store))):
        changed(store, key, lambda table: table.drop_columns([missing]) if missing in table.schema.names else table)
    trials, epochs = store.tables("made")
    assert trials.column(missing).null_count == 2
    assert missing not in epochs.schema.names or epochs.column(missing).null_count == 6
    with begin(store) as writer:  # and this version runs it
        advance(writer, trial(5), 1)
    assert len(keys(store)) == 7


def of_layout(number: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        footer = {**json.loads(table.schema.metadata[b"mixmo"]), "layout": number}
        return table.replace_schema_metadata({"mixmo": json.dumps(footer)})

    return change


@in_a_folder
def test_a_later_layout_is_refused_before_anything_is_made_of_it(
    store: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(store)
    changed(store, "trials.parquet", of_layout(LAYOUT))
    assert len(keys(store)) == 6
    changed(store, "trials.parquet", lambda table: of_layout(LAYOUT + 1)(table.select(["trial_id"])))
    for read in (store.trials, store.epochs, store.snapshot, store.verify, store.trial_rows):
        with pytest.raises(NewerError, match=r"later mixmo \(layout 2; this one reads 1\). Upgrade mixmo"):
            read("made")
    before = content(store, "sweeps/made/trials.parquet")
    with pytest.raises(DamagedError, match="Upgrade mixmo"):
        begin(store)
    assert content(store, "sweeps/made/trials.parquet") == before
    code = guard.guarded(lambda: cli.app(args=["ls", "--results", store.uri], standalone_mode=False))
    told = capsys.readouterr()
    assert (code, "Upgrade mixmo" in told.err) == (7, True)
