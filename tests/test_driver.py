"""Whole sweeps through the command line: run to the end, killed, drained, refused, failing."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import made_cifar
import pytest
from command_line import PATIENCE_S, Mixmo, kill

from mixmo_core.config import TrialConfig, unflatten
from orchestrator import driver
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import EpochReport, Update
from orchestrator.errors import UsageError
from orchestrator.ledger import Ledger
from orchestrator.rows import TrialRow, config_columns
from orchestrator.store import ResultStore

SWEEP = """
name: small
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1}
  optim: {epochs: 6, lr: 0.1}
blocks:
  - {label: vanilla, set: {model.subnetworks: 1}}
  - {label: cut, set: {mixing.method: cutmix}}
seeds: 2
resources: {gpus_per_worker: 0}
checkpoints: {every_s: 0.2}
"""
LONG = SWEEP.replace("train_images: 200", "train_images: 800").replace("epochs: 6", "epochs: 12")
"""Seconds of training on the fastest machine: what is to be disturbed must not be over before it is looked at."""


def reached(epochs: int) -> Callable[[list[TrialRow]], bool]:
    return lambda rows: sum(row.epoch for row in rows) >= epochs


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def workers(driver: int) -> list[int]:
    """Processes of Ray Train's workers below a driver."""
    return [
        pid for pid in descendants(driver) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Mixmo:
    mixmo = Mixmo(tmp_path_factory.mktemp("undisturbed"), SWEEP)
    mixmo("run", "sweep.yaml")
    return mixmo


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_runs_to_its_end_and_again_runs_nothing(undisturbed: Mixmo) -> None:
    rows = undisturbed.rows()
    assert [(row.label, row.config["seed"], row.state, row.epoch) for row in rows] == [
        ("vanilla", 0, "TERMINATED", 6),
        ("cut", 0, "TERMINATED", 6),
        ("vanilla", 1, "TERMINATED", 6),
        ("cut", 1, "TERMINATED", 6),
    ]
    for row in rows:
        assert row.attempts == 1
        assert (row.wall_s > 0, (row.images_per_s or 0) > 0, (row.train_flops or 0) > 0) == (True, True, True)
        assert (row.hosts, row.device_name, row.torch_version, row.ray_version) != (None, None, None, None)
        assert row.error is None
        assert ResultStore.open(undisturbed.folder / "results").logits(row).logits_MNK.shape == (
            1 if row.label == "vanilla" else 2, 360, 10
        )  # fmt: skip
        assert row.best_top1 == max(
            each.metrics["top1"] or 0
            for each in ResultStore.open(undisturbed.folder / "results").epoch_rows("small", row.trial_id)
        )
    undisturbed("verify", "small")
    again = undisturbed("run", "sweep.yaml")
    assert "nothing to run" in again.stderr
    assert undisturbed.rows() == rows


@pytest.mark.ray
@pytest.mark.slow
def test_another_sweep_takes_over_what_this_one_has_finished(undisturbed: Mixmo) -> None:
    (undisturbed.folder / "other.yaml").write_text(SWEEP.replace("name: small", "name: other"))
    undisturbed("run", "other.yaml")
    rows = ResultStore.open(undisturbed.folder / "results").trial_rows("other")
    assert [row.cached_from for row in rows] == ["small"] * 4
    assert [row.metrics for row in rows] == [row.metrics for row in undisturbed.rows()]
    assert [row.logits for row in rows] == [row.logits for row in undisturbed.rows()]
    assert None not in [row.logits for row in rows]
    undisturbed("verify", "other")


@pytest.mark.ray
@pytest.mark.slow
def test_parquet_opens_in_duckdb_and_pandas(undisturbed: Mixmo) -> None:
    import duckdb
    import pandas as pd

    folder = undisturbed.folder / "results/sweeps/small"
    top1 = "select label, avg(top1), count(*) from read_parquet(?) group by label order by label"
    by_duckdb = duckdb.execute(top1, [str(folder / "trials.parquet")]).fetchall()
    frame = pd.read_parquet(folder / "trials.parquet")
    assert [(label, count) for label, _, count in by_duckdb] == [("cut", 2), ("vanilla", 2)]
    assert by_duckdb[0][1] == pytest.approx(frame[frame["label"] == "cut"]["top1"].mean())
    epochs = pd.read_parquet(folder / "epochs").drop_duplicates(["trial_id", "epoch"])
    assert len(epochs) == 24


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    undisturbed, mixmo = (Mixmo(tmp_path / name, LONG) for name in ("undisturbed", "killed"))
    moments = random.Random(os.environ.get("MIXMO_TEST_SEED", "1"))
    undisturbed("run", "sweep.yaml")
    for _ in range(2):
        enough = mixmo.epochs() + moments.randint(1, 8)
        running = mixmo.start("run", "sweep.yaml")
        mixmo.until(running, reached(enough))
        kill(running)
    mixmo("run", "sweep.yaml")
    mixmo("verify", "small")
    assert mixmo.results() == undisturbed.results()
    assert mixmo("table", "small", "--format", "csv").stdout == undisturbed("table", "small", "--format", "csv").stdout


@pytest.mark.ray
@pytest.mark.slow
def test_one_driver_at_a_time_and_ctrl_c_lets_running_trials_finish(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, LONG)
    first = mixmo.start("run", "sweep.yaml")
    mixmo.until(first, lambda rows: any(row.state == "RUNNING" for row in rows))
    refused = mixmo("run", "sweep.yaml", code=6)
    assert f"process {first.pid}" in refused.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130
    states = {row.state for row in mixmo.rows()}
    assert states <= {"TERMINATED", "PENDING"}
    assert "TERMINATED" in states
    mixmo("run", "sweep.yaml")
    assert {row.state for row in mixmo.rows()} == {"TERMINATED"}
    mixmo("verify", "small")


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_ends_at_once_with_all_that_had_arrived(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, SWEEP.replace("epochs: 6", "epochs: 300").replace("every_s: 0.2", "keep: none"))
    running = mixmo.start("run", "sweep.yaml")
    mixmo.until(running, reached(3))
    running.terminate()
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 143, err
    assert {row.state for row in mixmo.rows()} == {"PENDING"}
    lease = ResultStore.open(tmp_path / "results").lease("small")
    assert lease is None or lease.released
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("every_s: 0.2", "keep: none"))
    mixmo("run", "sweep.yaml")
    assert {row.state for row in mixmo.rows() if row.epochs == 6} == {"TERMINATED"}
    store = ResultStore.open(tmp_path / "results")
    assert [store.checkpoints(row.trial_id) for row in mixmo.rows() if row.epochs == 6] == [[]] * 4
    # The trials that the file has dropped are over, and still there to go on with.
    assert {row.state for row in mixmo.rows() if row.epochs == 300} == {"CANCELLED"}
    mixmo("verify", "small")


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_loses_its_worker_too_often_fails_alone_and_can_be_run_again(tmp_path: Path) -> None:
    mixmo = Mixmo(tmp_path, LONG + "retry: {crash: 0}\n")
    running = mixmo.start("run", "sweep.yaml")
    mixmo.until(running, lambda rows: any(row.state == "RUNNING" and row.epoch >= 1 for row in rows))
    victims = workers(running.pid)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 3, err
    failed = [row for row in mixmo.rows() if row.state == "ERROR"]
    assert [row.error_cause for row in failed] == ["crash"]
    assert sum(row.state == "TERMINATED" for row in mixmo.rows()) == 3

    mixmo("run", "sweep.yaml", code=3)  # a failure stays one until it is asked for again
    mixmo("run", "sweep.yaml", "--retry-failed")
    assert {row.state for row in mixmo.rows()} == {"TERMINATED"}
    mixmo("verify", "small")


