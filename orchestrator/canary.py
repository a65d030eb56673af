"""Whether the largest trial of a sweep fits in memory: its first two steps are taken before any trial begins.

Each gang does it once, in the processes that will train: real images, a real batch, all workers. A sweep that cannot
fit is refused within a minute of its first gang, not at the hour at which its widest network comes.
"""

import gc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mixmo_core.config import TrialConfig
from mixmo_core.cost import step_flops, training_bytes
from orchestrator.sweep import Trial

if TYPE_CHECKING:
    import torch

STEPS = 2
"""The first step makes the momenta; the second is as large as all that follow."""


def largest(trials: Iterable[Trial]) -> Trial:
    """The trial that needs the most memory by the count of `mixmo_core.cost`; of equals the one with the most FLOPs,
    of these the first.
    """
    return max(trials, key=lambda each: (_needs(each), step_flops(each.config), -each.position))


def _needs(trial: Trial) -> int:
    return training_bytes(trial.config, trial.workers)


def refusal(sweep: str, trial: Trial, fault: str) -> str:
    """What to tell people: which trial, where it was tried and what it met, what it needs, what to lower."""
    config = trial.config
    settings = [f"model.width {config.model.width}", f"model.subnetworks {config.model.subnetworks}",
                f"data.batch_size {config.data.batch_size}"]  # fmt: skip
    bf16 = "" if config.precision == "bf16" else "set precision: bf16 (a new trial), "
    return (
        f"{sweep}: its largest trial does not fit in memory, so nothing was begun. Trial {trial.trial_id} "
        f"({', '.join(settings)}) needs {_needs(trial) / 1e9:.2g} GB at least, and was tried on {fault}. Lower one of "
        f"these settings, {bf16}share its batch among more resources.workers, leave it out by `exclude`, or use a "
        f"device with more memory; `--no-canary` begins all the same"
    )


def rehearse(config: TrialConfig, device: "torch.device", data_dir: Path | None, trials: int = 1) -> str | None:
    """Take the first steps of so many such trials side by side and throw them away; what went wrong if memory was too
    short, else None.

    On all workers at once where there are several. Raises what else the trial raises.
    """
    import torch

    from mixmo_core import train
    from orchestrator import devices

    fault = None
    try:
        told = [
            train.train(config, device=device, data_dir=data_dir, save_when=lambda: True, captured=False)
            for _ in range(trials)
        ]
        for _ in range(STEPS):
            for each in told:
                next(each, None)
    except Exception as error:
        if not is_memory(error):
            raise
        beside = f", {trials} of them side by side (resources.slots)" if trials > 1 else ""
        fault = f"{devices.memory(device)}{beside}: {_said(error)}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return fault


def _said(error: BaseException) -> str:
    """The sentence that speaks of memory."""
    sentences = [each.strip() for each in re.split(r"\. |\n", str(error))]
    return next((each for each in sentences if "memory" in each.lower()), type(error).__name__)


def is_memory(error: BaseException) -> bool:
    """Whether it says that memory was too short. On processors torch says so only in its message."""
    import torch

    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )
