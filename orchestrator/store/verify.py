"""Is everything in the store as the writer would have left it? Reads every object that a sweep names."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.rows import (
    EPOCHS_SCHEMA,
    FINAL,
    METRIC_COLUMNS,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    trial_rows,
)
from orchestrator.store.attempts import ATTEMPT, CHECKPOINT, LOGITS, NO_LOGITS, matches, progress_of
from orchestrator.store.lease import read_lease
from orchestrator.store.objects import DamagedError, Objects
from orchestrator.store.tables import (
    COPY,
    RERUN,
    ChangedError,
    Header,
    NewerError,
    SweepFiles,
    at_once,
    fit,
    numbers,
    only,
    sweep_names,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROWS_LOST = "its rows are lost to this table: put the file back from a copy, or run those trials under a new store"
_COME_AGAIN = f"{RERUN[0].lower()}{RERUN[1:]}"
_HARMLESS = "harmless: no reader takes it, and the next run deletes it after an hour"
_LOST = (
    "its numbers stand and nothing else is lost. For the weights it would have to be trained anew, and there is no "
    "command for that yet"
)
_PASSED_OVER = "its numbers stand; should it be run again, it goes on from an older checkpoint, or from the start"
_STALE = "readers take the copy, whose fence is higher; `mixmo run` or `mixmo compact` writes the table again"
_FOREIGN = "no reader takes it: delete it if you want to"
_ORPHANED = "no reader takes it: `mixmo gc` deletes what is older than an hour, or delete it if you want to"
_REPORT = "keep a copy of the sweep's folder and report this: no driver writes it"


FEW = 3_000
"""To look at so many rows one by one takes no longer than to load numpy."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    """unfinished, rows, duplicate, metrics, checkpoint, logits, missing, damaged, stale or unnamed."""
    trial_id: str | None
    text: str
    advice: str


def faults_of(files: SweepFiles, on_many: Callable[[], None] = lambda: None) -> list[Fault]:
    """Everything about a sweep that is not as a driver leaves it. `on_many`: before numpy is loaded. Raises
    NotFoundError.
    """
    try:
        rows, header, faults = _table_faults(files, on_many)
        stale = files.overwritten()
    except NewerError:
        raise
    except DamagedError as error:
        return [Fault("damaged", None, error.what, "put the file back from a copy"), *_other_damage(files)]
    if stale:
        text = f"{files.folder}/{files.key}/trials.parquet was overwritten by a driver that had lost the sweep"
        faults.append(Fault("stale", None, text, _STALE))
    return [
        *faults,
        *_other_damage(files),
        *_checkpoint_faults(files.folder, rows),
        *_logits_faults(files.folder, rows),
        *_unnamed(files, header, rows),
    ]


def _table_faults(
    files: SweepFiles, on_many: Callable[[], None], tries: int = 4
) -> tuple[list[TrialRow], Header, list[Fault]]:
    """What the tables have against each other. A driver may go on while they are read: then once more."""
    for last in (False,) * tries + (True,):
        trials, header, tag = files.trials()
        tables, faults = _tables(files, header)
        rows = trial_rows(trials)
        faults += [*_trial_faults(header, rows), *_epoch_faults(rows, trials, tables, on_many)]
        if last or not faults or files.trials()[2] == tag:
            return rows, header, faults
    raise AssertionError("the last try returns")


def _tables(files: SweepFiles, header: Header) -> tuple[dict[str, pa.Table], list[Fault]]:
    def read(name: str) -> pa.Table | Fault:
        advice = _COME_AGAIN if name.startswith("live-") else _ROWS_LOST
        try:
            return files.part(name)
        except ChangedError as gone:
            return Fault("missing", None, gone.what, advice)
        except DamagedError as error:
            return Fault("damaged", None, error.what, advice)

    names = [f"live-{header.fence}.parquet", *header.parts]
    found = dict(zip(names, at_once(read, names), strict=True))
    tables = {name: each for name, each in found.items() if not isinstance(each, Fault)}
    return tables, [each for each in found.values() if isinstance(each, Fault)]


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
    """Of trials that ended: any other goes on from the newest whole checkpoint that is there, whatever its row says. So
    does one that ended unfinished, whose driver was killed, or another sweep trained it on, after it had a newer one.
    """
    named = [row for row in rows if row.checkpoint is not None and row.state in FINAL]
    texts = at_once(lambda key: _unlike_its_name(folder, key), [str(row.checkpoint) for row in named])
    return [
        Fault("checkpoint", row.trial_id, f"checkpoint {text}", _LOST if row.state == "TERMINATED" else _PASSED_OVER)
        for row, text in zip(named, texts, strict=True)
        if text and not (_is_unfinished(row) and _is_overtaken(folder, str(row.checkpoint)))
    ]


def _is_unfinished(row: TrialRow) -> bool:
    return row.state != "TERMINATED" or row.stopped_early


def _is_overtaken(folder: Objects, lost: str) -> bool:
    """Whether its trial has a whole checkpoint that is further."""
    further = [
        key
        for key in folder.sizes(lost.rpartition("/")[0].rpartition("/")[0])
        if CHECKPOINT.fullmatch(key.rpartition("/")[2]) and progress_of(key)[:2] > progress_of(lost)[:2]
    ]
    return any(_unlike_its_name(folder, key) is None for key in further)


def _logits_faults(folder: Objects, rows: Sequence[TrialRow]) -> list[Fault]:
    """Of finished trials. One without logits is none: earlier versions kept none, and a store may have taken none."""
    named = [row for row in rows if row.logits is not None and row.state == "TERMINATED"]
    texts = at_once(lambda key: _unlike_its_name(folder, key), [str(row.logits) for row in named])
    return [
        Fault("logits", row.trial_id, text, f"its own numbers stand, ensembles with it cannot be made: {NO_LOGITS}")
        for row, text in zip(named, texts, strict=True)
        if text
    ]


def _unlike_its_name(folder: Objects, key: str) -> str | None:
    """What is wrong with a file that is named by its content; None where nothing is."""
    digest = folder.digest(key)
    if digest is None:
        return f"{key} is not there"
    return None if matches(key, digest) else f"{key} is damaged: its SHA-256 begins with {digest[:16]}"


_FILES = re.compile(rf"sweep\.yaml|lease\.json|events\.parquet|trials\.parquet|{COPY.pattern}")
_FOLDERS = ("epochs", "commands", "claims")
_LOG = re.compile(r"log-\d+\.txt")


def _unnamed(files: SweepFiles, header: Header, rows: Sequence[TrialRow]) -> list[Fault]:
    """Objects that nothing names. Those of a driver that works at this moment may be named soon."""
    working = _fence_at_work(files)
    named = {f"live-{header.fence}.parquet", *header.parts, *header.retired}
    faults = [
        Fault("unnamed", None, f"{files.key}/epochs/{match[0]} is named by nothing", _HARMLESS)
        for match in files.files()
        if match[0] not in named and int(match[2]) != working
    ]
    foreign = [name for name in files.folder.names(files.key) if not _FILES.fullmatch(name)]
    foreign += [f"{name}/" for name in files.folder.names(files.key, folders=True) if name not in _FOLDERS]
    foreign += [f"epochs/{name}" for name in files.strangers()]
    faults += [Fault("unnamed", None, f"{files.key}/{name} is no file of mixmo", _FOREIGN) for name in foreign]
    return faults + _unnamed_of_trials(files.folder, {row.trial_id for row in rows})


def _unnamed_of_trials(folder: Objects, own: set[str]) -> list[Fault]:
    """Under `trials/`: what belongs to no trial at all, and what a trial of this sweep has that no gang writes."""
    strange: dict[str, list[str]] = defaultdict(list)
    for key in folder.sizes("trials"):
        trial_id, *inner = key.split("/")[1:]
        if trial_id not in own or not _of_an_attempt(inner):
            strange[trial_id].append(key)
    faults = [
        Fault("unnamed", trial_id, f"{key} is no file of an attempt", _FOREIGN)
        for trial_id in strange.keys() & own
        for key in strange[trial_id]
    ]
    others = sorted(strange.keys() - own)
    known: set[str] = set()
    try:
        for sweep in sweep_names(folder) if others else ():
            known |= set(SweepFiles(folder, sweep).trials()[0].column("trial_id").to_pylist())
    except (UnreachableError, NotFoundError):  # another sweep is damaged or going: these may be its trials
        return faults
    return faults + [
        Fault("unnamed", trial_id, f"trials/{trial_id} belongs to no trial of any sweep", _ORPHANED)
        for trial_id in others
        if trial_id not in known
    ]


def _of_an_attempt(inner: Sequence[str]) -> bool:
    if len(inner) != 2:
        return False
    folder, name = inner
    return bool(ATTEMPT.fullmatch(folder) and any(kind.fullmatch(name) for kind in (CHECKPOINT, LOGITS, _LOG)))


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


def _epoch_faults(
    rows: Sequence[TrialRow], trials: pa.Table, tables: Mapping[str, pa.Table], on_many: Callable[[], None]
) -> list[Fault]:
    """What the rows of epochs have against each other, and against the trials. There may be millions: where they are
    more than a few, those trials are looked at row by row that a look at all columns at once does not clear.
    """
    if sum(map(len, tables.values())) <= FEW:
        suspects = {each for table in (trials, *tables.values()) for each in table.column("trial_id").to_pylist()}
    else:
        on_many()
        suspects = _suspects(fit(trials, TRIALS_SCHEMA), [fit(table, EPOCHS_SCHEMA) for table in tables.values()])
    held = {name: epoch_rows(only(table, *suspects)) for name, table in tables.items()}
    epochs = newest([row for each in held.values() for row in each])
    unknown = {each.trial_id for each in epochs} - {row.trial_id for row in rows}
    return [
        *(Fault("rows", trial_id, "has epochs, but no row in trials.parquet", _REPORT) for trial_id in sorted(unknown)),
        *_doubled(held),
        *_gaps([row for row in rows if row.trial_id in suspects], epochs),
    ]


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rows of epochs side by side. Trials are numbers here: places in `ids`."""

    table: pa.Table
    ids: Sequence[str]
    file: "NDArray[np.int64]"
    trial: "NDArray[np.int64]"
    keys: "Sequence[NDArray[np.int64]]"
    """Epoch, fence, attempt, seq."""

    def same(self, order: "NDArray[np.int64]", columns: "Iterable[NDArray[np.int64]]") -> "NDArray[np.bool_]":
        """Whether a row and the next one in this order are equal in all of these."""
        import numpy as np

        equal: NDArray[np.bool_] = np.all([np.diff(each[order]) == 0 for each in columns], axis=0)
        return equal


