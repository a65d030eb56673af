"""The tables of a sweep as files: how they are encoded, what the footer says, and how they are read consistently.

A read goes live, then trials, then the parts named there. A row that moves from the live file to a part on the way is
met at least once; of two rows with one key the highest (fence, attempt, seq) holds.
"""

import json
import re
import time
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.rows import (
    EPOCHS_REQUIRED,
    EPOCHS_SCHEMA,
    TRIALS_REQUIRED,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    records,
)
from orchestrator.store.objects import DamagedError, Objects, Stored

NAME = re.compile(r"[a-z0-9_-]{1,128}")
EPOCHS_FILE = re.compile(r"(live|part)-(\d+)(?:-(\d+))?\.parquet")


@dataclass(frozen=True, slots=True)
class Header:
    """What the footer of `trials.parquet` says: the state of a whole sweep in a few hundred bytes."""

    fence: int = 0
    generation: int = 0
    """Rises with every write of the table."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """The files of epochs that count, and their numbers of rows."""
    retired: Mapping[str, str] = field(default_factory=dict)
    """Files that count no more, and since when; they are deleted an hour later."""
    totals: Mapping[str, Any] = field(default_factory=dict)
    written_at: datetime | None = None
    done: bool = False
    """Whether the driver ended because nothing was left to run."""
    paused_by: str | None = None
    """Who had the running driver pause; None while it goes on."""

    def encode(self) -> bytes:
        record = {**asdict(self), "written_at": self.written_at.isoformat() if self.written_at else None}
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Raises ValueError, TypeError, KeyError or AttributeError if the footer is not as `encode` makes it."""
        record = json.loads(table.schema.metadata[b"mixmo"])
        known = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        if known.get("written_at"):
            known["written_at"] = datetime.fromisoformat(known["written_at"])
        header = cls(**known)
        dict(header.parts), dict(header.retired), dict(header.totals)
        return header


@dataclass(frozen=True, slots=True)
class Event:
    time: datetime
    kind: str
    text: str
    trial_id: str | None = None
    cause: str | None = None


EVENTS_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC")),
        *(pa.field(name, pa.string()) for name in ("trial_id", "kind", "cause", "text")),
    ]
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sweep at one moment, as far as a screen shows it."""

    header: Header
    rows: Sequence[TrialRow]
    live: Sequence[EpochRow]
    """Epochs of the trials that run, and some of those that just ended."""
    events: Sequence[Event]


def totals(rows: Iterable[TrialRow]) -> dict[str, Any]:
    """What a header says of all trials: counts by state, epochs done and planned, GPU seconds."""
    rows = list(rows)
    return {
        "trials": len(rows),
        "states": dict(Counter(row.state for row in rows)),
        "cached": sum(row.cached_from is not None for row in rows),
        "epochs": sum(row.epoch for row in rows),
        "epochs_planned": sum(row.epochs for row in rows),
        "gpu_seconds": sum(row.gpu_seconds for row in rows if row.cached_from is None),
    }


def encode(table: pa.Table) -> bytes:
    """Parquet bytes. Measured: dictionaries pay for words, byte streams for floats, and both together most."""
    words = [spec.name for spec in table.schema if spec.type == pa.string()]
    floats = [spec.name for spec in table.schema if spec.type == pa.float64()]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=words, use_byte_stream_split=floats, row_group_size=1 << 17
    )
    return bytes(sink.getvalue().to_pybytes())


_RESTORE = "Put it back from a copy"


def decode(data: bytes, name: str, schema: pa.Schema, required: Collection[str]) -> pa.Table:
    """The table of an object: the columns it has of this schema in their types, and any that the schema lacks.

    Raises DamagedError if it is no Parquet file, or has no table of this kind in it.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        line = str(error).partition("\n")[0].rstrip(".")
        raise DamagedError(f"{name} is no Parquet file ({line})", _RESTORE) from error
    fault = _fault(table, required)
    if fault:
        raise DamagedError(f"{name} was not written by mixmo: {fault}", _RESTORE)
    return _typed(table, name, schema)


