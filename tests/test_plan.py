"""The plan: what a run would do, by what the store holds."""

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from mixmo_core.config import NUMERICS, TrialConfig, trial_id
from mixmo_core.cost import checkpoint_bytes, logits_bytes, parameters, trial_flops
from orchestrator.errors import RefusedError
from orchestrator.plan import Plan, initial_row, make
from orchestrator.rows import TRIALS_SCHEMA, State, TrialRow, config_of, to_table, trial_rows
from orchestrator.sweep import Sweep, Trial, parse

TEXT = """\
name: {name}
trial: {{data: {{dataset: digits}}, model: {{depth: 10}}, optim: {{epochs: 10}}}}
blocks:
  - {{label: vanilla, set: {{model.subnetworks: 1}}, grid: {{model.width: {widths}}}}}
  - {{label: {label}, grid: {{model.width: {widths}}}}}
seeds: 2
{rest}
"""


def sweep_of(*widths: int, name: str = "ours", label: str = "mixed", rest: str = "") -> Sweep:
    return parse(TEXT.format(name=name, widths=list(widths) or [1, 2], label=label, rest=rest), source="x.yaml")


OURS = sweep_of()


def rows_of(sweep: Sweep, **changes: Any) -> list[TrialRow]:
    """A row for each trial, as the store gives them back."""
    rows = [initial_row(trial, sweep).replace(**changes) for trial in sweep.trials]
    return trial_rows(to_table(rows, TRIALS_SCHEMA))


def finished(sweep: Sweep) -> list[TrialRow]:
    return rows_of(sweep, state="TERMINATED", epoch=10, attempts=1, fence=1, attempt=1, seq=10)


def actions(plan: Plan) -> list[str]:
    return [item.action for item in plan.items]


def test_at_first_everything_is_new() -> None:
    plan = make(OURS, [])
    assert plan.counts == {"new": 8}
    assert plan.to_run == OURS.trials
    assert plan.changes
    assert all(item.row is None and item.epochs_left == 10 for item in plan.items)


def test_when_all_is_done_nothing_runs_and_nothing_changes() -> None:
    plan = make(OURS, finished(OURS))
    assert (plan.counts, plan.to_run, plan.changes, plan.removed) == ({"done": 8}, (), False, ())
    assert plan.summary()["train_flops_to_run"] == 0


@given(
    st.lists(
        st.sampled_from(["PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR", "CANCELLED"]), min_size=8, max_size=8
    )
)
def test_every_trial_is_in_the_plan_once_and_in_order(states: list[State]) -> None:
    rows = [row.replace(state=state, epoch=4) for row, state in zip(rows_of(OURS), states, strict=True)]
    plan = make(OURS, reversed(rows))
    assert [item.trial for item in plan.items] == list(OURS.trials)
    assert sum(plan.counts.values()) == 8
    ended = {"TERMINATED", "ERROR", "CANCELLED"}
    assert plan.to_run == tuple(trial for trial, state in zip(OURS.trials, states, strict=True) if state not in ended)
    again = make(OURS, rows, retry_failed=True)
    assert again.to_run == tuple(
        trial for trial, state in zip(OURS.trials, states, strict=True) if state not in {"TERMINATED", "CANCELLED"}
    )


@pytest.mark.parametrize(
    ("changes", "retry_failed", "action", "left"),
    [
        ({"state": "PENDING"}, False, "new", 10),
        ({"state": "PENDING", "attempts": 1}, False, "resume", 10),
        ({"state": "RUNNING", "epoch": 3, "attempts": 1}, False, "resume", 7),
        ({"state": "RUNNING", "checkpoint": "trials/x"}, False, "resume", 10),
        ({"state": "PAUSED", "epoch": 3}, False, "resume", 7),
        ({"state": "TERMINATED", "epoch": 10}, False, "done", 0),
        ({"state": "TERMINATED", "epoch": 4, "stopped_early": True}, False, "resume", 6),
        ({"state": "ERROR", "epoch": 4}, False, "failed", 0),
        ({"state": "ERROR", "epoch": 4}, True, "retry", 6),
        ({"state": "CANCELLED", "epoch": 4}, True, "cancelled", 0),
        ({"state": "CANCELLED", "error_cause": "no longer in the sweep file", "epoch": 4}, True, "resume", 6),
    ],
)
def test_what_becomes_of_a_trial(changes: dict[str, Any], retry_failed: bool, action: str, left: int) -> None:
    row = rows_of(OURS)[0].replace(**changes)
    item = make(OURS, [row], retry_failed=retry_failed).items[0]
    assert (item.action, item.row, item.epochs_left) == (action, row, left)
    assert item.runs == (item.trial in make(OURS, [row], retry_failed=retry_failed).to_run)


