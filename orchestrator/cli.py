"""The command line: parse, call one function, say how it ended. Data goes to stdout, talk to stderr.

What is slow to load (torch, Ray, pandas, matplotlib) is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

# Before numpy is loaded: its threads cost more than they give here, and two pools under load collapse.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import typer
import typer.core

from orchestrator.errors import ExitCode, MixmoError, NotFoundError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mixmo_core.config import TrialConfig
    from mixmo_core.train import Epoch
    from orchestrator.plan import Plan
    from orchestrator.progress import Progress
    from orchestrator.rows import TrialRow
    from orchestrator.store import ResultStore
    from orchestrator.sweep import Sweep


class _Command(typer.core.TyperCommand):
    """Its usage line names arguments as everybody writes them: `mixmo run [OPTIONS] FILE`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}").replace("}...", "") for piece in super().collect_usage_pieces(ctx)]


class _Sections(typer.core.TyperGroup):
    """Lists the commands under headings, in the order in which they are defined."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            sections.setdefault(command.rich_help_panel or "Commands", []).append(
                (name, command.get_short_help_str(200))
            )
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


_SETTINGS: Any = {"help_option_names": ["-h", "--help"], "max_content_width": 90}
app = typer.Typer(
    cls=_Sections, context_settings=_SETTINGS, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
data_app = typer.Typer(cls=_Sections, context_settings=_SETTINGS, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data", rich_help_panel="Around it")

RUNNING, READING, AROUND = "Plan and run", "Read results", "Around it"

File = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file, such as sweeps/quickstart.yaml.")]
SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="The name in the sweep file; `mixmo ls` lists them.")]
TrialId = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial id, or as many of its first digits as tell it.")]
Results = Annotated[
    str, typer.Option("--results", envvar="MIXMO_RESULTS", metavar="FOLDER", help="Where the results lie.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-S", metavar="SETTING=VALUE", help="Lay a value over the file, for all trials. May be repeated."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Lay the file's `quick` settings over it; the name gets -quick.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON with a versioned schema.")]
At = Literal["last", "best"]
Format = Literal["terminal", "markdown", "csv", "json"]
Data = Annotated[
    Path | None, typer.Option("--data", envvar="MIXMO_DATA", metavar="FOLDER", help="Where the images lie.")
]


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"mixmo {_version()}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sweeps of MixMo trainings: one YAML file in, Ray in the middle, Parquet and a table out.

    \b
    Begin with:
      mixmo plan sweeps/quickstart.yaml     what it would run
      mixmo run sweeps/quickstart.yaml      run what is missing; again to continue
      mixmo table quickstart                mean and deviation of every cell

    Results lie in ./results, or where --results or MIXMO_RESULTS says.

    \b
    Exit codes:
      0  all good                      5  not found
      1  a bug in mixmo                6  refused: another driver holds the sweep
      2  bad usage, bad sweep file     7  the store or the cluster is out of reach
      3  finished, some trials failed; or verify found faults
      4  stopped before the end        130, 143  interrupted
    """  # noqa: D301  (the backspace keeps lines as they are)


# ---------------------------------------------------------------------------------------------------- plan and run


