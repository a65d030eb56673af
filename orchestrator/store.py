"""Where results live, and how rows get in and out. Nobody else knows a path, and readers need no server.

    sweeps/<name>/sweep.yaml               the sweep file as it was given
    sweeps/<name>/lease.json               which driver may write here, and its fence
    sweeps/<name>/trials.parquet           one row per trial; its footer names the parts that count
    sweeps/<name>/epochs/live-<fence>.parquet         rows of running trials, replaced whole
    sweeps/<name>/epochs/part-<fence>-<seq>.parquet   rows that are settled; never changed
    sweeps/<name>/events.parquet           what happened, the last 1,000
    trials/<trial_id>/<fence>-<attempt>-<token>/      checkpoints and logs of one attempt, shared by all sweeps

The driver is the only writer of `sweeps/<name>/`; a gang writes only in the folder of its attempt. A write goes
part, then trials, then live; a read goes live, then trials, then the parts named there. So a row is in at least one
place at every moment, and of two rows with one key the highest (fence, attempt, seq) holds.

`trials.parquet` and `lease.json` change only by compare-and-swap. That makes the fence a fence: the first write of a
new driver makes every later one of its predecessor fail.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import MixmoError, NotFoundError, RefusedError, UnreachableError, UsageError
from orchestrator.rows import (
    EPOCHS_SCHEMA,
    FINAL,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    records,
    to_table,
    trial_rows,
)

LEASE_S = 60.0
"""A lease that nobody has renewed for this long may be taken over from anywhere."""
EVENTS_KEPT = 1000
LIVE_BYTES = 1 << 20
"""A live file that has grown past this has its rows sealed into a part."""
MERGED_AT = 8
"""So many parts of about one size are merged into one."""
OUTLIVES_S = 3600.0
"""What no footer names any more stays this long, for those who have listed the folder but not read it yet."""
LINGER_S = 60.0
"""Sealed rows stay in the live file this long too, so that one listing of `epochs/` always sees them somewhere."""
LOG_BYTES = 1 << 18

_CHECKPOINT = re.compile(r"epoch-(\d{5,})-([0-9a-f]{16})\.pt")
_ATTEMPT = re.compile(r"(\d+)-(\d+)-([A-Za-z0-9_]+)")
_EPOCHS_FILE = re.compile(r"(live|part)-(\d+)(?:-(\d+))?\.parquet")


class LeaseLostError(RefusedError):
    """Another driver has taken the sweep over: this one must stop, and what it has not written yet is not its own."""


class DamagedError(UnreachableError):
    """An object is there, but it is not what its name or its format says."""


# ------------------------------------------------------------------------------------------------------------ objects


@dataclass(frozen=True, slots=True)
class Stored:
    data: bytes
    tag: str
    """Tells one content from another, as an ETag does."""


class Folder:
    """Objects by key (`a/b/c`) under a folder: the few operations that an object store has too, and no more.

    An object is replaced whole: a reader sees the old one or the new one, also after a crash. Every OSError but
    "not there" becomes UnreachableError, leaves what was there as it was, and may be retried.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str) -> Stored | None:
        """The object, or None where there is none."""
        with self._explained("read", key):
            try:
                data = self.path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stored(data, _tag(data))

    def put(self, key: str, data: bytes) -> None:
        """Make or replace an object."""
        with self._explained("write", key), self._staged(key, data) as temporary:
            os.replace(temporary, self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        """Make an object; False, and no change, where there is one."""
        with self._explained("write", key), self._staged(key, data) as temporary:
            return _link(temporary, self.path(key))

    def upload(self, key: str, source: Path) -> bool:
        """As `create`, from a file of any size."""
        with self._explained("write", key), source.open("rb") as data, self._staged(key, data) as temporary:
            return _link(temporary, self.path(key))

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Replace the object whose tag this is (None: there is none yet). The new tag; None where it has changed."""
        with self._explained("write", key):
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path(key).with_name(".lock")):
                held = self.read(key)
                if (held.tag if held else None) != tag:
                    return None
                self.put(key, data)
        return _tag(data)

    def delete(self, key: str) -> None:
        with self._explained("delete", key):
            self.path(key).unlink(missing_ok=True)

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        """Sorted names of the objects (or the folders) right under a prefix; names that begin with a dot are ours."""
        with self._explained("list", prefix):
            try:
                with os.scandir(self.path(prefix)) as entries:
                    found = [entry.name for entry in entries if entry.is_dir() == folders]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in found if not name.startswith("."))

    def modified(self, key: str) -> float:
        """When the object was written, in seconds by the store's own clock; 0 where there is none."""
        with self._explained("read", key):
            try:
                return self.path(key).stat().st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return 0.0

    def clock(self, key: str) -> float:
        """The time by the clock that `modified` uses, which on a network folder is not this machine's."""
        with self._explained("write", key), self._staged(key, b"") as temporary:
            return temporary.stat().st_mtime

    def probe(self) -> None:
        """Raise UnreachableError if nothing can be written here."""
        with self._explained("write", "."):
            self.root.mkdir(parents=True, exist_ok=True)
            with self._staged("probe", b"mixmo"):
                pass

    @contextlib.contextmanager
    def _staged(self, key: str, data: bytes | BinaryIO) -> Iterator[Path]:
        """The data in a file beside the object, on disk. The name begins with a dot and does not end in .parquet, so
        that no glob of a Parquet reader finds it when a kill leaves it behind.
        """
        final = self.path(key)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(6)}.tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                shutil.copyfileobj(data, file, 1 << 20) if not isinstance(data, bytes) else file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(final.parent)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreachableError(
                f"cannot {verb} {self.path(key)}: {reason}. What was stored before is unharmed. Make the results "
                f"folder readable and writable, with room on its disk, and run the same command again."
            ) from error


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _link(source: Path, target: Path) -> bool:
    """Give a file its final name unless that is taken. A rename would overwrite, so it is a hard link."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():  # a file system without hard links: attempts have names of their own, so nobody races
            return False
        os.replace(source, target)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # some network folders cannot; all else is real
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(lock: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Hold a lock that dies with its process. Where the file system has none, the fence alone protects."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor, lock, patience_s)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, lock: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"a process holds {lock} and does not move (`fuser {lock}` names it; kill -9 it)"
                ) from error
            time.sleep(0.01)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
                return None
            raise


# -------------------------------------------------------------------------------------------------------------- lease


@dataclass(frozen=True, slots=True)
class Process:
    """A process, so that another on the same machine can tell whether it still lives."""

    host: str
    boot: str
    """Where process numbers mean the same: this boot of this machine, and this namespace of numbers."""
    pid: int
    started: str
    """Clock ticks from boot to its start: a process number is used again, the pair is not."""

    @classmethod
    def current(cls) -> Self:
        host = socket.gethostname()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        except OSError:
            boot = host
        return cls(host=host, boot=boot, pid=os.getpid(), started=_started(os.getpid()) or "")

    def sees_alive(self, other: "Process") -> bool | None:
        """Whether the other still lives; None where this process cannot tell."""
        started = _started(other.pid) if self.boot == other.boot else ""
        if started is None:
            return False
        return started == other.started if started and other.started else None


def _started(pid: int) -> str | None:
    """When the process began, "" if that is not to be known, None if there is no such process (or only its corpse)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return ""
        return ""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a sweep. It ends when it is released, when its process is seen to be dead, or, where nobody
    can see that process, when it was not renewed for so long.
    """

    holder: str
    """For people: who, where."""
    fence: int
    """Rises with every lease of the sweep."""
    process: Process
    nonce: str
    taken_at: datetime
    renewed_at: datetime
    duration_s: float = LEASE_S
    released: bool = False
    age_s: float = 0.0
    """Seconds since the renewal when it was read, by the store's clock. Not stored."""

    @property
    def expired(self) -> bool:
        return self.over(Process.current())

    def over(self, observer: Process) -> bool:
        alive = observer.sees_alive(self.process)
        return self.released or alive is False or (alive is None and self.age_s > self.duration_s)

    def encode(self) -> bytes:
        record = {**asdict(self), "taken_at": self.taken_at.isoformat(), "renewed_at": self.renewed_at.isoformat()}
        del record["age_s"]
        return json.dumps(record, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, age_s: float) -> Self:
        """Raises ValueError, KeyError or TypeError if this is no lease."""
        record = json.loads(data)
        record["process"] = Process(**record["process"])
        for name in ("taken_at", "renewed_at"):
            record[name] = datetime.fromisoformat(record[name])
        return cls(**record, age_s=age_s)


