"""Gangs on several machines: raylets of one Ray on this one, of which some are killed, drained and filled."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_cifar
import made_metadata
import made_raylets
import pytest
from command_line import Mixmo, kill
from disturbed import CannotError, small_disk
from made_raylets import add
from test_datasets import FILES
from test_fleet import Crew, config

from orchestrator.dispatcher import NAMESPACE, Retries, Update
from orchestrator.errors import UnreachableError, UsageError
from orchestrator.store import ResultStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    with made_raylets.started() as cluster:
        import ray

        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        try:
            yield cluster
        finally:
            ray.shutdown()


def trained(epoch: int, index: int = 0) -> Any:
    return lambda update: update.index == index and any(each.epoch >= epoch for each in update.epochs)


def lost(told: list[Update]) -> list[str | None]:
    return [update.error_kind for update in told if update.kind == "lost"]


def test_a_trial_on_two_machines_survives_the_death_of_one_and_uses_up_no_retry(machines: Any, tmp_path: Path) -> None:
    from orchestrator import fleet
    from orchestrator.casualties import missed_within_s

    assert missed_within_s() == 65.0  # Ray's own settings: 5 checks of 10 s, each 3 s after the one before
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
        # It is asked for every 5 s: the trial is to be under way still.
        trial = config(2, **{"data.batch_size": 2, "optim.epochs": 15, "optim.lr": 0.01})
        crew = Crew(
            tmp_path, [trial], workers=1, name="warned", retries=Retries(crash=0, preempted=0), accelerator="L4",
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


@made_raylets.asked
def test_a_gang_that_cannot_form_in_its_time_is_told_and_the_same_command_goes_on(
    machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for node in list(machines.worker_nodes):
        machines.remove_node(node)
    add(machines)
    machines.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", machines.address)
    sweep = Mixmo(tmp_path / "sweep", LATE)

    class Holder:  # here, so that it travels by value
        """What somebody else runs on the cluster."""

        def here(self) -> bool:
            return True

    held = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(held.here.remote())
    said = sweep("run", "sweep.yaml", "--yes", code=7).stderr
    for part in ("has formed in 5 s: a gang of 1 worker(s) needs 1 CPU", "1 CPU(s) and 0 GPU(s), 0 and 0 are free"):
        assert part in said
    assert "run the same command again" in said
    ray.kill(held)
    (sweep.folder / "sweep.yaml").write_text(LATE.replace("form_within_s: 5", "form_within_s: 600"))  # as it says
    sweep("run", "sweep.yaml", "--yes")
    assert [(row.state, row.attempts) for row in sweep.rows()] == [("TERMINATED", 1)]


LATE = """
name: late
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1}
  optim: {epochs: 2, lr: 0.1}
resources: {gpus_per_worker: 0, form_within_s: 5}
"""


@made_raylets.asked
def test_a_worker_whose_disk_is_full_trains_on_and_saves_when_there_is_room(machines: Any, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk"))
        except CannotError as error:
            pytest.skip(str(error))
        add(machines, env_vars={"TMPDIR": str(disk)}, resources={"accelerator_type:T4": 1})
        machines.wait_for_nodes()
        crew = stack.enter_context(
            Crew(tmp_path, [config(0, **{"optim.epochs": 400})], workers=1, name="full", accelerator="T4")
        )
        crew.fleet.form(1)
        crew.submit(0)
        crew.until(lambda update: bool(update.checkpoint))
        ballast, unsaved = disk / "ballast", 0

        def saves_no_more(update: Update) -> bool:
            """A checkpoint that goes leaves room, which is taken again."""
            nonlocal unsaved
            with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            unsaved = 0 if update.checkpoint else unsaved + len(update.epochs)
            return unsaved >= 20

        crew.until(saves_no_more)
        ballast.unlink()
        assert not any(update.kind == "ended" for update in crew.told)
        crew.until(lambda update: bool(update.checkpoint))
        ended = crew.ended(0)
        assert (ended.state, ended.attempt) == ("TERMINATED", 1)
        assert sorted(crew.losses(0)) == list(range(1, 401))
    assert "a checkpoint is not stored yet" in crew.store.log(crew.orders[0].trial_id)


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0))


@made_raylets.asked
def test_gangs_stand_where_they_may_and_go_so_that_machines_can(
    machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On demand only, on one of two machines: a gang that finds no place is called off when nothing waits for it, one
    that finds no trial goes home, and both are formed again when there is work.
    """
    from orchestrator import roster
    from orchestrator.casualties import waiting_groups

    monkeypatch.setattr(roster, "IDLE_S", 2.0)
    spot, lasting = (
        add(machines, labels={roster.MARKET: market}, resources={"accelerator_type:P4": 1})
        for market in ("spot", "on-demand")
    )
    machines.wait_for_nodes()
    before = free_cpus()
    trials = [config(0, **{"optim.epochs": 100}), config(1), config(2, **{"optim.epochs": 100}), config(3)]
    crew = Crew(tmp_path, trials, workers=1, name="lasting", accelerator="P4", spot=False)
    crew.fleet.limit = 2

    def is_told(how: str) -> bool:
        """In whichever order: the one that finds no place may be called off before the other has begun its trial."""
        return any(update.kind == "gang" and how in update.text for update in crew.told)

    with crew:
        assert crew.fleet.size() == 1
        crew.fleet.form(2)
        crew.submit(0)
        crew.until(lambda update: update.kind == "started")
        assert [worker.node for worker in crew.workers()] == [lasting.node_id]
        crew.until_true(lambda: is_told("no machine had room for it in its time, or no trial waited"))
        assert waiting_groups() == []
        assert crew.ended(0).state == "TERMINATED"
        crew.until_true(lambda: is_told("ended: it was sent home"))
        crew.until_true(lambda: free_cpus() == before)
        assert crew.workers() == []
        crew.submit(1)
        assert crew.ended(1).state == "TERMINATED"
        assert [worker.node for worker in crew.workers()] == [lasting.node_id]
        # A machine that comes later is used, whatever was called off before.
        later = add(machines, labels={roster.MARKET: "on-demand"}, resources={"accelerator_type:P4": 1})
        machines.wait_for_nodes()
        crew.submit(2, 3)
        crew.until(lambda update: update.index == 2 and update.kind == "started")
        assert {crew.ended(2).state, crew.ended(3).state} == {"TERMINATED"}
        assert crew.fleet.size() == 2
    for node in (spot, lasting, later):
        machines.remove_node(node)


