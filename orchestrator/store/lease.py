"""Who may write a sweep: one process at a time, under a number, the fence, that only rises."""

import contextlib
import json
import os
import pwd
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from orchestrator.errors import MixmoError, RefusedError, UnreachableError
from orchestrator.store.objects import DamagedError, Objects

LEASE_S = 60.0
"""A lease that nobody has renewed for this long may be taken over from anywhere."""


class LeaseLostError(RefusedError):
    """Another driver has taken the sweep over: this one must stop, and what it has not written yet is not its own."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, so that another on the same machine can tell whether it still lives."""

    host: str
    boot: str
    """Where process numbers mean the same: this boot of this machine, and this namespace of numbers."""
    pid: int
    started: str
    """Clock ticks from boot to its start: a process number is used again, the pair is not."""

    @classmethod
    def current(cls) -> Self:
        host = socket.gethostname()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        except OSError:
            boot = host
        return cls(host=host, boot=boot, pid=os.getpid(), started=_started(os.getpid()) or "")

    def sees_alive(self, other: "Process") -> bool | None:
        """Whether the other still lives; None where this process cannot tell."""
        started = _started(other.pid) if self.boot == other.boot else ""
        if started is None:
            return False
        return started == other.started if started and other.started else None


def _started(pid: int) -> str | None:
    """When the process began, "" if that is not to be known, None if there is no such process (or only its corpse)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return ""
        return ""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a sweep. It ends when it is released, when its process is seen to be dead, or, where nobody
    can see that process, when it was not renewed for so long.
    """

    holder: str
    """For people: who, where."""
    fence: int
    """Rises with every lease of the sweep."""
    process: Process
    nonce: str
    taken_at: datetime
    renewed_at: datetime
    duration_s: float = LEASE_S
    released: bool = False
    age_s: float = 0.0
    """Seconds since the renewal when it was read, by the store's clock. Not stored."""

    @property
    def expired(self) -> bool:
        return self.over(Process.current())

    def over(self, observer: Process) -> bool:
        alive = observer.sees_alive(self.process)
        return self.released or alive is False or (alive is None and self.age_s > self.duration_s)

    def encode(self) -> bytes:
        record = {**asdict(self), "taken_at": self.taken_at.isoformat(), "renewed_at": self.renewed_at.isoformat()}
        del record["age_s"]
        return json.dumps(record, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, age_s: float) -> Self:
        """Raises ValueError, KeyError or TypeError if this is no lease."""
        record = json.loads(data)
        record["process"] = Process(**record["process"])
        for name in ("taken_at", "renewed_at"):
            record[name] = datetime.fromisoformat(record[name])
        lease = cls(**record, age_s=age_s)
        if not all(isinstance(each, int) for each in (lease.fence, lease.process.pid)):
            raise ValueError("its fence or its process is no number")
        if not isinstance(lease.duration_s, int | float) or None in (lease.taken_at.tzinfo, lease.renewed_at.tzinfo):
            raise ValueError("its times are none")
        return lease


def read_lease(folder: Objects, key: str, clock: Callable[[], float] = time.time) -> Lease | None:
    """The lease as it stands; None where there never was one. `clock` is the store's, or nearly so."""
    modified, stored = folder.modified(key), folder.read(key)
    return None if stored is None else decoded(stored.data, max(0.0, clock() - modified), f"{folder}/{key}")


def decoded(data: bytes, age_s: float, name: str) -> Lease:
    """The lease that an object holds. Raises DamagedError if it is none."""
    try:
        return Lease.decode(data, age_s=age_s)
    except (ValueError, KeyError, TypeError) as error:
        text = f"{name} is no lease ({type(error).__name__}: {error})"
        raise DamagedError(text, "If no driver runs the sweep, delete it") from error