def test_the_plan_tells_which_other_sweeps_have_a_trial_still_to_end() -> None:
    theirs, ended = rows_of(sweep_of(name="theirs")), rows_of(sweep_of(name="ended"), state="ERROR")
    plan = make(OURS, [*rows_of(OURS), *theirs[:2], *ended, theirs[3].replace(sweep="third")])
    assert [item.begun_in for item in plan.items] == [("theirs",), ("theirs",), (), ("third",), (), (), (), ()]


def test_a_failed_trial_tells_its_cause() -> None:
    row = rows_of(OURS)[0].replace(state="ERROR", error_cause="CUDA out of memory")
    assert make(OURS, [row]).items[0].reason == "failed: CUDA out of memory"


def test_a_scheduler_that_stopped_a_trial_has_ended_it() -> None:
    sweep = sweep_of(rest="scheduler: {method: asha}")
    rows = rows_of(sweep, state="TERMINATED", epoch=4, stopped_early=True)
    assert make(sweep, rows).counts == {"done": 8}


def test_of_two_rows_of_one_trial_the_highest_order_holds() -> None:
    low = rows_of(OURS)[0].replace(state="TERMINATED", fence=1, attempt=9, seq=99)
    high = low.replace(state="RUNNING", epoch=2, fence=2, attempt=1, seq=1)
    for rows in ([low, high], [high, low]):
        assert make(OURS, rows).items[0].row == high


def test_the_result_of_another_sweep_serves() -> None:
    theirs = sweep_of(2, 3, name="theirs", label="other")
    plan = make(OURS, finished(theirs))
    assert plan.counts == {"new": 4, "cached": 4}
    for item in plan.items:
        assert (item.action == "cached") == (item.trial.config.model.width == 2)
        if item.row:
            assert (item.row.sweep, item.row.cached_from, item.row.label) == ("ours", "theirs", item.trial.label)
            assert (item.row.position, item.row.state) == (item.trial.position, "TERMINATED")
    assert not plan.removed
    assert plan.changes


@pytest.mark.parametrize(
    "changes", [{"state": "ERROR"}, {"state": "RUNNING", "epoch": 9}, {"state": "TERMINATED", "stopped_early": True}]
)
def test_only_a_whole_result_of_another_sweep_serves(changes: dict[str, Any]) -> None:
    assert make(OURS, rows_of(sweep_of(name="theirs"), **changes)).counts == {"new": 8}


def test_ones_own_result_goes_before_that_of_another_sweep() -> None:
    plan = make(OURS, [*finished(sweep_of(name="theirs")), *finished(OURS)])
    assert plan.counts == {"done": 8}


def test_what_the_file_no_longer_has_is_removed() -> None:
    before = finished(sweep_of(1, 2, 3))
    plan = make(OURS, before)
    assert plan.counts == {"done": 8}
    assert {row.config["model_width"] for row in plan.removed} == {3}
    assert len(plan.removed) == 4


def test_a_new_label_or_order_is_a_change_though_nothing_runs() -> None:
    plan = make(sweep_of(label="renamed"), finished(OURS))
    assert (plan.to_run, plan.changes) == ((), True)
    assert make(sweep_of(2, 1), finished(OURS)).changes


def test_a_result_under_older_numerics_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = finished(OURS)
    monkeypatch.setitem(NUMERICS, "cutmix", 2)
    now = sweep_of()
    plan = make(now, before)
    assert actions(plan) == ["done", "done", "stale", "stale"] * 2
    assert not plan.removed
    for item in plan.items:
        if item.action == "stale":
            assert item.stale
            assert item.stale.trial_id != item.trial.trial_id
            assert item.row is None, "a stale row must never be taken for the trial's own"
            assert item.reason.endswith("is a result under older numerics: cutmix 1, now 2")
    assert plan.summary()["stale"] == [before[index].trial_id for index in (2, 3, 6, 7)]
    begun = rows_of(now, state="RUNNING", epoch=1)
    assert actions(make(now, [*before, *begun])) == ["done", "done", "resume", "resume"] * 2


def test_an_unfinished_row_under_older_numerics_is_merely_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows_of(OURS, state="RUNNING", epoch=3)
    monkeypatch.setitem(NUMERICS, "training", 2)
    plan = make(sweep_of(), before)
    assert plan.counts == {"new": 8}
    assert len(plan.removed) == 8


