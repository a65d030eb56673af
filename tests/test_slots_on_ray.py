"""Whole sweeps on Ray whose gang trains three trials at a time, from a sweep file."""

import os
import signal
from pathlib import Path

import pytest
from command_line import PATIENCE_S, Mixmo
from test_driver import workers

from orchestrator.rows import TrialRow

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SWEEP = """\
name: narrow
trial:
  data:   {dataset: digits, train_images: 800, batch_size: 40, augmentation: standard}
  model:  {depth: 10, width: 1}
  optim:  {epochs: 12, lr: 0.1}
blocks:
  - grid: {mixing.method: [cutmix, linear]}
seeds: 3
retry: {crash: 0}
resources: {max_gangs: 1, gpus_per_worker: 0, slots: SLOTS}
"""
"""Six trials, of two shapes in turn."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Mixmo:
    mixmo = Mixmo(tmp_path_factory.mktemp("alone"), SWEEP.replace("SLOTS", "1"))
    mixmo("run", "sweep.yaml")
    return mixmo


def test_six_trials_in_three_slots_come_to_the_numbers_of_each_alone(alone: Mixmo, tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, SWEEP.replace("SLOTS", "3"))
    assert "At once: 3 trials (1 gang x 3 slots" in mixmo("plan", "sweep.yaml").stdout
    running = mixmo.start("run", "sweep.yaml")
    at_once: list[set[str]] = []

    def three_have_an_epoch(rows: list[TrialRow]) -> bool:
        at_once.append({row.cell_id for row in rows if row.state == "RUNNING"})
        return sum(row.state == "RUNNING" and row.epoch > 0 for row in rows) == 3

    mixmo.until(running, three_have_an_epoch)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, err
    mixmo("verify", "narrow")
    assert mixmo.results() == alone.results()
    assert max(map(len, at_once)) == 1, "one shape at a time"
    assert {(row.slots, row.attempts) for row in mixmo.rows()} == {(3, 1)}
    assert {(row.slots, row.attempts) for row in alone.rows()} == {(1, 1)}


def test_a_gang_that_is_killed_with_three_trials_in_hand_blames_none_and_each_goes_on(
    alone: Mixmo, tmp_path: Path
) -> None:
    """Although a crash of its own would be one too many for any of them."""
    mixmo = Mixmo(tmp_path, SWEEP.replace("SLOTS", "3"))
    running = mixmo.start("run", "sweep.yaml")
    mixmo.until(running, lambda rows: sum(row.state == "RUNNING" and row.epoch > 1 for row in rows) == 3)
    (worker,) = workers(running.pid)
    os.kill(worker, signal.SIGKILL)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, err
    mixmo("verify", "narrow")
    assert mixmo.results() == alone.results()
    assert sorted(row.attempts for row in mixmo.rows()) == [1, 1, 1, 2, 2, 2]
