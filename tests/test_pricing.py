"""What a plan says of hours and money, how it is measured, and how little it reads for that."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_rows import NOW

from mixmo_core import cost
from mixmo_core.config import DataConfig, ModelConfig, TrialConfig
from orchestrator import cli, pages, stopwatch
from orchestrator import plan as planning
from orchestrator import sweep as sweeps
from orchestrator.calibration import Timing, work
from orchestrator.errors import UsageError
from orchestrator.plan import initial_row
from orchestrator.rows import TrialRow, config_columns
from orchestrator.store import Folder, ResultStore

TEXT = """\
name: priced
trial: {{data: {{dataset: digits, batch_size: 40}}, model: {{depth: 10}}, optim: {{epochs: {epochs}}}}}
blocks: [{{grid: {{model.width: [1, 2, 4]}}}}]
seeds: 2
price: {{gpu_hour: 2.5, currency: EUR}}
{rest}
"""


def sweep_of(rest: str = "", epochs: int = 10) -> sweeps.Sweep:
    return sweeps.parse(TEXT.format(rest=rest, epochs=epochs), source="x.yaml")


def timings(sweep: sweeps.Sweep, trial_s: float, *widths: int, **changes: Any) -> list[Timing]:
    """Of trials that take so long, and a tenth less or more."""
    found = []
    for trial in sweep.trials[:3]:
        asked = work(config_columns(trial.config), 1, cost.trial_flops(trial.config), trial.config.optim.epochs)
        if trial.config.model.width in widths:
            given: dict[str, Any] = {"device_name": "a GPU", "gpus": 1.0, "precision": "fp32", "workers": 1, **changes}
            found += [
                Timing(shape=asked.shape, step_flops=asked.step_flops, pace=trial_s * factor / asked.flops, at=NOW,
                       source="measured", **given)
                for factor in (0.9, 1.1)
            ]  # fmt: skip
    return found


def page(plan: planning.Plan, gangs: int | None = None) -> list[str]:
    names = {item.trial.cell_id: f"w={item.trial.config.model.width}" for item in plan.items}
    return pages.plan(plan.summary(gangs), names, 100).plain.splitlines()


def test_hours_money_and_the_end_are_told_for_each_device() -> None:
    sweep = sweep_of()
    known = timings(sweep, 7200.0, 1, 2, 4) + timings(sweep, 72000.0, 1, 2, 4, device_name="a CPU", gpus=0.0, cpus=1.0)
    plan = planning.make(sweep, [], timings=known)
    assert page(plan, 4)[2:6] == [
        " Cost: 12 GPU-hours ± 10 % · 30.00 EUR on a GPU",
        "       4 h 00 m ± 10 % from begin to end in 4 gangs",
        "       120 core-hours ± 10 % on a CPU",
        "       1 d 16 h ± 10 % from begin to end in 4 gangs",
    ]
    first, _ = plan.summary(4)["cost"]["devices"]
    assert first["money"] == {"mean": pytest.approx(30), "low": pytest.approx(27), "high": pytest.approx(33)}
    assert "12 h 00 m ± 10 % in one gang, 4 h 00 m in 4 gangs, 2 h 00 m in 16 gangs; --gangs N" in page(plan)[3]
    assert planning.make(sweep_of("resources: {max_gangs: 2}"), [], timings=known).summary()["cost"]["gangs"] == 2


def test_under_a_scheduler_that_stops_trials_the_numbers_are_said_to_be_of_all_of_them() -> None:
    sweep = sweep_of("scheduler: {method: asha, grace_epochs: 1}")
    told = "scheduler: asha ends poor trials early; these numbers are of all trials to their ends"
    plan = planning.make(sweep, [])
    assert told in plan.summary()["notes"]
    assert told not in replace(plan, items=()).summary()["notes"]


def test_draws_to_come_are_priced_as_random_ones() -> None:
    """Before the first, which are those of a random search, and once some are there."""
    ranges = "search: {method: %s, num_samples: 6, ranges: {optim.lr: {min: 0.01, max: 0.1}}}"
    known = timings(sweep_of(), 7200.0, 1, 2, 4)
    random, drawing = (planning.make(sweep_of(ranges % name), [], timings=known) for name in ("random", "optuna"))
    assert drawing.sweep.to_draw == len(random.items) > 0
    asked = ("epochs_to_run", "train_flops", "train_flops_to_run", "storage", "cost")
    told, expected = drawing.summary(4), random.summary(4)
    assert {name: told[name] for name in asked} == {name: expected[name] for name in asked}
    assert drawing.prediction("a GPU") == random.prediction("a GPU") is not None
    assert "these numbers are of as many random draws" in " ".join(told["notes"])
    begun = replace(drawing, sweep=replace(drawing.sweep, trials=random.sweep.trials[:2]), items=random.items[:2])
    assert len(begun.expected.items) == len(random.items)


def test_how_many_trials_run_at_once_is_told_where_a_gang_has_slots() -> None:
    known, slots = planning.make(sweep_of("resources: {slots: 3, max_gangs: 2}"), []), "each of trials of one shape)"
    assert page(known)[2] == f" At once: 6 trials (2 gangs x 3 slots, {slots}"
    assert page(known, 1)[2] == f" At once: 3 trials (1 gang x 3 slots, {slots}"
    open_ = planning.make(sweep_of("resources: {slots: 3}"), [])
    assert page(open_)[2] == f" At once: 3 trials a gang (as many gangs as fit, {slots}"
    assert open_.summary()["at_once"] == {"gangs": None, "slots": 3, "trials": None}
    alone = planning.make(sweep_of("resources: {max_gangs: 2}"), [])
    assert not any("At once" in line for line in page(alone))
    more = [plan.summary()["storage"] for plan in (known, alone)]
    assert [each["peak"] - each["end"] for each in more] == [count * more[0]["per_running_trial"] for count in (6, 2)]


def test_a_shape_that_was_not_timed_is_told_by_its_neighbours_and_said_so() -> None:
    sweep = sweep_of()
    lines = page(planning.make(sweep, [], timings=timings(sweep, 3600.0, 1, 4)), 1)
    assert "; 2 of 3 shapes timed, the others by their FLOPs" in " ".join(line.strip() for line in lines[3:5])
    alone = page(planning.make(sweep, [], timings=timings(sweep, 3600.0, 2)[:1]), 1)
    assert "±" not in "".join(alone[2:6])
    assert "nothing measured tells" in " ".join(line.strip() for line in alone[3:6])


def test_without_timings_nothing_is_made_up() -> None:
    sweep = sweep_of()
    told = planning.make(sweep, []).summary()["cost"]
    assert (told["devices"], told["unknown"]) == ([], "nothing has been timed yet")
    lines = page(planning.make(sweep, []))[2:4]
    assert lines == [
        " Cost: not known",
        "       nothing has been timed yet; `mixmo calibrate FILE` does that on this machine, the first",
    ]
    other = timings(sweep, 60.0, 1, 2, 4, precision="bf16")
    assert "not of fp32 with 1 worker" in planning.make(sweep, [], timings=other).summary()["cost"]["unknown"]
    done = [finished(sweep, trial) for trial in sweep.trials]
    assert planning.make(sweep, done).summary()["cost"]["unknown"] is None, "nothing is to be paid"


def finished(sweep: sweeps.Sweep, trial: sweeps.Trial, **changes: Any) -> TrialRow:
    row = initial_row(trial, sweep).replace(
        state="TERMINATED", epoch=10, attempts=1, wall_s=100.0, gpu_seconds=100.0, device_name="a GPU",
        train_flops=cost.trial_flops(trial.config), updated_at=NOW,
    )  # fmt: skip
    return row.replace(**changes)


def test_the_first_trials_price_the_rest() -> None:
    sweep = sweep_of()
    plan = planning.make(sweep, [finished(sweep, trial) for trial in sweep.trials[:3]])
    (device,) = plan.summary()["cost"]["devices"]
    assert device["gpu_hours"]["mean"] == pytest.approx(300 / 3600)
    assert (device["shapes"], device["measured"]) == (3, 3)
    predicted = plan.prediction("a GPU")
    assert predicted is not None
    assert predicted.seconds.mean == pytest.approx(600), "what is done counts as it was"
    assert plan.prediction("another") is None
    half = [finished(sweep, sweep.trials[3], state="RUNNING", epoch=5, wall_s=50.0)]
    left = planning.make(sweep, [*half, *(finished(sweep, trial) for trial in sweep.trials[:3])])
    assert left.summary()["cost"]["devices"][0]["training_s"]["mean"] == pytest.approx(250, rel=0.01)


def test_what_becomes_of_trials_that_the_file_dropped() -> None:
    before, now = sweep_of(), sweep_of("exclude: ['model.width == 4', 'model.width == 2']")
    rows = [finished(before, before.trials[1]), initial_row(before.trials[2], before),
            finished(before, before.trials[4], state="PENDING", epoch=3)]  # fmt: skip
    reasons = [each["reason"] for each in planning.make(now, rows).summary()["by_removed"]]
    assert reasons == [
        "not in the file any more; its row stays (terminated)",
        "not in the file any more; it never began, and its row goes",
        "not in the file any more; cancelled at epoch 3 of 10, and goes on if it comes back",
    ]
    assert before.trials[4].trial_id[:7] in " ".join(page(planning.make(now, rows)))


# -------------------------------------------------------------------------------------------------------- how much work


class Counting(Folder):
    """Counts what is read and listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def read(self, key: str) -> Any:
        self.calls[f"read {key}"] += 1
        return super().read(key)

    def names(self, prefix: str, *, folders: bool = False) -> list[str]:
        self.calls["list"] += 1
        return super().names(prefix, folders=folders)


