"""The metrics against the reference's outputs, against plain loops, and against what must hold for any logits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mixmo_core.evaluate import (
    CAN_BE_UNDEFINED,
    expected_calibration_error,
    halves_of,
    robustness,
    summarize,
    tally,
    temperatures,
)
from mixmo_core.metrics import BY_NAME

CALIBRATED = {"nll_calibrated", "ece_calibrated", "temperature"}
PAIRWISE = {
    "ratio_error", "disagreement", "q_statistic", "error_correlation", "double_fault", "kl_divergence",
}  # fmt: skip
ELSEWHERE = {name for name in BY_NAME if name in {"loss", "lr"} or name.startswith(("filter_activity", "cifar_c"))}
"""Metrics that come from the training, the weights and the corrupted images."""


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
    "tace": "tace",
    "brier_per_class": "brier",
    "confidence_auc": "auc",
    "subnetwork_top1_mean": "accuracy_mean",
    "ratio_error": "diversity_ratioerrors",
}
SCALED = {"top1", "top5", "nll", "ece", "tace", "brier_per_class", "confidence_auc"}


def part_of(recorded: Any, images: str, temperature: float = 1.0) -> dict[str, float]:
    """Our metrics of some of the reference's images, with the mean of the logits divided by a temperature."""
    positions = slice(None) if images == "all" else recorded[images]
    logits = torch.from_numpy(recorded["logits"][:, positions].astype(np.float64))
    labels = torch.from_numpy(recorded["labels"][positions])
    # The temperature divides the mean: dividing each subnetwork's logits would break ties by rounding.
    ensemble = summarize(logits.mean(dim=0, keepdim=True) / temperature, labels)
    return summarize(logits, labels) | {name: ensemble[name] for name in SCALED}


@pytest.mark.shared
def test_equals_the_reference(golden: Callable[[str], Any]) -> None:
    recorded = golden("metrics_m2_c10.npz")
    ours = {
        "uncal": part_of(recorded, "all"),
        "caltest": part_of(recorded, "test_idx", float(recorded["T_fit_on_val_ref"])),
        "calval": part_of(recorded, "val_idx", float(recorded["T_fit_on_test_ref"])),
    }
    ours["cal"] = {name: (ours["caltest"][name] + ours["calval"][name]) / 2 for name in ours["caltest"]}
    for prefix, metrics in ours.items():
        for name, theirs in REFERENCE_NAMES.items():
            expected = float(recorded[f"{prefix}_{theirs}"])
            assert metrics[name] == pytest.approx(expected, abs=1e-6), (prefix, name)
        if prefix != "cal":
            members = [float(recorded[f"{prefix}_accuracy_{m}"]) for m in (0, 1)]
            assert metrics["subnetwork_top1_min"] == pytest.approx(min(members), abs=1e-6)
            assert metrics["subnetwork_top1_max"] == pytest.approx(max(members), abs=1e-6)


@pytest.mark.shared
def test_the_temperatures_are_the_exact_ones(golden: Callable[[str], Any]) -> None:
    recorded = golden("metrics_m2_c10.npz")
    first, second = halves_of(1000)
    assert torch.equal(first, torch.from_numpy(recorded["val_idx"]))
    assert torch.equal(second, torch.from_numpy(recorded["test_idx"]))
    logits = torch.from_numpy(recorded["logits"].astype(np.float64)).mean(dim=0)
    labels = torch.from_numpy(recorded["labels"])
    for group, positions in (("val", first), ("test", second), ("all", torch.arange(1000))):
        everything = torch.ones((1, len(positions)), dtype=torch.float64)
        fitted = float(temperatures(logits[positions], labels[positions], everything))
        assert fitted == pytest.approx(float(recorded[f"T_fit_on_{group}_exact"]), abs=1e-6)
    at_optimum = part_of(recorded, "val_idx", float(recorded["T_fit_on_val_exact"]))
    assert at_optimum["nll"] == pytest.approx(float(recorded["nll_val_at_exact_T"]), abs=1e-6)


