"""The commands to a running sweep, from any machine that sees its results: stop, pause, resume, cancel, retry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import (
    RUNNING,
    Command,
    Json,
    Results,
    SweepName,
    app,
    complete_trial,
    heavy,
    with_results,
)
from orchestrator.errors import ExitCode, NotFoundError, RefusedError, UsageError

if TYPE_CHECKING:
    from orchestrator import store as stores
    from orchestrator.rows import TrialRow
    from orchestrator.screen.show import Act
    from orchestrator.screen.state import Order

WAIT_S = 60.0
"""How long a command waits for the driver's answer."""
POLL_S = 1.0

NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the driver's answer.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Trials = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TRIAL...]", help="Trial ids, or as many of their first digits as tell.", autocompletion=complete_trial
    ),
]


@app.command(cls=Command, rich_help_panel=RUNNING)
def stop(
    sweep: SweepName,
    *,
    now: Annotated[bool, typer.Option("--now", help="Do not let running trials finish: they go on later.")] = False,
    no_wait: NoWait = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """End a running sweep: running trials finish, nothing new starts.

    As the first Ctrl-C where it runs does; with --now, as the second. `mixmo run FILE` continues it.
    """
    asked = _Asked(sweep, "stop_now" if now else "stop", results, as_json)
    return asked.of_driver(None, wait=not no_wait)


@app.command(cls=Command, rich_help_panel=RUNNING)
def pause(
    sweep: SweepName, *, no_wait: NoWait = False, results: Results = "results", as_json: Json = False
) -> ExitCode:
    """Have a running sweep rest: running trials are saved and stop at their next report.

    That is at the end of an epoch, or after ten minutes of a longer one. Workers stay formed and keep their place on
    the cluster; `mixmo stop` gives it back. `mixmo resume` goes on from where the trials were saved.
    """
    return _Asked(sweep, "pause", results, as_json).of_driver(None, wait=not no_wait)


@app.command(cls=Command, rich_help_panel=RUNNING)
def resume(
    sweep: SweepName, *, no_wait: NoWait = False, results: Results = "results", as_json: Json = False
) -> ExitCode:
    """Have a paused sweep go on."""
    return _Asked(sweep, "resume", results, as_json).of_driver(None, wait=not no_wait)


@app.command(cls=Command, rich_help_panel=RUNNING)
def cancel(
    sweep: SweepName,
    trial: Trials = None,
    *,
    yes: Yes = False,
    no_wait: NoWait = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """End trials for good: those named, or all that have not ended.

    A cancelled trial is not run again until `mixmo retry` asks for it. With or without a driver at work.
    """
    asked = _Asked(sweep, "cancel", results, as_json)
    from orchestrator.rows import FINAL

    chosen = _named(asked.rows, sweep, trial) if trial else asked.rows
    going = [row for row in chosen if row.state not in FINAL]
    if not going:
        return asked.told("nothing to cancel: every trial has ended" if not trial else "they have ended already")
    if not trial:
        _confirm(f"Cancel the {len(going)} trials of {sweep} that have not ended?", yes)
    return asked.of_anybody([row.trial_id for row in chosen] if trial else None, wait=not no_wait)


@app.command(cls=Command, rich_help_panel=RUNNING)
def retry(
    sweep: SweepName,
    trial: Trials = None,
    *,
    failed: Annotated[bool, typer.Option("--failed", help="All that have failed.")] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="All that are cancelled.")] = False,
    cause: Annotated[
        str | None,
        typer.Option(
            "--cause",
            metavar="TEXT",
            help="All that have failed with this in their cause, as `mixmo status` groups them, or crash, oom, ...",
        ),
    ] = None,
    no_wait: NoWait = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """Queue failed or cancelled trials again.

    They go on from their newest checkpoint. A running driver takes them up; without one, the next `mixmo run` does.
    A finished trial is not trained again: its numbers stand.
    """
    if sum([bool(trial), failed or cause is not None, cancelled]) != 1:
        raise UsageError("say which trials, in one way: their ids, --failed, --failed --cause TEXT or --cancelled")
    asked = _Asked(sweep, "retry", results, as_json)
    chosen = _named(asked.rows, sweep, trial) if trial else _all_of(asked.rows, cancelled=cancelled, cause=cause)
    _refuse_finished(chosen)
    ended = [row.trial_id for row in chosen if row.state in ("ERROR", "CANCELLED")]
    if not ended:
        return asked.told("nothing to retry: no such trial has failed or is cancelled")
    return asked.of_anybody(ended, wait=not no_wait)


@dataclass(frozen=True, slots=True)
class _Reply:
    """What became of a command."""

    text: str
    command: str | None = None
    """Its id, if it was given to a driver."""
    done: bool = True


class _Asking:
    """A command to a sweep, on its way to whoever carries it out."""

    def __init__(self, store: stores.ResultStore, sweep: str, verb: str, results: str) -> None:
        from orchestrator.store import Process, who

        self._store, self._sweep, self._verb, self._results = store, sweep, verb, results
        self._who = who(Process.current())

    def of_driver(
        self, trials: Sequence[str] | None, *, wait: bool, enough: Callable[[], bool] = lambda: False
    ) -> _Reply:
        """Ask the driver, and wait for its answer until it is `enough`. Raises RefusedError if there is none, or if it
        refuses.
        """
        fence = self._fence()
        if fence is None:
            raise RefusedError(
                f"no driver runs {self._sweep}, so there is none to {self._verb.partition('_')[0]}. "
                f"`{with_results('mixmo run FILE', self._results)}` continues the sweep"
            )
        commands = self._store.commands(self._sweep)
        given = commands.give(self._verb, fence=fence, given_by=self._who, trials=trials)
        if not wait:
            return _Reply("given to the driver", given.id)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and not enough():
            ended = self._fence() != fence  # asked before, so that no last answer is missed
            command = commands.get(given.id)
            if command is not None and command.answer is not None:
                if not command.answer.done:
                    raise RefusedError(f"{self._sweep}: {command.answer.text}")
                return _Reply(command.answer.text, given.id)
            if ended:
                raise RefusedError(f"{self._sweep}: its driver ended before it took the command: nothing was done")
            time.sleep(POLL_S)
        return _Reply(
            f"the driver has not answered in {WAIT_S:.0f} s; it may not reach its results. The command stays: it is "
            f"carried out when that driver sees it, and by no other", given.id, done=False,
        )  # fmt: skip

    def of_anybody(
        self, trials: Sequence[str] | None, *, wait: bool, enough: Callable[[], bool] = lambda: False
    ) -> _Reply:
        """Ask the driver; where there is none, do it here, as the sweep's writer for a moment."""
        if self._fence() is not None:
            return self.of_driver(trials, wait=wait, enough=enough)
        from orchestrator.steering import without_driver

        changed = without_driver(self._store, self._sweep, self._verb, trials, self._who)
        then = f". `{with_results('mixmo run FILE', self._results)}` trains them" if self._verb == "retry" else ""
        return _Reply(changed + then)

    def _fence(self) -> int | None:
        """Of the living driver. By this machine's clock, if that is wrong, one that lives may look dead."""
        lease = self._store.lease(self._sweep)
        if lease is not None and lease.expired:
            lease = self._store.lease(self._sweep, exact=True)
        return None if lease is None or lease.expired else lease.fence


class _Asked:
    """A command as the command line gives it: what becomes of it is printed, and is the exit code."""

    def __init__(self, sweep: str, verb: str, results: str, as_json: bool) -> None:
        """Raises NotFoundError if there is no such sweep."""
        from orchestrator.store import ResultStore

        store = ResultStore.open(results)
        self._sweep, self._verb, self._as_json = sweep, verb, as_json
        self._asking = _Asking(store, sweep, verb, results)
        self.rows: list[TrialRow] = store.trial_rows(sweep)

    def of_driver(self, trials: Sequence[str] | None, *, wait: bool) -> ExitCode:
        return self._told(self._asking.of_driver(trials, wait=wait))

    def of_anybody(self, trials: Sequence[str] | None, *, wait: bool) -> ExitCode:
        return self._told(self._asking.of_anybody(trials, wait=wait))

    def told(self, text: str) -> ExitCode:
        return self._told(_Reply(text))

    def _told(self, reply: _Reply) -> ExitCode:
        if self._as_json:
            told = {"sweep": self._sweep, "command": reply.command, "done": reply.done, "text": reply.text}
            streams.print_json(self._verb.partition("_")[0], told)
        streams.say(f"{self._sweep}: {reply.text}")
        return ExitCode.OK if reply.done else ExitCode.STOPPED


def from_screen(store: stores.ResultStore, sweep: str, results: str) -> Act:
    """Gives the orders of a screen, as the commands here do."""

    def act(order: Order, enough: Callable[[], bool]) -> str:
        heavy()  # what is done without a driver writes tables
        asking = _Asking(store, sweep, order.verb, results)
        ask = asking.of_driver if order.trials is None else asking.of_anybody
        return ask(order.trials, wait=True, enough=enough).text

    return act


def _named(rows: Sequence[TrialRow], sweep: str, prefixes: Sequence[str]) -> list[TrialRow]:
    """The trials of this sweep whose ids begin so. Raises NotFoundError."""
    found = []
    for prefix in prefixes:
        matching = [row for row in rows if row.trial_id.startswith(prefix.lower())]
        if len(matching) != 1:
            said = f"begins {len(matching)} trial ids: give more digits" if matching else "begins no trial id"
            raise NotFoundError(f"{sweep}: {prefix!r} {said}; `mixmo plan FILE --trials` lists them")
        found += matching
    return list({row.trial_id: row for row in found}.values())


def _all_of(rows: Sequence[TrialRow], *, cancelled: bool, cause: str | None) -> list[TrialRow]:
    from orchestrator.causes import failed_of
    from orchestrator.plan import REMOVED

    if cancelled:
        return [row for row in rows if row.state == "CANCELLED" and row.error_cause != REMOVED]
    return failed_of(rows, cause or "")


def _refuse_finished(rows: Sequence[TrialRow]) -> None:
    done = [row.trial_id for row in rows if row.state == "TERMINATED"]
    if done:
        raise RefusedError(
            f"{', '.join(done[:5])}: finished, and a result is never replaced. To train it again, for its weights or "
            "its logits say, run it under other results (`--results`)"
        )


def _confirm(question: str, yes: bool) -> None:
    """Raises RefusedError where nobody can be asked."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RefusedError(f"{question} There is no terminal to answer in: give --yes")
    typer.confirm(question, default=False, err=True, abort=True)
