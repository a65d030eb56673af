"""What a sweep may take, what it was to take, and whether it fits: the real driver over gangs that only count."""

import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_engine import Pace, Threads
from torch.autograd.graph import saved_tensors_hooks

from mixmo_core import cost, data, train
from mixmo_core.config import DataConfig, ModelConfig, TrialConfig, flatten, shape_of
from mixmo_core.step import Step
from orchestrator import budget, canary, driver, engine
from orchestrator import sweep as sweeps
from orchestrator.calibration import Prediction, Timing
from orchestrator.dispatcher import REHEARSALS, Dispatcher, Order, Retries
from orchestrator.engine import Job
from orchestrator.errors import ExitCode, RefusedError, SweepError
from orchestrator.plan import initial_row
from orchestrator.progress import measure
from orchestrator.store import ResultStore

ROOT = Path(__file__).parent.parent
SWEEP = """
name: made
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10}}
  optim: {{epochs: 4, lr: 0.1}}
blocks: [{{grid: {{model.width: [1, 3, 2]}}}}]
seeds: 3
resources: {{gpus_per_worker: 0}}
{rest}
"""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PERIOD_S", 0.05)


def load(rest: str = "") -> sweeps.Sweep:
    return sweeps.parse(SWEEP.format(rest=rest), source="made.yaml")


def run(
    sweep: sweeps.Sweep, folder: Path, pace: Pace | None = None, *, gangs: int = 2, rehearse: bool = True
) -> tuple[ExitCode, list[str]]:
    said: list[str] = []
    store, threads = ResultStore.open(folder, create=True), Threads(pace, gangs=gangs)
    return driver.run(sweep, store, engine=threads.engine, rehearse=rehearse, talk=said.append), said


# ---------------------------------------------------------------------------------------------------------- budget


def test_plan_says_why_a_run_would_be_refused() -> None:
    assert budget.refused(load(), []) == []
    (told,) = budget.refused(load("budget: {trials: 1}"), [])
    assert "a run would be refused" in told
    assert "budget.trials allows 1" in told
    (told,) = budget.refused(load("budget: {money: 1}"), [])
    assert "budget.money needs price.gpu_hour" in told
    limited = load("budget: {hours: 1}")
    row = initial_row(limited.trials[0], limited)
    assert budget.refused(limited, [row]) == []
    (told,) = budget.refused(limited, [row.replace(wall_s=3600.0)])
    assert "the budget is spent" in told


def test_a_budget_that_is_spent_drains_the_sweep_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    """A made epoch lasts a second, so that a trial is four."""
    code, said = run(load("budget: {hours: 0.002}"), tmp_path, gangs=1)
    rows = ResultStore.open(tmp_path).trial_rows("made")
    states = [row.state for row in rows]
    assert code == ExitCode.STOPPED
    assert 2 <= states.count("TERMINATED") <= 3
    assert states.count("TERMINATED") + states.count("PENDING") == 9, "what ran has finished"
    told = next(line for line in said if "the budget is spent" in line)
    assert "of 0.002 hours of training. To go on, raise budget.hours in made.yaml" in told
    assert "budget" in [event.kind for event in ResultStore.open(tmp_path).events("made")]
    with pytest.raises(RefusedError, match=r"made: the budget is spent: 0\.00\d+ of 0\.002 hours"):
        run(load("budget: {hours: 0.002}"), tmp_path)
    assert run(load("budget: {hours: 1}"), tmp_path)[0] == ExitCode.OK


@pytest.mark.parametrize(
    ("rest", "gpu_seconds", "told"),
    [
        ("budget: {gpu_hours: 2}", 7200.0, "2 of 2 GPU-hours.*raise budget.gpu_hours"),
        ("budget: {gpu_hours: 2}", 7199.0, None),
        ("budget: {money: 5}\nprice: {gpu_hour: 2.5, currency: EUR}", 7200.0, "5 of 5 EUR.*raise budget.money"),
        ("budget: {hours: 2}", 0.0, "2 of 2 hours of training"),
        ("", 1e9, None),
    ],
)
def test_each_limit_counts_what_was_trained_here(rest: str, gpu_seconds: float, told: str | None) -> None:
    import re

    sweep = load(rest)
    row = initial_row(sweep.trials[0], sweep).replace(gpu_seconds=gpu_seconds, wall_s=7200.0)
    spent = budget.spent(sweep, [row])
    assert re.search(told, spent or "") if told else spent is None
    assert budget.spent(sweep, [row.replace(cached_from="another")]) is None


def test_more_trials_than_the_file_allows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"made\.yaml: 9 trials, and budget\.trials allows 8"):
        run(load("budget: {trials: 8}"), tmp_path)
    assert ResultStore.open(tmp_path).sweeps() == []
    budget.check(load("budget: {trials: 9}"))
    with pytest.raises(SweepError, match=r"budget\.money needs price\.gpu_hour"):
        budget.check(load("budget: {money: 9}"))


