"""The commands that draw: figures, accuracy against cost, and a page with all there is to say of a sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli import streams
from orchestrator.cli.program import READING, Command, Data, Json, Results, app, complete_sweep, heavy, light

if TYPE_CHECKING:
    from orchestrator import analysis
    from orchestrator.figures import Drawn
    from orchestrator.rows import TrialRow
    from orchestrator.sweep import Shown

Cost = Literal["gpu_hours", "flops", "parameters", "inference_flops", "money"]
Sweeps = Annotated[
    list[str], typer.Argument(metavar="SWEEP...", help="One sweep, or several as one.", autocompletion=complete_sweep)
]
Metric = Annotated[str, typer.Option("--metric", metavar="NAME", help="top1, top5, nll, ece, brier, ...")]
Price = Annotated[
    float | None,
    typer.Option("--price", metavar="NUMBER", min=0, help="Of a GPU for an hour. [default: the sweep file's]"),
]
NoEnsembles = Annotated[bool, typer.Option("--no-ensembles", help="Leave out the ensembles that the sweep file names.")]


@app.command(cls=Command, rich_help_panel=READING)
def figures(
    sweep: Sweeps,
    *,
    only: Annotated[
        str, typer.Option("--only", metavar="KINDS", help="Draw only these, as curves,width. [default: all]")
    ] = "",
    format: Annotated[str, typer.Option("--format", metavar="FORMATS", help="Of png, svg and pdf.")] = "png,svg",
    metric: Metric = "top1",
    no_ensembles: NoEnsembles = False,
    data: Data = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = Path("figures"),
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Draw a sweep: curves, cells, studies of a setting, calibration, masks.

    Prints the files that it writes, and says of each figure that it leaves out what the sweep lacks for it. Kinds:
    curves, accuracy, width, subnetworks, probability, weight_root, repetition, ensemble, diversity, reliability,
    gallery. The gallery shows images of --data, or made ones. Ensembles that the sweep file names are drawn among the
    cells and the studies. With --metric each file's name ends with the metric's.
    """
    from orchestrator import analysis
    from orchestrator import figures as drawing

    formats, sweep = _words(format), list(dict.fromkeys(sweep))
    drawing.check_formats(formats)
    loaded = analysis.load(results, *sweep)

    @functools.cache
    def combined() -> list[TrialRow]:
        return [] if no_ensembles else _ensembles(loaded, loaded.asked(), streams.say)

    drawn = _drawn(loaded, combined, metric, data, _words(only))
    files = drawing.write(drawn.figures, out / "+".join(sweep), formats, metric)
    if as_json:
        named = {"files": [str(file) for file in files], "not_drawn": dict(drawn.lacking)}
        streams.print_json("figures", {"sweep": "+".join(sweep), **named})
        return
    for file in files:
        print(file)
    for kind, why in drawn.lacking.items():
        streams.say(f"note: no {kind}: {why}")


@app.command(cls=Command, rich_help_panel=READING)
def pareto(
    sweep: Sweeps,
    *,
    metric: Metric = "top1",
    cost: Annotated[Cost, typer.Option("--cost", help="What is paid.")] = "gpu_hours",
    price: Price = None,
    no_ensembles: NoEnsembles = False,
    format: Annotated[
        Literal["terminal", "markdown", "csv", "json"], typer.Option("--format", help="How to print it.")
    ] = "terminal",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Draw it, too: a .png, .svg or .pdf.")
    ] = None,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """Accuracy against cost, and which cells no other beats.

    Only finished trials count; ensembles that the sweep file names cost what their members do together. Where no
    trial had a GPU, hours are those of the wall clock.
    """
    light()
    from orchestrator import analysis
    from orchestrator.pareto import front

    if out:
        _check_suffix(out, (".png", ".svg", ".pdf"))
    loaded = analysis.load(results, *dict.fromkeys(sweep))
    asked = loaded.asked()
    rows = [*loaded.rows, *([] if no_ensembles else _ensembles(loaded, asked, streams.say, [metric]))]
    price, currency = _price(asked, price)
    found = front(rows, metric=metric, cost=cost, price=price, currency=currency)
    shapes: dict[str, Callable[[], str]] = {
        "terminal": found.to_text, "markdown": found.to_markdown, "csv": found.to_csv,
    }  # fmt: skip
    if as_json or format == "json":
        named = {"metric": metric, "cost": cost, "cost_name": found.cost_name, "notes": found.notes}
        streams.print_json("pareto", {"sweeps": loaded.sweeps, **named, "cells": found.records()})
    else:
        print(shapes[format]().rstrip("\n"))
    if out:
        heavy()
        from orchestrator.figures import draw_front, save

        streams.say(f"drawn: {save(draw_front(found), out)}")


