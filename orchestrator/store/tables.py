"""The tables of a sweep as files: how they are encoded, what the footer says, and how they are read consistently.

A read goes live, then trials, then the parts named there. A row that moves from the live file to a part on the way is
met at least once; of two rows with one key the highest (fence, attempt, seq) holds.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import NotFoundError
from orchestrator.rows import EPOCHS_SCHEMA, EpochRow, TrialRow, records
from orchestrator.store.objects import DamagedError, Folder

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

    def encode(self) -> bytes:
        record = {**asdict(self), "written_at": self.written_at.isoformat() if self.written_at else None}
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        record = json.loads((table.schema.metadata or {}).get(b"mixmo", b"{}"))
        known = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        if known.get("written_at"):
            known["written_at"] = datetime.fromisoformat(known["written_at"])
        return cls(**known)


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


def decode(data: bytes, key: str) -> pa.Table:
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{key} is no Parquet file ({error}). `mixmo verify` says what it held.") from error


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

    def __init__(self, folder: Folder, sweep: str) -> None:
        if not re.fullmatch(r"[a-z0-9_-]{1,128}", sweep):
            raise NotFoundError(f"{sweep!r} is no name of a sweep: those have small letters, digits, _ and - only")
        self.folder, self.sweep, self.key = folder, sweep, f"sweeps/{sweep}"

    def text(self) -> str:
        """The sweep file of the latest run, as it was given."""
        stored = self.folder.read(f"{self.key}/sweep.yaml")
        if stored is None:
            raise self._missing()
        return stored.data.decode()

    def events(self) -> list[Event]:
        key = f"{self.key}/events.parquet"
        stored = self.folder.read(key)
        return [Event(**record) for record in records(decode(stored.data, key))] if stored else []

    def trials(self) -> tuple[pa.Table, str]:
        """The trials, and the tag of their object. Raises NotFoundError."""
        key = f"{self.key}/trials.parquet"
        stored = self.folder.read(key)
        if stored is None:
            raise self._missing()
        return decode(stored.data, key), stored.tag

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
            trials, tag = self.trials()
            header = Header.of(trials)
            if header.fence == fence and live is not None:
                rows = decode(live.data, self.live_key(fence))
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
        return decode(stored.data, key)

    def files(self) -> list[re.Match[str]]:
        """The files of epochs that lie there, whether they count or not: (kind, fence, seq)."""
        return [match for match in map(EPOCHS_FILE.fullmatch, self.folder.names(f"{self.key}/epochs")) if match]

    def _gone(self, key: str) -> ChangedError:
        return ChangedError(f"{self.folder}/{key} is named but not there", "Put it back from a copy")

    def _missing(self) -> NotFoundError:
        begun = sweep_names(self.folder)
        have = f"it has {', '.join(begun[:10])}{' ...' if begun[10:] else ''}" if begun else "nothing has run there yet"
        return NotFoundError(
            f"no sweep {self.sweep} in {self.folder}: {have}. --results or MIXMO_RESULTS names another place"
        )


def sweep_names(folder: Folder) -> list[str]:
    """The sweeps that have begun, sorted."""
    names = folder.names("sweeps", folders=True)
    return [name for name in names if "trials.parquet" in folder.names(f"sweeps/{name}")]
