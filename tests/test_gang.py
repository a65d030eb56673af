"""A gang's loop with a dispatcher beside it, in one process: only Ray, which lies between the two, is made up."""

import asyncio
import importlib
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixmo_core import train
from mixmo_core.config import TrialConfig, cell_id, digest, flatten, identity, unflatten
from orchestrator.dispatcher import Dispatcher, Order, Update
from orchestrator.ledger import Ledger
from orchestrator.rows import TrialRow, config_columns
from orchestrator.store import ResultStore

SMALL = {
    "data.dataset": "digits", "data.train_images": 60, "data.batch_size": 20, "data.augmentation": "none",
    "model.depth": 10, "model.width": 1, "optim.epochs": 2,
}  # fmt: skip


def config(**changes: Any) -> TrialConfig:
    """Two epochs of three steps."""
    return unflatten({**SMALL, **changes})


class Killed(BaseException):
    """The end of a worker's process."""


class Desk:
    """A dispatcher as Ray shows it to a gang, whose workers are killed when `fatal` says so of a call."""

    def __init__(self, trial: TrialConfig, store: ResultStore) -> None:
        self.trial_id, self._store = digest(identity(trial))[:12], store
        self._desk = Dispatcher(
            [Order(index=0, trial_id=self.trial_id, settings=flatten(trial))], fence=1, crash_retries=9
        )
        self._desk.submit(0)
        row = TrialRow(
            sweep="made", position=0, trial_id=self.trial_id, digest=digest(identity(trial)), cell_id=cell_id(trial),
            epochs=trial.optim.epochs, config=config_columns(trial),
        )  # fmt: skip
        self._ledger, self._read = Ledger({0: row}, {0: trial}, fence=1, first_seq=0), 0
        self.told: list[Update] = []
        self.fatal: Callable[..., bool] = lambda name, *given: False

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Any:
            if self.fatal(name, *given):
                raise Killed
            answer = getattr(self._desk, name)(*given)
            if inspect.iscoroutine(answer):
                answer = asyncio.run(answer)
            if answer == "wait":  # nothing is left to do
                self._desk.close()
            return answer

        return SimpleNamespace(remote=remote)

    def row(self) -> TrialRow:
        """What the driver makes of all that was told so far."""
        news = asyncio.run(self._desk.updates(self._read, 0.0))
        for update in news:
            self._ledger.apply(update)
            self._read = update.seq
        self.told += news
        return self._ledger.rows[0]

    def losses(self) -> dict[int, float]:
        self.row()
        return {report.epoch: report.metrics["loss"] for update in self.told for report in update.epochs}

    def log(self) -> str:
        return self._store.log(self.trial_id)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore.open(tmp_path / "results", create=True)


def gang_module() -> Any:
    """The fleet's import comes first: it tells Ray how to be before Ray is there."""
    importlib.import_module("orchestrator.fleet")
    return importlib.import_module("orchestrator.gang")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, store: ResultStore) -> Callable[..., None]:
    """Form a gang of one and let it work until it is sent home, or killed."""
    gang = gang_module()

    def form(desk: Desk, **plan: Any) -> None:
        monkeypatch.setattr("ray.get_actor", lambda *_, **__: desk)
        monkeypatch.setattr("ray.get", lambda answer: answer)
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        monkeypatch.setattr("ray.train.get_context", lambda: context)
        monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        settings_ = {"store": store.uri, "namespace": "", "dispatcher": "", "wait_s": 0.0, **plan}
        gang.Gang("gang-0", gang.GangPlan(**{"checkpoint_every_s": 0, **settings_})).work()

    return form


def undisturbed(trial: TrialConfig) -> list[train.Epoch]:
    return list(train.train(trial))


@pytest.mark.parametrize(
    ("calls", "resumed"), [(1, None), (2, "epoch-00001-step-000001"), (6, "epoch-00002-step-000001")]
)
def test_a_trial_that_is_killed_in_the_middle_of_an_epoch_goes_on_there(
    store: ResultStore, work: Callable[..., None], calls: int, resumed: str | None
) -> None:
    """Killed when it has saved for the n-th time, but nobody knows of that yet; so one checkpoint after what its row
    names. A checkpoint is told after each step and each epoch: of the first epoch those are four.
    """
    desk = Desk(config(), store)
    count = itertools.count(1)
    desk.fatal = lambda name, *_: name == "report" and next(count) == calls
    with pytest.raises(Killed):
        work(desk)
    row = desk.row()
    assert (row.state, row.epoch) == ("RUNNING", 1 if calls > 4 else 0)
    named = row.checkpoint.rpartition("/")[2] if row.checkpoint else ""
    assert named.startswith(resumed) if resumed else not named
    newest = store.checkpoints(desk.trial_id)[0]

    desk.fatal = lambda *_: False
    work(desk)
    row = desk.row()
    assert (row.state, row.attempt, row.epoch) == ("TERMINATED", 2, 2)
    assert f"resumed from {newest}" in desk.log()
    whole = undisturbed(config())
    assert desk.losses() == {epoch.epoch: epoch.metrics["loss"] for epoch in whole}
    assert row.metrics == whole[-1].metrics
    assert row.checkpoint is not None
    assert row.checkpoint in store.checkpoints(desk.trial_id)
    assert "/epoch-00002-" in row.checkpoint
    assert "step" not in row.checkpoint


