"""README and docs: every command is one that there is, what only reads runs as printed, and links lead somewhere."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import made_studies
import pytest
import typer
from test_cli import Shell
from test_cli import mixmo as mixmo  # the fixture

from orchestrator import cli
from orchestrator.analysis import table
from orchestrator.plan import initial_row
from orchestrator.store import ResultStore
from orchestrator.sweep import load

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = [block for block in made_studies.WIDTH if block[1]["model.width"] <= 2]
NOT_RUN = {
    "run": "trains a sweep on Ray: tests/test_driver.py, and .ci/run runs `make quickstart`",
    "train": "trains a trial: tests/test_commands.py",
    "data": "downloads: tests/test_data.py",
    "watch": "until the sweep ends: tests/test_screen.py",
    "pause": "asks a driver: tests/test_steering.py",
    "submit": "wants a cluster",
}
"""Commands of which only the words are held against the program here, and where they are run."""


class Printed(NamedTuple):
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, code in re.findall(r"^ *```(\w+)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield code


def lines(page: Path) -> Iterator[str]:
    """What a reader may type: lines of shell, without their prompt and remarks."""
    for code in blocks(page, "sh", "bash", "console"):
        for line in code.splitlines():
            yield re.sub(r"(^|\s)#\s.*", "", line.strip().removeprefix("$ "))


def printed(program: str) -> list[Printed]:
    told = [(page.name, shlex.split(line)) for page in PAGES for line in lines(page)]
    found = {Printed(page, tuple(words[1:])) for page, words in told if words[:1] == [program]}
    return sorted(found)


def inline() -> list[Printed]:
    """Commands in the running text that have more than a name, as far as they are whole."""
    told = [(page.name, words) for page in PAGES if page.name != "cli.md"
            for words in re.findall(r"`mixmo ([^`]+ [^`]*)`", page.read_text()) if "..." not in words]  # fmt: skip
    return sorted({Printed(page, tuple(shlex.split(words))) for page, words in told})


COMMANDS = printed("mixmo")


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 50
    assert {"README.md", "paper.md", "results.md", "reliability.md", "extending.md"} <= {each.page for each in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_one_that_there_is(command: Printed) -> None:
    hold(command.words)


@pytest.mark.parametrize("command", inline(), ids=str)
def test_a_command_in_the_text_has_no_word_too_many(command: Printed) -> None:
    hold(command.words, resilient_parsing=True)  # it may have too few


def hold(words: Sequence[str], **given: Any) -> None:
    """Raises a usage error unless the program understands these words. Runs nothing."""
    program: Any = typer.main.get_command(cli.app)
    context, rest = program.make_context("mixmo", list(words[:1]), **given), list(words)
    while hasattr(program, "commands"):
        name, program, rest = program.resolve_command(context, rest)
        context = program.make_context(name, rest, parent=context, **given)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as a reader's, with the sweeps that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    store = ResultStore.open("results", create=True)
    for name in ("quickstart", "width", "table1_cifar10-quick"):
        made_studies.stored(store, made_studies.rows(SMALL, name=name))
    (file,) = (code for code in blocks(ROOT / "README.md", "yaml") if "name: width" in code)
    Path("width.yaml").write_text(file)


READS = [
    pytest.param(each, marks=[pytest.mark.slow] * (each.words[0] in ("figures", "report")), id=str(each))
    for each in COMMANDS
    if each.words[0] not in NOT_RUN and each.page not in ("paper.md", "cluster.md")
]


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("command", READS)
def test_a_command_that_reads_runs_as_printed(command: Printed, mixmo: Shell) -> None:
    ended = mixmo(*command.words)
    assert ended.code == (3 if command.words[0] == "verify" else 0), ended.err  # these trials have no checkpoints
    assert ended.out or "fault" in ended.err


def test_the_table_of_the_readme_is_what_the_program_prints_of_these_results() -> None:
    """Of 360 test images, how many each network of `make quickstart` got right, seed by seed."""
    right = {"vanilla": (344, 342, 345), "MIMO": (349, 340, 347), "Linear-MixMo": (346, 340, 349),
             "Cut-MixMo": (342, 336, 343)}  # fmt: skip
    trials = load(ROOT / "sweeps" / "quickstart.yaml")
    rows = [
        initial_row(trial, trials).replace(
            state="TERMINATED", metrics={"top1": right[trial.label or ""][trial.config.seed] / 360}
        )
        for trial in trials.trials
    ]
    printed = table(rows, baseline=trials.baseline).to_text()
    assert any(code.startswith(printed) for code in blocks(ROOT / "README.md", "text"))


def test_make_and_scripts_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"`make ([a-z-]+)", text)) | {each.words[0] for each in printed("make")} <= targets
    scripts = set(re.findall(r"python ((?:benchmarks|tests|docs)/[\w/]+(?:\.py)?)", text))
    assert len(scripts) > 6
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists() or target == ROOT / "docs" / "cluster.md", link
            if anchor and target.exists():
                assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
