"""Who trains what, now: hands trials to gangs and takes what comes back. Knows nothing of Ray.

A trial is handed out as (trial, attempt, token). What comes back under another token is refused, and the gang that
sent it drops the trial. A gang that asks for work while it holds a trial has lost it: its workers were formed anew, and
the trial is handed out again under the next attempt.

A gang may train several trials of one shape side by side. Each of its slots asks, holds and reports as if it were a
gang of its own, called `gang-0/2`; what becomes of the gang becomes of all its slots.

People may pause all, cancel a trial or have it trained again; a trial that another sweep trains is held back.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from orchestrator.population import Line, Population
from orchestrator.stopping import Judge

NAMESPACE = "mixmo"
"""In which the actors of a sweep find each other."""
REFORM_S = 60.0
"""How long a trial waits for its own gang, which lost a worker, to stand again: then the next gang that asks has it."""

REHEARSALS = 2
"""So often the workers of a gang may die in a rehearsal before that is taken for want of memory."""


def gang_of(slot: str) -> str:
    """Whose slot it is: `gang-0` for `gang-0/2`. A gang of one slot bears one name for both."""
    return slot.partition("/")[0]


# ------------------------------------------------------------------------------------------ what travels to and fro


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A trial that waits to be trained."""

    index: int
    """Its position in the sweep."""
    trial_id: str
    settings: Mapping[str, Any]
    """Every setting by its dotted name."""
    shape: str = ""
    """Trials of one shape may be trained side by side (`config.shape_of`)."""
    attempts: int = 0
    """Attempts begun before this driver's time."""
    checkpoint: str | None = None
    """The newest that the trial's row names."""
    held_back: bool = False
    """Another sweep may be training it: not to be handed out before it is released."""
    stopped: str | None = None
    """Why its scheduler has stopped it, where an earlier driver was killed before it could write its end."""
    line: Line | None = None
    """Of a trial of a population: which checkpoints are its own. Its `settings` are as copies have changed them."""


