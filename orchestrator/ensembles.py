"""Deep ensembles of finished trials, made from the logits that the store keeps. They need no training of their own.

A sweep file names them: `ensembles: [{of: cutmix, members: [2, 3]}]`. Of each cell that is meant, the finished trials
are taken in order of seed, N at a time. No trial is in two ensembles of one size, so their values are as independent
as those of trials; seeds that fill no ensemble are left out, and that is told.

N networks of M subnetworks predict as one network of N * M subnetworks does: with the softmax of the mean logit. So
does the reference. That is the geometric mean of their probabilities, normalised; Lakshminarayanan et al. (NeurIPS
2017, section 2.4) take the arithmetic one. For three Cut-MixMo networks of sweeps/quickstart.yaml the two differ in one
image of 360, and the NLL is 0.165 against 0.185.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mixmo_core.metrics import PROBABILITY_FLOOR
from orchestrator.analysis import EnsembleRow, Results
from orchestrator.errors import NotFoundError, UsageError
from orchestrator.progress import cell_names
from orchestrator.rows import METRIC_COLUMNS, TrialRow
from orchestrator.sweep import Ensemble

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from orchestrator.store import Logits, ResultStore

Talk = Callable[[str], None]
Stored = tuple[TrialRow, "Logits"]
LIGHT = frozenset({
    "top1", "nll", "brier", "brier_per_class", "subnetwork_top1_mean", "subnetwork_top1_min", "subnetwork_top1_max",
})  # fmt: skip
"""Metrics that need no torch, whose loading takes three times as long as all else that a table does."""


def rows(
    results: Results,
    talk: Talk = lambda line: print(line, file=sys.stderr),  # noqa: T201
    metrics: Collection[str] | None = None,
) -> list[TrialRow]:
    """The ensembles that the sweep files of these results name, as rows that `analysis.table` takes beside the trials.

    A row's `label` is like `3 x Cut-MixMo`, its settings are those of its cell with the seed of its first member, its
    times and FLOPs are sums over its members, its metrics are the ensemble's: all, or those that are asked for. `talk`
    gets a line for each cell that has too few finished seeds or no stored logits. Loads torch where there is an
    ensemble to make and more than `LIGHT` is asked for, and only there. Raises UsageError where members were measured
    on different images, DamagedError where stored logits are damaged.
    """
    made: dict[str, TrialRow] = {}
    trials = results.rows
    for sweep, asked in results.asked().items():
        own = sorted((row for row in trials if row.sweep == sweep), key=lambda row: row.position)
        for wanted in asked.ensembles:
            for row in _wanted(wanted, own, results.store, talk, METRIC_COLUMNS if metrics is None else metrics):
                made.setdefault(row.trial_id, row.replace(position=len(own) + len(made)))
    return list(made.values())


def _wanted(
    wanted: Ensemble, own: Sequence[TrialRow], store: ResultStore, talk: Talk, metrics: Collection[str]
) -> Iterator[EnsembleRow]:
    """What one entry of a sweep file stands for, of the sweep's own trials."""
    meant = [row for row in own if row.label == wanted.of]
    meant = meant or [row for row in own if row.config.get("mixing_method") == wanted.of]
    names = cell_names(meant)
    cells: dict[str, list[TrialRow]] = {}
    for row in meant:
        cells.setdefault(row.cell_id, []).append(row)
    if not cells:
        talk(f"note: ensembles of {wanted.of}: no trial here has this label or mixing method")
    for cell, members in cells.items():
        finished = [row for row in members if row.state == "TERMINATED" and not row.stopped_early]
        stored, lost = _stored(store, sorted(finished, key=lambda row: row.config.get("seed") or 0))
        lacking = f" with stored logits, has {len(stored)}: {lost[0]}" if lost else f", has {len(stored)}"
        for count in wanted.members:
            rest = len(stored) % count
            if len(stored) < count:
                talk(f"note: {count} x {names[cell]}: needs {count} finished seeds{lacking}")
            elif rest:
                talk(f"note: {count} x {names[cell]}: the last {rest} of {len(stored)} seeds are left out")
            for first in range(0, len(stored) - rest, count):
                yield _ensemble(stored[first : first + count], wanted.of, metrics)


