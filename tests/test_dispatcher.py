"""The dispatcher as a plain object: no Ray, no processes, no clocks."""

import asyncio
import functools
import random
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mixmo_core.config import flatten
from orchestrator import stopping
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import (
    REFORM_S,
    Assignment,
    Dispatcher,
    EpochReport,
    Loss,
    Order,
    Retries,
    Roll,
    Update,
    Worker,
)
from orchestrator.population import Population, steps_of

T = TypeVar("T")
GANG = "gang-0"


def order(index: int, attempts: int = 0) -> Order:
    return Order(index=index, trial_id=f"{index:012x}", settings={"seed": index}, attempts=attempts)


def report(epoch: int, top1: float = 0.5) -> EpochReport:
    return EpochReport(epoch=epoch, metrics={"top1": top1}, wall_s=1.0 * epoch, gpu_seconds=0, images_per_s=100)


def dispatcher(trials: int = 2, *, crash_retries: int = 1, attempts: int = 0) -> Dispatcher:
    desk = Dispatcher([order(i, attempts) for i in range(trials)], fence=7, retries=Retries(crash=crash_retries))
    for index in range(trials):
        desk.submit(index)
    return desk


def run(wait: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(wait)


def take(desk: Dispatcher, gang: str = GANG) -> Assignment:
    given = asyncio.run(desk.next(gang, 0.0))
    assert isinstance(given, Assignment)
    desk.accept(given.token)
    return given


def news(desk: Dispatcher, after: int = 0) -> list[Update]:
    return asyncio.run(desk.updates(after, 0.0))


def kinds(updates: Sequence[Update]) -> list[tuple[str, int | None, str | None]]:
    return [(update.kind, update.index, update.state) for update in updates]


def test_trials_are_handed_out_in_the_order_in_which_they_were_submitted() -> None:
    desk = dispatcher(3)
    assert [take(desk, f"gang-{i}").order.index for i in range(3)] == [0, 1, 2]
    assert asyncio.run(desk.next("gang-9", 0.0)) == "wait"


def test_an_attempt_is_numbered_on_from_those_of_earlier_drivers() -> None:
    given = take(dispatcher(1, attempts=4))
    assert (given.attempt, given.fence) == (5, 7)


def test_a_trial_that_trains_all_its_epochs_is_terminated() -> None:
    desk = dispatcher(1)
    token = take(desk).token
    assert desk.report(token, [report(1)], None) == "go on"
    assert desk.report(token, [report(2)], "key") == "go on"
    assert desk.finish(token)
    told = news(desk)
    assert kinds(told) == [
        ("started", 0, None),
        ("epochs", 0, None),
        ("epochs", 0, None),
        ("ended", 0, "TERMINATED"),
    ]
    assert told[2].checkpoint == "key"
    assert [update.seq for update in told] == [1, 2, 3, 4]


def test_a_checkpoint_in_the_middle_of_an_epoch_is_told_without_an_epoch() -> None:
    async def scenario() -> list[Update]:
        desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0))
        desk.submit(0)
        given = await desk.next(GANG, 0.0)
        assert isinstance(given, Assignment)
        assert desk.report(given.token, [], "within") == "go on"
        assert desk.report(given.token, [report(1)], None) == "go on"
        assert desk.report(given.token, [], "later") == "go on"
        desk.cancel([0], "by somebody")
        return await desk.updates(0, 0.0)

    told = run(scenario())
    assert [(update.kind, len(update.epochs), update.checkpoint) for update in told] == [
        ("started", 0, None), ("epochs", 0, "within"), ("epochs", 1, None), ("epochs", 0, "later"), ("ended", 0, None),
    ]  # fmt: skip


def test_who_takes_a_lost_trial_up_is_told_of_its_newest_checkpoint() -> None:
    """A listing of the store may not show it yet."""
    desk = dispatcher(1)
    first = take(desk)
    desk.report(first.token, [report(1)], "older")
    desk.report(first.token, [], "newer")
    desk.report(first.token, [report(2)], None)
    desk.abandon(first.token, "the device was lost", "crash")
    assert take(desk).order.checkpoint == "newer"


def test_the_end_of_a_trial_names_its_logits() -> None:
    desk = dispatcher(2)
    assert desk.finish(take(desk).token, "logits")
    assert desk.finish(take(desk).token)
    assert [update.logits for update in news(desk) if update.kind == "ended"] == ["logits", None]


def test_an_exception_ends_the_trial_with_its_traceback_and_frees_the_gang() -> None:
    desk = dispatcher(2)
    desk.fail(take(desk).token, "Traceback ...", "ValueError: no")
    ended = news(desk)[-1]
    assert (ended.state, ended.text, ended.cause) == ("ERROR", "Traceback ...", "ValueError: no")
    assert take(desk).order.index == 1


def test_a_gang_that_asks_while_it_holds_a_trial_has_lost_it_and_gets_it_again() -> None:
    desk = dispatcher(2)
    first = take(desk)
    again = take(desk)
    assert again.order == first.order
    assert again.attempt == first.attempt + 1
    assert again.token != first.token
    assert [update.kind for update in news(desk)] == ["started", "lost", "started"]


