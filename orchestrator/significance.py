"""Whether two groups of numbers differ by more than chance: intervals, exact tests, Holm's correction. Pure.

Few seeds are the rule here, so what decides is exact and assumes no distribution: how many of the arrangements that
would be as likely if there were no difference show one at least as large. Such a p has a floor, 0.25 for three pairs,
and `Comparison.smallest` tells it. The t-tests beside it assume normal values and have none. All tests are two-sided.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

MOST_ARRANGEMENTS = 1 << 16
"""As many are gone through one by one; of more, `DRAWS` are drawn."""
DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One group against another."""

    paired: bool
    counts: tuple[int, int]
    """Numbers in the one and in the other."""
    p_exact: float
    """Of the signs of the paired differences, or of the labels."""
    draws: int | None
    """How many arrangements `p_exact` counts, where they were drawn; None where all were gone through."""
    smallest: float
    """What `p_exact` is at least, whatever the numbers."""
    p_t: float | None
    """Of the paired t-test, or of Welch's; None where neither group varies."""
    p_holm: float | None = None
    """`p_exact` after Holm's correction over the family of comparisons."""
    p_t_holm: float | None = None


def compare(ours: Sequence[float], others: Sequence[float], *, paired: bool) -> Comparison:
    """Two groups of at least two finite numbers each; `paired`: the i-th of one belongs to the i-th of the other."""
    if min(len(ours), len(others)) < 2 or (paired and len(ours) != len(others)):
        raise ValueError(f"needs two groups of two and more, of one size if paired; got {len(ours)} and {len(others)}")
    counts = (len(ours), len(others))
    if paired:
        differences = [a - b for a, b in zip(ours, others, strict=True)]
        p, draws = sign_flip(differences)
        return Comparison(True, counts, p, draws, smallest_paired(len(ours)), paired_t(differences))
    p, draws = permutation(ours, others)
    return Comparison(False, counts, p, draws, smallest_unpaired(*counts), welch(ours, others))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm (1979): the smallest of m p-values times m, the next times m - 1, and none below a smaller one's."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected = [0.0] * len(ps)
    floor = 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = floor
    return corrected


# --------------------------------------------------------------------------------------------------------- exact tests


def sign_flip(differences: Sequence[float]) -> tuple[float, int | None]:
    """The p of the mean of paired differences, whose signs are as likely either way where nothing differs; the draws.

    Exact up to 17 pairs. The arrangement that was found counts as one, so p is never 0.
    """
    sizes = [abs(each) for each in differences]
    found = _floor(abs(math.fsum(differences)), math.fsum(sizes))
    if 2 ** (len(sizes) - 1) <= MOST_ARRANGEMENTS:  # the first sign stays: turning all of them changes nothing
        signs: Iterator[tuple[int, ...]] = itertools.product((1, -1), repeat=len(sizes) - 1)
        sums = (abs(sizes[0] + sum(map(operator.mul, sign, sizes[1:]))) for sign in signs)
        return sum(each >= found for each in sums) / 2 ** (len(sizes) - 1), None
    chance = _chance()
    drawn = (chance.getrandbits(len(sizes)) for _ in range(DRAWS))
    extreme = sum(abs(sum(-d if bits >> i & 1 else d for i, d in enumerate(sizes))) >= found for bits in drawn)
    return (extreme + 1) / (DRAWS + 1), DRAWS


def permutation(ours: Sequence[float], others: Sequence[float]) -> tuple[float, int | None]:
    """The p of a difference of two means, where any of the numbers could as well be the other group's; the draws.

    Exact up to 65,536 ways to deal them, such as 9 against 9.
    """
    few = min(len(ours), len(others))
    centre = math.fsum((*ours, *others)) / (len(ours) + len(others))
    pool = sorted(each - centre for each in (*ours, *others))  # sorted: which group is named first makes no difference
    # By the numbers themselves, not by their distances from the centre: where all are equal, these are rounding alone.
    found = _floor(abs(math.fsum(each - centre for each in ours)), math.fsum(map(abs, (*ours, *others))))
    ways = math.comb(len(pool), few)
    if ways <= MOST_ARRANGEMENTS:
        return sum(abs(sum(dealt)) >= found for dealt in itertools.combinations(pool, few)) / ways, None
    chance = _chance()
    extreme = sum(abs(sum(chance.sample(pool, few))) >= found for _ in range(DRAWS))
    return (extreme + 1) / (DRAWS + 1), DRAWS


def smallest_paired(pairs: int) -> float:
    """What the p of so many pairs is at least: all signs the same, one way or the other."""
    return _least(2 ** (pairs - 1))


def smallest_unpaired(ours: int, others: int) -> float:
    """What the p of two such groups is at least. Groups of one size can change places, and show the same difference."""
    ways = math.comb(ours + others, ours)
    return _least(ways // 2 if ours == others else ways)


def needed(level: float, family: int, *, paired: bool) -> int | None:
    """How many pairs, or numbers in each group, can come below a level after Holm's correction over a family; None
    where as many would be drawn from, whose p has a floor of its own.
    """
    counts = range(2, 32)
    return next(
        (n for n in counts if family * (smallest_paired(n) if paired else smallest_unpaired(n, n)) <= level), None
    )


def _least(arrangements: int) -> float:
    return 1 / arrangements if arrangements <= MOST_ARRANGEMENTS else 1 / (DRAWS + 1)


def _floor(found: float, scale: float) -> float:
    """What counts as large as the one found: sums of the same numbers in another order differ in their last digits."""
    return found - 1e-12 * scale


def _chance() -> "Random":
    import random  # only many seeds pay for it

    return random.Random(0)


# ------------------------------------------------------------------------------------------------------------- t-tests


def interval(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Where the mean of all seeds there could be lies with this confidence, by Student's t; None for fewer than two."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean, variance = _moments(values)
    reach = t_quantile(confidence, len(values) - 1) * math.sqrt(variance / len(values))
    return mean - reach, mean + reach


def paired_t(differences: Sequence[float]) -> float | None:
    mean, variance = _moments(differences)
    spread = math.sqrt(variance / len(differences))
    return t_tails(mean / spread, len(differences) - 1) if spread > 1e-12 * abs(mean) else None


def welch(ours: Sequence[float], others: Sequence[float]) -> float | None:
    """Welch's t-test: groups of different spread and size."""
    (mean, variance), (other_mean, other_variance) = _moments(ours), _moments(others)
    one, other = variance / len(ours), other_variance / len(others)
    if math.sqrt(one + other) <= 1e-12 * max(abs(mean), abs(other_mean)):
        return None
    total = one + other
    freedom = 1 / ((one / total) ** 2 / (len(ours) - 1) + (other / total) ** 2 / (len(others) - 1))
    return t_tails((mean - other_mean) / math.sqrt(total), freedom)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and variance with n - 1 in the denominator."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((each - mean) ** 2 for each in values) / (len(values) - 1)


def t_tails(t: float, freedom: float) -> float:
    """How likely Student's t is at least so far from 0."""
    return _beta(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


@lru_cache(maxsize=256)
def t_quantile(confidence: float, freedom: float) -> float:
    """How far from 0 Student's t is with a probability of 1 - confidence."""
    low, high = 0.0, 1.0
    while t_tails(high, freedom) > 1 - confidence:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_tails(middle, freedom) > 1 - confidence else (low, middle)
    return high


def _beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function at x = 1 - rest, by its continued fraction (Abramowitz and Stegun,
    26.5.8, evaluated as Lentz does). `rest` is given, since 1 - x has lost the digits of a small one.
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(b, a, rest, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction
