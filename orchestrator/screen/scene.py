"""What there is to see of a sweep: what is counted, grouped, sorted and found in a snapshot, before any of it is drawn.

Pure. A scene takes from the one before it what has not changed, since most of a large sweep has not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import is_
from typing import TYPE_CHECKING, Literal, Self

from orchestrator import analysis, progress
from orchestrator.causes import Cause, causes
from orchestrator.progress import Cell, Flops
from orchestrator.rows import State, TrialRow

if TYPE_CHECKING:
    from orchestrator.store import Event, Snapshot
    from orchestrator.sweep import Budget, Price

Pane = Literal["trials", "results", "failures", "events"]
PANES: tuple[Pane, ...] = ("trials", "results", "failures", "events")
Sort = Literal["state", "top-1", "epoch", "images/s", "news"]
SORTS: tuple[Sort, ...] = ("state", "top-1", "epoch", "images/s", "news")

WORDS: dict[State, str] = {
    "RUNNING": "running", "PAUSED": "paused", "ERROR": "failed", "PENDING": "queued", "TERMINATED": "finished",
    "CANCELLED": "cancelled",
}  # fmt: skip
"""States as people say them, in the order in which they want to see them."""
_RANKS = {state: rank for rank, state in enumerate(WORDS)}
MOST_COLUMNS = 24
"""A setting with more values than this makes no columns."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a sweep may cost, as its file says: a price of a GPU-hour, and what it is not to exceed."""

    gpu_hour: float | None = None
    currency: str = "USD"
    gpu_hours: float | None = None
    money: float | None = None
    hours: float | None = None
    """Of training, summed over the trials: a budget for processors."""

    @classmethod
    def of(cls, price: Price, budget: Budget) -> Self:
        """As a sweep file gives them."""
        return cls(price.gpu_hour, price.currency, budget.gpu_hours, budget.money, budget.hours)

    def cost(self, gpu_seconds: float) -> float | None:
        return None if self.gpu_hour is None else gpu_seconds / 3600 * self.gpu_hour

    @property
    def most(self) -> float | None:
        """The money that there is, given as such or as GPU-hours."""
        if self.money is None and self.gpu_hours is not None and self.gpu_hour is not None:
            return self.gpu_hours * self.gpu_hour
        return self.money


@dataclass(frozen=True, slots=True)
class Group:
    """The trials that something in another pane stands for: those of a cell, or of a cause of failure."""

    pane: Pane
    key: str
    """Of `Scene.keys`."""
    name: str
    """As it was called when it was chosen."""


@dataclass(frozen=True, slots=True)
class Search:
    """Which trials are listed: those with all of some words, of one group if there is one."""

    words: str = ""
    group: Group | None = None

    def __bool__(self) -> bool:
        return bool(self.words or self.group)


ALL = Search()


@dataclass(frozen=True, slots=True)
class Plot:
    """The grid as a table: one setting across, all others down."""

    across: str
    """The column of that setting."""
    columns: tuple[float, ...]
    lines: tuple[str, ...]
    cells: Mapping[tuple[int, int], str]
    """Cell ids by (line, column)."""

    def place(self, cell_id: str) -> tuple[int, int]:
        return next((place for place, each in self.cells.items() if each == cell_id), (0, 0))

    def beside(self, cell_id: str | None, down: int, right: int) -> str | None:
        """The next cell in a direction; the same where there is none."""
        if cell_id is None or cell_id not in self.cells.values():
            return min(self.cells.items(), default=(None, None))[1]
        line, column = self.place(cell_id)
        while True:
            line, column = line + down, column + right
            if not (0 <= line < len(self.lines) and 0 <= column < len(self.columns)):
                return cell_id
            if (line, column) in self.cells:
                return self.cells[line, column]


@dataclass(frozen=True, slots=True)
class _Counted:
    """What follows from the rows of the trials alone."""

    rows: dict[str, TrialRow]
    """By trial id."""
    members: Mapping[str, Sequence[str]]
    """Ids of the trials of each cell."""
    names: Mapping[str, str]
    """Of the cells."""
    plot: Plot | None
    cells: Mapping[str, Cell]
    results: Sequence[Cell]
    """Those with a finished trial, best first."""
    scale: tuple[float, float]
    """From the lowest mean less its deviation to the highest with it."""
    news: datetime | None
    """When a trial last told something."""
    failures: Sequence[Cause]
    found: dict[tuple[Search, Sort], list[str]]
    """Lists that were asked for."""
    said: dict[str, tuple[TrialRow, str]]
    """What a filter looks for words in, made when one is given."""