@pytest.mark.shared
def test_the_calibrated_likelihood_is_the_references_as_far_as_that_is_exact(golden: Callable[[str], Any]) -> None:
    recorded = golden("metrics_m2_c10.npz")
    ours = summarize(torch.from_numpy(recorded["logits"]), torch.from_numpy(recorded["labels"]))
    assert ours["nll_calibrated"] == pytest.approx(float(recorded["cal_nll"]), abs=3e-4)
    temperature = {half: float(recorded[f"T_fit_on_{half}_exact"]) for half in ("val", "test")}
    crossed = [part_of(recorded, f"{a}_idx", temperature[b]) for a, b in (("val", "test"), ("test", "val"))]
    assert ours["nll_calibrated"] == pytest.approx(sum(each["nll"] for each in crossed) / 2, abs=1e-6)
    assert ours["ece_calibrated"] == pytest.approx(sum(each["ece"] for each in crossed) / 2, abs=1e-6)
    assert ours["temperature"] == pytest.approx(sum(temperature.values()) / 2, abs=1e-6)


@pytest.mark.shared
def test_diversity_is_that_of_the_references_pair_counts(golden: Callable[[str], Any]) -> None:
    recorded = golden("metrics_m2_c10.npz")
    ours = summarize(torch.from_numpy(recorded["logits"]), torch.from_numpy(recorded["labels"]))
    n00, n10, n01, n11 = recorded["pair_counts_N00_N10_N01_N11"][0, 1]
    assert ours["double_fault"] == pytest.approx(n00, abs=1e-9)
    assert 2 * (1 - ours["subnetwork_top1_mean"] - ours["double_fault"]) == pytest.approx(n01 + n10, abs=1e-9)
    assert ours["q_statistic"] == pytest.approx((n11 * n00 - n01 * n10) / (n11 * n00 + n01 * n10), abs=1e-9)
    spread = (n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)
    assert ours["error_correlation"] == pytest.approx((n11 * n00 - n01 * n10) / spread**0.5, abs=1e-9)