def _suspects(trials: pa.Table, tables: Sequence[pa.Table]) -> set[str]:
    """The trials among which all are that have a fault in their rows."""
    import numpy as np

    epochs = pa.concat_tables(tables) if tables else EPOCHS_SCHEMA.empty_table()
    named = pa.chunked_array([*trials.column("trial_id").chunks, *epochs.column("trial_id").chunks], pa.string())
    encoded = named.combine_chunks().dictionary_encode()
    codes = np.from_dlpack(encoded.indices).astype(np.int64)
    own, rows = (
        codes[: len(trials)],
        _Columns(
            table=epochs,
            ids=encoded.dictionary.to_pylist(),
            file=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
            trial=codes[len(trials) :],
            keys=[_numbers(epochs.column(name)) for name in ("epoch", "fence", "attempt", "seq")],
        ),
    )
    wrong = np.ones(len(rows.ids), dtype=bool)
    wrong[own] = False  # all that are in no row of the trials remain
    order = np.lexsort((*reversed(rows.keys), rows.trial))
    last = order[_last(~rows.same(order, (rows.trial, rows.keys[0])), order)]
    wrong[_repeated(rows, order)] = True
    wrong |= _uneven(rows, last, own, _numbers(trials.column("epoch")))
    wrong[own[_contradicting(rows, last, own, trials)]] = True
    return {rows.ids[code] for code in np.flatnonzero(wrong).tolist()}


