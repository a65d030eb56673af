"""Carries out what people ask of a running sweep, and answers them. Part of its driver."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.dispatcher import Order
from orchestrator.engine import Crew
from orchestrator.errors import RefusedError, UnreachableError
from orchestrator.ledger import Ledger
from orchestrator.rows import FINAL, NO_ERROR, TrialRow
from orchestrator.sharing import Sharing
from orchestrator.store import Command, Inbox, ResultStore, SweepWriter

PERIOD_S = 3.0
"""Between two looks for commands, where a look is quick: it may take a twentieth of the time."""
LONGEST_S = 30.0
"""Between two looks, however long one takes: a store that was away keeps nobody waiting when it is back."""


class Steering:
    """The commands to one driver. Those that end the sweep are wishes that the driver's loop looks at."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        writer: SweepWriter,
        ledger: Ledger,
        crew: Crew,
        sharing: Sharing,
        order_of: Callable[[int], Order],
        talk: Callable[[str], None],
    ) -> None:
        """`order_of` gives the order of the trial at a position, to train it again."""
        self._inbox, self._writer, self._ledger, self._crew = inbox, writer, ledger, crew
        self._sharing, self._order_of, self._talk = sharing, order_of, talk
        self._next_look = 0.0
        self.drain = self.stop = self.cancelled = self.paused = False
        self.again: set[int] = set()
        """Trials that had ended and are to be trained again; the driver takes them out."""
        self._acts: Mapping[str, Callable[[Command], str]] = {
            "stop": self._stop, "stop_now": self._stop_now, "pause": self._pause, "resume": self._resume,
            "cancel": self._cancel, "retry": self._retry, "share": self._share,
        }  # fmt: skip

    def look(self) -> None:
        """Carry out what has come, if it is time to look. A store that is away has no commands."""
        began = time.monotonic()
        if began < self._next_look:
            return
        try:
            new = self._inbox.new()
        except UnreachableError:
            new = []
        ended = time.monotonic()
        self._next_look = ended + min(max(PERIOD_S, 20 * (ended - began)), LONGEST_S)
        for command in new:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        act = self._acts.get(command.verb)
        try:
            if act is None:
                raise RefusedError(f"this driver knows no {command.verb}: it is of another version")
            done, text = True, act(command)
        except RefusedError as error:
            done, text = False, str(error)
        self._inbox.answer(command, text, done=done)
        self._writer.event(command.verb, f"{command.given_by}: {text}")
        if command.verb != "share":
            self._talk(f"{command.verb.replace('_', ' ')}, asked by {command.given_by}: {text}")

    def _stop(self, command: Command) -> str:
        self.drain = True
        return f"{_trials(self._crew.in_hand(), 'running trial')} to finish, nothing new starts"

    def _stop_now(self, command: Command) -> str:
        self.drain = self.stop = True
        return "the driver ends now; `mixmo run` goes on from the last checkpoints"

    def _pause(self, command: Command) -> str:
        if self.drain:
            raise RefusedError("the sweep is stopping")
        if self.paused:
            return "the sweep is paused already"
        self._crew.pause()
        self.paused = True
        self._sharing.rest(self._crew)
        self._writer.pause(command.given_by)
        return f"{_trials(self._crew.in_hand(), 'running trial')} to be saved at the next report, nothing new starts"

    def _resume(self, command: Command) -> str:
        if not self.paused:
            return "the sweep was not paused"
        self._crew.resume()
        self.paused = False
        self._sharing.wake()
        self._writer.pause(None)
        return "the sweep goes on"

    def _cancel(self, command: Command) -> str:
        chosen = self._chosen(command)
        going = [position for position in chosen if self._ledger.rows[position].state not in FINAL]
        self._crew.cancel(going, f"cancelled by {command.given_by}")
        self.cancelled |= command.trials is None
        return f"{_trials(len(going))} cancelled{_others(len(chosen) - len(going), 'had ended')}"

    def _retry(self, command: Command) -> str:
        if self.drain:
            raise RefusedError("the sweep is stopping; `mixmo retry` works when it has stopped, too")
        chosen = self._chosen(command)
        wanted = [position for position in chosen if self._ledger.rows[position].state in ("ERROR", "CANCELLED")]
        self._crew.retry(map(self._order_of, wanted), f"asked by {command.given_by}")
        self.again |= set(wanted)
        return f"{_trials(len(wanted))} queued again{_others(len(chosen) - len(wanted), 'not failed or cancelled')}"

    def _share(self, command: Command) -> str:
        if command.sweep is None:
            raise RefusedError("it does not say which sweep it is of")
        shared = self._sharing.join(self._crew, command.sweep, command.trials or ())
        with contextlib.suppress(UnreachableError):  # the store is away: trials go on, and the other may train one too
            self._writer.flush(force=True)  # the other reads our rows when it has the answer
        return f"{_trials(shared)} shared with {command.sweep}"

    def _chosen(self, command: Command) -> list[int]:
        """Positions of the trials that a command is about. One that this sweep has not is none of them."""
        ids = None if command.trials is None else set(command.trials)
        return [position for position, row in self._ledger.rows.items() if ids is None or row.trial_id in ids]


def _trials(count: int, word: str = "trial") -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _others(count: int, how: str) -> str:
    return f"; {count:,} {how}" if count else ""


def without_driver(store: ResultStore, sweep: str, verb: str, trials: Sequence[str] | None, who: str) -> str:
    """Carry out a `cancel` or a `retry` where no driver runs: hold the sweep for as long as it takes to write that.

    What was done, as a driver would say it. Raises RefusedError if a driver has begun meanwhile.
    """
    apply = {"cancel": _cancelled, "retry": _waiting_again}[verb]
    with store.writer(sweep, sweep_text=store.sweep_file(sweep), holder=who) as writer:
        chosen = [row for row in writer.rows if trials is None or row.trial_id in trials]
        changed = [new for row in chosen if (new := apply(row, who)) is not None]
        said = {"cancel": "cancelled", "retry": "queued again"}[verb]
        text = f"{_trials(len(changed))} {said}"
        writer.put(changed)
        writer.event(verb, f"{who}: {text}")
        writer.close(done=all(row.state in FINAL for row in writer.rows))
    return text


def _cancelled(row: TrialRow, by: str) -> TrialRow | None:
    return None if row.state in FINAL else row.replace(state="CANCELLED", error_cause=f"cancelled by {by}")


def _waiting_again(row: TrialRow, by: str) -> TrialRow | None:
    if row.state not in ("ERROR", "CANCELLED"):
        return None
    return row.replace(state="PENDING", stopped_early=False, **NO_ERROR)
