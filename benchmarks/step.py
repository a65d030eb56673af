"""How long a training step takes, beside the reference's in one run, and how much memory.

    python benchmarks/step.py [--reference PATH] [--net wrn28-10,wrn28-2,preact18-1] [--device cpu] [--json]

A net is `wrn<depth>-<width>` on CIFAR-100 or `preact18-<width>` on TinyImageNet, with M = 2 and Cut-MixMo; the images
are random. First comes the gate: in fp64 one step of both from the same weights (`parity.py`), then the loss of the
first step that is timed, of the same images, masks and weights, in each precision. Without a passed gate, and without
a checkout of the reference, there is no ratio.

Timed are rounds of one step each (on a GPU of 50), the reference and ours in turn. Ours goes from the positions of
images to updated weights. The reference starts from ready tensors, so that its data path, which `data_path.py`
measures, costs it nothing: model, loss with the l2 term, training metrics, SGD, as its published settings say. On the
CPU a second is one of the process's CPU time, which with one thread is the wall time on a machine with nothing else to
do; wall times stand beside it. On a GPU it is wall time, the device waited for at both ends of a round.

Ours is measured as trials run (`default`: on a GPU replayed as a CUDA graph, see `mixmo_core.capture`) and, on a GPU,
by what `--variants` names besides: `eager` without the graph, `autotuned` with the convolutions that cuDNN finds
fastest by trying, `compiled` with the network by torch.compile inside the graph. None is a default before it has paid.

`share_of_floor` (on a GPU in bf16 the MFU) is the time of the convolutions and linear layers at the rate of the best
square matrix product in the same run (on the CPU also of a large convolution, on a GPU at least 790 TFLOP/s in bf16),
over the least time of a step. Peak memory is that of a process, or of the GPU's allocator, above what there was before
the network. Writes benchmarks/results/step_<device>.json, or `--into` another name.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import parity
import torch
from reference import L2, Reference, ready
from torch import nn

from mixmo_core import capture, cost, networks
from mixmo_core.config import DATASETS, TrialConfig, unflatten
from mixmo_core.data import Images
from mixmo_core.step import Step

NETS = "wrn28-10,wrn28-2,preact18-1"
IMAGES = 2000
CPU_BATCH = {"wrn28-10": 8}
"""Of a step that one thread can do in a few seconds; 32 for the others."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 1e-2}
"""Relative. The reference rounds masks to half precision."""
MODES = (("reference", "fp32"), ("default", "fp32"), ("default", "bf16"))
VARIANTS = {"cpu": "default", "cuda": "default,eager,autotuned"}
PEAKS = 3
STEPS = {"cpu": 1, "cuda": 50}
"""Of a round."""
PEAK_BF16 = 790e12
"""FLOP/s that an H200 is taken for, whatever its matrix products reach."""


def settings(net: str, device: torch.device) -> dict[str, Any]:
    """The reference's published settings of Cut-MixMo, at this width."""
    found = re.fullmatch(r"(wrn(\d+)|preact18)-(\d+)", net)
    if not found:
        raise SystemExit(f"{net}: no such net. A net is wrn<depth>-<width> or preact18-<width>: {NETS}")
    wide = net.startswith("wrn")
    batch = CPU_BATCH.get(net, 32) if device.type == "cpu" else 64 if wide else 100
    return {
        "data.dataset": "cifar100" if wide else "tiny_imagenet",
        "data.batch_size": batch,
        "data.repetition": 4,
        "model.arch": "wide_resnet" if wide else "preact_resnet",
        "model.depth": int(found[2] or 28),
        "model.width": int(found[3]),
        "model.subnetworks": 2,
        "mixing.method": "cutmix",
        "optim.lr": 0.0125 if wide else 0.05,
        "optim.weight_decay": 6e-4 if wide else 1e-4,
    }


def random_images(config: TrialConfig, device: torch.device) -> Images:
    """As the trial's dataset has them, on the device."""
    data, generator = DATASETS[config.data.dataset], torch.Generator().manual_seed(0)
    shape = (IMAGES, data.channels, data.size, data.size)
    pixels_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Images(pixels_NCHW.to(device), (torch.arange(IMAGES) % data.classes).to(device))


