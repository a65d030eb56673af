"""What several trials side by side in one process gain: trial-steps a second, beside one trial alone in the same run.

    python benchmarks/slots.py [--net wrn28-1,wrn28-2] [--slots 1,2,4] [--device cpu] [--json]

A net is as in step.py; the trials of a row differ in their seed. First comes the gate: three steps of each trial in
turn with its neighbours have the losses of the trial alone, to the bit on the CPU and within 1e-5 elsewhere. Without a
passed gate there is no ratio. Then rounds: a turn of each number of slots (on a GPU 50), one after the other. Seconds
are those of step.py. A ratio above 1 is what slots gain; on the CPU, where a turn is a loop, there is nothing to gain.
On a GPU each trial replays a graph of its own on a stream of its own, as in a gang; the gate is held to algorithms that
add in a fixed order, and goes on past the capture. `found` is what `slots: auto` takes there.

Not here: the same trials on shares of a GPU under plain Ray Tune. Writes benchmarks/results/slots_<device>.json.
"""

import argparse
import statistics
import sys
from typing import Any

import machine
import torch
from step import IMAGES, STEPS, random_images, settings, timed
from torch import Tensor

from mixmo_core import capture, networks
from mixmo_core.config import TrialConfig, unflatten
from mixmo_core.data import Images
from mixmo_core.step import Due, Step, side_by_side

GATE = 3
"""Steps that are compared, beyond those before a capture."""
NEARLY = 1e-5
"""Relative difference of losses that is allowed where kernels need not add in the same order."""


class Trials:
    """Some trials of one shape, each at a step of its own."""

    def __init__(self, configs: list[TrialConfig], images: Images) -> None:
        device, batch = images.labels_N.device, configs[0].data.batch_size
        self.steps: list[Step] = (
            [capture.CapturedStep(config, images) for config in configs]
            if capture.can(device)
            else [Step(config, networks.build(config), images) for config in configs]
        )
        self.configs, self.number, self.device = configs, 0, device
        self.indices_MB = torch.randint(
            IMAGES, (2, batch), generator=torch.Generator().manual_seed(1)
        ).to(device)  # fmt: skip

    def turn(self) -> None:
        self.number += 1
        dues = [
            Due(step, self.indices_MB, self.number, p=0.5, lr=config.optim.lr)
            for step, config in zip(self.steps, self.configs, strict=True)
        ]
        if any(faults := side_by_side(dues)):
            raise next(filter(None, faults))

    def losses(self) -> Tensor:
        return torch.stack([step.total_loss for step in self.steps])


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def passes(configs: list[TrialConfig], images: Images) -> bool:
    turns = GATE + (capture.WARM_UP + 1) * capture.can(images.labels_N.device)
    together = Trials(configs, images)
    for _ in range(turns):
        together.turn()
    alone = []
    for config in configs:
        trial = Trials([config], images)
        for _ in range(turns):
            trial.turn()
        alone.append(trial.losses())
    expected = torch.cat(alone)
    if images.labels_N.device.type == "cpu":
        return torch.equal(together.losses(), expected)
    return torch.allclose(together.losses(), expected, rtol=NEARLY, atol=0)


def measure(net: str, counts: list[int], device: torch.device, precision: str, rounds: int) -> list[dict[str, Any]]:
    flat = settings(net, device) | {"precision": precision}
    configs = [unflatten(flat | {"seed": seed}) for seed in range(max(counts))]
    images = random_images(configs[0], device)
    gates = {count: passes(configs[:count], images) for count in counts}
    trials = {count: Trials(configs[:count], images) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(rounds + 1):
        for count, each in trials.items():
            took, _ = timed(each.turn, device, STEPS[device.type])
            if number:  # the first makes the momenta
                seconds[count].append(took)
    rates = {count: count / min(each) for count, each in seconds.items()}
    middles = {count: count / statistics.median(each) for count, each in seconds.items()}
    del trials
    found = capture.slots(configs[0], images)
    return [
        {
            "net": net, "device": device.type, "precision": precision, "slots": count, "parity": gates[count],
            "ratio_to_alone": rates[count] / rates[1] if gates[count] else None,
            "ratio_of_medians": middles[count] / middles[1] if gates[count] else None,
            "min_s": min(seconds[count]), "median_s": statistics.median(seconds[count]),
            "trial_steps_per_s": rates[count], "found": found,
        }
        for count in counts
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| net | slots | trial-steps/s | against one alone, of most (of medians) |", "|---|---|---|---|"]
    for each in rows:
        ratio = f"{each['ratio_to_alone']:.2f} ({each['ratio_of_medians']:.2f})" if each["parity"] else "no parity"
        lines.append(f"| {each['net']} | {each['slots']} | {each['trial_steps_per_s']:.2f} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="wrn28-1,wrn28-2")
    parser.add_argument("--slots", default="1,2,4", help="with 1 among them, which the others are held against")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of trials on a GPU, take bf16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = sorted({1, *map(int, options.slots.split(","))})
    rows = [
        row
        for net in options.net.split(",")
        for row in measure(net, counts, options.device, options.precision, options.rounds)
    ]
    machine.publish(
        f"slots_{options.device.type}",
        {"threads": options.threads, "rows": rows},
        None if options.json else table(rows),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
