"""What runs inside a gang: the loop of a Ray Train worker that trains one trial after another.

Rank 0 speaks for the gang: it asks for work, reports epochs, writes checkpoints; what it learns goes to the other
ranks by a broadcast. Every wait ends before a collective could time out.
"""

import contextlib
import dataclasses
import io
import os
import platform
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from orchestrator.dispatcher import Answer, Assignment, EpochReport, Worker
from orchestrator.errors import MixmoError, NotFoundError, UnreachableError
from orchestrator.store import DamagedError, Logits, ResultStore
from orchestrator.store.attempts import LOG_BYTES, AttemptFolder, without_secrets

LOG_PERIOD_S = 30.0
STORE_PATIENCE_S = 600.0
"""How long a gang waits for a store that is away."""
LOGITS_PATIENCE_S = 60.0
"""How long a finished trial waits for a store that does not take its logits. Only training again would bring them."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GangPlan:
    """What a gang is made of, and the rules it works by."""

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    wait_s: float = 30.0
    """A wait for a trial ends after this time with a no-op for all ranks."""
    group_timeout_s: float = 1800.0
    """Of a collective of the process group. A wait takes at most half of it."""
    checkpoint_every_s: float | None = None
    """None: as often as saving stays under 3 % of the time, and at least every ten minutes, however long an epoch."""
    store: str
    data_dir: str | None = None
    namespace: str
    dispatcher: str
    """Name of the dispatcher's actor."""


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
        self.dispatcher = ray.get_actor(plan.dispatcher, namespace=plan.namespace)
        self.host = socket.gethostname()
        self.device_name = _device_name(self.device)

    def work(self) -> None:
        """Train one trial after another until the dispatcher sends the gang home."""
        worker = Worker(
            gang=self.name, rank=self.rank, world_size=self.world_size, pid=os.getpid(), host=self.host,
            device_name=self.device_name, torch_version=str(torch.__version__),
        )  # fmt: skip
        ray.get(self.dispatcher.join.remote(worker))
        while (assignment := self._next()) != "leave":
            if assignment != "wait":
                self._attempt(assignment)

    def _next(self) -> Assignment | Literal["wait", "leave"]:
        wait_s = min(self.plan.wait_s, self.plan.group_timeout_s / 2)
        asked = ray.get(self.dispatcher.next.remote(self.name, wait_s)) if self.rank == 0 else None
        answer: Assignment | Literal["wait", "leave"] = self._from_first(asked)
        return answer

    def _from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def _attempt(self, assignment: Assignment) -> None:
        order = assignment.order
        folder = self._store.attempt(order.trial_id, assignment.fence, assignment.attempt, assignment.token)
        log = LogTail(folder, self.rank)
        try:
            with log.capture():
                self._train(assignment, folder, log)
        except ray.exceptions.RayError:
            raise  # the dispatcher is out of reach: Ray Train forms the gang anew, and it asks again
        except Exception as error:
            if self._blame(assignment.token, error, log):
                raise
        finally:
            log.put()

    def _blame(self, token: str, error: Exception, log: "LogTail") -> bool:
        """Tell the dispatcher what became of the trial. Whether Ray Train must form the gang anew: the other ranks may
        wait in a collective, or the device's context is lost.
        """
        told, cause = (without_secrets(text, os.environ) for text in (traceback.format_exc(), _cause(error)))
        log.write(told)
        log.put()
        if _store_away(error):
            ray.get(self.dispatcher.abandon.remote(token, f"the store is away: {cause}", charge=False))
        elif isinstance(error, torch.AcceleratorError) or (self.world_size > 1 and _peer_lost(error)):
            ray.get(self.dispatcher.abandon.remote(token, f"a worker or device of {self.name} was lost: {cause}"))
            return True
        else:
            ray.get(self.dispatcher.fail.remote(token, told, cause))
        return self.world_size > 1

    def _train(self, assignment: Assignment, folder: AttemptFolder, log: "LogTail") -> None:
        """The trial's epochs, from its newest checkpoint on, be it in the middle of one."""
        config = unflatten(assignment.order.settings)
        log.line(f"trial {assignment.order.trial_id}, attempt {assignment.attempt}, on {self.name} ({self.host})")
        ray.get(self.dispatcher.accept.remote(assignment.token))
        saver = Saver(self._store, folder, self.plan)
        resume = self._resume_point(assignment.order.trial_id, config, log)
        reports: list[EpochReport] = []
        logits: str | None = None
        if resume is not None:
            reports, logits = list(resume.reports), resume.state.get("logits")
            saver.adopt(resume.key, self._patiently(lambda: self._store.checkpoints(assignment.order.trial_id), log))
            log.line(f"resumed from {resume.key}")
            if self._report(assignment, reports, resume.key) == "drop":
                return
        for told in train.train(
            config, device=self.device, data_dir=Path(self.plan.data_dir) if self.plan.data_dir else None,
            resume=resume and resume.state,
            save_when=lambda: self.rank == 0 and saver.due(within=True),  # any rank may ask, whatever its reason
        ):  # fmt: skip
            new: list[EpochReport] = []
            due, last = True, False
            if isinstance(told, train.Epoch):
                new = [self._describe(told, reports)]
                log.line(_line(new[0], config.optim.epochs))
                last = told.epoch == config.optim.epochs
                logits = self._put_logits(folder, told, log) if last else None
                due = last or saver.due(within=False)  # until its row is written, nothing else holds the trial's end
            reports += new
            checkpoint = self._save(saver, told, reports, logits, log) if self.rank == 0 and due else None
            answer = self._report(assignment, new, checkpoint)
            if answer == "save" and not last:
                log.line("given back: the sweep pauses")
                if self.rank == 0:
                    checkpoint = checkpoint or self._save(saver, told, reports, logits, log)
                    ray.get(self.dispatcher.give_back.remote(assignment.token, checkpoint))
                return
            if answer == "drop":
                log.line("dropped: the trial was stopped, or is another gang's by now")
                return
        if self.rank == 0:
            log.put()  # before the trial's end is known, so that who looks then finds it whole
            ray.get(self.dispatcher.finish.remote(assignment.token, logits))
            with contextlib.suppress(OSError, MixmoError):
                saver.clear()

    def _resume_point(self, trial_id: str, config: TrialConfig, log: "LogTail") -> "ResumePoint | None":
        """The newest checkpoint of any attempt that is whole and this config's."""
        found = self._newest(trial_id, config, log) if self.rank == 0 else None
        key = self._from_first(found and found.key)
        return None if key is None else found or self._patiently(lambda: self._load(key, config), log)

    def _newest(self, trial_id: str, config: TrialConfig, log: "LogTail") -> "ResumePoint | None":
        for key in self._patiently(lambda: self._store.checkpoints(trial_id), log):
            try:
                return self._patiently(partial(self._load, key, config), log)
            except (train.CheckpointError, DamagedError, NotFoundError) as error:  # the one before it will do
                log.line(f"checkpoint {key} is of no use: {error}")
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

    def _load(self, key: str, config: TrialConfig) -> "ResumePoint":
        with tempfile.TemporaryDirectory(prefix="mixmo-") as scratch:
            state = train.load(self._store.fetch(key, Path(scratch) / key.rpartition("/")[2]))
        if state["digest"] != digest(identity(config, self.world_size)):
            raise train.CheckpointError("it is of another config, seed or number of workers")
        try:
            return ResumePoint(key, state, [EpochReport(**row) for row in state["rows"]])
        except (KeyError, TypeError) as error:
            raise train.CheckpointError(f"its rows are not those of this version: {error}") from error

    def _describe(self, epoch: train.Epoch, before: list[EpochReport]) -> EpochReport:
        """An epoch's row; times add up over the epochs that count, whichever attempt trained them."""
        gpus = self.world_size * self.plan.gpus_per_worker
        wall_s, gpu_seconds = (before[-1].wall_s, before[-1].gpu_seconds) if before else (0.0, 0.0)
        return EpochReport(
            epoch=epoch.epoch,
            metrics=epoch.metrics,
            wall_s=wall_s + epoch.seconds,
            gpu_seconds=gpu_seconds + epoch.seconds * gpus,
            images_per_s=epoch.images / epoch.seconds,
        )

    def _put_logits(self, folder: AttemptFolder, epoch: train.Epoch, log: "LogTail") -> str | None:
        """The key of the logits, if the store takes them: a trial is worth more than what can be made of it."""
        if self.rank != 0 or epoch.logits is None or epoch.labels is None:
            return None
        logits = Logits.of(epoch.logits.numpy(), epoch.labels.numpy())
        try:
            return self._patiently(lambda: folder.put_logits(logits), log, wait_s=LOGITS_PATIENCE_S)
        except (OSError, MixmoError) as error:
            log.line(f"no logits stored: {error}")
            return None

    def _save(
        self, saver: "Saver", told: train.Epoch | train.Moment, reports: list[EpochReport], logits: str | None,
        log: "LogTail",
    ) -> str | None:  # fmt: skip
        """A checkpoint, if the store takes one: a trial is worth more than its insurance."""
        try:
            return saver.save(told, reports, logits)
        except (OSError, MixmoError) as error:
            log.line(f"no checkpoint at epoch {told.epoch}: {error}")
            return None

    def _report(self, assignment: Assignment, reports: list[EpochReport], checkpoint: str | None) -> Answer:
        told = None
        if self.rank == 0:
            told = ray.get(self.dispatcher.report.remote(assignment.token, reports, checkpoint))
        answer: Answer = self._from_first(told)
        return answer


