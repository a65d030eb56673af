"""The metrics against the reference's outputs, against plain loops, and against what must hold for any logits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmo_core.evaluate import expected_calibration_error, summarize
from mixmo_core.metrics import BY_NAME


def case(seed: int, M: int, N: int, K: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((M, N, K), generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, K, (N,), generator=generator)


cases = st.builds(
    case,
    seed=st.integers(0, 2**32),
    M=st.integers(1, 4),
    N=st.integers(1, 40),
    K=st.integers(2, 12),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)

REFERENCE_NAMES = {
    "top1": "accuracy",
    "top5": "accuracytop5",
    "nll": "nll",
    "ece": "ece",
    "subnetwork_top1_mean": "accuracy_mean",
    "ratio_error": "diversity_ratioerrors",
}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("images", "temperature", "prefix"),
    [("all", "", "uncal"), ("test_idx", "T_fit_on_val_ref", "caltest"), ("val_idx", "T_fit_on_test_ref", "calval")],
)
def test_equals_the_reference(golden: Callable[[str], Any], images: str, temperature: str, prefix: str) -> None:
    recorded = golden("metrics_m2_c10.npz")
    positions = slice(None) if images == "all" else recorded[images]
    divisor = float(recorded[temperature]) if temperature else 1.0
    logits = torch.from_numpy(recorded["logits"][:, positions].astype(np.float64))
    labels = torch.from_numpy(recorded["labels"][positions])
    # The temperature divides the mean: dividing each subnetwork's logits would break ties by rounding.
    ensemble = summarize(logits.mean(dim=0, keepdim=True) / divisor, labels)
    metrics = summarize(logits, labels) | {name: ensemble[name] for name in ("top1", "top5", "nll", "ece", "brier")}
    for ours, theirs in REFERENCE_NAMES.items():
        assert metrics[ours] == pytest.approx(float(recorded[f"{prefix}_{theirs}"]), abs=1e-6), ours
    # The reference divides the usual Brier score by the number of classes.
    assert metrics["brier"] / 10 == pytest.approx(float(recorded[f"{prefix}_brier"]), abs=1e-6)
    worst = min(recorded[f"{prefix}_accuracy_0"], recorded[f"{prefix}_accuracy_1"])
    assert metrics["subnetwork_top1_min"] == pytest.approx(float(worst), abs=1e-6)


@given(cases)
def test_equals_the_definitions_written_as_loops(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    metrics = summarize(logits, labels)
    assert metrics == pytest.approx(slow_summary(logits.numpy(), labels.numpy()), rel=1e-9, abs=1e-9)


def slow_summary(logits: Any, labels: Any) -> dict[str, float]:
    """Each metric as one would explain it, one image at a time."""
    M, N, K = logits.shape
    top1 = top5 = nll = brier = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for n in range(N):
        mean = logits[:, n].mean(axis=0)
        p = np.exp(mean - mean.max())
        p /= p.sum()
        y = int(labels[n])
        top1 += (np.argmax(p) == y) / N
        top5 += (y in np.argsort(-mean)[:5]) / N
        nll -= math.log(p[y] + 1e-12) / N if p[y] < 1 - 1e-9 else math.log(p[y]) / N
        brier += sum((p[k] - (k == y)) ** 2 for k in range(K)) / N
        bins.setdefault(math.ceil(p.max() * 15) - 1, []).append((p.max(), bool(np.argmax(p) == y)))
    ece = sum(abs(sum(c for c, _ in each) - sum(right for _, right in each)) / N for each in bins.values())
    accuracy = [float((logits[m].argmax(axis=-1) == labels).mean()) for m in range(M)]
    slow = {"top1": top1, "top5": top5, "nll": nll, "ece": ece, "brier": brier}
    slow |= {"subnetwork_top1_mean": sum(accuracy) / M, "subnetwork_top1_min": min(accuracy)}
    pairs = [(i, j) for i in range(M) for j in range(i)]
    if pairs:
        prediction = logits.argmax(axis=-1)
        wrong = prediction != labels
        slow["disagreement"] = float(np.mean([np.mean(prediction[i] != prediction[j]) for i, j in pairs]))
        ratios = []
        for i, j in pairs:
            one, both = int(np.sum(wrong[i] != wrong[j])), int(np.sum(wrong[i] & wrong[j]))
            ratios.append(one / both if both else 2 * one / N)
        slow["ratio_error"] = float(np.mean(ratios))
    return slow


@given(cases)
def test_names_and_ranges(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    metrics = summarize(logits, labels)
    evaluation = {name for name in BY_NAME if name not in {"loss", "lr"}}
    assert set(metrics) == evaluation - (set() if len(logits) > 1 else {"ratio_error", "disagreement"})
    for name, value in metrics.items():
        assert type(value) is float
        assert value >= 0, name
        if BY_NAME[name].unit == "fraction":
            assert value <= 1 + 1e-12, name
    assert metrics["top1"] <= metrics["top5"]
    assert metrics["subnetwork_top1_min"] <= metrics["subnetwork_top1_mean"]
    assert metrics["brier"] <= 2
    assert metrics["nll"] <= -math.log(1e-12)


@given(cases, st.randoms(use_true_random=False))
def test_order_of_subnetworks_and_images_does_not_matter(made: tuple[Tensor, Tensor], random: Any) -> None:
    logits, labels = made
    members = random.sample(range(len(logits)), len(logits))
    images = random.sample(range(len(labels)), len(labels))
    moved = summarize(logits[members][:, images], labels[images])
    assert moved == pytest.approx(summarize(logits, labels), rel=1e-9, abs=1e-9)


@given(cases, st.floats(-50, 50))
def test_a_constant_added_to_an_images_logits_changes_nothing(made: tuple[Tensor, Tensor], constant: float) -> None:
    logits, labels = made
    assert summarize(logits + constant, labels) == pytest.approx(summarize(logits, labels), rel=1e-6, abs=1e-9)


def test_equal_logits_give_the_values_known_in_advance() -> None:
    labels = torch.arange(20) % 10
    metrics = summarize(torch.zeros(1, 20, 10), labels)
    assert metrics["nll"] == pytest.approx(math.log(10))
    assert metrics["brier"] == pytest.approx(0.9)
    assert metrics["ece"] == pytest.approx(0, abs=1e-9)  # a tenth confident, a tenth right


def test_sure_and_right() -> None:
    labels = torch.arange(12) % 4
    logits = 1000 * torch.nn.functional.one_hot(labels, 4).float()
    metrics = summarize(torch.stack((logits, logits)), labels)
    assert metrics == {
        "top1": 1.0, "top5": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0,
        "subnetwork_top1_mean": 1.0, "subnetwork_top1_min": 1.0, "ratio_error": 0.0, "disagreement": 0.0,
    }  # fmt: skip


def test_sure_and_wrong_costs_the_floor() -> None:
    metrics = summarize(torch.tensor([[[1000.0, 0.0]]]), torch.tensor([1]))
    assert metrics["nll"] == pytest.approx(-math.log(1e-12))
    assert metrics["brier"] == pytest.approx(2)


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    assert summarize(torch.randn(1, 9, 3), torch.arange(9) % 3)["top5"] == 1.0


def test_ensemble_averages_logits_and_not_probabilities() -> None:
    # Means of logits: [4.5, 4]; of probabilities: [.49, .51]. The two disagree.
    metrics = summarize(torch.tensor([[[9.0, 0.0]], [[0.0, 8.0]]]), torch.tensor([0]))
    assert metrics["top1"] == 1.0
    assert metrics["nll"] == pytest.approx(math.log(1 + math.exp(-0.5)))


def predictions(*rows: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), 3).float()


def test_ratio_error_by_hand() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    # One image wrong twice, two wrong once; they predict differently on three.
    metrics = summarize(predictions([1, 1, 0, 0], [2, 0, 1, 0]), labels)
    assert metrics["ratio_error"] == pytest.approx(2)
    assert metrics["disagreement"] == pytest.approx(0.75)
    # No image wrong twice: twice the share of images wrong once.
    assert summarize(predictions([1, 0, 0, 0], [0, 0, 0, 0]), labels)["ratio_error"] == pytest.approx(0.5)


def test_calibration_bins_hold_their_upper_edge() -> None:
    # 1/15 and just above it are in different bins: one image right, one wrong, so each bin is off by its confidence.
    edge = 1 / 15
    confidence = torch.tensor([edge, edge + 1e-6], dtype=torch.float64)
    error = expected_calibration_error(confidence, torch.tensor([1.0, 0.0]))
    assert float(error) == pytest.approx(((1 - edge) + edge) / 2, abs=1e-5)
    below = torch.tensor([edge, edge - 1e-6], dtype=torch.float64)
    assert float(expected_calibration_error(below, torch.tensor([1.0, 0.0]))) == pytest.approx(0.5 - edge, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_type_is_evaluated_in_double_precision(dtype: torch.dtype) -> None:
    logits, labels = case(0, 2, 50, 10, 1.0)
    rounded = logits.to(dtype)
    assert summarize(rounded, labels) == summarize(rounded.double(), labels)


def test_a_diverged_network_is_measured_and_not_a_crash() -> None:
    metrics = summarize(torch.full((2, 6, 10), torch.nan), torch.arange(6))
    assert math.isnan(metrics["nll"])
    assert math.isnan(metrics["brier"])
    assert 0 <= metrics["top1"] <= 1


@pytest.mark.parametrize(
    ("logits", "labels"), [((5, 3), (5,)), ((2, 5, 3), (4,)), ((2, 0, 3), (0,)), ((2, 5, 3), (2,))]
)
def test_wrong_shapes_are_refused(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \(M, N, K\)"):
        summarize(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
