"""docs/results.md: its tables are the code's, and its code blocks run on a real store and give the right rows.

The store is caught at a bad moment: a driver was killed and another is at work, in the middle of a merge.
"""

import importlib.util
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from made_rows import DEAD, advance, content, epoch, trial

from mixmo_core.config import leaves
from mixmo_core.metrics import METRICS
from orchestrator import analysis, cli
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, to_table
from orchestrator.store import Folder, ResultStore, SweepWriter, encode, merge
from orchestrator.store import writer as writing

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
_TITLES = re.compile(r"^#+ ([^\n]*)$|^```(python|sql|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def _blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(heading that it stands under, language, code) of each block."""
    heading = ""
    for found in _TITLES.finditer(page):
        if found[2] is None:
            heading = found[1]
        else:
            yield heading, found[2], found[3]


BLOCKS = list(_blocks(PAGE.read_text()))


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


# ------------------------------------------------------------------------------------------- a store at a bad moment

SWEEP = "sweeps/quickstart"


def run_until_killed(store: ResultStore) -> SweepWriter:
    """Two trials finish, and the parts of their rows become one; the third is in its third epoch."""
    writer = store.writer("quickstart", sweep_text="name: quickstart\n", process=DEAD)
    for seed in range(2):
        for number in (1, 2, 3):
            advance(writer, trial(seed), number, seq=number)
        writer.flush(force=True)
    for number in (1, 2):
        advance(writer, trial(2), number, seq=number)
    writer.put([trial(3)])
    writer.flush(force=True)
    return writer


def caught(store: ResultStore) -> SweepWriter:
    """A second driver has begun the third trial anew, finished a fourth, and is about to name the part of a merge."""
    first = run_until_killed(store)
    writer = store.writer("quickstart", sweep_text="name: quickstart\n")
    advance(writer, trial(2), 1, seq=9, attempt=2)
    for number in (1, 2, 3):
        advance(writer, trial(4), number, seq=10 + number)
    writer.flush(force=True)
    # A driver that comes to itself after it was given up: rows of the attempt that was thrown back, and one more.
    late = [epoch(trial(2), number, seq=number, fence=1) for number in (1, 2, 3)]
    store.folder.put(f"{SWEEP}/epochs/live-{first.fence}.parquet", encode(to_table(late, EPOCHS_SCHEMA)))
    merging = [read(store, name) for name in store.snapshot("quickstart").header.parts]
    store.folder.put(f"{SWEEP}/epochs/part-{writer.fence}-000099.parquet", encode(merge(merging)))
    return writer


def read(store: ResultStore, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(content(store, f"{SWEEP}/epochs/{name}")))


@pytest.fixture
def results(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ResultStore]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "MERGED_AT", 2)
    store = ResultStore.open(place, create=True)
    writer = caught(store)
    yield store
    writer.close(done=False)


in_a_folder = pytest.mark.parametrize("place", ["folder"], indirect=True)
in_a_bucket = pytest.mark.parametrize(
    "place", ["bucket", pytest.param("ceph_bucket", marks=pytest.mark.slow)], indirect=True
)


def expected(store: ResultStore) -> list[tuple[str, int, int, float | None]]:
    """(trial, epoch, fence, top1) of each row that counts, which are also what the store itself reads."""
    rows = [(trial(seed), number, 1) for seed in range(2) for number in (1, 2, 3)]
    rows += [(trial(2), 1, 2), *((trial(4), number, 2) for number in (1, 2, 3))]
    wanted = sorted((row.trial_id, number, fence, epoch(row, number).metrics["top1"]) for row, number, fence in rows)
    held = store.epoch_rows("quickstart")
    assert [(row.trial_id, row.epoch, row.fence, row.metrics["top1"]) for row in held] == wanted
    return wanted


MEAN_TOP1 = sum(epoch(trial(seed), 3).metrics["top1"] or 0 for seed in (0, 1, 4)) / 3


