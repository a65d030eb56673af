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
    to_repeat,
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
    gangs: Annotated[
        int | None,
        typer.Option("--gangs", metavar="N", min=1, help="Tell when it ends in N gangs at once. [default: the file's]"),
    ] = None,
    quick: Quick = False,
    overrides: Overrides = None,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """What a run would do and what it costs. Changes nothing.

    Trials whose results are there already, in this sweep or another, are not run again. Hours, money and time to the
    end are told from what `mixmo calibrate` and the trials of the results took, for each kind of device among them.
    """
    light()
    from orchestrator import budget, pages
    from orchestrator import plan as planning
    from orchestrator.store import ResultStore
    from orchestrator.sweep import not_runnable

    sweep = load(file, overrides, quick)
    planned = planning.against(ResultStore.open(results), sweep)
    summary = planned.summary(gangs)
    summary["notes"] += not_runnable(sweep)
    if planned.to_run or planned.sweep.to_draw:
        summary["notes"] += budget.refused(planned.sweep, [item.row for item in planned.items if item.row])
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
    no_canary: Annotated[
        bool, typer.Option("--no-canary", help="Begin without two steps of the largest trial, which try the memory.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
    results: Results = "results",
) -> ExitCode:
    """Run what is missing of a sweep.

    Here, or on the Ray cluster of RAY_ADDRESS. The same command continues a sweep that was stopped or killed, from its
    checkpoints. The first Ctrl-C lets running trials finish, the second ends at once.
    """
    from orchestrator import driver
    from orchestrator.cli.steering import from_screen
    from orchestrator.screen import Screen, Terms, fetching
    from orchestrator.store import ResultStore

    sweep = load(file, overrides, quick)
    planned = planned_for(sweep, results, retry_failed=retry_failed)
    talk = streams.console(stderr=True)
    if planned.to_run or planned.sweep.to_draw:
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
        fetch=fetching(store, sweep.name), repeat=lambda trial: to_repeat(trial, results),
        on_quit="Ctrl-C stops the sweep: running trials finish, nothing new starts",
    )  # fmt: skip
    with screen:
        code: ExitCode = driver.run(
            sweep, store, data_dir=data, retry_failed=retry_failed, rehearse=not no_canary, observer=screen.show,
            talk=screen.say,
        )  # fmt: skip
        screen.ended()
    then = with_results(f"mixmo table {sweep.name}", results)
    talk.print(f"results in {store.uri} · next: {then}", style="dim", highlight=False, soft_wrap=True)
    return code


@app.command(cls=Command, rich_help_panel=RUNNING)
def calibrate(
    file: File,
    *,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="To spend on training steps, in all.")
    ] = 60.0,
    all_shapes: Annotated[
        bool, typer.Option("--all", help="Time every network of the sweep, not the smallest, middle and largest alone.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; auto is a GPU where there is one.")
    ] = "auto",
    quick: Quick = False,
    overrides: Overrides = None,
    data: Data = None,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Time a sweep's training steps on this machine, so that plans tell hours.

    What is found is kept in the results, for all sweeps, by the name of the device. A GPU or processor that others
    use meanwhile is timed as slow as it is then.
    """
    from mixmo_core.data import needed
    from orchestrator import datasets, stopwatch
    from orchestrator.store import ResultStore

    sweep = load(file, overrides, quick)
    store = ResultStore.open(results, create=True)
    place = _device("cpu" if device == "auto" and sweep.resources.gpus_per_worker == 0 else _chosen(device))
    there = stopwatch.shapes(sweep)
    trials = there if all_shapes else stopwatch.chosen(there)
    names = sorted({name for trial in trials for name in needed(trial.config)})
    folder = datasets.on_this_host(names, data)
    datasets.check(names, data)
    streams.say(f"{sweep.name}: {len(trials)} of {len(there)} shapes, {seconds / len(trials):.0f} s each, on {place}")
    done = []
    cpus = sweep.resources.cpus_per_worker
    for timed in stopwatch.calibrate(trials, device=place, cpus=cpus, data_dir=folder, seconds=seconds):
        store.add_timings(timed.timings)
        done.append(timed)
        if not as_json:
            print(_timed_line(timed), flush=True)
    if as_json:
        timings = [streams.plain(timing) for timed in done for timing in timed.timings]
        streams.print_json("calibrate", {"sweep": sweep.name, "shapes": len(there), "timings": timings})
    streams.say(f"kept in {store.uri}; next: {with_results(f'mixmo plan {file}', results)}")


def _timed_line(timed: Any) -> str:
    paces, model = [each.pace for each in timed.timings], timed.trial.config.model
    spread = f"{100 * (max(paces) / min(paces) - 1):.0f} % apart" if len(paces) > 1 else "timed once"
    what = f"{model.arch} w={model.width} M={model.subnetworks} B={timed.trial.config.data.batch_size}"
    rate = f"{1000 * timed.step_s:,.1f} ms a step, {timed.flops_per_s / 1e12:.3g} TFLOP/s"
    return f"{timed.trial.trial_id[:7]}  {what}  {rate} ({len(paces)} stretches, {spread})"


def _chosen(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


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
    config = _config_of_trial(trial, results) if trial else _config_at(load(_given(file), overrides, quick), index or 0)
    _train(config, device, threads, data)


def load(file: Path, overrides: Sequence[str] | None, quick: bool) -> Sweep:
    from orchestrator.sweep import load

    return load(file, overrides=overrides or (), quick=quick)


def planned_for(sweep: Sweep, results: str, *, retry_failed: bool) -> Plan:
    """What is to be run, shown where that is anything. Raises SweepError for what no run can honour yet."""
    from orchestrator import pages
    from orchestrator import plan as planning
    from orchestrator.store import ResultStore
    from orchestrator.sweep import check_runnable

    planned = planning.against(ResultStore.open(results), sweep, retry_failed=retry_failed)
    if planned.to_run or planned.sweep.to_draw:
        check_runnable(sweep)
        talk = streams.console(stderr=True)
        talk.print(pages.plan(planned.summary(), _cell_names(planned), talk.width))
    return planned


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

    row = ResultStore.open(results).find(prefix)[0]
    if row.lineage is not None:
        raise UsageError(
            f"trial {row.trial_id} belongs to the population of {row.sweep} and cannot be trained alone: what others "
            f"reach decides what becomes of it. `mixmo run` trains the sweep"
        )
    return config_of(row)


def _train(config: TrialConfig, device: str, threads: int, place: str | None) -> None:
    import torch

    from mixmo_core import data, train
    from mixmo_core.config import trial_id
    from orchestrator import datasets

    torch.set_num_threads(threads)
    chosen = _chosen(device)
    chip = _device(chosen)
    try:
        folder = datasets.on_this_host(data.needed(config), place)
        datasets.check(data.needed(config), place)
        streams.say(f"trial {trial_id(config)} on {chosen}; nothing is written")
        for epoch in train.train(config, device=chip, data_dir=folder):
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