def test_what_comes_under_an_old_token_is_refused() -> None:
    desk = dispatcher(1)
    old = take(desk).token
    take(desk)
    before = len(news(desk))
    assert desk.report(old, [report(1)], None) == "drop"
    assert not desk.finish(old)
    assert not desk.fail(old, "late", "late")
    assert not desk.abandon(old, "late", "crash")
    assert len(news(desk)) == before


def test_a_poison_trial_ends_after_its_retries_and_takes_no_other_with_it() -> None:
    desk = dispatcher(2, crash_retries=2)
    for _ in range(3):
        assert take(desk).order.index == 0
    assert take(desk).order.index == 1
    ended = next(update for update in news(desk) if update.kind == "ended")
    assert (ended.index, ended.state, ended.cause) == (0, "ERROR", "crash")


def test_a_gang_that_ends_gives_its_trial_to_another() -> None:
    desk = dispatcher(1)
    take(desk, "gang-0")
    desk.gang_ended("gang-0", "its node went away")
    given = take(desk, "gang-1")
    assert (given.order.index, given.attempt) == (0, 2)


def test_a_lost_worker_of_a_larger_gang_is_a_crash_and_no_error_of_the_trial() -> None:
    desk = dispatcher(1)
    desk.abandon(take(desk).token, "a worker was lost", "crash")
    assert [update.kind for update in news(desk)] == ["started", "lost"]
    assert take(desk).attempt == 2


def test_a_drained_dispatcher_hands_out_nothing_more_and_a_closed_one_sends_gangs_home() -> None:
    desk = dispatcher(2)
    take(desk, "gang-0")
    desk.drain()
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"
    assert desk.in_hand() == 1
    desk.close()
    assert asyncio.run(desk.next("gang-1", 0.0)) == "leave"


class Bar:
    """A rule for tests: below so much a trial stops."""

    def __init__(self, bar: float) -> None:
        self.bar = bar
        self.judged: list[tuple[int, int]] = []

    def verdict(self, trial: int, epoch: int, value: float) -> stopping.Bar | None:
        self.judged.append((trial, epoch))
        return None if value >= self.bar else stopping.Bar(self.bar, "all of them")

    def record(self, trial: int, epoch: int, value: float) -> None:
        """It remembers nothing."""


def judged(trials: int = 2, *, epochs: int = 4, orders: Sequence[Order] = ()) -> tuple[Dispatcher, Bar]:
    """Trials stop below a top1 of 0.4."""
    rule = Bar(0.4)
    judge = stopping.Judge(lambda: rule, method="bar", metric="top1", sign=1)
    for index in range(trials):
        judge.add(index, {"optim.epochs": epochs})
    desk = Dispatcher(orders or [order(i) for i in range(trials)], fence=7, retries=Retries(crash=1), judge=judge)
    for index in range(trials):
        desk.submit(index)
    return desk, rule


WHY = "bar: top1 0.3 at epoch 1, below 0.4: all of them"


def test_a_trial_that_the_scheduler_stops_is_saved_and_ends_at_the_report_that_decides_it() -> None:
    desk, _ = judged()
    token = take(desk).token
    assert desk.report(token, [report(1, 0.3)], None) == "save"
    assert desk.give_back(token, "key")
    told = news(desk)
    assert kinds(told) == [("started", 0, None), ("epochs", 0, None), ("ended", 0, "TERMINATED")]
    assert [(each.stopped_early, each.cause, each.checkpoint) for each in told[1:]] == [
        (True, WHY, None), (True, WHY, "key"),
    ]  # fmt: skip
    assert take(desk).order.index == 1  # nobody trains it again


def test_the_last_epoch_stops_nobody_and_an_epoch_is_judged_once_in_whatever_attempt() -> None:
    desk, rule = judged(1)
    token = take(desk).token
    assert [desk.report(token, [report(epoch)], None) for epoch in (1, 2)] == ["go on", "go on"]
    token = take(desk).token  # a worker died
    assert desk.report(token, [report(1, 0.1), report(2, 0.1)], None) == "go on"  # what it passed, it has passed
    assert desk.report(token, [report(3)], None) == "go on"
    assert desk.report(token, [report(4, 0.1)], None) == "go on"
    assert desk.finish(token)
    assert (news(desk)[-1].stopped_early, rule.judged) == (False, [(0, 1), (0, 2), (0, 3)])


@pytest.mark.parametrize("how", ["lost", "gang", "failed", "abandoned"])
def test_whatever_becomes_of_a_stopped_trial_while_it_is_saved_it_has_ended_as_stopped(how: str) -> None:
    desk, _ = judged()
    token = take(desk).token
    assert desk.report(token, [report(1, 0.3)], None) == "save"
    if how == "lost":
        assert take(desk).order.index == 1
    elif how == "gang":
        desk.gang_ended(GANG, "gone")
    elif how == "failed":
        assert desk.fail(token, "Traceback", "a full disk")
    else:
        assert desk.abandon(token, "the store is away", "store")
    (ended,) = [each for each in news(desk) if each.kind == "ended"]
    assert (ended.index, ended.state, ended.stopped_early, ended.cause) == (0, "TERMINATED", True, WHY)


def test_a_trial_whose_end_an_earlier_driver_could_not_write_ends_without_a_gang() -> None:
    desk, _ = judged(orders=[replace(order(0), stopped=WHY), order(1)])
    assert kinds(news(desk)) == [("ended", 0, "TERMINATED")]
    assert take(desk).order.index == 1


