"""What a place really does, found by trying: servers and network folders differ, and say little about it."""

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.store.objects import Objects

AT_ONCE = 8
"""Threads that want the same thing at one moment."""
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Abilities:
    read_back: bool
    """What was written last is what is read."""
    listed: bool
    """What was written is in the next list, and what was deleted is not."""
    created: int
    """How many of AT_ONCE believe that they made one object; of several tries, the one furthest from 1."""
    swapped: int
    """The same of those who replace one object."""
    fenced: bool
    """Whether a writer that was held up is kept from replacing what others wrote meanwhile."""
    ahead_s: float
    """How far this machine's clock is ahead of the place's, to a second or so."""


def find(objects: Objects, folder: str) -> Abilities:
    """Under a folder of its own, where nothing stays. Takes about a second. Raises UnreachableError."""
    keys = [f"{folder}/{name}-{number}" for name in ("list", "create", "swap") for number in range(ROUNDS)]
    try:
        listing, creating, swapping = (keys[ROUNDS * kind : ROUNDS * (kind + 1)] for kind in range(3))
        seen = [_seen(objects, key) for key in listing]
        return Abilities(
            read_back=all(read for read, _ in seen),
            listed=all(listed for _, listed in seen),
            created=_furthest([_makers(objects, key) for key in creating]),
            swapped=_furthest([_swappers(objects, key) for key in swapping]),
            fenced=objects.atomic,
            ahead_s=_ahead_s(objects, f"{folder}/clock"),
        )
    finally:
        for key in keys:
            objects.delete(key)


def _seen(objects: Objects, key: str) -> tuple[bool, bool]:
    """Whether an object is read back, and listed, as it changes."""
    folder, _, name = key.rpartition("/")
    objects.put(key, b"old")
    objects.put(key, b"new")
    stored = objects.read(key)
    there = name in objects.names(folder)
    objects.delete(key)
    return stored is not None and stored.data == b"new", there and name not in objects.names(folder)


def _makers(objects: Objects, key: str) -> int:
    return _winners(lambda: objects.create(key, _own()))


def _swappers(objects: Objects, key: str) -> int:
    tag = objects.swap(key, _own(), None)
    return _winners(lambda: objects.swap(key, _own(), tag) is not None)


def _winners(act: Callable[[], bool]) -> int:
    together = threading.Barrier(AT_ONCE)

    def once(_: int) -> bool:
        together.wait()
        return act()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(once, range(AT_ONCE)))


def _furthest(winners: list[int]) -> int:
    return max(winners, key=lambda each: abs(each - 1))


def _own() -> bytes:
    """A content that no other thread writes."""
    return secrets.token_bytes(8)


def _ahead_s(objects: Objects, key: str) -> float:
    before = time.time()
    there = objects.clock(key)
    return (before + time.time()) / 2 - there
