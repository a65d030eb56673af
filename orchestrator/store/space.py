"""What nothing in a store needs any more, and how a sweep is removed from it.

Drivers come and go meanwhile, without locks. A look takes the leases first and the rows after. A driver that held its
lease before the look counts as at work, and nothing that it may name is touched. One that takes its lease later plans
by the rows that are there then, and what these name is never deleted. Each look is taken again right before files go.
"""

import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from orchestrator.errors import NotFoundError, RefusedError, UnreachableError
from orchestrator.population import needed_by
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, TrialRow, to_table, trial_rows
from orchestrator.store.attempts import ATTEMPT, CHECKPOINT, LOG, LOGITS, matches, progress_of
from orchestrator.store.lease import HeldLease, Lease, Process, read_lease
from orchestrator.store.objects import DamagedError, Objects
from orchestrator.store.tables import EPOCHS_FILE, NAME, Header, SweepFiles, encode, totals

AGE_S = 3600.0
"""Nothing younger is deleted, by the clock of the place: whoever wrote it may be about to name it."""
STARTING_S = 600.0
"""By then a driver that has its lease has written the rows of all its trials."""
ASLEEP_S = 7 * 86400.0
"""A driver that was not heard of, but not seen dead either, may be on a laptop that sleeps: its next write names the
files of epochs that it wrote last. After this time it is given up."""
SPENT_S = 3 * 86400.0
"""Answered commands and the claims of drivers that are gone stay this long, to be looked at."""
BATCH = 256
THREADS = 16

Kind = Literal["superseded", "orphaned", "epochs", "claims", "commands"]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Leftover:
    """An object that nothing needs."""

    key: str
    bytes: int
    kind: Kind
    """superseded: a newer checkpoint or log of its trial has made it needless; orphaned: its trial belongs to no sweep;
    epochs: no table names it, or not any more; claims and commands: of drivers that are gone.
    """


@dataclass(frozen=True, slots=True)
class Leftovers:
    items: tuple[Leftover, ...]
    notes: tuple[str, ...] = ()
    """What was not looked through, and why."""

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.items)


@dataclass(frozen=True, slots=True)
class Belongings:
    """What goes when a sweep is removed."""

    sweep: str
    tables: Mapping[str, int]
    """Bytes by key, as in `files`."""
    files: Mapping[str, int]
    """Of attempts at trials that no other sweep has."""
    trials: int
    shared: int
    """Trials that another sweep has too: their files stay."""
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.tables.values()) + sum(self.files.values())


# ------------------------------------------------------------------------------------------------ who needs what, now


@dataclass(frozen=True)
class _Look:
    """Who needs what, at one moment."""

    now: float
    """By the clock of the place."""
    leases: Mapping[str, Lease | None]
    """Of every sweep that has an object, whether it has begun or not; None where no lease can be read."""
    headers: Mapping[str, Header | None]
    """Of every sweep that is not damaged; None where nothing of it is left, or was ever written."""
    rows: Mapping[str, Sequence[TrialRow]]
    """Of every trial, in all sweeps that have it."""
    notes: tuple[str, ...]
    """Why all of `trials/` is to be left alone; empty where it need not be."""

    @functools.cached_property
    def needed(self) -> set[str]:
        """The checkpoints that trials go on from: those of a population may be other trials'."""
        return needed_by(row for rows in self.rows.values() for row in rows)

    def is_busy(self, sweep: str) -> bool:
        lease = self.leases.get(sweep)
        return lease is not None and not lease.expired

    def is_over(self, sweep: str) -> bool:
        """Whether the last driver will never write again."""
        lease = self.leases.get(sweep)
        if lease is None:
            return sweep in self.leases
        gone = lease.released or Process.current().sees_alive(lease.process) is False
        return not self.is_busy(sweep) and (gone or lease.age_s > ASLEEP_S)

    def frees(self, item: Leftover) -> bool:
        """Whether nobody can need this object, as far as leases and tables tell."""
        _, name, *rest = item.key.split("/")
        if item.kind in ("superseded", "orphaned"):
            rows = self.rows.get(name, ())
            named = self.needed | {key for row in rows for key in (row.checkpoint, row.logits)}
            free = item.key not in named and not any(self.is_busy(row.sweep) for row in rows)
            return free and not self.notes and (item.kind == "superseded") == bool(rows)
        if item.kind == "claims":
            return True  # it decides nothing; a driver that lives has its young
        if self.is_busy(name) or item.kind == "commands":
            return not self.is_busy(name)
        header = self.headers.get(name)
        return name in self.headers and (header is None or rest[-1] not in {_live(header), *header.parts})


