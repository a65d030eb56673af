"""What became of workers, machines and heads that Ray has lost. Gangs' controllers load it: it loads no torch."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.placement_group import PlacementGroup

from orchestrator.dispatcher import Loss
from orchestrator.errors import UnreachableError

LOOK_S = 0.5
"""Between two looks at whether Ray's head is there."""
ANSWER_S = 1.0
"""In which it answers."""
PARTING_S = 10.0
"""What a process needs to end in order."""


def dead_nodes() -> frozenset[str]:
    """The machines that have ever been in the cluster and are no longer."""
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


def missed_within_s() -> float:
    """How long Ray may take to notice that a machine is gone, by the settings that this process shares with it: so many
    checks in a row are not answered in their time, each a period after the one before.
    """
    # No public name tells them; tests/test_nodes.py holds Ray to it.
    from ray._raylet import Config  # type: ignore[attr-defined]

    check_ms = Config.health_check_period_ms() + Config.health_check_timeout_ms()
    return float(Config.health_check_failure_threshold() * check_ms) / 1000


class RayLostError(UnreachableError):
    """Ray's head is gone, or the dispatcher. Nothing may be asked of Ray any more, no goodbye either: it ends the
    process, with 1 and without a word, where a thread asks it for something while it says goodbye.
    """


class Head:
    """Ray's head, seen from a process that has something to write before it ends. Ray ends each that has not found the
    head for a minute, and at once where it finds another in its place, with words and an exit code of its own. And each
    that needs the raylet of its machine after that has ended.
    """

    def __init__(self, address: str, own: Sequence[subprocess.Popen[Any]] = ()) -> None:
        """`own`: processes of this head that this one has started; where one of them has ended, all is over."""
        self._own = own
        host, _, port = address.rpartition(":")
        self._place = host.strip("[]"), int(port)
        self._looked_at = time.monotonic()
        self._away_since: float | None = None
        # By Ray's own setting, whose default this is.
        self._patience_s = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) - PARTING_S  # noqa: SIM112

    @property
    def answers(self) -> bool:
        return self._away_since is None

    def look(self, *, anew: bool = False) -> bool:
        """Whether it answers: if not, whatever else asks it hangs. Raises RayLostError where it is gone. `anew`: do
        not go by what was seen half a second ago.
        """
        now = time.monotonic()
        if now - self._looked_at < LOOK_S and not anew:
            return self.answers
        self._looked_at = now
        if any(each.poll() is not None for each in self._own):
            raise self._gone("has ended")
        try:
            socket.create_connection(self._place, timeout=ANSWER_S).close()
            self._away_since = None
        except OSError as error:
            self._away_since = now if self._away_since is None else self._away_since
            if isinstance(error, ConnectionRefusedError):
                raise self._gone("has ended") from error
            if now - self._away_since > self._patience_s:
                raise self._gone(f"has not answered for {now - self._away_since:.0f} s") from error
        return self.answers

    def _gone(self, how: str) -> RayLostError:
        host, port = self._place
        return RayLostError(
            f"Ray's head, {host}:{port}, {how}. Finished trials are safe, and others go on from their checkpoints: run "
            "the same command again, and start the cluster again before, if it is one of `ray up` or `ray start`."
        )


def own_processes() -> list[subprocess.Popen[Any]]:
    """What a Ray of our own stands on, none where we have joined one."""
    # No public name has them; tests/test_faults.py holds Ray to it.
    from ray._private.worker import _global_node

    held = {} if _global_node is None else _global_node.all_processes
    return [each.process for name in ("gcs_server", "raylet") for each in held.get(name, [])]


def drain(node: str, why: str, left_s: float) -> None:
    """Have Ray place nothing more on a machine that will be gone. Raises RuntimeError or RayError if it does not."""
    # What `ray drain-node` does, which is hidden as well and takes seconds; tests/test_nodes.py holds Ray to it.
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + left_s) * 1000)
    global_worker.gcs_client.drain_node(node, reason, why, deadline_ms)


def waiting_groups() -> list[PlacementGroup]:
    """What actors of this driver's job have asked room for and wait for: gangs, and nothing of Tune's, which asks from
    the driver itself. A group that is removed is one that its gang could not get in its time.
    """
    # No public call tells whose a group is; tests/test_nodes.py holds Ray to it.
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    own = bytes.fromhex(ray.get_runtime_context().get_job_id())
    table = map(
        gcs_pb2.PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table()
    )
    return [
        PlacementGroup(ray.PlacementGroupID(each.placement_group_id))
        for each in table
        if each.state == gcs_pb2.PlacementGroupTableData.PENDING
        and each.creator_job_id == own
        and not each.creator_actor_dead
    ]


def found_no_place(error: BaseException) -> bool:
    """Whether Ray Train gave a gang up since no machine had room for it in its time, or since it was called off."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def kind_of(errors: Mapping[int, BaseException]) -> Loss | None:
    """What took a gang its workers, by the error of each rank that has one; None where none of them died."""
    died = [inner for error in errors.values() if (inner := getattr(error, "health_check_failure", None)) is not None]
    if any(isinstance(error, ray.exceptions.OutOfMemoryError) for error in died):
        return "oom"
    if any(getattr(error, "preempted", False) or "node has died" in str(error) for error in died):
        return "preempted"
    return "crash" if died else None


class Messenger(ray.train.UserCallback):
    """Tells the dispatcher what a gang's controller hears of its workers."""

    def __init__(self, gang: str, dispatcher: str, namespace: str) -> None:
        self._gang, self._dispatcher, self._namespace = gang, dispatcher, namespace

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        kind = kind_of(worker_exceptions)
        if kind is not None:
            why = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in worker_exceptions.items())
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # the sweep is over
                desk = ray.get_actor(self._dispatcher, namespace=self._namespace)
                desk.struck.remote(self._gang, kind, f"{self._gang} lost a worker: {why}")


def _first_line(error: BaseException) -> str:
    inner = getattr(error, "health_check_failure", error)
    return f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0]}"[:200]
