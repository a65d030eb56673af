"""When a trial is saved, and how its checkpoints reach the store while training goes on."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmo_core import train
from orchestrator.errors import UnreachableError
from orchestrator.saver import Saver
from orchestrator.store import AttemptFolder, Folder, ResultStore

ID = "0123456789ab"


def moment(step: int, value: float | torch.Tensor = 0.0, cost: Callable[[], None] = lambda: None) -> train.Moment:
    """Of a training whose only weight has this value, or is this tensor."""

    def state() -> dict[str, Any]:
        cost()
        weight = value if isinstance(value, torch.Tensor) else torch.tensor([value])
        return {"epoch": 1, "model": {"weight": weight}, "part": {"step": step}, "history": []}

    return train.Moment(1, step, _state=state)


def steps(store: ResultStore) -> list[int]:
    """Of the checkpoints in the store, the furthest first."""
    return [int(key.rpartition("step-")[2][:6]) for key in store.checkpoints(ID)]


def weight(store: ResultStore, key: str, folder: Path) -> float:
    state = torch.load(store.fetch(key, folder / key.rpartition("/")[2]), weights_only=True)
    return float(state["model"]["weight"])


@dataclass
class Door:
    """What the place of the results does with uploads: lets them in while it is open, and refuses the first few."""

    refusals: int = 0
    opened: threading.Event = field(default_factory=threading.Event)
    tries: int = 0
    inside: int = 0
    most: int = 0
    """Uploads at one time."""

    def pass_through(self) -> None:
        self.tries, self.inside = self.tries + 1, self.inside + 1
        self.most = max(self.most, self.inside)
        try:
            assert self.opened.wait(60)
            if self.tries <= self.refusals:
                raise UnreachableError("the store is away")
        finally:
            self.inside -= 1


@pytest.fixture
def door(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """In front of the store, open."""
    made, upload = Door(), store.folder.upload

    def guarded(key: str, source: Path) -> bool:
        made.pass_through()
        return upload(key, source)

    monkeypatch.setattr(store.folder, "upload", guarded)
    made.opened.set()
    yield made
    made.opened.set()  # let a thread that waits end


@pytest.fixture
def saver(store: ResultStore) -> Iterator[Saver]:
    with Saver(store, store.attempt(ID, 1, 1, "aa"), 0.0) as made:
        yield made


def save(saver: Saver, told: train.Moment) -> None:
    saver.save(told, [], None)


def test_a_checkpoint_holds_what_the_training_was_when_it_was_asked_for(
    store: ResultStore, saver: Saver, door: Door, tmp_path: Path
) -> None:
    """Training goes on in the same tensors while the upload is still under way."""
    door.opened.clear()
    tensor = torch.tensor([1.0])
    save(saver, moment(1, tensor))
    tensor.fill_(2.0)
    assert not saver.due(within=False)  # one at a time
    assert (saver.unnamed(), store.checkpoints(ID)) == (None, [])
    door.opened.set()
    assert saver.wait(60)
    (key,) = store.checkpoints(ID)
    assert saver.unnamed() == key
    assert weight(store, key, tmp_path) == 1.0
    assert saver.due(within=False)


def test_a_store_that_is_away_is_asked_again_until_it_is_back(store: ResultStore, saver: Saver, door: Door) -> None:
    door.refusals = 1
    save(saver, moment(1))
    assert saver.wait(60)
    assert (steps(store), door.tries) == ([1], 2)
    assert saver.lines() == ["a checkpoint is not stored yet: the store is away"]
    assert saver.lines() == []


def test_a_state_that_the_store_does_not_take_gives_way_to_a_newer_one(
    store: ResultStore, saver: Saver, door: Door
) -> None:
    door.refusals = 10**6
    save(saver, moment(1))
    while door.tries < 1:
        time.sleep(0.001)
    door.refusals = 0
    save(saver, moment(2))
    assert saver.wait(60)
    assert (steps(store), door.tries, door.most) == ([2], 2, 1)


def test_whoever_leaves_waits_for_no_store_that_is_away(store: ResultStore, saver: Saver, door: Door) -> None:
    door.refusals = 10**6
    with saver:
        save(saver, moment(1))
        assert not saver.wait(0.01)
    assert saver.wait(60)
    assert (steps(store), saver.unnamed()) == ([], None)


def test_what_no_second_try_would_mend_is_said_once(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AttemptFolder, local: Path, name: str) -> str:
        raise ValueError("the files of an attempt are never changed")

    monkeypatch.setattr(AttemptFolder, "put_file", refuse)
    save(saver, moment(1))
    assert saver.wait(60)
    assert saver.unnamed() is None
    assert saver.lines() == ["a checkpoint was not stored: ValueError: the files of an attempt are never changed"]


def test_the_newest_two_stay_and_what_the_row_names(store: ResultStore, saver: Saver) -> None:
    told = []
    for step in range(1, 8):
        save(saver, moment(step))
        assert saver.wait(60)
        key = saver.unnamed()
        assert key is not None
        told.append(key)
        if step == 1:
            saver.name(key)
        if step == 5:
            assert steps(store) == [5, 4, 3, 2, 1]  # the row names the first
            saver.name(key)
    assert steps(store) == [7, 6, 5]
    saver.clear()
    assert steps(store) == [7, 5]
    saver.name(told[-1])
    saver.clear()
    assert steps(store) == [7]


def test_those_of_earlier_attempts_go_when_there_are_newer_ones(store: ResultStore, tmp_path: Path) -> None:
    with Saver(store, store.attempt(ID, 1, 1, "aa"), 0.0) as first:
        for step in (1, 2):
            save(first, moment(step))
            assert first.wait(60)
    with Saver(store, store.attempt(ID, 1, 2, "bb"), 0.0) as second:
        newest, *others = store.checkpoints(ID)
        second.adopt(newest, [newest, *others])
        assert second.unnamed() == newest  # the row may name an older one
        second.name(newest)
        for step in (3, 4):
            save(second, moment(step))
            assert second.wait(60)
            second.name(str(second.unnamed()))
    assert steps(store) == [4, 3]


def test_a_store_that_does_not_delete_costs_no_checkpoint(
    store: ResultStore, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = store.folder.delete

    def refuse(key: str) -> None:
        if key.startswith("trials/"):
            raise UnreachableError("no right to delete")
        delete(key)

    monkeypatch.setattr(store.folder, "delete", refuse)
    for step in (1, 2, 3):
        save(saver, moment(step))
        assert saver.wait(60)
    assert steps(store) == [3, 2, 1]
    (line,) = saver.lines()
    assert line.endswith("is not deleted: no right to delete")


# ------------------------------------------------------------------------------------------------------- when to save


class Clock:
    """A made-up one, and a store whose uploads take as long by it as they are said to."""

    def __init__(self) -> None:
        self._now, self._ticked = 0.0, threading.Condition()
        self.ends = 0.0
        """When the upload that is under way is over."""

    def __call__(self) -> float:
        return self._now

    def tick(self, seconds: float) -> None:
        with self._ticked:
            self._now += seconds
            self._ticked.notify_all()

    def wait(self) -> None:
        with self._ticked:
            assert self._ticked.wait_for(lambda: self._now >= self.ends, 60)


class SlowFolder(Folder):
    def __init__(self, root: Path, clock: Clock) -> None:
        super().__init__(root)
        self._clock = clock

    def upload(self, key: str, source: Path) -> bool:
        self._clock.wait()
        return super().upload(key, source)


@pytest.mark.parametrize("step_s", [0.7, 13.0])
@pytest.mark.parametrize("cost_s", [0.01, 3.0, 17.0, 60.0])
@pytest.mark.parametrize("upload_s", [0.0, 2.0, 100.0, 400.0])
@pytest.mark.parametrize("epoch_s", [13.0, 3600.0])
def test_no_more_than_ten_minutes_are_at_risk_and_saving_takes_less_than_three_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float, cost_s: float, upload_s: float, epoch_s: float
) -> None:
    """An hour by a made-up clock: steps, copies and uploads take as long as they are said to."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    clock, taken = Clock(), [0.0]
    stored: list[float] = []
    store = ResultStore(SlowFolder(tmp_path, clock))
    with Saver(store, store.attempt(ID, 1, 1, "aa"), clock=clock) as saver:

        def look(step: int, *, within: bool) -> None:
            if len(stored) < len(taken) - 1 and clock() >= clock.ends:
                assert saver.wait(60)
                stored.append(clock())
            if saver.due(within=within):
                taken.append(clock())
                clock.ends = clock() + cost_s + upload_s
                save(saver, moment(step, clock(), cost=lambda: clock.tick(cost_s)))

        for epoch in range(int(3600 / epoch_s)):
            for step in range(int(epoch_s / step_s)):
                clock.tick(step_s)
                look(epoch * 10**4 + step + 1, within=True)
            look(epoch * 10**4 + 9999, within=False)
        clock.tick(10**6)
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(taken)]
    slack_s = 2 * step_s + (epoch_s if epoch_s < 30 else 0)
    at_risk_s = [end - state for state, end in zip(taken, stored, strict=False)]
    assert max(at_risk_s) <= max(600.0, 2 * (cost_s + upload_s)) + slack_s
    if cost_s / 0.03 < 600 - upload_s - cost_s:  # else the ten minutes come first
        assert all(cost_s <= 0.03 * pause_s for pause_s in pauses_s[1:])  # the first was yet to learn its cost
    if upload_s < 10:
        assert all(upload_s <= 0.05 * pause_s for pause_s in pauses_s[1:])
    first_s = 30 if epoch_s > 30 else epoch_s
    assert first_s - step_s <= pauses_s[0] <= first_s + step_s
