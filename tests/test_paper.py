"""The paper as sweeps: what each file stands for, its published numbers, its quick form, and docs/paper.md.

`python tests/test_paper.py` writes the page anew.
"""

import dataclasses
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_analysis import compiled
from test_cli import COMMANDS, Shell
from test_cli import mixmo as mixmo  # the fixture

from mixmo_core.config import DATASETS, cell_id, flatten, unflatten, validation_images
from mixmo_core.cost import forward_flops, trial_flops
from orchestrator.analysis import EnsembleRow, table
from orchestrator.plan import initial_row
from orchestrator.rows import METRIC_COLUMNS, TrialRow
from orchestrator.store import Logits, ResultStore
from orchestrator.sweep import Published, Sweep, Trial, load

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper.md"
RESULTS = ROOT / "benchmarks" / "results"
MARK, END = "<!-- sweeps: written by tests/test_paper.py -->\n", "<!-- end -->"

CELLS = {
    "table1_cifar100": (15, 3), "table1_cifar10": (15, 3), "table2_mixing_blocks": (7, 3),
    "table3_encoders_classifiers": (5, 3), "table4_corruptions": (5 * 2, 3), "table5_tiny_imagenet": (7 * 3, 4),
    "table6_ensembles": (1, 3), "table7_filters": (3 * 7, 3), "figure5_width": (6 * 7, 3),
    "figure6_repetition": (1 + 4 * 3, 4), "figure7_probability": (11, 3), "figure8_weight_root": (7, 3),
    "figure9_subnetworks": (4, 3), "figure10_parameters": (2 * 6, 4), "appendix_alpha": (6, 3),
    "width_m_mixing": (6 + 6 * 3 * 3, 3),
}  # fmt: skip
"""Rows and columns of what is trained, and seeds. Rows of ensembles are made of these."""
FILES = {name: ROOT / "sweeps" / ("" if name == "width_m_mixing" else "paper") / f"{name}.yaml" for name in CELLS}

PEAK_FLOPS = {"bf16": 312e12, "fp32": 156e12}
"""Of an A100: NVIDIA's numbers for dense bf16, and for TF32, in which torch computes convolutions of fp32."""
SHARE = 0.4
"""Of the peak, assumed."""
CORE_FLOPS = 100e9
"""Of one core in bf16, cautious: a test holds it to under half of what was measured at width 2."""
START_S = 60.0
TRIAL_S = 2.0
"""Beside the arithmetic: to begin a sweep, and for each trial."""

each_file = pytest.mark.parametrize("name", CELLS)


def cells(sweep: Sweep) -> list[Trial]:
    return [*{trial.cell_id: trial for trial in sweep.trials}.values()]


def minutes(sweep: Sweep) -> float:
    """What a quick form takes on two cores, at most: training, and its looks at the images that it is measured on."""
    flops = 0.0
    for trial in sweep.trials:
        data, every = trial.config.data, trial.config.evaluate.every
        test = trial.config.evaluate.split == "test"
        images = DATASETS[data.dataset].test_images if test else validation_images(data)
        flops += trial_flops(trial.config) + forward_flops(trial.config) * images * -(
            -trial.config.optim.epochs // every
        )
    return (START_S + (TRIAL_S * len(sweep.trials) + flops / CORE_FLOPS) / 2) / 60


def gpu_hours(sweep: Sweep) -> float:
    rates = {precision: SHARE * peak for precision, peak in PEAK_FLOPS.items()}
    return sum(trial_flops(trial.config) / rates[trial.config.precision] for trial in sweep.trials) / 3600


# --------------------------------------------------------------------------------------------- what a file stands for


def test_there_is_a_file_for_each_table_and_figure() -> None:
    assert {path.stem for path in (ROOT / "sweeps" / "paper").iterdir()} == CELLS.keys() - {"width_m_mixing"}
    numbered = {re.match(r"(table|figure)\d+", name) for name in CELLS}
    assert {found[0] for found in numbered if found} == {
        *(f"table{number}" for number in range(1, 8)), *(f"figure{number}" for number in range(5, 11)),
    }  # fmt: skip