@app.command(cls=_Command, rich_help_panel=RUNNING)
def plan(
    file: File,
    *,
    show: Annotated[
        bool, typer.Option("--show", help="Also print every setting, and where its value comes from.")
    ] = False,
    trials: Annotated[
        bool, typer.Option("--trials", help="Also print every trial, its index and what would become of it.")
    ] = False,
    quick: Quick = False,
    overrides: Overrides = None,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """What a run would do and what it costs. Changes nothing.

    Trials whose results are there already, in this sweep or another, are not run again.
    """
    from orchestrator import driver, pages
    from orchestrator.store import ResultStore
    from orchestrator.sweep import not_runnable

    sweep = _load(file, overrides, quick)
    planned = driver.plan(sweep, ResultStore.open(results))
    summary = planned.summary()
    summary["notes"] += not_runnable(sweep)
    if as_json:
        _print_json("plan", summary | {"by_trial": _by_trial(planned)})
        return
    console, names = _console(), _cell_names(planned)
    console.print(pages.plan(summary, names, console.width))
    if show:
        console.print(pages.settings(sweep, console.width))
    if trials:
        console.print(pages.planned_trials(planned.items, names, console.width))


@app.command(cls=_Command, rich_help_panel=RUNNING)
def run(
    file: File,
    *,
    quick: Quick = False,
    overrides: Overrides = None,
    data: Data = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again, too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
    results: Results = "results",
) -> ExitCode:
    """Run what is missing of a sweep.

    Here, or on the Ray cluster of RAY_ADDRESS. The same command continues a sweep that was stopped or killed,
    from its
    checkpoints. The first Ctrl-C lets running trials finish, the second ends at once.
    """
    from orchestrator import driver, pages
    from orchestrator.dashboard import Screen
    from orchestrator.store import ResultStore
    from orchestrator.sweep import check_runnable

    sweep = _load(file, overrides, quick)
    planned = driver.plan(sweep, ResultStore.open(results), retry_failed=retry_failed)
    talk = _console(stderr=True)
    if planned.to_run:
        check_runnable(sweep)
        talk.print(pages.plan(planned.summary(), _cell_names(planned), talk.width))
        if (
            not yes
            and sys.stdin.isatty()
            and sys.stderr.isatty()
            and not typer.confirm("Run it?", default=True, err=True)
        ):
            return ExitCode.STOPPED
        driver.check(sweep, data)  # before the results are touched
    store = ResultStore.open(results, create=True)
    with Screen(talk) as screen:
        code: ExitCode = driver.run(
            sweep, store, data_dir=data, retry_failed=retry_failed, observer=screen.show, talk=screen.say
        )
        screen.ended()
    then = _with_results(f"mixmo table {sweep.name}", results)
    talk.print(f"results in {store.uri} · next: {then}", style="dim", highlight=False, soft_wrap=True)
    return code


@app.command(cls=_Command, rich_help_panel=RUNNING)
def train(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A sweep file.")] = None,
    *,
    index: Annotated[
        int | None,
        typer.Option("--index", metavar="N", help="Which trial of FILE, as `mixmo plan --trials` counts. [default: 0]"),
    ] = None,
    trial: Annotated[
        str | None, typer.Option("--trial", metavar="ID", help="A trial in the results, instead of a file.")
    ] = None,
    quick: Quick = False,
    overrides: Overrides = None,
    data: Data = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; auto is a GPU where there is one.")
    ] = "auto",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Processor threads for arithmetic.")
    ] = 1,
    results: Results = "results",
) -> None:
    """Train one trial in the foreground: no Ray, for a debugger.

    Prints a line per epoch and writes nothing to the results.
    """
    if (file is None) == (trial is None):
        raise UsageError("give a sweep FILE (and --index), or --trial ID: one of the two")
    if trial and (overrides or quick or index is not None):
        raise UsageError(
            "-S, --quick and --index go with a sweep FILE; --trial is trained as it is stored. To train it with other "
            "settings, give the FILE it is of, its --index (`mixmo plan FILE --trials` tells) and -S"
        )
    config = (
        _config_of_trial(trial, results) if trial else _config_at(_load(_given(file), overrides, quick), index or 0)
    )
    _train(config, device, threads, data)


# ---------------------------------------------------------------------------------------------------- read results


@app.command("ls", cls=_Command, rich_help_panel=READING)
def list_sweeps(results: Results = "results", as_json: Json = False) -> ExitCode:
    """The sweeps in the results, and how far each is.

    Ends with 7 if one of them cannot be read; the others are listed all the same.
    """
    _light()
    from orchestrator import pages
    from orchestrator.store import DamagedError, ResultStore

    store, now = ResultStore.open(results), _now()
    listed: list[tuple[str, Progress | None, datetime | None]] = []
    unread: dict[str, str] = {}
    for name in store.sweeps():
        try:
            listed.append((name, *_measured(store, name, now)))
        except DamagedError as error:
            unread[name] = str(error)
            listed.append((name, None, None))
    if as_json:
        sweeps = [
            {"sweep": name, **(_plain(state) if state else {"status": "damaged"}), "written_at": written}
            for name, state, written in listed
        ]
        _print_json("ls", {"results": store.uri, "sweeps": sweeps})
    elif listed:
        console = _console()
        console.print(pages.sweeps(listed, now, console.width))
    else:
        _say(f"no sweeps in {store.uri}; `mixmo run FILE` begins one")
    for name, told in unread.items():
        _say(f"mixmo: {name}: {' '.join(told.split())}")
    return ExitCode.UNREACHABLE if unread else ExitCode.OK