@given(cases)
def test_equals_the_definitions_written_as_loops(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    metrics = {name: value for name, value in summarize(logits, labels).items() if name not in CALIBRATED}
    assert metrics == pytest.approx(slow_summary(logits.numpy(), labels.numpy()), rel=1e-9, abs=1e-9)


def slow_summary(logits: Any, labels: Any) -> dict[str, float]:
    """Each metric as one would explain it, one image at a time. Those that are 0/0 are left out."""
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
    slow = {"top1": top1, "top5": top5, "nll": nll, "ece": ece, "brier": brier, "brier_per_class": brier / K}
    slow |= {"subnetwork_top1_mean": sum(accuracy) / M, "subnetwork_top1_min": min(accuracy)}
    slow |= {"subnetwork_top1_max": max(accuracy)}
    answers = [answer for each in bins.values() for answer in each]
    duels = [(c > d) + (c == d) / 2 for c, right in answers for d, also in answers if right and not also]
    if duels:
        slow["confidence_auc"] = sum(duels) / len(duels)
    slow |= slow_tace(logits.mean(axis=0), labels) | slow_diversity(logits, labels)
    return slow


def slow_tace(logits: Any, labels: Any) -> dict[str, float]:
    """In the manner of the reference, class by class and bin by bin; of equal probabilities the misses come first."""
    N, K = logits.shape
    p = torch.from_numpy(logits).softmax(dim=-1).numpy()  # equal probabilities must be equal here as well
    total = 0.0
    for k in range(K):
        kept = sorted((float(each), bool(y == k)) for each, y in zip(p[:, k], labels, strict=True) if each > 1e-3)
        size = len(kept) // 15
        if not size:
            return {}
        for number in range(15):
            part = kept[number * size : (number + 1) * size if number < 14 else None]
            total += abs(sum(confidence - hit for confidence, hit in part)) / (N * K)
    return {"tace": total}


def slow_diversity(logits: Any, labels: Any) -> dict[str, float]:
    M, N, _ = logits.shape
    pairs = [(i, j) for i in range(M) for j in range(i)]
    if not pairs:
        return {}
    prediction = logits.argmax(axis=-1)
    wrong = prediction != labels
    values: dict[str, list[float]] = {name: [] for name in sorted(PAIRWISE)}
    for i, j in pairs:
        n11, n10 = int(np.sum(~wrong[i] & ~wrong[j])), int(np.sum(~wrong[i] & wrong[j]))
        n01, n00 = int(np.sum(wrong[i] & ~wrong[j])), int(np.sum(wrong[i] & wrong[j]))
        agree, differ = n11 * n00, n01 * n10
        spread = math.sqrt((n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00))
        values["ratio_error"].append((n01 + n10) / n00 if n00 else 2 * (n01 + n10) / N)
        values["disagreement"].append(float(np.mean(prediction[i] != prediction[j])))
        values["q_statistic"].append((agree - differ) / (agree + differ) if agree + differ else math.nan)
        values["error_correlation"].append((agree - differ) / spread if spread else math.nan)
        values["double_fault"].append(n00 / N)
        log = [each - np.logaddexp.reduce(each, axis=-1, keepdims=True) for each in (logits[i], logits[j])]
        for one, other in (log, log[::-1]):
            values["kl_divergence"].append(float(np.sum(np.exp(one) * (one - other)) / N))
    means = {name: sum(each) / len(each) for name, each in values.items()}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


@given(cases)
def test_names_and_ranges(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    metrics = summarize(logits, labels)
    absent = (set() if len(logits) > 1 else PAIRWISE) | (set() if len(labels) > 1 else CALIBRATED)
    assert set(metrics) | CAN_BE_UNDEFINED - absent == set(BY_NAME) - ELSEWHERE - absent
    for name, value in metrics.items():
        assert type(value) is float
        assert value >= (-1 - 1e-12 if name in {"q_statistic", "error_correlation"} else 0), name
        if BY_NAME[name].unit == "fraction" or name in {"q_statistic", "error_correlation"}:
            assert value <= 1 + 1e-12, name
    assert metrics["top1"] <= metrics["top5"]
    assert metrics["subnetwork_top1_min"] <= metrics["subnetwork_top1_mean"] + 1e-12
    assert metrics["subnetwork_top1_mean"] <= metrics["subnetwork_top1_max"] + 1e-12
    assert metrics["brier"] <= 2
    assert metrics["nll"] <= -math.log(1e-12)


@given(cases, st.randoms(use_true_random=False))
def test_order_of_subnetworks_and_images_does_not_matter(made: tuple[Tensor, Tensor], random: Any) -> None:
    """Except to the calibration, whose halves are positions."""
    logits, labels = made
    members = random.sample(range(len(logits)), len(logits))
    images = random.sample(range(len(labels)), len(labels))
    before, after = summarize(logits, labels), summarize(logits[members][:, images], labels[images])
    for name in CALIBRATED & set(before):
        del before[name], after[name]
    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)
    same_images = summarize(logits[members], labels)
    assert same_images == pytest.approx(summarize(logits, labels), rel=1e-7, abs=1e-9)


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
        "top1": 1.0, "top5": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0, "brier_per_class": 0.0,
        "nll_calibrated": 0.0, "ece_calibrated": 0.0, "temperature": 1.0,
        "subnetwork_top1_mean": 1.0, "subnetwork_top1_min": 1.0, "subnetwork_top1_max": 1.0,
        "ratio_error": 0.0, "disagreement": 0.0, "double_fault": 0.0, "kl_divergence": 0.0,
    }  # fmt: skip


