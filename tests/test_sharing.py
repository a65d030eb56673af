"""Two running sweeps that want the same trials: each is trained once, and none waits for ever."""

import shutil
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from made_engine import Pace, Steps, Threads
from made_rows import DEAD, at, in_a_folder
from test_steering import Running, Shell, hurried, load, mixmo, steps

from orchestrator import driver
from orchestrator import plan as planning
from orchestrator.dispatcher import Order
from orchestrator.errors import ExitCode, UnreachableError
from orchestrator.rows import TrialRow
from orchestrator.sharing import Sharing
from orchestrator.store import Claim, Folder, ResultStore, SweepWriter

__all__ = ["hurried", "mixmo", "steps"]  # fixtures


class Counting(Pace):
    """Counts the epochs of every trial over all sweeps that have it as their pace."""

    def __init__(self, epoch_s: float = 0.0) -> None:
        super().__init__(epoch_s)
        self.epochs: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def epoch(self, order: Order, epoch: int) -> None:
        super().epoch(order, epoch)
        with self._lock:
            self.epochs[order.trial_id, epoch] += 1


def curve(store: ResultStore, sweep: str, trial_id: str) -> list[tuple[int, float | None]]:
    return [(row.epoch, row.metrics["top1"]) for row in store.epoch_rows(sweep, trial_id)]


def test_a_trial_that_runs_in_another_sweep_is_waited_for_and_taken(
    tmp_path: Path, store: ResultStore, steps: Steps
) -> None:
    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(steps, gangs=1))
    steps.until(lambda begun: begun == [(0, 1)])
    pace = Counting()
    second = Running(load(tmp_path, name="second", seeds=2), store, Threads(pace))
    second.until(lambda: second.states() == ["PENDING", "TERMINATED"])  # what is not shared goes on
    steps.open()
    assert (first.end(), second.end()) == (ExitCode.OK, ExitCode.OK)
    shared, own = second.rows()
    assert (shared.state, shared.cached_from, shared.epoch, shared.position) == ("TERMINATED", "first", 4, 0)
    assert own.cached_from is None
    assert {trial_id for trial_id, _ in pace.epochs} == {own.trial_id}
    assert curve(store, "second", shared.trial_id) == curve(store, "first", shared.trial_id)
    assert len(curve(store, "second", shared.trial_id)) == 4
    assert store.folder.sizes("claims") == {}
    assert store.verify("first") == store.verify("second") == []


@in_a_folder
def test_a_store_that_takes_nothing_when_another_sweep_joins_ends_no_sweep(
    tmp_path: Path, store: ResultStore, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Folder.put

    def full(self: Folder, key: str, data: bytes) -> None:
        if key == "sweeps/first/trials.parquet":
            raise UnreachableError("no room")
        put(self, key, data)

    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(steps))
    steps.until(lambda begun: begun == [(0, 1)])
    first.until(lambda: first.states() == ["RUNNING"])
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", full)
        steps.allow()
        first.until(lambda: any("no room" in line for line in first.said))
        second = Running(load(tmp_path, name="second", seeds=1), store, Threads(Counting()))
        second.until(lambda: answers(store) == ["1 trial shared with second"])
    steps.open()
    assert (first.end(), second.end()) == (ExitCode.OK, ExitCode.OK)
    assert second.rows()[0].cached_from == "first"


def answers(store: ResultStore) -> list[str]:
    """What the first sweep's driver has answered."""
    commands = store.commands("first")
    found = [commands.get(name.removesuffix(".json")) for name in commands.names()]
    return [command.answer.text for command in found if command and command.answer]


