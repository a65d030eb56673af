"""What a trial costs in a warm process before its first step, beyond what any training of it would do.

    python benchmarks/start.py [--net wrn28-1,wrn28-2,preact18-1,wrn28-10] [--device cpu] [--json]

A net is as in step.py, at the batch of its recipe; the images are there already, as for a gang's second trial.
`weights_s` is the drawing of the initial weights, `order_s` that of an epoch's batches, which every epoch has anew:
both are the trial's own. `rest_s` is all else: the config hashed, modules made and moved, the optimiser, the step. On
a GPU `next_s` is the start of a trial that takes over a captured step, weights included, and `capture_s` what the
first trial of a shape takes for its first steps, beyond replayed ones. Seconds are those of step.py.

Writes benchmarks/results/start_<device>.json.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import machine
import torch
from step import settings, timed

from mixmo_core import capture, cost, networks, train
from mixmo_core.config import DATASETS, TrialConfig, digest, identity, training_images, unflatten
from mixmo_core.data import Images

NETS = "wrn28-1,wrn28-2,preact18-1,wrn28-10"
RECIPE = torch.device("cuda")
"""Batches are those of the recipe, wherever it runs."""
STEPS = 20


def many_images(config: TrialConfig, device: torch.device) -> Images:
    """As many as the trial has, which share one image's memory: none is looked at before the first step is taken."""
    data, count = DATASETS[config.data.dataset], training_images(config)
    pixel = torch.zeros((1, data.channels, data.size, data.size), dtype=torch.uint8, device=device)
    return Images(pixel.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64, device=device))


def made(config: TrialConfig, images: Images) -> train._Run:
    """As `train.steps` makes it."""
    world = train._World(0, 1, digest(identity(config, 1)))
    return train._Run(config, world, images, images, captured=False)


def measure(net: str, device: torch.device, rounds: int) -> dict[str, Any]:
    config = unflatten(settings(net, RECIPE))
    images = many_images(config, device)

    def least(run: Callable[[], Any]) -> float:
        run()
        return min(timed(run, device)[0] for _ in range(rounds))

    weights_s = least(partial(networks.build, config))
    whole_s = least(partial(made, config, images))
    run = made(config, images)
    row = {
        "net": net, "device": device.type, "parameters": cost.parameters(config), "rounds": rounds,
        "weights_s": weights_s, "order_s": least(partial(run._order, 1)),
        "rest_s": least(partial(without_weights, config, images)), "whole_s": whole_s,
    }  # fmt: skip
    return row | (captured(config, images) if capture.can(device) else {})


def without_weights(config: TrialConfig, images: Images) -> None:
    """All of `made` but the drawing."""
    draw = networks._initialise
    networks._initialise = lambda net, generator: None
    try:
        made(config, images)
    finally:
        networks._initialise = draw


def captured(config: TrialConfig, images: Images) -> dict[str, float]:
    """Of the first trial of a shape, and of the second."""
    device = images.labels_N.device

    def turns(step: capture.CapturedStep, count: int) -> None:
        indices_MB = torch.zeros((2, config.data.batch_size), dtype=torch.int64, device=device)
        for number in range(1, count + 1):
            step(indices_MB, number=number, p=0.5, lr=1e-4)

    step = capture.lend(config, images)
    first_s, _ = timed(partial(turns, step, STEPS), device)
    replayed_s, _ = timed(partial(turns, step, STEPS), device)
    capture.give_back(step)
    next_s, _ = timed(partial(capture.lend, dataclasses.replace(config, seed=1), images), device)
    return {"capture_s": first_s - replayed_s, "next_s": next_s}


def table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in ("weights_s", "order_s", "rest_s", "capture_s", "next_s") if name in rows[0]]
    lines = [
        f"| net | parameters | {' | '.join(f'{name[:-2]}, ms' for name in names)} |",
        "|---|" + "---|" * (1 + len(names)),
    ]
    for each in rows:
        times = " | ".join(f"{1000 * each[name]:.1f}" for name in names)
        lines.append(f"| {each['net']} | {each['parameters']:,} | {times} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default=NETS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(net, options.device, options.rounds) for net in options.net.split(",")]
    machine.publish(
        f"start_{options.device.type}",
        {"threads": options.threads, "rows": rows},
        None if options.json else table(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
