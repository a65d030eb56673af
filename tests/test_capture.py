"""Steps that are replayed: the eager step's numbers, whatever trial had the network before, and nothing believed.

A recorder that takes the step anew stands in for the GPU's graph; `tests/test_capture_on_gpu.py` has the real one.
"""

import dataclasses
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import SYSTEMS, TINY, batch, images, with_data
from torch import Tensor

from mixmo_core import capture, networks, train
from mixmo_core.capture import MOST, WARM_UP, CapturedStep, worthwhile
from mixmo_core.config import DataConfig, ModelConfig, OptimConfig, TrialConfig
from mixmo_core.step import Due, Step, side_by_side

LRS = (0.0625, 0.03125, 0.125, 0.0625, 0.25, 0.0)
"""Numbers that fp32 has: the rate is a tensor here, and a number in an eager step."""


def anew(body: Callable[[], None], _: Collection[torch.Generator]) -> Callable[[], None]:
    return body


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(capture.RECORDERS, "cpu", anew)
    monkeypatch.setattr(capture, "_idle", [])


def state(step: Step, net: torch.nn.Module) -> list[Tensor]:
    momenta = [held["momentum_buffer"] for held in step.optimiser.state.values() if "momentum_buffer" in held]
    return [tensor.clone() for tensor in (*net.state_dict().values(), *momenta, step.total_loss)]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def eager(config: TrialConfig, data: Any, lrs: tuple[float, ...] = LRS) -> list[Tensor]:
    """What so many steps make of a trial."""
    net = networks.build(config)
    step = Step(config, net, data)
    for number, lr in enumerate(lrs, start=1):
        step(batch(config, number), number=number, p=number / 8, lr=lr)
    return state(step, net)


def captured(step: CapturedStep, config: TrialConfig, lrs: tuple[float, ...] = LRS) -> list[Tensor]:
    for number, lr in enumerate(lrs, start=1):
        step(batch(config, number), number=number, p=number / 8, lr=lr)
    return state(step, step.net)


@pytest.mark.parametrize(
    "system", ["MIMO", "Cut-MixMo", "Cut-MixMo, Mixup, AugMix", "manifold_mixup", "1 encoder, 2 classifiers by ratio"]
)
def test_captured_steps_are_the_eager_ones_to_the_bit(system: str) -> None:
    """Whatever changes between two: images, seeds, the chance of binary masks, the rate."""
    config = SYSTEMS[system]
    data = images(config)
    step = CapturedStep(config, data)
    assert same(captured(step, config), eager(config, data))
    assert step.is_replayed


def test_a_replay_works_on_the_memory_of_the_recorded_step() -> None:
    """A graph knows addresses: nothing that it reads or writes may ever be another tensor."""
    config = with_data(msda="cutmix", augmentation="augmix")
    step = CapturedStep(config, images(config))

    def addresses() -> list[int]:
        inputs = (step._indices_MB, step._p, step._lr)
        changed = (tensor for tensors in step._state().values() for tensor in tensors)
        return [tensor.data_ptr() for tensor in (*inputs, *changed)]

    before = addresses()
    captured(step, config)
    assert addresses() == before
    step.restart(dataclasses.replace(config, seed=5))
    captured(step, config)
    assert addresses() == before
    assert step.optimiser.param_groups[0]["lr"] is step._lr


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2, unique=True), steps=st.integers(0, 6))
@settings(max_examples=8, deadline=None)
def test_a_trial_that_takes_over_has_the_numbers_of_one_that_is_the_first(seeds: list[int], steps: int) -> None:
    """However far the one before it has come, and though it ended in numbers that are none."""
    data = images(TINY)
    one, other = (dataclasses.replace(TINY, seed=seed) for seed in seeds)
    step = CapturedStep(one, data)
    captured(step, one, LRS[:steps])
    with torch.no_grad():
        for tensor in (*step.net.parameters(), *step.net.buffers(), *step._momenta(), step.total_loss):
            tensor.fill_(torch.nan)
    step.restart(other)
    assert same(captured(step, other), eager(other, data))


