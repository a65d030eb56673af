"""What a sweep looks like: the screen that `run` and `watch` keep up to date, and the plain lines where there is none.

`render` is pure: rows in, one frame out that never exceeds its size. All that it shows comes from the store, so a
broken screen can hurt no sweep.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.text import Text

from orchestrator import progress
from orchestrator.errors import ExitCode, UnreachableError
from orchestrator.lines import (
    BAD,
    BUSY,
    DONE,
    FAINT,
    STRONG,
    WARN,
    Column,
    Section,
    bar,
    beside,
    clock,
    duration,
    ends,
    joined,
    number,
    percent,
    spanned,
    sparkline,
    stack,
)
from orchestrator.progress import Cell, Progress
from orchestrator.rows import TrialRow

if TYPE_CHECKING:
    from rich.live import Live

    from orchestrator.store import ResultStore, Snapshot

WIDE = 110
"""From this many columns on, results stand beside failures and events."""


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


def _header(snapshot: Snapshot, state: Progress, now: datetime, width: int) -> list[Text]:
    news = max((row.updated_at for row in snapshot.rows if row.updated_at), default=snapshot.header.written_at or now)
    word, style = _STATUS[state.status]
    if state.status == "finished" and state.failed:
        word, style = f"✗ finished, {state.failed} failed", BAD
    elif state.all_cancelled:
        word, style = "✗ all cancelled", WARN
    if state.status in ("pausing", "paused"):
        word = f"{word} by {snapshot.header.paused_by}"
    status = Text(word, style=style).append(f"  {clock(news, now)}", style=FAINT)
    name = Text(snapshot.rows[0].sweep if snapshot.rows else "(no trials)", style=STRONG)
    name.truncate(max(8, width - status.cell_len - 2), overflow="ellipsis")
    share = f"{int(100 * state.fraction + 1e-9):>4} %"
    failed = state.failed + state.cancelled
    partial = state.fraction * state.total - state.done - failed
    queued = state.total * (1 - state.fraction)
    stretches = [(state.done, "━", DONE), (failed, "━", BAD), (partial, "╍", BUSY), (queued, "─", FAINT)]
    drawn = bar(stretches, width - len(share)).append(share, style=STRONG)
    return [ends(name, status, width), drawn, ends(_counts(state), _pace(state, width), width)]


def _counts(state: Progress) -> Text:
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
        if told := ", ".join(f"{part:,} {how}" for part, how in aside if part):
            line.append(f" ({told})", style=FAINT)
    return line


def _pace(state: Progress, width: int) -> Text:
    """What there is room for: the time left first, then the pace, then what it has cost."""
    parts = []
    if state.gpu_seconds >= 36 and width >= WIDE:
        parts.append(f"{state.gpu_seconds / 3600:,.1f} GPU-hours")
    if state.images_per_s and width >= WIDE:
        parts.append(f"{state.images_per_s:,.0f} images/s")
    if state.trials_per_hour and width >= 76:
        parts.append(f"{state.trials_per_hour:,.{0 if state.trials_per_hour >= 10 else 1}f} trials/h")
    if state.status in ("finished", "stopped"):
        parts += [f"took {duration(state.elapsed_s)}"] if state.elapsed_s else []
    elif state.eta_s is not None:
        parts.append(f"{duration(state.eta_s)} left")
    return Text(" · ".join(parts), style=FAINT)


def _predicted(state: Progress) -> list[Text]:
    """What the sweep was to take, against what it took."""
    told = state.predicted
    if told is None:
        return []
    gpus, unit = (told.gpus, "GPU-hours") if told.gpus else (1.0, "hours of training")
    hours, taken = told.seconds.times(gpus / 3600), state.training_s * gpus / 3600
    line = Text(f"predicted {spanned(asdict(hours), f'{number(hours.mean)} {unit}')}", style=FAINT)
    line.append(f" on {told.device_name}, {'took' if state.status == 'finished' else 'so far'} ")
    return [line.append(number(taken), style=f"not dim {STRONG}")]


# -------------------------------------------------------------------------------------------------- the sections


def _running(snapshot: Snapshot, names: Mapping[str, str], width: int, driven: bool | None) -> Section:
    curves: dict[str, list[float]] = defaultdict(list)
    for epoch in sorted(snapshot.live, key=lambda row: row.epoch):
        top1 = epoch.metrics.get("top1")
        if top1 is not None:
            curves[epoch.trial_id].append(top1)
    stretch = 0 if width < 76 else 10 if width < 150 else 20
    curve = 0 if width < 70 else 12 if width < 150 else 24
    columns = [Column("", 7), Column("", 0), Column("seed", 4, "right")]
    columns += [Column("", stretch)] if stretch else []
    columns += [Column("epoch", 7, "right"), Column("top-1", 7, "right")]
    columns += [Column("", curve)] if curve else []
    columns += [Column("images/s", 8, "right"), Column("attempt", 7, "right")] if width >= 100 else []
    resting = driven is False or snapshot.header.paused_by
    shown = ("RUNNING", "PAUSED") if resting else ("RUNNING",)
    busy = sorted((row for row in snapshot.rows if row.state in shown), key=lambda row: row.position)
    lines = [
        _running_line(row, names[row.cell_id], curves[row.trial_id], stretch, curve)[: len(columns)] for row in busy
    ]
    going = any(row.state == "RUNNING" for row in busy)
    title = "To resume" if driven is False else ("Pausing" if going else "Paused") if resting else "Running"
    return Section(title, f"{STRONG} {BUSY}", tuple(columns), lines, least=4)


def _running_line(row: TrialRow, name: str, top1: Sequence[float], stretch: int, curve: int) -> list[str | Text]:
    share = min(1.0, row.epoch / max(1, row.epochs))
    line: list[str | Text] = [_id(row.trial_id), name, str(row.config.get("seed", ""))]
    line += [bar([(share, "━", BUSY), (1 - share, "─", FAINT)], stretch)] if stretch else []
    line += [f"{row.epoch}/{row.epochs}", percent(top1[-1] if top1 else row.metrics.get("top1"))]
    line += [Text(sparkline(top1, curve), style=BUSY)] if curve else []
    line += [f"{row.images_per_s:,.0f}" if row.images_per_s else "", str(row.attempts)]
    return line


def _results(rows: Sequence[TrialRow], names: Mapping[str, str], width: int) -> Section:
    ended = progress.results(rows, names)
    longest = max((len(cell.name) for cell in ended), default=0)
    strip = min(40, width - longest - 29)
    if strip < 9:
        strip = 0
    low = min((cell.mean - (cell.std or 0) for cell in ended), default=0.0)
    high = max((cell.mean + (cell.std or 0) for cell in ended), default=0.0)
    columns = [Column("", 0)]
    columns += [Column("", strip)] if strip else []
    columns += [Column("top-1 %", 7, "right"), Column("", 6), Column("n", 6, "right")]
    lines = []
    for cell in ended:
        line: list[str | Text] = [cell.name]
        line += [_interval(cell, low, high, strip)] if strip else []
        spread = f"± {100 * cell.std:.2f}" if cell.std is not None else ""
        line += [Text(f"{100 * cell.mean:.2f}", style=STRONG), spread, f"{len(cell.top1)}/{cell.planned}"]
        lines.append(line)
    return Section("Results", f"{STRONG} {DONE}", tuple(columns), lines, least=3)


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


def _failures(rows: Sequence[TrialRow], width: int) -> Section:
    room = 2 if width < 70 else 4
    lines: list[list[str | Text]] = []
    for cause, failed in progress.failures(rows):
        ids = " ".join(row.trial_id[:7] for row in failed[:room])
        lines.append([Text(f"{len(failed)} ×", style=BAD), cause, Text(ids, style=FAINT)])
    columns = (Column("", 5, "right"), Column("", 0), Column("trials", 8 * room - 1))
    return Section("Causes of failure", f"{STRONG} {BAD}", columns, lines, least=2)


_KINDS = {
    "running": "started", "terminated": "finished", "error": "failed", "pending": "given back", "withdrawn": "cached",
    "stop_now": "stop now",
}  # fmt: skip
"""Kinds of events, as what has happened."""


def _events(snapshot: Snapshot, names: Mapping[str, str], now: datetime) -> Section:
    spoken = {row.trial_id: f"{names[row.cell_id]}, seed {row.config.get('seed')}" for row in snapshot.rows}
    lines: list[list[str | Text]] = []
    for event in reversed(snapshot.events):
        kind, trial_id = _KINDS.get(event.kind, event.kind), event.trial_id or ""
        parts = dict.fromkeys([kind, event.cause, spoken.get(trial_id), event.text])
        said = " · ".join(" ".join(part.split()) for part in parts if part)
        lines.append([Text(clock(event.time, now), style=FAINT), _id(trial_id), said])
    return Section("Events", STRONG, (Column("", 8), Column("", 7), Column("", 0)), lines, least=2)


def _id(trial_id: str) -> Text:
    """Seven digits are enough for `mixmo show`."""
    return Text(trial_id[:7], style=FAINT)


# ----------------------------------------------------------------------------------------------------- the frame


def render(snapshot: Snapshot, now: datetime, size: tuple[int, int], *, driven: bool | None = True) -> Text:
    """One frame of at most `size` = (columns, lines). Times are shown in the time zone of `now`.

    `driven`: whether a driver holds the sweep; None where that cannot be told.
    """
    width, height = max(10, size[0] - 2), max(1, size[1])
    names = progress.cell_names(snapshot.rows)
    lines = _header(snapshot, progress.measure(snapshot, now, driven=driven), now, width)
    half = (width - 3) // 2 if width >= WIDE else width
    running, results = _running(snapshot, names, width, driven), _results(snapshot.rows, names, half)
    notes = [_failures(snapshot.rows, half), _events(snapshot, names, now)]
    room = height - len(lines)
    if width >= WIDE:
        body = stack([running], width, room - 1 - min(len(results.lines), room // 2))
        left = stack([results], half, room - len(body))
        lines += body + beside(left, stack(notes, half, room - len(body)), half)
    else:
        lines += stack([running, results, *notes], width, room)
    return joined(lines[:height], size[0])


def summary(snapshot: Snapshot, now: datetime, width: int, *, driven: bool | None = True) -> Text:
    """Everything but the events, as long as it is: what stays in the terminal when the screen is gone."""
    names = progress.cell_names(snapshot.rows)
    inner = max(10, min(width, 120) - 2)
    sections = [
        _running(snapshot, names, inner, driven),
        _results(snapshot.rows, names, inner),
        _failures(snapshot.rows, inner),
    ]
    state = progress.measure(snapshot, now, driven=driven)
    header = [*_header(snapshot, state, now, inner), *_predicted(state)]
    return joined([*header, *stack(sections, inner, 10**6)])


# --------------------------------------------------------------------------------------------------- plain lines


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
    pace = _pace(state, WIDE).plain
    return f"{clock(now, now)}  {_counts(state).plain} of {state.total:,}{' · ' if pace else ''}{pace}"


# ------------------------------------------------------------------------------------------------------ the screen


class Screen:
    """Shows the snapshots that it is given: a frame on a terminal, one plain line for each change elsewhere.

    The frame is redrawn when it differs from the last one, and seldom enough to cost under a twentieth of the time.
    When it ends, a summary stays behind.
    """

    def __init__(
        self,
        console: Console,
        *,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        say_every_s: int = 60,
    ) -> None:
        self._console = console
        self._now = now
        self._say_every = timedelta(seconds=say_every_s)
        self._live: Live | None = None
        self._draws = console.is_terminal and not console.is_dumb_terminal
        self._frame: Text | None = None
        self._shown: Snapshot | None = None
        self._driven: bool | None = True
        self._said_at: datetime | None = None
        self._rest_until = 0.0
        self._notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            for note in self._notes:
                self._print(note)
        if self._shown:
            self._console.print(summary(self._shown, self._now(), self._console.width, driven=self._driven))

    def ended(self) -> None:
        """The driver has let go of the sweep: the summary says `stopped` if anything is left."""
        self._driven = False

    def show(self, snapshot: Snapshot, *, driven: bool | None = True) -> None:
        if self._draws:
            self._draw(snapshot, driven)
        else:
            self._say(snapshot, driven)
        self._shown, self._driven = snapshot, driven

    def say(self, text: str) -> None:
        """A line for people: at the foot of the screen until the next one, and kept for when the screen is gone."""
        if not self._live:
            self._print(text)
            return
        self._notes = [*self._notes[-19:], text]
        self._rest_until = 0.0
        if self._shown:
            self._draw(self._shown, self._driven)

    def _draw(self, snapshot: Snapshot, driven: bool | None) -> None:
        began = time.monotonic()
        if began < self._rest_until:
            return
        if self._live is None:  # not before there is something to see
            from rich.live import Live

            self._live = Live(Text(), console=self._console, screen=True, auto_refresh=False)
            self._live.start()
        width, height = self._console.size
        frame = render(snapshot, self._now(), (width, height - bool(self._notes)), driven=driven)
        if self._notes:
            frame.append("\n" * (height - 1 - frame.plain.count("\n")))
            frame.append(f" {self._notes[-1]}"[:width], style=WARN)
        if frame != self._frame:
            self._live.update(frame, refresh=True)
            self._frame = frame
        self._rest_until = began + 20 * (time.monotonic() - began)

    def _say(self, snapshot: Snapshot, driven: bool | None) -> None:
        now = self._now()
        lines = changes(self._shown, snapshot, now) if self._shown else []
        if self._said_at is None or now - self._said_at >= self._say_every:
            lines.append(counts(snapshot, now, driven=driven))
            self._said_at = now
        for line in lines:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def watch(store: ResultStore, sweep: str, console: Console, *, once: bool = False, every_s: float = 1.0) -> ExitCode:
    """Shows a sweep until it ends; `once` shows one frame. A store that is away for a while is waited for.

    Raises NotFoundError or UnreachableError if the sweep cannot be read at the beginning.
    """
    snapshot = store.snapshot(sweep)
    if once:
        now = datetime.now().astimezone()
        console.print(render(snapshot, now, console.size, driven=progress.driven(store, sweep)))
        return ExitCode.OK
    with Screen(console) as screen:
        while True:
            began = time.monotonic()
            held: bool | None = None
            with contextlib.suppress(UnreachableError):
                snapshot = store.snapshot(sweep)
                held = progress.driven(store, sweep)
            screen.show(snapshot, driven=held)
            state = progress.measure(snapshot, datetime.now().astimezone())
            if state.status == "finished":
                return ExitCode.FAULTS if state.failed else ExitCode.OK
            time.sleep(max(every_s, 20 * (time.monotonic() - began)))
