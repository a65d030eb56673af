"""Figures: what is drawn, and that it can be told apart without colour."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import NOTHING, epoch, reached, trial

from orchestrator.errors import NotFoundError, UnreachableError, UsageError
from orchestrator.figures import PANEL_LINES, curve, draw_curves, figures, plots
from orchestrator.rows import EpochRow, TrialRow


def sweep(widths: int, seeds: int = 2) -> tuple[list[TrialRow], list[EpochRow]]:
    """For each width a cell with one subnetwork and one with two; all trials finished after three epochs."""
    rows: list[TrialRow] = []
    epochs: list[EpochRow] = []
    for width, subnetworks, seed in itertools.product(range(1, widths + 1), (1, 2), range(seeds)):
        label = "vanilla" if subnetworks == 1 else None
        row = trial(seed, width=width, subnetworks=subnetworks, label=label, position=len(rows))
        value = 0.5 + 0.05 * width + 0.02 * subnetworks + 0.01 * seed
        for number in (1, 2, 3):
            metrics = {**NOTHING, "top1": value * number / 3}
            epochs.append(replace(epoch(row, number), metrics=metrics))
        rows.append(reached(row, 3, metrics=metrics))
    return rows, epochs


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_curve_is_the_mean_and_spread_of_its_trials(values: list[list[float]]) -> None:
    drawn = curve([dict(enumerate(each, start=1)) for each in values])
    assert drawn.epochs == (1, 2, 3, 4)
    assert drawn.mean == pytest.approx(np.mean(values, axis=0), abs=1e-12)
    spread = np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros(4)
    assert drawn.std == pytest.approx(spread, abs=1e-9)


def test_a_curve_has_the_epochs_that_all_its_trials_have() -> None:
    trials: list[Mapping[int, float]] = [{1: 0.1, 2: 0.2, 4: 0.4}, {2: 0.4, 3: 0.5, 4: 0.8}]
    assert curve(trials).epochs == (2, 4)
    assert curve([{}]).epochs == ()


def test_only_finished_trials_are_drawn() -> None:
    rows, epochs = sweep(widths=1)
    rows[0] = rows[0].replace(state="RUNNING")
    rows[1] = rows[1].replace(stopped_early=True)
    (cell,) = plots(rows, epochs, "top1")
    assert cell.values == pytest.approx((0.59, 0.60))
    assert cell.curve.mean == pytest.approx((0.595 / 3, 2 * 0.595 / 3, 0.595))
    with pytest.raises(NotFoundError, match="no trial has finished"):
        figures(rows[:2], epochs, Path("nowhere"))


def test_lines_differ_in_dash_marker_and_brightness() -> None:
    rows, epochs = sweep(widths=PANEL_LINES // 2)
    (axis,) = draw_curves(plots(rows, epochs, "top1"), "top1").axes
    lines = axis.get_lines()
    assert len(lines) == PANEL_LINES
    assert len({str(line.get_linestyle()) + str(line.get_marker()) for line in lines}) == PANEL_LINES
    bright = [float(np.dot(np.array(line.get_color(), dtype=float), [0.299, 0.587, 0.114])) for line in lines]
    assert bright == sorted(bright)
    assert min(np.diff(bright)) > 0.05
    assert lines[0].get_label() == "vanilla, width 1, subnetworks 1 (2)"
    assert np.asarray(lines[0].get_ydata()) == pytest.approx([100 * 0.575 * n / 3 for n in (1, 2, 3)])


def test_many_cells_are_split_into_panels_and_no_empty_one_is_left() -> None:
    rows, epochs = sweep(widths=4)
    drawn = draw_curves(plots(rows, epochs, "top1"), "top1")
    assert [axis.get_title() for axis in drawn.axes] == [f"width {width}" for width in range(1, 5)]
    names = [[line.get_label() for line in axis.get_lines()] for axis in drawn.axes]
    assert names == [["vanilla, subnetworks 1 (2)", "subnetworks 2 (2)"]] * 4


def test_files_are_written_in_each_format_and_are_the_same_each_time(tmp_path: Path) -> None:
    rows, epochs = sweep(widths=3)
    written = figures(rows, epochs, tmp_path / "new" / "folder")
    names = ["curves.png", "curves.svg", "accuracy.png", "accuracy.svg"]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 2000 for path in written)
    again = figures(rows, epochs, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_a_metric_that_is_no_number_does_no_harm(tmp_path: Path) -> None:
    rows, _ = sweep(widths=2)
    rows[0] = rows[0].replace(metrics={**rows[0].metrics, "top1": math.nan})
    assert len(figures(rows, [], tmp_path, formats=["png"])) == 2


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    rows, epochs = sweep(widths=2)
    with pytest.raises(UsageError, match="no format gif; there are png"):
        figures(rows, epochs, tmp_path, formats=["gif"])
    with pytest.raises(UsageError, match="no metric top2"):
        figures(rows, epochs, tmp_path, metric="top2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match="--out"):
        figures(rows, epochs, tmp_path / "file" / "folder", formats=["png"])
