"""The command line: exit codes, the two streams, JSON, help, and what a command must not load."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import made_rows
import pytest
import sample_sweep
import typer
from command_line import loaded_by
from sample_sweep import NAME

from orchestrator import cli, doctor
from orchestrator.cli import guard, reading
from orchestrator.cli.program import with_results
from orchestrator.errors import ExitCode, MixmoError, NotFoundError, RefusedError, SweepError, UnreachableError
from orchestrator.rows import State
from orchestrator.store import Fault, ResultStore

ROOT = Path(__file__).parent.parent
TINY = """\
name: tiny
trial:
  data: {dataset: synthetic, train_images: 64, batch_size: 32}
  model: {depth: 10, width: 1}
  optim: {epochs: 2}
blocks:
  - grid: {mixing.method: [sum, linear]}
seeds: 2
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, as a terminal would see them."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(each) for each in arguments])
        out, err = self._capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)


@pytest.fixture
def mixmo(capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    before = signal.getsignal(signal.SIGTERM)
    yield Shell(capsys)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    sample_sweep.stored(folder, "end")
    return folder


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def commands() -> list[tuple[str, Any]]:
    """Every command with its words: `run`, `data get`, and the program itself first."""
    program: Any = typer.main.get_command(cli.app)

    def below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                yield from below(f"{words} {name}".strip(), inner)

    return list(below("", program))


COMMANDS = commands()
READS = [
    "ls",
    f"status {NAME}",
    f"watch {NAME} --once",
    f"table {NAME}",
    f"pareto {NAME}",
    "show 269026b",
    "logs 269026b",
    f"verify {NAME}",
]


# ---------------------------------------------------------------------------------------------------------- help


def spoken(mixmo: Shell, words: str) -> str:
    help_text = mixmo(*words.split(), "--help").out
    return help_text.replace("\n\n\n", "\n\n").rstrip()


def test_the_reference_holds_every_help(mixmo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write it anew with MIXMO_RECORD=1."""
    held = re.search(r"^typer==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if held and held[1] != typer.__version__:
        pytest.skip(f"docs/cli.md is as typer {held[1]} words it (constraints.txt); here is {typer.__version__}")
    monkeypatch.setenv("COLUMNS", "90")
    lines = [
        "# Commands",
        "",
        "Every `mixmo` command and its `--help`. This page is generated: `MIXMO_RECORD=1 python -m pytest"
        " tests/test_cli.py -k reference`.",
    ]
    for words, _ in COMMANDS:
        title = f"mixmo {words}".strip()
        lines += ["", f"## {title}", "", "```text", spoken(mixmo, words), "```"]
    page, text = ROOT / "docs" / "cli.md", "\n".join(lines) + "\n"
    if os.environ.get("MIXMO_RECORD"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
    assert page.read_text() == text, "docs/cli.md is out of date: MIXMO_RECORD=1 writes it anew"


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words or "mixmo" for words, _ in COMMANDS])
def test_every_command_and_option_says_what_it_is(words: str, command: Any) -> None:
    assert command.help
    first = command.help.strip().splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 90
    for parameter in command.params:
        assert parameter.name == "help" or getattr(parameter, "help", None), f"{words}: {parameter.name}"


def test_commands_of_the_design_are_there() -> None:
    words = {words for words, _ in COMMANDS}
    assert words >= {"plan", "run", "ls", "status", "watch", "show", "logs", "table", "figures", "pareto", "report",
                     "fold", "train",
                     "verify", "doctor", "data get"}  # fmt: skip


def test_what_is_hidden_stands_in_no_help(mixmo: Shell) -> None:
    told = mixmo("--help").out
    assert [line for line in told.splitlines() if re.match(r" *(reach\b|Commands:)", line)] == []
    assert {"Plan and run:", "Read results:", "Around it:"} <= set(told.splitlines())
    assert "PLACE" in mixmo("reach", "--help").out  # it is there for `submit`


def completed(shell: str, line: str, folder: Path, **given: str) -> list[str]:
    """What a shell is told to complete the last word of a line with, asked as its installed script asks."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
                 "_TYPER_COMPLETE_WORD_TO_COMPLETE": words[-1]},
    }[shell]  # fmt: skip
    known = {name: value for name, value in os.environ.items() if name != "MIXMO_RESULTS"}
    done = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import script; script()"], cwd=folder, text=True,
        env={**known, "PYTHONPATH": str(ROOT), "_MIXMO_COMPLETE": f"complete_{shell}", **asked, **given},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return re.findall(r'"(.*?)"', done.stdout) if shell == "zsh" else done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_sweeps(shell: str, results: Path, tmp_path: Path) -> None:
    assert completed(shell, "mixmo table cif", tmp_path, MIXMO_RESULTS=str(results)) == [NAME]
    assert completed(shell, "mixmo table --results here cif", tmp_path, MIXMO_RESULTS=str(results)) == []


