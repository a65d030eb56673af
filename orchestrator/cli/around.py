"""The commands around a sweep: whether this machine can run one, and the datasets it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import AROUND, Command, Data, Json, Results, app, data_app
from orchestrator.errors import ExitCode, UsageError


@app.command(cls=Command, rich_help_panel=AROUND)
def doctor(data: Data = None, results: Results = "results", as_json: Json = False) -> ExitCode:
    """Whether this machine can run a sweep.

    Looks at versions, processors, GPUs, the place of the results, datasets and free disk. Ends with 2 if a version or
    a dataset is wrong, with 7 if results cannot be written.
    """
    from orchestrator import doctor as examination
    from orchestrator import pages
    from orchestrator.datasets import local

    console, done = streams.console(), []
    for check in examination.examine(results, local(data)):
        done.append(check)
        if not as_json:
            console.print(pages.checks([check]), soft_wrap=True)
    if as_json:
        streams.print_json("doctor", {"checks": [streams.plain(check) for check in done]})
    return examination.verdict(done)


@data_app.callback()
def data_program() -> None:
    """Get datasets."""


@data_app.command("get", cls=Command)
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
    streams.say(f"{name} is whole; use it with --data {dest} or MIXMO_DATA={dest}")