class HeldLease:
    """A lease in the hands of its holder, who alone renews and releases it."""

    def __init__(
        self,
        folder: Objects,
        key: str,
        *,
        sweep: str,
        holder: str | None,
        process: Process,
        now: Callable[[], datetime],
        above: int = 0,
    ) -> None:
        """Take the lease at this key, under a fence above all that were. Raises RefusedError while another holds it."""
        self._folder, self._key, self._sweep, self._now = folder, key, sweep, now
        self._lock = threading.Lock()
        self._gone: LeaseLostError | None = None
        self._lease, self._tag = self._take(holder or who(process), process, above)

    @property
    def fence(self) -> int:
        return self._lease.fence

    def renew(self) -> None:
        """Tell all others that the holder lives. Raises LeaseLostError; does nothing once the lease is released."""
        with self._lock:
            if not self._lease.released:
                self._swap(replace(self._lease, renewed_at=self._now()))

    def release(self) -> None:
        with self._lock:
            self._swap(replace(self._lease, released=True))

    def check(self) -> None:
        """Raises LeaseLostError, without a request, if it is known that another has taken over: it stays so."""
        if self._gone is not None:
            raise self._gone

    def lost(self) -> LeaseLostError:
        """What to raise when another has taken over."""
        ours = f"its fence is above {self.fence}, which is this driver's"
        with contextlib.suppress(MixmoError):
            held = read_lease(self._folder, self._key)
            if held is not None:
                ours = f"{held.holder}, process {held.process.pid}, fence {held.fence} after {self.fence}"
        self._gone = LeaseLostError(
            f"sweep {self._sweep} was taken over by another driver ({ours}), because this one was not heard of for "
            f"{LEASE_S:.0f} s. That one goes on, and nothing is lost: `mixmo watch {self._sweep}` shows it"
        )
        return self._gone

    def _take(self, holder: str, process: Process, above: int) -> tuple[Lease, str]:
        for _ in range(5):
            stored = self._folder.read(self._key)
            held = read_lease(self._folder, self._key, lambda: self._folder.clock(self._key))
            if held is not None and not held.over(process):
                raise RefusedError(_refusal(self._sweep, held, process))
            now = self._now()
            lease = Lease(
                holder=holder,
                fence=1 + max(above, held.fence if held else 0),
                process=process,
                nonce=secrets.token_hex(8),
                taken_at=now,
                renewed_at=now,
                duration_s=LEASE_S,
            )
            tag = self._folder.swap(self._key, lease.encode(), stored.tag if stored else None)
            if tag is not None:
                return lease, tag
        raise RefusedError(f"several drivers want sweep {self._sweep} at this moment, and one of them has it now")

    def _swap(self, lease: Lease) -> None:
        for _ in range(3):
            tag = self._folder.swap(self._key, lease.encode(), self._tag)
            if tag is not None:
                self._lease, self._tag = lease, tag
                return
            stored = self._folder.read(self._key)
            if stored is None or _nonce(stored.data) != self._lease.nonce:
                raise self.lost()
            self._tag = stored.tag  # our own, whose answer was lost
        raise UnreachableError(f"{self._folder}/{self._key} keeps changing under this driver")


def _nonce(data: bytes) -> str | None:
    """Whose lease this is; None if it is none."""
    try:
        return Lease.decode(data, age_s=0.0).nonce
    except (ValueError, KeyError, TypeError):
        return None


def who(process: Process) -> str:
    """The user of this process, and where it runs: for people."""
    return f"{_user()}@{process.host}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number
        return f"user {os.getuid()}"


def _refusal(sweep: str, held: Lease, process: Process) -> str:
    since = held.taken_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    who = (
        f"sweep {sweep} is being run by {held.holder} (process {held.process.pid} on {held.process.host}) since {since}"
    )
    if process.sees_alive(held.process):
        return f"{who}. Watch it with `mixmo watch {sweep}`, or end it with `mixmo stop {sweep}` and run this again"
    left = max(1, round(held.duration_s - held.age_s))
    return (
        f"{who}, and was heard of {held.age_s:.0f} s ago. Watch it with `mixmo watch {sweep}`. If it is dead, run this "
        f"again in {left} s: its lease is over then"
    )
