"""Which of several running sweeps trains a trial that they share: whoever has its claim.

    claims/<trial_id>.json

A claim saves work and decides no result: without it, or with one that lies, the trial is trained twice, to the same
numbers. It is of the driver that it names, and worth nothing once that one holds its sweep no more.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from orchestrator.store.objects import Objects


@dataclass(frozen=True, slots=True)
class Claim:
    """The driver of a sweep, by its fence."""

    sweep: str
    fence: int


class Claims:
    """The claims of a store, as one driver makes them. Methods raise UnreachableError."""

    def __init__(self, folder: Objects, sweep: str, fence: int) -> None:
        self._folder, self._own = folder, Claim(sweep, fence)

    def take(self, trial_id: str, holds: Callable[[Claim], bool]) -> bool:
        """Claim a trial. False where the claim of another `holds` still, or others are at it at this moment."""
        key, data = _key(trial_id), json.dumps(asdict(self._own)).encode()
        for _ in range(3):
            stored = self._folder.read(key)
            if stored is None:
                if self._folder.create(key, data):
                    return True
                continue
            held = _decode(stored.data)
            if held == self._own:
                return True
            if held is not None and holds(held):
                return False
            if self._folder.swap(key, data, stored.tag) is not None:
                return True
        return False

    def drop(self, trial_id: str) -> None:
        """Give a claim up. One that another has taken stays."""
        stored = self._folder.read(_key(trial_id))
        if stored is not None and _decode(stored.data) == self._own:
            self._folder.delete(_key(trial_id))


def _key(trial_id: str) -> str:
    return f"claims/{trial_id}.json"


def _decode(data: bytes) -> Claim | None:
    """The claim; None for anything else, which nobody holds."""
    try:
        record = json.loads(data)
        return Claim(str(record["sweep"]), int(record["fence"]))
    except (ValueError, KeyError, TypeError):
        return None
