"""Hosts of our own on this machine: network namespaces with processes, mounts and names of their own, and SSH.

All of it lives in one namespace that `alone` makes, so that nothing of it reaches the machine's network, and all of it
is gone when the process is.
"""

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0"
BRIDGE, LAPTOP = "mixmobr0", f"{NETWORK}.1"
WANTED = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
}
HOME = pwd.getpwuid(0).pw_dir
"""Of root, on every host. ssh goes by the user's record, not by the environment."""
_INSIDE = "MIXMO_CLUSTER_INSIDE"


def missing() -> dict[str, str]:
    """Programs that are not here, with Debian's packages of them."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = {name: package for name, package in WANTED.items() if shutil.which(name, path=path) is None}
    ask = "dpkg -s python3-venv"  # as cluster/gpu.yaml does, which would fetch it on each host
    venv = subprocess.run(["bash", "-c", ask], capture_output=True, check=False)
    return lacking | ({"venv": "python3-venv"} if venv.returncode else {})


def alone(words: Sequence[str]) -> int | None:
    """Run this program again in namespaces of its own, and return how it ended; None where this is that run."""
    if os.environ.get(_INSIDE):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no host outlives the one who asked for it
        return None
    unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return subprocess.run([*unshare, *words], env={**os.environ, _INSIDE: "1", "PATH": path}, check=False).returncode


def make_network(folder: Path) -> None:
    """The bridge that joins the hosts and this process, who is the laptop. Nothing else is on it.

    `alone` has left the machine's network behind: from here there is a way to the hosts and to nowhere else, whatever
    address anybody may connect to.
    """
    sh("mount --make-rprivate /")
    sh("ip link set lo up")
    # With a hardware address of its own. Else it has that of a port, and another one when a host comes or goes: for a
    # minute the others then do not reach the laptop.
    sh(f"ip link add {BRIDGE} address 02:00:00:00:00:01 type bridge && ip link set {BRIDGE} up")
    sh(f"ip addr add {LAPTOP}/24 dev {BRIDGE}")
    ways = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(way.startswith(f"{NETWORK}.0/24 ") for way in ways), ways
    for private in ("/tmp/ray", "/run/netns"):
        Path(private).mkdir(parents=True, exist_ok=True)
        sh(f"mount -t tmpfs none {private}")
    home = folder / "laptop"
    (home / ".ssh").mkdir(parents=True)
    sh(f"ssh-keygen -q -t ed25519 -N '' -f {home}/.ssh/id_ed25519")
    os.environ["HOME"] = str(home)


@dataclass
class Host:
    number: int
    folder: Path
    """What is this host's alone: root's home, its Ray's files."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of who logs in, besides what every host has."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{10 + self.number}"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def plug_in(self, key: Path) -> None:
        """Make the host, with a key that may log in and a Python on its path, and start it."""
        self.root.mkdir(parents=True)
        (self.folder / "ray").mkdir()
        (self.root / ".ssh").mkdir(mode=0o700)
        shutil.copy(key.with_suffix(".pub"), self.root / ".ssh/authorized_keys")
        sh(f"ssh-keygen -q -t ed25519 -N '' -f {self.folder}/host_key")
        (self.folder / "sshd_config").write_text(
            f"ListenAddress 0.0.0.0\nHostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            "AuthorizedKeysFile %h/.ssh/authorized_keys\n"
        )
        sh(f"ip netns add {self.name}")
        sh(f"ip link add {self.name} type veth peer name eth0 netns {self.name}")
        sh(f"ip link set {self.name} master {BRIDGE} && ip link set {self.name} up")
        inside = f"ip -n {self.name}"
        sh(f"{inside} addr add {self.address}/24 dev eth0 && {inside} link set eth0 up && {inside} link set lo up")
        sh(f"{inside} route add default via {LAPTOP}")
        self._boot()

    def _boot(self) -> None:
        base = Path(sys.base_prefix)
        keeps = f"mkdir -p {self.root}{base} && " if base.is_relative_to(HOME) else ""
        if keeps:  # root's home is the host's own, but its Python is this machine's
            inside = self.root / base.relative_to(HOME)
            keeps = f"mkdir -p {inside} && mount --bind {base} {inside} && "
        (self.root / ".bashrc").write_text(
            f"export PATH={base}/bin:$PATH\n"
            "export RAY_health_check_period_ms=2000 RAY_health_check_failure_threshold=10\n"  # a test waits for it:
            "export RAY_health_check_timeout_ms=2000 RAY_gcs_rpc_server_reconnect_timeout_s=30\n"  # 40 s, and 30 s
            "export RAY_raylet_start_wait_time_s=300\n"  # and others may use the machine, beside whom workers that
            "export RAY_worker_niceness=0\n"  # give way, as Ray's do, would hardly get to anything
            + "".join(f"export {name}={value}\n" for name, value in self.environment.items())
        )
        init = (
            f"hostname {self.name} && {keeps}mount --rbind {self.root} {HOME} && "
            f"mkdir -p /tmp/ray && mount --bind {self.folder}/ray /tmp/ray && mount -t tmpfs none /dev/shm && "
            f"mkdir -p /run/sshd && cd / && exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"
        )
        log = (self.folder / "sshd.log").open("ab")
        own = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        env = {"PATH": f"{base}/bin:{os.environ['PATH']}", "HOME": HOME, "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *own, "bash", "-c", init], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=env,
        )  # fmt: skip

    def run(self, command: str) -> str:
        """Over SSH, as everybody talks to it."""
        words = [*ssh(), "-o", "ConnectTimeout=10", f"root@{self.address}", command]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout

    def answers(self) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return self.run("echo here").strip() == "here"
        return False

    def kill(self) -> None:
        """The power goes: its processes at once, and its place on the network."""
        assert self.process is not None
        sh(f"ip link del {self.name}")
        self.process.kill()
        self.process.wait()

    def is_off(self) -> bool:
        return self.process is None or self.process.poll() is not None


def ssh() -> list[str]:
    """To hosts that are new each time, with the laptop's key."""
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    key = f"{os.environ['HOME']}/.ssh/id_ed25519"
    return ["ssh", "-i", key, *(word for option in options for word in ("-o", option))]


def until(happened: Callable[[], object], what: str, within_s: float, every_s: float = 1.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(every_s)


def sh(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True)
