"""The networks are those of the reference implementation, number for number."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import flats
from torch import Tensor, nn

from mixmo_core import networks
from mixmo_core.config import (
    DATASETS,
    STEM_CHANNELS,
    DataConfig,
    MixingConfig,
    ModelConfig,
    TrialConfig,
    map_size,
    unflatten,
)
from mixmo_core.data import Images
from mixmo_core.step import Step


def config_of(dataset: Any, depth: int, width: int, M: int, seed: int = 0, **model: Any) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(dataset=dataset), model=ModelConfig(depth=depth, width=width, subnetworks=M, **model), seed=seed
    )


def preact(dataset: Any, M: int, width: int = 1, **model: Any) -> TrialConfig:
    return config_of(dataset, 28, width, M, arch="preact_resnet", **model)


NETS = {
    "wrn10_1_m2": config_of("cifar10", 10, 1, 2),
    "wrn28_2_m2": config_of("cifar100", 28, 2, 2),
    "wrn28_2_m1": config_of("cifar100", 28, 2, 1),
    "res18_1_m2": preact("tiny_imagenet", 2),
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


def golden_network(tag: str) -> networks.MixMoNet:
    """With the golden weights, taken over as a published checkpoint's are."""
    net = networks.build(NETS[tag])
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
    net, (C, S) = golden_network(tag).eval(), networks.image_shape(NETS[tag])
    layers: list[Tensor] = []
    for group in list(net.core.groups)[:3]:
        group.register_forward_hook(lambda _module, _inputs, output: layers.append(output))
    with torch.inference_mode():
        logits_MBK = net(torch.from_numpy(keyed(f"{tag}/x", (2, C, S, S))))
    for m, logits_BK in enumerate(logits_MBK):
        close(logits_BK, recorded[f"{tag}_infer_logits_{m}"])
    close(logits_MBK.mean(dim=0), recorded[f"{tag}_infer_logits_avg"])
    for number, layer_BCHW in enumerate(layers, start=1):
        assert tuple(layer_BCHW.shape) == tuple(recorded[f"{tag}_infer_layer{number}_shape"])
        close(layer_BCHW.flatten()[:16], recorded[f"{tag}_infer_layer{number}_first16"])


@pytest.mark.shared
@pytest.mark.parametrize("tag", ["wrn10_1_m2", "wrn28_2_m2", "res18_1_m2"])
def test_training_equals_the_reference(tag: str, golden: Callable[[str], Any]) -> None:
    recorded = golden("network_forward.npz")
    net, S = golden_network(tag), networks.image_shape(NETS[tag])[1]
    stacked_B6HW = torch.from_numpy(keyed(f"{tag}/xm", (2, 6, S, S)))
    first_BHW = torch.zeros(2, 32, 32)
    first_BHW[0, 4:20, 10:27] = 1
    first_BHW[1, 0:9, 20:32] = 1
    logits_MBK = net(stacked_B6HW.view(2, 2, 3, S, S).transpose(0, 1), torch.stack([first_BHW, 1 - first_BHW]))
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
        for name, tensor in networks.reference_tensors(networks.build(NETS[tag])).items()
        if "running" not in name
    }
    assert ours == set(recorded[f"{tag}_param_names"].tolist())


@pytest.mark.parametrize("tag", ["wrn10_1_m2", "res18_1_m2"])
def test_initial_weights_are_normal_and_cut_off_at_two(tag: str) -> None:
    """By Kolmogorov's test of each tensor, at one false alarm in 100,000; the seed is fixed."""
    cut = stats.truncnorm(-2, 2)
    for name, tensor in networks.build(NETS[tag]).named_parameters():
        if tensor.dim() < 2 or name == "classifier_biases" or (name == "classifiers" and tag == "res18_1_m2"):
            continue
        fan_in = tensor.shape[-1] if name == "classifiers" else math.prod(tensor.shape[-3:])
        drawn = tensor.detach().double().flatten() / (math.sqrt(2 / fan_in) / networks.TRUNCATED_STD)
        assert stats.kstest(drawn[:50_000].numpy(), cut.cdf).pvalue > 1e-5, name