def test_a_shell_completes_trials_and_says_nothing_of_what_it_cannot_read(results: Path, tmp_path: Path) -> None:
    ids = [row.trial_id for row in ResultStore.open(results).trial_rows(NAME)]
    place = {"MIXMO_RESULTS": str(results)}
    assert completed("bash", f"mixmo cancel {NAME} {ids[0][:6]}", tmp_path, **place) == [ids[0]]
    assert set(completed("bash", f"mixmo cancel {NAME} ", tmp_path, **place)) == set(ids)
    begun = {path.name for path in (results / "trials").iterdir()}
    assert set(completed("bash", "mixmo show ", tmp_path, **place)) == begun != set()
    (tmp_path / "results").symlink_to(results)  # what lies in the working folder
    assert completed("bash", "mixmo status c", tmp_path) == [NAME]
    (tmp_path / "no-store").write_text("")
    for elsewhere in (str(tmp_path / "no-store"), str(tmp_path / "none"), "s3://nobody/there", "gs://x", ""):
        assert completed("bash", "mixmo watch c", tmp_path / "..", MIXMO_RESULTS=elsewhere) == []
    assert not (tmp_path / "none").exists()


def test_without_a_command_there_is_help_and_a_word_that_is_none_is_corrected(mixmo: Shell) -> None:
    ended = mixmo("staus")
    assert ended.code == 2
    assert "Did you mean 'status'" in ended.err
    assert ended.out == ""


def test_the_version_is_told(mixmo: Shell) -> None:
    ended = mixmo("--version")
    assert ended.code == 0
    assert re.fullmatch(r"mixmo (\d+\.\d+\.\d+|from a source tree that is not installed)\n", ended.out)


@pytest.mark.parametrize(("typed", "offered"), [("rep", "report"), ("data g", "get"), ("pareto --co", "--cost")])
def test_a_shell_completes_what_is_typed(typed: str, offered: str) -> None:
    line = f"mixmo {typed}"
    asked = {"_MIXMO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import script; script()"],
        cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == [offered]


# ------------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [(SweepError("x.yaml:3: no"), 2), (NotFoundError("gone"), 5), (RefusedError("held"), 6), (UnreachableError("x"), 7),
     (KeyboardInterrupt(), 130), (typer.Abort(), 130), (guard.Terminated(), 143)],
)  # fmt: skip
def test_each_end_has_its_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert guard.guarded(fail) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    if isinstance(error, MixmoError):
        assert err == f"mixmo: {error}\n"


@pytest.mark.parametrize(("ended", "code"), [(None, 0), (ExitCode.FAULTS, 3), (ExitCode.STOPPED, 4)])
def test_what_a_command_returns_is_its_code(ended: ExitCode | None, code: int) -> None:
    assert guard.guarded(lambda: ended) == code


