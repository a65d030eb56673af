"""Optuna's TPE over sweeps that are killed and go on: without a driver, and whole sweeps of threads."""

import math
import subprocess
import sys
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import made_engine
import pytest
from made_engine import Killing, MadeCrew, Threads
from test_ranges import ALPHA, LR, load

from mixmo_core.config import flatten
from orchestrator import driver, pages, plan, searching
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import Roll, Update
from orchestrator.engine import datasets_of
from orchestrator.errors import SweepError, UsageError
from orchestrator.roster import Scene, decide, most_of
from orchestrator.rows import TrialRow, config_of
from orchestrator.store import ResultStore, SweepWriter

optuna = pytest.importorskip("optuna")
RANGES = f"{LR}, model.width: {{min: 1, max: 8}}, {ALPHA}, data.batch_size: {{choices: [20, 40]}}"


def tpe(**given: Any) -> sweeps.Sweep:
    return load(**({"method": "optuna", "samples": 14, "seeds": 1, "ranges": RANGES} | given))


def reached(config: Mapping[str, float]) -> float:
    """A hill: the best is at lr 0.1, width 5."""
    return 1.0 / (1 + abs(math.log10(config["optim.lr"]) + 1) + abs(config["model.width"] - 5))


class Life:
    """A sweep without a driver: what is drawn, and what becomes of it."""

    def __init__(self, sweep: sweeps.Sweep, rows: list[TrialRow] | None = None) -> None:
        self.rows = list(rows or [])
        self.sweep = searching.taken_up(sweep, self.rows)
        held = {row.trial_id: row for row in self.rows}
        at = {trial.position: held.get(trial.trial_id) or plan.initial_row(trial, self.sweep)
              for trial in self.sweep.trials}  # fmt: skip
        self.guide = searching.Guide(self.sweep, at)
        self.open = [row for row in at.values() if row.state == "PENDING"]

    def draw(self) -> None:
        for trial in self.guide.draw():
            row = plan.initial_row(trial, self.sweep)
            self.rows.append(row)
            self.open.append(row)

    def end(self, number: int = 0, **changes: Any) -> None:
        row = self.open.pop(number)
        metrics = {"top1": reached(flatten(config_of(row)))}
        seq = max((each.seq for each in self.rows), default=0) + 1
        ended = row.replace(**({"state": "TERMINATED", "epoch": 4, "seq": seq, "metrics": metrics} | changes))
        self.rows = [ended if each.trial_id == row.trial_id else each for each in self.rows]
        self.guide.ended(ended)

    def ids(self) -> list[str]:
        return [row.trial_id for row in self.rows]


def lived(sweep: sweeps.Sweep, at_once: int, cut: int | None = None) -> Life:
    """To its end; `cut`: it is killed after so many draws, and taken up from the rows."""
    life = Life(sweep)
    while life.guide.more or life.open:
        while len(life.open) < at_once and life.guide.more:
            life.draw()
            if len(life.rows) == cut:
                life = Life(sweep, life.rows)
        changes: dict[str, Any] = {}
        if len(life.rows) % 5 == 3:
            changes = {"stopped_early": True, "epoch": 2}
        elif len(life.rows) % 7 == 4:
            changes = {"state": "ERROR"}
        life.end(len(life.rows) % len(life.open), **changes)
    return life


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_search_that_is_taken_up_draws_what_the_undisturbed_one_draws(at_once: int) -> None:
    whole = lived(tpe(), at_once)
    assert len(whole.rows) == 28
    for cut in (1, 5, 12, 20, 27):
        assert lived(tpe(), at_once, cut).ids() == whole.ids(), cut


def test_cells_take_turns_and_each_has_its_own_draws() -> None:
    rows = lived(tpe(), 1).rows
    assert [row.config["mixing_method"] for row in rows] == ["linear", "cutmix"] * 14
    assert all(row.config["mixing_alpha"] in (None, 2.0) for row in rows[::2])
    assert len({row.config["optim_lr"] for row in rows}) == 28


def test_what_was_learned_makes_draws_better() -> None:
    rows = lived(tpe(methods="linear", samples=60), 1).rows
    values = [row.metrics["top1"] or 0.0 for row in rows if row.state == "TERMINATED"]
    assert sum(values[-15:]) > 1.5 * sum(values[:10]) / 10 * 15


def test_a_draw_is_trained_with_every_seed_and_told_once_as_their_mean() -> None:
    life = Life(tpe(seeds=3, methods="linear"))
    life.draw()
    assert [row.config["seed"] for row in life.rows] == [0, 1, 2]
    assert len({row.cell_id for row in life.rows}) == 1
    study = life.guide._studies[0]._study
    for top1 in (0.2, 0.4, 0.9):
        assert study.trials[-1].state.name == "RUNNING"
        life.end(metrics={"top1": top1})
    assert (study.trials[-1].state.name, study.trials[-1].value) == ("COMPLETE", pytest.approx(0.5))


def test_a_small_space_is_drawn_out_without_an_end_to_wait_for() -> None:
    sweep = tpe(methods="linear", ranges="model.width: {min: 1, max: 3}")
    life = lived(sweep, 2)
    assert sorted(row.config["model_width"] for row in life.rows) == [1, 2, 3]
    assert life.guide.draw() == []


