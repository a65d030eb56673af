"""Several trials in one gang: which go together, and what befalls one or all of them. No Ray, no torch."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import strategies
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from made_engine import Pace, Threads, metrics

from mixmo_core.config import flatten, ineffective, shape_of, unflatten
from mixmo_core.cost import parameters, step_flops
from orchestrator import driver
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import Assignment, Dispatcher, EpochReport, Order, Retries, Update, Worker, gang_of
from orchestrator.errors import ExitCode
from orchestrator.store import ResultStore

BETWEEN_STEPS = {
    "seed", "optim.epochs", "optim.lr", "optim.weight_decay", "optim.warmup", "optim.decay_at", "optim.decay_by",
    "evaluate.every", "evaluate.robustness", "mixing.probability",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- trials of one shape


@given(strategies.flats(), strategies.settings_with_names())
def test_a_setting_is_of_the_shape_unless_it_is_looked_at_between_steps_or_has_no_effect(
    flat: dict[str, Any], change: tuple[str, Any]
) -> None:
    name, value = change
    one = unflatten(flat)
    try:
        other = unflatten(flat | {name: value})
    except ValueError:
        reject()
    silent = name in ineffective(one) & ineffective(other)
    same = flatten(one)[name] == flatten(other)[name]
    assert (shape_of(one) == shape_of(other)) == (same or silent or name in BETWEEN_STEPS)
    if shape_of(one) == shape_of(other):
        assert (parameters(one), step_flops(one)) == (parameters(other), step_flops(other))


# ---------------------------------------------------------------------------------------------------- handing them out


def order(index: int, shape: str = "a") -> Order:
    return Order(index=index, trial_id=f"{index:012x}", settings={"optim.epochs": 3}, shape=shape)


def desk_of(shapes: Sequence[str], **retries: float) -> Dispatcher:
    """With trials of these shapes, all of which wait."""
    orders = [order(index, shape) for index, shape in enumerate(shapes)]
    desk = Dispatcher(orders, fence=1, retries=Retries(**retries))
    for each in orders:
        desk.submit(each.index)
    return desk


def take(desk: Dispatcher, slot: str, *, accept: bool = True) -> Assignment | None:
    answer = asyncio.run(desk.next(slot, 0.0))
    if isinstance(answer, Assignment) and accept:
        desk.accept(answer.token)
    assert answer != "leave"
    return answer if isinstance(answer, Assignment) else None


def filled(desk: Dispatcher, gang: str = "gang-0", slots: int = 3) -> dict[str, Assignment]:
    """What the slots of a gang have, once each has asked."""
    asked = {f"{gang}/{number}": take(desk, f"{gang}/{number}") for number in range(slots)}
    return {slot: given for slot, given in asked.items() if given is not None}


def indices(held: dict[str, Assignment]) -> list[int]:
    return [given.order.index for given in held.values()]


def news(desk: Dispatcher) -> list[Update]:
    return asyncio.run(desk.updates(0, 0.0))


def report(epoch: int) -> EpochReport:
    return EpochReport(epoch=epoch, metrics={"top1": 0.5}, wall_s=1.0, gpu_seconds=0, images_per_s=1)


def stands_again(desk: Dispatcher, gang: str = "gang-0", slots: int = 3, node: str = "") -> None:
    """Its process has died, and the one that Ray Train has formed introduces itself."""
    worker = Worker(gang=gang, rank=0, world_size=1, pid=1, host="h", device_name="d", torch_version="t", node=node)
    desk.join(replace(worker, slots=slots))


def losses(desk: Dispatcher) -> Counter[tuple[int | None, str | None]]:
    return Counter((update.index, update.error_kind) for update in news(desk) if update.kind == "lost")


def test_a_gang_takes_trials_of_one_shape_and_another_only_when_it_is_empty() -> None:
    desk = desk_of("aabba")
    held = filled(desk)
    assert indices(held) == [0, 1, 4]
    assert indices(filled(desk, "gang-1")) == [2, 3], "another gang takes up another shape"
    desk = desk_of("aab")
    held = filled(desk)
    assert indices(held) == [0, 1]
    desk.finish(held["gang-0/0"].token)
    assert take(desk, "gang-0/0") is None, "one of the other shape is still at work"
    desk.finish(held["gang-0/1"].token)
    assert indices(filled(desk)) == [2]


def test_a_slot_that_frees_takes_the_next_of_its_shape_in_the_order_of_the_queue() -> None:
    desk = desk_of("abaa")
    held = filled(desk, slots=2)
    assert indices(held) == [0, 2]
    desk.fail(held["gang-0/0"].token, "Traceback ...", "ValueError: no")
    again = take(desk, "gang-0/0")
    assert again is not None
    assert again.order.index == 3
    assert {update.text for update in news(desk) if update.kind == "started"} == {"on gang-0/0", "on gang-0/1"}


def test_a_gang_with_a_trial_in_any_slot_is_at_work() -> None:
    desk = desk_of("ab")
    stands_again(desk)
    held = filled(desk)
    assert desk.roll().standing == {"gang-0": None}
    desk.dismiss(["gang-0"])
    assert take(desk, "gang-0/1") is None, "it is not sent home"
    desk.finish(held["gang-0/0"].token)
    assert indices(filled(desk)) == [1]


def test_what_one_trial_meets_does_not_reach_its_neighbours() -> None:
    desk = desk_of("aaaa")
    held = filled(desk)
    desk.cancel([0], "by somebody")
    assert desk.report(held["gang-0/0"].token, [report(1)], None) == "drop"
    assert desk.report(held["gang-0/1"].token, [report(1)], None) == "go on"
    assert desk.fail(held["gang-0/1"].token, "Traceback ...", "DivergedError: no")
    assert desk.report(held["gang-0/2"].token, [report(1)], None) == "go on"


def test_all_slots_of_a_gang_hear_that_its_machine_will_be_taken_away() -> None:
    desk = desk_of("aaa")
    held = filled(desk, slots=2)
    desk.warned("gang-0")
    for given_ in held.values():
        assert desk.report(given_.token, [], "saved") == "save"
        assert desk.give_back(given_.token, "saved")
    assert asyncio.run(desk.next("gang-0/0", 0.0)) == "leave"
    assert losses(desk) == {(0, "preempted"): 1, (1, "preempted"): 1}
    assert indices(filled(desk, "gang-1")) == [1, 0, 2]


# -------------------------------------------------------------------------------------------------- a gang that is lost


@pytest.mark.parametrize("how", ["stands again", "ended", "struck"])
def test_a_gang_that_dies_loses_all_its_trials_each_under_its_next_attempt(how: str) -> None:
    desk = desk_of("aaa", crash=0)
    before = filled(desk)
    match how:
        case "stands again":
            stands_again(desk)
        case "ended":
            desk.gang_ended("gang-0", "gone")
        case "struck":
            desk.struck("gang-0", "preempted", "its machine is gone")
    news(desk)
    assert desk.in_hand() == 0
    kind = "preempted" if how == "struck" else "crash"
    assert losses(desk) == {(index, kind): 1 for index in range(3)}
    again = [take(desk, f"gang-{number}") for number in range(1, 4)]
    assert sorted((given_.order.index, given_.attempt) for given_ in again if given_) == [(0, 2), (1, 2), (2, 2)]
    for given_ in before.values():
        assert desk.report(given_.token, [report(1)], None) == "drop"


def test_none_is_blamed_for_a_death_among_several_and_each_goes_on_alone_until_it_is_past_it() -> None:
    desk = desk_of("aaaa", crash=0)
    held = filled(desk)
    for given_ in held.values():
        desk.report(given_.token, [report(1)], None)
    stands_again(desk)
    held = filled(desk)
    assert indices(held) == [2], "alone"
    assert "goes on alone" in news(desk)[-2].text
    desk.report(held["gang-0/0"].token, [report(1)], None)
    assert take(desk, "gang-0/1") is None, "it is not past where the gang died"
    desk.report(held["gang-0/0"].token, [report(2)], None)
    beside = take(desk, "gang-0/1")
    assert beside is not None
    assert beside.order.index == 3, "the others are not past it yet, and go alone in their turn"
    desk.finish(beside.token)
    desk.finish(held["gang-0/0"].token)
    assert indices(filled(desk)) == [1]


def test_a_death_alone_is_a_crash_of_the_trial() -> None:
    desk = desk_of("aa", crash=0)
    filled(desk)
    stands_again(desk)
    filled(desk)
    stands_again(desk)
    ended = [update for update in news(desk) if update.kind == "ended"]
    assert [(update.index, update.state, update.error_kind) for update in ended] == [(1, "ERROR", "crash")]


@pytest.mark.parametrize(("node", "ended"), [("a", ["ERROR"]), ("b", [])])
def test_a_death_alone_is_in_doubt_only_where_the_machine_may_be_gone(node: str, ended: list[str]) -> None:
    desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0), missed_within_s=60.0)
    desk.submit(0)
    stands_again(desk, node="a")
    filled(desk)
    stands_again(desk, node=node)
    assert [update.state for update in news(desk) if update.kind == "ended"] == ended
    desk.nodes_lost(["a"])
    assert [take(desk, "gang-1") is None, desk.in_hand()] == ([True, 0] if ended else [False, 1])


def test_memory_that_is_short_for_several_is_no_fault_of_one() -> None:
    desk = desk_of("aa", oom=0)
    held = filled(desk)
    desk.abandon(held["gang-0/1"].token, "CUDA out of memory", "oom", "Traceback ...")
    assert desk.report(held["gang-0/0"].token, [report(1)], None) == "go on"
    assert take(desk, "gang-0/1") is None, "it waits until it can be alone"
    desk.finish(held["gang-0/0"].token)
    (given_,) = filled(desk).values()
    desk.abandon(given_.token, "CUDA out of memory", "oom", "Traceback ...")
    assert news(desk)[-1].state == "ERROR"


def test_a_device_that_is_lost_is_lost_to_all_its_trials_and_blames_none() -> None:
    desk = desk_of("aa", crash=0)
    held = filled(desk)
    desk.abandon(held["gang-0/0"].token, "a device was lost", "crash")
    stands_again(desk)
    assert losses(desk) == {(0, "crash"): 1, (1, "crash"): 1}


class World:
    """Gangs of three slots that train and save as chance has it, among them one trial that kills whoever is at it."""

    def __init__(self, desk: Dispatcher, chance: random.Random, poison: int, deadly: int) -> None:
        self.desk, self.chance, self.poison, self.deadly = desk, chance, poison, deadly
        self.held: dict[str, Assignment] = {}
        self.epoch: dict[int, int] = Counter()
        self.saved: dict[int, int] = Counter()
        self.deaths = 0

    def step(self, slot: str) -> None:
        given_ = self.held.get(slot)
        if given_ is None:
            given_ = take(self.desk, slot)
            if given_ is not None:
                self.held[slot] = given_
                self.epoch[given_.order.index] = self.saved[given_.order.index]
            return
        index = given_.order.index
        if index == self.poison and self.epoch[index] == self.deadly:
            self.deaths += 1
            gang = gang_of(slot)
            self.held = {each: kept for each, kept in self.held.items() if gang_of(each) != gang}
            stands_again(self.desk, gang)
        elif self.epoch[index] == 3:
            assert self.desk.finish(given_.token)
            del self.held[slot]
        else:
            self.epoch[index] += 1
            assert self.desk.report(given_.token, [report(self.epoch[index])], None) == "go on"
            if self.chance.random() < 0.3:
                self.saved[index] = self.epoch[index]


@given(
    shapes=st.lists(st.sampled_from("ab"), min_size=2, max_size=9),
    deadly=st.integers(0, 3),
    crash=st.integers(0, 2),
    chance=st.randoms(use_true_random=False),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_poison_trial_ends_after_its_retries_and_takes_no_other_with_it(
    shapes: list[str], deadly: int, crash: int, chance: random.Random, data: st.DataObject
) -> None:
    poison = data.draw(st.integers(0, len(shapes) - 1))
    desk = desk_of(shapes, crash=crash)
    world = World(desk, chance, poison, deadly)
    slots = [f"gang-{gang}/{number}" for gang in range(2) for number in range(3)]
    ended: dict[int | None, Update] = {}
    for _ in range(2_000):
        world.step(chance.choice(slots))
        shared = [world.held[slot].order for slot in world.held if slot.startswith("gang-0/")]
        assert len({each.shape for each in shared}) <= 1
        ended = {update.index: update for update in news(desk) if update.kind == "ended"}
        if len(ended) == len(shapes):
            break
    states = {index: update.state for index, update in ended.items()}
    assert states == {index: "ERROR" if index == poison else "TERMINATED" for index in range(len(shapes))}
    assert ended[poison].error_kind == "crash"
    assert world.deaths <= crash + 2, "once with others, and then alone"
    assert f"this was crash {crash + 1} of the trial" in ended[poison].text


def test_a_trial_that_another_sweep_trains_joins_no_gang() -> None:
    orders = [order(0), replace(order(1), held_back=True), order(2)]
    desk = Dispatcher(orders, fence=1, retries=Retries())
    for each in orders:
        desk.submit(each.index)
    assert indices(filled(desk)) == [0, 2]
    desk.release([1])
    given_: Any = take(desk, "gang-0/2")
    assert given_.order.index == 1


# ------------------------------------------------------------------------------------------------- from a sweep file on


SWEEP = """
name: made
trial: {data: {dataset: digits}, model: {depth: 10}, optim: {epochs: 3}}
blocks: [{grid: {model.width: [1, 2]}}]
seeds: 4
resources: {slots: 3, gpus_per_worker: 0}
"""
"""Eight trials, of two shapes in turn."""


class Watched(Pace):
    """Notes which widths are at work in each gang whenever an epoch begins."""

    def __init__(self) -> None:
        super().__init__(0.005)
        self.crew: Callable[[], Dispatcher] | None = None
        self.seen: list[tuple[int, int]] = []

    def epoch(self, order: Order, epoch: int) -> None:
        super().epoch(order, epoch)
        assert self.crew is not None
        held: dict[str, list[Order]] = {}
        for slot, each in dict(self.crew()._hands).items():
            held.setdefault(gang_of(slot), []).append(each.order)
        self.seen += [(len({each.settings["model.width"] for each in orders}), len(orders)) for orders in held.values()]


@pytest.mark.parametrize("gangs", [1, 2])
def test_a_sweep_with_slots_fills_them_with_trials_of_one_shape_to_its_end(tmp_path: Path, gangs: int) -> None:
    store, pace = ResultStore.open(tmp_path, create=True), Watched()
    threads = Threads(pace, gangs=gangs, slots=3)
    pace.crew = lambda: threads.crews[0].desk
    sweep = sweeps.parse(SWEEP, source="made.yaml")
    assert driver.run(sweep, store, engine=threads.engine, talk=lambda _: None) == ExitCode.OK
    rows = store.trial_rows("made")
    assert {(row.state, row.epoch, row.attempts, row.slots) for row in rows} == {("TERMINATED", 3, 1, 3)}
    assert {row.trial_id: dict(row.metrics)["top1"] for row in rows} == {
        row.trial_id: metrics(row.trial_id, 3)["top1"] for row in rows
    }
    assert {shapes for shapes, _ in pace.seen} == {1}
    assert max(count for _, count in pace.seen) == 3
    assert store.verify("made") == []
