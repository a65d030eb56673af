"""From rows to the table of a paper: mean, spread and count per cell, and the distance from the baseline.

A cell is all trials that share the fields of a row and a column; with the default fields these differ by seed only.
Only finished trials count: one that was stopped early, failed or still runs leaves its cell marked as incomplete.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mixmo_core.metrics import BY_NAME
from orchestrator.errors import UsageError
from orchestrator.rows import CONFIG_COLUMNS, METRIC_COLUMNS, TrialRow, trial_rows
from orchestrator.store import ResultStore
from orchestrator.sweep import Published

At = Literal["last", "best"]
Key = tuple[Any, ...]

_FIELDS = ("label", "sweep", "cell_id", "workers", "members", *CONFIG_COLUMNS)
_OPEN = frozenset({"PENDING", "RUNNING", "PAUSED"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleRow(TrialRow):
    """Several trials of one cell that predict together (`orchestrator.ensembles`). Only tables know such rows: no store
    has them, and their trial id, `<id>+<id>`, is that of no trial.
    """

    members: int
    """How many trials it is made of."""


@dataclass(frozen=True, slots=True)
class Results:
    """The trials of some sweeps."""

    store: ResultStore
    sweeps: tuple[str, ...]
    table: pa.Table
    """As `ResultStore.trials`, one sweep below the other: a trial of two sweeps is in it twice."""

    @property
    def rows(self) -> list[TrialRow]:
        return trial_rows(self.table)

    def epochs(self) -> pa.Table:
        """As `ResultStore.epochs`, one sweep below the other."""
        return pa.concat_tables([self.store.epochs(sweep) for sweep in self.sweeps])

    def to_pandas(self) -> Any:
        return self.table.to_pandas()


def load(uri: str | Path, *sweeps: str) -> Results:
    """Read sweeps, all where none is named. Raises NotFoundError, UnreachableError."""
    store = ResultStore.open(uri)
    names = sweeps or tuple(store.sweeps())
    tables = [store.trials(sweep) for sweep in names]
    return Results(store, names, pa.concat_tables(tables) if tables else pa.table({}))


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True, slots=True)
class Cell:
    """The trials of one row and one column."""

    values: tuple[float, ...] = ()
    """The metric of each finished trial, in order of seed."""
    waiting: int = 0
    """Trials that wait or run."""
    failed: int = 0
    """Trials that failed, were cancelled, or were stopped early."""
    undefined: int = 0
    """Finished trials that the metric is not defined for, as ratio_error for a single subnetwork."""
    baseline: bool = False
    difference: float | None = None
    """Mean minus the baseline's mean."""
    difference_se: float | None = None
    """Standard error of the difference, from both spreads."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def planned(self) -> int:
        return self.n + self.waiting + self.failed + self.undefined

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / self.n if self.values else None

    @property
    def std(self) -> float | None:
        """With n - 1 in the denominator: of the seeds there could be, not of those there are."""
        if self.n < 2:
            return None
        mean = math.fsum(self.values) / self.n
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (self.n - 1))


@dataclass(frozen=True, slots=True)
class ResultTable:
    metric: str
    at: At
    row_fields: tuple[str, ...]
    col_fields: tuple[str, ...]
    row_keys: tuple[Key, ...]
    """Values of the row fields, one tuple for each line."""
    col_keys: tuple[Key, ...]
    cells: Mapping[tuple[Key, Key], Cell]
    averaged: tuple[str, ...] = ()
    """Settings that vary inside a cell besides the seed: its mean runs over them too."""
    counted: str = "trials"
    """What a cell's number counts."""
    published: tuple[tuple[str, float, str], ...] = ()
    """Name, value and source of what papers report of this metric."""

    def to_markdown(self) -> str:
        """A pipe table. Fractions are shown in percent, as mean ± standard deviation."""
        header, body = self.text_cells()
        lines = [header, ["---"] * len(self.row_fields) + ["---:"] * (len(header) - len(self.row_fields)), *body]
        text = "".join("| " + " | ".join(each.replace("|", r"\|") for each in line) + " |\n" for line in lines)
        return text + "".join(f"\n{note}\n" for note in self.notes())

    def to_text(self) -> str:
        """For a terminal: columns in line, no colours."""
        header, body = self.text_cells()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        rule = ["─" * width for width in widths]
        settings = len(self.row_fields)
        lines = [
            "  ".join(
                each.ljust(width) if i < settings else each.rjust(width)
                for i, (each, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, rule, *body)
        ]
        return "".join(f"{line}\n" for line in (*lines, *self.legend(), *self.notes()))

    def to_csv(self) -> str:
        """One line per cell, numbers plain: accuracies as fractions."""
        records = self.records()
        out = io.StringIO()
        writer = csv.DictWriter(out, [*self.row_fields, *self.col_fields, *_NUMBERS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**each, "values": " ".join(map(repr, each["values"]))} for each in records)
        return out.getvalue()

    def to_json(self) -> str:
        """One object per cell under `cells`, numbers plain; what is not a number is null."""
        document = {
            "schema": "mixmo.table/1",
            "metric": self.metric,
            "unit": BY_NAME[self.metric].unit,
            "at": self.at,
            "row_fields": self.row_fields,
            "col_fields": self.col_fields,
            "averaged": self.averaged,
            "published": [dict(zip(("name", "value", "source"), each, strict=True)) for each in self.published],
            "cells": [{name: _finite(value) for name, value in each.items()} for each in self.records()],
        }
        return json.dumps(document, indent=1, allow_nan=False)

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per cell that has trials: its fields, then its numbers."""
        return [
            dict(zip(self.row_fields + self.col_fields, row + col, strict=True))
            | {name: getattr(cell, name) for name in _NUMBERS}
            for row in self.row_keys
            for col in self.col_keys
            if (cell := self.cells.get((row, col)))
        ]

    def text_cells(self) -> tuple[list[str], list[list[str]]]:
        """What stands in a header and in each line, as text."""
        compared = any(cell.difference is not None for cell in self.cells.values())
        header = [short(name) for name in self.row_fields]
        for col in self.col_keys:
            title = ", ".join(f"{short(k)} {shown(v)}" for k, v in zip(self.col_fields, col, strict=True))
            header += [title or self.title, *(["vs baseline"] if compared else [])]
        body = []
        for row in self.row_keys:
            line = [shown(value) for value in row]
            for col in self.col_keys:
                cell = self.cells.get((row, col), Cell())
                line += [self.value_text(cell), *([self.difference_text(cell)] if compared else [])]
            body.append(line)
        return header, body

    @property
    def title(self) -> str:
        return f"{'best ' if self.at == 'best' else ''}{self.metric}{' %' if self._percent else ''}"

    @property
    def _percent(self) -> bool:
        return BY_NAME[self.metric].unit == "fraction"

    def value_text(self, cell: Cell) -> str:
        """`93.97 ± 0.12 (3)`; `(2/3)` where trials are still missing, `-` where there is nothing to wait for."""
        expected = cell.planned - cell.undefined
        if not expected:
            return "-"
        count = f"({cell.n})" if cell.n == expected else f"({cell.n}/{expected})"
        if cell.mean is None:
            return f"... {count}"
        return f"{self._with_spread(cell.mean, cell.std)} {count}"

    def difference_text(self, cell: Cell) -> str:
        if cell.baseline:
            return "baseline"
        if cell.difference is None:
            return "-"
        sign = "+" if cell.difference >= 0 else "-"
        return sign + self._with_spread(abs(cell.difference), cell.difference_se)

    def _with_spread(self, value: float, spread: float | None) -> str:
        """Both to the same digits: two of a percentage; else two significant ones of the spread, at most six."""
        if self._percent:
            value, digits, spread = 100 * value, 2, None if spread is None else 100 * spread
        elif spread is None or not math.isfinite(spread) or spread <= 0:
            return f"{value:.4g}" + ("" if spread is None else f" ± {spread:.4g}")
        else:
            digits = min(6, max(0, 1 - math.floor(math.log10(spread))))
        return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")

    def legend(self) -> list[str]:
        """What the parts of a number mean."""
        legend = []
        if any(cell.n for cell in self.cells.values()):
            legend.append(f"{self.title}: mean ± standard deviation (number of {self.counted})")
        if any(cell.difference is not None for cell in self.cells.values()):
            unit = " in points" if self._percent else ""
            legend.append(f"vs baseline: difference of the means{unit} ± its standard error")
        return ["", *legend] if legend else []

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers right."""
        notes = [
            f"Published: {name} {self._with_spread(value, None)} ({source})" for name, value, source in self.published
        ]
        if self.averaged:
            notes.append(f"Averaged over {', '.join(map(short, self.averaged))} too: --rows or --cols sets them apart.")
        if any(cell.n + cell.undefined != cell.planned for cell in self.cells.values()):
            notes.append("(2/3): two of three trials finished; the others run, wait, failed or were stopped early.")
        lacking = [key for key, cell in self.cells.items() if cell.undefined]
        if lacking:
            named = dict.fromkeys(", ".join(map(shown, row + col)) or "these trials" for row, col in lacking)
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            notes.append(f"{self.metric} is not defined for finished trials of: {'; '.join([*named][:3])}{more}.")
        if any(cell.baseline and cell.undefined and not cell.n for cell in self.cells.values()):
            notes.append(f"The baseline has no {self.metric} to compare with.")
        return notes


_NUMBERS = ("n", "planned", "waiting", "failed", "undefined", "mean", "std", "difference", "difference_se", "values")


def short(field: str) -> str:
    """A column's name as a setting is written in a sweep file: `model_width` as `model.width`."""
    return field.replace("_", ".", 1) if field in CONFIG_COLUMNS and field not in ("seed", "precision") else field


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(
    rows: Sequence[TrialRow],
    *,
    row_fields: Sequence[str] = (),
    col_fields: Sequence[str] = (),
    metric: str = "top1",
    at: At = "last",
    baseline: str | None = None,
    published: Sequence[Published] = (),
) -> ResultTable:
    """Mean, standard deviation and count of a metric for each combination of the fields.

    Fields are settings (`model.width` or `model_width`), `label`, `sweep`, `workers`, `cell_id`, or `members`, which is
    1 but for ensembles. Without row fields the lines are the labels and those settings that vary. An ensemble never
    shares a cell with trials: where no field tells them apart, `members` is added. `at` is the last epoch, or the best
    one (of top1, chosen on the very images it is measured on). A trial of several sweeps counts once. `baseline` is the
    label of the trials that every cell is compared with, at the same values of what varies among the baseline's trials.
    Lines and columns stand in the order of the sweep files, sweeps in that of `rows`; numbers by size. Raises
    UsageError for a field or a metric that there is not.
    """
    value = _metric(metric, at)
    listed = _listed(rows)
    rows = _once(listed)
    cols = tuple(map(_field, col_fields))
    lines = tuple(map(_field, row_fields)) or tuple(each for each in varied(rows) if each not in cols)
    combined = any(isinstance(row, EnsembleRow) for row in rows)
    if combined and {"label", "cell_id", "members"}.isdisjoint(lines + cols):
        lines = (*lines, "members")
    groups: dict[tuple[Key, Key], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((_key(row, lines), _key(row, cols)), []).append(row)
    cells = {key: _cell(members, value) for key, members in groups.items()}
    if baseline is not None:
        cells = _compare(cells, _reference(groups, lines + cols, baseline))
    inside = [name for members in groups.values() for name in varied(members, label=False)]
    return ResultTable(
        metric=metric,
        at=at,
        row_fields=lines,
        col_fields=cols,
        row_keys=_sorted({row for row, _ in groups}, lines, listed),
        col_keys=_sorted({col for _, col in groups}, cols, listed),
        cells=cells,
        averaged=tuple(dict.fromkeys(inside)),
        published=tuple((each.name, each.metrics[metric], each.source) for each in published if metric in each.metrics),
        counted="trials or ensembles" if combined else "trials",
    )


def varied(rows: Sequence[TrialRow], *, label: bool = True) -> list[str]:
    """The settings that tell the rows apart, without the seed: the fewest, those of the model first.

    A setting that follows from those before it (a repetition that goes with the number of subnetworks) adds nothing.
    """
    names: list[str] = []
    apart = 1
    for name in sorted(set(CONFIG_COLUMNS) - {"seed"}, key=_telling):
        groups = len({_key(row, (*names, name)) for row in rows})
        if groups > apart:
            names, apart = [*names, name], groups
    if len({row.workers for row in rows}) > 1:
        names.append("workers")
    return ["label", *names] if label and any(row.label for row in rows) else names


def _telling(name: str) -> tuple[int, int]:
    """What a reader asks for first comes first."""
    section = name.partition("_")[0]
    return ({"model": 0, "mixing": 1, "data": 2, "optim": 3}.get(section, 4), CONFIG_COLUMNS.index(name))


def _metric(metric: str, at: At) -> Callable[[TrialRow], float | None]:
    if metric not in METRIC_COLUMNS:
        raise UsageError(f"no metric {metric}; {_allowed(metric, METRIC_COLUMNS)}")
    if at == "last":
        return lambda row: row.metrics.get(metric)
    if at != "best":
        raise UsageError(f"at {at}: a table shows the last epoch or the best one (last, best)")
    if metric != "top1":
        raise UsageError(f"the best epoch is known of top1 only, not of {metric}: leave --at away for the last epoch")
    return lambda row: row.best_top1


def _field(name: str) -> str:
    column = name.replace(".", "_")
    if column not in _FIELDS:
        raise UsageError(f"no setting {name}; {_allowed(name, [short(each) for each in _FIELDS])}")
    return column


def _allowed(word: str, names: Sequence[str]) -> str:
    from orchestrator.sweep.document import nearest  # only a wrong word pays for loading it

    return f"there are {', '.join(names)}{nearest(word, names)}"


def _key(row: TrialRow, names: Iterable[str]) -> Key:
    values = (row.config.get(name) if name in CONFIG_COLUMNS else _column(row, name) for name in names)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _column(row: TrialRow, name: str) -> Any:
    if name == "members":
        return row.members if isinstance(row, EnsembleRow) else 1
    return getattr(row, name)


def _sorted(keys: Iterable[Key], names: Sequence[str], rows: Sequence[TrialRow]) -> tuple[Key, ...]:
    """Numbers by size, words and lists as they first occur in `rows`; null is before numbers, among words a word."""
    first: list[dict[Any, int]] = [{} for _ in names]
    for row in rows:
        for seen, value in zip(first, _key(row, names), strict=True):
            seen.setdefault(value, len(seen))
    numeric = [any(isinstance(value, int | float) for value in seen) for seen in first]

    def rank(i: int, value: Any) -> tuple[int, Any]:
        if isinstance(value, int | float):
            return (1, value)
        return (0, 0) if value is None and numeric[i] else (2, first[i][value])

    return tuple(sorted(keys, key=lambda key: [rank(i, value) for i, value in enumerate(key)]))


def _listed(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Sweep by sweep as they first occur, each in the order of its file."""
    sweeps: dict[str, int] = {}
    for row in rows:
        sweeps.setdefault(row.sweep, len(sweeps))
    return sorted(rows, key=lambda row: (sweeps[row.sweep], row.position))


def _once(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """One row per trial: of several sweeps' the finished one."""
    held: dict[str, TrialRow] = {}
    for row in rows:
        if row.trial_id not in held or held[row.trial_id].state != "TERMINATED" == row.state:
            held[row.trial_id] = row
    return list(held.values())


def _cell(rows: Sequence[TrialRow], value: Callable[[TrialRow], float | None]) -> Cell:
    full = [value(row) for row in rows if row.state == "TERMINATED" and not row.stopped_early]
    values = tuple(float(each) for each in full if each is not None)
    waiting = sum(row.state in _OPEN for row in rows)
    return Cell(values, waiting, failed=len(rows) - len(full) - waiting, undefined=len(full) - len(values))


# ---------------------------------------------------------------------------------------------------------- baseline


def _reference(
    groups: Mapping[tuple[Key, Key], Sequence[TrialRow]], fields: Sequence[str], baseline: str
) -> Callable[[tuple[Key, Key]], tuple[Key, Key] | None]:
    """For each cell, the baseline's cell to hold it against; None where none or several fit."""
    ours = [key for key, rows in groups.items() if all(row.label == baseline for row in rows)]
    labels = sorted({row.label for rows in groups.values() for row in rows if row.label})
    if baseline not in labels:
        raise UsageError(f"no trials are labelled {baseline}; labels are {', '.join(labels) or 'not used here'}")
    if not ours:
        raise UsageError(f"the trials labelled {baseline} share their lines with others: add label to the rows")
    places = [i for i, name in enumerate(fields) if name != "label" and len({(row + col)[i] for row, col in ours}) > 1]

    def find(cell: tuple[Key, Key]) -> tuple[Key, Key] | None:
        wanted = cell[0] + cell[1]
        fits = [key for key in ours if all((key[0] + key[1])[i] == wanted[i] for i in places)]
        return fits[0] if len(fits) == 1 else None

    return find


def _compare(
    cells: Mapping[tuple[Key, Key], Cell], reference: Callable[[tuple[Key, Key]], tuple[Key, Key] | None]
) -> dict[tuple[Key, Key], Cell]:
    compared = {}
    for key, cell in cells.items():
        found = reference(key)
        held = cells[found] if found is not None else Cell()
        compared[key] = _distance(cell, held, is_baseline=found == key)
    return compared


def _distance(cell: Cell, baseline: Cell, *, is_baseline: bool) -> Cell:
    difference = error = None
    if not is_baseline and cell.mean is not None and baseline.mean is not None:
        difference = cell.mean - baseline.mean
        if cell.std is not None and baseline.std is not None:
            error = math.sqrt(cell.std**2 / cell.n + baseline.std**2 / baseline.n)
    return replace(cell, baseline=is_baseline, difference=difference, difference_se=error)
