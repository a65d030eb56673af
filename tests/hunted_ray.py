"""Whole sweeps on Ray whose drivers, gangs and raylets are killed: real scans, real training, results to the bit.

The store is a bucket behind a `FaultProxy`, which kills the driver at the moment of a named request, before the server
acts or after. What each trial must reach is what an undisturbed run reached.
"""

import calendar
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from command_line import PATIENCE_S, Mixmo
from crash_points import POINTS
from fault_proxy import FaultProxy, Trap
from hunted import Blow, Tally, until

from orchestrator import plan as planning
from orchestrator import sweep as sweeps
from orchestrator.errors import NotFoundError
from orchestrator.rows import TrialRow
from orchestrator.store import ResultStore, SweepWriter

SWEEP = """
name: hunted
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1}}
  optim: {{epochs: {epochs}, lr: 0.1}}
blocks:
  - {{label: vanilla, set: {{model.subnetworks: 1}}}}
  - {{label: cut, set: {{mixing.method: cutmix}}}}
seeds: 2
resources: {{gpus_per_worker: 0}}
checkpoints: {{every_s: {every_s}}}
retry: {{crash: unlimited}}
"""
EPOCHS = 60
MARK = "MIXMO_HUNTED"
"""In the environment of all that a hunt starts, so that it finds what is left of them, and nothing else."""
ENDS_S = 3.0
"""So long may live what a killed driver leaves behind. Its gangs end in this time, two agents of Ray's do not."""
Results = dict[str, dict[str, Any]]
Told = Callable[[str], None]


class Sweep(Mixmo):
    """A sweep through the command line, whose store is where `uri` says; its processes get `through`."""

    def __init__(
        self, folder: Path, uri: str, *, through: str | None = None, epochs: int = EPOCHS, every_s: str = "0.2"
    ) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder, SWEEP.format(epochs=epochs, every_s=every_s))
        self.uri, self.through, self.planned_epochs = uri, through or uri, epochs
        self.mark = f"{os.getpid()}-{folder}"
        self.store = ResultStore.open(uri)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Its output goes to files, which no reader has to empty."""
        out, err = ((self.folder / f"{words[0]}.{name}").open("w") for name in ("out", "err"))
        with out, err:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", *words], cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, text=True,
                env={**self._environment(), "MIXMO_RESULTS": self.through, MARK: self.mark},
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "run.err").read_text()[-3000:]

    def rows(self) -> list[TrialRow]:
        try:
            return self.store.trial_rows(self.name)
        except NotFoundError:
            return []

    def epochs(self) -> int:
        return sum(row.epoch for row in self.rows())

    def results(self) -> Results:
        found: Results = {
            row.trial_id: {"trial": row.metrics, "state": row.state, "epoch": row.epoch} for row in self.rows()
        }
        for each in self.store.epoch_rows(self.name) if found else []:
            found[each.trial_id][str(each.epoch)] = each.metrics
        return found

    def run_to_the_end(self) -> float:
        """Seconds that it took. Raises AssertionError if it does not end well."""
        began = time.monotonic()
        process = self.start("run", "sweep.yaml")
        try:
            assert process.wait(PATIENCE_S) == 0, self.said()
        finally:
            end(process)
        return time.monotonic() - began

    def left(self) -> list[int]:
        """Processes that its drivers have started and that still live."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def clear(self) -> int:
        """Wait until nothing is left of its drivers; what does not end by itself is killed. How many were."""
        deadline = time.monotonic() + ENDS_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    def named(self, name: bytes) -> list[int]:
        """Of the living ones, those that are called so."""
        found = []
        for pid in self.left():
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


@contextlib.contextmanager
def rival(sweep: Sweep) -> Iterator[None]:
    """Another sweep that is at work and wants the same trials, so that ours claims them. It trains none."""
    trials = sweeps.load(sweep.folder / "sweep.yaml")
    with sweep.store.writer("rival", sweep_text="") as writer:
        writer.put(planning.initial_row(trial, trials).replace(sweep="rival") for trial in trials.trials)
        writer.flush(force=True)
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(writer, over), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()


def _renew(writer: SweepWriter, over: threading.Event) -> None:
    while not over.wait(5.0):
        writer.renew()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


