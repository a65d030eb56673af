"""The commands that take results elsewhere: copies of the tables, and answers to SQL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import READING, Command, Json, Results, app, complete_sweep
from orchestrator.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from orchestrator.pull import SweepState

ROWS_SHOWN = 1000
"""A terminal gets no more rows of an answer; every other format has all."""
_TOLD = {
    "running": "{0.sweep} still runs: {0.ended} of {0.trials} trials have ended. Pull again later for the rest",
    "stopped": "{0.sweep} is not finished and no driver runs it: {0.ended} of {0.trials} trials have ended",
    "unknown": "{0.sweep} is not finished: {0.ended} of {0.trials} trials have ended. Its lease cannot be read",
}


@app.command(cls=Command, rich_help_panel=READING)
def pull(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP... DEST",
            help="One sweep or several, and the folder to write into.",
            autocompletion=complete_sweep,
        ),
    ],
    *,
    format: Annotated[Literal["parquet", "csv", "arrow"], typer.Option("--format", help="Of the tables.")] = "parquet",
    logits: Annotated[bool, typer.Option("--logits", help="Also the logits of every finished trial.")] = False,
    force: Annotated[bool, typer.Option("--yes", "-y", "--force", help="Replace what is there.")] = False,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Copy the tables of sweeps into a folder.

    Writes trials and epochs (one row per trial and epoch, whatever the sweep is doing), and each sweep's file. Prints
    the files that it writes. A sweep that still runs is copied as it stands, and that is told.
    """
    if len(words) < 2:
        raise UsageError(f"name the sweeps and then a folder: mixmo pull {words[0]} FOLDER")
    from orchestrator import pull as pulling
    from orchestrator.store import ResultStore

    *sweeps, dest = words
    copy = pulling.pull(
        ResultStore.open(results), sweeps, Path(dest).expanduser(), format=format, logits=logits, force=force
    )
    if as_json:
        files = [{"file": str(each.path), "rows": each.rows, "bytes": each.size} for each in copy.files]
        streams.print_json("pull", {"files": files, "sweeps": list(map(streams.plain, copy.sweeps))})
    else:
        for each in copy.files:
            print(each.path if each.rows is None else f"{each.path}  {each.rows:,} row{'' if each.rows == 1 else 's'}")
    for told in [*filter(None, map(_told, copy.sweeps)), *copy.notes]:
        streams.say(f"note: {told}")


def _told(sweep: SweepState) -> str | None:
    return _TOLD[sweep.state].format(sweep) if sweep.state in _TOLD else None


@app.command(cls=Command, rich_help_panel=READING)
def sql(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="One query, in quotation marks; - reads it from stdin.")
    ],
    sweep: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SWEEP...]", help="Of these sweeps. [default: all]", autocompletion=complete_sweep),
    ] = None,
    *,
    format: Annotated[
        Literal["terminal", "markdown", "csv", "json"], typer.Option("--format", help="How to print it.")
    ] = "terminal",
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """Ask the results in SQL (DuckDB's).

    There are two tables: trials has one row per trial and sweep, epochs one per trial, epoch and sweep; the column
    sweep tells the sweeps apart. `mixmo sql "describe trials"` lists the columns. Nothing can be written, and no other
    file be read. Ends with 7 if one of the sweeps cannot be read; the answer is of the others.
    """
    from orchestrator import query as asking
    from orchestrator.pull import as_csv
    from orchestrator.store import ResultStore

    text = sys.stdin.read() if query == "-" else query
    given = asking.tables(ResultStore.open(results), sweep or (), text)
    answer = asking.ask(text, given)
    if as_json or format == "json":
        streams.print_json("sql", {"columns": answer.columns(), "rows": answer.to_records()})
    elif format == "csv":
        print(as_csv(answer.table).decode(), end="")
    else:
        print(answer.to_markdown() if format == "markdown" else answer.to_text(ROWS_SHOWN))
        if format == "terminal" and len(answer.table) > ROWS_SHOWN:
            streams.say(f"the first {ROWS_SHOWN:,} of {len(answer.table):,} rows; --format csv prints all")
    for name, told in given.damaged.items():
        streams.say(f"mixmo: without {name}: {' '.join(told.split())}")
    return ExitCode.UNREACHABLE if given.damaged else ExitCode.OK
