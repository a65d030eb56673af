"""`mixmo watch`: a store read again and again, and shown."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator import progress
from orchestrator.errors import ExitCode, UnreachableError
from orchestrator.screen.frame import Details, render
from orchestrator.screen.scene import Scene, Terms
from orchestrator.screen.show import SHARE, Act, Fetch, Screen
from orchestrator.screen.state import Read

if TYPE_CHECKING:
    from orchestrator.store import ResultStore, Snapshot


def watch(
    store: ResultStore, sweep: str, console: Console, *, once: bool = False, every_s: float = 1.0,
    terms: Terms | None = None, act: Act | None = None, repeat: Callable[[str], str] | None = None,
) -> ExitCode:  # fmt: skip
    """Shows a sweep until it ends, or until somebody leaves; `once` shows one frame.

    A store that is away for a while is waited for. Who uses the keys is not interrupted by the end of the sweep, and
    neither is who opens one that has ended. Raises NotFoundError or UnreachableError if the sweep cannot be read at the
    beginning.
    """
    if once:
        now = datetime.now().astimezone()
        scene = Scene(store.snapshot(sweep), now, driven=progress.driven(store, sweep), terms=terms)
        console.print(render(scene, now, console.size))
        return ExitCode.OK
    following = store.follow(sweep)
    snapshot = following.look()
    was_over = progress.over(snapshot)
    gc.freeze()  # most rows stay: to look through ten thousand again and again costs a tenth of a second each time
    with Screen(console, terms=terms, act=act, fetch=fetching(store, sweep), repeat=repeat) as screen:
        while True:
            began, held = time.thread_time(), None
            with contextlib.suppress(UnreachableError):
                snapshot = following.look()
                held = following.driven()
            pause_s = max(every_s, SHARE * (time.thread_time() - began))
            screen.show(snapshot, driven=held)
            stays = screen.has_keys and (was_over or screen.attended)
            if (progress.over(snapshot) and not stays) or screen.left.wait(pause_s):
                return _verdict(snapshot)


def _verdict(snapshot: Snapshot) -> ExitCode:
    failed = any(row.state == "ERROR" for row in snapshot.rows)
    return ExitCode.FAULTS if failed and progress.over(snapshot) else ExitCode.OK


def fetching(store: ResultStore, sweep: str) -> Fetch:
    """Reads what the pages of a trial show: nothing before one is opened."""

    def fetch(read: Read, known: Details) -> Details:
        if read.page == "log":
            return replace(known, log=store.log(read.trial_id), fault="")
        return replace(known, epochs=store.epoch_rows(sweep, read.trial_id), fault="")

    return fetch
