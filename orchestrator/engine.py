"""What trains the trials of a sweep, as its driver sees it: a crew that trains, a queue that says what comes next.

`on_ray` is the one that people use. The driver needs no more of it than the two protocols here, so that the faults of
drivers and stores can be tried by the thousand without a cluster.
"""

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator import sweep as sweeps
from orchestrator.dispatcher import NAMESPACE, Order, Update
from orchestrator.store import ResultStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a driver has trained."""

    sweep: sweeps.Sweep
    orders: Sequence[Order]
    """In the order to run."""
    fence: int
    store_uri: str
    data_dir: Path | None


class Crew(Protocol):
    """Those who train. Methods raise UnreachableError where they are lost, all of them; what those that bear a name of
    the dispatcher's do is said there.
    """

    def updates(self, wait_s: float) -> list[Update]: ...
    def in_hand(self) -> int: ...
    def idle(self) -> int: ...
    def drain(self) -> None: ...
    def submit(self, indices: Iterable[int]) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self, indices: Iterable[int], cause: str) -> None: ...
    def retry(self, orders: Iterable[Order], text: str) -> None: ...
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
    with fleet.cluster(cpus=max(1, round(resources.workers * resources.cpus_per_worker))) as cluster:
        reach.prove(ResultStore.open(job.store_uri))
        plan = _gang_plan(job, cluster)
        limit = None if resources.max_gangs == "auto" else resources.max_gangs
        gangs = fleet.gangs_for(cluster, plan, trials=len(job.orders), limit=limit)
        retries = sys.maxsize if job.sweep.retry.crash == "unlimited" else job.sweep.retry.crash
        crew = fleet.Fleet(job.orders, plan, fence=job.fence, crash_retries=retries)
        tuning = tune.Tuning(
            [(order.index, order.settings["optim.epochs"]) for order in job.orders],
            dispatcher=plan.dispatcher, namespace=plan.namespace, metric=job.sweep.scheduler.metric,
            at_once=gangs, slots=cluster.slots,
        )  # fmt: skip
        try:
            crew.form(gangs)
            tuning.start()
        except BaseException:
            crew.close()
            raise
        yield crew, tuning


def _gang_plan(job: Job, cluster: Any) -> Any:
    from orchestrator.gang import GangPlan

    resources, every_s = job.sweep.resources, job.sweep.checkpoints.every_s
    gpus = resources.gpus_per_worker
    return GangPlan(
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        gpus_per_worker=float(cluster.gpus >= 1) if gpus == "auto" else gpus,
        checkpoint_every_s=None if every_s == "auto" else every_s,
        store=job.store_uri,
        data_dir=str(job.data_dir.resolve()) if job.data_dir else None,
        namespace=NAMESPACE,
        dispatcher=f"dispatcher-{job.sweep.name}-{job.fence}-{secrets.token_hex(3)}",
    )
