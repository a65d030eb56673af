"""The files of an attempt at a trial: checkpoints that are named by their content, and logs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from orchestrator.store.objects import DamagedError, Folder, tag_of

LOG_BYTES = 1 << 18

CHECKPOINT = re.compile(r"epoch-(\d{5,})-([0-9a-f]{16})\.pt")
ATTEMPT = re.compile(r"(\d+)-(\d+)-([A-Za-z0-9_]+)")


def matches(key: str, digest: str) -> bool:
    """Whether a content with this SHA-256 may bear this name. Names without a hash match all."""
    match = CHECKPOINT.fullmatch(key.rpartition("/")[2])
    return match is None or digest.startswith(match[2])


class AttemptFolder:
    """The files of one attempt at one trial. Only the gang that runs the attempt writes here."""

    def __init__(self, folder: Folder, key: str) -> None:
        self._folder = folder
        self.key = key

    def path_of(self, name: str) -> str:
        """The store key of a file of this attempt."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name!r} is no name for a file of an attempt")
        return f"{self.key}/{name}"

    def put_file(self, local: Path, name: str) -> str:
        """Store a copy of a local file for good and return its key. The same again is fine, another content is not.

        A checkpoint is named by its content (`epoch-00012-<16 hex of its SHA-256>.pt`) and held to that name.
        """
        key, digest = self.path_of(name), tag_of(local)
        if not matches(key, digest):
            raise DamagedError(f"{local} is not what the name {name} says: its SHA-256 begins with {digest[:16]}")
        if not self._folder.upload(key, local) and self._folder.digest(key) != digest:
            raise ValueError(f"{key} exists with another content: the files of an attempt are never changed")
        return key

    def put_log(self, rank: int, text: str, environ: Mapping[str, str] = os.environ) -> str:
        """Replace the log of a rank by this text: its last 256 KiB, without the secrets of the environment."""
        key = self.path_of(f"log-{rank}.txt")
        self._folder.put(key, without_secrets(text, environ).encode(errors="replace")[-LOG_BYTES:])
        return key

    def checkpoints(self) -> list[str]:
        """Keys of this attempt's checkpoints, the latest epoch first."""
        names = [name for name in self._folder.names(self.key) if CHECKPOINT.fullmatch(name)]
        return sorted((f"{self.key}/{name}" for name in names), key=epoch_of, reverse=True)


def epoch_of(key: str) -> tuple[int, str]:
    """Sorts checkpoints by epoch."""
    match = CHECKPOINT.fullmatch(key.rpartition("/")[2])
    return (int(match[1]) if match else 0, key)


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """The text with the values of variables that are called like secrets starred out."""
    for name, value in environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", name, re.IGNORECASE):
            text = text.replace(value, "***")
    return text
