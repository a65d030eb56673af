"""A sweep as one page of HTML that needs nothing else: no network, no script, no file beside it. Pure.

The same results make the same page: it tells when they were written, never when it was made. All text that comes from a
sweep file or a trial is escaped, and figures are images inside the page, so nothing in them can run.
"""

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

from mixmo_core import cost
from orchestrator.figures import TITLES, Drawn, draw_front, svg
from orchestrator.lines import duration, percent, plural
from orchestrator.pareto import Front
from orchestrator.progress import cell_names, failures
from orchestrator.result_table import ResultTable
from orchestrator.rows import FINAL, TrialRow, config_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TRIALS = 500
"""Rows of the list of trials; a page of thousands helps nobody."""
MORE_METRICS = (
    "top5", "nll", "ece", "brier", "nll_calibrated", "ece_calibrated", "subnetwork_top1_mean", "ratio_error",
    "disagreement", "cifar_c_top1",
)  # fmt: skip
"""What stands beside the metric of the page, where it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a page is made of."""

    files: Mapping[str, str]
    """The sweep files, by the name of the sweep."""
    written_at: datetime | None
    """When a driver last wrote any of them."""
    rows: Sequence[TrialRow]
    """Of the trials, without ensembles."""
    results: ResultTable
    """The main table, ensembles included."""
    more: Sequence[ResultTable]
    """Tables with the same lines, of other metrics."""
    ensembles: Sequence[str]
    """What making the ensembles had to tell."""
    front: Front | None
    drawn: Drawn | None
    """None while no trial has finished."""


def page(content: Content) -> str:
    """The page. Loads matplotlib if there is something to draw."""
    title = f"{', '.join(content.files)}: results of {'a sweep' if len(content.files) == 1 else 'sweeps'}"
    sections = [
        ("results", "Results", _results(content)),
        ("ensembles", "Ensembles", _ensembles(content)),
        ("cost", "What it costs", _cost(content)),
        ("figures", "Figures", _figures(content)),
        ("failures", "Failures", _failures(content.rows)),
        ("run", "What was run", _run(content)),
    ]
    there = [(name, heading, parts) for name, heading, parts in sections if parts]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in there)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{parts}</section>\n'
        for name, heading, parts in there
    )
    head = f"<h1>{escape(', '.join(content.files))}</h1>{_state(content)}{_summary(content)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<header>{head}</header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


# --------------------------------------------------------------------------------------------------------------- head


def _state(content: Content) -> str:
    """Whether what stands below is all there will be."""
    states = Counter(row.state for row in content.rows)
    total, done = len(content.rows), states["TERMINATED"]
    left = total - sum(states[state] for state in FINAL)
    warned = _warning(content.results.heading)
    at = f" These results were written on {_moment(content.written_at)}." if content.written_at else ""
    if left:
        told = (
            f"Not finished: {left:,} of {plural(total, 'trial')} run or wait. All below is right for the "
            f"{plural(done, 'trial')} that have finished, and will change."
        )
        return f'<p class="state open" role="status">{warned}{told}{at}</p>'
    failed = f", {states['ERROR']:,} failed" if states["ERROR"] else ""
    cancelled = f", {states['CANCELLED']:,} were cancelled" if states["CANCELLED"] else ""
    told = f"Finished: {done:,} of {plural(total, 'trial')}{failed}{cancelled}."
    return f'<p class="state{" open" if warned else ""}">{warned}{told}{at}</p>'


def _summary(content: Content) -> str:
    rows = content.rows
    own = [row for row in rows if row.cached_from is None]
    gpu, flops = (math.fsum(values) for values in zip(*((r.gpu_seconds, r.train_flops or 0) for r in own), strict=True))
    cached = len(rows) - len(own)
    facts = {
        "Trials": f"{len(rows):,} in {plural(len({row.cell_id for row in rows}), 'cell')}"
                  f"{f', {cached:,} of them taken from other sweeps' if cached else ''}",
        "Seeds": _listed(row.config.get("seed") for row in rows),
        "Dataset": _listed(row.config.get("data_dataset") for row in rows),
        "Measured on": _listed(f"{row.split} images" for row in rows if row.split),
        "Epochs": _listed(row.epochs for row in rows),
        "Training time": f"{duration(math.fsum(row.wall_s for row in own))}, all trials one after the other",
        "GPU-hours": f"{gpu / 3600:,.2f}" if gpu else "none: no GPU was used",
        "FLOPs of training": f"{flops:.3g}" if flops else None,
        "Began": _moment(min((row.started_at for row in rows if row.started_at), default=None)),
        "Commit": _listed(f"{row.git_commit[:12]}{' with local changes' * bool(row.git_dirty)}"
                          for row in rows if row.git_commit),
        "torch": _listed(row.torch_version for row in rows),
        "Ray": _listed(row.ray_version for row in rows),
        "Devices": _listed(row.device_name for row in rows),
        "Hosts": _listed(host for row in rows for host in (row.hosts or "").split()),
        "Numerics": _listed((part for row in rows for part in (row.numerics or "").split()), most=40),
    }  # fmt: skip
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text)
    return f"<dl>{pairs}</dl>"


