"""The schedule, the epochs, resumption to the bit, several workers, and the checkpoints' files."""

import copy
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import made_cifar
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed

from mixmo_core import augment, cost, data, evaluate, mixing, networks, train
from mixmo_core.config import (
    RECIPES,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TrialConfig,
    digest,
    identity,
    shape_of,
    unflatten,
)
from mixmo_core.evaluate import CAN_BE_UNDEFINED, summarize
from mixmo_core.metrics import BY_NAME
from mixmo_core.step import Due, Purpose, Step, draw_seed, side_by_side, weighted_loss

EVALUATED = {name for name in BY_NAME if not name.startswith("cifar_c")} - CAN_BE_UNDEFINED
"""What every evaluation of two subnetworks gives."""


def small(**changes: Any) -> TrialConfig:
    """Three epochs of three steps on 60 digits. `changes` by dotted name, with `__` for the dot."""
    settings_ = {
        "data.dataset": "digits", "data.train_images": 60, "data.batch_size": 20, "model.depth": 10, "model.width": 1,
        "optim.epochs": 3, "optim.warmup": 0.5, "optim.decay_at": (0.6,), "seed": 1,
    }  # fmt: skip
    return unflatten({**settings_, **{name.replace("__", "."): value for name, value in changes.items()}})


def run(config: TrialConfig, **options: Any) -> list[tuple[train.Epoch, dict[str, Any]]]:
    """Every epoch with a copy of its state."""
    return [(epoch, copy.deepcopy(epoch.state())) for epoch in train.train(config, **options)]