def test_a_plan_counts_what_is_still_to_be_drawn(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    fresh = plan.against(store, tpe(seeds=2, samples=3))
    assert (fresh.summary()["to_draw"], fresh.summary()["to_run"]) == (12, 0)
    assert "12 more trials" in fresh.summary()["notes"][-1]
    assert "To run: 12 (12 to be drawn)" in pages.plan(fresh.summary(), {}, 100).plain
    assert fresh.sweep.origins["optim.lr"] == "varies"


def test_rows_of_a_changed_file_are_no_draws_of_it() -> None:
    rows = lived(tpe(), 1).rows
    narrower = RANGES.replace("max: 8", "max: 3")
    kept = searching.taken_up(tpe(ranges=narrower), rows).trials
    assert [trial.trial_id for trial in kept] == [row.trial_id for row in rows if row.config["model_width"] <= 3]
    other = searching.taken_up(load(method="optuna", ranges=LR), rows)
    assert other.trials == ()
    assert other.to_draw == 2 * 3 * 2


def test_seeds_that_a_file_has_got_since_are_trained_for_all_draws() -> None:
    rows = lived(tpe(samples=2, methods="linear"), 1).rows
    more = searching.taken_up(tpe(samples=2, methods="linear", seeds=2), rows)
    assert [trial.config.seed for trial in more.trials] == [0, 0, 1, 1]
    assert more.to_draw == 0


def test_ranges_that_cannot_be_trained_together_are_told_before_anything_starts() -> None:
    with pytest.raises(SweepError, match=r"data\.repetition"):
        tpe(ranges="data.repetition: {min: 1, max: 7}")


def test_a_missing_optuna_is_told_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'mixmo-sweeps\[optuna\]'"):
        searching.check_installed(tpe())
    searching.check_installed(load())


def test_a_search_needs_the_datasets_of_what_it_has_yet_to_draw() -> None:
    """They are checked before anything starts, and every host copies them."""
    assert tpe().trials == ()
    assert datasets_of(tpe()) == datasets_of(load()) != []


# ------------------------------------------------------------------------------------------- whole sweeps, over threads


def live(uri: str, epochs: int) -> None:
    flush = SweepWriter.flush
    SweepWriter.flush = lambda self, *, force=False: flush(self, force=True)  # type: ignore[method-assign]
    store = ResultStore.open(uri, create=True)
    pace = Killing(epochs, lambda: len(store.trial_rows("made")) > 10)
    driver.run(whole(), store, engine=Threads(pace, gangs=1).engine)


def whole() -> sweeps.Sweep:
    return tpe(methods="linear", samples=16)


def outcome(store: ResultStore) -> list[tuple[int, str, str, int]]:
    return [(row.position, row.trial_id, row.state, row.epoch) for row in store.trial_rows("made")]


@pytest.mark.slow
def test_a_sweep_of_draws_that_is_killed_goes_on_with_the_draws_of_the_undisturbed_one(tmp_path: Path) -> None:
    stores = [ResultStore.open(str(tmp_path / name), create=True) for name in ("undisturbed", "killed")]
    assert driver.run(whole(), stores[0], engine=Threads(gangs=1).engine, talk=lambda _: None) == 0
    assert len(outcome(stores[0])) == 16
    code = "import sys, test_searching; test_searching.live(sys.argv[1], int(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, stores[1].uri, "47"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 9, done.stdout + done.stderr
    assert 10 < len(outcome(stores[1])) < 16
    assert driver.run(whole(), stores[1], engine=Threads(gangs=1).engine, talk=lambda _: None) == 0
    assert outcome(stores[1]) == outcome(stores[0])
    assert stores[1].verify("made") == []
    said: list[str] = []
    assert driver.run(whole(), stores[1], engine=Threads(gangs=1).engine, talk=said.append) == 0
    assert said == ["made: nothing to run, all 16 trials have ended"]


def test_no_more_is_drawn_than_gangs_can_train_and_every_draw_is_an_event(tmp_path: Path) -> None:
    store = ResultStore.open(str(tmp_path), create=True)
    assert driver.run(tpe(samples=4), store, engine=Threads(gangs=2).engine, talk=lambda _: None) == 0
    rows, events = store.trial_rows("made"), store.events("made")
    assert {row.state for row in rows} == {"TERMINATED"}
    drawn = [event.trial_id for event in events if event.kind == "drawn"]
    assert drawn == [row.trial_id for row in rows]
    open_now = most = 0
    for event in events:
        open_now += (event.kind == "drawn") - (event.kind == "terminated")
        most = max(most, open_now)
    assert most == 2


class Elastic(MadeCrew):
    """As the fleet on a cluster: it has one machine, and as the third trial has ended three more have come."""

    ended = 0

    def _room(self) -> int:
        return 4 if self.ended >= 3 else 1

    def size(self) -> int:
        return most_of(self._room(), None)

    def updates(self, wait_s: float) -> list[Update]:
        told = super().updates(wait_s)
        self.ended += sum(update.kind == "ended" for update in told)
        roll: Roll = self._loop.call(self.desk.roll)
        gangs = dict.fromkeys(thread.name for thread in self._threads)
        self.form(decide(Scene(queued=roll.queued, in_hand=roll.in_hand, gangs=gangs, room=self._room())).form)
        return told


def test_a_search_with_one_seed_grows_with_the_machines_that_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw waits for no gang, else no gang would be formed for it."""
    monkeypatch.setattr(made_engine, "MadeCrew", Elastic)
    store, threads = ResultStore.open(str(tmp_path), create=True), Threads(made_engine.Pace(0.01), gangs=1)
    assert driver.run(whole(), store, engine=threads.engine, talk=lambda _: None) == 0
    assert [row.state for row in store.trial_rows("made")] == ["TERMINATED"] * 16
    assert len(threads.crews[0]._threads) == 4
    told = [event.kind for event in store.events("made") if event.kind in ("drawn", "terminated")]
    assert told[:10] == ["drawn", "terminated"] * 3 + ["drawn"] * 4, (
        "each end of one is followed by one, until there is room"
    )
    assert max(accumulate(1 if kind == "drawn" else -1 for kind in told)) == 4
