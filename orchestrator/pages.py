"""Pages of text for the commands that read: a list of sweeps, a trial, a plan, the state of this machine. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mixmo_core.config import flatten, leaves
from mixmo_core.metrics import METRICS
from orchestrator.lines import (
    BAD,
    BUSY,
    DONE,
    FAINT,
    STRONG,
    WARN,
    Column,
    Section,
    clock,
    duration,
    fields,
    fitted,
    joined,
    number,
    percent,
    plural,
    room,
    spanned,
    sparkline,
)
from orchestrator.population import copies_of
from orchestrator.progress import Progress
from orchestrator.rows import CONFIG_COLUMNS, EpochRow, TrialRow

if TYPE_CHECKING:
    from orchestrator.doctor import Check
    from orchestrator.plan import PlannedTrial
    from orchestrator.store import Fault
    from orchestrator.sweep import Sweep

_ALL = 10**6
_MARKS = {"good": ("✓", DONE), "note": ("·", WARN), "bad": ("✗", BAD)}
_STATES = {"TERMINATED": DONE, "RUNNING": BUSY, "ERROR": BAD}


def sweeps(listed: Sequence[tuple[str, Progress | None, datetime | None]], now: datetime, width: int) -> Text:
    """One line per sweep: (name, progress or None where it cannot be read, when it was last written)."""
    columns = (
        Column("", 0),
        Column("state", 9),
        Column("done", 13, "right", spare=3),
        Column("failed", 6, "right", spare=2),
        Column("last news", 9, "right", spare=1),
    )
    lines = [
        [
            Text(name, style=STRONG),
            ("cancelled" if state.all_cancelled else state.status) if state else Text("damaged", style=BAD),
            f"{state.done:,} of {state.total:,}" if state else "",
            Text(f"{state.failed:,}" if state and state.failed else "", style=BAD),
            clock(written, now) if written else "",
        ]
        for name, state, written in listed
    ]
    return joined(_fitting("Sweeps", columns, lines, min(width, 100) - 2))


_LEAST_NAME = 18
CELLS_SHOWN = 200
"""A page of more is read by nobody, and takes seconds to lay out."""


def _fitting(title: str, columns: Sequence[Column], lines: Sequence[Sequence[str | Text]], width: int) -> list[Text]:
    """A section whose names can be read: what may be left out goes first."""
    longest = max((len(line[i]) for line in lines for i, each in enumerate(columns) if not each.width), default=0)
    kept = fitted(width, columns, min(longest, _LEAST_NAME))
    narrow = [[line[i] for i in kept] for line in lines]
    return Section(title, STRONG, tuple(columns[i] for i in kept), narrow).draw(width, _ALL)


def checks(done: Sequence[Check]) -> Text:
    lines = []
    for check in done:
        mark, style = _MARKS[check.verdict]
        line = Text().append(f"{mark} ", style=style).append(f"{check.name:<14}", style=STRONG).append(check.found)
        lines.append(line.append(f" · {check.advice}", style=FAINT) if check.advice else line)
    return joined(lines)


def faults(found: Sequence[Fault]) -> Text:
    """Faults of one kind together, and once what to do about them."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in found:
        groups.setdefault((fault.kind, fault.advice), []).append(fault)
    lines = []
    for (kind, advice), members in groups.items():
        for fault in members:
            line = Text().append(f"✗ {kind:<12}", style=BAD)
            lines.append(
                line.append(f"{(fault.trial_id or '')[:7]:<9}", style=FAINT).append(" ".join(fault.text.split()))
            )
        lines.append(Text(f"  → {advice}", style=FAINT))
    return joined(lines)


# ------------------------------------------------------------------------------------------------------- one trial


