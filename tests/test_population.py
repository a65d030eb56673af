"""Population based training: its rule against Ray Tune's own, and sweeps under it that are killed and go on."""

import functools
import hashlib
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from command_line import Mixmo
from hypothesis import given
from hypothesis import strategies as st
from made_engine import Killing, MadeGang, Pace, Threads

from mixmo_core.config import trial_id
from orchestrator import driver, pages, plan
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import EpochReport, Order
from orchestrator.errors import ExitCode
from orchestrator.population import Population, Step, copies_of, needed_by, quantiles, settings_of, steps_of
from orchestrator.rows import TrialRow
from orchestrator.store import ResultStore, SweepWriter

SWEEP = """
name: made
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: {epochs}}}
blocks: [{{grid: {{optim.lr: {lr}}}}}]
seeds: {seeds}
resources: {{gpus_per_worker: 0}}
scheduler:
  method: pbt
  interval_epochs: 2
  mutations:
    optim.lr: {{min: 0.001, max: 10, scale: log}}
    optim.weight_decay: {{choices: [0.0001, 0.0006, 0.001]}}
{more}
"""


@functools.cache
def sweep_of(more: str = "", *, epochs: int = 9, lr: str = "[0.0001, 0.01, 0.1]", seeds: int = 2) -> sweeps.Sweep:
    return sweeps.parse(SWEEP.format(more=more, epochs=epochs, lr=lr, seeds=seeds), source="x.yaml")


# ---------------------------------------------------------------------------------------------- the rule against Tune's

RESULTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=120)
"""Which trial comes one epoch further, and what it reaches."""


LONGEST = 1000


class OfTune:
    """Tune's scheduler, and all that it looks at of Tune: trials that have no more than a name, all of them running."""

    class Named:
        def __init__(self, name: int) -> None:
            self.trial_id, self.status, self.experiment_tag = str(name), "RUNNING", ""
            self.config: dict[str, Any] = {"lr": 0.1}
            self.checkpoint_config = SimpleNamespace(num_to_keep=None)
            self.run_metadata = SimpleNamespace(checkpoint_manager=self)
            self.temporary_state, self.checkpoint = SimpleNamespace(saving_to=None), "a checkpoint"

        def is_finished(self) -> bool:
            return self.status == "TERMINATED"

        def set_experiment_tag(self, tag: str) -> None:
            """Of no account here."""

        def set_config(self, config: dict[str, Any]) -> None:
            self.config = config

    def __init__(self, **rule: Any) -> None:
        from ray.tune.schedulers import PopulationBasedTraining

        self.parent: int | None = None
        self.copied: list[tuple[int, int]] = []
        self.search_alg, self.trials = None, [self.Named(each) for each in range(6)]
        self.scheduler = PopulationBasedTraining(
            time_attr="training_iteration", metric="top1", mode="max", log_config=False,
                                 hyperparam_mutations={"lr": [0.1, 0.2]}, **rule)  # fmt: skip
        self._exploit = self.scheduler._exploit
        self.scheduler._exploit = self._told
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)

    def _told(self, controller: Any, trial: Any, parent: Any) -> None:
        self.parent = int(parent.trial_id)
        self.copied.append((int(trial.trial_id), self.parent))
        self._exploit(controller, trial, parent)

    def get_trials(self) -> list[Any]:
        return self.trials

    def pause_trial(self, trial: Any, should_checkpoint: bool = True) -> None:
        """It has been told."""

    def _schedule_trial_save(self, trial: Any, result: Any = None) -> str:
        return "a checkpoint"

    def get_live_trials(self) -> list[Any]:
        return [trial for trial in self.trials if not trial.is_finished()]

    def round(
        self, order: list[int], epoch: int, values: list[int], chances: dict[int, float]
    ) -> list[tuple[int, int]]:  # fmt: skip
        """All trials come to this epoch, and wait. Who is made a copy of whom."""
        self.copied = []
        left = [chances[trial] for trial in sorted(order, key=lambda trial: (values[trial], trial))]

        def chosen(some: list[Any]) -> Any:
            return some[int(left.pop(0) * len(some))] if isinstance(some[0], self.Named) else some[0]

        with mock.patch("random.choice", chosen):
            for trial in order:
                result = {"training_iteration": epoch, "top1": values[trial] / 100}
                self.scheduler.on_trial_result(self, self.trials[trial], result)
                self.trials[trial].status = "PAUSED"
        for trial in self.get_live_trials():
            trial.status = "RUNNING"
        return self.copied

    def compare(self, trial: int, epoch: int, value: float, chance: float) -> tuple[int | None, bool]:
        """Whom the trial is made a copy of, and whether it may be copied itself. `chance` chooses among the best."""
        self.parent = None
        with mock.patch("random.choice", lambda best: best[int(chance * len(best))]):  # whose values are of no account
            self.scheduler.on_trial_result(self, self.trials[trial], {"training_iteration": epoch, "top1": value})
        return self.parent, self.scheduler._trial_state[self.trials[trial]].last_checkpoint is not None


