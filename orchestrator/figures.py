"""The figures of a sweep. Each is drawn where the sweep has what it needs; where not, it is told why.

They read without colour: lines differ in dash and marker as well as in shade, and shades run from dark to light. What
is drawn comes from `studies`; a line below each figure says what its bands are and how much of the sweep it shows.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmo_core.metrics import BY_NAME
from orchestrator import lettering
from orchestrator.errors import NotFoundError, UnreachableError, UsageError
from orchestrator.pareto import Front
from orchestrator.rows import METRIC_COLUMNS, EpochRow, TrialRow
from orchestrator.significance import interval
from orchestrator.studies import (
    PANEL_LINES,
    STUDIES,
    Calibration,
    Cell,
    Curve,
    Line,
    Sample,
    calibration,
    cells,
    curves,
    setting_name,
    spread,
    standing,
    study,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.store import Logits

FORMATS = ("png", "svg", "pdf")
MOST_DIAGRAMS = 12
"""Cells whose calibration is drawn, of more the best: each reads the logits of its trials."""
MOST_NAMED = 12
"""Lines of a legend, and cells of a scatter that look different."""
MOST_NUMBERED = 30
"""Members of a front that have a number; of more, those that no other dominates."""
LEADER = 14.0
"""Points between a mark and its number from which on a line joins them."""
MOST_CELLS = 80
"""Lines of the figure of cells: of more, the best are shown."""
PANELS_ACROSS = 3
LEGEND_LINE = 0.14
"""Inches."""
FEW_IMAGES = 10
"""The accuracy of fewer is chance."""
DIVERSITY = ("ratio_error", "disagreement", "kl_divergence")

_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dv*"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "svg.hashsalt": "mixmo",
    "pdf.fonttype": 42,  # journals refuse the bitmap fonts of the default
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What figures are drawn from. What is costly to have is asked for when a figure needs it."""

    rows: Sequence[TrialRow]
    """Of the trials."""
    epochs: Callable[[], Sequence[EpochRow]]
    logits: Callable[[TrialRow], "Logits"]
    """Raises NotFoundError where none are stored."""
    samples: Callable[[], Sequence[Sample]]
    """Of the mixing blocks of the sweep; none where it mixes nothing."""
    ensembles: Callable[[], Sequence[TrialRow]] = tuple
    """Those that the sweep file names, as rows beside the trials."""

    def all_rows(self) -> list[TrialRow]:
        return [*self.rows, *self.ensembles()]


@dataclass(frozen=True, slots=True)
class Drawn:
    figures: Mapping[str, "Figure"]
    lacking: Mapping[str, str]
    """Why the others were not drawn."""


def draw(material: Material, *, metric: str = "top1", only: Sequence[str] = ()) -> Drawn:
    """The figures of a sweep by kind; all that it has what they need for, or those named.

    Raises NotFoundError while no trial has finished, UsageError for a metric or kind that there is not.
    """
    if metric not in METRIC_COLUMNS:
        raise UsageError(f"no metric {metric}; there are {', '.join(METRIC_COLUMNS)}")
    unknown = [each for each in only if each not in KINDS]
    if unknown:
        raise UsageError(f"no figure {unknown[0]}; there are {', '.join(KINDS)}")
    if not cells(material.rows, metric):
        raise NotFoundError("nothing to draw yet: no trial has finished")
    import matplotlib as mpl

    figures: dict[str, Figure] = {}
    lacking: dict[str, str] = {}
    with mpl.rc_context(_STYLE):
        for kind in only or KINDS:
            drawn = KINDS[kind](material, metric)
            if isinstance(drawn, str):
                lacking[kind] = drawn
            else:
                figures[kind] = drawn
    return Drawn(figures, lacking)


def write(figures: Mapping[str, "Figure"], folder: Path, formats: Sequence[str], metric: str = "top1") -> list[Path]:
    """Write figures into a folder, in each format; the files, in that order, named after another metric than top1, too.
    The same figures make the same bytes.

    Raises UsageError for a format that there is not, UnreachableError if the folder cannot be written.
    """
    check_formats(formats)
    suffix = "" if metric == "top1" else f"-{metric}"
    return [save(drawn, folder / f"{kind}{suffix}.{each}") for kind, drawn in figures.items() for each in formats]