@app.command(cls=Command, rich_help_panel=READING)
def report(
    sweep: Sweeps,
    *,
    metric: Metric = "top1",
    price: Price = None,
    no_ensembles: NoEnsembles = False,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page to write. [default: SWEEP.html]")
    ] = None,
    results: Results = "results",
    as_json: Json = False,
) -> None:
    """One page of HTML with all there is to say of a sweep.

    Tables with tests, ensembles, cost, figures, failures, and what was run. It opens without a network: nothing lies
    beside it. Of a sweep that still runs it shows what has finished, and
    says so. The same results make the same page.
    """
    from orchestrator import analysis
    from orchestrator import report as reporting
    from orchestrator.errors import UnreachableError

    names = list(dict.fromkeys(sweep))
    out = out or Path(f"{'+'.join(names)}.html")
    _check_suffix(out, (".html", ".htm"))
    content = _content(analysis.load(results, *names), metric, data, price, no_ensembles=no_ensembles)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(reporting.page(content), encoding="utf-8")
    except OSError as error:
        raise UnreachableError(f"cannot write {out}: {error.strerror or error}; name another with --out") from error
    if as_json:
        streams.print_json("report", {"sweeps": names, "file": str(out)})
    else:
        print(out)


def _content(
    loaded: analysis.Results, metric: str, data: str | None, price: float | None, *, no_ensembles: bool
) -> Any:
    from orchestrator import analysis
    from orchestrator.errors import NotFoundError
    from orchestrator.report import MORE_METRICS, Content

    asked, told = loaded.asked(), list[str]()
    trials = loaded.rows
    combined = [] if no_ensembles else _ensembles(loaded, asked, told.append)
    rows = [*trials, *combined]
    baselines = {each.baseline for each in asked.values()}
    baseline = baselines.pop() if len(baselines) == 1 else None
    made = analysis.table(
        rows, metric=metric, published=[each for one in asked.values() for each in one.published],
        baseline=baseline if any(row.label == baseline for row in trials) else None,
    )  # fmt: skip
    known = [each for each in MORE_METRICS if each != metric and any(row.metrics.get(each) is not None for row in rows)]
    try:
        drawn = _drawn(loaded, lambda: combined, metric, data, ())
    except NotFoundError:
        drawn = None
    written = [loaded.store.snapshot(name).header.written_at for name in loaded.sweeps]
    return Content(
        files={name: loaded.store.sweep_file(name) for name in loaded.sweeps}, rows=trials, results=made,
        written_at=max((each for each in written if each), default=None), drawn=drawn, ensembles=told,
        more=[analysis.table(rows, metric=each) for each in known], front=_front(rows, metric, _price(asked, price)),
    )  # fmt: skip


def _front(rows: list[TrialRow], metric: str, price: tuple[float | None, str]) -> Any:
    """By money where there is a price, else by GPU-hours; by FLOPs where hours do not compare."""
    from orchestrator.errors import NotFoundError, UsageError
    from orchestrator.pareto import front

    for cost in ("money", "gpu_hours", "flops"):
        try:
            return front(rows, metric=metric, cost=cost, price=price[0], currency=price[1])
        except UsageError:
            continue
        except NotFoundError:
            return None
    return None


def _drawn(
    loaded: analysis.Results,
    ensembles: Callable[[], list[TrialRow]],
    metric: str,
    data: str | None,
    only: tuple[str, ...],
) -> Drawn:
    from orchestrator import figures as drawing
    from orchestrator.rows import epoch_rows

    rows = loaded.rows

    def samples() -> Any:
        from orchestrator import gallery
        from orchestrator.datasets import local

        return gallery.samples(rows, local(data))  # of a bucket's datasets those that were copied here

    material = drawing.Material(
        rows=rows,
        epochs=lambda: epoch_rows(loaded.epochs()),
        logits=loaded.store.logits,
        samples=samples,
        ensembles=ensembles,
    )
    return drawing.draw(material, metric=metric, only=only)


def _ensembles(
    loaded: analysis.Results,
    asked: Mapping[str, Shown],
    talk: Callable[[str], None],
    metrics: Collection[str] | None = None,
) -> list[TrialRow]:
    if not any(each.ensembles for each in asked.values()):
        return []
    heavy()
    from orchestrator import ensembles

    return ensembles.rows(loaded, talk, metrics)


def _price(asked: Mapping[str, Shown], given: float | None) -> tuple[float | None, str]:
    """Of a GPU-hour, and its currency: as given, else as the sweep files agree."""
    told = {(each.price.gpu_hour, each.price.currency) for each in asked.values()}
    price, currency = told.pop() if len(told) == 1 else (None, "USD")
    return (price if given is None else given), currency


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))


def _check_suffix(path: Path, allowed: tuple[str, ...]) -> None:
    from orchestrator.errors import UsageError

    if path.suffix not in allowed:
        known = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise UsageError(f"{path}: the suffix decides what is written: {known} (got {path.suffix!r})")