def _last(changes: "NDArray[np.bool_]", rows: "NDArray[np.int64]") -> "NDArray[np.bool_]":
    """Which rows are the last of their kind, of whether the next one is of another."""
    import numpy as np

    return np.concatenate([changes, np.ones(min(1, len(rows)), dtype=bool)])


def _repeated(rows: _Columns, order: "NDArray[np.int64]") -> "NDArray[np.int64]":
    """Trials with an epoch twice in one file, or with one order but two contents in two."""
    import numpy as np

    by_file = np.lexsort((rows.keys[0], rows.trial, rows.file))
    twice = by_file[1:][rows.same(by_file, (rows.file, rows.trial, rows.keys[0]))]
    same = rows.same(order, (rows.trial, *rows.keys))
    left, right = order[:-1][same], order[1:][same]
    unlike = left[_differ(rows.table, left, rows.table, right, EPOCHS_SCHEMA.names)]
    return rows.trial[np.append(twice, unlike)]


def _uneven(
    rows: _Columns, last: "NDArray[np.int64]", own: "NDArray[np.int64]", epoch: "NDArray[np.int64]"
) -> "NDArray[np.bool_]":
    """Whether each trial lacks one of the epochs that it has reached. `last` is one row of each (trial, epoch)."""
    import numpy as np

    reached = np.zeros(len(rows.ids), dtype=np.int64)
    reached[own] = epoch
    inside = last[(rows.keys[0][last] >= 1) & (rows.keys[0][last] <= reached[rows.trial[last]])]
    return np.not_equal(np.bincount(rows.trial[inside], minlength=len(rows.ids)), reached)


