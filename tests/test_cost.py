"""The costs that a plan shows are those of the networks that a run builds."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixmo_core import cost, networks
from mixmo_core.config import DataConfig, EvaluateConfig, ModelConfig, OptimConfig, TrialConfig


def _wide(dataset: str, depth: int, width: int, M: int) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(dataset=dataset),  # type: ignore[arg-type]
        model=ModelConfig(depth=depth, width=width, subnetworks=M),
    )


@pytest.mark.shared
def test_parameters_are_those_of_the_reference(golden_folder: Path) -> None:
    counts = json.loads((golden_folder / "param_counts.json").read_text())
    for name, expected in counts.items():
        dataset, net, M = name.split("_")
        arch, width = net.split("-")
        config = TrialConfig(
            data=DataConfig(dataset="tiny_imagenet" if dataset == "tinyimagenet200" else dataset),
            model=ModelConfig(
                arch="wide_resnet" if arch == "wrn28" else "preact_resnet",
                width=int(width),
                subnetworks=int(M.removeprefix("M")),
            ),
        )
        assert cost.parameters(config) == expected, name
    assert len(counts) > 90


@pytest.mark.parametrize(
    ("dataset", "depth", "width", "M"),
    [("cifar10", 10, 1, 1), ("cifar100", 16, 2, 2), ("digits", 10, 1, 3), ("tiny_imagenet", 10, 1, 2)],
)
def test_counts_are_those_of_the_built_network(dataset: str, depth: int, width: int, M: int) -> None:
    config = _wide(dataset, depth, width, M)
    net = networks.build(config)
    assert cost.parameters(config) == sum(parameter.numel() for parameter in net.parameters())

    B, (C, S) = 2, networks.image_shape(config)
    images_MBCHW, masks_MBHW = torch.zeros(M, B, C, S, S), torch.full((M, B, S, S), 1 / M)
    with FlopCounterMode(display=False) as counter:
        logits_MBK = net(images_MBCHW, masks_MBHW)
    assert counter.get_total_flops() == B * cost.forward_flops(config)
    with counter:
        logits_MBK.sum().backward()
    # A backward pass alone; `counter` starts from zero again.
    assert counter.get_total_flops() == cost.step_flops(config) * B / config.data.batch_size - B * cost.forward_flops(
        config
    )


def test_known_operations() -> None:
    """WRN-28-10 at M = 2 takes 11.90 GFLOP a slot (counted in the reference with its late strides)."""
    assert cost.forward_flops(_wide("cifar100", 28, 10, 2)) == pytest.approx(11.90e9, rel=1e-3)
    assert cost.forward_flops(_wide("cifar100", 28, 2, 1)) == pytest.approx(2 * 242.7e6, rel=1e-3)


@pytest.mark.parametrize(("M", "macs"), [(2, 557e6)])
def test_known_operations_of_preact_resnet(M: int, macs: float) -> None:
    config = TrialConfig(
        data=DataConfig(dataset="tiny_imagenet"), model=ModelConfig(arch="preact_resnet", width=1, subnetworks=M)
    )
    assert cost.forward_flops(config) == pytest.approx(2 * macs, rel=1e-3)


@pytest.mark.parametrize(("repetition", "steps"), [(1, 781), (2, 1562), (4, 3125)])
def test_an_epoch_has_the_reference_number_of_steps(repetition: int, steps: int) -> None:
    config = TrialConfig(data=DataConfig(dataset="cifar100", repetition=repetition))
    assert cost.steps_per_epoch(config) == steps
    assert cost.trial_flops(config) == pytest.approx(cost.step_flops(config) * steps * 300)


def test_a_validation_split_shortens_the_epoch() -> None:
    config = TrialConfig(data=DataConfig(dataset="cifar10"), evaluate=EvaluateConfig(split="validation"))
    assert cost.steps_per_epoch(config) == 45_000 // 64


def test_cost_is_linear_in_what_it_should_be() -> None:
    def flops(epochs: int, batch_size: int, repetition: int) -> float:
        return cost.trial_flops(
            TrialConfig(
                data=DataConfig(dataset="synthetic", batch_size=batch_size, repetition=repetition),
                model=ModelConfig(depth=10, width=1),
                optim=OptimConfig(epochs=epochs),
            )
        )

    assert flops(6, 64, 1) == 2 * flops(3, 64, 1)
    assert flops(3, 64, 4) == 4 * flops(3, 64, 1)
    assert flops(3, 32, 1) == flops(3, 64, 1)