PBT = """
name: made
trial: {data: {dataset: digits}, optim: {epochs: 4}}
seeds: 3
scheduler: {method: pbt, interval_epochs: 2, quantile_fraction: 0.5, mutations: {optim.lr: {min: 0.01, max: 1}}}
"""


@functools.cache
def population_sweep(*, synchronous: bool, epochs: int) -> sweeps.Sweep:
    overrides = [f"scheduler.synchronous={str(synchronous).lower()}", f"optim.epochs={epochs}"]
    return sweeps.parse(PBT, source="x.yaml", overrides=overrides)


def peopled(*, synchronous: bool = False, epochs: int = 4) -> Dispatcher:
    """Three trials that are compared after every second epoch."""
    sweep = population_sweep(synchronous=synchronous, epochs=epochs)
    population = Population(sweep.scheduler, sweep.trials)
    orders = [
        Order(index=trial.position, trial_id=trial.trial_id, settings=flatten(trial.config)) for trial in sweep.trials
    ]
    return Dispatcher(orders, fence=7, retries=Retries(crash=1), population=population)


def compared(desk: Dispatcher, given: Assignment, top1: float) -> str:
    """What the gang is told at the milestone."""
    key = f"trials/{given.order.trial_id}/7-1-aa/epoch-00002-{'0' * 16}.pt"
    return desk.report(given.token, [report(1), report(2, top1)], key)


def test_trials_of_a_population_take_turns_and_nobody_need_submit_them() -> None:
    desk = peopled()
    first, second = take(desk), take(desk, "gang-1")
    assert [first.order.index, second.order.index] == [0, 1]
    assert compared(desk, first, 0.1) == "save"  # the third is not as far
    assert desk.give_back(first.token, None)
    third = take(desk)
    assert third.order.index == 2
    assert desk.report(second.token, [report(1)], None) == "go on"
    assert compared(desk, second, 0.9) == "save"  # the first is as far, and before it
    assert desk.give_back(second.token, None)
    assert take(desk, "gang-1").order.index == 0
    desk.drain()
    assert compared(desk, third, 0.5) == "go on"  # what is given back would not be handed out again
    assert [each.kind for each in news(desk) if each.index == 1] == ["started", "epochs", "epochs", "paused"]


def test_a_trial_that_is_made_a_copy_is_dropped_and_handed_out_again_from_its_parents_checkpoint() -> None:
    desk = peopled()
    for top1 in (0.5, 0.9):
        given = take(desk)
        assert compared(desk, given, top1) == "save"
        assert desk.give_back(given.token, None)
    parent, worst = given.order, take(desk)
    assert compared(desk, worst, 0.1) == "drop"
    assert desk.in_hand() == 0
    assert not desk.give_back(worst.token, None)
    epochs, exploited = news(desk)[-2:]
    assert (epochs.kind, exploited.kind, exploited.index) == ("epochs", "exploited", 2)
    (step,) = steps_of(epochs.lineage)
    assert step.copy is not None
    assert exploited.text == str(step.copy)
    assert (exploited.parent_id, exploited.checkpoint) == (parent.trial_id, step.copy.checkpoint)
    for gang in ("gang-0", "gang-1"):
        assert take(desk, gang).order.index < 2
    again = take(desk, "gang-2")
    assert (again.order.index, again.attempt, again.order.checkpoint) == (2, 2, step.copy.checkpoint)
    assert again.order.settings == {**worst.order.settings, **step.copy.settings}
    assert again.order.settings["seed"] == 2
    assert again.order.line is not None
    assert (again.order.line.source, again.order.line.compared_at) == (step.copy.checkpoint, 2)
    assert desk.report(again.token, [report(1, 0.9), report(2, 0.9)], step.copy.checkpoint) == "go on"  # its parent's
    assert news(desk)[-1].lineage is None


@pytest.mark.parametrize("last", ["compared", "failed"])
def test_trials_that_wait_for_one_another_are_handed_out_when_the_last_has_come_or_ended(last: str) -> None:
    desk = peopled(synchronous=True)
    first, second, third = (take(desk, f"gang-{i}") for i in range(3))
    assert compared(desk, first, 0.1) == "save"
    assert desk.give_back(first.token, None)
    assert compared(desk, second, 0.9) == "save"  # its gang has yet to give it back
    assert run(desk.next("gang-0", 0.0)) == "wait"
    assert desk.roll().queued == 0
    if last == "compared":
        assert compared(desk, third, 0.5) == "save"  # the first is before it
    else:
        assert desk.fail(third.token, "Traceback", "a bad day")
    told = news(desk)[-1]
    assert (told.kind, told.index, told.parent_id) == ("exploited", 0, second.order.trial_id)
    again = take(desk)
    assert (again.order.index, again.attempt, again.order.checkpoint) == (0, 2, told.checkpoint)
    assert desk.give_back(second.token, None)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), synchronous=st.booleans(), gangs=st.integers(1, 4))
