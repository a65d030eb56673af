"""Objects by key: what the store asks of a place, and a folder as one. A bucket is another (`bucket.py`)."""

import abc
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

from orchestrator.errors import UnreachableError

UNFINISHED_S = 3600.0
"""What a writer staged this long ago and never finished is of a writer that was killed."""
PATIENCE_S = 10.0
"""How long to wait for a lock that is held for milliseconds."""


class DamagedError(UnreachableError):
    """An object is there, but it is not what its name or its format says."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}. {advice}" if advice else what)
        self.what, self.advice = what, advice

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.what, self.advice)


@dataclass(frozen=True, slots=True)
class Stored:
    data: bytes
    tag: str
    """Tells one content from another. `swap` takes it; to nobody else it says anything."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, in hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Change:
    """What an object has become."""

    stored: Stored | None
    """None: there is none."""
    mark: str
    """To ask again with. Tells contents apart as a tag does, but `swap` does not take it."""


class Objects(abc.ABC):
    """Objects by key (`a/b/c`) in one place, which `str` names in messages.

    An object is replaced whole: a reader sees the old one or the new one, also after a crash. Every failure but "not
    there" is UnreachableError, leaves the old object or the new one, and may be retried. What was written is seen by
    every read and listing that begins after it.
    """

    @property
    @abc.abstractmethod
    def uri(self) -> str:
        """What `ResultStore.open` takes to find the same place from another machine. No secrets are in it."""

    @abc.abstractmethod
    def filesystem(self) -> "tuple[FileSystem, str]":
        """For readers of Parquet that want more than whole objects: Arrow's file system, and this place's path in it.

        Only in the process that asked: a file system may hold credentials, and is never pickled or stored.
        """

    @property
    def secrets(self) -> list[str]:
        """What must be in no text that is stored or shown, as far as this place knows more than the environment."""
        return []

    @abc.abstractmethod
    def read(self, key: str) -> Stored | None:
        """The object, or None where there is none."""

    def changed(self, key: str, mark: str | None) -> Change | None:
        """The object if it is not that of this mark any more; None, after one request that transfers nothing, if it is.

        The mark is of an earlier answer for the same key; None is of no object.
        """
        stored = self.read(key)
        now = stored.tag if stored else ""
        return None if now == mark else Change(stored, now)

    @abc.abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Make or replace an object."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Make an object; False, and no change, where there is one."""

    @abc.abstractmethod
    def upload(self, key: str, source: Path) -> bool:
        """As `create`, from a file of any size."""

    @abc.abstractmethod
    def download(self, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        """Copy an object of any size to a local file if its digest is acceptable. The digest; None where none is."""

    @abc.abstractmethod
    def digest(self, key: str) -> str | None:
        """The SHA-256, in hex, of an object of any size; None where there is none."""

    @abc.abstractmethod
    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Replace the object whose tag this is (None: there is none yet). The new tag; None where it has changed."""

    @property
    def atomic(self) -> bool:
        """Whether `swap` always refuses. Where not, a writer that is held up may overwrite what is newer, once."""
        return True

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; nothing where there is none."""

    @abc.abstractmethod
    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        """Sorted names of the objects (or the folders) right under a prefix; names that begin with a dot are ours."""

    @abc.abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """The bytes of every object under a prefix, at any depth, by its key; without those that begin with a dot."""

    @abc.abstractmethod
    def modified(self, key: str) -> float:
        """When the object was written, in seconds by the place's own clock; 0 where there is none."""

    @abc.abstractmethod
    def clock(self, key: str) -> float:
        """The time by the clock that `modified` uses, which may not be this machine's. `key` is one to be written."""

    @abc.abstractmethod
    def tidy(self, prefix: str) -> None:
        """Delete what writers that were killed more than an hour ago had not finished under a prefix."""

    def prune(self, prefix: str) -> None:
        """Tidy a prefix at any depth, and remove the folders in which nothing is left, where a place has folders."""
        self.tidy(prefix)

    @abc.abstractmethod
    def probe(self) -> None:
        """Raise UnreachableError if nothing can be written here."""


class Folder(Objects):
    """Objects as files under a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        return str(self.root)

    def __str__(self) -> str:
        return str(self.root)

    def filesystem(self) -> "tuple[FileSystem, str]":
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(self.root)

    def path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str) -> Stored | None:
        with self._explained("read", key):
            try:
                data = self.path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stored(data, _tag(data))

    def changed(self, key: str, mark: str | None) -> Change | None:
        with self._explained("read", key):
            try:
                with self.path(key).open("rb") as file:
                    at = os.fstat(file.fileno())  # an object is replaced, never written again: a new file has another
                    now = f"{at.st_ino} {at.st_mtime_ns} {at.st_size}"
                    data = None if now == mark else file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None if mark == "" else Change(None, "")
        return None if data is None else Change(Stored(data, _tag(data)), now)

    def put(self, key: str, data: bytes) -> None:
        with self._explained("write", key), self._staged(key, data) as temporary:
            os.replace(temporary, self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        with self._explained("write", key), self._staged(key, data) as temporary:
            return _link(temporary, self.path(key))

    def upload(self, key: str, source: Path) -> bool:
        with self._explained("write", key), source.open("rb") as data, self._staged(key, data) as temporary:
            return _link(temporary, self.path(key))

    def download(self, key: str, local: Path, accept: Callable[[str], bool]) -> str | None:
        with self._explained("read", key):
            try:
                source = self.path(key).open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return None
            with source, Folder(local.parent)._staged(local.name, source) as temporary:
                digest = digest_of(temporary)
                if accept(digest):
                    os.replace(temporary, local)
        return digest

    def digest(self, key: str) -> str | None:
        with self._explained("read", key):
            try:
                return digest_of(self.path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def swap(self, key: str, data: bytes, tag: str | None) -> str | None:
        with self._explained("write", key):
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path(key).with_name(".lock")):
                held = self.read(key)
                if (held.tag if held else None) != tag:
                    return None
                self.put(key, data)
        return _tag(data)

    def delete(self, key: str) -> None:
        with self._explained("delete", key):
            self.path(key).unlink(missing_ok=True)

    def is_file(self) -> bool:
        """Whether a file lies where the folder should be."""
        with self._explained("read", ""):
            return self.root.exists() and not self.root.is_dir()

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        with self._explained("list", prefix):
            try:
                with os.scandir(self.path(prefix)) as entries:
                    found = [entry.name for entry in entries if entry.is_dir() == folders]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in found if not name.startswith("."))

    def sizes(self, prefix: str) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._explained("list", prefix):
            for folder, inner, names in os.walk(self.path(prefix), onerror=_unless_gone):
                inner[:] = [name for name in inner if not name.startswith(".")]
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        if not name.startswith("."):
                            path = Path(folder, name)
                            found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def modified(self, key: str) -> float:
        with self._explained("read", key):
            try:
                return self.path(key).stat().st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return 0.0

    def clock(self, key: str) -> float:
        with self._explained("write", key), self._staged(key, b"") as temporary:
            return temporary.stat().st_mtime

    def tidy(self, prefix: str) -> None:
        with self._explained("tidy", prefix), contextlib.suppress(FileNotFoundError):
            for each in self.path(prefix).glob(".*.tmp"):
                if time.time() - each.stat().st_mtime > UNFINISHED_S:
                    each.unlink(missing_ok=True)

    def prune(self, prefix: str) -> None:
        with self._explained("tidy", prefix):
            for folder, _, _ in os.walk(self.path(prefix), topdown=False, onerror=_unless_gone):
                self.tidy(Path(folder).relative_to(self.root).as_posix())
                with contextlib.suppress(OSError):  # something is left in it
                    os.rmdir(folder)

    def probe(self) -> None:
        with self._explained("write", "."):
            self.root.mkdir(parents=True, exist_ok=True)
            with self._staged("probe", b"mixmo"):
                pass

    @contextlib.contextmanager
    def _staged(self, key: str, data: bytes | BinaryIO) -> Iterator[Path]:
        """The data in a file beside the object, on disk. The name begins with a dot and does not end in .parquet, so
        that no glob of a Parquet reader finds it when a kill leaves it behind.
        """
        final = self.path(key)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(6)}.tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                shutil.copyfileobj(data, file, 1 << 20) if not isinstance(data, bytes) else file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(final.parent)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreachableError(
                f"cannot {verb} {self.path(key)}: {reason}. What was stored before is unharmed. Make the results "
                f"folder readable and writable, with room on its disk, and run the same command again."
            ) from error


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(source: Path, target: Path) -> bool:
    """Give a file its final name unless that is taken. A rename would overwrite, so it is a hard link."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():  # a file system without hard links: attempts have names of their own, so nobody races
            return False
        os.replace(source, target)
    return True


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # some network folders cannot; all else is real
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold a lock that dies with its process. Where the file system has none, the fence alone protects."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor, lock)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, lock: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"a process holds {lock} and does not move (`fuser {lock}` names it; kill -9 it)"
                ) from error
            time.sleep(0.01)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
                return None
            raise
