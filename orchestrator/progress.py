"""How far a sweep is, read off its rows: counts, pace, time left, results so far, failures by cause. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from mixmo_core import cost
from mixmo_core.config import leaves
from orchestrator import analysis, causes
from orchestrator.calibration import Prediction
from orchestrator.rows import FINAL, TrialRow, config_of

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
    elapsed_s: float | None
    """From the first start to the last news."""
    gpu_seconds: float
    images_per_s: float
    """Slots trained on, over all trials that run now."""
    training_s: float = 0.0
    """Of all trials but those taken from other sweeps, summed; what `predicted` is held against."""
    predicted: Prediction | None = None
    """What the sweep was to take, reckoned when its first trial began."""

    @property
    def all_cancelled(self) -> bool:
        return 0 < self.cancelled == self.total


def measure(snapshot: Snapshot, now: datetime, *, driven: bool | None = True) -> Progress:
    """`driven`: whether a driver holds the sweep; None where that cannot be told."""
    rows = snapshot.rows
    states = Counter(row.state for row in rows)
    ended = sum(states[state] for state in FINAL)
    partial = sum(1 - _left(row) for row in rows if row.state not in FINAL)
    own = [row for row in rows if row.cached_from is None]
    training_s, predicted = sum(row.wall_s for row in own), Prediction.of(snapshot.header.predicted)
    return Progress(
        status=_status(snapshot, driven),
        total=len(rows),
        done=states["TERMINATED"],
        cached=sum(row.state == "TERMINATED" and row.cached_from is not None for row in rows),
        stopped_early=sum(row.state == "TERMINATED" and row.stopped_early for row in rows),
        running=states["RUNNING"],
        queued=states["PENDING"],
        paused=states["PAUSED"],
        failed=states["ERROR"],
        cancelled=states["CANCELLED"],
        fraction=(ended + partial) / len(rows) if rows else 0.0,
        trials_per_hour=_trials_per_hour(snapshot, own, now),
        eta_s=None
        if driven is False or snapshot.header.paused_by or snapshot.header.stopping
        else _eta_s(rows, predicted),
        elapsed_s=_elapsed_s(own),
        gpu_seconds=sum(row.gpu_seconds for row in own),
        images_per_s=sum(row.images_per_s or 0.0 for row in rows if row.state == "RUNNING" and driven is not False),
        training_s=training_s,
        predicted=predicted,
    )


def driven(store: ResultStore, sweep: str) -> bool:
    """Whether a living driver holds the sweep."""
    lease = store.lease(sweep)
    return lease is not None and not lease.expired


def _left(row: TrialRow) -> float:
    """The share of a trial's epochs that are still to be trained."""
    return 1 - min(1.0, row.epoch / max(1, row.epochs))


def _status(snapshot: Snapshot, driven: bool | None) -> Status:
    rows = snapshot.rows
    if all(row.state in FINAL for row in rows):
        return "finished"
    if not driven:
        return "quiet" if driven is None else "stopped"
    if snapshot.header.stopping:
        return "stopping"
    runs = any(row.state == "RUNNING" for row in rows)
    if snapshot.header.paused_by:
        return "pausing" if runs else "paused"
    began = any(row.state in FINAL and row.fence == snapshot.header.fence for row in rows)
    return "running" if runs or began else "starting"


def _elapsed_s(own: Sequence[TrialRow]) -> float | None:
    started = [row.started_at for row in own if row.started_at]
    updated = [row.updated_at for row in own if row.started_at and row.updated_at]
    return (max(updated) - min(started)).total_seconds() if started and updated else None


def _trials_per_hour(snapshot: Snapshot, own: Sequence[TrialRow], now: datetime) -> float | None:
    """Trials that ended well in the last hour, or since this driver began if that is less; null before the first."""
    mine = [row for row in own if row.fence == snapshot.header.fence]
    starts = [row.started_at for row in mine if row.started_at]
    ends = [row.updated_at for row in mine if row.state == "TERMINATED" and row.updated_at]
    if not ends or not starts:
        return None
    until = now if any(row.state not in FINAL for row in snapshot.rows) else max(ends)
    since = max(min(starts), until - timedelta(hours=1))
    recent = sum(end >= since for end in ends)
    hours = (until - since).total_seconds() / 3600
    return recent / hours if recent and hours > 0 else None


