"""The program, and what its commands share: arguments, options, and how little a reading command loads."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core
import typer.models

if TYPE_CHECKING:
    from orchestrator.store import ResultStore


class Command(typer.core.TyperCommand):
    """Its usage line names arguments as everybody writes them: `mixmo run [OPTIONS] FILE`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}").replace("}...", "") for piece in super().collect_usage_pieces(ctx)]


class Sections(typer.core.TyperGroup):
    """Lists the commands under headings, in the order in which they are defined."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if command.hidden:
                continue
            sections.setdefault(command.rich_help_panel or "Commands", []).append(
                (name, command.get_short_help_str(200))
            )
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


RUNNING, READING, AROUND = "Plan and run", "Read results", "Around it"
_SETTINGS: Any = {"help_option_names": ["-h", "--help"], "max_content_width": 90}
app = typer.Typer(
    cls=Sections, context_settings=_SETTINGS, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
data_app = typer.Typer(cls=Sections, context_settings=_SETTINGS, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data", rich_help_panel=AROUND)

MOST_COMPLETED = 200
"""More words than this help nobody to choose."""


def _of_store(ctx: typer.Context, incomplete: str, find: Callable[[ResultStore], Iterable[str]]) -> list[str]:
    """Words for a shell to complete: none, and nothing is said, where the results cannot be read or lie in a bucket,
    which takes too long while somebody types.
    """
    try:
        light()
        from orchestrator.store import ResultStore, folder_of

        place = ctx.params.get("results") or "results"
        if folder_of(place) is None:
            return []
        found = sorted(each for each in find(ResultStore.open(place)) if each.startswith(incomplete))
    except Exception:
        return []
    return found if len(found) <= MOST_COMPLETED else []


def complete_sweep(ctx: typer.Context, incomplete: str) -> list[str]:
    return _of_store(ctx, incomplete, lambda store: store.sweeps())


def complete_trial(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the sweep that stands before it, or of those that have begun in any."""
    sweep = ctx.params.get("sweep")
    return _of_store(
        ctx, incomplete, lambda store: store.trials(sweep).column("trial_id").to_pylist() if sweep else store.begun()
    )


File = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file, such as sweeps/quickstart.yaml.")]
SweepName = Annotated[
    str,
    typer.Argument(
        metavar="SWEEP", help="The name in the sweep file; `mixmo ls` lists them.", autocompletion=complete_sweep
    ),
]
TrialId = Annotated[
    str,
    typer.Argument(
        metavar="TRIAL", help="A trial id, or as many of its first digits as tell it.", autocompletion=complete_trial
    ),
]
Results = Annotated[
    str,
    typer.Option(
        "--results",
        envvar="MIXMO_RESULTS",
        metavar="PLACE",
        help="Where the results lie: a folder, or s3://bucket/prefix.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-S", metavar="SETTING=VALUE", help="Lay a value over the file, for all trials. May be repeated."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Lay the file's `quick` settings over it; the name gets -quick.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON with a versioned schema.")]
Format = Literal["terminal", "markdown", "latex", "csv", "json"]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", envvar="MIXMO_DATA", metavar="PLACE", help="Where the images lie: a folder, or s3://bucket/prefix."
    ),
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


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mixmo-sweeps")
    except PackageNotFoundError:
        return "from a source tree that is not installed"


def of_words(words: Sequence[str]) -> typer.Typer:
    """The program. Where the words begin with the name of a command, one that has no other: to build thirty takes a
    tenth of a short command's time.
    """
    commands = [each for each in app.registered_commands if words and _name(each) == words[0]]
    if not commands:
        return app
    one = copy.copy(app)
    one.registered_commands, one.registered_groups = commands, []
    return one


def _name(command: typer.models.CommandInfo) -> str:
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


def with_results(command: str, results: str) -> str:
    """A command to suggest: it names the results folder where it would not find it by itself."""
    known = results == (os.environ.get("MIXMO_RESULTS") or "results")
    return command if known else f"{command} --results {shlex.quote(results)}"


def to_repeat(trial_id: str, results: str) -> str:
    """The command that trains a trial again."""
    return with_results(f"mixmo train --trial {trial_id}", results)


def light() -> None:
    """For commands that read tables and compute nothing: pyarrow does without numpy where there is none, and loading
    it would be a quarter of their time. Where something has loaded it already, it stays.
    """
    sys.modules.setdefault("numpy", None)  # type: ignore[arg-type]


def heavy() -> None:
    """Undo `light`, for a command that has to compute after all."""
    if sys.modules.get("numpy", sys) is None:
        del sys.modules["numpy"]
