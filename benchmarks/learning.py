"""What a sweep of trainings showed, as a file: mean, deviation and every seed of each cell.

    mixmo run sweeps/benchmark/cifar100_5000.yaml --data DEST
    python benchmarks/learning.py results cifar100_5000

Reads the results folder and trains nothing. The commit, the processor and torch are those of the trials' rows, not of
this script's run. Writes benchmarks/results/<sweep>.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import analysis
from orchestrator.progress import cell_names
from orchestrator.rows import TrialRow

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("top1", "top5", "nll", "nll_calibrated", "ece", "subnetwork_top1_mean", "ratio_error", "loss")


def spread(rows: Sequence[TrialRow], metric: str) -> dict[str, Any] | None:
    values = [value for row in rows if (value := row.metrics.get(metric)) is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def summary(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The finished trials of one cell."""
    return {
        "trials": [row.trial_id for row in rows],
        "train_flops_per_trial": rows[0].train_flops,
        "wall_s_mean": statistics.fmean(row.wall_s for row in rows),
        **{name: found for name in METRICS if (found := spread(rows, name))},
    }


def write(results: str, sweep: str, more: Mapping[str, Any] | None = None) -> Path:
    """The file of a sweep, with `more` in it. Raises LookupError where nothing has finished."""
    loaded = analysis.load(results, sweep)
    finished = [row for row in loaded.rows if row.state == "TERMINATED" and not row.stopped_early]
    if not finished:
        raise LookupError(f"no trial of {sweep} in {results} has finished")
    origins = {
        name: sorted({str(getattr(row, name)) for row in finished})
        for name in ("git_commit", "device_name", "torch_version", "ray_version")
    }
    names = cell_names(loaded.rows)
    found = {
        "sweep": sweep,
        "sweep_file": loaded.store.sweep_file(sweep),
        "finished": len(finished),
        "planned": len(loaded.rows),
        "at": max(row.updated_at for row in finished if row.updated_at).isoformat(timespec="seconds"),
        **origins,
        **(more or {}),
        "cells": {names[cell]: summary([row for row in finished if row.cell_id == cell])
                  for cell in dict.fromkeys(row.cell_id for row in finished)},
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / f"{sweep}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, each in found["cells"].items():
        top1 = each["top1"]
        print(f"{name:14} top1 {100 * top1['mean']:.2f} ± {100 * (top1['std'] or 0):.2f} ({top1['n']})")
    print(f"written to {path.relative_to(ROOT)}", flush=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the results folder")
    parser.add_argument("sweep", help="the sweep's name")
    options = parser.parse_args()
    try:
        write(options.results, options.sweep)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
