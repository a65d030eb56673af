"""The screen over a sweep of 10,000 trials: how long a frame takes, and what share of a core `mixmo watch` uses.

A frame is what lies between a snapshot in hand and the terminal: the scene, its lines, and sending those that changed.
The look at the store comes before it, on a thread of its own, so that keys are answered meanwhile; it is told by
itself, and with the frame that follows.

A store is made with 1,000 cells of 10 seeds, of which 100 trials run; a driver goes on with it once a second. Frames
are timed here, part by part: the look at the store, the scene, the frame, the lines that are sent. The share of a core
is that of a `mixmo watch` of its own, on a terminal of 140 x 45, from when its first frame is there. Processor seconds
are told, since a shared machine stretches those of the clock.

    python benchmarks/screen.py                     writes benchmarks/results/screen.json
    python benchmarks/screen.py --seconds 20 --json
"""

import argparse
import contextlib
import fcntl
import gc
import hashlib
import io
import itertools
import json
import os
import pty
import resource
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import machine
from rich.console import Console

from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, TrialConfig, cell_id
from orchestrator.rows import METRIC_COLUMNS, EpochRow, State, TrialRow, config_columns
from orchestrator.screen import Scene, press
from orchestrator.screen.frame import drawn
from orchestrator.screen.state import State as Keys
from orchestrator.screen.terminal import Terminal
from orchestrator.store import ResultStore, SweepWriter

SWEEP = "large"
SIZE = (140, 45)
RUNNING, EPOCHS, SEEDS = 100, 200, 10
AT_ONCE = 20
"""Trials that report in a second."""
NOW = datetime.now(UTC)
_T = TypeVar("_T")