def test_whatever_becomes_of_its_trials_a_population_comes_to_its_end(seed: int, synchronous: bool, gangs: int) -> None:
    chance = random.Random(seed)
    desk, held = peopled(synchronous=synchronous, epochs=7), dict[str, tuple[Assignment, int]]()
    epochs = 0
    while len({update.index for update in news(desk) if update.kind == "ended"}) < 3:
        for gang in (f"gang-{i}" for i in range(gangs) if f"gang-{i}" not in held):
            given_ = run(desk.next(gang, 0.0))
            if isinstance(given_, Assignment):
                desk.accept(given_.token)
                assert given_.order.line is not None
                held[gang] = given_, given_.order.line.compared_at
        assert held, "all wait for one another"
        gang = chance.choice(sorted(held))
        happens = chance.random()
        if happens < 0.05:
            desk.struck(gang, "preempted", "its machine went")
            del held[gang]  # its workers were formed anew, and it asks
        elif happens < 0.07:
            desk.fail(held.pop(gang)[0].token, "Traceback", "a bad day")
        else:
            epochs += 1
            assert epochs < 200, "it goes round in circles"
            if (after := one_epoch(desk, *held[gang], chance.random())) is None:
                del held[gang]
            else:
                held[gang] = held[gang][0], after


def one_epoch(desk: Dispatcher, given_: Assignment, before: int, top1: float) -> int | None:
    """Train one on; None where the gang has the trial no more."""
    epoch = before + 1
    key = f"trials/{given_.order.trial_id}/7-1-aa/epoch-{epoch:05d}-{'0' * 16}.pt"
    answer = desk.report(given_.token, [report(epoch, top1)], key)
    if answer == "go on" or (answer == "save" and epoch == 7):
        return epoch if epoch < 7 or not desk.finish(given_.token) else None
    if answer == "save":
        desk.give_back(given_.token, None)
    return None


def test_a_trial_of_a_population_that_has_ended_is_compared_with_nobody() -> None:
    desk = peopled()
    for top1 in (0.5, 0.9):
        given = take(desk)
        compared(desk, given, top1)
        desk.give_back(given.token, None)
    desk.cancel([1], "by somebody")
    worst = take(desk)
    assert compared(desk, worst, 0.1) == "save"  # nothing of the first could be copied: it had been alone
    assert steps_of(news(desk)[-1].lineage)[0].copy is None


def test_an_offer_holds_until_each_of_its_trials_is_taken_up_over_or_held_back() -> None:
    async def scenario() -> list[bool]:
        desk = Dispatcher([order(index) for index in range(4)], fence=1, retries=Retries(crash=5))
        offered = asyncio.create_task(desk.offer([0, 1, 2, 3]))
        seen = []

        async def look() -> None:
            for _ in range(4):
                await asyncio.sleep(0)
            seen.append(offered.done())

        given = await desk.next(GANG, 10.0)
        assert isinstance(given, Assignment)
        desk.hold_back([3])
        desk.cancel([2], "by somebody")
        await look()
        desk.abandon(given.token, "a worker died", "crash")  # it waits again, but has been taken up once
        await look()
        assert isinstance(again := await desk.next(GANG, 0.0), Assignment)
        assert again.order.index == 0
        await look()
        assert isinstance(await desk.next("gang-1", 0.0), Assignment)
        await look()
        return seen

    assert run(scenario()) == [False, False, False, True]


def test_a_waiting_gang_gets_a_trial_as_soon_as_one_is_submitted() -> None:
    async def scenario() -> Any:
        desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0))
        waiting = [asyncio.create_task(desk.next(f"gang-{i}", 60.0)) for i in range(3)]
        await asyncio.sleep(0)
        desk.submit(0)
        done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        desk.close()
        return [task.result() for task in done], [await task for task in rest]

    (given,), rest = run(scenario())
    assert isinstance(given, Assignment)
    assert rest == ["leave", "leave"]


def test_the_question_of_a_worker_that_died_takes_no_trial() -> None:
    async def scenario() -> tuple[Any, Any, Any]:
        desk = Dispatcher([order(0), order(1)], fence=1, retries=Retries(crash=0))
        dead = asyncio.create_task(desk.next(GANG, 60.0))
        await asyncio.sleep(0)
        living = asyncio.create_task(desk.next(GANG, 60.0))
        await asyncio.sleep(0)
        desk.submit(0)
        desk.submit(1)
        given = await living
        return await dead, given, await desk.next("gang-1", 0.0)

    dead, first, second = run(scenario())
    assert dead == "wait"
    assert (first.order.index, second.order.index) == (0, 1)


def test_a_gang_that_has_ended_gets_nothing_by_a_question_it_asked_before() -> None:
    async def scenario() -> tuple[Any, Any]:
        desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0))
        asked = asyncio.create_task(desk.next(GANG, 60.0))
        await asyncio.sleep(0)
        desk.gang_ended(GANG, "gone")
        desk.submit(0)
        return await asked, await desk.next("gang-1", 0.0)

    asked, given = run(scenario())
    assert asked == "wait"
    assert isinstance(given, Assignment)


def test_a_death_before_the_trial_was_in_hand_is_no_crash_of_it() -> None:
    desk = dispatcher(1, crash_retries=0)
    for attempt in (1, 2, 3):
        given = asyncio.run(desk.next(GANG, 0.0))
        assert isinstance(given, Assignment)
        assert given.attempt == attempt


def test_a_store_that_was_away_is_not_charged_to_the_trial() -> None:
    desk = dispatcher(1, crash_retries=0)
    desk.abandon(take(desk).token, "the store is away", "store")
    assert take(desk).attempt == 2


