"""Rows of a large sweep into a store and out of it, through its public door alone.

Four figures: rows of epochs that a driver hands over at a steady pace, with the share of its time that this takes; the
same as fast as they are taken; reading and grouping 30,000 trials; reading 3 million rows of epochs once they are
compacted. Processor seconds stand beside those of the clock, since a shared machine stretches only the latter.

    python benchmarks/store.py                            in a folder that is made and removed
    python benchmarks/store.py --ceph                     in a bucket of a Ceph gateway that is started here
    python benchmarks/store.py --results s3://bucket/p    in an empty place of yours
    python benchmarks/store.py --tune 60                  a sweep of so many small trials through Ray Tune, in a folder
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import machine
import numpy as np

from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, TrialConfig, cell_id
from orchestrator.rows import METRIC_COLUMNS, EpochRow, State, TrialRow, config_columns
from orchestrator.store import ResultStore, SweepWriter

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = 100
"""Trials at once."""
PERIOD_S = 0.5
"""Of the driver's loop."""
METRICS = METRIC_COLUMNS[:12]
_T = TypeVar("_T")
Figures = dict[str, Any]


class Clock:
    """Seconds of the clock and of the processor that went into some calls."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __call__(self, call: Callable[[], _T]) -> _T:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return call()
        finally:
            self.wall_s += time.perf_counter() - wall
            self.cpu_s += time.process_time() - cpu

    def figures(self) -> Figures:
        return {"wall_s": round(self.wall_s, 3), "cpu_s": round(self.cpu_s, 3)}


class Made:
    """Trials of 12 cells with rows that are as good as noise: nothing in them is easy to compress."""

    def __init__(self, sweep: str, trials: int, epochs: int) -> None:
        self.sweep, self.trials, self.epochs = sweep, trials, epochs
        self.fence = 0
        """Of the driver, as the ledger gives it to its rows."""
        self._draws = np.random.default_rng(0).random(1 << 16).tolist()
        configs = [
            TrialConfig(
                data=DataConfig(dataset="cifar100"),
                model=ModelConfig(width=width, subnetworks=2),
                mixing=MixingConfig(method=method),
            )
            for width in (2, 3, 5, 10)
            for method in ("linear", "cutmix", "sum")
        ]  # fmt: skip
        self._cells = [(cell_id(config), config_columns(config)) for config in configs]

    def trial(self, number: int, epoch: int, seq: int) -> TrialRow:
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        cell, config = self._cells[number % len(self._cells)]
        state: State = "TERMINATED" if epoch == self.epochs else "RUNNING" if epoch else "PENDING"
        return TrialRow(
            sweep=self.sweep, fence=self.fence, label=f"{config['mixing_method']} {config['model_width']}",
            position=number, trial_id=digest[:12], digest=digest, cell_id=cell, epoch=epoch, epochs=self.epochs,
            attempt=1, attempts=1, state=state, seq=seq, config=config,
            metrics=self._metrics(number, epoch), wall_s=30.0 * epoch, updated_at=NOW + timedelta(seconds=seq / 1000),
        )  # fmt: skip

    def epoch(self, row: TrialRow) -> EpochRow:
        return EpochRow(
            sweep=self.sweep, trial_id=row.trial_id, epoch=row.epoch, attempt=1, fence=self.fence, seq=row.seq,
            wall_s=row.wall_s, updated_at=row.updated_at or NOW, gpu_seconds=row.wall_s,
            images_per_s=1e4 * self._draw(row.seq), metrics=row.metrics,
        )  # fmt: skip

    def _metrics(self, number: int, epoch: int) -> dict[str, float | None]:
        return {name: self._draw(number * 7919 + epoch * 31 + at) for at, name in enumerate(METRICS)} if epoch else {}

    def _draw(self, number: int) -> float:
        return float(self._draws[number % len(self._draws)])

    def steps(self) -> Iterator[list[TrialRow]]:
        """What the trials reach, one after the other; the running ones take turns."""
        seq = 0
        for start in range(0, self.trials, RUNNING):
            for epoch in range(1, self.epochs + 1):
                row_numbers = range(start, min(start + RUNNING, self.trials))
                yield [self.trial(number, epoch, seq + at) for at, number in enumerate(row_numbers, 1)]
                seq += len(row_numbers)


def steady(store: ResultStore, rate: int, seconds: float) -> Figures:
    """A driver's loop, in which so many rows a second arrive; 30,000 trials are planned."""
    made, spent = Made("steady", 30_000, 100), Clock()
    steps, given = made.steps(), 0
    with store.writer("steady", sweep_text="") as writer:
        made.fence = writer.fence
        writer.put(made.trial(number, 0, 0) for number in range(made.trials))
        writer.flush(force=True)
        began, waited = time.perf_counter(), 0.0
        while (passed := time.perf_counter() - began) < seconds:
            while given < rate * passed:
                rows = next(steps)
                epochs = [made.epoch(row) for row in rows]
                spent(lambda: hand_over(writer, rows, epochs))  # noqa: B023  (called at once)
                given += len(rows)
            lasted = passed  # the rows that were due until then are handed over
            spent(writer.flush)
            rest = max(0.0, PERIOD_S - (time.perf_counter() - began - passed))
            waited += rest
            time.sleep(rest)
        closing = Clock()
        closing(writer.close)
    held = len(store.epochs("steady", ["epoch"]))
    if held != given:
        raise SystemExit(f"{given} rows were handed over, but {held} are there")
    return {
        "rows_per_s": round(given / lasted), "asked_rows_per_s": rate, "rows": given, "seconds": round(lasted, 1),
        "store_share": round(spent.wall_s / lasted, 4), "store_cpu_share": round(spent.cpu_s / lasted, 4),
        "idle_share": round(waited / lasted, 3), "close": closing.figures(),
        "parts": len(store.snapshot("steady").header.parts),
    }  # fmt: skip


