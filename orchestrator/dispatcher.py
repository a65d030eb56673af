"""Who trains what, now: hands trials to gangs and takes what comes back. Knows nothing of Ray.

A trial is handed out as (trial, attempt, token). What comes back under another token is refused, and the gang that
sent it drops the trial. A gang that asks for work while it holds a trial has lost it: its workers were formed anew, and
the trial is handed out again under the next attempt.

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
SLOT = "mixmo_slot"
"""The Ray resource that limits how many trials Tune keeps going. A cluster has 1 of it, on its head; with n gangs a
proxy takes 1/n."""
REFORM_S = 60.0
"""How long a trial waits for its own gang, which lost a worker, to stand again: then the next gang that asks has it."""

REHEARSALS = 2
"""So often the workers of a gang may die in a rehearsal before that is taken for want of memory."""


# ------------------------------------------------------------------------------------------ what travels to and fro


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A trial that waits to be trained."""

    index: int
    """Its position in the sweep."""
    trial_id: str
    settings: Mapping[str, Any]
    """Every setting by its dotted name."""
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
    """The machines of its last loss, as long as that counts as a crash."""
    held_back: bool = False
    held: Assignment | None = None
    accepted: bool = False
    """Whether the gang has said that it has it: before that, a death is no crash of the trial's."""
    reports: dict[int, EpochReport] = field(default_factory=dict)
    """By epoch: an attempt repeats the epochs since its checkpoint, and Tune is to see each once."""
    ended: bool = False
    stopped: str | None = None
    """Why the scheduler has stopped it."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roll:
    """Who has what to do."""

    queued: int
    """Trials that wait for a gang and may have one now."""
    in_hand: int
    standing: Mapping[str, float | None]
    """The gangs that came to work, and for how many seconds each has found no trial; None: it has one."""


class _Blow(NamedTuple):
    """What struck a gang."""

    kind: Loss
    why: str
    at: float


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`judge` says which trials stop early; None: none. A `population` takes turns: all of its orders wait from the
        beginning, whomever Tune would begin with.
        """
        self._fence, self._retries, self._judge, self._clock = fence, retries, judge, clock
        self._population = population
        self._standings = {
            order.index: _Standing(order, order.attempts, held_back=order.held_back, stopped=order.stopped)
            for order in orders
        }
        self._queue: deque[int] = deque()
        self._hands: dict[str, Assignment] = {}
        """What each gang holds."""
        self._nodes: dict[str, frozenset[str]] = {}
        """The machines on which each trial in hand began."""
        self._struck: dict[str, _Blow] = {}
        """Gangs that hold a trial and lost a worker."""
        self._asking: dict[str, object] = {}
        """Each gang's latest question. Ray does not cancel those of a worker that has died."""
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
            self._asking.pop(worker.gang, None)
            self._formed[worker.gang] += 1
            self.nodes_lost(dead_nodes)
            if any(worker.oom_kills > each.oom_kills for each in before.values() if each.host == worker.host):
                self.struck(worker.gang, "oom", f"the kernel of {worker.host} ended a process for want of memory")
        before[worker.rank] = worker

    def struck(self, gang: str, kind: Loss, why: str) -> None:
        """A gang lost a worker, and Ray Train forms it anew. What it holds waits for that a while; it does not wait
        where the machine is gone. Of several reasons, what says more than a crash holds.
        """
        before = self._struck.get(gang)
        if gang in self._hands and (before is None or before.kind == "crash"):
            self._struck[gang] = _Blow(kind, why, before.at if before else self._clock())
            self._work.set()

    def warned(self, gang: str) -> None:
        """A machine of this gang will be taken away: what it holds it is to save and give back, and then to leave."""
        self._warned.add(gang)
        self._dismissed.add(gang)
        self._work.set()

    def nodes_lost(self, nodes: Collection[str]) -> None:
        """Ray has lost these machines, now or before."""
        for gang in list(self._hands):
            if self._nodes[gang] & set(nodes):
                self.struck(gang, "preempted", f"a machine of {gang} is gone")
        for standing in self._standings.values():  # a gang that stands again elsewhere knows it before Ray does
            if standing.crashed_on & set(nodes):
                standing.crashed_on = frozenset()
                standing.losses["crash"] -= 1
                standing.losses["preempted"] += 1

    async def next(self, gang: str, wait_s: float) -> Assignment | Literal["wait", "leave"]:
        """A trial for this gang. A gang that asks while it holds one has lost it: its workers were formed anew."""
        if gang in self._hands:
            self._lose_struck(gang, f"a worker of {gang} died; Ray Train formed the gang again")
        ask = self._asking[gang] = object()
        deadline = time.monotonic() + wait_s
        self._idle_since.setdefault(gang, self._clock())
        while not (self._closed or gang in self._dismissed) and self._asking.get(gang) is ask:
            index = self._first_free()
            if index is not None:
                return self._hand_out(index, gang)
            if not await self._wait_for_work(gang, ask, deadline - time.monotonic()):
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
        standing.reports |= {report.epoch: report for report in epochs}
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
        standing.changed.set()
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
        self._lose(standing.held, why, kind, error)
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

    async def result(self, index: int, epoch: int) -> EpochReport | None:
        """What the trial reported of this epoch, once it has; None when it ended before, is held back (its proxy would
        only keep another trial from being queued), or nobody trains any more. Earlier epochs are dropped: Tune asks for
        each once, and a long sweep's would fill the memory.
        """
        standing = self._standings[index]
        standing.reports = {each: report for each, report in standing.reports.items() if each >= epoch}
        while epoch not in standing.reports and not (standing.ended or standing.held_back or self._closed):
            standing.changed.clear()
            await standing.changed.wait()
        return standing.reports.get(epoch)

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
        for held in (self._asking, self._idle, self._idle_since):
            held.pop(gang, None)
        if gang in self._hands:
            self._lose_struck(gang, why)
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
        """How many gangs wait for a trial."""
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
        """Send every gang home when it next asks, and let Tune's proxies end, which wait for epochs: else Tune's thread
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

    async def _wait_for_work(self, gang: str, ask: object, wait_s: float) -> bool:
        """Whether there may be some."""
        self._work.clear()
        self._idle[gang] = ask
        try:
            await asyncio.wait_for(self._work.wait(), wait_s)
        except TimeoutError:
            return False
        finally:
            if self._idle.get(gang) is ask:
                del self._idle[gang]
        return True

    def _first_free(self) -> int | None:
        """The next trial to hand out, taken from the queue."""
        if self._draining or self._paused:
            return None
        free = filter(self._may_begin, self._queue)
        index = next(free, None) if self._population is None else min(free, key=self._population.turn, default=None)
        if index is not None:
            self._queue.remove(index)
        return index

    def _drop_from_queue(self, standing: _Standing) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(standing.order.index)

    def _hand_out(self, index: int, gang: str) -> Assignment:
        assert gang not in self._hands
        self._idle_since.pop(gang, None)
        standing = self._standings[index]
        standing.attempts += 1
        standing.accepted = False
        order = standing.order
        if self._population is not None:
            settings = {**order.settings, **self._population.settings(index)}
            order = replace(order, settings=settings, line=self._population.line(index))
        standing.held = Assignment(
            order=order, fence=self._fence, attempt=standing.attempts, token=secrets.token_hex(4)
        )
        self._hands[gang] = standing.held
        ranks = self._workers.get(gang, {})
        first = ranks.get(0)
        self._nodes[gang] = frozenset(worker.node for worker in ranks.values())
        self._tell(
            "started", standing, text=f"on {gang}", hosts=tuple(sorted({worker.host for worker in ranks.values()})),
            device_name=first and first.device_name, torch_version=first and first.torch_version,
        )  # fmt: skip
        return standing.held

    def _holder(self, token: str) -> _Standing | None:
        for assignment in self._hands.values():
            if assignment.token == token:
                return self._standings[assignment.order.index]
        return None

    def _gang_of(self, token: str) -> str | None:
        return next((gang for gang, held in self._hands.items() if held.token == token), None)

    def _lose_struck(self, gang: str, why: str) -> None:
        """A gang has lost its trial, by what is known to have struck it."""
        blow = self._struck.get(gang)
        if gang in self._warned and (blow is None or blow.kind == "crash"):
            blow = _Blow("preempted", f"{gang} lost the machine that it was warned of", self._clock())
        standing = self._standings[self._hands[gang].order.index]
        if standing.accepted and (blow is None or blow.kind == "crash"):
            standing.crashed_on = self._nodes.get(gang, frozenset())
        self._lose(self._hands[gang], blow.why if blow else why, blow.kind if blow else "crash")

    def _lose(self, assignment: Assignment, why: str, kind: Loss, error: str | None = None) -> None:
        standing = self._standings[assignment.order.index]
        if standing.stopped:  # it was only to be saved
            self._end(standing, "TERMINATED")
            return
        standing.losses[kind] += standing.accepted
        allowed = float(getattr(self._retries, kind))
        if kind == "oom" and error is None:  # a kernel ends the largest process, whoever took the last byte
            allowed = max(allowed, self._retries.crash)
        if standing.losses[kind] > allowed:
            told = error or f"{why}; this was {_SPOKEN[kind]} {standing.losses[kind]} of the trial"
            self._end(standing, "ERROR", text=told, cause=why if error else _SPOKEN[kind], error_kind=kind)
            return
        self._tell("lost", standing, text=why, cause=_SPOKEN[kind], error_kind=kind)
        self._release(standing)
        self._queue.appendleft(assignment.order.index)
        self._work.set()

    def _salvage(self) -> None:
        """Take trials from gangs that were struck and will not stand again soon."""
        for gang, blow in list(self._struck.items()):
            if blow.kind == "preempted" or self._clock() - blow.at > REFORM_S:
                self._lose_struck(gang, blow.why)

    def _end(self, standing: _Standing, state: Literal["TERMINATED", "ERROR", "CANCELLED"], **told: Any) -> None:
        if state == "TERMINATED" and standing.stopped:
            told |= {"stopped_early": True, "cause": standing.stopped}
        self._conclude(standing, "ended", state=state, **told)

    def _conclude(self, standing: _Standing, kind: str, **told: Any) -> None:
        self._tell(kind, standing, **told)
        self._release(standing)
        standing.ended = True
        standing.changed.set()
        if self._population is not None:
            self._population.close(standing.order.index)
            self._exploit()

    def _release(self, standing: _Standing) -> None:
        self._hands = {gang: held for gang, held in self._hands.items() if held is not standing.held}
        self._struck = {gang: blow for gang, blow in self._struck.items() if gang in self._hands}
        standing.held = None

    def _tell(self, kind: Any, standing: _Standing | None, **told: Any) -> None:
        self._told += 1
        index, attempt = (None, 0) if standing is None else (standing.order.index, standing.attempts)
        update = Update(seq=self._told, time=datetime.now(UTC), kind=kind, index=index, attempt=attempt, **told)
        self._updates.append(update)
        self._news.set()
