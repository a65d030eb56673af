"""The tables of a sweep as files: how they are encoded, what the footer says, and how they are read consistently.

A read goes live, then trials, then the parts named there. A row that moves from the live file to a part on the way is
met at least once; of two rows with one key the highest (fence, attempt, seq) holds.
"""

import contextlib
import json
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Self, TypeVar

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
COPY = re.compile(r"trials-(\d+)\.parquet")
LAYOUT = 1
"""Which objects there are and how they hang together. It rises when an older version could not read them rightly; that
a table has more columns is no reason.
"""
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
    copied: bool = False
    """Whether `trials-<fence>.parquet` has the same, since this place cannot refuse what an old driver writes late."""
    layout: int = LAYOUT
    paused_by: str | None = None
    """Who had the running driver pause; None while it goes on."""
    stopping: bool = False
    """Whether the running driver lets trials finish and starts no more."""
    predicted: Mapping[str, Any] | None = None
    """What the sweep was to take, as its driver reckoned when the first trial began: a `calibration.Prediction`."""

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
        dict(header.totals)
        if not all(isinstance(each, int) for each in (header.fence, header.generation, *header.parts.values())):
            raise ValueError("a fence, a generation or a number of rows is no number")
        if not all(map(EPOCHS_FILE.fullmatch, (*header.parts, *header.retired))):  # readers and deletions go by them
            raise ValueError("it names what is no file of epochs")
        for since in header.retired.values():
            datetime.fromisoformat(since)
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


ROW_GROUP = 1 << 17
"""Rows that are encoded together. Who wants one trial of a sorted file reads one or two such groups of it."""


def encode(table: pa.Table) -> bytes:
    """Parquet bytes. Measured on curves of 17 metrics that are as good as noise, in bytes a row: 194 plain, 135 zstd as
    it comes, 107 with dictionaries for words only, 95 with byte streams for floats, 91 with differences for the rest.
    Without a checksum for each page, two in five flipped bits give other numbers and no error.
    """
    kinds = {spec.name: _ENCODINGS.get(str(spec.type)) for spec in table.schema}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[spec.name for spec in table.schema if spec.type == pa.string()],
        column_encoding={name: kind for name, kind in kinds.items() if kind},
        row_group_size=ROW_GROUP,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue().to_pybytes())


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of the rows of epochs somebody wants."""

    columns: Collection[str] | None = None
    """These only; None is all."""
    trial_id: str | None = None
    """At least all of this trial; None is all."""


ALL = Wanted()
_ENCODINGS = {
    "double": "BYTE_STREAM_SPLIT",
    "int64": "DELTA_BINARY_PACKED",
    "timestamp[us, tz=UTC]": "DELTA_BINARY_PACKED",
}
_RESTORE = "Put it back from a copy"
_NO_RESULT = "No result hangs on it: delete it, or run the sweep again"
RERUN = "Run the sweep again: rows of trials that have not ended come again with their checkpoints"


def decode(
    data: bytes,
    name: str,
    schema: pa.Schema,
    required: Collection[str],
    wanted: Wanted = ALL,
    *,
    advice: str = _RESTORE,
) -> pa.Table:
    """The table of an object: the columns it has of this schema in their types, and any that the schema lacks.

    Raises DamagedError if it is no Parquet file, is not what was written, or has no table of this kind in it.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        have = file.schema_arrow.names
        fault = _shape_fault(have, required)
        if fault is None:
            table = file.read_row_groups(
                range(file.num_row_groups) if wanted.trial_id is None else _groups_with(file.metadata, wanted.trial_id),
                columns=None if wanted.columns is None else [name for name in have if name in wanted.columns],
            )
            fault = _null_fault(table, required)
    except (pa.ArrowException, OSError) as error:
        line = str(error).partition("\n")[0].rstrip(".")
        kind = "not what was written" if "CRC" in line else "no Parquet file"
        raise DamagedError(f"{name} is {kind} ({line})", advice) from error
    if fault:
        raise DamagedError(f"{name} was not written by mixmo: {fault}", advice)
    return _typed(table, name, schema, advice)