def test_sure_and_always_wrong() -> None:
    labels = torch.arange(40) % 4
    logits = 1000 * torch.nn.functional.one_hot((labels + 1) % 4, 4).float()
    metrics = summarize(torch.stack((logits, logits)), labels)
    assert metrics["top1"] == 0
    assert metrics["double_fault"] == 1
    # The best that can be done with such logits is to ignore them.
    assert metrics["nll_calibrated"] == pytest.approx(math.log(4), abs=2e-3)
    assert metrics["ece_calibrated"] == pytest.approx(0.25, abs=2e-3)
    assert not {"confidence_auc", "q_statistic", "error_correlation"} & set(metrics)


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


# --------------------------------------------------------------------------------------------------------- calibration


def fitted(logits_NK: Tensor, labels: Tensor) -> float:
    return float(temperatures(logits_NK, labels, torch.ones((1, len(labels)), dtype=torch.float64)))


def nll(logits_NK: Tensor, labels: Tensor, temperature: float) -> float:
    return float(torch.nn.functional.cross_entropy(logits_NK / temperature, labels))


@given(cases)
@example(case(seed=179, M=1, N=1, K=2, scale=0.1))
def test_no_temperature_fits_better(made: tuple[Tensor, Tensor]) -> None:
    logits, labels = made
    best = fitted(logits[0], labels)
    assert best > 0
    if (logits[0].argmax(dim=-1) == labels).all():
        assert best == 1  # there is no best one
        return
    at_best = nll(logits[0], labels, best)
    # Where labels have low logits the best is infinite, and the limit of the search stands for it.
    limited = at_best >= math.log(logits.shape[-1]) - 1e-3
    assert at_best <= nll(logits[0], labels, 1) + (2e-3 if limited else 1e-9)
    for factor in (0.5, 0.9, 1.1, 2):
        assert at_best <= nll(logits[0], labels, best * factor) + (2e-3 if limited and factor > 1 else 1e-9)


@given(seed=st.integers(0, 2**32), K=st.integers(2, 20), margin=st.floats(0.5, 6))
def test_the_temperature_is_that_of_another_solver(seed: int, K: int, margin: float) -> None:
    from scipy.optimize import minimize_scalar

    logits, labels = case(seed, 1, 200, K, 1.0)
    logits = logits[0] + margin * torch.nn.functional.one_hot(labels, K)
    logits[0, labels[0]] -= 2 * margin  # one image at least is wrong
    logits[0, (labels[0] + 1) % K] += 9
    found = minimize_scalar(
        lambda inverse: nll(logits, labels, 1 / inverse), bounds=(1e-3, 1e3), method="bounded", options={"xatol": 1e-9}
    )
    assert fitted(logits, labels) == pytest.approx(1 / float(found.x), rel=1e-5)


@given(cases, st.floats(1e-3, 1e3))
def test_the_scale_of_the_logits_does_not_matter_once_they_are_calibrated(
    made: tuple[Tensor, Tensor], scale: float
) -> None:
    logits, labels = made
    right = logits.mean(dim=0).argmax(dim=-1) == labels
    if len(labels) < 2 or any(bool(right[half].all()) for half in halves_of(len(labels))):
        return  # a half without a mistake keeps its logits as they are
    metrics, scaled = summarize(logits, labels), summarize(scale * logits, labels)
    assert scaled["nll_calibrated"] == pytest.approx(metrics["nll_calibrated"], abs=1e-6)
    assert scaled["temperature"] == pytest.approx(scale * metrics["temperature"], rel=1e-5)


