"""What runs inside a gang: the loop of a Ray Train worker that trains one trial after another.

Rank 0 speaks for the gang: it asks for work, reports epochs, writes checkpoints; what it learns goes to the other
ranks by a broadcast. Every wait ends before a collective could time out.

A gang of one worker may have several slots, which train a trial each, step by step in turn. What a trial does between
two steps is written as if it were alone, as a generator that yields the steps.
"""

import contextlib
import dataclasses
import io
import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mixmo_core import train
from mixmo_core.config import TrialConfig, digest, identity, unflatten
from mixmo_core.step import Due, side_by_side
from orchestrator import canary, datasets, devices, notice
from orchestrator.casualties import dead_nodes, drain
from orchestrator.dispatcher import Answer, Assignment, EpochReport, Order, Worker
from orchestrator.errors import MixmoError, NotFoundError, UnreachableError
from orchestrator.origin import origin
from orchestrator.roster import Needs
from orchestrator.saver import Saver
from orchestrator.store import DamagedError, Logits, ResultStore
from orchestrator.store.attempts import LOG_BYTES, AttemptFolder, progress_of, without_secrets

LOG_PERIOD_S = 30.0
STORE_PATIENCE_S = 600.0
"""How long a gang waits for a store that is away."""
LONGEST_LOG_PERIOD_S = 600.0
END_PATIENCE_S = 900.0
"""How long a trained trial waits for a store that takes neither its logits nor its last checkpoint: longer than a
server takes to come back, since only training again would bring them. Then it ends without.
"""
PARTING_S = 10.0
"""How long a trial that ends otherwise waits for a checkpoint on its way: a driver that stops waits 15 s for gangs."""
ASK_S = 1.0
"""Between two questions for a trial of the shape that the gang is at, while slots are free for one."""
REST_S = 0.02
"""Of a gang whose trials all wait for something else than a step."""

T = TypeVar("T")
Turns = Generator[Due | None, None, T]
"""What a trial does: it yields each step when it is due, None where it waits for something else."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GangPlan(Needs):
    """What a gang is made of, and the rules it works by."""

    form_within_s: float = 900.0
    """A fleet of which no gang stands after this time is given up."""
    wait_s: float = 30.0
    """A wait for a trial ends after this time with a no-op for all ranks."""
    slots: int = 1
    """Trials that are trained side by side; 1 where there are several workers."""
    finds_slots: bool = False
    """Whether a gang tries with its canary how many of them pay on its device, and has so many slots."""
    captured: bool = True
    """Whether steps are replayed as CUDA graphs where there is a GPU."""
    group_timeout_s: float = 1800.0
    """Of a collective of the process group. A wait takes at most half of it."""
    checkpoint_every_s: float | None = None
    """None: as often as saving stays under 3 % of the time, and at least every ten minutes, however long an epoch."""
    store: str
    data_dir: str | None = None
    """A folder of every host, or the address of a bucket."""
    milestones: tuple[int, ...] = ()
    """Epochs after which a trial is saved, and that is waited for: others may go on from there (`population`)."""
    datasets: tuple[str, ...] = ()
    """What the sweep's trials read: each host has it before it takes the first."""
    namespace: str
    dispatcher: str
    """Name of the dispatcher's actor."""
    canary: Mapping[str, Any] | None = None
    """Settings of the trial to rehearse before the first one, if any."""
    canaries: int = 1
    """So many such trials may be side by side."""


def loop(settings: Mapping[str, Any]) -> None:
    """The training function of the worker group: `settings` are a gang's name and its GangPlan's fields."""
    Gang(settings["gang"], GangPlan(**settings["plan"])).work()