def _look(folder: Objects, apart: str | None = None) -> _Look:
    """Leases first, rows after. `apart` is a sweep that is being removed."""
    now = folder.clock("clock")
    names = [name for name in folder.names("sweeps", folders=True) if NAME.fullmatch(name) and name != apart]
    leases: dict[str, Lease | None] = {}
    notes: list[str] = []
    for name in names:
        try:
            leases[name] = lease = read_lease(folder, f"sweeps/{name}/lease.json", lambda: now)
        except DamagedError as error:
            notes.append(f"whether a driver runs {name} cannot be told: {error.what}")
            continue
        if lease is not None and not lease.expired:
            held_s = lease.age_s + (lease.renewed_at - lease.taken_at).total_seconds()
            if held_s < STARTING_S:
                left = max(1, round((STARTING_S - held_s) / 60))
                notes.append(f"a driver of {name} has just begun; try again in {left} min")
    headers: dict[str, Header | None] = {}
    rows: dict[str, list[TrialRow]] = defaultdict(list)
    for name in names:
        files = SweepFiles(folder, name)
        try:
            table, headers[name], _ = files.trials()
            for row in trial_rows(table):
                rows[row.trial_id].append(row)
        except NotFoundError:
            if note := _tableless(files, leases.get(name)):
                notes.append(note)
            else:
                headers[name] = None
        except DamagedError as error:
            notes.append(f"{name} is damaged: {error.what}")
    return _Look(now, leases, headers, rows, tuple(notes))


def _live(header: Header) -> str:
    return f"live-{header.fence}.parquet"


def _tableless(files: SweepFiles, lease: Lease | None) -> str:
    """What is to be said of a sweep without trials.parquet; empty where nothing is left of it, or was ever written."""
    if lease is not None and not lease.expired:
        return f"{files.sweep} has no trials.parquet yet: its driver is about to write it"
    if _has_rows(files):
        return f"{files.sweep} has no trials.parquet: put it back from a copy, or `mixmo rm {files.sweep}`"
    return ""


def _has_rows(files: SweepFiles) -> bool:
    """Whether there are epochs of trials, of which no table tells any more."""
    try:
        return any(len(files.part(match[0])) for match in files.files())
    except DamagedError:
        return True


# ------------------------------------------------------------------------------------------------ what nothing needs


def leftovers(folder: Objects) -> Leftovers:
    """All that nothing in the store needs. Changes nothing, but needs the right to write: the clock is the place's."""
    if not folder.names("", folders=True):
        return Leftovers(())
    look = _look(folder)
    found = [*_of_epochs(folder, look), *_of_commands(folder, look), *_of_claims(folder, look)]
    if not look.notes:
        found += _of_trials(folder, look)
    notes = tuple(f"the files of trials are left alone: {note}" for note in look.notes)
    return Leftovers(tuple(sorted(_old(folder, look.now, found), key=lambda each: each.key)), notes)


def clean(folder: Objects, found: Iterable[Leftover]) -> int:
    """Delete what is still needless at the moment of its turn; the bytes that are free by that.

    Raises UnreachableError; what is deleted by then is deleted, and the rest is found again.
    """
    if not folder.names("", folders=True):
        return 0  # there is no such place, and none is made
    freed, items = 0, sorted(found, key=lambda each: each.key)
    for start in range(0, len(items), BATCH):
        look = _look(folder)
        going = [item for item in items[start : start + BATCH] if look.frees(item)]
        freed += _delete(folder, going)
    _prune(folder, _look(folder))
    return freed


def _prune(folder: Objects, look: _Look) -> None:
    """Folders of trials in which nothing is left, also by whoever was killed before it came to this."""
    busy = {trial_id for trial_id, rows in look.rows.items() if any(look.is_busy(row.sweep) for row in rows)}
    if not look.notes:
        for trial_id in folder.names("trials", folders=True):
            if trial_id not in busy:
                folder.prune(f"trials/{trial_id}")


def _delete(folder: Objects, items: Sequence[Leftover]) -> int:
    _each(lambda item: folder.delete(item.key), items)
    for trial in sorted({item.key.split("/")[1] for item in items if item.key.startswith("trials/")}):
        folder.prune(f"trials/{trial}")
    return sum(item.bytes for item in items)


def _old(folder: Objects, now: float, items: Sequence[Leftover]) -> Iterator[Leftover]:
    """Those that are there and were written long enough ago."""
    least = {"claims": SPENT_S, "commands": SPENT_S}
    for item, modified in zip(items, _each(lambda item: folder.modified(item.key), items), strict=True):
        if modified and now - modified > least.get(item.kind, AGE_S):
            yield item


