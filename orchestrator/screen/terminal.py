"""The terminal itself: lines go out, keys come in, and it is as it was when it is left, however that happens."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from orchestrator.screen.keys import decode

ESCAPE_S = 0.05
"""An escape after which nothing comes for so long is the key. SSH sends a sequence in one piece."""
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J", "\x1b[?25h\x1b[?1049l"


class Terminal:
    """The alternate screen of a console, and the keyboard where its standard input is this terminal's.

    To be entered and left by one thread; another may draw and wait.
    """

    def __init__(self, console: Console, *, keys: bool = True) -> None:
        self._console = console
        self._input = _keyboard() if keys else None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._rest = ""
        self._drawn: list[Text] = []
        self._size = (0, 0)
        self._modes: list[Any] | None = None
        self._lock = threading.RLock()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        os.set_blocking(self._woken, False)
        self._before: dict[int, Any] = {}

    @property
    def has_keys(self) -> bool:
        return self._input is not None

    @property
    def size(self) -> tuple[int, int]:
        return self._console.size.width, self._console.size.height

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not in the main thread: the size is looked at now and then, too
            self._before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: self.wake())
            if self._input is not None:
                self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._leave()
        for descriptor in (self._woken, self._waker):
            os.close(descriptor)

    def _enter(self) -> None:
        with self._lock:
            if self._input is not None:
                self._modes = termios.tcgetattr(self._input)
                tty.setcbreak(self._input, termios.TCSADRAIN)
            self._write(_ENTER)
            self._drawn, self._size = [], (0, 0)

    def _leave(self) -> None:
        with self._lock:
            if self._input is not None and self._modes is not None:
                with contextlib.suppress(termios.error):  # the terminal is gone
                    termios.tcsetattr(self._input, termios.TCSADRAIN, self._modes)
            with contextlib.suppress(OSError, ValueError):
                self._write(_LEAVE)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets its terminal back, and gives it again with `fg`."""
        self._leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._enter()
        self.wake()

    def draw(self, lines: Sequence[Text]) -> int:
        """Show these lines, of which only those are sent that are not there yet. How many were sent."""
        with self._lock:
            size = self.size
            if size != self._size:
                self._drawn, self._size = [], size
                self._write("\x1b[2J")
            filled = [*lines, *[Text()] * (size[1] - len(lines))][: size[1]]
            sent = [i for i, line in enumerate(filled) if i >= len(self._drawn) or line != self._drawn[i]]
            self._write("".join(f"\x1b[{i + 1};1H{self._encoded(filled[i])}\x1b[0m\x1b[K" for i in sent))
            self._drawn = filled
        return len(sent)

    def _encoded(self, line: Text) -> str:
        """With the colours that this console has."""
        with self._console.capture() as captured:
            self._console.print(line, end="", no_wrap=True, overflow="crop", crop=True)
        return captured.get()

    def _write(self, text: str) -> None:
        if text:
            self._console.file.write(text)
            self._console.file.flush()

    def wake(self) -> None:
        """Let whoever waits go on."""
        with contextlib.suppress(OSError):  # full: it will wake; closed: nobody waits
            os.write(self._waker, b".")

    def wait(self, longest_s: float) -> list[str]:
        """The keys that are pressed; none after so long, or when somebody wakes it."""
        keyboard = [] if self._input is None else [self._input]
        ready, _, _ = select.select([self._woken, *keyboard], [], [], ESCAPE_S if self._rest else longest_s)
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        if self._input is None or self._input not in ready:
            keys, self._rest = (["esc"], self._rest[1:]) if self._rest[:1] == "\x1b" else ([], "")
            return keys
        sent = os.read(self._input, 4096)
        if not sent:  # hung up
            self._input = None
            return []
        keys, self._rest = decode(self._rest + self._decoder.decode(sent))
        return keys


def _keyboard() -> int | None:
    """Standard input, if it is a terminal whose keys go to this process: in the background it would be stopped."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return descriptor
    return None
