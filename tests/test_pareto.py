"""The front: laws of domination, costs as the rows and settings have them, and the forms it is written in."""

import csv
import io
import itertools
from dataclasses import replace
from typing import Any, get_args

import made_studies
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmo_core import cost as counts
from orchestrator.analysis import EnsembleRow, table
from orchestrator.errors import NotFoundError, UsageError
from orchestrator.pareto import CostName, Front, dominators, front
from orchestrator.rows import TrialRow, config_of
from orchestrator.sweep import shown

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """The definition, of numbers of which less is better."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(POINTS)
def test_the_front_is_what_nothing_dominates_and_all_else_is_dominated_by_a_member_of_it(
    points: list[tuple[int, int]],
) -> None:
    found = dominators(points)
    for point, by in zip(points, found, strict=True):
        assert (by is None) == (not any(dominates(other, point) for other in points))
        if by is not None:
            assert dominates(points[by], point)
            assert found[by] is None
            assert points[by][1] == min(b for a, b in points if a <= point[0])


@given(POINTS, st.randoms())
def test_the_order_of_the_points_does_not_matter(points: list[tuple[int, int]], chance: Any) -> None:
    order = list(range(len(points)))
    chance.shuffle(order)
    before = [None if by is None else points[by] for by in dominators(points)]
    shuffled = [points[i] for i in order]
    after = [None if by is None else shuffled[by] for by in dominators(shuffled)]
    assert after == [before[i] for i in order]


def test_equals_do_not_dominate_each_other() -> None:
    assert dominators([(1, 1), (1, 1), (2, 1), (1, 2)]) == [None, None, 1, 1]


# --------------------------------------------------------------------------------------------------------------- costs


def test_members_stand_by_cost_and_say_who_dominates_them() -> None:
    found = front(made_studies.rows(made_studies.WIDTH))
    assert [each.cost for each in found.members] == sorted(each.cost for each in found.members)
    assert [each.name for each in found.members if each.dominated_by is None] == [
        "vanilla, width 1", "Cut-MixMo, width 1", "Cut-MixMo, width 2", "Cut-MixMo, width 3", "Cut-MixMo, width 5",
        "Cut-MixMo, width 10",
    ]  # fmt: skip
    (dominated,) = [each for each in found.members if each.name == "vanilla, width 10"]
    assert dominated.dominated_by == "Cut-MixMo, width 5"
    assert found.cost_name == "GPU-hours of training"


@given(st.permutations(range(21)))
def test_the_order_of_the_trials_does_not_matter(order: list[int]) -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    assert front([rows[i] for i in order], cost="flops") == front(rows, cost="flops")


def test_each_cost_is_what_the_rows_and_the_settings_say() -> None:
    rows = made_studies.rows([("one", {"model.width": 2})])
    config = config_of(rows[0])
    expected = {
        "gpu_hours": sum(row.gpu_seconds for row in rows) / 3 / 3600, "flops": rows[0].train_flops,
        "parameters": counts.parameters(config), "inference_flops": counts.forward_flops(config),
        "money": 2.5 * sum(row.gpu_seconds for row in rows) / 3 / 3600,
    }  # fmt: skip
    for name in get_args(CostName):
        (member,) = front(rows, cost=name, price=2.5).members
        assert member.cost == pytest.approx(expected[name]), name


def test_less_is_better_of_a_metric_whose_less_is_better() -> None:
    rows = made_studies.rows(made_studies.WIDTH)
    by_top1 = {each.name: each.dominated_by for each in front(rows, metric="top1").members}
    by_nll = {each.name: each.dominated_by for each in front(rows, metric="nll").members}
    assert by_nll == by_top1  # the made nll falls as the accuracy rises


def test_an_ensemble_costs_what_its_members_do() -> None:
    rows = made_studies.rows([("one", {"model.width": 2})], seeds=2)
    joined = {name: getattr(rows[0], name) for name in rows[0].__dataclass_fields__} | {
        "label": "2 x one", "cell_id": "2xone", "trial_id": "a+b", "gpu_seconds": sum(row.gpu_seconds for row in rows)
    }  # fmt: skip
    ensemble = EnsembleRow(**joined, members=2)
    names: list[CostName] = ["gpu_hours", "parameters", "inference_flops"]
    for name in names:
        single, double = front([*rows, ensemble], cost=name).members
        assert double.name == "2 x one"
        assert double.cost == pytest.approx(2 * single.cost)


def test_without_a_gpu_hours_are_those_of_the_wall_clock_and_that_is_said() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS, change=lambda row: row.replace(gpu_seconds=0.0))
    found = front(rows)
    assert found.cost_name == "wall-clock hours of training"
    assert found.members[0].cost == pytest.approx(91 / 3600)
    assert "No trial used a GPU" in found.to_text()
    mixed = [row.replace(gpu_seconds=9.0 if row.position % 7 else 0.0) for row in rows]
    with pytest.raises(UsageError, match=r"3 of 21 trials were trained without a GPU.*--cost flops"):
        front(mixed)
    assert front(mixed, cost="flops").members


def test_an_unfinished_sweep_is_right_for_what_has_finished_and_says_so() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    rows[-1] = rows[-1].replace(state="RUNNING")
    found = front(rows, cost="flops")
    assert "made, unfinished: 20 of 21 trials." in found.to_text()
    assert "by means alone, which may differ by chance" in found.notes[-1]
    assert "(2/3)" in found.to_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "top2"}, "no metric top2"),
        ({"metric": "temperature"}, "neither more nor less is better"),
        ({"cost": "sweat"}, "no cost sweat; there are gpu_hours, flops"),
        ({"cost": "money"}, "--price PER_GPU_HOUR"),
    ],
)
def test_what_there_is_not_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        front(made_studies.rows(made_studies.SUBNETWORKS), **given)


def test_where_nothing_has_finished_there_is_no_front() -> None:
    rows = made_studies.rows(made_studies.SUBNETWORKS)
    with pytest.raises(NotFoundError, match="no trial has finished"):
        front([row.replace(state="RUNNING") for row in rows])
    lacking = [row.replace(train_flops=None) for row in rows]
    with pytest.raises(NotFoundError, match="both top1 and flops"):
        front(lacking, cost="flops")
    some: list[TrialRow] = [row.replace(train_flops=None) if row.label == "vanilla" else row for row in rows]
    assert "Left out, without numbers: vanilla, subnetworks 1." in front(some, cost="flops").notes


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.fixture
def found() -> Front:
    return front(made_studies.rows(made_studies.WIDTH), price=2.5, cost="money", currency="EUR")


def test_the_numbers_are_those_of_the_table(found: Front) -> None:
    made = table(made_studies.rows(made_studies.WIDTH), row_fields=["cell_id"])
    cells = {row[0]: cell for (row, _), cell in made.cells.items()}
    for record, line in zip(csv.DictReader(io.StringIO(found.to_csv())), found.text_cells()[1], strict=True):
        cell = cells[record["cell_id"]]
        assert (float(record["mean"]), float(record["std"])) == (cell.mean, cell.std)
        assert line[2] == made.value_text(cell)


def test_every_form_has_every_cell(found: Front) -> None:
    for text in (found.to_text(), found.to_markdown(), found.to_csv()):
        assert all(each.name in text for each in found.members)
    assert found.to_text().splitlines()[0].split("  ")[0] == "cell"
    assert "At 2.5 EUR an hour." in found.to_text()
    assert not any(line != line.rstrip() for line in found.to_text().splitlines())


def test_markdown_keeps_its_columns_whatever_a_label_says(found: Front) -> None:
    strange = replace(found, members=(replace(found.members[0], name="a|b"),))
    lines = [line for line in strange.to_markdown().splitlines() if line.startswith("|")]
    assert [line.replace(r"\|", "").count("|") for line in lines] == [5] * len(lines)


def test_the_price_is_the_sweep_files() -> None:
    assert shown("name: x\nprice: {gpu_hour: 2.5, currency: EUR}\n", "x").price.gpu_hour == 2.5
    assert shown("name: x\n", "x").price.gpu_hour is None


def test_pairs_of_cells_agree_with_the_definition() -> None:
    members = front(made_studies.rows(made_studies.PROBABILITY), cost="flops").members
    front_names = {each.name for each in members if each.dominated_by is None}
    for one, other in itertools.permutations(members, 2):
        if dominates((one.cost, -one.mean), (other.cost, -other.mean)):
            assert other.name not in front_names