def _shape_fault(have: Sequence[str], required: Collection[str]) -> str | None:
    twice = [column for column, count in Counter(have).items() if count > 1]
    if twice:
        return f"its column {twice[0]} is there twice"
    lacking = sorted(set(required) - set(have))
    return f"it has no {', '.join(lacking)}" if lacking else None


def _null_fault(table: pa.Table, required: Collection[str]) -> str | None:
    empty = [name for name in table.schema.names if name in required and table.column(name).null_count]
    return f"it has no {', '.join(sorted(empty))}" if empty else None


def _groups_with(metadata: pq.FileMetaData, trial_id: str) -> list[int]:
    """The row groups that may hold the trial, by what the footer says of each."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    at = paths.index("trial_id")
    said = [metadata.row_group(index).column(at).statistics for index in range(metadata.num_row_groups)]
    return [
        index
        for index, each in enumerate(said)
        if each is None or not each.has_min_max or each.min <= trial_id <= each.max
    ]


def _typed(table: pa.Table, name: str, schema: pa.Schema, advice: str) -> pa.Table:
    for index, spec in enumerate(table.schema):
        wanted = schema.field(spec.name) if spec.name in schema.names else spec
        if wanted.type != spec.type:
            try:
                table = table.set_column(index, wanted, table.column(index).cast(wanted.type))
            except pa.ArrowException as error:
                text = f"its column {spec.name} is of type {spec.type}, not {wanted.type}"
                raise DamagedError(f"{name} was not written by mixmo: {text}", advice) from error
    return table


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns, in this order; those it lacks are null."""
    if table.schema.equals(schema):
        return table
    return pa.table([_column(table, spec) for spec in schema], schema=schema)


def _column(table: pa.Table, spec: pa.Field) -> pa.ChunkedArray:
    if spec.name not in table.schema.names:
        return pa.nulls(len(table), spec.type)
    column = table.column(spec.name)
    return column if column.type == spec.type else column.cast(spec.type)  # which loads a library, needed or not


def merge(
    tables: Iterable[pa.Table], upto: Mapping[str, int] | None = None, schema: pa.Schema = EPOCHS_SCHEMA
) -> pa.Table:
    """One row per (trial, epoch), the one with the highest order, sorted by both.

    `upto` gives the epoch that a trial has reached: rows beyond it are of an attempt that was thrown back. A schema
    other than the whole one has the columns of KEYS in it.
    """
    import numpy as np

    fitting = [fit(each, schema) for each in tables]
    table = pa.concat_tables(fitting) if fitting else schema.empty_table()
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
    if len(kept) == len(table) and (np.diff(kept) > 0).all():  # one file that is sorted, as compaction leaves it
        return table
    return _taken(table, kept)


KEYS = ("trial_id", "epoch", "fence", "attempt", "seq")
"""What tells rows of epochs apart, and which of two holds."""


def numbers(rows: Any) -> pa.Array:
    """Numbers of rows, from an array of 64-bit integers that lie one after the other. Loads nothing."""
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])


def _taken(table: pa.Table, rows: Any) -> pa.Table:
    """The rows with these numbers. In pieces: nine times faster than at once where there are many."""
    indices = numbers(rows)
    pieces = [table.take(indices.slice(start, ROW_GROUP)) for start in range(0, len(rows), ROW_GROUP)]
    return pa.concat_tables(pieces) if pieces else table.slice(0, 0)


FEW = 200
"""So many stretches of rows are put together more quickly than the library is loaded that takes rows by number."""