def _fault(table: pa.Table, required: Collection[str]) -> str | None:
    twice = [column for column, count in Counter(table.schema.names).items() if count > 1]
    if twice:
        return f"its column {twice[0]} is there twice"
    lacking = [column for column in required if column not in table.schema.names or table.column(column).null_count]
    return f"it has no {', '.join(sorted(lacking))}" if lacking else None


def _typed(table: pa.Table, name: str, schema: pa.Schema) -> pa.Table:
    for index, spec in enumerate(table.schema):
        wanted = schema.field(spec.name) if spec.name in schema.names else spec
        if wanted.type != spec.type:
            try:
                table = table.set_column(index, wanted, table.column(index).cast(wanted.type))
            except pa.ArrowException as error:
                text = f"its column {spec.name} is of type {spec.type}, not {wanted.type}"
                raise DamagedError(f"{name} was not written by mixmo: {text}", _RESTORE) from error
    return table


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns, in this order; those it lacks are null."""
    if table.schema.equals(schema):
        return table
    columns = [
        table.column(spec.name).cast(spec.type) if spec.name in table.schema.names else pa.nulls(len(table), spec.type)
        for spec in schema
    ]
    return pa.table(columns, schema=schema)


def merge(tables: Iterable[pa.Table], upto: Mapping[str, int] | None = None) -> pa.Table:
    """One row per (trial, epoch), the one with the highest order, sorted by both.

    `upto` gives the epoch that a trial has reached: rows beyond it are of an attempt that was thrown back.
    """
    import numpy as np

    fitting = [fit(each, EPOCHS_SCHEMA) for each in tables]
    table = pa.concat_tables(fitting).combine_chunks() if fitting else EPOCHS_SCHEMA.empty_table()
    if not len(table):
        return table
    names = table.column("trial_id").combine_chunks().dictionary_encode()
    trials, codes = names.dictionary.to_pylist(), np.from_dlpack(names.indices)
    ranks = np.argsort(np.argsort(np.array(trials, dtype=object)))[codes]
    epoch, fence, attempt, seq = (
        np.from_dlpack(table.column(name).combine_chunks()) for name in ("epoch", "fence", "attempt", "seq")
    )  # to_numpy() and pa.array() would import pandas, which costs more than all else here
    order = np.lexsort((seq, attempt, fence, epoch, ranks))
    last = np.ones(len(order), dtype=bool)
    last[:-1] = (np.diff(ranks[order]) != 0) | (np.diff(epoch[order]) != 0)
    if upto is not None:
        limit = np.array([upto.get(trial, np.iinfo(np.int64).max) for trial in trials], dtype=np.int64)
        last &= (epoch <= limit[codes])[order]
    kept = order[last]
    return table.take(pa.Array.from_buffers(pa.int64(), len(kept), [None, pa.py_buffer(kept)]))


def only(table: pa.Table, trial_id: str) -> pa.Table:
    """The rows of one trial. Without numpy, which costs more than to read one trial's rows."""
    kept = array("q", (i for i, each in enumerate(table.column("trial_id").to_pylist()) if each == trial_id))
    return table.take(pa.Array.from_buffers(pa.int64(), len(kept), [None, pa.py_buffer(kept)]))


@dataclass(frozen=True, slots=True)
class Look:
    """What one consistent look at a sweep saw."""

    header: Header
    trials: pa.Table
    tag: str
    """Of the object that holds the trials."""
    live: pa.Table
    parts: tuple[pa.Table, ...] = ()


class ChangedError(DamagedError):
    """An object that was named is gone: the sweep moved on while it was read, or, if it did not, the object is lost."""


