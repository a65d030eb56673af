"""Warm gangs on a real Ray: worker groups of Ray Train that train, fail, idle, die and come back."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixmo_core.config import TrialConfig, flatten, trial_id, unflatten
from orchestrator.dispatcher import NAMESPACE, Order, Retries, Update, Worker
from orchestrator.errors import UnreachableError
from orchestrator.store import ResultStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = {
    "data.dataset": "digits", "data.train_images": 200, "data.batch_size": 40, "data.augmentation": "none",
    "model.depth": 10, "model.width": 1, "optim.epochs": 5, "optim.lr": 0.1,
}  # fmt: skip


def config(seed: int = 0, **changes: object) -> TrialConfig:
    return unflatten({**SMALL, "seed": seed, **changes})


def long() -> TrialConfig:
    """Two epochs of 100 steps, so that a kill which follows the news of one of the first falls into the same epoch."""
    return config(2, **{"data.batch_size": 2, "optim.epochs": 2, "optim.lr": 0.01})


def failing() -> TrialConfig:
    """CIFAR-10 without its files: an exception in the trial itself."""
    return unflatten({"data.dataset": "cifar10", "model.depth": 10, "model.width": 1, "optim.epochs": 2})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    from orchestrator import fleet

    with fleet.cluster(cpus=2):
        yield


def test_a_ray_that_does_not_come_up_is_no_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 24 at work on 2 cores its node was not up within Ray's 30 s, which raises a bare Exception."""
    import ray

    from orchestrator import fleet

    def late(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # another Ray may be up in this process
    with (
        pytest.raises(UnreachableError, match=r"timed out during startup\. Nothing was trained"),
        fleet.cluster(cpus=1),
    ):
        pass


class Crew:
    """A fleet under test, and all that it told."""

    def __init__(
        self,
        folder: Path,
        configs: Sequence[TrialConfig],
        *,
        workers: int,
        name: str,
        retries: Retries | None = None,
        **plan: Any,
    ) -> None:
        from orchestrator import fleet
        from orchestrator.gang import GangPlan

        self.store = ResultStore.open(folder / "results", create=True)
        self.orders = [
            Order(index=index, trial_id=trial_id(config, workers), settings=flatten(config))
            for index, config in enumerate(configs)
        ]
        made = {"group_timeout_s": 5.0, "checkpoint_every_s": 0, **plan}
        gang = GangPlan(workers=workers, store=self.store.uri, namespace=NAMESPACE, dispatcher=name, **made)
        self.fleet = fleet.Fleet(self.orders, gang, fence=1, retries=retries or Retries(crash=2))
        self.fleet.limit = 1
        self.told: list[Update] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.close()

    def submit(self, *indices: int) -> None:
        self.fleet.submit(indices)

    def until(self, happened: Callable[[Update], bool], patience_s: float = 600) -> Update:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            for update in self.fleet.updates(0.5):
                self.told.append(update)
                if happened(update):
                    return update
        raise AssertionError(f"it did not happen in {patience_s} s; told: {self.told[-5:]}")

    def until_true(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not holds():
            assert time.monotonic() < deadline, "it did not happen"
            self.told += self.fleet.updates(0.5)

    def ended(self, index: int) -> Update:
        earlier = [update for update in self.told if update.kind == "ended" and update.index == index]
        return earlier[0] if earlier else self.until(lambda update: update.kind == "ended" and update.index == index)

    def losses(self, index: int) -> dict[int, float]:
        """Of all epochs told, the last told of each."""
        reports = [report for update in self.told if update.index == index for report in update.epochs]
        return {report.epoch: report.metrics["loss"] for report in reports}

    def workers(self) -> list[Worker]:
        return sorted(self.fleet.workers(), key=lambda worker: worker.rank)


def undisturbed(config: TrialConfig) -> dict[int, float]:
    from mixmo_core import train

    return {epoch.epoch: epoch.metrics["loss"] for epoch in train.train(config)}


@pytest.mark.usefixtures("ray_here")
def test_a_gang_of_one_worker_trains_fails_idles_and_survives_a_kill(tmp_path: Path) -> None:
    crew = Crew(tmp_path, [config(0), failing(), config(1), long()], workers=1, name="one")
    with crew:
        crew.fleet.form(1)
        crew.submit(0, 1, 2)

        assert crew.ended(0).state == "TERMINATED"
        # Ray Train's own context says what the gang is.
        (worker,) = crew.workers()
        assert (worker.rank, worker.world_size) == (0, 1)

        # An exception is the trial's error, with its traceback, and the same process takes the next trial.
        failed = crew.ended(1)
        assert failed.state == "ERROR"
        assert "Traceback" in failed.text
        assert failed.cause is not None
        assert failed.cause.startswith("DatasetError: cifar10")
        assert crew.ended(2).state == "TERMINATED"
        assert crew.workers() == [worker]

        # Idle past the process group's timeout of 5 s, then killed in the middle of an epoch.
        time.sleep(7)
        crew.submit(3)
        crew.until(lambda update: update.index == 3 and "/epoch-00001-step-" in (update.checkpoint or ""))
        assert crew.workers() == [worker]
        os.kill(worker.pid, signal.SIGKILL)
        assert crew.ended(3).state == "TERMINATED"
        (healed,) = crew.workers()
        assert healed.pid != worker.pid
        assert [update.kind for update in crew.told if update.index == 3 and update.kind != "epochs"] == [
            "started", "lost", "started", "ended",
        ]  # fmt: skip
    # It went on from the middle of the epoch, and came to the numbers of a run that nothing disturbed.
    assert re.search(r"resumed from trials/\S+/epoch-00001-step-", crew.store.log(trial_id(long())))
    assert crew.losses(3) == undisturbed(long())
    assert len(crew.store.checkpoints(trial_id(config(0)))) == 1


@pytest.mark.usefixtures("ray_here")
def test_a_gang_of_two_workers_trains_is_formed_anew_after_an_exception_and_after_a_kill(tmp_path: Path) -> None:
    crew = Crew(tmp_path, [config(0), failing(), config(1)], workers=2, name="two")
    with crew:
        crew.fleet.form(1)
        crew.submit(0)
        assert crew.ended(0).state == "TERMINATED"
        ranks = crew.workers()
        assert [(worker.rank, worker.world_size) for worker in ranks] == [(0, 2), (1, 2)]

        time.sleep(7)  # idle past the process group's timeout of 5 s
        crew.submit(1, 2)
        failed = crew.ended(1)
        assert failed.state == "ERROR"
        assert "DatasetError" in failed.text
        crew.until(lambda update: update.index == 2 and any(each.epoch == 2 for each in update.epochs))
        anew = crew.workers()
        assert {worker.pid for worker in anew}.isdisjoint(worker.pid for worker in ranks)

        os.kill(anew[1].pid, signal.SIGKILL)
        ended = crew.ended(2)
        assert (ended.state, ended.attempt) == ("TERMINATED", 2)
    assert "resumed from trials/" in crew.store.log(trial_id(config(1), 2), rank=1)
    assert sorted(crew.losses(2)) == [1, 2, 3, 4, 5]
    # No trial was charged for another's exception.
    assert [update.index for update in crew.told if update.kind == "lost"] == [2]


def short_of_memory(how: str) -> Callable[[Any], None]:
    """What a gang of two works by, with a second rank that has less memory than the first."""

    def loop(settings: Any) -> None:  # inside, so that it travels by value
        import ray.train
        import torch

        from mixmo_core import train
        from orchestrator import gang

        def train_short(*_: object, **__: object) -> None:
            if how == "killed":  # as the kernel does it
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB")

        if how != "fits" and ray.train.get_context().get_world_rank() == 1:
            train.train = train_short  # type: ignore[assignment]
        gang.loop(settings)

    return loop


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("how", "why"),
    [("fits", None), ("raised", r"CUDA out of memory$"), ("killed", r"^the workers of gang-0 died of it 2 times$")],
)
def test_a_rehearsal_that_does_not_fit_on_the_second_of_two_workers_refuses_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, why: str | None
) -> None:
    from orchestrator import gang

    monkeypatch.setattr(gang, "loop", short_of_memory(how))
    crew = Crew(tmp_path, [config(0)], workers=2, name=how, canary=flatten(config(9)), group_timeout_s=120.0)
    with crew:
        crew.fleet.form(1)
        crew.submit(0)
        last = crew.until(lambda update: update.kind in ("refused", "ended"))
    if why is None:
        assert (last.state, last.attempt) == ("TERMINATED", 1)
    else:
        assert re.search(why, last.text), last.text
        assert not any(update.kind == "started" for update in crew.told)