def _picked(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """As `_taken`, of numbers that rise. Without numpy, and where there are few stretches without more of Arrow."""
    if len(rows) in (0, len(table)):
        return table.slice(0, len(rows))
    starts = [i for i in range(len(rows)) if not i or rows[i] != rows[i - 1] + 1]
    if len(starts) > FEW:
        return _taken(table, array("q", rows))
    ends = [*starts[1:], len(rows)]
    stretches = [table.slice(rows[start], end - start) for start, end in zip(starts, ends, strict=True)]
    return pa.concat_tables(stretches).combine_chunks()


def only(table: pa.Table, *trial_ids: str) -> pa.Table:
    """The rows of some trials. Without numpy, which costs more than to read one trial's rows."""
    wanted, ids = set(trial_ids), table.column("trial_id").to_pylist() if trial_ids else []
    return _picked(table, [i for i, each in enumerate(ids) if each in wanted])


def at_epoch(table: pa.Table, epoch: int) -> pa.Table:
    """The rows of one epoch, in the same way."""
    epochs = [each for chunk in table.column("epoch").chunks for each in _integers(chunk)]
    return _picked(table, [i for i, each in enumerate(epochs) if each == epoch])


def _integers(chunk: pa.Array) -> list[int]:
    """Of 64 bits, none of them null. Thirty times as fast as Arrow's own way."""
    held = memoryview(chunk.buffers()[1]).cast("q") if len(chunk) else ()
    return list(held[chunk.offset : chunk.offset + len(chunk)])


@dataclass(frozen=True, slots=True)
class Look:
    """What one consistent look at a sweep saw."""

    header: Header
    trials: pa.Table
    tag: str
    """Of the object that holds the trials."""
    live: pa.Table
    parts: tuple[pa.Table, ...] = ()


READERS = 10
"""So many objects are read at once: a bucket takes milliseconds to answer, and botocore keeps this many connections."""
_T = TypeVar("_T")


def at_once(ask: Callable[[str], _T], keys: Collection[str]) -> list[_T]:
    """The answers in the order of the keys, of which there may be tens of thousands."""
    if len(keys) < 2:
        return [ask(key) for key in keys]
    from concurrent.futures import ThreadPoolExecutor  # not for commands that need one object

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(ask, keys))