@in_a_folder
@pytest.mark.parametrize("waits", [True, False])
def test_a_sweep_that_is_removed_while_its_result_is_taken_costs_the_curve_alone(
    tmp_path: Path, store: ResultStore, steps: Steps, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    names, over, to_remove = Folder.names, threading.Event(), ["first"]

    def watched(self: Folder, prefix: str, *, folders: bool = False) -> list[str]:
        """Who takes an epoch lists them, after it has read the trials."""
        if prefix == "sweeps/first/epochs" and threading.current_thread().name == "second" and to_remove:
            assert over.wait(60), "the first sweep does not end"
            store.remove(to_remove.pop())
        return names(self, prefix, folders=folders)

    monkeypatch.setattr(Folder, "names", watched)
    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(steps))
    steps.until(lambda begun: begun == [(0, 1)])
    if waits:
        second = Running(load(tmp_path, name="second", seeds=1), store, Threads(Counting()))
        second.until(lambda: answers(store) != [])
    steps.open()
    assert first.end() == ExitCode.OK
    over.set()
    if not waits:
        second = Running(load(tmp_path, name="second", seeds=1), store, Threads(Counting()))
    assert second.end() == ExitCode.OK
    assert store.sweeps() == ["second"]
    assert [(row.state, row.cached_from) for row in second.rows()] == [("TERMINATED", "first")]
    assert store.verify("second") == []


@in_a_folder
def test_the_result_of_a_sweep_that_ends_while_it_is_looked_at_is_taken(
    tmp_path: Path, store: ResultStore, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a driver that has gone is free: but not by rows that are older than its going."""
    rows_elsewhere = Sharing._rows_elsewhere
    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(steps))
    steps.until(lambda begun: begun == [(0, 1)])

    def overtaken(self: Sharing) -> dict[str, dict[str, TrialRow]]:
        rows = rows_elsewhere(self)
        if threading.current_thread().name == "second":
            steps.open()
            first.end()
        return rows

    monkeypatch.setattr(Sharing, "_rows_elsewhere", overtaken)
    pace = Counting()
    second = Running(load(tmp_path, name="second", seeds=1), store, Threads(pace))
    assert second.end() == ExitCode.OK
    assert [(row.state, row.cached_from) for row in second.rows()] == [("TERMINATED", "first")]
    assert pace.epochs == {}


def test_what_another_sweep_has_finished_is_read_once_and_taken_in_pieces_that_are_whole(
    tmp_path: Path, store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Running(load(tmp_path, name="first", seeds=5), store, Threads(Counting())).end() == ExitCode.OK
    pace, epochs, flush = Counting(), ResultStore.epochs, SweepWriter.flush
    asked: list[str] = []
    stored: list[tuple[int, int]] = []

    def watched(self: ResultStore, sweep: str) -> pa.Table:
        asked.append(sweep)
        return epochs(self, sweep)

    def flushed(self: SweepWriter, *, force: bool = False) -> bool:
        written = flush(self, force=force)
        rows = [row for row in store.trial_rows("second") if row.cached_from == "first"]
        stored.append((len(rows), sum(len(curve(store, "second", row.trial_id)) for row in rows)))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(driver, "TAKEN_TOGETHER", 2)
        patch.setattr(ResultStore, "epochs", watched)
        patch.setattr(SweepWriter, "flush", flushed)
        assert Running(load(tmp_path, name="second", seeds=5), store, Threads(pace)).end() == ExitCode.OK
    assert asked == ["first"]
    assert stored == [(2, 8), (4, 16), (5, 20), (5, 20)]
    assert pace.epochs == {}
    assert store.verify("second") == []


def test_curves_that_cannot_be_taken_over_are_missed_and_told(tmp_path: Path, store: ResultStore) -> None:
    assert Running(load(tmp_path, name="first", seeds=2), store, Threads(Counting())).end() == ExitCode.OK
    part = next(iter(store.snapshot("first").header.parts))
    store.folder.put(f"sweeps/first/epochs/{part}", b"junk")
    assert Running(load(tmp_path, name="second", seeds=2), store, Threads(Counting())).end() == ExitCode.OK
    assert [(row.cached_from, row.epoch) for row in store.trial_rows("second")] == [("first", 4)] * 2
    (told,) = [event.text for event in store.events("second") if event.kind == "damaged"]
    assert told.startswith("the epochs of 2 trials taken from first are not here: ")
    assert part in told
    assert store.verify("second") == []


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_two_sweeps_that_share_all_their_trials_train_each_once_and_both_end(
    tmp_path: Path, store: ResultStore, order: int, steps: Steps
) -> None:
    """With order -1 each has first what the other has last. The one that began earlier learns of the other."""
    seeds, pace = list(range(6)), Counting(0.02)
    gate = Gated(pace, steps)
    first = Running(load(tmp_path, name="first", seeds=seeds), store, Threads(gate))
    steps.until(lambda begun: len(begun) == 2)
    second = Running(load(tmp_path, name="second", seeds=seeds[::order]), store, Threads(pace))
    second.until(lambda: any(row.state != "PENDING" for row in second.rows()))  # it has trials of its own
    steps.open()
    assert (first.end(), second.end()) == (ExitCode.OK, ExitCode.OK)
    assert set(pace.epochs.values()) == {1}
    assert len(pace.epochs) == 6 * 4
    cached = [{row.trial_id for row in each.rows() if row.cached_from} for each in (first, second)]
    trained = [{row.trial_id for row in each.rows() if not row.cached_from} for each in (first, second)]
    assert cached == trained[::-1]
    assert all(trained)  # each did its share
    assert store.folder.sizes("claims") == {}
    assert store.verify("first") == store.verify("second") == []


class Gated(Pace):
    """A pace whose epochs wait for a test's steps before."""

    def __init__(self, pace: Pace, steps: Steps) -> None:
        super().__init__()
        self._pace, self._steps = pace, steps

    def epoch(self, order: Order, epoch: int) -> None:
        self._steps.epoch(order, epoch)
        self._pace.epoch(order, epoch)


@in_a_folder
def test_a_trial_that_fails_in_another_sweep_is_trained_here(tmp_path: Path, store: ResultStore, steps: Steps) -> None:
    class Failing(Steps):
        def epoch(self, order: Order, epoch: int) -> None:
            super().epoch(order, epoch)
            raise ValueError("not on this machine")

    failing = Failing()
    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(failing))
    failing.until(lambda begun: len(begun) == 1)
    second = Running(load(tmp_path, name="second", seeds=1), store, Threads(Counting()))
    second.until(lambda: store.commands("first").names() != [])
    failing.open()
    assert (first.end(), second.end()) == (ExitCode.FAULTS, ExitCode.OK)
    (row,) = second.rows()
    assert (row.state, row.cached_from) == ("TERMINATED", None)