@app.command(cls=_Command, rich_help_panel=READING)
def status(sweep: SweepName, results: Results = "results", as_json: Json = False) -> None:
    """How far a sweep is: counts, time left, results, failures."""
    _light()
    from orchestrator.dashboard import summary
    from orchestrator.progress import driven
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    if as_json:
        _print_json("status", _status(store, sweep))
        return
    console = _console()
    console.print(summary(store.snapshot(sweep), _now(), console.width, driven=driven(store, sweep)))


@app.command(cls=_Command, rich_help_panel=READING)
def watch(
    sweep: SweepName,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """Follow a sweep on a live screen until it ends.

    Ctrl-C leaves the screen; the sweep goes on. Reads the results only, so it works on any machine that sees
    them. Without a terminal it prints one plain line
    for each change. With --json it prints what `mixmo status --json` does, once.
    """
    _light()
    from orchestrator import dashboard
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    if as_json:
        _print_json("status", _status(store, sweep))
        return ExitCode.OK
    return dashboard.watch(store, sweep, _console(), once=once)


@app.command(cls=_Command, rich_help_panel=READING)
def table(
    sweep: Annotated[list[str], typer.Argument(metavar="SWEEP...", help="One sweep, or several as one.")],
    *,
    rows: Annotated[
        str, typer.Option("--rows", metavar="FIELDS", help="Settings that make a line, as model.width,label.")
    ] = "",
    cols: Annotated[str, typer.Option("--cols", metavar="FIELDS", help="Settings that make a column.")] = "",
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="top1, top5, nll, ece, brier, ...")] = "top1",
    at: Annotated[At, typer.Option("--at", help="The last epoch, or the best one.")] = "last",
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="LABEL", help="Compare with this label. [default: the file's]")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print it.")] = "terminal",
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Mean, deviation and number of seeds of every cell.

    Only finished trials count; a cell that lacks some is marked. Without --rows, the lines are the labels and the
    settings that vary.
    """
    from orchestrator import analysis

    sweep = list(dict.fromkeys(sweep))
    loaded = analysis.load(results, *sweep)
    fields = [[each.strip() for each in names.split(",") if each.strip()] for names in (rows, cols)]
    made = analysis.table(
        loaded.rows,
        row_fields=fields[0],
        col_fields=fields[1],
        metric=metric,
        at=at,
        baseline=baseline or _baseline(loaded.store, sweep, loaded.rows),
    )
    shown = {"terminal": made.to_text, "markdown": made.to_markdown, "csv": made.to_csv, "json": made.to_json}
    print(shown["json" if as_json else format]().rstrip("\n"))


@app.command(cls=_Command, rich_help_panel=READING)
def figures(
    sweep: SweepName,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = Path("figures"),
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Draw a sweep: learning curves, and the accuracy of every cell.

    Prints the files that it writes.
    """
    from orchestrator.figures import figures as draw
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    files = draw(store.trial_rows(sweep), store.epoch_rows(sweep), out / sweep)
    if as_json:
        _print_json("figures", {"sweep": sweep, "files": [str(file) for file in files]})
        return
    for file in files:
        print(file)