# ------------------------------------------------------------------------------------------------------------- tables


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


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    """unfinished, rows, duplicate, metrics, checkpoint, missing, damaged or unnamed."""
    trial_id: str | None
    text: str
    advice: str


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


def _encode(table: pa.Table) -> bytes:
    """Parquet bytes. Measured: dictionaries pay for words, byte streams for floats, and both together most."""
    words = [spec.name for spec in table.schema if spec.type == pa.string()]
    floats = [spec.name for spec in table.schema if spec.type == pa.float64()]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=words, use_byte_stream_split=floats, row_group_size=1 << 17
    )
    return bytes(sink.getvalue().to_pybytes())


def _decode(data: bytes, key: str) -> pa.Table:
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{key} is no Parquet file ({error}). `mixmo verify` says what it held.") from error


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
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

    fitting = [_fit(each, EPOCHS_SCHEMA) for each in tables]
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


# -------------------------------------------------------------------------------------------------------------- store


@dataclass(frozen=True, slots=True)
class Look:
    """What one consistent look at a sweep saw."""

    header: Header
    trials: pa.Table
    tag: str
    """Of the object that holds the trials."""
    live: pa.Table
    parts: tuple[pa.Table, ...] = ()


class _ChangedError(Exception):
    """An object that was named is gone: the sweep moved on while it was read."""