@pytest.mark.parametrize("kind", ["crash", "oom", "preempted", "store"])
def test_each_kind_of_loss_has_its_own_retries_and_its_own_name(kind: Loss) -> None:
    allowed = {"crash": 0, "oom": 0, "preempted": 0, "store": 0, kind: 2}
    desk = Dispatcher([order(0)], fence=1, retries=Retries(**allowed))
    desk.submit(0)
    for attempt in (1, 2, 3):
        given = take(desk)
        assert given.attempt == attempt
        assert desk.abandon(given.token, "why", kind, "Traceback" if kind == "oom" else None)
    told = news(desk)
    assert [update.error_kind for update in told if update.kind in ("lost", "ended")] == [kind] * 3
    assert (told[-1].state, told[-1].text.startswith("Traceback")) == ("ERROR", kind == "oom")


def test_a_store_that_is_away_and_a_machine_that_is_taken_use_up_no_retry() -> None:
    desk = dispatcher(1, crash_retries=0)
    losses: tuple[Loss, ...] = ("store", "preempted") * 20
    for kind in losses:
        desk.abandon(take(desk).token, "gone", kind)
    assert take(desk).attempt == 41


def test_memory_that_a_trial_asked_for_itself_is_final_and_a_worker_that_was_ended_for_it_is_tried_again() -> None:
    """The kernel ends the largest process, which may be a neighbour's."""
    desk = dispatcher(2, crash_retries=1)
    desk.abandon(take(desk).token, "CUDA out of memory", "oom", "Traceback ...")
    ended = news(desk)[-1]
    assert (ended.state, ended.error_kind, ended.cause) == ("ERROR", "oom", "CUDA out of memory")
    for attempt in (1, 2):
        given = take(desk)
        assert (given.order.index, given.attempt) == (1, attempt)
        desk.struck(GANG, "oom", "the kernel ended it")
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"
    ended = news(desk)[-1]
    assert (ended.state, ended.error_kind, ended.cause) == ("ERROR", "oom", "out of memory")


def worker(gang: str, node: str, rank: int = 0, **more: Any) -> Worker:
    return Worker(
        gang=gang, rank=rank, world_size=2, pid=1, host=f"host-{node}", device_name="d", torch_version="2", node=node,
        **more,
    )  # fmt: skip


def test_a_gang_whose_machine_is_gone_gives_its_trial_to_another_at_once_and_its_late_words_are_refused() -> None:
    desk = dispatcher(1, crash_retries=0)
    for rank, node in enumerate("ab"):
        desk.join(worker(GANG, node, rank))
    old = take(desk)
    desk.struck(GANG, "crash", "rank 1 does not answer")  # before Ray knows why
    desk.nodes_lost(["b"])
    desk.nodes_lost(["b"])
    assert [(update.kind, update.error_kind) for update in news(desk)] == [("started", None), ("lost", "preempted")]
    given = take(desk, "gang-1")
    assert (given.order.index, given.attempt) == (0, 2)
    assert desk.report(old.token, [report(9)], "late") == "drop"
    assert not desk.finish(old.token, "late")
    assert not desk.fail(old.token, "late", "late")
    assert desk.report(given.token, [report(1)], None) == "go on"
    assert desk.finish(given.token)
    assert all(update.checkpoint != "late" for update in news(desk))


def test_a_gang_that_lost_a_worker_keeps_its_trial_for_a_while_and_then_another_has_it() -> None:
    now = 0.0
    desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=1), clock=lambda: now)
    desk.submit(0)
    take(desk)
    desk.struck(GANG, "crash", "a worker died")
    assert kinds(news(desk)) == [("started", 0, None)]
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"
    now = REFORM_S + 1
    assert kinds(news(desk))[-1] == ("lost", 0, None)
    assert take(desk, "gang-1").attempt == 2
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"  # the gang stands again, and has nothing


def test_a_crash_turns_out_to_have_been_a_machine_that_ray_had_not_missed_yet() -> None:
    desk = dispatcher(1, crash_retries=1)
    for _ in range(5):
        desk.join(worker(GANG, "a"))
        take(desk)
        desk.join(worker(GANG, "b"))  # it stands again elsewhere
        assert isinstance(asyncio.run(desk.next(GANG, 0.0)), Assignment)
        desk.nodes_lost(["a"])
        desk.nodes_lost(["a"])
    assert not any(update.kind == "ended" for update in news(desk))


@pytest.mark.parametrize("end", ["missed", "alive", "time", "cancelled"])
def test_a_crash_ends_no_trial_before_ray_would_have_missed_its_machine(end: str) -> None:
    """The gang of two machines stands again on one of them and a third, and Ray has not said yet that one is gone."""
    now = 0.0
    desk = Dispatcher(
        [order(0), order(1)], fence=1, retries=Retries(crash=0), missed_within_s=15.0, clock=lambda: now
    )  # fmt: skip
    desk.submit(0)
    for rank, node in enumerate("ab"):
        desk.join(worker(GANG, node, rank))
    take(desk)
    for rank, node in enumerate("ab" if end == "alive" else "cb"):
        desk.join(worker(GANG, node, rank))
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"
    now = 14.0
    told = news(desk)
    if end == "alive":  # where it stands again, nothing can be missed
        assert (kinds(told)[-1], told[-1].error_kind) == (("ended", 0, "ERROR"), "crash")
        return
    assert (kinds(told), desk.in_hand()) == ([("started", 0, None)], 0)
    desk.submit(1)
    assert take(desk).order.index == 1  # the gang goes on meanwhile
    desk.nodes_lost(["a" if end == "missed" else "z"])
    if end == "missed":
        assert [update.error_kind for update in news(desk) if update.kind == "lost"] == ["preempted"]
        assert take(desk, "gang-1").order.index == 0
    if end == "cancelled":
        desk.cancel([0], "by somebody")
    now = 16.0
    ends = [(update.index, update.state, update.error_kind) for update in news(desk) if update.kind == "ended"]
    assert ends == {"missed": [], "time": [(0, "ERROR", "crash")], "cancelled": [(0, "CANCELLED", None)]}[end]


