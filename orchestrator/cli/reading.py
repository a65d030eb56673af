"""The commands that read results: sweeps, their state, tables, single trials."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import (
    READING,
    Command,
    Format,
    Json,
    Results,
    SweepName,
    TrialId,
    app,
    complete_sweep,
    heavy,
    light,
    to_repeat,
    with_results,
)
from orchestrator.errors import ExitCode

if TYPE_CHECKING:
    from orchestrator import analysis
    from orchestrator.progress import Progress
    from orchestrator.rows import TrialRow
    from orchestrator.screen import Terms
    from orchestrator.store import ResultStore


@app.command("ls", cls=Command, rich_help_panel=READING)
def list_sweeps(results: Results = "results", as_json: Json = False) -> ExitCode:
    """The sweeps in the results, and how far each is.

    Ends with 7 if one of them cannot be read; the others are listed all the same.
    """
    light()
    from orchestrator import pages
    from orchestrator.progress import driven, failures, measure
    from orchestrator.store import DamagedError, ResultStore

    store, now = ResultStore.open(results), streams.now()
    listed: list[tuple[str, Progress | None, datetime | None]] = []
    failed: dict[str, list[dict[str, Any]]] = {}
    unread: dict[str, str] = {}
    for name in store.sweeps():
        try:
            snapshot = store.snapshot(name)
            listed.append((name, measure(snapshot, now, driven=driven(store, name)), snapshot.header.written_at))
            failed[name] = [{"cause": cause, "trials": len(rows)} for cause, rows in failures(snapshot.rows)]
        except DamagedError as error:
            unread[name] = str(error)
            listed.append((name, None, None))
    if as_json:
        sweeps = [
            {
                "sweep": name,
                **(streams.plain(state) if state else {"status": "damaged"}),
                "written_at": written,
                "failures": failed.get(name, []),
            }
            for name, state, written in listed
        ]
        streams.print_json("ls", {"results": store.uri, "sweeps": sweeps})
    elif listed:
        console = streams.console()
        console.print(pages.sweeps(listed, now, console.width))
    else:
        streams.say(f"no sweeps in {store.uri}; `mixmo run FILE` begins one")
    for name, told in unread.items():
        streams.say(f"mixmo: {name}: {' '.join(told.split())}")
    return ExitCode.UNREACHABLE if unread else ExitCode.OK


@app.command(cls=Command, rich_help_panel=READING)
def status(sweep: SweepName, results: Results = "results", as_json: Json = False) -> None:
    """How far a sweep is: counts, time left, results, failures."""
    light()
    from orchestrator.progress import driven
    from orchestrator.screen import summary
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    if as_json:
        streams.print_json("status", _status(store, sweep))
        return
    console, terms = streams.console(), _terms(store, sweep)
    snapshot, held = store.snapshot(sweep), driven(store, sweep)
    console.print(summary(snapshot, streams.now(), console.width, driven=held, terms=terms))


@app.command(cls=Command, rich_help_panel=READING)
def watch(
    sweep: SweepName,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """Follow a sweep on a live screen until it ends.

    q or Ctrl-C leaves the screen; the sweep goes on. `?` lists the keys: they open a trial, filter and sort, and
    cancel, retry and pause as the commands of these names do. Reads the results only, so it works on any machine that
    sees them. Without a terminal it prints one plain line for each change. With --json it prints what
    `mixmo status --json` does, once.
    """
    light()
    from orchestrator import screen
    from orchestrator.cli.steering import from_screen
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    if as_json:
        streams.print_json("status", _status(store, sweep))
        return ExitCode.OK
    act, terms = from_screen(store, sweep, results), _terms(store, sweep)
    return screen.watch(
        store, sweep, streams.console(), once=once, terms=terms, act=act, repeat=lambda trial: to_repeat(trial, results)
    )


@app.command(cls=Command, rich_help_panel=READING)
def table(
    sweep: Annotated[
        list[str],
        typer.Argument(metavar="SWEEP...", help="One sweep, or several as one.", autocompletion=complete_sweep),
    ],
    *,
    rows: Annotated[
        str, typer.Option("--rows", metavar="FIELDS", help="Settings that make a line, as model.width,label.")
    ] = "",
    cols: Annotated[str, typer.Option("--cols", metavar="FIELDS", help="Settings that make a column.")] = "",
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="top1, top5, nll, ece, brier, ...")] = "top1",
    at: Annotated[
        str, typer.Option("--at", metavar="EPOCH", help="last, best, or one by its number: 30 or epoch=30.")
    ] = "last",
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="LABEL", help="Compare with this label, or with none. [default: the file's]"
        ),
    ] = None,
    ci: Annotated[
        float,
        typer.Option("--ci", metavar="PERCENT", min=50, max=99.99, help="Confidence of intervals and of tests."),
    ] = 95,
    no_ensembles: Annotated[
        bool, typer.Option("--no-ensembles", help="Leave out the ensembles that the sweep file names.")
    ] = False,
    with_stopped: Annotated[
        bool, typer.Option("--with-stopped", help="Count trials that a scheduler stopped early, too.")
    ] = False,
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            metavar="PARTS",
            help="Beside each mean: interval,difference,p,p_t,published. [default: what fits]",
        ),
    ] = "",
    format: Annotated[Format, typer.Option("--format", help="How to print it.")] = "terminal",
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Mean, deviation and number of seeds of every cell.

    Only finished trials count; a cell that lacks some is marked, and a heading tells of trials that a scheduler
    stopped early. Without --rows, the lines are the labels and those settings that vary which no label implies.
    Differences from the baseline are tested, paired where the seeds are the same. Ensembles that the sweep file names
    stand below, made from the trials' stored logits. Published numbers that it gives stand beside the cell that has
    their settings, or below; a sweep that was run with --quick is headed so, and has none. Markdown, CSV and JSON have
    all of it; a terminal what it has room for, and LaTeX all but p, unless --parts names something else.
    """
    light()
    from orchestrator import analysis

    sweep, when = list(dict.fromkeys(sweep)), _when(at)
    loaded = analysis.load(results, *sweep)
    fields = [[each.strip() for each in names.split(",") if each.strip()] for names in (rows, cols, parts)]
    asked, trials = loaded.asked(), loaded.rows
    ensembles = any(each.ensembles for each in asked.values()) and not no_ensembles
    compare = partial(
        analysis.table,
        [*trials, *(_ensembles(loaded, when, metric) if ensembles else ())],
        row_fields=fields[0],
        col_fields=fields[1],
        metric=metric,
        at=when,
        epochs=loaded.at_epoch(when) if isinstance(when, int) else (),
        published=[each for one in asked.values() for each in one.published],
        confidence=ci / 100,
        with_stopped=with_stopped,
    )
    if baseline:
        made = compare(baseline=None if baseline == "none" else baseline)
    else:
        told = _baseline({name: each.baseline for name, each in asked.items()}, trials)
        try:
            made = compare(baseline=told)
        except analysis.SharedLinesError as error:
            streams.say(f"note: nothing is compared with the file's baseline: {error}")
            made = compare()
    options = {"--rows": rows, "--cols": cols, "--metric": metric, "--at": at, "--baseline": baseline or "",
               "--ci": f"{ci:g}", "--parts": parts}  # fmt: skip
    given = [f"{name}={value}" for name, value in options.items() if value and value not in ("top1", "last", "95")]
    flags = [*(["--no-ensembles"] if no_ensembles else []), *(["--with-stopped"] if with_stopped else [])]
    words = ["mixmo", "table", *sweep, *given, *flags, "--format=latex"]
    shapes: dict[str, Callable[[], str]] = {
        "terminal": lambda: made.to_text(streams.width(), fields[2]),
        "markdown": lambda: made.to_markdown(fields[2]), "csv": made.to_csv, "json": made.to_json,
        "latex": lambda: made.to_latex(with_results(shlex.join(words), results), fields[2]),
    }  # fmt: skip
    print(shapes["json" if as_json else format]().rstrip("\n"))


