"""`mixmo plan` of a large sweep against a store that holds as many rows: its wall and processor time, as users have it.

Each figure is of a process of its own. A shared machine stretches the wall; the processor's seconds are the code's.

    python benchmarks/planning.py --cells 10000 --json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

from mixmo_core.cost import trial_flops
from orchestrator import plan as planning
from orchestrator.store import ResultStore
from orchestrator.sweep import parse

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT_S = 2.0
TEXT = """\
name: large
trial: {{data: {{dataset: cifar100}}, optim: {{epochs: 300}}}}
blocks:
  - grid: {{model.width: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], model.subnetworks: [1, 2, 3, 4],
           optim.lr: {rates}, data.batch_size: [32, 64]}}
seeds: 1
budget: {{gpu_hours: 1000000}}
price: {{gpu_hour: 2.5}}
resources: {{max_gangs: 64}}
"""


def sweep_of(cells: int) -> str:
    rates = [round(0.0001 * number, 6) for number in range(1, cells // 80 + 1)]
    return TEXT.format(rates=rates)


def fill(folder: Path, text: str) -> int:
    """A row for each trial: half of them finished, a quarter failed, the others waiting."""
    sweep = parse(text, source="large.yaml")
    store = ResultStore.open(folder, create=True)
    with store.writer(sweep.name, sweep_text=text) as writer:
        for trial in sweep.trials:
            row = planning.initial_row(trial, sweep).replace(seq=trial.position)
            if trial.position % 4 < 2:
                flops = trial_flops(trial.config)
                row = row.replace(
                    state="TERMINATED", epoch=300, attempts=1, train_flops=flops, wall_s=flops / 4e13,
                    gpu_seconds=flops / 4e13, device_name="a GPU", updated_at=NOW, metrics={"top1": 0.5},
                )  # fmt: skip
            elif trial.position % 4 == 2:
                row = row.replace(state="ERROR", attempts=1, error_cause="RuntimeError: no", updated_at=NOW)
            writer.put([row])
    return len(sweep.trials)


def planned(file: Path, results: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "orchestrator.cli", "plan", str(file), "--results", str(results), *words]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print it, instead of writing benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mixmo-planning-") as scratch:
        file, results = Path(scratch) / "large.yaml", Path(scratch) / "results"
        file.write_text(sweep_of(options.cells))
        trials = fill(results, file.read_text())
        found: dict[str, Any] = {"trials": trials, "rows": trials, "limit_s": LIMIT_S}
        for name, words in {"page": (), "json": ("--json",)}.items():
            runs = [planned(file, results, *words) for _ in range(options.repeats)]
            found[name] = min(runs, key=lambda run: run["wall_s"])
    if options.json:
        print(json.dumps(machine.described() | found, indent=1))
    else:
        print(f"{machine.write('planning', found)}: {found}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
