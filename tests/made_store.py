"""A small store with everything in it that this version writes, from real trainings, and nothing of this machine."""

import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mixmo_core import train
from orchestrator import analysis
from orchestrator.dispatcher import EpochReport
from orchestrator.plan import initial_row
from orchestrator.rows import EpochRow, TrialRow
from orchestrator.store import AttemptFolder, Logits, Process, ResultStore, SweepWriter
from orchestrator.store import writer as writing
from orchestrator.sweep import Trial, parse

SWEEP = "kept"
TEXT = f"""\
name: {SWEEP}
trial:
  data: {{dataset: digits, train_images: 64, batch_size: 32, repetition: 1}}
  model: {{depth: 10, width: 1}}
  optim: {{epochs: 2}}
blocks:
  - label: linear
    set: {{mixing.method: linear}}
seeds: 4
"""
FINISHED, FAILED, RUNNING, WAITING = range(4)
"""What became of the trials, by their seed."""
NOW = datetime(2026, 11, 24, tzinfo=UTC)
_TIMES = {"gpu_seconds": 0.0, "images_per_s": 1000.0}
NOBODY = Process(host="host", boot="a machine that is no more", pid=1, started="1")
MACHINE: dict[str, Any] = {
    "torch_version": "2.14.1", "ray_version": "2.60.0", "device_name": "a processor", "hosts": "host",
    "git_dirty": False, "git_commit": "0123456789abcdef0123456789abcdef01234567",
}  # fmt: skip


def record(folder: Path) -> None:
    """Write the store, and beside it what readers are to find in it."""
    unfinished = folder.with_name(f".{folder.name}")
    before, writing.MERGED_AT = writing.MERGED_AT, 2
    try:
        store = ResultStore.open(unfinished / "results", create=True)
        trials = parse(TEXT, source="kept.yaml").trials
        with tempfile.TemporaryDirectory() as scratch:
            _first_driver(store, trials, Path(scratch))
            _second_driver(store, trials, Path(scratch))
    finally:
        writing.MERGED_AT = before
    (unfinished / "results/sweeps" / SWEEP / ".lock").unlink()  # of the folder at work
    (unfinished / "expected.json").write_text(json.dumps(found(store), indent=1) + "\n")
    here = [name.encode() for name in (socket.gethostname(), str(Path.home()), str(Path.cwd())) if len(name) > 4]
    for path in filter(Path.is_file, unfinished.rglob("*")):
        assert not [name for name in here if name in path.read_bytes()], f"{path} names this machine"
    unfinished.rename(folder)


def found(store: ResultStore) -> dict[str, Any]:
    """What the readers make of the store."""
    loaded = analysis.load(store.uri, SWEEP)
    finished = store.trial_rows(SWEEP)[FINISHED]
    logits_MNK = store.logits(finished).logits_MNK
    table = analysis.table(loaded.rows, row_fields=["label"], metric="nll")
    return {
        "trials": [[r.trial_id, r.state, r.epoch, r.attempts, r.metrics["top1"]] for r in loaded.rows],
        "epochs": [[r.trial_id, r.epoch, r.fence, r.attempt, r.metrics["top1"]] for r in store.epoch_rows(SWEEP)],
        "events": [[each.time.isoformat(), each.kind, each.text, each.trial_id] for each in store.events(SWEEP)],
        "checkpoints": [store.checkpoints(row.trial_id) for row in loaded.rows],
        "logits": [list(logits_MNK.shape), float(logits_MNK.sum(dtype=float))],
        "log": store.log(finished.trial_id),
        "table": [[list(line), list(cell.values)] for (line, _), cell in table.cells.items()],
        "sweep": store.sweep_file(SWEEP),
    }  # fmt: skip


def _first_driver(store: ResultStore, trials: tuple[Trial, ...], scratch: Path) -> None:
    """A trial that finishes, one that fails in its second epoch, one that loses its first attempt."""
    sweep = parse(TEXT, source="kept.yaml")
    with _writer(store) as writer:
        writer.put([initial_row(trial, sweep).replace(**MACHINE) for trial in trials])
        for index in (FINISHED, FAILED, RUNNING):
            row = _begun(writer, trials[index], attempt=1)
            attempt = store.attempt(row.trial_id, writer.fence, 1, "1a2b")
            for epoch, reports in _trained(trials[index]):
                row = _told(writer, row, reports)
                if index == FINISHED and epoch.epoch == 2:
                    row = _ended(writer, row, attempt, epoch, reports, scratch)
                if index == FAILED:
                    error = {
                        "error": "Traceback:\nRuntimeError: no",
                        "error_cause": "RuntimeError: no",
                        "state": "ERROR",
                    }
                    writer.put([row := row.replace(**error)])
                    writer.event("error", "RuntimeError: no", row.trial_id, "RuntimeError: no")
                    break
            writer.flush(force=True)


