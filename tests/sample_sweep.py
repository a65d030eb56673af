"""A sweep at three moments of its life, made by hand: `beginning`, `middle`, `end`. For what people see and read."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from mixmo_core import cost
from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, TrialConfig, cell_id, digest, identity
from orchestrator.rows import EpochRow, State, TrialRow, config_columns
from orchestrator.store import Event, Header, ResultStore, Snapshot

NAME = "cifar100_width"
NOW = datetime(2026, 11, 21, 14, 2, 11, tzinfo=UTC)
Moment = Literal["beginning", "middle", "end"]

_OUT_OF_MEMORY, _KILLED = "CUDA out of memory", "a worker was killed by signal 9"
_FAILED = {7: _KILLED, 16: _OUT_OF_MEMORY, 17: _OUT_OF_MEMORY}
"""Positions of the trials that fail, and why."""


def _configs() -> list[tuple[str | None, TrialConfig]]:
    """14 cells, each with 3 seeds, seeds breadth first."""
    cells: list[tuple[str | None, DataConfig, ModelConfig, MixingConfig]] = []
    for width in (2, 5, 10):
        cells.append(("vanilla", DataConfig(), ModelConfig(width=width, subnetworks=1), MixingConfig()))
        for method in ("linear", "cutmix"):
            for subnetworks in (2, 3) if width < 10 else (2,):
                model = ModelConfig(width=width, subnetworks=subnetworks)
                cells.append((None, DataConfig(repetition=4), model, MixingConfig(method=method)))
    return [
        (label, TrialConfig(data=data, model=model, mixing=mixing, seed=seed))
        for seed in range(3)
        for label, data, model, mixing in cells
    ]


def _noise(*numbers: int) -> float:
    """Between -1 and 1, and the same on every machine."""
    return math.sin(sum(number * (i + 1) * 78.233 for i, number in enumerate(numbers)))


def _top1(config: TrialConfig, position: int) -> float:
    mixed = config.model.subnetworks > 1
    method = 0.012 if mixed and config.mixing.method == "cutmix" else 0.0
    return 0.69 + 0.012 * math.log2(config.model.width) + 0.02 * mixed + method + 0.004 * _noise(position, 1)


def _state(position: int, moment: Moment) -> State:
    if moment == "beginning":
        return "RUNNING" if position < 2 else "PENDING"
    if moment == "end" or position < 19:
        return "ERROR" if position in _FAILED else "TERMINATED"
    return "RUNNING" if position < 25 else "PENDING"


def _epochs_done(position: int, state: State, moment: Moment) -> int:
    if state == "TERMINATED":
        return 300
    if state == "PENDING" or moment == "beginning":
        return 0
    return 3 if state == "ERROR" else 40 + position * 37 % 220


def _row(position: int, label: str | None, config: TrialConfig, moment: Moment) -> TrialRow:
    name, state = digest(identity(config)), _state(position, moment)
    epoch = _epochs_done(position, state, moment)
    seconds = epoch * config.model.width * 0.9
    began = NOW - timedelta(minutes=200 - 7 * position)
    known = state != "PENDING"
    return TrialRow(
        sweep=NAME, label=label, position=position, trial_id=name[:12], digest=name, cell_id=cell_id(config),
        state=state, epoch=epoch, epochs=300, attempts=(2 if position == 20 else 1) if known else 0,
        error="Traceback (most recent call last):\n  ...\nRuntimeError: no" if state == "ERROR" else None,
        error_cause=_FAILED[position] if state == "ERROR" else None,
        started_at=began if known else None,
        updated_at=min(NOW, began + timedelta(seconds=seconds)) if known else None,
        wall_s=seconds, gpu_seconds=seconds, images_per_s=9000.0 + 100 * position if epoch else None,
        train_flops=cost.trial_flops(config) * epoch / 300, fence=1, attempt=1, seq=position,
        cached_from="pilot" if moment != "beginning" and position < 3 else None, torch_version="2.14.1",
        numerics="training=1", config=config_columns(config),
        metrics={"top1": _top1(config, position)} if state == "TERMINATED" else {},
    )  # fmt: skip


def _epoch_row(row: TrialRow, epoch: int, config: TrialConfig) -> EpochRow:
    top1 = _top1(config, row.position) * (1 - 0.8 * math.exp(-epoch / 60)) + 0.01 * _noise(row.position, epoch)
    return EpochRow(
        sweep=NAME, trial_id=row.trial_id, epoch=epoch, attempt=1, fence=1, seq=row.position,
        updated_at=NOW - timedelta(seconds=row.epoch - epoch), wall_s=float(epoch), gpu_seconds=float(epoch),
        images_per_s=9000.0, metrics={"loss": 3 * math.exp(-epoch / 90), "top1": top1},
    )  # fmt: skip


def snapshot(moment: Moment) -> Snapshot:
    configs = _configs()
    rows = [_row(position, label, config, moment) for position, (label, config) in enumerate(configs)]
    live, events = [], []
    for row, (_, config) in zip(rows, configs, strict=True):
        if row.state == "RUNNING":
            live += [_epoch_row(row, epoch, config) for epoch in range(1, row.epoch + 1)]
        if row.started_at:
            events.append(Event(row.started_at, "running", "", row.trial_id))
        if row.state in ("TERMINATED", "ERROR") and row.updated_at:
            text = row.error_cause or "all epochs trained"
            events.append(Event(row.updated_at, row.state.lower(), text, row.trial_id, row.error_cause))
    header = Header(fence=1, generation=5, written_at=NOW, done=moment == "end")
    return Snapshot(header, rows, live, sorted(events, key=lambda event: event.time))


def stored(folder: Path, moment: Moment) -> ResultStore:
    """The same sweep in a store, without a driver."""
    shot, store = snapshot(moment), ResultStore.open(folder, create=True)
    with store.writer(NAME, sweep_text=f"name: {NAME}\n", now=lambda: NOW) as writer:
        writer.put(shot.rows)
        writer.add(shot.live)
        for event in shot.events:
            writer.event(event.kind, event.text, event.trial_id, event.cause)
        for row in shot.rows[:20]:
            if row.attempts:
                store.attempt(row.trial_id, writer.fence, 1, "token").put_log(
                    0, f"epoch {row.epoch}\nas it was printed\n"
                )
        writer.close(done=moment == "end")
    return store
