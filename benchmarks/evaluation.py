"""What an evaluation costs, beside the training of an epoch: the target is less than 5 % at WRN-28-2, repetition 4.

    python benchmarks/evaluation.py [--net wrn28-2] [--device cpu] [--precision fp32,bf16] [--json]

A net is as in step.py, at the batch of its recipe; the images are random, as many as the dataset's. An epoch is one
step, timed, as often as the epoch has steps; an evaluation is all test images through the folded encoders and the
classifiers, their metrics, and the logits brought to the CPU. Seconds are those of step.py.

Writes benchmarks/results/evaluation_<device>.json.
"""

import argparse
import sys
from functools import partial
from typing import Any

import machine
import torch
from step import random_images, settings, timed

from mixmo_core import capture, cost, networks, train
from mixmo_core.config import DATASETS, unflatten
from mixmo_core.data import Images
from mixmo_core.step import Step

RECIPE = torch.device("cuda")
"""Batches are those of the recipe, wherever it runs."""
WARM_UP = 4


def measure(net: str, device: torch.device, precision: str, rounds: int) -> dict[str, Any]:
    config = unflatten(settings(net, RECIPE) | {"precision": precision})
    training, data = random_images(config, device), DATASETS[config.data.dataset]
    each = -(-data.test_images // len(training))
    held_out = Images(
        training.pixels_NCHW.repeat(each, 1, 1, 1)[: data.test_images],
        training.labels_N.repeat(each)[: data.test_images],
    )
    made = networks.build(config).to(device)
    step: Step = capture.CapturedStep(config, training) if capture.can(device) else Step(config, made, training)
    shape = (config.model.subnetworks, config.data.batch_size)
    indices_MB = torch.randint(len(training), shape, generator=torch.Generator().manual_seed(1)).to(device)
    run = partial(step, indices_MB, number=1, p=0.5, lr=1e-4)
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        run()
    evaluate = partial(train._evaluated, made, config, held_out, train._World(0, 1, ""))
    evaluate()
    made.train()
    steps_s, evaluations_s = [], []
    for _ in range(rounds):
        steps_s += [timed(run, device)[0] for _ in range(5)]
        evaluations_s.append(timed(evaluate, device)[0])
        made.train()
    epoch_s = cost.steps_per_epoch(config) * min(steps_s)
    return {
        "net": net, "device": device.type, "precision": precision, "batch": config.data.batch_size, "rounds": rounds,
        "steps_per_epoch": cost.steps_per_epoch(config), "step_s": min(steps_s), "epoch_s": epoch_s,
        "evaluation_s": min(evaluations_s), "part_of_epoch": min(evaluations_s) / epoch_s,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| net | precision | step, s | epoch, s | evaluation, s | part of an epoch |", "|---|---|---|---|---|---|"]
    for each in rows:
        lines.append(
            f"| {each['net']} | {each['precision']} | {each['step_s']:.4f} | {each['epoch_s']:.1f} "
            f"| {each['evaluation_s']:.2f} | {each['part_of_epoch']:.2%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="wrn28-2")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        measure(net, options.device, precision, options.rounds)
        for net in options.net.split(",")
        for precision in options.precision.split(",")
    ]
    machine.publish(
        f"evaluation_{options.device.type}",
        {"threads": options.threads, "rows": rows},
        None if options.json else table(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