class ResumePoint(NamedTuple):
    """A checkpoint in use."""

    key: str
    state: dict[str, Any]
    reports: list[EpochReport]


class Saver:
    """When to write a checkpoint, and which to keep. Only rank 0 saves."""

    SHARE = 0.03
    """Of the time that saving may take."""
    AT_RISK_S = 600.0
    """Work that a kill may cost, at most."""
    WITHIN_S = 30.0
    """Before a checkpoint in the middle of an epoch, at least: shorter epochs are saved when they are done."""

    def __init__(self, store: ResultStore, folder: AttemptFolder, plan: GangPlan) -> None:
        self._store, self._folder, self._plan = store, folder, plan
        self._saved_at, self._cost_s = time.monotonic(), 0.0
        self._keys: list[str] = []

    def adopt(self, key: str, others: Sequence[str]) -> None:
        """An earlier attempt's checkpoint is the newest so far; `others` go when there are newer ones."""
        self._keys = [*(other for other in reversed(others) if other != key), key]

    def due(self, *, within: bool) -> bool:
        """Whether to save at the end of an epoch, or `within` one."""
        pause_s = self._plan.checkpoint_every_s
        if pause_s is None:
            pause_s = min(max(self._cost_s / self.SHARE, self.WITHIN_S if within else 0.0), self.AT_RISK_S)
        return time.monotonic() - self._saved_at >= pause_s

    def save(self, told: train.Epoch | train.Moment, reports: list[EpochReport], logits: str | None) -> str:
        """Write the state, the rows so far, and after the last epoch where its logits are; returns the checkpoint's key
        in the store.
        """
        began = time.monotonic()
        rows = [dataclasses.asdict(report) for report in reports]
        state = {**told.state(), "rows": rows, "logits": logits}
        try:
            with tempfile.TemporaryDirectory(prefix="mixmo-") as scratch:
                path = train.save(state, Path(scratch))
                self._keys.append(self._folder.put_file(path, path.name))
        finally:  # a store that takes none is not asked again with every epoch
            self._saved_at, self._cost_s = time.monotonic(), time.monotonic() - began
        while len(self._keys) > 2:  # a damaged one is to have one before it
            self._store.discard(self._keys.pop(0))
        return self._keys[-1]

    def clear(self) -> None:
        """The trial has finished: its last checkpoint is enough. If none is to stay, the driver drops it once it has
        written the trial's row.
        """
        for key in self._keys[:-1]:
            self._store.discard(key)


class LogTail(io.TextIOBase):
    """A rank's log of one attempt: what was printed meanwhile, put into the store every 30 s and at the end."""

    def __init__(self, folder: AttemptFolder, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._text, self._put_at = "", float("-inf")

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        self._text = (self._text + text)[-LOG_BYTES:]
        if time.monotonic() - self._put_at >= LOG_PERIOD_S:
            self.put()
        return len(text)

    def line(self, text: str) -> None:
        self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {text}\n")

    def put(self) -> None:
        """Replace the log in the store. A store that takes none costs the log, not the trial."""
        self._put_at = time.monotonic()
        with contextlib.suppress(OSError, MixmoError):
            self._folder.put_log(self._rank, self._text)


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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