# --------------------------------------------------------------------------------------------- the ledger, without Ray

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = unflatten({"data.dataset": "digits", "optim.epochs": 4, "model.depth": 10, "model.width": 1})


def ledger(config: TrialConfig = CONFIG) -> Ledger:
    row = TrialRow(
        sweep="s", position=0, trial_id="0" * 12, digest="0" * 64, cell_id="1" * 12, epochs=4,
        config=config_columns(config),
    )  # fmt: skip
    return Ledger({0: row}, {0: config}, fence=3, first_seq=10, origin={"git_commit": "c0ffee"})


def ledger_copy(books: Ledger) -> Ledger:
    return replace(books, rows=dict(books.rows))


def update(seq: int, kind: Any, **told: Any) -> Update:
    return Update(seq=seq, time=NOW, kind=kind, index=0, attempt=told.pop("attempt", 1), **told)


def epochs(*top1: float, first: int = 1) -> list[EpochReport]:
    return [
        EpochReport(
            epoch=epoch, metrics={"loss": 1.0, "top1": value}, wall_s=2.0 * epoch, gpu_seconds=0.0, images_per_s=9.0
        )
        for epoch, value in enumerate(top1, start=first)
    ]


def test_a_trial_in_the_ledger_from_pending_to_terminated() -> None:
    books = ledger()
    row, rows = books.apply(update(1, "started", hosts=("b", "a"), device_name="d", torch_version="2"))
    assert (row.state, row.attempts, row.hosts, row.git_commit, rows) == ("RUNNING", 1, "a b", "c0ffee", [])
    row, rows = books.apply(update(2, "epochs", epochs=epochs(0.2, 0.6), checkpoint="key"))
    assert [(each.epoch, each.metrics["top1"], each.order) for each in rows] == [
        (1, 0.2, (3, 1, 12)),
        (2, 0.6, (3, 1, 12)),
    ]
    assert (row.epoch, row.wall_s, row.best_top1, row.best_epoch, row.checkpoint) == (2, 4.0, 0.6, 2, "key")
    books.apply(update(3, "epochs", epochs=epochs(0.5, 0.6, first=3)))
    row, _ = books.apply(update(4, "ended", state="TERMINATED"))
    assert (row.state, row.epoch, row.metrics["top1"], row.best_epoch, row.order) == (
        "TERMINATED",
        4,
        0.6,
        2,
        (3, 1, 14),
    )