def _of_epochs(folder: Objects, look: _Look) -> Iterator[Leftover]:
    """Files of epochs that no table names: those of a write that was cut short, and those merged into others."""
    for sweep, header in look.headers.items():
        if not look.is_over(sweep):
            continue
        retired = header.retired if header else {}
        for key, size in folder.sizes(f"sweeps/{sweep}/epochs").items():
            item = Leftover(key, size, "epochs")
            name = key.rpartition("/")[2]
            since = datetime.fromisoformat(retired[name]).timestamp() if name in retired else 0.0
            if EPOCHS_FILE.fullmatch(name) and look.now - since > AGE_S and look.frees(item):
                yield item


def _of_commands(folder: Objects, look: _Look) -> Iterator[Leftover]:
    for sweep in look.leases:
        for key, size in folder.sizes(f"sweeps/{sweep}/commands").items():
            item = Leftover(key, size, "commands")
            if look.frees(item) and _record(folder, key).get("answer"):
                yield item


def _of_claims(folder: Objects, look: _Look) -> Iterator[Leftover]:
    for key, size in folder.sizes("claims").items():
        if not look.is_busy(str(_record(folder, key).get("sweep"))):
            yield Leftover(key, size, "claims")


def _record(folder: Objects, key: str) -> dict[str, Any]:
    stored = folder.read(key)
    try:
        record = json.loads(stored.data) if stored else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _of_trials(folder: Objects, look: _Look) -> Iterator[Leftover]:
    by_trial: dict[str, dict[str, int]] = defaultdict(dict)
    for key, size in folder.sizes("trials").items():
        if _is_ours(key):
            by_trial[key.split("/")[1]][key] = size
    for trial_id, files in by_trial.items():
        rows = look.rows.get(trial_id, ())
        needed = look.needed | _needed(folder, files, rows) if rows else look.needed
        for key, size in files.items():
            item = Leftover(key, size, "superseded" if rows else "orphaned")
            if key not in needed and look.frees(item):
                yield item


def _is_ours(key: str) -> bool:
    """Whether it is a file that a gang writes. Any other under `trials/` is somebody's own."""
    match = re.fullmatch(r"trials/[0-9a-f]{12}/([^/]+)/([^/]+)", key)
    kinds = (CHECKPOINT, LOGITS, LOG)
    return bool(match and ATTEMPT.fullmatch(match[1]) and any(kind.fullmatch(match[2]) for kind in kinds))


def _needed(folder: Objects, files: Collection[str], rows: Sequence[TrialRow]) -> set[str]:
    """What is to stay of a trial that some sweep has. While it is not finished in all of them: its newest two whole
    checkpoints, and logits, which a checkpoint after the last epoch names.
    """
    finished = all(row.state == "TERMINATED" for row in rows)
    named = {key for row in rows for key in (row.checkpoint, row.logits) if key}
    checkpoints = sorted(_called(files, CHECKPOINT), key=progress_of, reverse=True)
    furthest = max((progress_of(key) for key in named if key in checkpoints), default=None)
    if not finished:
        kept = checkpoints if len(checkpoints) <= 2 else _first_whole(folder, checkpoints)
        named.update(kept, _called(files, LOGITS))
    elif furthest is not None:  # stored after its driver had given it up
        named.update(key for key in checkpoints if progress_of(key) > furthest)
    return named | _newest_logs(folder, _called(files, LOG))


def _called(files: Iterable[str], kind: Any) -> list[str]:
    return [key for key in files if kind.fullmatch(key.rpartition("/")[2])]


def _first_whole(folder: Objects, checkpoints: Iterable[str]) -> list[str]:
    whole = (key for key in checkpoints if (digest := folder.digest(key)) and matches(key, digest))
    return list(itertools.islice(whole, 2))


def _newest_logs(folder: Objects, logs: Iterable[str]) -> set[str]:
    """The log that `mixmo logs` shows, of each rank; all of those that are as new."""
    by_rank: dict[str, list[str]] = defaultdict(list)
    for key in logs:
        by_rank[key.rpartition("/")[2]].append(key)
    kept: set[str] = set()
    for keys in by_rank.values():
        times = [folder.modified(key) for key in keys] if len(keys) > 1 else [0.0]
        kept.update(key for key, time in zip(keys, times, strict=True) if time == max(times))
    return kept


def _each(act: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    from concurrent.futures import ThreadPoolExecutor  # which no reading command is to load

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(act, items))


# -------------------------------------------------------------------------------------------------- removing a sweep


