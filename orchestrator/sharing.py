"""Trials that another running sweep of the store wants as well: each is trained once, and both have it.

Such a trial is held back until a gang would else be idle and its claim is ours, or until its result is there. Whoever
trains it claims it before; whoever finishes it writes its row before the claim goes. A driver that wants what others
have begun tells theirs by a command, `share`, so that sweeps which share nothing ask the store for nothing. All this
saves work; no result hangs on it.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Self

from orchestrator.engine import Crew
from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan
from orchestrator.rows import FINAL, EpochRow, TrialRow
from orchestrator.store import Claim, DamagedError, ResultStore

PERIOD_S = 10.0
"""Between two looks at what others do."""
LONGEST_S = 60.0
"""The same where a look takes long: it may take a twentieth of the time, but nothing is forgotten over that."""
EAGER_S = 1.0
"""The same where a gang is idle, as long as there is something to claim."""
ANSWER_S = 15.0
"""How long the other driver has to say that it knows what is shared, before its rows are taken as they are."""


class Sharing:
    """What one driver knows of its shared trials. Positions are those of its own sweep."""

    def __init__(self, store: ResultStore, sweep: str, fence: int, ledger: Ledger) -> None:
        self._store, self._sweep, self._ledger = store, sweep, ledger
        self._claims = store.claims(sweep, fence)
        self._partners: set[str] = set()
        self._waiting: dict[int, str] = {}
        """Held back, by position: the ids."""
        self._claimed: dict[int, str] = {}
        self._taken: dict[int, tuple[TrialRow, list[EpochRow]]] = {}
        self._asked: dict[str, str] = {}
        """The commands to partners that are not answered yet."""
        self._asked_until = self._looked = self._next_look = 0.0
        self._resting, self._more = False, True

    @classmethod
    def begin(cls, store: ResultStore, planned: Plan, fence: int, ledger: Ledger) -> Self:
        """Find what is shared, and tell the others' drivers.

        Two sweeps that begin within the same second may both see nothing, and train a trial twice.
        """
        self = cls(store, planned.sweep.name, fence, ledger)
        items = [item for item in planned.items if item.runs and item.begun_in]
        for partner in sorted({sweep for item in items for sweep in item.begun_in}):
            with contextlib.suppress(UnreachableError):  # then it is not known to be running
                at_work = self._fence_of(partner)
                if at_work is not None:
                    shared = [item.trial for item in items if partner in item.begun_in]
                    ids = [trial.trial_id for trial in shared]
                    command = store.commands(partner).give(
                        "share", fence=at_work, given_by=f"sweep {self._sweep}", trials=ids, sweep=self._sweep
                    )
                    self._partners.add(partner)
                    self._asked[partner] = command.id
                    self._asked_until = time.monotonic() + ANSWER_S
                    self._waiting |= {trial.position: trial.trial_id for trial in shared}
        return self

    @property
    def held_back(self) -> frozenset[int]:
        return frozenset(self._waiting)

    @property
    def partners(self) -> list[str]:
        """The sweeps that share trials with this one."""
        return sorted(self._partners)

    def join(self, crew: Crew, partner: str, trial_ids: Iterable[str]) -> int:
        """Another sweep has begun that wants these trials; how many of them are not over here."""
        wanted = set(trial_ids)
        shared = {i: row for i, row in self._ledger.rows.items() if row.trial_id in wanted and row.state not in FINAL}
        self._partners.add(partner)
        for position, row in shared.items():
            if row.state == "RUNNING":
                self._claim(position)
            elif position not in self._claimed:
                self._waiting[position] = row.trial_id
        crew.hold_back(self._waiting)
        return len(shared)

    def look(self, crew: Crew) -> None:
        """Release the trials that are ours to train, and take those that others have finished. Now and then."""
        now = time.monotonic()
        for position in [each for each in self._waiting if self._ledger.rows[each].state in FINAL]:
            del self._waiting[position]  # it was cancelled
        if self._resting or not self._waiting or now < self._looked + EAGER_S:
            return
        waking = sum(self._ledger.rows[position].state != "RUNNING" for position in self._claimed)
        room = max(0, crew.idle() - waking)
        if now < self._next_look and not (room and self._more):
            return
        free: list[int] = []
        try:
            if self._are_told(now):
                free = self._free(room)
                self._more = len(free) >= room
        except UnreachableError:
            self._more = False  # the store is away: later
        self._looked = time.monotonic()
        self._next_look = self._looked + min(max(PERIOD_S, 20 * (self._looked - now)), LONGEST_S)
        if free:
            crew.release(free)
        finished = [position for position in self._waiting if position in self._taken]
        for position in finished:
            crew.withdraw([position], f"from {self._taken[position][0].sweep}")
        for position in (*free, *finished):
            del self._waiting[position]

    def rest(self, crew: Crew) -> None:
        """Nothing is handed out for now: others may train what nobody trains here."""
        self._resting = True
        for position in list(self._claimed):
            if self._ledger.rows[position].state != "RUNNING":
                self._put_back(crew, position)

    def wake(self) -> None:
        self._resting, self._more, self._next_look = False, True, 0.0

    def started(self, position: int) -> None:
        """A gang has the trial: one that was to wait for others was handed out before it could be held back."""
        if self._waiting.pop(position, None) is not None:
            self._claim(position)

    def paused(self, crew: Crew, position: int) -> None:
        if position in self._claimed:
            self._put_back(crew, position)

    def taken(self, position: int) -> tuple[TrialRow, list[EpochRow]]:
        """The result that another sweep has of a trial, and its epochs."""
        return self._taken.pop(position)

    def over(self) -> list[int]:
        """Claimed trials that have ended here. Once their rows are written, `drop` gives the claims up."""
        return [position for position in self._claimed if self._ledger.rows[position].state in FINAL]

    def drop(self, positions: Iterable[int]) -> None:
        for position in positions:
            with contextlib.suppress(UnreachableError):  # it ends with our lease
                self._claims.drop(self._claimed.pop(position))

    # Inside

    def _claim(self, position: int) -> None:
        """Say that it is being trained here, whatever others say."""
        self._claimed[position] = self._ledger.rows[position].trial_id
        with contextlib.suppress(UnreachableError):
            self._claims.take(self._claimed[position], self._holds)

    def _put_back(self, crew: Crew, position: int) -> None:
        crew.hold_back([position])
        self._waiting[position] = self._claimed[position]
        self.drop([position])

    def _are_told(self, now: float) -> bool:
        """Whether the others know what is shared, or have had their time."""
        for partner, asked in list(self._asked.items()):
            command = self._store.commands(partner).get(asked)
            if command is None or command.answer is not None or self._fence_of(partner) != command.fence:
                del self._asked[partner]
        return not self._asked or now > self._asked_until

    def _free(self, room: int) -> list[int]:
        """Claim up to so many of those that wait. What others have finished is put among the taken."""
        at_work = {name for name in self._partners if self._fence_of(name) is not None}
        rows = self._rows_elsewhere()  # in this order: who has gone by then has written all that there will be
        free: list[int] = []
        for position, trial_id in self._waiting.items():
            elsewhere = rows.get(trial_id, {})
            if self._take(position, elsewhere):
                continue
            busy = any(row.state == "RUNNING" for sweep, row in elsewhere.items() if sweep in at_work)
            if not at_work or (len(free) < room and not busy and self._claims.take(trial_id, self._holds)):
                free.append(position)
        if at_work and free:
            rows = self._rows_elsewhere()  # one may have been finished between the look at its row and its claim
        for position in free:
            self._claimed[position] = self._waiting[position]
        done = [position for position in free if self._take(position, rows.get(self._waiting[position], {}))]
        self.drop(done)
        return [position for position in free if position not in done]

    def _rows_elsewhere(self) -> dict[str, dict[str, TrialRow]]:
        """The partners' rows of the trials that wait, by trial and sweep."""
        wanted, found = set(self._waiting.values()), dict[str, dict[str, TrialRow]]()
        for partner in self._partners:
            with contextlib.suppress(NotFoundError, DamagedError):  # it says nothing, and nobody waits for it
                for row in self._store.trial_rows(partner):
                    if row.trial_id in wanted:
                        found.setdefault(row.trial_id, {})[partner] = row
        return found

    def _take(self, position: int, elsewhere: Mapping[str, TrialRow]) -> bool:
        """Whether another sweep has the result: then it is taken."""
        for sweep, row in elsewhere.items():
            if row.state == "TERMINATED" and not row.stopped_early:
                epochs: list[EpochRow] = []
                with contextlib.suppress(NotFoundError, DamagedError):  # its curve is lost, its result is not
                    epochs = self._store.epoch_rows(sweep, row.trial_id)
                self._taken[position] = (row, epochs)
                return True
        return False

    def _fence_of(self, sweep: str) -> int | None:
        """The fence under which a living driver holds a sweep; None if none does."""
        try:
            lease = self._store.lease(sweep)
        except (NotFoundError, DamagedError):
            return None
        return None if lease is None or lease.expired else lease.fence

    def _holds(self, claim: Claim) -> bool:
        return self._fence_of(claim.sweep) == claim.fence