def test_a_checkpoint_in_the_middle_of_an_epoch_changes_nothing_else_in_the_row() -> None:
    books = ledger()
    books.apply(update(1, "started"))
    row, rows = books.apply(update(2, "epochs", checkpoint="epoch-00001-step"))
    assert (row.state, row.epoch, row.checkpoint, row.metrics, rows) == ("RUNNING", 0, "epoch-00001-step", {}, [])
    before, _ = books.apply(update(3, "epochs", epochs=epochs(0.2, 0.6), checkpoint="epoch-00002"))
    row, rows = books.apply(update(4, "epochs", checkpoint="epoch-00003-step"))
    assert rows == []
    assert row == before.replace(checkpoint="epoch-00003-step", seq=14)
    row, _ = books.apply(update(5, "epochs"))  # the store took none
    assert row.checkpoint == "epoch-00003-step"
    row, _ = books.apply(update(6, "ended", state="TERMINATED", logits="logits"))
    assert (row.checkpoint, row.logits) == ("epoch-00003-step", "logits")


def test_a_lost_trial_waits_again_and_its_next_attempt_repeats_epochs_without_harm() -> None:
    books = ledger()
    books.apply(update(1, "started"))
    books.apply(update(2, "epochs", epochs=epochs(0.2, 0.6)))
    row, _ = books.apply(update(3, "lost", text="a worker died", cause="crash"))
    assert row.state == "PENDING"
    row, _ = books.apply(update(4, "started", attempt=2))
    assert (row.state, row.attempts) == ("RUNNING", 2)
    row, rows = books.apply(update(5, "epochs", attempt=2, epochs=epochs(0.2)))
    assert [each.order for each in rows] == [(3, 2, 15)]
    assert (row.epoch, row.best_epoch) == (1, 1)  # what was thrown back is no result


def test_a_paused_trial_keeps_what_it_has_done_and_a_retried_one_is_no_failure_any_more() -> None:
    books = ledger()
    books.apply(update(1, "started"))
    books.apply(update(2, "epochs", epochs=epochs(0.2, 0.6), checkpoint="before"))
    row, _ = books.apply(update(3, "paused", checkpoint="key"))
    assert (row.state, row.epoch, row.checkpoint, row.metrics["top1"]) == ("PAUSED", 2, "key", 0.6)
    row, _ = books.apply(update(4, "started", attempt=2))
    assert (row.state, row.attempts) == ("RUNNING", 2)
    row, _ = books.apply(update(5, "ended", attempt=2, state="CANCELLED", cause="cancelled by ada@lab"))
    assert (row.state, row.error_cause, row.checkpoint) == ("CANCELLED", "cancelled by ada@lab", "key")
    row, _ = books.apply(update(6, "retried", attempt=2))
    assert (row.state, row.error_cause, row.epoch, row.order) == ("PENDING", None, 2, (3, 2, 16))