@pytest.mark.shared
@pytest.mark.parametrize("tag", ["wrn28_2_m2", "res18_1_m2"])
def test_initial_weights_spread_as_the_reference(tag: str, golden: Callable[[str], Any]) -> None:
    """Bounds are at least five standard errors of what is measured: under one false alarm in 10,000 runs, and the seed
    is fixed.
    """
    recorded = golden("init_stats.npz")
    ours = networks.reference_tensors(networks.build(NETS[tag]))
    within_one = math.erf(math.sqrt(0.5)) / math.erf(math.sqrt(2))
    for name, (count, std, expected, largest) in zip(recorded[f"{tag}_names"].tolist(), recorded[tag], strict=True):
        weights = ours[name].double()
        assert weights.numel() == count
        small = name.startswith("list_fc") and tag == "res18_1_m2"  # N(0, 0.01^2), uncut
        spread = 0.01 if small else expected
        assert float(weights.std()) == pytest.approx(spread, rel=5 / math.sqrt(2 * count)), name
        assert float(weights.std()) == pytest.approx(std, rel=10 / math.sqrt(2 * count)), name
        assert abs(float(weights.mean())) < 5 * spread / math.sqrt(count), name
        sigma = spread if small else expected / networks.TRUNCATED_STD
        inside = float((weights.abs() < sigma).double().mean())
        share = math.erf(math.sqrt(0.5)) if small else within_one
        assert inside == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count)), name
        if small:
            assert 3.5 < float(weights.abs().max()) / sigma < 7
        else:
            # The reference lets a few large ones through, where it draws four times in vain.
            assert float(weights.abs().max()) <= 2 * sigma * 1.0001
            assert float(weights.abs().max()) / sigma == pytest.approx(min(largest, 2), abs=0.3), name


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
    configs = [config_of("digits", 10, 1, M) for M in (1, 3)] + [config_of("digits", 10, 1, 2, encoders=1)]
    one, *others = (networks.build(config).core.state_dict() for config in configs)
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_a_checkpoint_of_before_is_one_of_today() -> None:
    """The names of a wide ResNet's tensors are those of format 1: others would strand every checkpoint."""
    block = ["bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv1.weight"]
    block += [name.replace("1", "2") for name in block]
    names = {f"core.groups.{group}.0.{name}" for group in range(3) for name in block}
    names |= {f"core.groups.{group}.0.shortcut.weight" for group in (1, 2)}
    names |= {f"core.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(networks.build(config_of("digits", 10, 1, 2)).state_dict()) == names | {
        "encoders", "classifiers", "classifier_biases"
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("dataset", "arch", "M"),
    [(dataset, "wide_resnet", M) for dataset in DATASETS for M in (1, 3)]
    + [("digits", "preact_resnet", 2), ("cifar10", "preact_resnet", 3)],
)
def test_every_dataset_fits(dataset: Any, arch: Any, M: int) -> None:
    config = config_of(dataset, 10, 1, M, arch=arch)
    net, (C, S) = networks.build(config), networks.image_shape(config)
    masks_MBHW = torch.full((M, 2, map_size(config), map_size(config)), 1 / M)
    logits_MBK = net(torch.rand(M, 2, C, S, S), masks_MBHW)
    assert logits_MBK.shape == (M, 2, DATASETS[config.data.dataset].classes)
    logits_MBK.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.eval()(torch.rand(2, C, S, S)).shape == logits_MBK.shape


@given(flat=flats(), images=st.integers(2, 3))
@settings(max_examples=25)
def test_every_config_has_its_network(flat: dict[str, Any], images: int) -> None:
    """On the device that holds shapes only, where reading a value is an error: nothing in a forward pass does."""
    config = unflatten(flat)
    model, (C, S) = config.model, networks.image_shape(config)
    M, size, stem = model.subnetworks, map_size(config), STEM_CHANNELS[model.arch]
    with torch.device("meta"):
        net = networks._assemble(config)
        masks = torch.empty(M, images, size, size) if images == 2 else torch.empty(M, images, stem, size, size)
        hidden = networks.HiddenMix(torch.empty(images, dtype=torch.int64), torch.empty(networks.MIXING_POINTS))
        trained = net(torch.empty(M, images, C, S, S), masks, hidden=hidden)
        evaluated = net.eval()(torch.empty(images, C, S, S))
    classes = DATASETS[config.data.dataset].classes
    assert trained.shape == (M, images, classes)
    assert evaluated.shape == (M if model.classifiers == "all" else 1, images, classes)
    assert len(net.encoders) == (M if model.encoders == "all" else 1)


@pytest.mark.parametrize("size", [1, 8, 9, 31, 32, 64, 96, 128])
def test_any_size_goes_through(size: int) -> None:
    for block in (networks._WideBlock, networks._PreActBlock):
        core = narrow(block, M=1, encoders=1, classifiers=1).core.eval()
        assert core(torch.rand(2, 4, size, size)).shape == (2, core.features)


