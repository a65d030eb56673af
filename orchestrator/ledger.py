"""What happened, as rows: the dispatcher's updates turned into the tables of a sweep. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from mixmo_core import cost
from mixmo_core.config import TrialConfig, parts
from orchestrator.causes import fingerprint
from orchestrator.dispatcher import EpochReport, Update
from orchestrator.rows import NO_ERROR, EpochRow, TrialRow


@dataclass
class Ledger:
    """The rows of the sweep as they stand. `apply` is all that changes them."""

    rows: dict[int, TrialRow]
    """By position."""
    configs: dict[int, TrialConfig]
    fence: int
    first_seq: int
    """Updates are numbered on from here, so that `seq` rises over all drivers of the sweep."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Columns that are the same for all that this driver trains: commit, versions."""
    keep_checkpoint: bool = True

    def open(self, row: TrialRow, config: TrialConfig) -> TrialRow:
        """Begin the row of a trial that was not planned at first."""
        self.configs[row.position] = config
        self.rows[row.position] = row.replace(fence=self.fence, seq=self.first_seq)
        return self.rows[row.position]

    def apply(self, update: Update) -> tuple[TrialRow, list[EpochRow]]:
        """The trial's new row and the rows of its epochs that an update about a trial stands for."""
        assert update.index is not None
        row = self.rows[update.index].replace(
            attempt=update.attempt, fence=self.fence, seq=self.first_seq + update.seq, updated_at=update.time
        )
        epochs = [self._epoch_row(row, report) for report in update.epochs]
        match update.kind:
            case "started":
                row = self._started(row, update)
            case "epochs":
                row = self._advanced(row, update)
            case "exploited":  # its epochs stand until the next attempt tells those of the copy
                told = {"parent_id": update.parent_id, "lineage": update.lineage, "checkpoint": update.checkpoint}
                row = row.replace(state="PENDING", **told)
            case "lost":
                row = row.replace(state="PENDING", checkpoint=update.checkpoint or row.checkpoint)
            case "paused":
                row = row.replace(state="PAUSED", checkpoint=update.checkpoint or row.checkpoint)
            case "retried":
                row = row.replace(state="PENDING", stopped_early=False, **NO_ERROR)
            case "ended":
                spent = update.state == "TERMINATED" and not self.keep_checkpoint
                row = row.replace(
                    state=update.state, stopped_early=update.stopped_early, error=update.text or None,
                    error_cause=update.cause, error_kind=update.error_kind,
                    error_fingerprint=fingerprint(update.text) if update.state == "ERROR" else None,
                    checkpoint=None if spent else update.checkpoint or row.checkpoint, logits=update.logits,
                )  # fmt: skip
        self.rows[update.index] = row
        return row, epochs

    def take(self, update: Update, result: TrialRow, epochs: Sequence[EpochRow]) -> tuple[TrialRow, list[EpochRow]]:
        """The rows of a trial that another sweep has finished, as rows of this one: they hold against all that this
        sweep knew of it.
        """
        assert update.index is not None
        held = self.rows[update.index]
        place: dict[str, Any] = {
            "sweep": held.sweep, "fence": self.fence, "seq": self.first_seq + update.seq,
            "attempt": max(held.attempt, result.attempt),
        }  # fmt: skip
        row = result.replace(label=held.label, position=held.position, cached_from=result.sweep, **place)
        self.rows[update.index] = row
        return row, [replace(each, **place) for each in epochs]

    def _started(self, row: TrialRow, update: Update) -> TrialRow:
        hosts = sorted({*(row.hosts or "").split(), *update.hosts})
        numerics = " ".join(f"{name}={number}" for name, number in parts(self.configs[row.position]).items())
        return row.replace(
            state="RUNNING", attempts=update.attempt, started_at=row.started_at or update.time, hosts=" ".join(hosts),
            device_name=update.device_name, torch_version=update.torch_version, numerics=numerics,
            slots=max(row.slots, update.slots),
            split=self.configs[row.position].evaluate.split, **NO_ERROR, **self.origin,
        )  # fmt: skip

    def _advanced(self, row: TrialRow, update: Update) -> TrialRow:
        row = row.replace(checkpoint=update.checkpoint or row.checkpoint, lineage=update.lineage or row.lineage)
        if update.stopped_early:  # with the epochs that decided it: a driver killed before the trial's end knows of it
            row = row.replace(stopped_early=True, error_cause=update.cause)
        if not update.epochs:  # a checkpoint in the middle of one
            return row
        best, best_epoch, metrics = row.best_top1, row.best_epoch, row.metrics
        if update.epochs[0].epoch == 1:  # an attempt tells its whole history; what was thrown back is no result
            best, best_epoch, metrics = None, None, {}
        for report in update.epochs:
            top1 = report.metrics.get("top1")
            if top1 is not None and (best is None or top1 > best):
                best, best_epoch = top1, report.epoch
            # What an evaluation leaves out is undefined: an earlier epoch's value does not stand for it.
            metrics = dict(report.metrics) if top1 is not None else {**metrics, **report.metrics}
        last = update.epochs[-1]
        share = last.epoch / row.epochs
        return row.replace(
            epoch=last.epoch, metrics=metrics, wall_s=last.wall_s, gpu_seconds=last.gpu_seconds,
            images_per_s=last.images_per_s, train_flops=cost.trial_flops(self.configs[row.position]) * share,
            best_top1=best, best_epoch=best_epoch,
        )  # fmt: skip

    def _epoch_row(self, row: TrialRow, report: EpochReport) -> EpochRow:
        return EpochRow(
            sweep=row.sweep, trial_id=row.trial_id, epoch=report.epoch, attempt=row.attempt, fence=row.fence,
            seq=row.seq, updated_at=row.updated_at or datetime.now(UTC), wall_s=report.wall_s,
            gpu_seconds=report.gpu_seconds, images_per_s=report.images_per_s, metrics=report.metrics,
        )  # fmt: skip
