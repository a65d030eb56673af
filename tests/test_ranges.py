"""What a search draws: ranges with steps, choices and conditions, and random searches over them."""

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mixmo_core.config import flatten
from orchestrator import sweep as sweeps
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