@given(results=RESULTS, interval=st.integers(1, 4), grace=st.integers(1, 6), fraction=st.sampled_from([0.1, 0.25, 0.5]))
def test_a_trial_is_made_a_copy_of_whom_tunes_pbt_makes_it_a_copy(
    results: list[tuple[int, int]], interval: int, grace: int, fraction: float
) -> None:
    sweep = sweep_of(epochs=LONGEST)
    rule: Any = {"interval_epochs": interval, "grace_epochs": grace, "quantile_fraction": fraction}
    ours = made(replace(sweep, scheduler=replace(sweep.scheduler, **rule)))
    theirs = OfTune(perturbation_interval=interval, burn_in_period=grace, quantile_fraction=fraction)
    names = {member.trial.trial_id: trial for trial, member in ours._members.items()}
    epochs, told = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0)
    for trial, hundredths in results:
        told[trial] += 1
        if told[trial] > 20:
            ours.close(trial)
            theirs.trials[trial].status = "TERMINATED"
            continue
        epoch = epochs[trial] = epochs[trial] + 1
        chance = ours._chance(ours._members[trial], epoch, "parent")
        step = ours.compare(trial, epoch, {"top1": hundredths / 100}, checkpoint(trial, epoch))
        parent, is_best = theirs.compare(trial, epoch, hundredths / 100, chance)
        if step is None:
            assert parent is None
            continue
        assert (step.copy and names[step.copy.parent_id]) == parent
        assert (step.checkpoint is not None) == is_best
        if step.copy:
            epochs[trial] = step.copy.epoch
            assert ours.line(trial).compared_at == epochs[trial]


@given(
    rounds=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), max_size=8),
    orders=st.lists(st.permutations(range(6)), min_size=8, max_size=8),
    fraction=st.sampled_from([0.1, 0.25, 0.5]), grace=st.integers(1, 3), ends=st.sampled_from([None, 0, 5]),
)  # fmt: skip
def test_trials_that_wait_for_one_another_are_made_copies_of_whom_tunes_synchronous_pbt_makes_them_copies(
    rounds: list[list[int]], orders: list[list[int]], fraction: float, grace: int, ends: int | None
) -> None:
    """All come to each milestone in some order; `ends` is one that is out of it after the first."""
    sweep = sweep_of("  synchronous: true", epochs=LONGEST)
    rule: Any = {"grace_epochs": grace, "quantile_fraction": fraction}
    ours = made(replace(sweep, scheduler=replace(sweep.scheduler, **rule)))
    theirs = OfTune(perturbation_interval=2, burn_in_period=grace, quantile_fraction=fraction, synch=True)
    names = {member.trial.trial_id: trial for trial, member in ours._members.items()}
    for number, (values, order) in enumerate(zip(rounds, orders, strict=False)):
        epoch = max(grace, 2) + 2 * number
        there = [trial for trial in order if not (number and trial == ends)]
        chances = {trial: ours._chance(ours._members[trial], epoch, "parent") for trial in there}
        told: list[tuple[int, int]] = []
        for trial in there:
            ours.compare(trial, epoch, {"top1": values[trial] / 100}, checkpoint(trial, epoch))
            copied = ours.new_copies()
            assert not copied or trial == there[-1]
            told += [(each, names[ours.copy(each).parent_id]) for each in copied]
            assert all(ours.waits(each) == (trial != there[-1]) for each in there[: there.index(trial) + 1])
        assert told == theirs.round(there, epoch, values, chances)
        if ends is not None and not number:
            ours.close(ends)
            theirs.trials[ends].status = "TERMINATED"


