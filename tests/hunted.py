"""Sweeps whose drivers are killed and frozen by the thousand: the real driver, writer and lease, without Ray.

A driver is a child process, forked from a warm server, that runs a sweep over an engine of threads (`made_engine`). It
dies at a named moment of its own writes (`crash_points`), or at a random one; the next driver goes on. What a trial
reaches is a function of its id and its epoch, so that every row can be held against what it must be.
"""

import contextlib
import ctypes
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import made_engine
import pyarrow.parquet as pq
from crash_points import POINTS, When, watch
from made_engine import MadeGang, Pace, Threads

from mixmo_core import data  # noqa: F401  (loaded once, by the server from which drivers are forked)
from orchestrator import driver
from orchestrator import sweep as sweeps
from orchestrator.cli.guard import guarded
from orchestrator.dispatcher import Assignment, EpochReport, Order
from orchestrator.errors import ExitCode, NotFoundError, UnreachableError
from orchestrator.store import DamagedError, Logits, Process, ResultStore, lease

SWEEP = """
name: hunted
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: {epochs}, lr: 0.1}}
blocks: [{{label: all}}]
seeds: {seeds}
resources: {{gpus_per_worker: 0}}
"""
LEASE_S, HEARTBEAT_S = 1.0, 0.2
"""Of the drivers here: a stale one is to be stale soon."""
HUNG_S = 300.0
"""A driver that takes longer than this for anything hangs."""


@dataclass(frozen=True, kw_only=True)
class Blow:
    """When and how a driver is struck."""

    point: str | None = None
    """One of crash_points.POINTS; None: at a random moment."""
    when: When = "before"
    skip: int = 0
    """So many of these moments pass before."""
    after_s: float = 0.0
    """Of a random moment: seconds after the driver's start."""
    how: Literal["kill", "freeze"] = "kill"

    def __str__(self) -> str:
        return f"{self.when} {self.point}" if self.point else "random"

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGKILL if self.how == "kill" else signal.SIGSTOP


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a sweep is hunted."""

    seeds: int = 8
    epochs: int = 12
    epoch_s: float = 0.05
    lease_s: float = LEASE_S
    heartbeat_s: float = HEARTBEAT_S
    lists_lag: bool = False
    """What a listing hides, and no row names yet, is trained again: docs/storage.md says so."""


@dataclass
class Tally:
    """What became of it all."""

    struck: Counter[str] = field(default_factory=Counter)
    """Blows by their moment."""
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    rerun: int = 0
    """Trials that were trained again although they had finished, or over epochs that a checkpoint had passed."""
    refused: int = 0
    """Stale drivers that ended with exit code 6 when they woke."""
    unnamed: int = 0
    """Parts that stale drivers wrote after they had lost the sweep. No reader takes them."""
    first_row_s: list[float] = field(default_factory=list)
    """After a kill: from the next driver's start to the first epoch of its own in the store."""
    sweeps: int = 0
    faults: list[str] = field(default_factory=list)
    """What must not be, in words."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def words(self) -> str:
        return f"rows lost {self.lost}, doubled {self.doubled}, wrong {self.wrong}, trials run again {self.rerun}"

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.rerun or self.faults)


# ---------------------------------------------------------------------- the driver's process


class Trail:
    """What a driver did, line by line in a file, also when it is killed: time, kind, trial, epoch."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def tell(self, kind: str, *words: object) -> None:
        os.write(self._file, (" ".join([f"{time.monotonic():.4f}", kind, *map(str, words)]) + "\n").encode())


class TrailedPace(Pace):
    def __init__(self, epoch_s: float, trail: Trail) -> None:
        super().__init__(epoch_s)
        self._trail = trail

    def epoch(self, order: Order, epoch: int) -> None:
        self._trail.tell("epoch", order.trial_id, epoch)
        super().epoch(order, epoch)