class Hunt:
    """Sweeps that are disturbed one after another, each to its end, against what an undisturbed one reached."""

    def __init__(self, folder: Path, place: Callable[[str], str], server: str, seed: str, told: Told = print) -> None:
        """`place` gives the address of a fresh store by its name, on the server at `server` (host:port)."""
        self.folder, self.dice, self.tally, self.told = folder, random.Random(f"ray {seed}"), Tally(), told
        self.place, self.server = place, server
        self._number = 0
        self._finished: dict[str, tuple[int, int]] = {}
        quiet = Sweep(folder / "undisturbed", place("undisturbed"))
        self.undisturbed_s = quiet.run_to_the_end()
        self.expected = quiet.results()
        assert {each["state"] for each in self.expected.values()} == {"TERMINATED"}, quiet.said()
        self.proxy = FaultProxy(server)

    def fresh(self) -> Sweep:
        self._number += 1
        self._finished = {}
        uri = self.place(f"sweep-{self._number}")
        through = uri.replace(self.server, self.proxy.endpoint)
        self.tally.sweeps += 1
        return Sweep(self.folder / f"sweep-{self._number}", uri, through=through)

    # ---- drivers

    def kill_drivers(self, blows: list[Blow]) -> None:
        sweep, waiting, killed = self.fresh(), list(blows), False
        misses: Counter[str] = Counter()
        while waiting:
            with rival(sweep) if waiting[0].point == "claim" else contextlib.nullcontext():
                struck = self._strike(sweep, waiting[0], after_kill=killed)
            self.look(sweep)
            killed = struck
            if struck:
                blow = str(waiting.pop(0))
                self.tally.struck[blow] += 1
                del misses[blow]  # another of its kind has its own two chances
                self.told(f"{self.tally.struck.total()} kills, {len(waiting)} to go, {self.tally.words}")
            else:  # it came to its end before
                self.close(sweep)
                sweep = self.fresh()
                misses[str(waiting[0])] += 1
                if misses[str(waiting[0])] >= 2:
                    self.tally.faults.append(f"{waiting[0]}: it never came")
                    waiting.pop(0)
        self._finish(sweep, after_kill=killed)

    def _strike(self, sweep: Sweep, blow: Blow, *, after_kill: bool) -> bool:
        """Run a driver until it is struck. False: it ended before."""
        before, began = sweep.epochs(), time.monotonic()
        process = sweep.start("run", "sweep.yaml")
        trap = self._trap(blow, process.pid)
        deadline = began + PATIENCE_S
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if after_kill and sweep.epochs() > before:
                    self.tally.first_row_s.append(time.monotonic() - began)
                    after_kill = False
                if trap is None and time.monotonic() > began + blow.after_s:
                    process.kill()
                time.sleep(0.1)
            if process.poll() is None:
                self.tally.faults.append(f"{sweep.folder}: a driver hung: {sweep.said()}")
        finally:
            end(process)
            if trap:
                self.proxy.forget(trap)
            sweep.clear()
        if process.returncode not in (0, -signal.SIGKILL):
            self.tally.faults.append(f"{sweep.folder}: a driver ended with {process.returncode}: {sweep.said()}")
        return process.returncode == -signal.SIGKILL

    def _trap(self, blow: Blow, pid: int) -> Trap | None:
        if blow.point is None:
            return None
        return self.proxy.trap("PUT", POINTS[blow.point], blow.when, lambda: os.kill(pid, signal.SIGKILL), blow.skip)

    # ---- gangs and raylets

    def kill_processes(self, victims: list[Literal["worker", "controller", "raylet"]]) -> None:
        """Kill processes below a driver, each once the sweep has gone on since the one before."""
        sweep, waiting, killed = self.fresh(), list(victims), False
        while waiting:
            process = sweep.start("run", "sweep.yaml")
            try:
                killed = self._kill_below(sweep, process, waiting, after_kill=killed)
            finally:
                end(process)
                sweep.clear()
            self.look(sweep)
            if not killed:
                self.close(sweep)
                sweep = self.fresh()
        self._finish(sweep, after_kill=killed)

    def _kill_below(
        self, sweep: Sweep, process: "subprocess.Popen[str]", waiting: list[Any], *, after_kill: bool
    ) -> bool:
        """Strike until the driver ends. Whether it ended because its Ray was killed, and the sweep is to go on."""
        began, before = time.monotonic(), sweep.epochs()
        raylet_killed = False
        while process.poll() is None:
            if time.monotonic() > began + PATIENCE_S:
                self.tally.faults.append(f"{sweep.folder}: nothing happened after a kill: {sweep.said()}")
                return True
            time.sleep(0.1)
            if raylet_killed or sweep.epochs() <= before:
                continue
            if after_kill:
                self.tally.first_row_s.append(time.monotonic() - began)
            if not waiting:
                process.kill()
                return True
            time.sleep(self.dice.uniform(0.0, 1.0))
            if self._kill_one(sweep, waiting[0]):
                raylet_killed = waiting.pop(0) == "raylet"
                self.told(f"{self.tally.struck.total()} kills, {len(waiting)} to go, {self.tally.words}")
                began, before, after_kill = time.monotonic(), sweep.epochs(), True
        if process.returncode not in (0, 7, -signal.SIGKILL) and not raylet_killed:
            self.tally.faults.append(f"{sweep.folder}: the driver ended with {process.returncode}: {sweep.said()}")
        return process.returncode != 0

    def _kill_one(self, sweep: Sweep, victim: str) -> bool:
        names = {"worker": b"ray::RayTrainWorker", "controller": b"ray::TrainController", "raylet": b"raylet/raylet"}
        found = sweep.named(names[victim])
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.dice.choice(found), signal.SIGKILL)
            self.tally.struck[victim] += 1
            return True
        return False

    # ---- what became of it

    def look(self, sweep: Sweep) -> None:
        """Hold the store against what must be, while no driver runs."""
        rows = sweep.rows()
        finished = {row.trial_id: (row.attempts, row.epoch) for row in rows if row.state == "TERMINATED"}
        self.tally.lost += sum(epoch for trial_id, (_, epoch) in self._finished.items() if trial_id not in finished)
        self.tally.rerun += sum(
            trial_id in finished and finished[trial_id][0] != attempts
            for trial_id, (attempts, _) in self._finished.items()
        )
        self._finished = finished
        self.tally.doubled += len(rows) - len({row.trial_id for row in rows})
        if not rows:
            return
        found = Counter((row.trial_id, row.epoch) for row in sweep.store.epoch_rows(sweep.name))
        self.tally.doubled += sum(count - 1 for count in found.values())
        for trial_id, results in sweep.results().items():
            wanted = self.expected[trial_id]
            whole = trial_id in finished
            self.tally.lost += sum(whole and name not in results for name in wanted)
            # Of a trial under way, its row says what it reached so far; its epochs are what they always are.
            names = wanted if whole else [name for name in results if name.isdigit()]
            self.tally.wrong += sum(name in results and results[name] != wanted[name] for name in names)

    def close(self, sweep: Sweep) -> None:
        states = Counter(row.state for row in sweep.rows())
        if states != {"TERMINATED": len(self.expected)}:
            self.tally.faults.append(f"{sweep.folder}: states at the end: {dict(states)}")
        self.tally.faults += [f"{sweep.folder}: {fault.text}" for fault in sweep.store.verify(sweep.name)]

    def _finish(self, sweep: Sweep, *, after_kill: bool) -> None:
        before, began = sweep.epochs(), time.monotonic()
        process = sweep.start("run", "sweep.yaml")
        try:
            while process.poll() is None and time.monotonic() < began + PATIENCE_S:
                if after_kill and sweep.epochs() > before:
                    self.tally.first_row_s.append(time.monotonic() - began)
                    after_kill = False
                time.sleep(0.2)
        finally:
            end(process)
            sweep.clear()
        if process.returncode != 0:
            self.tally.faults.append(f"{sweep.folder}: the last driver ended with {process.returncode}: {sweep.said()}")
        self.look(sweep)
        self.close(sweep)


