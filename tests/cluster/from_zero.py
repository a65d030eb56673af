"""A cluster on AWS, from bare credentials: machines come for a sweep, are taken away under it, come again, and go.

    make test-cluster        as root, with Debian's iproute2, openssh-server, python3-venv and rsync

Ray's own AWS provider and autoscaler launch machines at a model of EC2 (cloud.py). Each is a namespace of this machine
(hosts.py), which has what cluster/gpu.yaml brings it: wheel, token, environment, and results in the bucket. No host has
a GPU; those that are in EC2's list are what Ray counts with. Images, roles and notices are Amazon's, and not here.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cloud import ENVIRONMENT, REGION, Cloud, Machine, server
from hosts import until
from laptop import ROOT, Laptop, main, say

if TYPE_CHECKING:
    from orchestrator.rows import TrialRow

NAME = "from_zero"
SWEEP = f"""
name: {NAME}
trial:
  data: {{dataset: digits, train_images: 400, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1}}
  optim: {{epochs: 60, lr: 0.1}}
blocks:
  - {{label: cut, set: {{mixing.method: cutmix}}}}
seeds: 2
resources: {{cpus_per_worker: 3, gpus_per_worker: 0}}
checkpoints: {{every_s: 1}}
"""
"""A spot machine has 4 CPUs, so that two trials at once need two of them."""
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

        Sweep(laptop, cloud, head).goes_through_it_all()
        assert cloud.running() == [head]
        laptop.ray("down", "-y", str(laptop.file))
        assert cloud.running() == []
        until(cloud.all_off, "all hosts are off", 60)
        say("ray down: no machine is left")


class Sweep:
    """One that is submitted from the laptop, and the machines that come and go for it."""

    def __init__(self, laptop: Laptop, cloud: Cloud, head: Machine) -> None:
        self.laptop, self.cloud, self.head = laptop, cloud, head

    def goes_through_it_all(self) -> None:
        from orchestrator.store import ResultStore

        (self.laptop.folder / f"{NAME}.yaml").write_text(SWEEP)
        with self.laptop.tunnel(self.cloud.host(self.head)):
            self.laptop.mixmo("submit", f"{NAME}.yaml", "--yes")
        self.store = ResultStore.open(RESULTS)

        taken = self.trains_on_two()
        self.check_what_ray_knows_of_them()
        for machine in taken:
            self.cloud.end(machine)
        say("both are taken away")
        self.trains_on_two()
        assert all(row.attempts > 1 for row in self.rows())

        self.laptop.mixmo("pause", NAME)
        say("the sweep pauses")
        self.lets_them_go()
        self.laptop.mixmo("resume", NAME)
        say("it goes on")
        self.trains_on_two()

        ended = ("TERMINATED", "ERROR")
        until(lambda: self.rows() and all(row.state in ended for row in self.rows()), "the sweep ends", 3600)
        assert {row.state for row in self.rows()} == {"TERMINATED"}, [(row.state, row.error) for row in self.rows()]
        self.laptop.mixmo("verify", NAME)
        say("the sweep has finished, whole")
        self.lets_them_go()
        launched = [machine.kind for machine in self.cloud.machines()]
        assert sorted(launched) == ["head"] + 6 * ["spot_gpu"], "as many as were needed, and no more"

    def trains_on_two(self) -> list[Machine]:
        """Wait until both trials train on spot machines, and return those."""
        began = time.monotonic()
        until(lambda: len(self.workers()) == 2, "two machines are launched", 600)
        found = self.workers()
        assert all(machine.spot and machine.instance_type == "g6.xlarge" for machine in found), found
        until(lambda: self.at_work() >= set(map(self.cloud.name, found)), "trials train on both", 1200)
        assert self.workers() == found
        say(f"two spot machines have come, and train: {time.monotonic() - began:.0f} s")
        return found

    def lets_them_go(self) -> None:
        began = time.monotonic()
        until(lambda: not self.workers(), "machines that have nothing to do are ended", 600)
        say(f"both machines are ended: {time.monotonic() - began:.0f} s")

    def check_what_ray_knows_of_them(self) -> None:
        nodes = self.laptop.nodes(self.cloud.host(self.head))
        workers = [node for node in nodes if node["Resources"].get("CPU")]
        assert (len(nodes), len(workers)) == (3, 2), nodes
        for node in workers:
            assert (node["Resources"]["CPU"], node["Resources"]["GPU"]) == (4, 1), node
            assert node["Labels"]["ray.io/market-type"] == "spot", node

    def workers(self) -> list[Machine]:
        return [machine for machine in self.cloud.running() if machine != self.head]

    def rows(self) -> list["TrialRow"]:
        with contextlib.suppress(Exception):  # the driver may not have written any yet
            return list(self.store.trial_rows(NAME))
        return []

    def at_work(self) -> set[str]:
        """Hosts of trials that have trained a while, also those where they trained before."""
        found = [str(row.hosts) for row in self.rows() if row.state == "RUNNING" and row.epoch > 3]
        return {host for hosts in found for host in hosts.split()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(__file__, whole))
