"""When a trial is saved, and how its checkpoints reach the store while training goes on."""

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch

from mixmo_core import train
from orchestrator.dispatcher import EpochReport
from orchestrator.errors import MixmoError, UnreachableError
from orchestrator.store import AttemptFolder, DamagedError, ResultStore
from orchestrator.store.attempts import progress_of

_T = TypeVar("_T")

LONGEST_WAIT_S = 30.0
"""Between two tries at a store that takes no checkpoint."""
UPLOAD_SHARE = 0.05
"""Of the time that an upload may be under way: it takes nothing from a GPU, but from the network and the processor."""


class Saver:
    """When to write a checkpoint, and which to keep. Only rank 0 saves.

    Training waits while its state is copied. A thread writes the copy to a file and takes that to the store, one at a
    time, and tries again for as long as the store takes none. Then older ones go: but for the newest two, since a
    damaged one is to have one before it, and for what the trial's row names, until it names a newer one.
    """

    SHARE = 0.03
    """Of the time that training may wait for its checkpoints."""
    AT_RISK_S = 600.0
    """Work that a kill may cost, at most, the upload of what saves it included."""
    WITHIN_S = 30.0
    """Before a checkpoint in the middle of an epoch, at least: shorter epochs are saved when they are done."""

    def __init__(
        self,
        store: ResultStore,
        folder: AttemptFolder,
        every_s: float | None = None,
        milestones: Collection[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s` is the time from one state that is saved to the next; None: as the rules above have it. What is
        saved after one of the `milestones` stays: another trial may go on from it, and the driver knows when none does.
        """
        self._store, self._folder, self._every_s, self._clock = store, folder, every_s, clock
        self._milestones = milestones
        self._saved_at = clock()  # when the newest state was copied
        self._blocked_s = self._upload_s = 0.0  # what the last one took
        self._changed = threading.Condition()  # holds all that follows
        self._waiting: _Snapshot | None = None
        self._uploading = self._closed = False
        self._thread: threading.Thread | None = None
        self._keys: list[str] = []  # in the store, oldest first
        self._named: str | None = None
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What is not stored by now is given up, after the try that is under way. `wait` comes before."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()

    def adopt(self, key: str, others: Sequence[str]) -> None:
        """An earlier attempt's checkpoint is the newest so far; `others` go when there are newer ones."""
        self._keys = [*(other for other in reversed(others) if other != key), key]

    # ---- for the training

    def due(self, *, within: bool) -> bool:
        """Whether to save at the end of an epoch, or `within` one. Not while an upload is under way: the state that
        is there when it ends is worth more.
        """
        return not self._is_busy() and self._clock() - self._saved_at >= self._pause_s(within)

    def save(self, told: train.Epoch | train.Moment, reports: Sequence[EpochReport], logits: str | None) -> None:
        """Copy the state, the rows so far, and after the last epoch where its logits are, to be stored while training
        goes on. An earlier state that is not stored yet is given up, after the try that is under way.
        """
        began = self._clock()
        rows = [dataclasses.asdict(report) for report in reports]
        snapshot = _Snapshot({**_copied(told.state()), "rows": rows, "logits": logits}, began)
        with self._changed:
            self._waiting = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._saved_at, self._blocked_s = began, self._clock() - began

    def wait(self, patience_s: float) -> bool:
        """Until what was saved is stored, or patience is at its end. Whether it is stored."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._uploading), patience_s)

    def unnamed(self) -> str | None:
        """The newest checkpoint in the store, if the trial's row does not name it yet."""
        with self._changed:
            return self._keys[-1] if self._keys and self._keys[-1] != self._named else None

    def name(self, key: str) -> None:
        """The dispatcher has been told of this checkpoint."""
        with self._changed:
            self._named = key

    def lines(self) -> list[str]:
        """What there is to say since the last call, for the log."""
        with self._changed:
            lines, self._lines = self._lines, []
        return lines

    def clear(self) -> None:
        """The trial has finished: its last checkpoint is enough. If none is to stay, the driver drops it once it has
        written the trial's row.
        """
        for key in self._keys[:-1]:
            if key != self._named and self._is_ours(key):  # the last one came too late for the row
                self._store.discard(key)

    def _pause_s(self, within: bool) -> float:
        if self._every_s is not None:
            return self._every_s
        shares_s = max(self._blocked_s / self.SHARE, self._upload_s / UPLOAD_SHARE)
        return min(max(shares_s, self.WITHIN_S if within else 0.0), self.AT_RISK_S - self._upload_s)

    def _is_busy(self) -> bool:
        with self._changed:
            return self._waiting is not None or self._uploading

    # ---- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._waiting is None:
                    return
                snapshot, self._waiting, self._uploading = self._waiting, None, True
            try:
                self._deliver(snapshot)
            except Exception as error:  # a trial is worth more than its insurance
                self._say(f"a checkpoint was not stored: {type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self._uploading = False
                    self._changed.notify_all()

    def _deliver(self, snapshot: "_Snapshot") -> None:
        folder = self._persist(lambda: tempfile.TemporaryDirectory(prefix="mixmo-"))
        if folder is None:
            return
        with folder as scratch:
            path = self._persist(lambda: train.save(snapshot.state, Path(scratch)))
            snapshot.state.clear()  # a copy of all weights
            key = self._persist(lambda: self._folder.put_file(path, path.name)) if path else None
        if key is not None:
            with self._changed:
                self._keys.append(key)
                self._upload_s = self._clock() - snapshot.taken_at
            self._thin()

    def _persist(self, attempt: Callable[[], _T]) -> _T | None:
        """What the attempt gives, tried until it works. None where there is a newer state, or nobody wants this one."""
        wait_s = 1.0
        while True:
            try:
                return attempt()
            except (UnreachableError, OSError) as error:
                if isinstance(error, DamagedError):
                    raise
                self._say(f"a checkpoint is not stored yet: {error}")
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting or self._closed, wait_s):
                    return None
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _thin(self) -> None:
        """A store that does not delete costs room and nothing else: `mixmo gc` finds what is left."""
        while True:
            with self._changed:
                if self._closed or len(self._keys) <= 2 or self._keys[0] == self._named:
                    return
                key = self._keys.pop(0)
            if not self._is_ours(key):
                continue
            try:
                self._store.discard(key)
            except (MixmoError, OSError) as error:
                self._say(f"{key} is not deleted: {error}")

    def _is_ours(self, key: str) -> bool:
        """Whether it is this trial's, and of no use to any other."""
        epoch, step, _ = progress_of(key)
        is_milestone = epoch in self._milestones and step == float("inf")
        return not is_milestone and key.split("/")[:2] == self._folder.key.split("/")[:2]

    def _say(self, line: str) -> None:
        with self._changed:
            self._lines.append(line)


class _Snapshot(NamedTuple):
    state: dict[str, Any]
    taken_at: float


def _copied(value: Any) -> Any:
    """The same in memory of its own, on the CPU: training goes on and changes its tensors in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return value