class ResultStore:
    """Every result of every sweep under one folder. Readers see a consistent state whatever writers do or die of."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @classmethod
    def open(cls, uri: str | Path, *, create: bool = False) -> Self:
        """The store at a folder or a `file://` URI; a folder that is not there is an empty store.

        `create` makes the folder and proves that it can be written. Raises UnreachableError if it cannot be read
        (or written), UsageError for a URI that this version does not know.
        """
        folder = Folder(_root(str(uri)))
        if folder.root.exists() and not folder.root.is_dir():
            raise UnreachableError(f"{folder} is a file; --results (or MIXMO_RESULTS) names a folder")
        if create:
            folder.probe()
        else:
            folder.names("")
        return cls(folder)

    @property
    def uri(self) -> str:
        return str(self.folder)

    # ---- sweeps

    def sweeps(self) -> list[str]:
        """Names of the sweeps that have begun, sorted."""
        names = self.folder.names("sweeps", folders=True)
        return [name for name in names if "trials.parquet" in self.folder.names(f"sweeps/{name}")]

    def sweep_file(self, sweep: str) -> str:
        """The sweep file of the latest run, as it was given."""
        stored = self.folder.read(f"{_sweep_key(sweep)}/sweep.yaml")
        if stored is None:
            raise self._no_sweep(sweep)
        return stored.data.decode()

    def lease(self, sweep: str) -> Lease | None:
        """Who runs the sweep, or did and died; None when nobody does. `expired` tells the two apart."""
        key = f"{_sweep_key(sweep)}/lease.json"
        held = _lease(self.folder, key, time.time)
        return None if held is None or held.released else held

    def trials(self, sweep: str) -> pa.Table:
        """One row per trial, its latest state; columns of TRIALS_SCHEMA."""
        return _fit(self._trials(sweep)[0], TRIALS_SCHEMA)

    def trial_rows(self, sweep: str) -> list[TrialRow]:
        return trial_rows(self._trials(sweep)[0])

    def epochs(self, sweep: str) -> pa.Table:
        """One row per trial and epoch, sorted by both; columns of EPOCHS_SCHEMA.

        Of a trial that begins again, the epochs that it has yet to repeat are left out.
        """
        seen = self.look(sweep)
        ids, reached = seen.trials.column("trial_id").to_pylist(), seen.trials.column("epoch").to_pylist()
        return merge([seen.live, *seen.parts], dict(zip(ids, reached, strict=True)))

    def epoch_rows(self, sweep: str, trial_id: str | None = None) -> list[EpochRow]:
        table = self.epochs(sweep)
        if trial_id is not None:
            wanted = [i for i, each in enumerate(table.column("trial_id").to_pylist()) if each == trial_id]
            table = table.slice(wanted[0], len(wanted)) if wanted else table.slice(0, 0)  # sorted, so side by side
        return epoch_rows(table)

    def events(self, sweep: str) -> list[Event]:
        """The last 1,000, oldest first."""
        key = f"{_sweep_key(sweep)}/events.parquet"
        stored = self.folder.read(key)
        return [Event(**record) for record in records(_decode(stored.data, key))] if stored else []

    def snapshot(self, sweep: str) -> Snapshot:
        """What a screen shows, from three objects whose size does not grow with the epochs done."""
        seen = self.look(sweep, parts=False)
        return Snapshot(seen.header, trial_rows(seen.trials), newest(epoch_rows(seen.live)), self.events(sweep))

    def find(self, prefix: str) -> list[TrialRow]:
        """The rows, one for each sweep that has it, of the one trial whose id begins so. Raises NotFoundError."""
        found = [row for sweep in self.sweeps() for row in self.trial_rows(sweep) if row.trial_id.startswith(prefix)]
        ids = sorted({row.trial_id for row in found})
        if not ids:
            raise NotFoundError(f"no trial in {self} has an id that begins with {prefix!r}; `mixmo ls` lists sweeps")
        if len(ids) > 1:
            raise NotFoundError(f"{prefix!r} begins {len(ids)} trial ids ({', '.join(ids[:5])}...): give more digits")
        return found

    def __str__(self) -> str:
        return self.uri

    # ---- attempts

    def attempt(self, trial_id: str, fence: int, attempt: int, token: str) -> "AttemptFolder":
        """The folder of one attempt, for its gang to write in."""
        if not re.fullmatch(r"[0-9a-f]{12}", trial_id) or not _ATTEMPT.fullmatch(f"{fence}-{attempt}-{token}"):
            raise ValueError(f"no attempt can be called {trial_id}/{fence}-{attempt}-{token}")
        return AttemptFolder(self.folder, f"trials/{trial_id}/{fence}-{attempt}-{token}")

    def checkpoints(self, trial_id: str) -> list[str]:
        """Keys of a trial's checkpoints over all attempts, the one of the latest epoch first. `fetch` checks them."""
        folders = [AttemptFolder(self.folder, f"trials/{trial_id}/{name}") for name in self._attempts(trial_id)]
        return sorted((key for folder in folders for key in folder.checkpoints()), key=_epoch_of, reverse=True)

    def fetch(self, key: str, local: Path) -> Path:
        """Copy a stored file to a local path. A checkpoint whose content is not what its name says is refused.

        Raises NotFoundError if it is not there, DamagedError if its content does not match its name.
        """
        stored = self.folder.read(key)
        if stored is None:
            raise NotFoundError(f"{self}/{key} is not there")
        if not _matches(key, stored.tag):
            raise DamagedError(f"{self}/{key} is damaged: its SHA-256 begins with {stored.tag[:16]}; use an older one")
        Folder(local.parent).put(local.name, stored.data)
        return local

    def discard(self, key: str) -> None:
        """Delete a file of an attempt: a checkpoint that a newer one has made needless."""
        if not key.startswith("trials/"):
            raise ValueError(f"{key} is not a file of an attempt")
        self.folder.delete(key)

    def log(self, trial_id: str, rank: int = 0) -> str:
        """What a rank of the newest attempt printed, its last 256 KiB. Raises NotFoundError."""
        keys = [f"trials/{trial_id}/{name}/log-{rank}.txt" for name in self._attempts(trial_id)]
        for key in sorted(keys, key=self.folder.modified, reverse=True):
            stored = self.folder.read(key)
            if stored is not None:
                return stored.data.decode(errors="replace")
        raise NotFoundError(
            f"no log of rank {rank} of trial {trial_id} in {self}: it has not begun, or not yet reported"
        )

    def _attempts(self, trial_id: str) -> list[str]:
        return [name for name in self.folder.names(f"trials/{trial_id}", folders=True) if _ATTEMPT.fullmatch(name)]

    # ---- writing

    def writer(
        self,
        sweep: str,
        *,
        sweep_text: str,
        holder: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        process: Process | None = None,
    ) -> "SweepWriter":
        """The one writer of a sweep. Raises RefusedError while another process holds its lease."""
        process = process or Process.current()
        return SweepWriter(self, sweep, sweep_text=sweep_text, holder=holder, now=now, process=process)

    # ---- reading, consistently

    def _trials(self, sweep: str) -> tuple[pa.Table, str]:
        key = f"{_sweep_key(sweep)}/trials.parquet"
        stored = self.folder.read(key)
        if stored is None:
            raise self._no_sweep(sweep)
        return _decode(stored.data, key), stored.tag

    def _no_sweep(self, sweep: str) -> NotFoundError:
        begun = self.sweeps()
        have = f"it has {', '.join(begun[:10])}{' ...' if begun[10:] else ''}" if begun else "nothing has run there yet"
        return NotFoundError(f"no sweep {sweep} in {self}: {have}. --results or MIXMO_RESULTS names another place")

    def look(self, sweep: str, *, parts: bool = True, tries: int = 8) -> Look:
        """Live, then trials, then parts: a row that moves is met at least once. Begin again when an object is gone."""
        for last in (False,) * tries + (True,):
            try:
                return self._look(sweep, parts)
            except _ChangedError as gone:
                if last:
                    raise DamagedError(
                        f"{self}: {gone} is named but not there; `mixmo verify {sweep}` says more"
                    ) from gone
                time.sleep(0.05)
        raise AssertionError("unreachable")

    def _look(self, sweep: str, parts: bool) -> Look:
        epochs = f"{_sweep_key(sweep)}/epochs"
        fence = max((int(name[2]) for name in self.epochs_files(sweep) if name[1] == "live"), default=0)
        for _ in range(4):
            live = self.folder.read(f"{epochs}/live-{fence}.parquet")
            trials, tag = self._trials(sweep)
            header = Header.of(trials)
            if header.fence == fence and live is not None:
                break
            fence = header.fence
        else:
            raise _ChangedError(f"{epochs}/live-{fence}.parquet")
        rows = _decode(live.data, f"{epochs}/live-{fence}.parquet")
        names = [f"{epochs}/{name}" for name in header.parts] if parts else []
        return Look(header, trials, tag, rows, tuple(map(self.read_part, names)))

    def read_part(self, key: str) -> pa.Table:
        stored = self.folder.read(key)
        if stored is None:
            raise _ChangedError(key)
        return _decode(stored.data, key)

    def epochs_files(self, sweep: str) -> list[re.Match[str]]:
        names = self.folder.names(f"{_sweep_key(sweep)}/epochs")
        return [match for match in map(_EPOCHS_FILE.fullmatch, names) if match]


