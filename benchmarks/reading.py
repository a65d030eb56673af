"""Processor seconds (user and system) of the commands that read, each in a process of its own, as a shell starts them.

The store is made here: 60 trials of 12 cells with 50 epochs each, once in a folder and once in a bucket of moto's
server on the loopback, whose own time does not count. Of some rounds the least and the median are told.

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

from orchestrator.store import ResultStore

ROOT = machine.ROOT
sys.path.append(str(ROOT / "tests"))
import made_bucket  # noqa: E402  (the S3 server that the tests use)

PROGRAM = [sys.executable, "-c", "from orchestrator.cli import script; script()"]
TARGET_S = {"folder": 0.3, "s3": 0.5}
COMMANDS = ("--version", "ls", "status made", "table made", "plan sweeps/quickstart.yaml", "show TRIAL")


def fill(place: str) -> str:
    """Put the sweep `made` there; the id of one of its trials."""
    store, made = ResultStore.open(place, create=True), Made("made", trials=60, epochs=50)
    with store.writer("made", sweep_text="name: made\n") as writer:
        made.fence = writer.fence
        for rows in made.steps():
            hand_over(writer, rows, [made.epoch(row) for row in rows])
        writer.close(done=True)
    return made.trial(0, 0, 0).trial_id


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


def measure(place: str, rounds: int) -> dict[str, Any]:
    trial = fill(place)
    found: dict[str, Any] = {}
    for command in COMMANDS:
        words = command.replace("TRIAL", trial).split()
        where = [] if command == "--version" else ["--results", place]
        cpu_s([*words, *where])  # leaves compiled modules behind, as any first call does
        took = [cpu_s([*words, *where]) for _ in range(rounds)]
        found[command] = {"least_s": round(min(took), 3), "median_s": round(statistics.median(took), 3)}
        print(f"  mixmo {command:30} {min(took):.3f} s at least, {statistics.median(took):.3f} s median", flush=True)
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
                result[name] = {"target_s": TARGET_S[name], "rounds": options.rounds, **measure(place, options.rounds)}
    if result:
        print(f"written to {machine.write('reading', result).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
