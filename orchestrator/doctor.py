"""Whether this machine can run a sweep: versions, processors, the place of the results, datasets, space on disk."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import ExitCode, MixmoError

if TYPE_CHECKING:
    from orchestrator.store import Objects
    from orchestrator.store.abilities import Abilities
    from orchestrator.store.bucket import Bucket

PYTHON = (3, 11)
PACKAGES: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", None),
    "torchvision": ("0.26", None),
    "ray": ("2.60", "2.61"),
    "pyarrow": ("22", None),
    "numpy": ("2", None),
}
"""The versions that pyproject.toml allows: from the first on, below the second. A test holds the two together."""

LITTLE_SPACE = 5 * 2**30
NO_SPACE = 200 * 2**20
"""Bytes free where results go: fewer than the first is a warning, fewer than the second is refused."""

CLOCKS_APART_S = 15.0
"""Whether a driver lives is told by the age of a renewal that comes every 20 s: more than this blurs it."""
_ELSEWHERE = "name another place with --results or MIXMO_RESULTS"

Verdict = Literal["good", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do about it, where something is to be done."""
    code: ExitCode = ExitCode.OK
    """What the command ends with when this is bad."""


def examine(results: str, data: Path | None) -> Iterator[Check]:
    """All checks, each when it is done. Nothing is left behind."""
    yield _python(sys.version_info[:3])
    for name, (least, below) in PACKAGES.items():
        yield package(name, least, below, metadata.version)
    yield _threads(os.cpu_count() or 1, dict(os.environ))
    yield from _accelerators()
    yield from place(results)
    yield from datasets(data)


def place(results: str) -> Iterator[Check]:
    """The place of the results: whether it can be written, and what it can do."""
    from orchestrator.store import folder_of

    try:
        folder = folder_of(results)
    except MixmoError as error:
        yield Check("results", "bad", str(error), _ELSEWHERE, error.exit_code)
        return
    if folder is None:
        writable = results_bucket(results)
        yield writable
        if writable.verdict == "good":
            yield from _bucket(results)
        return
    writable = results_folder(folder)
    yield writable
    yield _space(shutil.disk_usage(_existing(folder)).free, folder)
    if writable.verdict == "good":
        yield from _folder(_existing(folder))


def verdict(checks: Iterable[Check]) -> ExitCode:
    """The exit code of all checks: that of the first bad one."""
    return next((check.code for check in checks if check.verdict == "bad"), ExitCode.OK)


def _python(version: tuple[int, ...]) -> Check:
    found = ".".join(map(str, version))
    if version < PYTHON:
        return Check("Python", "bad", found, "needs 3.11 or newer", ExitCode.USAGE)
    return Check("Python", "good", f"{found} on {platform.system()} {platform.machine()}")


def package(name: str, least: str, below: str | None, installed: Callable[[str], str]) -> Check:
    """`installed` gives a package's version, as importlib.metadata.version does."""
    wanted = f"{least} or newer" + (f", below {below}" if below else "")
    try:
        found = installed(name)
    except metadata.PackageNotFoundError:
        return Check(name, "bad", "not installed", f"needs {wanted}: pip install '{name}>={least}'", ExitCode.USAGE)
    if numbers(found) < numbers(least) or (below and numbers(found) >= numbers(below)):
        return Check(name, "bad", found, f"needs {wanted}", ExitCode.USAGE)
    return Check(name, "good", found)


def numbers(version: str) -> tuple[int, ...]:
    """`2.14.1+cu130` is (2, 14, 1)."""
    return tuple(int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part)  # type: ignore[index]


def _threads(cores: int, environment: dict[str, str]) -> Check:
    limit = environment.get("OMP_NUM_THREADS")
    return Check("processors", "good", f"{cores}" + (f", OMP_NUM_THREADS={limit}" if limit else ""))


def _accelerators() -> Iterator[Check]:
    """What torch can compute on. It is imported here: that it loads is worth knowing too."""
    try:
        import torch
    except Exception as error:  # a broken installation raises what it likes
        yield Check("torch loads", "bad", f"{type(error).__name__}: {error}", "reinstall torch", ExitCode.USAGE)
        return
    if not torch.cuda.is_available():
        yield Check("GPUs", "note", "none that torch can use: trials run on the processors")
        return
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        yield Check(f"GPU {index}", "good", f"{properties.name}, {size:.0f} GiB, CUDA {torch.version.cuda}")


def results_folder(results: Path) -> Check:
    """Whether results can be written, tried where the folder is there. A folder that is not is not made."""
    place = _existing(results)
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.NamedTemporaryFile(dir=place, prefix=".mixmo-"):
            pass
    except OSError as error:
        text = f"{place} cannot be written: {error.strerror}"
        return Check("results", "bad", text, _ELSEWHERE, ExitCode.UNREACHABLE)
    return Check("results", "good", f"{results}" if results.exists() else f"{results}, which a run will make")


