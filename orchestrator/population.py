"""Population based training: which trial goes on from a copy of which other, and with which settings. Pure.

At a milestone, every `interval_epochs` epochs, a trial is compared with the newest results of all trials like it: one
of the worst takes over weights, optimiser and place in the schedule of one of the best, and goes on with that one's
settings, changed a little (Jaderberg et al. 2017, "Population Based Training of Neural Networks"). Who is worst and
who is best is Ray Tune's rule, to the decision: `tests/test_population.py` holds it to Tune's own class.

What is decided hangs on the order of results and on nothing else: chance is a hash of the scheduler's seed, the trial
and its comparison. Where trials wait for one another (`synchronous`) it does not hang on the order either. A trial's
row keeps what came of it (`Step`), from which another driver takes it up: copies overwrite the epochs that they were
decided by, so the epochs alone would not do.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mixmo_core.config import digest, flatten
from orchestrator.rows import FINAL, TrialRow

if TYPE_CHECKING:  # commands that only read know populations by their rows
    from orchestrator.sweep import Scheduler, Sweep, Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Of whom a trial is a copy from then on."""

    parent_id: str
    line: str
    """By what the parent's checkpoint is known: see `Line`."""
    epoch: int
    """The parent's, after which it was copied."""
    checkpoint: str
    """Store path of what was copied."""
    settings: Mapping[str, Any]
    """What may change, by dotted name, as it is from then on."""
    before: Mapping[str, Any]
    """The same, as the trial had it."""

    def __str__(self) -> str:
        changed = [
            f"{name} {self.before[name]} -> {value}"
            for name, value in self.settings.items()
            if value != self.before[name]
        ]
        return f"{self.parent_id} at epoch {self.epoch}: {', '.join(changed) or 'no setting changed'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What came of a trial at a milestone."""

    number: int
    """Of the comparison, over the whole sweep: the first is 1."""
    epoch: int
    value: float | None
    """What it reached; None where that is not defined."""
    checkpoint: str | None = None
    """The trial's own, from which others may go on: it was among the best."""
    copy: Copy | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Where a trial stands between its copies. A checkpoint bears the digest of its line and is of no other use."""

    digest: str
    compared_at: int = 0
    """The last milestone that is behind it: a checkpoint beyond the next one was never compared, and does not count."""
    parent: str | None = None
    """The digest of the line that it goes on from."""
    source: str | None = None
    """Store path of that line's checkpoint."""


def steps_of(lineage: str | None) -> list[Step]:
    """What a row's `lineage` tells."""
    told: list[dict[str, Any]] = json.loads(lineage) if lineage else []
    return [Step(**{**each, "copy": Copy(**each["copy"]) if each["copy"] else None}) for each in told]


def copies_of(row: TrialRow) -> list[Copy]:
    """Those that a row's trial was made, in their order."""
    return [step.copy for step in steps_of(row.lineage) if step.copy]


def settings_of(row: TrialRow) -> Mapping[str, Any]:
    """The settings that a row's trial has by now in place of those that it began with, by dotted name."""
    copies = copies_of(row)
    return copies[-1].settings if copies else {}


def line_of(trial_digest: str, steps: Iterable[Step]) -> Line:
    """The line of a trial of this digest, after all these steps."""
    line = Line(digest=trial_digest)
    for step in steps:
        copy = step.copy
        if copy is None:
            line = Line(digest=line.digest, compared_at=step.epoch, parent=line.parent, source=line.source)
        else:
            told = {"trial": trial_digest, "parent": copy.line, "epoch": copy.epoch, "settings": dict(copy.settings),
                    "number": step.number}  # fmt: skip
            line = Line(digest=digest(told), compared_at=copy.epoch, parent=copy.line, source=copy.checkpoint)
    return line


def needed_by(rows: Iterable[TrialRow]) -> set[str]:
    """The checkpoints that trials go on from, or others may, by what their rows say."""
    found: set[str] = set()
    for row in rows:
        keys = [row.checkpoint]
        for step in steps_of(row.lineage)[-1:] if row.state not in FINAL else ():
            keys += [step.checkpoint, step.copy.checkpoint if step.copy else None]
        found.update(filter(None, keys))
    return found


