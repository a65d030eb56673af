"""A gang's loop with a dispatcher beside it, in one process: only Ray, which lies between the two, is made up."""

import asyncio
import importlib
import inspect
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_metadata
import numpy as np
import pytest
import torch
from made_rows import in_a_folder

from mixmo_core import capture, train
from mixmo_core.config import TrialConfig, cell_id, digest, flatten, identity, shape_of, unflatten
from mixmo_core.step import Due
from orchestrator import plan, trained
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import Dispatcher, EpochReport, Order, Retries, Update
from orchestrator.errors import UnreachableError
from orchestrator.ledger import Ledger
from orchestrator.population import line_of, population_of, steps_of
from orchestrator.rows import TrialRow, config_columns
from orchestrator.saver import Saver
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

    def __init__(self, trial: TrialConfig, store: ResultStore, *more: TrialConfig) -> None:
        trials = dict(enumerate([trial, *more]))
        ids = {index: digest(identity(each))[:12] for index, each in trials.items()}
        self.trial_id, self._store = ids[0], store
        orders = [
            Order(index=index, trial_id=ids[index], settings=flatten(each), shape=shape_of(each))
            for index, each in trials.items()
        ]
        self.desk = Dispatcher(orders, fence=1, retries=Retries(crash=9))
        rows = {
            index: TrialRow(sweep="made", position=index, trial_id=ids[index], digest=digest(identity(each)),
                            cell_id=cell_id(each), epochs=each.optim.epochs, config=config_columns(each))
            for index, each in trials.items()
        }  # fmt: skip
        for index in trials:
            self.desk.submit(index)
        self._ledger, self._read = Ledger(rows, trials, fence=1, first_seq=0), 0
        self.told: list[Update] = []
        self.saver: Saver | None = None
        self.waits = True
        """Whether a report is answered only when what was saved before it is stored."""
        self.fatal: Callable[..., bool] = lambda name, *given: False

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Any:
            if name == "report" and self.saver is not None and self.waits:
                assert self.saver.wait(60)
            if self.fatal(name, *given):
                raise Killed
            answer = getattr(self.desk, name)(*given)
            if inspect.iscoroutine(answer):
                answer = asyncio.run(answer)
            if answer == "wait" and not self.desk.in_hand():  # nothing is left to do
                self.desk.close()
            return answer

        return SimpleNamespace(remote=remote)

    def row(self, index: int = 0) -> TrialRow:
        """What the driver makes of all that was told so far."""
        news = asyncio.run(self.desk.updates(self._read, 0.0))
        for update in news:
            if update.index is not None:
                self._ledger.apply(update)
            self._read = update.seq
        self.told += news
        return self._ledger.rows[index]

    def epochs(self, index: int = 0) -> dict[int, EpochReport]:
        self.row()
        return {each.epoch: each for update in self.told if update.index == index for each in update.epochs}

    def losses(self, index: int = 0) -> dict[int, float]:
        return {epoch: report.metrics["loss"] for epoch, report in self.epochs(index).items()}

    def log(self, index: int = 0) -> str:
        return self._store.log(self.row(index).trial_id)


def gang_module() -> Any:
    """The fleet's import comes first: it tells Ray how to be before Ray is there."""
    importlib.import_module("orchestrator.fleet")
    return importlib.import_module("orchestrator.gang")


def remembered(desk: Desk, *given: Any) -> Saver:
    desk.saver = Saver(*given)
    return desk.saver


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, store: ResultStore) -> Callable[..., None]:
    """Form a gang of one and let it work until it is sent home, or killed."""
    gang = gang_module()

    def form(desk: Desk, **plan: Any) -> None:
        monkeypatch.setattr("ray.get_actor", lambda *_, **__: desk)
        monkeypatch.setattr("ray.get", lambda answer: answer)
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0)
        monkeypatch.setattr("ray.nodes", list)
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node-a"))
        monkeypatch.setattr("ray.train.get_context", lambda: context)
        monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(gang, "Saver", partial(remembered, desk))
        settings_ = {"store": store.uri, "namespace": "", "dispatcher": "", "wait_s": 0.0, **plan}
        gang.Gang("gang-0", gang.GangPlan(**{"checkpoint_every_s": 0, **settings_})).work()

    return form