@each_file
def test_a_file_has_a_trial_for_each_row_column_and_seed(name: str) -> None:
    sweep, (count, seeds) = load(FILES[name]), CELLS[name]
    assert len(cells(sweep)) == count
    assert Counter(trial.cell_id for trial in sweep.trials) == {trial.cell_id: seeds for trial in cells(sweep)}
    assert len({trial.trial_id for trial in sweep.trials}) == len(sweep.trials) == count * seeds
    assert all(max(each.members) <= seeds for each in sweep.ensembles)


@each_file
def test_a_quick_form_keeps_the_rows_and_ends_soon(name: str) -> None:
    full, made = load(FILES[name]), load(FILES[name], quick=True)

    def rows(sweep: Sweep) -> set[tuple[Any, ...]]:
        names = [name for name in full.varied if name != "model.width"]
        return {(trial.label, *(flatten(trial.config)[each] for each in names)) for trial in sweep.trials}

    assert rows(made) == rows(full)
    assert {trial.config.model.width for trial in made.trials} <= {1, 2, 3}
    assert {trial.config.data.dataset for trial in made.trials} <= {"cifar10", "cifar100"}
    assert {trial.config.evaluate.robustness for trial in made.trials} == {"none"}
    assert made.seeds == (0,)
    needed = {each.of: max(each.members) for each in made.ensembles}
    for cell in cells(made):
        same = [trial for trial in made.trials if trial.cell_id == cell.cell_id]
        assert len(same) == needed.get(cell.label or "", 1)
    assert not made.notes
    assert minutes(made) < 12


def test_the_speed_of_a_core_is_cautious() -> None:
    measured = json.loads((RESULTS / "cifar100_5000.json").read_text())["cells"].values()
    assert min(each["train_flops_per_trial"] / each["wall_s_mean"] for each in measured) > 2 * CORE_FLOPS


# ------------------------------------------------------------------------------------------------- published numbers


def finished(sweep: Sweep) -> list[TrialRow]:
    """Every trial, and every ensemble of each cell, as a run would leave them."""
    metrics = {**dict.fromkeys(METRIC_COLUMNS), **dict.fromkeys(("top1", "top5", "nll_calibrated"), 0.5)}
    done = {"state": "TERMINATED", "metrics": metrics}
    rows = [
        initial_row(trial, sweep).replace(
            **done, epoch=trial.config.optim.epochs, train_flops=trial_flops(trial.config), wall_s=60.0
        )
        for trial in sweep.trials
    ]
    return [*rows, *ensembles(sweep, rows)]


def ensembles(sweep: Sweep, rows: list[TrialRow]) -> Iterator[EnsembleRow]:
    first = {row.cell_id: row for row in reversed(rows)}
    for wanted in sweep.ensembles:
        for row in first.values():
            if row.label == wanted.of:
                columns = {spec.name: getattr(row, spec.name) for spec in dataclasses.fields(row)}
                for count in wanted.members:
                    own = {"trial_id": f"{count}x{row.trial_id}+", "label": f"{count} x {row.label}"}
                    yield EnsembleRow(**{**columns, **own}, members=count)


def is_whole(each: Published) -> bool:
    """Whether it says what the paper trained with, so that a difference from it may be told."""
    return "optim.epochs" in each.where


def ids(rows: list[TrialRow], cell: str, members: int) -> set[str]:
    of = [row for row in rows if row.cell_id == cell]
    return {row.trial_id for row in of if (row.members if isinstance(row, EnsembleRow) else 1) == members}


@each_file
def test_every_published_number_stands_beside_the_cell_that_has_its_settings(name: str) -> None:
    sweep = load(FILES[name])
    rows = finished(sweep)
    for each in sweep.published:
        (metric, *_) = each.metrics
        made = table(rows, metric=metric, published=[each])
        beside = [cell.published for cell in made.cells.values() if cell.published]
        assert len(beside) == bool(each.where), each.label
        assert all(told.same == is_whole(each) for told in beside), each.label
        if is_whole(each):
            meant = cell_id(unflatten(each.where))
            assert [key for key, cell in made.cells.items() if cell.published] == [
                key for key, cell in made.cells.items() if set(cell.trials) & ids(rows, meant, each.members)
            ]
    quick = finished(load(FILES[name], quick=True))
    shown = table(quick, published=[each for each in sweep.published if is_whole(each)])
    assert not any(cell.published for cell in shown.cells.values())