@app.command(cls=_Command, rich_help_panel=READING)
def show(trial: TrialId, results: Results = "results", as_json: Json = False) -> None:
    """One trial: settings, results, attempts, error, how to repeat it."""
    from orchestrator import pages
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    rows = store.find(trial)
    row = max(rows, key=lambda each: each.order)
    epochs = store.epoch_rows(row.sweep, row.trial_id)
    repeat = _with_results(f"mixmo train --trial {row.trial_id}", results)
    if as_json:
        _print_json("show", {"rows": list(map(_flat, rows)), "epochs": list(map(_flat, epochs)), "repeat": repeat})
        return
    console = _console()
    console.print(pages.trial(rows, epochs, _now(), console.width, repeat=repeat), soft_wrap=True)


@app.command(cls=_Command, rich_help_panel=READING)
def logs(
    trial: TrialId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what is added, until Ctrl-C.")] = False,
    rank: Annotated[int, typer.Option("--rank", metavar="N", min=0, help="Which worker of the trial.")] = 0,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """What the newest attempt of a trial printed.

    At most the last 256 KiB; a running trial's log is renewed about every 30 s.
    """
    _light()
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    trial_id = store.find(trial)[0].trial_id
    text = store.log(trial_id, rank)
    if as_json:
        _print_json("logs", {"trial_id": trial_id, "rank": rank, "text": text})
        return
    print(text, end="" if text.endswith("\n") else "\n", flush=True)
    while follow:
        text = _print_added(text, store.log(trial_id, rank))


@app.command(cls=_Command, rich_help_panel=READING)
def verify(sweep: SweepName, results: Results = "results", as_json: Json = False) -> ExitCode:
    """Hold a stored sweep to its promises.

    One final state for each trial, no epoch missing or double, checkpoints whole. Ends with 3 if there are
    faults, and says what to do about each.
    """
    from orchestrator import pages
    from orchestrator.store import ResultStore

    found = ResultStore.open(results).verify(sweep)
    if as_json:
        _print_json("verify", {"sweep": sweep, "faults": [_plain(fault) for fault in found]})
    elif found:
        _console().print(pages.faults(found), soft_wrap=True)
    _say(f"{sweep}: {len(found) or 'no'} fault{'' if len(found) == 1 else 's'}")
    return ExitCode.FAULTS if found else ExitCode.OK


# ------------------------------------------------------------------------------------------------------- around it


@app.command(cls=_Command, rich_help_panel=AROUND)
def doctor(data: Data = None, results: Results = "results", as_json: Json = False) -> ExitCode:
    """Whether this machine can run a sweep.

    Looks at versions, processors, GPUs, the results folder, datasets and free disk. Ends with 2 if a version or
    a dataset is wrong, with 7 if results cannot be written.
    """
    from orchestrator import doctor as examination
    from orchestrator import pages

    console, done = _console(), []
    for check in examination.examine(Path(results), data):
        done.append(check)
        if not as_json:
            console.print(pages.checks([check]), soft_wrap=True)
    if as_json:
        _print_json("doctor", {"checks": [_plain(check) for check in done]})
    return examination.verdict(done)


@data_app.callback()
def data_program() -> None:
    """Get datasets."""


@data_app.command("get", cls=_Command)
def data_get(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="cifar10, cifar100, tiny_imagenet, cifar10_c or cifar100_c.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to put it in, for --data or MIXMO_DATA.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="Take it from this folder or archive instead of downloading."),
    ] = None,
) -> None:
    """Download a dataset, or take it from a folder or an archive, and check its files.

    digits and synthetic need no files. cifar10_c and cifar100_c are the corrupted test images of robustness: cifar_c.
    """
    from mixmo_core import data

    try:
        folder = data.fetch(name, dest, source)
    except data.DatasetError as error:
        raise UsageError(str(error)) from error
    print(folder)
    _say(f"{name} is whole; use it with --data {dest} or MIXMO_DATA={dest}")


# ------------------------------------------------------------------------------------------- what commands share


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mixmo-sweeps")
    except PackageNotFoundError:
        return "from a source tree that is not installed"


def _load(file: Path, overrides: Sequence[str] | None, quick: bool) -> Sweep:
    from orchestrator.sweep import load

    return load(file, overrides=overrides or (), quick=quick)


def _given(file: Path | None) -> Path:
    assert file is not None
    return file