def _stored(store: ResultStore, finished: Iterable[TrialRow]) -> tuple[list[Stored], list[str]]:
    """The trials that have logits, with them; why the others have none."""
    found: list[Stored] = []
    lost = []
    for row in finished:
        try:
            found.append((row, store.logits(row)))
        except NotFoundError as error:
            lost.append(str(error))
    return found, lost


def _ensemble(stored: Sequence[Stored], of: str, metrics: Collection[str]) -> EnsembleRow:
    members = [row for row, _ in stored]
    first = members[0]
    return EnsembleRow(
        sweep=first.sweep, label=f"{len(members)} x {first.label or of}", position=first.position,
        trial_id="+".join(row.trial_id for row in members), digest="+".join(row.digest for row in members),
        cell_id=f"{len(members)}x{first.cell_id}", members=len(members), workers=first.workers, state="TERMINATED",
        epoch=first.epoch, epochs=first.epochs, split=first.split,
        updated_at=max((row.updated_at for row in members if row.updated_at), default=None),
        wall_s=math.fsum(row.wall_s for row in members), gpu_seconds=math.fsum(row.gpu_seconds for row in members),
        train_flops=math.fsum(row.train_flops or 0.0 for row in members) or None, config=first.config,
        metrics=dict.fromkeys(METRIC_COLUMNS) | _metrics(stored, metrics),
    )  # fmt: skip


def _metrics(stored: Sequence[Stored], wanted: Collection[str]) -> dict[str, float]:
    import numpy as np

    first, reference = stored[0]
    for row, logits in stored[1:]:
        same = logits.logits_MNK.shape[1:] == reference.logits_MNK.shape[1:]
        if not same or not np.array_equal(logits.labels_N, reference.labels_N):
            raise UsageError(
                f"trials {first.trial_id} and {row.trial_id} cannot form an ensemble: their stored labels differ, so "
                f"they were measured on different images. Run one of them again under new results (`--results`) with "
                f"the dataset folder of the other; `mixmo table --no-ensembles` leaves ensembles out"
            )
    logits_MNK = np.concatenate([logits.logits_MNK for _, logits in stored])
    if LIGHT.issuperset(wanted):
        found = light(logits_MNK, reference.labels_N)
    else:
        import torch

        from mixmo_core.evaluate import summarize

        found = summarize(torch.from_numpy(logits_MNK), torch.from_numpy(reference.labels_N))
    return {name: value for name, value in found.items() if name in wanted}


def light(logits_MNK: NDArray[Any], labels_N: NDArray[Any]) -> dict[str, float]:
    """The metrics of `LIGHT` as `mixmo_core.evaluate.summarize` has them, to the rounding of doubles."""
    import numpy as np

    logits_MNK = logits_MNK.astype(np.promote_types(logits_MNK.dtype, np.float32))  # ten times as fast as halves
    logits_NK = logits_MNK.mean(axis=0, dtype=np.float64)
    weight_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probabilities_NK = weight_NK / weight_NK.sum(axis=1, keepdims=True)
    label_N = probabilities_NK[np.arange(len(labels_N)), labels_N]
    accuracy_M = (logits_MNK.argmax(axis=2) == labels_N).mean(axis=1)
    brier = np.mean(np.square(probabilities_NK).sum(axis=1) - 2 * label_N + 1)
    values = {
        "top1": np.mean(probabilities_NK.argmax(axis=1) == labels_N),
        "nll": -np.log(np.minimum(label_N + PROBABILITY_FLOOR, 1)).mean(),
        "brier": brier,
        "brier_per_class": brier / logits_NK.shape[1],
        "subnetwork_top1_mean": accuracy_M.mean(),
        "subnetwork_top1_min": accuracy_M.min(),
        "subnetwork_top1_max": accuracy_M.max(),
    }
    return {name: float(value) for name, value in values.items()}
