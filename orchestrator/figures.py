"""The plots of a sweep: learning curves, and the accuracy of every cell with its seeds.

They read without colour: lines differ in dash and marker as well as in shade, and shades run from dark to light. Only
finished trials are drawn, so that a plot says what the table says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmo_core.metrics import BY_NAME
from orchestrator.analysis import varied
from orchestrator.errors import NotFoundError, UnreachableError, UsageError
from orchestrator.rows import METRIC_COLUMNS, EpochRow, TrialRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
PANEL_LINES = 6
"""More lines than this in one plot cannot be told apart: they are split into panels."""

_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dv*"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "mixmo",
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the epochs, of the finished trials of one cell."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """With n - 1 in the denominator; 0 where there is one trial."""


@dataclass(frozen=True, slots=True)
class CellPlot:
    """What is drawn of one cell."""

    name: str
    panel: str
    values: tuple[float, ...]
    """The metric of the last epoch, one for each seed."""
    curve: Curve


def figures(
    rows: Sequence[TrialRow],
    epochs: Sequence[EpochRow],
    folder: Path,
    *,
    formats: Sequence[str] = ("png", "svg"),
    metric: str = "top1",
) -> list[Path]:
    """Draw `curves` and `accuracy` into a folder, in each format; the files, in that order.

    Raises NotFoundError while no trial has finished, UsageError for a metric or format that there is not,
    UnreachableError if the folder cannot be written.
    """
    if metric not in METRIC_COLUMNS:
        raise UsageError(f"no metric {metric}; there are {', '.join(METRIC_COLUMNS)}")
    unknown = [each for each in formats if each not in FORMATS]
    if unknown:
        raise UsageError(f"no format {unknown[0]}; there are {', '.join(FORMATS)}")
    cells = plots(rows, epochs, metric)
    if not cells:
        raise NotFoundError("nothing to draw yet: no trial has finished")
    import matplotlib as mpl

    written = []
    with mpl.rc_context(_STYLE):
        for name, draw in (("curves", draw_curves), ("accuracy" if metric == "top1" else metric, draw_values)):
            drawn = draw(cells, metric)
            written += [_save(drawn, folder / f"{name}.{each}") for each in formats]
    return written


def _save(figure: "Figure", path: Path) -> Path:
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[path.suffix[1:]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata=dated)
    except OSError as error:
        raise UnreachableError(
            f"cannot write {path}: {error.strerror or error}; name another folder with --out"
        ) from error
    return path


# ----------------------------------------------------------------------------------------------------- what to draw


def plots(rows: Sequence[TrialRow], epochs: Sequence[EpochRow], metric: str) -> list[CellPlot]:
    """The cells that have finished trials, in the order of the sweep."""
    full = [row for row in rows if row.state == "TERMINATED" and not row.stopped_early]
    full = [row for row in full if row.metrics.get(metric) is not None]
    names = varied(full)
    held: dict[str, dict[int, float]] = {row.trial_id: {} for row in full}
    for each in epochs:
        value = each.metrics.get(metric)
        if each.trial_id in held and value is not None:
            held[each.trial_id][each.epoch] = value
    cells: dict[str, list[TrialRow]] = {}
    for row in sorted(full, key=lambda row: row.position):
        cells.setdefault(row.cell_id, []).append(row)
    crowded = len(cells) > PANEL_LINES
    return [
        CellPlot(
            name=_name(members[0], names),
            panel=_name(members[0], names[1:2] if names[:1] == ["label"] else names[:1]) if crowded else "",
            values=tuple(float(row.metrics[metric] or 0.0) for row in members),
            curve=curve([held[row.trial_id] for row in members]),
        )
        for members in cells.values()
    ]


def _name(row: TrialRow, names: Sequence[str]) -> str:
    """What tells the cell from the others: `vanilla, width 2`."""
    words = []
    for name in names:
        value = getattr(row, name) if name in ("label", "workers") else row.config.get(name)
        if value is not None:
            word = name.partition("_")[2].replace("_", " ")
            words.append(value if isinstance(value, str) else f"{word or name} {value}")
    return ", ".join(dict.fromkeys(words)) or "all trials"


def curve(trials: Sequence[Mapping[int, float]]) -> Curve:
    """Mean and spread at each epoch that all the trials have."""
    shared = sorted(set.intersection(*(set(each) for each in trials)))
    n = len(trials)
    means = [math.fsum(each[epoch] for each in trials) / n for epoch in shared]
    squares = [
        math.fsum((each[epoch] - mean) ** 2 for each in trials) for epoch, mean in zip(shared, means, strict=True)
    ]
    return Curve(tuple(shared), tuple(means), tuple(math.sqrt(each / max(1, n - 1)) for each in squares))


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_curves(cells: Sequence[CellPlot], metric: str) -> "Figure":
    """One panel of lines, or several side by side, with a band of one standard deviation."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(cell.panel for cell in cells))
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.2 if across == 1 else 3.6 * across, 3.4 * down), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, [cell for cell in cells if cell.panel == panel], metric)
        axis.set_title(panel)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supxlabel("epoch", size="medium")
    figure.supylabel(_axis_name(metric), size="medium")
    return figure


