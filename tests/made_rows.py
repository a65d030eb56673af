"""Rows made by hand: small, distinct, and the same on every machine."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, TrialConfig, cell_id, digest, identity
from orchestrator.rows import METRIC_COLUMNS, EpochRow, TrialRow, config_columns
from orchestrator.store import Folder, Logits, Process, ResultStore, SweepWriter

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
NOTHING: dict[str, float | None] = dict.fromkeys(METRIC_COLUMNS)


DEAD = replace(Process.current(), pid=2**22 + 1, started="1")
"""A process of this machine that is no more."""
ELSEWHERE = replace(Process.current(), boot="another machine")

in_a_folder = pytest.mark.parametrize("place", ["folder"], indirect=True)
"""Marks a test that looks at the files of a store, or changes them behind its back."""


def trial(seed: int = 0, *, width: int = 2, subnetworks: int = 2, method: str = "cutmix", **columns: Any) -> TrialRow:
    """A trial of three epochs that waits."""
    config = TrialConfig(
        data=DataConfig(dataset="synthetic", repetition=4 if subnetworks > 1 else 1),
        model=ModelConfig(depth=10, width=width, subnetworks=subnetworks),
        mixing=MixingConfig(method=method),  # type: ignore[arg-type]
        seed=seed,
    )
    whole = digest(identity(config))
    given = {
        "sweep": "made", "position": seed, "trial_id": whole[:12], "digest": whole, "cell_id": cell_id(config),
        "epochs": 3, "config": config_columns(config), "metrics": NOTHING,
    }  # fmt: skip
    return TrialRow(**{**given, **columns})


def top1(trial_id: str, epoch: int) -> float:
    """What the trial reaches at this epoch, in every attempt."""
    return (int(trial_id[:4], 16) % 89 + epoch) / 100


def epoch(row: TrialRow, number: int, *, seq: int = 0, attempt: int = 1, fence: int = 0) -> EpochRow:
    return EpochRow(
        sweep=row.sweep, trial_id=row.trial_id, epoch=number, attempt=attempt, fence=fence, seq=seq,
        updated_at=NOW + timedelta(seconds=seq), wall_s=2.5 * number, gpu_seconds=0.0, images_per_s=1000.0,
        metrics={**NOTHING, "loss": 1 / number, "lr": 0.1, "top1": top1(row.trial_id, number)},
    )  # fmt: skip


def reached(row: TrialRow, number: int, *, seq: int = 0, attempt: int = 1, **columns: Any) -> TrialRow:
    """The trial when it has done so many epochs; finished with the last."""
    given: dict[str, Any] = {
        "state": "TERMINATED" if number == row.epochs else "RUNNING",
        "epoch": number, "attempt": attempt, "attempts": attempt, "seq": seq, "best_epoch": number,
        "best_top1": top1(row.trial_id, number), "metrics": epoch(row, number).metrics if number else NOTHING,
        "wall_s": 2.5 * number, "updated_at": NOW + timedelta(seconds=seq),
    }  # fmt: skip
    return row.replace(**{**given, **columns})


def advance(writer: SweepWriter, row: TrialRow, number: int, *, seq: int = 0, attempt: int = 1) -> TrialRow:
    """Tell the writer of one more epoch, as the driver does."""
    row = reached(row, number, seq=seq, attempt=attempt)
    writer.add([epoch(row, number, seq=seq, attempt=attempt)])
    writer.put([row])
    return row


def some_logits() -> Logits:
    """Of 2 subnetworks, 3 images and 4 classes."""
    return Logits.of(np.linspace(-2, 2, 24).reshape(2, 3, 4), np.array([3, 0, 3]))


def begin(store: ResultStore, **given: Any) -> SweepWriter:
    return store.writer("made", sweep_text="name: made\n", **given)


def finished(store: ResultStore, trials: int = 2) -> list[TrialRow]:
    """A sweep that is done."""
    rows = [trial(seed) for seed in range(trials)]
    with begin(store) as writer:
        writer.put(rows)
        for number in (1, 2, 3):
            rows = [advance(writer, row, number, seq=number) for row in rows]
            writer.flush(force=True)
        writer.close(done=True)
    return rows


def at(store: ResultStore, key: str) -> Path:
    """The file of an object of a store that lies in a folder."""
    assert isinstance(store.folder, Folder)
    return store.folder.path(key)


def content(store: ResultStore, key: str) -> bytes:
    stored = store.folder.read(key)
    assert stored is not None
    return stored.data


def keys(store: ResultStore) -> list[tuple[str, int]]:
    return [(row.trial_id, row.epoch) for row in store.epoch_rows("made")]