class InsuredGang(MadeGang):
    """As a real gang, it trains on where the store takes no checkpoint, and ends a trial with its logits."""

    def _train(self, given: Assignment) -> None:
        order, epochs = given.order, given.order.settings["optim.epochs"]
        reports, _ = self._resumed(order)
        if reports and self._told(given, reports, None):
            return
        for epoch in range(len(reports) + 1, epochs + 1):
            self.pace.epoch(order, epoch)
            reports.append(made_engine.report(order.trial_id, epoch))
            key = None
            with contextlib.suppress(UnreachableError):
                key = self._save(given, reports)
            if self._told(given, reports[-1:], key):
                return
        logits = None
        with contextlib.suppress(UnreachableError):
            logits = self._put_logits(given)
        self._loop.call(self.desk.finish, given.token, logits)

    def _told(self, given: Assignment, reports: list[EpochReport], key: str | None) -> bool:
        """Whether the trial is to be dropped."""
        return bool(self._loop.call(self.desk.report, given.token, reports, key) == "drop")

    def _put_logits(self, given: Assignment) -> str:
        import numpy as np

        folder = self._store.attempt(given.order.trial_id, given.fence, given.attempt, given.token)
        return folder.put_logits(Logits.of(np.zeros((1, 2, 3)), np.array([0, 1])))

    def _resumed(self, order: Order) -> tuple[list[EpochReport], str | None]:
        while True:
            try:
                return super()._resumed(order)
            except UnreachableError as error:
                if isinstance(error, DamagedError):
                    raise
                time.sleep(0.1)