def made(sweep: sweeps.Sweep) -> Population:
    population = Population(sweep.scheduler, sweep.trials)
    for trial in sweep.trials:
        population.open(trial.position)
    return population


def begun(sweep: sweeps.Sweep) -> Population:
    """Trial 2 was compared first and had no other beside it; trial 1 is best after epoch 2, and was saved."""
    population = made(sweep)
    population.compare(2, 2, {"top1": 0.5}, checkpoint(2, 2))
    population.compare(1, 2, {"top1": 0.9}, checkpoint(1, 2))
    return population


def checkpoint(trial: int, epoch: int) -> str:
    return f"trials/{trial:012x}/1-1-aa/epoch-{epoch:05d}-{epoch:016x}.pt"


@given(st.lists(st.integers(), max_size=20), st.floats(0.01, 0.5))
def test_nobody_is_among_the_worst_and_the_best(values: list[int], fraction: float) -> None:
    worst, best = quantiles(sorted(values), fraction)
    assert len(worst) == len(best) <= len(values) / 2
    assert len(worst) >= min(1, len(values) // 2)
    assert all(low <= high for low in worst for high in best)


# -------------------------------------------------------------------------------------------------------- what changes


def made_copies(more: str = "", *, results: int = 60) -> list[tuple[dict[str, Any], Step]]:
    """What the parents had, and the steps that made copies of them, of trials of which the first are always worst."""
    population, found = made(sweep_of(more, epochs=LONGEST)), []
    for number in range(results):
        epoch = 2 * number + 2
        for trial in range(6):
            before = {each.trial.trial_id: population.settings(place) for place, each in population._members.items()}
            step = population.compare(trial, epoch, {"top1": trial / 10}, checkpoint(trial, epoch))
            if step and step.copy:
                found.append((before[step.copy.parent_id], step))
                population._members[trial].line = replace(population.line(trial), compared_at=epoch)
    return found


def test_a_copy_has_its_parents_settings_changed_by_a_factor_or_drawn_anew_within_their_range() -> None:
    found = made_copies()
    factors = {round(step.copy.settings["optim.lr"] / had["optim.lr"], 4) for had, step in found if step.copy}
    assert {1.2, 0.8} < factors
    assert len(factors) > 10  # drawn anew
    for _, step in found:
        assert step.copy
        assert 0.001 <= step.copy.settings["optim.lr"] <= 10
        assert step.copy.settings["optim.weight_decay"] in (0.0001, 0.0006, 0.001)


def test_without_resampling_choices_move_to_a_neighbour_and_numbers_by_a_factor() -> None:
    for had, step in made_copies("  resample_probability: 0\n  perturbation_factors: [2, 0.5]"):
        assert step.copy
        lr = had["optim.lr"]
        assert step.copy.settings["optim.lr"] in (min(2 * lr, 10), max(lr / 2, 0.001))
        choices = [0.0001, 0.0006, 0.001]
        moved = choices.index(step.copy.settings["optim.weight_decay"]) - choices.index(had["optim.weight_decay"])
        assert abs(moved) <= 1


def test_what_a_copy_gets_hangs_on_the_seed_and_the_comparison() -> None:
    assert made_copies() == made_copies()
    others = made_copies("  seed: 1")
    assert [step.copy.settings for _, step in others if step.copy] != [
        step.copy.settings for _, step in made_copies() if step.copy
    ]


def test_a_trial_is_copied_from_those_that_differ_in_nothing_but_seed_and_mutations() -> None:
    text = SWEEP.format(more="", epochs=9, lr="[0.1, 0.2], model.width: [1, 2]", seeds=2)
    sweep = sweeps.parse(text, source="x.yaml")
    population = made(sweep)
    width = {trial.trial_id: trial.config.model.width for trial in sweep.trials}
    parents = []
    for epoch in (2, 4, 6):
        for trial in sweep.trials:
            place = trial.position
            step = population.compare(place, epoch, {"top1": place}, checkpoint(place, epoch))
            if step and step.copy:
                parents.append((trial.config.model.width, width[step.copy.parent_id]))
    assert parents
    assert all(own == theirs for own, theirs in parents)
    assert sweep.notes[0].endswith("populations of trials that differ in seed and mutations only: 2 of 4 trials")


@pytest.mark.parametrize("metrics", [{}, {"top1": None}, {"top1": math.nan}])
def test_a_trial_without_the_metric_is_neither_worst_nor_best(metrics: dict[str, float | None]) -> None:
    population = made(sweep_of())
    for trial in range(3):
        population.compare(trial, 2, {"top1": 0.5}, checkpoint(trial, 2))
    step = population.compare(3, 2, metrics, checkpoint(3, 2))
    assert step == Step(number=4, epoch=2, value=None)


def test_what_was_saved_at_another_moment_is_not_what_was_compared() -> None:
    for key in (checkpoint(1, 1), checkpoint(1, 2).replace("-0", "-step-000003-0", 1), None):
        population = made(sweep_of())
        population.compare(0, 2, {"top1": 0.1}, checkpoint(0, 2))
        step = population.compare(1, 2, {"top1": 0.9}, key)
        assert step is not None
        assert step.checkpoint is None
        again = population.compare(0, 4, {"top1": 0.1}, checkpoint(0, 4))
        assert again is not None
        assert again.copy is None


def test_a_trial_that_is_thrown_back_again_and_again_comes_to_its_end() -> None:
    population, trained = begun(sweep_of()), 0
    epoch = 0
    while epoch < 9:
        epoch, trained = epoch + 1, trained + 1
        step = population.compare(0, epoch, {"top1": 0.1}, checkpoint(0, epoch))
        epoch = step.copy.epoch if step and step.copy else epoch
        assert trained < 100
    assert len(population._members[0].copies) == 4  # as often as there are milestones: 2, 4, 6, 8


# ------------------------------------------------------------------------------------------ lines, and what rows keep


@given(results=RESULTS, data=st.data())
def test_a_population_taken_up_from_its_rows_decides_as_the_one_that_lived_through_it(
    results: list[tuple[int, int]], data: st.DataObject
) -> None:
    sweep = sweep_of(epochs=LONGEST)
    whole, epochs = made(sweep), dict.fromkeys(range(6), 0)
    cut = data.draw(st.integers(0, len(results)), label="killed after")
    lived(whole, results[:cut], epochs)
    fresh = made(sweep)
    for trial in range(6):
        fresh.take_up(trial, whole.lineage(trial))
    fresh = pickle.loads(pickle.dumps(fresh))  # as Ray hands it to the dispatcher
    assert lived(fresh, results[cut:], dict(epochs)) == lived(whole, results[cut:], dict(epochs))
    assert [fresh.lineage(trial) for trial in range(6)] == [whole.lineage(trial) for trial in range(6)]
    assert [fresh.line(trial) for trial in range(6)] == [whole.line(trial) for trial in range(6)]


def lived(population: Population, results: list[tuple[int, int]], epochs: dict[int, int]) -> list[Step | None]:
    steps = []
    for trial, hundredths in results:
        epochs[trial] += 1
        step = population.compare(trial, epochs[trial], {"top1": hundredths / 100}, checkpoint(trial, epochs[trial]))
        if step and step.copy:
            epochs[trial] = step.copy.epoch
        steps.append(step)
    return steps


def test_every_copy_begins_a_line_of_its_own_and_knows_the_one_that_it_goes_on_from() -> None:
    sweep = sweep_of()
    population = begun(sweep)
    assert population.line(0).digest == sweep.trials[0].digest
    lines = {population.line(0).digest}
    for number, epoch in enumerate((2, 4), start=1):
        step = population.compare(0, epoch, {"top1": 0.1}, checkpoint(0, epoch))
        assert step is not None
        assert step.copy is not None
        line = population.line(0)
        assert (line.parent, line.source, line.compared_at) == (sweep.trials[1].digest, checkpoint(1, 2), 2)
        lines.add(line.digest)
        assert len(lines) == number + 1
        assert [each.number for each in steps_of(population.lineage(0))] == [3, 4][:number]


def test_what_rows_name_is_needed_as_long_as_somebody_may_go_on_from_it() -> None:
    sweep = sweep_of()
    population = begun(sweep)
    population.compare(0, 2, {"top1": 0.1}, checkpoint(0, 2))
    rows = [
        plan.initial_row(trial, sweep).replace(lineage=population.lineage(trial.position)) for trial in sweep.trials
    ]
    assert needed_by(rows) == {checkpoint(1, 2)}
    assert needed_by([rows[0]]) == {checkpoint(1, 2)}
    assert needed_by([row.replace(state="TERMINATED", checkpoint=checkpoint(5, 9)) for row in rows]) == {
        checkpoint(5, 9)
    }


def test_a_trial_of_a_population_is_no_other_trial(tmp_path: Path) -> None:
    sweep = sweep_of()
    own = {trial.trial_id for trial in sweep.trials}
    assert not own & {trial_id(trial.config) for trial in sweep.trials}
    for other in (sweep_of("  seed: 1"), replace_name(sweep_of, "other"), sweep_of("  quantile_fraction: 0.5")):
        assert not own & {trial.trial_id for trial in other.trials}
        assert not {trial.cell_id for trial in sweep.trials} & {trial.cell_id for trial in other.trials}
    assert own == {trial.trial_id for trial in sweep_of("  mode: max").trials}
    assert own < {trial.trial_id for trial in sweep_of(seeds=3).trials}
    assert sweep.trials[0].trial_id == "64a69bb9d35a"  # another one would lose the results that there are


def replace_name(make: Any, name: str) -> sweeps.Sweep:
    return sweeps.parse(make().text.replace("name: made", f"name: {name}"), source="x.yaml")


# ------------------------------------------------------------------------------------------- whole sweeps, over threads


class Learning(MadeGang):
    """Its trials learn by what they have and how: the best rate is 0.1, and a copy goes on from its parent's value."""

    def trained(self, order: Order, before: list[EpochReport]) -> EpochReport:
        epoch, value = len(before) + 1, before[-1].metrics["top1"] if before else 0.0
        pace = 0.3 / (1 + abs(math.log10(order.settings["optim.lr"]) + 1))
        luck = int(hashlib.sha256(f"{order.settings['seed']} {epoch}".encode()).hexdigest()[:4], 16) / 65536 / 100
        metrics = {"loss": 1 / epoch, "lr": order.settings["optim.lr"], "top1": value + (1 - value) * pace * (1 + luck)}
        return EpochReport(epoch=epoch, metrics=metrics, wall_s=float(epoch), gpu_seconds=0.0, images_per_s=1000.0)


TOGETHER = "  synchronous: true"


def killed(store: ResultStore, epochs: int, gangs: int = 1, more: str = "") -> None:
    """Run the sweep in a process of its own that is killed after so many epochs."""
    code = "import sys, test_population; test_population.live(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4])"
    words = [sys.executable, "-c", code, store.uri, str(epochs), str(gangs), more]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 9, done.stdout + done.stderr


def live(uri: str, epochs: int, gangs: int, more: str) -> None:
    flush = SweepWriter.flush
    SweepWriter.flush = lambda self, *, force=False: flush(self, force=True)  # type: ignore[method-assign]
    store = ResultStore.open(uri, create=True)
    pace = Killing(epochs, lambda: any(row.epoch for row in store.trial_rows("made")))
    driver.run(sweep_of(more), store, engine=Threads(pace, gangs=gangs, kind=Learning).engine)


def run(store: ResultStore, sweep: sweeps.Sweep, gangs: int = 1) -> list[str]:
    said: list[str] = []
    engine = Threads(gangs=gangs, kind=Learning).engine
    assert driver.run(sweep, store, engine=engine, talk=said.append) == 0
    return said


Outcome = dict[str, tuple[Any, ...]]


def outcome(store: ResultStore) -> Outcome:
    """All that a run has to repeat: folders of attempts have names by chance."""
    found: Outcome = {}
    for row in store.trial_rows("made"):
        steps = [replace(step, checkpoint=None, copy=step.copy and replace(step.copy, checkpoint=""))
                 for step in steps_of(row.lineage)]  # fmt: skip
        curve = [each.metrics for each in store.epoch_rows("made", row.trial_id)]
        found[row.trial_id] = (row.state, row.epoch, row.parent_id, steps, row.metrics, curve)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """With one gang: so results come in one order."""
    store = ResultStore.open(str(tmp_path_factory.mktemp("whole")), create=True)
    run(store, sweep_of())
    return outcome(store)


@pytest.mark.parametrize("gangs", [1, 3])
def test_a_sweep_under_pbt_makes_copies_and_says_of_whom(tmp_path: Path, gangs: int) -> None:
    store, sweep = ResultStore.open(str(tmp_path), create=True), sweep_of()
    run(store, sweep, gangs)
    rows = store.trial_rows("made")
    assert {(row.state, row.epoch, row.stopped_early, row.error) for row in rows} == {("TERMINATED", 9, False, None)}
    copied = [row for row in rows if row.parent_id]
    assert 0 < len(copied) < len(rows)
    told = [(event.trial_id, event.text) for event in store.events("made") if event.kind == "exploited"]
    by_number = sorted(
        (step.number, row.trial_id, str(step.copy)) for row in rows for step in steps_of(row.lineage) if step.copy
    )
    assert told == [(trial, text) for _, trial, text in by_number]
    hold_lineage(store, rows)
    assert store.verify("made") == []
    assert run(store, sweep) == ["made: nothing to run, all 6 trials have ended"]


def test_trials_of_a_population_take_turns(undisturbed: Outcome) -> None:
    """Else one gang would train the first to its end before there is anything to hold it against."""
    assert any(steps and any(step.copy for step in steps) for _, _, _, steps, _, _ in undisturbed.values())


def test_what_nobody_goes_on_from_is_deleted(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    run(store, sweep_of())
    for row in store.trial_rows("made"):
        keys = store.checkpoints(row.trial_id)
        assert keys[0] == row.checkpoint
        assert len(keys) <= 3  # the newest two, and what the last write had yet to leave


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 13, 17, 22, 28, 35, 41, 50])
def test_a_sweep_that_is_killed_and_goes_on_makes_the_same_copies_and_the_same_numbers(
    undisturbed: Outcome, tmp_path: Path, epochs: int
) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    killed(store, epochs)
    run(store, sweep_of())
    assert outcome(store) == undisturbed
    assert store.verify("made") == []


