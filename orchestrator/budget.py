"""What a sweep may take, and whether it has. Pure."""

from collections.abc import Iterable

from orchestrator.errors import RefusedError, SweepError
from orchestrator.rows import TrialRow
from orchestrator.sweep import Sweep


def check(sweep: Sweep) -> None:
    """Raises RefusedError for more trials than the file allows itself, SweepError for money without a price."""
    most, price = sweep.budget.trials, sweep.price.gpu_hour
    if most is not None and len(sweep.trials) > most:
        raise RefusedError(
            f"{sweep.source}: {len(sweep.trials):,} trials, and budget.trials allows {most:,}. Raise it, or "
            f"`-S budget.trials={len(sweep.trials)}`, or leave trials out"
        )
    if sweep.budget.money is not None and price is None:
        raise SweepError(f"{sweep.source}: budget.money needs price.gpu_hour, by which it is reckoned")


def refused(sweep: Sweep, rows: Iterable[TrialRow]) -> list[str]:
    """Why a run would refuse the sweep for the sake of its budget, a line for each reason."""
    try:
        check(sweep)
    except (RefusedError, SweepError) as error:
        return [f"a run would be refused: {error}"]
    told = spent(sweep, rows)
    return [f"a run would be refused: {told}"] if told else []


def spent(sweep: Sweep, rows: Iterable[TrialRow]) -> str | None:
    """Which limit of the budget the sweep has reached, and how to go on; None while there is some left.

    Counted is the training behind the rows, whichever run did it; what a crash threw back and results that were taken
    from other sweeps are not.
    """
    budget, price = sweep.budget, sweep.price
    if budget.hours is None and budget.gpu_hours is None and budget.money is None:
        return None  # it is asked twice a second, and rows may be many
    own = [row for row in rows if row.cached_from is None]
    gpu_hours = sum(row.gpu_seconds for row in own) / 3600
    limits = [
        ("hours", budget.hours, sum(row.wall_s for row in own) / 3600, "hours of training"),
        ("gpu_hours", budget.gpu_hours, gpu_hours, "GPU-hours"),
        ("money", budget.money, gpu_hours * (price.gpu_hour or 0.0), price.currency),
    ]
    for name, limit, taken, unit in limits:
        if limit is not None and taken >= limit:
            return (
                f"the budget is spent: {taken:,.3g} of {limit:,g} {unit}. To go on, raise budget.{name} in "
                f"{sweep.source} (or `-S budget.{name}=...`) and give the same command again"
            )
    return None
