"""What the masks of a batch cost: milliseconds for 64 slots of 16 maps of 32 x 32, for every mixing method.

    python benchmarks/masks.py [--device cuda]

Times are of `mixing.draw`: kappa, masks, the coin and the roles, on one thread where the device is the CPU. Beside them
stands CowMix as the reference implementation makes it, by a dense convolution of 97 x 97 taps, once for every map; its
time is that of one mask. Writes benchmarks/results/masks.json, or masks-DEVICE.json, and prints the table.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn import functional

from mixmo_core import mixing
from mixmo_core.config import MixingConfig, MixingMethod

ROOT = Path(__file__).resolve().parent.parent
SLOTS, CHANNELS, SIZE = 64, 16, 32


def milliseconds(run: Callable[[], Any], repeats: int, device: torch.device) -> dict[str, float]:
    """Least and median wall time of a call, after one that does not count. The least is what others disturb least."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return {"least_ms": round(min(times[1:]), 3), "median_ms": round(statistics.median(times[1:]), 3)}


def dense_cow_mask(channels: int, generator: torch.Generator) -> torch.Tensor:
    """The smoothed map behind one mask of the reference: as many equal convolutions as there are channels."""
    taps = torch.arange(-48, 49, device=generator.device)
    line = torch.exp(-(taps**2) / (2 * 9.0**2))
    kernel = torch.outer(line, line).expand(channels, 1, -1, -1)
    noise = torch.randn(1, 1, SIZE, SIZE, generator=generator, device=generator.device)
    return functional.conv2d(noise, kernel.contiguous(), padding=48)


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    device = parser.parse_args().device
    torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(0)

    def batch(method: MixingMethod) -> Callable[[], Any]:
        config = MixingConfig(method=method)
        shape = (2, SLOTS, CHANNELS, SIZE, SIZE)
        return lambda: mixing.draw(config, *shape, p=1.0, generator=generator, device=device)

    batches = {method: milliseconds(batch(method), 50, device) for method in get_args(MixingMethod)}
    reference = milliseconds(lambda: dense_cow_mask(CHANNELS, generator), 5, device)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    done = {
        "command": f"python benchmarks/masks.py --device {device}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": {"processor": processor(device), "threads": 1, "shared": "with other work, hence the least times"},
        "torch": torch.__version__,
        "shape": {"slots": SLOTS, "channels": CHANNELS, "height": SIZE, "width": SIZE},
        "batch": batches,
        "one_cow_mask_by_dense_convolution": reference,
    }
    name = "masks.json" if device.type == "cpu" else f"masks-{device.type}.json"
    (ROOT / "benchmarks/results" / name).write_text(json.dumps(done, indent=1) + "\n")

    print(f"| method | ms for {SLOTS} masks, least (median) | ms a mask |\n|---|---|---|")
    for method, took in batches.items():
        print(f"| {method} | {took['least_ms']:.2f} ({took['median_ms']:.2f}) | {took['least_ms'] / SLOTS:.4f} |")
    print(f"| cowmix, as in the reference |  | {reference['least_ms']:.1f} ({reference['median_ms']:.1f}) |")


if __name__ == "__main__":
    main()