def _count(rows: Sequence[TrialRow], before: _Counted | None) -> _Counted:
    """Of a sweep whose trials are the same, only what has moved is counted anew."""
    moved = [row for row in rows if before.rows.get(row.trial_id) is not row] if before else rows
    if before and len(rows) == len(before.rows) and all(_held(row, before) for row in moved):
        touched = {row.cell_id for row in moved}
        now = {**before.rows, **{row.trial_id: row for row in moved}}
        fresh = progress.cells([now[each] for cell in touched for each in before.members[cell]], before.names)
        cells = {**before.cells, **{cell.cell_id: cell for cell in fresh}}
        members, names, plotted, said = before.members, before.names, before.plot, before.said
        failed = any("ERROR" in (row.state, before.rows[row.trial_id].state) for row in moved)
        failures = causes(rows) if failed else before.failures
    else:
        shapes = {row.cell_id: row for row in rows}
        groups: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            groups[row.cell_id].append(row.trial_id)
        now, members, said = {row.trial_id: row for row in rows}, groups, {}
        names, plotted = progress.cell_names(shapes.values()), plot(list(shapes.values()))
        cells = {cell.cell_id: cell for cell in progress.cells(rows, names)}
        failures = causes(rows)
    results = progress.best_first(cells.values())
    spreads = [(cell.mean, cell.std or 0.0) for cell in results]
    low, high = (min((m - s for m, s in spreads), default=0.0), max((m + s for m, s in spreads), default=0.0))
    told = [row.updated_at for row in moved if row.updated_at]
    news = max([*told, *([before.news] if before and before.news else [])], default=None)
    return _Counted(now, members, names, plotted, cells, results, (low, high), news, failures, {}, said)


def _held(row: TrialRow, before: _Counted) -> bool:
    """Whether this is a trial that was there, in the same cell."""
    held = before.rows.get(row.trial_id)
    return held is not None and (held.cell_id, held.label) == (row.cell_id, row.label)


class Scene:
    """A sweep as a screen has it. `driven` as `progress.measure` has it."""

    def __init__(
        self,
        snapshot: Snapshot,
        now: datetime,
        *,
        driven: bool | None = True,
        terms: Terms | None = None,
        before: Scene | None = None,
    ) -> None:
        self.snapshot, self.driven, self.terms = snapshot, driven, terms or Terms()
        self._flops: Flops = before._flops if before else Flops()
        self.progress = progress.measure(snapshot, now, driven=driven, flops=self._flops)
        held = before._counted if before else None
        same = held is not None and before is not None and _same(before.snapshot.rows, snapshot.rows)
        self._counted: _Counted = held if held and same else _count(snapshot.rows, held)
        self.rows, self.names, self.plot = self._counted.rows, self._counted.names, self._counted.plot
        self.cells, self.results = self._counted.cells, self._counted.results
        self.failures, self.news, self.scale = self._counted.failures, self._counted.news, self._counted.scale
        lives = before is not None and _same(before.snapshot.live, snapshot.live)
        self._curves: dict[str, list[float]] = before._curves if before and lives else _curves(snapshot)

    # ---- what the panes list

    def trials(self, wanted: Search = ALL, sort: Sort = "state") -> list[str]:
        """Ids of the trials that are meant, in this order. A word with `=` in it is a whole one: w=1 is not w=10."""
        key = (wanted, sort)
        found = self._counted.found
        if key not in found:
            rows: Iterable[TrialRow] = self.rows.values()
            if wanted.group:
                rows = [self.rows[each] for each in self.members(wanted.group.pane, wanted.group.key)]
            if words := wanted.words.lower().split():
                rows = [row for row in rows if _has(self._spoken(row), words)]
            found[key] = [row.trial_id for row in sorted(rows, key=_ORDERS[sort])]
        return found[key]

    @property
    def resting(self) -> bool:
        """Whether trials that have begun wait for somebody."""
        return self.driven is False or bool(self.snapshot.header.paused_by)

    def busy(self) -> list[TrialRow]:
        """Trials that run, or that wait to go on."""
        shown = ("RUNNING", "PAUSED") if self.resting else ("RUNNING",)
        return sorted((row for row in self.rows.values() if row.state in shown), key=lambda row: row.position)

    def events(self) -> list[Event]:
        """The newest first."""
        return list(reversed(self.snapshot.events))

    def keys(self, pane: Pane, wanted: Search = ALL, sort: Sort = "state") -> Sequence[str]:
        """What can be chosen in a pane, in the order in which it stands there."""
        if pane == "trials":
            return self.trials(wanted, sort)
        if pane == "results":
            if self.plot:
                return [cell_id for _, cell_id in sorted(self.plot.cells.items())]
            return [cell.cell_id for cell in self.results]
        if pane == "failures":
            return [cause.key for cause in self.failures]
        return [f"{event.time.isoformat()} {event.kind} {event.trial_id or ''}" for event in self.events()]

    def members(self, pane: Pane, key: str) -> list[str]:
        """Ids of the trials that something chosen stands for."""
        if pane == "trials":
            return [key] if key in self.rows else []
        if pane == "results":
            return list(self._counted.members.get(key, ()))
        if pane == "failures":
            return [row.trial_id for cause in self.failures if cause.key == key for row in cause.rows]
        return [each for each in [key.rpartition(" ")[2]] if each in self.rows]

    def called(self, pane: Pane, key: str) -> str:
        """What people call a cell, or a cause of failure."""
        if pane == "results":
            return self.names[key]
        return next((cause.name for cause in self.failures if cause.key == key), key)

    def name(self, trial_id: str) -> str:
        row = self.rows[trial_id]
        return f"{self.names[row.cell_id]}, seed {row.config.get('seed')}"

    def curve(self, trial_id: str) -> Sequence[float]:
        """Top-1 by epoch, as far as the live rows have it."""
        return self._curves.get(trial_id, ())

    def _spoken(self, row: TrialRow) -> str:
        held = self._counted.said.get(row.trial_id)
        if held is None or held[0] is not row:
            cause = f"{row.error_cause or ''} {row.error_fingerprint or ''}" if row.state == "ERROR" else ""
            words = f"{row.trial_id} {self.names[row.cell_id]} seed={row.config.get('seed')} {WORDS[row.state]}"
            said = f" {words} {row.hosts or ''} {row.device_name or ''} {row.label or ''} {cause} ".lower()
            held = self._counted.said[row.trial_id] = (row, said)
        return held[1]


