"""What the keys of a screen do: (state, key, scene) -> state, and what the world is to do about it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from orchestrator.rows import FINAL
from orchestrator.screen.scene import ALL, PANES, SORTS, Group, Pane, Scene, Search, Sort

Page = Literal["curves", "settings", "log"]
PAGES: tuple[Page, ...] = ("curves", "settings", "log")
Verb = Literal["cancel", "retry", "pause", "resume"]
_T = TypeVar("_T")
JUMP = 10
"""Lines that a page key moves."""


@dataclass(frozen=True, slots=True)
class Order:
    """A command to the sweep: what `mixmo cancel`, `retry`, `pause` and `resume` give."""

    verb: Verb
    trials: tuple[str, ...] | None
    """Their ids; None where it is about the sweep."""
    question: str


@dataclass(frozen=True, slots=True)
class Read:
    """Fetch what a page of a trial shows. Nothing of it is read before."""

    trial_id: str
    page: Page


@dataclass(frozen=True, slots=True)
class Quit:
    pass


Effect = Order | Read | Quit


@dataclass(frozen=True, slots=True)
class State:
    pane: Pane = "trials"
    """The one that has the keys."""
    chosen: Mapping[Pane, str] = field(default_factory=dict)
    """What is marked in each pane: something of `Scene.keys`, or of what it had a moment ago."""
    opened: str | None = None
    """The trial whose pages are shown."""
    page: Page = "curves"
    scroll: int = 0
    wanted: Search = ALL
    """The filter."""
    typing: bool = False
    sort: Sort = "state"
    help: bool = False
    asking: Order | None = None
    note: str = ""


def roams(state: State) -> bool:
    """Whether somebody looks for a trial, rather than at what runs."""
    return bool(state.typing or state.wanted or state.sort != "state" or state.chosen.get("trials"))


def press(state: State, key: str, scene: Scene) -> tuple[State, Effect | None]:
    """The state after a key, and what else is to be done. The uppermost of what lies on the screen takes the key."""
    state = replace(state, note="")
    if state.asking:
        agreed = key in ("y", "Y")
        return replace(state, asking=None, note="" if agreed else "nothing was done"), state.asking if agreed else None
    if state.typing:
        return _type(state, key), None
    if state.help:
        return replace(state, help=False), Quit() if key == "q" else None
    if key in _ANYWHERE:
        return _ANYWHERE[key](state, scene)
    return _in_trial(state, key) if state.opened else _in_lists(state, key, scene)


def choice(state: State, scene: Scene, pane: Pane | None = None) -> str | None:
    """What is marked in a pane, if it is still there."""
    chosen = state.chosen.get(pane or state.pane)
    return chosen if chosen in scene.keys(pane or state.pane, state.wanted, state.sort) else None


def _type(state: State, key: str) -> State:
    if key == "esc":
        return _worded(replace(state, typing=False), "")
    if key == "enter":
        return replace(state, typing=False)
    if key == "backspace":
        return _worded(state, state.wanted.words[:-1])
    if key == "clear":
        return _worded(state, "")
    return _worded(state, state.wanted.words + key) if len(key) == 1 else state


def _worded(state: State, words: str) -> State:
    return replace(state, wanted=replace(state.wanted, words=words))


# ------------------------------------------------------------------------------------------------------ moving about


_STEPS = {"down": 1, "up": -1, "j": 1, "k": -1, "pagedown": JUMP, "pageup": -JUMP, "home": -(10**9), "end": 10**9}


def _in_trial(state: State, key: str) -> tuple[State, Effect | None]:
    assert state.opened is not None
    if key == "esc":
        return replace(state, opened=None, page="curves", scroll=0), None
    if key in ("tab", "backtab", "left", "right"):
        page = _next(PAGES, state.page, -1 if key in ("backtab", "left") else 1)
        return replace(state, page=page, scroll=0), Read(state.opened, page)
    if key in _STEPS:
        step = -_STEPS[key] if state.page == "log" else _STEPS[key]  # a log is read from its end
        return replace(state, scroll=min(10**6, max(0, state.scroll + step))), None
    return state, None


def _in_lists(state: State, key: str, scene: Scene) -> tuple[State, Effect | None]:
    if key == "enter":
        return _enter(state, scene)
    if key in _STEPS or key in ("left", "right"):
        return _move(state, key, scene), None
    return _LISTED[key](state) if key in _LISTED else state, None


def _back(state: State) -> State:
    """One step towards how it all began."""
    if state.wanted.words:
        return _worded(state, "")
    if state.wanted:
        return replace(state, wanted=ALL)
    if state.sort != "state":
        return replace(state, sort="state")
    return replace(state, chosen={}, pane="trials")


_LISTED: dict[str, Callable[[State], State]] = {
    "tab": lambda state: replace(state, pane=_next(PANES, state.pane, 1)),
    "backtab": lambda state: replace(state, pane=_next(PANES, state.pane, -1)),
    "/": lambda state: replace(state, pane="trials", typing=True),
    "s": lambda state: replace(state, pane="trials", sort=_next(SORTS, state.sort, 1)),
    "esc": _back,
}


def _move(state: State, key: str, scene: Scene) -> State:
    keys, held = scene.keys(state.pane, state.wanted, state.sort), choice(state, scene)
    if not keys:
        return state
    if state.pane == "results" and scene.plot and key in ("up", "down", "left", "right", "j", "k"):
        to = scene.plot.beside(held, _STEPS.get(key, 0), {"left": -1, "right": 1}.get(key, 0))
    elif key in _STEPS:
        at = keys.index(held) + _STEPS[key] if held is not None else 0
        to = keys[max(0, min(len(keys) - 1, at))]
    else:
        return state
    return replace(state, chosen={**state.chosen, state.pane: to} if to is not None else state.chosen)


def _enter(state: State, scene: Scene) -> tuple[State, Effect | None]:
    """Open a trial, or list the trials that something else stands for."""
    held = choice(state, scene)
    if held is None:
        return _move(state, "home", scene), None
    members = scene.members(state.pane, held)
    if state.pane in ("trials", "events"):
        if not members:
            return replace(state, note="this is about no trial"), None
        return replace(state, opened=members[0], page="curves", scroll=0), Read(members[0], "curves")
    wanted = Search(group=Group(state.pane, held, scene.called(state.pane, held)))
    return replace(state, pane="trials", wanted=wanted, chosen={**state.chosen, "trials": members[0]}), None


# ---------------------------------------------------------------------------------------------------- what acts


def _cancel(state: State, scene: Scene) -> tuple[State, None]:
    going = [each for each in _meant(state, scene) if scene.rows[each].state not in FINAL]
    return _ask(state, scene, "cancel", going, "nothing to cancel: choose a trial that has not ended"), None


def _retry(state: State, scene: Scene) -> tuple[State, None]:
    ended = [each for each in _meant(state, scene) if scene.rows[each].state in ("ERROR", "CANCELLED")]
    return _ask(state, scene, "retry", ended, "nothing to retry: choose a trial, or a cause, that has failed"), None


def _pause(state: State, scene: Scene) -> tuple[State, None]:
    if scene.driven is False:
        return replace(state, note="no driver runs the sweep, so there is none to pause"), None
    if scene.snapshot.header.paused_by:
        return replace(state, asking=Order("resume", None, "Have the sweep go on?")), None
    return replace(state, asking=Order("pause", None, "Have the sweep rest? Running trials are saved first.")), None


_ANYWHERE: dict[str, Callable[[State, Scene], tuple[State, Effect | None]]] = {
    "K": _cancel,
    "R": _retry,
    "P": _pause,
    "q": lambda state, scene: (state, Quit()),
    "?": lambda state, scene: (replace(state, help=True), None),
}


def _meant(state: State, scene: Scene) -> list[str]:
    if state.opened:
        return scene.members("trials", state.opened)
    held = choice(state, scene)
    return [] if held is None else scene.members(state.pane, held)


def _ask(state: State, scene: Scene, verb: Verb, trials: list[str], otherwise: str) -> State:
    if not trials:
        return replace(state, note=otherwise)
    said = f"{trials[0][:7]} ({scene.name(trials[0])})" if len(trials) == 1 else f"{len(trials):,} trials"
    question = {"cancel": f"Cancel {said}, for good?", "retry": f"Queue {said} again?"}[verb]
    return replace(state, asking=Order(verb, tuple(trials), question))


def _next(order: tuple[_T, ...], now: _T, step: int) -> _T:
    return order[(order.index(now) + step) % len(order)]