def belongings(folder: Objects, sweep: str) -> Belongings:
    """What goes with a sweep. Raises NotFoundError where there is none, RefusedError while a driver runs it."""
    files = SweepFiles(folder, sweep)
    tables = {key: size for key, size in folder.sizes(files.key).items() if key != _lease_key(files)}
    if not tables:
        files.trials()  # raises, and says what is there
    _refuse_running(folder, files)
    rows, note = _rows_of(files)
    look = _look(folder, apart=sweep)
    ids = {row.trial_id for row in rows}
    notes = [note] if note else []
    notes += [f"the files of its trials stay, for `mixmo gc` to take later: {each}" for each in look.notes if ids]
    own = set() if look.notes else {trial_id for trial_id in ids if trial_id not in look.rows}
    held = {key: size for trial_id in sorted(own) for key, size in folder.sizes(f"trials/{trial_id}").items()}
    kept = {key: size for key, size in held.items() if _is_ours(key)}
    return Belongings(sweep, tables, kept, len(ids), len(ids & set(look.rows)), tuple(notes))


def remove(folder: Objects, sweep: str, process: Process | None = None) -> int:
    """Delete a sweep and the attempts at trials that no other sweep has; the bytes that are free by that.

    First its table is emptied, under a fence of our own: from there on no reader misses a file, no earlier driver can
    write, and nobody takes results from it any more. The table itself goes last. Killed in between, it leaves a sweep
    without trials, which this finishes, and files of trials that belong to no sweep, which `clean` takes. The lease
    stays, some hundred bytes: by its fence a later sweep of the name outranks whatever driver may still be asleep.

    Raises RefusedError while a driver runs the sweep, NotFoundError where there is none.
    """
    there = belongings(folder, sweep)
    files = SweepFiles(folder, sweep)
    fences = [int(match[2]) for match in files.files()]
    lease = HeldLease(
        folder, _lease_key(files), sweep=sweep, holder=None, process=process or Process.current(),
        now=lambda: datetime.now(UTC), above=max(fences, default=0),
    )  # fmt: skip
    last = [f"{files.key}/trials.parquet", files.live_key(lease.fence), f"{files.key}/sweep.yaml"]
    try:
        trial_ids = _empty(files, lease)
        first = [key for key in folder.sizes(files.key) if key not in (*last, _lease_key(files))]
        _each(folder.delete, first)
        freed = _remove_attempts(folder, sweep, trial_ids, lease)
        lease.renew()
        for key in last:
            folder.delete(key)
        folder.prune(files.key)
    finally:
        lease.release()
    return freed + sum(there.tables.values())


def _empty(files: SweepFiles, lease: HeldLease) -> set[str]:
    """Replace the table by one without rows. The trials that it had; none where it cannot be read."""
    key = f"{files.key}/trials.parquet"
    for _ in range(8):
        stored = files.folder.read(key)
        if stored is None:
            return set()
        rows, _ = _rows_of(files)
        try:
            header = files.trials()[1]
        except (DamagedError, NotFoundError):
            header = Header()
        header = replace(
            header, fence=lease.fence, generation=header.generation + 1, parts={}, retired={}, totals=totals([]),
            written_at=datetime.now(UTC), done=True,
        )  # fmt: skip
        files.folder.put(files.live_key(lease.fence), encode(to_table([], EPOCHS_SCHEMA)))
        table = to_table([], TRIALS_SCHEMA).replace_schema_metadata({"mixmo": header.encode()})
        if files.folder.swap(key, encode(table), stored.tag) is not None:
            return {row.trial_id for row in rows}
    raise UnreachableError(f"{files.folder}/{key} keeps changing: an older driver must still run; stop it")


def _remove_attempts(folder: Objects, sweep: str, trial_ids: Iterable[str], lease: HeldLease) -> int:
    items = [
        Leftover(key, size, "orphaned")
        for trial_id in sorted(trial_ids)
        for key, size in folder.sizes(f"trials/{trial_id}").items()
        if _is_ours(key)
    ]
    freed = 0
    for start in range(0, len(items), BATCH):
        lease.renew()
        look = _look(folder, apart=sweep)
        freed += _delete(folder, [item for item in items[start : start + BATCH] if look.frees(item)])
    return freed


def _rows_of(files: SweepFiles) -> tuple[list[TrialRow], str]:
    """The rows, or none and why."""
    try:
        return trial_rows(files.trials()[0]), ""
    except (NotFoundError, DamagedError):
        return [], f"the trials of {files.sweep} cannot be read: their files stay, for `mixmo gc` to take later"


def _lease_key(files: SweepFiles) -> str:
    return f"{files.key}/lease.json"


def _refuse_running(folder: Objects, files: SweepFiles) -> None:
    try:
        lease = read_lease(folder, _lease_key(files), lambda: folder.clock(_lease_key(files)))
    except DamagedError:
        return  # taking it says more
    if lease is not None and not lease.expired:
        raise RefusedError(
            f"sweep {files.sweep} is being run by {lease.holder} (process {lease.process.pid} on "
            f"{lease.process.host}). End it with `mixmo stop {files.sweep}`, or wait until it is done"
        )
