"""Equal to the reference on inputs that nobody recorded? Random networks, batches and logits, given to both in fp64.

    python benchmarks/parity.py --reference PATH_TO_A_CHECKOUT_OF_MIXMO_PYTORCH

For each case a network of random family, depth, width and M takes over the reference's weights. Compared are the logits
in evaluation, the losses of three optimisation steps (the reference's own loss with its l2 term, against weight decay
here), and the weights and running statistics after them; then the metrics of random logits. The reference is run as it
is, but for names that NumPy has dropped. Writes benchmarks/results/parity.json; ends with 1 if a bound is broken.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import machine
import torch
from reference import L2, Reference
from torch import Tensor

from mixmo_core import evaluate, mixing, networks, step
from mixmo_core.config import DATASETS, STEM_CHANNELS, TrialConfig, map_size, unflatten

BOUND = 1e-8
"""Of relative differences in fp64."""
STEPS, BATCH = 3, 4


# ---------------------------------------------------------------------------------------------------------- networks


def settings(chance: random.Random) -> dict[str, Any]:
    M = chance.randint(1, 5)
    wide = chance.random() < 0.75
    return {
        "data.dataset": chance.choice(["cifar10", "cifar100"]) if wide else "tiny_imagenet",
        "model.arch": "wide_resnet" if wide else "preact_resnet",
        "model.depth": chance.choice([10, 16, 22, 28]) if wide else 28,
        "model.width": chance.choice([1, 2, 3, 4]) if wide else 1,
        "model.subnetworks": M,
        "mixing.method": chance.choice(["sum", "linear", "cutmix"]),
        "mixing.weight_root": chance.choice([1.0, 2.0, 3.0, 5.5]),
        "mixing.probability": 0.7,
        "optim.lr": 0.01, "optim.weight_decay": 2 * L2,
    }  # fmt: skip


def compare_networks(reference: Reference, flat: dict[str, Any], seed: int, steps: int = STEPS) -> dict[str, float]:
    """The largest relative difference of each kind."""
    torch.manual_seed(seed)
    config = unflatten(flat)
    K, size = DATASETS[config.data.dataset].classes, DATASETS[config.data.dataset].size
    theirs, ours = reference.network(config, K), networks.build(config).double()
    networks.load_reference(ours, theirs.state_dict())
    images_BCHW = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    found = {"evaluation": _evaluated(theirs, ours, images_BCHW)}
    found["losses"] = _trained(reference, config, theirs, ours, seed, steps)
    tensors = networks.reference_tensors(ours)
    found["weights"] = max(
        _apart(tensors[name], value) for name, value in theirs.state_dict().items() if name in tensors
    )
    found["evaluation_after"] = _evaluated(theirs, ours, images_BCHW)
    return found


@torch.no_grad()
def _evaluated(theirs: Any, ours: networks.MixMoNet, images_BCHW: Tensor) -> float:
    expected_BK = theirs.eval()({"pixels": images_BCHW, "metadata": {"mode": "inference"}})["logits"]
    return _apart(ours.eval()(images_BCHW).mean(dim=0), expected_BK)


def _trained(  # noqa: PLR0917 -- both, and how long
    reference: Reference, config: TrialConfig, theirs: Any, ours: networks.MixMoNet, seed: int, steps: int
) -> float:
    """Some steps of both on the same batches; leaves the trained networks behind."""
    K, size, M = (
        DATASETS[config.data.dataset].classes, DATASETS[config.data.dataset].size,
        config.model.subnetworks,
    )  # fmt: skip
    loss = reference.loss(config, K, theirs)
    optim = config.optim
    sgd = torch.optim.SGD(theirs.parameters(), lr=optim.lr, momentum=optim.momentum, nesterov=True)
    mine = step.optimiser(ours, config)
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for _ in range(steps):
        images_MBCHW = torch.randn(M, BATCH, 3, size, size, dtype=torch.float64)
        labels_MB = torch.randint(K, (M, BATCH))
        masks, kappa_MB = _masks(config, generator)
        pixels = images_MBCHW.transpose(0, 1).flatten(1, 2)
        logits = theirs.train()({"pixels": pixels, "metadata": {"mode": "train", "mixmo_masks": _their_masks(masks)}})
        weights_MB = mixing.loss_weights(kappa_MB, config.mixing.weight_root)
        onehot_MBK = torch.nn.functional.one_hot(labels_MB, K).double() * weights_MB[..., None]
        their_loss = loss(logits, {f"target_{m}": onehot_MBK[m] for m in range(M)})
        sgd.zero_grad()
        their_loss.backward()
        sgd.step()
        squares = sum(float(p.detach().square().sum()) for p in ours.parameters())
        my_loss = step.weighted_loss(ours.train()(images_MBCHW, masks), labels_MB, kappa_MB, config.mixing.weight_root)
        mine.zero_grad()
        my_loss.backward()
        mine.step()
        worst = max(worst, _apart(my_loss.detach() + L2 * squares, their_loss.detach()))
    return worst


def _masks(config: TrialConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks and their means in fp64. They come from fp32, in which the reference takes the second from the first."""
    size, channels = map_size(config), STEM_CHANNELS[config.model.arch]
    masks_MBHW = mixing.draw(
        config.mixing, config.model.subnetworks, BATCH, channels, size, size, p=0.7, generator=generator, device="cpu"
    ).masks
    if len(masks_MBHW) == 2:
        masks_MBHW = torch.stack([masks_MBHW[0], 1 - masks_MBHW[0]])
    return masks_MBHW.double(), masks_MBHW.double().mean(dim=(2, 3))