@pytest.mark.parametrize(
    ("name", "fields"),
    [("table1_cifar10", ((), ())), ("figure5_width", (("label", "data.msda"), ("model.width",)))],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_table_of_the_paper_fits_on_a_page(name: str, fields: tuple[list[str], list[str]], tmp_path: Path) -> None:
    sweep = load(FILES[name])
    made = table(finished(sweep), row_fields=fields[0], col_fields=fields[1], baseline=sweep.baseline,
                 published=sweep.published)  # fmt: skip
    if not fields[0]:
        assert made.row_fields == ("label", "data_repetition", "data_msda")
    assert "Overfull" not in compiled(made.to_latex("mixmo table"), tmp_path)


def test_a_number_is_the_same_in_every_file() -> None:
    told: dict[tuple[Any, ...], dict[str, float]] = {}
    count = 0
    for name in CELLS:
        for each in load(FILES[name]).published:
            if is_whole(each):
                known = told.setdefault((*sorted(each.where.items()), each.members), {})
                for metric, value in each.metrics.items():
                    assert known.setdefault(metric, value) == value, (name, each.label)
                    count += 1
    assert count > sum(map(len, told.values()))  # some stand in several files


# ---------------------------------------------------------------------------------------------------------- the page


def comment(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    lines = [line.removeprefix("#").removeprefix(" ") for line in lines[: lines.index(f"name: {path.stem}")]]
    return [line for line in lines if not line.startswith("yaml-language-server:")]


def commands(path: Path) -> list[str]:
    return [re.split(r" {3,}", line.strip())[0] for line in comment(path) if line.startswith("  mixmo")]


def intent(path: Path) -> str:
    return " ".join(" ".join(comment(path)).split("  mixmo")[0].split())


def measured(name: str) -> str:
    """What `benchmarks/learning.py` wrote of a run of the sweep, or of its quick form."""
    lines = []
    for sweep in (name, f"{name}-quick"):
        file = RESULTS / f"{sweep}.json"
        if file.exists():
            found = json.loads(file.read_text())
            told = (
                f"{found['finished']} of {found['planned']} trials{_took(found)}, commit {found['git_commit'][0][:7]}"
            )
            values = ", ".join(f"{cell} {_spread(each['top1'])}" for cell, each in found["cells"].items())
            form = "the quick form, whose table is below, " if "tables" in found else "top1 " + values + ", "
            lines.append(f"{form}{told} ([{file.name}](../{file.relative_to(ROOT)}))")
    return "; ".join(lines) or "not run yet"


def _took(found: Mapping[str, Any]) -> str:
    """By the clock and by the processor, where `benchmarks/quick_forms.py` ran it."""
    run = found.get("run")
    if run is None:
        return ""
    worked = f", {run['cpu_s'] / 60:.1f} of processor" if run["cpu_s"] is not None else ""
    return f" in {run['wall_s'] / 60:.1f} minutes{worked}"


def tables(name: str) -> list[str]:
    """The first table of a quick form that has a number, as `mixmo table` printed it, with its heading and without its
    notes.
    """
    file = RESULTS / f"{name}-quick.json"
    if not file.exists():
        return []
    texts = [each["markdown"] for each in json.loads(file.read_text())["tables"]]
    printed = next((text for text in texts if re.search(r"\d \(\d+\) \|", text)), texts[0]).splitlines()
    assert printed[0].startswith("**quick form, not comparable")
    return [*printed[:2], *(line for line in printed if line.startswith("|")), ""]


def _spread(top1: Mapping[str, Any]) -> str:
    std = f" ± {100 * top1['std']:.2f}" if top1["std"] is not None else ""
    return f"{100 * top1['mean']:.2f}{std} ({top1['n']})"


def section(name: str) -> str:
    path = FILES[name]
    full, made = load(path), load(path, quick=True)
    flops = sum(trial_flops(trial.config) for trial in full.trials)
    return "\n".join([
        f"## {name}", "", intent(path), "", "```sh", *commands(path), "```", "",
        f"- File: [{path.relative_to(ROOT)}](../{path.relative_to(ROOT)})",
        f"- Price: {len(full.trials)} trials ({len(cells(full))} x {len(full.seeds)} seeds) in "
        f"{full.trials[0].config.precision}, {flops:.2g} FLOPs, {_hours(gpu_hours(full))} GPU-hours",
        f"- Quick form: {len(made.trials)} trials, about {minutes(made):.0f} minutes",
        *([f"- Published numbers: {len(full.published) or 'none known'}"] if path.parent.name == "paper" else []),
        f"- Measured so far: {measured(name)}", "", *tables(name),
    ])  # fmt: skip


def _hours(hours: float) -> str:
    return f"about {float(f'{hours:.2g}'):,.0f}"


def page() -> str:
    head, _, rest = PAGE.read_text().partition(MARK)
    return f"{head}{MARK}\n{chr(10).join(map(section, CELLS))}\n{END}{rest.partition(END)[2]}"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python tests/test_paper.py"


def test_the_page_says_by_what_its_prices_are_told() -> None:
    text = " ".join(PAGE.read_text().split())
    for told in (f"{100 * SHARE:.0f} %", f"{PEAK_FLOPS['bf16'] / 1e12:.0f} TFLOP/s", f"{PEAK_FLOPS['fp32'] / 1e12:.0f}",
                 f"{CORE_FLOPS / 1e9:.0f} GFLOP/s"):  # fmt: skip
        assert told in text


def with_logits(store: ResultStore, rows: list[TrialRow]) -> Iterator[TrialRow]:
    """The trials as a run leaves them, each with what the network makes of a few images."""
    labels_N = np.arange(20)
    for row in rows:
        classes = DATASETS[row.config["data_dataset"]].classes
        shape = (row.config["model_subnetworks"], len(labels_N), classes)
        stored = Logits.of(np.random.default_rng(row.position).normal(size=shape), labels_N % classes)
        yield row.replace(logits=store.attempt(row.trial_id, 1, 1, "token").put_logits(stored))


@each_file
def test_the_commands_of_a_file_run(name: str, mixmo: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are printed, in a folder where the sweep was run; `figures` in the test after this one."""
    path = FILES[name]
    sweep, known = load(path), {words for words, _ in COMMANDS}
    monkeypatch.chdir(tmp_path)
    store = ResultStore.open("results", create=True)
    trials = [row for row in finished(sweep) if not isinstance(row, EnsembleRow)]
    combined = {row.label for row in trials} & {each.of for each in sweep.ensembles}
    with store.writer(name, sweep_text=sweep.text) as writer:
        writer.put([row for row in trials if row.label not in combined])
        writer.put([*with_logits(store, [row for row in trials if row.label in combined])])
        writer.close(done=True)
    given = commands(path)
    assert [words for words in given if words.startswith(f"mixmo run {path.relative_to(ROOT)} ")]
    for words in given:
        program, command, *rest = shlex.split(words)
        assert program == "mixmo"
        assert {command, f"{command} {rest[0]}"} & known, words
        if command in ("table", "pareto"):
            assert rest[0] == name
            ended = mixmo(command, *rest)
            assert ended.code == 0, ended.err
            for each in sweep.ensembles:  # of all members at least, in every table and front
                assert f"{max(each.members)} x {each.of}" in ended.out or "--cols" in words, words
            if "--out" in rest:
                assert Path(rest[rest.index("--out") + 1]).stat().st_size > 5000


@pytest.mark.slow
def test_the_figure_of_widths_has_its_ensembles(mixmo: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "figure5_width"
    sweep = load(FILES[name])
    monkeypatch.chdir(tmp_path)
    store = ResultStore.open("results", create=True)
    trials = [row for row in finished(sweep) if not isinstance(row, EnsembleRow)]
    with store.writer(name, sweep_text=sweep.text) as writer:
        writer.put([*with_logits(store, trials)])
        writer.close(done=True)
    (words,) = (words for words in commands(FILES[name]) if words.startswith("mixmo figures"))
    ended = mixmo(*shlex.split(words)[1:])
    assert ended.code == 0, ended.err
    drawn = Path("figures", name, "width.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("2 x vanilla (1)", "2 x CutMix (1)", "vanilla (3)"))


if __name__ == "__main__":
    PAGE.write_text(page())
