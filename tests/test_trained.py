"""Trained networks out of a store, and `mixmo fold`: from a trial that was really trained to a file that runs alone."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from command_line import Mixmo

from mixmo_core import augment, networks, train
from orchestrator import trained
from orchestrator.cli import folding
from orchestrator.plan import initial_row
from orchestrator.store import DamagedError, ResultStore
from orchestrator.sweep import Trial, parse

pytestmark = pytest.mark.slow

FILE = """\
name: tiny
trial:
  data: {dataset: digits, train_images: 64, batch_size: 32}
  model: {depth: 10, width: 1}
  optim: {epochs: 2}
  mixing: {method: linear}
seeds: 4
"""
TRIALS = parse(FILE, source="tiny.yaml").trials


def saved(store: ResultStore, trial: Trial, folder: Path, token: str = "token", until: int = 2) -> list[str]:
    """Train it for so many epochs and store a checkpoint after each."""
    attempt, keys = store.attempt(trial.trial_id, 1, 1, token), []
    for epoch in train.train(trial.config):
        if isinstance(epoch, train.Epoch):
            path = train.save(epoch.state(), folder)
            keys.append(attempt.put_file(path, path.name))
            if epoch.epoch == until:
                break
    return keys


@pytest.fixture(scope="module")
def mixmo(tmp_path_factory: pytest.TempPathFactory) -> Mixmo:
    """Trials: one is finished, one is in epoch 2, one keeps no checkpoint, one waits."""
    program = Mixmo(tmp_path_factory.mktemp("shell"), FILE)
    store = ResultStore.open(program.folder / "results", create=True)
    sweep = parse(FILE, source="sweep.yaml")
    with store.writer("tiny", sweep_text=FILE) as writer:
        rows = [initial_row(trial, sweep) for trial in sweep.trials]
        rows[0] = rows[0].replace(state="TERMINATED", epoch=2)
        rows[1] = rows[1].replace(state="RUNNING", epoch=1)
        rows[2] = rows[2].replace(state="TERMINATED", epoch=2)
        writer.put(rows)
    saved(store, TRIALS[0], tmp_path_factory.mktemp("finished"))
    saved(store, TRIALS[1], tmp_path_factory.mktemp("begun"), until=1)
    return program


@pytest.fixture
def store(mixmo: Mixmo) -> ResultStore:
    return ResultStore.open(mixmo.folder / "results")


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predicted(found: trained.Trained) -> torch.Tensor:
    logits_BK: torch.Tensor = found.net(augment.normalise(images(), "digits")).mean(dim=0)
    return logits_BK


# ------------------------------------------------------------------------------------------------- out of the store


def test_a_finished_trial_is_read_from_its_last_checkpoint(store: ResultStore) -> None:
    found = trained.network(store, TRIALS[0].trial_id[:6])
    assert (found.epoch, found.step, found.is_finished) == (2, None, True)
    assert found.config == TRIALS[0].config
    assert found.row.trial_id == TRIALS[0].trial_id
    last = None
    for epoch in train.train(TRIALS[0].config):
        last = epoch.state()["model"] if isinstance(epoch, train.Epoch) else last
    assert last is not None
    for name, tensor in found.net.state_dict().items():
        assert torch.equal(tensor, last[name]), name


def test_an_unfinished_trial_is_read_as_far_as_it_is(store: ResultStore) -> None:
    found = trained.network(store, TRIALS[1].trial_id)
    assert (found.epoch, found.is_finished) == (1, False)


def test_a_checkpoint_that_is_of_no_use_is_told_and_the_one_before_it_taken(tmp_path: Path, mixmo: Mixmo) -> None:
    store = ResultStore.open(tmp_path / "results", create=True)
    with store.writer("tiny", sweep_text=FILE) as writer:
        writer.put([initial_row(TRIALS[0], parse(FILE, source="sweep.yaml")).replace(state="TERMINATED")])
    keys = saved(store, TRIALS[0], tmp_path / "scratch")
    store.folder.put(keys[1], b"junk")
    told: list[str] = []
    assert trained.network(store, TRIALS[0].trial_id, told.append).epoch == 1
    assert len(told) == 1
    assert "is of no use" in told[0]
    store.folder.put(keys[0], b"junk")
    with pytest.raises(DamagedError, match=r"no checkpoint of trial .* is whole"):
        trained.network(store, TRIALS[0].trial_id, told.append)


def test_a_foreign_checkpoint_is_not_taken(tmp_path: Path) -> None:
    store = ResultStore.open(tmp_path / "results", create=True)
    with store.writer("tiny", sweep_text=FILE) as writer:
        writer.put([initial_row(TRIALS[0], parse(FILE, source="sweep.yaml")).replace(state="TERMINATED")])
    for epoch in train.train(TRIALS[1].config):
        if isinstance(epoch, train.Epoch):
            path = train.save(epoch.state(), tmp_path / "scratch")
            store.attempt(TRIALS[0].trial_id, 1, 1, "token").put_file(path, path.name)
    told: list[str] = []
    with pytest.raises(DamagedError):
        trained.network(store, TRIALS[0].trial_id, told.append)
    assert all(f"it is of trial {TRIALS[1].trial_id}" in line for line in told)


# ------------------------------------------------------------------------------------------------------ mixmo fold


def test_a_folded_trial_predicts_what_its_ensemble_does(mixmo: Mixmo, store: ResultStore) -> None:
    ended = mixmo("fold", TRIALS[0].trial_id[:7], "net.pt2")
    assert ended.stdout == "net.pt2\n"
    program = torch.export.load(mixmo.folder / "net.pt2").module()
    with torch.no_grad():
        logits_BK = program(images())
    expected_BK = predicted(trained.network(store, TRIALS[0].trial_id))
    assert (logits_BK - expected_BK).abs().max() < 1e-5 * expected_BK.abs().max()
    lines = ended.stderr.splitlines()
    parameters = sum(each.numel() for each in program.parameters())
    assert lines[0] == f"trial {TRIALS[0].trial_id}, epoch 2 of 2, as one network of {parameters:,} parameters"
    assert lines[1].startswith("lost: what each of the 2 subnetworks predicts by itself")
    assert lines[2:] == ["input: pixels (batch, 1, 8, 8) uint8", "output: logits (batch, 10) float32"]


def test_onnx_is_written_as_well(mixmo: Mixmo, store: ResultStore) -> None:
    document = mixmo.json("fold", TRIALS[0].trial_id, "net.onnx")
    assert (document["schema"], document["file"], document["epoch"]) == ("mixmo.fold/1", "net.onnx", 2)
    session = onnxruntime.InferenceSession(mixmo.folder / "net.onnx")
    (logits_BK,) = session.run(None, {"pixels": images().numpy()})
    expected_BK = predicted(trained.network(store, TRIALS[0].trial_id))
    assert (torch.from_numpy(logits_BK) - expected_BK).abs().max() < 1e-5 * expected_BK.abs().max()


def test_an_unfinished_trial_is_folded_and_that_is_told(mixmo: Mixmo) -> None:
    ended = mixmo("fold", TRIALS[1].trial_id, "begun.pt2")
    assert "epoch 1 of 2" in ended.stderr
    assert "note: the trial is running: this is its newest checkpoint, not its result" in ended.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("ffff none.pt2", 5, "no trial in .* has an id that begins with 'ffff'"),
        (f"{TRIALS[2].trial_id} none.pt2", 5, "no checkpoint of trial .* is kept.*checkpoints: {keep: last}"),
        (f"{TRIALS[3].trial_id} none.pt2", 5, "it has saved none yet. `mixmo status tiny`"),
        (f"{TRIALS[0].trial_id} net.pt", 2, r"net.pt: the suffix decides what is written: .pt2 or .onnx \(got '.pt'\)"),
        (f"{TRIALS[0].trial_id} there.pt2", 2, "there.pt2: it is there already; --force replaces it"),
        (f"{TRIALS[0].trial_id} no/net.pt2", 2, "no/net.pt2: there is no folder no"),
        (f"{TRIALS[0].trial_id} folder.pt2", 2, "folder.pt2: this is a folder"),
    ],
)
def test_what_cannot_be_folded_is_one_clear_message(mixmo: Mixmo, words: str, code: int, told: str) -> None:
    (mixmo.folder / "there.pt2").write_text("mine")
    (mixmo.folder / "folder.pt2").mkdir(exist_ok=True)
    ended = mixmo("fold", *words.split(), code=code)
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(told, ended.stderr), ended.stderr
    assert (mixmo.folder / "there.pt2").read_text() == "mine"
    assert not (mixmo.folder / "none.pt2").exists()


def test_the_blocks_of_the_page_run(mixmo: Mixmo, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    (plain,) = (block for block in blocks if "torch.export.load(" in block)
    (whole,) = (block for block in blocks if "trained.network(" in block)
    mixmo("fold", TRIALS[0].trial_id, "net.pt2", "--force")
    monkeypatch.chdir(mixmo.folder)
    names: dict[str, Any] = {"pixels_BCHW": images()}
    exec(compile(plain + whole.replace("0123456", TRIALS[0].trial_id), "docs/results.md", "exec"), names)
    torch.testing.assert_close(names["logits_BK"], names["logits_MBK"].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_force_replaces_a_file(mixmo: Mixmo) -> None:
    (mixmo.folder / "old.pt2").write_text("old")
    mixmo("fold", TRIALS[0].trial_id, "old.pt2", "--force")
    torch.export.load(mixmo.folder / "old.pt2")


HIDDEN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("onnx") else find(name, package)
"""
FULL = """
import resource, tempfile
make = tempfile.mkdtemp
def mkdtemp(suffix=None, prefix=None, dir=None):
    if prefix == ".export-":  # the checkpoint is read by now
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return make(suffix, prefix, dir)
tempfile.mkdtemp = mkdtemp
"""


