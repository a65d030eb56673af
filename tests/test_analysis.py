"""Tables against numpy, by hand, and in every form they are written in."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_rows
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import NOTHING, epoch, reached, trial

from mixmo_core.config import flatten, leaves
from orchestrator import analysis
from orchestrator.analysis import Cell, EnsembleRow, ResultTable, table, varied
from orchestrator.errors import UsageError
from orchestrator.rows import EPOCHS_SCHEMA, TRIALS_SCHEMA, TrialRow, config_of
from orchestrator.store import ResultStore
from orchestrator.sweep import Published

VALUES = {
    (2, "linear", 2): [0.70, 0.72, 0.71], (2, "cutmix", 2): [0.74, 0.75, 0.76],
    (2, "linear", 5): [0.80, 0.81, 0.82], (2, "cutmix", 5): [0.84, 0.84, 0.87],
    (1, "none", 2): [0.69, 0.70, 0.71], (1, "none", 5): [0.78, 0.79, 0.80],
}  # fmt: skip
"""top1 by subnetworks, method and width, one for each seed."""


def done(seed: int, value: float, **given: Any) -> TrialRow:
    row = trial(seed, **given)
    return reached(row, row.epochs, best_top1=value + 0.01, metrics={**NOTHING, "top1": value, "nll": 1 - value})


def rows() -> list[TrialRow]:
    made: list[TrialRow] = []
    for (subnetworks, method, width), values in VALUES.items():
        label, how = ("vanilla", "cutmix") if subnetworks == 1 else (None, method)
        for seed, value in enumerate(values):
            position = len(made)
            made.append(
                done(seed, value, width=width, subnetworks=subnetworks, method=how, label=label, position=position)
            )
    return made


def cell(of: ResultTable, *row: Any, col: tuple[Any, ...] = ()) -> Cell:
    return of.cells[row, col]


# ------------------------------------------------------------------------------------------------------- statistics


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_mean_and_spread_are_numpys(values: list[float]) -> None:
    cell = Cell(tuple(values))
    assert cell.mean == pytest.approx(np.mean(values), abs=1e-15)
    assert cell.std == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_one_trial_has_no_spread_and_none_has_no_mean() -> None:
    assert (Cell((0.5,)).mean, Cell((0.5,)).std) == (0.5, None)
    assert (Cell().mean, Cell().std, Cell().n) == (None, None, 0)


def test_a_cell_is_all_seeds_of_one_setting() -> None:
    made = table(rows())
    assert made.row_fields == ("label", "model_width", "model_subnetworks", "mixing_method")
    assert len(made.cells) == 6
    for (subnetworks, method, width), values in VALUES.items():
        key = ("vanilla", width, 1, None) if subnetworks == 1 else (None, width, 2, method)
        assert cell(made, *key).values == tuple(values)
    assert made.averaged == ()


def test_rows_and_columns_are_the_users_choice() -> None:
    made = table(rows(), row_fields=["mixing.method"], col_fields=["model_width"])
    assert (made.row_keys, made.col_keys) == ((("linear",), ("cutmix",), (None,)), ((2,), (5,)))
    assert cell(made, "linear", col=(5,)).values == (0.80, 0.81, 0.82)


def test_a_table_says_when_it_averages_over_more_than_seeds() -> None:
    made = table(rows(), row_fields=["model.subnetworks"])
    assert cell(made, 1).n == 6
    assert made.averaged == ("model_width", "mixing_method")
    assert "Averaged over model.width, mixing.method too" in made.to_markdown()


def test_what_a_cell_averages_over_is_no_repetition_and_decides_nothing() -> None:
    made = table(rows(), row_fields=["model.subnetworks"], baseline="vanilla")
    (held,) = (each for each in made.cells.values() if not each.baseline)
    assert held.difference is not None
    assert held.comparison is None
    assert held.untested == "averaged over model.width, mixing.method"
    apart = table(
        rows(), row_fields=["model.subnetworks", "mixing.method"], col_fields=["model.width"], baseline="vanilla"
    )
    assert all(each.comparison for each in apart.cells.values() if not each.baseline)


def test_a_table_says_that_trials_are_still_under_way_and_marks_what_ended_without_a_number() -> None:
    waits, ended, failed = (made_rows.trial(0, width=width) for width in (2, 3, 5))
    open_rows = [waits, made_rows.reached(ended, 3), failed.replace(state="ERROR")]
    made = table(open_rows, row_fields=["model.width"])
    assert [made.value_text(cell(made, width)) for width in (2, 5)] == ["... (0/1)", "- (0/1)"]
    assert "Not finished: 1 trial runs or waits" in made.to_markdown()
    assert "the others run, wait, failed or were cancelled." in made.to_markdown()
    settled = table(open_rows[1:], row_fields=["model.width"])
    assert "Not finished" not in settled.to_markdown()
    assert "the others failed or were cancelled." in settled.to_markdown()


def test_settings_that_follow_from_others_are_not_shown_by_themselves() -> None:
    """Repetition goes with the number of subnetworks here, and adds nothing."""
    assert varied(rows()) == ["label", "model_width", "model_subnetworks", "mixing_method"]
    assert varied(rows()[:3]) == []
    assert table(rows()[:3]).row_keys == ((),)


def test_other_metrics_and_the_best_epoch() -> None:
    assert cell(table(rows(), metric="nll"), "vanilla", 2, 1, None).mean == pytest.approx(0.30)
    assert cell(table(rows(), at="best"), "vanilla", 2, 1, None).mean == pytest.approx(0.71)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "top2"}, "there are loss, lr, top1"),
        ({"metric": "eec"}, "did you mean 'ece'"),
        ({"metric": "nll", "at": "best"}, "known of top1 only"),
        ({"at": "first"}, "last, best"),
        ({"row_fields": ["model.widht"]}, "no setting model.widht; there are label, .*; did you mean 'model.width'"),
        ({"baseline": "plain"}, "labels are vanilla"),
        ({"baseline": "vanilla", "row_fields": ["model.width"]}, "add label"),
    ],
)
def test_what_there_is_not_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table(rows(), **given)


# -------------------------------------------------------------------------------------------------- what does not count


@pytest.mark.parametrize(
    ("changes", "waiting", "failed"),
    [
        ({"state": "RUNNING"}, 1, 0), ({"state": "PENDING"}, 1, 0), ({"state": "PAUSED"}, 1, 0),
        ({"state": "ERROR"}, 0, 1), ({"state": "CANCELLED"}, 0, 1), ({"stopped_early": True}, 0, 1),
    ],
)  # fmt: skip
def test_only_trials_that_ran_to_their_end_count(changes: dict[str, Any], waiting: int, failed: int) -> None:
    made = rows()
    made[0] = made[0].replace(**changes)
    found = cell(table(made), None, 2, 2, "linear")
    assert (found.values, found.waiting, found.failed, found.planned) == ((0.72, 0.71), waiting, failed, 3)
    text = table(made).to_text()
    assert "71.50 ± 0.71 (2/3)" in text
    assert "two of three trials finished" in text


def test_trials_that_a_scheduler_stopped_are_told_of_in_the_heading_and_count_where_asked() -> None:
    made = rows()
    made[0] = made[0].replace(stopped_early=True)
    left_out, included = table(made), table(made, with_stopped=True)
    assert left_out.heading == "without 1 trial that a scheduler stopped early"
    assert included.heading == "1 trial that a scheduler stopped early included, as they were when they stopped"
    for each in (left_out, included):
        assert each.heading in each.to_text()
        assert f"**{each.heading}**" in each.to_markdown()
        assert each.heading in each.to_latex("mixmo table")
        assert json.loads(each.to_json())["heading"] == each.heading
    assert (cell(left_out, None, 2, 2, "linear").n, cell(included, None, 2, 2, "linear").n) == (2, 3)
    assert table(rows()).heading == table(rows(), with_stopped=True).heading == ""


def test_a_population_shares_no_cell_with_trials_of_another_sweep_and_is_told_of() -> None:
    people = [row.replace(sweep="people", trial_id=f"p{row.trial_id}", lineage="[]") for row in rows()]
    made = table([*rows(), *people], row_fields=["model.width"])
    assert made.row_fields == ("model_width", "sweep")
    assert made.heading.startswith("populations: settings are those that trials began with")
    assert table(people, row_fields=["model.width"]).row_fields == ("model_width",)
    where = {name: value for name, value in flatten(config_of(people[0])).items() if name != "seed"}
    told = [Published(label=None, where=where, metrics={"top1": 0.5}, source="Table 1")]
    for these, same in ((rows(), True), (people, False)):
        cells = table(these, row_fields=["cell_id"], published=told).cells.values()
        assert [each.published.same for each in cells if each.published] == [same]


def test_at_an_epoch_by_its_number_whoever_reached_it_counts_stopped_or_not() -> None:
    made = [trial(seed, epoch=9, state="TERMINATED", stopped_early=seed == 0) for seed in range(3)]
    told = [epoch(row, 5) for row in made[:2]]
    for with_stopped in (False, True):
        found = table(made, at=5, epochs=told, with_stopped=with_stopped)
        assert (found.heading, [each.n for each in found.cells.values()]) == ("", [2])


def test_a_cell_that_has_not_begun_shows_how_many_are_planned() -> None:
    waiting = [trial(seed) for seed in range(3)]
    assert "... (0/3)" in table(waiting).to_text()


def test_a_trial_of_two_sweeps_counts_once_and_as_finished() -> None:
    made = rows()
    again = [row.replace(sweep="other", state="PENDING") for row in made]
    assert table(again + made).cells == table(made).cells


def test_a_metric_that_is_not_defined_is_not_said_to_be_missing() -> None:
    made = [row.replace(metrics={**row.metrics, "ratio_error": 0.5}) if not row.label else row for row in rows()]
    found = table(made, metric="ratio_error", baseline="vanilla")
    plain = cell(found, "vanilla", 2, 1, None)
    assert (plain.n, plain.failed, plain.waiting, plain.undefined, plain.planned) == (0, 0, 0, 3, 3)
    text = found.to_text()
    assert "finished; the others" not in text
    assert "..." not in text
    assert "ratio_error is not defined for finished trials of: vanilla, 2, 1, -; vanilla, 5, 1, -." in text
    assert "The baseline has no ratio_error to compare with." in text
    mixed = table(made, metric="ratio_error", row_fields=["model.width"])
    assert "(6)" in mixed.to_text()  # those that have it


# --------------------------------------------------------------------------------------------------------------- order


def test_words_stand_in_the_order_of_the_file_and_numbers_by_size() -> None:
    made = [
        done(0, 0.5, width=width, method=method, label=label, position=position)
        for position, (label, method, width) in enumerate(
            [("zeta", "sum", 5), ("zeta", "linear", 2), ("alpha", "cutmix", 5), ("vanilla", "linear", 5)]
        )
    ]
    backwards = made[::-1]
    assert table(backwards, row_fields=["label"]).row_keys == (("zeta",), ("alpha",), ("vanilla",))
    assert table(backwards, row_fields=["mixing.method"]).row_keys == (("sum",), ("linear",), ("cutmix",))
    assert table(backwards, col_fields=["mixing.method"]).col_keys == (("sum",), ("linear",), ("cutmix",))
    assert table(backwards, row_fields=["model.width"]).row_keys == ((2,), (5,))
    assert table(backwards, row_fields=["label"], baseline="vanilla").row_keys[-1] == ("vanilla",)


def test_sweeps_stand_in_the_order_in_which_they_are_named() -> None:
    first = [done(i, 0.5, label=label, position=i, sweep="one") for i, label in enumerate(["vanilla", "mimo"])]
    second = [done(i, 0.5, width=5, label=label, position=i, sweep="a") for i, label in enumerate(["zeta", "mimo"])]
    assert table(first + second, row_fields=["label"]).row_keys == (("vanilla",), ("mimo",), ("zeta",))
    assert table(second + first, row_fields=["label"]).row_keys == (("zeta",), ("mimo",), ("vanilla",))
    assert table(first + second, row_fields=["sweep"]).row_keys == (("one",), ("a",))


# ------------------------------------------------------------------------------------------------------------ baseline


def test_every_cell_is_compared_with_the_baseline_of_its_width() -> None:
    made = table(rows(), baseline="vanilla")
    five = cell(made, None, 5, 2, "cutmix")
    assert five.difference == pytest.approx(0.85 - 0.79)
    spread = math.sqrt(np.var(VALUES[2, "cutmix", 5], ddof=1) / 3 + np.var(VALUES[1, "none", 5], ddof=1) / 3)
    assert five.difference_se == pytest.approx(spread)
    assert cell(made, None, 2, 2, "linear").difference == pytest.approx(0.01)
    base = cell(made, "vanilla", 5, 1, None)
    assert (base.baseline, base.difference) == (True, None)


def test_the_baseline_is_found_across_columns() -> None:
    made = table(rows(), row_fields=["label", "mixing.method"], col_fields=["model.width"], baseline="vanilla")
    assert cell(made, None, "cutmix", col=(5,)).difference == pytest.approx(0.06)
    header, _ = made.text_cells(("value", "difference"))
    assert header == ["label", "mixing.method", "model.width 2", "vs baseline", "model.width 5", "vs baseline"]


def test_without_a_matching_baseline_there_is_no_difference() -> None:
    lonely = [*rows(), done(0, 0.9, width=10, position=99)]
    found = cell(table(lonely, baseline="vanilla"), None, 10, 2, "cutmix")
    assert (found.difference, found.baseline) == (None, False)


# --------------------------------------------------------------------------------------------------------------- forms


def test_markdown() -> None:
    expected = """\
