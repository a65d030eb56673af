"""Sweeps made by hand whose cells differ in one setting, with numbers that look like those of trained networks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from made_rows import NOTHING, NOW, epoch

from mixmo_core import cost
from mixmo_core.config import TrialConfig, cell_id, digest, identity, unflatten
from orchestrator.analysis import EnsembleRow
from orchestrator.rows import EpochRow, TrialRow, config_columns
from orchestrator.store import Logits, ResultStore

BASE = {"data.dataset": "cifar10", "model.depth": 10, "model.width": 1, "optim.epochs": 3, "data.repetition": 1}
Block = tuple[str | None, Mapping[str, Any]]

WIDTH: list[Block] = [
    *(("vanilla", {"model.width": width, "model.subnetworks": 1}) for width in (1, 2, 3, 5, 10)),
    *(
        (name, {"model.width": width, "mixing.method": method})
        for name, method in (("Linear-MixMo", "linear"), ("Cut-MixMo", "cutmix"))
        for width in (1, 2, 3, 5, 10)
    ),
]
PROBABILITY: list[Block] = [
    ("vanilla", {"model.subnetworks": 1}),
    ("Linear-MixMo", {"mixing.method": "linear"}),
    *(("Cut-MixMo", {"mixing.probability": p, "mixing.weight_root": r}) for r in (1, 3) for p in (0.0, 0.2, 0.5, 1.0)),
]
SUBNETWORKS: list[Block] = [
    ("vanilla", {"model.subnetworks": 1}),
    *((f"{m}", {"model.subnetworks": M, "mixing.method": m}) for m in ("linear", "cutmix") for M in (2, 3, 4)),
]
MANY: list[Block] = [
    (None, {"model.width": width, "mixing.method": method, "data.repetition": b})
    for method in ("linear", "cutmix", "fmix", "horizontal")
    for b in (1, 2, 4)
    for width in (1, 2, 4)
]


def accuracy(config: TrialConfig) -> float:
    M, mixing = config.model.subnetworks, config.mixing
    gain = 0.0
    if M > 1:
        gain = 0.02 + 0.004 * math.log2(config.model.width) * (M - 1) - 0.006 * (M - 2) ** 2
        if mixing.method != "linear":
            gain += 0.012 * math.sin(math.pi * min(1.0, mixing.probability + 0.1)) - 0.002 * mixing.weight_root
    return 0.70 + 0.02 * math.log2(config.model.width) + gain + 0.003 * math.sin(78.233 * config.seed + 3 * M)


def metrics(config: TrialConfig) -> dict[str, float | None]:
    top1, several = accuracy(config), config.model.subnetworks > 1
    spread = 0.3 + 0.1 * math.sin(config.seed + config.model.width)
    return {
        **NOTHING, "top1": top1, "loss": 1.0, "nll": 2 * (1 - top1), "ece": 0.02, "brier": 0.4,
        "subnetwork_top1_mean": top1 - 0.03 * spread if several else top1,
        "ratio_error": 3 * spread if several else None, "disagreement": 0.3 * spread if several else None,
    }  # fmt: skip


def rows(
    blocks: Iterable[Block], seeds: int = 3, *, name: str = "made", change: Callable[[TrialRow], TrialRow] = lambda r: r
) -> list[TrialRow]:
    """All trials finished, unless `change` makes something else of them; seeds breadth first."""
    made: list[TrialRow] = []
    for seed in range(seeds):
        for label, given in blocks:
            config = unflatten({**BASE, **given, "seed": seed})
            whole = digest(identity(config))
            row = TrialRow(
                sweep=name, label=label, position=len(made), trial_id=whole[:12], digest=whole,
                cell_id=cell_id(config), epochs=3, state="TERMINATED", epoch=3, config=config_columns(config),
                metrics=metrics(config), best_top1=accuracy(config), best_epoch=3, split="test", wall_s=90.0 + seed,
                gpu_seconds=cost.trial_flops(config) / 1e12, train_flops=cost.trial_flops(config), started_at=NOW,
                updated_at=NOW, git_commit="0123abc", torch_version="2.14.1", ray_version="2.60.0", hosts="node-1",
                attempts=1, attempt=1,
            )  # fmt: skip
            made.append(change(row))
    return made


def ensemble(members: Sequence[TrialRow]) -> EnsembleRow:
    """Of trials of one cell; it predicts a little better than the best of them."""
    first = members[0]
    columns = {spec.name: getattr(first, spec.name) for spec in fields(first)}
    best = max(row.metrics["top1"] or 0.0 for row in members)
    own: dict[str, Any] = {
        "label": f"{len(members)} x {first.label}", "trial_id": "+".join(row.trial_id for row in members),
        "cell_id": f"{len(members)}x{first.cell_id}", "metrics": {**first.metrics, "top1": best + 0.01},
        "train_flops": math.fsum(row.train_flops or 0.0 for row in members),
        "gpu_seconds": math.fsum(row.gpu_seconds for row in members),
    }  # fmt: skip
    return EnsembleRow(**{**columns, **own}, members=len(members))


def epochs(trials: Iterable[TrialRow]) -> list[EpochRow]:
    return [
        replace(epoch(row, n), sweep=row.sweep, metrics={**row.metrics, "top1": (row.metrics["top1"] or 0) * n / 3})
        for row in trials
        for n in range(1, row.epoch + 1)
    ]


def stored(store: ResultStore, trials: list[TrialRow], text: str = "", *, done: bool = True) -> None:
    """The same in a store, without a driver."""
    name = trials[0].sweep
    with store.writer(name, sweep_text=text or f"name: {name}\n", now=lambda: NOW) as writer:
        writer.put(trials)
        writer.add(epochs(trials))
        writer.close(done=done)


def some_logits(seed: int, *, M: int = 2, N: int = 400, K: int = 10, sure: float = 2.0) -> Logits:
    """Of networks that are right more often than not, and surer than they should be."""
    chance = np.random.default_rng(seed)
    labels_N = np.arange(N) * 7 % K  # the same images for all, as ensembles want
    logits_MNK = chance.normal(size=(M, N, K))
    logits_MNK[:, np.arange(N), labels_N] += 1.5
    return Logits.of(sure * logits_MNK, labels_N)
