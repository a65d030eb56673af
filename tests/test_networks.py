"""The networks are those of the reference implementation, number for number."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixmo_core import networks
from mixmo_core.config import DATASETS, DataConfig, ModelConfig, TrialConfig, map_size

NETS = {
    "wrn10_1_m2": ("cifar10", 10, 1, 2),
    "wrn28_2_m2": ("cifar100", 28, 2, 2),
    "wrn28_2_m1": ("cifar100", 28, 2, 1),
}


def keyed(name: str, shape: tuple[int, ...]) -> Any:
    """The standard normals that the golden vectors key by a name."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape).astype(np.float32)


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    z = keyed(name, shape)
    if len(shape) == 4:
        z = z * math.sqrt(2 / math.prod(shape[1:]))
    elif len(shape) == 2:
        z = 0.1 * z
    elif name.endswith("running_var"):
        z = np.exp(0.3 * z)
    elif name.endswith("running_mean"):
        z = 0.2 * z
    else:
        z = 1 + 0.2 * z if name.endswith("weight") else 0.1 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def config_of(dataset: Any, depth: int, width: int, M: int, seed: int = 0) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(dataset=dataset), model=ModelConfig(depth=depth, width=width, subnetworks=M), seed=seed
    )


def golden_network(tag: str) -> networks.MixMoNet:
    net = networks.build(config_of(*NETS[tag]))
    shapes = {name: tuple(tensor.shape) for name, tensor in networks.reference_tensors(net).items()}
    networks.load_reference(net, {name: golden_weight(name, shape) for name, shape in shapes.items()})
    return net


def close(ours: Tensor, recorded: Any, relative: float = 1e-4) -> None:
    theirs = torch.from_numpy(np.asarray(recorded))
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=relative * float(theirs.abs().max()))


@pytest.mark.shared
@pytest.mark.parametrize("tag", NETS)
def test_evaluation_equals_the_reference(tag: str, golden: Callable[[str], Any]) -> None:
    recorded = golden("network_forward.npz")
    net = golden_network(tag).eval()
    layers: list[Tensor] = []
    for group in net.core.groups:
        group.register_forward_hook(lambda _module, _inputs, output: layers.append(output))
    with torch.inference_mode():
        logits_MBK = net(torch.from_numpy(keyed(f"{tag}/x", (2, 3, 32, 32))))
    for m, logits_BK in enumerate(logits_MBK):
        close(logits_BK, recorded[f"{tag}_infer_logits_{m}"])
    close(logits_MBK.mean(dim=0), recorded[f"{tag}_infer_logits_avg"])
    for number, layer_BCHW in enumerate(layers, start=1):
        assert tuple(layer_BCHW.shape) == tuple(recorded[f"{tag}_infer_layer{number}_shape"])
        close(layer_BCHW.flatten()[:16], recorded[f"{tag}_infer_layer{number}_first16"])


@pytest.mark.shared
@pytest.mark.parametrize("tag", ["wrn10_1_m2", "wrn28_2_m2"])
def test_training_equals_the_reference(tag: str, golden: Callable[[str], Any]) -> None:
    recorded = golden("network_forward.npz")
    net = golden_network(tag)
    stacked_B6HW = torch.from_numpy(keyed(f"{tag}/xm", (2, 6, 32, 32)))
    first_BHW = torch.zeros(2, 32, 32)
    first_BHW[0, 4:20, 10:27] = 1
    first_BHW[1, 0:9, 20:32] = 1
    logits_MBK = net(stacked_B6HW.view(2, 2, 3, 32, 32).transpose(0, 1), torch.stack([first_BHW, 1 - first_BHW]))
    for m, logits_BK in enumerate(logits_MBK):
        close(logits_BK, recorded[f"{tag}_train_logits_{m}"])
    statistics = networks.reference_tensors(net)
    close(statistics["layer1.0.bn1.running_mean"], recorded[f"{tag}_train_bn_running_mean_after"])
    close(statistics["layer1.0.bn1.running_var"], recorded[f"{tag}_train_bn_running_var_after"])


@pytest.mark.shared
@pytest.mark.parametrize("tag", NETS)
def test_parameters_have_the_reference_names_and_shapes(tag: str, golden: Callable[[str], Any]) -> None:
    recorded = golden("network_forward.npz")
    ours = {
        f"{name}|{tuple(tensor.shape)}"
        for name, tensor in networks.reference_tensors(networks.build(config_of(*NETS[tag]))).items()
        if "running" not in name
    }
    assert ours == set(recorded[f"{tag}_param_names"].tolist())


