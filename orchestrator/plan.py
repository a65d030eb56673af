"""What a run of a sweep would do: its trials, minus what the store already holds, and what the rest costs."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mixmo_core.config import flatten, ineffective, parts
from mixmo_core.cost import checkpoint_bytes, logits_bytes, parameters, trial_flops
from orchestrator import searching
from orchestrator.calibration import Estimate, Prediction, Span, Timing, Work, estimates, of_trials, total, work
from orchestrator.errors import RefusedError
from orchestrator.rows import FINAL, TrialRow, config_columns
from orchestrator.store import DamagedError
from orchestrator.sweep import Sweep, Trial

if TYPE_CHECKING:
    from orchestrator.store import ResultStore

Action = Literal["new", "resume", "retry", "stale", "done", "cached", "failed", "cancelled"]
"""To run: `new`; `resume`, an earlier run began it; `retry`, it failed and is asked for again; `stale`, its result is
of older numerics. Not to run: `done` in this sweep; `cached`, another sweep has its result; `failed`; `cancelled`."""
REMOVED = "no longer in the sweep file"
"""Cause of the end of a trial that was begun and that the file then dropped. It goes on when it comes back."""
TABLES_BYTES, TRIAL_BYTES, EPOCH_BYTES = 28_000, 450, 210
"""Of the tables of a sweep: in any case, for each trial and for each of its epochs; measured on numbers that nothing
compresses.
"""
_FOR_EXAMPLE = (1, 4, 16)
"""Gangs at once for which the time to the end is told, where neither file nor command says how many there will be."""
RUNS: frozenset[Action] = frozenset({"new", "resume", "retry", "stale"})
_STORED = RUNS | {"done"}


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    trial: Trial
    action: Action
    row: TrialRow | None
    """What the store holds under this trial's id; of another sweep's result, as a row of this sweep."""
    reason: str
    stale: TrialRow | None = None
    """A result of the same settings under older numerics, so under another id."""
    begun_in: tuple[str, ...] = ()
    """Other sweeps that have it still to end. Should one be running, it is trained once for both."""

    @property
    def runs(self) -> bool:
        return self.action in RUNS

    stopped: str | None = None
    """Why a scheduler has stopped it, where its end is all that is left to be written."""

    @property
    def epochs_left(self) -> int:
        epochs = self.trial.config.optim.epochs
        if self.stopped:
            return 0
        return epochs - min(self.row.epoch if self.row else 0, epochs) if self.runs else 0


@dataclass(frozen=True)
class Plan:
    sweep: Sweep
    items: tuple[PlannedTrial, ...]
    """One for each trial, in the sweep's order."""
    removed: tuple[TrialRow, ...]
    """Rows of this sweep whose trials the file no longer has, stale ones apart."""
    changes: bool
    """Whether the sweep's rows must be written although nothing runs: a new label, an order, a cached result."""
    timings: tuple[Timing, ...] = ()
    """How fast trials were trained so far: the calibration table's, and those of all trials of the store."""

    @functools.cached_property
    def to_run(self) -> tuple[Trial, ...]:
        return tuple(item.trial for item in self.items if item.runs)

    @functools.cached_property
    def expected(self) -> Plan:
        """With random draws in place of those that a search makes as it goes: what it will draw nobody knows, but of
        which settings. For prices alone.
        """
        if not self.sweep.to_draw:
            return self
        drawn = (PlannedTrial(trial, "new", None, "to be drawn") for trial in self.sweep.likely())
        return replace(self, items=(*self.items, *drawn))

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Trials by action; only actions that occur."""
        return dict(Counter(item.action for item in self.items))

    @functools.cached_property
    def estimates(self) -> tuple[Estimate, ...]:
        """What the trials to run take on each kind of device that can be told of, the fastest first."""
        resources = self.sweep.resources
        gpus = None if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
        cpus, accelerator = resources.cpus_per_worker, resources.accelerator
        return tuple(estimates(_works(self), self.timings, gpus=gpus, cpus=cpus, accelerator=accelerator))

    def prediction(self, device_name: str) -> Prediction | None:
        """What the whole sweep takes on a kind of device, with what it has taken already; None where that cannot be
        told. Results of other sweeps take nothing.
        """
        whole = self.expected
        estimate = next((each for each in whole.estimates if each.device_name == device_name), None)
        if estimate is None:
            return None
        own = [item for item in whole.items if item.action != "cached"]
        spent, left = sum(item.row.wall_s for item in own if item.row), estimate.seconds
        done = Span(spent, spent, spent)
        return Prediction(
            device_name, estimate.gpus, total([done, left]), sum(item.trial.config.optim.epochs for item in own)
        )

    def summary(self, gangs: int | None = None) -> dict[str, Any]:
        """Plain values for a terminal or for JSON. FLOPs are of training alone; `to_run` counts what is left of it.
        `storage` is the room that the sweep takes in the store, `cost` what the trials to run take on devices that have
        been timed, in `gangs` trials at once (default: what the file says).
        """
        cells, expected = _cells(self), self.expected
        priced = cells if expected is self else _cells(expected)
        return {
            "sweep": self.sweep.name,
            "trials": len(self.items),
            "cells": len(cells),
            "seeds": list(self.sweep.seeds),
            "varied": list(self.sweep.varied),
            "baseline": self.sweep.baseline,
            "actions": self.counts,
            "to_run": len(self.to_run),
            "epochs_to_run": sum(item.epochs_left for item in expected.items),
            "train_flops": sum(cell["train_flops"] * cell["trials"] for cell in priced),
            "train_flops_to_run": sum(cell["train_flops_to_run"] for cell in priced),
            "removed": [row.trial_id for row in self.removed],
            "by_removed": [_removed(row) for row in self.removed],
            "stale": [item.stale.trial_id for item in self.items if item.stale],
            "to_draw": self.sweep.to_draw,
            "notes": [*self.sweep.notes, *self._open_notes()],
            "at_once": _at_once(self, gangs),
            "storage": _storage(expected, priced),
            "cost": _cost(expected, gangs),
            "by_cell": cells,
        }

    def _open_notes(self) -> list[str]:
        to_draw, method, scheduler = self.sweep.to_draw, self.sweep.search.method, self.sweep.scheduler.method
        notes = []
        if to_draw:
            notes.append(
                f"search: {method} draws {to_draw:,} more trials as it goes; these numbers are of as many random draws"
            )
        if scheduler in ("asha", "median") and self.to_run:
            notes.append(
                f"scheduler: {scheduler} ends poor trials early; these numbers are of all trials to their ends"
            )
        return notes


def against(
    store: ResultStore, sweep: Sweep, *, retry_failed: bool = False, own: Sequence[TrialRow] | None = None
) -> Plan:
    """The plan, given all that a store holds: a trial that another sweep has finished is taken over.

    Each sweep's trials are read once, and the calibration table; a damaged one costs the estimates alone. `own` are the
    sweep's rows as the one who writes them has them, where somebody does.
    """
    timings: Sequence[Timing] = ()
    with contextlib.suppress(DamagedError):
        timings = store.timings()
    rows = store.all_trial_rows(sweep.name)
    if own is not None:
        rows = [*(row for row in rows if row.sweep != sweep.name), *own]
    return make(searching.taken_up(sweep, rows), rows, retry_failed=retry_failed, timings=timings)


def make(sweep: Sweep, rows: Iterable[TrialRow], *, retry_failed: bool = False, timings: Sequence[Timing] = ()) -> Plan:
    """Compare a sweep with what the store holds: rows of this sweep, and of others whose results may serve. `timings`
    are those of the calibration table.

    RefusedError when two different trials share an id (the first 12 digits of their hashes).
    """
    rows = list(rows)
    planned = {trial.trial_id for trial in sweep.trials}
    own = _highest(row for row in rows if row.sweep == sweep.name)
    others = _highest(row for row in rows if row.sweep != sweep.name and _is_whole(row))
    begun = _unfinished(rows, sweep.name)
    others_too = [row for row in rows if row.trial_id not in planned and row.lineage is None]
    outdated = {_settings_of(row): row for row in others_too if _is_whole(row)}
    items = []
    for trial in sweep.trials:
        held, elsewhere = own.get(trial.trial_id), others.get(trial.trial_id)
        for row in filter(None, (held, elsewhere)):
            _hold_same(trial, row)
        stale = outdated.get(_settings_key(trial)) if outdated and not trial.population else None
        item = _judge(trial, _Known(held, elsewhere, stale), sweep, retry_failed=retry_failed)
        items.append(replace(item, begun_in=tuple(begun[trial.trial_id])) if trial.trial_id in begun else item)
    stale_ids = {item.stale.trial_id for item in items if item.stale}
    gone = tuple(row for key, row in own.items() if key not in planned and key not in stale_ids)
    changes = any(_changes(item, own) for item in items)
    return Plan(sweep, tuple(items), gone, changes, (*timings, *of_trials(rows)))


def initial_row(trial: Trial, sweep: Sweep) -> TrialRow:
    """The row of a trial that nothing has happened to yet."""
    return TrialRow(
        sweep=sweep.name, label=trial.label, position=trial.position, trial_id=trial.trial_id, digest=trial.digest,
        cell_id=trial.cell_id, workers=trial.workers, epochs=trial.config.optim.epochs,
        split=trial.config.evaluate.split, numerics=_numerics(trial), config=config_columns(trial.config),
        lineage="[]" if trial.population else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Known:
    """The rows that say something of one trial."""

    held: TrialRow | None
    elsewhere: TrialRow | None
    """The result that another sweep has."""
    stale: TrialRow | None


def _judge(trial: Trial, known: _Known, sweep: Sweep, *, retry_failed: bool) -> PlannedTrial:
    held, elsewhere = known.held, known.elsewhere
    if held and held.state == "TERMINATED" and (_is_whole(held) or sweep.scheduler.method != "none"):
        return PlannedTrial(trial, "done", held, "finished here")
    if elsewhere:
        row = elsewhere.replace(sweep=sweep.name, cached_from=elsewhere.sweep)
        row = row.replace(label=trial.label, position=trial.position)
        return PlannedTrial(trial, "cached", row, f"finished in {elsewhere.sweep}")
    if held and held.state == "CANCELLED" and held.error_cause != REMOVED:
        return PlannedTrial(trial, "cancelled", held, "cancelled")
    if held and held.state == "ERROR":
        cause = held.error_cause or "no cause is known"
        return PlannedTrial(trial, "retry" if retry_failed else "failed", held, f"failed: {cause}")
    return _begin(trial, known, scheduled=sweep.scheduler.method != "none")


def _begin(trial: Trial, known: _Known, *, scheduled: bool) -> PlannedTrial:
    """For a trial that has to run: from where, and why."""
    held, stale, numerics = known.held, known.stale, _numerics(trial)
    if held and held.stopped_early:
        told = f"a scheduler stopped it at epoch {held.epoch} of {held.epochs}"
        return PlannedTrial(trial, "resume", held, told, stopped=(held.error_cause or told) if scheduled else None)
    if held and (held.epoch or held.checkpoint or held.attempts):
        return PlannedTrial(trial, "resume", held, f"epoch {held.epoch} of {held.epochs} is done")
    if stale and stale.numerics != numerics:
        reason = f"{stale.trial_id} is a result under older numerics: {_difference(stale.numerics, numerics)}"
        return PlannedTrial(trial, "stale", held, reason, stale)
    return PlannedTrial(trial, "new", held, "nothing is known of it")


def _is_whole(row: TrialRow) -> bool:
    """A result: trained to its last epoch."""
    return row.state == "TERMINATED" and not row.stopped_early


def _unfinished(rows: Iterable[TrialRow], apart_from: str) -> dict[str, list[str]]:
    """The other sweeps that have a trial still to end, by its id."""
    begun: dict[str, list[str]] = {}
    for row in rows:
        if row.sweep != apart_from and row.state not in FINAL:
            begun.setdefault(row.trial_id, []).append(row.sweep)
    return begun


def _highest(rows: Iterable[TrialRow]) -> dict[str, TrialRow]:
    held: dict[str, TrialRow] = {}
    for row in rows:
        if row.trial_id not in held or row.order > held[row.trial_id].order:
            held[row.trial_id] = row
    return held


def _hold_same(trial: Trial, row: TrialRow) -> None:
    if row.digest != trial.digest:
        raise RefusedError(
            f"{row.sweep}: trial {trial.trial_id} is there already with other settings, whose hash begins with the "
            f"same 12 digits ({row.digest} and {trial.digest}). Change a seed of the sweep"
        )


def _changes(item: PlannedTrial, own: Mapping[str, TrialRow]) -> bool:
    row = own.get(item.trial.trial_id)
    return (
        row is None or item.action == "cached" or (row.label, row.position) != (item.trial.label, item.trial.position)
    )


def _numerics(trial: Trial) -> str:
    return " ".join(f"{part}={version}" for part, version in parts(trial.config).items())


def _difference(before: str | None, now: str) -> str:
    then = dict(pair.partition("=")[::2] for pair in (before or "").split())
    today = dict(pair.partition("=")[::2] for pair in now.split())
    changed = [
        f"{part} {then.get(part, '?')}, now {version}" for part, version in today.items() if then.get(part) != version
    ]
    return ", ".join(changed)


def _settings_of(row: TrialRow) -> str:
    return json.dumps([row.workers, dict(row.config)], sort_keys=True)


def _settings_key(trial: Trial) -> str:
    return json.dumps([trial.workers, config_columns(trial.config)], sort_keys=True)


def _cells(plan: Plan) -> list[dict[str, Any]]:
    """One entry for each cell, in order: what distinguishes it, and what its trials cost."""
    groups: dict[str, list[PlannedTrial]] = defaultdict(list)
    for item in plan.items:
        groups[item.trial.cell_id].append(item)
    return [_cell(cell_id, group, plan.sweep.varied) for cell_id, group in groups.items()]


def _cell(cell_id: str, group: Sequence[PlannedTrial], varied: Sequence[str]) -> dict[str, Any]:
    config = group[0].trial.config
    values, silent = flatten(config), ineffective(config)
    per_trial = trial_flops(config)
    return {
        "cell_id": cell_id,
        "label": group[0].trial.label,
        "settings": {name: None if name in silent else values[name] for name in varied},
        "trials": len(group),
        "actions": dict(Counter(item.action for item in group)),
        "parameters": parameters(config),
        "checkpoint_bytes": checkpoint_bytes(config),
        "logits_bytes": logits_bytes(config),
        "train_flops": per_trial,
        "train_flops_to_run": per_trial * sum(item.epochs_left for item in group) / config.optim.epochs,
    }


def _removed(row: TrialRow) -> dict[str, Any]:
    """A trial that the file no longer has, and what becomes of its row when the sweep is run."""
    if row.state in FINAL:
        reason = f"not in the file any more; its row stays ({row.state.lower()})"
    elif row.epoch:
        reason = (
            f"not in the file any more; cancelled at epoch {row.epoch} of {row.epochs}, and goes on if it comes back"
        )
    else:
        reason = "not in the file any more; it never began, and its row goes"
    return {"trial_id": row.trial_id, "cell_id": row.cell_id, "label": row.label, "state": row.state, "reason": reason}


def _works(plan: Plan) -> list[Work]:
    """What is left of each trial to run, in their order."""
    whole: dict[str, tuple[dict[str, Any], float]] = {}
    works = []
    for item in plan.items:
        config = item.trial.config
        if item.epochs_left:
            if item.trial.cell_id not in whole:
                whole[item.trial.cell_id] = config_columns(config), trial_flops(config)
            columns, flops = whole[item.trial.cell_id]
            share = item.epochs_left / config.optim.epochs
            works.append(work(columns, item.trial.workers, flops * share, item.epochs_left))
    return works


def _at_once(plan: Plan, gangs: int | None) -> dict[str, Any]:
    """How many trials may be trained at once; None where the file does not say in how many gangs."""
    resources = plan.sweep.resources
    slots = resources.slot_count
    if gangs is None and resources.max_gangs != "auto":
        gangs = resources.max_gangs
    return {"gangs": gangs, "slots": slots, "trials": gangs and gangs * slots}


def _cost(plan: Plan, gangs: int | None) -> dict[str, Any]:
    """Hours, money and time to the end on each kind of device that was timed; `unknown` says why there is none. What
    slots would gain is not known: a gang counts for one trial at a time.
    """
    resources, price, gangs = plan.sweep.resources, plan.sweep.price, _at_once(plan, gangs)["gangs"]
    devices = []
    for each in plan.estimates:
        elapsed = {count: asdict(each.elapsed(count)) for count in ((gangs,) if gangs else _FOR_EXAMPLE)}
        cores = 0.0 if each.gpus else resources.workers * resources.cpus_per_worker
        gpu_hours = each.seconds.times(each.gpus / 3600) if each.gpus else None
        money = gpu_hours.times(price.gpu_hour) if gpu_hours and price.gpu_hour is not None else None
        devices.append({
            "device_name": each.device_name,
            "gpus_per_trial": each.gpus,
            "training_s": asdict(each.seconds),
            "gpu_hours": gpu_hours and asdict(gpu_hours),
            "core_hours": asdict(each.seconds.times(cores / 3600)) if cores else None,
            "money": money and asdict(money),
            "elapsed_s": elapsed[gangs] if gangs else None,
            "elapsed_by_gangs": {str(count): span for count, span in elapsed.items()},
            "shapes": each.shapes,
            "measured": each.measured,
        })  # fmt: skip
    return {
        "gangs": gangs,
        "currency": price.currency,
        "devices": devices,
        "unknown": None if devices or not plan.to_run else _why_unknown(plan),
    }


def _why_unknown(plan: Plan) -> str:
    kinds = {(each.precision, each.workers) for each in _works(plan)}
    asked = ", ".join(f"{precision} with {workers} worker{'s' * (workers > 1)}" for precision, workers in sorted(kinds))
    if not plan.timings:
        return "nothing has been timed yet"
    return f"what has been timed is of other devices, or not of {asked}"


def _storage(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted bytes: when all trials have finished, and what more there is while they run. Files of cached trials
    are those of another sweep; `peak` is null where the file does not say how many trials run at once.
    """
    own = [sum(count for action, count in cell["actions"].items() if action in _STORED) for cell in cells]
    kept = plan.sweep.checkpoints.keep == "last"
    checkpoints = sum(cell["checkpoint_bytes"] * count for cell, count in zip(cells, own, strict=True)) if kept else 0
    logits = sum(cell["logits_bytes"] * count for cell, count in zip(cells, own, strict=True))
    epochs = sum(item.trial.config.optim.epochs for item in plan.items)
    tables = TABLES_BYTES + len(plan.items) * TRIAL_BYTES + epochs * EPOCH_BYTES
    takes_turns = plan.sweep.scheduler.method == "pbt"  # those that wait keep theirs, and what may be copied besides
    running = (3 if takes_turns else 2) * max((checkpoint_bytes(trial.config) for trial in plan.to_run), default=0)
    at_once = len(plan.to_run) if takes_turns else _at_once(plan, None)["trials"]
    end = checkpoints + logits + tables
    return {
        "checkpoints": checkpoints,
        "logits": logits,
        "tables": tables,
        "end": end,
        "per_running_trial": running,
        "peak": None if at_once is None else end + running * min(at_once, len(plan.to_run)),
    }