def driver_blows(number: int, seed: str) -> list[Blow]:
    """Each named moment twice, before and after, as far as the number goes; the rest at random. Shuffled."""
    dice = random.Random(f"blows {seed}")
    contract = ("lease", "claim", "checkpoint", "upload", "part", "commit")
    sides: tuple[Literal["before", "after"], ...] = ("before", "after")
    named = [Blow(point=point, when=when) for _ in range(2) for point in contract for when in sides]
    named += [Blow(point=point, when=when, skip=1) for point in ("live", "events", "sweep") for when in sides]
    blows = [_skipping(blow, dice) for blow in named[:number]]
    blows += [Blow(after_s=dice.uniform(2.0, 25.0)) for _ in range(number - len(blows))]
    dice.shuffle(blows)
    return blows


def _skipping(blow: Blow, dice: random.Random) -> Blow:
    """The first of these moments, or a later one: where there are many."""
    often = {"checkpoint": [0, 1, 5, 15], "commit": [0, 1, 2, 4], "live": [0, 1, 2, 4], "events": [0, 1]}
    return Blow(point=blow.point, when=blow.when, skip=dice.choice(often.get(blow.point or "", [0])))


def victims(number: int, seed: str) -> list[Literal["worker", "controller", "raylet"]]:
    """Of five, three workers of gangs, one controller of one and one raylet; shuffled."""
    dice = random.Random(f"victims {seed}")
    kinds: list[Literal["worker", "controller", "raylet"]] = ["worker", "raylet", "worker", "controller", "worker"]
    chosen = [kinds[each % len(kinds)] for each in range(number)]
    dice.shuffle(chosen)
    return chosen


