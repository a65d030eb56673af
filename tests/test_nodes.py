"""Gangs on several machines: raylets of one Ray on this one, of which some are killed, drained and filled."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_metadata
import pytest
from test_fleet import Crew, config, long

from orchestrator.dispatcher import NAMESPACE, Retries, Update
from orchestrator.errors import UnreachableError, UsageError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head that trains nothing, as the cluster files have it."""
    folder = tempfile.mkdtemp(prefix="mixmo-nodes-", dir="/tmp")
    settings = {
        "RAY_TMPDIR": folder, "GLOO_SOCKET_IFNAME": "lo",
        "RAY_worker_niceness": "0",  # else workers starve where others compute
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    Path(folder, "ray").mkdir()
    importlib.import_module("orchestrator.fleet")  # it tells Ray how to be before Ray is there
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        for node in (*cluster.worker_nodes, cluster.head_node):  # Cluster.shutdown refuses, where a Ray was here before
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def add(machines: Any, **more: Any) -> Any:
    return machines.add_node(num_cpus=1, include_dashboard=False, **more)


def trained(epoch: int, index: int = 0) -> Any:
    return lambda update: update.index == index and any(each.epoch >= epoch for each in update.epochs)


def lost(told: list[Update]) -> list[str | None]:
    return [update.error_kind for update in told if update.kind == "lost"]


@pytest.mark.skipif(
    not os.environ.get("MIXMO_TEST_NODES"),
    reason="A KNOWN FAULT (docs/reliability.md): the death of a machine that Ray has yet to notice is charged as a "
    "crash, and here none is allowed; MIXMO_TEST_NODES=1 runs it",
)
def test_a_trial_on_two_machines_survives_the_death_of_one_and_uses_up_no_retry(machines: Any, tmp_path: Path) -> None:
    from orchestrator import fleet

    nodes = [add(machines) for _ in range(2)]
    machines.wait_for_nodes()
    trial = config(0, **{"optim.epochs": 60})
    crew = Crew(tmp_path, [trial], workers=2, name="pair", retries=Retries(crash=0), group_timeout_s=60.0)
    with crew:
        assert fleet.offered().room(crew.fleet.plan) == 1
        crew.fleet.form(1)
        crew.submit(0)
        crew.until(trained(2))
        ranks = crew.workers()
        assert len({worker.node for worker in ranks}) == 2
        gone = next(node for node in nodes if node.node_id == ranks[1].node)
        machines.remove_node(gone, allow_graceful=False)
        come = add(machines)  # the autoscaler's answer
        ended = crew.ended(0)
        assert (ended.state, ended.attempt) == ("TERMINATED", 2)
        assert lost(crew.told) == ["preempted"]
        # Which of them is the first rank is Ray's to say.
        assert sorted(worker.node for worker in crew.workers()) == sorted([ranks[0].node, come.node_id])
        assert sorted(crew.losses(0)) == list(range(1, 61))
    assert "resumed from trials/" in crew.store.log(crew.orders[0].trial_id)


def test_a_spot_notice_saves_at_once_and_another_gang_goes_on_elsewhere(machines: Any, tmp_path: Path) -> None:
    from ray._private.state import state

    from orchestrator.casualties import dead_nodes

    with made_metadata.serve() as metadata:
        marked = add(machines, env_vars={"MIXMO_SPOT_NOTICE": metadata.address}, resources={"accelerator_type:L4": 1})
        machines.wait_for_nodes()
        crew = Crew(
            tmp_path, [long()], workers=1, name="warned", retries=Retries(crash=0, preempted=0), accelerator="L4",
            checkpoint_every_s=3600.0,
        )  # fmt: skip
        with crew:
            crew.fleet.form(1)
            crew.submit(0)
            crew.until(lambda update: update.kind == "started")
            assert [worker.node for worker in crew.workers()] == [marked.node_id]
            metadata.notice(120)
            given_back = crew.until(lambda update: update.kind == "lost")
            assert (given_back.error_kind, bool(given_back.checkpoint)) == ("preempted", True)
            crew.until(lambda update: update.kind == "gang")
            # Once nothing runs there any more it may be gone at once.
            assert marked.node_id in {*state.get_draining_nodes(), *dead_nodes()}
            machines.remove_node(marked, allow_graceful=False)
            add(machines, resources={"accelerator_type:L4": 1})
            ended = crew.ended(0)
            assert (ended.state, ended.attempt) == ("TERMINATED", 2)
            assert len([update for update in crew.told if update.kind == "started"]) == 2
            assert marked.node_id in dead_nodes()
        assert f"resumed from {given_back.checkpoint}" in crew.store.log(crew.orders[0].trial_id)


def test_what_no_machine_has_is_refused_and_what_others_use_is_waited_for_and_then_said(
    machines: Any, tmp_path: Path
) -> None:
    from orchestrator import fleet

    while len(machines.worker_nodes) < 2:
        add(machines)
    machines.wait_for_nodes()
    crews = [
        Crew(tmp_path / name, [config(seed, **{"optim.epochs": 40})], workers=1, name=name, form_within_s=within)
        for seed, (name, within) in enumerate([("first", 600.0), ("second", 600.0)])
    ]
    with pytest.raises(UsageError, match="of type H100"):
        fleet.offered().refuse_if_never(Crew(tmp_path, [], workers=1, name="never", accelerator="H100").fleet.plan)
    # Two sweeps that share the machines by max_gangs are at work at the same time.
    with crews[0] as first, crews[1] as second:
        for crew in crews:
            crew.fleet.form(1)
            crew.submit(0)
        first.until(trained(1))
        second.until(trained(1))
        assert not any(update.kind == "ended" for crew in crews for update in crew.told)
        wide = Crew(tmp_path / "wide", [config(9)], workers=2, name="wide", form_within_s=1.0)
        with wide:
            wide.fleet.form(1)
            wide.submit(0)
            said = r"no group of workers has formed in 1 s: a gang of 2 worker\(s\) needs 2 CPU.* are free"
            with pytest.raises(UnreachableError, match=said):
                wide.until(lambda update: update.kind == "ended")
        for crew in crews:
            assert crew.ended(0).state == "TERMINATED"
