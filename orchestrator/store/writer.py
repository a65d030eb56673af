"""The rows of a running sweep on their way to the store.

A write goes part, then live, then trials, so that every epoch that a trial has reached is there. Rows leave the live
file a minute after the trials have named the part that holds them, so that after each step all that was readable
before still is. `trials.parquet` changes only by compare-and-swap: the first write of a new driver makes every later
one of its predecessor fail.
"""

import contextlib
import operator
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Self

import pyarrow as pa

from orchestrator.errors import MixmoError, NotFoundError, RefusedError, UnreachableError
from orchestrator.rows import (
    EPOCHS_SCHEMA,
    FINAL,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    to_table,
    trial_rows,
)
from orchestrator.store.attempts import without_secrets
from orchestrator.store.lease import HeldLease, LeaseLostError, Process
from orchestrator.store.objects import DamagedError
from orchestrator.store.tables import (
    EVENTS_SCHEMA,
    Event,
    Header,
    Look,
    NewerError,
    Snapshot,
    SweepFiles,
    encode,
    merge,
    totals,
)

EVENTS_KEPT = 1000
LIVE_BYTES = 1 << 20
"""A live file that has grown past this has its rows sealed into a part."""
MERGED_AT = 8
"""So many parts of about one size are merged into one."""
SETTLED_ROWS = 1 << 18
"""A part of so many rows is merged no more while a sweep runs: readers gain little, and the driver would wait long."""
OUTLIVES_S = 3600.0
"""What no footer names any more stays this long, for those who have listed the folder but not read it yet."""
LINGER_S = 60.0
"""Rows stay in the live file this long after they were sealed: one listing of `epochs/` always sees them somewhere."""
LINGER_ROWS = 1 << 17
"""Where rows come in thousands a second, no more than these stay: the live file is written again with every flush."""
PIECE = 256
"""Trials that are encoded together. Of the pieces of a large sweep, a flush makes only those anew that have changed."""
FLUSH_PAUSE, MERGE_PAUSE = 50, 100
"""How many times as long as it took one waits before the next flush or merge: with what it takes to hand thousands of
rows a second over, the store has less than a twentieth of the driver's time (benchmarks/store.py).
"""
RETRY_S = 30.0
"""A store that took nothing is tried again after this at the latest, however long the failing took."""
LOOK_S = 20.0
"""How often a driver looks whether an older one has overwritten its trials, which it would else see when it writes."""


@dataclass(slots=True)
class _Batch:
    """What one flush writes, taken at one moment."""

    rows: list[TrialRow]
    sealing: list[EpochRow]
    staying: list[EpochRow]
    events: list[Event]
    changes: Counter[str]


@dataclass(frozen=True, slots=True)
class Compaction:
    """What `compact` did to the files of epochs."""

    sweep: str
    rows: int
    parts_before: int
    parts_after: int
    bytes_before: int
    """Of the parts that counted."""
    bytes_after: int
    """Of the parts that count now."""
    bytes_waiting: int
    """Of files that count no more and are deleted by a compaction, or a run, when they have not for an hour."""
    bytes_deleted: int
    unread: Sequence[str]
    """Parts that could not be read, and stay as they are."""


