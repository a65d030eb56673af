"""How long trials take, told from how long others took on the same kind of device. Pure.

Trials of one *shape* differ in nothing that decides how long a training step takes: the same network, batch, mixing,
augmentation, precision and number of workers. What is timed is a shape's *pace*, in seconds for a floating-point
operation: the operations are counted exactly (`mixmo_core.cost`), and what a device makes of them changes slowly from
one network to the next. Paces come from `mixmo calibrate` and from every trial that has trained an epoch.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa

from mixmo_core.config import DATASETS
from orchestrator.rows import CONFIG_COLUMNS, TrialRow

CORRUPTED = 75
"""Evaluations that `evaluate.robustness: cifar_c` costs at the end of a trial: 15 corruptions in 5 strengths."""
_NOT_OF_SHAPE = frozenset(
    {"seed", "data_train_images", "data_repetition", "data_input_repetition", "data_msda_probability",
     "data_msda_alpha", "mixing_probability", "mixing_alpha", "mixing_weight_root", "model_classifier_roles"}
)  # fmt: skip
_OF_SHAPE = tuple(
    name for name in CONFIG_COLUMNS if name not in _NOT_OF_SHAPE and not name.startswith(("optim_", "evaluate_"))
)  # a new setting is of the shape unless it is said here that it is not


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How fast a shape was trained once. A row of `calibration.parquet`; several of a shape tell how much it varies."""

    device_name: str
    shape: str
    precision: str
    workers: int
    gpus: float
    """Of all workers together; 0 on processors."""
    cpus: float | None = None
    """Cores of a worker, where it had no GPU; None where that was not recorded."""
    step_flops: float
    """Of one training step on the whole batch: where the shape lies among the others."""
    pace: float
    """Seconds for one operation of training."""
    source: Literal["measured", "trained"]
    """By `mixmo calibrate`, or a trial of a sweep, its evaluations included."""
    at: datetime
    torch_version: str | None = None
    mixmo_version: str | None = None


TIMINGS_SCHEMA: pa.Schema = pa.schema(
    [
        *((name, pa.string()) for name in ("device_name", "shape", "precision")),
        ("workers", pa.int64()),
        *((name, pa.float64()) for name in ("gpus", "cpus", "step_flops", "pace")),
        ("source", pa.string()),
        ("at", pa.timestamp("us", tz="UTC")),
        *((name, pa.string()) for name in ("torch_version", "mixmo_version")),
    ]
)


@dataclass(frozen=True, slots=True)
class Work:
    """What a trial, or what is left of one, asks of a device."""

    shape: str
    precision: str
    workers: int
    step_flops: float
    flops: float
    """Evaluations included, each image at the forward third of a training step's operations."""


def work(config: Mapping[str, Any], workers: int, flops: float, epochs: float, *, until_end: bool = True) -> Work:
    """Of `epochs` epochs whose training takes `flops`; `config` are the columns of a row. `until_end`: the last of
    them is the trial's last, after which robustness is measured.
    """
    slots = _steps(config) * config["data_batch_size"]
    held_out = _held_out(config)
    evaluations = epochs / config["evaluate_every"] + CORRUPTED * (
        until_end and config["evaluate_robustness"] != "none"
    )
    per_slot = flops / (slots * epochs) if epochs else 0.0
    return Work(
        shape=" ".join(f"{name}={config[name]}" for name in _OF_SHAPE if config.get(name) is not None),
        precision=config["precision"],
        workers=workers,
        step_flops=per_slot * config["data_batch_size"],
        flops=flops + evaluations * held_out * per_slot / 3,
    )


