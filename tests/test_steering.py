"""A running sweep and those who steer it: the real driver, dispatcher and store, over gangs that only count."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from made_engine import Pace, Steps, Threads
from made_rows import ELSEWHERE, in_a_folder

from orchestrator import cli, driver, sharing, steering
from orchestrator import sweep as sweeps
from orchestrator.cli import steering as commands
from orchestrator.dispatcher import Order
from orchestrator.errors import ExitCode, NotFoundError
from orchestrator.rows import TrialRow
from orchestrator.store import DamagedError, Folder, ResultStore

SWEEP = """
name: {name}
trial:
  data: {{dataset: digits, train_images: 200, batch_size: 40, augmentation: none}}
  model: {{depth: 10, width: 1, subnetworks: 1}}
  optim: {{epochs: {epochs}, lr: 0.1}}
blocks: [{{label: all}}]
seeds: {seeds}
resources: {{gpus_per_worker: 0}}
"""
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds for the store's sake is done at once here."""
    monkeypatch.setattr(steering, "PERIOD_S", 0.05)
    monkeypatch.setattr(driver, "PERIOD_S", 0.05)
    monkeypatch.setattr(sharing, "PERIOD_S", 0.3)
    monkeypatch.setattr(sharing, "EAGER_S", 0.05)
    monkeypatch.setattr(commands, "POLL_S", 0.05)


def load(
    folder: Path, *, name: str = "made", seeds: int | list[int] = 4, epochs: int = 4, overrides: Sequence[str] = ()
) -> sweeps.Sweep:
    file = folder / f"{name}.yaml"
    file.write_text(SWEEP.format(name=name, seeds=seeds, epochs=epochs))
    return sweeps.load(file, overrides=overrides)


class Running:
    """A driver in a thread of its own."""

    def __init__(self, sweep: sweeps.Sweep, store: ResultStore, threads: Threads) -> None:
        self.store, self.name, self.said = store, sweep.name, list[str]()
        self._ended: list[ExitCode | BaseException] = []
        self._run: Callable[[], ExitCode] = lambda: driver.run(
            sweep, ResultStore.open(store.uri), engine=threads.engine, talk=self.said.append
        )
        self._thread = threading.Thread(target=self._live, name=sweep.name)
        self._thread.start()

    def _live(self) -> None:
        try:
            self._ended.append(self._run())
        except BaseException as error:
            self._ended.append(error)

    def end(self) -> ExitCode:
        """How it ended, once it has."""
        self._thread.join(PATIENCE_S)
        assert self._ended, "it goes on"
        if isinstance(self._ended[0], BaseException):
            raise self._ended[0]
        return self._ended[0]

    def rows(self) -> list[TrialRow]:
        return self.store.trial_rows(self.name)

    def states(self) -> list[str]:
        return [row.state for row in self.rows()]

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(NotFoundError):  # not yet
                if happened():
                    return
            assert time.monotonic() < deadline, self.rows()
            assert not self._ended, self._ended
            time.sleep(0.02)


