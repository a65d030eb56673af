"""The picture of the README: the screen over a store that is made of the trials of sweeps/width_m_mixing.yaml.

The trials are those of the file; what became of them is invented, by the formula in `accuracy` and without a training.
"""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from mixmo_core import cost
from mixmo_core.config import TrialConfig
from orchestrator.plan import initial_row
from orchestrator.rows import EpochRow, TrialRow
from orchestrator.screen import Scene, State, Terms
from orchestrator.screen.frame import drawn
from orchestrator.store import ResultStore
from orchestrator.sweep import Sweep, load

FILE = Path(__file__).resolve().parent.parent / "sweeps" / "width_m_mixing.yaml"
SIZE = (108, 34)
NOW = datetime(2026, 11, 21, 14, 2, 11, tzinfo=UTC)
RUNNING, DONE = 6, 128
"""Trials that run, after so many."""
FAILED = {33: "CUDA out of memory", 61: "CUDA out of memory", 118: "worker 0 was killed by signal 9"}
TERMS = Terms(gpu_hour=2.5, gpu_hours=900)


def accuracy(config: TrialConfig) -> float:
    """Invented: grows with the width, a second subnetwork helps wide networks, a fourth hurts narrow ones."""
    M, wide = config.model.subnetworks, math.log2(config.model.width)
    gain = 0.0 if M == 1 else 0.012 * wide - 0.014 * (M - 2) * max(0.0, 2.6 - wide)
    kind = {"sum": 0.0, "linear": 0.008, "cutmix": 0.021}[config.mixing.method] if M > 1 else 0.0
    noise = 0.003 * math.sin(78.233 * (config.seed + 1) + 3 * M + 7 * config.model.width)
    return 0.728 + 0.026 * wide + gain + kind + noise


def _row(sweep: Sweep, position: int, fence: int) -> TrialRow:
    trial = sweep.trials[position]
    row = initial_row(trial, sweep).replace(fence=fence)
    if position >= DONE + RUNNING:
        return row
    ended, epochs = position < DONE, row.epochs
    epoch = 41 if position in FAILED else epochs if ended else 30 + 97 * position % 230
    took_s = cost.trial_flops(trial.config) * epoch / epochs / 1.2e14
    began = NOW - timedelta(seconds=took_s) if not ended else NOW - timedelta(minutes=6.5 * (DONE - position) + 3)
    return row.replace(
        state="ERROR" if position in FAILED else "TERMINATED" if ended else "RUNNING", epoch=epoch, attempts=1,
        error_cause=FAILED.get(position), wall_s=took_s, gpu_seconds=took_s, seq=position + 1, attempt=1,
        images_per_s=2.1e5 / trial.config.model.width, train_flops=cost.trial_flops(trial.config) * epoch / epochs,
        hosts=f"gpu-{position % 4}", device_name="NVIDIA H100", started_at=began - timedelta(hours=2 * ended),
        updated_at=began if ended else NOW - timedelta(seconds=3 * (position - DONE)),
        metrics={"top1": accuracy(trial.config)} if epoch == epochs else {},
    )  # fmt: skip


def _curve(row: TrialRow, config: TrialConfig) -> list[EpochRow]:
    return [
        EpochRow(
            sweep=row.sweep, trial_id=row.trial_id, epoch=epoch, attempt=1, fence=row.fence, seq=row.seq,
            updated_at=NOW, wall_s=float(epoch), gpu_seconds=float(epoch), images_per_s=row.images_per_s or 0.0,
            metrics={"top1": accuracy(config) * (1 - 0.8 * math.exp(-epoch / 45)) + 0.01 * math.sin(7.7 * epoch)},
        )
        for epoch in range(1, row.epoch + 1)
    ]  # fmt: skip


def stored(folder: Path) -> ResultStore:
    """The sweep half done, in a store, by the writer that a driver has."""
    sweep, store = load(FILE), ResultStore.open(folder, create=True)
    clock = [NOW]
    with store.writer(sweep.name, sweep_text=sweep.text, now=lambda: clock[-1]) as writer:
        rows = [_row(sweep, position, writer.fence) for position in range(len(sweep.trials))]
        writer.put(rows)
        for row in rows[DONE : DONE + RUNNING]:
            writer.add(_curve(row, sweep.trials[row.position].config))
        for row in rows[DONE - 12 : DONE]:
            clock.append(row.updated_at or NOW)
            writer.event("running", "", rows[row.position + RUNNING].trial_id)
            clock.append(row.updated_at or NOW)
            writer.event(row.state.lower(), "all epochs trained", row.trial_id, row.error_cause)
        clock.append(NOW)
        writer.close(done=False)
    return store


def scene(folder: Path) -> Scene:
    return Scene(stored(folder).follow(load(FILE).name).look(), NOW, driven=True, terms=TERMS)


def lines(folder: Path) -> list[Text]:
    """What the screen shows of it."""
    return [Text(" ").append_text(line) for line in drawn(scene(folder), NOW, SIZE, State())]


def svg(shown: Sequence[Text]) -> str:
    """As a picture that loads nothing from anywhere."""
    console = Console(record=True, width=SIZE[0], file=StringIO(), force_terminal=True, color_system="256")
    for line in shown:
        line.truncate(SIZE[0])
        console.print(line, no_wrap=True, crop=True)
    plain = re.sub(r"<!--.*?-->\n?", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    plain = re.sub(r"@font-face \{\{.*?\n {4}\}\}\n", "", plain, flags=re.DOTALL)
    drawing = console.export_svg(title="mixmo watch width_m_mixing", code_format=plain, unique_id="mixmo")
    return "\n".join(line.rstrip() for line in drawing.splitlines()) + "\n"
