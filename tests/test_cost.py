"""The costs that a plan shows are those of the networks that a run builds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mixmo_core import cost, networks, train
from mixmo_core.config import (
    DATASETS,
    DataConfig,
    Dataset,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TrialConfig,
    map_size,
    unflatten,
)
from orchestrator.store import Logits


def _built(config: TrialConfig) -> networks.MixMoNet:
    """The network on the device that holds shapes only, which counts as well and costs nothing."""
    with torch.device("meta"):
        return networks._assemble(config)


@pytest.mark.shared
def test_parameters_are_those_of_the_reference(golden_folder: Path) -> None:
    """Of the built networks too."""
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
        assert sum(parameter.numel() for parameter in _built(config).parameters()) == expected, name
    assert len(counts) > 90


@given(
    dataset=st.sampled_from(list(DATASETS)),
    arch=st.sampled_from(["wide_resnet", "preact_resnet"]),
    depth=st.sampled_from([10, 16, 28]),
    width=st.integers(1, 12),
    M=st.integers(1, 5),
    shares=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=25)
def test_counts_are_those_of_the_built_network(
    dataset: Any, arch: Any, depth: int, width: int, M: int, shares: tuple[bool, bool]
) -> None:
    encoders, classifiers = (1 if shared else M for shared in shares)
    model = ModelConfig(
        arch=arch, depth=depth, width=width, subnetworks=M, encoders=encoders, classifiers=classifiers
    )  # fmt: skip
    counts_hold(TrialConfig(data=DataConfig(dataset=dataset), model=model))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 27, 33, 96])
@pytest.mark.parametrize("arch", ["wide_resnet", "preact_resnet"])
def test_counts_hold_for_images_of_any_size(arch: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "synthetic", Dataset(train_images=512, test_images=8, classes=7, size=size))
    counts_hold(
        TrialConfig(
            data=DataConfig(dataset="synthetic"), model=ModelConfig(arch=arch, depth=10, width=1, subnetworks=2)
        )
    )


def counts_hold(config: TrialConfig) -> None:
    net, B, (C, S) = _built(config), 2, networks.image_shape(config)
    assert cost.parameters(config) == sum(parameter.numel() for parameter in net.parameters())
    M, size = config.model.subnetworks, map_size(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits_MBK = net(torch.empty(M, B, C, S, S), torch.empty(M, B, size, size))
    assert counter.get_total_flops() == B * cost.forward_flops(config)
    with counter:
        logits_MBK.sum().backward()
    # A backward pass alone; `counter` starts from zero again.
    assert counter.get_total_flops() == cost.step_flops(config) * B / config.data.batch_size - B * cost.forward_flops(
        config
    )


@pytest.mark.parametrize(
    ("arch", "width", "M", "macs"),
    [
        ("wide_resnet", 2, 1, 242.7e6),
        ("wide_resnet", 2, 2, 243.1e6),
        ("wide_resnet", 10, 1, 5951e6),
        ("wide_resnet", 10, 2, 5952e6),
        ("preact_resnet", 1, 2, 557e6),
        ("preact_resnet", 2, 2, 2151e6),
        ("preact_resnet", 3, 2, 4773e6),
    ],
)
def test_known_operations(arch: Any, width: int, M: int, macs: float) -> None:
    """Multiplications a slot, counted in the reference: WRN-28 at CIFAR-100, PreActResNet-18 at 64 px."""
    config = TrialConfig(
        data=DataConfig(dataset="cifar100" if arch == "wide_resnet" else "tiny_imagenet"),
        model=ModelConfig(arch=arch, width=width, subnetworks=M),
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


# ---------------------------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optim.epochs": 9},
        {"optim.epochs": 8, "evaluate.every": 4},
        {"model.subnetworks": 1, "model.depth": 16, "optim.epochs": 5},
        {"model.subnetworks": 4, "model.width": 3, "model.encoders": 1, "model.classifiers": 1},
        {"optim.momentum": 0.0, "evaluate.split": "validation"},
        {"model.arch": "preact_resnet"},
    ],
)
def test_the_room_is_that_of_the_files_that_are_written(given: dict[str, Any], tmp_path: Path) -> None:
    small = {"data.dataset": "digits", "data.train_images": 40, "data.batch_size": 20, "data.augmentation": "none",
             "model.depth": 10, "model.width": 1, "optim.epochs": 1}  # fmt: skip
    config = unflatten({**small, **given})
    *_, last = train.train(config)
    state = last.state()
    rows = [
        {"epoch": epoch, "metrics": dict(metrics), "wall_s": 1.5 * epoch, "gpu_seconds": 2.5, "images_per_s": 3.5}
        for epoch, metrics in enumerate(state["history"], 1)
    ]  # as a gang adds them
    path = train.save({**state, "rows": rows, "logits": "trials/0123456789ab/1-1-01234567/logits-0"}, tmp_path)
    assert cost.checkpoint_bytes(config) == pytest.approx(path.stat().st_size, rel=0.03)
    assert last.logits is not None
    assert last.labels is not None
    logits = Logits.of(last.logits.numpy(), last.labels.numpy()).encode()
    assert cost.logits_bytes(config) == pytest.approx(len(logits), rel=0.03)


@pytest.mark.parametrize(("dataset", "arch", "width", "megabytes"), [
    ("cifar100", "wide_resnet", 10, 293), ("tiny_imagenet", "preact_resnet", 1, 91),
])  # fmt: skip
def test_the_room_of_the_papers_networks(dataset: Any, arch: Any, width: int, megabytes: float) -> None:
    """Held to the tensors of the built network. A long history is some kilobytes for each hundred epochs."""
    config = TrialConfig(data=DataConfig(dataset=dataset), model=ModelConfig(arch=arch, width=width))
    net = _built(config)
    held = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    held += 4 * sum(parameter.numel() for parameter in net.parameters())
    assert cost.checkpoint_bytes(config) == pytest.approx(held, rel=0.005)
    assert cost.checkpoint_bytes(config) == pytest.approx(megabytes * 1e6, rel=0.01)
