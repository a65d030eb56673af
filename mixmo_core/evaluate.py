"""From logits to numbers: accuracy, likelihood, calibration and diversity of the M subnetworks. Pure functions.

The definitions are the reference implementation's, in double precision, where it has them; departures stand at their
places. A value that is 0/0 is undefined, and so is a mean over pairs of which one is: it is left out of what
`summarize` returns, and null in the rows.
"""

from functools import lru_cache
from itertools import combinations
from math import isnan

import numpy as np
import torch
from torch import Tensor

from mixmo_core.metrics import CALIBRATION_BINS, PROBABILITY_FLOOR

TACE_THRESHOLD = 1e-3
"""Smaller probabilities do not count in TACE."""
CAN_BE_UNDEFINED = frozenset({"tace", "confidence_auc", "q_statistic", "error_correlation"})

HALVES_SEED = 31
"""The reference's, so that the halves are its."""
TEMPERATURE_STEPS = 16
"""A fixed number, so that the device is never asked whether it is done. Newton's method takes 3 to 8 on the logits of
trained networks, 12 where one image in 2,000 is wrong by far.
"""
TEMPERATURE_REACH = 1e3


def summarize(logits_MNK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """The metrics of `mixmo_core.metrics` that an evaluation yields, by name.

    The ensemble predicts with the softmax of the mean of the M logit vectors. Logits may be of any float type, on any
    device; the host waits for the device once. Diversity is there from two subnetworks on, calibration from two images
    on; `CAN_BE_UNDEFINED` names what else may be left out. The order of the images matters to the calibration alone,
    whose halves are positions.
    """
    if logits_MNK.ndim != 3 or labels_N.shape != logits_MNK.shape[1:2] or not labels_N.numel():
        raise ValueError(
            f"logits must be (M, N, K) and labels (N,) with N at least 1, "
            f"got {tuple(logits_MNK.shape)} and {tuple(labels_N.shape)}"
        )
    logits_MNK = logits_MNK.detach()
    ensemble_NK = logits_MNK.mean(dim=0, dtype=torch.float64)
    predictions_MN = logits_MNK.argmax(dim=-1)
    accuracy_M = (predictions_MN == labels_N).double().mean(dim=1)
    values = {
        **_ensemble(ensemble_NK, labels_N),
        "subnetwork_top1_mean": accuracy_M.mean(),
        "subnetwork_top1_min": accuracy_M.min(),
        "subnetwork_top1_max": accuracy_M.max(),
    }
    if len(labels_N) >= 2:
        values |= _calibrated(ensemble_NK, labels_N)
    if len(logits_MNK) >= 2:
        values |= _diversity(logits_MNK, predictions_MN, labels_N)
    numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
    return {name: number for name, number in numbers.items() if name not in CAN_BE_UNDEFINED or not isnan(number)}


# -------------------------------------------------------------------------------------------------------- the ensemble


def _ensemble(logits_NK: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    probabilities_NK = logits_NK.softmax(dim=-1)
    confidence_N, correct_N, label_N = _answers(probabilities_NK, labels_N)
    highest_N5 = logits_NK.topk(min(5, logits_NK.shape[-1]), dim=-1).indices
    # sum over k of (p_k - [k = y])^2, without the one-hot matrix
    brier = (probabilities_NK.square().sum(dim=-1) - 2 * label_N + 1).mean()
    return {
        "top1": correct_N.mean(),
        "top5": (highest_N5 == labels_N[:, None]).any(dim=-1).double().mean(),
        "nll": _nats(label_N).mean(),
        "ece": expected_calibration_error(confidence_N, correct_N),
        "tace": thresholded_calibration_error(probabilities_NK, labels_N),
        "brier": brier,
        "brier_per_class": brier / logits_NK.shape[-1],
        "confidence_auc": area_under_curve(confidence_N, correct_N),
    }


def _answers(probabilities_NK: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest probability, whether it is the label's (1 or 0), and the label's."""
    confidence_N, prediction_N = probabilities_NK.max(dim=-1)
    label_N = probabilities_NK.gather(-1, labels_N[:, None]).squeeze(-1)
    return confidence_N, (prediction_N == labels_N).double(), label_N


def _nats(probability_N: Tensor) -> Tensor:
    return -(probability_N + PROBABILITY_FLOOR).clamp(max=1).log()


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """Sum over equally wide bins (low, high] of |accuracy - mean confidence| times the bin's share of the images."""
    return _excess(confidence_N, correct_N).abs().sum() / len(confidence_N)


def _excess(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """By bin: the sum of its images' confidences, less the number of those that are right."""
    inner_edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64, device=confidence_N.device)[1:-1]
    bin_N = torch.bucketize(confidence_N, inner_edges)
    excess = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=confidence_N.device)
    return excess.index_add_(0, bin_N, confidence_N.double() - correct_N.double())


def thresholded_calibration_error(probabilities_NK: Tensor, labels_N: Tensor) -> Tensor:
    """TACE (Nixon et al., 2019) as the reference has it: each class's probabilities (N, K), double, above the threshold
    are sorted into bins of floor(n / 15), the last of which takes what is left over; sum over classes and bins of
    |accuracy - mean probability| times the bin's share of the N K probabilities.

    NaN where a class has fewer than 15 of them. Of equal probabilities the misses come first; in the reference that
    is left to the order of the images.
    """
    N, K = probabilities_NK.shape
    hits_KN = labels_N == torch.arange(K, device=labels_N.device)[:, None]
    # The bits of doubles from 0 to 1 are integers of the same order, with room below for one bit more: hit or miss.
    bits_KN = probabilities_NK.t().contiguous().view(torch.int64) * 2 + hits_KN
    bits_KN = bits_KN.sort(dim=1).values
    excess_KN = (bits_KN >> 1).view(torch.float64) - (bits_KN & 1)
    kept_K = (probabilities_NK > TACE_THRESHOLD).sum(dim=0)
    steps = torch.arange(CALIBRATION_BINS + 1, device=labels_N.device)
    edges = (N - kept_K)[:, None] + (kept_K // CALIBRATION_BINS)[:, None] * steps
    edges[:, -1] = N
    up_to = torch.nn.functional.pad(excess_KN.cumsum(dim=1), (1, 0)).gather(1, edges)
    return torch.where((kept_K >= CALIBRATION_BINS).all(), up_to.diff(dim=1).abs().sum() / (N * K), torch.nan)


def area_under_curve(score_N: Tensor, positive_N: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that a positive one (1, not 0) has the higher score, ties counted half.

    From the ranks (Mann and Whitney, 1947). NaN where all are positive, or none.
    """
    ordered_N = score_N.sort().values
    rank_N = (torch.searchsorted(ordered_N, score_N) + torch.searchsorted(ordered_N, score_N, right=True) + 1) / 2
    positives = positive_N.sum()
    above = (rank_N.double() * positive_N).sum() - positives * (positives + 1) / 2
    return above / (positives * (len(score_N) - positives))


# --------------------------------------------------------------------------------------------------------- calibration


def _calibrated(logits_NK: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """The metrics after temperature scaling, cross-fitted: each half is divided by the other's temperature."""
    halves = halves_of(len(labels_N), labels_N.device)
    members_2N = torch.zeros((2, len(labels_N)), dtype=torch.float64, device=labels_N.device)
    for member_N, half in zip(members_2N, halves, strict=True):
        member_N.index_fill_(0, half, 1)
    temperature_2 = temperatures(logits_NK, labels_N, members_2N)
    scaled_NK = logits_NK / (temperature_2.flip(0) @ members_2N)[:, None]
    confidence_N, correct_N, label_N = _answers(scaled_NK.softmax(dim=-1), labels_N)
    nats_N = _nats(label_N)
    errors = [expected_calibration_error(confidence_N[half], correct_N[half]) for half in halves]
    return {
        "nll_calibrated": torch.stack([nats_N[half].mean() for half in halves]).mean(),
        "ece_calibrated": torch.stack(errors).mean(),
        "temperature": temperature_2.mean(),
    }


@lru_cache(maxsize=8)
def halves_of(images: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Positions of the images of either half, in the reference's order (facts of the reference, section 5)."""
    # A stream that NumPy has frozen. Kept on the device, so that no evaluation after the first waits for the copy.
    order = np.random.RandomState(HALVES_SEED).permutation(images)
    first, second = (torch.from_numpy(half).to(device) for half in np.split(order, [images // 2]))
    return first, second


def temperatures(logits_NK: Tensor, labels_N: Tensor, members_GN: Tensor) -> Tensor:
    """For each of G groups the temperature that its images' likelihood is highest at when it divides their logits.

    `members_GN`, double, is 1 where an image belongs to a group and 0 elsewhere; each image belongs to one. Exact: the
    negative log likelihood is convex in 1 / T, and its slope is brought to 0 by Newton's method, halving a bracket (of
    the factor `TEMPERATURE_REACH` to either side of where the logits' spread is 1) wherever Newton leaves it. Where
    labels have low logits the best is infinite, and the bracket's end stands for it. Where every image is right it
    is 0, which would forbid any error elsewhere: 1 stands for it, so the logits stay as they are. The reference's
    optimiser stops within 1 % of the optimum.
    """
    share_GN = members_GN / members_GN.sum(dim=1, keepdim=True)
    gap_NK = logits_NK - logits_NK.amax(dim=-1, keepdim=True)
    label_N = gap_NK.gather(-1, labels_N[:, None]).squeeze(-1)
    spread_G = -(share_GN @ gap_NK.mean(dim=-1))
    inverse_G = torch.where(spread_G > 0, 1 / spread_G, 1.0)
    low_G, high_G = inverse_G / TEMPERATURE_REACH, inverse_G * TEMPERATURE_REACH
    for _ in range(TEMPERATURE_STEPS):
        slope_G, curvature_G = (share_GN @ each_N for each_N in _derivatives(gap_NK, label_N, inverse_G @ members_GN))
        low_G, high_G = torch.where(slope_G <= 0, inverse_G, low_G), torch.where(slope_G >= 0, inverse_G, high_G)
        newton_G = inverse_G - slope_G / curvature_G
        inside_G = (low_G <= newton_G) & (newton_G <= high_G)  # its ends too: there a step that has converged stays
        inverse_G = torch.where(inside_G, newton_G, (low_G * high_G).sqrt())
    some_wrong_G = share_GN @ label_N < 0
    return torch.where(some_wrong_G, 1 / inverse_G, 1.0)


def _derivatives(gap_NK: Tensor, label_N: Tensor, inverse_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of an image's negative log likelihood by 1 / T: mean logit less the label's, and the logits' variance."""
    weight_NK = (inverse_N[:, None] * gap_NK).exp_()
    total_N = weight_NK.sum(dim=-1)
    mean_N = weight_NK.mul_(gap_NK).sum(dim=-1) / total_N
    square_N = weight_NK.mul_(gap_NK).sum(dim=-1) / total_N
    return mean_N - label_N, square_N - mean_N.square()


# ----------------------------------------------------------------------------------------------------------- diversity


def _diversity(logits_MNK: Tensor, predictions_MN: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Means over the pairs of subnetworks. Of a pair, n_ab images are those that the first gets right (a = 1) or wrong
    (a = 0) and the second right or wrong (Kuncheva and Whitaker, Machine Learning 51, 2003).

    Their disagreement is n01 + n10, ours counts the images on which the two predict differently, be it two wrong
    classes. Theirs is 2 (1 - subnetwork_top1_mean - double_fault).
    """
    wrong_MN = (predictions_MN != labels_N).double()
    first, second = torch.triu_indices(len(wrong_MN), len(wrong_MN), 1, device=labels_N.device)
    n00 = (wrong_MN @ wrong_MN.t())[first, second]
    n01, n10 = wrong_MN.sum(dim=1)[first] - n00, wrong_MN.sum(dim=1)[second] - n00
    n11 = len(labels_N) - n00 - n01 - n10
    agree, differ = n11 * n00, n01 * n10
    spread = ((n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)).sqrt()
    # Where no image is wrong twice the reference returns twice the share of those wrong once, and so does this.
    ratio = torch.where(n00 > 0, (n01 + n10) / n00, 2 * (n01 + n10) / len(labels_N))
    return {
        "ratio_error": ratio.mean(),
        "disagreement": (predictions_MN[first] != predictions_MN[second]).double().mean(),
        "q_statistic": ((agree - differ) / (agree + differ)).mean(),
        "error_correlation": ((agree - differ) / spread).mean(),
        "double_fault": n00.mean() / len(labels_N),
        "kl_divergence": _kl_divergence(logits_MNK),
    }


def _kl_divergence(logits_MNK: Tensor) -> Tensor:
    """Mean over images and ordered pairs. The two directions of a pair add up to the sum of (p - q) (log p - log q),
    of which no term is negative.
    """
    logs = [logits_NK.double().log_softmax(dim=-1) for logits_NK in logits_MNK]
    both = [((p.exp() - q.exp()) * (p - q)).sum() for p, q in combinations(logs, 2)]
    return torch.stack(both).mean() / (2 * logits_MNK.shape[1])


# ---------------------------------------------------------------------------------------------------------- robustness


TALLY = 3 + CALIBRATION_BINS
"""Numbers in a tally."""


def tally(logits_MNK: Tensor, labels_N: Tensor) -> Tensor:
    """What adds up over images, (TALLY,), double: their number, the right ones, the nats, and the bins' excess."""
    probabilities_NK = logits_MNK.detach().mean(dim=0, dtype=torch.float64).softmax(dim=-1)
    confidence_N, correct_N, label_N = _answers(probabilities_NK, labels_N)
    counts = torch.stack((torch.ones_like(correct_N), correct_N, _nats(label_N))).sum(dim=1)
    return torch.cat((counts, _excess(confidence_N, correct_N)))


def robustness(tallies_CT: Tensor, standard: int) -> dict[str, float]:
    """The `cifar_c` metrics from one tally for each corruption, of which the first `standard` are those that
    benchmarks count. All images are one set, as in the reference.
    """
    images, right, nats, *excess = tallies_CT.sum(dim=0).tolist()
    standard_images, standard_right, *_ = tallies_CT[:standard].sum(dim=0).tolist()
    return {
        "cifar_c_top1": right / images,
        "cifar_c_nll": nats / images,
        "cifar_c_ece": sum(map(abs, excess)) / images,
        "cifar_c15_top1": standard_right / standard_images,
    }