def results_bucket(uri: str) -> Check:
    """Whether results can be listed, written and deleted in a bucket."""
    from orchestrator.store import ResultStore

    try:
        store = ResultStore.open(uri, create=True)
    except MixmoError as error:
        return Check("results", "bad", str(error), _ELSEWHERE, error.exit_code)
    return Check("results", "good", f"{store}")


def _bucket(uri: str) -> Iterator[Check]:
    from orchestrator.store.bucket import Bucket

    bucket = Bucket.open(uri)
    yield from _tried(bucket, f".doctor-{secrets.token_hex(6)}")
    if bucket.address.sse:
        yield encryption(bucket)


def encryption(bucket: Bucket) -> Check:
    """Whether the store encrypts as its address asks."""
    try:
        encrypted = bucket.encrypts()
    except MixmoError as error:
        return Check("encryption", "bad", str(error), "", error.exit_code)
    if encrypted:
        return Check("encryption", "good", f"{bucket.address.sse}")
    text = f"the store does not say that it encrypts with {bucket.address.sse}"
    return Check("encryption", "bad", text, f"{_ELSEWHERE}, or leave sse out of the address", ExitCode.UNREACHABLE)


def _folder(folder: Path) -> Iterator[Check]:
    from orchestrator.store import Folder

    with tempfile.TemporaryDirectory(dir=folder, prefix=".mixmo-") as inside:
        yield from _tried(Folder(Path(inside)), "doctor")


def _tried(objects: Objects, folder: str) -> Iterator[Check]:
    from orchestrator.store import abilities

    try:
        found = abilities.find(objects, folder)
    except MixmoError as error:
        yield Check("what it can do", "bad", str(error), "", error.exit_code)
    else:
        yield from abilities_mean(found)


def abilities_mean(found: Abilities) -> Iterator[Check]:
    """What follows for a sweep from what the place of its results does."""
    if found.read_back:
        yield Check("whole objects", "good", "what was written last is what is read")
    else:
        text = "what was written last is not what is read: a driver would lose track of its own rows"
        yield Check("whole objects", "bad", text, _ELSEWHERE, ExitCode.UNREACHABLE)
    if found.listed:
        yield Check("lists", "good", "they show every change at once")
    else:
        text = "they lag: new sweeps are seen late, and a trial may resume at an older checkpoint. No row depends on it"
        yield Check("lists", "note", text)
    yield _drivers(found)
    if found.fenced:
        yield Check("stale drivers", "good", "what they still write is refused")
    else:
        text = "what one still writes may land once; the driver that took over, or the next one, puts it right"
        yield Check("stale drivers", "note", text)
    yield _clock(found.ahead_s)


def _drivers(found: Abilities) -> Check:
    from orchestrator.store.abilities import AT_ONCE
    from orchestrator.store.lease import LEASE_S

    if found.created == found.swapped == 1 and found.fenced:
        return Check("second driver", "good", "is refused at once")
    told = f"of {AT_ONCE} at once, {found.created} believe they created one object, and {found.swapped} replaced one"
    text = f"if it starts at the same moment, it may be refused only within {LEASE_S:.0f} s ({told})"
    return Check("second driver", "note", text, "do not start one sweep twice at the same moment")


def _clock(ahead_s: float) -> Check:
    way = "ahead of" if ahead_s > 0 else "behind"
    found = f"this machine's is {abs(ahead_s):.0f} s {way} the one of the results"
    if abs(ahead_s) > CLOCKS_APART_S:
        advice = "set it: a driver that lives may look dead in `mixmo status`, and past 15 minutes a bucket refuses all"
        return Check("clock", "note", found, advice)
    return Check("clock", "good", found)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _space(free: int, results: Path) -> Check:
    found = f"{free / 2**30:,.1f} GiB free"
    if free < NO_SPACE:
        return Check("disk", "bad", found, f"make room at {results}", ExitCode.UNREACHABLE)
    if free < LITTLE_SPACE:
        return Check("disk", "note", found, "little for checkpoints of wide networks")
    return Check("disk", "good", found)


def datasets(folder: Path | None) -> Iterator[Check]:
    """Which datasets a sweep can use: those inside the package, and those whose files lie in `folder`."""
    from mixmo_core import data

    yield Check("data", "good", "digits, synthetic (they need no files)")
    for name, inside in data.FOLDERS.items():
        if folder is None or not (folder / inside).is_dir():
            where = "" if folder is None else f" in {folder}"
            yield Check(name, "note", f"not there{where}", f"mixmo data get {name} DEST, then MIXMO_DATA=DEST")
            continue
        try:
            data.check(name, folder)
        except data.DatasetError as error:
            yield Check(name, "bad", "its files are not right", str(error), ExitCode.USAGE)
        else:
            yield Check(name, "good", f"whole, in {folder}")