class Shell:
    """The command line in this process, on one store."""

    def __init__(self, store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
        self._store, self._capsys = store, capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it said, on both streams."""
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--results", self._store.uri])
        out, err = self._capsys.readouterr()
        assert ended.value.code == code, (words, out, err)
        return out + err


@pytest.fixture
def mixmo(store: ResultStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Shell(store, capsys)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def steps() -> Iterator[Steps]:
    """Whatever a test ends with, no gang waits for it."""
    steps = Steps()
    yield steps
    steps.open()


class Failing(Steps):
    """As `Steps`; the trials at some positions fail in their second epoch until they are mended."""

    def __init__(self, *positions: int) -> None:
        super().__init__()
        self.positions = set(positions)

    def epoch(self, order: Order, epoch: int) -> None:
        super().epoch(order, epoch)
        if order.index in self.positions and epoch == 2:
            raise ValueError("no such luck")


# -------------------------------------------------------------------------------------------------- a running driver


def test_a_sweep_runs_to_its_end_over_threads(tmp_path: Path, store: ResultStore) -> None:
    assert driver.run(load(tmp_path), store, engine=Threads(Pace()).engine) == ExitCode.OK
    assert [(row.state, row.epoch, row.attempts) for row in store.trial_rows("made")] == [("TERMINATED", 4, 1)] * 4
    assert store.verify("made") == []
    assert store.folder.sizes("claims") == store.folder.sizes("sweeps/made/commands") == {}


def test_stop_lets_running_trials_finish_and_the_same_command_goes_on(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    sweep = load(tmp_path)
    running = Running(sweep, store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    said = mixmo("stop", "made")
    assert "made: 2 running trials to finish, nothing new starts" in said
    steps.open()
    assert running.end() == ExitCode.STOPPED
    assert running.states() == ["TERMINATED", "TERMINATED", "PENDING", "PENDING"]
    (event,) = [event for event in store.events("made") if event.kind == "stop"]
    assert "2 running trials" in event.text
    assert "@" in event.text  # who it was
    assert driver.run(sweep, store, engine=Threads().engine) == ExitCode.OK
    assert running.states() == ["TERMINATED"] * 4
    assert store.verify("made") == []


@in_a_folder
def test_stop_now_ends_at_once_with_all_that_had_arrived(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    threads = Threads(steps)
    running = Running(load(tmp_path), store, threads)
    steps.until(lambda begun: len(begun) == 2)
    steps.allow(2)
    running.until(lambda: sum(row.epoch for row in running.rows()) == 2)
    assert "ends now" in mixmo("stop", "made", "--now")
    assert threads.crews[0].closed.wait(60)  # before that, trials that go on could still come to their end
    steps.open()
    assert running.end() == ExitCode.STOPPED
    assert running.said[-1] == "stopping now"
    assert set(running.states()) == {"PENDING"}
    assert sum(row.epoch for row in running.rows()) >= 2


def test_a_paused_sweep_saves_its_trials_and_goes_on_from_there(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    running = Running(load(tmp_path, seeds=3), store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    assert "2 running trials to be saved" in mixmo("pause", "made")
    steps.allow(2)
    running.until(lambda: running.states() == ["PAUSED", "PAUSED", "PENDING"])
    assert [row.epoch for row in running.rows()] == [1, 1, 0]
    assert all(row.checkpoint for row in running.rows()[:2])
    status = json.loads(mixmo("status", "made", "--json"))
    assert (status["status"], status["paused"], status["running"], status["eta_s"]) == ("paused", 2, 0, None)
    assert "paused by " in mixmo("watch", "made", "--once")
    assert "paused already" in mixmo("pause", "made")
    begun = len(steps.begun)
    steps.open()
    time.sleep(0.5)
    assert len(steps.begun) == begun  # nothing is handed out
    assert "goes on" in mixmo("resume", "made")
    assert running.end() == ExitCode.OK
    assert [(row.state, row.epoch, row.attempts) for row in running.rows()] == [
        ("TERMINATED", 4, 2), ("TERMINATED", 4, 2), ("TERMINATED", 4, 1),
    ]  # fmt: skip
    assert sorted(steps.begun) == [(index, epoch) for index in range(3) for epoch in range(1, 5)]  # none was repeated
    assert store.verify("made") == []


@in_a_folder
@pytest.mark.parametrize("harm", [None, b"junk"], ids=["gone", "junk"])
def test_a_sweep_whose_live_file_is_lost_goes_on_from_its_checkpoints(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell, harm: bytes | None
) -> None:
    threads = Threads(steps)
    running = Running(load(tmp_path, seeds=2), store, threads)
    steps.allow(4)
    running.until(lambda: sum(row.epoch for row in running.rows()) == 4)
    mixmo("stop", "made", "--now")
    assert threads.crews[0].closed.wait(60)
    steps.open()
    running.end()
    begun = len(steps.begun)
    reached = {row.position: row.epoch for row in running.rows()}
    key = f"sweeps/made/epochs/live-{store.snapshot('made').header.fence}.parquet"
    store.folder.delete(key) if harm is None else store.folder.put(key, harm)
    with pytest.raises(DamagedError, match=r"Run the sweep again: .* come again with their checkpoints"):
        store.compact("made")
    assert {fault.advice.partition(":")[0] for fault in store.verify("made")} >= {"run the sweep again"}
    again = Running(load(tmp_path, seeds=2), store, Threads(steps))
    assert again.end() == ExitCode.OK
    assert [(row.state, row.epoch) for row in again.rows()] == [("TERMINATED", 4)] * 2
    assert store.verify("made") == []
    assert [each.kind for each in store.events("made")].count("damaged") == 1
    assert all(epoch > reached[index] for index, epoch in steps.begun[begun:])


def test_a_paused_sweep_can_be_stopped_and_its_next_driver_does_not_pause(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    sweep = load(tmp_path, seeds=2)
    running = Running(sweep, store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    mixmo("pause", "made")
    steps.allow(2)
    running.until(lambda: running.states() == ["PAUSED", "PAUSED"])
    mixmo("stop", "made")
    assert running.end() == ExitCode.STOPPED
    assert running.states() == ["PENDING", "PENDING"]
    assert store.snapshot("made").header.paused_by is None
    steps.open()
    assert driver.run(sweep, store, engine=Threads(steps).engine) == ExitCode.OK
    assert [row.epoch for row in running.rows()] == [4, 4]


def test_a_cancelled_trial_ends_alone_and_stays_cancelled_until_it_is_asked_for(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    sweep = load(tmp_path)
    running = Running(sweep, store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    in_hand, waiting = running.rows()[0].trial_id, running.rows()[3].trial_id
    assert "2 trials cancelled" in mixmo("cancel", "made", in_hand[:8], waiting)
    steps.open()
    assert running.end() == ExitCode.OK
    assert running.states() == ["CANCELLED", "TERMINATED", "TERMINATED", "CANCELLED"]
    assert all(
        (row.error_cause or "").startswith("cancelled by ") for row in running.rows() if row.state != "TERMINATED"
    )
    assert (0, 3) not in steps.begun  # the gang heard of it at its next report
    assert store.verify("made") == []
    said: list[str] = []
    assert driver.run(sweep, store, engine=Threads().engine, talk=said.append) == ExitCode.OK
    assert said == ["made: nothing to run, all 4 trials have ended (2 cancelled: `mixmo retry` queues them again)"]
    assert running.states() == ["CANCELLED", "TERMINATED", "TERMINATED", "CANCELLED"]

    assert "2 trials queued again" in mixmo("retry", "made", "--cancelled")
    assert "nothing to retry" in mixmo("retry", "made", "--failed")
    assert driver.run(sweep, store, engine=Threads().engine) == ExitCode.OK
    assert running.states() == ["TERMINATED"] * 4
    assert store.verify("made") == []


@in_a_folder
def test_a_cancelled_sweep_ends_with_what_it_has(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    running = Running(load(tmp_path), store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    assert "give --yes" in mixmo("cancel", "made", code=6)  # nobody can be asked here
    assert running.states().count("CANCELLED") == 0
    assert "4 trials cancelled" in mixmo("cancel", "made", "--yes")
    steps.open()
    assert running.end() == ExitCode.STOPPED
    assert running.states() == ["CANCELLED"] * 4
    assert "every trial has ended" in mixmo("cancel", "made", "--yes")


def test_a_failed_trial_is_queued_again_by_the_driver_that_saw_it_fail(
    tmp_path: Path, store: ResultStore, mixmo: Shell
) -> None:
    steps = Failing(0, 1)
    running = Running(load(tmp_path, seeds=3), store, Threads(steps, gangs=1))
    steps.allow(4)
    running.until(lambda: running.states()[:2] == ["ERROR", "ERROR"])
    steps.positions.clear()
    failed = [row.trial_id for row in running.rows()[:2]]
    assert "1 trial queued again" in mixmo("retry", "made", failed[1])
    assert "1 trial queued again" in mixmo("retry", "made", "--failed", "--cause", "VALUEerror")
    steps.open()
    assert running.end() == ExitCode.OK
    assert [(row.state, row.attempts, row.error) for row in running.rows()] == [
        ("TERMINATED", 2, None), ("TERMINATED", 2, None), ("TERMINATED", 1, None),
    ]  # fmt: skip
    assert steps.begun.count((0, 1)) == 1  # it went on from its checkpoint
    assert store.verify("made") == []


def test_a_trial_that_failed_in_an_earlier_run_is_queued_again_by_the_running_driver(
    tmp_path: Path, store: ResultStore, mixmo: Shell
) -> None:
    failing = Failing(0)
    failing.open()
    assert driver.run(load(tmp_path, seeds=1), store, engine=Threads(failing).engine) == ExitCode.FAULTS
    steps = Steps()
    running = Running(load(tmp_path, seeds=3), store, Threads(steps, gangs=1))
    steps.until(lambda begun: begun == [(1, 1)])
    assert "1 trial queued again" in mixmo("retry", "made", "--failed")
    steps.open()
    assert running.end() == ExitCode.OK
    assert running.states() == ["TERMINATED"] * 3
    assert store.verify("made") == []


@in_a_folder
def test_a_price_that_is_given_after_the_end_is_that_of_the_tables(
    tmp_path: Path, store: ResultStore, mixmo: Shell
) -> None:
    driver.run(load(tmp_path, seeds=1), store, engine=Threads().engine)
    priced = load(tmp_path, seeds=1, overrides=["price.gpu_hour=4"])
    said: list[str] = []
    assert driver.run(priced, store, engine=Threads().engine, talk=said.append) == ExitCode.OK
    assert store.sweep_file("made") == priced.text_as_run
    assert store.lease("made") is None
    assert driver.run(priced, store, engine=Threads().engine, talk=said.append) == ExitCode.OK
    assert said == ["made: nothing to run, all 1 trials have ended"]
    assert mixmo("pareto", "made", "--cost", "money")


# ------------------------------------------------------------------------------------------------ answers and refusals


@in_a_folder
def test_without_a_driver_there_is_none_to_stop_and_a_finished_trial_is_not_trained_again(
    tmp_path: Path, store: ResultStore, mixmo: Shell
) -> None:
    driver.run(load(tmp_path, seeds=2), store, engine=Threads().engine)
    for verb in ("stop", "pause", "resume"):
        assert f"none to {verb}. `mixmo run FILE" in mixmo(verb, "made", code=6)
    before = store.trial_rows("made")
    assert "a result is never replaced" in mixmo("retry", "made", before[0].trial_id, code=6)
    assert "begins no trial id" in mixmo("retry", "made", "zzz", code=5)
    assert "say which trials, in one way" in mixmo("retry", "made", code=2)
    assert "in one way" in mixmo("retry", "made", "--failed", "--cancelled", code=2)
    assert "no sweep other" in mixmo("stop", "other", code=5)
    assert store.trial_rows("made") == before


@in_a_folder
def test_a_sweep_that_keeps_no_checkpoints_leaves_those_that_another_names(
    tmp_path: Path, store: ResultStore, mixmo: Shell
) -> None:
    """A trial fails in the first, is trained by the second meanwhile, and asked for again."""
    steps = Failing(0)
    file = tmp_path / "first.yaml"
    file.write_text(SWEEP.format(name="first", seeds=2, epochs=4) + "checkpoints: {keep: none}\n")
    first = Running(sweeps.load(file), store, Threads(steps, gangs=1))
    steps.allow(2)
    first.until(lambda: "ERROR" in first.states())
    assert driver.run(load(tmp_path, name="second", seeds=1), store, engine=Threads().engine) == ExitCode.OK
    (row,) = store.trial_rows("second")
    mixmo("retry", "first", row.trial_id)
    steps.positions.clear()
    steps.open()
    assert first.end() == ExitCode.OK
    assert [each.checkpoint for each in first.rows()] == [None, None]
    assert store.checkpoints(first.rows()[1].trial_id) == []
    assert store.checkpoints(row.trial_id) == [row.checkpoint]
    assert store.verify("second") == []


@in_a_folder
def test_cancel_and_retry_work_without_a_driver(tmp_path: Path, store: ResultStore, mixmo: Shell) -> None:
    sweep, steps = load(tmp_path), Steps()
    threads = Threads(steps)
    running = Running(sweep, store, threads)
    steps.until(lambda begun: len(begun) == 2)
    steps.allow(2)
    running.until(lambda: sum(row.epoch for row in running.rows()) == 2)
    mixmo("stop", "made", "--now")
    assert threads.crews[0].closed.wait(60), "what is reported from here on is the last"
    steps.open()
    running.end()
    assert "4 trials cancelled" in mixmo("cancel", "made", "--yes")
    assert running.states() == ["CANCELLED"] * 4
    assert store.lease("made") is None
    assert store.verify("made") == []
    told = json.loads(mixmo("retry", "made", running.rows()[1].trial_id, "--json").partition("\nmade:")[0])
    assert (told["schema"], told["done"], told["command"]) == ("mixmo.retry/1", True, None)
    assert running.states() == ["CANCELLED", "PENDING", "CANCELLED", "CANCELLED"]
    assert driver.run(sweep, store, engine=Threads().engine) == ExitCode.OK
    assert running.states() == ["CANCELLED", "TERMINATED", "CANCELLED", "CANCELLED"]
    assert store.verify("made") == []


@in_a_folder
def test_a_command_to_an_earlier_driver_is_not_carried_out_by_a_later_one(
    tmp_path: Path, store: ResultStore, steps: Steps
) -> None:
    store.commands("made").give("stop", fence=0, given_by="ada@lab")
    running = Running(load(tmp_path), store, Threads(steps))
    steps.open()
    assert running.end() == ExitCode.OK
    (name,) = store.commands("made").names()
    command = store.commands("made").get(name.removesuffix(".json"))
    assert command is not None
    assert command.answer is not None
    assert (command.answer.done, command.answer.fence) == (False, 1)
    assert "give it again" in command.answer.text


@in_a_folder
def test_what_a_driver_does_not_know_or_cannot_do_is_refused(
    tmp_path: Path, store: ResultStore, steps: Steps, mixmo: Shell
) -> None:
    running = Running(load(tmp_path), store, Threads(steps))
    steps.until(lambda begun: len(begun) == 2)
    strange = store.commands("made").give("dance", fence=1, given_by="ada@lab")
    mixmo("stop", "made")
    answered = store.commands("made").get(strange.id)  # it came before
    assert answered is not None
    assert answered.answer is not None
    assert not answered.answer.done
    assert "knows no dance" in answered.answer.text
    assert "the sweep is stopping" in mixmo("pause", "made", code=6)
    running.until(lambda: json.loads(mixmo("status", "made", "--json"))["status"] == "stopping")
    assert "was not paused" in mixmo("resume", "made")
    steps.open()
    assert running.end() == ExitCode.STOPPED
    assert json.loads(mixmo("status", "made", "--json"))["status"] == "stopped"


@in_a_folder
def test_a_driver_lives_by_the_clock_of_its_results_and_not_by_that_of_who_asks(
    store: ResultStore, mixmo: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    modified, clock = Folder.modified, Folder.clock
    monkeypatch.setattr(Folder, "modified", lambda *asked: modified(*asked) - 95.0)
    monkeypatch.setattr(Folder, "clock", lambda *asked: clock(*asked) - 95.0)
    with store.writer("made", sweep_text="name: made\n", process=ELSEWHERE):
        assert "given to the driver" in mixmo("stop", "made", "--no-wait")


@in_a_folder
def test_a_driver_that_does_not_answer_or_ends_is_told_apart(
    store: ResultStore, mixmo: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "WAIT_S", 0.3)
    writer = store.writer("made", sweep_text="name: made\n")  # it holds the sweep, and looks for no command
    assert "The command stays" in mixmo("stop", "made", code=4)
    assert "given to the driver" in mixmo("stop", "made", "--no-wait")
    monkeypatch.setattr(commands, "WAIT_S", PATIENCE_S)
    timer = threading.Timer(0.3, lambda: writer.close(done=False))
    timer.start()
    assert "ended before it took the command" in mixmo("stop", "made", code=6)
    timer.join()
