"""How far a sweep is, read off its rows: counts, pace, time left, results so far, failures by cause. Pure."""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from mixmo_core import cost
from mixmo_core.config import leaves
from orchestrator import analysis, causes
from orchestrator.calibration import Prediction
from orchestrator.rows import FINAL, State, TrialRow, config_of

if TYPE_CHECKING:
    from orchestrator.store import ResultStore, Snapshot

Status = Literal["starting", "running", "pausing", "paused", "stopping", "finished", "stopped", "quiet"]
"""`pausing`, `stopping`: trials still run, and nothing new starts. `stopped`: something is left to run and no driver
runs it. `quiet`: whether one does cannot be told."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of trials by state; times in seconds; `fraction` counts the epochs of unfinished trials too."""

    status: Status
    total: int
    done: int
    cached: int
    """Of those done: taken from another sweep."""
    stopped_early: int
    """Of those done: stopped by a scheduler before their last epoch."""
    running: int
    queued: int
    paused: int
    failed: int
    cancelled: int
    fraction: float
    trials_per_hour: float | None
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    """Between these, as far as trials of a cell take equally long: see `_eta`."""
    elapsed_s: float | None
    """From the first start to the last news."""
    gpu_seconds: float
    images_per_s: float
    """Slots trained on, over all trials that run now."""
    training_s: float = 0.0
    """Of all trials but those taken from other sweeps, summed; what `predicted` is held against."""
    predicted: Prediction | None = None
    """What the sweep was to take, reckoned when its first trial began."""
    slots: int = 1
    """Of the gangs that trials run on: so many are trained side by side."""

    @property
    def all_cancelled(self) -> bool:
        return 0 < self.cancelled == self.total


class Flops:
    """What a trial costs to train, by its cell: worked out once for each."""

    def __init__(self) -> None:
        self._by_cell: dict[str, float] = {}

    def __call__(self, row: TrialRow) -> float:
        known = self._by_cell.get(row.cell_id)
        if known is None:
            known = self._by_cell[row.cell_id] = cost.trial_flops(config_of(row))
        return known


def measure(
    snapshot: Snapshot, now: datetime, *, driven: bool | None = True, flops: Callable[[TrialRow], float] | None = None
) -> Progress:
    """`driven`: whether a driver holds the sweep; None where that cannot be told. `flops` remembers between calls."""
    rows = snapshot.rows
    states = Counter([row.state for row in rows])
    ended = sum(states[state] for state in FINAL)
    waiting = [row for row in rows if row.state not in FINAL]
    own = [row for row in rows if row.cached_from is None]
    predicted = Prediction.of(snapshot.header.predicted)
    rests = driven is False or snapshot.header.paused_by or snapshot.header.stopping
    eta = None if rests or not waiting else _eta(waiting, own, flops or Flops(), predicted)
    return Progress(
        status=_status(snapshot, driven, states),
        total=len(rows),
        done=states["TERMINATED"],
        cached=sum(row.state == "TERMINATED" and row.cached_from is not None for row in rows),
        stopped_early=sum(row.state == "TERMINATED" and row.stopped_early for row in rows),
        running=states["RUNNING"],
        queued=states["PENDING"],
        paused=states["PAUSED"],
        failed=states["ERROR"],
        cancelled=states["CANCELLED"],
        fraction=(ended + sum(1 - _left(row) for row in waiting if row.epoch)) / len(rows) if rows else 0.0,
        trials_per_hour=_trials_per_hour(snapshot, own, now, over=not waiting),
        eta_s=eta.likely if eta else None,
        eta_low_s=eta.low if eta else None,
        eta_high_s=eta.high if eta else None,
        elapsed_s=_elapsed_s(own),
        gpu_seconds=sum([row.gpu_seconds for row in own]),
        images_per_s=sum(row.images_per_s or 0.0 for row in waiting if row.state == "RUNNING" and driven is not False),
        training_s=sum([row.wall_s for row in own]),
        predicted=predicted,
        slots=max((row.slots for row in waiting if row.state == "RUNNING"), default=1),
    )


def driven(store: ResultStore, sweep: str) -> bool:
    """Whether a living driver holds the sweep."""
    lease = store.lease(sweep)
    return lease is not None and not lease.expired


def status(snapshot: Snapshot, *, driven: bool | None) -> Status:
    """What a sweep does, without all that `measure` counts."""
    return _status(snapshot, driven, Counter([row.state for row in snapshot.rows]))


def over(snapshot: Snapshot) -> bool:
    """Whether every trial has ended."""
    return all(row.state in FINAL for row in snapshot.rows)


