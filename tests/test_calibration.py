"""From how long some trials took to what others take: laws of paces and estimates, and the table in the store."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import made_rows
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import in_a_folder

from mixmo_core import cost
from mixmo_core.config import DataConfig, EvaluateConfig, ModelConfig, OptimConfig, TrialConfig
from orchestrator.calibration import CORRUPTED, Estimate, Paces, Span, Timing, Work, estimates, of_trials, work
from orchestrator.rows import config_columns
from orchestrator.store import DamagedError, ResultStore

NOW = datetime(2026, 11, 29, tzinfo=UTC)


def timing(shape: str, step_flops: float, pace: float, **changes: Any) -> Timing:
    given: dict[str, Any] = {
        "device_name": "a GPU", "precision": "fp32", "workers": 1, "gpus": 1.0, "source": "measured", "at": NOW,
        "torch_version": "2.14",
    }  # fmt: skip
    return Timing(shape=shape, step_flops=step_flops, pace=pace, **{**given, **changes})


def asked(shape: str, step_flops: float, flops: float = 1e15) -> Work:
    return Work(shape, "fp32", 1, step_flops, flops)


def estimated(works: Sequence[Work], timings: Sequence[Timing], gpus: float | None = None) -> list[Estimate]:
    return estimates(works, timings, gpus=gpus, cpus=1.0)


sizes = st.floats(1e6, 1e14)
factors = st.floats(0.5, 1.0)


@st.composite
def devices(draw: st.DrawFn) -> tuple[dict[str, tuple[float, float]], list[Timing]]:
    """Shapes with their true (operations of a step, pace), a larger one never slower for an operation, and timings on
    both sides of each truth.
    """
    flops = sorted(draw(st.lists(sizes, min_size=2, max_size=8, unique=True)))
    truth, timings, pace = {}, [], 1e-10
    for number, each in enumerate(flops):
        pace *= draw(factors)
        truth[f"s{number}"] = each, pace
        for factor in (draw(factors), 1 / draw(factors)):
            timings.append(timing(f"s{number}", each, pace * factor))
    return truth, timings


@given(devices(), st.data())
def test_the_band_holds_the_truth_of_what_was_timed_and_of_what_lies_between(
    device: tuple[dict[str, tuple[float, float]], list[Timing]], data: st.DataObject
) -> None:
    truth, timings = device
    untimed = data.draw(st.sets(st.sampled_from(sorted(truth))))
    inner = set(sorted(truth)[1:-1])  # beyond the outermost no measurement bounds anything
    timings = [each for each in timings if each.shape not in untimed & inner]
    works = [asked(shape, flops) for shape, (flops, _) in truth.items()]
    (found,) = estimated(works, timings)
    true_s = math.fsum(each.flops * truth[each.shape][1] for each in works)
    if len({each.shape for each in timings}) > 1:
        assert found.seconds.low is not None
        assert found.seconds.high is not None
        assert found.seconds.low <= true_s * (1 + 1e-9)
        assert true_s <= found.seconds.high * (1 + 1e-9)
        assert found.seconds.low <= found.seconds.mean * (1 + 1e-9) <= found.seconds.high * (1 + 2e-9)


@given(devices(), st.lists(st.floats(1e10, 1e18), min_size=2, max_size=12), st.integers(1, 11))
def test_what_trials_take_adds_up(
    device: tuple[dict[str, tuple[float, float]], list[Timing]], flops: list[float], cut: int
) -> None:
    truth, timings = device
    names = sorted(truth)
    works = [asked(names[i % len(names)], truth[names[i % len(names)]][0], each) for i, each in enumerate(flops)]
    cut = min(cut, len(works) - 1)
    whole, first, second = (estimated(part, timings)[0].seconds for part in (works, works[:cut], works[cut:]))
    for side in ("mean", "low", "high"):
        assert getattr(whole, side) == pytest.approx(getattr(first, side) + getattr(second, side))


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 5]), st.sampled_from(["none", "cifar_c"]))
def test_more_epochs_never_cost_less(first: int, more: int, every: int, robustness: Any) -> None:
    def flops(epochs: int) -> float:
        config = TrialConfig(
            data=DataConfig(dataset="cifar10"), model=ModelConfig(depth=10, width=1),
            optim=OptimConfig(epochs=epochs), evaluate=EvaluateConfig(every=every, robustness=robustness),
        )  # fmt: skip
        return work(config_columns(config), 1, cost.trial_flops(config), epochs).flops

    assert flops(first) < flops(first + more)
    whole, rest = flops(first + more), flops(first)
    assert whole - rest == pytest.approx(flops(more) - (0 if robustness == "none" else flops(1) - _epoch(every)))


def _epoch(every: int) -> float:
    """One epoch without what is measured at the very end."""
    config = TrialConfig(
        data=DataConfig(dataset="cifar10"), model=ModelConfig(depth=10, width=1), optim=OptimConfig(epochs=1),
        evaluate=EvaluateConfig(every=every, robustness="cifar_c"),
    )  # fmt: skip
    return work(config_columns(config), 1, cost.trial_flops(config), 1, until_end=False).flops


def test_evaluations_count_as_a_third_of_a_step() -> None:
    config = TrialConfig(
        data=DataConfig(dataset="cifar10", train_images=500, batch_size=50, repetition=2),
        model=ModelConfig(depth=10, width=1), optim=OptimConfig(epochs=4),
        evaluate=EvaluateConfig(every=2, robustness="cifar_c"),
    )  # fmt: skip
    train = cost.trial_flops(config)
    found = work(config_columns(config), 1, train, 4)
    images = (2 + CORRUPTED) * 10_000
    assert found.flops == pytest.approx(train * (1 + images / 3 / (4 * 20 * 50)))
    assert found.step_flops == pytest.approx(cost.step_flops(config))


def test_a_shape_is_all_that_decides_the_time_of_a_step_and_nothing_else() -> None:
    base = TrialConfig(model=ModelConfig(width=3))

    def shape(config: TrialConfig) -> str:
        return work(config_columns(config), 1, cost.trial_flops(config), config.optim.epochs).shape

    alike = [replace(base, seed=7), replace(base, optim=OptimConfig(epochs=5, lr=0.3)),
             replace(base, data=DataConfig(train_images=500)), replace(base, evaluate=EvaluateConfig(every=9)),
             ]  # fmt: skip
    assert {shape(each) for each in alike} == {shape(base)}
    other = [replace(base, precision="bf16"), replace(base, model=ModelConfig(width=4)),
             replace(base, data=DataConfig(batch_size=32)), replace(base, data=DataConfig(msda="cutmix"))]  # fmt: skip
    assert len({shape(each) for each in (base, *other)}) == 5


def test_what_nothing_bounds_has_no_band() -> None:
    once = timing("a", 1e9, 1e-12)
    assert Paces([once]).of("a", 1e9).low is None
    assert Paces([once]).of("b", 1e8).high is None
    twice = [once, timing("a", 1e9, 2e-12)]
    assert Paces(twice).of("a", 1e9).high == 2e-12
    assert Paces(twice).of("b", 1e8).high is None, "how paces change with size is not known from one shape"
    with pytest.raises(ValueError, match="no shape was timed"):
        Paces([]).of("a", 1e9)


def test_a_shape_timed_once_is_as_uncertain_as_the_worst_of_the_others() -> None:
    paces = Paces([timing("a", 1e9, 1e-12), timing("a", 1e9, 3e-12), timing("b", 2e9, 1e-12)])
    assert paces.of("b", 2e9).low == pytest.approx(0.5e-12)
    assert paces.of("b", 2e9).high == pytest.approx(2e-12)


def test_between_two_shapes_the_pace_lies_between_and_the_band_is_wider() -> None:
    sides = [timing("a", 1e8, pace) for pace in (3.9e-12, 4.1e-12)]
    sides += [timing("b", 1e10, pace) for pace in (0.99e-12, 1.01e-12)]
    between = Paces(sides).of("c", 1e9)
    assert between.mean == pytest.approx(2e-12)
    assert not between.measured
    assert between.low is not None
    assert between.high is not None
    assert between.high / between.low > 4
    assert Paces(sides).of("c", 1e12).mean == pytest.approx(1e-12), "beyond the largest its pace holds"


def test_one_slow_trial_among_many_does_not_make_the_band() -> None:
    many = [timing("a", 1e9, 1e-12 * (1 + i / 1000)) for i in range(39)]
    pace = Paces([*many, timing("a", 1e9, 9e-12)]).of("a", 1e9)
    assert pace.high == pytest.approx(1.038e-12, rel=0.2)


def test_trials_go_before_calibrations_and_the_newest_torch_before_others() -> None:
    measured, trained = timing("a", 1e9, 1e-12), timing("a", 1e9, 2e-12, source="trained")
    assert Paces([measured, trained]).of("a", 1e9).mean == 2e-12
    newer = timing("a", 1e9, 3e-12, torch_version="2.15", at=NOW + timedelta(days=1))
    assert Paces([newer, trained]).of("a", 1e9).mean == 3e-12


def test_each_kind_of_device_is_told_apart_and_what_was_not_timed_is_not_told() -> None:
    gpu, cpu = timing("a", 1e9, 1e-14), timing("a", 1e9, 1e-11, gpus=0.0, device_name="a CPU", cpus=1.0)
    works = [asked("a", 1e9)]
    assert [each.device_name for each in estimated(works, [cpu, gpu])] == ["a GPU", "a CPU"]
    assert [each.device_name for each in estimated(works, [cpu, gpu], gpus=0)] == ["a CPU"]
    assert [each.device_name for each in estimated(works, [cpu, gpu], gpus=1)] == ["a GPU"]
    assert estimated(works, [gpu], gpus=0.5) == []
    assert estimates(works, [cpu], gpus=None, cpus=4.0) == []
    assert estimates(works, [gpu], gpus=None, cpus=1, accelerator="H200") == []
    assert estimated([replace(works[0], precision="bf16")], [gpu, cpu]) == []
    assert estimated([replace(works[0], workers=2)], [gpu, cpu]) == []
    assert estimated([], [gpu]) == []


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30), st.integers(1, 12))
def test_more_gangs_end_no_later(seconds: list[float], gangs: int) -> None:
    each = tuple(Span(one, one / 2, one * 2) for one in seconds)
    found = Estimate("a GPU", 1.0, Span(sum(seconds), None, None), 1, 1, each)
    one, some, more = (found.elapsed(count) for count in (1, gangs, gangs + 1))
    assert one.mean == pytest.approx(sum(seconds))
    assert max(seconds) <= some.mean <= one.mean + 1e-9
    assert some.mean >= sum(seconds) / gangs - 1e-6
    assert more.mean <= some.mean + 1e-9
    assert some.low == pytest.approx(some.mean / 2)
    assert some.high == pytest.approx(some.mean * 2)


# ------------------------------------------------------------------------------------------------------ from the rows


def test_trials_that_have_trained_tell_their_pace_once() -> None:
    row = made_rows.trial(1, epoch=2, wall_s=10.0, gpu_seconds=5.0, train_flops=2e12, device_name="a GPU",
                          torch_version="2.14", updated_at=NOW)  # fmt: skip
    (told,) = of_trials([row, row.replace(sweep="other")])
    done = work(row.config, 1, 2e12, 2, until_end=False)
    assert told.pace == pytest.approx(10.0 / done.flops)
    assert (told.gpus, told.source, told.device_name, told.shape) == (0.5, "trained", "a GPU", done.shape)
    silent = [row.replace(epoch=0), row.replace(wall_s=0.0), row.replace(device_name=None),
              row.replace(train_flops=None), row.replace(cached_from="other"), row.replace(slots=3)]  # fmt: skip
    assert of_trials(silent) == []


# -------------------------------------------------------------------------------------------------------- in the store


def test_timings_are_kept_and_replaced_by_shape_device_and_version(store: ResultStore) -> None:
    assert store.timings() == []
    first = [timing("a", 1e9, 1e-12), timing("a", 1e9, 2e-12), timing("b", 1e9, 1e-12, gpus=0.0, cpus=2.0)]
    store.add_timings(first)
    assert store.timings() == first
    again = timing("a", 1e9, 3e-12, at=NOW + timedelta(hours=1))
    other = timing("a", 1e9, 4e-12, device_name="another GPU")
    store.add_timings([again, other])
    assert store.timings() == [first[2], again, other]


@in_a_folder
def test_a_damaged_table_is_told(store: ResultStore) -> None:
    store.folder.put("calibration.parquet", b"nothing")
    with pytest.raises(DamagedError, match=r"calibration\.parquet is no Parquet file"):
        store.timings()