# ------------------------------------------------------------------------------------------------ nothing is believed


def failing(_: Callable[[], None], __: Collection[torch.Generator]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore about it")


def other_draws(body: Callable[[], None], generators: Collection[torch.Generator]) -> Callable[[], None]:
    def replay() -> None:
        for generator in generators:
            generator.manual_seed(1)
        body()

    return replay


def twice(body: Callable[[], None], _: Collection[torch.Generator]) -> Callable[[], None]:
    def replay() -> None:
        body()
        body()

    return replay


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (failing, "operation not permitted when stream is capturing$"),
        (lambda *_: lambda: None, "weights are .* apart"),
        (other_draws, "weights are .* apart"),
        (twice, "weights are .* apart"),
    ],
)
def test_what_cannot_be_recorded_or_is_another_step_is_warned_of_and_taken_eagerly(
    monkeypatch: pytest.MonkeyPatch, record: capture.Recorder, told: str
) -> None:
    monkeypatch.setitem(capture.RECORDERS, "cpu", record)
    data = images(TINY)
    step = CapturedStep(TINY, data)
    with pytest.warns(UserWarning, match=told):
        found = captured(step, TINY)
    assert same(found, eager(TINY, data))
    assert not step.is_replayed
    capture.give_back(step)
    assert not capture._idle, "the next trial tries anew"


# -------------------------------------------------------------------------------------------------- from trial to trial


def test_a_step_that_is_given_back_goes_to_the_next_trial_of_its_shape() -> None:
    data = images(TINY)
    step = capture.lend(TINY, data)
    captured(step, TINY)
    beside = capture.lend(dataclasses.replace(TINY, seed=9), data)
    assert beside is not step, "it is not free yet"
    capture.give_back(step)
    decayed = OptimConfig(weight_decay=1e-3)
    others = [
        (dataclasses.replace(TINY, model=ModelConfig(depth=10, width=2)), data),
        (dataclasses.replace(TINY, optim=decayed), data),
        (TINY, images(TINY)),
    ]
    for config, seen in others:
        assert capture.lend(config, seen) is not step
    slower = dataclasses.replace(TINY, seed=4, optim=OptimConfig(lr=0.01, epochs=2))
    assert capture.lend(slower, data) is step
    assert same(captured(step, slower), eager(slower, data))


def test_a_step_that_was_not_recorded_yet_is_not_kept() -> None:
    step = capture.lend(TINY, images(TINY))
    captured(step, TINY, LRS[:WARM_UP])
    capture.give_back(step)
    assert not capture._idle


def test_where_memory_is_short_the_oldest_that_no_trial_has_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    data, widths = images(TINY), [1, 2, 3]
    configs = [dataclasses.replace(TINY, model=ModelConfig(depth=10, width=width)) for width in widths]
    steps = [capture.lend(config, data) for config in configs]
    for step, config in zip(steps, configs, strict=True):
        captured(step, config)
        capture.give_back(step)
    assert capture.lend(configs[1], data) is steps[1], "what fits takes no more memory"
    capture.give_back(steps[1])
    monkeypatch.setattr(capture, "_free_part", lambda _: 1.0 - 0.3 * len(capture._idle))
    capture.lend(dataclasses.replace(TINY, precision="bf16"), data)
    assert capture._idle == [steps[1]]


def trial(**changes: Any) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(dataset="digits", train_images=60, batch_size=10, augmentation="none"),
        model=ModelConfig(depth=10, width=1, subnetworks=2),
        **{"optim": OptimConfig(epochs=2, lr=0.0625, warmup=0), **changes},
    )


def run(config: TrialConfig, **options: Any) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """The metrics and the weights of each epoch."""
    return [
        (each.metrics, {name: tensor.clone() for name, tensor in each.state()["model"].items()})
        for each in train.train(config, **options)
    ]


