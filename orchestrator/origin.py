"""Where this code comes from. A commit is recorded with results, and is never part of a trial's identity.

Code that was packaged, in a wheel or for a cluster, brings a file that says so; code in a checkout asks git.

    python -m orchestrator.origin       prints that file for this checkout
"""

import contextlib
import functools
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "origin.json"
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Origin:
    git_commit: str | None = None
    """None: not from a repository."""
    git_dirty: bool | None = None
    """Whether files differ from that commit."""

    def __str__(self) -> str:
        return f"{(self.git_commit or 'of no commit')[:12]}{' with local changes' if self.git_dirty else ''}"

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")


@functools.cache
def origin(folder: Path = _HERE) -> Origin:
    """Of the code in a folder; of the code that runs, where none is named."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Origin(**json.loads((folder / FILE).read_text()))
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _git(folder, "ls-files", "origin.py"):  # an environment may lie inside a repository
        return Origin()
    return Origin(commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no")))


def _git(folder: Path, *words: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return None


if __name__ == "__main__":
    print(json.dumps(asdict(origin())))  # noqa: T201
