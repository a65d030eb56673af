"""What only a GPU shows of captured steps: the graph has the eager step's numbers, for each trial that takes it over
and for several at once, and the host waits for nothing. `benchmarks/gpu.sh` runs it where little else is installed.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmo_core import capture, networks, train
from mixmo_core.capture import WARM_UP, CapturedStep
from mixmo_core.config import DATASETS, DataConfig, MixingConfig, ModelConfig, OptimConfig, TrialConfig
from mixmo_core.data import Images
from mixmo_core.step import Due, Step, side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here to capture steps on")

STEPS = WARM_UP + 6
TRIAL = TrialConfig(
    data=DataConfig(dataset="cifar100", batch_size=32, repetition=4),
    model=ModelConfig(depth=10, width=2, subnetworks=2),
    seed=3,
)


def with_(config: TrialConfig = TRIAL, **sections: dict[str, Any]) -> TrialConfig:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **given) for name, given in sections.items()}
    )


SYSTEMS = {
    "Cut-MixMo": TRIAL,
    "bf16": dataclasses.replace(TRIAL, precision="bf16"),
    "CutMix, AugMix": with_(data={"msda": "cutmix", "augmentation": "augmix"}),
    "ResizeMix": with_(data={"msda": "resizemix"}),
    "Manifold Mixup": with_(data={"msda": "manifold_mixup"}, model={"subnetworks": 1}),
    "no momentum": with_(optim={"momentum": 0.0}),
    "PreActResNet": dataclasses.replace(
        TRIAL, data=DataConfig(dataset="tiny_imagenet", batch_size=20), model=ModelConfig(arch="preact_resnet", width=1)
    ),
    **{method: dataclasses.replace(TRIAL, mixing=MixingConfig(method=method)) for method in
       ("sum", "linear", "cowmix", "fmix", "horizontal", "channel", "channel_split", "patchup_hard", "patchup_soft")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def ordered_sums() -> Iterator[None]:
    """Algorithms that add in a fixed order, so that two runs can be held against each other; and no step left over."""
    capture._idle.clear()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    capture._idle.clear()
    torch.cuda.empty_cache()


def images(config: TrialConfig, count: int = 400) -> Images:
    data, generator = DATASETS[config.data.dataset], torch.Generator().manual_seed(0)
    shape = (count, data.channels, data.size, data.size)
    pixels_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Images(pixels_NCHW.cuda(), (torch.arange(count) % data.classes).cuda())


def batch(config: TrialConfig, number: int) -> Tensor:
    shape = (config.model.subnetworks, config.data.batch_size)
    return torch.randint(400, shape, generator=torch.Generator().manual_seed(number)).cuda()


def taken(step: Step, config: TrialConfig, count: int = STEPS) -> list[float]:
    """The loss of each step."""
    losses = []
    for number in range(1, count + 1):
        step.total_loss.zero_()
        step(batch(config, number), number=number, p=number / count, lr=0.05 / number)
        losses.append(float(step.total_loss))
    return losses


def eagerly(config: TrialConfig, data: Images) -> tuple[list[float], list[Tensor]]:
    net = networks.build(config).cuda()
    return taken(Step(config, net, data), config), list(net.state_dict().values())


def assert_alike(step: CapturedStep, losses: list[float], expected: tuple[list[float], list[Tensor]]) -> None:
    assert step.is_replayed
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for tensor, other in zip(step.net.state_dict().values(), expected[1], strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_captured_steps_are_the_eager_ones(system: str) -> None:
    config = SYSTEMS[system]
    data = images(config)
    step = CapturedStep(config, data)
    assert_alike(step, taken(step, config), eagerly(config, data))


def test_a_trial_that_takes_over_has_its_own_numbers_without_a_new_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(TRIAL)
    step = capture.lend(TRIAL, data)
    taken(step, TRIAL)
    step.net.core.bn.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    capture.give_back(step)
    monkeypatch.setitem(capture.RECORDERS, "cuda", lambda *_: pytest.fail("captured again"))
    other = dataclasses.replace(TRIAL, seed=8, optim=OptimConfig(lr=0.2, epochs=7))
    assert capture.lend(other, data) is step
    assert_alike(step, taken(step, other), eagerly(other, data))


@pytest.mark.parametrize("count", [2, 5])
def test_trials_side_by_side_are_those_alone(count: int) -> None:
    """One of them in numbers that are none."""
    data = images(TRIAL)
    configs = [dataclasses.replace(TRIAL, seed=seed) for seed in range(count)]
    steps = [CapturedStep(config, data) for config in configs]
    losses: list[list[float]] = [[] for _ in steps]
    for number in range(1, STEPS + 1):
        for step in steps:
            step.total_loss.zero_()
        if number == WARM_UP + 3:
            steps[0].net.encoders.data.fill_(torch.nan)
        dues = [Due(step, batch(TRIAL, number), number, p=number / STEPS, lr=0.05 / number) for step in steps]
        assert side_by_side(dues) == [None] * count
        for found, step in zip(losses, steps, strict=True):
            found.append(float(step.total_loss))
    for step, config, found in zip(steps[1:], configs[1:], losses[1:], strict=True):
        assert_alike(step, found, eagerly(config, data))


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_waits_for_nothing_and_a_replay_allocates_nothing(captured: bool) -> None:
    config = with_(data={"msda": "cutmix", "augmentation": "augmix"})
    data = images(config)
    step = CapturedStep(config, data) if captured else Step(config, networks.build(config).cuda(), data)
    taken(step, config)
    batches = [batch(config, number) for number in range(4)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, indices_MB in enumerate(batches, start=STEPS):
            step(indices_MB, number=number, p=0.5, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if captured:
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_what_cannot_be_captured_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is waited for in the middle of the step."""
    data = images(TRIAL)
    expected = eagerly(TRIAL, data)
    take = CapturedStep.take

    def waits(step: CapturedStep, *given: Any) -> None:
        take(step, *given)
        step.total_loss.item()

    monkeypatch.setattr(CapturedStep, "take", waits)
    step = CapturedStep(TRIAL, data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = taken(step, TRIAL)
    assert any("taken eagerly" in str(each.message) for each in told)
    assert not step.is_replayed
    assert losses == pytest.approx(expected[0], rel=1e-5)


def test_a_training_is_the_same_captured_or_not_and_goes_on_from_its_checkpoints() -> None:
    config = TrialConfig(
        data=DataConfig(dataset="synthetic", train_images=200, batch_size=20),
        model=ModelConfig(depth=10, width=1, subnetworks=2),
        optim=OptimConfig(epochs=3),
    )
    whole = list(train.train(config, device="cuda", captured=False))
    going = train.train(config, device="cuda")
    state = copy.deepcopy(next(going).state())
    for epoch, expected in zip(going, whole[1:], strict=True):
        assert epoch.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-3)
    for epoch, expected in zip(train.train(config, device="cuda", resume=state), whole[1:], strict=True):
        assert epoch.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-3)


def test_the_device_tells_how_many_go_side_by_side() -> None:
    count = capture.slots(with_(model={"depth": 10, "width": 1}), images(TRIAL))
    assert count in {1, 2, 4, 8, 16}
    assert len(capture._idle) >= count
