"""Times the training steps of a sweep's shapes on this machine: what `mixmo calibrate` does. The only clock in pricing.

Of many shapes the smallest, the largest and some between are timed: those in between follow from their neighbours
(`calibration.Paces`). Each is trained as `mixmo train` would, real images and all, for a bounded time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mixmo_core import cost, train
from mixmo_core.config import TrialConfig
from orchestrator import devices
from orchestrator.calibration import Timing, Work, work
from orchestrator.errors import UsageError
from orchestrator.rows import config_columns
from orchestrator.sweep import Sweep, Trial

SHAPES = 3
"""So many are timed: the smallest, the one in the middle, the largest."""
SAMPLES = 6
"""Stretches of a shape's time; the first is for warming up."""
WARM_UP = 3
"""Steps that do not count: libraries choose their kernels, the momenta are made."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A shape and what was measured of it."""

    trial: Trial
    timings: tuple[Timing, ...]

    @property
    def step_s(self) -> float:
        return sum(each.pace * each.step_flops for each in self.timings) / len(self.timings)

    @property
    def flops_per_s(self) -> float:
        return self.timings[0].step_flops / self.step_s


def shapes(sweep: Sweep) -> list[Trial]:
    """A trial of each shape of the sweep, by the operations of its steps."""
    cells = {trial.cell_id: trial for trial in reversed(sweep.trials)}
    found = {_work(trial.config, trial.workers).shape: trial for trial in cells.values()}
    return sorted(found.values(), key=lambda trial: (cost.step_flops(trial.config), trial.position))


def chosen(trials: Sequence[Trial], count: int = SHAPES) -> list[Trial]:
    """So many of them, the first and the last always, the others at equal distances."""
    if len(trials) <= count:
        return list(trials)
    return [trials[round(i * (len(trials) - 1) / (count - 1))] for i in range(count)]


def calibrate(
    trials: Sequence[Trial], *, device: torch.device, cpus: float, data_dir: Path | None, seconds: float
) -> Iterator[Timed]:
    """Time trials one after the other, each for its share of the seconds; loading images comes on top.

    Raises UsageError for trials of several workers, which one process cannot train.
    """
    if any(trial.workers > 1 for trial in trials):
        raise UsageError(
            "calibrate times trials of one worker, and these have resources.workers above 1: run the sweep, and its "
            "first trials tell what the others take"
        )
    torch.set_num_threads(max(1, int(cpus)))
    for trial in trials:
        paces = time_paces(trial.config, device=device, data_dir=data_dir, limit_s=seconds / len(trials))
        asked, gpu = _work(trial.config), device.type == "cuda"
        yield Timed(trial, tuple(
            Timing(
                device_name=devices.name(device), shape=asked.shape, precision=asked.precision, workers=1,
                gpus=float(gpu), cpus=None if gpu else cpus, step_flops=asked.step_flops, pace=pace, source="measured",
                at=datetime.now(UTC), torch_version=str(torch.__version__), mixmo_version=_version(),
            )
            for pace in paces
        ))  # fmt: skip


def time_paces(
    config: TrialConfig,
    *,
    device: torch.device,
    data_dir: Path | None = None,
    limit_s: float = 20.0,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds for an operation, of several stretches of steps; of whole epochs, evaluations included, where two fit in.

    One stretch at least, however long a step takes.
    """
    unending = replace(
        config,
        optim=replace(config.optim, epochs=1_000_000),
        evaluate=replace(config.evaluate, every=1, robustness="none"),
    )
    watch = _Watch(limit_s, now)
    step_flops, epoch_flops = cost.step_flops(config), _work(unending, epochs=1).flops
    steps: list[float] = []
    epochs: list[float] = []
    done, seconds = 0, 0.0  # at the last moment of this epoch
    for told in train.train(unending, device=device, data_dir=data_dir, save_when=watch.due):
        if isinstance(told, train.Moment):
            before, before_s = done, seconds
            done, seconds = told.step, told.state()["part"]["seconds"]
            if watch.counts():
                steps.append((seconds - before_s) / ((done - before) * step_flops))
        else:
            if told.epoch > 1:
                epochs.append(told.seconds / epoch_flops)
            done, seconds = 0, 0.0
        if watch.is_over and (steps or epochs):
            break
    return epochs if len(epochs) > 1 or not steps else steps


class _Watch:
    """When a stretch is over. Asked after every step."""

    def __init__(self, limit_s: float, now: Callable[[], float]) -> None:
        self._limit_s, self._now = limit_s, now
        self._began = self._since = float("nan")
        self._asked, self._warm = 0, False

    def due(self) -> bool:
        if not self._asked:
            self._began = self._since = self._now()
        self._asked += 1
        warming_up = not self._warm and self._asked < WARM_UP
        return not warming_up and self._now() - self._since >= (self._limit_s / SAMPLES if self._warm else 0.0)

    def counts(self) -> bool:
        """A stretch has ended: whether it was more than warming up."""
        counted, self._warm, self._since = self._warm, True, self._now()
        return counted

    @property
    def is_over(self) -> bool:
        return self._now() - self._began >= self._limit_s


def _work(config: TrialConfig, workers: int = 1, epochs: int | None = None) -> Work:
    epochs = epochs or config.optim.epochs
    flops = cost.trial_flops(config) / config.optim.epochs * epochs
    return work(config_columns(config), workers, flops, epochs, until_end=False)


def _version() -> str | None:
    try:
        return version("mixmo-sweeps")
    except PackageNotFoundError:
        return None