def hand_over(writer: SweepWriter, rows: list[TrialRow], epochs: list[EpochRow]) -> None:
    writer.add(epochs)
    writer.put(rows)


def fill(store: ResultStore, made: Made) -> Figures:
    """All rows as fast as the door takes them, written out every 50,000."""
    spent, given = Clock(), 0
    with store.writer("made", sweep_text="name: made\n") as writer:
        made.fence = writer.fence
        spent(lambda: writer.put(made.trial(number, 0, 0) for number in range(made.trials)))
        for rows in made.steps():
            epochs = [made.epoch(row) for row in rows]
            spent(lambda: hand_over(writer, rows, epochs))  # noqa: B023
            if given // 50_000 != (given + len(rows)) // 50_000:
                spent(lambda: writer.flush(force=True))
            given += len(rows)
        spent(lambda: writer.close(done=True))
    return {"rows": given, **spent.figures(), "rows_per_s": round(given / spent.wall_s)}


def read(store: ResultStore, made: Made) -> Figures:
    figures: Figures = {}

    def timed(name: str, call: Callable[[], int], rounds: int = 3) -> None:
        """The best of some rounds; each must find all there is."""
        best: Figures = {}
        for _ in range(rounds):
            clock = Clock()
            found = clock(call)
            best = min([each for each in (best, clock.figures()) if each], key=lambda each: each["wall_s"])
        figures[name] = {"found": found, **best}

    def grouped() -> int:
        table = store.trials("made").group_by("label").aggregate([("top1", "mean"), ("top1", "count")])
        return int(sum(table.column("top1_count").to_pylist()))

    timed("trials_grouped", grouped)
    timed("epochs", lambda: len(store.epochs("made")))
    timed("epochs_3_columns", lambda: len(store.epochs("made", ["trial_id", "epoch", "top1"])))
    one = made.trial(made.trials // 2, made.epochs, 0).trial_id
    timed("epochs_of_one_trial", lambda: len(store.epoch_rows("made", one)))
    timed("snapshot", lambda: len(store.snapshot("made").rows))
    timed("verify_faults", lambda: len(store.verify("made")), rounds=1)
    return figures


def measure(store: ResultStore, options: argparse.Namespace) -> Figures:
    made = Made("made", options.trials, options.epochs)
    figures: Figures = {"steady": steady(store, options.rate, options.seconds)}
    say(f"steady: {figures['steady']}")
    figures["fill"] = fill(store, made)
    say(f"fill: {figures['fill']}")
    clock = Clock()
    done = clock(lambda: store.compact("made"))
    figures["compact"] = {
        **clock.figures(), "parts_before": done.parts_before, "parts_after": done.parts_after,
        "bytes_per_row": round(done.bytes_after / max(1, done.rows), 1), "bytes": done.bytes_after,
    }  # fmt: skip
    say(f"compact: {figures['compact']}")
    return figures | {"read": read(store, made)}


SWEEP = """
name: through_tune
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1}}
  optim: {{epochs: {epochs}, lr: 0.1}}
blocks: [{{label: vanilla, set: {{model.subnetworks: 1}}}}]
seeds: {trials}
resources: {{gpus_per_worker: 0}}
"""


def through_tune(store: ResultStore, trials: int, epochs: int = 20) -> Figures:
    """The whole path, from gangs that train over Tune and the dispatcher to the rows: how many rows a second come, and
    what share of the driver's time, from its first row on, goes into handing them over and writing them.
    """
    from orchestrator import driver
    from orchestrator import sweep as sweeps

    spent, first = Clock(), list[float]()

    def timed(name: str) -> None:
        method = getattr(SweepWriter, name)

        def call(self: SweepWriter, *words: Any, **named: Any) -> Any:
            if name == "add" and not first:
                first.append(time.perf_counter())
            return spent(lambda: method(self, *words, **named)) if first else method(self, *words, **named)

        setattr(SweepWriter, name, call)

    for name in ("add", "put", "event", "flush"):
        timed(name)
    sweep = sweeps.parse(SWEEP.format(trials=trials, epochs=epochs), source="through_tune.yaml")
    code = driver.run(sweep, store, rehearse=False)
    lasted = time.perf_counter() - first[0]
    rows = len(store.epochs("through_tune", ["epoch"]))
    if code != 0 or rows != trials * epochs:
        raise SystemExit(f"the sweep ended with {code} and {rows} of {trials * epochs} rows")
    return {
        "trials": trials, "rows": rows, "seconds": round(lasted, 1), "rows_per_s": round(rows / lasted, 1),
        "store_share": round(spent.wall_s / lasted, 4), "store_cpu_share": round(spent.cpu_s / lasted, 4),
    }  # fmt: skip


def table(places: dict[str, Figures]) -> str:
    lines = [
        "| place | rows/s at the door (share of the driver's time) | as fast as it goes | trials read and grouped "
        "| epochs read | compaction |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in places.items():
        steadily, filled, found = each["steady"], each["fill"], each["read"]
        lines.append(
            f"| {name} | {steadily['rows_per_s']:,} ({steadily['store_share']:.1%}) | {filled['rows_per_s']:,} rows/s "
            f"| {found['trials_grouped']['found']:,} in {_seconds(found['trials_grouped'])} "
            f"| {found['epochs']['found']:,} in {_seconds(found['epochs'])} | {_seconds(each['compact'])} |"
        )
    return "\n".join([*lines, "", "In brackets behind seconds: those of the processor."])


def _seconds(figures: Figures) -> str:
    return f"{figures['wall_s']:.2f} s ({figures['cpu_s']:.2f})"


def say(line: str) -> None:
    print(line, file=sys.stderr)


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What kind of place it is, and its address."""
    if options.results:
        yield "bucket" if options.results.startswith("s3:") else "folder", options.results
    elif options.ceph:
        sys.path.insert(0, str(machine.ROOT / "tests"))
        import made_bucket
        import made_ceph

        os.environ |= {"AWS_ACCESS_KEY_ID": made_bucket.KEY, "AWS_SECRET_ACCESS_KEY": made_bucket.SECRET}
        with made_ceph.serve() as server:
            bucket = made_bucket.make_bucket(server.endpoint)
            yield "ceph", f"s3://{bucket}/results?endpoint_override={server.endpoint}&scheme=http"
    else:
        with tempfile.TemporaryDirectory(prefix="mixmo-benchmark-") as folder:
            yield "folder", folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", metavar="PLACE", help="an empty folder or s3://bucket/prefix")
    parser.add_argument("--ceph", action="store_true", help="start a Ceph gateway, as the tests do")
    parser.add_argument("--tune", type=int, metavar="TRIALS", help="only the whole path, with so many trials")
    parser.add_argument("--trials", type=int, default=30_000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rate", type=int, default=None, help="rows a second; 5,000 in a folder, 2,000 in a bucket")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    with place(options) as (kind, address):
        options.rate = options.rate or (5_000 if kind == "folder" else 2_000)
        store = ResultStore.open(address, create=True)
        figures = through_tune(store, options.tune) if options.tune else measure(store, options)
    before = machine.ROOT / "benchmarks" / "results" / "store.json"
    held = json.loads(before.read_text()) if before.exists() else {}
    places, tune = held.get("places", {}), held.get("through_tune", {})
    (tune if options.tune else places)[kind] = {**machine.described(), **figures}
    path = machine.write("store", {"places": places, "through_tune": tune})
    print(json.dumps(tune if options.tune else places, indent=1) if options.json or options.tune else table(places))
    say(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