def undisturbed(trial: TrialConfig) -> list[train.Epoch]:
    return list(train.train(trial))


def assert_alone(desk: Desk, index: int, trial: TrialConfig) -> None:
    """That what is told of a trial is what it gives alone, to the bit."""
    whole = undisturbed(trial)
    assert {epoch: report.metrics for epoch, report in desk.epochs(index).items()} == {
        each.epoch: each.metrics for each in whole
    }
    assert (desk.row(index).state, desk.row(index).metrics) == ("TERMINATED", whole[-1].metrics)


@in_a_folder
def test_a_gang_with_slots_trains_trials_side_by_side_as_if_each_were_alone(
    store: ResultStore, work: Callable[..., None]
) -> None:
    """Five of one shape and one of another in three slots, of different lengths; every state is saved."""
    trials = [config(seed=seed, **{"optim.epochs": 1 + seed % 3, "optim.lr": 0.1 / (1 + seed)}) for seed in range(5)]
    trials.insert(1, config(**{"model.width": 2}))
    desk = Desk(trials[0], store, *trials[1:])
    in_hand: list[set[int]] = []

    def look(name: str, *_: Any) -> bool:
        if name == "report":
            in_hand.append({held.order.index for held in desk.desk._hands.values()})
        return False

    desk.fatal, desk.waits = look, False
    work(desk, slots=3, gpus_per_worker=1)
    for index, trial in enumerate(trials):
        assert_alone(desk, index, trial)
        row, epochs = desk.row(index), desk.epochs(index)
        assert (row.attempts, row.slots) == (1, 3)
        assert row.checkpoint == store.checkpoints(row.trial_id)[0]
        assert store.logits(row).logits_MNK.shape == (2, 360, 10)
        assert f"trial {row.trial_id}" in desk.log(index)
        assert all(other.trial_id not in desk.log(index) for other in map(desk.row, range(6)) if other is not row)
        alone = index == 1
        assert all((each.gpu_seconds == each.wall_s) == alone for each in epochs.values())
        assert all(each.gpu_seconds >= each.wall_s / 3.000001 for each in epochs.values())
    assert {1} in in_hand
    assert not any(1 in held for held in in_hand if held != {1}), "the wide one has the gang to itself"
    assert max(map(len, in_hand)) == 3
    texts = [update.text for update in desk.told if update.kind == "started"]
    assert set(texts) == {"on gang-0/0", "on gang-0/1", "on gang-0/2"}


