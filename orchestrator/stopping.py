"""Which trials are stopped before their last epoch: a scheduler's rule, over results as they arrive. Pure.

The rules are Ray Tune's, to the decision: `tests/test_stopping.py` holds them to Tune's own classes. They stand here so
that the dispatcher can judge a result in the moment in which it numbers it. A trial then ends at that very report, and
what is decided hangs on nothing but the order of results: the store's rows, told again in that order, bring a rule to
where it was.
"""

from __future__ import annotations

import bisect
import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from mixmo_core.config import flatten, ineffective, unflatten
from orchestrator.sweep import Sweep


@dataclass(frozen=True, slots=True)
class Bar:
    """What a value did not reach."""

    needed: float
    told: str
    """Of which trials, such as `rung 2 of 4, after 5 trials`."""


class Rule(Protocol):
    """Of values, more is better. Each trial's epochs come in order, each once."""

    def verdict(self, trial: int, epoch: int, value: float) -> Bar | None:
        """What stops the trial at this epoch, given what was recorded; None if it may go on. Changes nothing."""

    def record(self, trial: int, epoch: int, value: float) -> None:
        """Take a result in, whatever the verdict."""


class Halving:
    """ASHA: at rungs of grace * factor^k epochs, a trial goes on if it is among the best 1/factor of those that have
    been there before it (Li et al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2, without
    promotion: nothing is paused).
    """

    def __init__(self, *, grace: int, factor: float, epochs: int) -> None:
        """`epochs`: of the longest trial, whose end is no rung."""
        self._factor = factor
        self._rungs = [float(grace)]
        while self._rungs[-1] * factor < epochs:
            self._rungs.append(self._rungs[-1] * factor)
        self._values: list[list[float]] = [[] for _ in self._rungs]
        """Of each rung, ascending."""
        self._reached: dict[int, int] = {}
        """The highest rung of each trial, counted from 1."""

    def verdict(self, trial: int, epoch: int, value: float) -> Bar | None:
        rung = self._new_rung(trial, epoch)
        before = self._values[rung - 1] if rung else []
        if not before or value >= (needed := _quantile(before, 1 - 1 / self._factor)):
            return None
        return Bar(needed, f"rung {rung} of {len(self._rungs)}, after {len(before)} trial{'s' * (len(before) > 1)}")

    def record(self, trial: int, epoch: int, value: float) -> None:
        if rung := self._new_rung(trial, epoch):
            bisect.insort(self._values[rung - 1], value)
            self._reached[trial] = rung

    def _new_rung(self, trial: int, epoch: int) -> int:
        """The highest rung that this epoch has reached, if the trial was not there before; else 0. A trial that is
        evaluated every few epochs may pass over some.
        """
        rung = bisect.bisect_right(self._rungs, epoch)
        return rung if rung > self._reached.get(trial, 0) else 0


class Median:
    """The median stopping rule: a trial stops if its best value is below the median of what the others had on average
    up to the same epoch (Golovin et al. 2017, "Google Vizier", section 3.2.2).
    """

    def __init__(self, *, grace: int, least: int) -> None:
        """`least`: so many others must have reached the epoch."""
        self._grace, self._least = grace, least
        self._best: dict[int, float] = {}
        self._epochs: dict[int, array[int]] = {}
        """Of each trial those that count, ascending: from `grace` on."""
        self._sums: dict[int, array[float]] = {}
        """Of the values up to each of these."""

    def verdict(self, trial: int, epoch: int, value: float) -> Bar | None:
        if epoch < self._grace:
            return None
        means = [
            sums[place - 1] / place
            for other, sums in self._sums.items()
            if other != trial and self._epochs[other][-1] >= epoch
            if (place := bisect.bisect_right(self._epochs[other], epoch))
        ]
        if len(means) < self._least or max(value, self._best.get(trial, value)) >= (middle := statistics.median(means)):
            return None
        return Bar(middle, f"the median of {len(means)} others up to this epoch")

    def record(self, trial: int, epoch: int, value: float) -> None:
        self._best[trial] = max(value, self._best.get(trial, value))
        if epoch >= self._grace:
            sums = self._sums.setdefault(trial, array("d"))
            sums.append(value + (sums[-1] if sums else 0.0))
            self._epochs.setdefault(trial, array("l")).append(epoch)


