"""The rows of a running sweep on their way to the store.

A write goes part, then live, then trials, so that every epoch that a trial has reached is there. Rows leave the live
file a minute after the trials have named the part that holds them, so that after each step all that was readable
before still is. `trials.parquet` changes only by compare-and-swap: the first write of a new driver makes every later
one of its predecessor fail.
"""

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from orchestrator.store.lease import HeldLease, LeaseLostError, Process
from orchestrator.store.objects import DamagedError
from orchestrator.store.tables import (
    EVENTS_SCHEMA,
    Event,
    Header,
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
OUTLIVES_S = 3600.0
"""What no footer names any more stays this long, for those who have listed the folder but not read it yet."""
LINGER_S = 60.0
"""Rows stay in the live file this long after they were sealed: one listing of `epochs/` always sees them somewhere."""


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
        files: SweepFiles,
        *,
        sweep_text: str,
        holder: str | None,
        now: Callable[[], datetime],
        process: Process,
    ) -> None:
        self.sweep, self._files, self._folder, self._key, self._now = files.sweep, files, files.folder, files.key, now
        self._lock = threading.RLock()  # what is remembered
        self._writing = threading.RLock()  # one flush at a time
        self._rows: dict[str, TrialRow] = {}
        self._live: dict[tuple[str, int], EpochRow] = {}
        self._lingering: list[tuple[float, list[EpochRow]]] = []
        self._loose: list[str] = []  # parts that are written, but not named yet
        self._unmergeable: set[str] = set()  # parts that could not be read
        self._events: list[Event] = []
        self._changes: Counter[str] = Counter()  # of trials, live and events, so far ...
        self._written: Counter[str] = Counter()  # ... and how many of them are in the store
        self._header, self._tag, self._seq = Header(), None, 0
        self._live_bytes, self._next_flush, self._closed = 0.0, 0.0, False
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
            self.close(done=False)
        elif not issubclass(kind, LeaseLostError):
            with contextlib.suppress(MixmoError):  # the error that is on its way says more
                self.close(done=False)

    # ---- remembering

    def put(self, rows: Iterable[TrialRow]) -> None:
        """The latest state of trials. A row that is older than the one held, or says nothing new, is dropped.

        Raises RefusedError if two configs share an id, ValueError for a finished trial that would become unfinished.
        """
        with self._lock:
            for given in rows:
                row = given.replace(sweep=self.sweep, fence=self.fence)
                held = self._rows.get(row.trial_id)
                if held is None or (row.replace(fence=held.fence) != held and _succeeds(row, held)):
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
            if self._changes == self._written or not (force or began >= self._next_flush):
                return False
            try:
                self._write(self._batch())
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
        changed = {name for name, count in batch.changes.items() if count != self._written[name]}
        parts, merged = self._write_parts(batch.sealing) if "trials" in changed else (self._header.parts, [])
        if "live" in changed:
            self._write_live(batch.staying, batch.sealing)
        if "trials" in changed:
            self._write_trials(batch.rows, parts, merged)
            self._adopt(batch.sealing)
        if "events" in changed:
            records = [asdict(event) for event in batch.events]
            self._folder.put(f"{self._key}/events.parquet", encode(pa.Table.from_pylist(records, EVENTS_SCHEMA)))
        self._written = batch.changes

    def _write_parts(self, sealing: Sequence[EpochRow]) -> tuple[Mapping[str, int], list[str]]:
        """Write what is to be sealed or merged; the parts that count then, and those that count no more."""
        parts = dict(self._header.parts)
        if sealing:
            parts |= self._write_part([to_table(sealing, EPOCHS_SCHEMA)])
        merging = _to_merge({name: rows for name, rows in parts.items() if name not in self._unmergeable})
        tables = self._mergeable(merging)
        if not tables:
            return parts, []
        parts = {name: rows for name, rows in parts.items() if name not in merging}
        return parts | self._write_part(tables), merging

    def _mergeable(self, names: Iterable[str]) -> list[pa.Table]:
        """The tables of these parts, or none: a part that cannot be read must not stop the rows of living trials. It
        stays as it is, for `verify` to report.
        """
        tables, unread = [], len(self._unmergeable)
        for name in names:
            try:
                tables.append(self._files.part(name))
            except UnreachableError:
                self._unmergeable.add(name)
        return tables if unread == len(self._unmergeable) else []

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
        self._header = header
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
        )
        return header, encode(to_table(rows, TRIALS_SCHEMA).replace_schema_metadata({"mixmo": header.encode()}))

    def _swap_trials(self, data: bytes) -> None:
        key = f"{self._key}/trials.parquet"
        for _ in range(3):
            tag = self._folder.swap(key, data, self._tag)
            if tag is not None:
                self._tag = tag
                return
            try:
                _, held, self._tag = self._files.trials()  # an older driver's, or our own whose answer was lost
            except NotFoundError:  # the sweep was removed: only who holds its lease may make it anew
                self._lease.renew()
                self._tag = None
                continue
            if held.fence > self.fence:
                raise self._lease.lost()
        raise UnreachableError(f"{self._folder}/{key} keeps changing under this driver; an older one must still run")

    def _adopt(self, sealed: Sequence[EpochRow]) -> None:
        """The trials name the part of these rows now: from here on they only linger in the live file."""
        with self._lock:
            for row in sealed:
                if self._live.get((row.trial_id, row.epoch)) is row:
                    del self._live[row.trial_id, row.epoch]
        if sealed:
            self._lingering.append((time.monotonic(), list(sealed)))

    def _write_live(self, staying: Sequence[EpochRow], sealing: Sequence[EpochRow]) -> None:
        limit = time.monotonic() - LINGER_S
        self._lingering = [(since, rows) for since, rows in self._lingering if since > limit]
        leaving = [*(row for _, rows in self._lingering for row in rows), *sealing]
        data = encode(merge([to_table([*leaving, *staying], EPOCHS_SCHEMA)]))
        self._folder.put(self._files.live_key(self.fence), data)
        self._live_bytes = len(data) * len(staying) / max(1, len(staying) + len(leaving))

    def _take_over(self) -> None:
        """Take in what earlier drivers left: first the rows of running trials, then all trials, under our fence.

        Should an earlier driver still write in between, the swap fails and its rows are taken in as well.
        """
        for _ in range(8):
            self._load()
            self._write_live(list(self._live.values()), [])
            header, data = self._trials_object(self.rows, self._header.parts, self._header.retired)
            self._tag = self._folder.swap(f"{self._key}/trials.parquet", data, self._tag)
            if self._tag is not None:
                self._header = header
                return
        raise UnreachableError(f"{self._folder}/{self._key} keeps changing: an older driver must still run; stop it")

    def _load(self) -> None:
        for prefix in (self._key, f"{self._key}/epochs"):
            self._folder.tidy(prefix)
        left = [match[0] for match in self._files.files() if int(match[2]) < self.fence]
        try:
            seen = self._files.look(parts=False)
        except NotFoundError:
            self._header, self._tag = Header(retired=dict.fromkeys(left, self._now().isoformat())), None
            return
        if seen.header.fence > self.fence:
            raise self._lease.lost()
        self._tag = seen.tag
        self._rows = {row.trial_id: row for row in trial_rows(seen.trials)}
        ended = {trial_id for trial_id, row in self._rows.items() if row.state in FINAL}  # theirs are in the parts
        live = [row for row in epoch_rows(seen.live) if row.trial_id not in ended]
        self._live = {(row.trial_id, row.epoch): row for row in newest(live)}
        with contextlib.suppress(DamagedError):  # no result hangs on them
            self._events = self._files.events()
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
    if held.state == "TERMINATED" and not held.stopped_early and row.state != "TERMINATED":
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