def same(first: Any, second: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(itertools.starmap(same, zip(first, second, strict=True)))
    return bool(first == second)


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.shared
@pytest.mark.parametrize(
    ("dataset", "recipe", "repetition"),
    [("cifar100", "cifar", 1), ("cifar100", "cifar", 4), ("tiny_imagenet", "tiny_imagenet", 1)],
)
def test_learning_rates_equal_the_reference(
    dataset: str, recipe: str, repetition: int, golden: Callable[[str], Any]
) -> None:
    recorded, name = golden("lr_schedules.npz"), f"{recipe.removesuffix('_imagenet')}_b{repetition}"
    config = unflatten({"data.dataset": dataset, "data.repetition": repetition, **RECIPES[recipe]})
    steps = cost.steps_per_epoch(config)
    assert steps == int(recorded[f"{name}_steps_per_epoch"])
    early = [train.learning_rate(step, 1 + (step - 1) // steps, config) for step in range(1, 2 * steps + 1)]
    assert early == pytest.approx(recorded[f"{name}_steps_epoch1_2"].tolist(), rel=1e-6)
    for epoch in range(1, config.optim.epochs + 1):
        first, last = (epoch - 1) * steps + 1, epoch * steps
        ours = [train.learning_rate(step, epoch, config) for step in (first, last)]
        theirs = [float(recorded[f"{name}_{which}_step"][epoch - 1]) for which in ("first", "last")]
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize(
    ("dataset", "recipe", "base", "warmup", "decayed_from"),
    [("cifar10", "cifar", 0.05, 782, (101, 201, 226)), ("tiny_imagenet", "tiny_imagenet", 0.2, 1000, (600, 900))],
)
def test_rates_follow_the_reference_rule_at_every_repetition(
    dataset: str, recipe: str, base: float, warmup: int, decayed_from: tuple[int, ...], b: int
) -> None:
    """The base over b, after b times the warm-up's steps: what the reference's configurations spell out for b of 1 and
    4. Of Tiny ImageNet at b = 4 nothing is recorded.
    """
    config = unflatten({"data.dataset": dataset, "data.repetition": b, **RECIPES[recipe]})
    steps = cost.steps_per_epoch(config)
    for epoch in range(1, config.optim.epochs + 1):
        everything = range((epoch - 1) * steps + 1, epoch * steps + 1)
        for step in everything if epoch <= 3 else (everything[0], everything[-1]):
            expected = base / b * min(1, step / (warmup * b)) * 0.1 ** sum(epoch >= first for first in decayed_from)
            assert train.learning_rate(step, epoch, config) == pytest.approx(expected, rel=1e-12)


@given(
    epochs=st.integers(1, 40),
    repetition=st.sampled_from([1, 2, 4]),
    warmup=st.floats(0, 3),
    decay_at=st.lists(st.floats(0, 1), max_size=4, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_the_rate_rises_once_and_then_falls(epochs: int, repetition: int, warmup: float, decay_at: list[float]) -> None:
    config = small(
        optim__epochs=epochs, data__repetition=repetition, optim__warmup=warmup, optim__decay_at=tuple(sorted(decay_at))
    )
    steps = cost.steps_per_epoch(config)
    rates = [train.learning_rate(step, 1 + (step - 1) // steps, config) for step in range(1, epochs * steps + 1)]
    base = config.optim.lr / repetition
    assert all(0 < rate <= base * (1 + 1e-12) for rate in rates)
    rising = [later > earlier for earlier, later in itertools.pairwise(rates)]
    warm = warmup * repetition * 3
    assert all(up for step, up in enumerate(rising, start=1) if step + 1 <= warm)
    # After the warm-up it never rises again: what rises, rises within it.
    assert not any(up for step, up in enumerate(rising, start=1) if step > warm)
    if epochs * steps > warm:
        passed = sum(round(part * epochs) < epochs for part in decay_at)
        assert rates[-1] == pytest.approx(base * config.optim.decay_by**passed)


# --------------------------------------------------------------------------------------------------------- the epochs


def test_an_epoch_tells_what_it_gave() -> None:
    config = small(evaluate__every=2, optim__epochs=5)
    epochs = [epoch for epoch, _ in run(config)]
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5]
    assert all(epoch.images == 60 for epoch in epochs)
    assert all(epoch.seconds > 0 for epoch in epochs)
    evaluated = [set(epoch.metrics) - CAN_BE_UNDEFINED == EVALUATED for epoch in epochs]
    assert evaluated == [False, True, False, True, True]  # the last one always is
    assert all(set(epoch.metrics) == {"loss", "lr"} for epoch in epochs[:4:2])
    for epoch in epochs:
        assert epoch.history == tuple(other.metrics for other in epochs[: epoch.epoch])
        assert all(type(value) is float for value in epoch.metrics.values())
        last_step = epoch.epoch * 3
        assert epoch.metrics["lr"] == train.learning_rate(last_step, epoch.epoch, config)


def test_one_subnetwork_has_no_diversity() -> None:
    metrics = run(small(model__subnetworks=1, optim__epochs=1))[0][0].metrics
    assert EVALUATED - set(metrics) == {"ratio_error", "disagreement", "double_fault", "kl_divergence"}
    assert not {"q_statistic", "error_correlation"} & set(metrics)
    assert metrics["subnetwork_top1_mean"] == metrics["top1"]


def test_repetition_counts_its_slots() -> None:
    epoch = run(small(data__repetition=4, optim__epochs=1))[0][0]
    assert epoch.images == 240


def test_the_loss_is_that_of_the_steps() -> None:
    """The first epoch, done again by hand."""
    config = small(optim__epochs=1, evaluate__split="validation", mixing__method="linear")
    training, _ = data.load(config.data, split="validation")
    net = networks.build(config)
    step = Step(config, net, training)
    order = data.batch_repetition(54, 20, 1, 2, generator=torch.Generator().manual_seed(draw_seed(1, 1, Purpose.ORDER)))
    assert len(order) == cost.steps_per_epoch(config) == 2
    for number, indices_MB in enumerate(order, start=1):
        step(indices_MB, number=number, p=0.0, lr=train.learning_rate(number, 1, config))
    epoch, state = run(config)[0]
    assert epoch.metrics["loss"] == float(step.total_loss) / 2
    assert same(state["model"], dict(net.state_dict()))


def test_the_seed_decides_and_nothing_ambient() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(small(optim__epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = run(small(optim__epochs=1)), run(small(optim__epochs=1, seed=2))
    assert same(first[0][1], again[0][1])
    assert first[0][0].metrics["loss"] != other[0][0].metrics["loss"]


def test_it_learns_to_read_digits() -> None:
    config = unflatten(
        {"data.dataset": "digits", "model.depth": 10, "model.width": 1, "model.subnetworks": 1, "optim.epochs": 8}
    )
    assert run(config)[-1][0].metrics["top1"] > 0.9  # 0.936 to 0.975 with 16 seeds; one in ten by guessing


def test_a_trial_that_diverges_stops_and_says_what_to_change() -> None:
    with pytest.raises(train.DivergedError, match=r"diverged at epoch \d+.*smaller optim\.lr \(1e\+06 here\)"):
        run(small(optim__lr=1e6, optim__warmup=0.0, optim__epochs=5))


def test_a_bf16_trial_trains() -> None:
    losses = [epoch.metrics["loss"] for epoch, _ in run(small(precision="bf16"))]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses != [epoch.metrics["loss"] for epoch, _ in run(small())]


def test_missing_images_are_told(tmp_path: Path) -> None:
    epochs = train.train(TrialConfig(data=DataConfig(dataset="cifar10")), data_dir=tmp_path)
    with pytest.raises(data.DatasetError, match="mixmo data get cifar10"):
        next(epochs)


# ---------------------------------------------------------------------------------------------------- side by side


Told = list[tuple[train.Epoch, dict[str, Any]]]


def in_turn(
    configs: Sequence[TrialConfig], *, break_step: int | None = None, **options: Any
) -> tuple[list[Told], list[Exception | None]]:
    """The epochs of trials that take their steps in turn, with copies of their states, and what ended each before its
    last one. Step `break_step` of the first trial has images that are not there.
    """
    going = dict(enumerate(train.steps(config, **options) for config in configs))
    told: list[Told] = [[] for _ in configs]
    ends: list[Exception | None] = [None] * len(configs)
    while going:
        dues: dict[int, Due] = {}
        for i, steps in list(going.items()):
            try:
                while not isinstance(news := next(steps), Due):
                    if isinstance(news, train.Epoch):
                        told[i].append((news, copy.deepcopy(news.state())))
                dues[i] = (
                    news if (i, news.number) != (0, break_step) else news._replace(indices_MB=news.indices_MB + 99)
                )
            except StopIteration:
                del going[i]
            except train.DivergedError as error:
                ends[i] = error
                del going[i]
        for i, fault in zip(dues, side_by_side(list(dues.values())), strict=True):
            if fault is not None:
                ends[i] = fault
                del going[i]
    return told, ends


def assert_alone(config: TrialConfig, told: Told) -> None:
    """That these are the epochs of the trial alone, to the bit."""
    for (epoch, state), (expected, expected_state) in itertools.zip_longest(told, run(config)):
        assert epoch.metrics == expected.metrics
        assert epoch.history == expected.history
        assert same(epoch.logits, expected.logits)
        assert same(state, expected_state)


@given(
    shared=st.fixed_dictionaries(
        {
            "mixing__method": st.sampled_from(["sum", "linear", "cutmix"]),
            "data__augmentation": st.sampled_from(["none", "standard", "augmix"]),
            "data__msda": st.sampled_from(["none", "cutmix"]),
            "data__repetition": st.sampled_from([1, 2]),
        }
    ),
    own=st.lists(
        st.fixed_dictionaries(
            {
                "seed": st.integers(0, 2**32 - 1),
                "optim__lr": st.sampled_from([0.01, 0.2]),
                "optim__epochs": st.integers(1, 3),
                "evaluate__every": st.integers(1, 2),
                "mixing__probability": st.sampled_from([0.0, 0.5, 1.0]),
            }
        ),
        min_size=2,
        max_size=3,
    ),
)
@settings(max_examples=6, deadline=None)
def test_trials_that_take_their_steps_in_turn_are_those_alone_to_the_bit(
    shared: dict[str, Any], own: list[dict[str, Any]]
) -> None:
    configs = [small(**{**shared, **each}) for each in own]
    assert len({shape_of(config) for config in configs}) == 1
    told, ends = in_turn(configs, save_when=lambda: True)
    assert not any(ends)
    for config, epochs in zip(configs, told, strict=True):
        assert len(epochs) == config.optim.epochs
        assert_alone(config, epochs)


def test_a_trial_that_diverges_or_breaks_leaves_its_neighbours_as_they_are_to_the_bit() -> None:
    sound = [small(seed=2), small(seed=3)]
    wild = small(optim__lr=1e9)
    told, ends = in_turn([wild, *sound])
    assert isinstance(ends[0], train.DivergedError)
    assert not told[0]
    broken, faults = in_turn([small(), *sound], break_step=5)
    assert isinstance(faults[0], IndexError)
    assert [epoch.epoch for epoch, _ in broken[0]] == [1]
    for epochs in (told, broken):
        for config, own in zip(sound, epochs[1:], strict=True):
            assert len(own) == 3
            assert_alone(config, own)


# ---------------------------------------------------------------------------------------------------------- resumption


@given(
    method=st.sampled_from(["sum", "linear", "cutmix"]),
    M=st.integers(1, 3),
    repetition=st.sampled_from([1, 2]),
    momentum=st.sampled_from([0.0, 0.9]),
    every=st.integers(1, 3),
    split=st.sampled_from(["test", "validation"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, method: str, M: int, repetition: int, momentum: float, every: int, split: str, seed: int
) -> None:
    """Promise P5, from every epoch, through the file."""
    config = small(
        mixing__method=method, model__subnetworks=M, data__repetition=repetition, optim__momentum=momentum,
        evaluate__every=every, evaluate__split=split, seed=seed,
    )  # fmt: skip
    whole = run(config)
    assert [epoch.epoch for epoch, _ in whole] == [1, 2, 3]
    for stopped in (1, 2, 3):
        state = train.load(train.save(whole[stopped - 1][1], tmp_path))
        assert same(state, whole[stopped - 1][1])
        rest = run(config, resume=state)
        assert [epoch.epoch for epoch, _ in rest] == [1, 2, 3][stopped:]
        for (resumed, resumed_state), (epoch, epoch_state) in zip(rest, whole[stopped:], strict=True):
            assert resumed.metrics == epoch.metrics
            assert resumed.history == epoch.history
            assert same(resumed_state, epoch_state)


def after(step: int, done: int = 0) -> Callable[[], bool]:
    """A `save_when` that says True once, after this step of the trial, of which `done` are done."""
    steps = itertools.count(done + 1)
    return lambda: next(steps) == step


def moment(config: TrialConfig, step: int, **options: Any) -> dict[str, Any]:
    """The state after this step of the trial, as it comes out of a training that ends there."""
    for told in train.train(config, save_when=after(step), **options):
        if isinstance(told, train.Moment):
            return copy.deepcopy(told.state())
    raise AssertionError(f"no moment after step {step}")


def timeless(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the one number that the clock decides."""
    part = {name: value for name, value in state.get("part", {}).items() if name != "seconds"}
    return {**state, "part": part}


def interrupted(
    config: TrialConfig, cuts: Sequence[int], folder: Path
) -> tuple[list[tuple[train.Epoch, dict[str, Any]]], list[dict[str, Any]]]:
    """A training that is killed after each of these steps and goes on from the file. Its epochs, and the states."""
    epochs, states = [], []
    state: dict[str, Any] | None = None
    for done, cut in itertools.pairwise([0, *cuts, 0]):
        for told in train.train(config, resume=state, save_when=after(cut, done)):
            if isinstance(told, train.Moment):
                state = train.load(train.save(told.state(), folder))
                states.append(state)
                break
            epochs.append((told, copy.deepcopy(told.state())))
    return epochs, states


@given(
    method=st.sampled_from(["sum", "linear", "cutmix"]),
    M=st.integers(1, 2),
    repetition=st.sampled_from([1, 2]),
    momentum=st.sampled_from([0.0, 0.9]),
    every=st.integers(1, 2),
    split=st.sampled_from(["test", "validation"]),
    data=st.data(),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_training_resumed_at_any_steps_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, method: str, M: int, repetition: int, momentum: float, every: int, split: str, data: st.DataObject
) -> None:
    """Promise P5, from up to four moments of one training, through the files."""
    config = small(
        mixing__method=method, model__subnetworks=M, data__repetition=repetition, optim__momentum=momentum,
        evaluate__every=every, evaluate__split=split, optim__epochs=2,
    )  # fmt: skip
    steps = cost.steps_per_epoch(config)
    first_and_last = st.sampled_from([1, steps, steps + 1, 2 * steps])
    cuts = sorted(data.draw(st.sets(first_and_last | st.integers(1, 2 * steps), min_size=1, max_size=4)))
    whole = run(config)
    resumed, states = interrupted(config, cuts, tmp_path)
    assert [(state["epoch"], state["part"]["step"]) for state in states] == [
        (1 + (cut - 1) // steps, 1 + (cut - 1) % steps) for cut in cuts
    ]
    assert [epoch.epoch for epoch, _ in resumed] == [1, 2]
    for (epoch, state), (expected, expected_state) in zip(resumed, whole, strict=True):
        assert epoch.metrics == expected.metrics
        assert epoch.history == expected.history
        assert same(epoch.logits, expected.logits)
        assert same(state, expected_state)
    for cut, state in zip(cuts, states, strict=True):  # nor do earlier interruptions show in a later moment
        assert same(timeless(state), timeless(moment(config, cut)))


def test_a_training_that_is_only_saved_goes_on_as_if_nobody_had_asked() -> None:
    config, whole, saved = small(), run(small()), []
    for told in train.train(config, save_when=lambda: True):
        state = copy.deepcopy(told.state())
        if isinstance(told, train.Moment):
            saved.append((told.epoch, told.step))
            assert (state["epoch"], state["part"]["step"], len(state["history"])) == (*saved[-1], told.epoch - 1)
        else:
            assert same(state, whole[told.epoch - 1][1])
    assert saved == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]


def test_the_seconds_of_an_interrupted_epoch_are_those_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for a second a step, and an hour of whoever saves."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    state: dict[str, Any] | None = None
    seconds = []

    def asked(wanted: Callable[[], bool]) -> bool:
        now[0] += 1
        return wanted()

    for cut in (1, 2, 5, 0):
        done = 0 if state is None else 3 * len(state["history"]) + state["part"]["step"]
        for told in train.train(small(), resume=state, save_when=partial(asked, after(cut, done))):
            now[0] += 3600
            if isinstance(told, train.Moment):
                state = copy.deepcopy(told.state())
                break
            seconds.append(told.seconds)
    assert seconds == [3.0, 3.0, 3.0]
    for told in train.train(small(), save_when=partial(asked, lambda: True)):
        now[0] += 3600
        assert isinstance(told, train.Moment) or told.seconds == 3.0


def test_resuming_does_not_write_into_the_checkpoint() -> None:
    config = small(optim__epochs=2)
    for state in (run(config)[0][1], moment(config, 2)):
        before = copy.deepcopy(state)
        run(config, resume=state)
        assert same(state, before)


def test_a_checkpoint_of_another_trial_is_refused() -> None:
    config = small(optim__epochs=1)
    state = run(config)[0][1]
    others = (small(optim__epochs=1, seed=2), small(optim__epochs=2), small(optim__epochs=1, model__width=2))
    for held, other in itertools.product((state, moment(config, 2)), others):
        with pytest.raises(train.CheckpointError, match=digest(identity(config))[:12]):
            train.train(other, resume=held)
    list(train.train(config, resume=state))


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused() -> None:
    config = small(optim__epochs=2)
    for kind in ("model", "momentum"):
        state = run(config)[0][1]
        state[kind]["encoders"] = torch.zeros(3, 16, 1, 3, 3)
        with pytest.raises(train.CheckpointError, match=f"the checkpoint's {kind}"):
            next(train.train(config, resume=state))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": 4}, "step 4 of an epoch that has 3"),
        ({"step": 0}, "part is missing or wrong"),
        ({"step": "1"}, "part is missing or wrong"),
        ({"seconds": None}, "part is missing or wrong"),
        ({"statistics_RS": [1.0]}, "part is missing or wrong"),
        ({"colour": "red"}, "part is missing or wrong"),
        ({"statistics_RS": torch.zeros(2, 9)}, "statistics are not those of this network"),
    ],
)
def test_a_moment_that_cannot_be_of_this_trial_is_refused(change: dict[str, Any], match: str) -> None:
    config = small(optim__epochs=1)
    state = moment(config, 2)
    with pytest.raises(train.CheckpointError, match=match):
        next(train.train(config, resume={**state, "part": {**state["part"], **change}}))


def test_a_state_that_is_no_number_is_none_to_go_on_from() -> None:
    """The loss of a step is that of the weights before it: those after it may be beyond all numbers first."""
    too_fast = small(optim__epochs=1, optim__lr=1e300, optim__warmup=0.0)
    with pytest.raises(train.DivergedError, match="diverged at epoch 1, step 1: its last step made weights"):
        next(train.train(too_fast, save_when=lambda: True))
    one_step = small(optim__epochs=1, optim__lr=1e300, optim__warmup=0.0, data__train_images=20)
    with pytest.raises(train.DivergedError, match="diverged at epoch 1: its last step made weights"):
        next(train.train(one_step))


# ------------------------------------------------------------------------------------------------------------- logits


def test_an_evaluated_epoch_has_the_logits_behind_its_metrics() -> None:
    config = small(evaluate__every=2, evaluate__split="validation")
    _, held_out = data.load(config.data, split="validation")
    epochs = [epoch for epoch, _ in run(config)]
    assert [epoch.logits is None for epoch in epochs] == [epoch.labels is None for epoch in epochs]
    assert [epoch.logits is None for epoch in epochs] == [True, False, False]
    for epoch in epochs[1:]:
        assert epoch.logits is not None
        assert epoch.labels is not None
        assert (epoch.logits.shape, epoch.labels.shape) == ((2, 6, 10), (6,))
        assert torch.equal(epoch.labels, held_out.labels_N)
        assert evaluate.summarize(epoch.logits, epoch.labels).items() <= epoch.metrics.items()


# --------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return run(small(optim__epochs=2))[1][1]


def test_a_file_is_named_after_its_content(state: dict[str, Any], tmp_path: Path) -> None:
    path = train.save(state, tmp_path / "new" / "folder")
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"epoch-00002-{content[:16]}.pt"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    within = train.save(moment(small(optim__epochs=2), 5), tmp_path)
    assert within.name == f"epoch-00002-step-000002-{hashlib.sha256(within.read_bytes()).hexdigest()[:16]}.pt"
    assert train.save(copy.deepcopy(state), path.parent) == path  # the same state, the same bytes
    assert same(train.load(path), state)


def test_a_file_holds_tensors_and_plain_values_only(state: dict[str, Any], tmp_path: Path) -> None:
    loaded = torch.load(train.save(state, tmp_path), weights_only=True)
    assert set(loaded) == {"format", "torch", "digest", "epoch", "history", "model", "momentum"}
    assert loaded["torch"] == torch.__version__
    assert loaded["history"][1]["top1"] == state["history"][1]["top1"]


def test_damaged_and_renamed_files_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    path = train.save(state, tmp_path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content[:5000] + b"\0" + content[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(train.CheckpointError, match="damaged or renamed"):
            train.load(path)
    path.write_bytes(content)
    for name, match in (
        (path.name.replace("00002", "00003"), "it holds epoch 2"),
        (path.name.replace("00002", "00002-step-000002"), "it holds epoch 2"),
        (path.name[:-4] + ("0" if path.name[-4] != "0" else "1") + ".pt", "damaged or renamed"),
        ("model.pt", "not the name of a checkpoint"),
    ):
        renamed = tmp_path / name
        renamed.write_bytes(content)
        with pytest.raises(train.CheckpointError, match=match):
            train.load(renamed)
    with pytest.raises(train.CheckpointError, match="cannot be read: No such file"):
        train.load(tmp_path / "epoch-00009-0123456789abcdef.pt")


class _Foreign:
    """What a checkpoint must not hold."""


def _named(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / f"epoch-00002-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: {"weights": state["model"]}, "not a checkpoint of mixmo"),
        (lambda state: [1, 2], "not a checkpoint of mixmo"),
        (lambda state: {**state, "extra": _Foreign()}, "not a checkpoint of mixmo"),
        (lambda state: {**state, "format": 99}, "written by a newer mixmo"),
        (lambda state: {name: value for name, value in state.items() if name != "model"}, "model is missing"),
        (lambda state: {**state, "history": state["history"][:1]}, "history is missing or wrong"),
        (lambda state: {**state, "part": {"step": 1}}, "part is missing or wrong"),
    ],
)
def test_foreign_files_are_refused(change: Any, match: str, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(change(state), tmp_path / "any")
    with pytest.raises(train.CheckpointError, match=match):
        train.load(_named(tmp_path, (tmp_path / "any").read_bytes()))


def test_a_file_that_torch_cannot_read_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 nor a zip"):
        with pytest.raises(train.CheckpointError, match="not a checkpoint of mixmo"):
            train.load(_named(tmp_path, content))


def test_a_failed_write_leaves_nothing(state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train.save(state, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- workers

TWO = small(optim__epochs=2, optim__weight_decay=1e-3)
LONG = small(optim__epochs=2, data__train_images=40, data__batch_size=4)
"""Ten steps an epoch, of which two workers stop after the 8th and the 10th to agree."""


def _worker(rank: int, folder: Path) -> None:
    """One of two workers: trains, trains again from the first epoch, and writes what it saw."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder / 'rendezvous'}", timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    whole = run(TWO)
    resumed = run(TWO, resume=whole[0][1])
    long, asked = run(LONG), itertools.count(1)
    third = lambda: rank == 1 and next(asked) == 3  # noqa: E731 - one says so, after the 8th step of the second epoch
    told = [(type(each).__name__, copy.deepcopy(each.state())) for each in train.train(LONG, save_when=third)]
    within = told[1][1]
    saved = train.load(train.save(within, folder / f"{rank}"))
    try:
        train.train(small(data__batch_size=15))
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save(
        {
            "metrics": [epoch.metrics for epoch, _ in whole],
            "states": [state for _, state in whole],
            "resumed": [state for _, state in resumed],
            "images": whole[0][0].images,
            "logits": whole[0][0].logits,
            "told": [kind for kind, _ in told],
            "long": [state for _, state in long],
            "within": timeless(within),
            "saved": [told[0][1], told[2][1]],
            "from within": [state for _, state in run(LONG, resume=saved)],
            "refused": refused,
        },
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


def by_hand(config: TrialConfig, workers: int) -> tuple[list[dict[str, float]], networks.MixMoNet]:
    """What several workers should do, in one process: local batch norm, averaged gradients and statistics."""
    training, held_out = data.load(config.data)
    nets = [networks.build(config) for _ in range(workers)]
    steps = [Step(config, net, training, rank=rank, workers=workers) for rank, net in enumerate(nets)]
    rows, number = [], 0
    for epoch in range(1, config.optim.epochs + 1):
        generator = torch.Generator().manual_seed(draw_seed(config.seed, epoch, Purpose.ORDER))
        order = data.batch_repetition(len(training), config.data.batch_size, 1, 2, generator=generator)
        losses = []
        for indices_MB in order:
            number += 1
            p = mixing.probability(epoch, config.optim.epochs, config.mixing.probability)
            for step, net in zip(steps, nets, strict=True):
                net.train().zero_grad()
                step.seed(number)
                masks, kappa_MB = step._mixture(indices_MB, p)
                images_MBCHW, targets = step._gather(indices_MB, masks)
                loss = weighted_loss(net(images_MBCHW, masks), targets.labels, kappa_MB, config.mixing.weight_root)
                torch.autograd.backward(loss)
                losses.append(float(loss.detach()))
            for copies in zip(*(net.parameters() for net in nets), strict=True):
                grads = [each.grad for each in copies if each.grad is not None]
                mean = torch.stack(grads).mean(dim=0)
                for grad in grads:
                    grad.copy_(mean)  # in place: the fused SGD reads memory, not strides
            for step in steps:
                step.optimiser.param_groups[0]["lr"] = train.learning_rate(number, epoch, config)
                step.optimiser.step()
        for buffers in zip(*(net.buffers() for net in nets), strict=True):
            mean = torch.stack(buffers).mean(dim=0)
            for buffer in buffers:
                buffer.copy_(mean)
        rows.append({"loss": sum(losses) / len(losses)})
    assert len(held_out) == 360
    return rows, nets[0]


@pytest.mark.slow
def test_two_workers_train_one_trial(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)  # every worker gets the same metrics and state
    assert same(first["resumed"], first["states"][1:])
    assert first["images"] == 60
    assert first["logits"].shape == (2, 360, 10)
    assert first["told"] == ["Epoch", "Moment", "Epoch"]
    assert (first["within"]["epoch"], first["within"]["part"]["step"]) == (2, 8)
    own, others = first["within"]["part"]["statistics_RS"]
    assert not torch.equal(own, others)  # batch norm saw other slots
    assert same(first["saved"], first["long"])
    assert same(first["from within"], first["long"][1:])
    assert "15 cannot be split over 2 workers" in first["refused"]
    assert first["states"][0]["digest"] == digest(identity(TWO, workers=2))

    rows, net = by_hand(TWO, workers=2)
    for metrics, row in zip(first["metrics"], rows, strict=True):
        assert set(metrics) - CAN_BE_UNDEFINED == EVALUATED
        assert metrics["loss"] == pytest.approx(row["loss"], rel=1e-5)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(first["states"][-1]["model"][name], tensor, rtol=1e-4, atol=1e-5)
    alone = run(TWO)
    assert alone[-1][0].metrics["loss"] != first["metrics"][-1]["loss"]  # batch norm saw other slots
    with pytest.raises(train.CheckpointError, match="number of workers"):
        train.train(TWO, resume=first["states"][0])


@pytest.mark.parametrize(
    ("dataset", "arch", "batch", "match"),
    [
        ("digits", "wide_resnet", 3, "3 cannot be split over 2 workers"),
        ("digits", "wide_resnet", 2, None),
        ("digits", "preact_resnet", 2, "batch norm needs two"),
        ("synthetic", "preact_resnet", 2, "batch norm needs two"),
        ("cifar10", "preact_resnet", 2, None),
        ("digits", "preact_resnet", 4, None),
    ],
)
def test_every_worker_has_slots_enough(dataset: Any, arch: Any, batch: int, match: str | None) -> None:
    """What is refused is what the network could not train on, and nothing else."""
    config = TrialConfig(
        data=DataConfig(dataset=dataset, batch_size=batch),
        model=ModelConfig(arch=arch, depth=10, width=1, subnetworks=1),
    )
    if match:
        with pytest.raises(ValueError, match=match):
            train._check_split(config, 2)
    else:
        train._check_split(config, 2)
    if batch % 2 == 0:
        net, (C, S) = networks.build(config), networks.image_shape(config)
        images_MBCHW = torch.rand(1, batch // 2, C, S, S)
        if match:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                net(images_MBCHW)
        else:
            assert net(images_MBCHW).isfinite().all()


def test_logits_of_all_workers_are_put_in_order() -> None:
    """With as many images as they are, though they cannot be split evenly."""
    logits_MNK = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    shares = [logits_MNK[:, rank::3] for rank in range(3)]
    padded = [torch.nn.functional.pad(share, (0, 0, 0, 3 - share.shape[1])) for share in shares]

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        assert any(torch.equal(own, each) for each in padded)
        for part, each in zip(parts, padded, strict=True):
            part.copy_(each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.all_gather", all_gather)
        for share in shares:
            assert torch.equal(train._gathered(share, 7, 3), logits_MNK)


def test_evaluation_is_on_the_split_that_was_asked_for() -> None:
    config = small(optim__epochs=1)
    held_out = dataclasses.replace(config, evaluate=EvaluateConfig(split="validation"))
    assert run(held_out)[0][0].images == 40  # 54 images in batches of 20
    top1 = run(held_out)[0][0].metrics["top1"]
    assert round(top1 * 6, 9) == round(top1 * 6)  # of six images


# ---------------------------------------------------------------------------------------------------------- robustness


def on_cifar(robustness: str = "cifar_c") -> TrialConfig:
    return small(data__dataset="cifar10", data__train_images="all", evaluate__robustness=robustness, optim__epochs=2)


def test_corrupted_images_are_measured_after_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cifar.forget()
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    arrays = made_cifar.write_cifar10_c(tmp_path, monkeypatch)
    config = on_cifar()
    (first, _), (last, state) = run(config, data_dir=tmp_path)
    corrupted = {name for name in BY_NAME if name.startswith("cifar_c")}
    assert not corrupted & set(first.metrics)
    assert corrupted < set(last.metrics)

    net = networks.build(config)
    net.load_state_dict(state["model"])
    net.eval()
    with torch.inference_mode():
        logits = {
            name: net(augment.normalise(torch.from_numpy(arrays[name].transpose(0, 3, 1, 2)), "cifar10"))
            for name in data.CORRUPTIONS
        }
    labels = torch.from_numpy(arrays["labels"].astype("int64"))
    for count, names in ((19, {"cifar_c_top1": "top1", "cifar_c_nll": "nll", "cifar_c_ece": "ece"}),
                         (15, {"cifar_c15_top1": "top1"})):  # fmt: skip
        by_hand = summarize(torch.cat([logits[name] for name in data.CORRUPTIONS[:count]], dim=1), labels.repeat(count))
        for ours, name in names.items():
            assert last.metrics[ours] == pytest.approx(by_hand[name], rel=1e-5), ours

    plain = run(on_cifar("none"), data_dir=tmp_path)  # nothing else comes out differently
    same_metrics = {name: value for name, value in last.metrics.items() if name not in corrupted}
    assert plain[-1][0].metrics == pytest.approx(same_metrics, nan_ok=True)
    assert same(plain[-1][1]["model"], state["model"])


def test_missing_corrupted_images_are_told_before_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_cifar.forget()
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    with pytest.raises(data.DatasetError, match=r"no folder CIFAR-10-C in it.*mixmo data get cifar10_c DEST"):
        next(train.train(on_cifar(), data_dir=tmp_path))


def test_filter_activity_is_that_of_the_weights() -> None:
    epoch, state = run(small(optim__epochs=1))[0]
    net = networks.build(small())
    net.load_state_dict(state["model"])
    activity = networks.filter_activity(net)
    assert len(activity) == 4
    assert {name: epoch.metrics[name] for name in activity} == activity