def _quantile(ascending: list[float], share: float) -> float:
    """By linear interpolation between the two nearest, as numpy has it."""
    place = share * (len(ascending) - 1)
    low = int(place)
    below, above, rest = ascending[low], ascending[min(low + 1, len(ascending) - 1)], place - low
    if below == above:  # infinity has no distance from itself
        return below
    return below + (above - below) * rest if rest < 0.5 else above - (above - below) * (1 - rest)


class Judge:
    """A sweep's rule, applied to what its trials report. It decides on each epoch of a trial once, in whatever attempt
    it comes first: what a resumed trial tells again changes nothing.
    """

    def __init__(
        self,
        rule: Callable[[], Rule],
        *,
        method: str,
        metric: str,
        sign: Literal[1, -1],
        within: Sequence[str] = (),
    ) -> None:
        """`sign` makes more of the metric better; trials are compared with those of the same settings `within` only, by
        a rule of their own.
        """
        self._make, self._method, self._metric, self._sign, self._within = rule, method, metric, sign, within
        self._rules: dict[Any, Rule] = {}
        self._of: dict[int, Rule] = {}
        self._epochs: dict[int, int] = {}
        self._seen: dict[int, int] = {}

    def add(self, trial: int, settings: Mapping[str, Any]) -> None:
        """A trial that may report: its settings by dotted name. Those without effect make no difference."""
        silent = ineffective(unflatten(settings)) if self._within else frozenset[str]()
        group = tuple(None if name in silent else settings[name] for name in self._within)
        self._of[trial] = self._rules.setdefault(group, self._make())
        self._epochs[trial] = settings["optim.epochs"]

    def replay(self, trial: int, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """A result that was judged before; what came of it is known."""
        self._take(trial, epoch, metrics, judge=False)

    def decide(self, trial: int, epoch: int, metrics: Mapping[str, float | None]) -> str | None:
        """Why the trial stops here, as a person reads it; None if it goes on. Its last epoch is no stop."""
        return self._take(trial, epoch, metrics, judge=epoch < self._epochs[trial])

    def _take(self, trial: int, epoch: int, metrics: Mapping[str, float | None], *, judge: bool) -> str | None:
        value = metrics.get(self._metric)
        if epoch <= self._seen.get(trial, 0):
            return None
        self._seen[trial] = epoch
        if value is None or math.isnan(value):  # not evaluated, or undefined
            return None
        bar = self._of[trial].verdict(trial, epoch, self._sign * value) if judge else None
        self._of[trial].record(trial, epoch, self._sign * value)
        if bar is None:
            return None
        side, needed = "below" if self._sign > 0 else "above", self._sign * bar.needed
        return f"{self._method}: {self._metric} {value:.4g} at epoch {epoch}, {side} {needed:.4g}: {bar.told}"


def judge_of(sweep: Sweep) -> Judge | None:
    """The judge that a sweep's scheduler stands for, before any result; None where every trial goes to its end."""
    scheduler, grace = sweep.scheduler, sweep.scheduler.grace_epochs
    rule: Callable[[], Rule]
    if scheduler.method == "asha":
        longest = max(trial.config.optim.epochs for trial in sweep.examples)
        rule = partial(Halving, grace=grace, factor=scheduler.reduction_factor, epochs=longest)
    elif scheduler.method == "median":
        rule = partial(Median, grace=grace, least=scheduler.min_trials)
    else:
        return None
    judge = Judge(
        rule, method=scheduler.method, metric=scheduler.metric, sign=1 if scheduler.mode == "max" else -1,
        within=scheduler.within,
    )  # fmt: skip
    for trial in sweep.trials:
        judge.add(trial.position, flatten(trial.config))
    return judge
