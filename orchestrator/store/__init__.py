"""Where results live, and how rows get in and out. Nobody else knows a path, and readers need no server of ours.

A store is a folder, or a prefix of a bucket (`s3://bucket/prefix`); either has these objects:

    sweeps/<name>/sweep.yaml               the sweep file as it was given, under what -S laid over it
    sweeps/<name>/lease.json               which driver may write here, and its fence
    sweeps/<name>/trials.parquet           one row per trial; its footer names the parts that count
    sweeps/<name>/trials-<fence>.parquet   a copy of it, only in a place that cannot compare and swap
    sweeps/<name>/epochs/live-<fence>.parquet         rows of running trials, replaced whole
    sweeps/<name>/epochs/part-<fence>-<seq>.parquet   rows that are settled; never changed
    sweeps/<name>/events.parquet           what happened, the last 1,000
    sweeps/<name>/commands/<number>-<token>.json      what people ask of the driver, and its answers
    claims/<trial_id>.json                 which of several running sweeps trains a trial that they share
    trials/<trial_id>/<fence>-<attempt>-<token>/      checkpoints, logits, logs of one attempt, shared by all sweeps
    calibration.parquet                    how fast networks were trained on each kind of device

The driver is the only writer of `sweeps/<name>/`, new commands apart; a gang writes only in the folder of its attempt.
Rows go into a part before the trials name it, and leave the live file after; a read goes live, then trials, then the
parts named there. So a row is in at least one place at every moment, and of two rows with one key the highest (fence,
attempt, seq) holds.

`trials.parquet` and `lease.json` change only by compare-and-swap. That makes the fence a fence: the first write of a
new driver makes every later one of its predecessor fail. Where a place cannot do that, a predecessor may overwrite the
trials once: readers take the copy then, whose name has the higher fence, and a driver that lives writes them again.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from orchestrator.calibration import Timing
from orchestrator.errors import NotFoundError, UnreachableError, UsageError
from orchestrator.rows import (
    EPOCHS_SCHEMA,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    records,
    trial_rows,
)
from orchestrator.store.attempts import (
    ATTEMPT,
    LOG_BYTES,
    NO_LOGITS,
    TRIAL_ID,
    AttemptFolder,
    Logits,
    attempt_of,
    matches,
    progress_of,
    without_secrets,
)
from orchestrator.store.claims import Claim, Claims
from orchestrator.store.commands import Answer, Command, Commands, Inbox
from orchestrator.store.follow import Following
from orchestrator.store.lease import Lease, LeaseLostError, Process, read_lease, who
from orchestrator.store.objects import DamagedError, Folder, Objects
from orchestrator.store.space import Belongings, Leftover, Leftovers, belongings, clean, leftovers, remove
from orchestrator.store.tables import (
    KEYS,
    Event,
    Header,
    Look,
    Snapshot,
    SweepFiles,
    Wanted,
    at_epoch,
    encode,
    fit,
    merge,
    only,
    sweep_names,
    totals,
)
from orchestrator.store.timings import add_timings, read_timings
from orchestrator.store.verify import Fault, faults_of
from orchestrator.store.writer import Compaction, SweepWriter

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "LOG_BYTES", "Answer", "AttemptFolder", "Belongings", "Claim", "Claims", "Command", "Commands", "Compaction",
    "DamagedError", "Event", "Fault", "Folder", "Following", "Header", "Inbox", "Lease", "LeaseLostError", "Leftover",
    "Leftovers", "Logits", "Objects", "Process", "ResultStore", "Snapshot", "SweepWriter", "encode", "folder_of",
    "merge", "totals", "who", "without_secrets",
]  # fmt: skip


class ResultStore:
    """Every result of every sweep in one place. Readers see a consistent state whatever writers do or die of."""

    def __init__(self, folder: Objects) -> None:
        self.folder = folder

    @classmethod
    def open(cls, uri: str | Path, *, create: bool = False) -> Self:
        """The store at a folder, a `file://` URI, or `s3://bucket/prefix`; a place that is not there is an empty store.

        `create` makes the folder (never a bucket) and proves that it can be written. Raises UnreachableError if the
        place cannot be read (or written), UsageError for a URI that this version does not know.
        """
        folder = _place(str(uri))
        if create:
            folder.probe()
        else:
            folder.names("")
        return cls(folder)

    @property
    def uri(self) -> str:
        """Opens the same store from another machine."""
        return self.folder.uri

    # ---- sweeps

    def sweeps(self) -> list[str]:
        """Names of the sweeps that have begun, sorted."""
        return sweep_names(self.folder)

    def sweep_file(self, sweep: str) -> str:
        """The sweep file of the latest run, as it was given."""
        return SweepFiles(self.folder, sweep).text()

    def lease(self, sweep: str, *, exact: bool = False) -> Lease | None:
        """Who runs the sweep, or did and died; None when nobody does. `expired` tells the two apart.

        Its age is by this machine's clock; where it is to be `exact`, by the place's, for which a small object is
        written.
        """
        key = f"{SweepFiles(self.folder, sweep).key}/lease.json"
        held = read_lease(self.folder, key, (lambda: self.folder.clock(key)) if exact else time.time)
        return None if held is None or held.released else held

    def commands(self, sweep: str) -> Commands:
        """What people ask of the sweep's driver."""
        return Commands(self.folder, SweepFiles(self.folder, sweep).sweep)

    def claims(self, sweep: str, fence: int) -> Claims:
        """Claims on shared trials, as the sweep's driver with this fence makes them."""
        return Claims(self.folder, sweep, fence)

    def trials(self, sweep: str) -> pa.Table:
        """One row per trial, its latest state; columns of TRIALS_SCHEMA."""
        return fit(SweepFiles(self.folder, sweep).trials()[0], TRIALS_SCHEMA)

    def trial_rows(self, sweep: str) -> list[TrialRow]:
        return trial_rows(SweepFiles(self.folder, sweep).trials()[0])

    def epochs(self, sweep: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per trial and epoch, sorted by both; columns of EPOCHS_SCHEMA, or these of them.

        Of a trial that begins again, the epochs that it has yet to repeat are left out. Raises UsageError for a column
        that there is not.
        """
        names = EPOCHS_SCHEMA.names if columns is None else columns
        unknown = [name for name in names if name not in EPOCHS_SCHEMA.names]
        if unknown:
            raise UsageError(f"rows of epochs have no {', '.join(unknown)}; they have {', '.join(EPOCHS_SCHEMA.names)}")
        read = pa.schema([spec for spec in EPOCHS_SCHEMA if spec.name in names or spec.name in KEYS])
        seen = SweepFiles(self.folder, sweep).look(Wanted(None if columns is None else read.names))
        ids, reached = seen.trials.column("trial_id").to_pylist(), seen.trials.column("epoch").to_pylist()
        return merge([seen.live, *seen.parts], dict(zip(ids, reached, strict=True)), read).select(names)

    def epoch_rows(self, sweep: str, trial_id: str | None = None) -> list[EpochRow]:
        """As `epochs`: all, or those of one trial."""
        if trial_id is None:
            return epoch_rows(self.epochs(sweep))
        seen = SweepFiles(self.folder, sweep).look(Wanted(trial_id=trial_id))
        return _held(seen, [only(each, trial_id) for each in (seen.live, *seen.parts)])

    def rows_at_epoch(self, sweep: str, epoch: int) -> list[EpochRow]:
        """As `epochs`: those of one epoch, of all trials that have reached it."""
        seen = SweepFiles(self.folder, sweep).look()
        return _held(seen, [at_epoch(each, epoch) for each in (seen.live, *seen.parts)])

    def events(self, sweep: str) -> list[Event]:
        """The last 1,000, oldest first."""
        return SweepFiles(self.folder, sweep).events()

    def snapshot(self, sweep: str) -> Snapshot:
        """What a screen shows, from three objects whose size does not grow with the epochs done."""
        seen = SweepFiles(self.folder, sweep).look(None)
        return Snapshot(seen.header, trial_rows(seen.trials), newest(epoch_rows(seen.live)), self.events(sweep))

    def follow(self, sweep: str) -> Following:
        """For who looks at a sweep again and again: what has not changed is not read again."""
        return Following(self.folder, sweep)

    def tables(self, sweep: str) -> tuple[pa.Table, pa.Table]:
        """The trials and the epochs of one moment, as `trials` and `epochs` give them."""
        seen = SweepFiles(self.folder, sweep).look()
        reached = {row["trial_id"]: row["epoch"] for row in records(seen.trials.select(["trial_id", "epoch"]))}
        return fit(seen.trials, TRIALS_SCHEMA), merge([seen.live, *seen.parts], reached)

    def filesystem(self) -> "tuple[FileSystem, str]":
        """For tools that read Parquet by themselves: Arrow's file system, and the path of this store in it."""
        return self.folder.filesystem()

    def find(self, prefix: str) -> list[TrialRow]:
        """The rows, one for each sweep that has it, of the one trial whose id begins so. Raises NotFoundError."""
        found = [row for row in self.all_trial_rows() if row.trial_id.startswith(prefix.lower())]
        ids = sorted({row.trial_id for row in found})
        if not ids:
            damaged = ", ".join(self.damaged_sweeps())
            unsearched = f" (not searched, since they are damaged: {damaged})" if damaged else ""
            raise NotFoundError(
                f"no trial in {self} has an id that begins with {prefix!r}{unsearched}; `mixmo ls` lists sweeps"
            )
        if len(ids) > 1:
            some = f"{', '.join(ids[:5])}{', ...' if ids[5:] else ''}"
            raise NotFoundError(f"{prefix!r} begins {len(ids)} trial ids ({some}): give more digits")
        return found

    def all_trial_rows(self, needed: str | None = None) -> list[TrialRow]:
        """The rows of all sweeps but those that cannot be read: `damaged_sweeps` tells which these are.

        The sweep that is `needed` is read also where a listing does not show it yet; raises UnreachableError if it
        cannot be.
        """
        rows: list[TrialRow] = []
        for sweep in sorted({*self.sweeps(), *([needed] if needed else [])}):
            try:
                rows += self.trial_rows(sweep)
            except (NotFoundError, UnreachableError) as error:  # deleted since it was listed; damaged
                if sweep == needed and isinstance(error, UnreachableError):
                    raise
        return rows

    def damaged_sweeps(self) -> dict[str, str]:
        """What is wrong with each sweep whose trials cannot be read, by its name. Empty where all is well."""
        damaged: dict[str, str] = {}
        for sweep in self.sweeps():
            try:
                SweepFiles(self.folder, sweep).trials()
            except UnreachableError as error:
                damaged[sweep] = error.what if isinstance(error, DamagedError) else str(error)
            except NotFoundError:  # deleted since it was listed
                continue
        return damaged

    def __str__(self) -> str:
        return str(self.folder)

    # ---- attempts

    def attempt(self, trial_id: str, fence: int, attempt: int, token: str) -> "AttemptFolder":
        """The folder of one attempt, for its gang to write in."""
        if not TRIAL_ID.fullmatch(trial_id) or not ATTEMPT.fullmatch(f"{fence}-{attempt}-{token}"):
            raise ValueError(f"no attempt can be called {trial_id}/{fence}-{attempt}-{token}")
        return AttemptFolder(self.folder, f"trials/{trial_id}/{fence}-{attempt}-{token}")

    def checkpoints(self, trial_id: str, named: str | None = None) -> list[str]:
        """Keys of a trial's checkpoints over all attempts, the furthest first. `fetch` checks them.

        `named` is one that the trial's row names: it is among them also where a listing does not show it yet.
        """
        folders = [AttemptFolder(self.folder, f"trials/{trial_id}/{name}") for name in self._attempts(trial_id)]
        keys = {key for folder in folders for key in folder.checkpoints()} | ({named} if named else set())
        return sorted(keys, key=progress_of, reverse=True)

    def fetch(self, key: str, local: Path) -> Path:
        """Copy a stored file to a local path. A checkpoint whose content is not what its name says is refused.

        Raises NotFoundError if it is not there, DamagedError if its content does not match its name.
        """
        digest = self.folder.download(key, local, lambda digest: matches(key, digest))
        if digest is None:
            raise NotFoundError(f"{self}/{key} is not there")
        if not matches(key, digest):
            raise DamagedError(f"{self}/{key} is damaged: its SHA-256 begins with {digest[:16]}; use an older one")
        return local

    def discard(self, key: str) -> None:
        """Delete a file of an attempt: a checkpoint that a newer one has made needless."""
        if not key.startswith("trials/"):
            raise ValueError(f"{key} is not a file of an attempt")
        self.folder.delete(key)

    def logits(self, row: TrialRow) -> Logits:
        """What the trained network of a finished trial makes of the images it was measured on.

        Raises NotFoundError where there are none, DamagedError if they are not what their name says.
        """
        if row.logits is None:
            raise NotFoundError(f"no logits of trial {row.trial_id} in {self}: {_why_no_logits(row)}")
        stored = self.folder.read(row.logits)
        if stored is None:
            raise NotFoundError(f"{self}/{row.logits} is not there: {NO_LOGITS}")
        if not matches(row.logits, stored.digest):
            text = f"{self}/{row.logits} is damaged: its SHA-256 begins with {stored.digest[:16]}; {NO_LOGITS}"
            raise DamagedError(text)
        try:
            return Logits.decode(stored.data)
        except ValueError as error:
            raise DamagedError(f"{self}/{row.logits} was not written by mixmo: {error}; {NO_LOGITS}") from error

    def log(self, trial_id: str, rank: int = 0) -> str:
        """What a rank of the newest attempt printed, its last 256 KiB. Raises NotFoundError."""
        keys = [f"trials/{trial_id}/{name}/log-{rank}.txt" for name in self._attempts(trial_id)]
        for key in sorted(keys, key=lambda key: (self.folder.modified(key), attempt_of(key)), reverse=True):
            stored = self.folder.read(key)
            if stored is not None:
                return stored.data.decode(errors="replace")
        raise NotFoundError(
            f"no log of rank {rank} of trial {trial_id} in {self}: it has not begun, or not yet reported"
        )

    def begun(self) -> list[str]:
        """Ids of the trials that have files here."""
        return [name for name in self.folder.names("trials", folders=True) if TRIAL_ID.fullmatch(name)]

    def _attempts(self, trial_id: str) -> list[str]:
        return [name for name in self.folder.names(f"trials/{trial_id}", folders=True) if ATTEMPT.fullmatch(name)]

    # ---- calibration

    def timings(self) -> list[Timing]:
        """The calibration table: what `mixmo calibrate` has measured."""
        return read_timings(self.folder)

    def add_timings(self, timings: Iterable[Timing]) -> None:
        """Put timings in the place of older ones of the same shapes, device and versions."""
        add_timings(self.folder, timings)

    # ---- room

    def leftovers(self) -> Leftovers:
        """What nothing in the store needs any more, and is old enough. Deletes nothing."""
        return leftovers(self.folder)

    def clean(self, found: Iterable[Leftover]) -> int:
        """Delete leftovers, those that are still needless when their turn comes; the bytes that are free by that."""
        return clean(self.folder, found)

    def belongings(self, sweep: str) -> Belongings:
        """What would go with a sweep. Raises NotFoundError, and RefusedError while a driver runs it."""
        return belongings(self.folder, sweep)

    def remove(self, sweep: str) -> int:
        """Delete a sweep and the attempts at trials that no other sweep has; the bytes that are free by that.

        Whatever may kill it, no reader sees half a sweep, and the same again finishes. Raises NotFoundError, and
        RefusedError while a driver runs it.
        """
        return remove(self.folder, sweep)

    # ---- checking and writing

    def compact(self, sweep: str) -> Compaction:
        """Make one file of a sweep's epochs, and delete what has outlived its hour; again does no harm.

        Raises NotFoundError, and RefusedError while a driver runs the sweep.
        """
        text = SweepFiles(self.folder, sweep).text()
        with self.writer(sweep, sweep_text=text) as writer:
            return writer.compact()

    def verify(self, sweep: str, on_many: Callable[[], None] = lambda: None) -> list[Fault]:
        """Everything that is not as this module would have left it. Reads every object that the sweep names.

        `on_many` is called before numpy is loaded, which is where rows are many.
        """
        return faults_of(SweepFiles(self.folder, sweep), on_many)

    def writer(
        self,
        sweep: str,
        *,
        sweep_text: str,
        holder: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        process: Process | None = None,
        lenient: bool = False,
    ) -> "SweepWriter":
        """The one writer of a sweep. Raises RefusedError while another process holds its lease, DamagedError where what
        is there cannot be read.

        `lenient` takes a sweep over though the live file is lost: for who trains its trials on, whose checkpoints have
        the same rows. Those of trials that have ended are not in it alone.
        """
        files, process = SweepFiles(self.folder, sweep), process or Process.current()
        return SweepWriter(files, sweep_text=sweep_text, holder=holder, now=now, process=process, lenient=lenient)


def _why_no_logits(row: TrialRow) -> str:
    if row.state != "TERMINATED":
        return f"they are stored when it finishes, and it is {row.state}. `mixmo run` runs what is left of {row.sweep}"
    if row.stopped_early:
        return "they are stored after the last epoch, and a scheduler stopped it before"
    return (
        f"it finished under a version that kept none, or the store took none (`mixmo logs {row.trial_id}` says so). "
        f"To have them, run it again under new results (`--results`)"
    )


def _place(uri: str) -> Objects:
    path = folder_of(uri)
    if path is None:
        from orchestrator.store.bucket import Bucket

        return Bucket.open(uri)
    folder = Folder(path)
    if folder.is_file():
        raise UnreachableError(f"{folder} is a file; --results (or MIXMO_RESULTS) names a folder")
    return folder


def _held(seen: Look, tables: Iterable[pa.Table]) -> list[EpochRow]:
    """The rows in these tables that hold: of a trial that begins again, none that it has yet to repeat."""
    ids, epochs = seen.trials.column("trial_id").to_pylist(), seen.trials.column("epoch").to_pylist()
    reached = dict(zip(ids, epochs, strict=True))
    rows = newest([row for table in tables for row in epoch_rows(table)])
    return [row for row in rows if row.epoch <= reached.get(row.trial_id, row.epoch)]


def folder_of(uri: str) -> Path | None:
    """The folder that a path or a `file://` URI names; None for a bucket's address.

    Raises UsageError, which repeats nothing that may be a password, for any other address.
    """
    # With too few slashes it is an address still, not a folder of that name.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/|(?i:(s3|file)):", uri)
    if scheme is None:
        return _absolute(uri)
    name = (scheme[1] or scheme[2]).lower()
    if name == "s3":
        return None
    if name != "file":
        raise UsageError(f"{scheme[1]}://...: results lie in a folder, or in a bucket at s3://bucket/prefix")
    parts = urlsplit(uri)
    if parts.netloc.lower() not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise UsageError(
            "file://...: a folder of this machine is file:///path, with three slashes, no host, and nothing behind a ? "
            "or # (in a name these are %3F and %23)"
        )
    return Path(unquote(parts.path))


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # the working directory is gone; no such user
        raise UnreachableError(f"{path}: {error}; --results (or MIXMO_RESULTS) names a folder") from error
