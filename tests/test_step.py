"""One optimisation step: the reference's numbers, draws that depend on nothing but their counters, no waiting."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import close, config_of, golden_network, keyed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmo_core import data, networks
from mixmo_core.config import DataConfig, MixingConfig, ModelConfig, OptimConfig, TrialConfig
from mixmo_core.step import Purpose, Step, draw_seed, optimiser, weighted_loss

TINY = TrialConfig(
    data=DataConfig(dataset="digits", batch_size=8), model=ModelConfig(depth=10, width=1, subnetworks=2), seed=3
)


def images(config: TrialConfig, count: int = 40) -> data.Images:
    """Random images of the config's dataset."""
    generator, (C, S) = torch.Generator().manual_seed(0), networks.image_shape(config)
    pixels_NCHW = torch.randint(0, 256, (count, C, S, S), dtype=torch.uint8, generator=generator)
    return data.Images(pixels_NCHW, torch.arange(count) % 10)


def with_data(config: TrialConfig = TINY, **changes: Any) -> TrialConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def batch(config: TrialConfig, seed: int = 0) -> Tensor:
    shape = (config.model.subnetworks, config.data.batch_size)
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.shared
def test_four_steps_equal_the_reference(golden: Callable[[str], Any]) -> None:
    """Loss (the recorded one has the l2 term in it), weights and predictions after four steps of the CIFAR recipe."""
    recorded = golden("training_steps.npz")
    l2, decay_in_sgd, lr, momentum = recorded["cifar_hparams"].tolist()
    assert decay_in_sgd == 0  # theirs is in the loss; ours is twice that, in SGD
    config = dataclasses.replace(
        config_of("cifar10", 10, 1, 2), optim=OptimConfig(lr=lr, momentum=momentum, weight_decay=2 * l2)
    )
    net = golden_network("wrn10_1_m2")
    step = Step(config, net, images(config))
    for number, expected in enumerate(recorded["cifar_losses"].tolist()):
        mask_BHW = torch.from_numpy(recorded[f"cifar_mask_{number}"])[:, 0].float()
        if number == 3:  # linear: the recorded mask is rounded to half precision
            mask_BHW = torch.from_numpy(recorded["cifar_mask32_3_first"]).view(-1, 1, 1).expand(-1, 32, 32)
        kappa_B = torch.from_numpy(recorded[f"cifar_kappa_{number}"]).float()
        stacked_BCHW = torch.from_numpy(keyed(f"train/x{number}", (8, 6, 32, 32)))
        logits_MBK = net(stacked_BCHW.view(8, 2, 3, 32, 32).transpose(0, 1), torch.stack([mask_BHW, 1 - mask_BHW]))
        labels_MB = torch.from_numpy(recorded[f"cifar_labels_{number}"])
        loss = weighted_loss(logits_MBK, labels_MB, torch.stack([kappa_B, 1 - kappa_B]), root=3.0)
        penalty = l2 * sum(float(parameter.detach().double().square().sum()) for parameter in net.parameters())
        assert float(loss.detach()) + penalty == pytest.approx(expected, rel=1e-4)
        step.update(loss, lr)
    weights = networks.reference_tensors(net)
    for name, norm in zip(recorded["cifar_final_param_names"].tolist(), recorded["cifar_final_param_l2"], strict=True):
        assert float(weights[name].norm()) == pytest.approx(norm, rel=1e-4), name
    with torch.inference_mode():
        logits_BK = net.eval()(torch.from_numpy(keyed("train/xe", (2, 3, 32, 32)))).mean(dim=0)
    close(logits_BK, recorded["cifar_final_eval_logits"], relative=1e-3)


