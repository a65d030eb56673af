"""One frame of the screen, from a scene and a state: never larger than its size. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text

from orchestrator import pages
from orchestrator.lines import BUSY, FAINT, STRONG, WARN, Section, beside, chart, ends, joined, percent, stack
from orchestrator.screen import grid, panes
from orchestrator.screen.panes import MARKS, WIDE, titled
from orchestrator.screen.scene import PANES, Pane, Scene, Terms
from orchestrator.screen.state import PAGES, State, choice, roams

if TYPE_CHECKING:
    from orchestrator.rows import EpochRow
    from orchestrator.store import Snapshot

LEAST = (80, 24)
"""Below this there is no grid and no second line of figures: counts, what runs, what happened."""
LEAST_HINTED = 10
"""So many lines high, a frame spares one for what can be pressed."""
LONGEST = 200
"""Lines of what stays in the terminal: each list says how many more there are, and `table` and `show` have them all."""


@dataclass(frozen=True, slots=True)
class Details:
    """What was read for the pages of one trial, as far as it was asked for."""

    trial_id: str
    repeat: str = ""
    """The command that trains it again."""
    epochs: Sequence[EpochRow] | None = None
    log: str | None = None
    fault: str = ""
    """Why something could not be read."""


def render(
    scene: Scene, now: datetime, size: tuple[int, int], state: State | None = None, details: Details | None = None
) -> Text:
    """One frame of at most `size` = (columns, lines). Times are shown in the time zone of `now`.

    Without a state nobody is at the keys: there are no hints, and nothing is marked.
    """
    return joined(drawn(scene, now, size, state, details), size[0])


def drawn(
    scene: Scene, now: datetime, size: tuple[int, int], state: State | None = None, details: Details | None = None
) -> list[Text]:
    """The lines of a frame, without their margin."""
    width, height = max(10, size[0] - 2), max(1, size[1])
    small = size[0] < LEAST[0] or size[1] < LEAST[1]
    foot = _foot(scene, state, width, hints=height >= LEAST_HINTED) if state else None
    room = height - (foot is not None)
    if state and state.help:
        lines = _help(width, room)
    elif state and state.opened and state.opened in scene.rows:
        known = details if details and details.trial_id == state.opened else Details(state.opened)
        lines = _trial(scene, now, state, known, (width, room))
    else:
        lines = panes.header(scene, now, width, tall=not small)
        lines += _overview(scene, now, state, width, room - len(lines), small=small)
    lines = lines[:room]
    return [*lines, *[Text()] * (room - len(lines)), foot] if foot is not None and height > 1 else lines


def _overview(scene: Scene, now: datetime, state: State | None, width: int, room: int, *, small: bool) -> list[Text]:
    enough = grid.wide_enough(scene)  # where the grid is whole in the full width alone, it has that
    wide = width >= WIDE and not small and not width - 3 - panes.NOTES < enough <= width
    left = max((width - 3) // 2, min(enough, width - 3 - panes.NOTES)) if wide else width
    right = width - left - 3 if wide else width
    ran, cells = _trials(scene, state, width), _results(scene, state, left, small=small)
    causes = panes.failures(scene, right, *_marked(scene, state, "failures"))
    told = panes.events(scene, now, *_marked(scene, state, "events"))
    ran, cells, *notes = _favoured([ran, cells, causes, told], state)
    if wide:
        body = stack([ran], width, room - 1 - min(cells.wants, room // 2))
        rest = room - len(body)
        lists = [cells] if cells.lists else [cells, panes.results(scene, left)]
        return body + beside(stack(lists, left, rest), stack(notes, right, rest), left)
    return stack([ran, cells, *notes], width, room)


def _favoured(sections: list[Section], state: State | None) -> list[Section]:
    """What somebody moves about in has the room that the others do not need."""
    at = PANES.index(state.pane) if state else 0
    moves = state is not None and (roams(state) or at > 0)
    return [
        replace(section, most=section.least + 2) if moves and i != at and section.most is None else section
        for i, section in enumerate(sections)
    ]


def _marked(scene: Scene, state: State | None, pane: Pane) -> tuple[bool, str | None]:
    """Whether a pane has the keys, and what is chosen in it then."""
    if state is None or state.pane != pane:
        return False, None
    return True, choice(state, scene)


def _results(scene: Scene, state: State | None, width: int, *, small: bool) -> Section:
    """The grid where there is one and room for it; else a list."""
    marked = _marked(scene, state, "results")
    drawn = grid.heat_map(scene, width, *marked) if not small else None
    return drawn or panes.results(scene, width, *marked)


def _trials(scene: Scene, state: State | None, width: int) -> Section:
    if state and roams(state):
        ids = scene.trials(state.wanted, state.sort)
        by = "" if state.sort == "state" else f" by {state.sort}"
        title = titled(f"Trials{by}", state.pane == "trials")
        return panes.trials(scene, ids, width, title, marked=choice(state, scene, "trials"), states=True)
    going = scene.progress.running > 0
    resting = "To resume" if scene.driven is False else "Pausing" if going else "Paused"
    title = titled(resting if scene.resting else "Running", state is not None and state.pane == "trials")
    return panes.trials(scene, [row.trial_id for row in scene.busy()], width, title, marked=None, states=False)


def _foot(scene: Scene, state: State, width: int, *, hints: bool) -> Text | None:
    """What is asked, typed or told; else what can be pressed."""
    if state.asking:
        return ends(Text(f"{state.asking.question} y/n", style=f"{STRONG} {WARN}"), Text(), width)
    if (state.typing or state.wanted) and not state.opened:
        return ends(_searched(scene, state, width - len(state.note)), Text(state.note, style=WARN), width)
    if state.note:
        return ends(Text(state.note, style=WARN), Text(), width)
    hint = next((each for each in _HINTS[bool(state.opened)] if len(each) <= width), "")
    return Text(hint, style=FAINT) if hints and hint and not state.help else None


def _searched(scene: Scene, state: State, width: int) -> Text:
    """Which trials are listed, and how many these are."""
    wanted, found = state.wanted, Text(f"  {len(scene.trials(state.wanted, state.sort)):,} found", style=FAINT)
    words = Text(f"/{wanted.words}" if wanted.words or state.typing else "", style=STRONG)
    words.append("▏" if state.typing else "", style=BUSY)
    if not wanted.group:
        return words.append_text(found)
    group = Text(f"of {wanted.group.name}", style=STRONG)
    group.truncate(max(8, width - words.cell_len - found.cell_len - 1), overflow="ellipsis")
    return Text(" " if words else "").join([group, words]).append_text(found)


_HINTS = {
    False: (
        "↑↓ enter open · tab panes · / filter · s sort · K R P act · ? help · q quit",
        "q quit · ? help · ↑↓ enter open · tab panes · / filter",
        "q quit · ? help",
    ),
    True: (
        "tab pages · ↑↓ scroll · esc back · K R P act · ? help · q quit",
        "q quit · ? help · esc back · tab pages · ↑↓ scroll",
        "q quit · ? help",
    ),
}
"""What can be pressed among the lists, and in a trial: the first that there is room for."""
HELP = [
    "Keys",
    "",
    "↑ ↓ home end page  choose in the pane that has the keys (▸)",
    "← →                choose in the grid, too",
    "enter              open a trial; list those of a cell, or of a cause",
    "tab                next pane: trials, results, failures, events",
    "                   in a trial the next page: curves, settings, log",
    "/                  list trials with some words: cutmix w=10 failed node-3",
    "s                  sort them by state, top-1, epoch, images/s, last news",
    "esc                one step back",
    "",
    "K                  cancel what is chosen: a trial, or all of a cell or cause",
    "R                  queue it again, if it has failed or is cancelled",
    "P                  have the sweep pause, or go on",
    "                   Each asks first. They are mixmo cancel, retry, pause and",
    "                   resume.",
    "",
    "q                  leave the screen; the sweep goes on",
    "",
    "Any key goes back.",
]
SHORT_HELP = [
    "q      leave; the sweep goes on",
    "?      this; any key goes back",
    "↑ ↓    choose (← → in the grid)",
    "enter  open a trial; list a cell's",
    "tab    next pane; a trial's next page",
    "/      filter: cutmix w=10 failed",
    "s      sort",
    "esc    one step back",
    "K      cancel what is chosen",
    "R      queue it again",
    "P      pause, or go on",
]
"""For a terminal that has no room for all of it; what matters most comes first."""


def _help(width: int, room: int) -> list[Text]:
    whole = len(HELP) <= room and max(map(len, HELP)) <= width
    lines = [Text(line) for line in (HELP if whole else SHORT_HELP)[:room]]
    if whole:
        lines[0].stylize(STRONG)
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


# ------------------------------------------------------------------------------------------------------ one trial


def _trial(scene: Scene, now: datetime, state: State, known: Details, size: tuple[int, int]) -> list[Text]:
    row, (width, height) = scene.rows[known.trial_id], size
    mark, style = MARKS[row.state]
    head = Text(f"{mark} ", style=style).append(f"{row.trial_id}  ", style=STRONG).append(scene.name(row.trial_id))
    tabs = Text("  ").join(Text(page, style="reverse" if page == state.page else FAINT) for page in PAGES)
    top = [ends(head, Text(f"epoch {row.epoch} of {row.epochs}", style=FAINT), width), tabs, Text()]
    room = max(0, height - len(top))
    if state.page == "log":
        return top + _log(known, state.scroll, width, room)
    if state.page == "settings":
        told = pages.trial([row], known.epochs or (), now, width, repeat=known.repeat)
        folded = [part for line in told.split("\n") for part in _folded(line[1:], width)]
        return top + _scrolled(folded, state.scroll, room)
    return top + _scrolled(_curves(scene, known, width, room), state.scroll, room)


def _folded(line: Text, width: int) -> list[Text]:
    """A line that is too long, as several: what is to be repeated has to be there to its end."""
    return list(line.divide(range(width, len(line), width)))


def _scrolled(lines: list[Text], scroll: int, room: int) -> list[Text]:
    start = max(0, min(scroll, len(lines) - room))
    return lines[start : start + room]


def _log(known: Details, scroll: int, width: int, room: int) -> list[Text]:
    """Its end; `scroll` lines further up."""
    if known.log is None:
        return [Text(known.fault or "reading ...", style=WARN if known.fault else FAINT)]
    lines = [Text(line.expandtabs(4)) for line in _printable(known.log).splitlines()] or [Text("(empty)", style=FAINT)]
    end = max(min(room, len(lines)), len(lines) - scroll)
    shown = lines[max(0, end - room) : end]
    for line in shown:
        line.truncate(width, overflow="ellipsis")
    return shown


def _printable(text: str) -> str:
    """What a program printed, without what would move the cursor of this terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else " " for each in text)


