"""Tests and intervals against scipy, by brute force, and by the laws they must keep."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from orchestrator import significance
from orchestrator.significance import compare, holm, interval, needed, permutation, sign_flip, t_quantile, t_tails

permuted: Any = stats.permutation_test  # its stubs want literals
values = st.floats(-2, 2).map(lambda value: round(value, 4))


def groups(least: int = 2, most: int = 6) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=least, max_size=most)


def normal(seed: int, *sizes: int, shift: float = 0.5) -> list[list[float]]:
    chance = random.Random(seed)
    return [[chance.gauss(i * shift, 1 + i) for _ in range(size)] for i, size in enumerate(sizes)]


# ---------------------------------------------------------------------------------------------------- reference values


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 3.7, 9, 40, 1000])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 1.0, 2.5, 12.0, 300.0])
def test_students_t_is_scipys(t: float, freedom: float) -> None:
    assert t_tails(t, freedom) == t_tails(-t, freedom)
    assert t_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 99])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_quantiles_are_scipys(confidence: float, freedom: int) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_scipys(seed: int) -> None:
    (ours,) = normal(seed, 2 + seed)
    expected = stats.ttest_1samp(ours, 0).confidence_interval(0.9)
    assert interval(ours, 0.9) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_t_tests_are_scipys(seed: int) -> None:
    ours, others, third = normal(seed, 3 + seed, 3 + seed, 5)
    assert compare(ours, others, paired=True).p_t == pytest.approx(stats.ttest_rel(ours, others).pvalue, rel=1e-9)
    expected = stats.ttest_ind(ours, third, equal_var=False).pvalue
    assert compare(ours, third, paired=False).p_t == pytest.approx(expected, rel=1e-9)


def difference(a: Any, b: Any, axis: int = -1) -> Any:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(3, 3), (5, 5), (7, 7)])
def test_exact_tests_are_scipys(seed: int, sizes: tuple[int, int]) -> None:
    ours, others = normal(seed, *sizes)
    for paired, kind in ((True, "samples"), (False, "independent")):
        expected = permuted((ours, others), difference, permutation_type=kind, n_resamples=10**5)
        assert compare(ours, others, paired=paired).p_exact == pytest.approx(expected.pvalue, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- by force


@given(groups(2, 7))
def test_signs_are_counted_by_force(differences: list[float]) -> None:
    found = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    assert sign_flip(differences) == (sum(each >= found - 1e-9 for each in sums) / len(sums), None)


@given(groups(2, 4), groups(2, 4))
@example([0.9062] * 3, [0.9062] * 2)  # whose mean is another number
def test_labels_are_counted_by_force(ours: list[float], others: list[float]) -> None:
    pool, count = ours + others, len(ours)

    def distance(order: tuple[int, ...]) -> float:
        rest = [pool[i] for i in range(len(pool)) if i not in order]
        return abs(sum(pool[i] for i in order) / count - sum(rest) / len(rest))

    found = distance(tuple(range(count)))
    ways = list(itertools.combinations(range(len(pool)), count))
    assert permutation(ours, others)[0] == sum(distance(order) >= found - 1e-9 for order in ways) / len(ways)


@pytest.mark.parametrize(("n", "paired", "p"), [(3, True, 0.25), (5, True, 0.0625), (6, True, 0.03125),
                                                (3, False, 0.1), (4, False, 2 / 70)])  # fmt: skip
def test_groups_that_lie_apart_reach_the_smallest_p(n: int, paired: bool, p: float) -> None:
    found = compare([1 + i / 10 for i in range(n)], [i / 10 for i in range(n)], paired=paired)
    assert found.p_exact == found.smallest == pytest.approx(p)


def test_unequal_groups_reach_theirs() -> None:
    found = compare([5, 6], [0, 1, 2, 1], paired=False)
    assert found.p_exact == found.smallest == pytest.approx(1 / 15)


def test_how_many_seeds_it_takes() -> None:
    assert [needed(0.05, m, paired=True) for m in (1, 2, 5)] == [6, 7, 8]
    assert [needed(0.05, m, paired=False) for m in (1, 2, 5)] == [4, 5, 5]
    assert needed(0.05, 5000, paired=True) is None


# --------------------------------------------------------------------------------------------------------------- laws


@given(groups(), groups())
def test_p_is_a_probability_and_swapping_the_groups_changes_none(ours: list[float], others: list[float]) -> None:
    assert 0 < compare(ours, others, paired=False).p_exact <= 1
    for paired in (False, True) if len(ours) == len(others) else (False,):
        one, other = compare(ours, others, paired=paired), compare(others, ours, paired=paired)
        assert one.p_exact == other.p_exact
        assert one.smallest == other.smallest <= one.p_exact
        assert (one.p_t is None) == (other.p_t is None)
        if one.p_t is not None and other.p_t is not None:
            assert 0 <= one.p_t <= 1
            assert one.p_t == pytest.approx(other.p_t, rel=1e-9)


@given(groups(2, 6), st.floats(0.01, 100), st.floats(-3, 3))
def test_units_make_no_difference(ours: list[float], scale: float, shift: float) -> None:
    others = [0.3, -0.1, 0.7]
    turned = permutation([scale * x + shift for x in ours], [scale * x + shift for x in others])
    assert turned == permutation(ours, others)


@given(st.lists(st.floats(1e-6, 1), max_size=8))
def test_holm_corrects_upwards_and_keeps_the_order(ps: list[float]) -> None:
    corrected = holm(ps)
    for (p, after), (q, other) in itertools.combinations(zip(ps, corrected, strict=True), 2):
        assert (after <= other) if p <= q else (other <= after)
    assert all(p <= after <= min(1.0, len(ps) * p) + 1e-15 for p, after in zip(ps, corrected, strict=True))
    assert not ps or min(corrected) == min(1.0, len(ps) * min(ps))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(groups(2, 6))
def test_more_confidence_is_a_wider_interval_around_the_mean(ours: list[float]) -> None:
    narrow, wide = interval(ours, 0.5), interval(ours, 0.99)
    assert narrow
    assert wide
    assert wide[0] <= narrow[0] <= sum(ours) / len(ours) + 1e-12
    assert sum(narrow) == pytest.approx(2 * sum(ours) / len(ours), abs=1e-9)
    assert narrow[1] <= wide[1]


# ---------------------------------------------------------------------------------------------------------- the edges


def test_numbers_that_do_not_vary_have_no_t() -> None:
    for paired in (True, False):
        same = compare([0.7, 0.7, 0.7], [0.7, 0.7, 0.7], paired=paired)
        assert (same.p_exact, same.p_t) == (1.0, None)
    assert compare([0.8, 0.8], [0.7, 0.7], paired=True).p_t is None
    assert compare([0.8, 0.8], [0.7, 0.7], paired=False).p_t is None
    assert interval([0.7, 0.7], 0.95) == (0.7, 0.7)


def test_ties_count_though_their_last_digits_differ() -> None:
    """0.75 - 0.74 and 0.76 - 0.75 are not the same float."""
    assert sign_flip([0.75 - 0.74, 0.76 - 0.75, 0.73 - 0.74]) == (1.0, None)


def test_too_few_numbers_are_refused_or_have_no_interval() -> None:
    with pytest.raises(ValueError, match="got 1 and 3"):
        compare([1.0], [1.0, 2.0, 3.0], paired=False)
    with pytest.raises(ValueError, match="of one size if paired"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)
    assert interval([0.5], 0.95) is None
    assert interval([0.5, math.nan], 0.95) is None


@pytest.mark.parametrize("paired", [True, False])
def test_many_seeds_are_drawn_from_the_same_every_time(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn and exact agree: with 20,000 draws the standard error is below 0.0036, so 0.018 is five of them."""
    ours, others = normal(3, 10, 10, shift=1.0)
    exact_of = significance.MOST_ARRANGEMENTS
    monkeypatch.setattr(significance, "MOST_ARRANGEMENTS", 10**6)
    exact = compare(ours, others, paired=paired)
    monkeypatch.setattr(significance, "MOST_ARRANGEMENTS", 10)
    drawn = compare(ours, others, paired=paired)
    assert (exact.draws, drawn.draws) == (None, significance.DRAWS)
    assert 0.01 < exact.p_exact < 0.9
    assert drawn.p_exact == pytest.approx(exact.p_exact, abs=0.018)
    assert drawn == compare(ours, others, paired=paired)
    assert drawn.p_exact == compare(others, ours, paired=paired).p_exact
    assert drawn.smallest == 1 / (significance.DRAWS + 1)
    assert exact_of >= math.comb(18, 9)