def _cell_names(planned: Plan) -> dict[str, str]:
    from orchestrator.plan import initial_row
    from orchestrator.progress import cell_names

    cells = {item.trial.cell_id: item.trial for item in planned.items}
    return cell_names([initial_row(trial, planned.sweep) for trial in cells.values()])


def _by_trial(planned: Plan) -> list[dict[str, Any]]:
    return [
        {
            "index": index, "trial_id": item.trial.trial_id, "cell_id": item.trial.cell_id, "label": item.trial.label,
            "seed": item.trial.config.seed, "action": item.action, "reason": item.reason,
        }
        for index, item in enumerate(planned.items)
    ]  # fmt: skip


def _with_results(command: str, results: str) -> str:
    """A command to suggest: it names the results folder where it would not find it by itself."""
    known = results == (os.environ.get("MIXMO_RESULTS") or "results")
    return command if known else f"{command} --results {shlex.quote(results)}"


def _baseline(store: ResultStore, sweeps: Sequence[str], rows: Sequence[TrialRow]) -> str | None:
    """What the sweep files say, where they agree and the baseline is among the trials."""
    named = {sweep: _baseline_in(store.sweep_file(sweep), sweep) for sweep in sweeps}
    if len(set(named.values())) > 1:
        told = ", ".join(f"{sweep} {baseline or 'none'}" for sweep, baseline in named.items())
        _say(f"note: the sweeps name different baselines ({told}); --baseline LABEL chooses one")
        return None
    (baseline,) = set(named.values())
    return baseline if any(row.label == baseline for row in rows) else None


def _baseline_in(text: str, source: str) -> str | None:
    from orchestrator.sweep.document import Faults, read

    faults = Faults()
    root = read(text, source, faults)
    node = root.value.get("baseline") if root and isinstance(root.value, dict) and not faults.lines else None
    return str(node.value) if node and node.value is not None else None


def _config_at(sweep: Sweep, index: int) -> TrialConfig:
    if not 0 <= index < len(sweep.trials):
        raise NotFoundError(f"{sweep.name} has trials 0 to {len(sweep.trials) - 1}; there is no trial {index}")
    return sweep.trials[index].config


def _config_of_trial(prefix: str, results: str) -> TrialConfig:
    from orchestrator.rows import config_of
    from orchestrator.store import ResultStore

    return config_of(ResultStore.open(results).find(prefix)[0])


def _train(config: TrialConfig, device: str, threads: int, folder: Path | None) -> None:
    import torch

    from mixmo_core import data, train
    from mixmo_core.config import not_yet, trial_id

    missing = not_yet(config)
    if missing:
        raise UsageError(f"not yet: {', '.join(missing)} cannot be trained by this version")
    torch.set_num_threads(threads)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = _device(chosen)
    try:
        for name in data.needed(config):
            data.check(name, folder)
        _say(f"trial {trial_id(config)} on {chosen}; nothing is written")
        for epoch in train.train(config, device=place, data_dir=folder):
            print(_epoch_line(epoch, config), flush=True)
    except data.DatasetError as error:
        raise UsageError(str(error)) from error


def _device(name: str) -> Any:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UsageError(f"--device {name}: torch has none here; it has {', '.join(['cpu', *there])}") from error
    return torch.device(name)


def _epoch_line(epoch: Epoch, config: TrialConfig) -> str:
    metrics = epoch.metrics
    words = [
        f"epoch {epoch.epoch:>{len(str(config.optim.epochs))}}/{config.optim.epochs}",
        f"loss {metrics['loss']:.4f}",
    ]
    words += [f"{name} {100 * metrics[name]:.2f} %" for name in ("top1",) if name in metrics]
    words += [f"{name} {metrics[name]:.4f}" for name in ("nll", "ece") if name in metrics]
    return "  ".join([*words, f"{epoch.images / epoch.seconds:,.0f} images/s", f"{epoch.seconds:.1f} s"])


def _measured(store: ResultStore, name: str, now: datetime) -> tuple[Progress, datetime | None]:
    from orchestrator.progress import driven, measure

    snapshot = store.snapshot(name)
    return measure(snapshot, now, driven=driven(store, name)), snapshot.header.written_at