def _left(row: TrialRow) -> float:
    """The share of a trial's epochs that are still to be trained."""
    return 1 - min(1.0, row.epoch / max(1, row.epochs))


def _status(snapshot: Snapshot, driven: bool | None, states: Mapping[State, int]) -> Status:
    if sum(states[state] for state in FINAL) == len(snapshot.rows):
        return "finished"
    if not driven:
        return "quiet" if driven is None else "stopped"
    if snapshot.header.stopping:
        return "stopping"
    if snapshot.header.paused_by:
        return "pausing" if states["RUNNING"] else "paused"
    began = states["RUNNING"] or any(row.state in FINAL and row.fence == snapshot.header.fence for row in snapshot.rows)
    return "running" if began else "starting"


def _elapsed_s(own: Sequence[TrialRow]) -> float | None:
    started = [row.started_at for row in own if row.started_at]
    updated = [row.updated_at for row in own if row.started_at and row.updated_at]
    return (max(updated) - min(started)).total_seconds() if started and updated else None


def _trials_per_hour(snapshot: Snapshot, own: Sequence[TrialRow], now: datetime, *, over: bool) -> float | None:
    """Trials that ended well in the last hour, or since this driver began if that is less; null before the first."""
    mine = [row for row in own if row.fence == snapshot.header.fence]
    starts = [row.started_at for row in mine if row.started_at]
    ends = [row.updated_at for row in mine if row.state == "TERMINATED" and row.updated_at]
    if not ends or not starts:
        return None
    until = max(ends) if over else now
    since = max(min(starts), until - timedelta(hours=1))
    recent = sum(end >= since for end in ends)
    hours = (until - since).total_seconds() / 3600
    return recent / hours if recent and hours > 0 else None


@dataclass(frozen=True, slots=True)
class _Band:
    low: float
    likely: float
    high: float


_UNMEASURED = 0.25
"""How far off a cell's time may be, as a share of it, where none of its trials has ended."""


def _eta(
    waiting: Sequence[TrialRow],
    own: Sequence[TrialRow],
    flops: Callable[[TrialRow], float],
    predicted: Prediction | None,
) -> _Band | None:
    """Seconds until the last trial ends: what is left, spread over as many trials as run now.

    A trial takes as long as those of its cell took; where none has ended, as its FLOPs say at the speed so far. The
    band begins where no place is ever idle and reaches to the longest that any order of hand-outs can take (Graham,
    1966: total / m + (1 - 1 / m) * the longest), and is wider by the error of the times themselves: the spread of a
    cell's trials over the root of their number. Before the first epoch is done all that is known is what was predicted.
    """
    took: dict[str, list[float]] = defaultdict(list)
    for row in own:
        if row.state == "TERMINATED" and row.wall_s > 0 and not row.stopped_early:
            took[row.cell_id].append(row.wall_s)
    typical = {cell: math.fsum(times) / len(times) for cell, times in took.items()}
    spread, speed = _spread(took, typical), _flops_per_s(own)
    at_once = max(1, sum(row.state == "RUNNING" for row in waiting))
    total = longest = doubt = 0.0
    for row, count in _alike(waiting):
        known = typical.get(row.cell_id) or (flops(row) / speed if speed else None)
        if known is None:
            return _foretold(predicted, at_once) if predicted else None
        seconds = known * _left(row)
        total, longest = total + count * seconds, max(longest, seconds)
        share = spread / math.sqrt(len(took[row.cell_id])) if row.cell_id in typical else _UNMEASURED
        doubt += count * seconds * share
    if not math.isfinite(total):  # a speed that is next to nothing says nothing
        return None
    likely = max(total / at_once, longest, 0.0)
    off = min(1.0, doubt / total) if total > 0 else 0.0
    return _Band(likely * (1 - off), likely, max(likely, total / at_once + (1 - 1 / at_once) * longest) * (1 + off))


def _alike(waiting: Sequence[TrialRow]) -> Iterable[tuple[TrialRow, int]]:
    """One of those with as much left of the same cell, and how many they are: most have not begun."""
    keys = [(row.cell_id, row.epoch, row.epochs) for row in waiting]
    counts = Counter(keys)
    return [(row, counts[key]) for key, row in dict(zip(keys, waiting, strict=True)).items()]


def _foretold(predicted: Prediction, at_once: int) -> _Band:
    told = predicted.seconds
    low, high = (told.mean if each is None else each for each in (told.low, told.high))
    return _Band(low / at_once, told.mean / at_once, high / at_once)


