"""How lines of text are laid out: numbers for people, columns, sections with their headings, bars. Knows no sweeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, overload

from rich.text import Text

# Colours are the terminal's own sixteen, so that its light or dark theme holds. No colour is ever the only signal.
DONE, BUSY, BAD, WARN, FAINT, STRONG = "green", "cyan", "red", "yellow", "dim", "bold"


# --------------------------------------------------------------------------------------------- numbers for people


def duration(seconds: float) -> str:
    """`42 s`, `3 m 05 s`, `2 h 14 m`, `3 d 04 h`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    if hours:
        return f"{hours} h {minute:02d} m"
    return f"{minutes} m {second:02d} s" if minutes else f"{second} s"


def percent(fraction: float | None, digits: int = 1) -> str:
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f} %"


def clock(moment: datetime, now: datetime) -> str:
    """`14:02:11`, or `20 Nov` if that was another day, in the time zone of `now`."""
    local = moment.astimezone(now.tzinfo)
    return f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%d %b}"


def room(count: float) -> str:
    """Bytes: `512 B`, `4.7 kB`, `310 MB`, `1.2 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.2g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def number(value: float) -> str:
    """Three digits that count: `0.0214`, `3.2`, `412`, `12,000`."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def spanned(span: Mapping[str, float | None], text: str) -> str:
    """A number with its band: `3.2 h ± 20 %`. `span` has its mean, low and high, of which the latter may be unknown."""
    mean, low, high = (span[name] for name in ("mean", "low", "high"))
    if not mean or low is None or high is None:
        return text
    within = 100 * max(mean - low, high - mean) / mean
    return f"{text} ± {within:.0f} %" if within < 0.05 or within >= 10 else f"{text} ± {within:.2g} %"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of some numbers, between their own lowest and highest, in at most `width` characters."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    means = _means(values, min(width, len(values)))
    low, high = min(means), max(means)
    if high == low:
        return "▄" * len(means)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """The course of some numbers as columns of blocks, `height` lines high, between their own lowest and highest."""
    values = [value for value in values if math.isfinite(value)]
    if not values or height < 1:
        return []
    means = _means(values, min(width, len(values)))
    low, high = min(means), max(means)
    eighths = [
        1 + round((8 * height - 1) * (mean - low) / (high - low)) if high > low else 4 * height for mean in means
    ]
    rows = [[max(0, min(8, each - 8 * line)) for each in eighths] for line in reversed(range(height))]
    return ["".join(" ▁▂▃▄▅▆▇█"[each] for each in row) for row in rows]