def _root(uri: str) -> Path:
    if uri.startswith("s3://"):
        raise UsageError(f"{uri}: buckets are not built yet; name a folder that all machines share")
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    if re.match(r"[a-z][a-z0-9+.-]*://", uri):
        raise UsageError(f"{uri}: results lie in a folder (or, later, at s3://bucket/prefix)")
    return Path(uri).expanduser().absolute()


def _sweep_key(sweep: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,128}", sweep):
        raise NotFoundError(f"{sweep!r} is no name of a sweep: those have small letters, digits, _ and - only")
    return f"sweeps/{sweep}"


def _lease(folder: Folder, key: str, clock: Callable[[], float]) -> Lease | None:
    modified, stored = folder.modified(key), folder.read(key)
    if stored is None:
        return None
    try:
        return Lease.decode(stored.data, age_s=max(0.0, clock() - modified))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder}/{key} is damaged ({error}). If no driver runs the sweep, delete it.") from error


def _matches(key: str, digest: str) -> bool:
    """Whether a content with this SHA-256 may bear this name. Names without a hash match all."""
    match = _CHECKPOINT.fullmatch(key.rpartition("/")[2])
    return match is None or digest.startswith(match[2])


class AttemptFolder:
    """The files of one attempt at one trial. Only the gang that runs the attempt writes here."""

    def __init__(self, folder: Folder, key: str) -> None:
        self._folder = folder
        self.key = key

    def path_of(self, name: str) -> str:
        """The store key of a file of this attempt."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name!r} is no name for a file of an attempt")
        return f"{self.key}/{name}"

    def put_file(self, local: Path, name: str) -> str:
        """Store a copy of a local file for good and return its key. The same again is fine, another content is not.

        A checkpoint is named by its content (`epoch-00012-<16 hex of its SHA-256>.pt`) and held to that name.
        """
        key, digest = self.path_of(name), _file_digest(local)
        if not _matches(key, digest):
            raise DamagedError(f"{local} is not what the name {name} says: its SHA-256 begins with {digest[:16]}")
        if not self._folder.upload(key, local):
            held = self._folder.read(key)
            if held is None or held.tag != digest:
                raise ValueError(f"{key} exists with another content: the files of an attempt are never changed")
        return key

    def put_log(self, rank: int, text: str, environ: Mapping[str, str] = os.environ) -> str:
        """Replace the log of a rank by this text: its last 256 KiB, without the secrets of the environment."""
        key = self.path_of(f"log-{rank}.txt")
        self._folder.put(key, without_secrets(text, environ).encode(errors="replace")[-LOG_BYTES:])
        return key

    def checkpoints(self) -> list[str]:
        """Keys of this attempt's checkpoints, the latest epoch first."""
        names = [name for name in self._folder.names(self.key) if _CHECKPOINT.fullmatch(name)]
        return sorted((f"{self.key}/{name}" for name in names), key=_epoch_of, reverse=True)