Loss = Literal["crash", "oom", "preempted", "store"]
"""What takes a trial out of a gang's hands: a worker or a device that died, memory that was not enough, a machine that
was taken away, a store that was away for too long."""
_SPOKEN: Mapping[Loss, str] = {
    "crash": "crash", "oom": "out of memory", "preempted": "preempted", "store": "the store was away"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often a trial begins again, by what it was lost by."""

    crash: float = 2
    oom: float = 0
    preempted: float = math.inf
    store: float = math.inf


Answer = Literal["go on", "save", "drop"]
"""To a gang that reports: train on; save the trial and give it back, since the sweep pauses, the scheduler has seen
enough of it or others of its population are to come as far first; it is not yours any more.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """An order in a gang's hands."""

    order: Order
    fence: int
    attempt: int
    token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What a gang says of one epoch. Times as in `rows.EpochRow`."""

    epoch: int
    metrics: Mapping[str, float]
    wall_s: float
    gpu_seconds: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One thing that happened, in the order in which it reached the dispatcher."""

    seq: int
    time: datetime
    kind: Literal[
        "started", "epochs", "exploited", "lost", "paused", "ended", "retried", "withdrawn", "gang", "refused"
    ]
    index: int | None = None
    attempt: int = 0
    epochs: Sequence[EpochReport] = ()
    checkpoint: str | None = None
    logits: str | None = None
    state: Literal["TERMINATED", "ERROR", "CANCELLED"] | None = None
    stopped_early: bool = False
    """The scheduler stops it: said with the epochs that decided it, and with its end."""
    text: str = ""
    cause: str | None = None
    error_kind: Literal["exception"] | Loss | None = None
    """Of a trial that was lost, or ended as ERROR."""
    lineage: str | None = None
    """Of a trial that its population has compared: what its row keeps of that (`Population.lineage`)."""
    parent_id: str | None = None
    """Whom it was made a copy of."""
    hosts: tuple[str, ...] = ()
    device_name: str | None = None
    torch_version: str | None = None
    slots: int = 1
    """Of the gang that has the trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank of a gang, as it introduced itself."""

    gang: str
    rank: int
    world_size: int
    pid: int
    host: str
    device_name: str
    torch_version: str
    slots: int = 1
    """How many trials its gang trains side by side."""
    node: str = ""
    """Ray's name for its machine."""
    oom_kills: int = 0
    """How many processes that machine's kernel had ended for want of memory when this one began."""


# ------------------------------------------------------------------------------------------------------- dispatcher


@dataclass
class _Standing:
    """How one order stands."""

    order: Order
    attempts: int
    submitted: bool = False
    losses: Counter[str] = field(default_factory=Counter)
    """By their kind."""
    crashed_on: frozenset[str] = frozenset()
    """The machines of its last loss that may be gone, as long as that counts as a crash."""
    held_back: bool = False
    held: Assignment | None = None
    accepted: bool = False
    """Whether the gang has said that it has it: before that, a death is no crash of the trial's."""
    reached: int = 0
    """Its newest epoch that was ever reported."""
    alone_until: int = 0
    """It went down with others, and nobody knows whose doing it was: it is trained alone until this epoch is done."""
    ended: bool = False
    stopped: str | None = None
    """Why the scheduler has stopped it."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set where it may wait for its first gang no more."""

    @property
    def is_fresh(self) -> bool:
        """Whether it waits for its first gang, and may have one."""
        return self.attempts == self.order.attempts and not (self.ended or self.held_back)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roll:
    """Who has what to do."""

    queued: int
    """Trials that wait for a gang and may have one now."""
    in_hand: int
    standing: Mapping[str, float | None]
    """The gangs that came to work, and for how many seconds each has found no trial; None: it has one."""


class _Blow(NamedTuple):
    """What struck a slot, and with it all of its gang."""

    kind: Loss
    why: str
    at: float
    shared: bool
    """Whether the gang had several trials in hand."""


class Dispatcher:
    """Hands trials to gangs and takes what comes back. Runs as an asyncio actor; a plain object in its tests.

    Waiting methods are coroutines; all others act at once, one at a time, and so need no lock.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        *,
        fence: int,
        retries: Retries,
        judge: Judge | None = None,
        population: Population | None = None,
        missed_within_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`judge` says which trials stop early; None: none. A `population` takes turns: all of its orders wait from the
        beginning, whomever Tune would begin with. `missed_within_s`: how long Ray may take to notice that a machine is
        gone.
        """
        self._fence, self._retries, self._judge, self._clock = fence, retries, judge, clock
        self._population, self._missed_within_s = population, missed_within_s
        self._standings = {
            order.index: _Standing(order, order.attempts, held_back=order.held_back, stopped=order.stopped)
            for order in orders
        }
        self._queue: deque[int] = deque()
        self._hands: dict[str, Assignment] = {}
        """What each slot holds."""
        self._nodes: dict[str, frozenset[str]] = {}
        """The machines on which each trial in hand began."""
        self._struck: dict[str, _Blow] = {}
        """Slots that hold a trial and whose gang lost a worker."""
        self._doubted: dict[int, _Blow] = {}
        """Trials that a crash would end, unless Ray says yet that a machine was gone. Nobody has them in hand."""
        self._asking: dict[str, object] = {}
        """Each slot's latest question. Ray does not cancel those of a worker that has died."""
        self._idle: dict[str, object] = {}
        """The questions that wait for a trial."""
        self._idle_since: dict[str, float] = {}
        self._dismissed: set[str] = set()
        self._warned: set[str] = set()
        """Gangs of which a machine will be taken away."""
        self._workers: dict[str, dict[int, Worker]] = {}
        self._formed: Counter[str] = Counter()
        self._updates: deque[Update] = deque()
        """Those that the driver has not acknowledged."""
        self._told = 0
        self._news, self._work = asyncio.Event(), asyncio.Event()
        self._closed = self._draining = self._paused = False
        self._rehearsals: Counter[str] = Counter()
        self._fits = False
        """Whether a gang has rehearsed the largest trial."""
        for order in orders if population is not None else ():
            self.submit(order.index)

    # For gangs

    def rehearses(self, gang: str) -> bool:
        """Whether the gang is to rehearse the largest trial before it joins: until one has. A gang that asks anew has
        died of it; once may be chance.
        """
        if self._fits or self._draining or self._closed:
            return False
        if self._rehearsals[gang] >= REHEARSALS:
            self.rehearsed(gang, f"the workers of {gang} died of it {REHEARSALS} times")
            return False
        self._rehearsals[gang] += 1
        return True

    def rehearsed(self, gang: str, fault: str | None) -> None:
        """How it went. A fault ends the sweep before it begins: nothing is handed out any more."""
        if fault is None:
            self._fits = True
        elif not self._draining:
            self._draining = True
            self._tell("refused", None, text=fault)

    def join(self, worker: Worker, dead_nodes: Collection[str] = ()) -> None:
        """A rank introduces itself, each time its process starts, and tells which machines Ray has lost."""
        before = self._workers.setdefault(worker.gang, {})
        if worker.rank == 0:
            self._asking = {slot: ask for slot, ask in self._asking.items() if gang_of(slot) != worker.gang}
            self._formed[worker.gang] += 1
            self.nodes_lost(dead_nodes)
            if any(worker.oom_kills > each.oom_kills for each in before.values() if each.host == worker.host):
                self.struck(worker.gang, "oom", f"the kernel of {worker.host} ended a process for want of memory")
        before[worker.rank] = worker
        if worker.slots > 1:  # before any slot asks: none is to find a neighbour that is no more
            why = f"the process of {worker.gang} died; Ray Train formed it again"
            self._lose_all(worker.gang, why, frozenset({worker.node}))

    def struck(self, gang: str, kind: Loss, why: str) -> None:
        """A gang lost a worker, and Ray Train forms it anew. What it holds waits for that a while; it does not wait
        where the machine is gone. Of several reasons, what says more than a crash holds.
        """
        shared = self._is_shared(gang)
        for slot in self._in_hand_of(gang):
            blow = self._struck.get(slot) or _Blow("crash", why, self._clock(), shared)
            if blow.kind == "crash":
                self._struck[slot] = blow._replace(kind=kind, why=why)
                self._work.set()

    def warned(self, gang: str) -> None:
        """A machine of this gang will be taken away: what it holds it is to save and give back, and then to leave."""
        self._warned.add(gang)
        self._dismissed.add(gang)
        self._work.set()

    def nodes_lost(self, nodes: Collection[str]) -> None:
        """Ray has lost these machines, now or before."""
        for slot in list(self._hands):
            if self._nodes[slot] & set(nodes):
                self.struck(gang_of(slot), "preempted", f"a machine of {gang_of(slot)} is gone")
        for standing in self._standings.values():  # a gang that stands again elsewhere knows it before Ray does
            if standing.crashed_on & set(nodes):
                standing.crashed_on = frozenset()
                standing.losses["crash"] -= 1
                standing.losses["preempted"] += 1
                doubted = self._doubted.get(standing.order.index)
                if doubted:
                    self._settle(standing, f"{doubted.why}; a machine of it is gone", "preempted")

    async def next(self, slot: str, wait_s: float) -> Assignment | Literal["wait", "leave"]:
        """A trial for this slot: of the shape of those that its gang has in hand, where there are any. A slot that asks
        while it holds one has lost it: the gang's workers were formed anew.
        """
        gang = gang_of(slot)
        if slot in self._hands:
            stands_on = frozenset(worker.node for worker in self._workers.get(gang, {}).values())
            self._lose_all(gang, f"a worker of {gang} died; Ray Train formed the gang again", stands_on)
        ask = self._asking[slot] = object()
        deadline = time.monotonic() + wait_s
        if not self._in_hand_of(gang):
            self._idle_since.setdefault(gang, self._clock())
        while not (self._closed or gang in self._dismissed) and self._asking.get(slot) is ask:
            index = self._first_free(gang)
            if index is not None:
                return self._hand_out(index, slot)
            if not await self._wait_for_work(slot, ask, deadline - time.monotonic()):
                return "wait"
        return "leave" if self._closed or gang in self._dismissed else "wait"

    def accept(self, token: str) -> None:
        """The gang has the trial in its hands."""
        standing = self._holder(token)
        if standing is not None:
            standing.accepted = True

    def report(self, token: str, epochs: Sequence[EpochReport], checkpoint: str | None) -> Answer:
        """Take the rows of a trial; none where only a checkpoint is new, in the middle of an epoch. `drop`: the token
        is not the trial's any more.
        """
        standing = self._holder(token)
        if standing is None or standing.held is None:
            return "drop"
        standing.reached = max([standing.reached, *(each.epoch for each in epochs)])
        if standing.alone_until and standing.reached >= standing.alone_until:
            standing.alone_until = 0
            self._work.set()
        if checkpoint is not None:
            standing.order = replace(standing.order, checkpoint=checkpoint)
        if self._judge is not None and standing.stopped is None:
            verdicts = [self._judge.decide(standing.order.index, each.epoch, each.metrics) for each in epochs]
            standing.stopped = next(filter(None, verdicts), None)
        told: dict[str, Any] = {"stopped_early": True, "cause": standing.stopped} if standing.stopped else {}
        is_milestone = self._compare(standing, epochs)
        if is_milestone and self._population is not None:
            told["lineage"] = self._population.lineage(standing.order.index)
        self._tell("epochs", standing, epochs=tuple(epochs), checkpoint=checkpoint, **told)
        self._exploit()
        if standing.held is None:
            return "drop"
        waits = is_milestone and self._is_ahead(standing)
        leaves = self._paused or standing.stopped or waits or self._gang_of(token) in self._warned
        return "drop" if self._closed else "save" if leaves else "go on"

    def give_back(self, token: str, checkpoint: str | None) -> bool:
        """The trial is saved, as an answer asked for: it has ended if its scheduler stopped it, else it waits for
        another gang, or until the sweep goes on, and is the first then. It has lost nothing, and no retry.
        """
        standing = self._holder(token)
        if standing is None:
            return False
        if standing.stopped:
            self._end(standing, "TERMINATED", checkpoint=checkpoint)
            return True
        if self._gang_of(token) in self._warned:
            why = f"{self._gang_of(token)} is to lose a machine, and has saved it"
            self._tell("lost", standing, text=why, cause=_SPOKEN["preempted"], error_kind="preempted",
                       checkpoint=checkpoint)  # fmt: skip
        else:
            self._tell("paused", standing, checkpoint=checkpoint)
        self._release(standing)
        self._queue.appendleft(standing.order.index)
        self._work.set()
        return True

    def finish(self, token: str, logits: str | None = None) -> bool:
        """The trial has trained all its epochs. `logits` is the key of those of the last one."""
        standing = self._holder(token)
        if standing is None:
            return False
        standing.stopped = None  # it came too late
        self._end(standing, "TERMINATED", logits=logits)
        return True

    def fail(self, token: str, error: str, cause: str) -> bool:
        """An exception came out of the trial. It would come again: no further attempt is made."""
        standing = self._holder(token)
        if standing is None:
            return False
        if standing.stopped:  # it was only to be saved
            self._end(standing, "TERMINATED")
            return True
        self._end(standing, "ERROR", text=error, cause=cause, error_kind="exception")
        return True

    def abandon(self, token: str, why: str, kind: Loss, error: str | None = None) -> bool:
        """The gang cannot go on with the trial, by no exception that would surely come again. `error` is the traceback,
        if the trial is to blame: what is only a worker's death may be of a neighbour's making.
        """
        standing = self._holder(token)
        if standing is None or standing.held is None:
            return False
        gang = self._gang_of(token)
        shared = self._is_shared(gang)
        if kind == "crash":  # of a device: its neighbours have lost it, too
            self.struck(gang, kind, why)
        self._lose(standing.held, why, kind, error, shared=shared)
        return True

    # For Tune's proxies

    def submit(self, index: int) -> None:
        """Queue a trial: the scheduler wants it run. A second time changes nothing."""
        standing = self._standings[index]
        if not (standing.submitted or standing.ended):
            standing.submitted = True
            if self._population is not None:
                self._population.open(index)
            if standing.stopped:
                self._end(standing, "TERMINATED")
                return
            self._queue.append(index)
            self._work.set()

    async def offer(self, indices: Sequence[int]) -> None:
        """Queue trials, and wait until each has been taken up, is over or held back, or nobody trains any more."""
        for index in indices:
            self.submit(index)
        for index in indices:
            standing = self._standings[index]
            while standing.is_fresh and not self._closed:
                standing.changed.clear()
                await standing.changed.wait()

    # For the driver

    async def updates(self, after: int, wait_s: float) -> list[Update]:
        """What happened after number `after`, as soon as there is something, or nothing after `wait_s` seconds."""
        while self._updates and self._updates[0].seq <= after:
            self._updates.popleft()
        self._salvage()
        if not self._updates:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
        return list(self._updates)

    def workers(self) -> list[Worker]:
        return [worker for gang in self._workers.values() for worker in gang.values()]

    def formed(self, gang: str) -> int:
        """How often the gang has been formed so that its first rank came to work."""
        return self._formed[gang]

    def gang_ended(self, gang: str, why: str) -> None:
        """A gang will not come back: what it held goes to another."""
        self._asking = {slot: ask for slot, ask in self._asking.items() if gang_of(slot) != gang}
        self._idle = {slot: ask for slot, ask in self._idle.items() if gang_of(slot) != gang}
        self._idle_since.pop(gang, None)
        self._lose_all(gang, why)
        self._dismissed.discard(gang)
        self._warned.discard(gang)
        self._workers.pop(gang, None)
        self._tell("gang", None, text=f"{gang} ended: {why}")

    def roll(self) -> Roll:
        still = self._draining or self._paused or self._closed
        queued = 0 if still else sum(map(self._may_begin, self._queue))
        now = self._clock()
        standing = {gang: self._idle_since.get(gang) for gang in self._workers}
        idle = {gang: None if since is None else now - since for gang, since in standing.items()}
        return Roll(queued=queued, in_hand=len(self._hands), standing=idle)

    def dismiss(self, gangs: Iterable[str]) -> None:
        """Send gangs home that have no trial."""
        self._dismissed |= set(gangs) & self._idle_since.keys()
        self._work.set()

    def drain(self) -> None:
        """Hand out nothing more. Trials in hand go on."""
        self._draining = True

    def in_hand(self) -> int:
        return len(self._hands)

    def idle(self) -> int:
        """How many slots wait for a trial."""
        return len(self._idle)

    def pause(self) -> None:
        """Hand out nothing, and have every trial in hand saved and given back at its next report."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._work.set()

    def cancel(self, indices: Iterable[int], cause: str) -> None:
        """End trials that have not ended. The gang of one in hand hears of it at its next report."""
        for standing in self._unended(indices):
            self._drop_from_queue(standing)
            self._end(standing, "CANCELLED", cause=cause)

    def retry(self, orders: Iterable[Order], text: str) -> None:
        """Queue trials that have ended, in this driver's time or before, past Tune: it has finished with them. What an
        ended trial is worth is for the driver to know.
        """
        for order in orders:
            before = self._standings.get(order.index)
            if before is None or before.ended:
                standing = _Standing(order, before.attempts if before else order.attempts)
                self._standings[order.index] = standing
                self._tell("retried", standing, text=text)
                self.submit(order.index)

    def add(self, orders: Iterable[Order]) -> None:
        """Queue trials that were not known at first, past Tune."""
        for order in orders:
            self._standings[order.index] = _Standing(order, order.attempts)
            if self._judge is not None:
                self._judge.add(order.index, order.settings)
            self.submit(order.index)

    def hold_back(self, indices: Iterable[int]) -> None:
        """Do not hand out these trials until they are released. One in hand goes on."""
        for standing in self._unended(indices):
            if standing.held is None:
                standing.held_back = True
                standing.changed.set()

    def release(self, indices: Iterable[int]) -> None:
        """Hand out these trials in their turn, past Tune: it was told that they are over."""
        for standing in self._unended(indices):
            standing.held_back = False
            self.submit(standing.order.index)
            self._work.set()

    def withdraw(self, indices: Iterable[int], text: str) -> None:
        """End trials that wait: another sweep has their results."""
        for standing in self._unended(indices):
            if standing.held is None:
                self._drop_from_queue(standing)
                self._conclude(standing, "withdrawn", text=text)

    def close(self) -> None:
        """Send every gang home when it next asks, and let Tune's proxies end, which wait for gangs: else Tune's thread
        is still at work when Ray goes down under it, and the driver's process with it.
        """
        self._closed = True
        self._work.set()
        for standing in self._standings.values():
            standing.changed.set()

    # Inside

    def _compare(self, standing: _Standing, epochs: Iterable[EpochReport]) -> bool:
        """Hold the trial against its population. Whether one of these epochs is a milestone that it had not passed."""
        if self._population is None:
            return False
        index, checkpoint = standing.order.index, standing.order.checkpoint
        return any(self._population.compare(index, each.epoch, each.metrics, checkpoint) for each in epochs)

    def _exploit(self) -> None:
        """Trials that were made copies of better ones go on as such, in their turn, under their next attempts."""
        population = self._population
        if population is None:
            return
        for index in population.new_copies():
            standing, copy = self._standings[index], population.copy(index)
            self._tell("exploited", standing, text=str(copy), checkpoint=copy.checkpoint, parent_id=copy.parent_id,
                       lineage=population.lineage(index))  # fmt: skip
            standing.order = replace(standing.order, checkpoint=copy.checkpoint)
            self._release(standing)
            if index not in self._queue:
                self._queue.append(index)
        self._work.set()  # whoever waited for this one may begin

    def _is_ahead(self, standing: _Standing) -> bool:
        """Whether others of its population are to come as far first: those that it waits for, or whose turn it is."""
        if self._population is None:
            return False
        index, turn = standing.order.index, self._population.turn
        waiting = [] if self._draining else filter(self._may_begin, self._queue)
        return self._population.waits(index) or any(turn(each) < turn(index) for each in waiting)

    def _may_begin(self, index: int) -> bool:
        """Whether a trial that is queued may be handed out now."""
        waits = self._population is not None and self._population.waits(index)
        return not (self._standings[index].held_back or waits)

    def _unended(self, indices: Iterable[int]) -> list[_Standing]:
        return [standing for index in indices if not (standing := self._standings[index]).ended]

    async def _wait_for_work(self, slot: str, ask: object, wait_s: float) -> bool:
        """Whether there may be some."""
        self._work.clear()
        self._idle[slot] = ask
        try:
            await asyncio.wait_for(self._work.wait(), wait_s)
        except TimeoutError:
            return False
        finally:
            if self._idle.get(slot) is ask:
                del self._idle[slot]
        return True

    def _first_free(self, gang: str) -> int | None:
        """The next trial to hand out to this gang, taken from the queue."""
        if self._draining or self._paused:
            return None
        beside = [self._standings[self._hands[slot].order.index] for slot in self._in_hand_of(gang)]
        free = (each for each in self._queue if self._may_begin(each) and _goes_with(self._standings[each], beside))
        index = next(free, None) if self._population is None else min(free, key=self._population.turn, default=None)
        if index is not None:
            self._queue.remove(index)
        return index

    def _drop_from_queue(self, standing: _Standing) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(standing.order.index)

    def _hand_out(self, index: int, slot: str) -> Assignment:
        assert slot not in self._hands
        gang = gang_of(slot)
        self._idle_since.pop(gang, None)
        standing = self._standings[index]
        standing.attempts += 1
        standing.accepted = False
        standing.changed.set()
        order = standing.order
        if self._population is not None:
            settings = {**order.settings, **self._population.settings(index)}
            order = replace(order, settings=settings, line=self._population.line(index))
        standing.held = Assignment(
            order=order, fence=self._fence, attempt=standing.attempts, token=secrets.token_hex(4)
        )
        self._hands[slot] = standing.held
        ranks = self._workers.get(gang, {})
        first = ranks.get(0)
        self._nodes[slot] = frozenset(worker.node for worker in ranks.values())
        self._tell(
            "started", standing, text=f"on {slot}", hosts=tuple(sorted({worker.host for worker in ranks.values()})),
            device_name=first and first.device_name, torch_version=first and first.torch_version,
            slots=first.slots if first else 1,
        )  # fmt: skip
        return standing.held

    def _holder(self, token: str) -> _Standing | None:
        for assignment in self._hands.values():
            if assignment.token == token:
                return self._standings[assignment.order.index]
        return None

    def _gang_of(self, token: str) -> str:
        return next((gang_of(slot) for slot, held in self._hands.items() if held.token == token), "")

    def _in_hand_of(self, gang: str) -> list[str]:
        """The gang's slots that have a trial."""
        return [slot for slot in self._hands if gang_of(slot) == gang]

    def _is_shared(self, gang: str) -> bool:
        """Whether what befalls the gang may be the doing of either of several trials."""
        held = [self._hands[slot].order.index for slot in self._in_hand_of(gang)]
        return sum(self._standings[index].accepted for index in held) > 1

    def _lose_all(self, gang: str, why: str, alive: frozenset[str] = frozenset()) -> None:
        """A gang has lost all that it had in hand, by what is known to have struck it; else it has crashed. `alive`:
        machines that are known to be there. A gang that was told to drop all, since nobody trains any more, has lost
        nothing: the next driver goes on with it.
        """
        if self._closed:
            return
        shared, slots = self._is_shared(gang), self._in_hand_of(gang)
        for slot in slots:
            self._lose_struck(slot, self._struck.get(slot) or _Blow("crash", why, self._clock(), shared), alive)

    def _lose_struck(self, slot: str, blow: _Blow, alive: frozenset[str] = frozenset()) -> None:
        """A crash on machines that are not known to be there may be their end, which Ray has yet to notice: it ends no
        trial before Ray would have.
        """
        gang = gang_of(slot)
        if gang in self._warned and blow.kind == "crash":
            blow = blow._replace(kind="preempted", why=f"{gang} lost the machine that it was warned of")
        standing = self._standings[self._hands[slot].order.index]
        if standing.accepted and blow.kind == "crash" and not blow.shared:
            standing.crashed_on = self._nodes.get(slot, frozenset()) - alive
            last = standing.losses["crash"] >= self._retries.crash and not standing.stopped
            if last and standing.crashed_on and self._missed_within_s:
                standing.losses["crash"] += 1
                self._doubted[standing.order.index] = blow
                self._release(standing)
                return
        self._lose(self._hands[slot], blow.why, blow.kind, shared=blow.shared)

    def _lose(
        self, assignment: Assignment, why: str, kind: Loss, error: str | None = None, *, shared: bool = False
    ) -> None:
        standing = self._standings[assignment.order.index]
        if standing.stopped:  # it was only to be saved
            self._end(standing, "TERMINATED")
            return
        if shared and standing.accepted and kind in ("crash", "oom"):
            # A trial that takes its neighbours with it dies alone the next time, and is blamed then.
            standing.alone_until = standing.reached + 1
            why = f"{why}; of several trials in hand none is blamed, and this one goes on alone for now"
        else:
            standing.losses[kind] += standing.accepted
        self._settle(standing, why, kind, error)

    def _settle(self, standing: _Standing, why: str, kind: Loss, error: str | None = None) -> None:
        """A loss that is counted ends the trial, or another gang takes it up."""
        self._doubted.pop(standing.order.index, None)
        allowed = float(getattr(self._retries, kind))
        if kind == "oom" and error is None:  # a kernel ends the largest process, whoever took the last byte
            allowed = max(allowed, self._retries.crash)
        if standing.losses[kind] > allowed:
            told = error or f"{why}; this was {_SPOKEN[kind]} {standing.losses[kind]} of the trial"
            self._end(standing, "ERROR", text=told, cause=why if error else _SPOKEN[kind], error_kind=kind)
            return
        self._tell("lost", standing, text=why, cause=_SPOKEN[kind], error_kind=kind)
        self._release(standing)
        self._queue.appendleft(standing.order.index)
        self._work.set()

    def _salvage(self) -> None:
        """Take trials from gangs that were struck and will not stand again soon, and end those that are in doubt no
        more.
        """
        for slot, blow in list(self._struck.items()):
            if blow.kind == "preempted" or self._clock() - blow.at > REFORM_S:
                self._lose_struck(slot, blow)
        for index, blow in list(self._doubted.items()):
            if self._clock() - blow.at > self._missed_within_s:
                self._settle(self._standings[index], blow.why, blow.kind)

    def _end(self, standing: _Standing, state: Literal["TERMINATED", "ERROR", "CANCELLED"], **told: Any) -> None:
        if state == "TERMINATED" and standing.stopped:
            told |= {"stopped_early": True, "cause": standing.stopped}
        self._conclude(standing, "ended", state=state, **told)

    def _conclude(self, standing: _Standing, kind: str, **told: Any) -> None:
        self._doubted.pop(standing.order.index, None)
        self._tell(kind, standing, **told)
        self._release(standing)
        standing.ended = True
        standing.changed.set()
        if self._population is not None:
            self._population.close(standing.order.index)
            self._exploit()

    def _release(self, standing: _Standing) -> None:
        self._hands = {slot: held for slot, held in self._hands.items() if held is not standing.held}
        self._struck = {slot: blow for slot, blow in self._struck.items() if slot in self._hands}
        standing.held = None

    def _tell(self, kind: Any, standing: _Standing | None, **told: Any) -> None:
        self._told += 1
        index, attempt = (None, 0) if standing is None else (standing.order.index, standing.attempts)
        update = Update(seq=self._told, time=datetime.now(UTC), kind=kind, index=index, attempt=attempt, **told)
        self._updates.append(update)
        self._news.set()


def _goes_with(standing: _Standing, beside: Sequence[_Standing]) -> bool:
    """Whether a trial that waits may be trained beside those that a gang has in hand."""
    if standing.held_back or not beside:
        return not standing.held_back
    alone = any(each.alone_until for each in (standing, *beside))
    return not alone and standing.order.shape == beside[0].order.shape