@app.command(cls=Command, rich_help_panel=READING)
def show(trial: TrialId, results: Results = "results", as_json: Json = False) -> None:
    """One trial: settings, results, attempts, error, how to repeat it."""
    light()
    from orchestrator import pages
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    rows = store.find(trial)
    row = max(rows, key=lambda each: each.order)
    epochs = store.epoch_rows(row.sweep, row.trial_id)
    repeat = to_repeat(row.trial_id, results)
    if as_json:
        streams.print_json(
            "show", {"rows": list(map(streams.flat, rows)), "epochs": list(map(streams.flat, epochs)), "repeat": repeat}
        )
        return
    console = streams.console()
    console.print(pages.trial(rows, epochs, streams.now(), console.width, repeat=repeat), soft_wrap=True)


@app.command(cls=Command, rich_help_panel=READING)
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
    light()
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    trial_id = store.find(trial)[0].trial_id
    text = store.log(trial_id, rank)
    if as_json:
        streams.print_json("logs", {"trial_id": trial_id, "rank": rank, "text": text})
        return
    print(text, end="" if text.endswith("\n") else "\n", flush=True)
    while follow:
        text = _print_added(text, store.log(trial_id, rank))


@app.command(cls=Command, rich_help_panel=READING)
def verify(sweep: SweepName, results: Results = "results", as_json: Json = False) -> ExitCode:
    """Hold a stored sweep to its promises.

    One final state for each trial, no epoch missing or double, checkpoints whole. Ends with 3 if there are
    faults, and says what to do about each. Trials that have not ended are no fault, but are told.
    """
    light()
    from orchestrator import pages
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    found, left = store.verify(sweep, on_many=heavy), _left(store, sweep)
    if as_json:
        faults = [streams.plain(fault) for fault in found]
        streams.print_json("verify", {"sweep": sweep, "faults": faults, "trials_left": left})
    elif found:
        streams.console().print(pages.faults(found), soft_wrap=True)
    streams.say(f"{sweep}: {len(found) or 'no'} fault{'' if len(found) == 1 else 's'}")
    if left:
        streams.say(
            f"note: {left:,} of its trials have not ended: `mixmo status {sweep}` says whether a driver runs them"
        )
    return ExitCode.FAULTS if found else ExitCode.OK


