"""A trained network out of the store: the newest checkpoint that is kept of a trial, as a network.

found = trained.network(ResultStore.open("results"), "0123456")
logits_MBK = found.net(augment.normalise(pixels_BCHW, found.config.data.dataset))
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixmo_core import networks, train
from mixmo_core.config import TrialConfig, flatten, unflatten
from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.population import line_of, settings_of, steps_of
from orchestrator.rows import TrialRow, config_of
from orchestrator.store import DamagedError, ResultStore

Talk = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trained:
    net: networks.MixMoNet
    """On the CPU, in evaluation mode."""
    config: TrialConfig
    row: TrialRow
    key: str
    """Of its checkpoint in the store."""
    epoch: int
    """The epoch that it has done, or is in."""
    step: int | None
    """In the middle of an epoch: the steps of it that are done."""

    @property
    def is_finished(self) -> bool:
        return self.step is None and self.epoch == self.config.optim.epochs


def network(
    store: ResultStore,
    prefix: str,
    talk: Talk = lambda line: print(line, file=sys.stderr),  # noqa: T201
) -> Trained:
    """The network of the one trial whose id begins so, from its furthest checkpoint; of an unfinished one, too.

    A checkpoint that is damaged is told to `talk`, and the one before it taken. Raises NotFoundError where there is no
    such trial or none of its checkpoints is kept, DamagedError where none of them is whole.
    """
    row = max(store.find(prefix), key=lambda each: each.order)
    keys = store.checkpoints(row.trial_id)
    if not keys:
        raise NotFoundError(f"no checkpoint of trial {row.trial_id} is kept in {store}: {_why_none(row)}")
    for key in keys:
        try:
            return _load(store, row, key)
        except (train.CheckpointError, DamagedError, NotFoundError) as error:
            talk(f"note: {key} is of no use: {error}")
    raise DamagedError(
        f"no checkpoint of trial {row.trial_id} in {store} is whole", "Put one back from a copy, or run the trial again"
    )


def _load(store: ResultStore, row: TrialRow, key: str) -> Trained:
    with tempfile.TemporaryDirectory(prefix="mixmo-") as scratch:
        try:
            state = train.load(store.fetch(key, Path(scratch) / key.rpartition("/")[2]))
        except OSError as error:
            raise UnreachableError(f"{scratch}: cannot write a copy of the checkpoint: {error.strerror}") from error
    if state["digest"] != line_of(row.digest, steps_of(row.lineage)).digest:
        raise train.CheckpointError(f"it is of trial {state['digest'][:12]}")
    config = unflatten({**flatten(config_of(row)), **settings_of(row)})
    net = networks.build(config)
    net.load_state_dict(state["model"])
    step = state["part"]["step"] if "part" in state else None
    return Trained(net.eval(), config, row, key, epoch=state["epoch"], step=step)


def _why_none(row: TrialRow) -> str:
    if row.state in ("PENDING", "RUNNING", "PAUSED"):
        return f"it has saved none yet. `mixmo status {row.sweep}` tells how far it is"
    return (
        f"{row.sweep} ran with `checkpoints: {{keep: none}}`, or it ended before its first one. Run it again under new "
        f"results (`--results`) with `checkpoints: {{keep: last}}`, the default"
    )