# ---------------------------------------------------------------------- a path that fails, or is away


def at_rate(hunt: Hunt, rate: float) -> float:
    """Run a sweep while so many of all requests fail; how long it took, against the undisturbed one."""
    sweep = hunt.fresh()
    hunt.proxy.rate, hunt.proxy.stale_rate = rate, 2 * rate
    try:
        took_s = sweep.run_to_the_end()
    finally:
        hunt.proxy.rate = hunt.proxy.stale_rate = 0.0
        sweep.clear()
    _one_attempt_each(hunt, sweep)
    return took_s / hunt.undisturbed_s


def while_away(hunt: Hunt, away_s: float, epochs: int) -> int:
    """Take the store away while trials train; how many of them trained their last epoch meanwhile, by their logs."""
    uri = hunt.place("away")
    through = uri.replace(hunt.server, hunt.proxy.endpoint)
    sweep = Sweep(hunt.folder / "away", uri, through=through, epochs=epochs, every_s="auto")
    hunt.tally.sweeps += 1
    process = sweep.start("run", "sweep.yaml")
    try:
        until(lambda: sweep.epochs() > 0 or process.poll() is not None)
        with hunt.proxy.away("silent"):
            time.sleep(away_s / 2)
        with hunt.proxy.away("refused"):
            time.sleep(away_s / 2)
        returned = time.time()
        code = process.wait(away_s + 4 * PATIENCE_S)
    finally:
        end(process)
        sweep.clear()
    if code != 0:
        hunt.tally.faults.append(f"{sweep.folder}: the driver ended with {code}: {sweep.said()}")
    _one_attempt_each(hunt, sweep, compare=False)
    return sum(_trained_before(returned, sweep.store.log(row.trial_id), epochs) for row in sweep.rows())


def _trained_before(moment: float, log: str, epochs: int) -> bool:
    """Whether a log has the last epoch before this moment, in seconds since 1970."""
    last = next((line for line in log.splitlines() if f" epoch {epochs}/{epochs} " in line), None)
    return last is not None and calendar.timegm(time.strptime(last[:19], "%Y-%m-%d %H:%M:%S")) < moment


def _one_attempt_each(hunt: Hunt, sweep: Sweep, *, compare: bool = True) -> None:
    """When only the path was down, no trial is run again."""
    hunt.tally.rerun += sum(row.attempts > 1 for row in sweep.rows())
    if compare:
        hunt.look(sweep)
    else:  # its trials are longer than those of the undisturbed sweep
        found = Counter((row.trial_id, row.epoch) for row in sweep.store.epoch_rows(sweep.name))
        wanted = {(row.trial_id, each + 1) for row in sweep.rows() for each in range(sweep.planned_epochs)}
        hunt.tally.lost += len(wanted - found.keys())
        hunt.tally.doubled += found.total() - len(found)
    hunt.close(sweep)


def epoch_s(hunt: Hunt) -> float:
    """How long an epoch takes here, the slowest trial's."""
    store = ResultStore.open(hunt.place("undisturbed"))
    return max(row.wall_s / row.epochs for row in store.trial_rows("hunted"))