class SweepWriter:
    """Rows of one sweep on their way to the store. Threads may share it.

    `put`, `add` and `event` only remember; `flush` writes. What a flush could not write stays remembered, so that a
    store that was away costs nothing but time. Sweep and fence of every row are the writer's own.
    """

    def __init__(
        self,
        files: SweepFiles,
        *,
        sweep_text: str,
        holder: str | None,
        now: Callable[[], datetime],
        process: Process,
        lenient: bool = False,
    ) -> None:
        """`lenient`: as `ResultStore.writer` says."""
        self.sweep, self._files, self._folder, self._key, self._now = files.sweep, files, files.folder, files.key, now
        self._lock = threading.RLock()  # what is remembered
        self._writing = threading.RLock()  # one flush at a time
        self._rows: dict[str, TrialRow] = {}
        self._live: dict[tuple[str, int], EpochRow] = {}
        self._lingering: list[tuple[float, pa.Table]] = []
        self._trials_table = _TrialsTable()
        self._loose: list[str] = []  # parts that are written, but not named yet
        self._unmergeable: set[str] = set()  # parts that could not be read
        self._events: list[Event] = []
        self._changes: Counter[str] = Counter()  # of trials, live and events, so far ...
        self._written: Counter[str] = Counter()  # ... and how many of them are in the store
        self._header, self._tag, self._seq = Header(), None, 0
        self._merged: tuple[dict[str, int], list[str]] = (
            {},
            [],
        )  # a merge that no trials name yet: its part, its sources
        self._live_bytes, self._done, self._closed, self._lenient = 0.0, False, False, lenient
        self._next_flush = self._next_merge = 0.0
        self._next_look = time.monotonic() + LOOK_S
        self._lease = HeldLease(
            self._folder, f"{self._key}/lease.json", sweep=self.sweep, holder=holder, process=process, now=now,
            above=max((int(match[2]) for match in files.files()), default=0),
        )  # fmt: skip
        try:
            self._folder.put(f"{self._key}/sweep.yaml", sweep_text.encode())
            self._take_over()
        except MixmoError:
            with contextlib.suppress(MixmoError):
                self._lease.release()
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
            self.close()
        elif not issubclass(kind, LeaseLostError):
            with contextlib.suppress(MixmoError):  # the error that is on its way says more
                self.close()

    # ---- remembering

    def put(self, rows: Iterable[TrialRow]) -> None:
        """The latest state of trials. A row that is older than the one held, or says nothing new, is dropped.

        Raises RefusedError if two configs share an id, ValueError for a finished trial that would become unfinished.
        """
        with self._lock:
            fence = self.fence
            for given in rows:
                row = given if self._owns(given, fence) else given.replace(sweep=self.sweep, fence=fence)
                if row.error or row.error_cause:
                    row = row.replace(error=self._starred(row.error), error_cause=self._starred(row.error_cause))
                held = self._rows.get(row.trial_id)
                if held is None or (_news(row, held) and _succeeds(row, held)):
                    self._rows[row.trial_id] = row
                    self._done &= row.state in FINAL
                    self._changes["trials"] += 1

    def add(self, rows: Iterable[EpochRow]) -> None:
        """Epochs that are done. Of two rows of one epoch the one with the highest order holds."""
        with self._lock:
            fence = self.fence
            for given in rows:
                row = given if self._owns(given, fence) else replace(given, sweep=self.sweep, fence=fence)
                held = self._live.get((row.trial_id, row.epoch))
                if held is None or row.order >= held.order:
                    self._live[row.trial_id, row.epoch] = row
                    self._changes["live"] += 1

    def _owns(self, row: TrialRow | EpochRow, fence: int) -> bool:
        return row.fence == fence and row.sweep == self.sweep

    def event(self, kind: str, text: str, trial_id: str | None = None, cause: str | None = None) -> None:
        """Something to tell people; only the last 1,000 are kept."""
        text, cause = self._starred(text), self._starred(cause)
        with self._lock:
            self._events = [*self._events[1 - EVENTS_KEPT :], Event(self._now(), kind, text, trial_id, cause)]
            self._changes["events"] += 1

    def _starred(self, text: str | None) -> Any:
        """Whatever a library says in its errors, no secret gets into a table."""
        return text and without_secrets(text, os.environ, self._folder.secrets)

    def forget(self, trial_ids: Iterable[str]) -> None:
        """Drop the rows of trials that are planned no more. Those that have done an epoch stay: they are results."""
        with self._lock:
            for trial_id in trial_ids:
                if trial_id in self._rows and self._rows[trial_id].epoch == 0:
                    del self._rows[trial_id]
                    self._changes["trials"] += 1

    def pause(self, by: str | None) -> None:
        """Say in the header who has had the sweep paused; None: it goes on."""
        with self._lock:
            self._header = replace(self._header, paused_by=by)
            self._changes["trials"] += 1

    def stopping(self) -> None:
        """Say in the header that nothing new starts."""
        with self._lock:
            self._header = replace(self._header, stopping=True)
            self._changes["trials"] += 1

    @property
    def predicted(self) -> Mapping[str, Any] | None:
        return self._header.predicted

    def predict(self, predicted: Mapping[str, Any]) -> None:
        """Say in the header what the sweep is to take."""
        with self._lock:
            self._header = replace(self._header, predicted=predicted)
            self._changes["trials"] += 1

    def snapshot(self) -> Snapshot:
        """As `ResultStore.snapshot`, from memory: with what is not written yet."""
        with self._lock:
            rows, header = self.rows, self._header
            live, events = newest(list(self._live.values())), tuple(self._events)
        return Snapshot(replace(header, totals=totals(rows), written_at=self._now()), rows, live, events)

    def renew(self) -> None:
        """Keep the lease: at least every third of a minute. Raises LeaseLostError."""
        self._lease.renew()

    # ---- writing

    def flush(self, *, force: bool = False) -> bool:
        """Write what has changed, if it is time to (or `force`); whether anything was written.

        The more a flush costs the rarer it is: under a twentieth of the time. Raises UnreachableError, and may be
        called again; raises LeaseLostError when another driver has taken over.
        """
        with self._writing:
            began = time.monotonic()
            if not self._folder.atomic and began >= self._next_look:
                self._look()
            if self._changes == self._written or not (force or began >= self._next_flush):
                return False
            longest = RETRY_S
            try:
                self._write(self._batch())
                longest = float("inf")
            finally:
                ended = time.monotonic()
                self._next_flush = ended + min(longest, max(1.0, FLUSH_PAUSE * (ended - began)))
            if force or ended >= self._next_merge:
                with contextlib.suppress(UnreachableError):  # the rows are written; the parts can wait
                    self._merge(_to_merge(self._header.parts, self._unmergeable))
                self._next_merge = time.monotonic() + MERGE_PAUSE * (time.monotonic() - ended)
            return True

    def _look(self) -> None:
        """An older driver may overwrite the trials once, where the place cannot refuse it: then they are written again
        though nothing is new.
        """
        self._next_look = time.monotonic() + LOOK_S
        stored = self._folder.read(f"{self._key}/trials.parquet")
        if stored is None or stored.tag != self._tag:
            with self._lock:
                self._changes["trials"] += 1

    def compact(self) -> "Compaction":
        """Make one part of all that can be read, and delete what has outlived its hour."""
        with self._writing:
            before, parts = self._folder.sizes(f"{self._key}/epochs"), self._header.parts
            self._merge_all()
            if self._unmergeable:  # once more, without what could not be read
                self._merge_all()
            with self._lock:
                self._changes["trials"] += 1
            self._write(self._batch())
            after = self._folder.sizes(f"{self._key}/epochs")
        return Compaction(
            sweep=self.sweep,
            rows=sum(self._header.parts.values()),
            parts_before=len(parts),
            parts_after=len(self._header.parts),
            bytes_before=_bytes_of(before, parts),
            bytes_after=_bytes_of(after, self._header.parts),
            bytes_waiting=_bytes_of(after, self._header.retired),
            bytes_deleted=sum(size for key, size in before.items() if key not in after),
            unread=sorted(self._unmergeable),
        )

    def _merge_all(self) -> None:
        names = [name for name in self._header.parts if name not in self._unmergeable]
        self._merge(names if len(names) > 1 else [])

    def close(self, *, done: bool | None = None) -> None:
        """Write all there is, say whether the sweep is done (None: as it was before), and give the lease back. Twice is
        fine.
        """
        with self._writing:
            if self._closed:
                return
            with self._lock:
                self._changes["trials"] += 1
                self._done = self._done if done is None else done
                self._header = replace(self._header, paused_by=None, stopping=False)
            self._write(self._batch())
            self._lease.release()
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
        """Part, then live, then trials: what the trials say is always backed by rows."""
        self._lease.check()
        changed = {name for name, count in batch.changes.items() if count != self._written[name]}
        sealed = to_table(batch.sealing, EPOCHS_SCHEMA)
        parts, sources = self._write_parts(sealed) if "trials" in changed else (self._header.parts, [])
        if "live" in changed:
            self._write_live(batch.staying, sealed)
        if "trials" in changed:
            self._write_trials(batch.rows, parts, sources)
            self._adopt(batch.sealing, sealed)
        if "events" in changed:
            records = [asdict(event) for event in batch.events]
            self._folder.put(f"{self._key}/events.parquet", encode(pa.Table.from_pylist(records, EVENTS_SCHEMA)))
        self._written = batch.changes

    def _write_parts(self, sealed: pa.Table) -> tuple[Mapping[str, int], list[str]]:
        """Write what is to be sealed; the parts that count then, and those that count no more since they are merged."""
        merged, sources = self._merged
        parts = {name: rows for name, rows in self._header.parts.items() if name not in sources} | merged
        return parts | (self._write_part([sealed]) if len(sealed) else {}), sources

    def _merge(self, names: Sequence[str]) -> None:
        """Write one part of these; the next write of the trials names it instead of them. A part that cannot be read
        must not stop the rows of living trials: it stays as it is, for `verify` to report, and so do the others.
        """
        if self._merged[1] or not names:
            return
        tables = []
        for name in names:
            try:
                tables.append(self._files.part(name))
            except DamagedError:
                self._unmergeable.add(name)
        if len(tables) == len(names):
            self._merged = self._write_part(tables), list(names)
            with self._lock:
                self._changes["trials"] += 1

    def _write_part(self, tables: Sequence[pa.Table]) -> dict[str, int]:
        """Nothing names the part until the trials do; should they not get written, its name is not used again."""
        name, table = f"part-{self.fence}-{self._seq:06d}.parquet", merge(tables)
        self._seq += 1
        self._loose.append(name)
        if not self._folder.create(f"{self._key}/epochs/{name}", encode(table)):  # two drivers have one fence
            raise self._lease.lost()
        return {name: len(table)}

    def _write_trials(self, rows: Sequence[TrialRow], parts: Mapping[str, int], merged: Iterable[str]) -> None:
        header, data = self._trials_object(rows, parts, self._retire(parts, merged))
        self._swap_trials(data)
        self._header, self._merged = header, ({}, [])
        self._loose.clear()

    def _retire(self, parts: Mapping[str, int], merged: Iterable[str]) -> dict[str, str]:
        """The files that count no more, and since when. Those that have not for an hour are deleted."""
        now, retired = self._now(), {}
        for name, since in self._header.retired.items():
            if (now - datetime.fromisoformat(since)).total_seconds() > OUTLIVES_S:
                self._folder.delete(f"{self._key}/epochs/{name}")
            else:
                retired[name] = since
        return retired | {name: now.isoformat() for name in (*merged, *self._loose) if name not in parts}

    def _trials_object(
        self, rows: Sequence[TrialRow], parts: Mapping[str, int], retired: Mapping[str, str]
    ) -> tuple[Header, bytes]:
        header = replace(
            self._header,
            fence=self.fence,
            generation=self._header.generation + 1,
            parts=parts,
            retired=retired,
            totals=totals(rows),
            written_at=self._now(),
            done=self._done,
            copied=not self._folder.atomic,
        )
        table = self._trials_table.of(rows)
        return header, encode(table.replace_schema_metadata({"mixmo": header.encode()}))

    def _swap_trials(self, data: bytes) -> None:
        key = f"{self._key}/trials.parquet"
        self._copy_trials(data)
        for _ in range(3):
            tag = self._folder.swap(key, data, self._tag)
            if tag is not None:
                self._tag = tag
                return
            try:
                _, held, tag = self._files.trials()  # an older driver's, or our own whose answer was lost
            except NotFoundError:  # the sweep was removed: only who holds its lease may make it anew
                self._lease.renew()
                self._tag = None
                continue
            if held.fence > self.fence:
                raise self._lease.lost()
            self._tag = tag  # to know a newer driver's would be the right to replace it
        raise UnreachableError(f"{self._folder}/{key} keeps changing under this driver; an older one must still run")

    def _copy_trials(self, data: bytes) -> None:
        """Under a name that no other driver touches, for readers of a place where one may overwrite the trials."""
        if not self._folder.atomic:
            if max(self._files.copies()) > self.fence:  # the swap would not tell, where what is there is our own
                raise self._lease.lost()
            self._folder.put(self._files.copy_key(self.fence), data)

    def _adopt(self, rows: Sequence[EpochRow], sealed: pa.Table) -> None:
        """The trials name the part of these rows now: from here on they only linger in the live file."""
        with self._lock:
            for row in rows:
                if self._live.get((row.trial_id, row.epoch)) is row:
                    del self._live[row.trial_id, row.epoch]
        if rows:
            self._lingering.append((time.monotonic(), sealed))

    def _write_live(self, staying: Sequence[EpochRow], sealed: pa.Table) -> None:
        self._lingering = _still(self._lingering, time.monotonic() - LINGER_S)
        leaving = [*(table for _, table in self._lingering), sealed]
        data = encode(merge([*leaving, to_table(staying, EPOCHS_SCHEMA)]))
        self._folder.put(self._files.live_key(self.fence), data)
        self._live_bytes = len(data) * len(staying) / max(1, len(staying) + sum(map(len, leaving)))

    def _take_over(self) -> None:
        """Take in what earlier drivers left: first the rows of running trials, then all trials, under our fence.

        Should an earlier driver still write in between, the swap fails and its rows are taken in as well.
        """
        for _ in range(8):
            self._load()
            self._write_live(list(self._live.values()), EPOCHS_SCHEMA.empty_table())
            header, data = self._trials_object(self.rows, self._header.parts, self._header.retired)
            self._tag = self._folder.swap(f"{self._key}/trials.parquet", data, self._tag)
            if self._tag is not None:
                self._header = header
                self._copy_trials(data)  # not before: it would hide what an earlier driver has written since the look
                self._files.drop_copies(below=self.fence)
                return
        raise UnreachableError(f"{self._folder}/{self._key} keeps changing: an older driver must still run; stop it")

    def _load(self) -> None:
        for prefix in (self._key, f"{self._key}/epochs"):
            self._folder.tidy(prefix)
        left = [match[0] for match in self._files.files() if int(match[2]) < self.fence]
        lost = ""
        try:
            seen = self._files.look(None)
        except NotFoundError:
            self._header, self._tag = Header(retired=dict.fromkeys(left, self._now().isoformat())), None
            return
        except DamagedError as error:
            if not self._lenient:
                raise
            trials, header, tag = self._files.trials()  # raises if it is these
            seen, lost = Look(header, trials, tag, EPOCHS_SCHEMA.empty_table()), error.what
        if seen.header.fence > self.fence:
            raise self._lease.lost()
        _check_columns(seen)
        self._tag = seen.tag
        self._rows = {row.trial_id: row for row in trial_rows(seen.trials)}
        ended = {trial_id for trial_id, row in self._rows.items() if row.state in FINAL}  # theirs are in the parts
        live = [row for row in epoch_rows(seen.live) if row.trial_id not in ended]
        self._live = {(row.trial_id, row.epoch): row for row in newest(live)}
        with contextlib.suppress(DamagedError):  # no result hangs on them
            self._events = self._files.events()
        if lost:
            self.event("damaged", f"rows of trials that had not ended come again with their checkpoints: {lost}")
        counted, now = {*seen.header.parts, *seen.header.retired}, self._now().isoformat()
        retired = {**seen.header.retired, **{name: now for name in left if name not in counted}}
        self._done = seen.header.done
        self._header = replace(seen.header, retired=retired, paused_by=None, stopping=False)


