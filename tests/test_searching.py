"""What a search draws: ranges at random, and Optuna's TPE over whole sweeps of threads, killed and going on."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from made_engine import Pace, Threads

from mixmo_core.config import flatten
from orchestrator import driver, pages, plan, searching
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import Order
from orchestrator.errors import SweepError, UsageError
from orchestrator.rows import TrialRow, config_of
from orchestrator.store import ResultStore, SweepWriter
from orchestrator.sweep.ranges import Range

# -------------------------------------------------------------------------------------------------------------- ranges

NUMBERS = st.floats(1e-6, 1e6, allow_nan=False)
SHARES = st.floats(0, 1, exclude_max=True)


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    if draw(st.integers(0, 3)) == 0:
        return Range(choices=tuple(draw(st.lists(st.integers(), min_size=1, max_size=5, unique=True))))
    whole = draw(st.booleans())
    low, high = sorted(draw(st.lists(st.integers(1, 1000) if whole else NUMBERS, min_size=2, max_size=2, unique=True)))
    assume(whole or high > low * 1.001)
    scale: Any = draw(st.sampled_from(["linear", "log"]))
    steps = draw(st.integers(1, 50))
    step = None if scale == "log" or draw(st.booleans()) else (1 if whole else (high - low) / steps)
    return Range(min=low, max=high, scale=scale, step=step, whole=whole)


@given(each=ranges(), shares=st.lists(SHARES, min_size=2, max_size=2))
def test_every_draw_is_within_its_range_and_more_share_is_no_less(each: Range, shares: list[float]) -> None:
    values = [each.at(share) for share in sorted(shares)]
    assert all(map(each.has, values))
    assert each.choices or values[0] <= values[1]
    if each.whole:
        assert all(type(value) is int for value in values)


@given(each=ranges())
def test_the_ends_of_a_range_are_drawn(each: Range) -> None:
    ends = [each.at(0.0), each.at(math.nextafter(1.0, 0.0))]
    if each.choices:
        assert ends == [each.choices[0], each.choices[-1]]
    else:
        assert ends == pytest.approx([each.min, each.last], rel=1e-5)


def test_whole_numbers_have_equal_shares() -> None:
    drawn = [Range(min=1, max=4, whole=True).at(k / 1000) for k in range(1000)]
    assert [drawn.count(value) for value in (1, 2, 3, 4)] == [250] * 4
    drawn = [Range(min=1, max=4, step=2, whole=True).at(k / 1000) for k in range(1000)]
    assert [drawn.count(value) for value in (1, 3)] == [500] * 2  # 4 is no step from 1


def test_a_logarithmic_range_gives_each_decade_its_share() -> None:
    drawn = [Range(min=0.001, max=1.0, scale="log").at(k / 3000) for k in range(3000)]
    assert [sum(low <= value < 10 * low for value in drawn) for low in (0.001, 0.01, 0.1)] == pytest.approx(
        [1000] * 3, abs=2
    )


# ------------------------------------------------------------------------------------------------------ random searches

BASE = """
name: made
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 2}}
  optim: {{epochs: 4}}