def _status(store: ResultStore, sweep: str) -> dict[str, Any]:
    from orchestrator import progress

    snapshot, lease = store.snapshot(sweep), store.lease(sweep)
    names = progress.cell_names(snapshot.rows)
    cells = progress.results(snapshot.rows, names)
    return {
        "sweep": sweep,
        **_plain(progress.measure(snapshot, _now(), driven=progress.driven(store, sweep))),
        "holder": lease.holder if lease else None,
        "written_at": snapshot.header.written_at,
        "results": [{**_plain(cell), "n": len(cell.top1), "mean": cell.mean, "std": cell.std} for cell in cells],
        "failures": [
            {"cause": cause, "trials": [row.trial_id for row in rows]}
            for cause, rows in progress.failures(snapshot.rows)
        ],
    }


def _print_added(before: str, now: str) -> str:
    """What a log has more than before; a log that was cut at its beginning, or is another's, is printed whole."""
    import time

    tail = before[-2000:]
    at = now.rfind(tail) if tail else 0
    print(now[at + len(tail) :] if at >= 0 else now, end="", flush=True)
    time.sleep(1.0)
    return now


# ------------------------------------------------------------------------------------------------------ the two streams


def _light() -> None:
    """For commands that read tables and compute nothing: pyarrow does without numpy where there is none, and loading
    it would be a quarter of their time. Where something has loaded it already, it stays.
    """
    sys.modules.setdefault("numpy", None)  # type: ignore[arg-type]


def _now() -> datetime:
    return datetime.now().astimezone()


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `_guarded` knows what it means; rich would end with 1

    console = Piped(stderr=stderr, highlight=False, markup=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100
    return console


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _plain(record: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(record)


def _flat(row: Any) -> dict[str, Any]:
    """A row as its table has it: settings and metrics are columns of their own."""
    record = _plain(row)
    return {**record, **record.pop("config", {}), **record.pop("metrics")}


def _print_json(command: str, payload: Mapping[str, Any]) -> None:
    print(json.dumps(_valid({"schema": f"mixmo.{command}/1", **payload}), indent=2, allow_nan=False))


def _valid(value: Any) -> Any:
    """As JSON can have it: no NaN, times in ISO 8601."""
    if isinstance(value, Mapping):
        return {str(key): _valid(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------------- the end


class _Terminated(BaseException):
    """SIGTERM, where nobody else takes it: the screen is put back in order on the way out."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    # What is imported is never garbage, and to look for some there costs a tenth of a short command's time.
    gc.set_threshold(100_000, 20, 20)
    sys.exit(_guarded(lambda: app(args=arguments, prog_name="mixmo", standalone_mode=False)))


def _guarded(command: Callable[[], Any]) -> int:
    """Run a command; its end as an exit code, and one clear message where it went wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
    try:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in background
        code = int(command() or 0)
        if sys.stdout:
            sys.stdout.flush()  # here, where a full disk is still told
        return code
    except MixmoError as error:
        _say("\n".join(f"mixmo: {line}" for line in str(error).splitlines() or [type(error).__name__]))
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except _Terminated:
        return ExitCode.TERMINATED
    except BrokenPipeError:  # `mixmo table x | head`
        _drop_output()
        return ExitCode.OK
    except Exception as error:
        return _other(error)


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _drop_output() -> None:
    """What is still to be written goes nowhere, instead of failing again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: Any) -> NoReturn:
    raise _Terminated


def _other(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer, whichever click it stands on
        error.show()
        return int(error.exit_code)
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        _say(f"mixmo: cannot write {error.filename or 'the output'}: {error.strerror}")
        _drop_output()
        return ExitCode.UNREACHABLE
    traceback.print_exc()
    _say("mixmo: this is a bug in mixmo, not in what you did. Please report it with the lines above.")
    return ExitCode.BUG


def script() -> NoReturn:
    """The installed command. It leaves without the teardown of Arrow's and torch's threads, which can abort a process
    whose work is done and written.
    """
    code = _guarded(lambda: app(prog_name="mixmo", standalone_mode=False))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    script()
