"""Weak scaling: how much longer a step takes where workers share a trial, each with the batch that one alone has.

    python benchmarks/scaling.py [--net wrn28-2] [--workers 2] [--device cpu] [--precision fp32] [--json]

A net is as in step.py; the processes are on this machine, with a thread each and gloo between them, or with a GPU each
and NCCL. Three kinds of round take turns: one worker alone while the others wait, all at once without a word between
them, and all of them together by `DistributedDataParallel` as trials are trained. `efficiency` is the first over the
last, least of each; `of_the_machine` is the second over the last, which leaves out what the processes take from one
another (caches, memory, a busy neighbour). Seconds are by the clock, so it wants a quiet machine.

Writes benchmarks/results/scaling_<device>.json.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from step import random_images, settings
from torch import distributed, multiprocessing

from mixmo_core import networks, train
from mixmo_core.config import unflatten
from mixmo_core.step import Step

KINDS = ("alone", "apart", "together")


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One process. Rank 0 writes the seconds of a step in each kind of round."""
    torch.set_num_threads(1)
    cuda = options.device.type == "cuda"
    device = torch.device("cuda", rank) if cuda else options.device
    if cuda:
        torch.cuda.set_device(device)
    store = distributed.FileStore(f"{folder}/store", options.workers)
    distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=options.workers)
    config = unflatten(settings(options.net, options.device) | {"precision": options.precision})
    batch = config.data.batch_size
    shared = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch * options.workers))
    images = random_images(config, device)
    single = Step(config, networks.build(config).to(device), images)
    averaged = train._averaging(networks.build(config).to(device), device)
    steps = {
        "alone": single,
        "apart": single,
        "together": Step(shared, averaged, images, rank=rank, workers=options.workers),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, step in steps.items():
            size = batch * (options.workers if kind == "together" else 1)
            indices_MB = torch.randint(len(images), (2, size), generator=torch.Generator().manual_seed(number)).to(
                device
            )
            distributed.barrier()
            if kind == "alone" and rank:
                continue
            began = time.perf_counter()
            for turn in range(options.steps):
                step(indices_MB, number=turn + 1, p=0.5, lr=1e-4)
            if cuda:
                torch.cuda.synchronize(device)
            if number:  # the first warms up
                seconds[kind].append((time.perf_counter() - began) / options.steps)
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps({"batch_per_worker": batch, "seconds": seconds}))
    distributed.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(options, folder), nprocs=options.workers)
        found = json.loads(Path(folder, "seconds.json").read_text())
    least = {kind: min(of_kind) for kind, of_kind in found["seconds"].items()}
    return {
        "net": options.net, "device": options.device.type, "precision": options.precision, "workers": options.workers,
        "batch_per_worker": found["batch_per_worker"], "steps": options.steps, "rounds": options.rounds,
        **{f"{kind}_s": of_kind for kind, of_kind in least.items()},
        "efficiency": least["alone"] / least["together"], "of_the_machine": least["apart"] / least["together"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="wrn28-2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--json", action="store_true", help="print the row as JSON")
    options = parser.parse_args()
    row = measure(options)
    path = machine.write(f"scaling_{options.device.type}", {"rows": [row]})
    said = "alone {alone_s:.3f} s, apart {apart_s:.3f} s, together {together_s:.3f} s: efficiency {efficiency:.2f}"
    print(
        json.dumps(row, indent=1) if options.json else f"{said} ({{of_the_machine:.2f}} of the machine's)".format(**row)
    )
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
