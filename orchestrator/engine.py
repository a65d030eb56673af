"""What trains the trials of a sweep, as its driver sees it: a crew that trains, a queue that says what comes next.

`on_ray` is the one that people use. The driver needs no more of it than the two protocols here, so that the faults of
drivers and stores can be tried by the thousand without a cluster.
"""

import contextlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from mixmo_core.config import shape_of, unflatten
from orchestrator import sweep as sweeps
from orchestrator.dispatcher import NAMESPACE, Order, Retries, Update
from orchestrator.population import Population
from orchestrator.roster import Offer
from orchestrator.stopping import Judge
from orchestrator.store import ResultStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a driver has trained."""

    sweep: sweeps.Sweep
    orders: Sequence[Order]
    """In the order to run."""
    fence: int
    store_uri: str
    data_dir: str | None
    """Where the datasets lie: a folder, or a bucket."""
    judge: Judge | None = None
    """It stops trials early; it knows what earlier drivers have seen."""
    population: Population | None = None
    """It has trials go on as copies of others; it knows what earlier drivers have decided."""
    canary: Mapping[str, Any] | None = None
    """The settings of the trial that is rehearsed before any begins (`canary`)."""


class Crew(Protocol):
    """Those who train: `size` trials at once. Methods raise UnreachableError where they are lost, all of
    them; what those that bear a name of the dispatcher's do is said there.
    """

    def updates(self, wait_s: float) -> list[Update]: ...
    def size(self) -> int: ...
    def in_hand(self) -> int: ...
    def idle(self) -> int: ...
    def drain(self) -> None: ...
    def submit(self, indices: Iterable[int]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self, indices: Iterable[int], cause: str) -> None: ...
    def retry(self, orders: Iterable[Order], text: str) -> None: ...
    def add(self, orders: Iterable[Order]) -> None: ...
    def hold_back(self, indices: Iterable[int]) -> None: ...
    def release(self, indices: Iterable[int]) -> None: ...
    def withdraw(self, indices: Iterable[int], text: str) -> None: ...
    def close(self) -> list[Update]: ...


class Queue(Protocol):
    """Who says which trial comes next. `error` is why it ended, if not for want of trials."""

    error: BaseException | None

    def is_alive(self) -> bool: ...
    def drain(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...


Engine = Callable[[Job], contextlib.AbstractContextManager[tuple[Crew, Queue]]]
"""It trains from the context's beginning on. Its end is not the crew's: who entered it closes the crew before."""


@contextlib.contextmanager
def on_ray(job: Job) -> Iterator[tuple[Crew, Queue]]:
    """Gangs on the Ray cluster of RAY_ADDRESS, or on one of our own; Ray Tune says what comes next.

    Raises UsageError where no gang fits, UnreachableError where the cluster does not answer, RefusedError where not
    every host of it reaches the store.
    """
    from orchestrator import fleet, reach, tune

    resources = job.sweep.resources
    with fleet.cluster(cpus=max(1, round(resources.workers * resources.cpus_per_worker))) as offer:
        reach.prove(ResultStore.open(job.store_uri))
        plan = _gang_plan(job, offer)
        offer.refuse_if_never(plan)
        crew = fleet.Fleet(
            job.orders, plan, fence=job.fence, retries=retries_of(job.sweep), judge=job.judge, population=job.population
        )
        crew.limit = None if resources.max_gangs == "auto" else resources.max_gangs
        filled = math.ceil((len(job.orders) + job.sweep.to_draw) / plan.slots)
        most = max(1, min(crew.limit or math.inf, offer.room(plan), filled))
        tuning = tune.Tuning(
            [order.index for order in job.orders], dispatcher=plan.dispatcher, namespace=plan.namespace
        )
        try:
            crew.form(int(most))
            tuning.start()
        except BaseException:
            crew.close()
            raise
        yield crew, tuning


def retries_of(sweep: sweeps.Sweep) -> Retries:
    given = {spec.name: getattr(sweep.retry, spec.name) for spec in fields(sweep.retry)}
    return Retries(**{name: math.inf if count == "unlimited" else count for name, count in given.items()})


def _canaries(job: Job, slots: int) -> int:
    """How many trials of the largest one's shape may be side by side."""
    if job.canary is None or slots == 1:
        return 1
    shape = shape_of(unflatten(job.canary))
    alike = sum(order.shape == shape for order in job.orders)
    return min(slots, alike) if alike and not job.sweep.to_draw else slots


def milestones_of(job: Job) -> tuple[int, ...]:
    """The epochs after which a trial of a population is compared with the others, and may be copied."""
    if job.population is None:
        return ()
    longest = max(trial.config.optim.epochs for trial in job.sweep.trials)
    return tuple(job.sweep.scheduler.milestones(longest))


def datasets_of(sweep: sweeps.Sweep) -> list[str]:
    """The names of all that the trials read, also those that a search is yet to draw."""
    from mixmo_core import data

    return sorted({name for trial in sweep.examples for name in data.needed(trial.config)})


def _gang_plan(job: Job, offer: Offer) -> Any:
    from orchestrator import datasets
    from orchestrator.gang import GangPlan

    resources, every_s = job.sweep.resources, job.sweep.checkpoints.every_s
    gpus, within_s = resources.gpus_per_worker, resources.form_within_s
    slots = job.sweep.resources.slot_count
    return GangPlan(
        workers=resources.workers,
        slots=slots,
        finds_slots=resources.finds_slots and job.population is None,  # whose trials take turns
        captured=resources.captured,
        cpus_per_worker=resources.cpus_per_worker,
        gpus_per_worker=float(offer.has_gpus) if gpus == "auto" else gpus,
        accelerator=None if resources.accelerator == "any" else resources.accelerator,
        spot=resources.spot,
        form_within_s=(1800.0 if offer.coming else 600.0) if within_s == "auto" else within_s,
        checkpoint_every_s=None if every_s == "auto" else every_s,
        milestones=milestones_of(job),
        store=job.store_uri,
        data_dir=job.data_dir if datasets.in_bucket(job.data_dir) else str(datasets.local(job.data_dir) or "") or None,
        datasets=tuple(datasets_of(job.sweep)),
        namespace=NAMESPACE,
        canary=job.canary,
        canaries=_canaries(job, slots),
        dispatcher=f"dispatcher-{job.sweep.name}-{job.fence}-{secrets.token_hex(3)}",
    )