def test_a_gang_that_is_to_lose_its_machine_saves_gives_back_and_leaves_and_no_retry_is_used_up() -> None:
    desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0, preempted=0))
    desk.submit(0)
    token = take(desk).token
    assert desk.report(token, [report(1)], None) == "go on"
    desk.warned(GANG)
    assert desk.report(token, [], "key") == "save"
    assert desk.give_back(token, "key")
    assert asyncio.run(desk.next(GANG, 0.0)) == "leave"
    lost = news(desk)[-1]
    assert (lost.kind, lost.error_kind, lost.checkpoint) == ("lost", "preempted", "key")
    assert desk.report(token, [report(2)], None) == "drop"
    given = take(desk, "gang-1")
    assert (given.attempt, given.order.checkpoint) == (2, "key")
    assert desk.report(given.token, [report(2)], None) == "go on"


def test_a_gang_that_was_warned_and_died_before_it_had_saved_was_preempted() -> None:
    desk = dispatcher(1, crash_retries=0)
    take(desk)
    desk.warned(GANG)
    desk.struck(GANG, "crash", "gone")
    desk.gang_ended(GANG, "gone")
    assert [update.error_kind for update in news(desk) if update.kind == "lost"] == ["preempted"]
    assert take(desk, "gang-1").attempt == 2


def test_idle_gangs_are_counted_and_only_they_can_be_sent_home() -> None:
    now = 0.0
    desk = Dispatcher([order(0), replace(order(1), held_back=True)], fence=1, retries=Retries(), clock=lambda: now)
    desk.submit(0)
    desk.submit(1)
    for gang in (GANG, "gang-1"):
        desk.join(replace(worker(gang, "a"), gang=gang))
    assert desk.roll() == Roll(queued=1, in_hand=0, standing={GANG: None, "gang-1": None})
    take(desk)
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"
    now = 70.0
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"
    assert desk.roll() == Roll(queued=0, in_hand=1, standing={GANG: None, "gang-1": 70.0})
    desk.dismiss([GANG, "gang-1"])
    assert asyncio.run(desk.next("gang-1", 0.0)) == "leave"
    desk.gang_ended("gang-1", "it was sent home")
    assert take(desk).attempt == 2  # it was at work, and stays
    assert "gang-1" not in desk.roll().standing
    desk.pause()
    assert desk.roll().queued == 0


@pytest.mark.parametrize(
    ("before", "after", "dead", "kind"),
    [({"oom_kills": 3}, {"oom_kills": 4}, (), "oom"), ({"oom_kills": 3}, {"oom_kills": 3}, (), "crash"),
     ({}, {}, ("a",), "preempted"), ({}, {}, ("z",), "crash")],
)  # fmt: skip
def test_what_a_worker_died_of_is_told_when_its_gang_stands_again(
    before: dict[str, int], after: dict[str, int], dead: tuple[str, ...], kind: str
) -> None:
    desk = dispatcher(1)
    desk.join(worker(GANG, "a", **before))
    take(desk)
    desk.join(worker(GANG, "a", **after), dead)
    assert take(desk).attempt == 2
    assert [update.error_kind for update in news(desk) if update.kind == "lost"] == [kind]


def test_a_trial_submitted_twice_is_trained_once() -> None:
    desk = dispatcher(1)
    desk.submit(0)
    take(desk, "gang-0")
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"


def test_an_offer_ends_when_nobody_trains_any_more() -> None:
    """Else Tune's thread would still wait when Ray goes down."""

    async def scenario() -> None:
        desk = Dispatcher([order(0), order(1)], fence=1, retries=Retries(crash=0))
        offered = asyncio.create_task(desk.offer([0, 1]))
        assert isinstance(await desk.next(GANG, 10.0), Assignment)
        assert not offered.done()
        desk.close()
        await asyncio.wait_for(offered, 10)
        await asyncio.wait_for(desk.offer([1]), 10)

    run(scenario())


def test_a_gang_that_drops_its_trial_since_all_is_over_has_not_crashed() -> None:
    desk = dispatcher(1, crash_retries=0)
    token = take(desk).token
    desk.accept(token)
    desk.close()
    assert desk.report(token, [report(1)], "key") == "drop"
    assert asyncio.run(desk.next(GANG, 0.0)) == "leave"
    desk.gang_ended(GANG, "it was sent home")
    assert [update.kind for update in news(desk)] == ["started", "epochs", "gang"]


def test_a_closed_dispatcher_takes_a_last_report_and_sends_the_gang_away() -> None:
    desk = dispatcher(1)
    token = take(desk).token
    desk.close()
    assert desk.report(token, [report(1)], None) == "drop"
    assert [update.kind for update in news(desk)] == ["started", "epochs"]