resources: {{gpus_per_worker: 0}}
blocks: [{{grid: {{mixing.method: [{methods}]}}}}]
seeds: {seeds}
search: {{method: {method}, num_samples: {samples}, seed: {seed}, ranges: {{{ranges}}}}}
"""
LR = "optim.lr: {min: 0.001, max: 1, scale: log}"
ALPHA = "mixing.alpha: {min: 1, max: 4, when: \"mixing.method == 'cutmix'\"}"


def load(**given: Any) -> sweeps.Sweep:
    values = {"methods": "linear, cutmix", "seeds": 2, "method": "random", "samples": 3, "seed": 0, "ranges": LR}
    return sweeps.parse(BASE.format(**(values | given)), source="x.yaml")


def values(sweep: sweeps.Sweep, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(flatten(trial.config)[name] for name in names) for trial in sweep.trials]


def test_a_random_search_draws_for_each_cell_and_seed_and_all_cells_get_the_same_values() -> None:
    sweep = load()
    drawn = values(sweep, "seed", "mixing.method", "optim.lr")
    assert len(drawn) == 2 * 3 * 2
    rates = [rate for seed, method, rate in drawn if (seed, method) == (0, "linear")]
    assert drawn == [(seed, method, rate) for seed in (0, 1) for rate in rates for method in ("linear", "cutmix")]
    assert len(set(rates)) == 3
    assert sweep.varied == ("mixing.method", "optim.lr")


@given(seed=st.integers(0, 100), samples=st.integers(1, 6), more=st.integers(1, 4))
def test_more_draws_leave_the_first_ones_as_they_are(seed: int, samples: int, more: int) -> None:
    few, many = load(seed=seed, samples=samples, seeds=1), load(seed=seed, samples=samples + more, seeds=1)
    assert [trial.trial_id for trial in many.trials][: len(few.trials)] == [trial.trial_id for trial in few.trials]


def test_another_range_beside_it_changes_no_draw_and_another_seed_changes_all() -> None:
    both = load(ranges=f"{ALPHA}, {LR}")
    assert values(both, "optim.lr") == values(load(), "optim.lr")
    assert not {*values(load(seed=1), "optim.lr")} & {*values(load(), "optim.lr")}


def test_a_condition_decides_where_a_setting_is_drawn() -> None:
    drawn = values(load(ranges=f"{LR}, {ALPHA}"), "mixing.method", "mixing.alpha")
    assert {alpha for method, alpha in drawn if method == "linear"} == {2.0}  # its default
    assert len({alpha for method, alpha in drawn if method == "cutmix"}) == 3


def test_a_condition_sees_what_was_drawn_before_it() -> None:
    sweep = load(
        methods="linear",
        samples=20,
        ranges="model.width: {choices: [1, 2]}, optim.lr: {min: 0.2, max: 0.9, when: model.width == 2}",
    )
    drawn = values(sweep, "model.width", "optim.lr")
    assert {rate for width, rate in drawn if width == 1} == {0.05}
    assert all(0.2 <= rate <= 0.9 for width, rate in drawn if width == 2)
    assert {width for width, _ in drawn} == {1, 2}


def test_draws_that_become_the_same_are_one_trial() -> None:
    assert len(load(methods="linear", samples=30, seeds=1, ranges="model.width: {min: 1, max: 3}").trials) == 3


def test_whoever_chooses_does_it_by_images_that_are_held_out() -> None:
    assert {trial.config.evaluate.split for trial in load().trials} == {"validation"}
    assert load().origins["evaluate.split"].endswith("(search)")
    text = BASE.format(methods="linear", seeds=1, method="random", samples=2, seed=0, ranges=LR)
    for rest, told in (("", "search"), ("scheduler: {method: asha}\n", "scheduler")):
        asked = sweeps.parse(text.replace("  optim:", "  evaluate: {split: test}\n  optim:") + rest, source="x.yaml")
        assert {trial.config.evaluate.split for trial in asked.trials} == {"test"}
        assert [note for note in asked.notes if f": {told}: it chooses by test images" in note]
    grid = text.partition("search:")[0]
    assert {trial.config.evaluate.split for trial in sweeps.parse(grid, source="x.yaml").trials} == {"test"}


# --------------------------------------------------------------------------------------------------------------- Optuna

optuna = pytest.importorskip("optuna")
RANGES = f"{LR}, model.width: {{min: 1, max: 8}}, {ALPHA}, data.batch_size: {{choices: [20, 40]}}"


def tpe(**given: Any) -> sweeps.Sweep:
    return load(**({"method": "optuna", "samples": 14, "seeds": 1, "ranges": RANGES} | given))


def reached(config: Mapping[str, float]) -> float:
    """A hill: the best is at lr 0.1, width 5."""
    return 1.0 / (1 + abs(math.log10(config["optim.lr"]) + 1) + abs(config["model.width"] - 5))


class Life:
    """A sweep without a driver: what is drawn, and what becomes of it."""

    def __init__(self, sweep: sweeps.Sweep, rows: list[TrialRow] | None = None) -> None:
        self.rows = list(rows or [])
        self.sweep = searching.taken_up(sweep, self.rows)
        held = {row.trial_id: row for row in self.rows}
        at = {trial.position: held.get(trial.trial_id) or plan.initial_row(trial, self.sweep)
              for trial in self.sweep.trials}  # fmt: skip
        self.guide = searching.Guide(self.sweep, at)
        self.open = [row for row in at.values() if row.state == "PENDING"]

    def draw(self) -> None:
        for trial in self.guide.draw():
            row = plan.initial_row(trial, self.sweep)
            self.rows.append(row)
            self.open.append(row)

    def end(self, number: int = 0, **changes: Any) -> None:
        row = self.open.pop(number)
        metrics = {"top1": reached(flatten(config_of(row)))}
        seq = max((each.seq for each in self.rows), default=0) + 1
        ended = row.replace(**({"state": "TERMINATED", "epoch": 4, "seq": seq, "metrics": metrics} | changes))
        self.rows = [ended if each.trial_id == row.trial_id else each for each in self.rows]
        self.guide.ended(ended)

    def ids(self) -> list[str]:
        return [row.trial_id for row in self.rows]


def lived(sweep: sweeps.Sweep, at_once: int, cut: int | None = None) -> Life:
    """To its end; `cut`: it is killed after so many draws, and taken up from the rows."""
    life = Life(sweep)
    while life.guide.more or life.open:
        while len(life.open) < at_once and life.guide.more:
            life.draw()
            if len(life.rows) == cut:
                life = Life(sweep, life.rows)
        changes: dict[str, Any] = {}
        if len(life.rows) % 5 == 3:
            changes = {"stopped_early": True, "epoch": 2}
        elif len(life.rows) % 7 == 4:
            changes = {"state": "ERROR"}
        life.end(len(life.rows) % len(life.open), **changes)
    return life


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_search_that_is_taken_up_draws_what_the_undisturbed_one_draws(at_once: int) -> None:
    whole = lived(tpe(), at_once)
    assert len(whole.rows) == 28
    for cut in (1, 5, 12, 20, 27):
        assert lived(tpe(), at_once, cut).ids() == whole.ids(), cut


def test_cells_take_turns_and_each_has_its_own_draws() -> None:
    rows = lived(tpe(), 1).rows
    assert [row.config["mixing_method"] for row in rows] == ["linear", "cutmix"] * 14
    assert all(row.config["mixing_alpha"] in (None, 2.0) for row in rows[::2])
    assert len({row.config["optim_lr"] for row in rows}) == 28


def test_what_was_learned_makes_draws_better() -> None:
    rows = lived(tpe(methods="linear", samples=60), 1).rows
    values = [row.metrics["top1"] or 0.0 for row in rows if row.state == "TERMINATED"]
    assert sum(values[-15:]) > 1.5 * sum(values[:10]) / 10 * 15


def test_a_draw_is_trained_with_every_seed_and_told_once_as_their_mean() -> None:
    life = Life(tpe(seeds=3, methods="linear"))
    life.draw()
    assert [row.config["seed"] for row in life.rows] == [0, 1, 2]
    assert len({row.cell_id for row in life.rows}) == 1
    study = life.guide._studies[0]._study
    for top1 in (0.2, 0.4, 0.9):
        assert study.trials[-1].state.name == "RUNNING"
        life.end(metrics={"top1": top1})
    assert (study.trials[-1].state.name, study.trials[-1].value) == ("COMPLETE", pytest.approx(0.5))


def test_a_small_space_is_drawn_out_without_an_end_to_wait_for() -> None:
    sweep = tpe(methods="linear", ranges="model.width: {min: 1, max: 3}")
    life = lived(sweep, 2)
    assert sorted(row.config["model_width"] for row in life.rows) == [1, 2, 3]
    assert life.guide.draw() == []


def test_a_plan_counts_what_is_still_to_be_drawn(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    fresh = plan.against(store, tpe(seeds=2, samples=3))
    assert (fresh.summary()["to_draw"], fresh.summary()["to_run"]) == (12, 0)
    assert "12 more trials" in fresh.summary()["notes"][-1]
    assert "To run: 12 (12 to be drawn)" in pages.plan(fresh.summary(), {}, 100).plain
    assert fresh.sweep.origins["optim.lr"] == "varies"


def test_rows_of_a_changed_file_are_no_draws_of_it() -> None:
    rows = lived(tpe(), 1).rows
    narrower = RANGES.replace("max: 8", "max: 3")
    kept = searching.taken_up(tpe(ranges=narrower), rows).trials
    assert [trial.trial_id for trial in kept] == [row.trial_id for row in rows if row.config["model_width"] <= 3]
    other = searching.taken_up(load(method="optuna", ranges=LR), rows)
    assert other.trials == ()
    assert other.to_draw == 2 * 3 * 2


def test_seeds_that_a_file_has_got_since_are_trained_for_all_draws() -> None:
    rows = lived(tpe(samples=2, methods="linear"), 1).rows
    more = searching.taken_up(tpe(samples=2, methods="linear", seeds=2), rows)
    assert [trial.config.seed for trial in more.trials] == [0, 0, 1, 1]
    assert more.to_draw == 0


def test_ranges_that_cannot_be_trained_together_are_told_before_anything_starts() -> None:
    with pytest.raises(SweepError, match=r"data\.repetition"):
        tpe(ranges="data.repetition: {min: 1, max: 7}")


def test_a_missing_optuna_is_told_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'mixmo-sweeps\[optuna\]'"):
        searching.check_installed(tpe())
    searching.check_installed(load())


# ------------------------------------------------------------------------------------------- whole sweeps, over threads


class Killing(Pace):
    """The process ends as by SIGKILL before the epoch with this number, counted over all trials."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def epoch(self, order: Order, epoch: int) -> None:
        self.left -= 1
        if self.left < 0:
            time.sleep(0.1)  # the driver may write what it knows
            os._exit(9)