def _their_masks(masks_MBHW: Tensor) -> list[Tensor]:
    given = masks_MBHW[:1] if len(masks_MBHW) == 2 else masks_MBHW
    return [mask_BHW.unsqueeze(1) for mask_BHW in given]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest of theirs."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


# ----------------------------------------------------------------------------------------------------------- metrics


def compare_metrics(reference: Reference, chance: random.Random, seed: int) -> dict[str, float]:
    """Absolute differences of the metrics of random logits."""
    torch.manual_seed(seed)
    M, N, K = chance.randint(1, 4), chance.randint(200, 2000), chance.choice([3, 10, 100])
    labels_N = torch.randint(K, (N,))
    logits_MNK = chance.uniform(0.5, 3) * torch.randn(M, N, K) + 3 * torch.nn.functional.one_hot(labels_N, K)
    ours = evaluate.summarize(logits_MNK, labels_N)
    probabilities = logits_MNK.double().mean(dim=0).softmax(dim=-1).numpy()
    labels, right = labels_N.numpy(), probabilities.argmax(1) == labels_N.numpy()
    theirs = {
        "top1": right.mean(),
        "nll": -reference.metrics.get_ll(probabilities, labels) / N,
        "ece": reference.metrics.get_ece(probabilities.max(1), right)[0],
        "brier_per_class": reference.metrics.get_brier(probabilities, labels) / N,
    }
    return {name: abs(ours[name] - float(value)) for name, value in theirs.items()}


# --------------------------------------------------------------------------------------------------------------- run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, metavar="PATH", help="a checkout of mixmo-pytorch")
    parser.add_argument("--cases", type=int, default=20, help="networks and sets of logits that are compared")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    reference, chance = Reference(options.reference), random.Random(options.seed)
    worst: dict[str, float] = {}
    cases = []
    for case in range(options.cases):
        flat = settings(chance)
        found = compare_networks(reference, flat, case) | {
            f"metric_{name}": value for name, value in compare_metrics(reference, chance, case).items()
        }
        cases.append({"settings": flat, **found})
        worst = {name: max(worst.get(name, 0.0), value) for name, value in found.items()}
        print(f"case {case}: {max(found.values()):.1e}", flush=True)
    for name, value in worst.items():
        print(f"{name:28} {value:.1e}")
    passed = all(value <= BOUND for value in worst.values())
    path = machine.write("parity", {"bound": BOUND, "passed": passed, "worst": worst, "cases": cases})
    print(f"{'equal' if passed else 'NOT EQUAL'}; written to {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