def _listed(values: Iterable[Any], most: int = 8) -> str:
    """The different values, in order; the first few of many."""
    found = [str(value) for value in dict.fromkeys(values) if value not in (None, "")]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _moment(moment: datetime | None) -> str | None:
    return f"{moment.astimezone(UTC):%d %B %Y, %H:%M} UTC" if moment else None


# ------------------------------------------------------------------------------------------------------------- results


def _results(content: Content) -> str:
    made = content.results
    header, body = made.text_cells()
    told = [*made.legend(), *made.notes()]
    main = _table(f"{made.title} of every cell", header, body, words=len(made.row_fields), warning=made.heading)
    data = base64.b64encode(made.to_csv().encode()).decode()
    link = f'<p><a download="results.csv" href="data:text/csv;base64,{data}">These numbers, unrounded, as CSV</a></p>'
    return main + _notes(told) + link + _more(content)


def _more(content: Content) -> str:
    if not content.more:
        return ""
    fields = content.results.row_fields
    lines = [list(column) for column in zip(*(table.text_cells(("value",))[1] for table in content.more), strict=True)]
    header = [*content.more[0].text_cells(("value",))[0][: len(fields)], *(table.title for table in content.more)]
    body = [[*line[0][: len(fields)], *(each[len(fields)] for each in line)] for line in lines]
    caption, warning = "Other metrics of every cell, last epoch", content.results.heading
    return "<h3>Other metrics</h3>" + _table(caption, header, body, words=len(fields), warning=warning)


def _ensembles(content: Content) -> str:
    if content.results.counted == "trials" and not content.ensembles:
        return ""
    told = (
        "<p>Several trained networks that predict together, with the softmax of their mean logits; their numbers stand "
        "in the table above. No trial is in two ensembles of one size.</p>"
    )
    return told + _notes(content.ensembles)


# ---------------------------------------------------------------------------------------------------- cost and figures


def _cost(content: Content) -> str:
    parts, warning = "", content.results.heading
    if content.front:
        header, body = content.front.text_cells()
        caption = f"{content.front.metric} against {content.front.cost_name}"
        parts += _table(caption, header, body, words=1, words_after=3, warning=warning) + _notes(content.front.notes)
        parts += _figure(draw_front(content.front), "Accuracy against cost", f"Figure of the table above: {caption}")
    groups: dict[str, list[TrialRow]] = {}
    for row in content.rows:
        groups.setdefault(row.cell_id, []).append(row)
    names = cell_names(content.rows)
    body = [[names[cell], *_spent(members)] for cell, members in groups.items()]
    header = ["cell", "trials", "finished", "time a trial", "GPU-hours a trial", "FLOPs a trial", "parameters"]
    caption = "Time and arithmetic of each cell"
    return parts + "<h3>What each cell took</h3>" + _table(caption, header, body, words=1, warning=warning)


def _spent(members: Sequence[TrialRow]) -> list[str]:
    full = [row for row in members if row.state == "TERMINATED" and not row.stopped_early]
    count = max(1, len(full))
    gpu = math.fsum(row.gpu_seconds for row in full) / 3600 / count
    flops = math.fsum(row.train_flops or 0.0 for row in full) / count
    return [
        f"{len(members):,}",
        f"{len(full):,}",
        duration(math.fsum(row.wall_s for row in full) / count) if full else "-",
        f"{gpu:.3g}" if gpu else "-",
        f"{flops:.3g}" if flops else "-",
        f"{cost.parameters(config_of(members[0])):,}",
    ]


def _figures(content: Content) -> str:
    if content.drawn is None:
        return "<p>Nothing to draw yet: no trial has finished.</p>"
    cells = "; ".join(", ".join(each) for each in content.results.text_cells(())[1])
    parts = [
        _figure(drawn, TITLES[kind], f"{TITLES[kind]}, of: {cells}") for kind, drawn in content.drawn.figures.items()
    ]
    lacking = [f"{TITLES[kind]}: {why}." for kind, why in content.drawn.lacking.items()]
    left = f"<details><summary>Not drawn: {len(lacking)}</summary>{_notes(lacking)}</details>" if lacking else ""
    return f'<div class="figures">{"".join(parts)}</div>{left}'


def _figure(drawn: "Figure", title: str, alt: str) -> str:
    data = base64.b64encode(svg(drawn)).decode()
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><img alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{data}"></figure>'
    )


# ------------------------------------------------------------------------------------------------------- what was run


def _failures(rows: Sequence[TrialRow]) -> str:
    parts = []
    names = cell_names(rows)
    for cause, members in failures(rows):
        ids = ", ".join(f"{row.trial_id} ({names[row.cell_id]}, seed {row.config.get('seed')})" for row in members[:20])
        more = f" and {len(members) - 20} more" if len(members) > 20 else ""
        first = members[0].error
        told = f"<details><summary>The first error</summary><pre>{escape(first)}</pre></details>" if first else ""
        head = f"<h3>{escape(cause)}: {plural(len(members), 'trial')}</h3>"
        parts.append(f"{head}<p>{escape(ids + more)}</p>{told}")
    return "".join(parts)