| label | model.width | model.subnetworks | mixing.method | top1 % | 95 % interval | vs baseline | p | p (t) |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
| - | 2 | 2 | linear | 71.00 ± 1.00 (3) | 68.52 to 73.48 | +1.00 ± 0.82 | 1 | 0.23 |
| - | 2 | 2 | cutmix | 75.00 ± 1.00 (3) | 72.52 to 77.48 | +5.00 ± 0.82 | 1 | - |
| - | 5 | 2 | linear | 81.00 ± 1.00 (3) | 78.52 to 83.48 | +2.00 ± 0.82 | 1 | - |
| - | 5 | 2 | cutmix | 85.00 ± 1.73 (3) | 80.70 to 89.30 | +6.00 ± 1.15 | 1 | 0.018 |
| vanilla | 2 | 1 | - | 70.00 ± 1.00 (3) | 67.52 to 72.48 | baseline | - | - |
| vanilla | 5 | 1 | - | 79.00 ± 1.00 (3) | 76.52 to 81.48 | baseline | - | - |

p: two-sided, from exact permutation of the signs of the differences, paired by seed, after Holm's correction over 4 \
comparisons

p (t): the same of the paired t-test

3 seeds cannot decide at 5 %: with 3 pairs the smallest exact two-sided p is 0.25, 1 after Holm's correction over 4; \
8 seeds can.
"""
    assert table(rows(), baseline="vanilla").to_markdown() == expected


def test_lines_are_the_labels_and_what_they_leave_open() -> None:
    made = [row.replace(label="MIMO" if row.label is None else row.label) for row in rows()]
    assert table(rows()).row_fields == ("label", "model_width", "model_subnetworks", "mixing_method")
    assert table(made).row_fields == ("label", "model_width", "mixing_method")
    assert sorted(cell.values for cell in table(made).cells.values()) == sorted(
        cell.values for cell in table(rows()).cells.values()
    )
    alone = [row for row in made if row.config["mixing_method"] != "linear"]
    assert table(alone).row_fields == ("label", "model_width")


def test_a_narrow_terminal_spares_the_tests_and_last_of_all_the_interval() -> None:
    made = table(seven(), row_fields=["label"], baseline="plain")
    shown = []
    for width in range(90, 40, -1):
        header = tuple(re.split(r"  +", made.to_text(width).splitlines()[0])[1:])
        if header not in shown:
            shown.append(header)
        assert ("Left out for want of room" in made.to_text(width)) == (len(header) < 5)
    assert shown == [
        ("top1 %", "95 % interval", "vs baseline", "p", "p (t)"), ("top1 %", "95 % interval", "vs baseline", "p"),
        ("top1 %", "95 % interval", "vs baseline"), ("top1 %", "vs baseline"),
    ]  # fmt: skip


def test_the_parts_that_are_named_are_shown_in_every_form() -> None:
    made = table(seven(), row_fields=["label"], baseline="plain")
    assert made.to_text(40, ["p", "interval"]).splitlines()[0].split("  ")[-1] == "p"
    assert "Left out" not in made.to_text(40, ["p"])
    assert made.to_markdown(["p_t"]).startswith("| label | top1 % | p (t) |\n")
    latex = made.to_latex("", ["interval", "p"])
    assert r"label & top1 \% & 95 \% interval & p \\" in latex
    assert "p: two-sided, from exact permutation" in latex
    assert r"$\mathbf{76.33} \pm 1.37$ (7)$^{\dagger}$ & $75.06$ to $77.60$ & $0.016$ \\" in latex
    with pytest.raises(UsageError, match="no part value of a table; there are interval, difference, p, p_t, published"):
        made.to_text(80, ["value"])


def test_published_numbers_have_no_empty_columns() -> None:
    published = [Published(label="Theirs", where={"model.width": 5, "mixing.method": "cutmix"}, metrics={"top1": 0.8},
                           source="Table 1")]  # fmt: skip
    made = table(rows(), row_fields=["mixing.method"], col_fields=["model.width"], published=published)
    assert made.text_cells(("value", "published"))[0] == [
        "mixing.method",
        "model.width 2",
        "model.width 5",
        "published",
    ]
    assert {len(line) for line in made.text_cells(("value", "published"))[1]} == {4}
    (line,) = (line for line in made.to_latex().splitlines() if line.startswith("cutmix"))
    assert line.count("&") == 3


def seven(shift: float = 0.05, **given: Any) -> list[TrialRow]:
    """A baseline of seven seeds, and a method that is as much better in each."""
    made = []
    for seed in range(7):
        low = 0.70 + seed * seed / 1000
        made.append(done(seed, low, subnetworks=1, label="plain", position=seed, **given))
        made.append(done(seed, low + shift + seed / 1e4, label="a & b", position=7 + seed, **given))
    return made


def test_latex() -> None:
    made = table(seven(git_commit="1a2b3c", split="test"), row_fields=["label"], baseline="plain")
    assert (
        made.to_latex("mixmo table made --format=latex")
        == r"""% sweep made; commit 1a2b3c; mixmo table made --format=latex