# ---------------------------------------------------------------------------------------------------------- canary


class Short(Pace):
    """Gangs that have too little memory for a width of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []
        self.begun = threading.Event()

    def rehearse(self, settings: Mapping[str, Any]) -> str | None:
        self.tried.append(settings["model.width"])
        return "a device of a host: 2 GB: out of memory" if settings["model.width"] == 3 else None

    def epoch(self, order: Order, epoch: int) -> None:
        self.begun.set()


def test_a_sweep_that_does_not_fit_is_refused_before_its_first_trial(tmp_path: Path) -> None:
    pace, sweep = Short(), load()
    with pytest.raises(RefusedError) as error:
        run(sweep, tmp_path, pace)
    told = str(error.value)
    assert sweep.trials[1].trial_id in told
    for words in ("made: its largest trial does not fit", "model.width 3", "data.batch_size 40", "GB at least",
                  "a device of a host: 2 GB: out of memory", "precision: bf16", "--no-canary"):  # fmt: skip
        assert words in told
    assert set(pace.tried) == {3}
    assert not pace.begun.is_set()
    assert {row.state for row in ResultStore.open(tmp_path).trial_rows("made")} == {"PENDING"}
    assert run(sweep, tmp_path, pace, rehearse=False)[0] == ExitCode.OK


def test_the_largest_is_that_of_the_most_memory_and_what_is_done_is_not_tried(tmp_path: Path) -> None:
    sweep = load()
    assert canary.largest(sweep.trials).config.model.width == 3
    assert canary.largest(sweep.trials).position == 1
    pace = Short()
    assert run(sweep, tmp_path, pace, rehearse=False)[0] == ExitCode.OK
    four = SWEEP.replace("seeds: 3", "seeds: 4").format(rest="exclude: ['model.width == 3 and seed == 3']")
    more = sweeps.parse(four, source="made.yaml")
    assert run(more, tmp_path, pace)[0] == ExitCode.OK
    assert set(pace.tried) == {2}


def desk() -> Dispatcher:
    return Dispatcher([Order(index=0, trial_id="0" * 12, settings={})], fence=1, retries=Retries())


def test_one_gang_that_has_rehearsed_is_enough() -> None:
    dispatcher = desk()
    assert dispatcher.rehearses("gang-0")
    assert dispatcher.rehearses("gang-1"), "at the same time both do"
    dispatcher.rehearsed("gang-0", None)
    assert not dispatcher.rehearses("gang-2")


def test_workers_that_die_of_a_rehearsal_again_and_again_had_too_little_memory() -> None:
    dispatcher = desk()
    assert [dispatcher.rehearses("gang-0") for _ in range(REHEARSALS + 1)] == [True] * REHEARSALS + [False]
    (update,) = dispatcher._updates
    assert (update.kind, update.text) == ("refused", "the workers of gang-0 died of it 2 times")
    dispatcher.submit(0)
    assert dispatcher._first_free("gang-0") is None, "nothing is handed out"


TINY = TrialConfig(
    data=DataConfig(dataset="digits", train_images=80, batch_size=40), model=ModelConfig(depth=10, width=1)
)


def test_a_trial_that_fits_passes_and_another_fault_is_no_want_of_memory(tmp_path: Path) -> None:
    assert canary.rehearse(TINY, torch.device("cpu"), None) is None
    missing = TrialConfig(data=DataConfig(dataset="cifar10"), model=ModelConfig(depth=10, width=1))
    with pytest.raises(data.DatasetError):
        canary.rehearse(missing, torch.device("cpu"), tmp_path)


def test_as_many_are_tried_side_by_side_as_may_train_so(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = Step.begin

    def short_for_three(self: Step, *given: torch.Tensor, **more: Any) -> None:
        taken.append(id(self))
        if len(set(taken)) == 3:
            raise MemoryError("not enough memory")
        step(self, *given, **more)

    monkeypatch.setattr(Step, "begin", short_for_three)
    assert canary.rehearse(TINY, torch.device("cpu"), None, 2) is None
    assert sorted(Counter(taken).values()) == [2, 2], "two steps of each"
    taken.clear()
    fault = canary.rehearse(TINY, torch.device("cpu"), None, 3)
    assert fault is not None
    assert "3 of them side by side (resources.slots): not enough memory" in fault


@pytest.mark.parametrize(("slots", "seeds", "tried"), [(1, 9, 1), (3, 9, 3), (3, 2, 2)])
def test_no_more_are_tried_side_by_side_than_there_are_of_the_largest(slots: int, seeds: int, tried: int) -> None:
    """Of two widths, of which only the greater one's trials count."""
    text = f"""
name: two
trial: {{data: {{dataset: digits}}, model: {{depth: 10}}}}
blocks: [{{grid: {{model.width: [1, 2]}}}}]
seeds: {seeds}
resources: {{slots: {slots}}}
"""
    sweep = sweeps.parse(text, source="x.yaml")
    orders = [
        Order(
            index=trial.position, trial_id=trial.trial_id, settings=flatten(trial.config), shape=shape_of(trial.config)
        )
        for trial in sweep.trials
    ]
    largest = flatten(canary.largest(sweep.trials).config)
    job = Job(sweep=sweep, orders=orders, fence=1, store_uri="x", data_dir=None, canary=largest)
    assert engine._canaries(job, sweep.resources.slot_count) == tried


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on memory here")
def test_a_trial_that_does_not_fit_on_processors_says_so() -> None:
    code = """
import resource, torch
from orchestrator import canary
from mixmo_core.config import DataConfig, ModelConfig, TrialConfig
tiny = TrialConfig(data=DataConfig(dataset="digits", batch_size=40), model=ModelConfig(depth=10, width=1))
assert canary.rehearse(tiny, torch.device("cpu"), None) is None
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 300_000_000, resource.RLIM_INFINITY))
wide = TrialConfig(data=DataConfig(dataset="synthetic", batch_size=256), model=ModelConfig(depth=28, width=20))
print(canary.rehearse(wide, torch.device("cpu"), None))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GB: " in done.stdout
    assert "memory" in done.stdout.lower()


@pytest.mark.parametrize("model", [ModelConfig(depth=10, width=2), ModelConfig(depth=16, width=1, subnetworks=4),
                                   ModelConfig(arch="preact_resnet", width=1)])  # fmt: skip
def test_what_a_step_keeps_is_what_is_counted(model: ModelConfig) -> None:
    """Of the values that autograd saves, each storage once; weights are counted apart."""
    config = TrialConfig(data=DataConfig(dataset="synthetic", batch_size=32, augmentation="none"), model=model)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []  # so that no storage is freed and its place taken
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        next(iter(train.train(config, save_when=lambda: True)))
    counted = cost._network(config).activations * 4 * config.data.batch_size
    assert sum(kept.values()) == pytest.approx(counted, rel=0.15)
    assert cost.training_bytes(config) > counted + 3 * 4 * cost.parameters(config)
    assert cost.training_bytes(config, workers=2) < cost.training_bytes(config)


# ------------------------------------------------------------------------------------------------------ predictions


def timed(sweep: sweeps.Sweep, pace: Callable[[float], float]) -> list[Timing]:
    from made_rows import NOW

    from orchestrator.calibration import work
    from orchestrator.rows import config_columns

    timings = []
    for trial in sweep.trials[:3]:
        flops = cost.trial_flops(trial.config)
        asked = work(config_columns(trial.config), 1, flops, trial.config.optim.epochs)
        for factor in (0.9, 1.1):
            timings.append(
                Timing(
                    device_name="thread", shape=asked.shape, precision="fp32", workers=1, gpus=0.0, cpus=1.0,
                    step_flops=asked.step_flops, pace=factor * pace(asked.flops), source="measured", at=NOW,
                )
            )  # fmt: skip
    return timings


def test_what_was_predicted_stands_against_what_it_took(tmp_path: Path) -> None:
    """A made trial takes four seconds; the calibration says five, give or take a tenth."""
    from made_rows import NOW

    from orchestrator.screen import summary

    sweep, store = load("budget: {hours: 0.004}"), ResultStore.open(tmp_path, create=True)
    store.add_timings(timed(sweep, lambda flops: 5.0 / flops))
    assert run(sweep, tmp_path, gangs=1)[0] == ExitCode.STOPPED
    first = Prediction.of(store.snapshot("made").header.predicted)
    assert first is not None
    assert (first.device_name, first.gpus, first.epochs) == ("thread", 0.0, 36)
    assert first.seconds.mean == pytest.approx(45)
    assert first.seconds.error == pytest.approx(0.1)
    assert run(load(), tmp_path)[0] == ExitCode.OK, "it goes on"
    snapshot = store.snapshot("made")
    assert Prediction.of(snapshot.header.predicted) == first, "a run that goes on keeps the first prediction"
    state = measure(snapshot, NOW, driven=False)
    assert state.training_s == 36
    text = summary(snapshot, NOW, 100, driven=False).plain
    assert "predicted 0.0125 hours of training ± 10 % on thread, took 0.01" in text


def test_without_a_calibration_nothing_is_predicted(tmp_path: Path) -> None:
    assert run(load(), tmp_path)[0] == ExitCode.OK
    assert ResultStore.open(tmp_path).snapshot("made").header.predicted is None