def _left(store: ResultStore, sweep: str) -> int | None:
    """Trials that have not ended; None where the table cannot be read."""
    from orchestrator.rows import FINAL
    from orchestrator.store import DamagedError

    try:
        return sum(state not in FINAL for state in store.trials(sweep).column("state").to_pylist())
    except DamagedError:
        return None


def _terms(store: ResultStore, sweep: str) -> Terms:
    """What the sweep may cost, as its file says."""
    from orchestrator.screen import Terms

    text = store.sweep_file(sweep)
    if not ("price" in text or "budget" in text):  # a reader of YAML is half of all that such a command loads
        return Terms()
    from orchestrator.sweep import shown

    asked = shown(text, sweep)
    return Terms.of(asked.price, asked.budget)


def _when(text: str) -> analysis.At:
    """What --at says: `last`, `best`, `30` or `epoch=30`."""
    from orchestrator.errors import UsageError

    named: dict[str, analysis.At] = {"last": "last", "best": "best"}
    if text in named:
        return named[text]
    number = text.removeprefix("epoch=")
    if not (number.isascii() and number.isdigit() and int(number)):
        raise UsageError(f"--at {text}: give last, best, or an epoch by its number, as 30 or epoch=30")
    return int(number)


def _ensembles(loaded: analysis.Results, at: analysis.At, metric: str) -> list[TrialRow]:
    if at != "last":
        streams.say(f"note: ensembles are of the last epoch, whose logits are stored: --at {at} leaves them out")
        return []
    heavy()
    from orchestrator import ensembles

    return ensembles.rows(loaded, streams.say, [metric])


def _baseline(named: Mapping[str, str | None], trials: Sequence[TrialRow]) -> str | None:
    """What the sweep files say, where they agree and the baseline is among the trials."""
    if len(set(named.values())) > 1:
        told = ", ".join(f"{sweep} {baseline or 'none'}" for sweep, baseline in named.items())
        streams.say(f"note: the sweeps name different baselines ({told}); --baseline LABEL chooses one")
        return None
    (baseline,) = set(named.values())
    return baseline if any(row.label == baseline for row in trials) else None


def _status(store: ResultStore, sweep: str) -> dict[str, Any]:
    from orchestrator import causes, progress

    snapshot, lease = store.snapshot(sweep), store.lease(sweep)
    names = progress.cell_names(snapshot.rows)
    cells = progress.results(snapshot.rows, names)
    return {
        "sweep": sweep,
        **streams.plain(progress.measure(snapshot, streams.now(), driven=progress.driven(store, sweep))),
        "holder": lease.holder if lease else None,
        "written_at": snapshot.header.written_at,
        "results": [{**streams.plain(cell), "n": len(cell.top1), "mean": cell.mean, "std": cell.std} for cell in cells],
        "failures": [
            {
                "cause": cause.name,
                "kind": cause.kind,
                "fingerprint": cause.fingerprint,
                "trials": [row.trial_id for row in cause.rows],
            }
            for cause in causes.causes(snapshot.rows)
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