def _steps(config: Mapping[str, Any]) -> int:
    images: int = config["data_train_images"]
    trained = images - (images // 10 if config["evaluate_split"] == "validation" else 0)
    return trained * int(config["data_repetition"]) // int(config["data_batch_size"])


def _held_out(config: Mapping[str, Any]) -> int:
    if config["evaluate_split"] == "validation":
        return int(config["data_train_images"]) // 10
    return DATASETS[config["data_dataset"]].test_images


def of_trials(rows: Iterable[TrialRow]) -> list[Timing]:
    """What trials that have trained an epoch tell, each once however many sweeps have it. Those trained side by side
    tell nothing: their seconds are also their neighbours'.
    """
    told: dict[str, Timing] = {}
    for row in rows:
        if not (row.epoch and row.wall_s > 0 and row.train_flops and row.device_name and row.updated_at):
            continue
        if row.slots > 1:
            continue
        asked = work(row.config, row.workers, row.train_flops, row.epoch, until_end=row.epoch >= row.epochs)
        if row.cached_from is None and asked.flops > 0:
            told[row.trial_id] = Timing(
                device_name=row.device_name, shape=asked.shape, precision=asked.precision, workers=row.workers,
                gpus=round(row.gpu_seconds / row.wall_s, 3), step_flops=asked.step_flops,
                pace=row.wall_s / asked.flops, source="trained", at=row.updated_at, torch_version=row.torch_version,
            )  # fmt: skip
    return list(told.values())


# ------------------------------------------------------------------------------------------------------------- paces


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds for an operation: the mean, and the band that what was measured allows."""

    mean: float
    low: float | None
    """None where nothing measured says how far off the mean may be."""
    high: float | None
    measured: bool
    """Whether the shape itself was timed."""


class Paces:
    """The paces of one kind of device, for trials of one precision and number of workers.

    The band of a shape that was timed goes from the fastest to the slowest of its timings, the outermost twentieth on
    either side left out; of one that was timed once, it is as wide as the widest among the others. The pace of any
    other shape is interpolated between its neighbours by the operations of a step, on logarithmic scales; beyond the
    outermost shape it is that shape's. Its band holds those of both neighbours, and is at least as wide as the worst
    error that the same rule makes where it can be checked: for each timed shape, from all the others. So a band is
    made of measured differences only, and where there are none (one timing; one shape, and another is asked for) there
    is no band. It is no confidence interval: the machines of a sweep share their moods, so errors do not average out,
    and the bands of trials are added up as they are.
    """

    def __init__(self, timings: Iterable[Timing]) -> None:
        shapes: dict[str, list[Timing]] = defaultdict(list)
        for timing in timings:
            shapes[timing.shape].append(timing)
        counting = {shape: _counting(found) for shape, found in shapes.items()}
        widest = max(filter(None, map(_spread, counting.values())), default=None)
        self._known = {shape: _pace(found, widest) for shape, found in counting.items()}
        placed = sorted((found[0].step_flops, shape) for shape, found in counting.items())
        self._flops = [math.log(flops) for flops, _ in placed]
        self._paces = [self._known[shape] for _, shape in placed]
        self._error = self._worst_error()

    def of(self, shape: str, step_flops: float) -> Pace:
        """Raises ValueError where nothing at all was timed."""
        if shape in self._known:
            return self._known[shape]
        if not self._paces:
            raise ValueError("no shape was timed")
        mean, neighbours = _between(self._flops, self._paces, math.log(step_flops))
        lows, highs = ([getattr(each, side) for each in neighbours] for side in ("low", "high"))
        if self._error is None or None in lows or None in highs:
            return Pace(mean, None, None, measured=False)
        return Pace(mean, min(*lows, mean / self._error), max(*highs, mean * self._error), measured=False)

    def _worst_error(self) -> float | None:
        """The factor by which interpolation is off at most, where each shape is told from the others."""
        errors = []
        for i, pace in enumerate(self._paces):
            flops, others = self._flops[:i] + self._flops[i + 1 :], self._paces[:i] + self._paces[i + 1 :]
            if others:
                told, _ = _between(flops, others, self._flops[i])
                errors.append(max(told / pace.mean, pace.mean / told))
        return max(errors, default=None)


def _counting(timings: Sequence[Timing]) -> list[Timing]:
    """Of a shape's timings those that count: by the newest torch, and of whole trials where there are any."""
    newest = max(timings, key=lambda each: each.at).torch_version
    recent = [each for each in timings if each.torch_version == newest]
    return [each for each in recent if each.source == "trained"] or recent


def _extremes(timings: Sequence[Timing]) -> tuple[float, float]:
    paces, out = sorted(each.pace for each in timings), len(timings) // 20
    return paces[out], paces[-1 - out]


def _spread(timings: Sequence[Timing]) -> float | None:
    """The factor between the mean and what is furthest from it; None where there is one timing."""
    if len(timings) < 2:
        return None
    mean, (low, high) = _mean(timings), _extremes(timings)
    return max(high / mean, mean / low, 1.0)


def _mean(timings: Sequence[Timing]) -> float:
    return math.fsum(each.pace for each in timings) / len(timings)


def _pace(timings: Sequence[Timing], widest: float | None) -> Pace:
    mean = _mean(timings)
    if len(timings) > 1:
        low, high = _extremes(timings)
        return Pace(mean, min(low, mean), max(high, mean), measured=True)
    if widest is None:
        return Pace(mean, None, None, measured=True)
    return Pace(mean, mean / widest, mean * widest, measured=True)


def _between(flops: Sequence[float], paces: Sequence[Pace], at: float) -> tuple[float, list[Pace]]:
    """The pace at a logarithm of operations, from the nearest below and above, which are told with it."""
    right = bisect.bisect_left(flops, at)
    if right in (0, len(flops)):
        nearest = paces[min(right, len(flops) - 1)]
        return nearest.mean, [nearest]
    before, after = paces[right - 1], paces[right]
    gap = flops[right] - flops[right - 1]
    share = (at - flops[right - 1]) / gap if gap else 0.5
    return math.exp((1 - share) * math.log(before.mean) + share * math.log(after.mean)), [before, after]


# ---------------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, slots=True)
class Span:
    """A number with its band; no band (None) where nothing measured gives one."""

    mean: float
    low: float | None
    high: float | None

    def times(self, factor: float) -> Span:
        return Span(
            self.mean * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
        )

    @property
    def error(self) -> float | None:
        """The larger of the two distances to the band's ends, as a fraction of the mean."""
        if self.low is None or self.high is None or not self.mean:
            return None
        return max(self.mean - self.low, self.high - self.mean) / self.mean


@dataclass(frozen=True, slots=True)
class Estimate:
    """What some trials take on one kind of device."""

    device_name: str
    gpus: float
    """That a trial uses; 0 on processors."""
    seconds: Span
    """Of training, summed over the trials."""
    shapes: int
    measured: int
    """Of the shapes, those that were timed themselves."""
    each: tuple[Span, ...]
    """Seconds of every trial, in the order in which they begin."""

    def elapsed(self, gangs: int) -> Span:
        """Seconds until the last trial ends, where so many run at once and the next begins when one ends."""
        low = [span.low for span in self.each if span.low is not None]
        high = [span.high for span in self.each if span.high is not None]
        whole = len(low) == len(high) == len(self.each)
        mean = _makespan([span.mean for span in self.each], gangs)
        return Span(mean, _makespan(low, gangs) if whole else None, _makespan(high, gangs) if whole else None)


def _makespan(seconds: Sequence[float], gangs: int) -> float:
    ends = [0.0] * max(1, min(gangs, len(seconds)))
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def estimates(
    works: Sequence[Work], timings: Iterable[Timing], *, gpus: float | None, cpus: float, accelerator: str = "any"
) -> list[Estimate]:
    """What the trials take on each kind of device that was timed at their precisions and workers, the fastest first.

    `gpus` is that of a worker: 0 for processors, None for one GPU where there are any. `accelerator` is a word in the
    device's name.
    """
    devices: dict[tuple[str, float], list[Timing]] = defaultdict(list)
    for timing in timings:
        if _fits(timing, gpus, cpus) and (accelerator == "any" or accelerator.lower() in timing.device_name.lower()):
            devices[timing.device_name, timing.gpus / timing.workers].append(timing)
    found = [_estimate(works, name, per_worker, held) for (name, per_worker), held in devices.items()]
    return sorted(filter(None, found), key=lambda each: (each.seconds.mean, each.device_name))


def _fits(timing: Timing, gpus: float | None, cpus: float) -> bool:
    if timing.gpus:
        return gpus is None or abs(timing.gpus - gpus * timing.workers) < 0.01
    return not gpus and timing.cpus in (None, cpus)


def _estimate(works: Sequence[Work], device: str, gpus: float, timings: Sequence[Timing]) -> Estimate | None:
    """None where a precision or number of workers was not timed."""
    kinds: dict[tuple[str, int], list[Timing]] = defaultdict(list)
    for timing in timings:
        kinds[timing.precision, timing.workers].append(timing)
    paces = {kind: Paces(kinds[kind]) for kind in {(each.precision, each.workers) for each in works} if kind in kinds}
    if not works or any((each.precision, each.workers) not in paces for each in works):
        return None
    known = {
        (each.shape, each.workers): paces[each.precision, each.workers].of(each.shape, each.step_flops)
        for each in {(one.shape, one.workers): one for one in works}.values()
    }
    each = tuple(_seconds(known[one.shape, one.workers], one.flops) for one in works)
    measured = sum(pace.measured for pace in known.values())
    return Estimate(device, gpus * works[0].workers, total(each), len(known), measured, each)


def _seconds(pace: Pace, flops: float) -> Span:
    return Span(pace.mean, pace.low, pace.high).times(flops)


def total(spans: Iterable[Span]) -> Span:
    """Their sum; the bands add up as they are (see `Paces`)."""
    spans = list(spans)
    lows, highs = [each.low for each in spans], [each.high for each in spans]
    return Span(
        math.fsum(each.mean for each in spans),
        None if None in lows else math.fsum(low for low in lows if low is not None),
        None if None in highs else math.fsum(high for high in highs if high is not None),
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a whole sweep was to take, as reckoned when its first trial began. Part of its header, as plain values."""

    device_name: str
    gpus: float
    """That a trial uses; 0 on processors."""
    seconds: Span
    """Of training, over all trials."""
    epochs: int
    """Planned, over all trials: a run of another number of them is another sweep, and is predicted anew."""

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Prediction | None:
        """None where there is none, or it is of a version that this one does not understand."""
        try:
            return cls(**{**record, "seconds": Span(**record["seconds"])}) if record else None
        except (TypeError, KeyError):
            return None