def assert_alike(some: Any, others: Any) -> None:
    for (metrics, model), (expected, others_model) in zip(some, others, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-4)
        for name, tensor in model.items():
            torch.testing.assert_close(tensor, others_model[name], rtol=1e-4, atol=1e-5)


def test_a_captured_training_is_the_eager_one_and_leaves_its_step_to_the_next() -> None:
    first, second = trial(seed=1), trial(seed=2, optim=OptimConfig(epochs=3, lr=0.1))
    assert_alike(run(first), run(first, captured=False))
    (step,) = capture._idle
    assert_alike(run(second), run(second, captured=False))
    assert capture._idle == [step]


def test_a_captured_training_goes_on_from_a_checkpoint_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole = run(trial())
    with closing(cast(Any, train.train(trial(), save_when=lambda: True))) as going:
        moments = [next(going) for _ in range(8)]
        path = train.save(moments[-1].state(), tmp_path)
    assert len(capture._idle) == 1, "what is given up is given back"
    assert_alike(run(trial(), resume=train.load(path)), whole[1:])
    assert_alike(run(trial(), resume=train.load(path), captured=False), whole[1:])


def test_a_trial_that_diverges_leaves_its_step_to_one_that_does_not() -> None:
    with pytest.raises(train.DivergedError):
        run(trial(optim=OptimConfig(epochs=2, lr=1e9, warmup=0)))
    assert_alike(run(trial()), run(trial(), captured=False))


# --------------------------------------------------------------------------------------------------------- side by side


def test_captured_steps_side_by_side_are_those_of_each_alone() -> None:
    data = images(TINY)
    configs = [dataclasses.replace(TINY, seed=seed) for seed in range(3)]
    steps = [capture.lend(config, data) for config in configs]
    for number, lr in enumerate(LRS, start=1):
        dues = [Due(step, batch(TINY, number), number, p=number / 8, lr=lr) for step in steps]
        assert side_by_side(dues) == [None] * 3
    for step, config in zip(steps, configs, strict=True):
        assert same(state(step, step.net), eager(config, data))


@given(st.lists(st.floats(1, 1000), min_size=5, max_size=5), st.integers(1, MOST * 2))
def test_as_many_go_side_by_side_as_pay_and_fit(rates: list[float], fit: int) -> None:
    asked: list[int] = []

    def rate(count: int) -> float | None:
        asked.append(count)
        return rates[count.bit_length() - 1] if count <= fit else None

    count = worthwhile(rate)
    tried = rates[: len(asked)]
    assert asked == [1 << each for each in range(len(asked))]
    assert count <= min(fit, MOST)
    assert all(after >= 1.1 * before for before, after in zip(tried, rates[1 : count.bit_length()], strict=False))
    at = count.bit_length() - 1
    assert count == MOST or 2 * count > fit or rates[at + 1] < 1.1 * rates[at]


def test_the_device_tells_how_many_go_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which a turn takes as long for two as for one, and from then on for each alike."""
    data, now = images(TINY), [0.0]

    def turn(dues: list[Due]) -> list[Exception | None]:
        now[0] += max(2, len(dues))
        return side_by_side(dues)

    monkeypatch.setattr(capture, "side_by_side", turn)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert capture.slots(TINY, data) == 2
    assert len(capture._idle) == 4, "they are there for the trials that follow"
    seeds = {step._config.seed for step in capture._idle}
    assert len(seeds) == 4
    step = capture.lend(TINY, data)
    assert same(captured(step, TINY), eager(TINY, data))


def test_memory_that_ends_is_the_end_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(TINY)

    def turn(dues: list[Due]) -> list[Exception | None]:
        return [torch.OutOfMemoryError("no more") if at else None for at, _ in enumerate(dues)]

    monkeypatch.setattr(capture, "side_by_side", turn)
    assert capture.slots(TINY, data) == 1


def test_where_nothing_is_captured_there_is_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(capture.RECORDERS, "cpu")
    assert train.slots(TINY, device="cpu") == 1
    assert capture.slots(TINY, images(TINY)) == 1