def test_a_result_of_another_sweep_holds_against_what_was_known_here() -> None:
    books, theirs = ledger(), replace(ledger(), fence=1)
    books.apply(update(1, "started", attempt=4))
    _, old = books.apply(update(2, "epochs", attempt=4, epochs=epochs(0.1)))
    books.apply(update(3, "lost", attempt=4))
    theirs.apply(update(1, "started"))
    _, new = theirs.apply(update(2, "epochs", epochs=epochs(0.2, 0.3, 0.4, 0.6)))
    result, _ = theirs.apply(update(3, "ended", state="TERMINATED", logits="logits"))
    row, taken = books.take(update(4, "withdrawn", attempt=4), result.replace(sweep="theirs"), new)
    assert (row.sweep, row.cached_from, row.state, row.metrics["top1"], row.logits) == (
        "s", "theirs", "TERMINATED", 0.6, "logits",
    )  # fmt: skip
    assert row.order == (3, 4, 14)
    assert {each.order for each in taken} == {row.order}
    assert min(each.order for each in taken) > max(each.order for each in old)
    assert books.rows[0] == row


def test_an_undefined_metric_leaves_nothing_of_an_earlier_epoch() -> None:
    books = ledger()
    books.apply(update(1, "started"))
    told = ({"top1": 0.5, "tace": 0.1, "loss": 3.0}, {"top1": 0.6, "loss": 2.0}, {"loss": 1.0})
    for number, metrics in enumerate(told, start=1):
        report = EpochReport(epoch=number, metrics=metrics, wall_s=1.0, gpu_seconds=0.0, images_per_s=9.0)
        row, _ = books.apply(update(1 + number, "epochs", epochs=[report]))
    assert row.metrics == {"top1": 0.6, "loss": 1.0}  # the third epoch was not evaluated


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_row_says_on_which_split_it_is_measured(split: str) -> None:
    row, _ = ledger(unflatten({"data.dataset": "digits", "evaluate.split": split})).apply(update(1, "started"))
    assert row.split == split


def test_missing_files_are_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_cifar.forget()
    made_cifar.write_cifar10(tmp_path, monkeypatch)
    text = """
name: robust
trial:
  data: {dataset: cifar10, batch_size: 40}
  model: {depth: 10, width: 1}
  evaluate: {robustness: cifar_c}
blocks: [{label: all}]
"""
    file = tmp_path / "robust.yaml"
    file.write_text(text)
    sweep = sweeps.load(file)
    with pytest.raises(UsageError, match=r"no folder CIFAR-10-C in it.*mixmo data get cifar10_c DEST"):
        driver.check(sweep, tmp_path)
    made_cifar.write_cifar10_c(tmp_path, monkeypatch)
    driver.check(sweep, tmp_path)


def test_a_failed_trial_keeps_its_traceback_and_a_new_start_clears_it() -> None:
    books = ledger()
    books.apply(update(1, "started"))
    row, _ = books.apply(update(2, "ended", state="ERROR", text="Traceback ...", cause="ValueError: no"))
    assert (row.state, row.error, row.error_cause) == ("ERROR", "Traceback ...", "ValueError: no")
    row, _ = books.apply(update(3, "started", attempt=2))
    assert (row.error, row.error_cause) == (None, None)


def test_a_checkpoint_that_is_not_kept_is_not_named() -> None:
    books = ledger()
    books.keep_checkpoint = False
    books.apply(update(1, "started"))
    row, _ = books.apply(update(2, "epochs", epochs=epochs(0.1, 0.2, 0.3, 0.4), checkpoint="key"))
    assert row.checkpoint == "key"
    failed, _ = ledger_copy(books).apply(update(3, "ended", state="ERROR", text="Traceback ...", cause="no"))
    assert failed.checkpoint == "key"  # it is there, to look into or to go on from
    row, _ = books.apply(update(3, "ended", state="TERMINATED", logits="logits"))
    assert (row.checkpoint, row.logits) == (None, "logits")
