"""Figures: what is drawn where, that it can be told apart without colour, and that files are the same each time."""

import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_cifar
import made_figures
import made_studies
import numpy as np
import pytest
from made_rows import NOTHING
from matplotlib.patches import Rectangle

from orchestrator import figures, gallery, studies
from orchestrator.analysis import EnsembleRow
from orchestrator.errors import NotFoundError, UnreachableError, UsageError
from orchestrator.figures import FORMATS, KINDS, TITLES, Material, draw, draw_front, draw_study, write
from orchestrator.pareto import front
from orchestrator.rows import TrialRow
from orchestrator.store import Logits
from orchestrator.studies import PANEL_LINES, STUDIES, Sample, calibration, study
from orchestrator.sweep import parse

SWEEPS = {
    "width": made_studies.WIDTH, "probability": made_studies.PROBABILITY, "subnetworks": made_studies.SUBNETWORKS,
    "many": made_studies.MANY,
}  # fmt: skip


def no_logits(row: TrialRow) -> Logits:
    raise NotFoundError("none are stored")


def material(rows: Sequence[TrialRow], **given: Any) -> Material:
    """Of trials without logits; a gallery is not asked for."""
    return Material(**{
        "rows": rows, "epochs": lambda: made_studies.epochs(rows), "logits": no_logits, "samples": list[Sample], **given
    })  # fmt: skip


def logits(row: TrialRow) -> Logits:
    return made_studies.some_logits(row.position, M=row.config["model_subnetworks"])


def told(figure: Any) -> str:
    """What stands below a figure."""
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


# ----------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("name", "studies"),
    [("width", {"width"}), ("probability", {"probability", "weight_root"}), ("subnetworks", {"subnetworks"}),
     ("many", {"width", "repetition"})],
)  # fmt: skip
def test_each_figure_is_drawn_where_the_sweep_has_what_it_needs(name: str, studies: set[str]) -> None:
    drawn = draw(material(made_studies.rows(SWEEPS[name])))
    several = {"ensemble", "diversity"}
    assert set(drawn.figures) == {"curves", "accuracy", *studies, *several}
    assert set(drawn.lacking) == set(KINDS) - set(drawn.figures)
    assert all(TITLES[kind] for kind in KINDS)
    for kind in set(STUDIES) - studies:
        assert drawn.lacking[kind] == f"no cells differ in {STUDIES[kind].replace('_', '.', 1)} alone"


def test_a_sweep_of_single_networks_has_no_ensemble_diversity_or_gallery() -> None:
    rows = made_studies.rows(made_studies.WIDTH[:5])
    drawn = draw(material(rows, samples=lambda: gallery.samples(rows)), only=["ensemble", "diversity", "gallery"])
    assert not drawn.figures
    assert drawn.lacking == {
        "ensemble": "no finished trial has several subnetworks",
        "diversity": "no finished trial has several subnetworks whose predictions differ",
        "gallery": "no trial mixes several images",
    }


def test_what_is_costly_is_asked_for_only_by_who_needs_it() -> None:
    def never(*given: Any) -> Any:
        raise AssertionError("nobody needs it")

    drawn = draw(material(made_studies.rows(SWEEPS["width"]), epochs=never, logits=never, samples=never),
                 only=["accuracy", "width", "ensemble", "diversity"])  # fmt: skip
    assert not drawn.lacking


def test_an_unfinished_sweep_says_so_in_every_figure() -> None:
    rows = made_studies.rows(SWEEPS["width"])
    rows[-1] = rows[-1].replace(state="RUNNING", metrics=NOTHING)
    drawn = draw(material(rows, logits=logits))
    for kind in ("curves", "accuracy", "width", "reliability"):
        assert "made, unfinished: 44 of 45 trials" in told(drawn.figures[kind]), kind
    for kind in ("ensemble", "diversity"):
        assert "made, unfinished: 29 of 30 trials" in told(drawn.figures[kind]), kind
    assert "made, unfinished: 44 of 45 trials" in told(draw_front(front(rows)))


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    rows = made_studies.rows(SWEEPS["width"])
    with pytest.raises(UsageError, match="no metric top2"):
        draw(material(rows), metric="top2")
    with pytest.raises(UsageError, match="no figure heigth; there are curves, accuracy"):
        draw(material(rows), only=["heigth"])
    with pytest.raises(NotFoundError, match="no trial has finished"):
        draw(material([row.replace(state="RUNNING") for row in rows]))
    drawn = draw(material(rows), only=["accuracy"]).figures
    with pytest.raises(UsageError, match="no format gif; there are png"):
        write(drawn, tmp_path, ["gif"])
    with pytest.raises(UsageError, match="no format is named"):
        write(drawn, tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match="--out"):
        write(drawn, tmp_path / "file" / "folder", ["png"])


