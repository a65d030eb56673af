"""The commands that plan and run: what a sweep would do, the sweep, one trial in the foreground."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import (
    RUNNING,
    Command,
    Data,
    File,
    Json,
    Overrides,
    Quick,
    Results,
    app,
    light,
    with_results,
)
from orchestrator.errors import ExitCode, FailedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from mixmo_core.config import TrialConfig
    from mixmo_core.train import Epoch
    from orchestrator.plan import Plan
    from orchestrator.sweep import Sweep


@app.command(cls=Command, rich_help_panel=RUNNING)
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
    light()
    from orchestrator import pages
    from orchestrator import plan as planning
    from orchestrator.store import ResultStore
    from orchestrator.sweep import not_runnable

    sweep = _load(file, overrides, quick)
    planned = planning.against(ResultStore.open(results), sweep)
    summary = planned.summary()
    summary["notes"] += not_runnable(sweep)
    if as_json:
        streams.print_json("plan", summary | {"by_trial": _by_trial(planned)})
        return
    console, names = streams.console(), _cell_names(planned)
    console.print(pages.plan(summary, names, console.width))
    if show:
        console.print(pages.settings(sweep, console.width))
    if trials:
        console.print(pages.planned_trials(planned.items, names, console.width))


@app.command(cls=Command, rich_help_panel=RUNNING)
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
    from orchestrator import plan as planning
    from orchestrator.cli.steering import from_screen
    from orchestrator.screen import Screen, Terms, fetching
    from orchestrator.store import ResultStore
    from orchestrator.sweep import check_runnable

    sweep = _load(file, overrides, quick)
    planned = planning.against(ResultStore.open(results), sweep, retry_failed=retry_failed)
    talk = streams.console(stderr=True)
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
    screen = Screen(
        talk, terms=Terms.of(sweep.price, sweep.budget), act=from_screen(store, sweep.name, results),
        fetch=fetching(store, sweep.name), on_quit="Ctrl-C stops the sweep: running trials finish, nothing new starts",
    )  # fmt: skip
    with screen:
        code: ExitCode = driver.run(
            sweep, store, data_dir=data, retry_failed=retry_failed, observer=screen.show, talk=screen.say
        )
        screen.ended()
    then = with_results(f"mixmo table {sweep.name}", results)
    talk.print(f"results in {store.uri} · next: {then}", style="dim", highlight=False, soft_wrap=True)
    return code


@app.command(cls=Command, rich_help_panel=RUNNING)
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
    from mixmo_core.config import trial_id

    torch.set_num_threads(threads)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = _device(chosen)
    try:
        for name in data.needed(config):
            data.check(name, folder)
        streams.say(f"trial {trial_id(config)} on {chosen}; nothing is written")
        for epoch in train.train(config, device=place, data_dir=folder):
            print(_epoch_line(epoch, config), flush=True)
    except data.DatasetError as error:
        raise UsageError(str(error)) from error
    except train.DivergedError as error:
        raise FailedError(str(error)) from error


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