def test_a_finished_trial_has_the_logits_of_its_last_epoch(store: ResultStore, work: Callable[..., None]) -> None:
    desk = Desk(config(), store)
    work(desk)
    last, held = undisturbed(config())[-1], store.logits(desk.row())
    assert last.logits is not None
    assert last.labels is not None
    assert np.array_equal(held.logits_MNK, last.logits.numpy().astype(np.float16))
    assert np.array_equal(held.labels_N, last.labels.numpy())


def test_a_kill_between_the_last_checkpoint_and_the_end_loses_no_logits(
    store: ResultStore, work: Callable[..., None]
) -> None:
    desk = Desk(config(), store)
    desk.fatal = lambda name, *_: name == "finish"
    with pytest.raises(Killed):
        work(desk)
    assert desk.row().logits is None
    desk.fatal = lambda *_: False
    work(desk)
    row = desk.row()
    assert (row.state, row.attempt) == ("TERMINATED", 2)
    assert "/1-1-" in str(row.logits)  # nothing was trained again
    assert store.logits(row).logits_MNK.shape == (2, 360, 10)


def test_a_store_that_takes_no_logits_costs_the_logits_and_not_the_trial(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def full(source: Path, target: Path) -> None:
        if target.name.startswith("logits-"):
            raise OSError(28, "No space left on device")
        link(source, target)

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr(gang_module(), "LOGITS_PATIENCE_S", -1.0)
    desk = Desk(config(), store)
    work(desk)
    row = desk.row()
    assert (row.state, row.logits) == ("TERMINATED", None)
    assert "no logits stored: cannot write" in desk.log()
    assert "No space left on device" in desk.log()


def test_a_trial_that_diverges_names_its_cause_and_its_last_good_checkpoint(
    store: ResultStore, work: Callable[..., None], tmp_path: Path
) -> None:
    """With so much weight decay the weights grow a thousandfold a step, until they are no numbers any more."""
    trial = config(**{"optim.lr": 1e3, "optim.weight_decay": 1.0, "optim.warmup": 0.0, "optim.epochs": 9})
    desk = Desk(trial, store)
    work(desk)
    row = desk.row()
    assert row.state == "ERROR"
    assert str(row.error_cause).startswith("DivergedError: diverged at epoch ")
    assert "smaller optim.lr (1000 here)" in str(row.error)
    assert row.checkpoint == store.checkpoints(desk.trial_id)[0]
    state = train.load(store.fetch(row.checkpoint, tmp_path / row.checkpoint.rpartition("/")[2]))
    assert all(tensor.isfinite().all() for kind in ("model", "momentum") for tensor in state[kind].values())
    assert row.logits is None


# ----------------------------------------------------------------------------------------------------- when to save


@pytest.mark.parametrize("step_s", [0.7, 13.0])
@pytest.mark.parametrize("cost_s", [0.01, 3.0, 17.0, 60.0])
@pytest.mark.parametrize("epoch_s", [13.0, 3600.0])
def test_no_more_than_ten_minutes_are_at_risk_and_saving_takes_less_than_three_percent(
    store: ResultStore, step_s: float, cost_s: float, epoch_s: float
) -> None:
    """An hour by a made-up clock: steps and saves take as long as they are said to."""
    gang, now, ends = gang_module(), [0.0], [0.0]
    """Of the saves."""

    def state() -> dict[str, Any]:
        now[0] += cost_s
        ends.append(now[0])
        return {"epoch": 1, "at": now[0]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gang, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr("os.fsync", lambda _: None)
        plan = gang.GangPlan(store=store.uri, namespace="", dispatcher="")
        saver = gang.Saver(store, store.attempt("0" * 12, 1, 1, "aa"), plan)
        for _ in range(int(3600 / epoch_s)):
            for step in range(int(epoch_s / step_s)):
                now[0] += step_s
                if saver.due(within=True):
                    saver.save(train.Moment(1, step + 1, _state=state), [], None)
            if saver.due(within=False):
                saver.save(train.Moment(1, step + 1, _state=state), [], None)
    trained_s = [later - cost_s - earlier for earlier, later in itertools.pairwise(ends)]
    assert max(*trained_s, now[0] - ends[-1]) <= 600 + step_s
    if cost_s < 18:  # else the ten minutes come first
        assert all(cost_s <= 0.03 * (cost_s + each) for each in trained_s[1:])  # the first was yet to learn its cost
    first_s = 30 if epoch_s > 30 else epoch_s
    assert first_s - step_s <= trained_s[0] <= first_s + step_s
