"""Words beside marks: on their marks' side, and over nothing else while there is room."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.lettering import DISTANCES, Box, Point, overlap, place

FRAME = (0.0, 0.0, 300.0, 200.0)
SIZE = (9.0, 6.0)
PLACES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6)).map(lambda at: (30.0 * at[0], 30.0 * at[1])),
    min_size=1, max_size=12, unique=True,
)  # fmt: skip
"""On a grid that leaves room for a word beside each."""


def box(middle: Point, size: Point = SIZE) -> Box:
    return (middle[0] - size[0] / 2, middle[1] - size[1] / 2, middle[0] + size[0] / 2, middle[1] + size[1] / 2)


@given(PLACES, st.integers(0, 30))
def test_words_cover_no_mark_no_other_word_and_stay_inside_where_there_is_room(marks: list[Point], named: int) -> None:
    middles = place(marks, [SIZE] * min(named, len(marks)), frame=FRAME)
    assert len(middles) == min(named, len(marks))
    words = [box(middle) for middle in middles]
    assert all(overlap(one, other) == 0 for one, other in itertools.combinations(words, 2))
    assert all(overlap(word, box(mark, (7, 7))) == 0 for word in words for mark in marks)
    assert all(overlap(word, FRAME) >= SIZE[0] * SIZE[1] - 1e-9 for word in words)


@given(PLACES)
def test_each_word_is_near_its_own_mark(marks: list[Point]) -> None:
    far = 3.5 + max(DISTANCES) + math.hypot(*SIZE) / 2
    for mark, middle in zip(marks, place(marks, [SIZE] * len(marks), frame=FRAME), strict=True):
        assert math.dist(mark, middle) <= far + 1e-9


def test_a_crowd_of_marks_has_its_words_around_it() -> None:
    marks = [(150.0 + i, 100.0 + i % 2) for i in range(6)]
    words = [box(middle) for middle in place(marks, [SIZE] * 6, frame=FRAME)]
    assert all(overlap(one, other) == 0 for one, other in itertools.combinations(words, 2))
    assert all(overlap(word, box(mark, (7, 7))) == 0 for word in words for mark in marks)


def test_a_word_makes_way_for_a_line() -> None:
    line = (100.0, 50.0, 101.0, 150.0)
    ((across, up),) = place([(100.5, 100.0)], [SIZE], frame=FRAME, lines=[line])
    assert overlap(box((across, up)), line) == 0
