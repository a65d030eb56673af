"""The rows of the result tables, and their Arrow schemas, derived from the settings and the metrics.

`trials` has one row per trial, its latest state. `epochs` has one row per trial and epoch. Times are seconds,
timestamps are UTC, accuracies and errors are fractions.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import attrgetter, itemgetter
from typing import Any, Literal, Self

import pyarrow as pa

from mixmo_core.config import DATASETS, TrialConfig, flatten, ineffective, leaves, unflatten
from mixmo_core.metrics import METRICS

SCHEMA_VERSION = 1

State = Literal["PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR", "CANCELLED"]
FINAL: frozenset[State] = frozenset({"TERMINATED", "ERROR", "CANCELLED"})
NO_ERROR: Mapping[str, None] = dict.fromkeys(("error", "error_cause", "error_kind", "error_fingerprint"))
"""What a trial has of its last failure once it begins again."""

CONFIG_COLUMNS: tuple[str, ...] = tuple(name.replace(".", "_") for name, _ in leaves())
METRIC_COLUMNS: tuple[str, ...] = tuple(metric.name for metric in METRICS)
_SETTINGS = frozenset(CONFIG_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One trial, as it stands. Who orders two rows of one trial: (fence, attempt, seq); the highest holds."""

    sweep: str
    label: str | None = None
    """Of the block the trial came from."""
    position: int
    """Its place in the sweep: seeds breadth first."""
    trial_id: str
    digest: str
    """The whole hash, of which the id is the first 12 digits."""
    cell_id: str
    workers: int = 1
    state: State = "PENDING"
    epoch: int = 0
    """Epochs done."""
    epochs: int
    """Epochs planned."""
    attempts: int = 0
    """Attempts begun, over all fences."""
    error: str | None = None
    """The traceback, or what became of the workers."""
    error_cause: str | None = None
    """What it failed of, in one line."""
    error_kind: str | None = None
    """`exception`, or what its workers were lost by once too often: `crash`, `oom`, `preempted`, `store`."""
    error_fingerprint: str | None = None
    """By which failures are grouped: the exception and the innermost of our frames, `DivergedError in train.train`."""
    started_at: datetime | None = None
    updated_at: datetime | None = None
    wall_s: float = 0.0
    """Seconds of training and evaluation behind the rows that count."""
    gpu_seconds: float = 0.0
    images_per_s: float | None = None
    """Slots of training per second of the last epoch, its evaluation included."""
    train_flops: float | None = None
    """Of the training that the rows stand for."""
    best_top1: float | None = None
    best_epoch: int | None = None
    stopped_early: bool = False
    split: str | None = None
    checkpoint: str | None = None
    """Store path of the checkpoint that counts; its name ends with the digits of its SHA-256."""
    logits: str | None = None
    """Store path of what a finished trial makes of the images it is measured on; named as a checkpoint is."""
    attempt: int = 0
    fence: int = 0
    seq: int = 0
    """Order of arrival at the driver, over the whole sweep."""
    parent_id: str | None = None
    """The trial of which it is a copy since its population last decided so."""
    lineage: str | None = None
    """Of a trial of a population, as JSON: each copy (of whom, after which epoch, with which settings from then on),
    and what came of its last comparison. Its settings here are those that it began with.
    """
    cached_from: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    torch_version: str | None = None
    ray_version: str | None = None
    device_name: str | None = None
    hosts: str | None = None
    """Names of the hosts that ran it, sorted, separated by spaces."""
    slots: int = 1
    """Of the gangs that ran it, at most: above 1, its seconds are also those of trials beside it."""
    numerics: str | None = None
    """Versions of the parts' arithmetic, as `part=version part=version`."""
    schema_version: int = SCHEMA_VERSION
    config: Mapping[str, Any] = field(default_factory=dict)
    """By column name (`model_width`); see `config_columns`."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of the last epoch evaluated, by column name."""

    @property
    def order(self) -> tuple[int, int, int]:
        return (self.fence, self.attempt, self.seq)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """One epoch of one trial."""

    sweep: str
    trial_id: str
    epoch: int
    """1 is the first."""
    attempt: int
    fence: int
    seq: int
    updated_at: datetime
    wall_s: float
    """Seconds since the trial began, over all attempts whose epochs count."""
    gpu_seconds: float
    images_per_s: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int, int]:
        return (self.fence, self.attempt, self.seq)


def config_columns(config: TrialConfig) -> dict[str, Any]:
    """The settings of a trial by column name: null where one has no effect, a count where the file says `all`."""
    silent = ineffective(config)
    resolved = {
        "data.train_images": DATASETS[config.data.dataset].train_images,
        "model.encoders": config.model.subnetworks,
        "model.classifiers": config.model.subnetworks,
    }
    columns: dict[str, Any] = {}
    for column, (name, value) in zip(CONFIG_COLUMNS, flatten(config).items(), strict=True):
        shown = resolved[name] if value == "all" else list(value) if isinstance(value, tuple) else value
        columns[column] = None if name in silent else shown
    return columns


def config_of(row: TrialRow) -> TrialConfig:
    """The config that a row stands for: it has the row's trial id."""
    given = {name: row.config.get(name.replace(".", "_")) for name, _ in leaves()}
    return unflatten({name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None})


# ---------------------------------------------------------------------------------------------------- Arrow schemas