class Bench:
    """One net: what a step of each mode is, from weights that all share."""

    def __init__(
        self, flat: dict[str, Any], device: torch.device, reference: Reference | None, variants: str = "default"
    ) -> None:
        self.flat, self.config, self.device, self.reference = flat, unflatten(flat), device, reference
        self.variants = variants.split(",")
        self.images = random_images(self.config, device)
        shape, generator = (2, self.config.data.batch_size), torch.Generator().manual_seed(1)
        self.indices_MB = torch.randint(IMAGES, shape, generator=generator).to(device)

    def ours(self, variant: str, precision: str) -> tuple[Callable[[], None], Callable[[], float]]:
        """A step, and the loss of those so far."""
        config = dataclasses.replace(self.config, precision=precision)  # type: ignore[arg-type]
        if variant != "eager" and capture.can(self.device):
            step: Step = capture.CapturedStep(config, self.images)
            if variant == "compiled":
                step._net = torch.compile(step._net, fullgraph=True)
        else:
            step = Step(config, networks.build(config).to(self.device), self.images)
        numbers = iter(range(1, sys.maxsize))

        def run() -> None:
            with torch.backends.cudnn.flags(enabled=True, benchmark=variant == "autotuned"):
                step(self.indices_MB, number=next(numbers), p=0.5, lr=config.optim.lr)

        return run, lambda: float(step.total_loss)

    def theirs(self) -> tuple[Callable[[], None], Callable[[], float]]:
        """The same of the reference: images, masks and weights are those of our first step."""
        assert self.reference is not None
        drawing = Step(self.config, nn.Linear(1, 1, device=self.device), self.images)
        drawing.seed(1)
        masks, kappa_MB = drawing._mixture(self.indices_MB, 0.5)
        images_MBCHW, targets = drawing._gather(self.indices_MB, masks)
        batch = ready(images_MBCHW, targets.labels, masks, kappa_MB, self.config)
        wrapper = self.reference.trainer(self.config, self.device)
        wrapper.network.load_state_dict(networks.reference_tensors(networks.build(self.config)), strict=False)
        l2 = float(wrapper.loss.config_loss["l2_reg"])
        penalty = l2 and l2 * float(wrapper.loss.l2_reg().detach())
        return lambda: Reference.train(wrapper, batch), lambda: float(wrapper.loss._accumulator_loss) - penalty

    def mode(self, variant: str, precision: str) -> tuple[Callable[[], None], Callable[[], float]]:
        return self.theirs() if variant == "reference" else self.ours(variant, precision)

    def modes(self) -> list[tuple[str, str]]:
        wanted = [*MODES, *((variant, "bf16") for variant in self.variants if variant != "default")]
        return [mode for mode in wanted if self.reference is not None or mode[0] != "reference"]


# --------------------------------------------------------------------------------------------------------- measurement