def test_two_trials_with_one_short_id_are_refused() -> None:
    row = finished(OURS)[0]
    for other in (row, row.replace(sweep="theirs")):
        with pytest.raises(RefusedError, match="whose hash begins with the same 12 digits"):
            make(OURS, [other.replace(digest=row.trial_id + "0" * 52)])


@given(strategies.configs(), st.integers(1, 4))
def test_an_initial_row_stands_for_its_trial(config: TrialConfig, workers: int) -> None:
    trial = Trial(config, "label", workers, 3)
    row = initial_row(trial, OURS)
    assert (row.state, row.epoch, row.attempts, row.position, row.label) == ("PENDING", 0, 0, 3, "label")
    assert (row.trial_id, row.digest, row.cell_id) == (trial.trial_id, trial.digest, trial.cell_id)
    assert (row.epochs, row.split, row.workers) == (config.optim.epochs, config.evaluate.split, workers)
    assert trial_id(config_of(row), row.workers) == row.trial_id
    back = trial_rows(to_table([row], TRIALS_SCHEMA))[0]
    assert trial_id(config_of(back), back.workers) == row.trial_id


@given(strategies.configs(), st.integers(1, 4))
def test_every_config_is_recognised_under_older_numerics(config: TrialConfig, workers: int) -> None:
    def alone() -> Sweep:
        return dataclasses.replace(OURS, trials=(Trial(config, None, workers, 0),))

    before = finished(alone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NUMERICS, "training", 2)
        assert actions(make(alone(), before)) == ["stale"]
        other_workers = dataclasses.replace(OURS, trials=(Trial(config, None, workers + 1, 0),))
        assert actions(make(other_workers, before)) == ["new"]


def test_numerics_are_recorded_by_part() -> None:
    numerics = initial_row(OURS.trials[0], OURS).numerics
    assert numerics == "augmentation_standard=1 digits=1 msda_none=1 training=1 wide_resnet=2"


def test_the_summary_counts_and_adds_up() -> None:
    half = [row.replace(state="RUNNING", epoch=5) for row in rows_of(OURS)]
    summary = make(OURS, half).summary()
    whole = sum(trial_flops(trial.config) for trial in OURS.trials)
    assert summary["train_flops"] == pytest.approx(whole)
    assert summary["train_flops_to_run"] == pytest.approx(whole / 2)
    assert (summary["trials"], summary["cells"], summary["to_run"], summary["epochs_to_run"]) == (8, 4, 8, 40)
    assert summary["actions"] == {"resume": 8}
    assert summary["seeds"] == [0, 1]
    first = summary["by_cell"][0]
    assert first["settings"] == {"model.width": 1, "model.subnetworks": 1}
    assert first["parameters"] == parameters(OURS.trials[0].config)
    assert (first["label"], first["trials"], first["cell_id"]) == ("vanilla", 2, OURS.trials[0].cell_id)


def test_the_summary_is_plain_and_knows_no_time() -> None:
    import json

    rows = [row.replace(updated_at=datetime(2026, 11, 21, tzinfo=UTC)) for row in finished(OURS)]
    assert json.loads(json.dumps(make(OURS, rows).summary())) == make(OURS, finished(OURS)).summary()


def storage(plan: Plan) -> dict[str, Any]:
    held: dict[str, Any] = plan.summary()["storage"]
    return held


def test_storage_is_that_of_the_trials_that_have_finished_and_two_checkpoints_for_each_that_runs() -> None:
    configs = [trial.config for trial in OURS.trials]
    told = storage(make(OURS, []))
    assert told["checkpoints"] == sum(map(checkpoint_bytes, configs))
    assert told["logits"] == sum(map(logits_bytes, configs))
    assert told["end"] == told["checkpoints"] + told["logits"] + told["tables"]
    assert told["per_running_trial"] == 2 * max(map(checkpoint_bytes, configs))
    assert told["peak"] is None  # as many as the cluster holds
    limited = storage(make(sweep_of(rest="resources: {max_gangs: 3}"), []))
    assert limited["peak"] == limited["end"] + 3 * limited["per_running_trial"]


def test_storage_follows_what_is_kept_and_who_has_it() -> None:
    nothing = storage(make(sweep_of(rest="checkpoints: {keep: none}"), []))
    assert nothing["checkpoints"] == 0
    assert nothing["per_running_trial"] > 0
    done = storage(make(OURS, finished(OURS)))
    assert (done["end"], done["per_running_trial"]) == (storage(make(OURS, []))["end"], 0)
    other = sweep_of(name="other")
    cached = storage(make(OURS, finished(other)))
    assert (cached["checkpoints"], cached["logits"]) == (0, 0)
    assert cached["tables"] == done["tables"]
