"""Ensembles of stored logits: what they predict, who is in them, and that tables keep them apart from trials."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Mixmo
from hypothesis import given
from hypothesis import strategies as st
from made_rows import reached, trial

from mixmo_core.evaluate import summarize
from orchestrator import analysis, ensembles
from orchestrator.analysis import EnsembleRow, table
from orchestrator.errors import UsageError
from orchestrator.rows import METRIC_COLUMNS, TrialRow
from orchestrator.store import Logits, ResultStore

ROOT = Path(__file__).parent.parent
M, N, K = 2, 40, 10
FILE = """\
name: made
trial: {data: {dataset: synthetic}}
ensembles: [{of: cutmix, members: [2, 3]}]
"""


def logits(seed: int, subnetworks: int = M, images: int = N) -> Logits:
    """Of a network that is often right. All have the same images."""
    labels_N = np.random.default_rng(0).integers(0, K, images)
    logits_MNK = np.random.default_rng(seed + 1).normal(size=(subnetworks, images, K))
    logits_MNK += 1.5 * np.eye(K)[labels_N]
    return Logits(logits_MNK.astype(np.float16), labels_N)


def stored(
    folder: Path, rows: list[TrialRow], *, text: str = FILE, told: dict[str, Logits] | None = None
) -> analysis.Results:
    """A store with these trials; those in `told` have logits."""
    store = ResultStore.open(folder, create=True)
    with store.writer(rows[0].sweep, sweep_text=text) as writer:
        for row in rows:
            key = None
            if told and row.trial_id in told:
                key = store.attempt(row.trial_id, writer.fence, 1, "token").put_logits(told[row.trial_id])
            writer.put([row.replace(logits=key)])
    return analysis.load(folder)


def finished(seeds: int, **given: Any) -> list[TrialRow]:
    return [
        reached(trial(seed, **given), 3, gpu_seconds=2.0, wall_s=1.5 + seed, train_flops=1e9) for seed in range(seeds)
    ]


def with_logits(folder: Path, rows: list[TrialRow], **given: Any) -> analysis.Results:
    told = {row.trial_id: logits(row.config["seed"], row.config["model_subnetworks"]) for row in rows}
    return stored(folder, rows, told=told, **given)


def made(results: analysis.Results) -> tuple[list[TrialRow], list[str]]:
    notes: list[str] = []
    return ensembles.rows(results, notes.append), notes


# ------------------------------------------------------------------------------------------------------ what they say


def test_an_ensemble_predicts_with_the_mean_logit_of_all_subnetworks(tmp_path: Path) -> None:
    (pair, *_), _ = made(with_logits(tmp_path, finished(2)))
    both = [logits(0), logits(1)]
    stacked_MNK = np.concatenate([each.logits_MNK for each in both]).astype(np.float64)
    predictions_N = stacked_MNK.mean(axis=0).argmax(axis=-1)
    assert pair.metrics["top1"] == np.mean(predictions_N == both[0].labels_N)
    expected = summarize(torch.from_numpy(stacked_MNK), torch.from_numpy(both[0].labels_N))
    assert {name: pair.metrics[name] for name in expected} == expected
    assert set(pair.metrics) == set(METRIC_COLUMNS)
    assert pair.metrics["loss"] is None  # it was not trained


def test_single_networks_form_an_ensemble_with_diversity(tmp_path: Path) -> None:
    text = FILE.replace("of: cutmix", "of: vanilla")
    (pair, *_), _ = made(with_logits(tmp_path, finished(2, subnetworks=1, label="vanilla"), text=text))
    assert pair.label == "2 x vanilla"
    assert pair.metrics["disagreement"] is not None


def test_the_mean_logit_is_the_geometric_mean_of_the_probabilities() -> None:
    logits_MNK = torch.from_numpy(logits(3).logits_MNK).double()
    geometric_NK = logits_MNK.softmax(dim=-1).log().mean(dim=0).exp()
    torch.testing.assert_close(
        geometric_NK / geometric_NK.sum(dim=-1, keepdim=True), logits_MNK.mean(dim=0).softmax(dim=-1)
    )


@given(
    st.integers(1, 4), st.integers(1, 30), st.integers(2, 12), st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_what_needs_no_torch_is_what_torch_says(M: int, N: int, K: int, seed: int, scale: float, step: float) -> None:
    """Rounded to whole steps, logits are equal now and then, and what is first of equals holds."""
    dice = np.random.default_rng(seed)
    logits_MNK = scale * dice.normal(size=(M, N, K))
    logits_MNK = (np.round(logits_MNK / step) * step if step else logits_MNK).astype(np.float16)
    labels_N = dice.integers(0, K, N)
    expected = summarize(torch.from_numpy(logits_MNK), torch.from_numpy(labels_N))
    found = ensembles.light(logits_MNK, labels_N)
    assert set(found) == ensembles.LIGHT
    assert found == pytest.approx({name: expected[name] for name in ensembles.LIGHT}, rel=1e-12, abs=1e-14)


def test_metrics_that_nobody_asks_for_are_not_made(tmp_path: Path) -> None:
    results = with_logits(tmp_path, finished(2))
    whole, notes = made(results)
    for wanted in (["top1", "nll"], ["top1", "ece"], ["loss"]):
        few = ensembles.rows(results, notes.append, wanted)
        for one, other in zip(few, whole, strict=True):
            assert {name for name, value in one.metrics.items() if value is not None} == set(wanted) - {"loss"}
            assert [one.metrics[name] for name in wanted] == pytest.approx([other.metrics[name] for name in wanted])
            assert one.replace(metrics={}) == other.replace(metrics={})


def test_a_row_has_its_cells_settings_and_its_members_cost(tmp_path: Path) -> None:
    rows = finished(3)
    (pair, three), _ = made(with_logits(tmp_path, rows))
    assert isinstance(pair, EnsembleRow)
    assert isinstance(three, EnsembleRow)
    assert (pair.members, three.members) == (2, 3)
    assert (pair.label, three.label) == ("2 x cutmix", "3 x cutmix")
    assert three.config == rows[0].config
    assert (three.wall_s, three.gpu_seconds, three.train_flops) == (1.5 + 2.5 + 3.5, 6.0, 3e9)
    assert (three.state, three.sweep, three.epoch, three.split) == ("TERMINATED", "made", 3, rows[0].split)


def test_no_store_takes_an_ensemble_for_a_trial(tmp_path: Path) -> None:
    (pair, *_), _ = made(with_logits(tmp_path, finished(2)))
    with pytest.raises(ValueError, match="no attempt"):
        ResultStore.open(tmp_path).attempt(pair.trial_id, 1, 1, "token")
    assert len(analysis.load(tmp_path).rows) == 2


# --------------------------------------------------------------------------------------------------------- who is in it


@pytest.mark.parametrize("seeds", range(8))
def test_members_stand_in_order_of_seed_and_none_is_in_two_ensembles_of_a_size(tmp_path: Path, seeds: int) -> None:
    rows = finished(max(1, seeds))
    results = with_logits(tmp_path, rows[::-1])
    found, notes = made(results)
    ids = [row.trial_id for row in rows]
    for size in (2, 3):
        groups = [row.trial_id.split("+") for row in found if isinstance(row, EnsembleRow) and row.members == size]
        assert groups == [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        told = [note for note in notes if note.startswith(f"note: {size} x cutmix:")]
        rest = len(rows) % size
        if len(rows) < size:
            assert told == [f"note: {size} x cutmix: needs {size} finished seeds, has {len(rows)}"]
        else:
            assert told == ([f"note: {size} x cutmix: the last {rest} of {len(rows)} seeds are left out"] * bool(rest))


@pytest.mark.parametrize("changes", [{"state": "RUNNING"}, {"state": "ERROR"}, {"stopped_early": True}])
def test_a_trial_that_did_not_run_to_its_end_is_no_member(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = finished(3)
    rows[0] = rows[0].replace(**changes)
    found, notes = made(with_logits(tmp_path, rows))
    assert [row.trial_id for row in found] == [f"{rows[1].trial_id}+{rows[2].trial_id}"]
    assert notes == ["note: 3 x cutmix: needs 3 finished seeds, has 2"]


def test_trials_without_logits_are_told_and_passed_over(tmp_path: Path) -> None:
    rows = finished(3)
    found, notes = made(stored(tmp_path, rows, told={row.trial_id: logits(1) for row in rows[1:]}))
    assert [row.trial_id for row in found] == [f"{rows[1].trial_id}+{rows[2].trial_id}"]
    (note,) = notes
    assert note.startswith("note: 3 x cutmix: needs 3 finished seeds with stored logits, has 2: no logits of trial")
    assert rows[0].trial_id in note


def test_members_of_different_images_are_refused(tmp_path: Path) -> None:
    rows = finished(2)
    first, second = logits(0), logits(1)
    for other in (replace(second, labels_N=(second.labels_N + 1) % K), logits(1, images=N + 1)):
        results = stored(
            tmp_path / str(len(other.labels_N)), rows, told={rows[0].trial_id: first, rows[1].trial_id: other}
        )
        with pytest.raises(
            UsageError, match=f"{rows[0].trial_id} and {rows[1].trial_id} .*measured on different images"
        ):
            made(results)


def test_each_cell_has_ensembles_of_its_own(tmp_path: Path) -> None:
    rows = [*finished(2), *finished(2, width=5), *finished(2, method="linear")]
    found, notes = made(with_logits(tmp_path, [row.replace(position=i) for i, row in enumerate(rows)]))
    assert [(row.label, row.config["model_width"]) for row in found] == [("2 x cutmix", 2), ("2 x cutmix", 5)]
    assert notes == [f"note: 3 x w={width}: needs 3 finished seeds, has 2" for width in (2, 5)]


def test_a_label_goes_before_a_method_of_the_same_name(tmp_path: Path) -> None:
    rows = [*finished(2), *finished(2, method="linear", label="cutmix")]
    found, _ = made(with_logits(tmp_path, [row.replace(position=i) for i, row in enumerate(rows)]))
    assert [(row.label, row.config["mixing_method"]) for row in found] == [("2 x cutmix", "linear")]


def test_a_name_that_no_trial_has_is_told(tmp_path: Path) -> None:
    assert made(with_logits(tmp_path, finished(2), text=FILE.replace("cutmix", "gone"))) == (
        [],
        ["note: ensembles of gone: no trial here has this label or mixing method"],
    )


def test_an_ensemble_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    text = FILE.replace("[{of: cutmix, members: [2, 3]}]", "[{of: cutmix, members: [2]}, {of: C, members: [2]}]")
    rows = finished(2, label="C")
    with_logits(tmp_path, rows, text=text)
    found, _ = made(with_logits(tmp_path, [row.replace(sweep="other") for row in rows], text=text))
    assert [row.label for row in found] == ["2 x C"]


@pytest.mark.parametrize("text", ["", "name: made\n", "ensembles: [{of: [}", "ensembles: [{of: cutmix, members: 2}]\n"])
def test_a_file_that_names_none_makes_none(tmp_path: Path, text: str) -> None:
    assert made(with_logits(tmp_path, finished(2), text=text)) == ([], [])


def test_torch_is_not_loaded_to_make_none() -> None:
    code = "import sys; from orchestrator import ensembles; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout


# ------------------------------------------------------------------------------------------------------------- tables

FIELDS = ["label", "model.width", "model.subnetworks", "mixing.method", "members", "cell_id", "sweep"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrialRow], list[TrialRow]]:
    """Trials of two widths with a baseline, and their ensembles."""
    rows = [*finished(3, label="mixed"), *finished(3, label="mixed", width=5), *finished(3, subnetworks=1, label="one")]
    text = FILE.replace("of: cutmix", "of: mixed")
    results = with_logits(
        tmp_path_factory.mktemp("results"), [row.replace(position=i) for i, row in enumerate(rows)], text=text
    )
    return results.rows, made(results)[0]


@given(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True), st.integers(0, 4))
def test_ensembles_change_no_cell_of_the_trials(
    both: tuple[list[TrialRow], list[TrialRow]], fields: list[str], cut: int
) -> None:
    trials, combined = both
    lines, cols = fields[:cut], fields[cut:]

    def values(rows: list[TrialRow]) -> list[tuple[float, ...]]:
        return sorted(
            cell.values for cell in table(rows, row_fields=lines or ["label"], col_fields=cols).cells.values()
        )

    ensembles_alone = values(combined)
    assert values([*trials, *combined]) == sorted([*values(trials), *ensembles_alone])


def test_ensembles_stand_under_the_trials_and_meet_the_baseline(
    both: tuple[list[TrialRow], list[TrialRow]],
) -> None:
    trials, combined = both
    shown = table([*combined, *trials], baseline="one")
    assert [key[0] for key in shown.row_keys] == [
        "mixed",
        "mixed",
        "one",
        "2 x mixed",
        "2 x mixed",
        "3 x mixed",
        "3 x mixed",
    ]
    of = shown.cells[("3 x mixed", 5), ()]
    one = shown.cells[("one", 2), ()]
    assert (of.n, of.planned) == (1, 1)
    assert of.difference == pytest.approx((of.mean or 0) - (one.mean or 0))
    assert "number of trials or ensembles" in shown.to_text()
    assert "number of trials)" in table(trials).to_text()


def test_without_a_label_the_number_of_members_tells_them_apart(both: tuple[list[TrialRow], list[TrialRow]]) -> None:
    trials, combined = both
    shown = table([*trials, *combined], row_fields=["model.width"])
    assert shown.row_fields == ("model_width", "members")
    assert shown.row_keys == ((2, 1), (2, 2), (2, 3), (5, 1), (5, 2), (5, 3))
    assert table(trials, row_fields=["model.width"]).row_fields == ("model_width",)
    assert "| members |" in shown.to_markdown()


def test_the_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = (ROOT / "docs" / "results.md").read_text().split("```python\n")
    (code,) = (block.partition("```")[0] for block in blocks if "ensembles.rows(" in block)
    with_logits(tmp_path / "results", finished(3, sweep="quickstart"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/results.md", "exec"), {})
    assert "| 2 x cutmix |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ on the command line


@pytest.fixture(scope="module")
def mixmo(tmp_path_factory: pytest.TempPathFactory) -> Mixmo:
    program = Mixmo(tmp_path_factory.mktemp("shell"), FILE)
    with_logits(program.folder / "results", finished(4))
    return program


def test_a_table_shows_the_ensembles_of_its_sweep(mixmo: Mixmo) -> None:
    ended = mixmo("table", "made")
    lines = ended.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["-", "2 x cutmix", "3 x cutmix"]
    assert [line.rpartition("(")[2].split()[0] for line in lines[2:5]] == ["4)", "2)", "1)"]
    assert ended.stderr == "note: 3 x cutmix: the last 1 of 4 seeds are left out\n"
    cells = mixmo.json("table", "made", "--rows", "members")["cells"]
    found, _ = made(analysis.load(mixmo.folder / "results"))
    assert [cell["members"] for cell in cells] == [1, 2, 3]
    assert cells[1]["values"] == [row.metrics["top1"] for row in found if row.label == "2 x cutmix"]


def test_a_table_leaves_them_out_on_demand_and_where_they_are_not_known(mixmo: Mixmo) -> None:
    plain = mixmo("table", "made", "--no-ensembles")
    assert " x " not in plain.stdout
    assert plain.stderr == ""
    best = mixmo("table", "made", "--at", "best")
    assert " x " not in best.stdout
    assert "ensembles are of the last epoch" in best.stderr


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("table made", "numpy"), ("pareto made", "numpy"), ("table made --metric=nll", "numpy"),
        ("table made --metric=ece", "torch numpy"), ("table made --no-ensembles", ""), ("table made --at best", ""),
        ("table made --at 3 --no-ensembles", ""), ("verify made", ""),
    ],
)  # fmt: skip
def test_only_an_ensemble_pays_for_numpy_and_only_some_metrics_for_torch(mixmo: Mixmo, words: str, loaded: str) -> None:
    code = (
        "import sys; from orchestrator import cli;"
        " cli.guarded(lambda: cli.app(args=sys.argv[1:], standalone_mode=False));"
        " print(*(name for name in ('torch', 'numpy') if sys.modules.get(name)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split(), "--results", str(mixmo.folder / "results")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == loaded


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_was_run_has_ensembles_of_its_trials(tmp_path: Path) -> None:
    mixmo = Mixmo(
        tmp_path / "shell",
        "name: tiny\ntrial:\n  data: {dataset: synthetic, train_images: 64, batch_size: 32}\n"
        "  model: {depth: 10, width: 1}\n  optim: {epochs: 1}\n  mixing: {method: sum}\n"
        "seeds: 2\nensembles: [{of: sum, members: [2]}]\n",
    )
    mixmo("run", "sweep.yaml", "--yes")
    cells = mixmo.json("table", "tiny", "--metric", "subnetwork_top1_mean", "--rows", "members")["cells"]
    assert [cell["members"] for cell in cells] == [1, 2]
    # Of four subnetworks, the mean is that of the two pairs; half precision may tie two logits.
    assert cells[1]["mean"] == pytest.approx(cells[0]["mean"], abs=0.01)
