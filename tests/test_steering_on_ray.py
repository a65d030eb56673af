"""Whole sweeps on Ray, steered through the command line, and two at once that share a trial."""

from pathlib import Path

import pytest
from command_line import PATIENCE_S, Mixmo
from test_driver import LONG, reached

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_sweep_that_was_paused_cancelled_stopped_and_retried_comes_to_the_same_numbers(tmp_path: Path) -> None:
    sweep = LONG.replace("seeds: 2", "seeds: 5")  # so many that some are left when it is stopped
    undisturbed, mixmo = (Mixmo(tmp_path / name, sweep) for name in ("undisturbed", "steered"))
    undisturbed("run", "sweep.yaml")
    running = mixmo.start("run", "sweep.yaml")
    mixmo.until(running, reached(2))
    mixmo("pause", "small")
    mixmo.until(running, lambda rows: not any(row.state == "RUNNING" for row in rows))
    assert any(row.state == "PAUSED" for row in mixmo.rows())
    assert mixmo.json("status", "small")["status"] == "paused"
    waits, goes = (mixmo.rows()[position].trial_id for position in (-1, -2))
    mixmo("cancel", "small", waits, goes)
    mixmo("retry", "small", goes[:8])
    mixmo("resume", "small")
    mixmo("stop", "small")
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 4, err
    assert {row.state for row in mixmo.rows()} <= {"TERMINATED", "PENDING", "CANCELLED"}
    assert [row.trial_id for row in mixmo.rows() if row.state == "CANCELLED"] == [waits]
    mixmo("retry", "small", waits[:8])  # this time there is no driver
    mixmo("run", "sweep.yaml")
    mixmo("verify", "small")
    assert mixmo.results() == undisturbed.results()


def test_two_sweeps_at_once_train_a_trial_that_they_share_once(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, LONG)
    other = LONG.replace("name: small", "name: other").replace(
        "  - {label: vanilla, set: {model.subnetworks: 1}}\n", ""
    )
    (tmp_path / "other.yaml").write_text(other.replace("seeds: 2", "seeds: [0, 7]"))
    first = mixmo.start("run", "sweep.yaml")
    mixmo.until(first, lambda rows: any(row.label == "cut" and row.state == "RUNNING" for row in rows))
    second = mixmo.start("run", "other.yaml")
    for running in (first, second):
        _, err = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 0, err
    mixmo("verify", "small")
    mixmo("verify", "other")
    mixmo.name = "other"
    shared, own = mixmo.rows()
    assert (shared.cached_from, own.cached_from) == ("small", None)
    assert len(list((tmp_path / "results/trials" / shared.trial_id).iterdir())) == 1  # one attempt, of one of them
    assert not list((tmp_path / "results").glob("claims/*.json"))
