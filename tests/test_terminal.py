"""The screen in a real terminal: keys are sent through tmux, and what stands on the screen is read back."""

import dataclasses
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sample_sweep
from rich.console import Console
from rich.text import Text
from sample_sweep import NAME, NOW

from orchestrator import lines
from orchestrator.screen import Scene
from orchestrator.screen.frame import drawn
from orchestrator.screen.state import State
from orchestrator.screen.terminal import Terminal
from orchestrator.store import ResultStore

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 90.0
_numbers = itertools.count(1)


class Tmux:
    """A terminal of its own server, in which a shell runs one command."""

    def __init__(self, folder: Path, command: str, size: tuple[int, int] = (100, 30)) -> None:
        self._socket = folder / f"t{next(_numbers)}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "screen-256color", "SHELL": "/bin/sh"}
        self._run(
            "-f", os.devnull, "new-session", "-d", "-x", str(size[0]), "-y", str(size[1]),
            f"trap : INT; stty -a > {folder}/before; {command}; echo ended $?; stty -a > {folder}/after; "
            "exec sleep 300",
            environment=environment,
        )  # fmt: skip

    def _run(self, *words: str, environment: dict[str, str] | None = None) -> str:
        command = ["tmux", "-S", str(self._socket), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def pid(self) -> int:
        """Of the program, whose parent is the shell."""
        shell = self._run("display", "-p", "#{pane_pid}").strip()
        children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        return int(children[0])

    def until(self, there: Callable[[str], bool]) -> str:
        """The screen once it is as it should be."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            shown = self.screen()
            if there(shown):
                return shown
            time.sleep(0.1)
        raise AssertionError(f"the screen is still:\n{self.screen()}")

    def shows(self, text: str) -> str:
        return self.until(lambda shown: text in shown)

    def close(self) -> None:
        self._run("kill-server")


Open = Callable[..., Tmux]


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Open]:
    if shutil.which("tmux") is None:
        pytest.skip("NO REAL TERMINAL WAS TESTED: tmux is not installed (apt install tmux)")
    begun: list[Tmux] = []

    def begin(command: str, size: tuple[int, int] = (100, 30)) -> Tmux:
        begun.append(Tmux(tmp_path, command, size))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    sample_sweep.stored(tmp_path / "results", "middle")
    return tmp_path / "results"


def watch(results: Path) -> str:
    return f"{sys.executable} -m orchestrator.cli watch {NAME} --results {results}"


def test_a_trial_is_found_opened_read_and_cancelled(tmux: Open, results: Path, tmp_path: Path) -> None:
    terminal = tmux(watch(results))
    first = terminal.shows("To resume 6")
    assert "◦ stopped before its end" in first
    assert "linear M=2   72.56 ±0.05 2/3" in first

    terminal.press("/", "w", "=", "5", " ", "l", "i", "n", "e", "a", "r")
    terminal.shows("/w=5 linear▏  6 found")
    terminal.press("Enter", "Down", "Enter")
    terminal.shows("top-1  15.")
    terminal.press("Tab", "End")
    command = f"mixmo train --trial aa4463179935 --results {results}"
    terminal.until(lambda shown: command in "".join(line[1:].rstrip() for line in shown.splitlines()))
    terminal.press("Tab")
    terminal.shows("as it was printed")

    terminal.press("K")
    terminal.shows("for good? y/n")
    terminal.press("n")
    terminal.shows("nothing was done")
    terminal.press("K", "y")
    terminal.shows("cancel: 1 trial cancelled")
    rows = ResultStore.open(results).trial_rows(NAME)
    assert [row.trial_id[:7] for row in rows if row.state == "CANCELLED"] == ["aa44631"]

    terminal.press("Escape")
    terminal.shows("1 cancelled")
    terminal.press("q")
    left = terminal.shows("ended 0")
    assert "1 cancelled" in left, "a summary stays behind"
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text()


def test_it_is_laid_out_anew_when_the_terminal_changes_its_size(tmux: Open, results: Path) -> None:
    terminal = tmux(watch(results), (80, 24))
    assert terminal.shows("Events 2 of 44").splitlines()[-1].startswith(" ↑↓ enter open")
    terminal.resize(140, 45)
    terminal.until(lambda shown: any("Top-1 %" in line and "Causes" in line for line in shown.splitlines()))
    terminal.resize(60, 15)
    terminal.until(lambda shown: "Results" in shown and "Top-1 %" not in shown and " s sort" not in shown)
    assert terminal.screen().splitlines()[-1].startswith(" q quit · ? help · ↑↓ enter open")
    terminal.press("?")
    assert terminal.shows("P      pause").splitlines()[0].startswith(" q      leave")


def test_when_it_is_killed_the_terminal_is_as_it_was_and_so_is_the_sweep(
    tmux: Open, results: Path, tmp_path: Path
) -> None:
    before = [each.state for each in ResultStore.open(results).trial_rows(NAME)]
    terminal = tmux(watch(results))
    terminal.shows("To resume 6")
    os.kill(terminal.pid(), signal.SIGTERM)
    terminal.shows("ended 143")
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text()
    assert [each.state for each in ResultStore.open(results).trial_rows(NAME)] == before


SWEEP = """
name: made
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 500, lr: 0.1}
seeds: 6
resources: {gpus_per_worker: 0}
"""


@pytest.mark.slow
def test_the_screen_of_a_run_steers_it(tmux: Open, tmp_path: Path) -> None:
    """The real driver, which takes its commands from the store, as from any other machine."""
    (tmp_path / "made.yaml").write_text(SWEEP)
    program = ROOT / "tests" / "run_on_threads.py"
    terminal = tmux(f"{sys.executable} {program} {tmp_path / 'made.yaml'} {tmp_path / 'results'}")
    terminal.shows("● running")
    terminal.press("P", "y")
    terminal.shows("‖ paused by")
    terminal.press("P", "y")
    terminal.shows("● running")
    terminal.press("Down", "K", "y")
    terminal.shows("1 cancelled")
    terminal.press("q")
    terminal.shows("Ctrl-C stops the sweep")
    terminal.press("C-c")
    assert " running" in terminal.shows("◦ stopping")  # they finish, as the first Ctrl-C has it
    terminal.press("C-c")
    assert "1 cancelled" in terminal.shows("ended 130")
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text()
    states = [row.state for row in ResultStore.open(tmp_path / "results").trial_rows("made")]
    assert states.count("CANCELLED") == 1


# ----------------------------------------------------------------------------------------------- how much is done


def sized(lines_high: int = 30) -> tuple[Terminal, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="256", width=100, height=lines_high)
    return Terminal(console, keys=False), stream


def test_only_lines_that_changed_are_sent() -> None:
    terminal, stream = sized()
    shot = sample_sweep.snapshot("middle")
    scene = Scene(shot, NOW)
    assert terminal.draw(drawn(scene, NOW, (100, 30), State())) == 30
    sent = len(stream.getvalue())
    assert terminal.draw(drawn(scene, NOW, (100, 30), State())) == 0
    assert len(stream.getvalue()) == sent
    rows = [*shot.rows[:19], dataclasses.replace(shot.rows[19], epoch=84), *shot.rows[20:]]
    moved = Scene(dataclasses.replace(shot, rows=rows), NOW, before=scene)
    assert 1 <= terminal.draw(drawn(moved, NOW, (100, 30), State())) <= 5


def test_a_line_goes_where_it_stands_and_what_was_there_before_goes() -> None:
    terminal, stream = sized(3)
    terminal.draw([Text("one"), Text("two")])
    stream.truncate(0)
    stream.seek(0)
    terminal.draw([Text("one"), Text("2")])
    assert stream.getvalue() == "\x1b[2;1H2\x1b[0m\x1b[K"


def test_of_ten_thousand_trials_those_that_are_shown_are_drawn() -> None:
    made: list[int] = []
    many = lines.Lazy(10_000, lambda i: made.append(i) or [f"{i}"])  # type: ignore[func-returns-value]
    section = lines.Section("Trials", "bold", (lines.Column("", 0),), many, marked=7_000)
    assert [line.plain.strip() for line in section.draw(20, 11)][1:] == [f"{i}" for i in range(6995, 7005)]
    assert len(made) == 10


def test_a_scene_counts_the_cells_that_moved_and_no_other() -> None:
    shot = sample_sweep.snapshot("middle")
    before = Scene(shot, NOW)
    rows = [*shot.rows[:19], dataclasses.replace(shot.rows[19], epoch=84), *shot.rows[20:]]
    after = Scene(dataclasses.replace(shot, rows=rows), NOW, before=before)
    assert {cell for cell in after.cells if after.cells[cell] is not before.cells[cell]} == {rows[19].cell_id}
    assert after.names is before.names
    assert Scene(shot, NOW, driven=False, before=before).cells is before.cells
