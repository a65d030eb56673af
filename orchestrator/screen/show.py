"""The screen that `run` and `watch` keep up to date, and the plain lines where there is no terminal.

Whoever has news calls `show`. Where there are keys, a thread of the screen's own draws and listens, so that it answers
while a store is slow or a driver busy. All that it shows is read, so a broken screen can hurt no sweep.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.text import Text

from orchestrator import progress
from orchestrator.errors import MixmoError
from orchestrator.lines import WARN
from orchestrator.screen import plain
from orchestrator.screen.frame import Details, drawn, summary
from orchestrator.screen.scene import Scene, Terms
from orchestrator.screen.state import Effect, Order, Quit, Read, State, press
from orchestrator.screen.terminal import Terminal

if TYPE_CHECKING:
    from orchestrator.store import Snapshot

Act = Callable[[Order, Callable[[], bool]], str]
"""Carries out an order and says what became of it; the second asks whether to wait no longer for an answer."""
Fetch = Callable[[Read, Details], Details]
"""What a page shows, added to what is known. Raises MixmoError."""
TICK_S = 0.5
AGAIN_S = 10.0
"""So often the page of a trial that runs is read again."""
PATIENCE_S = 10.0
"""So long an order that was given may take after the screen is left."""
SHARE = 40
"""After a frame of news the screen rests so many times as long as the processor took for it, and so does whoever reads
the news: together they stay under a twentieth of a core.
"""


class Screen:
    """Shows the snapshots that it is given: frames on a terminal, one plain line for each change elsewhere.

    A frame is drawn when something changed, and news seldom enough to cost under a twentieth of the time. When it ends,
    a summary stays behind.
    """

    def __init__(
        self,
        console: Console,
        *,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        say_every_s: int = 60,
        terms: Terms | None = None,
        act: Act | None = None,
        fetch: Fetch | None = None,
        repeat: Callable[[str], str] | None = None,
        on_quit: str = "",
    ) -> None:
        """`repeat`: the command that trains a trial again, by its id. `on_quit`: what `q` says where it does not leave
        the screen.
        """
        self._console, self._now, self._say_every = console, now, timedelta(seconds=say_every_s)
        self._terms, self._act, self._fetch, self._repeat, self._on_quit = terms, act, fetch, repeat, on_quit
        self._draws = console.is_terminal and not console.is_dumb_terminal
        self._terminal: Terminal | None = None
        self._thread: threading.Thread | None = None
        self._orders: list[threading.Thread] = []
        self._news: SimpleQueue[tuple[Snapshot, bool | None]] = SimpleQueue()
        self._arrived: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What threads that ask the world have brought, for the one that draws."""
        self._scene: Scene | None = None
        self._state = State()
        self._details: Details | None = None
        self._read_at = 0.0
        self._drawn: tuple[object, ...] = ()
        """Of what the frame on the terminal is made."""
        self._shown: Snapshot | None = None
        self._driven: bool | None = True
        self._said: tuple[progress.Status, datetime] | None = None
        """What the sweep did when its counts were last told in a plain line, and when that was."""
        self._rest_until = 0.0
        self._notes: list[str] = []
        self._broken: Exception | None = None
        self.left = threading.Event()
        """Set when somebody has left the screen."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left.set()
        if self._terminal:
            self._terminal.wake()
            if self._thread:
                self._thread.join(PATIENCE_S)
            self._terminal.__exit__(None, None, None)
            self._terminal = None
            for note in self._notes:
                self._print(note)
        for order in self._orders:
            order.join(PATIENCE_S)
        if self._shown:
            self._console.print(
                summary(self._shown, self._now(), self._console.width, driven=self._driven, terms=self._terms)
            )

    @property
    def attended(self) -> bool:
        """Whether somebody has used its keys."""
        return self._state != State()

    @property
    def has_keys(self) -> bool:
        return self._thread is not None

    def ended(self) -> None:
        """The driver has let go of the sweep: the summary says `stopped` if anything is left."""
        self._driven = False

    def show(self, snapshot: Snapshot, *, driven: bool | None = True) -> None:
        """Raises whatever broke the screen."""
        if self._broken:
            raise self._broken
        if not self._draws:
            self._say(snapshot, driven)
        is_news = snapshot is not self._shown or driven != self._driven
        self._shown, self._driven = snapshot, driven
        if self._draws:
            if is_news:
                self._news.put((snapshot, driven))
            self._begin()
            self._nudge()

    def say(self, text: str) -> None:
        """A line for people: at the foot of the screen until the next one, and kept for when the screen is gone."""
        if not self._terminal:
            self._print(text)
            return
        self._notes = [*self._notes[-19:], text]
        self._rest_until = 0.0
        self._nudge()

    # ---- on a terminal

    def _begin(self) -> None:
        """Not before there is something to see."""
        if self._terminal is None:
            self._terminal = Terminal(self._console).__enter__()
            if self._terminal.has_keys:
                self._thread = threading.Thread(target=self._live, name="screen", daemon=True)
                self._thread.start()

    def _nudge(self) -> None:
        if self._thread and self._terminal:
            self._terminal.wake()
        else:
            self._step([])

    def _live(self) -> None:
        assert self._terminal is not None
        try:
            while not self.left.is_set() and not self._broken:
                self._step(self._terminal.wait(TICK_S))
        except Exception as error:
            self._broken = error

    def _step(self, keys: list[str]) -> None:
        """Take keys and news, and draw what they have changed."""
        began = time.thread_time()
        if not self._news.empty() and time.monotonic() >= self._rest_until:
            first = self._scene is None  # which takes longer than any later one
            while not self._news.empty():
                snapshot, driven = self._news.get()
            self._scene = Scene(snapshot, self._now(), driven=driven, terms=self._terms, before=self._scene)
            self._draw(self._scene)
            rest_s = 0.0 if first else SHARE * (time.thread_time() - began)
            self._rest_until = time.monotonic() + rest_s
        while not self._arrived.empty():
            self._arrived.get()()
        if self._scene is not None:
            for key in keys:
                self._state, effect = press(self._state, key, self._scene)
                self._do(effect)
            self._read_again(self._scene)
            self._draw(self._scene)

    def _draw(self, scene: Scene) -> None:
        assert self._terminal is not None
        width, height = self._terminal.size
        made_of = (scene, self._state, self._details, width, height, self._notes)
        if made_of == self._drawn:
            return
        state = self._state if self._terminal.has_keys else None
        lines = drawn(scene, self._now(), (width, height - bool(self._notes)), state, self._details)
        if self._notes:
            lines = [*lines, *[Text()] * (height - 1 - len(lines)), Text(self._notes[-1], style=WARN)]
        margined = [Text(" ").append_text(line) for line in lines]
        for line in margined:
            line.truncate(width)
        self._terminal.draw(margined)
        self._drawn = made_of

    # ---- what keys ask of the world

    def _do(self, effect: Effect | None) -> None:
        if isinstance(effect, Quit):
            if self._on_quit:
                self._state = replace(self._state, note=self._on_quit)
            else:
                self.left.set()
        elif isinstance(effect, Order):
            self._state = replace(self._state, note=f"{effect.verb}: asked ...")
            self._orders.append(self._aside(lambda: self._carry_out(effect)))
        elif isinstance(effect, Read):
            self._read_at = time.monotonic()
            if self._details is None or self._details.trial_id != effect.trial_id:
                self._details = Details(effect.trial_id, self._repeat(effect.trial_id) if self._repeat else "")
            known = self._details
            self._aside(lambda: self._fetch_into(effect, known))

    def _aside(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # our bug: whoever calls `show` has it, and the terminal is put back first
                self._broken = error

        thread = threading.Thread(target=guarded, name="screen-aside", daemon=True)
        thread.start()
        return thread

    def _carry_out(self, order: Order) -> None:
        try:
            told = self._act(order, self.left.is_set) if self._act else "this screen gives no commands"
        except MixmoError as error:
            told = _in_one_line(error)
        self._arrived.put(lambda: self._tell(f"{order.verb}: {told}"))
        self._wake()

    def _tell(self, note: str) -> None:
        self._state = replace(self._state, note=note)

    def _keep(self, details: Details) -> None:
        """Unless another trial was opened meanwhile."""
        if self._details and self._details.trial_id == details.trial_id:
            self._details = details

    def _fetch_into(self, read: Read, known: Details) -> None:
        try:
            found = self._fetch(read, known) if self._fetch else known
        except MixmoError as error:
            found = replace(known, fault=_in_one_line(error))
        self._arrived.put(lambda: self._keep(found))
        self._wake()

    def _wake(self) -> None:
        if self._terminal:
            self._terminal.wake()

    def _read_again(self, scene: Scene) -> None:
        """What is open of a trial that runs."""
        row = scene.rows.get(self._state.opened or "")
        if row and row.state == "RUNNING" and time.monotonic() - self._read_at > AGAIN_S:
            self._do(Read(row.trial_id, self._state.page))

    # ---- without one

    def _say(self, snapshot: Snapshot, driven: bool | None) -> None:
        now = self._now()
        lines = plain.changes(self._shown, snapshot, now) if self._shown else []
        doing = progress.status(snapshot, driven=driven)
        if self._said is None or self._said[0] != doing or now - self._said[1] >= self._say_every:
            lines.append(plain.counts(snapshot, now, driven=driven))
            self._said = (doing, now)
        for line in lines:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