def test_gradients_of_the_smallest_maps_are_whole_in_bf16() -> None:
    """A strided 3x3 convolution of a single pixel, as on digits: eight of its nine taps see padding alone. The CPU
    kernel for bf16 left what was in the memory there, mostly no numbers after this.
    """
    conv = networks._Conv(16, 32, 3, stride=2)
    nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    pixels_BCHW = torch.rand(8, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        for places in (1, 2, 4):
            torch.full((conv.weight.numel() * places // 2,), math.nan)  # freed at once, for the kernel to find
        conv.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            conv(pixels_BCHW).sum().backward()
        grad = conv.weight.grad
        assert grad is not None
        assert (grad != 0).sum() == grad[:, :, 1, 1].numel()
        torch.testing.assert_close(grad[0, :, 1, 1], pixels_BCHW.sum(dim=0).flatten(), rtol=0.02, atol=0)


def test_the_mean_is_the_reference_pool_of_64_pixels() -> None:
    """64 px are 32x32 encoded and 4x4 after the last group, which the reference pools by a window of 4."""
    core = networks.build(preact("tiny_imagenet", 1)).core.eval()
    maps_BCHW = torch.randn(2, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pooled = nn.functional.avg_pool2d(core.groups(maps_BCHW), 4)
        assert pooled.shape[2:] == (1, 1)
        torch.testing.assert_close(core(maps_BCHW), pooled.flatten(1), rtol=1e-6, atol=1e-6)


def test_the_asymmetric_padding_is_on_the_right_and_at_the_bottom() -> None:
    conv = networks._LateStride(1, 1, 3, stride=2)
    with torch.no_grad():
        conv.weight.fill_(0)
        conv.weight[0, 0, 2, 2] = 1  # reads what lies two below and two to the right
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(image).flatten().tolist() == [10, 0, 0, 0]
    odd = torch.arange(25.0).view(1, 1, 5, 5)
    torch.testing.assert_close(conv(odd), nn.functional.conv2d(odd, conv.weight, stride=2, padding=1))


# ---------------------------------------------------------------------------------- what is shared, and hidden mixing


def narrow(block: Any, *, M: int, encoders: int, classifiers: int, width: int = 1, seed: int = 0) -> networks.MixMoNet:
    """A network with the blocks of a real one and few channels: gray images, 3 classes."""
    widths = tuple(width * each for each in ((4, 6, 8) if block is networks._WideBlock else (4, 6, 8, 10)))
    net = networks.MixMoNet(
        networks._Core(block, 4, widths, 2),
        subnetworks=M,
        encoders=encoders,
        classifiers=classifiers,
        channels=1,
        stem=4,
        stem_stride=1 if block is networks._WideBlock else 2,
        classes=3,
    )
    networks._initialise(net, torch.Generator().manual_seed(seed))
    return net


BLOCKS = pytest.mark.parametrize("block", [networks._WideBlock, networks._PreActBlock])


def batch_of(
    block: Any, M: int, B: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Images (M, B, 1, 8, 8) and masks of their encoded maps that sum to 1."""
    generator, size = torch.Generator().manual_seed(seed), 8 if block is networks._WideBlock else 4
    images_MBCHW = torch.randn(M, B, 1, 8, 8, generator=generator, dtype=dtype)
    return images_MBCHW, torch.randn(M, B, size, size, generator=generator, dtype=dtype).softmax(dim=0)


@BLOCKS
@pytest.mark.parametrize("M", [2, 5])
def test_what_is_shared_is_one_thing_used_by_all(block: Any, M: int) -> None:
    """The network that shares equals the one whose M encoders and classifiers are alike, and has the sum of its
    gradients.
    """
    shared = narrow(block, M=M, encoders=1, classifiers=1).double()
    alike = narrow(block, M=M, encoders=M, classifiers=M).double()
    alike.core.load_state_dict(shared.core.state_dict())
    with torch.no_grad():
        for name in ("encoders", "classifiers", "classifier_biases"):
            getattr(alike, name).copy_(getattr(shared, name))
    images_MBCHW, masks_MBHW = batch_of(block, M, dtype=torch.float64)
    logits, expected = shared(images_MBCHW, masks_MBHW), alike(images_MBCHW, masks_MBHW)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    weights_MBK = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for each in (logits, expected):
        torch.autograd.backward((each * weights_MBK).sum())
    for name in ("encoders", "classifiers", "classifier_biases"):
        summed = getattr(alike, name).grad.sum(dim=0, keepdim=True)
        torch.testing.assert_close(getattr(shared, name).grad, summed, rtol=1e-9, atol=1e-12)
    evaluated = shared.eval()(images_MBCHW[0])
    assert len(evaluated) == 1
    torch.testing.assert_close(evaluated.expand(M, -1, -1), alike.eval()(images_MBCHW[0]), rtol=1e-12, atol=1e-12)


@BLOCKS
def test_hidden_maps_are_mixed_at_the_place_that_was_drawn(block: Any) -> None:
    net = narrow(block, M=1, encoders=1, classifiers=1).double()
    images_MBCHW, _ = batch_of(block, 1, dtype=torch.float64)
    partner_B, lam = torch.tensor([2, 3, 1, 0]), 0.3
    for place in range(networks.MIXING_POINTS):
        lam_L = torch.ones(networks.MIXING_POINTS, dtype=torch.float64)
        lam_L[place] = lam
        h_BCHW = net._encoded(images_MBCHW[0], net.encoders[0])
        for number, group in enumerate(net.core.groups):
            if number == place:
                h_BCHW = torch.stack([lam * h_BCHW[slot] + (1 - lam) * h_BCHW[partner_B[slot]] for slot in range(4)])
            h_BCHW = group(h_BCHW)
        if net.core.bn is not None:
            h_BCHW = net.core.bn(h_BCHW).relu()
        expected = h_BCHW.mean(dim=(2, 3)) @ net.classifiers[0].T + net.classifier_biases[0]
        logits_MBK = net(images_MBCHW, hidden=networks.HiddenMix(partner_B, lam_L))
        torch.testing.assert_close(logits_MBK[0], expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits_MBK, net(images_MBCHW))


@BLOCKS
def test_a_share_of_one_everywhere_changes_no_bit(block: Any) -> None:
    net = narrow(block, M=2, encoders=2, classifiers=2)
    images_MBCHW, masks_MBHW = batch_of(block, 2)
    hidden = networks.HiddenMix(torch.tensor([1, 0, 3, 2]), torch.ones(networks.MIXING_POINTS))
    assert torch.equal(net(images_MBCHW, masks_MBHW, hidden), net(images_MBCHW, masks_MBHW))


def test_hidden_mixing_keeps_the_type_of_the_maps() -> None:
    hidden = networks.HiddenMix(torch.tensor([1, 0]), torch.full((3,), 0.5))
    maps_BCHW = torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16).view(2, 1, 1, 1)
    mixed_BCHW = hidden.at(1, maps_BCHW)
    assert mixed_BCHW.dtype is torch.bfloat16
    assert mixed_BCHW.flatten().tolist() == [2, 2]


@pytest.mark.parametrize(
    "config",
    [
        config_of("digits", 10, 1, 3, encoders=1, classifiers=1),
        config_of("digits", 10, 1, 2, encoders=1),
        config_of("digits", 10, 1, 2, classifiers=1),
        preact("digits", 2, classifiers=1),
    ],
    ids=["one of each", "one encoder", "one classifier", "preact"],
)
def test_every_variant_learns(config: TrialConfig) -> None:
    """Steps on one batch of noise lower its loss, and move every parameter."""
    generator, M = torch.Generator().manual_seed(0), config.model.subnetworks
    pixels_NCHW = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=generator)
    settled = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=8, augmentation="none"),
        mixing=MixingConfig(method="sum"),
    )
    net = networks.build(settled)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    step, losses = Step(settled, net, Images(pixels_NCHW, torch.arange(8) % 10)), []
    # All subnetworks see the same images, as one classifier cannot tell several apart.
    for number in range(1, 16):
        step.total_loss.zero_()
        step(torch.arange(8).expand(M, 8), number=number, p=0.0, lr=0.02)
        losses.append(float(step.total_loss))
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- a finished network


def train_a_little(net: networks.MixMoNet, block: Any, seed: int) -> None:
    """Three steps at random images and targets, after which no statistic of a batch norm is what it was."""
    rule = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for number in range(3):
        images_MBCHW, masks_MBHW = batch_of(block, net.subnetworks, seed=seed + number, dtype=net.encoders.dtype)
        rule.zero_grad()
        logits_MBK = net(3 * images_MBCHW + 1, masks_MBHW)
        labels = torch.arange(logits_MBK.shape[0] * logits_MBK.shape[1]) % 3
        torch.autograd.backward(nn.functional.cross_entropy(logits_MBK.flatten(0, 1), labels))
        rule.step()
    assert all(float((bn.running_var - 1).abs().min()) > 0 for bn in net.modules() if isinstance(bn, networks._Norm))


@given(
    block=st.sampled_from([networks._WideBlock, networks._PreActBlock]),
    M=st.integers(1, 5),
    shares=st.tuples(st.booleans(), st.booleans()),
    width=st.integers(1, 3),
    precision=st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-12)]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_the_folded_network_predicts_the_same(
    block: Any, M: int, shares: tuple[bool, bool], width: int, precision: tuple[torch.dtype, float], seed: int
) -> None:
    dtype, tolerance = precision
    encoders, classifiers = (1 if shared else M for shared in shares)
    net = narrow(block, M=M, encoders=encoders, classifiers=classifiers, width=width, seed=seed).to(dtype)
    train_a_little(net, block, seed)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    single = networks.fold(net)
    assert (single.subnetworks, len(single.encoders), len(single.classifiers)) == (1, 1, 1)
    assert net.training
    assert not single.training
    images_BCHW = batch_of(block, 1, 16, seed=seed + 9, dtype=dtype)[0][0]
    with torch.no_grad():
        expected = net.eval()(images_BCHW).mean(dim=0)
        folded = single(images_BCHW)
        assert folded.shape == (1, 16, 3)
        assert folded.dtype is dtype
        assert float((folded[0] - expected).abs().max()) < tolerance * float(expected.abs().max())
        # It is a network of its own: what happens to it happens to no other.
        for parameter in single.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_folded_network_may_be_trained_on() -> None:
    net = narrow(networks._WideBlock, M=3, encoders=3, classifiers=3)
    single = networks.fold(net).train()
    torch.autograd.backward(single(batch_of(networks._WideBlock, 1)[0]).sum())
    assert all(parameter.grad is not None for parameter in single.parameters())
    assert sum(p.numel() for p in single.parameters()) < sum(p.numel() for p in net.parameters())


def test_filter_activity_by_hand() -> None:
    """Two 3x3 layers of five filters with norms of 100, 60, 45, 25 and 10 % of the largest, all others even."""
    net = narrow(networks._PreActBlock, M=2, encoders=2, classifiers=2)
    layers = [module for module in net.core.modules() if isinstance(module, networks._Conv)]
    threes = [layer for layer in layers if layer.weight.shape[2] == 3]
    assert (len(layers), len(threes)) == (19, 16)  # three shortcuts, which do not count
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(-0.5 if layer in threes else math.nan)
        five = torch.tensor([2.0, -1.2, 0.9, -0.5, 0.2])
        threes[0].weight = nn.Parameter(five.view(5, 1, 1, 1).expand(5, 4, 3, 3).clone())
        threes[1].weight = nn.Parameter(100 * five.flip(0).view(5, 1, 1, 1).expand(5, 4, 3, 3).clone())
        threes[2].weight.zero_()  # a dead layer has no active filter
    assert networks.filter_activity(net) == pytest.approx(
        {
            "filter_activity_20": (13 + 2 * 4 / 5) / 16,
            "filter_activity_30": (13 + 2 * 3 / 5) / 16,
            "filter_activity_40": (13 + 2 * 3 / 5) / 16,
            "filter_activity_50": (13 + 2 * 2 / 5) / 16,
        }
    )


# ------------------------------------------------------------------------------------------------------- types, errors


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


@pytest.mark.parametrize(
    "config",
    [*NETS.values(), config_of("cifar10", 10, 1, 3, encoders=1), config_of("cifar10", 10, 1, 3, classifiers=1)],
)
def test_published_checkpoints_are_taken(config: TrialConfig) -> None:
    """A bare state dict, the whole file that the reference writes, and names as `nn.DataParallel` has them."""
    source = networks.build(config)
    weights = {name: tensor.clone() for name, tensor in networks.reference_tensors(source).items()}
    weights |= {
        f"{name[:-12]}num_batches_tracked": torch.tensor(7) for name in weights if name.endswith("running_mean")
    }
    for published in (
        weights,
        {"epoch": 300, "classifier_state_dict": weights, "classifier_optimizer_state_dict": {"state": {}}},
        {f"module.{name}": tensor for name, tensor in weights.items()},
    ):
        net = networks._assemble(config)
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.fill_(math.nan)
        networks.load_reference(net, published)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, source.state_dict()[name]), name


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