def _run(content: Content) -> str:
    files = "".join(
        f"<h3>The sweep file of {escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in content.files.items()
    )
    names, metric = cell_names(content.rows), content.results.metric
    header = ["trial", "cell", "seed", "state", "epoch", content.results.metric, "time", "host"]
    body = [
        [
            row.trial_id,
            names[row.cell_id],
            str(row.config.get("seed")),
            row.state.lower() + (", stopped early" if row.stopped_early else ""),
            f"{row.epoch} of {row.epochs}",
            _value(row, metric, is_fraction="%" in content.results.title),
            duration(row.wall_s) if row.wall_s else "-",
            row.hosts or "-",
        ]
        for row in content.rows[:MOST_TRIALS]
    ]
    shown = "All trials" if len(body) == len(content.rows) else f"The first {len(body):,} trials"
    table = _table(f"{shown} of {len(content.rows):,}", header, body, words=2, warning=content.results.heading)
    return f"{files}<details><summary>{shown}</summary>{table}</details>"


def _value(row: TrialRow, metric: str, *, is_fraction: bool) -> str:
    value = row.metrics.get(metric)
    return "-" if value is None else percent(value, 2) if is_fraction else f"{value:.4g}"


# --------------------------------------------------------------------------------------------------------------- parts


def _table(
    caption: str,
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    *,
    words: int,
    words_after: int = 10**6,
    warning: str = "",
) -> str:
    """A table whose first columns name the line; `words_after`: from this column on there are words again. The warning
    is what `mixmo table` prints above its own.
    """

    def kind(i: int) -> str:
        return "" if i < words or i >= words_after else ' class="n"'

    head = "".join(f'<th scope="col"{kind(i)}>{_parted(escape(text))}</th>' for i, text in enumerate(header))
    lines = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(text)}</th>' if i == 0 else f"<td{kind(i)}>{_held(escape(text))}</td>"
            for i, text in enumerate(line)
        )
        + "</tr>\n"
        for line in body
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{_warning(warning)}{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>"
    )


def _warning(text: str) -> str:
    return f'<strong class="warning">{escape(text)}</strong>' if text else ""


def _parted(name: str) -> str:
    """A column's name, which narrow paper may break between its words."""
    return name.replace("_", "_<wbr>").replace(".", ".<wbr>")


def _held(text: str) -> str:
    """A mean, its deviation and its count may be told on two lines, as on narrow paper, and not on four."""
    return text.replace("± ", "±\u00a0").replace(" (", "\u00a0(")


def _notes(lines: Iterable[str]) -> str:
    told = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
    return f'<ul class="notes">{told}</ul>' if told else ""


_CSS = """
:root { --ink: #1c1c1e; --faint: #5c5c62; --line: #d9d9de; --page: #fff; --soft: #f5f5f7; --link: #0b57a4;
  --open: #8a4b00; --open-soft: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --faint: #a5a5ad; --line: #3c3c42; --page: #18181a;
  --soft: #232326; --link: #8ab8f0; --open: #ffcf87; --open-soft: #3a2a10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.state { margin: 0 0 1rem; }
.state.open { padding: .6rem .9rem; border-left: 4px solid var(--open); background: var(--open-soft); }
.warning { display: block; color: var(--ink); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem 1.5rem; margin: 1rem 0; }
dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 1.25rem 0 0; }
.wide { overflow-x: auto; margin: .5rem 0; background:
  linear-gradient(90deg, var(--page) 40%, transparent) 0 0/3rem 100% no-repeat local,
  linear-gradient(270deg, var(--page) 40%, transparent) 100% 0/3rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 0/.9rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) 100% 0/.9rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); font-size: .85rem; padding-bottom: .35rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-weight: 400; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
th.n, td.n { text-align: right; }
.notes { color: var(--faint); font-size: .88rem; padding-left: 1.1rem; margin: .5rem 0 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
.figures figure { margin: 0; }
figure { width: fit-content; max-width: 100%; margin: 1.25rem 0; padding: 1rem;
  background: #f7f7f5; color: #1c1c1e; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
img { display: block; max-width: 100%; height: auto; }
pre { overflow-x: auto; padding: .9rem; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; margin: .75rem 0; }
@media print { :root { --ink: #000; --faint: #444; --line: #bbb; --page: #fff; --soft: #fff; --open-soft: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, a[download] { display: none; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .5rem .15rem 0; }
  thead { display: table-header-group; } img { max-height: 23cm; }
  .figures { display: block; } figure, tr, h2, h3 { break-inside: avoid; } h2, h3, figcaption { break-after: avoid; }
  figure { border: 0; background: none; padding: 0; } pre { white-space: pre-wrap; } .wide { overflow: visible; }
  th, td { white-space: normal; } }
"""
