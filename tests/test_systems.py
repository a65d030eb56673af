"""Every system of the paper, from a sweep file through Ray into the tables."""

import math
from pathlib import Path

import pytest
from command_line import Mixmo

from orchestrator.store import ResultStore

SWEEP = Path(__file__).resolve().parent.parent / "sweeps" / "benchmark" / "systems.yaml"


@pytest.mark.ray
@pytest.mark.slow
def test_every_system_trains_and_evaluates_from_a_sweep_file(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, SWEEP.read_text())
    mixmo("run", "sweep.yaml", "--yes")
    rows = mixmo.rows()
    assert {row.state for row in rows} == {"TERMINATED"}
    for row in rows:
        metrics = row.metrics
        assert metrics["loss"] is not None, row.label
        assert math.isfinite(metrics["loss"]), row.label
        assert 0 <= (metrics["top1"] or 0) <= 1, row.label
        several = row.config["model_subnetworks"] > 1 and row.config["model_classifiers"] != 1
        assert (metrics["disagreement"] is not None) == several, row.label
    store = ResultStore.open(tmp_path / "results")
    stored = {row.label: store.logits(row).logits_MNK.shape for row in rows}
    assert stored["more subnetworks"] == (5, 360, 10)
    assert stored["two encoders, one classifier"] == (1, 360, 10)
    mixmo("verify", "systems")
    mixmo("table", "systems", "--metric", "nll_calibrated")
