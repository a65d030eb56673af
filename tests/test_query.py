"""`mixmo sql`: DuckDB's answers over a store, right while a sweep runs, and nothing else within a query's reach."""

import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from made_rows import DEAD, advance, begin, epoch, finished, in_a_folder, trial

from orchestrator import cli, query
from orchestrator.errors import NotFoundError, UsageError
from orchestrator.query import Answer
from orchestrator.store import DamagedError, ResultStore

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mixmo(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs `mixmo sql` on the store in this process: its code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["sql", *words, "--results", store.uri])
        return (int(ended.value.code or 0), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


def asked(store: ResultStore, text: str, *sweeps: str) -> list[tuple[object, ...]]:
    answer = query.ask(text, query.tables(store, sweeps, text))
    return [tuple(row.values()) for row in answer.to_records()]


# --------------------------------------------------------------------------------------------------------- the answers


def test_the_answer_is_right_while_a_driver_that_was_killed_is_followed_by_another(store: ResultStore) -> None:
    writer = begin(store, process=DEAD)
    for number in (1, 2, 3):
        advance(writer, trial(), number, seq=number)
    for number in (1, 2):
        advance(writer, trial(1), number, seq=number)
    writer.flush(force=True)
    with begin(store) as writer:
        advance(writer, trial(1), 1, seq=3, attempt=2)
        writer.flush(force=True)
        text = "select trial_id, epoch, fence, top1 from epochs order by all"
        rows = [(trial(), number, 1) for number in (1, 2, 3)] + [(trial(1), 1, 2)]
        wanted = [(row.trial_id, number, fence, epoch(row, number).metrics["top1"]) for row, number, fence in rows]
        assert asked(store, text) == sorted(wanted)


def test_all_sweeps_or_those_that_are_named(store: ResultStore) -> None:
    finished(store)
    with store.writer("other", sweep_text="") as writer:
        advance(writer, trial(sweep="other"), 1)
    text = "select sweep, count(*), (select count(*) from epochs e where e.sweep = t.sweep) from trials t group by all"
    assert sorted(asked(store, text)) == [("made", 2, 6), ("other", 1, 1)]
    assert asked(store, text, "other") == [("other", 1, 1)]
    assert sorted(asked(store, text, "made", "other", "made")) == [("made", 2, 6), ("other", 1, 1)]
    with pytest.raises(NotFoundError, match="no sweep others"):
        asked(store, text, "others")


@in_a_folder
def test_an_empty_store_has_both_tables_and_no_rows(store: ResultStore) -> None:
    assert asked(store, "select count(top1), (select count(top1) from epochs) from trials") == [(0, 0)]


def test_epochs_are_read_only_where_they_are_asked_for(store: ResultStore) -> None:
    finished(store)
    (part,) = store.snapshot("made").header.parts
    store.folder.put(f"sweeps/made/epochs/{part}", b"junk")
    assert asked(store, "select count(*) from trials") == [(2,)]
    for text in ("from EPOCHS", "select 1 from trials join made.epochs using (trial_id)", 'from "epochs"'):
        assert list(query.tables(store, (), text).damaged) == ["made"]
        with pytest.raises(DamagedError):
            query.tables(store, ["made"], text)


def test_a_damaged_sweep_does_not_hide_the_others(store: ResultStore, mixmo: Command) -> None:
    finished(store)
    with store.writer("other", sweep_text="") as writer:
        writer.put([trial(sweep="other")])
    store.folder.put("sweeps/made/trials.parquet", b"junk")
    code, out, err = mixmo("select sweep from trials", "--format", "csv")
    assert (code, out) == (7, '"sweep"\n"other"\n')
    assert "without made: " in err
    code, out, err = mixmo("select sweep from trials", "other")
    assert (code, out.split(), err) == (0, ["sweep", "─────", "other"], "")


@in_a_folder
@pytest.mark.parametrize("text", [
    "select trial_id, max(top1) from epochs group by all",
    "from trials", "describe epochs", "summarize trials", "show tables", "explain select 1 from trials",
    "with epochs as (select 1 as a) select a from epochs",
    "pivot epochs on epoch using max(top1) group by trial_id",
    "select date_trunc('day', updated_at) from trials",
])  # fmt: skip
def test_what_duckdb_offers_for_reading_is_there(store: ResultStore, text: str) -> None:
    finished(store)
    assert asked(store, text)


# -------------------------------------------------------------------------------------------------------- the refusals


@pytest.mark.parametrize(("text", "message"), [
    ("select tpo1 from trials", r'(?s)"tpo1" not found.*"top1".*`mixmo sql "describe trials"` lists'),
    ("select top1 from trails", r'(?s)trails does not exist.*"trials"'),
    ("selekt", "syntax error"),
    ("select 1; select 2", "2 queries"),
    ("", "asks nothing"),
    ("-- only words", "asks nothing"),
    ("drop view trials", "only read"),
    ("create table x as from trials", "only read"),
    ("copy trials to 'out.csv'", "only read"),
    ("attach 'x.db'", "only read"),
    ("set threads = 1", "only read"),
    ("set enable_external_access = true; select 1", "configuration"),
    ("set enable_external_access = true; from read_text('sweep.yaml')", "configuration"),
    ("install httpfs; select 1", "disabled by configuration"),
    ("from 'results/*.parquet'", "disabled by configuration"),
    ("from read_text('sweep.yaml')", "disabled by configuration"),
    ("from glob('*')", "disabled by configuration"),
    ("copy trials to 'out.csv'; select 1", "disabled by configuration"),
    ("attach 'x.db'; select 1", "disabled by configuration"),
    ("from answer", "does not exist"),
    ("select getenv('HOME')", "does not exist"),
])  # fmt: skip
def test_a_query_that_is_refused_is_bad_usage_and_reaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ResultStore.open("results", create=True)
    finished(store)
    Path("sweep.yaml").write_text("secret")
    answer = pa.table({"not": ["for queries"]})
    with pytest.raises(UsageError, match=message):
        query.ask(text, query.tables(store, (), text))
    assert {path.name for path in tmp_path.iterdir()} == {"results", "sweep.yaml"}
    assert len(answer) == 1


@in_a_folder
def test_a_wrong_query_is_one_clear_message(store: ResultStore, mixmo: Command) -> None:
    finished(store)
    code, out, err = mixmo("select tpo1 from trials")
    assert (code, out) == (2, "")
    assert all(line.startswith("mixmo: ") for line in err.splitlines())
    assert "Traceback" not in err


@in_a_folder
def test_without_duckdb_the_command_says_how_to_get_it(
    store: ResultStore, mixmo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(store)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    importlib.invalidate_caches()
    code, out, err = mixmo("from trials")
    assert (code, out) == (2, "")
    assert "pip install" in err
    assert "'.[sql]'" in err


# --------------------------------------------------------------------------------------------------------- the formats


@in_a_folder
def test_every_format_has_the_same_rows(store: ResultStore, mixmo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = finished(store)
    text = "select seed, trial_id, top1 / 3 as third, updated_at, error, 'a|b' as bar from trials order by seed"
    thirds = [(row.metrics["top1"] or 0) / 3 for row in rows]
    times = [row.updated_at.isoformat() for row in rows if row.updated_at]
    code, out, err = mixmo(text)
    assert (code, err) == (0, "")
    head, rule, *lines = out.splitlines()
    assert head.split() == ["seed", "trial_id", "third", "updated_at", "error", "bar"]
    assert set(rule) == {"─", " "}
    assert [line.split() for line in lines] == [
        [str(seed), row.trial_id, f"{third:.6g}", when, "a|b"]
        for seed, (row, third, when) in enumerate(zip(rows, thirds, times, strict=True))
    ]
    told = json.loads(mixmo(text, "--json")[1])
    assert mixmo(text, "--format", "json")[1] == mixmo(text, "--json")[1]
    assert told["schema"] == "mixmo.sql/1"
    assert told["columns"]["updated_at"] == "timestamp[us, tz=UTC]"
    assert told["rows"][1] == {
        "seed": 1, "trial_id": rows[1].trial_id, "third": thirds[1], "updated_at": times[1], "error": None,
        "bar": "a|b",
    }  # fmt: skip
    assert mixmo(text, "--format", "csv")[1].splitlines()[1].startswith(f'0,"{rows[0].trial_id}",{thirds[0]!r},')
    assert mixmo(text, "--format", "markdown")[1].splitlines()[:2] == [
        "| seed | trial_id | third | updated_at | error | bar |",
        "| ---: | --- | ---: | --- | --- | --- |",
    ]
    assert r"a\|b" in mixmo(text, "--format", "markdown")[1]


@in_a_folder
def test_a_query_may_come_from_another_program(
    store: ResultStore, mixmo: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished(store)
    (tmp_path / "query.sql").write_text("select count(*) as n from trials -- a comment\n")
    with (tmp_path / "query.sql").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert mixmo("-", "--format", "csv")[1] == '"n"\n2\n'


@in_a_folder
def test_a_terminal_gets_the_first_rows_of_many(store: ResultStore, mixmo: Command) -> None:
    _, out, err = mixmo("select unnest(range(3000)) as n")
    assert len(out.splitlines()) == 2 + 1000
    assert err == "the first 1,000 of 3,000 rows; --format csv prints all\n"
    assert len(mixmo("select unnest(range(3000)) as n", "--format", "csv")[1].splitlines()) == 3001


@in_a_folder
def test_two_columns_of_one_name_are_told_apart(store: ResultStore) -> None:
    text = "select 1 as a, 2 as a, 3 as a_1, 4 as a"
    answer = query.ask(text, query.tables(store, (), text))
    assert answer.to_records() == [{"a": 1, "a_1": 2, "a_1_1": 3, "a_2": 4}]


@in_a_folder
def test_every_type_of_duckdb_can_be_printed(store: ResultStore, mixmo: Command) -> None:
    text = """
        select sum(x)::hugeint as s, interval 1 day as i, {'a': [1, 2]} as n, map {'k': 1} as m,
            1.5::decimal(9, 2) as d, 'x'::blob as b, date '2026-11-24' as t,
            'a'::enum('a', 'b') as e, 'nan'::double as f, null as u, true as y,
            uuid() as v, timestamp '2026-11-24 01:02:03' as w, time '01:02:03' as c, 3::uint8 as k
        from (values (1), (2)) v(x)
    """
    told = json.loads(mixmo(text, "--json")[1])["rows"][0]
    assert {name: told[name] for name in "sndbtefuyk"} == {
        "s": 3, "n": {"a": [1, 2]}, "d": 1.5, "b": "78", "t": "2026-11-24", "e": "a", "f": None, "u": None, "y": True,
        "k": 3,
    }  # fmt: skip
    for shape in ("terminal", "markdown", "csv"):
        code, out, err = mixmo(text, "--format", shape)
        assert (code, err) == (0, "")
        assert "2026-11-24" in out


def test_values_of_any_type_are_shown() -> None:
    table = pa.table({
        "whole": [Decimal("12345678901234567890123")], "part": [Decimal("1.50")], "bytes": [b"\x01\xff"],
        "nested": [{"a": [1.5, None]}], "long": ["x" * 100], "lines": ["one\n  two"], "none": pa.nulls(1),
    })  # fmt: skip
    answer = Answer(table)
    assert answer.to_records() == [{
        "whole": 12345678901234567890123, "part": 1.5, "bytes": "01ff", "nested": {"a": [1.5, None]},
        "long": "x" * 100, "lines": "one\n  two", "none": None,
    }]  # fmt: skip
    shown = answer.to_text(5).splitlines()[2]
    assert "one two" in shown
    assert "x" * 59 + "…" in shown
    assert "x" * 60 not in shown
    assert '{"a": [1.5, null]}' in shown


@in_a_folder
def test_who_takes_a_sweep_for_a_table_is_told_what_the_tables_are(store: ResultStore, mixmo: Command) -> None:
    finished(store)
    code, _, err = mixmo("select * from made")
    assert code == 2
    assert "the tables are trials and epochs" in err
    assert "where sweep =" in err
    assert "Did you mean" not in err  # DuckDB's guess is one of its internal tables
    assert "lists the columns" in mixmo("select nothing from trials")[2]
