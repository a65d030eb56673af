"""A sweep as it goes on, for a screen that stays open all day: three requests a look, and only what changed is read."""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from orchestrator.errors import NotFoundError
from orchestrator.rows import (
    EPOCHS_REQUIRED,
    EPOCHS_SCHEMA,
    TRIALS_SCHEMA,
    EpochRow,
    TrialRow,
    epoch_rows,
    newest,
    trial_rows,
)
from orchestrator.store.lease import Lease, Process, decoded, read_lease
from orchestrator.store.objects import Change, Objects
from orchestrator.store.tables import RERUN, Event, Header, Snapshot, SweepFiles, Wanted, decode, fit, numbers

SHOWN = ("sweep", "trial_id", "epoch", "attempt", "fence", "seq", "updated_at", "wall_s", "gpu_seconds", "images_per_s",
         "top1")  # fmt: skip
"""Columns of the running epochs that are read; the other metrics are null."""


class Following:
    """Looks at a sweep again and again. Rows that are as they were are the same objects from look to look.

    A look makes three requests, each on condition that the object has changed: trials, live epochs, and events; where
    the trials are as they were, events and the lease take turns. What a place without compare-and-swap needs beyond
    that is asked only when its trials changed.
    """

    def __init__(self, folder: Objects, sweep: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._folder, self._clock = SweepFiles(folder, sweep), folder, clock
        self._marks: dict[str, str] = {}
        self._trials: pa.Table = TRIALS_SCHEMA.empty_table()
        self._rows: list[TrialRow] = []
        self._header = Header()
        self._live: dict[tuple[Any, ...], EpochRow] = {}
        self._live_rows: Sequence[EpochRow] = ()
        self._events: Sequence[Event] = ()
        self._lease: Lease | None = None
        self._lease_at: float | None = None
        """When it was last seen to be another one."""
        self._lease_is_next = False
        self._shot: Snapshot | None = None

    def look(self) -> Snapshot:
        """The sweep as it stands: the very snapshot of the last look where nothing has changed.

        Raises NotFoundError if there is no such sweep, UnreachableError; a later call goes on where this one failed.
        """
        moved = self._look_at_trials()
        fresh = self._look_at_live() or moved
        if moved or not self._lease_is_next:
            fresh = self._look_at_events() or fresh
        else:
            self._look_at_lease()
        self._lease_is_next = moved or not self._lease_is_next
        if fresh or self._shot is None:
            self._shot = Snapshot(self._header, self._rows, self._live_rows, self._events)
        return self._shot

    def driven(self) -> bool:
        """Whether a living driver holds the sweep, as far as the looks so far tell; the first call asks.

        Whether one that cannot be seen still lives is told by this machine's clock: since when its lease is the same.
        """
        if self._lease_at is None:
            self._lease = read_lease(self._folder, self._lease_key)
            self._lease_at = self._clock() - (self._lease.age_s if self._lease else 0.0)
        if self._lease is None:
            return False
        return not replace(self._lease, age_s=self._clock() - self._lease_at).over(Process.current())

    @property
    def _lease_key(self) -> str:
        return f"{self._files.key}/lease.json"

    def _changed(self, key: str, take: Callable[[Change], None]) -> bool:
        """Ask for an object, and take it if it is another. Its mark is kept only then: who fails is asked again."""
        change = self._folder.changed(key, self._marks.get(key))
        if change is None:
            return False
        take(change)
        self._marks[key] = change.mark
        return True

    def _look_at_trials(self) -> bool:
        return self._changed(f"{self._files.key}/trials.parquet", self._take_trials)

    def _take_trials(self, change: Change) -> None:
        if change.stored is None:
            self._files.trials()  # says what is there instead; or it has come this moment
            raise NotFoundError(f"sweep {self._files.sweep} in {self._folder} has just changed: ask again")
        table, header = self._files.trials_of(change.stored)
        if header.copied:  # an older driver may have overwritten them
            table, header, _ = self._files.trials()
        if not table.equals(self._trials):
            self._rows = _rows(fit(table, TRIALS_SCHEMA), self._trials, self._rows)
            self._trials = fit(table, TRIALS_SCHEMA)
        self._header = header

    def _look_at_live(self) -> bool:
        return self._changed(self._files.live_key(self._header.fence), self._take_live)

    def _take_live(self, change: Change) -> None:
        if change.stored is None:
            return
        name = f"{self._folder}/{self._files.live_key(self._header.fence)}"
        table = decode(change.stored.data, name, EPOCHS_SCHEMA, EPOCHS_REQUIRED, Wanted(columns=SHOWN), advice=RERUN)
        columns = [table.column(name).to_pylist() for name in ("trial_id", "epoch", "fence", "attempt", "seq")]
        keys = list(zip(*columns, strict=True))
        unknown = [i for i, key in enumerate(keys) if key not in self._live]
        read = dict(zip([keys[i] for i in unknown], epoch_rows(_taken(table, unknown)), strict=True))
        self._live = {key: self._live.get(key) or read[key] for key in keys}
        self._live_rows = newest(list(self._live.values()))

    def _look_at_events(self) -> bool:
        def take(change: Change) -> None:
            self._events = self._files.events_of(change.stored)

        return self._changed(f"{self._files.key}/events.parquet", take)

    def _look_at_lease(self) -> None:
        def take(change: Change) -> None:
            held = decoded(change.stored.data, 0.0, self._lease_key) if change.stored else None
            known = replace(self._lease, age_s=0.0) if self._lease else None
            if self._lease_at is None or held != known:
                self._lease_at = self._clock()
            self._lease = None if held is None or held.released else held

        self._changed(self._lease_key, take)


def _rows(table: pa.Table, before: pa.Table, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows of a table, those that are as before taken over: to make one costs more than all else."""
    if len(before) != len(rows) or not len(rows) or not table.column("trial_id").equals(
        before.column("trial_id")
    ):  # fmt: skip
        return trial_rows(table)
    moved = _moved(table, before)
    new = iter(trial_rows(_taken(table, moved)))
    made = list(rows)
    for i in moved:
        made[i] = next(new)
    return made


def _moved(table: pa.Table, before: pa.Table) -> list[int]:
    """Numbers of the rows that are not as they were."""
    import pyarrow.compute as pc  # who looks once does without

    moved = pa.nulls(len(table), pa.bool_()).fill_null(False)
    for name in table.schema.names:
        new, old = table.column(name).combine_chunks(), before.column(name).combine_chunks()
        if new.equals(old):
            continue
        if pa.types.is_list(new.type):  # has no comparison of its own
            differs = pa.array([a != b for a, b in zip(new.to_pylist(), old.to_pylist(), strict=True)])
        else:
            differs = pc.or_(pc.fill_null(pc.not_equal(new, old), False), pc.xor(pc.is_null(new), pc.is_null(old)))
        moved = pc.or_(moved, differs)
    return [i for i, each in enumerate(moved.to_pylist()) if each]


def _taken(table: pa.Table, wanted: Sequence[int]) -> pa.Table:
    return table.take(numbers(array("q", wanted)))
