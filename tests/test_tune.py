"""The pages in which Ray Tune is given a sweep's trials. What it does with them is in the tests on Ray."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from orchestrator.tune import PAGE, Grid

COMMON = {"dispatcher": "made"}


def suggested(grid: Grid, most: int = 10_000) -> list[Any]:
    found: list[Any] = []
    while len(found) < most and (page := grid.suggest(f"{len(found)}")) != Searcher.FINISHED:
        found.append(page)
    return found


@given(st.integers(0, 3 * PAGE + 1))
def test_every_trial_is_on_one_page_in_its_order(trials: int) -> None:
    indices = [7 * index % 10_007 for index in range(trials)]
    pages = suggested(Grid(indices, COMMON))
    assert [index for page in pages for index in page["page"]] == indices
    assert all(page["dispatcher"] == "made" and 1 <= len(page["page"]) <= PAGE for page in pages)
    assert len(pages) == -(-trials // PAGE)


def test_a_drained_grid_suggests_nothing_more() -> None:
    grid = Grid(range(2 * PAGE), COMMON)
    assert len(suggested(grid, most=1)) == 1
    grid.drain()
    assert suggested(grid) == []
