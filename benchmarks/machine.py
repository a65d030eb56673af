"""Where and with what a benchmark ran: every result file carries it."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def described() -> dict[str, Any]:
    """The command, the moment, the commit, the machine and the versions of a run."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *("PATH" if Path(word).is_absolute() else word for word in sys.argv)]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": gpu,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(name: str, result: dict[str, Any]) -> Path:
    """Put a result, with the description of the run before it, into `benchmarks/results/<name>.json`."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**described(), **result}, indent=1) + "\n")
    return path


def publish(name: str, result: dict[str, Any], table: str | None) -> None:
    """As `write`, and print its `rows`: as this table, or else as JSON."""
    path = write(name, result)
    print(json.dumps(result["rows"], indent=1) if table is None else table)
    print(f"written to {path}", file=sys.stderr)
