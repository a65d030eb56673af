"""Early stopping: the rules against Ray Tune's own, and a sweep under them that is killed and goes on."""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Mixmo
from hypothesis import given
from hypothesis import strategies as st
from made_engine import Killing, Pace, Threads

from orchestrator import driver, plan
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import Order
from orchestrator.stopping import Halving, Judge, Median, Rule, judge_of
from orchestrator.store import ResultStore, SweepWriter

# --------------------------------------------------------------------------------------------- the rules against Tune's

LONGEST = 20
RESULTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3000)), max_size=80)
"""Which trial comes one epoch further, and what it reaches, in thousandths."""


class OfTune:
    """One of Tune's schedulers as a rule: it is shown trials that have no more than a name."""

    class Named:
        def __init__(self, trial_id: str) -> None:
            self.trial_id = trial_id

    class Empty:
        """A controller in whose queue nothing waits."""

        def get_live_trials(self) -> list[Any]:
            return []

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.trials: dict[int, OfTune.Named] = {}

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        if trial not in self.trials:
            self.trials[trial] = self.Named(str(trial))
            self.scheduler.on_trial_add(self.Empty(), self.trials[trial])
        result = {"training_iteration": epoch, "top1": value}
        return bool(self.scheduler.on_trial_result(self.Empty(), self.trials[trial], result) == "STOP")


def in_step(ours: Rule, theirs: OfTune, results: list[tuple[int, int]], *, every: int) -> list[tuple[int, int]]:
    """Feed both, with a value every so many epochs, until each trial is stopped or at its end. Who stopped, when."""
    epochs, stopped = dict[int, int](), list[tuple[int, int]]()
    for trial, thousandths in results:
        epoch = epochs[trial] = epochs.get(trial, 0) + every
        if epoch >= LONGEST or trial in [each for each, _ in stopped]:
            continue
        value = thousandths / 1000
        bar = ours.verdict(trial, epoch, value)
        ours.record(trial, epoch, value)
        assert (bar is not None) == theirs.stops(trial, epoch, value), (trial, epoch, value, bar)
        assert bar is None or value < bar.needed
        if bar is not None:
            stopped.append((trial, epoch))
    return stopped


@given(results=RESULTS, grace=st.integers(1, 4), factor=st.sampled_from([1.5, 2, 3, 4]), every=st.integers(1, 3))
def test_halving_stops_whom_tunes_asha_stops(
    results: list[tuple[int, int]], grace: int, factor: float, every: int
) -> None:
    from ray.tune.schedulers import ASHAScheduler

    theirs = ASHAScheduler(metric="top1", mode="max", max_t=LONGEST, grace_period=grace, reduction_factor=factor,
                           stop_last_trials=False)  # fmt: skip
    in_step(Halving(grace=grace, factor=factor, epochs=LONGEST), OfTune(theirs), results, every=every)


@given(results=RESULTS, grace=st.integers(1, 4), least=st.integers(1, 3), every=st.integers(1, 3))
def test_median_stops_whom_tunes_rule_stops(results: list[tuple[int, int]], grace: int, least: int, every: int) -> None:
    from ray.tune.schedulers import MedianStoppingRule

    theirs = MedianStoppingRule(time_attr="training_iteration", metric="top1", mode="max", grace_period=grace,
                                min_samples_required=least)  # fmt: skip
    in_step(Median(grace=grace, least=least), OfTune(theirs), results, every=every)


def test_rungs_lie_before_the_end() -> None:
    assert Halving(grace=1, factor=3, epochs=27)._rungs == [1, 3, 9]
    assert Halving(grace=1, factor=3, epochs=28)._rungs == [1, 3, 9, 27]
    assert Halving(grace=5, factor=2, epochs=5)._rungs == [5]


def test_one_in_four_goes_on_at_a_rung() -> None:
    rule = Halving(grace=1, factor=4, epochs=100)
    for trial in range(8):
        rule.record(trial, 1, trial / 10)
    assert rule.verdict(8, 1, 0.5) is not None
    assert rule.verdict(8, 1, 0.6) is None


