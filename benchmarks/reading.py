"""Processor seconds (user and system) of the commands that read, each in a process of its own, as a shell starts them.

The store is made here: 60 trials of 12 cells with 50 epochs each, once in a folder and once in a bucket of moto's
server on the loopback, whose own time does not count. Its sweep file has a baseline, a price, a budget, published
numbers, and ensembles of two cells, whose ten trials have logits as those of CIFAR-100 are: 4 MB each. Of some rounds
the least and the median are told, and what is beyond the target.

    python benchmarks/reading.py                 writes benchmarks/results/reading.json
    python benchmarks/reading.py --imports       what `mixmo ls` spends on imports, the dearest first; writes nothing
"""

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from store import Made, hand_over

from orchestrator.rows import TrialRow
from orchestrator.store import Logits, ResultStore
from orchestrator.sweep import shown

ROOT = machine.ROOT
sys.path.append(str(ROOT / "tests"))
import made_bucket  # noqa: E402  (the S3 server that the tests use)
import numpy as np  # noqa: E402

PROGRAM = [sys.executable, "-c", "from orchestrator.cli import script; script()"]
TARGET_S = {"folder": 0.3, "s3": 0.5}
COMMANDS = (
    "--version", "ls", "status made", "watch made --once", "table made --no-ensembles", "table made",
    "table made --at 25 --no-ensembles", "pareto made --no-ensembles", "pareto made", "show TRIAL", "logs TRIAL",
    "plan sweeps/quickstart.yaml", "plan sweeps/paper/table5_tiny_imagenet.yaml", "verify made",
)  # fmt: skip
TRIALS, EPOCHS, CELLS = 60, 50, 12
JOINED = ("cutmix 10", "linear 10")
FILE = """\
name: made
trial: {data: {dataset: cifar100}, model: {subnetworks: 2}}
baseline: sum 10
price: {gpu_hour: 2.5, currency: EUR}
budget: {gpu_hours: 900, hours: 900}
ensembles: [{of: cutmix 10, members: [2, 3]}, {of: linear 10, members: [2, 3]}]
"""
PUBLISHED = "published:" + (ROOT / "sweeps" / "paper" / "table1_cifar100.yaml").read_text().partition("published:")[2]


def fill(place: str) -> str:
    """Put the sweep `made` there; the id of one of its trials."""
    asked = shown(FILE + PUBLISHED, "made")
    assert asked.ensembles, "the sweep file cannot be read"
    assert asked.published
    store, made = ResultStore.open(place, create=True), Made("made", trials=TRIALS, epochs=EPOCHS)
    dice = np.random.default_rng(0)
    labels_N = dice.integers(0, 100, 10_000)
    with store.writer("made", sweep_text=FILE + PUBLISHED) as writer:
        made.fence = writer.fence
        for number, rows in enumerate(made.steps(), 1):
            seeded = [
                row.replace(config={**row.config, "seed": row.position // CELLS}, gpu_seconds=row.wall_s)
                for row in rows
            ]  # fmt: skip
            if number == EPOCHS:
                seeded = [_ended(store, row, dice, labels_N) for row in seeded]
            hand_over(writer, seeded, [made.epoch(row) for row in seeded])
        writer.close(done=True)
    return made.trial(0, 0, 0).trial_id


def _ended(store: ResultStore, row: TrialRow, dice: np.random.Generator, labels_N: Any) -> TrialRow:
    """With what its gang leaves behind."""
    attempt = store.attempt(row.trial_id, row.fence, row.attempt, "made")
    attempt.put_log(0, "".join(f"epoch {epoch} of {EPOCHS}\n" for epoch in range(1, EPOCHS + 1)))
    if row.label not in JOINED:
        return row
    logits_MNK = dice.normal(size=(2, len(labels_N), 100)) + 2 * np.eye(100)[labels_N]
    return row.replace(logits=attempt.put_logits(Logits.of(logits_MNK, labels_N)))


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """The address of a new bucket; its credentials are in the environment."""
    with made_bucket.serve() as endpoint:
        os.environ |= {"AWS_ACCESS_KEY_ID": made_bucket.KEY, "AWS_SECRET_ACCESS_KEY": made_bucket.SECRET}
        name = made_bucket.make_bucket(endpoint)
        yield f"s3://{name}/results?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def cpu_s(words: list[str]) -> float:
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*PROGRAM, *words], cwd=ROOT, env=compiled, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"mixmo {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(place: str, rounds: int, target_s: float) -> dict[str, Any]:
    trial = fill(place)
    found: dict[str, Any] = {}
    for command in COMMANDS:
        words = command.replace("TRIAL", trial).split()
        where = [] if command == "--version" else ["--results", place]
        cpu_s([*words, *where])  # leaves compiled modules behind, as any first call does
        took = [cpu_s([*words, *where]) for _ in range(rounds)]
        least, usual = min(took), statistics.median(took)
        found[command] = {"least_s": round(least, 3), "median_s": round(usual, 3)}
        mark = " beyond the target" if least > target_s else ""
        print(f"  mixmo {command:46} {least:.3f} s at least, {usual:.3f} s median{mark}", flush=True)
    return found


def imports(place: str) -> None:
    """The 25 modules whose own code takes `mixmo ls` longest to load."""
    fill(place)
    words = [sys.executable, "-X", "importtime", *PROGRAM[1:], "ls", "--results", place]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    lines = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)$", told, re.MULTILINE)
    print(f"{len(lines)} modules, {sum(int(own) for own, *_ in lines) / 1000:.0f} ms")
    for own, whole, _, name in sorted(lines, key=lambda line: -int(line[0]))[:25]:
        print(f"{int(own) / 1000:7.1f} ms  {int(whole) / 1000:7.1f} with what it imports  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, metavar="N")
    parser.add_argument("--imports", action="store_true", help="only tell what is imported")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, bucket() as address:
        for name, place in (("folder", str(Path(folder) / "results")), ("s3", address)):
            print(f"{name}: target {TARGET_S[name]} s")
            if options.imports:
                imports(place)
            else:
                told = measure(place, options.rounds, TARGET_S[name])
                result[name] = {"target_s": TARGET_S[name], "rounds": options.rounds, **told}
    if result:
        print(f"written to {machine.write('reading', result).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