def _epoch_of(key: str) -> tuple[int, str]:
    match = _CHECKPOINT.fullmatch(key.rpartition("/")[2])
    return (int(match[1]) if match else 0, key)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """The text with the values of variables that are called like secrets starred out."""
    for name, value in environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", name, re.IGNORECASE):
            text = text.replace(value, "***")
    return text


# ------------------------------------------------------------------------------------------------------------- writer


@dataclass(slots=True)
class _Batch:
    """What one flush writes, taken at one moment."""

    rows: list[TrialRow]
    sealing: list[EpochRow]
    staying: list[EpochRow]
    events: list[Event]
    changes: Counter[str]


class SweepWriter:
    """Rows of one sweep on their way to the store. Threads may share it.

    `put`, `add` and `event` only remember; `flush` writes. What a flush could not write stays remembered, so that a
    store that was away costs nothing but time. Sweep and fence of every row are the writer's own.
    """

    def __init__(
        self,
        store: ResultStore,
        sweep: str,
        *,
        sweep_text: str,
        holder: str | None,
        now: Callable[[], datetime],
        process: Process,
    ) -> None:
        self.store, self.sweep = store, sweep
        self._folder, self._key, self._now = store.folder, _sweep_key(sweep), now
        self._lock = threading.RLock()  # what is remembered
        self._writing = threading.RLock()  # one flush at a time
        self._leasing = threading.Lock()
        self._rows: dict[str, TrialRow] = {}
        self._live: dict[tuple[str, int], EpochRow] = {}
        self._lingering: list[tuple[float, list[EpochRow]]] = []
        self._events: list[Event] = []
        self._changes: Counter[str] = Counter()  # of trials, live and events, so far ...
        self._written: Counter[str] = Counter()  # ... and how many of them are in the store
        self._header, self._tag, self._seq = Header(), None, 0
        self._live_bytes, self._next_flush, self._closed = 0.0, 0.0, False
        self._lease, self._lease_tag = self._take(holder, process)
        try:
            self._folder.put(f"{self._key}/sweep.yaml", sweep_text.encode())
            self._take_over()
        except MixmoError:
            with contextlib.suppress(MixmoError):
                self._release()
            raise

    _tag: str | None

    @property
    def fence(self) -> int:
        return self._lease.fence

    @property
    def rows(self) -> list[TrialRow]:
        """The latest row of every trial in order of position, also those that earlier runs left."""
        with self._lock:
            return sorted(self._rows.values(), key=lambda row: (row.position, row.trial_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close(done=False)
        elif not issubclass(kind, LeaseLostError):
            with contextlib.suppress(MixmoError):  # the error that is on its way says more
                self.close(done=False)

    # ---- remembering

    def put(self, rows: Iterable[TrialRow]) -> None:
        """The latest state of trials. A row that is older than the one held is dropped.

        Raises RefusedError if two configs share an id, ValueError for a finished trial that would become unfinished.
        """
        with self._lock:
            for given in rows:
                row = given.replace(sweep=self.sweep, fence=self.fence)
                held = self._rows.get(row.trial_id)
                if held is None or _succeeds(row, held):
                    self._rows[row.trial_id] = row
                    self._changes["trials"] += 1

    def add(self, rows: Iterable[EpochRow]) -> None:
        """Epochs that are done. Of two rows of one epoch the one with the highest order holds."""
        with self._lock:
            for given in rows:
                row = replace(given, sweep=self.sweep, fence=self.fence)
                held = self._live.get((row.trial_id, row.epoch))
                if held is None or row.order >= held.order:
                    self._live[row.trial_id, row.epoch] = row
                    self._changes["live"] += 1

    def event(self, kind: str, text: str, trial_id: str | None = None, cause: str | None = None) -> None:
        """Something to tell people; only the last 1,000 are kept."""
        with self._lock:
            self._events = [*self._events[1 - EVENTS_KEPT :], Event(self._now(), kind, text, trial_id, cause)]
            self._changes["events"] += 1

    def forget(self, trial_ids: Iterable[str]) -> None:
        """Drop the rows of trials that are planned no more. Those that have done an epoch stay: they are results."""
        with self._lock:
            for trial_id in trial_ids:
                if trial_id in self._rows and self._rows[trial_id].epoch == 0:
                    del self._rows[trial_id]
                    self._changes["trials"] += 1

    def snapshot(self) -> Snapshot:
        """As `ResultStore.snapshot`, from memory: with what is not written yet."""
        with self._lock:
            rows, header = self.rows, self._header
            live, events = newest(list(self._live.values())), tuple(self._events)
        return Snapshot(replace(header, totals=totals(rows), written_at=self._now()), rows, live, events)

    # ---- writing

    def flush(self, *, force: bool = False) -> bool:
        """Write what has changed, if it is time to (or `force`); whether anything was written.

        The more a flush costs the rarer it is: under a twentieth of the time. Raises UnreachableError, and may be
        called again; raises LeaseLostError when another driver has taken over.
        """
        with self._writing:
            began = time.monotonic()
            batch = self._batch()
            if batch.changes == self._written or not (force or began >= self._next_flush):
                return False
            try:
                self._write(batch)
            finally:
                ended = time.monotonic()
                self._next_flush = ended + max(1.0, 20 * (ended - began))
            return True

    def close(self, *, done: bool) -> None:
        """Write all there is, say whether the sweep is done, and give the lease back. Twice is fine."""
        with self._writing:
            if self._closed:
                return
            with self._lock:
                self._changes["trials"] += 1
                self._header = replace(self._header, done=done)
            self._write(self._batch())
            self._release()
            self._closed = True

    def _batch(self) -> _Batch:
        with self._lock:
            full = self._live_bytes > LIVE_BYTES
            ended = {trial_id for trial_id, row in self._rows.items() if row.state in FINAL}
            sealing: list[EpochRow] = []
            staying: list[EpochRow] = []
            for row in self._live.values():
                (sealing if full or row.trial_id in ended else staying).append(row)
            if sealing:
                self._changes.update(["trials", "live"])
            return _Batch(self.rows, sealing, staying, self._events, Counter(self._changes))

    def _write(self, batch: _Batch) -> None:
        """Part, then trials, then live: after each step all that was readable before still is."""
        changed = {name for name, count in batch.changes.items() if count != self._written[name]}
        if "trials" in changed:
            parts, merged = self._write_parts(batch.sealing)
            self._write_trials(batch.rows, parts, merged)
            self._adopt(batch.sealing)
        self._written["trials"] = batch.changes["trials"]
        if "live" in changed:
            self._write_live(batch.staying)
        self._written["live"] = batch.changes["live"]
        if "events" in changed:
            records = [asdict(event) for event in batch.events]
            self._folder.put(f"{self._key}/events.parquet", _encode(pa.Table.from_pylist(records, EVENTS_SCHEMA)))
        self._written["events"] = batch.changes["events"]

    def _write_parts(self, sealing: Sequence[EpochRow]) -> tuple[dict[str, int], list[str]]:
        """Write what is to be sealed or merged; the parts that count then, and those that count no more."""
        parts, seq = dict(self._header.parts), self._seq
        if sealing:
            parts |= self._write_part(seq, [to_table(sealing, EPOCHS_SCHEMA)])
            seq += 1
        merging = _to_merge(parts)
        if merging:
            tables = [self.store.read_part(f"{self._key}/epochs/{name}") for name in merging]
            parts = {name: rows for name, rows in parts.items() if name not in merging}
            parts |= self._write_part(seq, tables)
        return parts, merging

    def _write_part(self, seq: int, tables: Sequence[pa.Table]) -> dict[str, int]:
        """A part is named by the next write of trials only, so one that a failed flush left is simply replaced."""
        name, table = f"part-{self.fence}-{seq:06d}.parquet", merge(tables)
        self._folder.put(f"{self._key}/epochs/{name}", _encode(table))
        return {name: len(table)}

    def _write_trials(self, rows: Sequence[TrialRow], parts: dict[str, int], merged: Iterable[str]) -> None:
        header, data = self._trials_object(rows, parts, merged)
        self._swap_trials(data)
        for name in set(self._header.retired) - set(header.retired):
            self._folder.delete(f"{self._key}/epochs/{name}")
        self._header = header

    def _trials_object(
        self, rows: Sequence[TrialRow], parts: dict[str, int], merged: Iterable[str]
    ) -> tuple[Header, bytes]:
        now = self._now()
        retired = {
            name: since
            for name, since in self._header.retired.items()
            if (now - datetime.fromisoformat(since)).total_seconds() <= OUTLIVES_S
        }
        header = replace(
            self._header,
            fence=self.fence,
            generation=self._header.generation + 1,
            parts=parts,
            retired=retired | dict.fromkeys(merged, now.isoformat()),
            totals=totals(rows),
            written_at=now,
        )
        return header, _encode(to_table(rows, TRIALS_SCHEMA).replace_schema_metadata({"mixmo": header.encode()}))

    def _swap_trials(self, data: bytes) -> None:
        key = f"{self._key}/trials.parquet"
        for _ in range(3):
            tag = self._folder.swap(key, data, self._tag)
            if tag is not None:
                self._tag = tag
                return
            held = self._folder.read(key)
            if held is not None and Header.of(_decode(held.data, key)).fence > self.fence:
                raise self._lost()
            self._tag = held.tag if held else None  # an older driver's, or our own whose answer was lost: ours is newer
        raise UnreachableError(f"{self._folder}/{key} keeps changing under this driver; an older one must still run")

    def _adopt(self, sealed: Sequence[EpochRow]) -> None:
        """The sealed rows now count where the trials say; they linger in the live file for those who read by glob."""
        ours = [int(match[3]) for match in map(_EPOCHS_FILE.fullmatch, self._header.parts) if match and match[3]]
        self._seq = 1 + max([self._seq - 1, *ours])
        with self._lock:
            for row in sealed:
                if self._live.get((row.trial_id, row.epoch)) is row:
                    del self._live[row.trial_id, row.epoch]
        if sealed:
            self._lingering.append((time.monotonic(), list(sealed)))

    def _write_live(self, staying: Sequence[EpochRow]) -> None:
        limit = time.monotonic() - LINGER_S
        self._lingering = [(sealed_at, rows) for sealed_at, rows in self._lingering if sealed_at > limit]
        lingering = [row for _, rows in self._lingering for row in rows]
        data = _encode(merge([to_table([*lingering, *staying], EPOCHS_SCHEMA)]))
        self._folder.put(f"{self._key}/epochs/live-{self.fence}.parquet", data)
        self._live_bytes = len(data) * len(staying) / max(1, len(staying) + len(lingering))

    # ---- the lease

    def renew(self) -> None:
        """Tell all others that this driver lives: at least every third of a minute. Raises LeaseLostError."""
        with self._leasing:
            renewed = replace(self._lease, renewed_at=self._now())
            self._lease_tag = self._swap_lease(renewed)
            self._lease = renewed

    def _take(self, holder: str | None, process: Process) -> tuple[Lease, str]:
        key = f"{self._key}/lease.json"
        for _ in range(5):
            stored = self._folder.read(key)
            held = _lease(self._folder, key, lambda: self._folder.clock(key))
            if held is not None and not held.over(process):
                raise RefusedError(_refusal(self.sweep, held, process))
            now = self._now()
            lease = Lease(
                holder=holder or f"{_user()}@{process.host}",
                fence=1 + max(held.fence if held else 0, *self._fences_seen()),
                process=process,
                nonce=secrets.token_hex(8),
                taken_at=now,
                renewed_at=now,
            )
            tag = self._folder.swap(key, lease.encode(), stored.tag if stored else None)
            if tag is not None:
                return lease, tag
        raise RefusedError(f"several drivers want sweep {self.sweep} at this moment; one of them has it now")

    def _fences_seen(self) -> list[int]:
        """The fences of all files, should the lease be gone: a fence is never given twice."""
        return [0, 0, *(int(match[2]) for match in self.store.epochs_files(self.sweep))]

    def _swap_lease(self, lease: Lease) -> str:
        key = f"{self._key}/lease.json"
        for _ in range(3):
            tag = self._folder.swap(key, lease.encode(), self._lease_tag)
            if tag is not None:
                return tag
            held, stored = _lease(self._folder, key, time.time), self._folder.read(key)
            if held is None or stored is None or held.nonce != self._lease.nonce:
                raise self._lost()
            self._lease_tag = stored.tag  # our own, whose answer was lost
        raise UnreachableError(f"{self._folder}/{key} keeps changing under this driver")

    def _release(self) -> None:
        with self._leasing:
            self._swap_lease(replace(self._lease, released=True))

    def _lost(self) -> LeaseLostError:
        with contextlib.suppress(MixmoError):
            held = self.store.lease(self.sweep)
            if held is not None:
                return LeaseLostError(
                    f"sweep {self.sweep} was taken over by {held.holder} (process {held.process.pid}, fence "
                    f"{held.fence}; ours was {self.fence}), because this driver was not heard of for {LEASE_S:.0f} s. "
                    f"That one goes on; nothing is lost. `mixmo watch {self.sweep}` shows it"
                )
        return LeaseLostError(f"sweep {self.sweep} was taken over by another driver; its fence is above {self.fence}")

    def _take_over(self) -> None:
        """Take in what earlier drivers left: first the rows of running trials, then all trials, under our fence.

        Should an earlier driver still write in between, the swap fails and its rows are taken in as well.
        """
        for _ in range(8):
            self._load()
            self._write_live(list(self._live.values()))
            header, data = self._trials_object(self.rows, dict(self._header.parts), [])
            self._tag = self._folder.swap(f"{self._key}/trials.parquet", data, self._tag)
            if self._tag is not None:
                self._header = header
                return
        raise UnreachableError(f"{self._folder}/{self._key} keeps changing: an older driver must still run; stop it")

    def _load(self) -> None:
        try:
            seen = self.store.look(self.sweep, parts=False)
        except NotFoundError:
            self._header, self._tag = Header(), None
            return
        if seen.header.fence > self.fence:
            raise self._lost()
        self._rows = {row.trial_id: row for row in trial_rows(seen.trials)}
        ended = {trial_id for trial_id, row in self._rows.items() if row.state in FINAL}  # theirs are in the parts
        live = [row for row in epoch_rows(seen.live) if row.trial_id not in ended]
        self._live = {(row.trial_id, row.epoch): row for row in newest(live)}
        self._events, self._tag = self.store.events(self.sweep), seen.tag
        left = [match[0] for match in self.store.epochs_files(self.sweep) if int(match[2]) < self.fence]
        counted, now = {*seen.header.parts, *seen.header.retired}, self._now().isoformat()
        retired = {**seen.header.retired, **{name: now for name in left if name not in counted}}
        self._header = replace(seen.header, done=False, retired=retired)


def _succeeds(row: TrialRow, held: TrialRow) -> bool:
    """Whether a trial's row may take the place of the one held."""
    if held.digest != row.digest:
        raise RefusedError(
            f"two configs share the trial id {row.trial_id} ({held.digest} and {row.digest}): change one setting of "
            f"either, and both can be stored"
        )
    if row.order < held.order:
        return False
    if held.state == "TERMINATED" and row.state != "TERMINATED":
        raise ValueError(f"trial {row.trial_id} is finished and cannot become {row.state}")
    return True


def _to_merge(parts: Mapping[str, int]) -> list[str]:
    """Parts of about one size, once they are many: so a row is rewritten only as often as the table's size has digits
    to the base of 8.
    """
    sizes: dict[int, list[str]] = defaultdict(list)
    for name, rows in parts.items():
        sizes[max(1, rows).bit_length() // 3].append(name)
    return next((names for _, names in sorted(sizes.items()) if len(names) >= MERGED_AT), [])


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number
        return f"user {os.getuid()}"


def _refusal(sweep: str, held: Lease, process: Process) -> str:
    since = held.taken_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    who = (
        f"sweep {sweep} is being run by {held.holder} (process {held.process.pid} on {held.process.host}) since {since}"
    )
    if process.sees_alive(held.process):
        return (
            f"{who}. Watch it with `mixmo watch {sweep}`, or end it with `kill {held.process.pid}` and run this again"
        )
    left = max(1, round(held.duration_s - held.age_s))
    return (
        f"{who}, and was heard of {held.age_s:.0f} s ago. Watch it with `mixmo watch {sweep}`. If it is dead, run this "
        f"again in {left} s: its lease is over then"
    )
