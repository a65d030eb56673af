"""What there is to draw: the cells that count, studies of one setting, and calibration that agrees with the metric."""

from collections.abc import Mapping

import made_studies
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_rows import NOTHING

from mixmo_core import evaluate
from mixmo_core.metrics import CALIBRATION_BINS
from orchestrator import analysis
from orchestrator.rows import TrialRow
from orchestrator.significance import interval
from orchestrator.store import Logits
from orchestrator.studies import PANEL_LINES, STUDIES, calibration, cells, curve, standing, study


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


# -------------------------------------------------------------------------------------------------------------- cells


def waiting(row: TrialRow) -> TrialRow:
    """The last seed of all cells is still to come, and the first trial failed."""
    if row.position == 0:
        return row.replace(state="ERROR", metrics=NOTHING)
    return row.replace(state="PENDING", metrics=NOTHING) if row.config["seed"] == 2 else row


def test_only_finished_trials_count_and_the_name_says_of_how_many() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS, change=waiting)
    rows[1] = rows[1].replace(stopped_early=True)
    found = cells(rows, "top1")
    assert [cell.counted for cell in found[:3]] == [
        "vanilla, subnetworks 1 (1/3)", "linear, subnetworks 2 (1/3)", "linear, subnetworks 3 (2/3)"
    ]  # fmt: skip
    assert standing(rows, "top1") == "made, unfinished: 12 of 21 trials"


def test_what_failed_is_told_apart_from_what_is_to_come() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    assert standing(rows, "top1") == "made: 21 of 21 trials"
    rows[0] = rows[0].replace(state="ERROR")
    others = "the others failed, were stopped early or lack this metric"
    assert standing(rows, "top1") == f"made: 20 of 21 trials, {others}"


def test_ensembles_are_counted_by_themselves() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    combined = [made_studies.ensemble(rows[:1] * 2), made_studies.ensemble(rows[1:2] * 2)]
    assert standing([*rows, *combined], "top1") == "made: 21 of 21 trials and 2 ensembles"
    assert standing([*rows, *combined[:1]], "top1") == "made: 21 of 21 trials and 1 ensemble"
    rows[0] = rows[0].replace(state="RUNNING")
    assert standing([*rows, *combined], "top1") == "made, unfinished: 20 of 21 trials and 2 ensembles"


def test_a_quick_form_is_told_so_below_a_figure() -> None:
    rows = [row.replace(sweep="made-quick") for row in made_studies.rows(made_studies.SUBNETWORKS)]
    assert standing(rows, "top1") == "made-quick: 21 of 21 trials (quick form, not comparable)"


def test_a_trial_of_two_sweeps_counts_once() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    twice = [*rows, *(row.replace(sweep="again") for row in rows)]
    assert [cell.trials for cell in cells(twice, "top1")] == [cell.trials for cell in cells(rows, "top1")]
    assert [cell.planned for cell in cells(twice, "top1")] == [3] * 7


def test_cells_hold_the_values_of_the_table() -> None:
    rows = made_studies.rows(made_studies.MANY, change=waiting)
    table = analysis.table(rows, row_fields=["cell_id"])
    expected = {row[0]: cell.values for (row, _), cell in table.cells.items()}
    assert {cell.trials[0].cell_id: cell.values("top1") for cell in cells(rows, "top1")} == expected


def test_names_have_what_labels_do_not_imply() -> None:
    labelled = made_studies.rows([("one", {"model.width": 1}), ("two", {"model.width": 2, "mixing.method": "linear"})])
    assert [cell.name for cell in cells(labelled, "top1")] == ["one", "two"]
    partly = made_studies.rows([("one", {"model.width": 1}), (None, {"model.width": 2})])
    assert [cell.name for cell in cells(partly, "top1")] == ["one, width 1", "width 2"]


def test_many_cells_are_split_into_panels_by_what_tells_most() -> None:
    found = cells(made_studies.rows(made_studies.MANY), "top1")
    assert len(found) == 36
    assert len({cell.panel for cell in found}) == 3
    assert found[0].within == "linear, repetition 1 (3)"
    assert {cell.panel for cell in cells(made_studies.rows(made_studies.MANY[:PANEL_LINES]), "top1")} == {""}


# ------------------------------------------------------------------------------------------------------------- studies


def test_a_study_has_a_line_for_each_system_and_the_interval_of_each_mean() -> None:
    rows = made_studies.rows(made_studies.WIDTH)
    lines = study(rows, "model_width", "top1")
    assert [line.counted for line in lines] == ["vanilla (3)", "Linear-MixMo (3)", "Cut-MixMo (3)"]
    for line in lines:
        assert [point.at for point in line.points] == [1, 2, 3, 5, 10]
        for point in line.points:
            values = [
                row.metrics["top1"] for row in rows if (row.label, row.config["model_width"]) == (line.name, point.at)
            ]
            assert list(point.values) == values
            assert point.mean == pytest.approx(np.mean(values))  # type: ignore[arg-type]
            assert point.bounds == interval(point.values, 0.95)