def timed(run: Callable[[], Any], device: torch.device, calls: int = 1) -> tuple[float, float]:
    """Seconds of a call, then of the wall; the device is waited for before the first call and after the last."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
    return (cpu if device.type == "cpu" else wall), wall


@torch.no_grad()
def flops_per_second(precision: str, device: torch.device) -> float:
    """Of the best square matrix product; on the CPU also of a convolution, whose library is another and faster."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = PEAK_BF16 if precision == "bf16" and device.type == "cuda" else 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        best = max(best, 2 * size**3 / least(partial(torch.mm, a, b), device))
    if device.type == "cpu":
        maps, weight = torch.randn(16, 256, 16, 16, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
        maps, weight = (each.to(memory_format=torch.channels_last) for each in (maps, weight))
        run = partial(nn.functional.conv2d, maps, weight, padding=1)
        best = max(best, 2 * maps.numel() * weight[0].numel() / least(run, device))
    return best


def least(run: Callable[[], Any], device: torch.device) -> float:
    return min(timed(run, device)[0] for _ in range(8))


def gate(bench: Bench, losses: dict[tuple[str, str], float]) -> dict[tuple[str, str], bool]:
    """Whether each mode has the reference's numbers."""
    if bench.reference is None:
        return dict.fromkeys(losses, False)
    flat = bench.flat | {"optim.lr": 1.0, "optim.weight_decay": 2 * L2}  # the decay that parity.py's loss has
    found = parity.compare_networks(bench.reference, flat, seed=0, steps=1)
    exact = max(found.values()) <= parity.BOUND
    expected = losses["reference", "fp32"]
    apart = {mode: abs(loss / expected - 1) for mode, loss in losses.items()}
    print(f"gate: fp64 {max(found.values()):.0e}, loss {apart}", file=sys.stderr, flush=True)
    return {mode: exact and apart[mode] <= SAME_LOSS[mode[1]] for mode in losses}


def measure(bench: Bench, net: str, rounds: int) -> list[dict[str, Any]]:
    steps, losses, peaks = {}, {}, {}
    for mode in bench.modes():
        before = _resident(bench.device)
        steps[mode], loss = bench.mode(*mode)
        steps[mode]()
        losses[mode] = loss()
        for _ in range(capture.WARM_UP + 1):
            steps[mode]()  # a step is captured by now
        peaks[mode] = (_peak(bench.device) - before) / 2**20
    passed = gate(bench, losses)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {mode: [] for mode in steps}
    for number in range(rounds + 1):
        for mode, run in steps.items():
            took = timed(run, bench.device, STEPS[bench.device.type])
            if number:  # the first warms up
                seconds[mode].append(took)
    rates = {precision: flops_per_second(precision, bench.device) for precision in SAME_LOSS}
    rows = [row(net, bench, mode, seconds, parity=passed[mode], rate=rates[mode[1]]) for mode in steps]
    return [each | {"peak_mib": peaks[each["variant"], each["precision"]]} for each in rows]


def row(
    net: str,
    bench: Bench,
    mode: tuple[str, str],
    seconds: dict[tuple[str, str], list[tuple[float, float]]],
    *,
    parity: bool,
    rate: float,
) -> dict[str, Any]:
    own, walls = zip(*seconds[mode], strict=True)
    batch = bench.config.data.batch_size
    found: dict[str, Any] = {
        "net": net, "device": bench.device.type, "precision": mode[1], "variant": mode[0],
        "threads": torch.get_num_threads(), "batch": batch, "rounds": len(own),
        "ratio_to_reference": None, "ratio_of_medians": None,
        "min_s": min(own), "median_s": statistics.median(own),
        "min_wall_s": min(walls), "median_wall_s": statistics.median(walls),
        "images_per_s": batch / min(own), "share_of_floor": cost.step_flops(bench.config) / rate / min(own),
        "parity": parity,
    }  # fmt: skip
    if parity:
        theirs, _ = zip(*seconds["reference", "fp32"], strict=True)
        found["ratio_to_reference"] = min(theirs) / min(own)
        found["ratio_of_medians"] = statistics.median(theirs) / statistics.median(own)
    return found


def peak_mib(net: str, mode: tuple[str, str], options: argparse.Namespace) -> float:
    """Of three steps in a process of their own; the least of some, which scatter by a twentieth."""
    words = [sys.executable, __file__, "--net", net, "--device", options.device.type, "--peak", *mode]
    if options.reference is not None:
        words += ["--reference", str(options.reference)]
    runs = [subprocess.run(words, capture_output=True, text=True, check=True) for _ in range(PEAKS)]
    return min(float(run.stdout) for run in runs)


def print_peak(net: str, mode: tuple[str, str], device: torch.device, reference: Reference | None) -> None:
    bench = Bench(settings(net, device), device, reference)
    nn.functional.conv2d(torch.rand(1, 3, 8, 8, device=device), torch.rand(4, 3, 3, 3, device=device))  # its libraries
    before = _peak(device)
    run, _ = bench.mode(*mode)
    for _ in range(3):
        run()
    print((_peak(device) - before) / 2**20)


def _resident(device: torch.device) -> float:
    """The bytes that a GPU's allocator has given out, from which `_peak` counts anew."""
    if device.type == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def _peak(device: torch.device) -> float:
    """The most bytes so far. Not `ru_maxrss`, which a process takes over from the one that started it."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert kib is not None
    return int(kib[1]) * 1024.0


# --------------------------------------------------------------------------------------------------------------- run


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| net | batch | variant | precision | s/step, least (median) | ratio to reference, of least (of medians) "
        "| images/s | share of floor | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        ratio = "" if not each["parity"] else f"{each['ratio_to_reference']:.2f} ({each['ratio_of_medians']:.2f})"
        lines.append(
            f"| {each['net']} | {each['batch']} | {each['variant']} | {each['precision']} "
            f"| {each['min_s']:.4f} ({each['median_s']:.4f}) | {ratio} | {each['images_per_s']:.0f} "
            f"| {each['share_of_floor']:.2f} | {each['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="PATH", help="a checkout of mixmo-pytorch")
    parser.add_argument("--net", default=NETS, help="names, with commas between them")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--variants", help=f"with commas between them; {VARIANTS['cuda']} on a GPU")
    parser.add_argument("--into", help="name of the file of results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reference = None if options.reference is None else Reference(options.reference)
    if options.peak:
        print_peak(options.net, tuple(options.peak), options.device, reference)
        return 0
    rows: list[dict[str, Any]] = []
    variants, into = options.variants or VARIANTS[options.device.type], options.into or f"step_{options.device.type}"
    for net in options.net.split(","):
        bench = Bench(settings(net, options.device), options.device, reference, variants)
        for each in measure(bench, net, options.rounds):
            if options.device.type == "cpu":  # the process has had others before
                each["peak_mib"] = peak_mib(net, (each["variant"], each["precision"]), options)
            rows.append(each)
        path = machine.write(into, {"rows": rows})  # what there is, should the next fail
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    print(f"written to {path}", file=sys.stderr)
    return 0 if reference is None or all(each["parity"] for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