@in_a_folder
def test_the_moment_is_a_bad_one(results: ResultStore) -> None:
    """Rows lie in a part and its merge, in the live file and a part, in the file of a dead driver, and in a merge that
    nothing names yet; and some go beyond what their trial has reached.
    """
    header = results.snapshot("quickstart").header
    names = results.folder.names(f"{SWEEP}/epochs")
    tables = {name: read(results, name) for name in names}
    keys = {
        name: set(zip(table.column("trial_id").to_pylist(), table.column("epoch").to_pylist(), strict=True))
        for name, table in tables.items()
    }
    merged = next(name for name in header.parts if name.startswith("part-1"))
    retired = [name for name in header.retired if name.startswith("part-1")]
    assert len(retired) == 2
    assert all(keys[name] < keys[merged] for name in retired)
    assert keys["live-2.parquet"] & keys[next(name for name in header.parts if name.startswith("part-2"))]
    assert "part-2-000099.parquet" in names
    assert "part-2-000099.parquet" not in header.parts
    assert (trial(2).trial_id, 3) in keys["live-1.parquet"]
    assert sum(map(len, keys.values())) > 2 * len(expected(results))


# ----------------------------------------------------------------------------------------------------------- the blocks


def block(title: str, language: str = "python", number: int = 0) -> str:
    return [code for section, spoken, code in BLOCKS if (section, spoken) == (title, language)][number]


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def tuples(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(frame[["trial_id", "epoch", "fence", "top1"]].itertuples(index=False, name=None))


def query(sql: str) -> pd.DataFrame:
    table: pd.DataFrame = duckdb.connect().sql(sql).to_arrow_table().to_pandas()
    return table


@in_a_folder
def test_the_python_block(results: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(block("In Python"))
    assert names["trials"].num_rows == 5
    assert names["epochs"].num_rows == len(expected(results))
    assert "| cutmix |" in capsys.readouterr().out
    assert tuples(names["curves"]) == expected(results)
    assert names["best"].height == 3


@in_a_folder
def test_the_pandas_block(results: ResultStore) -> None:
    names = run(block("pandas"))
    assert tuples(names["epochs"]) == expected(results)
    assert list(names["table"]["count"]) == [3]
    assert names["table"]["mean"].iloc[0] == pytest.approx(MEAN_TOP1)


@in_a_folder
def test_the_sql_blocks(results: ResultStore) -> None:
    table = query(block("DuckDB", "sql"))
    assert (list(table.model_width), list(table.n)) == ([2], [3])
    assert tuples(query(block("DuckDB", "sql", 1))) == expected(results)


@in_a_folder
def test_the_polars_block(results: ResultStore) -> None:
    frame = run(block("polars"))["epochs"]
    assert sorted(frame.select("trial_id", "epoch", "fence", "top1").rows()) == expected(results)


class Watched(Folder):
    """Calls back after every change of an object."""

    def __init__(self, root: Path, look: Callable[[], None]) -> None:
        super().__init__(root)
        self._look = look

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        self._look()

    def create(self, key: str, data: bytes) -> bool:
        made = super().create(key, data)
        self._look()
        return made

    def delete(self, key: str) -> None:
        super().delete(key)
        self._look()


def test_the_blocks_are_right_after_every_single_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store's own reader says, which `test_writer.py` holds to what was acknowledged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "MERGED_AT", 2)
    seen: list[int] = []

    def look() -> None:
        store = ResultStore.open("results")
        if not store.sweeps():
            return
        known = {row.trial_id for row in store.trial_rows("quickstart")}  # a new trial's rows come before its own row
        rows = [row for row in store.epoch_rows("quickstart") if row.trial_id in known]
        wanted = sorted((row.trial_id, row.epoch, row.fence, row.metrics["top1"]) for row in rows)
        for title in ("pandas", "polars"):
            frame = run(block(title))["epochs"]
            columns = frame[["trial_id", "epoch", "fence", "top1"]]
            assert sorted(columns.itertuples(index=False, name=None) if title == "pandas" else columns.rows()) == wanted
        assert tuples(query(block("DuckDB", "sql", 1))) == wanted
        seen.append(len(wanted))

    caught(ResultStore(Watched(Path("results"), look))).close(done=False)
    assert seen[-1] == 10
    assert len(seen) > 20


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs the lines of a block as commands, in this process. What they print."""
    before = signal.getsignal(signal.SIGTERM)

    def lines(code: str) -> list[str]:
        outs = []
        for line in code.splitlines():
            program, *words = shlex.split(line)
            assert program == "mixmo"
            with pytest.raises(SystemExit) as ended:
                cli.main(words)
            told = capsys.readouterr()
            assert not ended.value.code, told.err
            outs.append(told.out)
        return outs

    yield lines
    signal.signal(signal.SIGTERM, before)


def test_the_blocks_of_the_copies(results: ResultStore, monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    monkeypatch.setenv("MIXMO_RESULTS", results.uri)
    shell(block("A copy", "bash"))
    assert tuples(pd.read_parquet("copy/epochs.parquet")) == expected(results)
    names = run(block("A copy"))
    assert sorted(names["epochs"].select("trial_id", "epoch", "fence", "top1").rows()) == expected(results)
    assert sorted(names["trials"].trial_id) == sorted(trial(seed).trial_id for seed in range(5))
    assert str(names["trials"].updated_at.dtype) == "datetime64[us, UTC]"


def test_the_block_of_sql(results: ResultStore, monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    monkeypatch.setenv("MIXMO_RESULTS", results.uri)
    columns, table, curve = shell(block("SQL", "bash"))
    assert all(f"{name} " in columns for name in TRIALS_SCHEMA.names)
    assert table.splitlines()[-1].split()[:3] == ["2", "cutmix", f"{MEAN_TOP1:.6g}"]
    counts = [int(line.rpartition(",")[2]) for line in curve.splitlines()[1:]]
    assert counts == [sum(number == each for _, each, _, _ in expected(results)) for number in (1, 2, 3)]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("example", PAGE.parent / "analysis.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_draws_what_all_three_tools_say(results: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    example, loaded = script(), analysis.load(results.uri, "quickstart")
    rows = expected(results)
    means = [sum(top1 or 0 for _, at, _, top1 in rows if at == number) / [4, 3, 3][number - 1] for number in (1, 2, 3)]
    for curves in (example.with_duckdb(loaded), example.with_polars(loaded), example.with_pandas(loaded)):
        assert curves.columns == ["label", "mixing_method", "epoch", "mean", "std", "n"]
        assert curves.select("label", "mixing_method", "epoch", "n").rows() == [
            (None, "cutmix", 1, 4), (None, "cutmix", 2, 3), (None, "cutmix", 3, 3),
        ]  # fmt: skip
        assert curves["mean"].to_list() == pytest.approx(means)
        assert curves["std"].min() > 0
    example.main(results.uri, "quickstart", "curves.png")
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "curves.png\n"


# ------------------------------------------------------------------------------------------------------- from a bucket

BUCKET = [code for section, _, code in BLOCKS if section == "In a bucket"]


def run_in_bucket(code: str, store: ResultStore, server: str) -> dict[str, Any]:
    """A block, with the addresses of the page replaced by those of the test."""
    code = code.replace("s3://bucket/prefix/", store.uri.partition("?")[0] + "/").replace(
        "s3://bucket/prefix", store.uri
    )
    return run(code.replace('"https://host:9000"', f'"http://{server}", "aws_allow_http": "true"'))


def server_of(store: ResultStore) -> str:
    found = re.search("endpoint_override=([^&]+)", store.uri)
    assert found
    return found[1]


@in_a_bucket
def test_the_blocks_of_a_bucket(results: ResultStore) -> None:
    server = server_of(results)
    for code in BUCKET:
        names = run_in_bucket(code, results, server)
        if "pl.read_parquet" in code:
            assert sorted(names["epochs"].select("trial_id", "epoch", "fence", "top1").rows()) == expected(results)
        elif "curve" in names:
            assert names["curve"].column("n").to_pylist() == [4, 3, 3]
            assert names["trials"].num_rows == 5
        else:
            frame = names["epochs"]
            assert tuples(frame if "pandas" in code.partition("\n")[0] else frame.to_pandas()) == expected(results)


def test_no_block_is_left_out() -> None:
    here = ["A copy", "SQL", "In Python", "pandas", "DuckDB", "polars"]
    assert [section for section, language, _ in BLOCKS if section in here] == [
        "A copy", "A copy", "SQL", "In Python", "pandas", "DuckDB", "DuckDB", "polars",
    ]  # fmt: skip
    tools = ("storage_options", "ds.dataset", "read_parquet", "duckdb")
    ways = [next(word for word in tools if word in code) for code in BUCKET]
    assert ways == ["duckdb", "read_parquet", "ds.dataset", "storage_options"]
    elsewhere = ["ensembles.rows(", "torch.export.load(", "trained.network(", "networks.load_reference("]
    others = [code for section, _, code in BLOCKS if section not in (*here, "In a bucket")]
    assert [any(word in code for word in elsewhere) for code in others] == [True] * len(elsewhere)