def test_a_plan_reads_each_sweep_once_and_counts_each_network_once(tmp_path: Path) -> None:
    """However many cells there are: what a plan of 10,000 takes is in benchmarks/planning.py."""
    rates = [round(0.001 * i, 3) for i in range(1, 101)]
    text = f"""
name: many
trial: {{data: {{dataset: digits}}, model: {{depth: 10}}}}
blocks: [{{grid: {{model.width: [31, 32, 33], optim.lr: {rates}}}}}]
"""
    sweep = sweeps.parse(text, source="many.yaml")
    with ResultStore.open(tmp_path, create=True).writer("many", sweep_text=text) as writer:
        writer.put(finished(sweep, trial) for trial in sweep.trials)
    folder, before = Counting(tmp_path), cost._summed.cache_info().misses
    summary = planning.against(ResultStore(folder), sweep).summary()
    assert summary["actions"] == {"done": 300}
    assert folder.calls.pop("list") <= 2
    assert folder.calls == {"read sweeps/many/trials.parquet": 1, "read calibration.parquet": 1}
    assert cost._summed.cache_info().misses - before <= 3


def test_a_page_of_very_many_cells_shows_some_and_says_so() -> None:
    rates = [round(0.001 * i, 3) for i in range(1, 302)]
    text = f"name: many\ntrial: {{data: {{dataset: digits}}}}\nblocks: [{{grid: {{optim.lr: {rates}}}}}]"
    plan = planning.make(sweeps.parse(text, source="many.yaml"), [])
    lines = pages.plan(plan.summary(), {item.trial.cell_id: "x" for item in plan.items}, 100).plain.splitlines()
    assert "and 101 more cells; --json has all" in lines[-1]
    assert len(lines) < 210