class Driven:
    """A sweep of ten thousand trials, and a driver that goes on with it."""

    def __init__(self, writer: SweepWriter, trials: int) -> None:
        self.writer, self.trials = writer, trials
        configs = [
            TrialConfig(
                data=DataConfig(dataset="cifar100", repetition=repetition),
                model=ModelConfig(width=width, subnetworks=subnetworks),
                mixing=MixingConfig(weight_root=root),
            )
            for width, subnetworks, repetition in itertools.product(range(1, 11), (2, 3, 4, 5), (1, 2, 4, 8, 16))
            for root in (1, 2, 3, 4, 5)
        ]  # fmt: skip
        self._cells = [(cell_id(config), config_columns(config)) for config in configs]
        self._seq = itertools.count(1)
        self._next = trials * 2 // 5
        self.running = [
            self._row(number, "RUNNING", 1 + number % 150) for number in range(self._next - RUNNING, self._next)
        ]
        ended = [
            self._row(number, "ERROR" if number % 80 == 7 else "TERMINATED", EPOCHS)
            for number in range(self._next - RUNNING)
        ]
        writer.put([*ended, *self.running, *(self._row(number, "PENDING", 0) for number in range(self._next, trials))])
        writer.add(self._epoch(row, epoch) for row in self.running for epoch in range(1, row.epoch + 1))
        for row in ended[-1000:]:
            writer.event("terminated", "all epochs trained", row.trial_id)
        writer.flush(force=True)

    def step(self) -> None:
        """Some trials report an epoch, and one ends."""
        reporting, self.running = self.running[:AT_ONCE], self.running[AT_ONCE:]
        moved = [
            row.replace(epoch=row.epoch + 1, seq=next(self._seq), updated_at=datetime.now(UTC)) for row in reporting
        ]
        moved[0] = moved[0].replace(epoch=EPOCHS, state="TERMINATED")
        begun = self._row(self._next, "RUNNING", 1)
        self._next += 1
        self.writer.add(self._epoch(row, row.epoch) for row in [*moved, begun])
        self.writer.put([*moved, begun])
        self.writer.event("terminated", "all epochs trained", moved[0].trial_id)
        self.running += [*moved[1:], begun]

    def _row(self, number: int, state: State, epoch: int) -> TrialRow:
        cell, config = self._cells[number % len(self._cells)]
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        top1 = 0.5 + (number * 7919 % 1000) / 4000
        return TrialRow(
            sweep=SWEEP, position=number, trial_id=digest[:12], digest=digest, cell_id=cell, epoch=epoch, epochs=EPOCHS,
            fence=self.writer.fence, attempt=1, attempts=int(epoch > 0), state=state, seq=next(self._seq),
            wall_s=9.0 * epoch, gpu_seconds=9.0 * epoch, images_per_s=1e4, train_flops=1e15 * epoch / EPOCHS,
            hosts=f"node-{number % 16}",
            device_name="NVIDIA H200", started_at=NOW - timedelta(hours=2) if epoch else None, updated_at=NOW,
            error_cause=f"CUDA out of memory: {number} MiB" if state == "ERROR" else None,
            config={**config, "seed": number // len(self._cells)},
            metrics={name: top1 for name in METRIC_COLUMNS[:12]} | {"top1": top1} if epoch else {},
        )  # fmt: skip

    def _epoch(self, row: TrialRow, epoch: int) -> EpochRow:
        top1 = 0.7 * (1 - 1 / (1 + epoch / 20))
        return EpochRow(
            sweep=SWEEP, trial_id=row.trial_id, epoch=epoch, attempt=1, fence=self.writer.fence, seq=next(self._seq),
            updated_at=NOW, wall_s=9.0 * epoch, gpu_seconds=9.0 * epoch, images_per_s=1e4,
            metrics={"top1": top1, "loss": 1 - top1},
        )  # fmt: skip


class Timed:
    """Milliseconds of the processor, by what they went into."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], _T]) -> _T:
        began = time.thread_time()
        result = call()
        self.ms.setdefault(name, []).append(1000 * (time.thread_time() - began))
        return result

    def figures(self) -> dict[str, Any]:
        return {name: {"n": len(held), "median_ms": round(_at(held, 0.5), 2), "p95_ms": round(_at(held, 0.95), 2),
                       "first_ms": round(held[0], 2)} for name, held in self.ms.items()}  # fmt: skip


def _at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def frames(store: ResultStore, driven: Driven, rounds: int) -> dict[str, Any]:
    """Frames after news, and frames after keys."""
    timed, following = Timed(), store.follow(SWEEP)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="256", width=SIZE[0], height=SIZE[1])
    terminal, scene, keys = Terminal(console, keys=False), None, Keys()
    for number in range(rounds):
        if number:
            driven.step()
            driven.writer.flush(force=True)
        began = time.thread_time()
        shot = timed("look", following.look)
        held = timed("driven", following.driven)
        looked = time.thread_time()
        scene = timed("scene", lambda: Scene(shot, datetime.now(UTC), driven=held, before=scene))  # noqa: B023
        lines = timed("frame", lambda: drawn(scene, NOW, SIZE, keys))  # noqa: B023
        timed("sent", lambda: terminal.draw(lines))  # noqa: B023
        timed.ms.setdefault("news, from the snapshot to the terminal", []).append(1000 * (time.thread_time() - looked))
        if not number:
            gc.freeze()  # as `watch` does after its first look
        timed.ms.setdefault("news, with the look at the store", []).append(1000 * (time.thread_time() - began))
    assert scene is not None
    for key in ["down"] * 20 + ["/", *"w=7 m=3", "enter"] + ["s", "s", "down", "tab", "right"] * 4:
        began = time.thread_time()
        keys, _ = press(keys, key, scene)
        terminal.draw(drawn(scene, NOW, SIZE, keys))
        timed.ms.setdefault("key", []).append(1000 * (time.thread_time() - began))
    return timed.figures()


def share(store: ResultStore, driven: Driven, seconds: float) -> dict[str, Any]:
    """What `mixmo watch` uses while a driver goes on, and while nothing happens."""
    with watching(store.uri) as (pid, sent):
        busy, drawn_busy = _spent(pid, seconds, driven, sent)
        quiet, drawn_quiet = _spent(pid, seconds / 2, None, sent)
    return {"seconds": seconds, "busy_share": round(busy, 4), "busy_frames": drawn_busy, "quiet_share": round(quiet, 4),
            "quiet_frames": drawn_quiet}  # fmt: skip


def _spent(pid: int, seconds: float, driven: Driven | None, sent: list[int]) -> tuple[float, int]:
    """The share of a core, and how often something was drawn."""
    began, before, drawn_before = time.monotonic(), _cpu_s(pid), len(sent)
    while time.monotonic() - began < seconds:
        if driven:
            driven.step()
            driven.writer.flush()
            driven.writer.renew()
        time.sleep(1.0)
    return (_cpu_s(pid) - before) / (time.monotonic() - began), len(sent) - drawn_before


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def watching(results: str) -> Iterator[tuple[int, list[int]]]:
    """A `mixmo watch` on a terminal of its own whose first frame is there: its process id, and the bytes it sends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
    command = [sys.executable, "-m", "orchestrator.cli", "watch", SWEEP, "--results", results]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=machine.ROOT, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its keyboard is its own
    )  # fmt: skip
    shown, sent = threading.Event(), list[int]()

    def swallow() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 1 << 16):
                sent.append(len(data))
                if b"Running" in data:
                    shown.set()

    threading.Thread(target=swallow, daemon=True).start()
    try:
        if not shown.wait(120):
            raise SystemExit("mixmo watch has shown nothing in two minutes")
        time.sleep(2.0)
        yield process.pid, sent
    finally:
        process.terminate()
        process.wait(30)
        os.close(theirs)
        os.close(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", action="store_true", help="print the figures, and write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore.open(folder, create=True)
        with store.writer(SWEEP, sweep_text=f"name: {SWEEP}\n") as writer:
            driven = Driven(writer, options.trials)
            figures = {
                "trials": options.trials,
                "cells": 1000,
                "size": list(SIZE),
                "frames": frames(store, driven, options.frames),
                "watch": share(store, driven, options.seconds),
                "peak_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
            }
    print(json.dumps(figures, indent=1))
    if not options.json:
        print(machine.write("screen", figures), file=sys.stderr)


if __name__ == "__main__":
    main()
