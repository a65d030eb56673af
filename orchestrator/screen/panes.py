"""The panes of a screen: its header, the trials, the results, the failures, the events. Pure: a scene in, lines out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text

from orchestrator import progress
from orchestrator.lines import (
    BAD,
    BUSY,
    DONE,
    FAINT,
    STRONG,
    WARN,
    Column,
    Lazy,
    Section,
    bar,
    clock,
    duration,
    ends,
    number,
    percent,
    spanned,
    sparkline,
)
from orchestrator.progress import Cell, Progress
from orchestrator.rows import TrialRow
from orchestrator.screen.scene import Scene

if TYPE_CHECKING:
    from orchestrator.store import Event

WIDE = 110
"""From this many columns on, results stand beside failures and events."""
NOTES = 40
"""The fewest columns of the latter."""
MARKS = {
    "RUNNING": ("●", BUSY), "PAUSED": ("‖", WARN), "ERROR": ("✗", BAD), "PENDING": ("○", FAINT),
    "TERMINATED": ("✓", DONE), "CANCELLED": ("◦", WARN),
}  # fmt: skip


def titled(title: str, focused: bool) -> str:
    return f"▸ {title}" if focused else title


# ----------------------------------------------------------------------------------------------------- the header


_STATUS: dict[progress.Status, tuple[str, str]] = {
    "starting": ("○ starting", FAINT),
    "running": ("● running", BUSY),
    "pausing": ("‖ pausing", WARN),
    "paused": ("‖ paused", WARN),
    "stopping": ("◦ stopping", WARN),
    "finished": ("✓ finished", DONE),
    "stopped": ("◦ stopped before its end", WARN),
    "quiet": ("◌ no news since", WARN),
}


def header(scene: Scene, now: datetime, width: int, *, tall: bool = True) -> list[Text]:
    """Three lines: name and state; how far; counts, and what is left. `tall` has a fourth: the pace and the cost."""
    snapshot, state = scene.snapshot, scene.progress
    news = scene.news or snapshot.header.written_at or now
    word, style = _status(state, snapshot.header.paused_by)
    status = Text(word, style=style).append(f"  {clock(news, now)}", style=FAINT)
    name = Text(snapshot.rows[0].sweep if snapshot.rows else "(no trials)", style=STRONG)
    name.truncate(max(8, width - status.cell_len - 2), overflow="ellipsis")
    share = f"{int(100 * state.fraction + 1e-9):>4} %"
    failed = state.failed + state.cancelled
    partial = state.fraction * state.total - state.done - failed
    queued = state.total * (1 - state.fraction)
    stretches = [(state.done, "━", DONE), (failed, "━", BAD), (partial, "╍", BUSY), (queued, "─", FAINT)]
    drawn = bar(stretches, width - len(share)).append(share, style=STRONG)
    counts, band = counted(state), left(state)
    fits = counts.cell_len + 2 + len(band) <= width
    lines = [ends(name, status, width), drawn, ends(counts, _faint([band if fits else left(state, band=False)]), width)]
    pace = [*_pace(state), *([band.partition("(")[2].rstrip(")")] if band and not fits else [])]
    return [*lines, *_paid(pace, _faint(_spent(scene)), width)] if tall else lines


def _paid(pace: Sequence[str], spent: Text, width: int) -> list[Text]:
    """The pace and the cost in one line, or in none. Of the pace there is as much as leaves room for the cost."""
    fitting = next(
        (pace[:count] for count in range(len(pace), 0, -1) if _faint(pace[:count]).cell_len + 2 + len(spent) <= width),
        pace if not spent else (),
    )
    if not fitting and spent:
        spent.truncate(width, overflow="ellipsis")
        return [spent]
    return [ends(_faint(fitting), spent, width)] if fitting else []


def _status(state: Progress, paused_by: str | None) -> tuple[str, str]:
    """A mark and some words, and their style."""
    if state.status == "finished" and state.failed:
        return f"✗ finished, {state.failed} failed", BAD
    if state.all_cancelled:
        return "✗ all cancelled", WARN
    word, style = _STATUS[state.status]
    return f"{word} by {paused_by}" if state.status in ("pausing", "paused") and paused_by else word, style


def _faint(parts: Sequence[str]) -> Text:
    return Text(" · ".join(parts), style=FAINT)


def counted(state: Progress) -> Text:
    line = Text()
    for count, word, style in (
        (state.done, "done", DONE),
        (state.running, "to resume" if state.status == "stopped" else "running", BUSY),
        (state.queued, "queued", FAINT),
        (state.paused, "paused", WARN),
        (state.failed, "failed", BAD),
        (state.cancelled, "cancelled", WARN),
    ):
        if count or word == "done":
            line.append("  " if line.plain else "").append(f"{count:,}", style=f"{STRONG} {style}").append(f" {word}")
        aside = [(state.cached, "cached"), (state.stopped_early, "stopped early")] if word == "done" else []
        if word == "running" and state.slots > 1:
            aside = [(state.slots, "slots a gang")]
        if told := ", ".join(f"{part:,} {how}" for part, how in aside if part):
            line.append(f" ({told})", style=FAINT)
    return line


def left(state: Progress, *, band: bool = True) -> str:
    """The time that is left, and between what it lies; or the time that it took."""
    if state.status in ("finished", "stopped"):
        return f"took {duration(state.elapsed_s)}" if state.elapsed_s else ""
    if state.eta_s is None:
        return ""
    low, likely, high = (duration(each or 0.0) for each in (state.eta_low_s, state.eta_s, state.eta_high_s))
    return f"{likely} left" + (f" ({low} to {high})" if band and low != high else "")


def _pace(state: Progress) -> list[str]:
    parts = []
    if state.trials_per_hour:
        parts.append(f"{state.trials_per_hour:,.{0 if state.trials_per_hour >= 10 else 1}f} trials/h")
    if state.images_per_s:
        parts.append(f"{state.images_per_s:,.0f} images/s")
    return parts


def _spent(scene: Scene) -> list[str]:
    """Hours, GPU-hours and money, each against what there is."""
    terms, hours = scene.terms, scene.progress.gpu_seconds / 3600
    parts = []
    if terms.hours is not None:
        parts.append(f"{number(scene.progress.training_s / 3600)} of {terms.hours:,g} hours of training")
    if hours >= 0.01 or terms.gpu_hours is not None:
        parts.append(
            f"{hours:,.1f}" + (f" of {terms.gpu_hours:,g}" if terms.gpu_hours is not None else "") + " GPU-hours"
        )
    cost, most = terms.cost(scene.progress.gpu_seconds), terms.most
    if cost is not None:
        parts.append(f"{cost:,.2f}" + (f" of {most:,.2f}" if most is not None else "") + f" {terms.currency}")
    return parts


def predicted(state: Progress) -> list[Text]:
    """What the sweep was to take, against what it took."""
    told = state.predicted
    if told is None:
        return []
    gpus, unit = (told.gpus, "GPU-hours") if told.gpus else (1.0, "hours of training")
    hours, taken = told.seconds.times(gpus / 3600), state.training_s * gpus / 3600
    line = Text(f"predicted {spanned(asdict(hours), f'{number(hours.mean)} {unit}')}", style=FAINT)
    line.append(f" on {told.device_name}, {'took' if state.status == 'finished' else 'so far'} ")
    return [line.append(number(taken), style=f"not dim {STRONG}")]


def in_one_line(state: Progress, paused_by: str | None) -> str:
    """The header in one plain line, without its moment."""
    word = _status(state, paused_by)[0].partition(" ")[2]
    return " · ".join([word, f"{counted(state).plain} of {state.total:,}", *filter(None, [*_pace(state), left(state)])])


# ---------------------------------------------------------------------------------------------------- the trials


def trials(scene: Scene, ids: Sequence[str], width: int, title: str, *, marked: str | None, states: bool) -> Section:
    """One line for each of these trials. `states`: with a mark for what has become of it."""
    shown = _shown(width)
    columns = tuple(column for name, column in _COLUMNS if name in shown and (name != "state" or states))

    def line(i: int) -> list[str | Text]:
        row = scene.rows[ids[i]]
        made = _line(scene, row, shown)
        return [made[name] for name, _ in _COLUMNS if name in shown and (name != "state" or states)]

    at = ids.index(marked) if marked is not None and marked in ids else None
    return Section(title, f"{STRONG} {BUSY}", columns, Lazy(len(ids), line), least=4, marked=at)


_COLUMNS: list[tuple[str, Column]] = [
    ("state", Column("", 1)), ("id", Column("", 7)), ("name", Column("", 0)), ("seed", Column("seed", 4, "right")),
    ("bar", Column("", 10)), ("epoch", Column("epoch", 7, "right")), ("top1", Column("top-1", 7, "right")),
    ("curve", Column("", 12)), ("long curve", Column("", 24)), ("speed", Column("images/s", 8, "right")),
    ("node", Column("node", 10)), ("device", Column("device", 12)), ("attempts", Column("attempt", 7, "right")),
]  # fmt: skip
_FROM = {"bar": 76, "curve": 70, "speed": 100, "node": 104, "device": 134, "attempts": 160, "long curve": 190}
"""Columns that need a width."""


def _shown(width: int) -> set[str]:
    shown = {name for name, _ in _COLUMNS if width >= _FROM.get(name, 0)}
    return shown - {"curve"} if "long curve" in shown else shown


def _line(scene: Scene, row: TrialRow, shown: set[str]) -> dict[str, str | Text]:
    top1 = scene.curve(row.trial_id)
    mark, style = MARKS[row.state]
    share = min(1.0, row.epoch / max(1, row.epochs))
    last = top1[-1] if top1 and row.state == "RUNNING" else row.metrics.get("top1")
    return {
        "state": Text(mark, style=style),
        "id": short(row.trial_id),
        "name": scene.names[row.cell_id],
        "seed": str(row.config.get("seed", "")),
        "bar": bar([(share, "━", style), (1 - share, "─", FAINT)], 10) if "bar" in shown else "",
        "epoch": f"{row.epoch}/{row.epochs}",
        "top1": percent(last),
        "curve": Text(sparkline(top1, 12), style=BUSY) if "curve" in shown else "",
        "long curve": Text(sparkline(top1, 24), style=BUSY) if "long curve" in shown else "",
        "speed": f"{row.images_per_s:,.0f}" if row.images_per_s else "",
        "node": (row.hosts or "").replace(" ", ","),
        "device": (row.device_name or "").removeprefix("NVIDIA "),
        "attempts": str(row.attempts) if row.attempts else "",
    }


def short(trial_id: str) -> Text:
    """Seven digits are enough for `mixmo show`."""
    return Text(trial_id[:7], style=FAINT)


# ------------------------------------------------------------------------------------- results, failures, events


def results(scene: Scene, width: int, focused: bool = False, marked: str | None = None) -> Section:
    """The cells with a finished trial, best first."""
    ended = scene.results
    longest = max((len(cell.name) for cell in ended), default=0)
    strip = min(40, width - longest - 29)
    if strip < 9:
        strip = 0
    columns = [Column("", 0)]
    columns += [Column("", strip)] if strip else []
    columns += [Column("top-1 %", 7, "right"), Column("", 6), Column("n", 6, "right")]

    def line(i: int) -> list[str | Text]:
        cell = ended[i]
        spread = f"± {100 * cell.std:.2f}" if cell.std is not None else ""
        strips: list[str | Text] = [_interval(cell, *scene.scale, strip)] if strip else []
        mean = Text(f"{100 * cell.mean:.2f}", style=STRONG)
        return [cell.name, *strips, mean, spread, f"{len(cell.top1)}/{cell.planned}"]

    at = next((i for i, cell in enumerate(ended) if cell.cell_id == marked), None)
    lines = Lazy(len(ended), line)
    return Section(titled("Results", focused), f"{STRONG} {DONE}", tuple(columns), lines, least=3, marked=at)


def _interval(cell: Cell, low: float, high: float, width: int) -> Text:
    """Mean and deviation on a scale that all cells share."""

    def at(value: float) -> int:
        return round((width - 1) * (value - low) / (high - low)) if high > low else width // 2

    strip = ["·"] * width
    for i in range(at(cell.mean - (cell.std or 0)), at(cell.mean + (cell.std or 0)) + 1):
        strip[i] = "━"
    strip[at(cell.mean)] = "●"
    line = Text("".join(strip), style=DONE)
    line.highlight_regex("·+", FAINT)
    return line


def failures(scene: Scene, width: int, focused: bool = False, marked: str | None = None) -> Section:
    """Failed trials by what failed."""
    room = 2 if width < 70 else 4
    lines: list[list[str | Text]] = []
    for cause in scene.failures:
        ids = " ".join(row.trial_id[:7] for row in cause.rows[:room])
        lines.append([Text(f"{len(cause.rows):,} ×", style=BAD), cause.name, Text(ids, style=FAINT)])
    columns = (Column("", 7, "right"), Column("", 0), Column("trials", 8 * room - 1))
    at = next((i for i, cause in enumerate(scene.failures) if cause.key == marked), None)
    return Section(titled("Causes of failure", focused), f"{STRONG} {BAD}", columns, lines, least=2, marked=at)


_KINDS = {
    "running": "started", "terminated": "finished", "error": "failed", "pending": "given back", "withdrawn": "cached",
    "stop_now": "stop now",
}  # fmt: skip
"""Kinds of events, as what has happened."""


def events(scene: Scene, now: datetime, focused: bool = False, marked: str | None = None) -> Section:
    """What happened, the newest first."""
    told = scene.events()
    lines = Lazy(len(told), lambda i: _told(scene, told[i], now))
    at = scene.keys("events").index(marked) if marked is not None else None
    columns = (Column("", 8), Column("", 7), Column("", 0))
    return Section(titled("Events", focused), STRONG, columns, lines, least=2, marked=at)


def _told(scene: Scene, event: Event, now: datetime) -> list[str | Text]:
    kind, trial_id = _KINDS.get(event.kind, event.kind), event.trial_id or ""
    spoken = scene.name(trial_id) if trial_id in scene.rows else None
    parts = dict.fromkeys([kind, event.cause, spoken, event.text])
    said = " · ".join(" ".join(part.split()) for part in parts if part)
    return [Text(clock(event.time, now), style=FAINT), short(trial_id), said]