# ----------------------------------------------------------------------------------------------------------- measuring

TINY = TrialConfig(
    data=DataConfig(dataset="digits", train_images=80, batch_size=40), model=ModelConfig(depth=10, width=1)
)


def test_steps_are_timed_and_whole_epochs_where_they_fit_in() -> None:
    steps = stopwatch.time_paces(TINY, device=torch.device("cpu"), limit_s=0.0)
    assert len(steps) == 1, "one stretch at least"
    assert 0 < steps[0] < 1e-3
    epochs = stopwatch.time_paces(TINY, device=torch.device("cpu"), limit_s=1.5)
    assert epochs
    assert all(pace > 0 for pace in epochs)


def test_a_watch_counts_no_warming_up() -> None:
    time = iter(range(100))
    watch = stopwatch._Watch(limit_s=60.0, now=lambda: next(time) * 5.0)
    asked = [watch.due() for _ in range(stopwatch.WARM_UP)]
    assert asked == [False] * (stopwatch.WARM_UP - 1) + [True]
    assert not watch.counts()
    assert [watch.due() for _ in range(3)][-1]
    assert watch.counts()


@given(st.integers(1, 40), st.integers(2, 6))
def test_the_smallest_and_the_largest_are_always_timed(shapes: int, count: int) -> None:
    trials: list[Any] = list(range(shapes))
    some: list[Any] = list(stopwatch.chosen(trials, count))
    assert len(some) == min(shapes, count)
    assert some == sorted(set(some))
    assert (some[0], some[-1]) == (0, shapes - 1)


def test_shapes_of_a_sweep_are_sorted_by_size_and_several_workers_are_refused() -> None:
    sweep = sweep_of("resources: {workers: 2, gpus_per_worker: 0}")
    assert [trial.config.model.width for trial in stopwatch.shapes(sweep)] == [1, 2, 4]
    timed = stopwatch.calibrate(sweep.trials, device=torch.device("cpu"), cpus=1, data_dir=None, seconds=1)
    with pytest.raises(UsageError, match="times trials of one worker"):
        next(timed)


def test_calibrate_and_then_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, results = tmp_path / "x.yaml", str(tmp_path / "results")
    text = TEXT.format(rest="resources: {gpus_per_worker: 0, max_gangs: 2}", epochs=2)
    file.write_text(text.replace("batch_size: 40", "batch_size: 40, train_images: 80"))

    def mixmo(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--json", "--results", results])
        assert not ended.value.code
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    told = mixmo("calibrate", str(file), "--seconds", "1", "--device", "cpu")
    assert told["schema"] == "mixmo.calibrate/1"
    assert told["shapes"] == len({each["shape"] for each in told["timings"]}) == 3
    (device,) = mixmo("plan", str(file))["cost"]["devices"]
    assert (device["measured"], device["gpu_hours"], device["money"]) == (3, None, None)
    assert device["core_hours"]["mean"] > 0
    assert device["elapsed_s"]["mean"] < device["training_s"]["mean"]