def test_where_the_setting_has_no_effect_there_is_a_level() -> None:
    lines = study(made_studies.rows(made_studies.PROBABILITY), "mixing_probability", "top1")
    assert [(line.name, line.is_level, len(line.points)) for line in lines] == [
        ("vanilla", True, 1), ("Linear-MixMo, weight root 3", True, 1), ("Cut-MixMo, weight root 1", False, 4),
        ("Cut-MixMo, weight root 3", False, 4),
    ]  # fmt: skip


def test_a_system_with_one_value_stands_beside_the_others() -> None:
    lines = study(made_studies.rows(made_studies.SUBNETWORKS), "model_subnetworks", "top1")
    assert [(line.name, [point.at for point in line.points]) for line in lines] == [
        ("vanilla", [1]), ("linear", [2, 3, 4]), ("cutmix", [2, 3, 4])
    ]  # fmt: skip


def test_a_line_tells_how_many_trials_its_points_have() -> None:
    rows = made_studies.rows(made_studies.WIDTH, change=waiting)
    assert [line.counted for line in study(rows, "model_width", "top1")] == [
        "vanilla (1 to 2/3)", "Linear-MixMo (2/3)", "Cut-MixMo (2/3)"
    ]  # fmt: skip


def test_of_too_many_lines_those_of_a_single_point_are_left_out() -> None:
    """As where a sweep varies one setting after another around one cell."""
    around = [*(("a", {"model.width": w}) for w in (1, 2, 3, 4, 5, 6)), *(("a", {"mixing.alpha": a}) for a in (1, 3))]
    rows = made_studies.rows([*around, ("vanilla", {"model.subnetworks": 1})])
    (line,) = study(rows, "mixing_alpha", "top1") or study(rows, "model_width", "top1")
    assert [point.at for point in line.points] == [1, 2, 3]
    assert line.name == "a"


@pytest.mark.parametrize("field", STUDIES.values())
def test_there_is_no_study_where_no_cells_differ_in_the_setting_alone(field: str) -> None:
    apart = [
        ("a", {"model.width": 1, "mixing.probability": 0.1, "mixing.weight_root": 1.0, "data.repetition": 1}),
        ("b", {"model.width": 2, "mixing.probability": 0.2, "mixing.weight_root": 2.0, "data.repetition": 2,
               "model.subnetworks": 3}),
    ]  # fmt: skip
    assert study(made_studies.rows(apart), field, "top1") == []


def test_a_setting_that_goes_with_the_studied_one_splits_no_line() -> None:
    rows = made_studies.rows([(None, {"model.width": w, "optim.lr": 0.1 / w}) for w in (1, 2, 4)])
    (line,) = study(rows, "model_width", "top1")
    assert [point.at for point in line.points] == [1, 2, 4]


@given(st.permutations(range(30)))
def test_a_study_does_not_depend_on_the_order_of_the_rows(order: list[int]) -> None:
    rows = made_studies.rows(made_studies.PROBABILITY)
    assert study([rows[i] for i in order], "mixing_probability", "top1") == study(rows, "mixing_probability", "top1")


# --------------------------------------------------------------------------------------------------------- calibration


@given(seed=st.integers(0, 10**6), subnetworks=st.integers(1, 3), sure=st.floats(0.1, 5))
def test_the_bins_add_up_to_the_metric(seed: int, subnetworks: int, sure: float) -> None:
    stored = made_studies.some_logits(seed, M=subnetworks, N=120, sure=sure)
    bins = calibration([stored])
    expected = evaluate.summarize(
        torch.from_numpy(stored.logits_MNK.astype(np.float32)), torch.from_numpy(stored.labels_N)
    )
    assert bins.error == pytest.approx(expected["ece"], abs=1e-9)
    assert sum(bins.images) == 120
    right = sum(n * accuracy for n, accuracy in zip(bins.images, bins.accuracy, strict=True))
    assert right / 120 == pytest.approx(expected["top1"])


def test_seeds_share_the_bins() -> None:
    one, two = made_studies.some_logits(1), made_studies.some_logits(2)
    both = calibration([one, two])
    apart = [calibration([one]), calibration([two])]
    assert both.images == tuple(map(sum, zip(*(each.images for each in apart), strict=True)))
    assert len(both.images) == CALIBRATION_BINS


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    even = Logits.of(np.zeros((1, 1, 15)), np.array([0]))  # a fifteenth each
    assert calibration([even]).images[0] == 1