def _curves(scene: Scene, known: Details, width: int, room: int) -> list[Text]:
    """Top-1 and loss by epoch, of all epochs once they are read, of the latest until then."""
    if known.epochs is None:
        told = known.fault or "reading ..."
        drawn = _chart("top-1", scene.curve(known.trial_id), width, max(3, room - 3), as_percent=True)
        return [*drawn, Text(told, style=WARN if known.fault else FAINT)]
    if not known.epochs:
        return [Text("no epoch has ended yet", style=FAINT)]
    height = max(3, (room - 3) // 2 - 1)
    series = {name: [each.metrics.get(name) for each in known.epochs] for name in ("top1", "loss")}
    values = {name: [value for value in held if value is not None] for name, held in series.items()}
    drawn = _chart("top-1", values["top1"], width, height, as_percent=True)
    return [*drawn, Text(), *_chart("loss", values["loss"], width, height, as_percent=False)]


def _chart(name: str, values: Sequence[float], width: int, height: int, *, as_percent: bool) -> list[Text]:
    if not values:
        return []
    spoken = [percent(each, 2) if as_percent else f"{each:.4g}" for each in (min(values), max(values), values[-1])]
    head = Text(name, style=STRONG).append(f"  {spoken[0]} to {spoken[1]}, now {spoken[2]}", style=FAINT)
    return [head, *(Text(line, style=BUSY) for line in chart(values, width, height))]


# -------------------------------------------------------------------------------------------------------- summary


def summary(
    snapshot: Snapshot, now: datetime, width: int, *, driven: bool | None = True, terms: Terms | None = None
) -> Text:
    """Everything but the events: what stays in the terminal when the screen is gone."""
    scene, inner = Scene(snapshot, now, driven=driven, terms=terms), max(10, min(width, 120) - 2)
    lists = [_trials(scene, None, inner), panes.results(scene, inner), panes.failures(scene, inner)]
    return joined([*panes.header(scene, now, inner), *panes.predicted(scene.progress), *stack(lists, inner, LONGEST)])