@in_a_folder
def test_a_gang_that_finds_more_slots_to_pay_has_them(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are taken anew stand in for captured ones. Without them, or with a trial that cannot be tried, one."""
    monkeypatch.setattr(capture, "_idle", [])
    monkeypatch.setattr(capture, "worthwhile", lambda rate: 3 if rate(3) else 1)
    monkeypatch.setitem(capture.RECORDERS, "cpu", lambda body, _: body)
    trials = [config(seed=seed, **{"optim.lr": 0.0625, "optim.warmup": 0}) for seed in range(4)]
    desk = Desk(trials[0], store, *trials[1:])
    work(desk, finds_slots=True, canary=flatten(trials[0]))
    for index, trial in enumerate(trials):
        expected = {each.epoch: each.metrics["loss"] for each in undisturbed(trial)}
        assert (desk.row(index).state, desk.row(index).slots) == ("TERMINATED", 3)
        assert desk.losses(index) == pytest.approx(expected, rel=1e-4)
    assert len(capture._idle) == 3, "a slot's next trial takes over what the one before has left"
    desk = Desk(trials[0], store)
    work(desk, finds_slots=True, canary={"data.dataset": "cifar10"}, data_dir=None)
    assert (desk.row().state, desk.row().slots) == ("TERMINATED", 1)
    monkeypatch.delitem(capture.RECORDERS, "cpu")
    desk = Desk(trials[0], store)
    work(desk, finds_slots=True, canary=flatten(trials[0]))
    assert (desk.row().state, desk.row().slots) == ("TERMINATED", 1)


def of_three(store: ResultStore, **second: Any) -> tuple[Desk, list[TrialConfig]]:
    """Three trials of three epochs that differ in their seed, and what else is said of the second."""
    trials = [config(seed=seed, **{"optim.epochs": 3, **(second if seed == 1 else {})}) for seed in range(3)]
    desk = Desk(trials[0], store, *trials[1:])
    desk.waits = False
    return desk, trials


def assert_neighbours_alone(desk: Desk, trials: list[TrialConfig]) -> None:
    for index in (0, 2):
        assert_alone(desk, index, trials[index])
        assert desk.row(index).attempts == 1


@in_a_folder
def test_a_slot_that_diverges_leaves_the_others_as_they_are(store: ResultStore, work: Callable[..., None]) -> None:
    desk, trials = of_three(store, **{"optim.lr": 1e9})
    work(desk, slots=3)
    assert_neighbours_alone(desk, trials)
    assert desk.row(1).state == "ERROR"
    assert str(desk.row(1).error_cause).startswith("DivergedError: diverged at epoch 1")


@in_a_folder
@pytest.mark.parametrize("what", ["cancelled", "stopped early"])
def test_a_slot_whose_trial_ends_by_a_word_leaves_the_others_as_they_are(
    store: ResultStore, work: Callable[..., None], what: str
) -> None:
    desk, trials = of_three(store)

    def at_its_report(name: str, *given: Any) -> bool:
        if name == "report" and given[0] in {held.token for held in desk.desk._hands.values() if held.order.index == 1}:
            if what == "cancelled":
                desk.desk.cancel([1], "by somebody")
            else:
                desk.desk._standings[1].stopped = "below the others"
        return False

    desk.fatal = at_its_report
    work(desk, slots=3)
    assert_neighbours_alone(desk, trials)
    row = desk.row(1)
    assert (row.state, row.stopped_early) == (("CANCELLED", False) if what == "cancelled" else ("TERMINATED", True))


@in_a_folder
def test_a_slot_whose_step_breaks_leaves_the_others_as_they_are(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second epoch."""
    desk, trials = of_three(store)
    first, whole = next(iter(train.train(trials[1]))), Due.begin

    def broken(due: Due) -> None:
        if due.number == 5 and due.step._config == trials[1]:
            raise RuntimeError("its images are not there")
        whole(due)

    monkeypatch.setattr(Due, "begin", broken)
    work(desk, slots=3)
    assert_neighbours_alone(desk, trials)
    assert (desk.row(1).state, desk.row(1).error_cause) == ("ERROR", "RuntimeError: its images are not there")
    assert desk.losses(1) == {1: first.metrics["loss"]}


@in_a_folder
@pytest.mark.parametrize("calls", [2, 5, 9])
def test_a_gang_that_is_killed_with_several_trials_in_hand_goes_on_with_each(
    store: ResultStore, work: Callable[..., None], calls: int
) -> None:
    trials = [config(seed=seed) for seed in range(3)]
    desk = Desk(trials[0], store, *trials[1:])
    count = itertools.count(1)
    desk.fatal = lambda name, *_: name == "report" and next(count) == calls
    with pytest.raises(Killed):
        work(desk, slots=3)
    desk.fatal = lambda *_: False
    work(desk, slots=3)
    for index, trial in enumerate(trials):
        assert_alone(desk, index, trial)
        assert desk.row(index).attempts == 2
        assert desk.row(index).error_kind is None


@in_a_folder
def test_a_paused_sweep_saves_every_slot_and_goes_on_to_the_bit(store: ResultStore, work: Callable[..., None]) -> None:
    trials = [config(seed=seed) for seed in range(3)]
    desk = Desk(trials[0], store, *trials[1:])

    def pauses(name: str, *_: Any) -> bool:
        if name == "report":
            desk.desk.pause()
        return False

    desk.fatal, desk.waits = pauses, False
    work(desk, slots=3)
    assert [desk.row(index).state for index in range(3)] == ["PAUSED"] * 3
    desk.fatal = lambda *_: False
    desk.desk._closed = False
    desk.desk.resume()
    work(desk, slots=3)
    for index, trial in enumerate(trials):
        assert_alone(desk, index, trial)
        assert "given back" in desk.log(index) or "resumed from" in desk.log(index)


def test_neighbours_share_the_time_of_their_gang_and_one_alone_has_all_of_it() -> None:
    Share = gang_module().Share
    first, second = Share(), Share()
    for seconds in (2.0, 4.0):
        first.passed(seconds, among=2)
        second.passed(seconds, among=2)
    first.passed(6.0, among=1)
    assert second.taken() == 0.5
    assert first.taken() == pytest.approx(9 / 12)
    first.passed(1.0, among=1)
    assert first.taken() == 1.0
    assert first.taken() == 1.0, "of no time"


@pytest.mark.parametrize(
    ("calls", "resumed"), [(1, "epoch-00001-step-000001"), (4, "epoch-00001-"), (6, "epoch-00002-step-000002")]
)
def test_a_trial_that_is_killed_in_the_middle_of_an_epoch_goes_on_there(
    store: ResultStore, work: Callable[..., None], calls: int, resumed: str
) -> None:
    """Killed when it has saved for the n-th time, but nobody knows of that yet; so a checkpoint or two after what its
    row names. It saves after each step and each epoch: in the first epoch four times.
    """
    desk = Desk(config(), store)
    count = itertools.count(1)
    desk.fatal = lambda name, *_: name == "report" and next(count) == calls
    with pytest.raises(Killed):
        work(desk)
    row = desk.row()
    assert (row.state, row.epoch) == ("RUNNING", 1 if calls > 4 else 0)
    newest = store.checkpoints(desk.trial_id)[0]
    assert newest.rpartition("/")[2].startswith(resumed)
    assert row.checkpoint in (None, *store.checkpoints(desk.trial_id)[1:])

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


@in_a_folder
def test_a_gang_rehearses_the_largest_trial_before_it_asks_for_one(
    store: ResultStore, work: Callable[..., None]
) -> None:
    calls: list[str] = []
    desk = Desk(config(), store)

    def heard(name: str, *given: Any) -> bool:
        calls.append(name)
        return False

    desk.fatal = heard
    work(desk, canary=flatten(config(seed=9)))
    assert calls[:4] == ["rehearses", "rehearsed", "join", "next"]
    assert desk.row().state == "TERMINATED"
    other = Desk(config(), store)  # what is wrong with the largest one but its size is its own to tell
    work(other, canary=flatten(config(**{"data.dataset": "cifar10"})))
    assert other.row().state == "TERMINATED"
    again = Desk(config(), store)
    again.fatal = lambda name, *given: name == "rehearsed"
    for _ in range(2):
        with pytest.raises(Killed):
            work(again, canary=flatten(config(seed=9)))
    work(again, canary=flatten(config(seed=9)))
    assert [(update.kind, update.text) for update in asyncio.run(again.desk.updates(0, 0.0))] == [
        ("refused", "the workers of gang-0 died of it 2 times")
    ]


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


@in_a_folder
def test_a_store_that_takes_no_logits_costs_the_logits_and_not_the_trial(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def full(source: Path, target: Path) -> None:
        if target.name.startswith("logits-"):
            raise OSError(28, "No space left on device")
        link(source, target)

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr(gang_module(), "END_PATIENCE_S", -1.0)
    desk = Desk(config(), store)
    work(desk)
    row = desk.row()
    assert (row.state, row.logits) == ("TERMINATED", None)
    assert row.checkpoint == store.checkpoints(desk.trial_id)[0]
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


def test_a_trial_that_asks_for_too_much_memory_ends_of_that_and_the_next_one_trains(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = train.steps

    def too_much(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(train, "steps", asked)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has 3 MiB free")

    monkeypatch.setattr(train, "steps", too_much)
    desk = Desk(config(), store)
    work(desk)
    row = desk.row()
    assert (row.state, row.error_kind, row.attempts) == ("ERROR", "oom", 1)
    assert str(row.error_cause).startswith("OutOfMemoryError: CUDA out of memory")
    assert str(row.error_fingerprint).startswith("OutOfMemoryError in gang._pass_epochs")
    assert "Traceback" in str(row.error)


def test_a_spot_notice_saves_in_the_middle_of_an_epoch_and_the_gang_leaves(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else saves, and the first epoch ends only when the notice has come."""
    drained: list[tuple[Any, ...]] = []
    client = SimpleNamespace(drain_node=lambda *given: drained.append(given))
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=client))
    trial = config(**{"data.batch_size": 2, "optim.lr": 0.01})
    with made_metadata.serve() as metadata:
        monkeypatch.setenv("MIXMO_SPOT_NOTICE", metadata.address)
        desk = Desk(trial, store)

        def comes(name: str, *_: Any) -> bool:
            if name == "accept" and not desk.told:
                metadata.notice(60)
                until(lambda: len(drained) == 1)
            return False

        desk.fatal = comes
        work(desk, checkpoint_every_s=3600)
        row = desk.row()
    assert (row.state, row.epoch, desk.told[-1].kind, desk.told[-1].error_kind) == ("PENDING", 0, "lost", "preempted")
    assert "/epoch-00001-step-" in str(row.checkpoint)
    assert drained[0][0] == "node-a"
    monkeypatch.setenv("MIXMO_SPOT_NOTICE", "off")
    desk.desk.gang_ended("gang-0", "it was sent home")
    work(desk)
    row = desk.row()
    assert (row.state, row.attempt) == ("TERMINATED", 2)
    assert desk.losses() == {epoch.epoch: epoch.metrics["loss"] for epoch in undisturbed(trial)}


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def when_uploading(store: ResultStore, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    upload = store.folder.upload

    def watched(key: str, source: Path) -> bool:
        happens()
        return upload(key, source)

    # the gang opens the store by itself
    monkeypatch.setattr(ResultStore, "open", lambda *_, **__: store)
    monkeypatch.setattr(store.folder, "upload", watched)


@in_a_folder
def test_a_row_names_a_checkpoint_when_it_is_stored_and_not_before(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads take until two reports were made, but the last: the trial's end waits for it."""
    desk, reports = Desk(config(), store), threading.Semaphore(0)
    held: list[bool] = []

    def hold() -> None:
        held.append(desk.row().epoch < 2 and reports.acquire(timeout=2) and reports.acquire(timeout=2))

    when_uploading(store, monkeypatch, hold)
    missing: list[str] = []

    def look(name: str, *given: Any) -> bool:
        if name == "report":
            reports.release()
            missing.extend(key for key in given[2:] if key and store.folder.digest(key) is None)
        return False

    desk.fatal, desk.waits = look, False
    work(desk)
    row = desk.row()
    assert (row.state, missing) == ("TERMINATED", [])
    assert any(held)
    assert row.checkpoint == store.checkpoints(desk.trial_id)[0]
    assert "/epoch-00002-" in str(row.checkpoint)


@in_a_folder
def test_what_the_row_of_a_cancelled_trial_names_stays(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload takes until the next report, so that one is under way when the trial is dropped."""
    desk, reports, numbers = Desk(config(), store), threading.Semaphore(0), itertools.count(1)

    def hold() -> None:
        assert reports.acquire(timeout=60)

    when_uploading(store, monkeypatch, hold)

    def cancels(name: str, *_: Any) -> bool:
        if name != "report" or desk.saver is None:
            return False
        if next(numbers) == 5:
            desk.desk.cancel([0], "cancelled by a test")
            threading.Timer(0.3, reports.release).start()  # when the gang has heard of it
        else:
            reports.release()
            assert desk.saver.wait(60)
        return False

    desk.fatal, desk.waits = cancels, False
    work(desk)
    row, kept = desk.row(), store.checkpoints(desk.trial_id)
    assert (row.state, next(numbers)) == ("CANCELLED", 6)
    assert "dropped: " in desk.log()
    assert row.checkpoint in kept[1:]


@in_a_folder
@pytest.mark.parametrize("back", [True, False])
def test_a_trial_that_ends_while_the_store_is_away_waits_for_it_and_ends_in_any_case(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch, *, back: bool
) -> None:
    tries = itertools.count(1)

    def refuse() -> None:
        if not back or next(tries) < 3:
            raise UnreachableError("the store is away")

    when_uploading(store, monkeypatch, refuse)
    if not back:
        monkeypatch.setattr(gang_module(), "END_PATIENCE_S", 0.1)
        monkeypatch.setattr(gang_module(), "PARTING_S", 0.1)
    desk = Desk(config(), store)
    desk.waits = False
    work(desk, checkpoint_every_s=3600)
    row = desk.row()
    assert (row.state, row.epoch) == ("TERMINATED", 2)
    assert row.logits is not None
    assert row.checkpoint == next(iter(store.checkpoints(desk.trial_id)), None)
    assert (row.checkpoint is not None) == back
    assert "a checkpoint is not stored yet: the store is away" in desk.log()
    assert ("its last checkpoint is not stored" in desk.log()) != back


@in_a_folder
def test_a_trial_waits_for_room_on_its_host_and_is_given_up_to_others_when_there_is_none_for_long(
    store: ResultStore, work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot bring its checkpoint there. Somebody makes room when the second gang has waited a while."""
    desk = Desk(config(), store)
    desk.fatal = lambda name, *_: name == "finish"
    with pytest.raises(Killed):
        work(desk)
    desk.fatal = lambda *_: False
    waited_s = itertools.accumulate(itertools.repeat(2.0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        clock = SimpleNamespace(now=0.0)

        def sleep(seconds: float) -> None:
            clock.now += seconds
            if next(waited_s) > 700:
                disk.undo()

        made = SimpleNamespace(
            monotonic=lambda: clock.now, perf_counter=time.perf_counter, sleep=sleep, strftime=time.strftime,
            gmtime=time.gmtime,
        )  # fmt: skip
        disk.setattr(gang_module(), "time", made)
        disk.setattr(store.folder.__class__, "download", full)
        work(desk)
    row = desk.row()
    assert (row.state, row.attempts) == ("TERMINATED", 3)
    lost = [update for update in desk.told if update.kind == "lost"]
    assert [update.error_kind for update in lost] == ["crash", "store"]
    assert "No space left on device. Make room where it has its temporary files" in lost[1].text
    assert desk.losses() == {epoch.epoch: epoch.metrics["loss"] for epoch in undisturbed(config())}


def test_a_trial_of_a_paused_sweep_is_given_back_when_it_is_stored(
    store: ResultStore, work: Callable[..., None]
) -> None:
    desk = Desk(config(), store)

    def pauses(name: str, *_: Any) -> bool:
        if name == "accept":
            desk.desk.pause()
        return False

    desk.fatal = pauses
    work(desk, checkpoint_every_s=3600)
    assert desk.row().epoch == 1
    assert (desk.told[-1].kind, [desk.told[-1].checkpoint]) == ("paused", store.checkpoints(desk.trial_id))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"PK foreign" * 99])
def test_a_truncated_or_foreign_checkpoint_is_refused_and_the_one_before_it_used(
    store: ResultStore, work: Callable[..., None], damage: Callable[[bytes], bytes]
) -> None:
    desk = Desk(config(), store)
    desk.fatal = lambda name, *_: name == "finish"
    with pytest.raises(Killed):
        work(desk)
    newest, before = store.checkpoints(desk.trial_id)[:2]
    stored = store.folder.read(newest)
    assert stored is not None
    store.folder.put(newest, damage(stored.data))
    desk.fatal = lambda *_: False
    work(desk)
    assert f"checkpoint {newest} is of no use: {store}/{newest} is damaged" in desk.log()
    assert f"resumed from {before}" in desk.log()
    row, whole = desk.row(), undisturbed(config())
    assert (row.state, row.metrics) == ("TERMINATED", whole[-1].metrics)
    assert desk.losses() == {epoch.epoch: epoch.metrics["loss"] for epoch in whole}


# ------------------------------------------------------------------------------------------------------ populations

POPULATION = """
name: made
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 3, warmup: 0}
blocks: [{grid: {optim.lr: [1.0e-3, 0.2, 1.0e-7]}}]
scheduler:
  {method: pbt, metric: nll, interval_epochs: 1, quantile_fraction: 0.4, mutations: {optim.lr: {min: 1.0e-7, max: 1}}}
"""


class Peopled(Desk):
    """Of a population, and of one gang: trials take turns."""

    def __init__(self, sweep: sweeps.Sweep, store: ResultStore, rows: Mapping[int, TrialRow] | None = None) -> None:
        held = rows or {trial.position: plan.initial_row(trial, sweep) for trial in sweep.trials}
        orders = [
            Order(index=trial.position, trial_id=trial.trial_id, settings=flatten(trial.config),
                  attempts=held[trial.position].attempts, checkpoint=held[trial.position].checkpoint)
            for trial in sweep.trials if held[trial.position].state != "TERMINATED"
        ]  # fmt: skip
        self._store, self.told, self.saver, self.waits = store, [], None, False
        self.fatal = lambda name, *given: False
        self.desk = Dispatcher(orders, fence=1, retries=Retries(), population=population_of(sweep, held))
        configs = {trial.position: trial.config for trial in sweep.trials}
        self._ledger, self._read = Ledger(dict(held), configs, fence=1, first_seq=0), 0

    def rows(self) -> dict[int, TrialRow]:
        self.row()
        return self._ledger.rows


@in_a_folder
def test_a_copy_goes_on_from_its_parents_weights_with_settings_of_its_own(
    store: ResultStore, work: Callable[..., None]
) -> None:
    sweep = sweeps.parse(POPULATION, source="x.yaml")
    desk = Peopled(sweep, store)
    work(desk, milestones=(1, 2))
    rows = desk.rows()
    assert {(row.state, row.epoch) for row in rows.values()} == {("TERMINATED", 3)}
    row = rows[2]
    copy = [step.copy for step in steps_of(row.lineage) if step.copy][-1]
    assert row.parent_id == copy.parent_id == sweep.trials[1].trial_id
    config_ = unflatten({**flatten(sweep.trials[2].config), **copy.settings})
    state = train.load(store.fetch(copy.checkpoint, Path(tempfile.mkdtemp()) / copy.checkpoint.rpartition("/")[2]))
    assert (state["digest"], state["epoch"]) == (copy.line, copy.epoch)
    line = line_of(row.digest, steps_of(row.lineage)).digest
    expected = list(train.train(config_, resume={**state, "digest": line}, known_as=line))
    assert row.metrics == expected[-1].metrics
    told = [each for each in desk.told if each.index == 2]
    curve = {report.epoch: report.metrics for update in told for report in update.epochs}
    assert [curve[epoch] for epoch in range(1, 4)] == list(expected[-1].history)
    with store.writer("made", sweep_text=POPULATION) as writer:
        writer.put(rows.values())
    assert trained.network(store, row.trial_id).config == config_


@in_a_folder
def test_a_checkpoint_from_before_a_copy_and_a_source_that_is_another_are_of_no_use(
    store: ResultStore, work: Callable[..., None]
) -> None:
    """Killed when it has said that it begins its copy: its own checkpoint is as far as what it is a copy of."""
    sweep = sweeps.parse(POPULATION, source="x.yaml")
    desk = Peopled(sweep, store)

    def begins_copy(name: str, *given: Any) -> bool:
        return name == "accept" and any(
            held.order.line and held.order.line.source for held in desk.desk._hands.values()
        )

    desk.fatal = begins_copy
    with pytest.raises(Killed):
        work(desk, milestones=(1, 2), checkpoint_every_s=1000)
    rows = dict(desk.rows())
    row = next(row for row in rows.values() if row.parent_id)
    assert row.checkpoint is not None
    assert row.checkpoint.split("/")[1] == row.parent_id
    old = store.checkpoints(row.trial_id)[0]
    foreign = next(key for other in rows.values() if other.trial_id not in (row.trial_id, row.parent_id)
                   for key in store.checkpoints(other.trial_id))  # fmt: skip
    over = {place: each.replace(state="TERMINATED") for place, each in rows.items()}
    lineage = (row.lineage or "").replace(row.checkpoint, foreign)
    lost = Peopled(sweep, store, {**over, row.position: row.replace(lineage=lineage, checkpoint=foreign)})
    work(lost, milestones=(1, 2), checkpoint_every_s=1000)
    ended = lost.rows()[row.position]
    assert (ended.state, ended.error_kind) == ("ERROR", "exception")
    assert f"{foreign}, of which the trial is a copy, is gone or of no use" in str(ended.error_cause)

    again = Peopled(sweep, store, rows)
    work(again, milestones=(1, 2), checkpoint_every_s=1000)
    keys = [key for key in store.folder.sizes(f"trials/{row.trial_id}") if "/log-" in key]
    logs = " ".join(stored.data.decode() for key in keys if (stored := store.folder.read(key)) is not None)
    assert f"checkpoint {old} is of no use: it is of another config" in logs
    assert f"resumed from {row.checkpoint}" in logs
    assert {each.state for each in again.rows().values()} == {"TERMINATED"}