class Gang:
    """One rank's view of its gang."""

    def __init__(self, name: str, plan: GangPlan) -> None:
        context = ray.train.get_context()
        self.name, self.plan = name, plan
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        torch.set_num_threads(max(1, int(plan.cpus_per_worker)))
        self._store = _opened(plan)
        self._data_dir = datasets.on_this_host(
            plan.datasets if datasets.in_bucket(plan.data_dir) else (), plan.data_dir
        )
        self.dispatcher = ray.get_actor(plan.dispatcher, namespace=plan.namespace)
        self.host, self.node = socket.gethostname(), ray.get_runtime_context().get_node_id()
        self.device_name = devices.name(self.device)
        self._watch: notice.Watch | None = None
        self._slots = [name]
        self._seats: dict[str, Seat] = {}
        """The slots that have a trial."""
        self._asks_at = float("-inf")

    def work(self) -> None:
        """Train one trial after another until the dispatcher sends the gang home."""
        oom_kills = _oom_kills()
        self._rehearse()
        slots = self._slot_count()
        if slots > 1:
            self._slots = [f"{self.name}/{number}" for number in range(slots)]
        worker = Worker(
            gang=self.name, rank=self.rank, world_size=self.world_size, pid=os.getpid(), host=self.host,
            device_name=self.device_name, torch_version=str(torch.__version__), slots=slots,
            node=self.node, oom_kills=oom_kills,
        )  # fmt: skip
        ray.get(self.dispatcher.join.remote(worker, dead_nodes() if self.rank == 0 else ()))
        if self.world_size > 1:
            dist.barrier()  # who is handed a trial is known in full
        address = notice.endpoint()
        if address and ray.train.get_context().get_local_rank() == 0:
            self._watch = notice.Watch(address, self._warn)
        try:
            while self._fill() or self._seats:
                self._turn()
        finally:
            for seat in self._seats.values():
                seat.turns.close()
            if self._watch is not None:
                self._watch.close()

    def _warn(self, told: notice.Notice) -> None:
        """A machine will be taken away. The dispatcher hears of it before training is asked to save."""
        ray.get(self.dispatcher.warned.remote(self.name))
        with contextlib.suppress(
            ray.exceptions.RayError, RuntimeError
        ):  # a machine that takes more work loses it again
            drain(self.node, str(told), told.left_s)

    def _rehearse(self) -> None:
        """Try whether the sweep's largest trial fits, unless another gang has. Any rank may find that it does not."""
        settings = self.plan.canary
        asked = settings and self.rank == 0 and ray.get(self.dispatcher.rehearses.remote(self.name))
        if settings and self._from_first(asked):
            try:
                fault = canary.rehearse(unflatten(settings), self.device, self._data_dir, self.plan.canaries)
            except Exception as error:
                if self.world_size > 1 and _peer_lost(error):
                    raise  # it may have died of this: the gang that is formed anew rehearses again
                fault = None  # whatever else may be wrong with the trial is its own to tell
            if fault or self.rank == 0:
                told = fault and f"{self.device_name} of {self.host}: {fault}"
                ray.get(self.dispatcher.rehearsed.remote(self.name, told))

    def _slot_count(self) -> int:
        """As many as the plan says, or as pay for trials like the canary, which is the largest."""
        settings = self.plan.canary
        if not self.plan.finds_slots or not settings:
            return self.plan.slots
        try:
            return train.slots(unflatten(settings), device=self.device, data_dir=self._data_dir)
        except Exception:
            return self.plan.slots  # whatever is wrong with the trial is its own to tell

    def _fill(self) -> bool:
        """Trials for the slots that have none; the wait for one is long where no slot has any. Whether the gang is to
        stay.
        """
        if self._seats and time.monotonic() < self._asks_at:
            return True
        self._asks_at = time.monotonic() + ASK_S
        for slot in self._slots:
            if slot not in self._seats:
                assignment = self._next(slot, 0.0 if self._seats else self.plan.wait_s)
                if assignment == "leave":
                    return False
                if assignment != "wait":
                    self._seats[slot] = self._seat(assignment)
        return True

    def _turn(self) -> None:
        """The next step of every trial in hand, and all that each has to do before it."""
        began, present = time.perf_counter(), list(self._seats.values())
        ready: list[tuple[Seat, Due]] = []
        for slot, seat in list(self._seats.items()):
            try:
                due = seat.advance()
            except StopIteration:
                del self._seats[slot]
                self._asks_at = float("-inf")
            else:
                ready += [(seat, due)] if due else []
        if ready:
            with ready[-1][0].log.capture():  # what a step prints cannot be told apart
                faults = side_by_side([due for _, due in ready])
            for (seat, _), fault in zip(ready, faults, strict=True):
                seat.fault = fault
        elif len(self._seats) > 1:
            time.sleep(REST_S)
        took_s = time.perf_counter() - began
        for seat in present:
            seat.share.passed(took_s, among=len(present))

    def _next(self, slot: str, wait_s: float) -> Assignment | Literal["wait", "leave"]:
        wait_s = min(wait_s, self.plan.group_timeout_s / 2)
        asked = ray.get(self.dispatcher.next.remote(slot, wait_s)) if self.rank == 0 else None
        answer: Assignment | Literal["wait", "leave"] = self._from_first(asked)
        return answer

    def _from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def _seat(self, assignment: Assignment) -> "Seat":
        order = assignment.order
        folder = self._store.attempt(order.trial_id, assignment.fence, assignment.attempt, assignment.token)
        log, share = LogTail(folder, self.rank), Share()
        return Seat(log, share, self._attempt(assignment, folder, log, share))

    def _attempt(self, assignment: Assignment, folder: AttemptFolder, log: "LogTail", share: "Share") -> Turns[None]:
        try:
            yield from self._train(assignment, folder, log, share)
        except ray.exceptions.RayError:
            raise  # the dispatcher is out of reach: Ray Train forms the gang anew, and it asks again
        except Exception as error:
            if self._blame(assignment.token, error, log):
                raise
            error.__traceback__ = None  # it holds the trial's tensors
        finally:
            log.put()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next trial is of another size

    def _blame(self, token: str, error: Exception, log: "LogTail") -> bool:
        """Tell the dispatcher what became of the trial. Whether Ray Train must form the gang anew: the other ranks may
        wait in a collective, or the device's context is lost.
        """
        known = self._store.folder.secrets
        told, cause = (without_secrets(text, os.environ, known) for text in (traceback.format_exc(), _cause(error)))
        log.write(told)
        log.put()
        if self.world_size > 1 and _peer_lost(error):
            return True  # who died, and of what, is known when the gang stands again
        if _store_away(error):
            ray.get(self.dispatcher.abandon.remote(token, f"the store is away: {cause}", "store"))
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            ray.get(self.dispatcher.abandon.remote(token, cause, "oom", told))
        elif isinstance(error, torch.AcceleratorError):
            ray.get(self.dispatcher.abandon.remote(token, f"a device of {self.name} was lost: {cause}", "crash"))
            return True
        else:
            ray.get(self.dispatcher.fail.remote(token, told, cause))
        return self.world_size > 1

    def _train(self, assignment: Assignment, folder: AttemptFolder, log: "LogTail", share: "Share") -> Turns[None]:
        """The trial's epochs, from its newest checkpoint on, be it in the middle of one."""
        config = unflatten(assignment.order.settings)
        place = f"on {self.name} ({self.host}), code {origin()}"
        log.line(f"trial {assignment.order.trial_id}, attempt {assignment.attempt}, {place}")
        ray.get(self.dispatcher.accept.remote(assignment.token))
        with Saver(self._store, folder, self.plan.checkpoint_every_s, self.plan.milestones) as saver:
            hand = Hand(assignment, config, folder, saver, log, share)
            try:
                yield from self._pass_epochs(hand)
            except ray.exceptions.RayError:
                raise
            except Exception:
                if self.rank == 0:  # so that its row names the last good checkpoint
                    yield from self._await_upload(hand, PARTING_S)
                    self._tell(hand, [])
                raise

    def _pass_epochs(self, hand: "Hand") -> Turns[None]:
        is_ours = yield from self._take_up(hand)
        if not is_ours:
            return
        for told in train.steps(
            hand.config, device=self.device, data_dir=self._data_dir,
            resume=hand.state, save_when=lambda: self._is_to_save(hand), known_as=_line_of(hand.assignment.order),
            captured=self.plan.captured,
        ):  # fmt: skip
            if isinstance(told, Due):
                yield told
                continue
            new, saved = yield from self._record(hand, told)
            answer = self._report(hand, new)
            if answer == "save" and not hand.is_trained:
                if self.rank == 0:
                    yield from self._give_back(hand, None if saved else told)
                return
            if answer == "drop":
                hand.log.line("dropped: the trial was stopped, or is another gang's by now")
                if self.rank == 0:
                    yield from self._await_upload(hand, PARTING_S)
                return
        if self.rank == 0:
            hand.log.put()  # before the trial's end is known, so that who looks then finds it whole
            ray.get(self.dispatcher.finish.remote(hand.assignment.token, hand.logits))
            with contextlib.suppress(OSError, MixmoError):
                hand.saver.clear()

    def _is_to_save(self, hand: "Hand") -> bool:
        """Between two steps; any rank may ask for it."""
        warned = self._watch is not None and self._watch.given
        return warned or (self.rank == 0 and hand.saver.due(within=True))

    def _take_up(self, hand: "Hand") -> Turns[bool]:
        """Go on from the newest checkpoint, if there is one. Whether there is anything to train for this gang."""
        order, log = hand.assignment.order, hand.log
        resume = self._resume_point(order, hand.config, log)
        if resume is None:
            return True
        hand.state, hand.reports, hand.logits = resume.state, list(resume.reports), resume.state.get("logits")
        hand.saver.adopt(resume.key, self._checkpoints(order, log))
        log.line(f"resumed from {resume.key}")
        answer = self._report(hand, hand.reports)
        if answer == "save" and not hand.is_trained and self.rank == 0:
            yield from self._give_back(hand, None)
        return answer == "go on" or (answer == "save" and hand.is_trained)

    def _record(self, hand: "Hand", told: train.Epoch | train.Moment) -> Turns[tuple[list[EpochReport], bool]]:
        """What there is to report of an epoch, and whether the state is on its way to the store."""
        new: list[EpochReport] = []
        due = True
        if isinstance(told, train.Epoch):
            new = [self._describe(told, hand)]
            hand.log.line(_line(new[0], hand.config.optim.epochs))
            hand.reports += new
            due = hand.is_trained or told.epoch in self.plan.milestones or hand.saver.due(within=False)
        if self.rank == 0 and isinstance(told, train.Epoch) and hand.is_trained:
            yield from self._store_end(hand, told)
        elif self.rank == 0 and due:
            hand.saver.save(told, hand.reports, None)
            if new and new[0].epoch in self.plan.milestones:  # who is compared says at once what can be copied
                yield from self._await_upload(hand, min(END_PATIENCE_S, self.plan.group_timeout_s / 2))
        return new, due

    def _store_end(self, hand: "Hand", told: train.Epoch) -> Turns[None]:
        """The logits, then a checkpoint that names them: until its row is written, nothing else holds the trial's end.
        A trial is worth more than either.
        """
        patience_s = END_PATIENCE_S if self.world_size == 1 else min(END_PATIENCE_S, self.plan.group_timeout_s / 2)
        deadline = time.monotonic() + patience_s
        hand.logits = self._put_logits(hand.folder, told, hand.log, patience_s)
        hand.saver.save(told, hand.reports, hand.logits)
        stored = yield from self._await_upload(hand, max(PARTING_S, deadline - time.monotonic()))
        if not stored:
            hand.log.line("its last checkpoint is not stored: the trial ends without")

    def _give_back(self, hand: "Hand", unsaved: train.Epoch | train.Moment | None) -> Turns[None]:
        """The sweep pauses, or a machine goes. What is not saved yet is, and a store that is away is waited for."""
        hand.log.line("given back: the sweep pauses, or a machine of this gang will be taken away")
        if unsaved is not None:
            hand.saver.save(unsaved, hand.reports, None)
        yield from self._await_upload(hand, min(END_PATIENCE_S, self.plan.group_timeout_s / 2))
        ray.get(self.dispatcher.give_back.remote(hand.assignment.token, hand.saver.unnamed()))

    def _await_upload(self, hand: "Hand", patience_s: float) -> Turns[bool]:
        """Until what was saved is stored, or patience is at its end. Whether it is stored. Neighbours train on."""
        deadline = time.monotonic() + patience_s
        while True:
            stored = hand.saver.wait(min(2.0 if len(self._seats) == 1 else 0.0, patience_s))
            hand.log.lines(hand.saver.lines())
            if stored or time.monotonic() >= deadline:
                return stored
            yield None

    def _resume_point(self, order: Order, config: TrialConfig, log: "LogTail") -> "ResumePoint | None":
        """The newest checkpoint of any attempt that is whole and this config's."""
        found = self._newest(order, config, log) if self.rank == 0 else None
        key = self._from_first(found and found.key)
        return None if key is None else found or self._patiently(lambda: self._load(key, order, config), log)

    def _checkpoints(self, order: Order, log: "LogTail") -> list[str]:
        """Those that the trial may go on from, the furthest first. Of a population: none beyond the milestone that it
        is to be compared at next, and also what it is a copy of.
        """
        keys = self._patiently(lambda: self._store.checkpoints(order.trial_id, order.checkpoint), log)
        line = order.line
        if line is None:
            return keys
        limit = next((each for each in self.plan.milestones if each > line.compared_at), math.inf)
        within = {key for key in keys if progress_of(key)[0] <= limit}
        return sorted(within | ({line.source} if line.source else set()), key=progress_of, reverse=True)

    def _newest(self, order: Order, config: TrialConfig, log: "LogTail") -> "ResumePoint | None":
        for key in self._checkpoints(order, log):
            try:
                return self._patiently(partial(self._load, key, order, config), log)
            except (train.CheckpointError, DamagedError, NotFoundError) as error:  # the one before it will do
                log.line(f"checkpoint {key} is of no use: {error}")
        if order.line is not None and order.line.source:
            told = f"{order.line.source}, of which the trial is a copy, is gone or of no use"
            raise NotFoundError(f"{told}: its first epochs cannot be made again. Put it back, then `mixmo retry`")
        return None

    def _patiently(self, ask: Callable[[], T], log: "LogTail", wait_s: float = 600.0) -> T:
        """What the store has to say. A store that is away for a while is no fault of the trial."""
        limit_s = wait_s if self.world_size == 1 else min(wait_s, self.plan.group_timeout_s / 2)
        deadline = time.monotonic() + limit_s
        while True:
            try:
                return ask()
            except (UnreachableError, OSError) as error:
                if isinstance(error, DamagedError) or time.monotonic() > deadline:
                    raise
                log.line(f"waiting for the store: {error}")
                time.sleep(2.0)

    def _load(self, key: str, order: Order, config: TrialConfig) -> "ResumePoint":
        try:
            with tempfile.TemporaryDirectory(prefix="mixmo-") as scratch:
                state = train.load(self._store.fetch(key, Path(scratch) / key.rpartition("/")[2]))
        except OSError as error:  # no fault of the trial either: another host may have room
            raise UnreachableError(
                f"{self.host} cannot read {key}: {error}. Make room where it has its temporary files (TMPDIR)"
            ) from error
        own, line = key.startswith(f"trials/{order.trial_id}/"), order.line
        known_as = _line_of(order) or digest(identity(config, self.world_size))
        if state["digest"] != (known_as if own or line is None else line.parent):
            raise train.CheckpointError("it is of another config, seed or number of workers, or from before a copy")
        state["digest"] = known_as  # a copy is this trial's from here on
        try:
            return ResumePoint(key, state, [EpochReport(**row) for row in state["rows"]])
        except (KeyError, TypeError) as error:
            raise train.CheckpointError(f"its rows are not those of this version: {error}") from error

    def _describe(self, epoch: train.Epoch, hand: "Hand") -> EpochReport:
        """An epoch's row; times add up over the epochs that count, whichever attempt trained them. Neighbours share the
        GPU's seconds; the clock's are what they are.
        """
        gpus = self.world_size * self.plan.gpus_per_worker
        wall_s, gpu_seconds = (hand.reports[-1].wall_s, hand.reports[-1].gpu_seconds) if hand.reports else (0.0, 0.0)
        return EpochReport(
            epoch=epoch.epoch,
            metrics=epoch.metrics,
            wall_s=wall_s + epoch.seconds,
            gpu_seconds=gpu_seconds + epoch.seconds * gpus * hand.share.taken(),
            images_per_s=epoch.images / epoch.seconds,
        )

    def _put_logits(
        self, folder: AttemptFolder, epoch: train.Epoch, log: "LogTail", patience_s: float
    ) -> str | None:  # fmt: skip
        """The key of the logits, if the store takes them."""
        if epoch.logits is None or epoch.labels is None:
            return None
        logits = Logits.of(epoch.logits.numpy(), epoch.labels.numpy())
        try:
            return self._patiently(lambda: folder.put_logits(logits), log, wait_s=patience_s)
        except (OSError, MixmoError) as error:
            log.line(f"no logits stored: {error}")
            return None

    def _report(self, hand: "Hand", reports: list[EpochReport]) -> Answer:
        """What the dispatcher says to these epochs, on every rank."""
        answer: Answer = self._from_first(self._tell(hand, reports) if self.rank == 0 else None)
        return answer

    def _tell(self, hand: "Hand", reports: list[EpochReport]) -> Answer:
        """Report epochs, and the newest checkpoint once it is in the store."""
        hand.log.lines(hand.saver.lines())
        checkpoint = hand.saver.unnamed()
        answer: Answer = ray.get(self.dispatcher.report.remote(hand.assignment.token, reports, checkpoint))
        if checkpoint is not None and answer != "drop":  # the row of a trial that was cancelled names the one before
            hand.saver.name(checkpoint)
        return answer


