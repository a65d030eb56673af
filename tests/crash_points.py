"""The moments at which a driver is made to die: before and after each kind of write, by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from orchestrator.store import Objects, ResultStore
from orchestrator.store.objects import Stored

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")
When = Literal["before", "after"]
POINTS = {
    "lease": r"/lease\.json$",
    "claim": r"(^|/)claims/",
    "sweep": r"/sweep\.yaml$",
    "checkpoint": r"(^|/)trials/.*\.pt$",
    "upload": r"(^|/)trials/.*/logits-[^/]*$",
    "part": r"/epochs/part-",
    "live": r"/epochs/live-",
    "commit": r"/trials\.parquet$",
    "events": r"/events\.parquet$",
}
"""By the key of the object: `commit` is the write of the trials, by which rows come to count."""


def named(key: str) -> str | None:
    """The point at which an object is written."""
    return next((name for name, pattern in POINTS.items() if re.search(pattern, key)), None)


class Watched(Objects):
    """Objects of another place; `told` hears of every write before it is made and after, by its point."""

    def __init__(self, inner: Objects, told: Callable[[str, When], None]) -> None:
        self._inner, self._told = inner, told

    @property
    def uri(self) -> str:
        return self._inner.uri

    def __str__(self) -> str:
        return str(self._inner)

    def put(self, key: str, data: bytes) -> None:
        self._around(key, lambda: self._inner.put(key, data))

    def create(self, key: str, data: bytes) -> bool:
        return self._around(key, lambda: self._inner.create(key, data))

    def upload(self, key: str, source: Path) -> bool:
        return self._around(key, lambda: self._inner.upload(key, source))

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        return self._around(key, lambda: self._inner.swap(key, data, tag))

    def _around(self, key: str, write: Callable[[], T]) -> T:
        point = named(key)
        if point is None:
            return write()
        self._told(point, "before")
        done = write()
        self._told(point, "after")
        return done

    # What only reads, or tidies, goes straight through.

    def read(self, key: str) -> Stored | None:
        return self._inner.read(key)

    def download(self, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        return self._inner.download(key, local, accept)

    def digest(self, key: str) -> str | None:
        return self._inner.digest(key)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        return self._inner.names(prefix, folders=folders)

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._inner.sizes(prefix)

    def modified(self, key: str) -> float:
        return self._inner.modified(key)

    def clock(self, key: str) -> float:
        return self._inner.clock(key)

    def filesystem(self) -> "tuple[FileSystem, str]":
        return self._inner.filesystem()

    @property
    def atomic(self) -> bool:
        return self._inner.atomic

    def tidy(self, prefix: str) -> None:
        self._inner.tidy(prefix)

    def prune(self, prefix: str) -> None:
        self._inner.prune(prefix)

    def probe(self) -> None:
        self._inner.probe()


def watch(told: Callable[[str, When], None]) -> None:
    """From here on every store that this process opens is watched."""
    opened = ResultStore.open.__func__  # type: ignore[attr-defined]

    def open_watched(cls: type[ResultStore], uri: str | Path, *, create: bool = False) -> ResultStore:
        store: ResultStore = opened(cls, uri, create=create)
        store.folder = Watched(store.folder, told)
        return store

    ResultStore.open = classmethod(open_watched)  # type: ignore[assignment, method-assign]