def test_halves_depend_on_nothing_but_the_number_of_images() -> None:
    for images in (1, 2, 7, 100):
        first, second = halves_of(images)
        assert (len(first), len(second)) == (images // 2, images - images // 2)
        assert torch.cat((first, second)).sort().values.tolist() == list(range(images))
    assert halves_of(7)[0].tolist() == np.random.RandomState(31).permutation(7)[:3].tolist()
    assert halves_of(50)[0] is halves_of(50)[0]


def test_each_half_is_measured_at_the_others_temperature() -> None:
    """A half that is too sure and one that is not sure enough are made worse by each other."""
    logits, labels = case(0, 1, 400, 5, 1.0)
    logits = logits + 2 * torch.nn.functional.one_hot(labels, 5)
    first, second = halves_of(400)
    own = summarize(logits, labels)["nll_calibrated"]
    logits[:, first] *= 3
    assert summarize(logits, labels)["nll_calibrated"] > own + 0.1
    crossed = [(first, fitted(logits[0, second], labels[second])), (second, fitted(logits[0, first], labels[first]))]
    expected = sum(nll(logits[0, half], labels[half], temperature) for half, temperature in crossed) / 2
    assert summarize(logits, labels)["nll_calibrated"] == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------- other people's code


@given(cases)
def test_agrees_with_scikit_learn(made: tuple[Tensor, Tensor]) -> None:
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    logits, labels = made
    K = logits.shape[-1]
    metrics = summarize(logits, labels)
    p = logits.mean(dim=0).softmax(dim=-1)
    floored = (p + 1e-12).clamp(max=1).numpy()
    one_hot = torch.nn.functional.one_hot(labels, K).numpy()
    assert metrics["nll"] == pytest.approx(-float((np.log(floored) * one_hot).sum(axis=1).mean()), abs=1e-9)
    if float(p.min()) > 1e-6:
        assert metrics["nll"] == pytest.approx(log_loss(labels.numpy(), p.numpy(), labels=range(K)), abs=1e-5)
    if K > 2:
        theirs = brier_score_loss(labels.numpy(), p.numpy(), labels=range(K), scale_by_half=False)
        assert metrics["brier"] == pytest.approx(theirs, abs=1e-9)
    correct = (p.argmax(dim=-1) == labels).numpy()
    if correct.any() and not correct.all():
        assert metrics["confidence_auc"] == pytest.approx(roc_auc_score(correct, p.max(dim=-1).values), abs=1e-12)
    else:
        assert "confidence_auc" not in metrics


def test_tied_confidences_count_half() -> None:
    logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [3.0, 0.0], [1.0, 0.0]]])
    metrics = summarize(logits, torch.tensor([0, 1, 0, 1]))
    assert metrics["confidence_auc"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_what_is_undefined_is_left_out() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    # One subnetwork is always right, the other never: neither their correlation nor Q is defined.
    metrics = summarize(predictions([0] * 40, [1] * 40), labels)
    assert CAN_BE_UNDEFINED - set(metrics) >= {"q_statistic", "error_correlation"}
    assert summarize(torch.zeros(1, 14, 2), labels[:14]).keys() & {"tace"} == set()
    assert summarize(torch.zeros(1, 15, 2), labels[:15])["tace"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------- robustness


@given(cases, st.integers(1, 19), st.integers(1, 5))
def test_tallies_add_up_to_the_metrics_of_all_images(made: tuple[Tensor, Tensor], standard: int, batches: int) -> None:
    logits, labels = made
    corruptions = [(logits * (1 + index), (labels + index) % logits.shape[-1]) for index in range(19)]
    tallies = torch.stack([
        torch.stack([
            tally(part_MNK, part_N)
            for part_MNK, part_N in zip(each.chunk(batches, dim=1), of_each.chunk(batches), strict=True)
        ]).sum(dim=0)
        for each, of_each in corruptions
    ])  # fmt: skip
    metrics = robustness(tallies, standard)
    whole = summarize(torch.cat([each for each, _ in corruptions], dim=1), torch.cat([each for _, each in corruptions]))
    for name in ("top1", "nll", "ece"):
        assert metrics[f"cifar_c_{name}"] == pytest.approx(whole[name], abs=1e-9)
    few, of_few = zip(*corruptions[:standard], strict=True)
    assert metrics["cifar_c15_top1"] == pytest.approx(
        summarize(torch.cat(few, dim=1), torch.cat(of_few))["top1"], abs=1e-9
    )
