"""Where the images of a sweep lie: a folder, or a bucket from which each host copies a dataset once.

What is in a bucket lies there as it was published: the folder of a dataset (`cifar-100-python/train` ...), or its
archive (`tiny-imagenet-200.zip`). A copy is made under a lock and held to the published checksums, so that all gangs of
a host share one, whoever of them is killed while it copies.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mixmo_core import data
from orchestrator.errors import UnreachableError, UsageError
from orchestrator.store import Objects, ResultStore

CACHE = "MIXMO_DATA_CACHE"
TRIES = 3
"""How often an object is copied whose content is not what was published."""


def in_bucket(place: str | None) -> bool:
    return place is not None and place.lower().startswith("s3:/")


def local(place: str | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of this host in which the datasets are read: the place itself, or the copies of what is in a bucket.

    Copies lie in MIXMO_DATA_CACHE, or else in the user's cache.
    """
    if place is None or not in_bucket(place):
        return Path(place).expanduser().absolute() if place else None
    above = environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    base = Path(environ.get(CACHE) or Path(above) / "mixmo" / "data")
    return base / hashlib.sha256(place.partition("?")[0].rstrip("/").encode()).hexdigest()[:12]


def check(names: Iterable[str], place: str | None) -> None:
    """Whether the datasets can be had, before anything starts: those of a folder are held to their checksums, those of
    a bucket are only looked for. Raises UsageError, or UnreachableError if the bucket cannot be read.
    """
    if in_bucket(place):
        bucket = ResultStore.open(str(place)).folder
        for name in names:
            if name in data.FOLDERS and not _objects(bucket, name):
                raise UsageError(
                    f"{bucket}: holds neither {data.FOLDERS[name]}/ nor {data.ARCHIVES[name]}, so no {name}. Get it "
                    f"with `mixmo data get {name} DEST` and copy DEST/{data.FOLDERS[name]} into the bucket"
                )
        return
    for name in names:
        try:
            data.check(name, local(place))
        except data.DatasetError as error:
            raise UsageError(str(error)) from error


def on_this_host(names: Iterable[str], place: str | None) -> Path | None:
    """The folder that holds these datasets, copied to this host if need be. Waits for whoever copies already.

    Raises UnreachableError when a copy cannot be made: no bucket, no room, or not what was published.
    """
    folder = local(place)
    if folder is not None and in_bucket(place):
        for name in names:
            if name in data.FOLDERS:
                with _explained(name, folder), _locked(folder, name):
                    if not _whole(name, folder):
                        _copy(name, folder, ResultStore.open(str(place)).folder)
    return folder


def _copy(name: str, folder: Path, bucket: Objects) -> None:
    sizes = _objects(bucket, name)
    if not sizes:
        raise UnreachableError(f"{bucket}: holds neither {data.FOLDERS[name]}/ nor {data.ARCHIVES[name]}")
    _hold_room(name, folder, sizes)
    fault = ""
    for again in range(TRIES):
        for key, size in sizes.items():
            target = folder / key
            if again or not target.is_file() or target.stat().st_size != size:
                target.parent.mkdir(parents=True, exist_ok=True)
                bucket.download(key, target, lambda digest: True)
        try:
            return _finish(name, folder)
        except data.DatasetError as error:
            fault = str(error)
    raise UnreachableError(
        f"{bucket}: {name} was copied {TRIES} times and is not what was published: {fault.partition('. ')[0]}. Put "
        f"the dataset into the bucket again, and run the same command again"
    )


def _finish(name: str, folder: Path) -> None:
    """Unpack what came as an archive, and hold all to the checksums. Raises DatasetError."""
    archive = folder / data.ARCHIVES[name]
    if archive.is_file():
        data.fetch(name, folder, archive)
        archive.unlink()
    data.check(name, folder)


def _objects(bucket: Objects, name: str) -> dict[str, int]:
    """The objects of a dataset by key, and their bytes: those of its folder, or else its archive."""
    inside, archive = data.FOLDERS[name], data.ARCHIVES[name]
    found = {key: size for key, size in bucket.sizes(inside).items() if key.startswith(f"{inside}/")}
    if found or archive not in bucket.names(""):
        return found
    return {archive: -1}  # whatever its size: it is unpacked and goes


def _whole(name: str, folder: Path) -> bool:
    try:
        data.check(name, folder)
    except data.DatasetError:
        return False
    return True


def _hold_room(name: str, folder: Path, sizes: Mapping[str, int]) -> None:
    missing = sum(size for key, size in sizes.items() if not (folder / key).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UnreachableError(
            f"{folder}: {name} needs {missing / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Make room on this "
            f"host, or name another folder with {CACHE}; then run the same command again"
        )


@contextlib.contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreachableError(
            f"{folder}: {name} cannot be copied to this host: {error.strerror or error}. Make room there, or name "
            f"another folder with {CACHE}; then run the same command again"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """A lock that dies with its process, so that a copy which was killed is taken up by the next."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
