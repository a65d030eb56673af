"""The command that makes one plain network of a trial's subnetworks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import READING, Command, Json, Results, TrialId, app
from orchestrator.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from orchestrator.trained import Trained

SUFFIXES = (".pt2", ".onnx")


@app.command(cls=Command, rich_help_panel=READING)
def fold(
    trial: TrialId,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .pt2 (torch.export) or .onnx.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Fold a trained trial into one plain network, and write it to a file.

    The file predicts what the ensemble of the trial's subnetworks does, at the cost of one network, and runs without
    mixmo. It takes the newest checkpoint; .onnx needs the packages of the extra `onnx`.
    """
    _check(out, force=force)
    from mixmo_core import export, networks
    from orchestrator import trained
    from orchestrator.store import ResultStore

    found = trained.network(ResultStore.open(results), trial, streams.say)
    folded, dataset = networks.fold(found.net), found.config.data.dataset
    try:
        export.write(folded, dataset, out)
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        told = error.strerror or error
        raise UnreachableError(f"cannot write {out}: {told}. Nothing was left there; name another place") from error
    described = export.description(dataset)
    parameters = sum(parameter.numel() for parameter in folded.parameters())
    if as_json:
        streams.print_json("fold", _record(found) | {"file": str(out), "parameters": parameters, **described})
    else:
        print(out)
    for line in _told(found, parameters, described):
        streams.say(line)


def _check(out: Path, *, force: bool) -> None:
    """What can be refused before anything slow is loaded."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: the suffix decides what is written: {' or '.join(SUFFIXES)} (got {out.suffix!r})")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}; make it first, or name another")
    if out.is_dir():
        raise UsageError(f"{out}: this is a folder; name a file in it")
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out}: it is there already; --force replaces it")


def _record(found: Trained) -> dict[str, Any]:
    return {
        "trial_id": found.row.trial_id, "epoch": found.epoch, "step": found.step,
        "epochs": found.config.optim.epochs, "checkpoint": found.key,
    }  # fmt: skip


def _told(found: Trained, parameters: int, described: Any) -> list[str]:
    M = found.config.model.subnetworks
    at = f"epoch {found.epoch} of {found.config.optim.epochs}" + (f", step {found.step}" if found.step else "")
    lines = [f"trial {found.row.trial_id}, {at}, as one network of {parameters:,} parameters"]
    if not found.is_finished:
        lines.append(f"note: the trial is {found.row.state.lower()}: this is its newest checkpoint, not its result")
    if M > 1:
        lines.append(
            f"lost: what each of the {M} subnetworks predicts by itself; their ensemble is what the file predicts"
        )
    for kind in ("input", "output"):
        spec = described[kind]
        lines.append(f"{kind}: {spec['name']} ({', '.join(map(str, spec['shape']))}) {spec['type']}")
    return lines