def _contradicting(
    rows: _Columns, last: "NDArray[np.int64]", own: "NDArray[np.int64]", trials: pa.Table
) -> "NDArray[np.int64]":
    """Numbers of rows of finished trials that are not as their last epoch says."""
    import numpy as np

    ends = last[_last(np.diff(rows.trial[last]) != 0, last)]
    end = np.full(len(rows.ids), -1)
    end[rows.trial[ends]] = ends
    state = np.array([each == "TERMINATED" for each in trials.column("state").to_pylist()], dtype=bool)
    finished = np.flatnonzero(state & (end[own] >= 0))
    beyond = rows.keys[0][end[own[finished]]] != _numbers(trials.column("epoch"))[finished]
    unlike: NDArray[np.bool_] = beyond | _differ(trials, finished, rows.table, end[own[finished]], METRIC_COLUMNS)
    return finished[unlike]


def _differ(
    one: pa.Table, rows: "NDArray[np.int64]", other: pa.Table, others: "NDArray[np.int64]", names: Sequence[str]
) -> "NDArray[np.bool_]":
    """Whether each row of one table has, in any of these columns, another value than its partner of the other."""
    import numpy as np

    differ = np.zeros(len(rows), dtype=bool)
    for name in names:
        a, b = one.column(name).take(numbers(rows)), other.column(name).take(numbers(others))
        if pa.types.is_string(a.type):
            differ |= np.array([x != y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)], dtype=bool)
        else:
            x, y = _numbers(a), _numbers(b)
            differ |= (x != y) & ~(np.isnan(x) & np.isnan(y))  # not a number is the same as itself here
    return differ


def _numbers(column: pa.ChunkedArray) -> Any:
    """A column of numbers or times as an array; what is null is a number that no measurement gives."""
    import numpy as np
    import pyarrow.compute as pc  # a tenth of the time of every command that loads the store

    if pa.types.is_floating(column.type):
        return np.from_dlpack(pc.fill_null(column, -1.7976931348623157e308).combine_chunks())
    return np.from_dlpack(pc.fill_null(column.cast(pa.int64()), -(2**63)).combine_chunks())


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


def _gaps(rows: Sequence[TrialRow], epochs: Sequence[EpochRow]) -> list[Fault]:
    """Epochs of a trial that are not 1, 2, ... up to the one it reached, or that its row contradicts."""
    by_trial: dict[str, list[EpochRow]] = defaultdict(list)
    for each in epochs:
        by_trial[each.trial_id].append(each)
    faults = []
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
