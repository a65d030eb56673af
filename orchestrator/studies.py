"""What there is to draw of a sweep: its cells, their curves, studies of one setting, calibration. Pure, no matplotlib.

Only finished trials count, so that a figure says what the table says; every name tells how many of how many these are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixmo_core.config import leaves
from mixmo_core.metrics import CALIBRATION_BINS
from orchestrator.analysis import EnsembleRow, telling
from orchestrator.result_table import heading, shown
from orchestrator.rows import FINAL, EpochRow, TrialRow
from orchestrator.significance import interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.store import Logits

PANEL_LINES = 6
"""More lines than this in one plot cannot be told apart: they are split into panels."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The finished trials that differ in their seed alone, in the order of the sweep."""

    name: str
    panel: str
    """What it shares with its neighbours where cells are too many for one plot; empty where they are not."""
    trials: tuple[TrialRow, ...]
    planned: int

    def values(self, metric: str) -> tuple[float, ...]:
        found = [row.metrics.get(metric) for row in self.trials]
        return tuple(float(value) for value in found if value is not None)

    @property
    def counted(self) -> str:
        return f"{self.name} {counted(len(self.trials), self.planned)}"

    @property
    def within(self) -> str:
        """Its name and count, without what the title of its panel says."""
        words = [word for word in self.name.split(", ") if word != self.panel]
        return f"{', '.join(words) or self.name} {counted(len(self.trials), self.planned)}"


def counted(n: int, planned: int) -> str:
    """`(3)`; `(2/3)` where trials are still missing. As tables have it."""
    return f"({n})" if n == planned else f"({n}/{planned})"


def finished(rows: Iterable[TrialRow], metric: str) -> list[TrialRow]:
    """The trials that count, cell by cell in the order of the sweeps; one of several sweeps once."""
    listed = _listed(rows)
    places: dict[str, int] = {}
    held: dict[str, TrialRow] = {}
    for row in listed:
        places.setdefault(row.cell_id, len(places))  # of the planned ones, lest a failure moves a cell
        if row.state == "TERMINATED" and not row.stopped_early and row.metrics.get(metric) is not None:
            held.setdefault(row.trial_id, row)
    return sorted(held.values(), key=lambda row: places[row.cell_id])


def cells(rows: Sequence[TrialRow], metric: str) -> list[Cell]:
    """The cells that have finished trials with this metric, in the order of the sweep."""
    full = finished(rows, metric)
    names = telling(full)
    planned: dict[str, set[str]] = {}
    for row in rows:
        planned.setdefault(row.cell_id, set()).add(row.trial_id)
    groups: dict[str, list[TrialRow]] = {}
    for row in full:
        groups.setdefault(row.cell_id, []).append(row)
    panels = (names[1:2] if names[:1] == ["label"] else names[:1]) if len(groups) > PANEL_LINES else []
    return [
        Cell(_name(members[0], names), _words(members[0], panels), tuple(members), len(planned[cell]))
        for cell, members in groups.items()
    ]


def standing(rows: Sequence[TrialRow], metric: str) -> str:
    """How much of a sweep a figure shows: `quickstart: 12 of 12 trials and 2 ensembles`, `quickstart, unfinished: 7 of
    12 trials`. And that a quick form is one, as tables say.
    """
    trials = [row for row in rows if not isinstance(row, EnsembleRow)]
    ids = {row.trial_id for row in trials}
    n, full = len(finished(trials, metric)), {row.trial_id for row in trials if row.state in FINAL}
    combined = len({row.trial_id for row in rows}) - len(ids)
    made = f" and {combined:,} ensemble{'' if combined == 1 else 's'}" if combined else ""
    sweeps = [*dict.fromkeys(row.sweep for row in rows)]
    unfinished = ", unfinished" if full < ids else ""
    others = "" if unfinished or n == len(ids) else ", the others failed, were stopped early or lack this metric"
    quick = f" ({told})" if (told := heading(sweeps)) else ""
    return f"{', '.join(sweeps)}{unfinished}: {n:,} of {len(ids):,} trials{made}{others}{quick}"