def test_what_nobody_foresaw_is_our_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.guarded(lambda: 1 // 0) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "this is a bug in mixmo" in err


def test_a_reader_that_stops_reading_is_no_fault() -> None:
    def command() -> None:
        raise BrokenPipeError

    code = (
        "import sys; from orchestrator.cli.guard import guarded\ndef f(): raise BrokenPipeError\nsys.exit(guarded(f))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("pipe", ["| head -1", "| true"])
def test_the_start_of_a_long_page_is_no_fault(results: Path, pipe: str) -> None:
    program = f"{sys.executable} -c 'from orchestrator.cli import script; script()'"
    line = f"{program} plan sweeps/cifar10_small.yaml -S seeds=800 --trials --results {results} {pipe} > /dev/null"
    done = subprocess.run(
        ["bash", "-c", line + "; exit ${PIPESTATUS[0]}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [f"table {NAME}", f"status {NAME}", "ls --json"])
def test_output_that_cannot_be_written_is_one_message(results: Path, command: str) -> None:
    words = [sys.executable, "-c", "from orchestrator.cli import script; script()", *command.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*words, "--results", str(results)], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (7, "mixmo: cannot write the output: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("status nothing", 5, "no sweep nothing in .*: it has cifar100_width"),
        ("show ffff", 5, "no trial in .* has an id that begins with 'ffff'"),
        ("logs 269026b --rank 3", 5, "no log of rank 3"),
        ("table cifar100_width --metric speed", 2, "no metric speed; there are loss, lr, top1"),
        ("table cifar100_width --rows model.widht", 2, "no setting model.widht.*did you mean 'model.width'"),
        ("train", 2, "give a sweep FILE .* or --trial ID"),
        ("train --trial 269026b -S optim.epochs=1", 2, "go with a sweep FILE.*give the FILE"),
        ("train --trial 269026b --quick", 2, "go with a sweep FILE"),
        ("train --trial 269026b --index 0", 2, "go with a sweep FILE"),
        ("train FILE --index 99", 5, "tiny has trials 0 to 3; there is no trial 99"),
        ("train FILE -S optim.lr=1e9", 3, "^trial .*mixmo: diverged at epoch 1: .*Try a smaller optim.lr"),
        ("train FILE --device abacus", 2, "^mixmo: --device abacus: torch has none here; it has cpu"),
        ("plan nowhere.yaml", 2, "nowhere.yaml: there is no such file"),
        ("plan FILE -S optim.epoch=3", 2, "did you mean 'optim.epochs'"),
        ("run FILE -S data.dataset=cifar10 -S data.train_images=all --yes", 2, "mixmo data get cifar10 DEST"),
        ("run FILE -S resources.slots=4 -S resources.workers=2 --yes", 2, "slots: above 1 are for trials of one"),
        ("data get mnist DEST", 2, "nothing to get"),
        ("ls --results s3://bucket/x", 7, "AWS_PROFILE"),
        ("ls --results s3://key:word@bucket/x", 2, "a user name or a password in it"),
        ("ls --results FILE", 7, "is a file"),
    ],
)
def test_what_is_refused_is_one_clear_message(
    mixmo: Shell, results: Path, sweep_file: Path, tmp_path: Path, arguments: str, code: int, message: str
) -> None:
    words = [str(sweep_file) if word == "FILE" else word for word in arguments.split()]
    if "--results" not in words and words[0] != "data":
        words += ["--results", str(tmp_path / "none" if words[0] == "run" else results)]
    ended = mixmo(*words)
    assert ended.code == code, ended.err
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("state", "left"), [("PENDING", 1), ("RUNNING", 1), ("TERMINATED", 0)])
def test_trials_that_have_not_ended_are_told_by_verify(mixmo: Shell, tmp_path: Path, state: State, left: int) -> None:
    with made_rows.begin(ResultStore.open(tmp_path, create=True)) as writer:
        made_rows.advance(writer, made_rows.trial(epochs=1), 1)
        writer.put([made_rows.trial(1, epochs=0, state=state)])
    ended = mixmo("verify", "made", "--results", tmp_path)
    assert (ended.code, "1 of its trials have not ended" in ended.err) == (0, left == 1)
    assert json.loads(mixmo("verify", "made", "--json", "--results", tmp_path).out)["trials_left"] == left


def test_a_sweep_that_is_verified_with_faults_ends_with_3(mixmo: Shell, results: Path) -> None:
    ended = mixmo("verify", NAME, "--results", results)
    assert ended.code == 3
    assert "faults" in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_watching_and_puts_the_terminal_back(tmp_path: Path, number: int, code: int) -> None:
    sample_sweep.stored(tmp_path, "middle")
    command = [
        sys.executable,
        "-c",
        "from orchestrator.cli import main; main()",
        "watch",
        NAME,
        "--results",
        str(tmp_path),
    ]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout
        seen = b""
        while b"To resume" not in seen:
            seen += os.read(running.stdout.fileno(), 65536)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert (seen + out).count(b"\x1b[?1049h") == (seen + out).count(b"\x1b[?1049l") == 1
    assert b"Traceback" not in err


# ------------------------------------------------------------------------------------------------ streams and JSON


@pytest.mark.parametrize("command", READS)
def test_what_is_read_goes_to_stdout_without_escapes(mixmo: Shell, results: Path, command: str) -> None:
    ended = mixmo(*command.split(), "--results", results)
    assert ended.code == (3 if command.startswith("verify") else 0)
    assert ended.out
    assert "\x1b" not in ended.out
    assert ended.err == "" or command.startswith("verify")


@pytest.mark.parametrize("command", READS)
def test_every_reading_command_speaks_json(mixmo: Shell, results: Path, command: str) -> None:
    name = command.split()[0]
    ended = mixmo(*command.split(), "--json", "--results", results)
    document = json.loads(ended.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert document["schema"] == f"mixmo.{'status' if name == 'watch' else name}/1"


def test_the_status_in_json(mixmo: Shell, results: Path) -> None:
    document = json.loads(mixmo("status", NAME, "--json", "--results", results).out)
    assert (document["status"], document["total"], document["done"], document["failed"]) == ("finished", 39, 36, 3)
    assert document["failures"][0]["cause"] == "CUDA out of memory"
    best = document["results"][0]
    assert (best["name"], best["n"], best["planned"]) == ("cutmix w=10 M=2", 3, 3)
    assert best["mean"] == pytest.approx(sum(best["top1"]) / 3)


def test_an_empty_place_has_no_sweeps(mixmo: Shell, tmp_path: Path) -> None:
    ended = mixmo("ls", "--results", tmp_path / "none")
    assert (ended.code, ended.out) == (0, "")
    assert "no sweeps in" in ended.err
    assert not (tmp_path / "none").exists()


def test_a_damaged_sweep_does_not_hide_the_others(mixmo: Shell, tmp_path: Path) -> None:
    folder = stored_with_baseline(tmp_path, bad=None, good=None)
    (folder / "sweeps" / "bad" / "trials.parquet").write_bytes(b"junk")
    ended = mixmo("ls", "--results", folder)
    assert ended.code == 7
    assert re.search(r"^ bad +damaged", ended.out, re.MULTILINE)
    assert re.search(r"^ good +finished +3 of 3", ended.out, re.MULTILINE)
    assert re.fullmatch(r"mixmo: bad: .*\n", ended.err)
    document = json.loads(mixmo("ls", "--json", "--results", folder).out)
    assert [each["status"] for each in document["sweeps"]] == ["damaged", "finished"]


def test_faults_are_one_line_each_and_counted_in_words(
    mixmo: Shell, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResultStore, "verify", lambda *_, **__: [Fault("damaged", None, "a page\n  of words", "look")])
    ended = mixmo("verify", NAME, "--results", results)
    assert (ended.code, ended.err) == (3, f"{NAME}: 1 fault\n")
    assert "a page of words\n" in ended.out


def test_results_may_be_named_by_the_environment(mixmo: Shell, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMO_RESULTS", str(results))
    assert NAME in mixmo("ls").out


def test_a_trial_is_shown_with_the_command_that_repeats_it(mixmo: Shell, results: Path) -> None:
    text = mixmo("show", "269026b", "--results", results).out
    assert f"mixmo train --trial 269026bdefcb --results {results}\n" in text
    for word in ("a worker was killed by signal 9", "RuntimeError: no", "mixing.method", "mixmo train --trial 269026b"):
        assert word in text


def test_a_suggested_command_names_the_results_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXMO_RESULTS", raising=False)
    assert with_results("mixmo table x", "results") == "mixmo table x"
    assert with_results("mixmo table x", "my results") == "mixmo table x --results 'my results'"
    monkeypatch.setenv("MIXMO_RESULTS", "elsewhere")
    assert with_results("mixmo table x", "elsewhere") == "mixmo table x"
    assert with_results("mixmo table x", "results") == "mixmo table x --results results"


def stored_with_baseline(folder: Path, **baselines: str | None) -> Path:
    store = ResultStore.open(folder, create=True)
    for sweep, baseline in baselines.items():
        text = f"name: {sweep}\n" + (f"baseline: {baseline}\n" if baseline else "")
        with store.writer(sweep, sweep_text=text) as writer:
            for position, (label, width, seed) in enumerate([("plain", 2, 0), ("plain", 2, 1), ("wide", 5, 0)]):
                row = made_rows.trial(seed, width=width, sweep=sweep, label=label, position=position)
                writer.put([made_rows.reached(row, 3)])
            writer.close(done=True)
    return folder


def test_several_sweeps_share_a_baseline_they_agree_on(mixmo: Shell, tmp_path: Path) -> None:
    folder = stored_with_baseline(tmp_path, one="plain", two="plain", three="wide", four=None)
    assert "vs baseline" in mixmo("table", "one", "one", "--results", folder).out
    both = mixmo("table", "one", "two", "--results", folder)
    assert "vs baseline" in both.out
    assert both.err == ""
    for other, told in (("three", "one plain, three wide"), ("four", "one plain, four none")):
        apart = mixmo("table", "one", other, "--results", folder)
        assert "vs baseline" not in apart.out
        assert told in apart.err
        assert "--baseline" in apart.err
        assert "vs baseline" in mixmo("table", "one", other, "--baseline", "wide", "--results", folder).out


def test_lines_that_a_baseline_of_the_file_shares_are_shown_without_it(mixmo: Shell, tmp_path: Path) -> None:
    folder = stored_with_baseline(tmp_path, one="plain")
    shown = mixmo("table", "one", "--rows", "mixing.method", "--results", folder)
    assert (shown.code, "vs baseline" in shown.out) == (0, False)
    assert "add label to the rows" in shown.err
    asked = mixmo("table", "one", "--rows", "mixing.method", "--baseline", "plain", "--results", folder)
    assert (asked.code, "add label to the rows" in asked.err) == (2, True)
    without = mixmo("table", "one", "--baseline", "none", "--results", folder)
    assert (without.code, without.err, "vs baseline" in without.out) == (0, "", False)


def test_a_table_of_any_epoch_and_in_latex_with_the_command_that_made_it(mixmo: Shell, tmp_path: Path) -> None:
    made_rows.finished(ResultStore.open(tmp_path, create=True), 3)
    assert "epoch 2 top1 %" in mixmo("table", "made", "--at", "2", "--results", tmp_path).out
    ended = mixmo("table", "made", "--at", "epoch=2", "--format", "latex", "--results", tmp_path)
    made_by = f"mixmo table made --at=epoch=2 --format=latex --results {tmp_path}"
    assert ended.out.startswith(f"% sweep made; commit not known; {made_by}\n")
    refused = mixmo("table", "made", "--at", "first", "--results", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert "--at first: give last, best, or an epoch by its number" in refused.err


def test_a_quick_table_is_headed_so_and_shows_no_published_number(mixmo: Shell, tmp_path: Path) -> None:
    text = "name: made\npublished: [{label: Theirs, where: {model.width: 2}, top1: 0.8123, source: Table 1}]\n"
    for sweep, seed in (("made", 0), ("made-quick", 1)):
        with ResultStore.open(tmp_path, create=True).writer(sweep, sweep_text=text) as writer:
            writer.put([made_rows.reached(made_rows.trial(seed, sweep=sweep), 3)])
            writer.close(done=True)
    for form, begins in (("terminal", "quick"), ("markdown", "**quick"), ("latex", "% quick"), ("csv", "n,")):
        shown = mixmo("table", "made-quick", "--format", form, "--results", tmp_path).out
        assert shown.startswith(begins)
        assert "quick form, not comparable" in shown
        assert "Table 1" not in shown
    assert json.loads(mixmo("table", "made-quick", "--json", "--results", tmp_path).out)["published"] == []
    whole = mixmo("table", "made", "--results", tmp_path).out
    assert "quick" not in whole
    assert "Table 1" in whole
    both = mixmo("table", "made", "made-quick", "--rows", "sweep", "--results", tmp_path).out
    assert both.startswith("quick form, not comparable: made-quick\n")
    assert both.count("81.23") == 1


@pytest.mark.parametrize("width", [50, 200])
def test_a_table_has_the_width_of_the_terminal(
    mixmo: Shell, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_with_baseline(tmp_path, one="plain")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = mixmo("table", "one", "--results", folder).out.splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("Left out for want of room") for line in lines) == (width < 200)


def test_a_log_is_printed_as_it_is(mixmo: Shell, results: Path) -> None:
    assert mixmo("logs", "269026b", "--results", results).out == "epoch 3\nas it was printed\n"


@pytest.mark.parametrize(
    ("before", "now", "added"),
    [("one\n", "one\ntwo\n", "two\n"), ("one\n", "one\n", ""), ("", "one\n", "one\n"), ("gone\n", "new\n", "new\n")],
)
def test_following_a_log_prints_what_is_new(
    before: str, now: str, added: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reading._print_added(before, now) == now
    assert capsys.readouterr().out == added


# ------------------------------------------------------------------------------------------------------ plan, train


def test_a_plan_says_what_would_run_and_writes_nothing(mixmo: Shell, sweep_file: Path, tmp_path: Path) -> None:
    ended = mixmo("plan", sweep_file, "--results", tmp_path / "none", "--show", "--trials")
    assert ended.code == 0
    assert "4 trials in 2 cells, seeds 0, 1" in ended.out
    assert "To run: 4 (4 new)" in ended.out
    assert re.search(r"Storage: \d.* at the end \(checkpoints .*, logits .*, tables .* kB\)", ended.out)
    assert "more for each trial while it runs" in ended.out
    assert re.search(r"optim.epochs +2 ", ended.out)
    assert not (tmp_path / "none").exists()


def test_a_plan_notes_what_a_run_would_refuse(mixmo: Shell, sweep_file: Path, tmp_path: Path) -> None:
    population = "{method: pbt, interval_epochs: 1, mutations: {optim.lr: {choices: [0.1, 0.2]}}}"
    sweep_file.write_text(TINY + f"resources: {{slots: 4}}\nscheduler: {population}\n")
    none = tmp_path / "none"
    told = "resources.slots: 4 with scheduler.method: pbt: understood, but not yet possible in a run"
    ended = mixmo("plan", sweep_file, "--results", none)
    assert ended.code == 0
    assert f"note: {told}" in ended.out
    assert told in json.loads(mixmo("plan", sweep_file, "--json", "--results", none).out)["notes"]
    refused = mixmo("run", sweep_file, "--yes", "--results", none)
    assert (refused.code, refused.err) == (2, f"mixmo: {sweep_file}: {told}\n")  # and no plan before it


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_names_can_be_read_at_any_width(
    mixmo: Shell, results: Path, sweep_file: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for page, name in ((mixmo("plan", sweep_file, "--results", results).out, "linear"),
                       (mixmo("ls", "--results", results).out, NAME)):  # fmt: skip
        assert re.search(rf"^ *{name} ", page, re.MULTILINE), page
        assert max(map(len, page.splitlines())) <= width


def test_a_plan_in_json(mixmo: Shell, sweep_file: Path, tmp_path: Path) -> None:
    document = json.loads(mixmo("plan", sweep_file, "--json", "--results", tmp_path / "none").out)
    assert document["schema"] == "mixmo.plan/1"
    assert document["actions"] == {"new": 4}
    assert [each["index"] for each in document["by_trial"]] == [0, 1, 2, 3]
    storage = document["storage"]
    assert storage["end"] == storage["checkpoints"] + storage["logits"] + storage["tables"]


def test_training_in_the_foreground_prints_a_line_per_epoch_and_keeps_nothing(
    mixmo: Shell, sweep_file: Path, tmp_path: Path
) -> None:
    ended = mixmo("train", sweep_file, "--index", "1", "--results", tmp_path / "none")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"loss \d+\.\d+  top1 \d+\.\d+ %  nll", line) for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


# ---------------------------------------------------------------------------------------------------------- doctor


def test_the_doctor_leaves_nothing_behind(mixmo: Shell, tmp_path: Path) -> None:
    ended = mixmo("doctor", "--json", "--results", tmp_path / "none")
    checks = {check["name"]: check for check in json.loads(ended.out)["checks"]}
    assert checks["Python"]["verdict"] == "good"
    assert {"torch", "ray", "processors", "results", "disk", "data", "cifar10"} <= set(checks)
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_and_the_project_agree_on_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, doctor.PYTHON))}"
    wanted = {re.split(r"[\[=<>]", each)[0]: each for each in project["dependencies"]}
    for name, (least, below) in doctor.PACKAGES.items():
        text = re.sub(r"\[.*\]", "", wanted[name]).removeprefix(name)
        expected = f"=={least}.*" if below else f">={least}"
        assert text == expected


@pytest.mark.parametrize(
    ("installed", "verdict"),
    [("2.59.1", "bad"), ("2.60.0", "good"), ("2.60.9", "good"), ("2.61.0", "bad"), ("2.60.0+cu130", "good")],
)
def test_a_version_is_held_to_its_range(installed: str, verdict: str) -> None:
    check = doctor.package("ray", "2.60", "2.61", lambda name: installed)
    assert check.verdict == verdict
    assert check.code == (ExitCode.OK if verdict == "good" else ExitCode.USAGE)


def test_a_package_that_is_not_there_is_told_with_its_command() -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    check = doctor.package("torch", "2.11", None, missing)
    assert (check.verdict, check.code) == ("bad", ExitCode.USAGE)
    assert "pip install 'torch>=2.11'" in check.advice


def test_results_that_cannot_be_written_end_with_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    check = doctor.results_folder(file)
    assert (check.verdict, check.code) == ("bad", ExitCode.UNREACHABLE)
    assert doctor.verdict([doctor.Check("a", "note", ""), check]) is ExitCode.UNREACHABLE
    assert doctor.results_folder(tmp_path / "deep" / "down").found.endswith(", which a run will make")
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert doctor.results_folder(Path("here")).found == "here"


def test_a_dataset_with_a_wrong_file_is_a_fault_and_one_that_is_not_there_a_note(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    found = {check.name: check for check in doctor.datasets(tmp_path)}
    assert (found["cifar10"].verdict, found["cifar10"].code) == ("bad", ExitCode.USAGE)
    assert found["cifar100"].verdict == "note"


# ------------------------------------------------------------------------------------------------- what is not loaded

NEVER = {
    "torch", "ray", "boto3", "botocore", "pyarrow.dataset", "duckdb", "pandas", "matplotlib", "sklearn",
    "numpy", "pydantic", "asyncio", "multiprocessing", "concurrent.futures", "importlib.metadata",
    "orchestrator.driver", "orchestrator.dispatcher",
}  # fmt: skip
MOST_MODULES = 380
"""Of a reading command; 273 to 321 when this was written, with what Python itself begins with."""


@pytest.mark.parametrize("command", [*READS, "plan FILE"])
def test_what_a_reading_command_must_not_load(command: str, results: Path, sweep_file: Path) -> None:
    """This is what keeps it under 0.3 s of CPU (benchmarks/reading.py)."""
    words = [str(sweep_file) if word == "FILE" else word for word in command.split()]
    loaded, computes = loaded_by(*words, "--results", str(results)), command.startswith("verify")
    assert loaded & NEVER <= ({"numpy", "pandas", "concurrent.futures"} if computes else set())
    assert "pyarrow.parquet" in loaded  # it did read
    assert len(loaded) < MOST_MODULES or computes
    names_cells_only = command.split()[0] in ("ls", "status", "watch", "show")
    assert not (names_cells_only and "orchestrator.sweep" in loaded)


def test_help_loads_no_tables() -> None:
    assert loaded_by("--help") & (NEVER | {"pyarrow", "rich.console"}) == set()