@pytest.mark.usefixtures("ray_here")
def test_a_gang_whose_worker_never_comes_to_work_is_given_up_with_what_ray_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import fleet

    monkeypatch.setattr(fleet, "FORMATIONS", 2)
    crew = Crew(tmp_path, [config(0)], workers=1, name="never")
    crew.fleet.plan = replace(crew.fleet.plan, store="gopher://results")
    with crew:
        crew.fleet.form(1)
        crew.submit(0)
        with pytest.raises(UnreachableError, match=r"(?s)no gang could be kept: .*gopher"):
            crew.until(lambda update: update.kind == "ended")
    assert [update.kind for update in crew.told] == ["gang"]  # the trial was not charged


@pytest.mark.usefixtures("ray_here")
def test_a_gang_for_which_spot_machines_may_come_asks_for_none_on_demand_and_stands_on_those_without_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import fleet

    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(
        "max_workers: 4\navailable_node_types: {spot: {resources: {CPU: 2}, labels: {ray.io/market-type: spot}}}\n"
    )
    monkeypatch.setattr(fleet, "BOOTSTRAP", file)
    monkeypatch.setenv("RAY_ADDRESS", "that of this Ray")  # as on the head of one that `ray up` has made
    with Crew(tmp_path, [config(0)], workers=1, name="market") as crew:
        asked = crew.fleet._trainer("gang-0").scaling_config.label_selector
        assert asked == {"ray.io/market-type": "!on-demand"}
        crew.fleet.form(1)
        crew.submit(0)
        assert crew.ended(0).state == "TERMINATED"