def _eta_s(rows: Sequence[TrialRow], predicted: Prediction | None = None) -> float | None:
    """Seconds until the last trial ends: what is left, spread over as many trials as run now.

    A trial takes as long as those of its cell took; where none has ended, as its FLOPs say at the speed so far. Before
    the first epoch is done all that is known is what was predicted.
    """
    waiting = [row for row in rows if row.state not in FINAL]
    if not waiting:
        return None
    took: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.state == "TERMINATED" and row.cached_from is None and row.wall_s > 0 and not row.stopped_early:
            took[row.cell_id].append(row.wall_s)
    typical = {cell: math.fsum(times) / len(times) for cell, times in took.items()}
    speed = _flops_per_s(rows)
    for row in waiting:
        if row.cell_id not in typical:
            if not speed:
                return predicted.seconds.mean / _at_once(rows) if predicted else None
            typical[row.cell_id] = cost.trial_flops(config_of(row)) / speed
    seconds = [typical[row.cell_id] * _left(row) for row in waiting]
    if not math.isfinite(sum(seconds)):  # a speed that is next to nothing says nothing
        return None
    return max(sum(seconds) / _at_once(rows), *seconds, 0.0)


def _at_once(rows: Sequence[TrialRow]) -> int:
    return max(1, sum(row.state == "RUNNING" for row in rows))


def _flops_per_s(rows: Sequence[TrialRow]) -> float | None:
    worked = [row for row in rows if row.train_flops and row.wall_s > 0 and row.cached_from is None]
    return sum(row.train_flops or 0.0 for row in worked) / sum(row.wall_s for row in worked) if worked else None


# ------------------------------------------------------------------------------------------------- results and failures


@dataclass(frozen=True, slots=True)
class Cell:
    """Trials that differ in their seed alone, and the top-1 (a fraction) of those that ended."""

    cell_id: str
    name: str
    planned: int
    top1: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.top1) / len(self.top1)

    @property
    def std(self) -> float | None:
        """Of a sample: n - 1 in the denominator."""
        count, mean = len(self.top1), self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.top1) / (count - 1)) if count > 1 else None


def results(rows: Sequence[TrialRow], names: Mapping[str, str]) -> list[Cell]:
    """The cells with a finished trial, best first. Trials that a scheduler stopped early do not count."""
    planned = Counter(row.cell_id for row in rows)
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        top1 = row.metrics.get("top1")
        if row.state == "TERMINATED" and not row.stopped_early and top1 is not None:
            found[row.cell_id].append(top1)
    ended = [Cell(cell, names[cell], planned[cell], tuple(values)) for cell, values in found.items()]
    return sorted(ended, key=lambda cell: (-cell.mean, cell.name))


def failures(rows: Sequence[TrialRow]) -> list[tuple[str, list[TrialRow]]]:
    """Failed trials by what failed, the most frequent first."""
    return [(cause.name, list(cause.rows)) for cause in causes.causes(rows)]


# ------------------------------------------------------------------------------------------------------------- names


_SPEAK_FOR_THEMSELVES = ("data_dataset", "mixing_method", "model_arch")
_FOLLOW = ("model_encoders", "model_classifiers")
"""Counts that say something only where they differ from the number of subnetworks."""


def cell_names(rows: Sequence[TrialRow]) -> dict[str, str]:
    """A short name for every cell: its label, and the settings in which it differs from others of that label.

    Settings are written as papers do: `cutmix w=10 M=2`.
    """
    symbols = {name.replace(".", "_"): spec.metadata["setting"].symbol for name, spec in leaves()}
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
                if value is not None and not (column in _FOLLOW and value == row.config.get("model_subnetworks")):
                    words.append(_word(column, value, symbols.get(column)))
            names[cell_id] = " ".join(words) or row.config.get("mixing_method") or f"cell {cell_id[:7]}"
    return names


def _words_first(column: str) -> bool:
    return column not in _SPEAK_FOR_THEMSELVES


def _word(column: str, value: object, symbol: str | None) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if column in _SPEAK_FOR_THEMSELVES else f"{symbol or analysis.short(column).rpartition('.')[2]}={text}"
