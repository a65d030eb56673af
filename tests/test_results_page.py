"""docs/results.md: its tables are the code's, and its code blocks run on a real store and give the right rows."""

import os
import re
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from made_rows import advance, content, epoch, trial

from mixmo_core.config import leaves
from mixmo_core.metrics import METRICS
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA
from orchestrator.store import ResultStore

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
BLOCKS = re.findall(r"```(python|sql)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def settings_table() -> str:
    lines = ["| column | setting | meaning |", "| --- | --- | --- |"]
    for name, spec in leaves():
        setting = spec.metadata["setting"]
        symbol = f" ({setting.symbol})" if setting.symbol else ""
        lines.append(f"| `{name.replace('.', '_')}` | `{name}` | {setting.meaning}{symbol} |")
    return "\n".join(lines)


def metrics_table() -> str:
    lines = ["| column | unit | better | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{each.name}` | {each.unit} | {each.better} | {each.meaning} |" for each in METRICS]
    return "\n".join(lines)


def filled(page: str) -> str:
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        page = re.sub(rf"<!-- {name} -->\n\n(\|.*\n)*", f"<!-- {name} -->\n\n{table}\n", page)
    return page


def test_the_tables_of_the_page_are_the_codes() -> None:
    page = PAGE.read_text()
    if os.environ.get("MIXMO_RECORD"):
        PAGE.write_text(filled(page))
    assert page == filled(page), "docs/results.md is out of date: MIXMO_RECORD=1 writes its tables anew"


@pytest.mark.parametrize("name", sorted({*TRIALS_SCHEMA.names, *EPOCHS_SCHEMA.names}))
def test_every_column_is_explained(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    """A driver was killed, another is at work: rows doubled over attempts and files, some of them thrown back."""
    monkeypatch.chdir(tmp_path)
    store = ResultStore.open("results", create=True)
    with store.writer("quickstart", sweep_text="") as writer:
        for seed in range(2):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
        for number in (1, 2):
            advance(writer, trial(2), number, seq=number)
        writer.put([trial(3)])
    left = content(store, "sweeps/quickstart/epochs/live-1.parquet")
    with store.writer("quickstart", sweep_text="") as writer:
        advance(writer, trial(2), 1, seq=9, attempt=2)
    store.folder.put("sweeps/quickstart/epochs/live-1.parquet", left)
    return store


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def expected(store: ResultStore) -> list[tuple[str, int, int, float | None]]:
    """(trial, epoch, fence, top1) of each row that counts, which are also what the store itself reads."""
    rows = [(trial(seed), number, 1) for seed in range(2) for number in (1, 2, 3)] + [(trial(2), 1, 2)]
    wanted = sorted((row.trial_id, number, fence, epoch(row, number).metrics["top1"]) for row, number, fence in rows)
    held = store.epoch_rows("quickstart")
    assert [(row.trial_id, row.epoch, row.fence, row.metrics["top1"]) for row in held] == wanted
    return wanted


def tuples(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(frame[["trial_id", "epoch", "fence", "top1"]].itertuples(index=False, name=None))


def test_the_python_block(results: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(BLOCKS[0][1])
    assert names["trials"].num_rows == 4
    assert names["epochs"].num_rows == len(expected(results))
    assert "| cutmix |" in capsys.readouterr().out


def test_the_pandas_block(results: ResultStore) -> None:
    names = run(BLOCKS[1][1])
    assert tuples(names["epochs"]) == expected(results)
    assert list(names["table"]["count"]) == [2]
    assert names["table"]["mean"].iloc[0] == pytest.approx(
        sum(epoch(trial(s), 3).metrics["top1"] or 0 for s in (0, 1)) / 2
    )


def query(sql: str) -> pd.DataFrame:
    table: pd.DataFrame = duckdb.connect().sql(sql).to_arrow_table().to_pandas()
    return table


def test_the_sql_blocks(results: ResultStore) -> None:
    table = query(BLOCKS[2][1])
    assert (list(table.model_width), list(table.n)) == ([2], [2])
    assert tuples(query(BLOCKS[3][1])) == expected(results)


def test_the_polars_block(results: ResultStore) -> None:
    pytest.importorskip("polars", reason="polars is not installed, whose snippet in docs/results.md is then not run")
    frame = run(BLOCKS[4][1])["epochs"]
    assert sorted(frame.select("trial_id", "epoch", "fence", "top1").rows()) == expected(results)


def test_the_block_of_a_bucket(bucket: str) -> None:
    with ResultStore.open(bucket, create=True).writer("quickstart", sweep_text="") as writer:
        writer.put([trial(0), trial(1)])
    block = next(code for _, code in BLOCKS if "s3://bucket" in code)
    trials = run(block.replace("s3://bucket/prefix", bucket))["trials"]
    assert list(trials.trial_id) == [trial(0).trial_id, trial(1).trial_id]


def test_no_block_is_left_out() -> None:
    assert [language for language, _ in BLOCKS[:5]] == ["python", "python", "sql", "sql", "python"]
    elsewhere = [
        "ensembles.rows(",
        "torch.export.load(",
        "trained.network(",
        "networks.load_reference(",
        "s3://bucket",
    ]  # in test_ensembles.py, test_trained.py, and above
    assert [any(word in code for _, code in BLOCKS[5:]) for word in elsewhere] == [True] * len(BLOCKS[5:])
