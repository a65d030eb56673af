"""From rows to the table of a paper: mean, spread and count per cell, and the distance from the baseline.

A cell is all trials that share the fields of a row and a column; with the default fields these differ by seed only.
Only finished trials count: one that was stopped early, failed or still runs leaves its cell marked as incomplete.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from mixmo_core.config import DATASETS, ineffective, unflatten
from orchestrator.errors import UsageError
from orchestrator.result_table import At, Cell, Key, Reported, ResultTable, heading, short, shown
from orchestrator.rows import (
    CONFIG_COLUMNS,
    EPOCHS_SCHEMA,
    METRIC_COLUMNS,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    trial_rows,
)
from orchestrator.significance import compare, holm
from orchestrator.store import ResultStore

if TYPE_CHECKING:
    from orchestrator.sweep import Published, Shown

__all__ = [
    "At",
    "Cell",
    "EnsembleRow",
    "ResultTable",
    "Results",
    "load",
    "short",
    "shown",
    "table",
    "telling",
    "varied",
]

_FIELDS = ("label", "sweep", "cell_id", "workers", "members", *CONFIG_COLUMNS)
_OPEN = frozenset({"PENDING", "RUNNING", "PAUSED"})
TableName = Literal["trials", "epochs"]


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

    def asked(self) -> "dict[str, Shown]":
        """What each sweep's file asks of its tables. Beside a quick form no published number stands."""
        from orchestrator.sweep import is_quick, shown  # who prints no table does without

        found = {name: shown(self.store.sweep_file(name), name) for name in self.sweeps}
        return {name: replace(each, published=()) if is_quick(name) else each for name, each in found.items()}

    def epochs(self) -> pa.Table:
        """As `ResultStore.epochs`, one sweep below the other."""
        tables = [self.store.epochs(sweep) for sweep in self.sweeps]
        return pa.concat_tables(tables) if tables else EPOCHS_SCHEMA.empty_table()

    def at_epoch(self, epoch: int) -> list[EpochRow]:
        """The rows of one epoch, of all trials that have reached it: what `table` takes for `at=epoch`."""
        return [row for sweep in self.sweeps for row in self.store.rows_at_epoch(sweep, epoch)]

    def to_pandas(self, name: TableName = "trials") -> Any:
        """A table as a pandas.DataFrame. Counts and truth values may be missing (`Int64`, `boolean`) and so stay what
        they are, whatever the sweep; a missing float is NaN. Raises ModuleNotFoundError where pandas is not installed.
        """
        pandas = _package("pandas")
        kinds = {pa.int64(): pandas.Int64Dtype(), pa.bool_(): pandas.BooleanDtype()}
        return self._named(name).to_pandas(types_mapper=kinds.get)

    def to_polars(self, name: TableName = "trials") -> Any:
        """A table as a polars.DataFrame, null where a value is missing. Raises ModuleNotFoundError."""
        return _package("polars").from_arrow(self._named(name))

    def _named(self, name: TableName) -> pa.Table:
        if name not in ("trials", "epochs"):
            raise UsageError(f"no table {name}; there are trials and epochs")
        return self.table if name == "trials" else self.epochs()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        told = f"{name} is not installed: pip install {name}. Results.table and Results.epochs() do without it"
        raise ModuleNotFoundError(told, name=name) from error


def load(uri: str | Path, *sweeps: str) -> Results:
    """Read sweeps, all where none is named. Raises NotFoundError, UnreachableError."""
    store = ResultStore.open(uri)
    names = sweeps or tuple(store.sweeps())
    tables = [store.trials(sweep) for sweep in names]
    return Results(store, names, pa.concat_tables(tables) if tables else TRIALS_SCHEMA.empty_table())


# ------------------------------------------------------------------------------------------------------------ tables