@pytest.mark.slow
def test_a_sweep_of_several_gangs_that_is_killed_again_and_again_keeps_all_promises(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    for epochs in (7, 9, 5, 8):
        killed(store, epochs, gangs=3)
    run(store, sweep_of(), gangs=3)
    rows = store.trial_rows("made")
    assert {(row.state, row.epoch, row.error) for row in rows} == {("TERMINATED", 9, None)}
    assert any(row.parent_id for row in rows)
    hold_lineage(store, rows)
    assert store.verify("made") == []


def hold_lineage(store: ResultStore, rows: Sequence[TrialRow]) -> None:
    """A trial's rows are those of its network: up to its last copy its parent's, then with that copy's settings."""
    for row in rows:
        epochs = store.epoch_rows("made", row.trial_id)
        assert [each.epoch for each in epochs] == [*range(1, row.epoch + 1)]
        assert epochs[-1].metrics == row.metrics
        assert row.config["optim_lr"] in (0.0001, 0.01, 0.1)
        copies = copies_of(row)
        rates = {each.metrics["lr"] for each in epochs[copies[-1].epoch if copies else 0 :]}
        assert rates == {settings_of(row).get("optim.lr", row.config["optim_lr"])}
        assert row.parent_id == (copies[-1].parent_id if copies else None)


def test_a_trial_that_fails_ends_alone_and_can_be_tried_again(tmp_path: Path) -> None:
    store, sweep = ResultStore.open(str(tmp_path), create=True), sweep_of()
    fails = True

    class Failing(Pace):
        def epoch(self, order: Order, epoch: int) -> None:
            if fails and (order.index, epoch) == (3, 5):
                raise RuntimeError("a bad day")

    engine = Threads(Failing(), gangs=1, kind=Learning).engine
    assert driver.run(sweep, store, engine=engine, talk=lambda _: None) == ExitCode.FAULTS
    rows = store.trial_rows("made")
    assert [(row.state, row.epoch) for row in rows] == [("ERROR" if i == 3 else "TERMINATED", 9 - 5 * (i == 3))
                                                        for i in range(6)]  # fmt: skip
    assert not [row for row in rows if row.parent_id == rows[3].trial_id]
    fails = False
    assert driver.run(sweep, store, engine=engine, retry_failed=True, talk=lambda _: None) == ExitCode.OK
    rows = store.trial_rows("made")
    assert {(row.state, row.epoch, row.error) for row in rows} == {("TERMINATED", 9, None)}
    hold_lineage(store, rows)
    assert store.verify("made") == []


def test_a_population_that_is_paused_goes_on_as_it_was(tmp_path: Path, undisturbed: Outcome) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    threads, paused = Threads(gangs=1, kind=Learning), list[int]()

    class Pausing(Pace):
        def epoch(self, order: Order, epoch: int) -> None:
            if epoch in (3, 6) and order.index not in paused:
                paused.append(order.index)
                threads.crews[0].pause()
                threading.Timer(0.2, threads.crews[0].resume).start()

    threads.pace = Pausing()
    assert driver.run(sweep_of(), store, engine=threads.engine, talk=lambda _: None) == ExitCode.OK
    assert len(paused) == 6
    assert outcome(store) == undisturbed


def in_any_order(found: Outcome) -> Outcome:
    """What hangs on no order: of two comparisons at one milestone either may have been the first."""
    loose: Outcome = {}
    for trial, (state, epoch, parent, steps, *numbers) in found.items():
        kept = [replace(step, number=0, copy=step.copy and replace(step.copy, line="")) for step in steps]
        loose[trial] = (state, epoch, parent, kept, *numbers)
    return loose


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    store = ResultStore.open(str(tmp_path_factory.mktemp("together")), create=True)
    run(store, sweep_of(TOGETHER))
    assert store.verify("made") == []
    return in_any_order(outcome(store))


@pytest.mark.parametrize("gangs", [2, 8])
def test_trials_that_wait_for_one_another_make_the_same_copies_with_any_number_of_gangs(
    together: Outcome, tmp_path: Path, gangs: int
) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    run(store, sweep_of(TOGETHER), gangs)
    assert in_any_order(outcome(store)) == together
    rows = store.trial_rows("made")
    copies = [copy for row in rows for copy in copies_of(row)]
    assert len(copies) == 4 * 2  # at each milestone the worst two of six
    assert {copy.epoch for copy in copies} == {2, 4, 6, 8}
    hold_lineage(store, rows)
    assert store.verify("made") == []


@pytest.mark.slow
@pytest.mark.parametrize("blows", [(11,), (12, 3), (30, 8), (47,)])
def test_trials_that_wait_for_one_another_make_the_same_copies_after_kills(
    together: Outcome, tmp_path: Path, blows: tuple[int, ...]
) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    for epochs in blows:
        killed(store, epochs, 3, TOGETHER)
    run(store, sweep_of(TOGETHER), 3)
    assert in_any_order(outcome(store)) == together
    assert store.verify("made") == []


def test_nobody_waits_for_a_trial_that_has_failed_or_was_cancelled(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    threads = Threads(gangs=2, kind=Learning)

    class Failing(Pace):
        def epoch(self, order: Order, epoch: int) -> None:
            if (order.index, epoch) == (5, 4):  # the last for whom the others wait
                raise RuntimeError("a bad day")
            if (order.index, epoch) == (4, 6):
                threads.crews[0].cancel([4], "by somebody")

    threads.pace = Failing()
    driver.run(sweep_of(TOGETHER), store, engine=threads.engine, talk=lambda _: None)
    rows = store.trial_rows("made")
    assert [row.state for row in rows] == [*["TERMINATED"] * 4, "CANCELLED", "ERROR"]
    hold_lineage(store, rows[:4])
    assert {step.epoch for row in rows[:4] for step in steps_of(row.lineage)} >= {8}
    assert store.verify("made") == []


def test_the_page_of_a_copy_says_of_whom_and_offers_no_command_that_could_not_repeat_it(copied_row: TrialRow) -> None:
    shown = pages.trial([copied_row], [], datetime.now(UTC), 100, repeat="mixmo train").plain
    for copy in copies_of(copied_row):
        assert f"  {copy.parent_id} at epoch {copy.epoch}: " in shown
    assert "Repeat it" not in shown
    alone = copied_row.replace(lineage=None)
    assert "Repeat it" in pages.trial([alone], [], datetime.now(UTC), 100, repeat="mixmo train").plain


@pytest.fixture
def copied_row(tmp_path: Path) -> TrialRow:
    store = ResultStore.open(str(tmp_path), create=True)
    run(store, sweep_of(TOGETHER), 2)
    return next(row for row in store.trial_rows("made") if row.parent_id)


def test_who_chooses_by_test_images_is_told_so() -> None:
    assert {trial.config.evaluate.split for trial in sweep_of().trials} == {"validation"}
    told = sweeps.parse(sweep_of().text, source="x.yaml", overrides=["evaluate.split=test"])
    assert any("scheduler: it chooses by test images" in note for note in told.notes)


def test_another_sweep_neither_gives_its_results_to_a_population_nor_takes_them(tmp_path: Path) -> None:
    store, sweep = ResultStore.open(str(tmp_path), create=True), sweep_of()
    run(store, sweep)
    for other in (
        replace_name(sweep_of, "other"),
        sweeps.parse(sweep.text, source="x", overrides=["scheduler.method=none"]),
    ):
        planned = plan.against(store, other)
        assert planned.counts == {"new": 6}


def test_a_population_has_no_shared_results_with_the_same_trials_under_no_scheduler(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    plain = sweeps.parse(sweep_of().text, source="x.yaml", overrides=["scheduler.method=none", "name=plain"])
    run(store, plain)
    assert plan.against(store, sweep_of()).counts == {"new": 6}


# -------------------------------------------------------------------------------------------------------------- on Ray

ON_RAY = """
name: small
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 5, warmup: 0}
blocks:
  - {label: learns, grid: {optim.lr: [0.05, 0.1]}}
  - {label: learns nothing, grid: {optim.lr: [1.0e-7, 2.0e-7]}}
resources: {gpus_per_worker: 0}
scheduler: {method: pbt, metric: nll, interval_epochs: 1, mutations: {optim.lr: {min: 1.0e-7, max: 1}}}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_pbt_makes_copies_on_ray_and_all_commands_say_so(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, ON_RAY)
    assert "1 of 4 trials" in " ".join(mixmo("plan", "sweep.yaml").stdout.split())
    mixmo("run", "sweep.yaml")
    rows = mixmo.rows()
    assert {(row.state, row.epoch, row.split, row.error) for row in rows} == {("TERMINATED", 5, "validation", None)}
    copied = [row for row in rows if row.parent_id]
    assert "learns nothing" in {row.label for row in copied}  # once it does learn, any other may be the worst
    store = ResultStore.open(tmp_path / "results")
    for row in rows:
        assert [each.epoch for each in store.epoch_rows("small", row.trial_id)] == [1, 2, 3, 4, 5]
        assert store.checkpoints(row.trial_id, row.checkpoint)[0] == row.checkpoint
    for row in copied:
        told = [str(step.copy) for step in steps_of(row.lineage) if step.copy]
        assert [
            each.text for each in store.events("small") if (each.trial_id, each.kind) == (row.trial_id, "exploited")
        ] == told
        shown = mixmo("show", row.trial_id).stdout
        assert all(each in " ".join(shown.split()) for each in told)
        assert "cannot be trained alone" in mixmo("train", "--trial", row.trial_id, code=2).stderr
    assert mixmo("verify", "small").returncode == 0
    assert "nothing to run, all 4 trials have ended" in mixmo("run", "sweep.yaml").stderr
