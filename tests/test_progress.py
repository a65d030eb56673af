"""What a sweep is said to be doing: on its way to rest, stopping, starting, all cancelled."""

import re
from typing import Any

import pytest
from sample_sweep import NOW

from mixmo_core.config import TrialConfig, cell_id, digest, identity
from orchestrator import pages, progress
from orchestrator.rows import State, TrialRow, config_columns
from orchestrator.screen import Scene, render
from orchestrator.store import Header, Snapshot

SIZE = (100, 20)
FENCE = 2
"""Of the driver that runs."""


def row(seed: int, state: State = "PENDING", fence: int = FENCE) -> TrialRow:
    config = TrialConfig(seed=seed)
    name = digest(identity(config))
    return TrialRow(
        sweep="made", position=seed, trial_id=name[:12], digest=name, cell_id=cell_id(config), state=state, epochs=10,
        fence=fence, config=config_columns(config),
    )  # fmt: skip


def shot(*rows: TrialRow, **header: Any) -> Snapshot:
    return Snapshot(Header(fence=FENCE, written_at=NOW, **header), rows, [], [])


def test_a_sweep_on_its_way_to_rest_says_so_until_its_trials_have_stopped() -> None:
    """The header and the list tell the same."""
    frame = render(Scene(shot(row(0, "RUNNING"), row(1, "PAUSED"), paused_by="ada@lab"), NOW), NOW, SIZE).plain
    assert "‖ pausing by ada@lab" in frame
    assert "1 running  1 paused" in frame
    assert "Pausing 2" in frame
    assert "Paused" not in frame


@pytest.mark.parametrize("left", ["RUNNING", "PENDING"])
def test_a_driver_that_lets_its_trials_finish_is_stopping_and_not_starting(left: State) -> None:
    stopping = shot(row(0, "TERMINATED"), row(1, left), stopping=True)
    assert progress.measure(stopping, NOW).status == "stopping"
    frame = render(Scene(stopping, NOW), NOW, SIZE).plain
    assert "◦ stopping" in frame
    assert " left" not in frame
    assert progress.measure(stopping, NOW, driven=False).status == "stopped"


@pytest.mark.parametrize(("fence", "status"), [(FENCE, "running"), (FENCE - 1, "starting")])
def test_a_driver_between_two_trials_runs_and_one_that_has_ended_none_starts(fence: int, status: str) -> None:
    assert progress.measure(shot(row(0, "TERMINATED", fence), row(1)), NOW).status == status


def test_a_sweep_whose_trials_are_all_cancelled_is_not_called_a_success() -> None:
    cancelled = [row(seed, "CANCELLED") for seed in range(2)]
    state = progress.measure(shot(*cancelled), NOW)
    assert state.status == "finished"  # nothing is left to run: who waits for that goes on
    assert "✗ all cancelled" in render(Scene(shot(*cancelled), NOW), NOW, SIZE).plain
    assert re.search(r"made +cancelled +0 of 2", pages.sweeps([("made", state, NOW)], NOW, 80).plain)
    assert "✓ finished" in render(Scene(shot(*cancelled, row(2, "TERMINATED")), NOW), NOW, SIZE).plain