def _arrow_type(hint: Any) -> pa.DataType:
    """The column type of a Python type; `None` and the word `all` make no difference."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _arrow_type(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return pa.string()
    if origin is tuple:
        return pa.list_(pa.float64())
    simple = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    return pa.timestamp("us", tz="UTC") if hint is datetime else simple[hint]


def _setting_types() -> dict[str, pa.DataType]:
    columns = {}
    for name, _ in leaves():
        hint: Any = TrialConfig
        for part in name.split("."):
            hint = typing.get_type_hints(hint)[part]
        columns[name.replace(".", "_")] = _arrow_type(hint)
    return columns


def _schema(row: type[TrialRow] | type[EpochRow]) -> pa.Schema:
    columns: dict[str, pa.DataType] = {}
    for name, hint in typing.get_type_hints(row).items():
        if name == "config":
            columns |= _setting_types()
        elif name == "metrics":
            columns |= dict.fromkeys(METRIC_COLUMNS, pa.float64())
        else:
            columns[name] = _arrow_type(hint)
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _required(row: type[TrialRow] | type[EpochRow]) -> frozenset[str]:
    missing = dataclasses.MISSING
    given = dataclasses.fields(row)
    return frozenset(spec.name for spec in given if spec.default is missing and spec.default_factory is missing)


TRIALS_SCHEMA: pa.Schema = _schema(TrialRow)
EPOCHS_SCHEMA: pa.Schema = _schema(EpochRow)
TRIALS_REQUIRED: frozenset[str] = _required(TrialRow)
EPOCHS_REQUIRED: frozenset[str] = _required(EpochRow)
"""Columns that no table can do without, whatever version wrote it."""


def to_table(rows: Iterable[TrialRow] | Iterable[EpochRow], schema: pa.Schema) -> pa.Table:
    """Column by column: rows are many, and a dictionary for each would cost more than all else."""
    held: list[Any] = list(rows)
    own = set(_own_names(type(held[0]))) if held else set()
    configs = _Mappings([row.config for row in held] if any(name in _SETTINGS for name in schema.names) else [])
    metrics = _Mappings([row.metrics for row in held])
    columns = []
    for spec in schema:
        if spec.name in own:
            columns.append(pa.array(list(map(attrgetter(spec.name), held)), spec.type))
        else:
            columns.append((configs if spec.name in _SETTINGS else metrics).column(spec))
    return pa.table(columns, schema=schema)


class _Mappings:
    """Columns from mappings that mostly have the same keys, and lack most of a schema's."""

    def __init__(self, mappings: Sequence[Mapping[str, Any]]) -> None:
        self._mappings = mappings
        kinds = list(map(set, set(map(tuple, mappings))))  # one or two, as a rule
        self._some: set[str] = set().union(*kinds)
        self._all: set[str] = set.intersection(*kinds) if kinds else set()

    def column(self, spec: pa.Field) -> pa.Array:
        name = spec.name
        if name not in self._some:
            return pa.nulls(len(self._mappings), spec.type)
        if name in self._all:
            return pa.array(list(map(itemgetter(name), self._mappings)), spec.type)
        return pa.array([each.get(name) for each in self._mappings], spec.type)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as dictionaries, as `to_pylist` has them; that imports pandas when it meets a time."""
    columns = [_values(table.column(name)) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_timestamp(column.type):
        return list(column.to_pylist())
    ticks = [tick for chunk in column.chunks for tick in chunk.view(pa.int64()).to_pylist()]
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    return [None if tick is None else _EPOCH + timedelta(microseconds=tick * 10**6 // per_second) for tick in ticks]


def _own_names(row: type[TrialRow] | type[EpochRow]) -> list[str]:
    return [spec.name for spec in dataclasses.fields(row) if spec.name not in ("config", "metrics")]


def _own(table: pa.Table, row: type[TrialRow] | type[EpochRow]) -> list[dict[str, Any]]:
    """What rows have beside their settings and metrics. A column that a reader has added to a table of an earlier
    version is null all the way, be it that no row may be so.
    """
    table = table.select([name for name in _own_names(row) if name in table.schema.names])
    made = {spec.name: spec.default for spec in dataclasses.fields(row)}
    given = {name: made[name] for name in table.schema.names if made[name] not in (None, dataclasses.MISSING)}
    lacking = [name for name in given if table.column(name).null_count]
    held = records(table)
    for each in held if lacking else ():
        each |= {name: given[name] for name in lacking if each[name] is None}
    return held


def trial_rows(table: pa.Table) -> list[TrialRow]:
    """Rows of a `trials` table. What it lacks, since an earlier version wrote it, is as a new row has it; columns that
    this version does not know are dropped.
    """
    configs, metrics = _mappings(table, CONFIG_COLUMNS), _mappings(table, METRIC_COLUMNS)
    own = _own(table, TrialRow)
    return [TrialRow(**each, config=c, metrics=m) for each, c, m in zip(own, configs, metrics, strict=True)]


def epoch_rows(table: pa.Table) -> list[EpochRow]:
    """Rows of an `epochs` table, as `trial_rows` reads them."""
    metrics = _mappings(table, METRIC_COLUMNS)
    own = _own(table, EpochRow)
    return [EpochRow(**each, metrics=m) for each, m in zip(own, metrics, strict=True)]


def _mappings(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each row the columns with these names, in a dictionary of its own."""
    held = set(table.schema.names)
    columns = [_values(table.column(name)) if name in held else [None] * len(table) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def newest(rows: Sequence[EpochRow]) -> list[EpochRow]:
    """One row per (trial, epoch): the one with the highest order. Sorted by trial and epoch."""
    held: dict[tuple[str, int], EpochRow] = {}
    for row in rows:
        key = (row.trial_id, row.epoch)
        if key not in held or row.order > held[key].order:
            held[key] = row
    return [held[key] for key in sorted(held)]
