"""Everything that comes out of an epoch: name, unit, meaning. The result tables derive their columns from this list."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: Literal["fraction", "nats", "1", "1/step"]
    meaning: str
    better: Literal["higher", "lower", ""] = ""
    """Which direction is an improvement; empty where neither is."""


METRICS: tuple[Metric, ...] = (
    Metric("loss", "nats", "Training loss of the epoch: weighted, summed over subnetworks, mean over slots.", "lower"),
    Metric("lr", "1/step", "Learning rate of the epoch's last step."),
    Metric("top1", "fraction", "Images whose label has the highest ensemble probability.", "higher"),
    Metric("top5", "fraction", "Images whose label is among the five highest.", "higher"),
    Metric("nll", "nats", "Negative log likelihood of the ensemble.", "lower"),
    Metric("ece", "fraction", "Expected calibration error: 15 bins of equal width on the confidence.", "lower"),
    Metric("brier", "1", "Squared error of the probabilities, summed over classes, mean over images.", "lower"),
    Metric("subnetwork_top1_mean", "fraction", "Accuracy of one subnetwork, mean over the M.", "higher"),
    Metric("subnetwork_top1_min", "fraction", "Accuracy of the weakest subnetwork.", "higher"),
    Metric("ratio_error", "1", "Images that one subnetwork of a pair gets wrong, over those that both do; mean over "
           "pairs. Null at M = 1.", "higher"),
    Metric("disagreement", "fraction", "Images on which the two of a pair predict differently; mean over pairs. Null "
           "at M = 1."),
)  # fmt: skip
"""`ensemble` is the softmax of the mean of the M logit vectors (the paper, section 3; facts of the reference)."""

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