% \usepackage{booktabs,graphicx}
\noindent\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
\begin{tabular}{lrrr}
\toprule
label & top1 \% & 95 \% interval & vs baseline \\
\midrule
plain & $71.30 \pm 1.35$ (7) & $70.05$ to $72.55$ & baseline \\
a \& b & $\mathbf{76.33} \pm 1.37$ (7) & $75.06$ to $77.60$ & $+5.03 \pm 0.73$$^{\dagger}$ \\
\bottomrule
\end{tabular}}
\par\smallskip
{\footnotesize\raggedright
top1 \%: mean $\pm$ standard deviation (number of trials)\par
95 \% interval: of the mean, by Student's t\par
vs baseline: difference of the means in points $\pm$ its standard error\par
\textbf{Bold}: the best mean of its column, significant only where marked.\par
$^{\dagger}$ significant at 5\,\%: exact permutation test, Holm's correction over 1.\par
}
"""
    )


ODD = r"50 % & #1_a {b} ~^\ <c>|d*"


def compiled(body: str, folder: Path) -> str:
    """What TeX says of a page with this table, which it must be able to set."""
    program = shutil.which("pdflatex") or shutil.which("tectonic")
    if program is None:
        pytest.skip("neither pdflatex nor tectonic is here: the LaTeX of tables is not compiled")
    page = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n" + body + "\\end{document}\n"
    (folder / "page.tex").write_text(page)
    flags = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in program else []
    done = subprocess.run([program, *flags, "page.tex"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert (folder / "page.pdf").exists()
    return done.stdout + done.stderr


def test_latex_compiles(tmp_path: Path) -> None:
    published = [Published(label=None, where={"model.subnetworks": 2}, metrics={"top1": 0.8}, source=ODD)]
    made = [row.replace(label=ODD if row.label != "plain" else "plain") for row in seven()]
    compiled(table(made, baseline="plain", published=published).to_latex("mixmo table a_b"), tmp_path)


def test_latex_keeps_its_columns_and_braces_whatever_the_words() -> None:
    made = [row.replace(label=ODD if row.label != "plain" else "plain") for row in seven()]
    lines = table(made, baseline="plain").to_latex("a\nb").splitlines()
    inner = [line for line in lines if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in inner}) == 1
    text = re.sub(r"\\[\\{}]", "", "\n".join(lines[1:]))
    assert text.count("{") == text.count("}")
    assert lines[0].endswith("; a b")


def test_text_keeps_its_columns_in_line() -> None:
    made = rows()
    made[0] = made[0].replace(label="a | b")
    lines = table(made, baseline="vanilla").to_text().splitlines()
    assert lines[1].replace("─", "").strip() == ""
    assert len({line.index("(") for line in lines[2:9] if "(3)" in line}) == 1
    assert r"a \| b" in table(made).to_markdown()


def test_csv_has_one_plain_line_per_cell() -> None:
    read = list(csv.DictReader(io.StringIO(table(rows(), baseline="vanilla").to_csv())))
    assert len(read) == 6
    first = next(line for line in read if line["mixing_method"] == "cutmix" and line["model_width"] == "2")
    assert float(first["mean"]) == pytest.approx(0.75)
    assert [float(value) for value in first["values"].split()] == VALUES[2, "cutmix", 2]
    assert (first["label"], first["n"]) == ("", "3")


def test_json_is_strict_and_carries_its_version() -> None:
    made = rows()
    made[0] = made[0].replace(metrics={**NOTHING, "top1": float("nan")})
    read = json.loads(table(made).to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (read["schema"], read["metric"], read["unit"]) == ("mixmo.table/1", "top1", "fraction")
    broken = next(each for each in read["cells"] if each["mixing_method"] == "linear" and each["model_width"] == 2)
    assert (broken["mean"], broken["values"]) == (None, [None, 0.72, 0.71])
    assert len(read["cells"]) == 6


def test_metrics_that_are_no_fractions_have_the_digits_of_their_spread() -> None:
    made = [done(seed, value) for seed, value in enumerate((0.7, 0.71, 0.74))]
    assert "0.283 ± 0.021 (3)" in table(made, metric="nll").to_text()
    assert "0.3 (1)" in table(made[:1], metric="nll").to_text()
    assert "0.3 ± 0 (2)" in table([made[0], done(1, 0.7)], metric="nll").to_text()


def test_a_terminal_is_told_what_the_numbers_mean() -> None:
    lines = table(rows(), baseline="vanilla").to_text().splitlines()
    assert lines[9:11] == [
        "top1 %: mean ± standard deviation (number of trials)",
        "vs baseline: difference of the means in points ± its standard error",
    ]
    assert max(map(len, lines)) <= 100
    assert "standard error" not in table(rows()).to_text()
    assert "standard deviation" not in table([trial(0)]).to_text()


# -------------------------------------------------------------------------------------------------------------- tests


def test_differences_are_tested_pair_by_pair_where_the_seeds_are_the_same() -> None:
    made = table(seven(), row_fields=["label"], baseline="plain")
    found = cell(made, "a & b").comparison
    assert found
    assert (found.paired, found.p_exact, found.p_holm) == (True, 2 / 128, 2 / 128)
    text = made.to_text()
    assert re.search(r"\+5\.03 ± 0\.73 \*  0\.016  ", text)
    assert "*: significant at 5 %" in text
    assert "cannot decide" not in text
    strict = table(seven(), row_fields=["label"], baseline="plain", confidence=0.99)
    assert "7 seeds cannot decide at 1 %" in strict.to_text()
    assert " *" not in strict.to_text()
    assert "99 % interval" in strict.to_text()


def test_pairs_are_those_of_one_seed_whatever_the_order() -> None:
    made = table(seven()[::-1], row_fields=["label"], baseline="plain")
    mixed = [row.replace(position=-row.position) if row.label == "plain" else row for row in seven()]
    again = table(mixed, row_fields=["label"], baseline="plain")
    assert cell(made, "a & b").comparison == cell(again, "a & b").comparison


def test_other_seeds_are_compared_without_pairs() -> None:
    made = table(seven()[:-1], row_fields=["label"], baseline="plain")
    found = cell(made, "a & b").comparison
    assert found
    assert (found.paired, found.counts) == (False, (6, 7))
    assert "permutation of the group labels" in made.to_text()
    three = [row for row in seven() if (row.config["seed"] < 3) == (row.label == "plain")]
    assert "3 against" not in table(three, row_fields=["label"], baseline="plain").to_text()
    few = table([row for row in three if row.config["seed"] < 6], row_fields=["label"], baseline="plain").notes()
    assert (
        "3 against 3 trials cannot decide at 5 %: the smallest exact two-sided p is 0.1; 4 against as many can." in few
    )


def test_the_correction_runs_over_the_table() -> None:
    made = [*seven(), *(row.replace(label="other", trial_id=row.trial_id + "x") for row in seven()[1::2])]
    tested = table(made, row_fields=["label"], baseline="plain")
    for label in ("a & b", "other"):
        found = cell(tested, label).comparison
        assert found
        assert (found.p_exact, found.p_holm) == (2 / 128, 4 / 128)


def test_one_trial_and_a_value_that_is_none_are_not_tested() -> None:
    one = table(seven()[:3], row_fields=["label"], baseline="plain")
    assert "Not tested: a & b: one trial cannot decide, on either side." in one.notes()
    broken = seven()
    broken[1] = broken[1].replace(metrics={**NOTHING, "top1": math.nan})
    assert "a value is no number" in table(broken, row_fields=["label"], baseline="plain").to_text()


def test_an_ensemble_of_the_baselines_own_trials_is_not_tested() -> None:
    plain = [row for row in seven() if row.label == "plain"]
    given = {name: getattr(plain[0], name) for name in ("sweep", "digest", "cell_id", "epochs", "config", "metrics")}
    both = [
        analysis.EnsembleRow(label="2 x plain", position=99 + i, state="TERMINATED", members=2,
                             trial_id=f"{plain[i].trial_id}+{plain[i + 1].trial_id}", **given)
        for i in (0, 2)
    ]  # fmt: skip
    made = table([*plain, *both], row_fields=["label"], baseline="plain")
    assert cell(made, "2 x plain").comparison is None
    assert "Not tested: 2 x plain: made of the baseline's own trials." in made.notes()


def test_intervals_and_tests_are_in_csv_and_json() -> None:
    made = table(seven(), row_fields=["label"], baseline="plain")
    read = json.loads(made.to_json())
    first = read["cells"][1]
    assert read["confidence"] == 0.95
    assert (first["paired"], first["p_exact"], first["smallest"]) == (True, 2 / 128, 2 / 128)
    assert first["seeds"] == [*range(7)]
    assert first["ci_low"] < first["mean"] < first["ci_high"]
    _, line = csv.DictReader(io.StringIO(made.to_csv()))
    assert float(line["ci_low"]) == first["ci_low"]
    assert line["seeds"] == "0 1 2 3 4 5 6"


# -------------------------------------------------------------------------------------------------------------- epochs


def test_any_epoch_counts_every_trial_that_has_reached_it() -> None:
    running, failed, waiting = reached(trial(0), 2), reached(trial(1), 2, state="ERROR"), trial(2)
    epochs = [epoch(row, 1) for row in (running, failed)]
    made = table([running, failed, waiting], at=1, epochs=epochs)
    found = cell(made)
    assert found.values == tuple(each.metrics["top1"] for each in epochs)
    assert (found.n, found.waiting, found.planned) == (2, 1, 3)
    assert made.title == "epoch 1 top1 %"
    assert "two of three trials reached epoch 1" in made.to_text()
    assert json.loads(made.to_json())["at"] == 1
    with pytest.raises(UsageError, match="no top1 at epoch 9, which was reached by no trial: 2 is the furthest"):
        table([running, failed], at=9)
    with pytest.raises(UsageError, match="no nll at epoch 1, which was not evaluated"):
        table([running, failed], at=1, epochs=epochs, metric="nll")


@pytest.mark.parametrize(("split", "told"), [("test", "the test set"), ("validation", "the validation images")])
def test_a_best_epoch_says_on_what_it_was_chosen(split: str, told: str) -> None:
    assert f"chosen on {told} that it is measured on" in table(seven(split=split), at="best").to_text()
    assert "chosen on" not in table(seven(split=split)).to_text()


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    store = ResultStore.open(tmp_path, create=True)
    for sweep, part in (("one", rows()[:9]), ("two", rows()[6:])):
        with store.writer(sweep, sweep_text="") as writer:
            writer.put(part)
    return tmp_path


def test_sweeps_are_loaded_one_below_the_other(stored: Path) -> None:
    loaded = analysis.load(stored, "two", "one")
    assert (loaded.table.num_rows, loaded.sweeps) == (21, ("two", "one"))
    assert len(analysis.load(stored).rows) == 21
    assert set(table(loaded.rows).cells) == set(table(rows()).cells)
    frame = loaded.to_pandas()
    assert list(frame.groupby("sweep").size()) == [9, 12]
    assert loaded.epochs().num_rows == 0
    assert analysis.load(stored / "nothing").rows == []


def test_frames_have_the_types_of_the_columns_whatever_is_missing(stored: Path, tmp_path: Path) -> None:
    """A count of which some are missing is no float, and a sweep without rows has the same columns."""
    for loaded in (analysis.load(stored, "one"), analysis.load(tmp_path / "nothing")):
        pandas, polars = loaded.to_pandas(), loaded.to_polars()
        names = ("best_epoch", "git_dirty", "top1", "trial_id", "updated_at", "epoch")
        assert [str(pandas.dtypes[name]) for name in names] == [
            "Int64", "boolean", "float64", "str" if pd.__version__ >= "3" else "object", "datetime64[us, UTC]", "Int64",
        ]  # fmt: skip
        assert [polars.schema[name] for name in names] == [
            pl.Int64, pl.Boolean, pl.Float64, pl.String, pl.Datetime("us", "UTC"), pl.Int64,
        ]  # fmt: skip
        assert polars.schema["optim_decay_at"] == pl.List(pl.Float64)
        assert (len(pandas), list(pandas.columns)) == (polars.height, polars.columns)
    assert polars.columns == TRIALS_SCHEMA.names
    assert analysis.load(stored).to_pandas("epochs").columns.tolist() == EPOCHS_SCHEMA.names
    assert analysis.load(stored).to_polars("epochs").columns == EPOCHS_SCHEMA.names
    with pytest.raises(UsageError, match="no table epoch; there are trials and epochs"):
        analysis.load(stored).to_pandas("epoch")  # type: ignore[arg-type]


def test_frames_keep_every_value(stored: Path) -> None:
    loaded = analysis.load(stored, "one")
    pandas, polars = loaded.to_pandas(), loaded.to_polars()
    assert polars["top1"].to_list() == [row.metrics["top1"] for row in loaded.rows]
    assert pandas.seed.tolist() == polars["seed"].to_list() == [row.config["seed"] for row in loaded.rows]
    assert pandas.best_epoch.isna().tolist() == polars["best_epoch"].is_null().to_list()
    finished = pandas[(pandas.state == "TERMINATED") & ~pandas.stopped_early]
    assert len(finished) == sum(row.state == "TERMINATED" and not row.stopped_early for row in loaded.rows)


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_a_package_that_is_not_there_is_told(stored: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install {name}") as told:
        getattr(analysis.load(stored), f"to_{name}")()
    assert told.value.name == name


def test_published_numbers_stand_below_ours() -> None:
    published = [
        Published(label="Puzzle-Mix", where={}, metrics={"top1": 0.8431, "top5": 0.9646}, source="Table 1, quoted"),
        Published(label=None, where={"model.width": 10}, metrics={"top5": 0.9722}, source="Table 1"),
    ]
    made = table(rows(), published=published)
    assert made.notes()[0] == "Published: Puzzle-Mix 84.31 (Table 1, quoted)"
    assert "Published: Puzzle-Mix 84.31 (Table 1, quoted)" in made.to_markdown()
    assert json.loads(made.to_json())["published"] == [
        {"name": "Puzzle-Mix", "value": 0.8431, "source": "Table 1, quoted"}
    ]
    both = table(rows(), metric="top5", published=published).notes()
    assert both[:2] == ["Published: Puzzle-Mix 96.46 (Table 1, quoted)", "Published: model.width 10 97.22 (Table 1)"]
    assert not table(rows(), metric="nll", published=published).notes()


def test_a_published_number_stands_beside_the_one_cell_that_has_its_settings() -> None:
    published = [
        Published(label="CutMix, wide", where={"mixing.method": "cutmix", "model.width": 5}, metrics={"top1": 0.84},
                  source="Table 1"),
        Published(label="Linear", where={"mixing.method": "linear"}, metrics={"top1": 0.8}, source="Table 2"),
    ]  # fmt: skip
    made = table(rows(), published=published)
    beside = cell(made, None, 5, 2, "cutmix")
    assert beside.published
    assert (beside.published.value, beside.published.same) == (0.84, False)
    assert sum(each.published is not None for each in made.cells.values()) == 1
    header, body = made.text_cells(("value", "published"))
    assert [header[-1], *(line[-1] for line in body)] == ["published", "-", "-", "-", "84.00", "-", "-"]
    assert "Published: Linear 80.00 (Table 2)" in made.notes()  # two widths have it
    assert "published: Table 1. Settings it does not name may differ." in made.notes()
    assert "Published: CutMix, wide 84.00 (Table 1)" in table(rows(), row_fields=["label"], published=published).notes()
    assert r"$84.00$$^{\ddagger}$" in made.to_latex()


def test_the_difference_from_a_published_number_needs_every_setting() -> None:
    row = rows()[9]
    whole = {
        name: tuple(value) if isinstance(value := row.config[name.replace(".", "_")], list) else value
        for name, _ in leaves()
        if name != "seed" and row.config[name.replace(".", "_")] is not None
    } | {"model.encoders": "all"}
    for where, same in ((whole, True), ({k: v for k, v in whole.items() if k != "optim.momentum"}, False)):
        published = [Published(label="x", where=where, metrics={"top1": 0.84}, source="T")]
        made = table(rows(), published=published)
        assert ("84.00 (+1.00)" in made.to_text()) == same
        told = [each["published_difference"] for each in json.loads(made.to_json())["cells"] if each["published"]]
        assert told == [pytest.approx(0.01) if same else None]
    other = [Published(label="x", where={**whole, "optim.momentum": 0.5}, metrics={"top1": 0.84}, source="T")]
    assert not any(each.published for each in table(rows(), published=other).cells.values())


WHOLE: dict[str, Any] = {name: spec.default for name, spec in leaves() if name != "seed"} | {
    "data.dataset": "synthetic", "data.repetition": 4, "model.depth": 10, "model.width": 5,
}  # fmt: skip
"""Every setting of the trials of width 5 and two subnetworks that mix by cutmix, those without effect included."""


def test_settings_without_effect_may_be_named() -> None:
    """One mapping holds what all entries of a paper share, also for its single networks, which mix nothing."""
    single = {**WHOLE, "model.subnetworks": 1, "data.repetition": 1}
    published = [
        Published(label="Cut", where=WHOLE, metrics={"top1": 0.84}, source="T"),
        Published(label="single", where=single, metrics={"top1": 0.78}, source="T"),
    ]
    made = table(rows(), published=published)
    for key, name in (((None, 5, 2, "cutmix"), "Cut"), (("vanilla", 5, 1, None), "single")):
        told = cell(made, *key).published
        assert told is not None
        assert (told.name, told.same) == (name, True)
    assert sum(each.published is not None for each in made.cells.values()) == 2
    plain = Published(label="x", where={"mixing.method": "cutmix", "model.width": 5}, metrics={"top1": 0.1}, source="T")
    assert cell(table(rows(), published=[plain]), "vanilla", 5, 1, None).published is None


def test_a_published_ensemble_stands_beside_an_ensemble_of_as_many() -> None:
    row = rows()[-1]
    columns = {spec.name: getattr(row, spec.name) for spec in dataclasses.fields(row)}
    pair = EnsembleRow(**{**columns, "trial_id": "a+b", "label": "2 x vanilla"}, members=2)
    single = {**WHOLE, "model.subnetworks": 1, "data.repetition": 1}
    published = [
        Published(label="DE", where=single, metrics={"top1": 0.82}, source="T", members=2),
        Published(label="DE of three", where=single, metrics={"top1": 0.83}, source="T", members=3),
    ]
    made = table([*rows(), pair], published=published)
    told = {key[0]: each.published.name for key, each in made.cells.items() if each.published}
    assert told == {("2 x vanilla", 5, 1, None): "DE"}
    assert "Published: DE of three 83.00 (T)" in made.notes()


def test_published_numbers_of_one_name_do_not_hide_each_other() -> None:
    published = [
        Published(
            label="Cut", where={"mixing.method": "cutmix", "model.width": 5}, metrics={"top1": top1}, source=source
        )
        for top1, source in ((0.84, "Table 1"), (0.85, "Table 5"))
    ]
    made = table(rows(), published=published)
    beside = cell(made, None, 5, 2, "cutmix").published
    assert beside is not None
    other = next(each for each in published if each.source != beside.source)
    assert f"Published: Cut {100 * other.metrics['top1']:.2f} ({other.source})" in made.notes()
    assert sum("Published: Cut" in note for note in made.notes()) == 1


def quick(*, seeds: int = 1) -> list[TrialRow]:
    return [row.replace(sweep="made-quick") for row in rows() if (row.config["seed"] or 0) < seeds]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_form_of_a_quick_table_is_headed_so(seeds: int) -> None:
    made = table(quick(seeds=seeds), baseline="vanilla")
    assert made.heading == "quick form, not comparable"
    assert made.to_text().startswith("quick form, not comparable\n\nlabel")
    assert made.to_markdown().startswith("**quick form, not comparable**\n\n| label")
    latex = made.to_latex()
    assert latex.startswith("% quick form, not comparable\n")
    assert latex.index(r"\textbf{quick form, not comparable}") < latex.index(r"\begin{tabular}")
    assert "mathbf" not in latex
    assert json.loads(made.to_json())["heading"] == "quick form, not comparable"
    assert {line["form"] for line in csv.DictReader(io.StringIO(made.to_csv()))} == {"quick form, not comparable"}


def test_a_full_table_is_not_headed_and_a_quick_sweep_among_others_is_named() -> None:
    full = table(rows())
    assert full.heading == ""
    for text in (full.to_text(), full.to_markdown(), full.to_latex(), full.to_csv(), full.to_json()):
        assert "quick" not in text
    both = table(
        [*(row.replace(trial_id=f"q{row.trial_id}") for row in quick()), *rows()], row_fields=["sweep", "label"]
    )
    assert both.to_text().startswith("quick form, not comparable: made-quick\n")


def test_one_seed_claims_no_order() -> None:
    made = table([row for row in rows() if row.config["seed"] == 0], baseline="vanilla")
    text = made.to_text()
    assert made.notes()[-1].startswith("Not tested: ")
    assert made.notes()[-1].endswith("one trial cannot decide, on either side.")
    header, body = made.text_cells()
    assert header[-2:] == ["top1 %", "vs baseline"]
    assert not any(mark in each for line in body for each in line for mark in "±*")
    assert "significant" not in text
    latex = made.to_latex()
    assert not any(word in latex for word in ("mathbf", "dagger", "Bold"))
    assert "mathbf" in table(rows(), baseline="vanilla").to_latex()


def test_a_mean_of_one_trial_is_not_set_in_bold_over_others() -> None:
    made = table([*rows(), done(0, 0.99, label="lucky", width=9)], row_fields=["label", "model.width", "mixing.method"])
    assert "mathbf" not in made.to_latex()