def test_weight_decay_is_the_reference_l2_term() -> None:
    """In double precision and on every parameter: batch norm and biases too."""
    config = dataclasses.replace(TINY, optim=OptimConfig(weight_decay=6e-4))
    ours, theirs = (networks.build(config).double() for _ in range(2))
    sgd = optimiser(ours, config)
    other = torch.optim.SGD(theirs.parameters(), lr=config.optim.lr, momentum=0.9, nesterov=True)
    images_MBCHW, masks_MBHW = torch.rand(2, 8, 1, 8, 8).double(), torch.full((2, 8, 8, 8), 0.5).double()
    for _ in range(3):
        for net, rule, l2 in ((ours, sgd, 0.0), (theirs, other, 3e-4)):
            rule.zero_grad()
            penalty = torch.stack([parameter.square().sum() for parameter in net.parameters()]).sum()
            torch.autograd.backward(net(images_MBCHW, masks_MBHW).double().square().mean() + l2 * penalty)
            rule.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_one_subnetwork_has_the_plain_cross_entropy() -> None:
    logits_MBK, labels_MB = torch.randn(1, 6, 10), torch.randint(0, 10, (1, 6))
    expected = nn.functional.cross_entropy(logits_MBK[0], labels_MB[0])
    torch.testing.assert_close(weighted_loss(logits_MBK, labels_MB, torch.ones(1, 6), root=3.0), expected)


@given(M=st.integers(2, 5), root=st.floats(0.5, 20))
@settings(max_examples=20, deadline=None)
def test_even_mixes_have_the_sum_of_the_cross_entropies(M: int, root: float) -> None:
    logits_MBK, labels_MB = torch.randn(M, 6, 10), torch.randint(0, 10, (M, 6))
    expected = sum(nn.functional.cross_entropy(logits_MBK[m], labels_MB[m]) for m in range(M))
    loss = weighted_loss(logits_MBK, labels_MB, torch.full((M, 6), 1 / M), root)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_an_image_that_is_not_there_is_not_learned_from() -> None:
    logits_MBK = torch.randn(2, 3, 10, requires_grad=True)
    kappa_MB = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    torch.autograd.backward(weighted_loss(logits_MBK, torch.zeros(2, 3, dtype=torch.int64), kappa_MB, root=3.0))
    assert logits_MBK.grad is not None
    assert (logits_MBK.grad.abs().sum(dim=2) == 0).tolist() == [[True, False, False], [False, False, True]]


# ---------------------------------------------------------------------------------------------------------- randomness


def test_draw_seeds_are_pinned() -> None:
    """Other values would be other trainings under the same trial ids."""
    assert draw_seed(0, 1, Purpose.ORDER) == 16294208415412502940
    assert draw_seed(0, 1, Purpose.MIXING) == 16294208415006990960
    assert draw_seed(7, 937_500, Purpose.AUGMENTATION) == 7191089603138459378


@given(seed=st.integers(0, 2**64 - 1), start=st.integers(1, 2**28))
@settings(max_examples=30, deadline=None)
def test_no_two_draws_of_a_trial_share_a_seed(seed: int, start: int) -> None:
    """Not even in the lower 32 bits, which are all that the CPU's generator reads."""
    seeds = [draw_seed(seed, number, purpose) for number in range(start, start + 500) for purpose in Purpose]
    assert len({value & 0xFFFFFFFF for value in seeds}) == len(seeds)
    assert all(0 <= value < 2**64 for value in seeds)


def test_neighbouring_seeds_are_unlike() -> None:
    pairs = [(draw_seed(s, n, p), draw_seed(s + 1, n, p)) for s in range(20) for n in range(20) for p in Purpose]
    flipped = [(a ^ b).bit_count() for a, b in pairs]
    # 64 fair coins have a deviation of 4; of the mean of 1,200 it is 0.12.
    assert sum(flipped) / len(flipped) == pytest.approx(32, abs=1)
    assert min(flipped) > 8