def _has(said: str, words: Sequence[str]) -> bool:
    return all((f" {word} " if "=" in word else word) in said for word in words)


_ORDERS: dict[Sort, Callable[[TrialRow], tuple[float, ...]]] = {
    "state": lambda row: (_RANKS[row.state], row.position),
    "top-1": lambda row: (-(row.metrics.get("top1") or 0.0), row.position),
    "epoch": lambda row: (-row.epoch / max(1, row.epochs), row.position),
    "images/s": lambda row: (-(row.images_per_s or 0.0), row.position),
    "news": lambda row: (-(row.updated_at.timestamp() if row.updated_at else 0.0), row.position),
}


def _same(before: Sequence[object], now: Sequence[object]) -> bool:
    """Whether the rows are the very same: a row that has changed is another."""
    return before is now or (len(before) == len(now) and all(map(is_, before, now)))


def _curves(snapshot: Snapshot) -> dict[str, list[float]]:
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in snapshot.live:
        top1 = row.metrics.get("top1")
        if top1 is not None:
            points[row.trial_id].append((row.epoch, top1))
    return {trial_id: [top1 for _, top1 in sorted(held)] for trial_id, held in points.items()}


def plot(shapes: Sequence[TrialRow]) -> Plot | None:
    """The cells, given by one row of each, as a table; None where they do not make one of two lines and two columns
    that is filled for the most part.

    Across goes a number that varies: the width where that is one, or else the setting with the most values.
    """
    across = _across(shapes)
    if across is None:
        return None
    names = progress.cell_names(shapes, without=across)
    columns = tuple(sorted({row.config[across] for row in shapes if row.config.get(across) is not None}))
    lines = tuple(dict.fromkeys(names[row.cell_id] for row in sorted(shapes, key=lambda row: row.position)))
    cells: dict[tuple[int, int], str] = {}
    numbers = {name: i for i, name in enumerate(lines)}
    for row in shapes:
        value = row.config.get(across)
        place = (numbers[names[row.cell_id]], columns.index(value) if value is not None else -1)
        if place[1] < 0 or place in cells:
            return None
        cells[place] = row.cell_id
    filled = 2 * len(cells) > len(lines) * len(columns)  # a table of holes says less than a list
    return Plot(across, columns, lines, cells) if len(lines) > 1 and filled else None


def _across(shapes: Sequence[TrialRow]) -> str | None:
    found: dict[str, int] = {}
    for column in analysis.varied(shapes, label=False):
        values = {row.config.get(column) for row in shapes} if column != "workers" else {None}
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            found[column] = len(values)
    if 1 < found.get("model_width", 0) <= MOST_COLUMNS:
        return "model_width"
    likely = [column for column, count in found.items() if 1 < count <= MOST_COLUMNS]
    return max(likely, key=lambda column: found[column], default=None)
