"""What a metric costs: the cells of some sweeps, and which of them no other beats for as much or less. Pure.

A cell is dominated if another has as good a mean at a lower cost, or a better mean at no higher cost. Equals do not
dominate each other. Means are taken as they are: whether a difference is more than chance, `mixmo table` tells.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mixmo_core import cost as counts
from mixmo_core.metrics import BY_NAME
from orchestrator.analysis import EnsembleRow
from orchestrator.errors import NotFoundError, UsageError
from orchestrator.result_table import Cell, ResultTable
from orchestrator.rows import METRIC_COLUMNS, TrialRow, config_of
from orchestrator.studies import cells, standing

CostName = Literal["gpu_hours", "flops", "parameters", "inference_flops", "money"]


@dataclass(frozen=True, slots=True)
class Member:
    """A cell with its cost and its finished trials."""

    name: str
    cell_id: str
    cost: float
    values: tuple[float, ...]
    planned: int
    dominated_by: str | None = None
    """The name of the member of the front that is the best at no higher cost; None on the front."""

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def std(self) -> float | None:
        return Cell(self.values).std


@dataclass(frozen=True, slots=True)
class Front:
    metric: str
    cost: CostName
    cost_name: str
    """With its unit, as an axis has it."""
    members: tuple[Member, ...]
    """By cost; of one cost the better first."""
    notes: tuple[str, ...]
    standing: str
    """How much of the sweeps is in it."""

    # ---------------------------------------------------------------------------------------------------------- forms

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per cell, numbers plain."""
        return [
            {"cell": each.name, "cell_id": each.cell_id, self.cost: each.cost, "n": len(each.values),
             "planned": each.planned, "mean": each.mean, "std": each.std, "values": each.values,
             "on_front": each.dominated_by is None, "dominated_by": each.dominated_by}
            for each in self.members
        ]  # fmt: skip

    def text_cells(self) -> tuple[list[str], list[list[str]]]:
        """What stands in a header and in each line."""
        written = ResultTable(self.metric, "last", (), (), (), (), {})
        header = ["cell", self.cost_name, written.title, "front"]
        body = [
            [
                each.name,
                f"{each.cost:,.0f}" if self.cost == "parameters" else f"{each.cost:.3g}",
                written.value_text(Cell(each.values, failed=each.planned - len(each.values))),
                "on it" if each.dominated_by is None else f"dominated by {each.dominated_by}",
            ]
            for each in self.members
        ]
        return header, body

    def to_text(self) -> str:
        header, body = self.text_cells()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = [
            "  ".join(text.rjust(width) if i in (1, 2) else text.ljust(width) for i, (text, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in (header, ["─" * w for w in widths], *body))
        ]
        return "".join(f"{line.rstrip()}\n" for line in (*lines, "", *self.notes))

    def to_markdown(self) -> str:
        header, body = self.text_cells()
        lines = [header, ["---", "---:", "---:", "---"], *body]
        table = "".join("| " + " | ".join(each.replace("|", r"\|") for each in line) + " |\n" for line in lines)
        return table + "".join(f"\n{note}\n" for note in self.notes)

    def to_csv(self) -> str:
        out = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(out, [*records[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**each, "values": " ".join(map(repr, each["values"]))} for each in records)
        return out.getvalue()


def front(
    rows: Sequence[TrialRow],
    *,
    metric: str = "top1",
    cost: CostName = "gpu_hours",
    price: float | None = None,
    currency: str = "USD",
) -> Front:
    """The cells by cost. Ensembles among the rows are cells of their own and cost what their members do together.

    `price` is that of a GPU for an hour. Raises UsageError for a metric that has no better, a cost that there is not,
    or money without a price; NotFoundError while no trial has finished.
    """
    _check(metric, cost, price)
    found = cells(rows, metric)
    if not found:
        raise NotFoundError("there is nothing to compare yet: no trial has finished")
    trials = [row for cell in found for row in cell.trials]
    hours, clock = _hours(trials, cost)
    measures: dict[str, tuple[Callable[[TrialRow], float | None], str]] = {
        "gpu_hours": (hours, f"{clock} of training"),
        "money": (lambda row: (price or 0.0) * (hours(row) or 0.0), f"{currency} for training"),
        "flops": (lambda row: row.train_flops, "FLOPs of training"),
        "parameters": (lambda row: float(counts.parameters(config_of(row)) * _networks(row)), "parameters"),
        "inference_flops": (lambda row: counts.forward_flops(config_of(row)) * _networks(row), "FLOPs of a prediction"),
    }  # fmt: skip
    measure, name = measures[cost]
    members, lacking = [], []
    for cell in found:
        spent = [value for row in cell.trials if (value := measure(row)) is not None]
        values = cell.values(metric)
        if len(spent) < len(cell.trials) or not all(map(math.isfinite, (*spent, *values))):
            lacking.append(cell.name)
            continue
        each = math.fsum(spent) / len(spent)
        members.append(Member(cell.name, cell.trials[0].cell_id, each, values, cell.planned))
    if not members:
        raise NotFoundError(f"there is nothing to compare: no finished trial has both {metric} and {cost}")
    told = standing(rows, metric)
    notes = [
        *_notes(cost, clock, price, currency),
        *([f"Left out, without numbers: {', '.join(lacking)}."] * bool(lacking)),
    ]
    return Front(metric, cost, name, _ordered(members, metric), (f"{told}.", *notes), told)


def _check(metric: str, cost: str, price: float | None) -> None:
    if metric not in METRIC_COLUMNS:
        raise UsageError(f"no metric {metric}; there are {', '.join(METRIC_COLUMNS)}")
    if not BY_NAME[metric].better:
        raise UsageError(f"of {metric} neither more nor less is better, so there is no front of it")
    if cost not in get_args(CostName):
        raise UsageError(f"no cost {cost}; there are {', '.join(get_args(CostName))}")
    if cost == "money" and price is None:
        raise UsageError(
            "money needs a price: --price PER_GPU_HOUR, or `price: {gpu_hour: 2.5, currency: EUR}` in the sweep file"
        )


def _networks(row: TrialRow) -> int:
    return row.members if isinstance(row, EnsembleRow) else 1


def _hours(trials: Sequence[TrialRow], cost: str) -> tuple[Callable[[TrialRow], float | None], str]:
    """What a trial took, and of which clock: GPU-hours, or hours of the wall clock where no trial had a GPU."""
    with_gpu = [row for row in trials if row.gpu_seconds]
    if not with_gpu:
        return (lambda row: row.wall_s / 3600), "wall-clock hours"
    if len(with_gpu) < len(trials) and cost in ("gpu_hours", "money"):
        without = next(row for row in trials if not row.gpu_seconds)
        raise UsageError(
            f"{len(trials) - len(with_gpu)} of {len(trials)} trials were trained without a GPU (the first is "
            f"{without.trial_id}), so their hours do not compare; --cost flops compares all"
        )
    return (lambda row: row.gpu_seconds / 3600), "GPU-hours"


def _notes(cost: str, clock: str, price: float | None, currency: str) -> list[str]:
    notes = []
    if cost in ("gpu_hours", "money") and clock != "GPU-hours":
        notes.append("No trial used a GPU: hours are those of the wall clock.")
    if cost == "money":
        notes.append(f"At {price:g} {currency} an hour.")
    notes.append("Costs are means over the trials of a cell, those of an ensemble sums over its members.")
    return [*notes, "Dominated: by means alone, which may differ by chance; `mixmo table` tests that."]


def _ordered(members: Sequence[Member], metric: str) -> tuple[Member, ...]:
    sign = -1 if BY_NAME[metric].better == "higher" else 1
    order = sorted(range(len(members)), key=lambda i: (members[i].cost, sign * members[i].mean))
    found = dominators([(members[i].cost, sign * members[i].mean) for i in order])
    return tuple(
        Member(each.name, each.cell_id, each.cost, each.values, each.planned,
               None if by is None else members[order[by]].name)
        for each, by in ((members[i], by) for i, by in zip(order, found, strict=True))
    )  # fmt: skip


def dominators(points: Sequence[tuple[float, float]]) -> list[int | None]:
    """For each point, of whose numbers less is better, the one that dominates it: of the front, that with the least
    second number among those whose first is no larger. None for the points of the front.
    """
    found: list[int | None] = [None] * len(points)
    best: int | None = None
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if best is not None and points[best] != points[i] and points[best][1] <= points[i][1]:
            found[i] = best
        else:
            best = i
    return found
