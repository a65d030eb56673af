"""A sweep in plain lines, where there is no terminal: one for each change. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from orchestrator import progress
from orchestrator.lines import clock, duration, percent
from orchestrator.population import copies_of
from orchestrator.rows import TrialRow
from orchestrator.screen.panes import in_one_line

if TYPE_CHECKING:
    from orchestrator.store import Snapshot


def changes(before: Snapshot, after: Snapshot, now: datetime) -> list[str]:
    """One line for every trial that began, ended or was given back since `before`."""
    old = {row.trial_id: row for row in before.rows}
    names = progress.cell_names(after.rows)
    lines = []
    for row in sorted(after.rows, key=lambda row: (row.seq, row.position)):
        said = _change(old.get(row.trial_id), row)
        if said:
            name = f"{names[row.cell_id]}, seed {row.config.get('seed')}"
            lines.append(f"{clock(now, now)}  {row.trial_id[:7]}  {said[0]:<9} {name}{said[1]}")
    return lines


def _change(before: TrialRow | None, row: TrialRow) -> tuple[str, str] | None:
    """What has become of a trial: a verb, and what else there is to say."""
    if before and (before.state, before.attempts) == (row.state, row.attempts):
        return None
    seen = before.state if before else "PENDING"
    again = f" · attempt {row.attempts}" if row.attempts > 1 else ""
    top1 = f" · top-1 {percent(row.metrics.get('top1'))}"
    if row.state == "RUNNING":
        return "started", again + (f" · from epoch {row.epoch}" if row.epoch else "")
    if row.state == "PENDING" and (copy := next(iter(copies_of(row)[-1:]), None)) and row.checkpoint == copy.checkpoint:
        return "exploited", f" · {copy}"
    if row.state == "TERMINATED" and row.cached_from is not None:
        return "cached", f"{top1} · from {row.cached_from}"
    if row.state == "TERMINATED" and row.stopped_early:
        return "stopped", f"{top1} · epoch {row.epoch} of {row.epochs}"
    return {
        "TERMINATED": ("finished", f"{top1} · {duration(row.wall_s)}"),
        "ERROR": ("failed", f" · {row.error_cause or 'no cause was recorded'}"),
        "CANCELLED": ("cancelled", ""),
        "PAUSED": ("paused", ""),
        "PENDING": ("given back", "") if seen != "PENDING" else None,
    }[row.state]


def counts(snapshot: Snapshot, now: datetime, *, driven: bool | None = True) -> str:
    """The header in one plain line."""
    state = progress.measure(snapshot, now, driven=driven)
    return f"{clock(now, now)}  {in_one_line(state, snapshot.header.paused_by)}"