def _draw_panel(axis: "Axes", cells: Sequence[CellPlot], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    scale = _scale(metric)
    for number, cell in enumerate(cells):
        x, n = cell.curve.epochs, len(cell.values)
        mean = [scale * value for value in cell.curve.mean]
        low = [scale * (value - std) for value, std in zip(cell.curve.mean, cell.curve.std, strict=True)]
        high = [scale * (value + std) for value, std in zip(cell.curve.mean, cell.curve.std, strict=True)]
        shade, style = _shade(number, len(cells)), number % PANEL_LINES
        axis.plot(
            x, mean, color=shade, linestyle=_DASHES[style], linewidth=1.4, marker=_MARKERS[style], markersize=3.5,
            markevery=max(1, len(x) // 8), label=_within(cell),
        )  # fmt: skip
        if n > 1:
            axis.fill_between(x, low, high, color=shade, alpha=0.18, linewidth=0)
    axis.legend(fontsize="small", handlelength=3.2)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_values(cells: Sequence[CellPlot], metric: str) -> "Figure":
    """A line for each cell: its seeds as rings, their mean as a bar with one standard deviation."""
    from matplotlib.figure import Figure

    scale, count = _scale(metric), len(cells)
    figure = Figure(figsize=(5.6, 0.9 + 0.32 * count), layout="constrained")
    axis = figure.subplots()
    for line, cell in enumerate(reversed(cells)):
        values = [scale * value for value in cell.values]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
        axis.plot([mean - std, mean + std], [line, line], color="0.55", linewidth=5, solid_capstyle="butt", alpha=0.5)
        axis.plot([mean], [line], color="black", marker="|", markersize=13, markeredgewidth=2)
        axis.plot(values, [line] * len(values), "o", markerfacecolor="white", markeredgecolor="black", markersize=4.5)
    axis.set_yticks(range(count), [f"{cell.name} ({len(cell.values)})" for cell in reversed(cells)])
    axis.set_ylim(-0.6, count - 0.4)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"{_axis_name(metric)}: each seed, mean, one standard deviation")
    return figure


def _within(cell: CellPlot) -> str:
    """The cell's name and count, without what the title of its panel says."""
    words = [word for word in cell.name.split(", ") if word != cell.panel]
    return f"{', '.join(words) or cell.name} ({len(cell.values)})"


def _scale(metric: str) -> float:
    return 100.0 if BY_NAME[metric].unit == "fraction" else 1.0


def _axis_name(metric: str) -> str:
    return f"{metric} (%)" if _scale(metric) == 100.0 else metric


def _shade(number: int, of: int) -> tuple[float, float, float]:
    """Dark blue to light orange, evenly in brightness: the order survives a grey printer."""
    share = number / max(1, of - 1)
    return (0.05 + 0.85 * share, 0.15 + 0.45 * share, 0.45 - 0.25 * share)