def table(
    rows: Sequence[TrialRow],
    *,
    row_fields: Sequence[str] = (),
    col_fields: Sequence[str] = (),
    metric: str = "top1",
    at: At = "last",
    epochs: Iterable[EpochRow] = (),
    baseline: str | None = None,
    published: "Sequence[Published]" = (),
    confidence: float = 0.95,
    with_stopped: bool = False,
) -> ResultTable:
    """Mean, standard deviation and count of a metric for each combination of the fields.

    Fields are settings (`model.width` or `model_width`), `label`, `sweep`, `workers`, `cell_id`, or `members`, which is
    1 but for ensembles. Without row fields the lines are the labels and what these leave open (`telling`). No ensemble
    shares a cell with trials: where no field tells them apart, `members` is added; `sweep` where one of several sweeps
    trained a population, whose settings are those that its trials began with. `at` is the last epoch, the best one
    (of top1, chosen on the very images it is measured on), or a number: then every trial that has reached that epoch
    counts, whatever became of it, and `epochs` must have its rows (`Results.at_epoch`). A trial of several sweeps
    counts once. `baseline` is the label of the trials that every cell is compared with, at the same values of what
    varies among the baseline's trials; `significance` tests the differences. A published number stands beside the one
    cell whose trials, or ensembles of so many, have all the settings that it names. `confidence` is that of the
    intervals, and what is left to 1 the level of the tests. Trials that a scheduler stopped early count only
    `with_stopped`, with what they had reached. Lines and columns stand in the order of the sweep files,
    sweeps in that of `rows`; numbers by size. Raises UsageError for a field, a metric or an epoch that there is not.
    """
    value = _metric(metric, at)
    if isinstance(at, int):
        rows = _at_epoch(rows, at, {row.trial_id: row for row in epochs}, metric)
    listed = _listed(rows)
    rows = _once(listed)
    stopped = 0 if isinstance(at, int) else sum(row.state == "TERMINATED" and row.stopped_early for row in rows)
    if with_stopped and not isinstance(at, int):
        rows = [row.replace(stopped_early=False) if row.stopped_early else row for row in rows]
    cols = tuple(map(_field, col_fields))
    lines = tuple(map(_field, row_fields)) or tuple(each for each in telling(rows) if each not in cols)
    combined = any(isinstance(row, EnsembleRow) for row in rows)
    if combined and {"label", "cell_id", "members"}.isdisjoint(lines + cols):
        lines = (*lines, "members")
    populated = [row for row in rows if row.lineage is not None]
    if populated and len({row.sweep for row in rows}) > 1 and {"cell_id", "sweep"}.isdisjoint(lines + cols):
        lines = (*lines, "sweep")  # what a population made of a setting is no repetition of that
    groups: dict[tuple[Key, Key], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((_key(row, lines), _key(row, cols)), []).append(row)
    cells = {key: _cell(members, value) for key, members in groups.items()}
    inside = {key: varied(members, label=False) for key, members in groups.items()}
    if baseline is not None:
        cells = _corrected(_compare(cells, _reference(groups, lines + cols, baseline), inside))
    told = [each for each in published if metric in each.metrics]
    return ResultTable(
        metric=metric,
        at=at,
        row_fields=lines,
        col_fields=cols,
        row_keys=_sorted({row for row, _ in groups}, lines, listed),
        col_keys=_sorted({col for _, col in groups}, cols, listed),
        cells=_beside(cells, groups, told, metric),
        averaged=tuple(dict.fromkeys(name for names in inside.values() for name in names)),
        published=tuple(Reported(each.name, each.metrics[metric], each.source) for each in told),
        counted="trials or ensembles" if combined else "trials",
        confidence=confidence,
        splits=tuple(dict.fromkeys(row.split for row in rows if row.split)),
        sweeps=tuple(dict.fromkeys(row.sweep for row in listed)),
        stopped=stopped,
        populated=len(populated),
        with_stopped=with_stopped,
        commits=tuple(dict.fromkeys(f"{row.git_commit}{'+' * bool(row.git_dirty)}" for row in rows if row.git_commit)),
    )


def varied(rows: Sequence[TrialRow], *, label: bool = True) -> list[str]:
    """The settings that tell the rows apart, without the seed: the fewest, those of the model first.

    A setting that follows from those before it (a repetition that goes with the number of subnetworks) adds nothing.
    """
    if not rows:
        return []
    names: list[str] = []
    group_of_row, apart = [0] * len(rows), 1
    for name in sorted(set(CONFIG_COLUMNS) - {"seed"}, key=_rank):
        values = [row.config.get(name) for row in rows]
        if values.count(values[0]) == len(values):  # most settings: the trials of a sweep have them in common
            continue
        values = [tuple(value) if isinstance(value, list) else value for value in values]
        numbers: dict[tuple[int, Any], int] = {}
        split = [numbers.setdefault(each, len(numbers)) for each in zip(group_of_row, values, strict=True)]
        if len(numbers) > apart:
            names, group_of_row, apart = [*names, name], split, len(numbers)
    if len({row.workers for row in rows}) > 1:
        names.append("workers")
    return ["label", *names] if label and any(row.label for row in rows) else names


def telling(rows: Sequence[TrialRow]) -> list[str]:
    """What tells the cells apart: the label, where all have one, and of the settings that vary those it leaves open. A
    label whose trials all have one mixing method says that already.
    """
    names = varied(rows)
    if not all(row.label for row in rows):
        return names
    kept: list[str] = []
    for name in names:
        if len({_key(row, [*kept, name]) for row in rows}) > len({_key(row, kept) for row in rows}):
            kept.append(name)
    return kept


def _rank(name: str) -> tuple[int, int]:
    """What a reader asks for first comes first."""
    section = name.partition("_")[0]
    return ({"model": 0, "mixing": 1, "data": 2, "optim": 3}.get(section, 4), CONFIG_COLUMNS.index(name))


def _metric(metric: str, at: At) -> Callable[[TrialRow], float | None]:
    if metric not in METRIC_COLUMNS:
        raise UsageError(f"no metric {metric}; {_allowed(metric, METRIC_COLUMNS)}")
    if at == "last" or (isinstance(at, int) and at > 0):
        return lambda row: row.metrics.get(metric)
    if at != "best":
        raise UsageError(f"at {at}: a table shows the last epoch, the best one or one by its number (last, best, 30)")
    if metric != "top1":
        raise UsageError(f"the best epoch is known of top1 only, not of {metric}: leave --at away for the last epoch")
    return lambda row: row.best_top1


def _at_epoch(rows: Sequence[TrialRow], at: int, epochs: Mapping[str, EpochRow], metric: str) -> list[TrialRow]:
    """The trials as they stood after an epoch: done if they have reached it."""
    if all(epochs[row.trial_id].metrics.get(metric) is None for row in rows if row.trial_id in epochs):
        most = max((row.epoch for row in rows), default=0)
        why = "was not evaluated" if at <= most else f"was reached by no trial: {most} is the furthest"
        raise UsageError(f"there is no {metric} at epoch {at}, which {why}; `mixmo show TRIAL` lists a trial's epochs")
    reached: dict[str, Any] = {"state": "TERMINATED", "stopped_early": False}
    return [
        row.replace(**reached, metrics=epochs[row.trial_id].metrics)
        if row.trial_id in epochs
        else row.replace(stopped_early=True)
        for row in rows
    ]


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
    full = [(row, value(row)) for row in rows if row.state == "TERMINATED" and not row.stopped_early]
    known = [(row, float(found)) for row, found in full if found is not None]
    waiting = sum(row.state in _OPEN for row in rows)
    return Cell(
        tuple(found for _, found in known),
        waiting,
        failed=len(rows) - len(full) - waiting,
        undefined=len(full) - len(known),
        seeds=tuple(None if isinstance(row, EnsembleRow) else row.config.get("seed") for row, _ in known),
        trials=tuple(row.trial_id for row, _ in known),
    )


# ---------------------------------------------------------------------------------------------------------- baseline


class SharedLinesError(UsageError):
    """The baseline's trials stand in lines with others, so there is nothing to hold a cell against."""


def _reference(
    groups: Mapping[tuple[Key, Key], Sequence[TrialRow]], fields: Sequence[str], baseline: str
) -> Callable[[tuple[Key, Key]], tuple[Key, Key] | None]:
    """For each cell, the baseline's cell to hold it against; None where none or several fit."""
    ours = [key for key, rows in groups.items() if all(row.label == baseline for row in rows)]
    labels = sorted({row.label for rows in groups.values() for row in rows if row.label})
    if baseline not in labels:
        raise UsageError(f"no trials are labelled {baseline}; labels are {', '.join(labels) or 'not used here'}")
    if not ours:
        raise SharedLinesError(f"the trials labelled {baseline} share their lines with others: add label to the rows")
    places = [i for i, name in enumerate(fields) if name != "label" and len({(row + col)[i] for row, col in ours}) > 1]

    def find(cell: tuple[Key, Key]) -> tuple[Key, Key] | None:
        wanted = cell[0] + cell[1]
        fits = [key for key in ours if all((key[0] + key[1])[i] == wanted[i] for i in places)]
        return fits[0] if len(fits) == 1 else None

    return find


def _compare(
    cells: Mapping[tuple[Key, Key], Cell],
    reference: Callable[[tuple[Key, Key]], tuple[Key, Key] | None],
    inside: Mapping[tuple[Key, Key], Sequence[str]],
) -> dict[tuple[Key, Key], Cell]:
    compared = {}
    for key, cell in cells.items():
        found = reference(key)
        held = cells[found] if found is not None else Cell()
        averaged = [*inside[key], *(inside[found] if found is not None else ())]
        compared[key] = _distance(cell, held, tuple(dict.fromkeys(averaged)), is_baseline=found == key)
    return compared


def _distance(cell: Cell, baseline: Cell, averaged: Sequence[str], *, is_baseline: bool) -> Cell:
    cell = replace(cell, baseline=is_baseline)
    if is_baseline or cell.mean is None or baseline.mean is None:
        return cell
    error = None
    if cell.std is not None and baseline.std is not None:
        error = math.sqrt(cell.std**2 / cell.n + baseline.std**2 / baseline.n)
    cell = replace(
        cell, difference=cell.mean - baseline.mean, difference_se=error, untested=_untested(cell, baseline, averaged)
    )
    if cell.untested:
        return cell
    ours, others = (
        dict(zip(cell.seeds, cell.values, strict=True)),
        dict(zip(baseline.seeds, baseline.values, strict=True)),
    )
    if len(ours) == cell.n and len(others) == baseline.n and ours.keys() == others.keys() and None not in ours:
        return replace(cell, comparison=compare(cell.values, [others[seed] for seed in cell.seeds], paired=True))
    return replace(cell, comparison=compare(cell.values, baseline.values, paired=False))


def _untested(cell: Cell, baseline: Cell, averaged: Sequence[str]) -> str:
    """Why no test can hold the two against each other; empty where one can. `averaged` are settings that vary
    in them.
    """
    members = [{each for joined in side.trials for each in joined.split("+")} for side in (cell, baseline)]
    if members[0] & members[1]:
        return "made of the baseline's own trials"
    if not all(map(math.isfinite, cell.values + baseline.values)):
        return "a value is no number"
    if min(cell.n, baseline.n) < 2:
        return "one trial cannot decide, on either side"
    if averaged:  # they are no repetitions of one another, as seeds are
        return f"averaged over {', '.join(map(short, averaged))}"
    return ""


def _corrected(cells: Mapping[tuple[Key, Key], Cell]) -> dict[tuple[Key, Key], Cell]:
    """With Holm's correction over all comparisons of the table."""
    tests = {key: cell.comparison for key, cell in cells.items() if cell.comparison}
    exact = dict(zip(tests, holm([each.p_exact for each in tests.values()]), strict=True))
    students = {key: each.p_t for key, each in tests.items() if each.p_t is not None}
    by_t = dict(zip(students, holm([*students.values()]), strict=True))
    corrected = {
        key: replace(cells[key], comparison=replace(each, p_holm=exact[key], p_t_holm=by_t.get(key)))
        for key, each in tests.items()
    }
    return {key: corrected.get(key, cell) for key, cell in cells.items()}


# --------------------------------------------------------------------------------------------------------- published


def _beside(
    cells: Mapping[tuple[Key, Key], Cell],
    groups: Mapping[tuple[Key, Key], Sequence[TrialRow]],
    published: "Sequence[Published]",
    metric: str,
) -> dict[tuple[Key, Key], Cell]:
    """Published numbers, each in the one cell whose trials agree with it; where several do, with none, and where
    several numbers fit one cell, the one that names the most settings.
    """
    placed = dict(cells)
    for each in sorted(published, key=lambda each: len(each.where)):
        silent = _silent(each.where)
        fits = [key for key, rows in groups.items() if each.where and all(_agrees(row, each, silent) for row in rows)]
        if len(fits) == 1:
            same = all(_names_all(row, each.where) for row in groups[fits[0]])
            told = Reported(each.name, each.metrics[metric], each.source, same)
            placed[fits[0]] = replace(placed[fits[0]], published=told)
    return placed


def _silent(where: Mapping[str, Any]) -> frozenset[str]:
    """The settings that change nothing under the others named, and under the defaults of those that are not named."""
    try:
        return ineffective(unflatten(where))
    except ValueError:  # those that are not named would have to be others
        return frozenset()


def _agrees(row: TrialRow, published: "Published", silent: frozenset[str]) -> bool:
    """Whether it is of so many networks and has the settings; null is any value of one that changes nothing. Nothing
    agrees with a quick form.
    """
    if _column(row, "members") != published.members or heading([row.sweep]):
        return False
    settings = ((row.config.get(name.replace(".", "_")), name, value) for name, value in published.where.items())
    return all(
        ours == _resolved(row, name, value) or (ours is None and name in silent) for ours, name, value in settings
    )


def _resolved(row: TrialRow, name: str, value: Any) -> Any:
    """A setting of a sweep file as a row has it: a count for `all`, a list for several numbers."""
    if value == "all":
        images = DATASETS[row.config["data_dataset"]].train_images
        return images if name == "data.train_images" else row.config.get("model_subnetworks")
    return list(value) if isinstance(value, tuple) else value


def _names_all(row: TrialRow, where: Mapping[str, Any]) -> bool:
    """Whether every setting that has an effect is named, the seed apart, and held from the first epoch to the last."""
    if row.lineage is not None:
        return False
    named = {name.replace(".", "_") for name in where}
    return {name for name, value in row.config.items() if value is not None} - {"seed"} <= named
