"""A cluster on AWS, from bare credentials: workers come for a sweep, are taken away under it, come again, and go.

    make test-cluster        as root, with Debian's iproute2, openssh-server and rsync; about ten minutes on 2 cores

Ray's own AWS provider and autoscaler launch machines at a model of EC2 (cloud.py). Each is a namespace of this machine
(hosts.py), which has what cluster/gpu.yaml brings it: wheel, token, environment. No host has a GPU; those that are in
EC2's list are what Ray counts with. The images, the metadata of machines and their roles are Amazon's, and not here.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from cloud import ENVIRONMENT, REGION, Cloud, server
from hosts import until
from laptop import ROOT, Laptop, main, say

SWEEP = """
name: from_zero
trial:
  data: {dataset: digits, train_images: 400, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1}
  optim: {epochs: 60, lr: 0.1}
blocks:
  - {label: cut, set: {mixing.method: cutmix}}
seeds: 2
resources: {cpus_per_worker: 3, gpus_per_worker: 0, max_gangs: 2}
checkpoints: {every_s: 1}
"""
"""A spot machine has 4 CPUs, so that two gangs need two of them."""
EDITS = {
    "  type: aws\n": "  type: external\n  module: mapped.Mapped\n",
    # What Ray itself fills in for AWS, and for no provider that is not in its list.
    "cluster_name: mixmo\n": "cluster_name: mixmo\ninitialization_commands: []\ncluster_synced_files: []\n",
    "ssh_user: ubuntu ": "ssh_user: root ",
    "idle_timeout_minutes: 5\n": "idle_timeout_minutes: 0.5\n",
}
BUCKET = "my-bucket"
RESULTS = f"s3://{BUCKET}/results?region={REGION}"


def whole(folder: Path) -> None:
    os.environ |= ENVIRONMENT
    with server():
        cloud = Cloud(folder)
        paths = f"{ROOT}:{Path(__file__).parent}"
        laptop = Laptop(folder, "gpu.yaml", EDITS, {"PYTHONPATH": paths, "MIXMO_RESULTS": RESULTS})
        laptop.python(str(ROOT / "cluster/setup_aws.py"), "--bucket", BUCKET, "--region", REGION)
        laptop.up()
        (head,) = cloud.machines()
        assert (head.kind, head.spot) == ("head", False)
        (node,) = laptop.nodes(cloud.host(head))
        assert not node["Resources"].get("CPU"), node
        say("ray up: a head, and no worker")
        with laptop.tunnel(cloud.host(head)):
            train(laptop, cloud)
        began = time.monotonic()
        until(lambda: not cloud.running("spot_gpu"), "workers that have nothing to do are ended", 600)
        assert cloud.running("head") == [head]
        say(f"the workers are ended, {time.monotonic() - began:.0f} s after the sweep")
        laptop.ray("down", "-y", str(laptop.file))
        assert not any(machine.runs for machine in cloud.machines())
        until(cloud.all_off, "all hosts are off", 60)
        say("ray down: no machine is left")


def train(laptop: Laptop, cloud: Cloud) -> None:
    """A sweep for which two workers come; both are taken away, and two more come."""
    from orchestrator.rows import TrialRow
    from orchestrator.store import ResultStore

    (laptop.folder / "from_zero.yaml").write_text(SWEEP)
    laptop.mixmo("submit", "from_zero.yaml", "--yes")
    store = ResultStore.open(RESULTS)

    def rows() -> list[TrialRow]:
        with contextlib.suppress(Exception):
            return list(store.trial_rows("from_zero"))
        return []

    def at_work() -> set[str]:
        """Hosts that have trained a while."""
        return {str(row.hosts) for row in rows() if row.state == "RUNNING" and row.epoch > 3}

    until(lambda: len(at_work()) == 2, "two gangs train", 900)
    first = cloud.running("spot_gpu")
    assert at_work() == {cloud.host(machine).name for machine in first}
    assert all(machine.spot and machine.instance_type == "g6.xlarge" for machine in first)
    (head,) = cloud.running("head")
    workers = [node for node in laptop.nodes(cloud.host(head)) if node["Resources"].get("CPU")]
    assert len(workers) == 2, workers
    for node in workers:
        assert (node["Resources"]["CPU"], node["Resources"]["GPU"]) == (4, 1), node
        assert node["Labels"]["ray.io/market-type"] == "spot", node
    assert len(cloud.machines()) == 3, "as many as the sweep needs"
    say("two spot workers have come, and train")

    before = {row.trial_id: row.epoch for row in rows()}
    for machine in first:
        cloud.end(machine)
    say(f"both are taken away, after {sum(before.values())} epochs")
    began = time.monotonic()
    gone = {cloud.host(machine).name for machine in first}
    until(lambda: at_work() - gone, "a worker that has come in their place trains", 900)
    say(f"training goes on, {time.monotonic() - began:.0f} s later")
    until(lambda: rows() and all(row.state in ("TERMINATED", "ERROR") for row in rows()), "the sweep ends", 1200)

    found = rows()
    assert {row.state for row in found} == {"TERMINATED"}, [(row.state, row.error) for row in found]
    assert all(row.attempts > 1 for row in found)
    assert len(cloud.machines()) <= 5, "as many as the sweep needs"
    laptop.mixmo("verify", "from_zero")
    say("the sweep has finished, whole")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(__file__, whole))