def _means(values: Sequence[float], length: int) -> list[float]:
    """Means of as many stretches of equal length."""
    edges = [i * len(values) // length for i in range(length + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


# --------------------------------------------------------------------------------------------- lines and sections


class Lazy(Sequence[Sequence["str | Text"]]):
    """Lines that are made when they are shown: of ten thousand, fifty are."""

    def __init__(self, count: int, make: Callable[[int], Sequence[str | Text]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Sequence[str | Text]: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Sequence[str | Text]]: ...

    def __getitem__(self, at: int | slice) -> Sequence[str | Text] | Sequence[Sequence[str | Text]]:
        if isinstance(at, slice):
            return [self._make(i) for i in range(*at.indices(self._count))]
        return self._make(range(self._count)[at])


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    """In characters. 0 takes what the other columns leave."""
    align: Literal["left", "right"] = "left"
    spare: int = 0
    """Where the width is short, columns are left out in this order; 0 stays."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with the titles of its columns, and lines under it."""

    title: str
    style: str
    columns: tuple[Column, ...]
    lines: Sequence[Sequence[str | Text]]
    least: int = 1
    """So many lines are worth showing before any other section grows."""
    most: int | None = None
    """More than so many are not asked for."""
    marked: int | None = None
    """The line that somebody has chosen: it is always among those shown."""
    lists: bool = True
    """Whether each line is a thing of its own: then the heading counts them, and the one that is marked is shown so."""

    @property
    def wants(self) -> int:
        return len(self.lines) if self.most is None else min(self.most, len(self.lines))

    def draw(self, width: int, height: int) -> list[Text]:
        """At most `height` lines, heading included."""
        room, count = height - 1, len(self.lines)
        start = 0 if self.marked is None else max(0, min(self.marked - room // 2, count - room))
        shown = self.lines[start : start + room]
        if not shown:
            return []
        counted = f"{count:,}" if len(shown) == count else f"{len(shown)} of {count:,}"
        head = fields(width, self.columns, [column.title for column in self.columns])
        rule = _rule(f"{self.title} {counted}" if self.lists else self.title, head.plain.ljust(width), self.style)
        drawn = [fields(width, self.columns, line) for line in shown]
        if self.marked is not None and start <= self.marked < start + len(drawn):
            line = drawn[self.marked - start]
            line.truncate(width, pad=True)
            line.stylize("reverse" if self.lists else "")
        return [rule, *drawn]


def fitted(width: int, columns: Sequence[Column], least: int) -> list[int]:
    """The columns to show: those that may be left out go, in the order of their rank, until the open one has `least`
    characters.
    """
    shown = list(range(len(columns)))
    for _, i in sorted((column.spare, i) for i, column in enumerate(columns) if column.spare):
        if width - sum(columns[j].width for j in shown) - 2 * (len(shown) - 1) >= least:
            break
        shown.remove(i)
    return shown


def fields(width: int, columns: Sequence[Column], contents: Sequence[str | Text]) -> Text:
    """One line of columns, two spaces apart, exactly as wide as asked."""
    rest = width - sum(column.width for column in columns) - 2 * (len(columns) - 1)
    line = Text()
    for i, (column, content) in enumerate(zip(columns, contents, strict=True)):
        text = content.copy() if isinstance(content, Text) else Text(content)
        text.truncate(column.width or max(1, rest), overflow="ellipsis")
        text.align(column.align, column.width or max(1, rest))
        line.append("  " if i else "").append_text(text)
    line.truncate(width)
    return line


def _rule(title: str, columns: str, style: str) -> Text:
    """`Running 4 ──────── epoch ── top-1`: a title on a rule, and the columns' titles above their columns."""
    drawn = list(columns)
    for i, character in enumerate(columns):
        near = columns[max(0, i - 1) : i + 2]
        if character == " " and (not near.strip() or i == len(columns) - 1):
            drawn[i] = "─"
    start = len(title)
    return Text(title, style=style).append(" " + "".join(drawn)[start + 1 :], style=f"not bold default {FAINT}")


def ends(left: Text, right: Text, width: int) -> Text:
    """`left` at the left and `right` at the right; where both do not fit, `right` is left out."""
    gap = width - left.cell_len - right.cell_len
    line = left.copy()
    if gap >= 2:
        line.append(" " * gap).append_text(right)
    line.truncate(width, overflow="ellipsis")
    return line


def bar(shares: Sequence[tuple[float, str, str]], width: int) -> Text:
    """Shares of a whole as stretches of a bar: (share, character, style). A share above zero is seen."""
    total = sum(share for share, _, _ in shares)
    line, passed = Text(), 0.0
    for share, character, style in shares:
        passed += share
        until = round(width * passed / total) if total else width
        line.append(character * max(until - len(line), 1 if share > 1e-9 else 0), style=style)
    line.truncate(width)
    return line


def stack(sections: Sequence[Section], width: int, height: int) -> list[Text]:
    """Sections one above another: each gets its least first, in order; then each what it wants, in order."""
    present = [section for section in sections if section.lines]
    lent = [0] * len(present)
    left = height
    for cap in (lambda section: section.least, lambda section: 10**9):
        for i, section in enumerate(present):
            more = min(1 + min(cap(section), section.wants) - lent[i], left)
            if lent[i] + more >= 2:
                lent[i] += more
                left -= more
    return [line for section, lines in zip(present, lent, strict=True) for line in section.draw(width, lines)]


def beside(left: Sequence[Text], right: Sequence[Text], half: int) -> list[Text]:
    """Two stacks side by side, the left one `half` characters wide."""
    lines = []
    for i in range(max(len(left), len(right))):
        line = left[i].copy() if i < len(left) else Text()
        line.truncate(half, pad=True)
        lines.append(line.append("   ").append_text(right[i]) if i < len(right) else line)
    return lines


def joined(lines: Sequence[Text], width: int | None = None) -> Text:
    """Lines with a margin of one character and nothing at their ends, cut at `width`."""
    margined = [Text(" ").append_text(line) for line in lines]
    for line in margined:
        line.rstrip()
        if width is not None:
            line.truncate(width)
    return Text("\n", no_wrap=True, overflow="crop", end="").join(margined)