# ------------------------------------------------------------------------------------------------------------ the judge


def judge(rule: Callable[[], Rule], sign: Any = 1, epochs: int = LONGEST) -> Judge:
    made = Judge(rule, method="asha", metric="top1", sign=sign)
    for trial in range(6):
        made.add(trial, {"optim.epochs": epochs})
    return made


RULES: dict[str, Callable[[], Rule]] = {
    "asha": partial(Halving, grace=1, factor=2, epochs=LONGEST),
    "median": partial(Median, grace=1, least=2),
}


def decisions(under: Judge, results: list[tuple[int, int]], epochs: dict[int, int]) -> list[str | None]:
    told = []
    for trial, thousandths in results:
        epochs[trial] = epochs.get(trial, 0) + 1
        told.append(under.decide(trial, epochs[trial], {"top1": thousandths / 1000})
                    if epochs[trial] <= LONGEST else None)  # fmt: skip
    return told


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(results=RESULTS, data=st.data())
def test_a_judge_to_whom_a_history_is_told_again_decides_as_the_one_that_lived_through_it(
    rule: Callable[[], Rule], results: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole, epochs = judge(rule), dict[int, int]()
    cut = data.draw(st.integers(0, len(results)), label="killed after")
    decisions(whole, results[:cut], epochs)
    seen = dict[int, int]()
    history = []
    for trial, thousandths in results[:cut]:
        seen[trial] = seen.get(trial, 0) + 1
        if seen[trial] <= LONGEST:
            history.append((trial, seen[trial], {"top1": thousandths / 1000}))
    # A resumed trial's rows come with later numbers: only each trial's own order is sure.
    late = data.draw(st.sets(st.integers(0, 5)), label="resumed")
    history.sort(key=lambda result: result[0] in late)
    fresh = judge(rule)
    for result in history:
        fresh.replay(*result)
    fresh = pickle.loads(pickle.dumps(fresh))  # as Ray hands it to the dispatcher
    assert decisions(fresh, results[cut:], dict(epochs)) == decisions(whole, results[cut:], dict(epochs))


def test_within_a_setting_trials_are_compared_with_their_own_kind_only() -> None:
    under = judge_of(sweeps.parse(
        SWEEP.format(scheduler="{method: asha, reduction_factor: 2, within: [model.width, mixing.method]}")
        + "blocks: [{grid: {model.width: [1, 2], mixing.method: [sum, cutmix]}}]", source="x.yaml",
    ))  # fmt: skip
    assert under is not None
    assert under.decide(0, 1, {"top1": 0.9}) is None  # of width 1; with one subnetwork there is no mixing to differ in
    assert under.decide(1, 1, {"top1": 0.5}) is None  # of width 2
    assert under.decide(2, 1, {"top1": 0.5}) is not None  # with another seed, of width 1
    assert under.decide(3, 1, {"top1": 0.5}) is None


@pytest.mark.parametrize(("sign", "better"), [(1, 0.9), (-1, 0.1)])
def test_less_is_better_where_the_metric_says_so(sign: int, better: float) -> None:
    under = judge(RULES["asha"], sign)
    assert under.decide(0, 1, {"top1": 0.5}) is None
    assert under.decide(1, 1, {"top1": better}) is None
    told = under.decide(2, 1, {"top1": 1 - better})
    side = "below" if sign > 0 else "above"
    assert (
        told
        == f"asha: top1 {1 - better:.4g} at epoch 1, {side} {0.7 if sign > 0 else 0.3}: rung 1 of 5, after 2 trials"
    )


@pytest.mark.parametrize("metrics", [{}, {"top1": None}, {"top1": math.nan}, {"loss": 0.1}])
def test_an_epoch_without_the_metric_decides_nothing(metrics: dict[str, float | None]) -> None:
    under = judge(RULES["asha"])
    assert [under.decide(trial, 1, {"top1": 0.9}) for trial in range(3)] == [None] * 3
    assert under.decide(3, 1, metrics) is None
    assert under.decide(3, 2, {"top1": 0.1}) is None  # the first there
    assert "after 3 trials" in (under.decide(4, 1, {"top1": 0.1}) or "")  # and that one is not among them


# ------------------------------------------------------------------------------------------- whole sweeps, over threads

SWEEP = """
name: made
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: 9, lr: 0.1}}
  evaluate: {{split: validation}}
seeds: 8
resources: {{gpus_per_worker: 0}}
scheduler: {scheduler}
"""
ASHA = "{method: asha, metric: top1, reduction_factor: 2}"
MEDIAN = "{method: median, metric: loss, min_trials: 2}"


def sweep_of(scheduler: str = ASHA) -> sweeps.Sweep:
    return sweeps.parse(SWEEP.format(scheduler=scheduler), source="x.yaml")


def killed(store: ResultStore, scheduler: str, epochs: int) -> None:
    """Run the sweep in a process of its own that is killed after so many epochs."""
    code = "import sys, test_stopping; test_stopping.live(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    done = subprocess.run([sys.executable, "-c", code, store.uri, scheduler, str(epochs)], cwd=Path(__file__).parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 9, done.stdout + done.stderr


def live(uri: str, scheduler: str, epochs: int) -> None:
    flush = SweepWriter.flush
    SweepWriter.flush = lambda self, *, force=False: flush(self, force=True)  # type: ignore[method-assign]
    store = ResultStore.open(uri, create=True)
    pace = Killing(epochs, lambda: any(row.epoch for row in store.trial_rows("made")))
    driver.run(sweep_of(scheduler), store, engine=Threads(pace, gangs=1).engine)


def outcome(store: ResultStore) -> list[tuple[str, str, int, bool, str | None]]:
    return [(row.trial_id, row.state, row.epoch, row.stopped_early, row.error_cause)
            for row in store.trial_rows("made")]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str, int, bool, str | None]]]:
    """By scheduler, with one gang: so results come in one order."""
    found = {}
    for name, scheduler in (("asha", ASHA), ("median", MEDIAN)):
        store = ResultStore.open(str(tmp_path_factory.mktemp(name)), create=True)
        assert driver.run(sweep_of(scheduler), store, engine=Threads(gangs=1).engine, talk=lambda _: None) == 0
        found[name] = outcome(store)
    return found


