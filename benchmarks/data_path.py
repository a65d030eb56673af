"""How many samples a second the data path makes, beside the reference's loader on the same images in one process.

    python benchmarks/data_path.py [--reference PATH] [--device cpu] [--json]

A sample is what one slot of a batch needs: M images, augmented and normalised, their labels, and a mask. Ours is what
a step does before the network; the reference's is its own dataset wrapper, transforms and sampler in a loader without
processes of its own, and the stacking of the images that follows. Images are random, 2,000 of the size of the dataset;
those of TinyImageNet are decoded beforehand for both. Rounds in turn, of one batch of ours and of theirs. Seconds are
those of step.py: CPU time on the CPU. Writes benchmarks/results/data_path_<device>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import torch
from reference import Reference
from step import IMAGES, random_images, timed
from torch import nn

from mixmo_core.config import TrialConfig, unflatten
from mixmo_core.data import Images, batch_repetition
from mixmo_core.step import Step

CIFAR = {"data.dataset": "cifar100", "data.batch_size": 64, "data.repetition": 4, "mixing.method": "cutmix"}
TINY = CIFAR | {"data.dataset": "tiny_imagenet", "data.batch_size": 100, "model.arch": "preact_resnet"}
CASES: dict[str, dict[str, Any]] = {
    "standard": CIFAR | {"model.subnetworks": 2},
    "standard, M = 1": CIFAR | {"model.subnetworks": 1, "data.repetition": 1},
    "standard, M = 3": CIFAR | {"model.subnetworks": 3},
    "CutMix of pixels": CIFAR | {"model.subnetworks": 2, "data.msda": "cutmix"},
    "AugMix": CIFAR | {"model.subnetworks": 2, "data.augmentation": "augmix"},
    "standard, TinyImageNet": TINY | {"model.subnetworks": 2, "model.width": 1},
}


def ours(config: TrialConfig, images: Images) -> Iterator[Any]:
    """Batches without an end: positions first, an epoch at a time, then all that a step does before the network."""
    step = Step(config, nn.Linear(1, 1, device=images.labels_N.device), images)
    data, number = config.data, 0
    generator = torch.Generator(images.labels_N.device).manual_seed(0)
    while True:
        for indices_MB in batch_repetition(
            IMAGES, data.batch_size, data.repetition, config.model.subnetworks, generator=generator
        ):
            number += 1
            step.seed(number)
            masks, kappa_MB = step._mixture(indices_MB, 0.5)
            yield *step._gather(indices_MB, masks), masks, kappa_MB


def theirs(reference: Reference, config: TrialConfig, images: Images) -> Iterator[Any]:
    M, device = config.model.subnetworks, images.labels_N.device
    on_cpu = Images(images.pixels_NCHW.cpu(), images.labels_N.cpu())
    while True:
        for batch in reference.batches(config, on_cpu):
            yield torch.cat([batch[f"pixels_{m}"] for m in range(M)], dim=1).to(device), batch


def measure(case: str, reference: Reference | None, device: torch.device, rounds: int) -> dict[str, Any]:
    config = unflatten(CASES[case])
    images = random_images(config, device)
    paths: dict[str, Iterator[Any]] = {"ours": ours(config, images)}
    if reference is not None:
        paths["reference"] = theirs(reference, config, images)
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 1):
        for name, path in paths.items():
            took, _ = timed(_next(path), device)
            if number:  # the first warms up
                seconds[name].append(took)
    batch = config.data.batch_size
    found: dict[str, Any] = {"case": case, "settings": CASES[case], "device": device.type, "rounds": rounds}
    for name, took_each in seconds.items():
        found[f"{name}_samples_per_s"] = batch / min(took_each)
        found[f"{name}_samples_per_s_median"] = batch / statistics.median(took_each)
    if reference is not None:
        found["ratio"] = found["ours_samples_per_s"] / found["reference_samples_per_s"]
        found["ratio_of_medians"] = found["ours_samples_per_s_median"] / found["reference_samples_per_s_median"]
    return found


def _next(path: Iterator[Any]) -> Callable[[], Any]:
    return lambda: next(path)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| data path | samples/s, most (median) | of the reference | ratio, of most (of medians) |",
        "|---|---|---|---|",
    ]
    for each in rows:
        own, other, ratio = (
            f"{each[most]:{form}} ({each[median]:{form}})" if most in each else "not measured"
            for most, median, form in (
                ("ours_samples_per_s", "ours_samples_per_s_median", ",.0f"),
                ("reference_samples_per_s", "reference_samples_per_s_median", ",.0f"),
                ("ratio", "ratio_of_medians", ".1f"),
            )
        )
        lines.append(f"| {each['case']} | {own} | {other} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="PATH", help="a checkout of mixmo-pytorch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reference = None if options.reference is None else Reference(options.reference)
    rows = [measure(case, reference, options.device, options.rounds) for case in CASES]
    machine.publish(
        f"data_path_{options.device.type}",
        {"threads": options.threads, "rows": rows},
        None if options.json else table(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