def quantiles(ascending: Sequence[Any], fraction: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """The worst and the best, as many of each: none of one alone, and nobody is both."""
    count = min(math.ceil(len(ascending) * fraction), len(ascending) // 2)
    return ascending[:count], ascending[len(ascending) - count :]


@dataclass(slots=True, eq=False)
class _Member:
    trial: Trial
    kin: list[_Member]
    """All that it may be copied from, and itself."""
    milestones: range
    line: Line
    steps: list[Step] = field(default_factory=list)
    """All copies, and the last comparison."""
    is_open: bool = False
    """Whether it has epochs ahead, and so counts among the others."""

    @property
    def last(self) -> Step | None:
        return self.steps[-1] if self.steps else None

    @property
    def open_kin(self) -> list[_Member]:
        """Those that have epochs ahead."""
        return [each for each in self.kin if each.is_open]

    @property
    def copies(self) -> list[Copy]:
        return [step.copy for step in self.steps if step.copy]


class Population:
    """The trials of a sweep under PBT, by their positions."""

    def __init__(self, scheduler: Scheduler, trials: Sequence[Trial]) -> None:
        self._scheduler = scheduler
        self._sign = 1 if scheduler.mode == "max" else -1
        self._count = 0
        self._copied: list[int] = []
        self._members: dict[int, _Member] = {}
        kin: dict[Any, list[_Member]] = defaultdict(list)
        for trial in trials:
            alike, milestones = kin[scheduler.kin(trial.config)], scheduler.milestones(trial.config.optim.epochs)
            self._members[trial.position] = _Member(trial, alike, milestones, Line(digest=trial.digest))
            alike.append(self._members[trial.position])

    def take_up(self, trial: int, lineage: str | None) -> None:
        """What earlier drivers have decided on a trial."""
        member, steps = self._members[trial], steps_of(lineage)
        member.steps, member.line = steps, line_of(member.trial.digest, steps)
        self._count = max([self._count, *(step.number for step in steps)])

    def open(self, trial: int) -> None:
        """The trial is to be trained."""
        self._members[trial].is_open = True

    def close(self, trial: int) -> None:
        """It has ended: nobody is compared with it any more, nor copies it, nor waits for it."""
        member = self._members[trial]
        was_open, member.is_open = member.is_open, False
        at = {each.line.compared_at for each in member.open_kin}
        if self._scheduler.synchronous and was_open and len(at) == 1 and member.line.compared_at < min(at):
            self._settle(member)

    def waits(self, trial: int) -> bool:
        """Whether it may not go on before others have come as far."""
        member = self._members[trial]
        at = member.line.compared_at
        return self._scheduler.synchronous and any(each.line.compared_at < at for each in member.open_kin)

    def new_copies(self) -> list[int]:
        """The trials that were made copies since the last call."""
        copied, self._copied = self._copied, []
        return copied

    def turn(self, trial: int) -> tuple[int, int]:
        """Of several that wait, the one with the lowest is next, so that all come on together; and which one that is
        hangs on nothing but what was decided.
        """
        return (self._members[trial].line.compared_at, trial)

    def settings(self, trial: int) -> dict[str, Any]:
        """Those that may change, as they are now."""
        member = self._members[trial]
        flat = flatten(member.trial.config)
        began_with = {name: flat[name] for name in self._scheduler.mutations}
        return dict(member.copies[-1].settings) if member.copies else began_with

    def copy(self, trial: int) -> Copy:
        """What it was made last; it has been made a copy."""
        return self._members[trial].copies[-1]

    def line(self, trial: int) -> Line:
        return self._members[trial].line

    def lineage(self, trial: int) -> str:
        """What the trial's row keeps of it."""
        return json.dumps([asdict(step) for step in self._members[trial].steps])

    def compare(
        self, trial: int, epoch: int, metrics: Mapping[str, float | None], checkpoint: str | None
    ) -> Step | None:
        """What comes of a trial after this epoch; None where it is no milestone, or one that is behind it. `checkpoint`
        is the trial's newest in the store: one of another moment is not what could be copied. Who is made a copy by
        that, this one or others that have waited for it, `new_copies` tells.
        """
        member = self._members[trial]
        if epoch >= member.trial.config.optim.epochs:
            self.close(trial)
        if epoch not in member.milestones or epoch <= member.line.compared_at:
            return None
        value = metrics.get(self._scheduler.metric)
        self._count += 1
        most = sys.float_info.max  # JSON has no infinity
        reached = None if value is None or math.isnan(value) else min(max(value, -most), most)
        step = Step(number=self._count, epoch=epoch, value=reached)
        self._enter(member, step)
        worst, best = self._quantiles(member)
        saved = replace(step, checkpoint=checkpoint if checkpoint and _is_after(checkpoint, epoch) else None)
        if self._scheduler.synchronous:
            self._enter(member, saved)
            if len({each.line.compared_at for each in member.open_kin}) == 1:
                self._settle(member)
        elif member in best:
            self._enter(member, saved)
        elif member in worst:
            self._exploit(member, best)
        return member.last

    # Inside

    def _enter(self, member: _Member, step: Step) -> None:
        member.steps = [*(each for each in member.steps if each.copy), step]
        member.line = line_of(member.trial.digest, member.steps)

    def _settle(self, member: _Member) -> None:
        """All have come to the milestone: the worst are made copies."""
        worst, best = self._quantiles(member)
        for each in worst:
            self._count += 1
            self._exploit(each, best)

    def _exploit(self, member: _Member, best: Sequence[_Member]) -> None:
        """Make a trial a copy of one of the best, if what is to be copied was saved. Only who was among the best at its
        own milestone has saved that.
        """
        last = member.last
        assert last is not None
        chance = partial(self._chance, member, last.epoch)
        parent = best[int(chance("parent") * len(best))]
        step = parent.last
        if step is None or step.checkpoint is None or len(member.copies) >= len(member.milestones):
            return
        own, theirs = self.settings(member.trial.position), self.settings(parent.trial.position)
        copy = Copy(
            parent_id=parent.trial.trial_id, line=parent.line.digest, epoch=step.epoch, checkpoint=step.checkpoint,
            settings={name: self._changed(name, value, chance) for name, value in theirs.items()}, before=own,
        )  # fmt: skip
        self._enter(member, Step(number=self._count, epoch=last.epoch, value=last.value, copy=copy))
        self._copied.append(member.trial.position)

    def _quantiles(self, member: _Member) -> tuple[Sequence[_Member], Sequence[_Member]]:
        """Among those like it that have been compared and have epochs ahead; of equals the first is the worse."""
        kin = member.open_kin
        values = [(self._sign * each.last.value, each) for each in kin if each.last and each.last.value is not None]
        ascending = [each for _, each in sorted(values, key=lambda pair: pair[0])]
        return quantiles(ascending, self._scheduler.quantile_fraction)

    def _changed(self, name: str, value: Any, chance: Callable[[str], float]) -> Any:
        """A setting of the parent's as the copy gets it."""
        each = self._scheduler.mutations[name]
        is_new = chance(f"new {name}") < self._scheduler.resample_probability
        share = chance(name)
        if is_new or (each.choices and value not in each.choices):
            return each.at(share)
        if each.choices:
            place = each.choices.index(value) + (1 if share < 0.5 else -1)
            return each.choices[min(max(place, 0), len(each.choices) - 1)]
        factors = self._scheduler.perturbation_factors
        return each.nearest(value * factors[int(share * len(factors))])

    def _chance(self, member: _Member, epoch: int, purpose: str) -> float:
        """From 0 to 1, 1 excluded. A trial comes to a milestone a second time only as another copy."""
        name = f"{self._scheduler.seed} {member.trial.trial_id} {epoch} {len(member.copies)} {purpose}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _is_after(checkpoint: str, epoch: int) -> bool:
    """Whether it holds the state after this epoch, by its name."""
    name = checkpoint.rpartition("/")[2]
    return name.startswith(f"epoch-{epoch:05d}-") and "-step-" not in name


def population_of(sweep: Sweep, rows: Mapping[int, TrialRow]) -> Population | None:
    """The population of a sweep, as its rows have it, by position; None where its scheduler makes none."""
    if sweep.scheduler.method != "pbt":
        return None
    population = Population(sweep.scheduler, sweep.trials)
    for trial in sweep.trials:
        population.take_up(trial.position, rows[trial.position].lineage if trial.position in rows else None)
    return population