def trial(rows: Sequence[TrialRow], epochs: Sequence[EpochRow], now: datetime, width: int, *, repeat: str) -> Text:
    """A trial, given by its row in each sweep that has it; the one with the highest order speaks for it.

    repeat is the command that trains it again; empty where it is not known.
    """
    row = max(rows, key=lambda each: each.order)
    inner = max(40, min(width, 100) - 2)
    state = Text(row.state.lower(), style=_STATES.get(row.state, FAINT))
    head = Text(row.trial_id, style=STRONG).append("  ").append_text(state)
    head.append(f"  epoch {row.epoch} of {row.epochs}" + (", stopped early" if row.stopped_early else ""))
    blocks = [
        [head],
        _pairs("What became of it", _fate(rows, row, now), inner),
        _pairs("Results of the last epoch", _metrics(row), inner),
        _curve(epochs, inner),
        _pairs("Settings", _settings(row), inner),
        _copies(row),
        _pairs("Where it ran", _origin(row), inner),
    ]
    if row.error:
        blocks.append([Text("Error", style=f"{STRONG} {BAD}"), *(Text(line) for line in row.error.splitlines())])
    if repeat and row.lineage is None:  # what others of its population reach cannot be repeated alone
        blocks.append([Text("Repeat it here, without Ray: ", style=FAINT).append(repeat)])
    lines = [line for block in blocks if block for line in [*block, Text()]]
    return joined(lines[:-1])


def _pairs(title: str, pairs: Mapping[str, Any], width: int) -> list[Text]:
    shown = {name: str(value) for name, value in pairs.items() if value not in (None, "")}
    longest = max((len(name) for name in shown), default=0)
    columns = (Column("", 1), Column("", longest), Column("", 0))
    lines = [fields(width, columns, ["", Text(name, style=FAINT), value]) for name, value in shown.items()]
    return [Text(title, style=STRONG), *lines] if lines else []


def _fate(rows: Sequence[TrialRow], row: TrialRow, now: datetime) -> dict[str, Any]:
    return {
        "sweeps": ", ".join(sorted({each.sweep for each in rows})),
        "label": row.label,
        "cause": row.error_cause,
        "attempts": row.attempts or None,
        "began": clock(row.started_at, now) if row.started_at else None,
        "last news": clock(row.updated_at, now) if row.updated_at else None,
        "training": duration(row.wall_s) if row.wall_s else None,
        "GPU-hours": f"{row.gpu_seconds / 3600:.3f}" if row.gpu_seconds else None,
        "images/s": f"{row.images_per_s:,.0f}" if row.images_per_s else None,
        "FLOPs": f"{row.train_flops:.3g}" if row.train_flops else None,
        "taken from": row.cached_from,
        "best": f"{percent(row.best_top1, 2)} in epoch {row.best_epoch}" if row.best_top1 is not None else None,
        "checkpoint": row.checkpoint,
    }


def _metrics(row: TrialRow) -> dict[str, Any]:
    shown = {}
    for metric in METRICS:
        value = row.metrics.get(metric.name)
        if value is not None:
            shown[metric.name] = percent(value, 2) if metric.unit == "fraction" else f"{value:.4g}"
    return shown


def _curve(epochs: Sequence[EpochRow], width: int) -> list[Text]:
    top1 = [value for each in epochs if (value := each.metrics.get("top1")) is not None]
    if len(top1) < 2:
        return []
    line = Text("top-1  ", style=FAINT).append(sparkline(top1, min(60, width - 30)), style=BUSY)
    return [line.append(f"  {percent(top1[0])} to {percent(top1[-1])}")]


def _settings(row: TrialRow) -> dict[str, Any]:
    """By dotted name; those without effect are left out, as they are null in the row."""
    names = {column: column.replace("_", ".", 1) for column in CONFIG_COLUMNS}
    shown = {names[column]: row.config.get(column) for column in CONFIG_COLUMNS}
    return {**shown, "workers": row.workers if row.workers > 1 else None}


def _copies(row: TrialRow) -> list[Text]:
    """Of a trial of a population: whom it was made a copy of, and what it changed."""
    told = [Text(f"  {copy}") for copy in copies_of(row)]
    return [Text("Since then a copy of", style=STRONG), *told] if told else []


def _origin(row: TrialRow) -> dict[str, Any]:
    dirty = " with local changes" if row.git_dirty else ""
    return {
        "hosts": row.hosts,
        "slots": f"{row.slots}, so up to {row.slots - 1} trials beside it" if row.slots > 1 else None,
        "device": row.device_name,
        "torch": row.torch_version,
        "ray": row.ray_version,
        "commit": f"{row.git_commit}{dirty}" if row.git_commit else None,
        "numerics": row.numerics,
    }


# ---------------------------------------------------------------------------------------------------------- a plan