def test_a_step_depends_on_its_number_and_on_nothing_before_it() -> None:
    stepped = []
    for before in ([], [4, 9]):
        net = networks.build(TINY)
        step = Step(TINY, net, images(TINY))
        for number in before:
            step(batch(TINY, number), number=number, p=0.5, lr=0.05)
        stepped.append(everything(step, 6))
        assert not torch.equal(stepped[0][0], everything(step, 7)[0])
        assert not torch.equal(stepped[0][1], everything(step, 7)[1])
    assert all(torch.equal(*pair) for pair in zip(*stepped, strict=True))


def everything(step: Step, number: int) -> list[Tensor]:
    """What a step draws: images, masks, kappa, labels and, where there are two labels, their shares."""
    indices_MB = batch(step._config)
    masks_MBHW, kappa_MB = step._mixture(indices_MB, number, 1.0)
    images_MBCHW, targets = step._gather(indices_MB, number, masks_MBHW)
    return [images_MBCHW, masks_MBHW, kappa_MB, *(each for each in targets if each is not None)]


@pytest.mark.parametrize("augmentation", ["none", "standard", "augmix"])
@pytest.mark.parametrize("msda", ["none", "mixup", "cutmix", "resizemix"])
def test_workers_share_the_batch_of_one(augmentation: Any, msda: Any) -> None:
    config = with_data(augmentation=augmentation, msda=msda)
    net = networks.build(config)
    whole = everything(Step(config, net, images(config)), 5)
    assert len(whole) == (4 if msda == "none" else 5)
    for rank in range(4):
        own = everything(Step(config, net, images(config), rank=rank, workers=4), 5)
        for mine, of_all in zip(own, whole, strict=True):
            assert torch.equal(mine, of_all[:, rank::4])


# ------------------------------------------------------------------------------------------------------------ the step


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often a value goes from the device to Python, for which a GPU would be waited."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device() -> None:
    with _Reads() as control:  # type: ignore[no-untyped-call]
        torch.ones(2).sum().item()
    assert control.count == 1
    for method in ("sum", "linear", "cutmix"):
        config = dataclasses.replace(TINY, mixing=MixingConfig(method=method))
        step = Step(config, networks.build(config), images(config))
        with _Reads() as reads:  # type: ignore[no-untyped-call]
            for number in (1, 2):
                step(batch(config), number=number, p=0.5, lr=0.05)
        assert reads.count == 0


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_on_one_batch_lower_its_loss(M: int, precision: Any) -> None:
    config = dataclasses.replace(
        TINY,
        data=dataclasses.replace(TINY.data, augmentation="none"),
        model=ModelConfig(depth=10, width=1, subnetworks=M),
        mixing=MixingConfig(method="sum"),
        precision=precision,
    )
    net = networks.build(config)
    step, losses = Step(config, net, images(config)), []
    for number in range(1, 16):
        step.total_loss.zero_()
        step(batch(config), number=number, p=0.0, lr=0.02)
        losses.append(float(step.total_loss))
    assert losses[0] == pytest.approx(M * math.log(10), rel=0.6)
    assert losses[-1] < 0.5 * losses[0]
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in net.buffers()} == {torch.float32}


def test_momentum_may_be_zero() -> None:
    config = dataclasses.replace(TINY, optim=OptimConfig(momentum=0, weight_decay=0))
    net = networks.build(config)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    step = Step(config, net, images(config))
    step(batch(config), number=1, p=0.5, lr=0.1)
    for old, parameter in zip(before, net.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), old - 0.1 * parameter.grad)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_takes_few_operations() -> None:
    """What the host pays for a step: 509 operations for WRN-28-2 with torch 2.14, 837 or more in the reference, whose
    l2 term alone is 575. A tenth is left for other versions of torch.
    """
    config = dataclasses.replace(TINY, model=ModelConfig(depth=28, width=2, subnetworks=2))
    step = Step(config, networks.build(config), images(config))
    step(batch(config), number=1, p=0.5, lr=0.05)
    with _Operations() as operations:  # type: ignore[no-untyped-call]
        step(batch(config), number=2, p=0.5, lr=0.05)
    assert 100 < operations.count < 560