class _TrialsTable:
    """The table of all trials, of which only the pieces are made anew that have a row which is another than before."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Sequence[TrialRow], pa.Table]] = []

    def of(self, rows: Sequence[TrialRow]) -> pa.Table:
        pieces = []
        for number, start in enumerate(range(0, len(rows), PIECE)):
            some = rows[start : start + PIECE]
            held = self._pieces[number] if number < len(self._pieces) else ((), None)
            same = len(held[0]) == len(some) and all(map(operator.is_, held[0], some))
            pieces.append(held if same else (some, to_table(some, TRIALS_SCHEMA)))
        self._pieces = pieces
        return pa.concat_tables([table for _, table in pieces]) if pieces else TRIALS_SCHEMA.empty_table()


def _still(lingering: Sequence[tuple[float, pa.Table]], limit: float) -> list[tuple[float, pa.Table]]:
    """Of rows that were sealed, those that must stay in the live file: not for too long, and not too many."""
    kept: list[tuple[float, pa.Table]] = []
    for since, table in reversed(lingering):
        if since <= limit or sum(len(each) for _, each in kept) >= LINGER_ROWS:
            break
        kept.insert(0, (since, table))
    return kept


def _news(row: TrialRow, held: TrialRow) -> bool:
    """Whether a row says anything that the one held does not; under which fence it is said is no news."""
    if (row.attempt, row.seq) != (held.attempt, held.seq):  # most rows; to compare all that they say takes longer
        return True
    return (row if row.fence == held.fence else row.replace(fence=held.fence)) != held


def _check_columns(seen: Look) -> None:
    """To write a table again without the columns that only a later version knows would lose what they say."""
    for table, schema in ((seen.trials, TRIALS_SCHEMA), (seen.live, EPOCHS_SCHEMA)):
        unknown = [name for name in table.schema.names if name not in schema.names]
        if unknown:
            raise NewerError(
                f"a later mixmo ran this sweep: its tables have columns that this one does not know, and would lose by "
                f"running it ({', '.join(unknown)}). No result was changed, and all else can be read"
            )


def _succeeds(row: TrialRow, held: TrialRow) -> bool:
    """Whether a trial's row may take the place of the one held."""
    if held.digest != row.digest:
        raise RefusedError(
            f"two configs share the trial id {row.trial_id} ({held.digest} and {row.digest}): change one setting of "
            f"either, and both can be stored"
        )
    if row.order < held.order:
        return False
    if held.state == "TERMINATED" and not held.stopped_early and row.state != "TERMINATED":
        raise ValueError(f"trial {row.trial_id} is finished and cannot become {row.state}")
    return True


def _bytes_of(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    wanted = set(names)
    return sum(size for key, size in sizes.items() if key.rpartition("/")[2] in wanted)


def _to_merge(parts: Mapping[str, int], unmergeable: Collection[str]) -> list[str]:
    """Parts of about one size, once they are many: so a row is rewritten only as often as the table's size has digits
    to the base of 8. Those that are large already stay.
    """
    sizes: dict[int, list[str]] = defaultdict(list)
    for name, rows in parts.items():
        if name not in unmergeable and rows < SETTLED_ROWS:
            sizes[max(1, rows).bit_length() // 3].append(name)
    return next((names for _, names in sorted(sizes.items()) if len(names) >= MERGED_AT), [])
