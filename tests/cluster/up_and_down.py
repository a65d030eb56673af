"""A cluster of hosts of one's own, from `ray up` to `ray down`, with one host killed in between.

    make test-cluster        as root, with Debian's iproute2, openssh-server, python3-venv and rsync

Hosts are namespaces of this machine (hosts.py): a head and three workers, whose Rays see neither each other's processes
nor each other's files, but for the folder of results, which they share as hosts share a network folder.
"""

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import hosts
from hosts import Host, until
from laptop import ROOT, Laptop, installed, key, main, prepare, say

WORKERS = 3
SWEEP = """
name: two_hosts
trial:
  data: {dataset: digits, train_images: 400, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1}
  optim: {epochs: 40, lr: 0.1}
blocks:
  - {label: cut, set: {mixing.method: cutmix}}
seeds: 3
resources: {workers: 2, cpus_per_worker: 2, gpus_per_worker: 0}
checkpoints: {every_s: 1}
"""
"""Each of the hosts has the 2 CPUs of this machine: a gang of 2 workers needs two of them."""
AS_INSTALLED = "the wheel's own"


def whole(folder: Path) -> None:
    from orchestrator.origin import origin
    from orchestrator.rows import TrialRow
    from orchestrator.store import ResultStore

    cluster = [Host(number, folder / f"host{number}") for number in range(1 + WORKERS)]
    for host in cluster:
        host.plug_in(key())
    for host in cluster:
        until(host.answers, f"{host.name} answers over SSH", 60)
        prepare(host)
    say(f"{len(cluster)} hosts answer over SSH")

    head, *workers = cluster
    edits = {
        "head_ip: 192.0.2.1 ": f"head_ip: {head.address} ",
        "worker_ips: [192.0.2.2, 192.0.2.3] ": f"worker_ips: [{', '.join(host.address for host in workers)}] ",
        "ssh_user: ubuntu ": "ssh_user: root ",
        "ssh_private_key: ~/": f"ssh_private_key: {os.environ['HOME']}/",  # ssh asks not HOME but the user's record
    }
    laptop = Laptop(folder, "onprem.yaml", edits)
    (folder / "two_hosts.yaml").write_text(SWEEP)
    laptop.up()
    until(lambda: len(laptop.nodes(head)) == len(cluster), "all hosts are in the cluster", 900, 15)
    say(f"ray up: {len(cluster)} hosts in the cluster")
    for host in cluster:  # what is installed there is told from what is submitted
        (installed(host) / "origin.json").write_text(json.dumps({"git_commit": AS_INSTALLED, "git_dirty": False}))

    with laptop.tunnel(head):
        submit = ["submit", "two_hosts.yaml", "--yes"]
        refused = laptop.mixmo(*submit, "--results", f"{hosts.HOME}/results", code=6)
        assert f"not in reach of {WORKERS} of the cluster's {len(cluster)} hosts" in refused, refused
        say("a folder that hosts do not share is refused")

        results = folder / "shared"
        laptop.mixmo(*submit, "--results", str(results))
        sent = origin()
        store = ResultStore.open(results)

        def rows() -> list[TrialRow]:
            with contextlib.suppress(Exception):
                return list(store.trial_rows("two_hosts"))
            return []

        def running() -> list[str]:
            """The hosts of a trial that has trained a while."""
            return next(((row.hosts or "").split() for row in rows() if row.state == "RUNNING" and row.epoch > 3), [])

        until(running, "a gang trains", 300)
        at_work = running()
        assert len(at_work) == 2, at_work
        say(f"a gang of two hosts trains: {' and '.join(at_work)}")
        assert "at work already" in laptop.mixmo(*submit, "--results", str(results))

        lost = next(host for host in workers if host.name == at_work[0])
        before = sum(row.epoch for row in rows())
        lost.kill()
        say(f"{lost.name} is killed, after {before} epochs")
        began = time.monotonic()
        until(lambda: sum(row.epoch for row in rows()) > before + 3, "training goes on", 600)
        say(f"training goes on, {time.monotonic() - began:.0f} s later")
        until(lambda: rows() and all(row.state in ("TERMINATED", "ERROR") for row in rows()), "the sweep ends", 900)

    found = rows()
    assert {row.state for row in found} == {"TERMINATED"}, [(row.state, row.error) for row in found]
    assert any(row.attempts > 1 for row in found)
    assert {row.git_commit for row in found} == {sent.git_commit}
    for rank in (0, 1):
        log = store.log(found[-1].trial_id, rank)
        assert f"code {sent}" in log, log[:500]
        assert AS_INSTALLED not in log
    assert laptop.mixmo("verify", "two_hosts", "--results", str(results)) is not None
    say("the sweep has finished, whole, with the code that was submitted")

    laptop.ray("down", "-y", str(laptop.file))
    for host in cluster:  # workers end by themselves when they have missed their head for a while
        if host is not lost:
            until(partial(without_ray, host), f"no Ray is left on {host.name}", 120)
    say("ray down: no Ray is left")


def without_ray(host: Host) -> bool:
    return not host.run("pgrep raylet || true").strip()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(__file__, whole))
