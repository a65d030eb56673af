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
           "pairs. Null with one classifier.", "higher"),
    Metric("disagreement", "fraction", "Images on which the two of a pair predict differently; mean over pairs. Null "
           "with one classifier."),
    Metric("nll_calibrated", "nats", "NLL_c of the paper: after temperature scaling, each half of the images at the "
           "temperature that fits the other half best.", "lower"),
    Metric("ece_calibrated", "fraction", "Expected calibration error after the same scaling, mean of the halves.",
           "lower"),
    Metric("temperature", "1", "What the logits are divided by in it, mean of the halves; above 1 the net is too sure. "
           "1 for a half without a mistake, which has no best one."),
    Metric("tace", "fraction", "Thresholded adaptive calibration error: each class's probabilities above 0.001 in 15 "
           "bins of equal count. Null where a class has fewer than 15.", "lower"),
    Metric("brier_per_class", "1", "The reference's Brier score: brier over the number of classes.", "lower"),
    Metric("confidence_auc", "fraction", "How often a right image is surer than a wrong one: area under the ROC curve. "
           "Null where all are right, or none.", "higher"),
    Metric("subnetwork_top1_max", "fraction", "Accuracy of the strongest subnetwork.", "higher"),
    Metric("q_statistic", "1", "Yule's Q of two subnetworks' mistakes, from -1 to 1, 0 if independent; mean over "
           "pairs. Null with one classifier, and where it is 0/0."),
    Metric("error_correlation", "1", "Correlation of two subnetworks' mistakes, mean over pairs. Null with one "
           "classifier, and where one of them is always right, or always wrong."),
    Metric("double_fault", "fraction", "Images that both of a pair get wrong, mean over pairs. Null with one "
           "classifier.", "lower"),
    Metric("kl_divergence", "nats", "From the probabilities of one subnetwork to those of another, mean over ordered "
           "pairs. Null with one classifier."),
    *(Metric(f"filter_activity_{percent}", "fraction", "3x3 filters of the core network whose l1 norm is "
             f"above 0.{percent} of their layer's largest, mean over layers.") for percent in (20, 30, 40, 50)),
    Metric("cifar_c_top1", "fraction", "top1 on the published corrupted test images, 19 corruptions at 5 severities as "
           "one set. Of the last epoch, and null without evaluate.robustness.", "higher"),
    Metric("cifar_c_nll", "nats", "nll on the same images.", "lower"),
    Metric("cifar_c_ece", "fraction", "ece on the same images.", "lower"),
    Metric("cifar_c15_top1", "fraction", "top1 on the 15 corruptions that benchmarks count.", "higher"),
)  # fmt: skip
"""`ensemble` is the softmax of the mean of the M logit vectors (the paper, section 3; facts of the reference)."""

CALIBRATION_BINS = 15
"""Of `ece`, `tace` and reliability diagrams."""

PROBABILITY_FLOOR = 1e-12
"""Added to a probability before its logarithm, as the reference does: one hopeless image costs at most 27.6 nats."""

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