def _second_driver(store: ResultStore, trials: tuple[Trial, ...], scratch: Path) -> None:
    """The trial that was lost begins anew, and is stopped in its second epoch."""
    with _writer(store) as writer:
        row = _begun(writer, trials[RUNNING], attempt=2)
        attempt = store.attempt(row.trial_id, writer.fence, 2, "3c4d")
        ((_, reports), *_) = _trained(trials[RUNNING], until=1)
        row = _told(writer, row, reports)
        for told in train.train(trials[RUNNING].config, save_when=lambda: True):
            if isinstance(told, train.Moment) and (told.epoch, told.step) == (2, 1):
                key = _saved(attempt, {**told.state(), "rows": list(map(asdict, reports)), "logits": None}, scratch)
                writer.put([row.replace(checkpoint=key)])
                break


@contextlib.contextmanager
def _writer(store: ResultStore) -> Iterator[SweepWriter]:
    ticks = (NOW + timedelta(seconds=second) for second in range(10**6))
    with store.writer(
        SWEEP, sweep_text=TEXT, holder="somebody@host", process=NOBODY, now=lambda: next(ticks)
    ) as writer:
        yield writer


def _begun(writer: SweepWriter, trial: Trial, attempt: int) -> TrialRow:
    row = next(row for row in writer.rows if row.trial_id == trial.trial_id)
    row = row.replace(state="RUNNING", attempt=attempt, attempts=attempt, epoch=0, started_at=NOW, seq=row.seq + 1)
    writer.put([row])
    writer.event("running", "", row.trial_id)
    return row


def _trained(trial: Trial, until: int = 2) -> Iterator[tuple[train.Epoch, list[EpochReport]]]:
    """Each epoch, and the reports up to it, as a gang makes them but for the times."""
    reports: list[EpochReport] = []
    for epoch in train.train(trial.config):
        assert isinstance(epoch, train.Epoch)
        number = epoch.epoch
        reports.append(EpochReport(**_TIMES, epoch=number, metrics=epoch.metrics, wall_s=2.5 * number))
        yield epoch, list(reports)
        if number == until:
            return


def _told(writer: SweepWriter, row: TrialRow, reports: list[EpochReport]) -> TrialRow:
    last = reports[-1]
    row = row.replace(
        epoch=last.epoch, seq=row.seq + 1, metrics=last.metrics, wall_s=last.wall_s, images_per_s=last.images_per_s,
        updated_at=NOW + timedelta(seconds=last.epoch), best_top1=max(each.metrics["top1"] for each in reports),
        best_epoch=max(reports, key=lambda each: each.metrics["top1"]).epoch,
    )  # fmt: skip
    writer.add([
        EpochRow(
            sweep=SWEEP, trial_id=row.trial_id, epoch=last.epoch, attempt=row.attempt, fence=writer.fence, seq=row.seq,
            updated_at=NOW + timedelta(seconds=last.epoch), wall_s=last.wall_s, gpu_seconds=last.gpu_seconds,
            images_per_s=last.images_per_s, metrics=last.metrics,
        )
    ])  # fmt: skip
    writer.put([row])
    return row


def _ended(
    writer: SweepWriter, row: TrialRow, attempt: AttemptFolder, epoch: train.Epoch, reports: list[EpochReport],
    scratch: Path,
) -> TrialRow:  # fmt: skip
    assert epoch.logits is not None
    assert epoch.labels is not None
    logits = attempt.put_logits(Logits.of(epoch.logits.numpy(), epoch.labels.numpy()))
    key = _saved(attempt, {**epoch.state(), "rows": list(map(asdict, reports)), "logits": logits}, scratch)
    attempt.put_log(0, "2026-11-24 00:00:02 epoch 2/2\n")
    row = row.replace(state="TERMINATED", checkpoint=key, logits=logits, seq=row.seq + 1)
    writer.put([row])
    writer.event("terminated", "all epochs trained", row.trial_id)
    return row


def _saved(attempt: AttemptFolder, state: dict[str, Any], scratch: Path) -> str:
    path = train.save(state, scratch)
    return attempt.put_file(path, path.name)