class Share:
    """How much of its gang's time a trial had."""

    def __init__(self) -> None:
        self._own_s = self._passed_s = 0.0

    def passed(self, seconds: float, *, among: int) -> None:
        self._own_s += seconds / among
        self._passed_s += seconds

    def taken(self) -> float:
        """Of the time since this was asked last, as a fraction: 1 of a trial that was alone."""
        share = self._own_s / self._passed_s if self._own_s < self._passed_s else 1.0
        self._own_s = self._passed_s = 0.0
        return share


@dataclasses.dataclass(slots=True)
class Seat:
    """A slot with a trial in it."""

    log: "LogTail"
    share: Share
    turns: Turns[None]
    fault: Exception | None = None
    """What its last step met."""

    def advance(self) -> Due | None:
        """The trial's next step, once all before it is done; None where it waits. Raises StopIteration at its end."""
        fault, self.fault = self.fault, None
        with self.log.capture():
            return next(self.turns) if fault is None else self.turns.throw(fault)


@dataclasses.dataclass(slots=True)
class Hand:
    """The trial that a slot has in its hands."""

    assignment: Assignment
    config: TrialConfig
    folder: AttemptFolder
    saver: Saver
    log: "LogTail"
    share: "Share"
    state: dict[str, Any] | None = None
    """What it goes on from."""
    reports: list[EpochReport] = dataclasses.field(default_factory=list)
    logits: str | None = None

    @property
    def is_trained(self) -> bool:
        return len(self.reports) == self.config.optim.epochs


