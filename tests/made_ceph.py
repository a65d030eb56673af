"""A real S3 server on this machine alone: Ceph's RADOS Gateway, with the monitor and the disk (in memory) it needs.

Debian packages it. Where it is not installed, `make test` installs it if it may (as root, with apt); else the tests
over it are skipped, which the end of the run tells.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_bucket import KEY, SECRET, client

INSTALLS = "MIXMO_TEST_INSTALL"
"""Set in the environment, it allows a run of the tests to install packages. `make test` sets it; nothing else does."""
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
STARTS_S = 90.0
STOPS_S = 20.0

# cephx and both kinds of addresses are needed: without keys the gateway never gets in, without v1 the disk does not.
CONFIG = """
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/keyring
run_dir = {folder}
admin_socket =
pid_file =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
mon_data_avail_warn = 1
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 1000
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_crush_chooseleaf_type = 0
[mon.a]
host = localhost
mon_data = {folder}/mon
[osd.0]
host = localhost
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_memory_target = 1073741824
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {folder}/rgw
rgw_thread_pool_size = 64
rgw_dns_name = localhost
"""
KEYS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw": {"mon": "allow rwx", "osd": "allow rwx"},
}


class Ceph:
    """A server under a folder. `endpoint` is its host:port; key and secret are those of made_bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        port, v2, v1 = _free_ports(3)
        self.endpoint = f"127.0.0.1:{port}"
        self._monitor_at = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        self._fsid = str(uuid.uuid4())
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        (folder / "ceph.conf").write_text(CONFIG.format(folder=folder, port=port, v2=v2, v1=v1, fsid=self._fsid))

    def start(self) -> None:
        """Raises AssertionError, with the ends of the logs, if it does not come up; then nothing of it runs."""
        try:
            self._start_monitor()
            self._start_disk()
            self._run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test",
                      f"--access-key={KEY}", f"--secret={SECRET}", "--max-buckets=0")  # fmt: skip
            self.start_gateway()
        except BaseException:
            self.stop()
            raise

    def start_gateway(self) -> None:
        """Returns when it answers."""
        self._begin("radosgw", "-n", "client.rgw", "-f")
        deadline = time.monotonic() + STARTS_S
        asked = client(self.endpoint)
        try:
            while not _answers(asked):
                assert self._running["radosgw"].poll() is None, self._told("radosgw ended")
                assert time.monotonic() < deadline, self._told("radosgw does not answer")
                time.sleep(0.1)
        finally:
            asked.close()

    def kill_gateway(self) -> None:
        """As a power cut would: what was acknowledged is in the disk's process, which lives on."""
        self._end("radosgw", signal.SIGKILL)

    def freeze(self, *, frozen: bool) -> None:
        """Whether the gateway stands still: it takes connections, and answers none."""
        self._running["radosgw"].send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def stop(self) -> None:
        """The gateway first and the monitor last: a disk without its monitor does not end."""
        for name in ("radosgw", "ceph-osd", "ceph-mon"):
            if name in self._running:
                self._end(name, signal.SIGTERM)

    def _start_monitor(self) -> None:
        keyring = self._folder / "keyring"
        for number, (name, allowed) in enumerate(KEYS.items()):
            capabilities = [word for what, how in allowed.items() for word in ("--cap", what, how)]
            make = [] if number else ["-C"]
            self._run("ceph-authtool", *make, str(keyring), "--gen-key", "-n", name, *capabilities)
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._monitor_at, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--keyring", str(keyring), "--monmap", monmap)
        self._begin("ceph-mon", "-f", "-i", "a")

    def _start_disk(self) -> None:
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self._begin("ceph-osd", "-f", "-i", "0")

    def _begin(self, name: str, *arguments: str) -> None:
        command = [name, "-c", str(self._folder / "ceph.conf"), *arguments]
        quiet = subprocess.DEVNULL
        self._running[name] = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, env=_environment(), cwd=self._folder
        )

    def _run(self, name: str, *arguments: str) -> None:
        command = [name, "-c", str(self._folder / "ceph.conf"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STARTS_S, env=_environment(), cwd=self._folder, check=False
        )
        assert done.returncode == 0, self._told(f"{name} {' '.join(arguments[:3])}: {done.stderr[-2000:]}")

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._running.pop(name)
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(STOPS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _told(self, what: str) -> str:
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join([what, *(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)])


@contextlib.contextmanager
def serve() -> Iterator[Ceph]:
    """A server on free ports of the loopback. Skips the test where it is not installed and may not be."""
    if not installed():
        pytest.skip(
            "NO REAL S3 SERVER WAS TESTED: Ceph is not installed. `make test` as root on Debian or Ubuntu installs it, "
            f"as does: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    for tries_left in (2, 1, 0):  # another process may take a port between the search and its use
        folder = Path(tempfile.mkdtemp(prefix="ceph-"))  # not pytest's: its paths are long, and kept
        server = Ceph(folder)
        try:
            try:
                server.start()
            except AssertionError:
                if not tries_left:
                    raise
                continue
            yield server
            return
        finally:
            server.stop()
            shutil.rmtree(folder, ignore_errors=True)


def installed() -> bool:
    """Whether the programs are there, after an attempt to install them where this is allowed."""
    if not _found() and os.environ.get(INSTALLS) and os.geteuid() == 0 and shutil.which("apt-get"):
        with (Path(tempfile.gettempdir()) / "mixmo-test-install.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist come here at once
            if not _found():
                _install()
    return _found()


def _found() -> bool:
    return all(shutil.which(name, path=_environment()["PATH"]) for name in ("radosgw", "ceph-mon", "ceph-osd", "ceph"))


def _install() -> None:
    """A failure is seen by what is not there afterwards."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(
            ["apt-get", *command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=400,
            check=False,
        )  # fmt: skip


def _environment() -> dict[str, str]:
    """Not the tests' own: `ceph` is a Python program of the system's."""
    return {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as held:
        taken = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


def _answers(asked: Any) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        asked.list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True
