"""From logits to numbers: accuracy, likelihood, calibration and diversity of the M subnetworks. Pure functions.

The definitions are the reference implementation's, in double precision, except `brier`, which is summed over the
classes as in the literature (the reference divides by their number).
"""

from itertools import combinations

import torch
from torch import Tensor

CALIBRATION_BINS = 15
PROBABILITY_FLOOR = 1e-12
"""Added to a probability before its logarithm, as the reference does: one hopeless image costs at most 27.6 nats."""


def summarize(logits_MNK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """The metrics of `mixmo_core.metrics` that an evaluation yields, by name.

    The ensemble predicts with the softmax of the mean of the M logit vectors. Logits may be of any float type, on any
    device; the host waits for the device once. `ratio_error` and `disagreement` are there from two subnetworks on.
    """
    if logits_MNK.ndim != 3 or labels_N.shape != logits_MNK.shape[1:2] or not labels_N.numel():
        raise ValueError(
            f"logits must be (M, N, K) and labels (N,) with N at least 1, "
            f"got {tuple(logits_MNK.shape)} and {tuple(labels_N.shape)}"
        )
    logits_MNK = logits_MNK.detach().double()
    ensemble_NK = logits_MNK.mean(dim=0)
    predictions_MN = logits_MNK.argmax(dim=-1)
    accuracy_M = (predictions_MN == labels_N).double().mean(dim=1)
    values = {
        **_ensemble(ensemble_NK, labels_N),
        "subnetwork_top1_mean": accuracy_M.mean(),
        "subnetwork_top1_min": accuracy_M.min(),
    }
    if len(predictions_MN) >= 2:
        values |= _diversity(predictions_MN, labels_N)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _ensemble(logits_NK: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    probabilities_NK = logits_NK.softmax(dim=-1)
    confidence_N, prediction_N = probabilities_NK.max(dim=-1)
    correct_N = (prediction_N == labels_N).double()
    highest_N5 = logits_NK.topk(min(5, logits_NK.shape[-1]), dim=-1).indices
    label_N = probabilities_NK.gather(-1, labels_N[:, None]).squeeze(-1)
    return {
        "top1": correct_N.mean(),
        "top5": (highest_N5 == labels_N[:, None]).any(dim=-1).double().mean(),
        "nll": -(label_N + PROBABILITY_FLOOR).clamp(max=1).log().mean(),
        "ece": expected_calibration_error(confidence_N, correct_N),
        # sum over k of (p_k - [k = y])^2, without the one-hot matrix
        "brier": (probabilities_NK.square().sum(dim=-1) - 2 * label_N + 1).mean(),
    }


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """Sum over equally wide bins (low, high] of |accuracy - mean confidence| times the bin's share of the images."""
    inner_edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64, device=confidence_N.device)[1:-1]
    bin_N = torch.bucketize(confidence_N, inner_edges)
    excess = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=confidence_N.device)
    excess.index_add_(0, bin_N, confidence_N.double() - correct_N.double())
    return excess.abs().sum() / len(confidence_N)


def _diversity(predictions_MN: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Means over the pairs of subnetworks."""
    pairs = list(combinations(predictions_MN, 2))
    ratio = torch.stack([_ratio_error(first_N != labels_N, second_N != labels_N) for first_N, second_N in pairs])
    disagreement = torch.stack([(first_N != second_N).double().mean() for first_N, second_N in pairs])
    return {"ratio_error": ratio.mean(), "disagreement": disagreement.mean()}


def _ratio_error(wrong_N: Tensor, also_wrong_N: Tensor) -> Tensor:
    """Images that exactly one gets wrong over images that both do. Where no image is wrong twice the reference returns
    twice the share of images that are wrong once, and so does this.
    """
    both = (wrong_N & also_wrong_N).double().mean()
    one = (wrong_N ^ also_wrong_N).double().mean()
    return torch.where(both > 0, one / both, 2 * one)