class SweepFiles:
    """The objects of one sweep, for reading."""

    def __init__(self, folder: Objects, sweep: str) -> None:
        if not NAME.fullmatch(sweep):
            raise NotFoundError(f"{sweep!r} is no name of a sweep: those have small letters, digits, _ and - only")
        self.folder, self.sweep, self.key = folder, sweep, f"sweeps/{sweep}"

    def text(self) -> str:
        """The sweep file of the latest run, as it was given."""
        stored = self.folder.read(f"{self.key}/sweep.yaml")
        if stored is None:
            raise self._missing()
        try:
            return stored.data.decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.folder}/{self.key}/sweep.yaml is no text ({error.reason})", _RESTORE) from error

    def events(self) -> list[Event]:
        key = f"{self.key}/events.parquet"
        stored = self.folder.read(key)
        if stored is None:
            return []
        table = decode(stored.data, f"{self.folder}/{key}", EVENTS_SCHEMA, ("time", "kind", "text"))
        return [Event(**record) for record in records(fit(table, EVENTS_SCHEMA))]

    def trials(self) -> tuple[pa.Table, Header, str]:
        """The trials, what their footer says, and the tag of their object. Raises NotFoundError, DamagedError."""
        key = f"{self.key}/trials.parquet"
        stored = self.folder.read(key)
        if stored is None:
            raise self._missing()
        table = decode(stored.data, f"{self.folder}/{key}", TRIALS_SCHEMA, TRIALS_REQUIRED)
        try:
            return table, Header.of(table), stored.tag
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"{self.folder}/{key} was not written by mixmo: its footer is not ours"
            raise DamagedError(text, _RESTORE) from error

    def look(self, *, parts: bool = True, tries: int = 8) -> Look:
        """Everything at one moment. Begins again when an object that was named is gone: the sweep moved on."""
        for last in (False,) * tries + (True,):
            try:
                return self._look(parts)
            except ChangedError:
                if last:
                    raise
                time.sleep(0.05)
        raise AssertionError("the last try returns or raises")

    def _look(self, parts: bool) -> Look:
        fence = max((int(match[2]) for match in self.files() if match[1] == "live"), default=0)
        for _ in range(4):
            live = self.folder.read(self.live_key(fence))
            trials, header, tag = self.trials()
            if header.fence == fence and live is not None:
                rows = self._epochs(live, self.live_key(fence))
                return Look(header, trials, tag, rows, tuple(map(self.part, header.parts)) if parts else ())
            fence = header.fence
        raise self._gone(self.live_key(fence))

    def live_key(self, fence: int) -> str:
        return f"{self.key}/epochs/live-{fence}.parquet"

    def part(self, name: str) -> pa.Table:
        """A file of epochs by its name. Raises ChangedError if it is gone."""
        key = f"{self.key}/epochs/{name}"
        stored = self.folder.read(key)
        if stored is None:
            raise self._gone(key)
        return self._epochs(stored, key)

    def _epochs(self, stored: Stored, key: str) -> pa.Table:
        return decode(stored.data, f"{self.folder}/{key}", EPOCHS_SCHEMA, EPOCHS_REQUIRED)

    def files(self) -> list[re.Match[str]]:
        """The files of epochs that lie there, whether they count or not: (kind, fence, seq)."""
        return [match for match in map(EPOCHS_FILE.fullmatch, self.folder.names(f"{self.key}/epochs")) if match]

    def _gone(self, key: str) -> ChangedError:
        return ChangedError(f"{self.folder}/{key} is named but not there", _RESTORE)

    def _missing(self) -> NotFoundError:
        begun = sweep_names(self.folder)
        have = f"it has {', '.join(begun[:10])}{' ...' if begun[10:] else ''}" if begun else "nothing has run there yet"
        return NotFoundError(
            f"no sweep {self.sweep} in {self.folder}: {have}. --results or MIXMO_RESULTS names another place"
        )


def sweep_names(folder: Objects) -> list[str]:
    """The sweeps that have begun, sorted. A folder that has another name than a sweep can have is none of ours."""
    names = folder.names("sweeps", folders=True)
    return [name for name in names if NAME.fullmatch(name) and _begun(folder, name)]


def _begun(folder: Objects, name: str) -> bool:
    try:
        return "trials.parquet" in folder.names(f"sweeps/{name}")
    except UnreachableError:  # whoever reads it is told why it cannot be
        return True