@in_a_folder
def test_a_trial_that_is_cancelled_while_it_waits_for_another_sweep_is_over(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    first = Running(load(tmp_path, name="first", seeds=1), store, Threads(steps))
    steps.until(lambda begun: begun == [(0, 1)])
    second = Running(load(tmp_path, name="second", seeds=2), store, Threads(Pace()))
    second.until(lambda: second.states() == ["PENDING", "TERMINATED"])
    mixmo("cancel", "second", second.rows()[0].trial_id)
    assert second.end() == ExitCode.OK
    assert second.states() == ["CANCELLED", "TERMINATED"]
    steps.open()
    assert first.end() == ExitCode.OK


@in_a_folder
def test_a_paused_or_stopping_sweep_leaves_its_trials_to_the_other(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    first = Running(load(tmp_path, name="first", seeds=3), store, Threads(steps, gangs=1))
    steps.until(lambda begun: begun == [(0, 1)])
    second = Running(load(tmp_path, name="second", seeds=3), store, Threads(Counting(0.01)))
    second.until(lambda: [row.state for row in second.rows()][1:] == ["TERMINATED", "TERMINATED"])
    mixmo("pause", "first")
    steps.allow()
    assert second.end() == ExitCode.OK
    shared = second.rows()[0]
    assert (shared.state, shared.cached_from, shared.epoch) == ("TERMINATED", None, 4)  # from the first's checkpoint
    mixmo("resume", "first")
    assert first.end() == ExitCode.OK
    assert [row.cached_from for row in first.rows()] == ["second"] * 3
    assert steps.begun == [(0, 1)]
    assert store.verify("first") == store.verify("second") == []


@in_a_folder
def test_a_sweep_whose_driver_has_died_keeps_no_trial_from_anybody(tmp_path: Path, store: ResultStore) -> None:
    sweep = load(tmp_path, name="second", seeds=2)
    dead = load(tmp_path, name="first", seeds=2)
    assert driver.run(dead, store, engine=Threads().engine) == ExitCode.OK
    with_rows = store.trial_rows("first")
    writer = store.writer("first", sweep_text=dead.text, process=DEAD)
    again = load(tmp_path, name="third", seeds=3)
    store.claims("first", writer.fence).take(again.trials[2].trial_id, lambda claim: True)
    assert driver.run(sweep, store, engine=Threads().engine) == ExitCode.OK
    assert [row.cached_from for row in store.trial_rows("second")] == ["first"] * len(with_rows)
    assert driver.run(again, store, engine=Threads().engine) == ExitCode.OK
    assert store.trial_rows("third")[2].cached_from is None


@in_a_folder
@pytest.mark.parametrize("damaged", ["lease.json", "trials.parquet", None])
def test_a_sweep_that_is_damaged_or_deleted_meanwhile_keeps_no_trial_from_anybody(
    tmp_path: Path, store: ResultStore, steps: Steps, damaged: str | None
) -> None:
    shared = load(tmp_path, name="first", seeds=2)
    writer = store.writer("first", sweep_text=shared.text)  # it has begun, and answers no command
    writer.put(planning.initial_row(trial, shared).replace(state="RUNNING") for trial in shared.trials)
    writer.flush(force=True)
    second = Running(load(tmp_path, name="second", seeds=3), store, Threads(steps))
    steps.until(lambda begun: begun == [(2, 1)])
    at(store, "sweeps/first/lease.json").unlink()
    if damaged:
        at(store, f"sweeps/first/{damaged}").write_bytes(b"not what it was")
    else:
        shutil.rmtree(at(store, "sweeps/first"))
    steps.open()
    assert second.end() == ExitCode.OK
    assert "2 of them are to run in first as well, at this moment: each is trained once, for both" in second.said
    assert [row.cached_from for row in second.rows()] == [None] * 3


def test_sweeps_that_share_nothing_ask_for_nothing(tmp_path: Path, store: ResultStore, steps: Steps) -> None:
    first = Running(load(tmp_path, name="first", seeds=[0, 1]), store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    assert driver.run(load(tmp_path, name="second", seeds=[2, 3]), store, engine=Threads().engine) == ExitCode.OK
    assert store.commands("first").names() == []
    steps.open()
    assert first.end() == ExitCode.OK
    assert store.folder.sizes("claims") == {}


# ----------------------------------------------------------------------------------------------------------- claims


def test_a_claim_is_one_drivers_until_it_is_dropped_or_its_driver_is_gone(store: ResultStore) -> None:
    first, second = store.claims("first", 3), store.claims("second", 1)
    asked: list[Claim] = []

    def lives(claim: Claim) -> bool:
        asked.append(claim)
        return True

    assert first.take("0123456789ab", lives)
    assert first.take("0123456789ab", lives)  # it is ours
    assert not second.take("0123456789ab", lives)
    assert asked == [Claim("first", 3)]
    second.drop("0123456789ab")  # not ours to drop
    assert not second.take("0123456789ab", lives)
    first.drop("0123456789ab")
    assert second.take("0123456789ab", lives)
    assert store.claims("second", 2).take("0123456789ab", lambda claim: False)  # of the driver before
    assert not second.take("0123456789ab", lives)
    store.folder.put("claims/0123456789ab.json", b"no claim")
    assert second.take("0123456789ab", lives)
    assert store.folder.sizes("claims").keys() == {"claims/0123456789ab.json"}


def test_of_many_that_claim_one_trial_at_once_one_has_it(store: ResultStore) -> None:
    for stale in (False, True):
        if stale:
            assert store.claims("gone", 1).take("b" * 12, lambda claim: False)
        start, taken = threading.Barrier(8), list[int]()

        def take(
            fence: int, start: threading.Barrier = start, taken: list[int] = taken, trial_id: str = "ab"[stale] * 12
        ) -> None:
            claims = ResultStore.open(store.uri).claims("sweep", fence)
            start.wait()
            if claims.take(trial_id, lambda claim: claim.sweep != "gone"):
                taken.append(fence)

        threads = [threading.Thread(target=take, args=(fence,)) for fence in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
