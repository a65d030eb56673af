"""The command line as a user has it: processes of their own, in a folder of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.rows import TrialRow
from orchestrator.store import ResultStore

PATIENCE_S = 280


class Mixmo:
    """The command line in a folder of its own."""

    def __init__(self, folder: Path, sweep: str) -> None:
        self.folder, self.name = folder, sweep.partition("name: ")[2].split()[0]
        folder.mkdir(exist_ok=True)
        (folder / "sweep.yaml").write_text(sweep)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *words], cwd=self.folder, env=self._environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code, f"{words} gave {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self(*words, "--json").stdout)
        return answer

    def rows(self) -> list[TrialRow]:
        return ResultStore.open(self.folder / "results").trial_rows(self.name)

    def epochs(self) -> int:
        """How many the store's trials have done."""
        written = (self.folder / f"results/sweeps/{self.name}/trials.parquet").exists()
        return sum(row.epoch for row in self.rows()) if written else 0

    def until(self, running: subprocess.Popen[str], happened: Callable[[list[TrialRow]], bool]) -> None:
        """Wait for the store to say so."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert running.poll() is None, f"it ended with {running.returncode}: {running.communicate()}"
            if (self.folder / f"results/sweeps/{self.name}/trials.parquet").exists() and happened(self.rows()):
                return
            time.sleep(0.1)
        raise AssertionError("it did not happen in time")

    def results(self) -> dict[str, dict[str, Any]]:
        """What a run has to repeat to the bit: the metrics of every epoch of every trial, and of the trials."""
        store = ResultStore.open(self.folder / "results")
        found = {row.trial_id: {"trial": row.metrics, "state": row.state, "epoch": row.epoch} for row in self.rows()}
        for each in store.epoch_rows(self.name):
            found[each.trial_id][str(each.epoch)] = each.metrics
        return found

    def _environment(self) -> dict[str, str]:
        here = str(Path(__file__).resolve().parent.parent)
        return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


ROOT = Path(__file__).resolve().parent.parent
_LOADED = "print(*sorted(name for name, module in sys.modules.items() if module), file=sys.stderr)"


def loaded_by(*words: str) -> set[str]:
    """The modules that a command loads, in a process of its own. Its own verdict must be 0, or 3 for faults found."""
    code = (
        "import sys; from orchestrator import cli; code = cli.guarded(lambda: cli.app(args=sys.argv[1:],"
        f" standalone_mode=False)); print(code, end=' ', file=sys.stderr); {_LOADED}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    ended, *loaded = done.stderr.splitlines()[-1].split()
    assert int(ended) in (0, 3), done.stderr
    return set(loaded)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