def test_a_trial_that_is_stopped_is_final_and_keeps_rows_and_checkpoint(
    undisturbed: dict[str, list[tuple[str, str, int, bool, str | None]]], tmp_path: Path
) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    driver.run(sweep_of(), store, engine=Threads(gangs=1).engine, talk=lambda _: None)
    rows = store.trial_rows("made")
    stopped = [row for row in rows if row.stopped_early]
    assert 0 < len(stopped) < len(rows)
    for row in rows:
        assert row.state == "TERMINATED"
        assert [each.epoch for each in store.epoch_rows("made", row.trial_id)] == [*range(1, row.epoch + 1)]
        if row.stopped_early:
            assert (row.epoch < row.epochs, row.epoch in (1, 2, 4, 8)) == (True, True)
            assert str(row.error_cause).startswith(f"asha: top1 {row.metrics['top1']:.4g} at epoch {row.epoch}, below ")
            assert f"epoch-{row.epoch:05d}-" in str(row.checkpoint)
        else:
            assert (row.epoch, row.error_cause) == (row.epochs, None)
    told = [(event.trial_id, event.text) for event in store.events("made") if event.kind == "stopped"]
    assert sorted(told) == sorted((row.trial_id, row.error_cause) for row in stopped)
    assert store.verify("made") == []
    said: list[str] = []
    assert driver.run(sweep_of(), store, engine=Threads(gangs=1).engine, talk=said.append) == 0
    assert said == ["made: nothing to run, all 8 trials have ended"]


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "epochs"), [("asha", 3), ("asha", 20), ("median", 11)])
def test_a_sweep_that_is_killed_and_goes_on_stops_the_same_trials_at_the_same_epochs(
    undisturbed: dict[str, list[tuple[str, str, int, bool, str | None]]], tmp_path: Path, scheduler: str, epochs: int
) -> None:
    store, file = ResultStore.open(str(tmp_path), create=True), {"asha": ASHA, "median": MEDIAN}[scheduler]
    killed(store, file, epochs)
    left = sum(row.epoch for row in store.trial_rows("made"))
    assert left, "it was killed before anything was written"
    driver.run(sweep_of(file), store, engine=Threads(gangs=1).engine, talk=lambda _: None)
    assert outcome(store) == undisturbed[scheduler]


