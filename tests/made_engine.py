"""An engine of threads: the real driver, dispatcher and store around trainers that only count. No Ray, no torch.

A gang is a thread that takes trials from a real `Dispatcher`, writes real checkpoints and resumes from them; what a
trial reaches is a function of its id and its epoch. `Pace` says how fast, or lets a test take every step itself.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.dispatcher import Assignment, Dispatcher, EpochReport, Order, Update, Worker, gang_of
from orchestrator.engine import Job, milestones_of, retries_of
from orchestrator.errors import MixmoError, NotFoundError, UnreachableError
from orchestrator.store import DamagedError, ResultStore
from orchestrator.store.attempts import progress_of

AT_ONCE = 2


def metrics(trial_id: str, epoch: int) -> dict[str, float]:
    """What a trial reaches at this epoch, in every attempt, sweep and process."""
    return {"loss": 1 / epoch, "lr": 0.1, "top1": (int(trial_id[:4], 16) % 89 + epoch % 10) / 100}


class Pace:
    """How a gang spends its epochs. Every call is made from a gang's thread, before the epoch counts."""

    def __init__(self, epoch_s: float = 0.0) -> None:
        self.epoch_s = epoch_s

    def rehearse(self, settings: Mapping[str, Any]) -> str | None:
        """What is short of memory when the largest trial is tried, if anything is."""
        return None

    def epoch(self, order: Order, epoch: int) -> None:
        """Returns when the epoch is over; raises what the trial is to fail with."""
        time.sleep(self.epoch_s)


class Killing(Pace):
    """The process ends as by SIGKILL before the epoch with this number, counted over all trials, once what its driver
    has written is such that a test can go on from it.
    """

    def __init__(self, at: int, written: Callable[[], bool]) -> None:
        super().__init__()
        self._left, self._written = at, written

    def epoch(self, order: Order, epoch: int) -> None:
        self._left -= 1
        if self._left < 0:
            while not self._written():
                time.sleep(0.05)
            os._exit(9)


class Steps(Pace):
    """Epochs that end when a test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._allowed = 0
        self._open = False

    def epoch(self, order: Order, epoch: int) -> None:
        with self._changed:
            self.begun.append((order.index, epoch))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._allowed > 0, timeout=60)
            self._allowed -= not self._open

    def allow(self, epochs: int = 1) -> None:
        with self._changed:
            self._allowed += epochs
            self._changed.notify_all()

    def open(self) -> None:
        """From here on nothing waits."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def until(self, happened: Callable[[list[tuple[int, int]]], bool]) -> None:
        """Wait until the epochs that have begun, as (index, epoch), are so."""
        with self._changed:
            assert self._changed.wait_for(lambda: happened(self.begun), timeout=60), self.begun


class Threads:
    """Engines over one pace: `driver.run(..., engine=Threads().engine)`."""

    def __init__(
        self,
        pace: Pace | None = None,
        *,
        gangs: int = AT_ONCE,
        slots: int = 1,
        wait_s: float = 0.2,
        kind: "type[MadeGang] | None" = None,
    ) -> None:
        """A slot is a thread of its own here; what makes a gang of several is the dispatcher's to see to."""
        self.pace, self.gangs, self.slots = pace or Pace(), gangs, slots
        self.wait_s, self.kind = wait_s, kind or MadeGang
        self.crews: list[MadeCrew] = []

    @contextlib.contextmanager
    def engine(self, job: Job) -> Iterator[tuple["MadeCrew", "MadeQueue"]]:
        loop = _Loop()
        desk = Dispatcher(
            job.orders, fence=job.fence, retries=retries_of(job.sweep), judge=job.judge, population=job.population
        )
        crew = MadeCrew(self, job, loop, desk)
        self.crews.append(crew)
        crew.form(self.gangs)
        queue = MadeQueue(loop, desk, job.orders, page=2 * self.slots)
        try:
            yield crew, queue
        finally:
            crew.close()
            loop.close()


class GoneError(Exception):
    """The driver has ended, and its dispatcher with it: a gang that worked on hears of it so, as one that is killed."""