def test_updates_are_told_until_they_are_acknowledged() -> None:
    desk = dispatcher(2)
    take(desk, "gang-0")
    take(desk, "gang-1")
    assert [update.seq for update in news(desk, 0)] == [1, 2]
    assert [update.seq for update in news(desk, 0)] == [1, 2]
    assert [update.seq for update in news(desk, 1)] == [2]
    assert news(desk, 2) == []


def test_started_says_where_and_on_what() -> None:
    desk = dispatcher(1)
    for rank, host in enumerate(("b", "a")):
        worker = Worker(gang=GANG, rank=rank, world_size=2, pid=1, host=host, device_name=f"d{rank}", torch_version="2")
        desk.join(worker)
    take(desk)
    (started,) = news(desk)
    assert (started.hosts, started.device_name, started.torch_version) == (("a", "b"), "d0", "2")


def test_a_paused_dispatcher_has_trials_saved_and_hands_them_out_first_when_it_goes_on() -> None:
    desk = dispatcher(3)
    token = take(desk).token
    assert desk.report(token, [report(1)], None) == "go on"
    desk.pause()
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"
    assert desk.report(token, [report(2)], None) == "save"
    assert desk.give_back(token, "key")
    assert not desk.give_back(token, "key")
    assert desk.report(token, [report(3)], None) == "drop"
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"
    paused = news(desk)[-1]
    assert (paused.kind, paused.index, paused.checkpoint) == ("paused", 0, "key")
    desk.resume()
    given = [take(desk, f"gang-{i}") for i in range(3)]
    assert [(each.order.index, each.attempt) for each in given] == [(0, 2), (1, 1), (2, 1)]
    assert desk.report(given[0].token, [report(3)], None) == "go on"


def test_a_trial_that_finishes_while_the_others_are_saved_has_finished() -> None:
    desk = dispatcher(1)
    token = take(desk).token
    desk.pause()
    assert desk.report(token, [report(1)], None) == "save"
    assert desk.finish(token)  # it was its last epoch
    assert kinds(news(desk))[-1] == ("ended", 0, "TERMINATED")


def test_a_cancelled_trial_is_over_at_once_and_its_gang_hears_of_it() -> None:
    desk = dispatcher(3)
    token = take(desk).token
    desk.cancel([0, 1], "cancelled by ada@lab")
    desk.cancel([0, 1], "again")
    assert [(update.index, update.state, update.cause) for update in news(desk)[1:]] == [
        (0, "CANCELLED", "cancelled by ada@lab"), (1, "CANCELLED", "cancelled by ada@lab"),
    ]  # fmt: skip
    assert desk.report(token, [report(1)], "key") == "drop"
    assert not desk.finish(token)
    assert take(desk).order.index == 2


def test_a_trial_that_is_cancelled_before_tune_wants_it_is_not_queued_by_it() -> None:
    desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0))
    desk.cancel([0], "no")
    desk.submit(0)
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"


def test_a_trial_that_has_ended_is_queued_again_with_all_its_crashes_forgiven() -> None:
    desk = dispatcher(2, crash_retries=0)
    take(desk)
    take(desk, "gang-1")
    desk.gang_ended(GANG, "gone")
    assert kinds(news(desk))[-2] == ("ended", 0, "ERROR")
    desk.retry([order(0), order(1)], "asked by ada@lab")  # the second is in hand, and stays there
    desk.submit(0)
    again = take(desk)
    assert (again.order.index, again.attempt) == (0, 2)
    assert asyncio.run(desk.next("gang-2", 0.0)) == "wait"
    assert desk.finish(again.token)
    assert [update.kind for update in news(desk) if update.index == 0] == [
        "started", "ended", "retried", "started", "ended",
    ]  # fmt: skip


def test_a_trial_of_an_earlier_run_is_queued_by_asking_for_it_again() -> None:
    desk = dispatcher(1)
    desk.retry([order(7, attempts=2)], "asked by ada@lab")
    assert [(take(desk, f"gang-{i}").order.index, desk.in_hand()) for i in range(2)] == [(0, 1), (7, 2)]
    assert news(desk)[-1].attempt == 3


def test_a_trial_that_is_held_back_waits_for_its_release_or_is_withdrawn() -> None:
    desk = Dispatcher([order(0), order(1), order(2)], fence=1, retries=Retries(crash=0))
    desk.hold_back([0, 1])
    for index in range(3):
        desk.submit(index)
    assert take(desk, "gang-2").order.index == 2
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"
    desk.withdraw([0, 2], "from another")  # the third is in hand
    assert kinds(news(desk))[-1] == ("withdrawn", 0, None)
    desk.release([0, 1])
    assert take(desk).order.index == 1
    assert asyncio.run(desk.next("gang-1", 0.0)) == "wait"


def test_an_order_may_be_held_back_from_the_beginning_and_released_past_tune() -> None:
    desk = Dispatcher([replace(order(0), held_back=True)], fence=1, retries=Retries(crash=0))
    assert asyncio.run(desk.next(GANG, 0.0)) == "wait"
    desk.release([0])
    assert take(desk).order.index == 0