@made_raylets.asked
def test_two_sweeps_that_share_a_cluster_are_at_work_at_once_and_both_end(
    machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while len(machines.worker_nodes) < 2:
        add(machines)
    machines.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", machines.address)
    sweeps = [Mixmo(tmp_path / name, SHARED.format(name=name)) for name in ("one", "two")]
    drivers = [sweep.start("run", "sweep.yaml", "--yes") for sweep in sweeps]
    try:
        sweeps[0].until(drivers[0], lambda _: all(map(is_at_work, sweeps)))
        for driver in drivers:
            said = driver.communicate(timeout=600)
            assert driver.returncode == 0, said
    finally:
        for driver in drivers:
            kill(driver)
    assert [[row.state for row in sweep.rows()] for sweep in sweeps] == [["TERMINATED"] * 2] * 2


def is_at_work(sweep: Mixmo) -> bool:
    return sweep.epochs() > 0 and any(row.state == "RUNNING" and row.epoch > 0 for row in sweep.rows())


SHARED = """
name: {name}
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1}}
  optim: {{epochs: 400, lr: 0.01}}
seeds: 2
resources: {{gpus_per_worker: 0, max_gangs: 1}}
"""


def knowing_made_cifar() -> Callable[[Any], None]:
    """What a gang works by, where the images are those of this test; each host writes down what it copies."""
    from torchvision.datasets import CIFAR10

    from mixmo_core import config, data

    made = config.DATASETS["cifar10"], data._MD5["cifar10"]
    lists = {name: getattr(CIFAR10, name) for name in ("train_list", "test_list", "meta")}

    def loop(settings: Any) -> None:  # inside, so that it travels by value
        import os
        from pathlib import Path

        from torchvision.datasets import CIFAR10

        from mixmo_core import config, data
        from orchestrator import gang
        from orchestrator.store.bucket import Bucket

        config.DATASETS["cifar10"], data._MD5["cifar10"] = made
        for name, value in lists.items():
            setattr(CIFAR10, name, value)
        download = Bucket.download

        def watched(self: Bucket, key: str, *rest: Any) -> Any:
            with Path(os.environ["MIXMO_DATA_CACHE"], "copied").open("a") as file:
                file.write(f"{key}\n")
            return download(self, key, *rest)

        Bucket.download = watched  # type: ignore[assignment, method-assign]
        gang.loop(settings)

    return loop


@made_raylets.asked
def test_each_host_of_a_gang_copies_the_images_of_a_bucket_once(
    machines: Any, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmo_core import data
    from orchestrator import datasets, gang

    place, published = bucket.replace("/some/results", "/data"), tmp_path / "published"
    made_cifar.forget()
    made_cifar.write_cifar10(published, monkeypatch)
    for key in FILES:
        ResultStore.open(place).folder.put(key, (published / key).read_bytes())
    caches = [tmp_path / "here", tmp_path / "there"]
    nodes = [
        add(machines, env_vars={datasets.CACHE: str(cache)}, resources={"accelerator_type:V100": 1}) for cache in caches
    ]
    machines.wait_for_nodes()
    monkeypatch.setattr(gang, "loop", knowing_made_cifar())
    images: dict[str, Any] = {"data.dataset": "cifar10", "data.train_images": "all", "data.batch_size": 40}
    crew = Crew(
        tmp_path, [config(seed, **images) for seed in (0, 1)], workers=2, name="images", accelerator="V100",
        data_dir=place, datasets=("cifar10",), group_timeout_s=120.0,
    )  # fmt: skip
    with crew:
        crew.fleet.form(1)
        crew.submit(0, 1)
        assert [crew.ended(index).state for index in (0, 1)] == ["TERMINATED"] * 2
        assert {worker.node for worker in crew.workers()} == {node.node_id for node in nodes}
    for cache in caches:
        assert sorted((cache / "copied").read_text().split()) == FILES
        data.check("cifar10", datasets.local(place, {datasets.CACHE: str(cache)}))
    for node in nodes:
        machines.remove_node(node)
    made_cifar.forget()