def _spread(took: Mapping[str, Sequence[float]], typical: Mapping[str, float]) -> float:
    """How far trials of one cell are apart in their time, as a share of it: the deviation, pooled over the cells."""
    squares = sum(((each / typical[cell]) - 1) ** 2 for cell, times in took.items() for each in times)
    freedom = sum(len(times) - 1 for times in took.values())
    return math.sqrt(squares / freedom) if freedom else _UNMEASURED


def _flops_per_s(own: Sequence[TrialRow]) -> float | None:
    worked = [row for row in own if row.train_flops and row.wall_s > 0]
    return sum(row.train_flops or 0.0 for row in worked) / sum(row.wall_s for row in worked) if worked else None


# ------------------------------------------------------------------------------------------------- results and failures


@dataclass(frozen=True, slots=True)
class Cell:
    """Trials that differ in their seed alone, and the top-1 (a fraction) of those that ended."""

    cell_id: str
    name: str
    planned: int
    top1: tuple[float, ...]
    running: int = 0
    failed: int = 0
    epochs_left: float = 0.0
    """Of those planned, as a share."""

    @property
    def mean(self) -> float:
        return math.fsum(self.top1) / len(self.top1)

    @property
    def std(self) -> float | None:
        """Of a sample: n - 1 in the denominator."""
        count, mean = len(self.top1), self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.top1) / (count - 1)) if count > 1 else None


def cells(rows: Sequence[TrialRow], names: Mapping[str, str]) -> list[Cell]:
    """All cells in the order of their first trials. Trials that a scheduler stopped early are no result."""
    groups: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        groups[row.cell_id].append(row)
    return [_cell(names[cell_id], members) for cell_id, members in groups.items()]


def _cell(name: str, members: Sequence[TrialRow]) -> Cell:
    top1, running, failed, left = [], 0, 0, 0.0
    for row in members:
        value = row.metrics.get("top1")
        if row.state == "TERMINATED":
            if value is not None and not row.stopped_early:
                top1.append(value)
        else:
            running += row.state == "RUNNING"
            failed += row.state == "ERROR"
            left += 0.0 if row.state in FINAL else _left(row)
    return Cell(members[0].cell_id, name, len(members), tuple(top1), running, failed, left / len(members))


def results(rows: Sequence[TrialRow], names: Mapping[str, str]) -> list[Cell]:
    """The cells with a finished trial, best first."""
    return best_first(cells(rows, names))


def best_first(found: Iterable[Cell]) -> list[Cell]:
    return sorted((cell for cell in found if cell.top1), key=lambda cell: (-cell.mean, cell.name))


def failures(rows: Sequence[TrialRow]) -> list[tuple[str, list[TrialRow]]]:
    """Failed trials by what failed, the most frequent first."""
    return [(cause.name, list(cause.rows)) for cause in causes.causes(rows)]


# ------------------------------------------------------------------------------------------------------------- names


_SPEAK_FOR_THEMSELVES = ("data_dataset", "mixing_method", "model_arch")
_FOLLOW = ("model_encoders", "model_classifiers")
"""Counts that say something only where they differ from the number of subnetworks."""


def cell_names(rows: Iterable[TrialRow], *, without: str | None = None) -> dict[str, str]:
    """A short name for every cell: its label, and the settings in which it differs from others of that label.

    Settings are written as papers do: `cutmix w=10 M=2`. One setting may be left out.
    """
    blocks: dict[str | None, dict[str, TrialRow]] = defaultdict(dict)
    for row in rows:
        blocks[row.label][row.cell_id] = row
    names = {}
    for label, block in blocks.items():
        varied = sorted(analysis.varied(list(block.values()), label=False), key=_words_first)
        for cell_id, row in block.items():
            words = [label] if label else []
            for column in varied:
                value = row.workers if column == "workers" else row.config.get(column)
                follows = column in _FOLLOW and value == row.config.get("model_subnetworks")
                if value is not None and column != without and not follows:
                    words.append(_word(column, value))
            names[cell_id] = " ".join(words) or row.config.get("mixing_method") or f"cell {cell_id[:7]}"
    return names


def symbol(column: str) -> str:
    """A setting as papers write it: `w`, `M`; by its name where they have no letter for it."""
    return _symbols().get(column) or analysis.short(column).rpartition(".")[2]


@functools.cache
def _symbols() -> dict[str, str | None]:
    return {name.replace(".", "_"): spec.metadata["setting"].symbol for name, spec in leaves()}


def _words_first(column: str) -> bool:
    return column not in _SPEAK_FOR_THEMSELVES


def _word(column: str, value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if column in _SPEAK_FOR_THEMSELVES else f"{symbol(column)}={text}"
