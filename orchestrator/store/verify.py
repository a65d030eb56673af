"""Is everything in the store as the writer would have left it? Reads every object that a sweep names."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.rows import FINAL, EpochRow, TrialRow, epoch_rows, newest, trial_rows
from orchestrator.store.attempts import NO_LOGITS, matches
from orchestrator.store.lease import read_lease
from orchestrator.store.objects import DamagedError, Objects
from orchestrator.store.tables import ChangedError, Header, NewerError, SweepFiles, sweep_names

_ROWS_LOST = "its rows are lost to this table: put the file back from a copy, or run those trials under a new store"
_HARMLESS = "harmless: no reader takes it, and the next run deletes it after an hour"
_LOST = (
    "its numbers stand and nothing else is lost. For the weights it would have to be trained anew, and there is no "
    "command for that yet"
)
_PASSED_OVER = "its numbers stand; should it be run again, it goes on from an older checkpoint, or from the start"
_REPORT = "keep a copy of the sweep's folder and report this: no driver writes it"


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    """unfinished, rows, duplicate, metrics, checkpoint, logits, missing, damaged or unnamed."""
    trial_id: str | None
    text: str
    advice: str


def faults_of(files: SweepFiles) -> list[Fault]:
    """Everything about a sweep that is not as a driver leaves it. Raises NotFoundError."""
    while True:
        try:
            trials, header, tag = files.trials()
            tables, faults = _tables(files, header)
            if files.trials()[2] == tag:  # else it moved on while we read
                break
        except NewerError:
            raise
        except DamagedError as error:
            return [Fault("damaged", None, error.what, "put the file back from a copy"), *_other_damage(files)]
    rows = trial_rows(trials)
    held = {name: epoch_rows(table) for name, table in tables.items()}
    return [
        *faults,
        *_other_damage(files),
        *_trial_faults(header, rows),
        *_doubled(held),
        *_epoch_faults(rows, newest([row for each in held.values() for row in each])),
        *_checkpoint_faults(files.folder, rows),
        *_logits_faults(files.folder, rows),
        *_unnamed(files, header),
    ]


def _tables(files: SweepFiles, header: Header) -> tuple[dict[str, pa.Table], list[Fault]]:
    tables, faults = {}, []
    for name in (f"live-{header.fence}.parquet", *header.parts):
        try:
            tables[name] = files.part(name)
        except ChangedError as gone:
            faults.append(Fault("missing", None, gone.what, _ROWS_LOST))
        except DamagedError as error:
            faults.append(Fault("damaged", None, error.what, _ROWS_LOST))
    return tables, faults


def _other_damage(files: SweepFiles) -> list[Fault]:
    """Of the small objects on which no result hangs."""
    lease_key = f"{files.key}/lease.json"
    looks: dict[str, Callable[[], object]] = {
        "if no driver runs the sweep, delete it: the next run makes a new one": lambda: read_lease(
            files.folder, lease_key
        ),
        "no result hangs on it: delete it, or run the sweep again": files.events,
        "no result hangs on it: put the file back from a copy, or run the sweep again": files.text,
    }
    faults = []
    for advice, look in looks.items():
        try:
            look()
        except DamagedError as error:
            faults.append(Fault("damaged", None, error.what, advice))
        except NotFoundError:
            faults.append(Fault("missing", None, f"{files.folder}/{files.key}/sweep.yaml is not there", advice))
    return faults


def _checkpoint_faults(folder: Objects, rows: Sequence[TrialRow]) -> list[Fault]:
    """Of trials that ended: any other goes on from the newest whole checkpoint that is there, whatever its row says."""
    faults = []
    for row in rows:
        if row.checkpoint is None or row.state not in FINAL:
            continue
        text = _unlike_its_name(folder, row.checkpoint)
        if text:
            advice = _LOST if row.state == "TERMINATED" else _PASSED_OVER
            faults.append(Fault("checkpoint", row.trial_id, f"checkpoint {text}", advice))
    return faults


def _logits_faults(folder: Objects, rows: Sequence[TrialRow]) -> list[Fault]:
    """Of finished trials. One without logits is none: earlier versions kept none, and a store may have taken none."""
    named = [(row.trial_id, row.logits) for row in rows if row.logits is not None and row.state == "TERMINATED"]
    texts = [(trial_id, _unlike_its_name(folder, key)) for trial_id, key in named]
    return [
        Fault("logits", trial_id, text, f"its own numbers stand, ensembles with it cannot be made: {NO_LOGITS}")
        for trial_id, text in texts
        if text
    ]


def _unlike_its_name(folder: Objects, key: str) -> str | None:
    """What is wrong with a file that is named by its content; None where nothing is."""
    digest = folder.digest(key)
    if digest is None:
        return f"{key} is not there"
    return None if matches(key, digest) else f"{key} is damaged: its SHA-256 begins with {digest[:16]}"


def _unnamed(files: SweepFiles, header: Header) -> list[Fault]:
    """Files that nothing names. Those of a driver that works at this moment may be named soon."""
    folder = files.folder
    working = _fence_at_work(files)
    named = {f"live-{header.fence}.parquet", *header.parts, *header.retired}
    faults = [
        Fault("unnamed", None, f"{files.key}/epochs/{match[0]} is named by nothing", _HARMLESS)
        for match in files.files()
        if match[0] not in named and int(match[2]) != working
    ]
    known: set[str] = set()
    try:
        for sweep in sweep_names(folder):
            known |= set(SweepFiles(folder, sweep).trials()[0].column("trial_id").to_pylist())
    except (UnreachableError, NotFoundError):  # another sweep is damaged or going: these may be its trials
        return faults
    return faults + [
        Fault("unnamed", trial_id, f"trials/{trial_id} belongs to no trial of any sweep", "delete it if you want to")
        for trial_id in folder.names("trials", folders=True)
        if trial_id not in known
    ]


def _fence_at_work(files: SweepFiles) -> int | None:
    try:
        lease = read_lease(files.folder, f"{files.key}/lease.json")
    except DamagedError:
        return None
    return lease.fence if lease is not None and not lease.expired else None


def _trial_faults(header: Header, rows: Sequence[TrialRow]) -> list[Fault]:
    counts = Counter(row.trial_id for row in rows)
    doubled = [
        Fault("duplicate", trial_id, f"{count} rows in trials.parquet", "run the sweep again: it writes one")
        for trial_id, count in counts.items()
        if count > 1
    ]
    return doubled + [
        Fault("unfinished", row.trial_id, f"still {row.state}, though the sweep is done", "run the sweep again")
        for row in rows
        if header.done and row.state not in FINAL
    ]


def _doubled(files: Mapping[str, Sequence[EpochRow]]) -> list[Fault]:
    """Epochs twice in one file, or with one order but two contents in two."""
    faults = []
    seen: dict[tuple[str, int, tuple[int, int, int]], EpochRow] = {}
    for name, rows in files.items():
        for (trial_id, epoch), count in Counter((row.trial_id, row.epoch) for row in rows).items():
            if count > 1:
                faults.append(Fault("duplicate", trial_id, f"{count} rows of epoch {epoch} in {name}", _REPORT))
        for row in rows:
            first = seen.setdefault((row.trial_id, row.epoch, row.order), row)
            if first is not row and repr(first) != repr(row):  # a loss may be nan, which equals nothing
                text = f"two rows of epoch {row.epoch} have one order {row.order}, one of them in {name}"
                faults.append(Fault("duplicate", row.trial_id, text, _REPORT))
    return faults


def _epoch_faults(rows: Sequence[TrialRow], epochs: Sequence[EpochRow]) -> list[Fault]:
    """Epochs of a trial that are not 1, 2, ... up to the one it reached, or that its row contradicts."""
    by_trial: dict[str, list[EpochRow]] = defaultdict(list)
    for each in epochs:
        by_trial[each.trial_id].append(each)
    unknown = set(by_trial) - {row.trial_id for row in rows}
    faults = [
        Fault("rows", trial_id, "has epochs, but no row in trials.parquet", _REPORT) for trial_id in sorted(unknown)
    ]
    for row in rows:
        held = by_trial[row.trial_id]
        if row.cached_from is not None and not held:
            continue  # they are in the sweep that it was taken from
        done = [each.epoch for each in held if each.epoch <= row.epoch]
        if done != list(range(1, row.epoch + 1)):
            text = f"reached epoch {row.epoch}, but has rows of {_ranges(done)}"
            faults.append(Fault("rows", row.trial_id, text, _ROWS_LOST))
        elif row.state == "TERMINATED":
            faults += _contradictions(row, held)
    return faults


def _contradictions(row: TrialRow, held: Sequence[EpochRow]) -> list[Fault]:
    if held and held[-1].epoch > row.epoch:
        text = f"finished at epoch {row.epoch}, but has a row of epoch {held[-1].epoch}"
        return [Fault("rows", row.trial_id, text, _REPORT)]
    evaluated = next((each for each in reversed(held) if each.metrics.get("top1") is not None), None)
    faults = []
    for name, value in row.metrics.items():
        last = next((v for each in reversed(held) if (v := each.metrics.get(name)) is not None), None)
        allowed = [last, evaluated.metrics.get(name) if evaluated else None]
        if not any(_same(value, each) for each in allowed):
            text = f"{name} is {value} in trials.parquet, but {last} in its last epoch"
            faults.append(Fault("metrics", row.trial_id, text, _REPORT))
    return faults


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


def _ranges(epochs: Sequence[int]) -> str:
    """`1-4, 6` for [1, 2, 3, 4, 6]."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and epoch == spans[-1][1] + 1:
            spans[-1][1] = epoch
        else:
            spans.append([epoch, epoch])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "no epoch"