def test_a_metric_that_is_no_number_does_no_harm(tmp_path: Path) -> None:
    rows = made_studies.rows(SWEEPS["width"])
    rows[0] = rows[0].replace(metrics={**rows[0].metrics, "top1": np.nan})
    assert write(draw(material(rows)).figures, tmp_path, ["png"])


def test_a_single_cell_of_a_single_seed_is_drawn(tmp_path: Path) -> None:
    rows = made_studies.rows([(None, {})], seeds=1)
    drawn = draw(material(rows, logits=logits, samples=lambda: gallery.samples(rows)))
    assert set(drawn.figures) == set(KINDS) - set(STUDIES)
    assert len(write(drawn.figures, tmp_path, ["png"])) == len(drawn.figures)


# -------------------------------------------------------------------------------------------------- how it looks


def brightness(colour: Any) -> float:
    return float(np.dot(np.array(colour[:3], dtype=float), [0.299, 0.587, 0.114]))


def test_lines_differ_in_dash_marker_and_brightness() -> None:
    blocks = [
        (str(p), {"mixing.probability": p, "model.width": w}) for p in (0, 0.1, 0.2, 0.3, 0.4, 0.5) for w in (1, 2)
    ]
    lines = study(made_studies.rows(blocks), "model_width", "top1")
    (axis,) = draw_study(lines, "model_width", "top1").axes
    drawn = axis.get_lines()
    assert len(drawn) == PANEL_LINES
    assert len({str(line.get_linestyle()) + str(line.get_marker()) for line in drawn}) == PANEL_LINES
    bright = [brightness(line.get_color()) for line in drawn]
    assert bright == sorted(bright)
    assert min(np.diff(bright)) > 0.05


def test_a_grey_print_keeps_the_lines_apart() -> None:
    """As a printer sees it: the figure's own pixels, without their colours."""
    from PIL import Image

    figure = draw(material(made_studies.rows(SWEEPS["width"])), only=["width"]).figures["width"]
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    grey = np.asarray(Image.open(sink).convert("L"))
    for line in figure.axes[0].get_lines():
        shade = round(255 * brightness(line.get_color()))
        assert (np.abs(grey.astype(int) - shade) <= 3).sum() > 100, line.get_label()


def test_axes_are_in_percent_and_named() -> None:
    drawn = draw(material(made_studies.rows(SWEEPS["probability"])), only=["probability"]).figures["probability"]
    assert (drawn.get_supxlabel(), drawn.get_supylabel()) == ("probability (p)", "top1 (%)")
    line = next(line for line in drawn.axes[0].get_lines() if line.get_label() == "Cut-MixMo, weight root 3 (3)")
    assert np.asarray(line.get_ydata(), dtype=float).max() == pytest.approx(72.5, abs=1)


def test_a_diagram_has_the_bars_of_the_bins() -> None:
    rows = made_studies.rows([(None, {})], seeds=1)
    drawn = draw(material(rows, logits=logits), only=["reliability"]).figures["reliability"]
    above, _ = drawn.axes
    bins = calibration([logits(rows[0])])
    heights = [bar.get_height() for bar in above.patches if isinstance(bar, Rectangle) and bar.get_fill()]
    assert heights == pytest.approx([a for a, n in zip(bins.accuracy, bins.images, strict=True) if n])
    assert "ECE 2.0 %" in above.get_title()  # the trial's own number, which the table has


@pytest.mark.parametrize(("metric", "best"), [("top1", True), ("ece", False)])
def test_of_more_cells_than_diagrams_the_best_are_drawn_in_the_order_of_the_sweep(metric: str, best: bool) -> None:
    rows = [
        row.replace(metrics={**row.metrics, metric: 0.5 + row.position % 15 / 100})
        for row in made_studies.rows(SWEEPS["width"])
    ]
    drawn = draw(material(rows, logits=logits), metric=metric, only=["reliability"]).figures["reliability"]
    assert f"12 of 15 cells, the best by {metric}" in told(drawn)
    titles = [axis.get_title().replace("\n", " ").split(" (")[0] for axis in drawn.axes if axis.get_title()]
    names = [cell.name for cell in studies.cells(rows, "ece")]
    assert titles == (names[3:] if best else names[:12])