def check_formats(formats: Sequence[str]) -> None:
    unknown = [each for each in formats if each not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"no format {', '.join(unknown) or 'is named'}; there are {', '.join(FORMATS)}")


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as its suffix says, without a date. Raises UnreachableError."""
    import matplotlib as mpl

    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[path.suffix[1:]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):
            figure.savefig(path, bbox_inches="tight", bbox_extra_artists=_artists(figure), metadata=dated)
    except OSError as error:
        raise UnreachableError(
            f"cannot write {path}: {error.strerror or error}; name another place with --out"
        ) from error
    return path


def svg(figure: "Figure") -> bytes:
    """The figure as SVG on nothing: the page behind it shows through."""
    import io

    import matplotlib as mpl

    sink = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(sink, format="svg", bbox_inches="tight", bbox_extra_artists=_artists(figure),
                       metadata={"Date": None}, transparent=True)  # fmt: skip
    return sink.getvalue()


def _artists(figure: "Figure") -> list[Any] | None:
    """All that the file has to hold, legends too, for which the layout makes no room: long ones would take it all.

    None where there are no legends: every axis goes through the list, which takes a gallery half a minute.
    """
    legends = [legend for axis in figure.axes if (legend := axis.get_legend())]
    return [*figure.get_default_bbox_extra_artists(), *legends] if legends else None


# ----------------------------------------------------------------------------------------------- curves, cells, studies


def _curves(material: Material, metric: str) -> "Figure | str":
    drawn = cells(material.rows, metric)
    lines = curves(drawn, material.epochs(), metric)
    if not any(len(each.epochs) > 1 for each in lines):
        return "no two epochs were evaluated"
    return draw_curves(drawn, lines, metric, standing(material.rows, metric))


def draw_curves(drawn: Sequence[Cell], lines: Sequence[Curve], metric: str, told: str = "") -> "Figure":
    """One panel of lines, or several side by side, with a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    panels = list(dict.fromkeys(cell.panel for cell in drawn))
    figure, axes = _panels(panels)
    for axis, panel in zip(axes, panels, strict=True):
        here = [(cell, line) for cell, line in zip(drawn, lines, strict=True) if cell.panel == panel]
        named = _best_curves(here, metric)
        for number, (cell, line) in enumerate(named):
            _draw_curve(axis, cell, line, _scale(metric), _look(number, len(named)))
        others = [line for cell, line in here if (cell, line) not in named]
        for number, line in enumerate(others):
            mean = [_scale(metric) * value for value in line.mean]
            label = f"{len(others)} others" if number == 0 else None
            axis.plot(line.epochs, mean, color="0.78", linewidth=0.7, zorder=1, label=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legends(figure, axes)
    figure.supxlabel("epoch", size="medium")
    figure.supylabel(_axis_name(metric), size="medium")
    spared = any(sum(cell.panel == panel for cell in drawn) > PANEL_LINES for panel in panels)
    best = " Of many lines the best at their end are named." if spared else ""
    _tell(figure, told, f"Mean over seeds, whose number is in brackets; bands: one standard deviation.{best}")
    return figure


def _best_curves(here: Sequence[tuple[Cell, Curve]], metric: str) -> list[tuple[Cell, Curve]]:
    """The lines of a panel that are told apart, in its order: all of few; of many those that end best."""
    if len(here) <= PANEL_LINES:
        return list(here)
    sign = -1 if BY_NAME[metric].better == "lower" else 1
    ended = [pair for pair in here if pair[1].mean]
    best = sorted(ended, key=lambda pair: -sign * pair[1].mean[-1])[: PANEL_LINES - 1]
    return [pair for pair in here if pair in best]


def _draw_curve(axis: "Axes", cell: Cell, line: Curve, scale: float, look: Mapping[str, Any]) -> None:
    mean = [scale * value for value in line.mean]
    axis.plot(line.epochs, mean, linewidth=1.4, markersize=3.5, markevery=max(1, len(mean) // 8), label=cell.within,
              **look)  # fmt: skip
    if len(cell.trials) > 1:
        low = [scale * (value - std) for value, std in zip(line.mean, line.std, strict=True)]
        high = [scale * (value + std) for value, std in zip(line.mean, line.std, strict=True)]
        axis.fill_between(line.epochs, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _accuracy(material: Material, metric: str) -> "Figure | str":
    rows = material.all_rows()
    drawn, told = cells(rows, metric), standing(rows, metric)
    if len(drawn) > MOST_CELLS:
        told = f"{told}, the best {MOST_CELLS} of {len(drawn):,} cells"
        drawn = _best(drawn, metric)[:MOST_CELLS]
    return draw_values(drawn, metric, told)


def _best(drawn: Sequence[Cell], metric: str) -> list[Cell]:
    """The best first."""
    sign = -1 if BY_NAME[metric].better == "lower" else 1

    def rank(cell: Cell) -> float:
        values = cell.values(metric)
        return -sign * spread(values)[0] if values else math.inf

    return sorted(drawn, key=rank)


def draw_values(drawn: Sequence[Cell], metric: str, told: str = "") -> "Figure":
    """A line for each cell: its seeds as rings, their mean as a bar with one standard deviation."""
    from matplotlib.figure import Figure

    scale, count = _scale(metric), len(drawn)
    longest = max(len(cell.counted) for cell in drawn)
    figure = Figure(figsize=(4.2 + 0.075 * longest, 0.9 + 0.32 * count), layout="constrained")
    axis = figure.subplots()
    for line, cell in enumerate(reversed(drawn)):
        values = [scale * value for value in cell.values(metric)]
        mean, std = spread(values)
        axis.plot([mean - std, mean + std], [line, line], color="0.55", linewidth=5, solid_capstyle="butt", alpha=0.5)
        axis.plot([mean], [line], color="black", marker="|", markersize=13, markeredgewidth=2)
        axis.plot(values, [line] * len(values), "o", markerfacecolor="white", markeredgecolor="black", markersize=4.5)
    axis.set_yticks(range(count), [cell.counted for cell in reversed(drawn)])
    axis.set_ylim(-0.6, count - 0.4)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(_axis_name(metric))
    _tell(figure, told, "Rings: each seed; bars: mean and one standard deviation.")
    return figure


def _study(kind: str) -> Callable[[Material, str], "Figure | str"]:
    def drawn(material: Material, metric: str) -> "Figure | str":
        if not study(material.rows, STUDIES[kind], metric):
            name = STUDIES[kind].replace("_", ".", 1)
            return f"no cells differ in {name} alone"
        rows = material.all_rows()
        return draw_study(study(rows, STUDIES[kind], metric), STUDIES[kind], metric, standing(rows, metric))

    return drawn


def draw_study(lines: Sequence[Line], field: str, metric: str, told: str = "") -> "Figure":
    """The metric over the values of a setting, with bands of the interval of the mean."""
    values = sorted({point.at for line in lines if not line.is_level for point in line.points})
    panels = list(dict.fromkeys(line.panel for line in lines))
    figure, axes = _panels(panels)
    for axis, panel in zip(axes, panels, strict=True):
        here = [line for line in lines if line.panel == panel]
        for number, line in enumerate(here):
            _draw_line(axis, line, _scale(metric), _look(number, len(here)))
        if values[0] > 0 and values[-1] / values[0] > 20:
            axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
    _legends(figure, axes)
    figure.supxlabel(setting_name(field), size="medium")
    figure.supylabel(_axis_name(metric), size="medium")
    bands = "Mean over seeds, whose number is in brackets; bands: 95 % interval of the mean, by Student's t."
    levels = " Lines across: the setting has no effect there." if any(line.is_level for line in lines) else ""
    _tell(figure, told, f"{bands}{levels}")
    return figure


def _draw_line(axis: "Axes", line: Line, scale: float, look: Mapping[str, Any]) -> None:
    mean = [scale * point.mean for point in line.points]
    bounds = [tuple(scale * each for each in point.bounds or (point.mean, point.mean)) for point in line.points]
    if line.is_level:
        axis.axhline(mean[0], linewidth=1.2, label=line.counted, color=look["color"], linestyle=look["linestyle"])
        axis.axhspan(*bounds[0], color=look["color"], alpha=0.1, linewidth=0)
        return
    at = [point.at for point in line.points]
    axis.plot(at, mean, linewidth=1.4, markersize=4.5, label=line.counted, **look)
    low, high = [low for low, _ in bounds], [high for _, high in bounds]
    if len(at) > 1:
        axis.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    else:
        axis.vlines(at, low, high, color=look["color"], linewidth=1.2)


# ------------------------------------------------------------------------------------------------------------ scatters


def _ensemble(material: Material, metric: str) -> "Figure | str":
    several = _several(material.rows, "subnetwork_top1_mean")
    if not several:
        return "no finished trial has several subnetworks"
    figure, axis = _square()
    _draw_scatter(axis, several, "subnetwork_top1_mean", "top1")
    low, high = (bound(axis.get_xlim()[i], axis.get_ylim()[i]) for i, bound in ((0, min), (1, max)))
    axis.plot([low, high], [low, high], color="0.6", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.set_xlabel("accuracy of one subnetwork, mean over the M (%)")
    axis.set_ylabel("accuracy of their ensemble (%)")
    _legend(axis, handlelength=1.2)
    told = standing(_with_several(material.rows), "subnetwork_top1_mean")
    _tell(figure, told, "Small: each seed; large: mean. On the dotted line the ensemble gains nothing.")
    return figure


def _diversity(material: Material, metric: str) -> "Figure | str":
    there = [each for each in DIVERSITY if _several(material.rows, each)]
    if not there:
        return "no finished trial has several subnetworks whose predictions differ"
    figure, axes = _panels(there, titled=False, sharex=False)
    for axis, name in zip(axes, there, strict=True):
        _draw_scatter(axis, _several(material.rows, name), name, metric)
        axis.set_xlabel(_axis_name(name).replace("_", " "))
    _legend(axes[-1], handlelength=1.2)
    figure.supylabel(_axis_name(metric), size="medium")
    _tell(figure, standing(_with_several(material.rows), there[0]), "Small: each seed; large: mean.")
    return figure


def _several(rows: Sequence[TrialRow], metric: str) -> list[Cell]:
    """The cells of more than one subnetwork that have a metric."""
    return cells(_with_several(rows), metric)


def _with_several(rows: Sequence[TrialRow]) -> list[TrialRow]:
    return [row for row in rows if (row.config.get("model_subnetworks") or 0) > 1]


def _draw_scatter(axis: "Axes", drawn: Sequence[Cell], x: str, y: str) -> None:
    looks = list(dict.fromkeys(_kind(cell, len(drawn)) for cell in drawn))
    named: set[str] = set()
    for cell in drawn:
        pairs = [(row.metrics.get(x), row.metrics.get(y)) for row in cell.trials]
        both = [(_scale(x) * a, _scale(y) * b) for a, b in pairs if a is not None and b is not None]
        if not both:
            continue
        kind = _kind(cell, len(drawn))
        look = _look(looks.index(kind), len(looks))
        color, marker = look["color"], look["marker"]
        xs, ys = [a for a, _ in both], [b for _, b in both]
        axis.plot(xs, ys, color=color, marker=marker, markersize=3, linestyle="none", alpha=0.6)
        axis.plot([spread(xs)[0]], [spread(ys)[0]], color=color, marker=marker, markersize=8, linestyle="none",
                  markeredgecolor="black", markeredgewidth=0.6, label=None if kind in named else kind)  # fmt: skip
        named.add(kind)


def _kind(cell: Cell, count: int) -> str:
    """What looks alike in a scatter: a cell's trials; of too many cells, those of one label or panel."""
    return cell.counted if count <= MOST_NAMED else cell.trials[0].label or cell.panel


# --------------------------------------------------------------------------------------------------------- reliability


def _reliability(material: Material, metric: str) -> "Figure | str":
    drawn = cells(material.rows, "ece")
    found: dict[str, Calibration] = {}
    for cell in _best(drawn, metric):
        if len(found) < MOST_DIAGRAMS:
            try:
                found[cell.name] = calibration([material.logits(row) for row in cell.trials])
            except NotFoundError:
                continue
    if not found:
        return "no cell has the logits of all its finished trials in the store"
    told = standing(material.rows, "ece")
    if len(found) < len(drawn):
        told = f"{told}, {len(found)} of {len(drawn)} cells"
    if len(found) == MOST_DIAGRAMS < len(drawn):
        told = f"{told}, the best by {metric}"
    return draw_reliability([(cell, found[cell.name]) for cell in drawn if cell.name in found], told)


def draw_reliability(found: Sequence[tuple[Cell, Calibration]], told: str = "") -> "Figure":
    """For each cell what is right of what is promised, and below it how often that much is promised."""
    from matplotlib.figure import Figure

    across = min(4, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(0.5 + 2.1 * across, 0.3 + 3.2 * down))  # by hand: to find a layout takes seconds
    grid = figure.add_gridspec(down, across, left=0.06, right=0.98, bottom=0.16 / down, top=1 - 0.12 / down, wspace=0.3,
                               hspace=0.55)  # fmt: skip
    for number, (cell, bins) in enumerate(found):
        inner = grid[number // across, number % across].subgridspec(2, 1, height_ratios=(4, 1), hspace=0.15)
        above = figure.add_subplot(inner[0])
        below = figure.add_subplot(inner[1], sharex=above)
        above.tick_params(labelbottom=False)
        _draw_diagram(above, bins)
        mean = math.fsum(values := cell.values("ece")) / len(values)
        title = [*textwrap.wrap(cell.counted, 26), f"ECE {100 * mean:.1f} %"]
        above.set_title("\n".join(title), fontsize="small")
        edges = _edges(len(bins.images))
        below.bar(edges[:-1], [100 * each for each in bins.shares], width=edges[1], align="edge", color="0.35")
        below.set(xlim=(0, 1), ylim=(0, 100), yticks=(0, 100), xticks=(0, 0.5, 1), xlabel="confidence")
        if number % across == 0:
            above.set_ylabel("accuracy")
            below.set_ylabel("images %")
    _tell(figure, told, "Bars: share of right images in 15 bins of the ensemble's confidence, over all seeds; white "
                        f"where there are fewer than {FEW_IMAGES} images. Hatched: what lacks to the confidence, or is "
                        "above it. ECE: mean over seeds.")  # fmt: skip
    return figure


def _draw_diagram(axis: "Axes", bins: Calibration) -> None:
    edges = _edges(len(bins.images))
    for left, images, sure, right in zip(edges[:-1], bins.images, bins.confidence, bins.accuracy, strict=True):
        if images:
            shade = "0.72" if images >= FEW_IMAGES else "white"
            axis.bar(left, right, width=edges[1], align="edge", color=shade, edgecolor="black", linewidth=0.6)
            axis.bar(left, sure - right, width=edges[1], bottom=right, align="edge", fill=False, hatch="////",
                     edgecolor="0.25", linewidth=0.4)  # fmt: skip
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def _edges(bins: int) -> list[float]:
    return [i / bins for i in range(bins + 1)]


# ------------------------------------------------------------------------------------------------------------- gallery


def _gallery(material: Material, metric: str) -> "Figure | str":
    samples = material.samples()
    return draw_gallery(samples) if samples else "no trial mixes several images"


def draw_gallery(samples: Sequence[Sample]) -> "Figure":
    """A line for each mixing block: the images that go in, then some draws as a mask above what it mixes."""
    from matplotlib.figure import Figure

    images = max(len(sample.images_MHWC) for sample in samples)
    draws = max(len(sample.masks_DHWC) for sample in samples)
    figure = Figure(figsize=(0.85 * (images + draws) + 0.2, 2.25 * len(samples)))  # by hand, as the diagrams
    lines = figure.add_gridspec(
        len(samples), 1, left=0.01, right=0.99, bottom=0, top=1 - 0.2 / len(samples), hspace=0.2
    )
    for line, sample in enumerate(samples):
        grid = lines[line].subgridspec(2, images + draws, wspace=0.08, hspace=0.08)
        for m, image_HWC in enumerate(sample.images_MHWC):
            _show(figure.add_subplot(grid[1, m]), image_HWC, f"image {m + 1}")
        for d, kappas in enumerate(sample.kappas):
            told = "/".join(f"{100 * kappa:.0f}" for kappa in kappas)
            _show(figure.add_subplot(grid[0, images + d]), sample.masks_DHWC[d], f"{told} %")
            _show(figure.add_subplot(grid[1, images + d]), sample.mixed_DHWC[d])
        corner = figure.add_subplot(grid[0, :images])
        corner.set_axis_off()
        corner.text(0, 1, sample.name.replace(", ", "\n"), transform=corner.transAxes, va="top", fontsize="medium")
    coloured = any(sample.masks_DHWC.shape[-1] > 1 for sample in samples)
    colours = "Where each channel has a mask of its own, these are the red, green and blue ones. " if coloured else ""
    made = "The images are made up. " if any(sample.is_made for sample in samples) else ""
    how = "Upper lines: masks, white for image 1, with the shares of the images; lower lines: what they mix. "
    _tell(figure, "", f"{how}{colours}{made}Here pixels are mixed; training mixes feature maps of the same size.")
    return figure


def _show(axis: "Axes", image_HWC: Any, title: str = "") -> None:
    shown = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(visible=False)
    axis.set(xticks=(), yticks=())
    for spine in axis.spines.values():
        spine.set(visible=True, linewidth=0.5)
    axis.set_title(title, fontsize="x-small", pad=2)


# -------------------------------------------------------------------------------------------------------------- pareto


def draw_front(front: Front) -> "Figure":
    """The metric against the cost: the front as a line, what is dominated as open marks; each with a number, which a
    list beside it explains.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axis = figure.subplots()
        scale = _scale(front.metric)
        costs = [each.cost for each in front.members]
        on = [each for each in front.members if each.dominated_by is None]
        corners = [
            [(here.cost, scale * here.mean), (then.cost, scale * here.mean)] for here, then in itertools.pairwise(on)
        ]
        steps = [*itertools.chain(*corners), (on[-1].cost, scale * on[-1].mean)]
        bounds = [(each.cost, interval(each.values, 0.95) or (each.mean, each.mean)) for each in front.members]
        bars = [[(cost, scale * low), (cost, scale * high)] for cost, (low, high) in bounds]
        axis.plot(*zip(*steps, strict=True), color="0.5", linewidth=1, zorder=1)
        for bar in bars:
            axis.plot(*zip(*bar, strict=True), color="0.6", linewidth=0.9, zorder=1)
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axis.set_xscale("log")
        axis.margins(x=0.08)
        axis.set_xlabel(front.cost_name)
        axis.set_ylabel(_axis_name(front.metric))
        _number_members(figure, front, [*bars, steps])
        _tell(figure, front.standing, "Filled: on the front, no other is as good for less; open: dominated, by means "
                                      "alone. Bars: 95 % interval of the mean, by Student's t.")  # fmt: skip
    return figure


def _number_members(figure: "Figure", front: Front, lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """All members by their cost; of very many those of the front. Members in one place share a word."""
    (axis,), scale = figure.axes, _scale(front.metric)
    few = len(front.members) <= MOST_NUMBERED
    numbers: dict[tuple[float, float], list[str]] = {}
    for each in sorted(front.members, key=lambda each: not few and each.dominated_by is not None):  # named ones first
        at = numbers.setdefault((each.cost, scale * each.mean), [])
        name = None
        if few or each.dominated_by is None:
            at.append(str(sum(map(len, numbers.values())) + 1))
            name = f"{at[-1]}  {textwrap.fill(each.name, 80, subsequent_indent='    ')}"
        axis.plot(
            [each.cost], [scale * each.mean], marker="o", markersize=5, linestyle="none", color="black",
            markerfacecolor="black" if each.dominated_by is None else "white", label=name,
        )  # fmt: skip
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="x-small", handlelength=1.0).set_in_layout(False)
    _place(figure, {place: ", ".join(told) for place, told in numbers.items()}, lines)


def _place(
    figure: "Figure", words: Mapping[tuple[float, float], str], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Write each word beside its place on the only axis, whose layout is final from then on; empty ones are marks that
    no other word may cover, and stand last. `lines` go straight across or upwards.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    (axis,) = figure.axes
    points = 72 / figure.dpi
    size = 0.7 * float(_STYLE["font.size"])
    marks = [(points * x, points * y) for x, y in axis.transData.transform(list(words))]
    left, lower, right, upper = (points * each for each in axis.get_window_extent().extents)
    ends = [[(points * x, points * y) for x, y in axis.transData.transform(line)] for line in lines]
    thin = [
        (min(a, b) - 0.5, min(c, d) - 0.5, max(a, b) + 0.5, max(c, d) + 0.5)
        for line in ends
        for (a, c), (b, d) in itertools.pairwise(line)
    ]
    sizes = [(0.66 * size * len(word), size) for word in words.values() if word]
    middles = lettering.place(marks, sizes, frame=(left, lower, right, upper), lines=thin)
    for (at, word), mark, middle in zip(words.items(), marks, middles, strict=False):
        offset = (middle[0] - mark[0], middle[1] - mark[1])
        axis.annotate(
            word, at, xytext=offset, textcoords="offset points", ha="center", va="center", fontsize=size,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkB": 2}
            if math.hypot(*offset) > LEADER else None,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- looks


KINDS: dict[str, Callable[[Material, str], "Figure | str"]] = {
    "curves": _curves,
    "accuracy": _accuracy,
    **{kind: _study(kind) for kind in STUDIES},
    "ensemble": _ensemble,
    "diversity": _diversity,
    "reliability": _reliability,
    "gallery": _gallery,
}
TITLES: dict[str, str] = {
    "curves": "Learning curves",
    "accuracy": "Every cell with its seeds",
    "width": "Over the width of the network",
    "subnetworks": "Over the number of subnetworks",
    "probability": "Over the probability of binary masks",
    "weight_root": "Over the root of the loss weights",
    "repetition": "Over the repetition in a batch",
    "ensemble": "One subnetwork against the ensemble",
    "diversity": "Diversity of the subnetworks",
    "reliability": "Reliability of the confidence",
    "gallery": "Masks, and what they mix",
}


def _panels(titles: Sequence[str], *, titled: bool = True, sharex: bool = True) -> "tuple[Figure, list[Axes]]":
    """Axes with common limits, one for each title, at most three side by side."""
    from matplotlib.figure import Figure

    across = min(PANELS_ACROSS, len(titles))
    down = math.ceil(len(titles) / across)
    figure = Figure(figsize=(5.2 if across == 1 else 3.6 * across, 3.4 * down), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title if titled else "")
    return figure, axes[: len(titles)]


def _square() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    return figure, figure.subplots()


def _tell(figure: "Figure", told: str, how: str) -> None:
    """Below the figure: how much of the sweep it shows, and what one has to know to read it."""
    text = f"{told}. {how}" if told else how
    lines = textwrap.wrap(text, max(40, round(16 * figure.get_figwidth())))
    figure.text(0.01, -0.02, "\n".join(lines), fontsize=7, color="0.35", va="top", linespacing=1.3)


def _legend(axis: "Axes", **given: Any) -> None:
    """What the lines are, beside the only plot or the last. Of many lines the first."""
    handles, names = axis.get_legend_handles_labels()
    more = len(names) - MOST_NAMED
    if more > 1:
        handles, names = handles[:MOST_NAMED], [*names[: MOST_NAMED - 1], f"{names[MOST_NAMED - 1]} and {more} more"]
    names = [textwrap.fill(name, 40) for name in names]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    axis.legend(handles, names, **place, **given).set_in_layout(False)


def _legends(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """What the lines are: beside the only plot; of several below each, where they cover none."""
    if len(axes) == 1:
        _legend(axes[0], handlelength=3.2)
        return
    most = 0
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        names = [textwrap.fill(name, 44) for name in names]
        most = max(most, sum(1 + name.count("\n") for name in names))
        axis.legend(handles, names, loc="upper left", bbox_to_anchor=(-0.02, -0.1), handlelength=3.2, borderaxespad=0)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * most * math.ceil(len(axes) / PANELS_ACROSS))


def _look(number: int, of: int) -> dict[str, Any]:
    """Of line `number`: no two of up to six share a dash or a marker, and none of any number a shade."""
    style = number % PANEL_LINES
    return {"color": _shade(number, of), "linestyle": _DASHES[style], "marker": _MARKERS[style]}


def _scale(metric: str) -> float:
    return 100.0 if BY_NAME[metric].unit == "fraction" else 1.0


def _axis_name(metric: str) -> str:
    return f"{metric} (%)" if _scale(metric) == 100.0 else metric


def _shade(number: int, of: int) -> tuple[float, float, float]:
    """Dark blue to light orange, evenly in brightness: the order survives a grey printer."""
    share = number / max(1, of - 1)
    return (0.05 + 0.85 * share, 0.15 + 0.45 * share, 0.45 - 0.25 * share)