def test_gangs_that_wait_are_idle() -> None:
    async def scenario() -> list[int]:
        desk = Dispatcher([order(0)], fence=1, retries=Retries(crash=0))
        counts = [desk.idle()]
        waiting = [asyncio.create_task(desk.next(gang, 60.0)) for gang in (GANG, GANG, "gang-1")]
        await asyncio.sleep(0)
        counts.append(desk.idle())
        desk.submit(0)
        await asyncio.sleep(0.01)
        counts.append(desk.idle())
        desk.close()
        await asyncio.gather(*waiting)
        return [*counts, desk.idle()]

    assert run(scenario()) == [0, 2, 1, 0]


class Fleet(RuleBasedStateMachine):
    """Gangs that take, report, finish, fail, crash and vanish in any order lose no trial and end none twice."""

    TRIALS, RETRIES = 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.desk = dispatcher(self.TRIALS, crash_retries=self.RETRIES)
        self.held: dict[str, Assignment] = {}
        self.dead: list[str] = []
        self.paused = False

    @rule(gang=st.sampled_from(["gang-0", "gang-1", "gang-2"]))
    def ask(self, gang: str) -> None:
        if gang in self.held:
            self.dead.append(self.held.pop(gang).token)
        given = asyncio.run(self.desk.next(gang, 0.0))
        if isinstance(given, Assignment):
            self.held[gang] = given

    @precondition(lambda self: self.held)
    @rule(data=st.data(), end=st.sampled_from(["report", "finish", "fail", "abandon"]))
    def speak(self, data: st.DataObject, end: str) -> None:
        gang = data.draw(st.sampled_from(sorted(self.held)))
        token = self.held[gang].token
        if end == "report":
            assert self.desk.report(token, [report(1)], None) == ("save" if self.paused else "go on")
            return
        del self.held[gang]
        self.dead.append(token)
        calls = {"finish": (), "fail": ("traceback", "cause"), "abandon": ("lost", "crash")}
        assert getattr(self.desk, end)(token, *calls[end])

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def speak_too_late(self, data: st.DataObject) -> None:
        assert not self.desk.finish(data.draw(st.sampled_from(self.dead)))

    @rule(index=st.integers(0, TRIALS - 1))
    def cancel(self, index: int) -> None:
        self.desk.cancel([index], "cancelled")
        for gang in [gang for gang, holds in self.held.items() if holds.order.index == index]:
            self.dead.append(self.held.pop(gang).token)

    @rule(index=st.integers(0, TRIALS - 1))
    def retry(self, index: int) -> None:
        self.desk.retry([order(index)], "again")

    @rule(index=st.integers(0, TRIALS - 1), act=st.sampled_from(["hold_back", "release"]))
    def hold_or_release(self, index: int, act: str) -> None:
        getattr(self.desk, act)([index])

    @rule(index=st.integers(0, TRIALS - 1))
    def withdraw(self, index: int) -> None:
        self.desk.withdraw([index], "from another")

    @rule(paused=st.booleans())
    def pause_or_resume(self, paused: bool) -> None:
        self.paused = paused
        self.desk.pause() if paused else self.desk.resume()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        token = self.held.pop(data.draw(st.sampled_from(sorted(self.held)))).token
        self.dead.append(token)
        assert self.desk.give_back(token, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        gang = data.draw(st.sampled_from(sorted(self.held)))
        self.dead.append(self.held.pop(gang).token)
        self.desk.gang_ended(gang, "gone")

    @invariant()
    def every_trial_is_in_one_place(self) -> None:
        ended: set[int | None] = set()
        for update in news(self.desk):
            if update.kind == "retried":
                ended.remove(update.index)
            elif update.kind in ("ended", "withdrawn"):
                assert update.index not in ended
                ended.add(update.index)
            else:
                assert update.index not in ended  # what has ended says nothing more
        in_hand = [assignment.order.index for assignment in self.held.values()]
        assert len(in_hand) == len(set(in_hand)) == self.desk.in_hand()
        assert not ended & set(in_hand)

    def teardown(self) -> None:
        """Whatever happened, gangs that behave now end every trial."""
        self.desk.resume()
        self.desk.release(range(self.TRIALS))
        for gang in sorted(self.held):
            assert self.desk.finish(self.held[gang].token)
        while isinstance(given := asyncio.run(self.desk.next("gang-9", 0.0)), Assignment):
            assert self.desk.finish(given.token)
        ended = {update.index for update in news(self.desk) if update.kind in ("ended", "withdrawn")}
        assert ended == set(range(self.TRIALS))
        assert self.desk.in_hand() == 0


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(crashes=st.integers(0, 6), retries=st.integers(0, 4))
def test_attempts_are_one_more_than_the_crashes_that_were_forgiven(crashes: int, retries: int) -> None:
    desk = dispatcher(1, crash_retries=retries)
    given = asyncio.run(desk.next(GANG, 0.0))
    for _ in range(crashes):
        if isinstance(given, Assignment):
            desk.accept(given.token)
        given = asyncio.run(desk.next(GANG, 0.0))
    if crashes <= retries:
        assert isinstance(given, Assignment)
        assert given.attempt == crashes + 1
    else:
        assert given == "wait"
        assert news(desk)[-1].state == "ERROR"


@pytest.mark.parametrize("call", ["report", "finish", "fail", "abandon"])
def test_a_token_that_was_never_given_is_refused(call: str) -> None:
    arguments = {"report": ([report(1)], None), "finish": (), "fail": ("t", "c"), "abandon": ("w", "crash")}[call]
    assert getattr(dispatcher(1), call)("no-such-token", *arguments) in (False, "drop")
