"""What a trial costs beside its training: this project against Ray Tune, in one run on one machine.

    python benchmarks/orchestration.py                      200 trivial trials each, 3 of the nested form
    python benchmarks/orchestration.py --trials 50 --rounds 1
    python benchmarks/orchestration.py --scale 20000        ours alone: does a trial cost more, the more there are?
    python benchmarks/orchestration.py --slots 512          ours alone: how soon so many slots are full

A trivial trial reports three epochs that take no time. Four at a time are run by

    guide   Ray Tune as its guide shows it: a function, `max_concurrent_trials`, reused actors, loggers off
    best    Ray Tune at its best: a class, reused actors, concurrency limited by resources
    nested  a TorchTrainer of one worker for each trial, as Ray's guide to tuning trainings has it, one at a time
    ours    gangs with torch and a process group, whose rows, logs and checkpoints go to a store in a folder

each in a process of its own, with a Ray of its own, in turns. A figure is the time from the end of the first trial to
the end of the last over their number less one, so that nobody's start counts; it stands beside as `start_s`. Seconds of
processor are those of the driver, the process that a user starts. Ratios are ours over theirs, of medians over rounds.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

AT_ONCE = 4
EPOCHS = 3
NESTED = 3
"""Trials of the nested form, of which one takes as long as hundreds of the others."""
SLOT_S = 2.0
"""How long a trial of --slots takes."""
TRIALS = """
name: trivial
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: {epochs}}}
seeds: {trials}
resources: {{gpus_per_worker: 0, max_gangs: {at_once}}}
"""


@dataclass
class Ends:
    """When trials ended, by the clock and by the processor of this process."""

    began: float = field(default_factory=time.perf_counter)
    at: list[tuple[float, float]] = field(default_factory=list)

    def note(self, count: int = 1) -> None:
        self.at += [(time.perf_counter(), time.process_time())] * count

    def figures(self) -> dict[str, float]:
        (first_s, first_cpu_s), (last_s, last_cpu_s) = self.at[0], self.at[-1]
        between = len(self.at) - 1
        return {
            "trials": len(self.at), "start_s": round(first_s - self.began, 2),
            "wall_ms": round(1e3 * (last_s - first_s) / between, 2),
            "driver_cpu_ms": round(1e3 * (last_cpu_s - first_cpu_s) / between, 2),
        }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- Ray Tune


@contextlib.contextmanager
def own_ray(**resources: float) -> Iterator[None]:
    """As the driver starts one."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            address="local", num_cpus=AT_ONCE, resources=resources, include_dashboard=False, log_to_driver=False,
            object_store_memory=100 * 2**20, logging_level="ERROR", _temp_dir=folder,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def tuned(trainable: Any, trials: int, scratch: str, **options: Any) -> Ends:
    from ray import tune

    ends = Ends()

    class Clock(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ends.note()

    tune.Tuner(
        trainable,
        param_space={"index": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(metric="top1", mode="max", **options),
        run_config=tune.RunConfig(storage_path=scratch, verbose=0, callbacks=[Clock()]),
    ).fit()
    return ends


def guide(trials: int, scratch: str) -> Ends:
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        for epoch in range(EPOCHS):
            tune.report({"top1": 0.1 * epoch})

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "auto"
    with own_ray():
        return tuned(trial, trials, scratch, max_concurrent_trials=AT_ONCE, reuse_actors=True)


def best(trials: int, scratch: str) -> Ends:
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.epoch = 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.epoch = 0
            return True

        def step(self) -> dict[str, Any]:
            self.epoch += 1
            return {"top1": 0.1 * self.epoch, "done": self.epoch == EPOCHS}

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...
        def load_checkpoint(self, checkpoint: Any) -> None: ...

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "8"
    with own_ray(slot=AT_ONCE):
        return tuned(tune.with_resources(Trial, {"cpu": 0, "slot": 1}), trials, scratch, reuse_actors=True)


def nested(trials: int, scratch: str) -> Ends:
    """As Ray's guide has it for version 2 of Train: a Tune function that fits a trainer."""
    import ray.train.torch
    from ray import tune

    def worker() -> None:
        for epoch in range(EPOCHS):
            ray.train.report({"top1": 0.1 * epoch})

    def trial(config: dict[str, Any]) -> None:
        ray.train.torch.TorchTrainer(
            worker,
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name=f"nested-{config['index']}", storage_path=scratch),
        ).fit()
        tune.report({"top1": 0.2})

    with own_ray():
        return tuned(trial, trials, scratch, max_concurrent_trials=1)


# ------------------------------------------------------------------------------------------------------------- ours


def trivially(settings: Mapping[str, Any]) -> None:
    """A gang whose trainings are trivial trials; all around them is as it always is. It travels by value."""
    from mixmo_core import train
    from orchestrator import gang

    def epochs(config: Any, *, resume: Any = None, **_: Any) -> Any:
        history: tuple[dict[str, float], ...] = ()
        for epoch in range(1, EPOCHS + 1):
            history += ({"loss": 1.0 / epoch, "lr": 0.1, "top1": 0.1 * epoch},)
            yield train.Epoch(epoch, history[-1], 200, 1e-6, history, None, None, dict)

    train.steps = epochs
    gang.loop(settings)


def ours(trials: int, scratch: str, note: Callable[[Ends], None] = lambda ends: None) -> Ends:
    from orchestrator import driver, engine, gang
    from orchestrator import sweep as sweeps
    from orchestrator.store import ResultStore

    gang.loop = trivially
    ends = Ends()

    @contextlib.contextmanager
    def clocked(job: engine.Job) -> Iterator[tuple[engine.Crew, engine.Queue]]:
        with engine.on_ray(job) as (crew, queue):
            updates = crew.updates

            def seen(wait_s: float) -> Any:
                found = updates(wait_s)
                ended = sum(update.kind == "ended" for update in found)
                ends.note(ended)
                if ended:
                    note(ends)
                return found

            crew.updates = seen  # type: ignore[method-assign]
            yield crew, queue

    sweep = sweeps.parse(TRIALS.format(epochs=EPOCHS, trials=trials, at_once=AT_ONCE), source="trivial.yaml")
    store = ResultStore.open(scratch, create=True)
    code = driver.run(sweep, store, rehearse=False, engine=clocked, talk=lambda line: None)
    rows = store.epochs("trivial", ["epoch"]).num_rows
    if code != 0 or rows != trials * EPOCHS:
        raise SystemExit(f"ours ended with {code} and {rows} of {trials * EPOCHS} rows")
    return ends


SYSTEMS: dict[str, Callable[[int, str], Ends]] = {"guide": guide, "best": best, "nested": nested, "ours": ours}


# ------------------------------------------------------------------------------------------------------ side by side


def measured(system: str, trials: int) -> dict[str, Any]:
    """In a process of its own."""
    words = [sys.executable, __file__, "--alone", system, "--trials", str(trials)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{system}: {found}")
    return found


def compared(trials: int, rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for number in range(rounds):
        for name in ("best", "ours", "guide") if number % 2 == 0 else ("guide", "ours", "best"):
            runs[name].append(measured(name, trials))
    runs["nested"].append(measured("nested", NESTED))
    middle = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}

    def ratio(name: str, key: str) -> float:
        return round(middle["ours"][key] / middle[name][key], 4)

    return {
        "ratios": {"tune_best": ratio("best", "wall_ms"), "tune_guide": ratio("guide", "wall_ms"),
                   "nested": ratio("nested", "wall_ms")},
        "driver_cpu_ratios": {"tune_best": ratio("best", "driver_cpu_ms"),
                              "tune_guide": ratio("guide", "driver_cpu_ms")},
        "medians": middle, "runs": runs,
    }  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    told = {"best": "Ray Tune at its best", "guide": "Ray Tune as its guide shows it",
            "nested": "a TorchTrainer per trial", "ours": "ours"}  # fmt: skip
    lines = ["| | wall a trial | driver's processor a trial | ours over it |", "|---|---:|---:|---:|"]
    for name, words in told.items():
        each, over = result["medians"][name], result["ratios"].get(name if name == "nested" else f"tune_{name}")
        cells = f"{each['wall_ms']:,.1f} ms | {each['driver_cpu_ms']:,.1f} ms | {f'{over:.3g}x' if over else ''}"
        lines.append(f"| {words} | {cells} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- many trials, slots


def resident_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0


def scaled(trials: int, scratch: str) -> dict[str, Any]:
    """Ours with many trials: cost and memory at every thousand."""
    marks: dict[int, dict[str, float]] = {}

    def note(ends: Ends) -> None:
        done = len(ends.at)
        if done // 1000 * 1000 not in marks:
            marks[done // 1000 * 1000] = {"done": done, "at_s": ends.at[-1][0], "rss_kb": resident_kb()}

    ours(trials, scratch, note)
    stops = [mark for at, mark in sorted(marks.items())]
    steps = [
        {"done": after["done"], "rss_kb": after["rss_kb"],
         "wall_ms": round(1e3 * (after["at_s"] - before["at_s"]) / (after["done"] - before["done"]), 2)}
        for before, after in itertools.pairwise(stops)
    ]  # fmt: skip
    first, last = steps[0], steps[-1]
    tenth = next((each for each in steps if each["done"] >= 10_000), last)
    return {
        "trials": trials,
        "cost_ratio_at_10000": round(tenth["wall_ms"] / first["wall_ms"], 3),
        "cost_ratio_at_the_end": round(last["wall_ms"] / first["wall_ms"], 3),
        "driver_kb_per_trial": round((last["rss_kb"] - first["rss_kb"]) / (last["done"] - first["done"]), 2),
        "steps": steps,
    }  # fmt: skip


def filled(slots: int) -> dict[str, Any]:
    """How soon so many slots have a trial each, over the real scheduler and dispatcher; what trains in them sleeps."""
    import ray

    from orchestrator import fleet, tune
    from orchestrator.dispatcher import NAMESPACE, Dispatcher, EpochReport, Order, Retries

    class Slots:
        async def work(self, dispatcher: Any) -> float:
            """All slots take two trials each; when the last of them had its first, by the clock of `time.time`."""
            began: list[float] = []

            async def slot(name: str) -> None:
                for _ in range(2):
                    while (given := await dispatcher.next.remote(name, 30.0)) == "wait":
                        pass
                    if given == "leave":
                        return
                    began.append(time.time())
                    await dispatcher.accept.remote(given.token)
                    await asyncio.sleep(SLOT_S)
                    report = EpochReport(epoch=1, metrics={}, wall_s=SLOT_S, gpu_seconds=0.0, images_per_s=0.0)
                    await dispatcher.report.remote(given.token, [report], None)
                    await dispatcher.finish.remote(given.token)

            await asyncio.gather(*(slot(f"slot-{number}") for number in range(slots)))
            return sorted(began)[slots - 1]

    orders = [Order(index=index, trial_id=f"{index:012x}", settings={"optim.epochs": 1}) for index in range(2 * slots)]
    with fleet.cluster(cpus=AT_ONCE):
        name = "dispatcher-slots"
        dispatcher = ray.remote(num_cpus=0, max_concurrency=100_000)(Dispatcher).options(
            name=name, namespace=NAMESPACE
        ).remote(orders, fence=1, retries=Retries())  # fmt: skip
        workers = ray.remote(num_cpus=0)(Slots).remote()
        tuning = tune.Tuning([order.index for order in orders], dispatcher=name, namespace=NAMESPACE)
        began = time.time()
        tuning.start()
        full = ray.get(workers.work.remote(dispatcher)) - began
        tuning.join()
        ended = time.time() - began
    return {"slots": slots, "full_s": round(full, 2), "trials": 2 * slots, "all_s": round(ended, 2),
            "ideal_s": 2 * SLOT_S}  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, metavar="TRIALS")
    parser.add_argument("--slots", type=int, metavar="SLOTS")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--alone", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    import machine

    from orchestrator import fleet  # noqa: F401  (it sets Ray's environment, which stands before Ray is imported)

    results = machine.ROOT / "benchmarks" / "results" / "orchestration.json"
    with tempfile.TemporaryDirectory(prefix="mixmo-bench-") as scratch:
        if options.alone:
            print(json.dumps(SYSTEMS[options.alone](options.trials, scratch).figures()))
            return 0
        held = json.loads(results.read_text())["measured"] if results.exists() else {}
        if options.scale:
            name, found = "scale", scaled(options.scale, scratch)
        elif options.slots:
            name, found = "slots", filled(options.slots)
        else:
            name, found = "compared", compared(options.trials, options.rounds)
    path = machine.write("orchestration", {"measured": {**held, name: {**machine.described(), **found}}})
    print(table(found) if name == "compared" and not options.json else json.dumps(found, indent=1))
    say(f"written to {path}")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    for thread in threading.enumerate():  # Ray's threads end with their process
        if thread is not threading.main_thread() and not thread.daemon:
            os._exit(code)
    sys.exit(code)