class NewerError(DamagedError):
    """A sweep that a later version of mixmo wrote, in a way that this one cannot read, or cannot write without loss."""

    def __init__(self, what: str, advice: str = "Upgrade mixmo, here and wherever this sweep is read or run") -> None:
        super().__init__(what, advice)


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
        return self.events_of(self.folder.read(f"{self.key}/events.parquet"))

    def events_of(self, stored: Stored | None) -> list[Event]:
        """The events of what lies where they should."""
        if stored is None:
            return []
        name, required = f"{self.folder}/{self.key}/events.parquet", ("time", "kind", "text")
        table = decode(stored.data, name, EVENTS_SCHEMA, required, advice=_NO_RESULT)
        return [Event(**record) for record in records(fit(table, EVENTS_SCHEMA))]

    def trials(self) -> tuple[pa.Table, Header, str]:
        """The trials, what their footer says, and the tag of `trials.parquet`. Raises NotFoundError, DamagedError.

        Where an older driver has overwritten them, the copy that has a higher fence holds.
        """
        for _ in range(4):
            table, header, tag = self._trials("trials.parquet")
            above = max(self.copies() if header.copied else [0])
            if above <= header.fence:
                return table, header, tag
            with contextlib.suppress(NotFoundError):  # a newer driver has put its own in this one's place
                return *self._trials(f"trials-{above}.parquet")[:2], tag
        raise ChangedError(f"{self.folder}/{self.key}/trials.parquet keeps changing", "Try again")

    def overwritten(self) -> bool:
        """Whether `trials.parquet` is an older driver's, and readers take a copy instead."""
        return self._trials("trials.parquet")[1].fence < self.trials()[1].fence

    def _trials(self, name: str) -> tuple[pa.Table, Header, str]:
        key = f"{self.key}/{name}"
        stored = self.folder.read(key)
        if stored is None:
            raise self._missing()
        return *self.trials_of(stored, key), stored.tag

    def trials_of(self, stored: Stored, key: str | None = None) -> tuple[pa.Table, Header]:
        """The trials, and what their footer says, of an object that holds them. Raises DamagedError."""
        key = key or f"{self.key}/trials.parquet"
        self._check_layout(stored.data, key)
        table = decode(stored.data, f"{self.folder}/{key}", TRIALS_SCHEMA, TRIALS_REQUIRED)
        try:
            return table, Header.of(table)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"{self.folder}/{key} was not written by mixmo: its footer is not ours"
            raise DamagedError(text, _RESTORE) from error

    def copies(self) -> list[int]:
        """The fences of the copies of the trials, and 0."""
        return [0, *(int(match[1]) for match in map(COPY.fullmatch, self.folder.names(self.key)) if match)]

    def copy_key(self, fence: int) -> str:
        return f"{self.key}/trials-{fence}.parquet"

    def drop_copies(self, below: int) -> None:
        """Delete the copies of drivers that were before this fence."""
        for fence in self.copies():
            if 0 < fence < below:
                self.folder.delete(self.copy_key(fence))

    def _check_layout(self, data: bytes, key: str) -> None:
        """Before anything else is made of the table: of a later layout, nothing can be told but its number."""
        with contextlib.suppress(pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError):
            layout = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[b"mixmo"]).get("layout", LAYOUT)
            if layout > LAYOUT:
                text = f"{self.folder}/{key} was written by a later mixmo (layout {layout}; this one reads {LAYOUT})"
                raise NewerError(text)

    def look(self, wanted: Wanted | None = ALL, *, tries: int = 8) -> Look:
        """Everything at one moment, without the parts if none of them is wanted. Begins again when an object that was
        named is gone: the sweep moved on.
        """
        for last in (False,) * tries + (True,):
            try:
                return self._look(wanted)
            except ChangedError:
                if last:
                    raise
                time.sleep(0.05)
        raise AssertionError("the last try returns or raises")

    def _look(self, wanted: Wanted | None) -> Look:
        fence = max((int(match[2]) for match in self.files() if match[1] == "live"), default=0)
        for _ in range(4):
            live = self.folder.read(self.live_key(fence))
            trials, header, tag = self.trials()
            if header.fence == fence and live is not None:
                rows = self._epochs(live, self.live_key(fence), wanted or ALL)
                return Look(header, trials, tag, rows, tuple(self.parts(header.parts, wanted)) if wanted else ())
            fence = header.fence
        raise self._gone(self.live_key(fence))

    def live_key(self, fence: int) -> str:
        return f"{self.key}/epochs/live-{fence}.parquet"

    def parts(self, names: Collection[str], wanted: Wanted = ALL) -> list[pa.Table]:
        """Files of epochs by their names, each in one request and several at once. Raises as `part`."""
        return at_once(lambda name: self.part(name, wanted), names)

    def part(self, name: str, wanted: Wanted = ALL) -> pa.Table:
        """A file of epochs by its name. Raises ChangedError if it is gone, DamagedError if it is none."""
        key = f"{self.key}/epochs/{name}"
        stored = self.folder.read(key)
        if stored is None:
            raise self._gone(key)
        return self._epochs(stored, key, wanted)

    def _epochs(self, stored: Stored, key: str, wanted: Wanted) -> pa.Table:
        name, advice = f"{self.folder}/{key}", RERUN if "/live-" in key else _RESTORE
        return decode(stored.data, name, EPOCHS_SCHEMA, EPOCHS_REQUIRED, wanted, advice=advice)

    def files(self) -> list[re.Match[str]]:
        """The files of epochs that lie there, whether they count or not: (kind, fence, seq)."""
        return [match for match in map(EPOCHS_FILE.fullmatch, self.folder.names(f"{self.key}/epochs")) if match]

    def strangers(self) -> list[str]:
        """Names in the folder of epochs that are of no file of epochs."""
        return [name for name in self.folder.names(f"{self.key}/epochs") if not EPOCHS_FILE.fullmatch(name)]

    def _gone(self, key: str) -> ChangedError:
        return ChangedError(f"{self.folder}/{key} is named but not there", RERUN if "/live-" in key else _RESTORE)

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
