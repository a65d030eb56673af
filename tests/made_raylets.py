"""A Ray of several machines on this one: raylets of a head that trains nothing, as the cluster files have it."""

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

asked = pytest.mark.skipif(
    not os.environ.get("MIXMO_TEST_FAULTS"),
    reason="FIFTEEN MINUTES OF FAULTS OF RAY WERE NOT TRIED: `make test-faults` runs them",
)
"""Tests that take a minute or two each, of what few changes touch."""


@contextlib.contextmanager
def started(**head: Any) -> Iterator[Any]:
    """Ray's own class for it, with no worker yet. `head` are arguments of `ray start` for the head."""
    folder = tempfile.mkdtemp(prefix="mixmo-nodes-", dir="/tmp")
    settings = {
        "RAY_TMPDIR": folder, "GLOO_SOCKET_IFNAME": "lo",
        "RAY_worker_niceness": "0",  # else workers starve where others compute
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    Path(folder, "ray").mkdir()
    importlib.import_module("orchestrator.fleet")  # it tells Ray how to be before Ray is there
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **head},
    )
    try:
        yield cluster
    finally:
        for node in (*cluster.worker_nodes, cluster.head_node):  # Cluster.shutdown refuses, where a Ray was here before
            kill(node)
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def add(cluster: Any, **more: Any) -> Any:
    return cluster.add_node(num_cpus=1, include_dashboard=False, **more)


def kill(node: Any) -> None:
    """All processes of it at once."""
    node.kill_all_processes(check_alive=False, allow_graceful=False)