def plan(summary: Mapping[str, Any], names: Mapping[str, str], width: int) -> Text:
    """What a run would do. `summary` is that of plan.Plan; `names` gives a name by cell id."""
    inner = min(width, 110) - 2
    seeds = summary["seeds"]
    spoken = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds[:8]))}{' ...' if len(seeds) > 8 else ''}"
    head = Text(summary["sweep"], style=STRONG)
    head.append(
        f"  {plural(summary['trials'], 'trial')} in {plural(summary['cells'], 'cell')}, {spoken}", style="not bold"
    )
    lines = [
        head,
        _verdict(summary),
        *_at_once(summary["at_once"]),
        *_cost(summary["cost"], inner),
        *_storage(summary["storage"]),
    ]
    columns = (Column("", 0), Column("weights", 11, "right", 2), Column("FLOPs a trial", 13, "right", 1),
               Column("trials", 6, "right", 4), Column("to run", 6, "right"), Column("", 18, spare=3))  # fmt: skip
    cells: list[list[str | Text]] = [
        [
            names[cell["cell_id"]],
            f"{cell['parameters']:,}",
            f"{cell['train_flops']:.2g}",
            f"{cell['trials']:,}",
            f"{sum(count for action, count in cell['actions'].items() if action in _TO_RUN):,}",
            Text(", ".join(f"{count:,} {action}" for action, count in cell["actions"].items()), style=FAINT),
        ]
        for cell in summary["by_cell"][:CELLS_SHOWN]
    ]
    lines += _fitting("Cells", columns, cells, inner)
    if len(summary["by_cell"]) > CELLS_SHOWN:
        more = plural(len(summary["by_cell"]) - CELLS_SHOWN, "more cell")
        lines.append(Text(f"and {more}; --json has all, --trials prints every trial", style=FAINT))
    gone: dict[str, list[str]] = {}
    for row in summary["by_removed"]:
        gone.setdefault(row["reason"], []).append(row["trial_id"])
    stale = {"of a result under older numerics, to run again": summary["stale"]} if summary["stale"] else {}
    for reason, ids in (gone | stale).items():
        shown = " ".join(each[:7] for each in ids[:6]) + (" ..." if len(ids) > 6 else "")
        told = textwrap.wrap(f"{plural(len(ids), 'trial')} {reason}: {shown}", inner, subsequent_indent="  ")
        lines += [Text(line, style=WARN) for line in told]
    for note in summary["notes"]:
        wrapped = textwrap.wrap(f"note: {note}", inner, subsequent_indent="      ", break_on_hyphens=False)
        lines += [Text(line, style=WARN) for line in wrapped]
    return joined(lines)


