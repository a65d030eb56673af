"""A Ray of several hosts on this machine: a head that does not train, and workers, with token and dashboard."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STARTS_S = 180.0
WORKER_RESOURCES = ("--num-cpus=1", "--object-store-memory=100000000")


@dataclass(frozen=True)
class MadeCluster:
    address: str
    """Of the dashboard."""
    token: str

    def environment(self) -> dict[str, str]:
        """Of who submits."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def started(workers: Sequence[Sequence[str]], environment: Mapping[str, str]) -> Iterator[MadeCluster]:
    """A head, and a worker for each prefix of a command: empty, or what puts it into a namespace of its own."""
    folder = Path(tempfile.mkdtemp(prefix="mxc-", dir="/tmp"))  # Ray's sockets may have 107 characters
    token, (port, dashboard) = secrets.token_hex(16), _free(2)
    env = {
        **os.environ, **environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "RAY_raylet_start_wait_time_s": "300",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    env.pop("RAY_ADDRESS", None)
    head = [
        "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=0",
        f"--temp-dir={folder}", "--object-store-memory=100000000",
    ]  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        running.append(_ray_start((), head, folder, env))
        _until_answered(f"http://127.0.0.1:{dashboard}", running[0])
        for prefix in workers:
            running.append(_ray_start(prefix, [f"--address=127.0.0.1:{port}", *WORKER_RESOURCES], folder, env))
            _until_alive(f"127.0.0.1:{port}", len(running), env, folder)  # two at once want the same sockets
        yield MadeCluster(f"http://127.0.0.1:{dashboard}", token)
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)  # `--block` takes its processes with it
        for process in reversed(running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _ray_start(
    prefix: Sequence[str], words: Sequence[str], folder: Path, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":  # fmt: skip
    ports = zip(
        ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent"), _free(4), strict=True
    )
    agents = [f"--{name}-port={port}" for name, port in ports]
    with (folder / f"start-{secrets.token_hex(3)}.log").open("wb") as log:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *agents, *words],
            env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _until_answered(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ray start ended with {process.returncode}"
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:  # it asks for the token
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("Ray's dashboard did not answer")


def _until_alive(address: str, nodes: int, env: Mapping[str, str], folder: Path) -> None:
    ask = (
        f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='ERROR');"
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
        if done.stdout.strip() == str(nodes):
            return
        time.sleep(1.0)
    logs = "\n".join(each.read_text(errors="replace")[-1500:] for each in folder.glob("start-*.log"))
    raise AssertionError(f"the cluster did not come to {nodes} nodes: {done.stdout} {done.stderr[-2000:]}\n{logs}")


def _free(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