class ResumePoint(NamedTuple):
    """A checkpoint in use."""

    key: str
    state: dict[str, Any]
    reports: list[EpochReport]


class LogTail(io.TextIOBase):
    """A rank's log of one attempt: what was printed meanwhile, put into the store every 30 s and at the end."""

    def __init__(self, folder: AttemptFolder, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._text, self._put_at, self._pause_s = "", float("-inf"), LOG_PERIOD_S

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        self._text = (self._text + text)[-LOG_BYTES:]
        if time.monotonic() - self._put_at >= self._pause_s:
            self.put()
        return len(text)

    def line(self, text: str) -> None:
        self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {text}\n")

    def lines(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.line(text)

    def put(self) -> None:
        """Replace the log in the store. A store that takes none costs the log, not the trial: it is asked ever less
        often, since training waits for its refusals.
        """
        self._put_at = time.monotonic()
        try:
            self._folder.put_log(self._rank, self._text)
            self._pause_s = LOG_PERIOD_S
        except (OSError, MixmoError):
            self._pause_s = min(2 * self._pause_s, LONGEST_LOG_PERIOD_S)


def _opened(plan: GangPlan) -> ResultStore:
    """The store. One that is away is waited for: a gang that is formed meanwhile is none the worse for it."""
    deadline = time.monotonic() + min(STORE_PATIENCE_S, plan.group_timeout_s / 2)
    while True:
        try:
            return ResultStore.open(plan.store)
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def _oom_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory since it began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _line_of(order: Order) -> str | None:
    """By what the checkpoints of a trial of a population are known; any other's config says it."""
    return None if order.line is None else order.line.digest


def _store_away(error: Exception) -> bool:
    return isinstance(error, UnreachableError) and not isinstance(error, DamagedError)


def _peer_lost(error: Exception) -> bool:
    """Whether a collective broke, and so another rank is to blame. Gloo says so only in its message."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _cause(error: BaseException) -> str:
    """One line by which failures are grouped."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0]}"[:200] if message else type(error).__name__


def _line(report: EpochReport, epochs: int) -> str:
    shown = " ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    return f"epoch {report.epoch}/{epochs} {shown} ({report.images_per_s:.0f} images/s)"
