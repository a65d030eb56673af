"""SQL over the results: DuckDB on what the store's own reader gives, so that an answer is right while a sweep runs.

DuckDB sees two tables in memory and nothing else: no file, no network, no setting can be reached from a query.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orchestrator.errors import NotFoundError, UsageError
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, records
from orchestrator.store import DamagedError, ResultStore

if TYPE_CHECKING:
    import duckdb

CELL = 60
"""Longer words are cut in a terminal."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a query reads: the sweeps one below the other, column `sweep` tells them apart."""

    trials: pa.Table
    epochs: pa.Table
    damaged: dict[str, str]
    """The sweeps that could not be read, and why."""


def tables(store: ResultStore, sweeps: Sequence[str], query: str) -> Tables:
    """What the query asks for, of these sweeps or, where none is named, of all that can be read.

    `epochs` is read only where the query has that word. Raises NotFoundError, DamagedError for one that is named.
    """
    names, damaged = list(dict.fromkeys(sweeps)) or store.sweeps(), {}
    with_epochs = re.search(r"\bepochs\b", query, re.IGNORECASE)
    read: list[tuple[pa.Table, pa.Table]] = [(TRIALS_SCHEMA.empty_table(), EPOCHS_SCHEMA.empty_table())]
    for name in names:
        try:
            read.append(store.tables(name) if with_epochs else (store.trials(name), read[0][1]))
        except (DamagedError, NotFoundError) as error:
            if sweeps:
                raise
            if isinstance(error, DamagedError):  # else it was deleted since it was listed
                damaged[name] = str(error)
    trials, epochs = (pa.concat_tables(each) for each in zip(*read, strict=True))
    return Tables(trials, epochs, damaged)


def ask(query: str, given: Tables) -> Answer:
    """What DuckDB answers. Raises UsageError for a query that it refuses, or where DuckDB is not installed."""
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise UsageError(
            "`mixmo sql` needs DuckDB, which the extra `sql` installs: in the project's folder run "
            "pip install --constraint constraints.txt '.[sql]', or pip install 'duckdb>=1.4'"
        ) from error
    with _connection(given) as connection:
        try:
            _check(connection.extract_statements(query))
            found = connection.sql(query)
            table = found.to_arrow_table() if found is not None else pa.table({})
        except duckdb.InterruptException:
            raise KeyboardInterrupt from None
        except duckdb.Error as error:
            raise UsageError(f"{_said(error)}\n{_hint(error)}") from None
    return Answer(_told_apart(table))


def _said(error: Exception) -> str:
    """Without a guess of DuckDB's at one of its internal tables."""
    return re.sub(r'\n*Did you mean "(?!trials|epochs)[^"]*"\?', "", str(error)).strip()


def _hint(error: Exception) -> str:
    if _is_of_table(error):
        return (
            "the tables are trials and epochs, of all sweeps; the column sweep tells them apart: where sweep = 'NAME'"
        )
    return '`mixmo sql "describe trials"` lists the columns'


def _is_of_table(error: Exception) -> bool:
    return bool(re.search(r"Table with name .* does not exist", str(error)))


def _connection(given: Tables) -> duckdb.DuckDBPyConnection:
    import duckdb

    connection = duckdb.connect(":memory:", config={"enable_external_access": "false"})
    connection.execute("set python_enable_replacements = false")  # a table is never a variable of ours
    connection.execute("set TimeZone = 'UTC'")
    connection.register("trials", given.trials)
    connection.register("epochs", given.epochs)
    connection.execute("set lock_configuration = true")
    return connection


def _check(statements: Sequence[duckdb.Statement]) -> None:
    """One query; a pivot counts as `MULTI`."""
    import duckdb

    asks = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
    count = sum(each.type in asks for each in statements)
    if count != 1:
        what = f"these are {count} queries" if count else "this asks nothing"
        raise UsageError(f"{what}: results are only read, by one query (select, from, describe, summarize, ...)")


def _told_apart(table: pa.Table) -> pa.Table:
    """The table with no name twice: `epoch`, `epoch_1`."""
    names: list[str] = []
    for name in table.schema.names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        names.append(name if name not in names else next(each for each in others if each not in names))
    return table.rename_columns(names)


# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows that a query gave, and how they are shown."""

    table: pa.Table

    def to_records(self) -> list[dict[str, Any]]:
        """Rows as JSON can have them, but for NaN: times in ISO 8601, bytes in hex."""
        return [{name: _plain(value) for name, value in row.items()} for row in records(self.table)]

    def columns(self) -> dict[str, str]:
        """The type of each column by its name, in Arrow's words."""
        return {spec.name: str(spec.type) for spec in self.table.schema}

    def to_text(self, most: int) -> str:
        """In columns, numbers to the right; at most so many rows."""
        titles, lines = self.table.schema.names, self._lines(most)
        lines = [[_cut(word) for word in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
        right = [_is_number(spec.type) for spec in self.table.schema]
        drawn = [titles, ["─" * width for width in widths], *lines]
        return "\n".join(
            "  ".join(
                word.rjust(width) if number else word.ljust(width)
                for word, width, number in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in drawn
        )

    def to_markdown(self) -> str:
        rule = ["---:" if _is_number(spec.type) else "---" for spec in self.table.schema]
        lines = [[word.replace("|", r"\|") for word in line] for line in [self.table.schema.names, *self._lines(None)]]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

    def _lines(self, most: int | None) -> list[list[str]]:
        rows = records(self.table if most is None else self.table.slice(0, most))
        return [[_word(value) for value in row.values()] for row in rows]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _word(value: Any) -> str:
    """For people: six digits of a number, one line of a text."""
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(json.dumps(value).split() if isinstance(value, list | dict) else str(value).split())


def _cut(word: str) -> str:
    return word if len(word) <= CELL else f"{word[: CELL - 1]}…"


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