class _Loop:
    """The dispatcher lives in one asyncio loop, as in its actor."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="dispatcher", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a plain method of the dispatcher, or wait for one of its coroutines."""

        async def act() -> Any:
            result = function(*arguments, **named)
            return await result if asyncio.iscoroutine(result) else result

        if self.loop.is_closed():
            raise GoneError
        return asyncio.run_coroutine_threadsafe(act(), self.loop).result(120)

    def close(self) -> None:
        async def end() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class MadeCrew:
    """As `fleet.Fleet`, over threads."""

    def __init__(self, threads: Threads, job: Job, loop: _Loop, desk: Dispatcher) -> None:
        self.desk, self._threads_of, self._job, self._loop = desk, threads, job, loop
        self._threads: list[threading.Thread] = []
        self._acknowledged = 0
        self._closed = False
        self.closed = threading.Event()
        """Set when the dispatcher takes nothing any more."""
        self.faults: list[BaseException] = []
        """What escaped a gang, which is a fault of this file."""

    def form(self, gangs: int) -> None:
        slots = self._threads_of.slots
        for _ in range(gangs):
            gang = f"gang-{len(self._threads) // slots}"
            self._loop.call(self.desk.join, made_worker(gang, slots))
            for name in [f"{gang}/{number}" for number in range(slots)] if slots > 1 else [gang]:
                thread = threading.Thread(target=self._work, args=(name,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self, name: str) -> None:
        try:
            threads = self._threads_of
            threads.kind(name, threads.pace, self._job, self._loop, self.desk, threads.wait_s).work()
        except (GoneError, asyncio.CancelledError, concurrent.futures.CancelledError):
            pass
        except BaseException as error:
            self.faults.append(error)
            self._loop.call(self.desk.gang_ended, gang_of(name), repr(error))

    def size(self) -> int:
        return len(self._threads)

    def updates(self, wait_s: float) -> list[Update]:
        told: list[Update] = self._loop.call(self.desk.updates, self._acknowledged, wait_s)
        if told:
            self._acknowledged = told[-1].seq
        elif self.faults:
            raise UnreachableError(f"a made gang broke: {self.faults[0]!r}")
        return told

    def close(self) -> list[Update]:
        if self._closed:
            return []
        self._closed = True
        self._loop.call(self.desk.close)
        self.closed.set()
        for thread in self._threads:
            thread.join(10)
        last: list[Update] = self._loop.call(self.desk.updates, self._acknowledged, 0.0)
        return last

    def in_hand(self) -> int:
        return int(self._loop.call(self.desk.in_hand))

    def idle(self) -> int:
        return int(self._loop.call(self.desk.idle))

    def drain(self) -> None:
        self._loop.call(self.desk.drain)

    def submit(self, indices: Iterable[int]) -> None:
        for index in sorted(indices):
            self._loop.call(self.desk.submit, index)

    def pause(self) -> None:
        self._loop.call(self.desk.pause)

    def resume(self) -> None:
        self._loop.call(self.desk.resume)

    def cancel(self, indices: Iterable[int], cause: str) -> None:
        self._loop.call(self.desk.cancel, list(indices), cause)

    def retry(self, orders: Iterable[Order], text: str) -> None:
        self._loop.call(self.desk.retry, list(orders), text)

    def add(self, orders: Iterable[Order]) -> None:
        self._loop.call(self.desk.add, list(orders))

    def hold_back(self, indices: Iterable[int]) -> None:
        self._loop.call(self.desk.hold_back, list(indices))

    def release(self, indices: Iterable[int]) -> None:
        self._loop.call(self.desk.release, list(indices))

    def withdraw(self, indices: Iterable[int], text: str) -> None:
        self._loop.call(self.desk.withdraw, list(indices), text)


class MadeQueue:
    """As Tune over its proxies, with small pages: one is queued when that before it has been taken up."""

    error: BaseException | None = None

    def __init__(self, loop: _Loop, desk: Dispatcher, orders: Iterable[Order], page: int) -> None:
        self._desk, self._waiting, self._page = desk, [order.index for order in orders], page
        self._drained = False
        self._proxy = asyncio.run_coroutine_threadsafe(self._offer(), loop.loop)

    async def _offer(self) -> None:
        while self._waiting and not self._drained:
            page, self._waiting = self._waiting[: self._page], self._waiting[self._page :]
            await self._desk.offer(page)

    def is_alive(self) -> bool:
        return not self._proxy.done()

    def drain(self) -> None:
        self._drained = True

    def join(self, timeout: float | None = None) -> None:
        """They end with the loop."""


def made_worker(gang: str, slots: int) -> Worker:
    return Worker(
        gang=gang, rank=0, world_size=1, pid=0, host="made", device_name="thread", torch_version="0", slots=slots
    )


class MadeGang:
    """As `gang.Gang`, with a trainer that counts."""

    def __init__(self, name: str, pace: Pace, job: Job, loop: _Loop, desk: Dispatcher, wait_s: float) -> None:
        self.name, self.pace, self._loop, self.desk, self._wait_s = name, pace, loop, desk, wait_s
        self._job, self._store = job, ResultStore.open(job.store_uri)

    def work(self) -> None:
        if self._job.canary and self._loop.call(self.desk.rehearses, self.name):
            self._loop.call(self.desk.rehearsed, self.name, self.pace.rehearse(self._job.canary))
        while (given := self._loop.call(self.desk.next, self.name, self._wait_s)) != "leave":
            if isinstance(given, Assignment):
                self._attempt(given)

    def _attempt(self, given: Assignment) -> None:
        self._loop.call(self.desk.accept, given.token)
        try:
            self._train(given)
        except GoneError:
            raise
        except MixmoError as error:
            self._loop.call(self.desk.abandon, given.token, f"the store is away: {error}", "store")
        except Exception as error:
            self._loop.call(self.desk.fail, given.token, f"Traceback ...\n{error!r}", repr(error))

    def _train(self, given: Assignment) -> None:
        order, epochs = given.order, given.order.settings["optim.epochs"]
        reports, key = self._resumed(order)
        if reports:
            answer = self._loop.call(self.desk.report, given.token, reports, key)
            if answer == "save" and len(reports) < epochs:
                self._loop.call(self.desk.give_back, given.token, None)
            if answer == "drop" or (answer == "save" and len(reports) < epochs):
                return
        for epoch in range(len(reports) + 1, epochs + 1):
            self.pace.epoch(order, epoch)
            reports.append(self.trained(order, reports))
            key = self._save(given, reports)
            answer = self._loop.call(self.desk.report, given.token, reports[-1:], key)
            if answer == "save" and epoch < epochs:
                self._loop.call(self.desk.give_back, given.token, None)
            if answer == "drop" or (answer == "save" and epoch < epochs):
                return
        self._loop.call(self.desk.finish, given.token, None)

    def trained(self, order: Order, before: list[EpochReport]) -> EpochReport:
        """The epoch that follows these."""
        return report(order.trial_id, len(before) + 1)

    def _save(self, given: Assignment, reports: list[EpochReport]) -> str:
        line = given.order.line and given.order.line.digest
        data = json.dumps({"line": line, "rows": [asdict(each) for each in reports]}).encode()
        folder = self._store.attempt(given.order.trial_id, given.fence, given.attempt, given.token)
        name = f"epoch-{len(reports):05d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            path.write_bytes(data)
            return folder.put_file(path, name)

    def _resumed(self, order: Order) -> tuple[list[EpochReport], str | None]:
        """The epochs behind the newest whole checkpoint that is the trial's, or of which it is a copy; and its key."""
        line, keys = order.line, self._store.checkpoints(order.trial_id, order.checkpoint)
        if line is not None:
            limit = next((each for each in milestones_of(self._job) if each > line.compared_at), 10**9)
            within = {key for key in keys if progress_of(key)[0] <= limit} | ({line.source} if line.source else set())
            keys = sorted(within, key=progress_of, reverse=True)
        for key in keys:
            with TemporaryDirectory() as scratch, contextlib.suppress(DamagedError, NotFoundError):
                state = json.loads(self._store.fetch(key, Path(scratch) / "state").read_bytes())
                own = key.startswith(f"trials/{order.trial_id}/")
                if line is None or state["line"] == (line.digest if own else line.parent):
                    return [EpochReport(**row) for row in state["rows"]], key
        assert line is None or line.source is None, f"{line} is not there"
        return [], None


def report(trial_id: str, epoch: int) -> EpochReport:
    return EpochReport(
        epoch=epoch, metrics=metrics(trial_id, epoch), wall_s=float(epoch), gpu_seconds=0.0, images_per_s=1000.0
    )
