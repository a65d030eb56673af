"""A table of results and the forms it is written in: terminal, Markdown, LaTeX, CSV, JSON. Computed elsewhere."""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mixmo_core.metrics import BY_NAME
from orchestrator.errors import UsageError
from orchestrator.rows import CONFIG_COLUMNS
from orchestrator.significance import Comparison, holm, interval, needed

At = Literal["last", "best"] | int
"""The last epoch, the best one of each trial, or the one of this number."""
Key = tuple[Any, ...]
Part = Literal["value", "interval", "difference", "p", "p_t", "published"]
PARTS: tuple[Part, ...] = get_args(Part)[1:]
"""What may stand beside a value."""

QUICK = "quick form, not comparable"
"""Heads what is shown of a sweep that was run with --quick."""
WIDTH = 100
"""Columns of a terminal. Where a table is wider, the parts that a reader misses least are left out, in this order."""
_SPARED: tuple[Part, ...] = ("p_t", "p", "interval")


@dataclass(frozen=True, slots=True)
class Reported:
    """A number from a paper."""

    name: str
    value: float
    source: str
    same: bool = False
    """Whether every setting of the cell beside it is known to be the paper's."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The trials of one row and one column."""

    values: tuple[float, ...] = ()
    """The metric of each finished trial, in order of seed."""
    waiting: int = 0
    """Trials that wait or run."""
    failed: int = 0
    """Trials that failed, were cancelled, or were stopped early."""
    undefined: int = 0
    """Finished trials that the metric is not defined for, as ratio_error for a single subnetwork."""
    baseline: bool = False
    difference: float | None = None
    """Mean minus the baseline's mean."""
    difference_se: float | None = None
    """Standard error of the difference, from both spreads."""
    seeds: tuple[int | None, ...] = ()
    """Of each value; None for an ensemble's."""
    trials: tuple[str, ...] = ()
    """The id of each value's trial; those of an ensemble joined by `+`."""
    comparison: Comparison | None = None
    """With the baseline, where that can be tested."""
    untested: str = ""
    """Why it cannot."""
    published: Reported | None = None

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def planned(self) -> int:
        return self.n + self.waiting + self.failed + self.undefined

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / self.n if self.values else None

    @property
    def std(self) -> float | None:
        """With n - 1 in the denominator: of the seeds there could be, not of those there are."""
        if self.n < 2:
            return None
        mean = math.fsum(self.values) / self.n
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (self.n - 1))

    def numbers(self, confidence: float) -> dict[str, Any]:
        """All there is to say of it, by column of the CSV."""
        low, high = interval(self.values, confidence) or (None, None)
        found, told = self.comparison, self.published
        gap = self.mean - told.value if told and told.same and self.mean is not None else None
        plain = (
            "n",
            "planned",
            "waiting",
            "failed",
            "undefined",
            "mean",
            "std",
            "difference",
            "difference_se",
            "values",
        )
        tested = ("paired", "p_exact", "draws", "p_t", "p_holm", "p_t_holm", "smallest")
        return {
            **{name: getattr(self, name) for name in plain},
            "seeds": self.seeds, "confidence": confidence, "ci_low": low, "ci_high": high,
            **{name: getattr(found, name) if found else None for name in tested},
            "published": told.value if told else None, "published_source": told.source if told else None,
            "published_difference": gap,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResultTable:
    metric: str
    at: At
    row_fields: tuple[str, ...]
    col_fields: tuple[str, ...]
    row_keys: tuple[Key, ...]
    """Values of the row fields, one tuple for each line."""
    col_keys: tuple[Key, ...]
    cells: Mapping[tuple[Key, Key], Cell]
    averaged: tuple[str, ...] = ()
    """Settings that vary inside a cell besides the seed: its mean runs over them too."""
    counted: str = "trials"
    """What a cell's number counts."""
    published: tuple[Reported, ...] = ()
    """What papers report of this metric; some of it stands in a cell."""
    confidence: float = 0.95
    """Of the intervals; what is left to 1 is the level of the tests."""
    splits: tuple[str, ...] = ()
    """The images that the trials were measured on: `test`, `validation`."""
    sweeps: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    """Of the code that trained them; `+` where it had changes."""
    stopped: int = 0
    """Trials that a scheduler stopped early."""
    populated: int = 0
    """Trials of populations (`scheduler.method: pbt`)."""
    with_stopped: bool = False
    """Whether they count, with what they had reached."""

    @property
    def heading(self) -> str:
        """What stands above every form of it; empty where there is nothing to warn of."""
        told = (heading(self.sweeps), self._told_of_stopped(), self._told_of_populations())
        return "; ".join(filter(None, told))

    def _told_of_populations(self) -> str:
        if not self.populated:
            return ""
        return "populations: settings are those that trials began with, and trials are partly copies of one another"

    def _told_of_stopped(self) -> str:
        if not self.stopped:
            return ""
        trials = f"{self.stopped:,} trial{'' if self.stopped == 1 else 's'}"
        if self.with_stopped:
            return f"{trials} that a scheduler stopped early included, as they were when they stopped"
        return f"without {trials} that a scheduler stopped early"

    # ---------------------------------------------------------------------------------------------------------- forms

    def to_markdown(self, parts: Sequence[str] = ()) -> str:
        """A pipe table: each value with these parts, or with all that there are. Fractions are shown in percent, as
        mean ± standard deviation.
        """
        chosen = self._chosen(parts) or self._available()
        header, body = self.text_cells(chosen)
        lines = [header, ["---"] * len(self.row_fields) + ["---:"] * (len(header) - len(self.row_fields)), *body]
        head = f"**{self.heading}**\n\n" if self.heading else ""
        text = "".join("| " + " | ".join(each.replace("|", r"\|") for each in line) + " |\n" for line in lines)
        return head + text + "".join(f"\n{note}\n" for note in (*self._key_to_tests(chosen), *self.notes()))

    def to_text(self, width: int = WIDTH, parts: Sequence[str] = ()) -> str:
        """For a terminal: columns in line, no colours. Where all of it is too wide, the tests are left out, and then
        the interval, unless the parts are named.
        """
        chosen = self._chosen(parts) or self._fitting(width)
        header, body = self.text_cells(chosen)
        widths = _widths(header, body)
        rule = ["─" * width for width in widths]
        settings = len(self.row_fields)
        lines = [
            "  ".join(
                each.ljust(width) if i < settings else each.rjust(width)
                for i, (each, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, rule, *body)
        ]
        told = [*self.legend(chosen), *self.notes(), *([] if parts else self._spared(chosen))]
        lines = [self.heading, "", *lines] if self.heading else lines
        return "".join(f"{line}\n" for line in (*lines, *(part for each in told for part in _wrapped(each, width))))

    def to_latex(self, command: str = "", parts: Sequence[str] = ()) -> str:
        """A tabular of booktabs, the best of each column in bold, set smaller where it is wider than the line; its
        legend follows it. Significance is a dagger. Unless the parts are named, interval and difference stand beside a
        single column of values and are left out beside several. `command` is what made it.
        """
        usual = ("value", "published", *(("interval", "difference") if len(self.col_keys) == 1 else ()))
        chosen = self._chosen(parts) or tuple(part for part in self._available() if part in usual)
        source = f"sweep {', '.join(self.sweeps)}; commit {', '.join(self.commits) or 'not known'}"
        origin = " ".join("; ".join(filter(None, (source, command))).split())
        header = [*map(short, self.row_fields), *self._titles(chosen)]
        body = [[*(_escaped(shown(value)) for value in row), *self._latex_line(row, chosen)] for row in self.row_keys]
        caption = [rf"\noindent\textbf{{{_escaped(self.heading)}}}\par\smallskip"] if self.heading else []
        lines = [
            *([f"% {self.heading}"] if self.heading else []), f"% {origin}", r"% \usepackage{booktabs,graphicx}",
            *caption, r"\noindent\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(self.row_fields)}{'r' * (len(header) - len(self.row_fields))}}}",
            r"\toprule", _latex_row(map(_escaped, header)), r"\midrule", *map(_latex_row, body), r"\bottomrule",
            r"\end{tabular}}",
        ]  # fmt: skip
        tested = [each for each in self._key_to_tests(chosen) if not each.startswith("*")]
        told = [_escaped(each) for each in (*self._key_to_values(chosen), *tested, *self.notes()) if each]
        told += self._latex_key()
        if told:
            lines += [r"\par\smallskip", r"{\footnotesize\raggedright", *(rf"{each}\par" for each in told), "}"]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """One line per cell, numbers plain: accuracies as fractions."""
        records = self.records()
        out = io.StringIO()
        names = [*self.row_fields, *self.col_fields, *Cell().numbers(self.confidence), "form"]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: _words(value) for name, value in each.items()} | {"form": heading(self.sweeps)} for each in records
        )
        return out.getvalue()

    def to_json(self) -> str:
        """One object per cell under `cells`, numbers plain; what is not a number is null."""
        document = {
            "schema": "mixmo.table/1",
            "heading": self.heading or None,
            "metric": self.metric,
            "unit": BY_NAME[self.metric].unit,
            "at": self.at,
            "row_fields": self.row_fields,
            "col_fields": self.col_fields,
            "averaged": self.averaged,
            "published": [{"name": each.name, "value": each.value, "source": each.source} for each in self.published],
            "cells": [{name: _finite(value) for name, value in each.items()} for each in self.records()],
            "confidence": self.confidence,
            "splits": self.splits,
            "sweeps": self.sweeps,
            "commits": self.commits,
            "notes": self.notes(),
        }
        return json.dumps(document, indent=1, allow_nan=False)

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per cell that has trials: its fields, then its numbers."""
        return [
            dict(zip(self.row_fields + self.col_fields, row + col, strict=True)) | cell.numbers(self.confidence)
            for row in self.row_keys
            for col in self.col_keys
            if (cell := self.cells.get((row, col)))
        ]

    # ---------------------------------------------------------------------------------------------------------- parts

    def text_cells(self, parts: Sequence[Part] | None = None) -> tuple[list[str], list[list[str]]]:
        """What stands in a header and in each line, as text; all there is to say of a cell, or these parts of it."""
        chosen = self._available() if parts is None else parts
        header = [*map(short, self.row_fields), *self._titles(chosen)]
        body = [
            [
                *map(shown, row),
                *(self.part_text(self._cell(row, col), part) for col, part in self._columns(chosen)),
            ]
            for row in self.row_keys
        ]
        return header, body

    def part_text(self, cell: Cell, part: Part) -> str:
        """What a terminal and Markdown say of it."""
        if part == "value":
            return self.value_text(cell)
        if part == "interval":
            return self._interval_text(cell)
        if part == "difference":
            return self.difference_text(cell) + (" *" if self.significant(cell) else "")
        if part == "published":
            return self._published_text(cell)
        found = cell.comparison
        p = None if found is None else found.p_holm if part == "p" else found.p_t_holm
        return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"

    def _cell(self, row: Key, col: Key) -> Cell:
        return self.cells.get((row, col), Cell())

    def _available(self) -> tuple[Part, ...]:
        cells = self.cells.values()
        there: dict[Part, bool] = {
            "value": True,
            "interval": any(interval(cell.values, self.confidence) for cell in cells),
            "difference": any(cell.difference is not None for cell in cells),
            "p": any(cell.comparison for cell in cells),
            "p_t": any(cell.comparison and cell.comparison.p_t is not None for cell in cells),
            "published": any(cell.published for cell in cells),
        }
        return tuple(part for part, is_there in there.items() if is_there)

    def _chosen(self, parts: Sequence[str]) -> tuple[Part, ...]:
        """The value and those of the parts that there are; empty where none was asked for. Raises UsageError for what
        is no part.
        """
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise UsageError(f"no part {unknown[0]} of a table; there are {', '.join(PARTS)}")
        return tuple(part for part in self._available() if part in ("value", *parts)) if parts else ()

    def _fitting(self, width: int) -> tuple[Part, ...]:
        parts = self._available()
        for spared in _SPARED:
            widths = _widths(*self.text_cells(parts))
            if sum(widths) + 2 * (len(widths) - 1) <= width:
                break
            parts = tuple(part for part in parts if part != spared)
        return parts

    def _columns(self, parts: Sequence[Part]) -> list[tuple[Key, Part]]:
        """The columns of numbers; no empty ones of published numbers, which often stand under one setting alone."""
        told = {col for (_, col), cell in self.cells.items() if cell.published}
        return [(col, part) for col in self.col_keys for part in parts if part != "published" or col in told]

    def _titles(self, parts: Sequence[Part]) -> list[str]:
        names = {"interval": f"{self._confident} interval", "difference": "vs baseline", "p": "p", "p_t": "p (t)",
                 "published": "published"}  # fmt: skip
        titles = []
        for col, part in self._columns(parts):
            title = ", ".join(f"{short(k)} {shown(v)}" for k, v in zip(self.col_fields, col, strict=True))
            titles.append(names.get(part, title or self.title))
        return titles

    @property
    def title(self) -> str:
        when = {"best": "best ", "last": ""}.get(str(self.at), f"epoch {self.at} ")
        return f"{when}{self.metric}{' %' if self._percent else ''}"

    @property
    def level(self) -> float:
        """A difference is called significant where chance would show it less often."""
        return round(1 - self.confidence, 12)

    @property
    def _confident(self) -> str:
        return f"{100 * self.confidence:g} %"

    @property
    def _percent(self) -> bool:
        return BY_NAME[self.metric].unit == "fraction"

    def significant(self, cell: Cell) -> bool:
        """By the exact test, after Holm's correction over the table."""
        found = cell.comparison
        return found is not None and found.p_holm is not None and found.p_holm <= self.level

    def value_text(self, cell: Cell) -> str:
        """`93.97 ± 0.12 (3)`; `(2/3)` where trials are missing, `-` where there is nothing to wait for."""
        if cell.mean is None:
            return f"{'...' if cell.waiting else '-'} {_count(cell)}".rstrip()
        return f"{self._with_spread(cell.mean, cell.std)} {_count(cell)}"

    def difference_text(self, cell: Cell) -> str:
        if cell.baseline:
            return "baseline"
        if cell.difference is None:
            return "-"
        sign = "+" if cell.difference >= 0 else "-"
        return sign + self._with_spread(abs(cell.difference), cell.difference_se)

    def _interval_text(self, cell: Cell) -> str:
        found = interval(cell.values, self.confidence)
        if found is None:
            return "-"
        low, high = (self._digits(bound, (found[1] - found[0]) / 2)[0] for bound in found)
        return f"{low} to {high}"

    def _published_text(self, cell: Cell) -> str:
        told = cell.published
        if told is None:
            return "-"
        text = self._with_spread(told.value, None)
        if not told.same or cell.mean is None:
            return text
        gap = cell.mean - told.value
        return f"{text} ({'+' if gap >= 0 else '-'}{self._with_spread(abs(gap), None)})"

    def _with_spread(self, value: float, spread: float | None) -> str:
        number, around = self._digits(value, spread)
        return number if around is None else f"{number} ± {around}"

    def _digits(self, value: float, spread: float | None) -> tuple[str, str | None]:
        """Both to the same digits: two of a percentage; else two significant ones of the spread, at most six."""
        if self._percent:
            value, digits, spread = 100 * value, 2, None if spread is None else 100 * spread
        elif spread is None or not math.isfinite(spread) or spread <= 0:
            return f"{value:.4g}", None if spread is None else f"{spread:.4g}"
        else:
            digits = min(6, max(0, 1 - math.floor(math.log10(spread))))
        return f"{value:.{digits}f}", None if spread is None else f"{spread:.{digits}f}"

    # ---------------------------------------------------------------------------------------------------------- words

    def legend(self, parts: Sequence[Part] | None = None) -> list[str]:
        """What the parts of a number mean."""
        chosen = self._available() if parts is None else parts
        legend = [*self._key_to_values(chosen), *self._key_to_tests(chosen)]
        return ["", *legend] if legend else []

    def _key_to_values(self, parts: Sequence[Part]) -> list[str]:
        legend = []
        if any(cell.n for cell in self.cells.values()):
            legend.append(f"{self.title}: mean ± standard deviation (number of {self.counted})")
        if "interval" in parts:
            legend.append(f"{self._confident} interval: of the mean, by Student's t")
        if "difference" in parts:
            unit = " in points" if self._percent else ""
            legend.append(f"vs baseline: difference of the means{unit} ± its standard error")
        return legend

    def _tests(self) -> list[Comparison]:
        return [cell.comparison for cell in self.cells.values() if cell.comparison]

    def _key_to_tests(self, parts: Sequence[Part]) -> list[str]:
        tests = self._tests()
        if not tests:
            return []
        over = f"Holm's correction over {len(tests)} comparison{'s' if len(tests) > 1 else ''}"
        paired = {each.paired for each in tests}
        exact = _either(paired, "signs of the differences, paired by seed", "group labels")
        drawn = max((each.draws or 0 for each in tests), default=0)
        some = f"; of more than 65,536 arrangements, {drawn:,} are drawn with a fixed seed" if drawn else ""
        lines = []
        if "p" in parts:
            lines.append(f"p: two-sided, from exact permutation of the {exact}, after {over}{some}")
        if "p_t" in parts:
            lines.append(f"p (t): the same of the {_either(paired, 'paired t-test', 'Welch t-test')}")
        if any(map(self.significant, self.cells.values())):
            lines.append(f"*: significant at {100 * self.level:g} % by the exact test, after {over}")
        return lines

    def _spared(self, parts: Sequence[Part]) -> list[str]:
        names = {"interval": "the interval", "p": "p", "p_t": "p (t)"}
        lacking = [name for part, name in names.items() if part in self._available() and part not in parts]
        return [f"Left out for want of room: {', '.join(lacking)}; --format markdown has all."] if lacking else []

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers right."""
        notes = [*self._notes_on_open(), *self._notes_on_epoch(), *self._notes_on_published(), *self._notes_on_tests()]
        if self.averaged:
            notes.append(f"Averaged over {', '.join(map(short, self.averaged))} too: --rows or --cols sets them apart.")
        if any(cell.n + cell.undefined != cell.planned for cell in self.cells.values()):
            what = f"reached epoch {self.at}" if isinstance(self.at, int) else "finished"
            notes.append(f"(2/3): two of three trials {what}; the others {self._others()}.")
        if any(cell.undefined for cell in self.cells.values()):
            named = self._named(key for key, cell in self.cells.items() if cell.undefined)
            notes.append(f"{self.metric} is not defined for finished trials of: {named}.")
        if any(cell.baseline and cell.undefined and not cell.n for cell in self.cells.values()):
            notes.append(f"The baseline has no {self.metric} to compare with.")
        return notes

    def _named(self, keys: Iterable[tuple[Key, Key]]) -> str:
        named = [*dict.fromkeys(", ".join(map(shown, row + col)) or "these trials" for row, col in keys)]
        return "; ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")

    def _others(self) -> str:
        """What may have become of the trials that a cell lacks."""
        told = []
        if any(cell.waiting for cell in self.cells.values()):
            told += ["run", "wait"]
        if any(cell.failed for cell in self.cells.values()):
            told += ["failed", "were cancelled"]
            if isinstance(self.at, int) or (self.stopped and not self.with_stopped):
                told.append("were stopped early")
        return f"{', '.join(told[:-1])} or {told[-1]}"

    def _notes_on_open(self) -> list[str]:
        waiting = sum(cell.waiting for cell in self.cells.values())
        if not waiting:
            return []
        them = "trial runs or waits" if waiting == 1 else "trials run or wait"
        return [f"Not finished: {waiting:,} {them}. The numbers are those of trials that have ended, and will change."]

    def _notes_on_epoch(self) -> list[str]:
        if self.at != "best":
            return []
        on = " and the ".join({"test": "test set", "validation": "validation images"}.get(s, s) for s in self.splits)
        chosen = f"the {on}" if on else "the images"
        return [
            f"best: each trial's best epoch, chosen on {chosen} that it is measured on, so better than it would be."
        ]

    def _notes_on_published(self) -> list[str]:
        beside = [cell.published for cell in self.cells.values() if cell.published]
        placed = {(each.name, each.value, each.source) for each in beside}
        notes = [
            f"Published: {each.name} {self._with_spread(each.value, None)} ({each.source})"
            for each in self.published
            if (each.name, each.value, each.source) not in placed
        ]
        if beside:
            sources = "; ".join(dict.fromkeys(each.source for each in beside))
            same = any(each.same for each in beside)
            told = " In brackets: ours minus it, where every setting is the same." if same else ""
            differ = "" if all(each.same for each in beside) else " Settings it does not name may differ."
            notes.append(f"published: {sources}.{told}{differ}")
        return notes

    def _notes_on_tests(self) -> list[str]:
        """Which comparisons could not have been significant, whatever their numbers, and what it would take."""
        tests = self._tests()
        told: dict[str, None] = {}
        for each, corrected in zip(tests, holm([each.smallest for each in tests]), strict=True):
            if corrected > self.level:
                told[self._undecided(each, corrected, len(tests))] = None
        untested: dict[str, list[tuple[Key, Key]]] = {}
        for key, cell in self.cells.items():
            if cell.untested:
                untested.setdefault(cell.untested, []).append(key)
        return [*told, *(f"Not tested: {self._named(keys)}: {why}." for why, keys in untested.items())]

    def _undecided(self, test: Comparison, corrected: float, family: int) -> str:
        one, other = test.counts
        who = f"{one} seeds" if test.paired else f"{one} against {other} trials"
        kind = f"with {one} pairs " if test.paired else ""
        after = f", {corrected:.2g} after Holm's correction over {family}" if corrected > test.smallest else ""
        enough = needed(self.level, family, paired=test.paired)
        can = f"; {enough} {'seeds' if test.paired else 'against as many'} can" if enough else ""
        told = f"{kind}the smallest exact two-sided p is {test.smallest:.2g}{after}{can}"
        return f"{who} cannot decide at {100 * self.level:g} %: {told}."

    # ---------------------------------------------------------------------------------------------------------- LaTeX

    def _latex_line(self, row: Key, parts: Sequence[Part]) -> list[str]:
        line = []
        for col, part in self._columns(parts):
            cell = self._cell(row, col)
            found = r"$^{\dagger}$" if self.significant(cell) else ""
            if part == "value":
                value = self._latex_value(cell, best=self._is_best(cell, col))
                line.append(value + ("" if "difference" in parts else found))
                continue
            text = self.part_text(cell, part).removesuffix(" *")
            told = r"$^{\ddagger}$" if text != "-" else ""
            line.append(_latex_number(text) + {"published": told, "difference": found}.get(part, ""))
        return line

    def _latex_value(self, cell: Cell, *, best: bool) -> str:
        if cell.mean is None:
            return self.value_text(cell).replace("...", r"\dots{}")
        number, spread = self._digits(cell.mean, cell.std)
        bold = rf"\mathbf{{{number}}}" if best else number
        around = "" if spread is None else rf" \pm {spread}"
        return f"${bold}{around}$ {_count(cell)}"

    def _is_best(self, cell: Cell, col: Key) -> bool:
        """Of its column, as far as the digits shown tell. One trial claims nothing, nor does a quick form."""
        better = BY_NAME[self.metric].better
        means = [
            c.mean for (_, at), c in self.cells.items() if at == col and c.mean is not None and math.isfinite(c.mean)
        ]
        if not better or len(means) < 2 or cell.mean is None or cell.n < 2 or self.heading:
            return False
        best = max(means) if better == "higher" else min(means)
        return self._digits(cell.mean, None) == self._digits(best, None)

    def _latex_key(self) -> list[str]:
        key = []
        if any(self._is_best(cell, col) for (_, col), cell in self.cells.items()):
            key.append(r"\textbf{Bold}: the best mean of its column, significant only where marked.")
        if any(map(self.significant, self.cells.values())):
            over = f"exact permutation test, Holm's correction over {len(self._tests())}"
            key.append(rf"$^{{\dagger}}$ significant at {100 * self.level:g}\,\%: {over}.")
        if any(cell.published for cell in self.cells.values()):
            key.append(r"$^{\ddagger}$ as published.")
        return key


def heading(sweeps: Sequence[str]) -> str:
    """`quick form, not comparable`, with the names of the quick ones where other sweeps stand beside them."""
    from orchestrator.sweep import is_quick  # the reader of sweep files: whoever prints no table does without

    quick = [*filter(is_quick, sweeps)]
    return f"{QUICK}: {', '.join(quick)}" if 0 < len(quick) < len(sweeps) else QUICK if quick else ""


def short(field: str) -> str:
    """A column's name as a setting is written in a sweep file: `model_width` as `model.width`."""
    return field.replace("_", ".", 1) if field in CONFIG_COLUMNS and field not in ("seed", "precision") else field


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def _count(cell: Cell) -> str:
    expected = cell.planned - cell.undefined
    return "" if not expected else f"({cell.n})" if cell.n == expected else f"({cell.n}/{expected})"


def _either(paired: set[bool], when: str, otherwise: str) -> str:
    return " or of the ".join(text for is_so, text in ((True, when), (False, otherwise)) if is_so in paired)


def _widths(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *body, strict=True)]


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]


def _words(value: Any) -> Any:
    """Several values as one field of a CSV line."""
    return " ".join("-" if each is None else repr(each) for each in value) if isinstance(value, tuple) else value


def _finite(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{each: f"\\{each}" for each in "&%$#_"}, "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"$|$", "*": r"$*$",
    "\n": " ",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(each, each) for each in text)


def _latex_number(text: str) -> str:
    """Numbers in mathematics, so that a minus is one; words as they are."""
    if not any(map(str.isdigit, text)):
        return _escaped(text)
    return re.sub(r"[^\s()]*\d[^\s()]*(?: ± \S+)?", lambda found: "$" + found[0].replace("±", r"\pm") + "$", text)


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
