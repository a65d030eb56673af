"""The files of an attempt at a trial: checkpoints and logits that are named by their content, and logs."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # numpy is loaded by those who read or write logits, and by nobody else
    import numpy as np
    from numpy.typing import NDArray

from orchestrator.store.objects import DamagedError, Objects, digest_of

LOG_BYTES = 1 << 18

CHECKPOINT = re.compile(r"epoch-(\d{5,})-(?:step-(\d{6,})-)?([0-9a-f]{16})\.pt")
LOGITS = re.compile(r"logits-([0-9a-f]{16})\.npz")
LOG = re.compile(r"log-(\d+)\.txt")
NO_LOGITS = "put the file back from a copy, or run the trial again under new results (`--results`)"
"""What to do about logits that are lost."""
TRIAL_ID = re.compile(r"[0-9a-f]{12}")
ATTEMPT = re.compile(r"(\d+)-(\d+)-([A-Za-z0-9_]+)")


def matches(key: str, digest: str) -> bool:
    """Whether a content with this SHA-256 may bear this name. Names without a hash match all."""
    name = key.rpartition("/")[2]
    match = CHECKPOINT.fullmatch(name) or LOGITS.fullmatch(name)
    return match is None or digest.startswith(match.groups()[-1])


@dataclass(frozen=True, slots=True)
class Logits:
    """What the subnetworks of a trained network make of the held-out images, in their order."""

    logits_MNK: "NDArray[np.float16]"
    """Of M subnetworks, N images and K classes."""
    labels_N: "NDArray[np.int64]"
    """What the images show."""

    @classmethod
    def of(cls, logits_MNK: "NDArray[np.floating[Any]]", labels_N: "NDArray[np.integer[Any]]") -> Self:
        """In half precision; a logit beyond its range (65,504) is put at its end."""
        import numpy as np

        limit = np.finfo(np.float16).max
        return cls(np.clip(logits_MNK, -limit, limit).astype(np.float16), labels_N.astype(np.int64))

    def encode(self) -> bytes:
        """As an .npz file, the same bytes for the same numbers."""
        import numpy as np

        file = io.BytesIO()
        np.savez(file, logits_MNK=self.logits_MNK, labels_N=self.labels_N)
        return file.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads what `encode` made; nothing in it is executed. Raises ValueError for anything else."""
        import numpy as np

        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                logits_MNK, labels_N = file["logits_MNK"], file["labels_N"]
        except Exception as error:  # whatever a foreign file makes of the reader
            raise ValueError(f"it is no file of logits ({type(error).__name__})") from error
        if (logits_MNK.dtype, labels_N.dtype) != (np.float16, np.int64):
            raise ValueError(f"it holds {logits_MNK.dtype} and {labels_N.dtype}, not float16 and int64")
        if logits_MNK.ndim != 3 or labels_N.shape != logits_MNK.shape[1:2]:
            raise ValueError(f"its shapes {logits_MNK.shape} and {labels_N.shape} are not (M, N, K) and (N)")
        return cls(logits_MNK, labels_N)


class AttemptFolder:
    """The files of one attempt at one trial. Only the gang that runs the attempt writes here."""

    def __init__(self, folder: Objects, key: str) -> None:
        self._folder = folder
        self.key = key

    def path_of(self, name: str) -> str:
        """The store key of a file of this attempt."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name!r} is no name for a file of an attempt")
        return f"{self.key}/{name}"

    def put_file(self, local: Path, name: str) -> str:
        """Store a copy of a local file for good and return its key. The same again is fine, another content is not.

        A checkpoint is named by its content (`epoch-00012-<16 hex of its SHA-256>.pt` after an epoch, and in one
        `epoch-00012-step-000345-<16 hex>.pt`) and held to that name.
        """
        key, digest = self.path_of(name), digest_of(local)
        if not matches(key, digest):
            raise DamagedError(f"{local} is not what the name {name} says: its SHA-256 begins with {digest[:16]}")
        if not self._folder.upload(key, local) and self._folder.digest(key) != digest:
            raise ValueError(f"{key} exists with another content: the files of an attempt are never changed")
        return key

    def put_logits(self, logits: Logits) -> str:
        """Store the logits of the trained network for good, named by their content, and return their key."""
        data = logits.encode()
        key = self.path_of(f"logits-{hashlib.sha256(data).hexdigest()[:16]}.npz")
        self._folder.create(key, data)
        return key

    def put_log(self, rank: int, text: str, environ: Mapping[str, str] = os.environ) -> str:
        """Replace the log of a rank by this text: its last 256 KiB, without the secrets of environment and store."""
        key = self.path_of(f"log-{rank}.txt")
        text = without_secrets(text, environ, self._folder.secrets)
        self._folder.put(key, text.encode(errors="replace")[-LOG_BYTES:])
        return key

    def checkpoints(self) -> list[str]:
        """Keys of this attempt's checkpoints, the furthest first."""
        names = [name for name in self._folder.names(self.key) if CHECKPOINT.fullmatch(name)]
        return sorted((f"{self.key}/{name}" for name in names), key=progress_of, reverse=True)


def attempt_of(key: str) -> tuple[int, int]:
    """Fence and number of the attempt that wrote a file: of two that one driver began, the later is the higher."""
    match = ATTEMPT.fullmatch(key.split("/")[2])
    return (int(match[1]), int(match[2])) if match else (0, 0)


def progress_of(key: str) -> tuple[int, float, str]:
    """Sorts checkpoints by how far they are: an epoch's steps come before its end."""
    match = CHECKPOINT.fullmatch(key.rpartition("/")[2])
    if match is None:
        return (0, 0, key)
    return (int(match[1]), int(match[2]) if match[2] else float("inf"), key)


def without_secrets(text: str, environ: Mapping[str, str], more: Iterable[str] = ()) -> str:
    """The text with the values of variables that are called like secrets starred out, and those of `more`."""
    for value in more:
        text = text.replace(value, "***")
    for name, value in environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", name, re.IGNORECASE):
            text = text.replace(value, "***")
    return text