def test_ensembles_are_drawn_among_the_cells_and_the_studies_and_are_made_once_they_are_needed() -> None:
    rows = with_ensembles(made_studies.WIDTH)
    trials = [row for row in rows if not isinstance(row, EnsembleRow)]
    asked: list[str] = []

    def combined() -> list[TrialRow]:
        asked.append("asked")
        return [row for row in rows if isinstance(row, EnsembleRow)]

    few = draw(material(trials, ensembles=combined), only=["curves", "probability", "ensemble", "diversity"])
    assert asked == []
    assert set(few.lacking) == {"probability"}
    assert not any("2 x" in name for figure in few.figures.values() for name in named(figure))
    drawn = draw(material(trials, ensembles=combined), only=["accuracy", "width"]).figures
    assert len(asked) == 2
    assert "45 of 45 trials and 15 ensembles" in told(drawn["width"])
    assert {"vanilla (3)", "2 x vanilla (1)", "2 x Cut-MixMo (1)"} <= set(named(drawn["width"]))
    lines = {line.get_label(): line for line in drawn["width"].axes[0].get_lines()}
    assert np.asarray(lines["2 x vanilla (1)"].get_xdata()).tolist() == [1, 2, 3, 5, 10]
    assert sum(label.get_text().startswith("2 x") for label in drawn["accuracy"].axes[0].get_yticklabels()) == 15


def named(figure: Any) -> list[str]:
    """What the legends of a figure list."""
    return [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]


@pytest.mark.slow
def test_hundreds_of_cells_are_drawn_without_a_warning(tmp_path: Path) -> None:
    blocks = [(None, {"model.width": w, "mixing.probability": p / 40}) for w in range(1, 4) for p in range(40)]
    drawn = draw(material(made_studies.rows(blocks, seeds=1)), only=["curves", "accuracy", "width", "ensemble"])
    assert "the best 80 of 120 cells" in told(drawn.figures["accuracy"])
    for figure in drawn.figures.values():
        figures.svg(figure)


@pytest.mark.parametrize(("metric", "best"), [("top1", {0.8, 0.9}), ("nll", {0.0, 0.1})])
def test_of_many_curves_the_best_are_named_and_the_others_are_grey(metric: str, best: set[float]) -> None:
    blocks: list[made_studies.Block] = [
        (None, {"mixing.method": method, "mixing.probability": p / 10})
        for method in ("cutmix", "fmix")
        for p in range(10)
    ]
    rows = [
        row.replace(metrics={**row.metrics, metric: row.config["mixing_probability"]})
        for row in made_studies.rows(blocks, seeds=1)
    ]
    many = made_studies.epochs(rows)
    curves = [replace(each, metrics={metric: each.metrics[metric]}) for each in many]
    figure = draw(material(rows, epochs=lambda: curves), metric=metric, only=["curves"]).figures["curves"]
    assert len(figure.axes) == 2
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None
        names = [text.get_text() for text in legend.get_texts()]
        assert names[-1] == "5 others"
        assert len(names) == PANEL_LINES
        assert len(axis.lines) == 10
        assert best <= {float(re.search(r"probability ([\d.]+)", name)[1]) for name in names[:-1]}  # type: ignore[index]
    assert "the best at their end are named" in told(figure)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.slow
def test_files_are_written_in_each_format_and_are_the_same_each_time(tmp_path: Path) -> None:
    rows = made_studies.rows(SWEEPS["probability"][-2:], seeds=2)
    whole = material(rows, logits=logits, samples=lambda: gallery.samples(rows))
    drawn = draw(whole).figures
    written = write(drawn, tmp_path / "new" / "folder", FORMATS)
    assert [path.name for path in written] == [f"{kind}.{each}" for kind in drawn for each in FORMATS]
    assert all(path.stat().st_size > 2000 for path in written)
    again = write(draw(whole).figures, tmp_path / "again", FORMATS)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    for path in written:
        if path.suffix == ".svg":
            assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", path.read_text())


def test_the_figures_of_another_metric_have_names_of_their_own(tmp_path: Path) -> None:
    drawn = draw(material(made_studies.rows(SWEEPS["width"])), metric="nll", only=["accuracy", "width"]).figures
    assert [path.name for path in write(drawn, tmp_path, ["svg"], "nll")] == ["accuracy-nll.svg", "width-nll.svg"]
    assert [path.name for path in write(drawn, tmp_path, ["svg"])] == ["accuracy.svg", "width.svg"]


# ------------------------------------------------------------------------------------------------------------ fronts


def with_ensembles(blocks: Sequence[made_studies.Block]) -> list[TrialRow]:
    rows = made_studies.rows(blocks)
    cells: dict[str, list[TrialRow]] = {}
    for row in rows:
        cells.setdefault(row.cell_id, []).append(row)
    return [*rows, *(made_studies.ensemble(members[:2]) for members in cells.values())]


@pytest.mark.parametrize("name", ["subnetworks", "probability"])
def test_a_front_is_drawn_with_numbers_that_its_list_explains(name: str) -> None:
    found = front(with_ensembles(SWEEPS[name]), cost="flops")
    axis = draw_front(found).axes[0]
    legend = axis.get_legend()
    assert legend is not None
    listed = [text.get_text().split(None, 1) for text in legend.get_texts()]
    assert [" ".join(name.split()) for _, name in listed] == [each.name for each in found.members]
    shown = [number for text in axis.texts for number in text.get_text().split(", ")]
    assert sorted(shown, key=int) == [number for number, _ in listed]
    assert axis.get_xlabel() == "FLOPs of training"


