"""What a sweep of trainings showed, as a file: mean, deviation and every seed of each label.

    mixmo run sweeps/benchmark/cifar100_5000.yaml --data DEST
    python benchmarks/learning.py results cifar100_5000

Reads the results folder and trains nothing. The commit, the processor and torch are those of the trials' rows, not of
this script's run. Writes benchmarks/results/<sweep>.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import analysis
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
    """The finished trials of one label."""
    return {
        "trials": [row.trial_id for row in rows],
        "train_flops_per_trial": rows[0].train_flops,
        "wall_s_mean": statistics.fmean(row.wall_s for row in rows),
        **{name: found for name in METRICS if (found := spread(rows, name))},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the results folder")
    parser.add_argument("sweep", help="the sweep's name")
    options = parser.parse_args()
    loaded = analysis.load(options.results, options.sweep)
    finished = [row for row in loaded.rows if row.state == "TERMINATED" and not row.stopped_early]
    if not finished:
        print(f"no trial of {options.sweep} in {options.results} has finished", file=sys.stderr)
        return 1
    origins = {
        name: sorted({str(getattr(row, name)) for row in finished})
        for name in ("git_commit", "device_name", "torch_version", "ray_version")
    }
    labels = list(dict.fromkeys(row.label or "" for row in finished))
    found = {
        "sweep": options.sweep,
        "sweep_file": loaded.store.sweep_file(options.sweep),
        "finished": len(finished),
        "planned": len(loaded.rows),
        "at": max(row.updated_at for row in finished if row.updated_at).isoformat(timespec="seconds"),
        **origins,
        "labels": {label: summary([row for row in finished if (row.label or "") == label]) for label in labels},
    }
    path = ROOT / "benchmarks" / "results" / f"{options.sweep}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    for label, each in found["labels"].items():
        top1 = each["top1"]
        print(f"{label:14} top1 {100 * top1['mean']:.2f} ± {100 * (top1['std'] or 0):.2f} ({top1['n']})")
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