def drive(
    uri: str, folder: Path, number: int, terms: Terms, blow: Blow | None, machine: str | None, aws: dict[str, str]
) -> None:
    """One driver: its life, and maybe its death. The main function of a child process, which has the environment that
    the server had when it started, but for what `aws` says.
    """
    _end_with_parent()
    os.environ |= aws
    out = os.open(folder / f"driver-{number}.txt", os.O_WRONLY | os.O_CREAT, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    trail = Trail(folder / f"trail-{number}.txt")
    lease.LEASE_S, driver.Heartbeat.PERIOD_S = terms.lease_s, terms.heartbeat_s
    if machine:
        here = Process.current
        Process.current = classmethod(lambda cls: replace(here(), boot=machine, host=machine))  # type: ignore[assignment, method-assign]
    moments: Counter[tuple[str, str]] = Counter()

    def told(point: str, when: When) -> None:
        if when == "after":
            trail.tell(point)
        moments[point, when] += 1
        if blow and (point, when) == (blow.point, blow.when) and moments[point, when] == blow.skip + 1:
            os.kill(os.getpid(), blow.signal)

    watch(told)
    sweep = sweeps.load(folder / "sweep.yaml")
    engine = Threads(TrailedPace(terms.epoch_s, trail), kind=InsuredGang).engine
    code = guarded(lambda: driver.run(sweep, ResultStore.open(uri, create=True), engine=engine))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """A test that is killed leaves no driver behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@functools.cache
def warm() -> Any:
    """The server from which drivers are forked, with all that they need loaded."""
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = f"{here}:{here.parent}"
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["hunted", "disturbed", "hunted_ray", "pytest"])  # the parent's main module needs them
    return made


# ---------------------------------------------------------------------- a hunted sweep


class Child:
    """A driver's process. Several threads may ask about theirs at once, which multiprocessing's own do not bear."""

    _asking = threading.RLock()

    def __init__(self, *words: Any) -> None:
        self._process = warm().Process(target=drive, args=words)
        with self._asking:
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def exitcode(self) -> int | None:
        with self._asking:
            return self._process.exitcode  # type: ignore[no-any-return]

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.join(HUNG_S)


class Game:
    """One sweep from its beginning to its end, whatever becomes of its drivers."""

    def __init__(self, folder: Path, uri: str, terms: Terms, *, through: str) -> None:
        """`through` is the address of the same place that drivers get; `uri` is the one to look at it by."""
        folder.mkdir(parents=True)
        self.folder, self.terms, self._uri, self._directly = folder, terms, through, through == uri
        self.store = ResultStore.open(uri)
        (folder / "sweep.yaml").write_text(SWEEP.format(seeds=terms.seeds, epochs=terms.epochs))
        sweep = sweeps.load(folder / "sweep.yaml")
        self.name, self.planned = sweep.name, [trial.trial_id for trial in sweep.trials]
        self.tally = Tally(sweeps=1)
        self.number = self.stale_drivers = 0
        self._finished: set[str] = set()
        self._passed: dict[str, int] = {}
        """The epoch that each trial's furthest checkpoint had reached, before the latest driver began."""

    def start(self, blow: Blow | None = None, *, machine: str | None = None) -> Child:
        self.number += 1
        self.began = time.monotonic()
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return Child(self._uri, self.folder, self.number, self.terms, blow, machine, aws)

    def trail(self, number: int | None = None) -> list[list[str]]:
        path = self.folder / f"trail-{number or self.number}.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def fence(self) -> int:
        """Of the latest driver that has held the lease."""
        stored = self.store.folder.read(f"sweeps/{self.name}/lease.json")
        return int(json.loads(stored.data)["fence"]) if stored else 0

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("driver-*.txt"))[-3:])

    def look(self, *, after_kill: bool = False) -> None:
        """Hold the store against what must be, while no driver runs. To be called after each driver."""
        trail = self.trail()
        self._count_reruns(trail)
        if after_kill:
            with contextlib.suppress(StopIteration):
                self.tally.first_row_s.append(_first_row(trail) - self.began)
        recount(self)
        named = {trial_id: [key] if key else [] for trial_id, key in self._named().items()}
        for trial_id in self.planned:
            found = named.get(trial_id, []) if self.terms.lists_lag else self.store.checkpoints(trial_id)
            self._passed[trial_id] = max(map(_epoch_of, found), default=0)

    def _named(self) -> dict[str, str | None]:
        """The checkpoints that rows name: those that the next driver cannot miss."""
        with contextlib.suppress(NotFoundError):
            return {row.trial_id: row.checkpoint for row in self.store.trial_rows(self.name)}
        return {}

    def _count_reruns(self, trail: list[list[str]]) -> None:
        again = {
            trial_id
            for _, kind, *words in trail
            if kind == "epoch"
            for trial_id, epoch in [words]
            if trial_id in self._finished or int(epoch) <= self._passed.get(trial_id, 0)
        }
        self.tally.rerun += len(again)

    def finish(self, *, after_kill: bool) -> None:
        """Let it come to its end, and hold everything against what must be."""
        process = self.start()
        process.join(HUNG_S)
        if process.is_alive():
            process.kill()
            self.tally.faults.append(f"{self.folder}: a driver hung")
        elif process.exitcode != 0:
            self.tally.faults.append(f"{self.folder}: the last driver ended with {process.exitcode}: {self.said()}")
        self.look(after_kill=after_kill)
        self.close()

    def close(self) -> None:
        """At its end every trial has one final state, and the store is as it should be."""
        if not self.store.sweeps():
            self.tally.faults.append(f"{self.folder}: nothing is stored: {self.said()}")
            return
        states = Counter(row.state for row in self.store.trial_rows(self.name))
        if states != {"TERMINATED": len(self.planned)}:
            self.tally.faults.append(f"{self.folder}: states at the end: {dict(states)}")
        for fault in self.store.verify(self.name):
            # What a stale driver wrote, or a dead one's request that was under way for long: nobody reads it.
            if fault.kind == "unnamed" and (self.stale_drivers or not self._directly):
                self.tally.unnamed += 1
            else:
                self.tally.faults.append(f"{self.folder}: {fault.text}")


def _epoch_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("/epoch-")[2][:5])


def _first_row(trail: list[list[str]]) -> float:
    """When the first epoch of this driver's own was in the store. Raises StopIteration."""
    lines = iter(trail)
    next(line for line in lines if line[1] == "checkpoint")
    return float(next(line for line in lines if line[1] in ("live", "part"))[0])