@pytest.mark.shared
def test_initial_weights_spread_as_the_reference(golden: Callable[[str], Any]) -> None:
    recorded = golden("init_stats.npz")
    ours = networks.reference_tensors(networks.build(config_of("cifar100", 28, 2, 2)))
    for name, (count, std, expected, largest) in zip(
        recorded["wrn28_2_m2_names"].tolist(), recorded["wrn28_2_m2"], strict=True
    ):
        weights = ours[name]
        assert weights.numel() == count
        # Five standard errors of a standard deviation; the recorded one is a draw as well.
        assert float(weights.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * count)), name
        assert float(weights.std()) == pytest.approx(std, rel=10 / math.sqrt(2 * count)), name
        sigma = expected / networks.TRUNCATED_STD
        assert float(weights.abs().max()) <= 2 * sigma * 1.0001
        assert float(weights.abs().max()) / sigma == pytest.approx(largest, abs=0.3), name


@given(seed=st.integers(0, 2**32 - 1), ambient=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_seed_alone_decides_the_weights(seed: int, ambient: int) -> None:
    torch.manual_seed(ambient)
    before = torch.get_rng_state()
    first = networks.build(config_of("digits", 10, 1, 2, seed)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(ambient + 1)
    second = networks.build(config_of("digits", 10, 1, 2, seed)).state_dict()
    other = networks.build(config_of("digits", 10, 1, 2, seed ^ 1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoders"], other["encoders"])


def test_networks_that_differ_in_subnetworks_start_from_one_core() -> None:
    one, three = (networks.build(config_of("digits", 10, 1, M)).core.state_dict() for M in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_encoders_are_drawn_independently() -> None:
    net = networks.build(config_of("cifar10", 10, 1, 3))
    assert len({float(encoder.detach().sum()) for encoder in net.encoders}) == 3
    assert len({float(classifier.detach().sum()) for classifier in net.classifiers}) == 3


@pytest.mark.parametrize("M", [1, 2, 4])
def test_evaluation_is_the_sum_of_the_encoders(M: int) -> None:
    """One convolution with summed weights is the M convolutions of the same image, mixed by a plain sum."""
    net = networks.build(config_of("synthetic", 10, 1, M)).eval().double()
    images_BCHW = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = [nn.functional.conv2d(images_BCHW, weight, padding=1) for weight in net.encoders]
    features_BD = net.core(torch.stack(maps).sum(dim=0))
    expected = torch.stack([features_BD @ w.T + b for w, b in zip(net.classifiers, net.classifier_biases, strict=True)])
    torch.testing.assert_close(net(images_BCHW), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("M", [1, 3])
def test_every_dataset_fits(dataset: Any, M: int) -> None:
    config = config_of(dataset, 10, 1, M)
    net, (C, S) = networks.build(config), networks.image_shape(config)
    masks_MBHW = torch.full((M, 2, map_size(config), map_size(config)), 1 / M)
    logits_MBK = net(torch.rand(M, 2, C, S, S), masks_MBHW)
    assert logits_MBK.shape == (M, 2, DATASETS[config.data.dataset].classes)
    logits_MBK.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.eval()(torch.rand(2, C, S, S)).shape == logits_MBK.shape


def test_the_asymmetric_padding_is_on_the_right_and_at_the_bottom() -> None:
    conv = networks._LateStride(1, 1, 3, stride=2)
    with torch.no_grad():
        conv.weight.fill_(0)
        conv.weight[0, 0, 2, 2] = 1  # reads what lies two below and two to the right
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(image).flatten().tolist() == [10, 0, 0, 0]


def test_bf16_keeps_logits_in_fp32() -> None:
    net = networks.build(config_of("digits", 10, 1, 2))
    images_MBCHW, masks_MBHW = torch.rand(2, 4, 1, 8, 8), torch.full((2, 4, 8, 8), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(images_MBCHW, masks_MBHW)
    exact = net(images_MBCHW, masks_MBHW)
    assert rounded.dtype is torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * float(exact.detach().abs().max()))


def test_wrong_use_is_told() -> None:
    net = networks.build(config_of("digits", 10, 1, 2))
    with pytest.raises(ValueError, match="needs masks"):
        net(torch.rand(2, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="in training mode images must be"):
        net(torch.rand(4, 1, 8, 8))
    with pytest.raises(ValueError, match="in evaluation mode images must be"):
        net.eval()(torch.rand(2, 4, 1, 8, 8))


def test_reference_weights_of_another_network_are_refused() -> None:
    net = networks.build(config_of("cifar10", 10, 1, 2))
    before = net.encoders.detach().clone()
    weights = {name: tensor.clone() for name, tensor in networks.reference_tensors(net).items()}
    weights["layer1.0.conv1.weight"] = torch.zeros(32, 16, 3, 3)
    weights["fc.bias"] = weights.pop("list_fc.1.bias")
    weights["bn1.num_batches_tracked"] = torch.tensor(7)
    with pytest.raises(ValueError, match="not the weights of this network") as caught:
        networks.load_reference(net, weights)
    assert "missing: list_fc.1.bias" in str(caught.value)
    assert "unknown: fc.bias" in str(caught.value)
    assert "layer1.0.conv1.weight: shape (32, 16, 3, 3) instead of (16, 16, 3, 3)" in str(caught.value)
    assert "num_batches_tracked" not in str(caught.value)
    assert torch.equal(net.encoders.detach(), before)
