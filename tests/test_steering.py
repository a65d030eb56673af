"""A running sweep and those who steer it: the real driver, dispatcher and store, over gangs that only count."""

from pathlib import Path

from made_engine import Pace, Threads
from made_rows import in_a_folder

from orchestrator import driver
from orchestrator import sweep as sweeps
from orchestrator.errors import ExitCode
from orchestrator.store import ResultStore

SWEEP = """
name: {name}
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: 4, lr: 0.1}}
blocks: [{{label: all}}]
seeds: {seeds}
resources: {{gpus_per_worker: 0}}
"""


def load(folder: Path, *, name: str = "made", seeds: int | str = 4) -> sweeps.Sweep:
    file = folder / f"{name}.yaml"
    file.write_text(SWEEP.format(name=name, seeds=seeds))
    return sweeps.load(file)


@in_a_folder
def test_a_sweep_runs_to_its_end_over_threads(tmp_path: Path, store: ResultStore) -> None:
    sweep = load(tmp_path)
    assert driver.run(sweep, store, engine=Threads(Pace()).engine) == ExitCode.OK
    rows = store.trial_rows("made")
    assert [(row.state, row.epoch, row.attempts) for row in rows] == [("TERMINATED", 4, 1)] * 4
    assert store.verify("made") == []