def recount(game: Game) -> None:
    """Count what is lost, doubled and wrong by reading the files themselves, and through the store."""
    store, tally = game.store, game.tally
    try:
        trials = store.trial_rows(game.name)
    except NotFoundError:
        trials = []
    finished = {row.trial_id for row in trials if row.state == "TERMINATED"}
    tally.lost += game.terms.epochs * len(game._finished - finished)
    game._finished |= finished
    tally.doubled += len(trials) - len({row.trial_id for row in trials})
    for row in trials:
        tally.wrong += row.epoch > 0 and _unlike(row.trial_id, row.epoch, row.metrics)
    if not trials:
        return
    rows = Counter((row.trial_id, row.epoch) for row in store.epoch_rows(game.name))
    tally.doubled += sum(count - 1 for count in rows.values())
    tally.lost += sum((trial_id, each + 1) not in rows for trial_id in finished for each in range(game.terms.epochs))
    keyed = [(record["trial_id"], record["epoch"], record) for record in _stored(store, game.name)]
    tally.wrong += len({(trial_id, each) for trial_id, each, record in keyed if _unlike(trial_id, each, record)})


def _stored(store: ResultStore, sweep: str) -> Iterator[dict[str, Any]]:
    """Every row of epochs that counts, straight from the files that the trials name."""
    trials = store.folder.read(f"sweeps/{sweep}/trials.parquet")
    assert trials is not None
    header = json.loads(pq.read_metadata(io.BytesIO(trials.data)).metadata[b"mixmo"])
    for name in (*header["parts"], f"live-{header['fence']}.parquet"):
        stored = store.folder.read(f"sweeps/{sweep}/epochs/{name}")
        if stored is not None:  # verify tells of those that are missing
            yield from pq.read_table(io.BytesIO(stored.data)).to_pylist()


def _unlike(trial_id: str, epoch: int, record: Any) -> bool:
    return any(record[name] != value for name, value in made_engine.metrics(trial_id, epoch).items())


# ---------------------------------------------------------------------- the hunts

Place = Callable[[str], tuple[str, str]]
"""Of a fresh store by this name: the address to look at it by, and the one for drivers, where faults may be."""
Told = Callable[[str], None]
Hunt = Callable[[Path, Place, str, int, Terms, Told], Tally]


def by_killing(folder: Path, place: Place, seed: str, kills: int, terms: Terms, told: Told = print) -> Tally:
    """Kill so many drivers, half at named points and half at random, over as many sweeps as it takes."""
    dice, total = random.Random(f"kills {seed}"), Tally()
    while total.struck.total() < kills:
        game, killed = _fresh(folder, place, total.sweeps, terms), False
        while total.struck.total() + game.tally.struck.total() < kills:
            blow = draw(dice, terms)
            process = game.start(blow)
            struck = _killed(process, blow)
            if not struck and process.exitcode != 0:
                game.tally.faults.append(f"{game.folder}: a driver ended with {process.exitcode}: {game.said()}")
            game.look(after_kill=killed)
            killed = struck
            if not struck:  # it came to its end
                break
            game.tally.struck[str(blow)] += 1
        game.finish(after_kill=killed)
        total += game.tally
        told(f"{total.struck.total()} of {kills} kills, {total.words}")
    return total


def by_freezing(folder: Path, place: Place, seed: str, wakes: int, terms: Terms, told: Told = print) -> Tally:
    """Freeze drivers past their lease, have others take over, and wake them: so many times in all."""
    dice, total = random.Random(f"wakes {seed}"), Tally()
    while total.refused < wakes:
        game = _fresh(folder, place, total.sweeps, terms)
        _freeze_and_wake(game, dice, wakes - total.refused)
        game.finish(after_kill=False)
        total += game.tally
        told(f"{total.refused} of {wakes} stale drivers refused, {total.words}")
    return total


def _fresh(folder: Path, place: Place, number: int, terms: Terms) -> Game:
    uri, through = place(f"sweep-{number}")
    return Game(folder / f"sweep-{number}", uri, terms, through=through)


def draw(dice: random.Random, terms: Terms, how: Literal["kill", "freeze"] = "kill") -> Blow:
    if dice.random() < 0.5:
        undisturbed_s = terms.epoch_s * terms.epochs * terms.seeds / made_engine.AT_ONCE
        return Blow(after_s=dice.uniform(0.0, max(1.5, undisturbed_s)), how=how)
    when: When = dice.choice(["before", "after"])
    point, skip = dice.choice(list(POINTS)), dice.choice([0, 0, 1, 2, 5])
    if how == "freeze" and (point, when) == ("lease", "before"):
        skip += 1  # it must have the lease to lose it
    return Blow(point=point, when=when, skip=skip, how=how)


def _killed(process: Child, blow: Blow) -> bool:
    """See to it that the driver is struck. False: it ended before."""
    process.join(HUNG_S if blow.point else blow.after_s)
    hung = bool(blow.point) and process.is_alive()
    if process.is_alive():
        process.kill()
    assert not hung, f"a driver hung that was to be killed {blow}"
    return bool(process.exitcode == -signal.SIGKILL)


def _freeze_and_wake(game: Game, dice: random.Random, wakes: int) -> None:
    """One driver after another, each frozen while it holds the lease, until the sweep has ended or that often."""
    blow = draw(dice, game.terms, "freeze")
    stale = game.start(blow, machine="machine-0")
    for number in range(1, wakes + 1):
        if not _frozen(game, stale, blow, game.number):
            break  # it came to its end
        fence = game.fence()
        time.sleep(1.2 * game.terms.lease_s)
        following = draw(dice, game.terms, "freeze")
        successor = game.start(following, machine=f"machine-{number}")
        took_over = _taken_over(game, fence, successor)
        time.sleep(dice.choice([0.0, dice.uniform(0.0, 1.0)]))
        stale.send(signal.SIGCONT)
        stale.join(HUNG_S)
        if not took_over:  # there was nothing left to take over, or the frozen one stood in its way
            successor.join(HUNG_S)
            break
        if stale.exitcode == ExitCode.REFUSED:
            game.tally.refused += 1
            game.stale_drivers += 1
            game.tally.struck[str(blow)] += 1
        else:
            game.tally.faults.append(f"{game.folder}: a stale driver ended with {stale.exitcode}: {game.said()}")
            stale.kill()
        recount(game)
        stale, blow = successor, following
    if stale.is_alive():
        until(lambda: not stale.is_alive() or _stands(stale))
        stale.send(signal.SIGCONT)
        stale.join(HUNG_S)
        stale.kill()


def _frozen(game: Game, process: Child, blow: Blow, number: int) -> bool:
    """Wait until the driver stands still with the lease in its hands. False: it ended before."""
    until(lambda: not process.is_alive() or any(line[1] == "lease" for line in game.trail(number)))
    if not blow.point:
        process.join(blow.after_s)
        process.send(blow.signal)
    until(lambda: not process.is_alive() or _stands(process))
    return bool(process.is_alive())


def _taken_over(game: Game, fence: int, successor: Child) -> bool:
    """Wait until the successor has the lease. False: it ended without."""
    until(lambda: game.fence() > fence or not successor.is_alive())
    return game.fence() > fence


def _stands(process: Child) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def until(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + HUNG_S
    while not happened():
        assert time.monotonic() < deadline, "what was to happen did not"
        time.sleep(0.01)
    return True


def in_parallel(
    hunt: Hunt, folder: Path, place: Place, seed: str, number: int, terms: Terms, lanes: int, told: Told
) -> Tally:
    """The same hunt in several lanes at once, each with draws of its own: drivers wait more than they work."""
    shares = [number // lanes + (lane < number % lanes) for lane in range(lanes)]

    def lane(each: int) -> Tally:
        name = f"lane-{each}"
        return hunt(
            folder / name, lambda sweep: place(f"{name}/{sweep}"), f"{seed} {name}", shares[each], terms,
            lambda line: told(f"{name}: {line}"),
        )  # fmt: skip

    with ThreadPoolExecutor(lanes) as pool:
        return sum(pool.map(lane, [each for each in range(lanes) if shares[each]]), Tally())
