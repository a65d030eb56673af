"""A sweep whose results lie in a bucket, from the command line through Ray and back."""

import math
from pathlib import Path

import pytest
from command_line import Mixmo

from orchestrator.store import ResultStore
from orchestrator.store.bucket import Address

SWEEP = """
name: small
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 2}
  optim: {epochs: 2, lr: 0.1}
seeds: 2
resources: {gpus_per_worker: 0}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("place", ["bucket", "ceph_bucket"], indirect=True)
def test_a_sweep_runs_into_a_bucket_and_is_read_from_it(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is named by the environment, as people do; gangs find it by the store's address."""
    bucket, address = place, Address.parse(place)
    place = str(address)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"{address.endpoint}")
    monkeypatch.setenv("MIXMO_RESULTS", place)
    mixmo = Mixmo(tmp_path, SWEEP)
    ran = mixmo("run", "sweep.yaml", "--yes")
    store = ResultStore.open(bucket)
    rows = store.trial_rows("small")
    assert [row.state for row in rows] == ["TERMINATED"] * 2
    assert len(store.epoch_rows("small")) == 4
    for row in rows:
        assert math.isfinite(row.metrics["loss"] or math.nan)
        assert row.checkpoint is not None
        assert store.fetch(row.checkpoint, tmp_path / "a.pt").stat().st_size > 0
        assert store.logits(row).logits_MNK.shape[0] == 2
        assert store.log(row.trial_id)
    status = mixmo.json("status", "small")
    assert (status["status"], status["total"], status["done"]) == ("finished", 2, 2)
    assert "top1" in mixmo("table", "small").stdout
    mixmo("verify", "small")
    again = mixmo("run", "sweep.yaml", "--yes")  # nothing is left to run
    assert store.trial_rows("small") == rows
    assert "hush-hush" not in ran.stdout + ran.stderr + again.stderr
    for key in store.folder.sizes(""):
        stored = store.folder.read(key)
        assert stored is not None
        assert b"hush-hush" not in stored.data
    assert {path.name for path in tmp_path.iterdir()} <= {"sweep.yaml", "a.pt"}
