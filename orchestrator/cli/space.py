"""The commands that make room in the results."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import AROUND, Command, Json, Results, app, complete_sweep, light
from orchestrator.errors import ExitCode, RefusedError

if TYPE_CHECKING:
    from orchestrator.store import Belongings, Leftovers

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")]

_KINDS: Mapping[str, str] = {
    "superseded": "checkpoints and logs that newer ones have made needless",
    "orphaned": "files of trials that belong to no sweep",
    "epochs": "files of epochs that no table names",
    "claims": "claims of drivers that are gone",
    "commands": "commands that were answered days ago",
}


@app.command(cls=Command, rich_help_panel=AROUND)
def gc(yes: Yes = False, dry_run: DryRun = False, results: Results = "results", as_json: Json = False) -> ExitCode:
    """Delete what no sweep needs any more.

    Shows what goes and asks first; without a terminal it deletes only with --yes. Nothing that a sweep refers to goes,
    nothing of a sweep that runs, and nothing younger than an hour.
    """
    light()
    from orchestrator.lines import plural, room
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    found = store.leftovers()
    if not as_json:
        _show_leftovers(found, store.uri)
    for note in found.notes:
        streams.say(f"note: {' '.join(note.split())}")
    question = f"Delete {plural(len(found.items), 'object')}, {room(found.bytes)}?"
    goes = bool(found.items) and not dry_run and (yes or (not as_json and _confirmed(question)))
    freed = 0 if dry_run else store.clean(found.items if goes else ())  # empty folders go without a word
    if as_json:
        items = [streams.plain(each) for each in found.items]
        told = {"results": store.uri, "bytes": found.bytes, "notes": list(found.notes), "items": items}
        streams.print_json("gc", {**told, "deleted": goes, "freed_bytes": freed})
    elif goes:
        streams.say(f"{room(freed)} freed")
    elif found.items:
        streams.say("nothing was deleted" if dry_run or _asks() else "nothing was deleted: --yes deletes it")
    return ExitCode.OK


@app.command(cls=Command, rich_help_panel=AROUND)
def rm(
    sweep: Annotated[
        list[str], typer.Argument(metavar="SWEEP...", help="The sweeps to remove.", autocompletion=complete_sweep)
    ],
    *,
    yes: Yes = False,
    dry_run: DryRun = False,
    results: Results = "results",
    as_json: Json = False,
) -> ExitCode:
    """Remove sweeps and what only they need.

    Shows what goes and asks for the sweep's name first. Trials that another sweep has too keep their files. Refused
    while a driver runs the sweep. Ends with 4 if another name was typed, and nothing of that sweep went.
    """
    light()
    from orchestrator.lines import room
    from orchestrator.store import ResultStore

    store = ResultStore.open(results)
    names = list(dict.fromkeys(sweep))
    found = [store.belongings(name) for name in names]  # a name that is wrong removes nothing
    freed: dict[str, int] = {}
    for place, name in enumerate(names):
        each = found[place] = store.belongings(name)  # what it shared with one before is its own now
        if not as_json:
            _show_belongings(each)
        for note in each.notes:
            streams.say(f"note: {' '.join(note.split())}")
        if not dry_run and (yes or _named(each.sweep)):
            freed[each.sweep] = store.remove(each.sweep)
            streams.say(f"{each.sweep} is removed: {room(freed[each.sweep])} freed")
    if as_json:
        streams.print_json("rm", {"results": store.uri, "sweeps": [_plain(each, freed) for each in found]})
    return ExitCode.OK if dry_run or len(freed) == len(found) else ExitCode.STOPPED


def _show_leftovers(found: Leftovers, uri: str) -> None:
    from orchestrator.lines import room

    counts, sizes = Counter[str](), Counter[str]()
    for each in found.items:
        counts[each.kind] += 1
        sizes[each.kind] += each.bytes
    for kind, meaning in _KINDS.items():
        if counts[kind]:
            print(f"{room(sizes[kind]):>8}  {counts[kind]:>6,}  {meaning}")
    print(f"{room(found.bytes):>8}  {len(found.items):>6,}  in {uri}" if found.items else f"nothing needless in {uri}")


def _show_belongings(each: Belongings) -> None:
    from orchestrator.lines import plural, room

    print(f"{each.sweep}: {room(each.bytes)}")
    print(f"{room(sum(each.tables.values())):>8}  {len(each.tables):>6,}  tables")
    print(f"{room(sum(each.files.values())):>8}  {len(each.files):>6,}  checkpoints, logits and logs")
    if each.shared:
        print(f"          the files of {plural(each.shared, 'trial')} stay: another sweep has them too")


def _plain(each: Belongings, freed: Mapping[str, int]) -> dict[str, object]:
    keys: Sequence[str] = [*each.tables, *each.files]
    told = {"sweep": each.sweep, "bytes": each.bytes, "trials": each.trials, "shared": each.shared}
    return {**told, "notes": list(each.notes), "keys": keys, "freed_bytes": freed.get(each.sweep)}


def _asks() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _confirmed(question: str) -> bool:
    return _asks() and typer.confirm(question, default=False, err=True)


def _named(sweep: str) -> bool:
    """Whether the user types the name. Raises RefusedError where there is nobody to ask."""
    if not _asks():
        raise RefusedError(f"{sweep} is not removed: nobody can be asked here. --yes removes it")
    return bool(typer.prompt(f"Type {sweep} to remove it", default="", show_default=False, err=True) == sweep)
