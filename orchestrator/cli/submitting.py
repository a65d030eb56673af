"""The command that has a cluster run a sweep."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import streams
from orchestrator.cli.planning import load, planned_for
from orchestrator.cli.program import RUNNING, Command, File, Overrides, Quick, Results, app
from orchestrator.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from orchestrator.submit import Cluster, Request


@app.command(cls=Command, rich_help_panel=RUNNING)
def submit(
    file: File,
    *,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="The dashboard of the cluster's Ray.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option("--wait", help="Show what the driver says, and end as it ends.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", min=1, help="With --wait: end with 4 after S seconds.")
    ] = None,
    quick: Quick = False,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PLACE", help="Where the cluster's hosts find the images. [default: they know]"),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again, too.")] = False,
    no_canary: Annotated[
        bool, typer.Option("--no-canary", help="Begin without two steps of the largest trial, which try the memory.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
    results: Results = "results",
) -> ExitCode:
    """Have a Ray cluster run what is missing of a sweep.

    Its driver runs on the cluster's head, with the code that is here, and goes on without this machine. The same
    command again finds the job that is at work; when that has ended, it runs what is missing.
    `ray dashboard cluster/gpu.yaml` brings the cluster's address here.
    """
    if timeout is not None and not wait:
        raise UsageError("--timeout goes with --wait")
    from orchestrator import budget, datasets, driver
    from orchestrator import submit as submission
    from orchestrator.engine import datasets_of
    from orchestrator.sweep import check_runnable

    sweep = load(file, overrides, quick)
    check_runnable(sweep)
    budget.check(sweep)
    if datasets.in_bucket(data):  # a folder of the hosts is seen there alone
        datasets.check(datasets_of(sweep), data)
    place = submission.place(results)
    planned = planned_for(sweep, place, retry_failed=retry_failed)
    if planned.to_run or planned.sweep.to_draw:
        driver.hold_to_budget(planned)
    elif not planned.changes:
        streams.say(driver.nothing_to_run(planned))
        return driver.verdict([item.row for item in planned.items if item.row])
    if (
        not yes
        and sys.stdin.isatty()
        and sys.stderr.isatty()
        and not typer.confirm(f"Submit it to {address}?", default=True, err=True)
    ):
        return ExitCode.STOPPED
    request = submission.Request(
        sweep=sweep, results=place, data=data, retry_failed=retry_failed, rehearse=not no_canary
    )
    return _submit(submission.Cluster(address), request, wait=wait, timeout=timeout)


def _submit(cluster: Cluster, request: Request, *, wait: bool, timeout: float | None) -> ExitCode:
    name, where = request.sweep.name, f"--results {shlex.quote(request.results)}"
    job = cluster.submit(request, streams.say)
    streams.say(f"watch it: mixmo watch {name} {where} · end it: mixmo stop {name} {where}")
    if not wait:
        print(job.id)
        return ExitCode.OK
    try:
        code = cluster.follow(job.id, streams.say, timeout)
    except KeyboardInterrupt:
        streams.say(f"{name} goes on. The same command follows it again; mixmo stop {name} {where} ends it")
        raise
    if code == ExitCode.STOPPED and timeout is not None:
        streams.say(f"{name}: not ended in {timeout:g} s, or stopped; the same command follows it again")
    print(job.id)
    return code


@app.command(hidden=True)
def reach(results: Annotated[str, typer.Argument(metavar="PLACE", help="Where the results lie.")]) -> None:
    """Whether every host of a Ray cluster reaches these results.

    The cluster is that of RAY_ADDRESS; `submit` has it run this.
    """
    from orchestrator.reach import prove_on_cluster

    prove_on_cluster(results)