@pytest.mark.parametrize("name", ["probability", "many"])
def test_the_numbers_of_a_front_cover_neither_marks_nor_each_other(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = SWEEPS[name] if name == "many" else [*SWEEPS[name], *made_studies.SUBNETWORKS]
    figure = draw_front(front(with_ensembles(rows), cost="flops"))
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    (axis,) = figure.axes
    numbers = [text.get_window_extent(renderer) for text in axis.texts]
    marks = [axis.transData.transform(line.get_xydata()) for line in axis.lines if line.get_marker() == "o"]
    assert len(numbers) > 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(numbers, 2))
    for number in numbers:
        assert not any(number.contains(*mark[0]) for mark in marks)


def test_of_a_front_with_very_many_members_those_are_numbered_that_none_dominates() -> None:
    found = front(with_ensembles(SWEEPS["many"]), cost="flops")
    assert len(found.members) > figures.MOST_NUMBERED
    legend = draw_front(found).axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == sum(each.dominated_by is None for each in found.members)


# ----------------------------------------------------------------------------------------------------------- gallery


BLOCKS: list[made_studies.Block] = [
    (None, {"mixing.method": method})
    for method in ("sum", "linear", "cutmix", "cowmix", "fmix", "horizontal", "channel", "patchup_soft")
]


def test_the_gallery_mixes_as_the_masks_say() -> None:
    made = gallery.samples(made_studies.rows([*BLOCKS[1:3], (None, {"model.subnetworks": 3})], seeds=1))
    assert [sample.name for sample in made] == ["linear, 2 images", "cutmix, 2 images", "cutmix, 3 images"]
    for sample in made[:2]:
        one, two = sample.images_MHWC
        for mask, mixed, kappas in zip(sample.masks_DHWC, sample.mixed_DHWC, sample.kappas, strict=True):
            assert mixed == pytest.approx(mask * one + (1 - mask) * two, abs=1e-5)
            assert kappas == pytest.approx((mask.mean(), 1 - mask.mean()), abs=1e-5)
    assert all(sum(kappas) == pytest.approx(1) for kappas in made[2].kappas)


def test_images_are_made_up_only_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_studies.rows(BLOCKS[:1], seeds=1)
    (made,) = gallery.samples(rows, tmp_path)
    assert made.is_made
    made_cifar.write_cifar10(tmp_path / "data", monkeypatch)
    made_cifar.forget()
    (real,) = gallery.samples(made_studies.rows(BLOCKS[:1], seeds=1), tmp_path / "data")
    made_cifar.forget()
    assert not real.is_made
    assert real.images_MHWC.shape == (2, 32, 32, 3)
    (digits,) = gallery.samples(made_studies.rows([(None, {"data.dataset": "digits"})], seeds=1))
    assert not digits.is_made
    assert digits.images_MHWC.shape == (2, 8, 8, 1)


def test_every_kind_of_mask_can_be_shown() -> None:
    made = gallery.samples(made_studies.rows(BLOCKS, seeds=1))
    assert len(made) == len(BLOCKS)
    drawn = figures.draw_gallery(made)
    assert figures.svg(drawn) == figures.svg(figures.draw_gallery(made))
    assert "made up" in told(drawn)
    sink = io.BytesIO()
    drawn.savefig(sink, format="png")
    assert len(sink.getvalue()) > 20_000


# ---------------------------------------------------------------------------------------------------------- the page

PAGE = Path(__file__).parent.parent / "docs" / "figures.md"


def test_the_page_shows_every_kind_with_its_command() -> None:
    text = PAGE.read_text()
    headings = {word for line in text.splitlines() if line.startswith("## ") for word in line[3:].split(", ")}
    assert headings >= set(KINDS)
    assert len(made_figures.pictures()) == len([*made_figures.FOLDER.iterdir()])
    assert all(picture.stat().st_size < 200_000 for picture in made_figures.pictures())
    for kinds in re.findall(r"--only ([\w,]+)", text):
        assert set(kinds.split(",")) <= set(KINDS)
    (sweep,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(parse(sweep, source=PAGE.name).trials) == 60


@pytest.mark.slow
def test_the_pictures_of_the_page_show_what_the_code_draws(tmp_path: Path) -> None:
    """Words and numbers, not pixels: these hang on the fonts that a machine has."""
    drawn = made_figures.drawn(tmp_path)
    for picture in made_figures.pictures():
        shown = json.loads(json.dumps(made_figures.shown(drawn[picture.stem])))
        assert made_figures.carried(picture) == shown, f"{picture.name}: run python tests/made_figures.py"