def test_a_trial_whose_driver_was_killed_before_its_end_was_written_ends_without_training(tmp_path: Path) -> None:
    store, sweep = ResultStore.open(str(tmp_path), create=True), sweep_of()
    why = "asha: top1 0.1 at epoch 2, below 0.5: rung 2 of 4, after 3 trials"
    with store.writer("made", sweep_text=sweep.text) as writer:
        rows = [plan.initial_row(trial, sweep) for trial in sweep.trials]
        decided = rows[5].replace(state="RUNNING", epoch=2, attempts=1, stopped_early=True, error_cause=why)
        writer.put([*rows[:5], decided, *rows[6:]])
    begun: list[int] = []

    class Watching(Pace):
        def epoch(self, order: Order, epoch: int) -> None:
            begun.append(order.index)

    driver.run(sweep, store, engine=Threads(Watching()).engine, talk=lambda _: None)
    row = store.trial_rows("made")[5]
    assert (row.state, row.stopped_early, row.epoch, row.attempts, row.error_cause) == ("TERMINATED", True, 2, 1, why)
    assert 5 not in begun


def test_without_its_scheduler_a_stopped_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    driver.run(sweep_of(), store, engine=Threads(gangs=1).engine, talk=lambda _: None)
    before = sum(row.epoch for row in store.trial_rows("made"))
    begun: list[int] = []

    class Watching(Pace):
        def epoch(self, order: Order, epoch: int) -> None:
            begun.append(epoch)

    driver.run(sweep_of("{method: none}"), store, engine=Threads(Watching()).engine, talk=lambda _: None)
    rows = store.trial_rows("made")
    assert {(row.state, row.epoch, row.stopped_early, row.error_cause) for row in rows} == {
        ("TERMINATED", 9, False, None)
    }  # fmt: skip
    assert len(begun) == 8 * 9 - before


def test_every_trial_goes_to_its_end_where_there_is_no_scheduler() -> None:
    assert judge_of(sweep_of("{method: none}")) is None


# -------------------------------------------------------------------------------------------------------------- on Ray

ON_RAY = """
name: small
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 4, warmup: 0}
blocks:
  - label: learns
    grid: {optim.lr: [0.1, 0.08, 0.06]}
  - label: learns nothing
    grid: {optim.lr: [1.0e-7, 2.0e-7, 3.0e-7]}
resources: {gpus_per_worker: 0}
scheduler: {method: asha, metric: nll, reduction_factor: 2}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_asha_stops_trials_on_ray_and_all_commands_say_so(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, ON_RAY)
    mixmo("run", "sweep.yaml")
    rows = mixmo.rows()
    assert {(row.state, row.split, row.attempts) for row in rows} == {("TERMINATED", "validation", 1)}
    stopped = {row.label for row in rows if row.stopped_early}
    assert "learns nothing" in stopped
    assert not all(row.stopped_early for row in rows)
    assert all(row.stopped_early and row.epoch < 4 for row in rows if row.label == "learns nothing")
    store = ResultStore.open(tmp_path / "results")
    for row in rows:
        assert len(store.epoch_rows("small", row.trial_id)) == row.epoch
        assert store.checkpoints(row.trial_id, row.checkpoint)[0] == row.checkpoint
        assert row.stopped_early == (row.error_cause is not None) == (row.logits is None)
    count = sum(row.stopped_early for row in rows)
    assert f"without {count} trials that a scheduler stopped early" in mixmo("table", "small").stdout
    assert f"{count} stopped early" in mixmo("status", "small").stdout
    assert mixmo("verify", "small").returncode == 0
    again = mixmo("run", "sweep.yaml").stderr
    assert "nothing to run, all 6 trials have ended" in again