def on_a_machine(fault: str, mixmo: Mixmo, name: str) -> subprocess.CompletedProcess[str]:
    """`mixmo fold` where packages are hidden, or where no file may be large."""
    return subprocess.run(
        [sys.executable, "-c", f"{fault}\nfrom orchestrator.cli import main\nmain()", "fold", TRIALS[0].trial_id, name],
        cwd=mixmo.folder, env=mixmo._environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_the_packages_of_onnx_the_command_that_installs_them_is_told(mixmo: Mixmo) -> None:
    ended = on_a_machine(HIDDEN, mixmo, "hidden.onnx")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.search(r"^mixmo: hidden.onnx needs onnx .*pip install", ended.stderr, re.MULTILINE), ended.stderr
    assert not (mixmo.folder / "hidden.onnx").exists()


@pytest.mark.parametrize("name", ["full.pt2", "full.onnx"])
def test_a_full_disk_ends_with_7_and_leaves_nothing(mixmo: Mixmo, name: str) -> None:
    ended = on_a_machine(FULL, mixmo, name)
    assert (ended.returncode, ended.stdout) == (7, ""), ended.stderr
    assert ended.stderr.startswith(f"mixmo: cannot write {name}: "), ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in mixmo.folder.iterdir() if "full" in path.name or "export" in path.name] == []


def test_the_command_knows_what_can_be_written() -> None:
    from mixmo_core import export

    assert tuple(export._WRITERS) == folding.SUFFIXES


def test_a_checkpoint_with_the_authors_names_is_measured_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = train.train(TRIALS[0].config)
    own = networks.build(TRIALS[0].config)
    own.load_state_dict(last.state()["model"])
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 2, "classifier_state_dict": networks.reference_tensors(own)}, "checkpoint.ckpt")
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    (block,) = [each.partition("```")[0] for each in page.split("```python\n") if "load_reference" in each]
    settings = (
        '{"data.dataset": "digits", "data.train_images": 64, "data.batch_size": 32, "model.depth": 10, '
        '"model.width": 1, "mixing.method": "linear"}'
    )
    given = re.sub(r"\{.*\}", settings, block).replace('data_dir="data"', "data_dir=None")
    names: dict[str, Any] = {}
    exec(compile(given, "docs/results.md", "exec"), names)
    expected = {name: value for name, value in last.metrics.items() if name not in ("loss", "lr")}
    assert names["metrics"] == expected