def _listed(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Sweep by sweep as they first occur, each in the order of its file."""
    kept = list(rows)
    order = {name: place for place, name in enumerate(dict.fromkeys(row.sweep for row in kept))}
    return sorted(kept, key=lambda row: (order[row.sweep], row.position))


def _name(row: TrialRow, names: Sequence[str]) -> str:
    """What tells the cell from the others: `vanilla, width 2`."""
    return _words(row, names) or "all trials"


def _words(row: TrialRow, names: Sequence[str]) -> str:
    words = []
    for name in names:
        value = getattr(row, name) if name in ("label", "workers") else row.config.get(name)
        if value is not None:
            word = name.partition("_")[2].replace("_", " ")
            words.append(value if isinstance(value, str) else f"{word or name} {shown(value)}")
    return ", ".join(dict.fromkeys(words))


# ------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the epochs, of the finished trials of one cell."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """With n - 1 in the denominator; 0 where there is one trial."""


def curves(cells: Sequence[Cell], epochs: Iterable[EpochRow], metric: str) -> list[Curve]:
    """The curve of each cell."""
    held: dict[str, dict[int, float]] = {row.trial_id: {} for cell in cells for row in cell.trials}
    for each in epochs:
        value = each.metrics.get(metric)
        if each.trial_id in held and value is not None:
            held[each.trial_id][each.epoch] = value
    return [curve([held[row.trial_id] for row in cell.trials]) for cell in cells]


def curve(trials: Sequence[Mapping[int, float]]) -> Curve:
    """Mean and spread at each epoch that all the trials have."""
    shared = sorted(set.intersection(*(set(each) for each in trials)))
    moments = [spread([each[epoch] for each in trials]) for epoch in shared]
    return Curve(tuple(shared), tuple(mean for mean, _ in moments), tuple(std for _, std in moments))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1 in the denominator; 0 for one value."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


# ------------------------------------------------------------------------------------------------------------ studies


STUDIES: dict[str, str] = {
    "width": "model_width",
    "subnetworks": "model_subnetworks",
    "probability": "mixing_probability",
    "weight_root": "mixing_weight_root",
    "repetition": "data_repetition",
}
"""Settings whose effect is worth a figure of its own, by the name of the figure."""


@dataclass(frozen=True, slots=True)
class Point:
    """The trials at one value of the setting."""

    at: float
    values: tuple[float, ...]
    bounds: tuple[float, float] | None
    """Of the interval of the mean; None for fewer than two trials."""
    planned: int

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True, slots=True)
class Line:
    """Cells that differ in the setting alone, by its values."""

    name: str
    panel: str
    points: tuple[Point, ...]
    is_level: bool = False
    """The setting has no effect on these trials: one point, which holds for all its values."""

    @property
    def counted(self) -> str:
        """Its name, and how many trials each of its points is the mean of."""
        n, planned = {len(point.values) for point in self.points}, {point.planned for point in self.points}
        whole = all(len(point.values) == point.planned for point in self.points)
        if whole and len(n) == 1:
            return f"{self.name} ({n.pop()})"
        shown = f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"
        return f"{self.name} ({shown})" if whole else f"{self.name} ({shown}/{max(planned)})"


def study(rows: Sequence[TrialRow], field: str, metric: str, confidence: float = 0.95) -> list[Line]:
    """The metric over the values of a setting, one line for each combination of the others.

    Empty where no two cells differ in this setting alone, or in it and in what goes with it: a learning rate that is
    given for each width makes no difference here. Where lines are too many for one plot, those of a single point are
    left out.
    """
    full = finished(rows, metric)
    names = telling(full)
    if field not in names:
        return []
    names.remove(field)
    groups: dict[str, dict[float | None, list[TrialRow]]] = {}
    for row in full:
        groups.setdefault(_words(row, names), {}).setdefault(row.config.get(field), []).append(row)
    longer = {name for name, points in groups.items() if len(points.keys() - {None}) > 1}
    if not longer:
        return []
    if len(groups) > PANEL_LINES and len(longer) < len(groups):
        kept = {row.cell_id for name in longer for members in groups[name].values() for row in members}
        return study([row for row in rows if row.cell_id in kept], field, metric, confidence)
    planned: dict[str, set[str]] = {}
    for row in rows:
        planned.setdefault(row.cell_id, set()).add(row.trial_id)
    panels = (names[1:2] if names[:1] == ["label"] else names[:1]) if len(groups) > PANEL_LINES else []
    lines = []
    for name, points in groups.items():
        first = next(iter(points.values()))[0]
        panel = _words(first, panels)
        rest = ", ".join(word for word in name.split(", ") if word != panel)
        within = rest or name or first.label or "all trials"
        made = {at: _point(at or 0.0, members, metric, confidence, planned) for at, members in points.items()}
        levels = [Line(within, panel, (made.pop(None),), is_level=True)] if None in made else []
        ordered = tuple(sorted(made.values(), key=lambda point: point.at))
        lines += [*([Line(within, panel, ordered)] if ordered else []), *levels]
    return lines


def _point(
    at: float, members: Sequence[TrialRow], metric: str, confidence: float, planned: Mapping[str, set[str]]
) -> Point:
    values = tuple(float(row.metrics[metric] or 0.0) for row in members)
    ids = set().union(*(planned[row.cell_id] for row in members))
    return Point(float(at), values, interval(values, confidence), len(ids))


def setting_name(field: str) -> str:
    """`width (w)`: a setting's name and the paper's symbol."""
    symbols = {name.replace(".", "_"): spec.metadata["setting"].symbol for name, spec in leaves()}
    word = field.partition("_")[2].replace("_", " ")
    return f"{word} ({symbols[field]})" if symbols.get(field) else word


# -------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class Calibration:
    """By bin of the confidence, over the images of all trials of a cell: what is promised, and what is kept."""

    images: tuple[int, ...]
    """How many have their confidence in the bin."""
    confidence: tuple[float, ...]
    """Mean of these; 0 where there are none."""
    accuracy: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        return [count / sum(self.images) for count in self.images]

    @property
    def error(self) -> float:
        """The expected calibration error of all the images as one set."""
        bins = zip(self.shares, self.confidence, self.accuracy, strict=True)
        return math.fsum(share * abs(right - sure) for share, sure, right in bins)


def calibration(stored: Sequence["Logits"]) -> Calibration:
    """Of the ensembles of some trials' subnetworks, in the bins of the metric `ece`: equally wide, (low, high]."""
    import numpy as np

    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    totals = np.zeros((3, CALIBRATION_BINS))
    for each in stored:
        confidence_N, correct_N = _answers(each)
        bin_N = np.searchsorted(edges, confidence_N)
        for total, weight_N in zip(totals, (np.ones_like(confidence_N), confidence_N, correct_N), strict=True):
            total += np.bincount(bin_N, weight_N, CALIBRATION_BINS)
    counts, confident, right = totals
    filled = np.maximum(counts, 1)
    return Calibration(tuple(counts.astype(int).tolist()), tuple((confident / filled).tolist()),
                       tuple((right / filled).tolist()))  # fmt: skip


def _answers(stored: "Logits") -> tuple["NDArray[np.float64]", "NDArray[np.float64]"]:
    """How sure the ensemble is of each image, and whether it is right (1 or 0): the softmax of the mean logits."""
    import numpy as np

    mean_NK = stored.logits_MNK.mean(axis=0, dtype=np.float64)
    exponential_NK = np.exp(mean_NK - mean_NK.max(axis=1, keepdims=True))
    confidence_N = exponential_NK.max(axis=1) / exponential_NK.sum(axis=1)
    return confidence_N, (mean_NK.argmax(axis=1) == stored.labels_N).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------ gallery


@dataclass(frozen=True, slots=True)
class Sample:
    """How one mixing block mixes: the images that go in, and some draws. Made by `gallery`."""

    name: str
    images_MHWC: "NDArray[np.float32]"
    """In [0, 1]; C is 1 or 3."""
    masks_DHWC: "NDArray[np.float32]"
    """Of D draws, the share of the first image, or for M > 2 the shade of the image that a pixel is of, in [0, 1]."""
    mixed_DHWC: "NDArray[np.float32]"
    kappas: tuple[tuple[float, ...], ...]
    """Of each draw, the share of each image."""
    is_made: bool
    """The images are made up, since the sweep's own are not at hand."""
