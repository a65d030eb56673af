"""Heads of clusters that end under a running sweep, and its driver beside them: one clear message, and on it goes."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_raylets
import pytest
from command_line import Mixmo, kill

from orchestrator.casualties import Head
from orchestrator.errors import UnreachableError
from orchestrator.rows import TrialRow

SWEEP = """
name: headless
trial:
  data: {dataset: digits, train_images: 200, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1, subnetworks: 1}
  optim: {epochs: 50, lr: 0.1}
seeds: 3
resources: {gpus_per_worker: 0}
checkpoints: {every_s: 0.2}
retry: {crash: 0}
"""


def server_killed(head: Any) -> None:
    """Only what knows of all the others."""
    (server,) = head.all_processes["gcs_server"]
    os.kill(server.process.pid, signal.SIGKILL)


def restarted(head: Any) -> None:
    """All of it, as `ray stop` does; the test starts another in its place while the driver ends."""
    made_raylets.kill(head)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("end", [server_killed, restarted])
def test_a_head_that_ends_under_a_sweep_is_told_and_the_same_command_goes_on(
    end: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Mixmo(tmp_path / "sweep", SWEEP)
    with made_raylets.started() as cluster:
        made_raylets.add(cluster)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        driver = sweep.start("run", "sweep.yaml", "--yes")
        try:
            sweep.until(driver, one_done_and_one_under_way)
            end(cluster.head_node)
            port = int(cluster.address.rpartition(":")[2])
            if end is server_killed:
                said = told(driver)
        finally:
            if end is server_killed:
                kill(driver)
    before = finished(sweep)
    assert before
    if end is restarted:
        time.sleep(5)  # `ray stop` and `ray start` take longer
    with made_raylets.started(gcs_server_port=port) as cluster:
        if end is restarted:
            said = told(driver)
        assert "Finished trials are safe" in said
        assert "run the same command again" in said
        assert cluster.address == os.environ["RAY_ADDRESS"]
        made_raylets.add(cluster)
        cluster.wait_for_nodes()
        sweep("run", "sweep.yaml", "--yes")
    assert {row.state for row in sweep.rows()} == {"TERMINATED"}
    assert {row.trial_id: row for row in sweep.rows() if row.trial_id in before} == before
    assert [row.attempts for row in sweep.rows()].count(2) == 1  # the one that ran
    sweep("verify", sweep.name)


def told(driver: Any) -> str:
    """What it says at its end."""
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 7, err
    return str(err)


def one_done_and_one_under_way(rows: list[TrialRow]) -> bool:
    return {"TERMINATED", "RUNNING"} <= {row.state for row in rows} and any(
        row.state == "RUNNING" and row.epoch > 2 for row in rows
    )


def finished(sweep: Mixmo) -> dict[str, TrialRow]:
    return {row.trial_id: row for row in sweep.rows() if row.state == "TERMINATED"}


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


def silent(*_: Any, **__: Any) -> None:
    raise TimeoutError
