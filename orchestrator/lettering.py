"""Where the words of a figure go: beside their marks, and over nothing else as far as there is room. Pure.

All lengths are in points of a printer, y upwards.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, lower, right, upper."""

DIRECTIONS = 16
DISTANCES = (1.0, 3.0, 7.0, 12.0, 18.0, 26.0)
"""Between a mark and its word, the nearest first."""
_COVERED, _LINES = 1e4, 1e2
"""How bad it is to share a square point with other words, with marks or with what is beyond the frame, and with lines;
to be a point away from the mark is 1.
"""


def place(
    marks: Sequence[Point], sizes: Sequence[Point], *, frame: Box, lines: Sequence[Box] = (), radius: float = 3.5
) -> list[Point]:
    """The middle of the word of each of the first marks; the other marks have none. Words are set one after the other,
    each in the best place that is left. `sizes` are widths and heights, `radius` is that of a mark.
    """
    around = [_box(mark, (2 * radius, 2 * radius)) for mark in marks]
    words: list[Box] = []

    def badness(candidate: tuple[Box, float]) -> float:
        box, distance = candidate
        outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
        covered = outside + sum(overlap(box, other) for other in (*words, *around))
        return _COVERED * covered + _LINES * sum(overlap(box, line) for line in lines) + distance

    for mark, size in zip(marks, sizes, strict=False):
        words.append(min(_beside(mark, size, radius), key=badness)[0])
    return [((left + right) / 2, (lower + upper) / 2) for left, lower, right, upper in words]


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    upwards = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, upwards)


def _beside(mark: Point, size: Point, radius: float) -> list[tuple[Box, float]]:
    found = []
    for distance in DISTANCES:
        for direction in range(DIRECTIONS):
            angle = math.tau * (direction + 2) / DIRECTIONS  # the first is to the upper right
            right, up = math.cos(angle), math.sin(angle)
            middle = (
                mark[0] + right * (radius + distance) + math.copysign(min(1.0, abs(2 * right)), right) * size[0] / 2,
                mark[1] + up * (radius + distance) + math.copysign(min(1.0, abs(2 * up)), up) * size[1] / 2,
            )
            found.append((_box(middle, size), distance))
    return found


def _box(middle: Point, size: Point) -> Box:
    return (middle[0] - size[0] / 2, middle[1] - size[1] / 2, middle[0] + size[0] / 2, middle[1] + size[1] / 2)
