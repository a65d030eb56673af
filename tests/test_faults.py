"""Heads of clusters that end under a running sweep, and its driver beside them: one clear message, and on it goes."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_raylets
import pytest
import ray
from command_line import Mixmo, kill

from orchestrator import fleet
from orchestrator.casualties import Head, RayLostError
from orchestrator.errors import RefusedError, UnreachableError
from orchestrator.rows import TrialRow

SWEEP = """
name: headless
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 50, lr: 0.1}
seeds: 3
resources: {gpus_per_worker: 0, max_gangs: 1}
checkpoints: {every_s: 0.2}
retry: {crash: 0}
"""


def server_killed(head: Any) -> None:
    """Only what knows of all the others."""
    (server,) = head.all_processes["gcs_server"]
    os.kill(server.process.pid, signal.SIGKILL)


@made_raylets.asked
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("end", [server_killed, made_raylets.kill])
def test_a_head_that_ends_under_a_sweep_is_told_and_the_same_command_goes_on(
    end: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head alone, or all of its machine's Ray as by `ray stop`; another stands in its place soon."""
    sweep = Mixmo(tmp_path / "sweep", SWEEP)
    with made_raylets.started() as cluster:
        made_raylets.add(cluster)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        driver = sweep.start("run", "sweep.yaml", "--yes")
        try:
            sweep.until(driver, one_done_and_one_under_way)
            end(cluster.head_node)
            time.sleep(5)  # `ray start` takes longer
            with made_raylets.started(gcs_server_port=int(cluster.address.rpartition(":")[2])) as next_cluster:
                assert next_cluster.address == cluster.address
                before = told_of_its_end(driver, sweep)
                made_raylets.add(next_cluster)
                next_cluster.wait_for_nodes()
                goes_on(sweep, before)
        finally:
            kill(driver)


@made_raylets.asked
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("names", "end"),
    [(("gcs_server", "raylet/raylet"), signal.SIGKILL), (("raylet/raylet", "gcs_server"), signal.SIGTERM)],
)
def test_a_ray_of_our_own_that_is_stopped_is_told_and_the_same_command_goes_on(
    names: tuple[str, ...], end: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else workers starve where others compute
    sweep = Mixmo(tmp_path / "sweep", SWEEP)
    driver = sweep.start("run", "sweep.yaml", "--yes")
    try:
        sweep.until(driver, one_done_and_one_under_way)
        stopped = [pid for name in names for pid, said in children(driver.pid) if name in said]
        assert len(stopped) == len(names)
        for pid in stopped:
            os.kill(pid, end)
        before = told_of_its_end(driver, sweep)
    finally:
        kill(driver)
    goes_on(sweep, before)


def children(parent: int) -> list[tuple[int, str]]:
    """Processes that it has started, and their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append((int(path.name), (path / "cmdline").read_text()))
    return found


def told_of_its_end(driver: Any, sweep: Mixmo) -> dict[str, TrialRow]:
    """The trials that had finished by then."""
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 7, said
    assert "Ray's head, " in said or "Ray lost the dispatcher" in said
    assert "Finished trials are safe" in said
    assert "run the same command again" in said
    return {row.trial_id: row for row in sweep.rows() if row.state == "TERMINATED"}


def goes_on(sweep: Mixmo, before: dict[str, TrialRow]) -> None:
    assert before
    sweep("run", "sweep.yaml", "--yes")
    rows = {row.trial_id: row for row in sweep.rows()}
    assert {row.state for row in rows.values()} == {"TERMINATED"}
    assert {name: rows[name] for name in before} == before
    assert sorted(row.attempts for row in rows.values()) == [1, 1, 2]  # the one that ran
    sweep("verify", sweep.name)


def one_done_and_one_under_way(rows: list[TrialRow]) -> bool:
    return {"TERMINATED", "RUNNING"} <= {row.state for row in rows} and any(
        row.state == "RUNNING" and row.epoch > 2 for row in rows
    )


@pytest.mark.parametrize(
    ("met", "refused", "said"),
    [
        (ray.exceptions.AuthenticationError("wrong"), True, "10.0.0.1:6379 asks for a token.*set RAY_AUTH_MODE=token"),
        (
            RuntimeError("Version mismatch: The cluster was started with Ray: 2.59.0"),
            True,
            "of another version.*2.59.0",
        ),
        (ConnectionError("Could not find any running Ray instance"), False, "no Ray cluster answers.*Start it"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_with_its_cause(
    met: Exception, refused: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise met

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with (
        pytest.raises(RefusedError if refused else UnreachableError, match=f"RAY_ADDRESS=10.0.0.1:6379.*{said}|{said}"),
        fleet._joined_ray("10.0.0.1:6379"),
    ):
        pytest.fail("it was joined")


class Clock:
    """Of the head's watcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("orchestrator.casualties.time", self)

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_a_head_that_is_gone_is_known_at_once_and_one_that_is_silent_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        head = Head(address)
        assert head.look()
        with monkeypatch.context() as cut:
            cut.setattr(socket, "create_connection", silent)
            assert [head.look() for _ in range(3)] == [False] * 3
        assert head.look()
        monkeypatch.setattr(socket, "create_connection", silent)
        assert not head.look()
        clock.now += 18.0
        assert not head.look()
        assert not head.look()
        with pytest.raises(UnreachableError, match="has not answered for 21 s"):
            head.look()
    monkeypatch.undo()
    Clock(monkeypatch)
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+, has ended\. Finished trials are safe.*same command"):
        Head(address).look()


def test_a_head_of_our_own_is_gone_with_any_of_its_processes() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        subprocess.Popen(["sleep", "600"]) as one,
        subprocess.Popen(["sleep", "600"]) as other,
    ):
        head = Head(f"127.0.0.1:{listening.getsockname()[1]}", [one, other])
        assert head.look(anew=True)
        other.kill()
        other.wait()
        with pytest.raises(RayLostError, match="has ended"):
            head.look(anew=True)
        one.kill()


def silent(*_: Any, **__: Any) -> None:
    raise TimeoutError
