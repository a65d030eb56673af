"""The calibration table of a store, `calibration.parquet`: how fast shapes were trained on each kind of device."""

from collections.abc import Iterable
from dataclasses import asdict

import pyarrow as pa

from orchestrator.calibration import TIMINGS_SCHEMA, Timing
from orchestrator.errors import UnreachableError
from orchestrator.rows import records
from orchestrator.store.objects import Objects, Stored
from orchestrator.store.tables import decode, encode, fit

KEY = "calibration.parquet"
_REQUIRED = ("device_name", "shape", "precision", "workers", "gpus", "step_flops", "pace", "source", "at")


def read_timings(folder: Objects) -> list[Timing]:
    """All of them; none where nobody has calibrated. Raises DamagedError."""
    return _decoded(folder, folder.read(KEY))


def add_timings(folder: Objects, timings: Iterable[Timing]) -> None:
    """Put timings in the place of older ones of the same shapes on the same device under the same versions.

    Two that calibrate at once both get theirs in. Raises UnreachableError.
    """
    new = list(timings)
    replaced = {_kind(each) for each in new}
    for _ in range(8):
        stored = folder.read(KEY)
        kept = [each for each in _decoded(folder, stored) if _kind(each) not in replaced]
        table = pa.Table.from_pylist([asdict(each) for each in (*kept, *new)], TIMINGS_SCHEMA)
        if folder.swap(KEY, encode(table), stored.tag if stored else None) is not None:
            return
    raise UnreachableError(f"{folder}/{KEY} keeps changing: others calibrate into it. Try again")


def _kind(timing: Timing) -> tuple[object, ...]:
    return (
        timing.device_name, timing.shape, timing.workers, timing.gpus, timing.cpus, timing.torch_version,
        timing.mixmo_version,
    )  # fmt: skip


def _decoded(folder: Objects, stored: Stored | None) -> list[Timing]:
    if stored is None:
        return []
    table = decode(stored.data, f"{folder}/{KEY}", TIMINGS_SCHEMA, _REQUIRED)
    return [Timing(**record) for record in records(fit(table, TIMINGS_SCHEMA))]
