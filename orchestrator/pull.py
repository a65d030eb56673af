"""Copies of sweeps for other tools: two tables of one moment, and the sweep files, in a folder of the user's own.

Unlike the store's own files these need no rules to be read: `epochs` has one row per trial and epoch.
"""

import contextlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from orchestrator.progress import driven
from orchestrator.rows import FINAL, TrialRow, trial_rows
from orchestrator.store import DamagedError, Folder, ResultStore, encode

Format = Literal["parquet", "csv", "arrow"]
State = Literal["finished", "running", "stopped", "unknown"]
"""`stopped`: trials are left, and no driver runs them. `unknown`: whether one does cannot be told."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """A file that was written."""

    path: Path
    rows: int | None
    """None where it is no table."""
    size: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class SweepState:
    """How far a sweep was when it was pulled."""

    sweep: str
    state: State
    ended: int
    """Trials in a final state, failed ones too."""
    trials: int


@dataclass(slots=True)
class Copy:
    """What `pull` has written, and what of it is worth a word."""

    files: list[Pulled] = field(default_factory=list)
    sweeps: list[SweepState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pull(
    store: ResultStore,
    sweeps: Sequence[str],
    dest: Path,
    *,
    format: Format = "parquet",  # noqa: A002
    logits: bool = False,
    force: bool = False,
) -> Copy:
    """Write `trials`, `epochs` and `<sweep>.yaml` into a folder, which is made where it is not there.

    The tables have the sweeps one below the other (column `sweep`), each as it stood at one moment. With `logits` those
    of the finished trials go to `logits/<trial_id>.npz`. All is read before a file changes, and no file is ever half
    written. Raises UsageError where a file is in the way (`force` replaces it), RefusedError for a folder inside the
    results, NotFoundError, DamagedError, and UnreachableError where the store or the folder is out of reach.
    """
    sweeps = list(dict.fromkeys(sweeps))
    tables = {name: dest / f"{name}.{format}" for name in ("trials", "epochs")}
    texts = {dest / f"{sweep}.yaml": b"" for sweep in sweeps}
    _check(store, dest, [*tables.values(), *texts, *([dest / "logits"] if logits else [])], force=force)
    copy, read = Copy(), []
    for sweep in sweeps:
        read.append(_tables(store, sweep))
        copy.sweeps.append(_state(store, sweep, trial_rows(read[-1][0])))
        try:
            texts[dest / f"{sweep}.yaml"] = store.sweep_file(sweep).encode()
        except (DamagedError, NotFoundError) as error:  # no result hangs on it
            del texts[dest / f"{sweep}.yaml"]
            copy.notes.append(f"{sweep}.yaml is left out: {error}")
    whole = {name: pa.concat_tables(each) for name, each in zip(tables, zip(*read, strict=True), strict=True)}
    data = {tables[name]: encoded(table, format) for name, table in whole.items()}
    _write({**data, **texts})
    rows = {tables[name]: len(table) for name, table in whole.items()}
    copy.files = [Pulled(path, rows.get(path), len(content)) for path, content in {**data, **texts}.items()]
    if logits:
        _pull_logits(store, trial_rows(whole["trials"]), dest / "logits", copy)
    return copy


def _check(store: ResultStore, dest: Path, files: Iterable[Path], *, force: bool) -> None:
    """What can be refused before anything is read."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(dest)):
        raise UsageError(f"{dest}: sweeps are pulled into a folder of this machine")
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{dest}: this is a file; name a folder")
    if isinstance(store.folder, Folder):
        root, there = store.folder.root.resolve(), dest.resolve()
        if there == root or root in there.parents:
            raise RefusedError(
                f"{dest} lies in the results themselves ({root}), where it could harm them: name another"
            )
    taken = [path.name for path in files if os.path.lexists(path)]
    if taken and not force:
        raise UsageError(f"{dest} has {', '.join(taken)} already: --yes replaces what is there, or name another folder")


def _tables(store: ResultStore, sweep: str) -> tuple[pa.Table, pa.Table]:
    try:
        return store.tables(sweep)
    except DamagedError as error:
        raise DamagedError(
            f"{sweep} cannot be pulled, and nothing was written: {error.what}",
            f"{error.advice or 'Try again'}; `mixmo verify {sweep}` lists all that is wrong",
        ) from error


def _state(store: ResultStore, sweep: str, rows: Sequence[TrialRow]) -> SweepState:
    ended = sum(row.state in FINAL for row in rows)
    state: State = "finished"
    if ended < len(rows):
        try:
            state = "running" if driven(store, sweep) else "stopped"
        except DamagedError:
            state = "unknown"
    return SweepState(sweep, state, ended, len(rows))


def _pull_logits(store: ResultStore, rows: Sequence[TrialRow], folder: Path, copy: Copy) -> None:
    keys = {row.trial_id: row.logits for row in rows if row.logits is not None and row.state == "TERMINATED"}
    for trial_id, key in keys.items():
        try:
            path = store.fetch(key, folder / f"{trial_id}.npz")
            copy.files.append(Pulled(path, None, path.stat().st_size))
        except (DamagedError, NotFoundError) as error:
            copy.notes.append(f"the logits of {trial_id} are left out: {error}")


def _write(files: Mapping[Path, bytes]) -> None:
    """All of them beside their places first, so that a full disk changes nothing; then each takes its place whole."""
    staged = {path: path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp") for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with staged[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        place, why = error.filename or next(iter(files)).parent, error.strerror or error
        raise UnreachableError(f"cannot write {place}: {why}. Make room there or name another folder") from error
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- formats


def encoded(table: pa.Table, format: Format) -> bytes:  # noqa: A002
    """The table as a file: Parquet as the store's own, CSV, or Arrow's IPC format (Feather), uncompressed."""
    if format == "parquet":
        return encode(table)
    return as_csv(table) if format == "csv" else _as_arrow(table)


def _as_arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def as_csv(table: pa.Table) -> bytes:
    """As pandas and polars read it: words in quotation marks, null as nothing, `NaN` as NaN, times in UTC with a Z.
    Lists are JSON.
    """
    import pyarrow.csv

    sink = io.BytesIO()
    pyarrow.csv.write_csv(_flat(table), sink)
    if not any(pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py() for column in table.columns):
        return sink.getvalue()  # to look for them costs more than all else
    return _PLAIN_NAN.sub(lambda found: b"NaN" if found[0] == b"nan" else found[0], sink.getvalue())


_PLAIN_NAN = re.compile(rb'"(?:[^"]|"")*"|(?<=[,\n])nan(?=[,\n])')
"""A word in quotation marks, or a bare nan, which polars takes for a word."""


def _flat(table: pa.Table) -> pa.Table:
    """Lists and the like as JSON, spans of time as words."""
    for index, spec in enumerate(table.schema):
        if pa.types.is_nested(spec.type) or pa.types.is_interval(spec.type):
            written = [None if each is None else _written(each) for each in table.column(index).to_pylist()]
            table = table.set_column(index, spec.name, pa.array(written, pa.string()))
    return table


def _written(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