def live(uri: str, epochs: int) -> None:
    flush = SweepWriter.flush
    SweepWriter.flush = lambda self, *, force=False: flush(self, force=True)  # type: ignore[method-assign]
    driver.run(whole(), ResultStore.open(uri, create=True), engine=Threads(Killing(epochs), gangs=1).engine)


def whole() -> sweeps.Sweep:
    return tpe(methods="linear", samples=16)


def outcome(store: ResultStore) -> list[tuple[int, str, str, int]]:
    return [(row.position, row.trial_id, row.state, row.epoch) for row in store.trial_rows("made")]


@pytest.mark.slow
def test_a_sweep_of_draws_that_is_killed_goes_on_with_the_draws_of_the_undisturbed_one(tmp_path: Path) -> None:
    stores = [ResultStore.open(str(tmp_path / name), create=True) for name in ("undisturbed", "killed")]
    assert driver.run(whole(), stores[0], engine=Threads(gangs=1).engine, talk=lambda _: None) == 0
    assert len(outcome(stores[0])) == 16
    code = "import sys, test_searching; test_searching.live(sys.argv[1], int(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, stores[1].uri, "47"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 9, done.stdout + done.stderr
    assert 10 < len(outcome(stores[1])) < 16
    assert driver.run(whole(), stores[1], engine=Threads(gangs=1).engine, talk=lambda _: None) == 0
    assert outcome(stores[1]) == outcome(stores[0])
    assert stores[1].verify("made") == []
    said: list[str] = []
    assert driver.run(whole(), stores[1], engine=Threads(gangs=1).engine, talk=said.append) == 0
    assert said == ["made: nothing to run, all 16 trials have ended"]


def test_no_more_is_drawn_than_gangs_can_train_and_every_draw_is_an_event(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    assert driver.run(tpe(samples=4), store, engine=Threads(gangs=2).engine, talk=lambda _: None) == 0
    rows, events = store.trial_rows("made"), store.events("made")
    assert {row.state for row in rows} == {"TERMINATED"}
    drawn = [event.trial_id for event in events if event.kind == "drawn"]
    assert drawn == [row.trial_id for row in rows]
    open_now = most = 0
    for event in events:
        open_now += (event.kind == "drawn") - (event.kind == "terminated")
        most = max(most, open_now)
    assert most == 2
