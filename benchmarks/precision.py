"""Does bf16 cost accuracy? The difference to fp32 on the same seeds, on real scans of digits.

    python benchmarks/precision.py

Each seed trains twice, in fp32 and in bf16: the same weights to begin with, the same batches, the same masks. Seeds
are added, 8, 16, 32 ... in all, until the interval of the mean difference decides: inside +-1.0 point, or outside of
it. Every look takes its share of the 5 % (Bonferroni over all looks there could be), so that the interval holds its
95 % although it is looked at several times. Writes benchmarks/results/precision.json.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import machine
import torch
from scipy import stats

from mixmo_core import train
from mixmo_core.config import TrialConfig, unflatten

LOOKS = (8, 16, 32, 64, 128)
BOUND = 0.01
"""One point of accuracy."""
SYSTEMS: dict[str, dict[str, Any]] = {
    "vanilla": {"model.subnetworks": 1},
    "Cut-MixMo": {"model.subnetworks": 2, "mixing.method": "cutmix", "data.repetition": 2},
}
PROBLEM: dict[str, Any] = {
    "data.dataset": "digits", "data.train_images": 400, "data.batch_size": 32, "model.depth": 10, "model.width": 1,
    "optim.epochs": 10, "optim.lr": 0.2, "evaluate.every": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """Of the mean of paired differences, from Student's t."""

    mean: float
    low: float
    high: float

    @property
    def decides(self) -> bool:
        """Whether it lies wholly inside the bound, or wholly outside."""
        return self.inside or self.low > BOUND or self.high < -BOUND

    @property
    def inside(self) -> bool:
        return self.low > -BOUND and self.high < BOUND


def interval(differences: Sequence[float], confidence: float) -> Interval:
    mean, n = statistics.fmean(differences), len(differences)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def accuracy(config: TrialConfig) -> float:
    *_, last = train.train(config)
    return last.metrics["top1"]


def compare(system: dict[str, Any]) -> dict[str, Any]:
    """Seeds until it is decided, or until there are no more looks."""
    confidence = 1 - 0.05 / len(LOOKS)
    singles: list[float] = []
    halves: list[float] = []
    for look in LOOKS:
        for seed in range(len(singles), look):
            settings = PROBLEM | system | {"seed": seed}
            singles.append(accuracy(unflatten(settings | {"precision": "fp32"})))
            halves.append(accuracy(unflatten(settings | {"precision": "bf16"})))
        found = interval([half - single for half, single in zip(halves, singles, strict=True)], confidence)
        if found.decides:
            break
    return {
        "seeds": len(singles), "confidence_of_this_look": confidence, "fp32_mean": statistics.fmean(singles),
        "bf16_mean": statistics.fmean(halves), "difference": found.mean, "interval": [found.low, found.high],
        "decided": found.decides, "inside_one_point": found.inside, "fp32": singles, "bf16": halves,
    }  # fmt: skip


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, system in SYSTEMS.items():
        found[name] = compare(system)
        low, high = (100 * each for each in found[name]["interval"])
        print(
            f"{name}: bf16 - fp32 = {100 * found[name]['difference']:+.2f} points, 95 % interval {low:+.2f} to "
            f"{high:+.2f}, {found[name]['seeds']} seeds",
            flush=True,
        )
    path = machine.write("precision", {"problem": PROBLEM, "systems": SYSTEMS, "bound": BOUND, "results": found})
    print(f"written to {path}")
    return 0 if all(each["inside_one_point"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