_TO_RUN = ("new", "resume", "retry", "stale")
_ACTIONS = {
    "new": "new", "resume": "to resume", "retry": "failed, to run again", "stale": "stale, to run again",
    "done": "done", "cached": "cached", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip


def _verdict(summary: Mapping[str, Any]) -> Text:
    actions = summary["actions"]
    runs = [f"{actions[name]:,} {_ACTIONS[name]}" for name in _TO_RUN if name in actions]
    rest = [f"{count:,} {_ACTIONS[name]}" for name, count in actions.items() if name not in _TO_RUN]
    line = Text("To run: ").append(f"{summary['to_run'] + summary['to_draw']:,}", style=f"{STRONG} {BUSY}")
    runs += [f"{summary['to_draw']:,} to be drawn"] if summary["to_draw"] else []
    line.append(f" ({', '.join(runs)})" if runs else ", nothing is missing")
    line.append(f" · {', '.join(rest)}" if rest else "", style=FAINT)
    epochs = plural(summary["epochs_to_run"], "epoch")
    flops = f" · {epochs}, {summary['train_flops_to_run']:.2g} FLOPs of training"
    return line.append(flops if summary["to_run"] else "", style=FAINT)


def _at_once(at_once: Mapping[str, Any]) -> list[Text]:
    """How many trials run at once, where a gang trains several."""
    gangs, slots = at_once["gangs"], at_once["slots"]
    if slots == 1:
        return []
    known = f"{at_once['trials']:,} trials" if gangs else f"{slots} trials a gang"
    how = f"{plural(gangs, 'gang')} x {slots} slots" if gangs else "as many gangs as fit"
    return [Text("At once: ").append(known, style=STRONG).append(f" ({how}, each of trials of one shape)", style=FAINT)]


def _cost(cost: Mapping[str, Any], width: int) -> list[Text]:
    """A line for each kind of device that has been timed, or why nothing can be told."""
    if cost["unknown"]:
        told = f"{cost['unknown']}; `mixmo calibrate FILE` does that on this machine, the first trials of a run do, too"
        return [Text("Cost: ").append("not known", style=STRONG), *_wrapped(told, width)]
    lines: list[Text] = []
    for device in cost["devices"]:
        line = Text("      " if lines else "Cost: ").append(_hours(device), style=STRONG)
        if device["money"]:
            line.append(f" · {device['money']['mean']:,.2f} {cost['currency']}")
        line.append(f" on {device['device_name']}")
        lines += [line, *_wrapped(f"{_lasts(device, cost['gangs'])}{_known(device)}", width)]
    return lines


def _wrapped(told: str, width: int) -> list[Text]:
    return [Text(f"      {each}", style=FAINT) for each in textwrap.wrap(told, width - 6)]


def _hours(device: Mapping[str, Any]) -> str:
    kind = "GPU-hours" if device["gpu_hours"] else "core-hours"
    hours = device["gpu_hours"] or device["core_hours"]
    return spanned(hours, f"{number(hours['mean'])} {kind}")


def _lasts(device: Mapping[str, Any], gangs: int | None) -> str:
    if gangs is None:
        one, *others = device["elapsed_by_gangs"].items()
        told = ", ".join(f"{duration(each['mean'])} in {count} gangs" for count, each in others)
        return f"{spanned(one[1], duration(one[1]['mean']))} in one gang, {told}; --gangs N tells for N"
    elapsed = device["elapsed_s"]
    return f"{spanned(elapsed, duration(elapsed['mean']))} from begin to end in {plural(gangs, 'gang')}"


def _known(device: Mapping[str, Any]) -> str:
    """How the estimate came about, where that is not by timing each shape itself."""
    told = ""
    if device["measured"] < device["shapes"]:
        told = f"; {device['measured']} of {plural(device['shapes'], 'shape')} timed, the others by their FLOPs"
    if device["training_s"]["low"] is None:
        told += "; how far off that may be, nothing measured tells"
    return told


def _storage(storage: Mapping[str, Any]) -> list[Text]:
    line = Text("Storage: ").append(room(storage["end"]), style=STRONG).append(" at the end")
    kinds = ", ".join(f"{name} {room(storage[name])}" for name in ("checkpoints", "logits", "tables") if storage[name])
    lines = [line.append(f" ({kinds})", style=FAINT)]
    if storage["per_running_trial"]:
        most = f", so at most {room(storage['peak'])}" if storage["peak"] is not None else ""
        more = f"         {room(storage['per_running_trial'])} more for each trial while it runs{most}"
        lines.append(Text(more, style=FAINT))
    return lines


def planned_trials(items: Sequence[PlannedTrial], names: Mapping[str, str], width: int) -> Text:
    """One line per trial, beginning with its index for `mixmo train --index`."""
    columns = (Column("", 6, "right"), Column("", 12), Column("", 0), Column("seed", 4, "right"),
               Column("", 9), Column("", 30, spare=1))  # fmt: skip
    lines: list[list[str | Text]] = [
        [
            str(index),
            item.trial.trial_id,
            names[item.trial.cell_id],
            str(item.trial.config.seed),
            Text(item.action, style=BUSY if item.runs else FAINT),
            Text(item.reason, style=FAINT),
        ]
        for index, item in enumerate(items)
    ]
    return joined(_fitting("Trials", columns, lines, max(60, min(width, 130) - 2)))


def settings(sweep: Sweep, width: int) -> Text:
    """Every setting of a sweep's trials: its value, where it comes from, what it means."""
    common = flatten(sweep.examples[0].config)
    lines = []
    for name, spec in leaves():
        value = common[name] if sweep.origins.get(name) != "varies" else Text("varies", style=BUSY)
        shown = (
            value if isinstance(value, Text) else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        )
        place = sweep.origins.get(name, "").replace(f"{sweep.source}:", "line ")
        origin = Text("" if place == "varies" else place, style=FAINT)
        lines.append([name, shown, origin, Text(spec.metadata["setting"].meaning, style=FAINT)])
    columns = (Column("", 23), Column("value", 12), Column("from", 12), Column("", 0))
    return joined(Section("Settings", STRONG, columns, lines).draw(max(60, width - 2), _ALL))
