"""The quick forms of the paper's tables and figures, and of width_m_mixing, run one after another, as files.

    python benchmarks/quick_forms.py --data DEST
    python benchmarks/quick_forms.py --data DEST table1_cifar10 figure5_width

One gang at a time. Each sweep is run, its tables are made as its file says, and benchmarks/results/NAME-quick.json
is written as `learning.py` does, with what the run took: seconds by the clock, which count whatever else the machine
did, and seconds of processor of every process that took part, Ray's included. What is in --results already is not run
again. Linux only.
"""

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from learning import ROOT, write

FILES = {path.stem: path for path in (*(ROOT / "sweeps/paper").glob("*.yaml"), ROOT / "sweeps/width_m_mixing.yaml")}
PR_SET_CHILD_SUBREAPER = 36
ORPHANS_S = 30.0
"""How long processes that outlive their command are waited for."""
UNREACHABLE = 7
"""How a command ends whose Ray did not start; the same command again continues."""
ONE_GANG = ("-S", "resources.max_gangs=1")


class Family:
    """The processor seconds of all processes that descend from this one, those that have ended and orphans included.

    Looked up in /proc five times a second, since Ray's raylet ends its workers without waiting for them, so that no
    parent is ever told what they took. What a process takes after the last look at it is missing.
    """

    PERIOD_S = 0.2

    def __init__(self) -> None:
        self._took: dict[tuple[int, str], float] = {}
        """By the process's id and the moment of its start."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        return sum(self._took.values())

    def _look_on(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            self._look()

    def _look(self) -> None:
        parents: dict[int, int] = {}
        found: dict[int, tuple[str, float]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                found[int(folder.name)] = fields[19], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for process, (started, took) in found.items():
            ancestor = parents[process]
            while ancestor in parents and ancestor != os.getpid():
                ancestor = parents[ancestor]
            if ancestor == os.getpid():
                self._took[process, started] = took


def timed(words: list[str]) -> dict[str, Any]:
    """Run a command, and wait for what it leaves behind. How it ended, and what it took."""
    began = time.monotonic()
    with Family() as family:
        code = subprocess.run(words, check=False).returncode
        wall_s = time.monotonic() - began
        _bury(ORPHANS_S)
    return {"code": code, "wall_s": round(wall_s, 1), "cpu_s": round(family.cpu_s, 1)}


def _bury(patience_s: float) -> None:
    """Wait for the orphans, which are ours since we are their reaper. Those of a Ray that did not come up stay."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.1)


def tables_of(file: Path) -> list[list[str]]:
    """The `mixmo table` commands in the head of a sweep file, as what follows the sweep's name."""
    found = re.findall(rf"^#\s+mixmo table {file.stem}(.*?)(?:\s{{3,}}.*)?$", file.read_text(), re.MULTILINE)
    return [shlex.split(rest) for rest in found]


def run(file: Path, data: Path, results: Path) -> bool:
    """Whether the quick form of a file was run to its end, and its tables came out."""
    mixmo, name = [sys.executable, "-m", "orchestrator.cli"], f"{file.stem}-quick"
    asked = ["run", str(file.relative_to(ROOT)), "--quick", *ONE_GANG, "--yes"]
    took = timed([*mixmo, *asked, "--data", str(data), "--results", str(results)])
    if took["code"] == UNREACHABLE:  # Ray gives its node 30 s to come up, which on a machine that is busy are too few
        again = timed([*mixmo, *asked, "--data", str(data), "--results", str(results)])
        took = {"code": again["code"], **{name: round(took[name] + again[name], 1) for name in ("wall_s", "cpu_s")}}
    print(
        f"{name}: ended with {took['code']} after {took['wall_s']:.0f} s, {took['cpu_s']:.0f} s of processor",
        flush=True,
    )
    if took["code"]:
        return False
    tables = []
    for options in tables_of(file):
        words = ["table", name, *options, "--format", "markdown"]
        made = subprocess.run([*mixmo, *words, "--results", str(results)], capture_output=True, text=True, check=False)
        print(made.stdout or made.stderr, flush=True)
        if made.returncode:
            return False
        tables.append({"command": shlex.join(["mixmo", *words[:-2]]), "markdown": made.stdout})
    ran = {"command": shlex.join(["mixmo", *asked, "--data", "DEST"]), "processors": os.cpu_count(), **took}
    write(str(results), name, {"run": ran, "tables": tables})
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a sweep file's; all without one")
    parser.add_argument("--data", type=Path, required=True, metavar="DEST", help="where CIFAR-10 and CIFAR-100 lie")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER")
    options = parser.parse_args()
    if unknown := set(options.names) - FILES.keys():
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(sorted(FILES))}")
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print("this system cannot give its orphans to us: processor seconds would lack Ray's", file=sys.stderr)
        return 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    files = [FILES[name] for name in options.names or sorted(FILES)]
    failed = [file.stem for file in files if not run(file, options.data.resolve(), options.results.resolve())]
    print(f"failed: {' '.join(failed)}" if failed else f"all {len(files)} ended well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
