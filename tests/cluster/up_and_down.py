"""A cluster of hosts of one's own, from `ray up` to `ray down`, with one host killed in between.

    make test-cluster        as root, with Debian's iproute2, openssh-server and rsync; about ten minutes on 2 cores

Hosts are namespaces of this machine (hosts.py): a head and three workers, whose Rays see neither each other's processes
nor each other's files, but for the folder of results, which they share as hosts share a network folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import hosts
from hosts import Host, until

ROOT = Path(__file__).resolve().parent.parent.parent
WORKERS = 3
SWEEP = """
name: two_hosts
trial:
  data: {dataset: digits, train_images: 400, batch_size: 40, augmentation: none}
  model: {depth: 10, width: 1}
  optim: {epochs: 40, lr: 0.1}
blocks:
  - {label: cut, set: {mixing.method: cutmix}}
seeds: 3
resources: {workers: 2, cpus_per_worker: 2, gpus_per_worker: 0}
checkpoints: {every_s: 1}
"""
"""Each of the hosts has the 2 CPUs of this machine: a gang of 2 workers needs two of them."""
AS_INSTALLED = "the wheel's own"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    lacking = hosts.missing()
    if lacking and os.environ.get("MIXMO_TEST_INSTALL") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", *set(lacking.values())], check=False)
        lacking = hosts.missing()
    if os.geteuid() != 0 or lacking:
        said = f"apt install {' '.join(lacking.values())}" if lacking else "be root"
        print(f"NO CLUSTER WAS TESTED: it needs namespaces and SSH: {said}", file=sys.stderr)
        return 2
    code = hosts.alone([sys.executable, __file__])
    if code is not None:
        return code
    folder = Path(tempfile.mkdtemp(prefix="mixmo-cluster-", dir="/var/tmp"))
    try:
        whole(folder)
    except BaseException:
        print(f"\nwhat the hosts left: {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    say("all of it held")
    print("1 passed, 0 failed")
    return 0


def whole(folder: Path) -> None:
    from orchestrator.origin import origin
    from orchestrator.rows import TrialRow
    from orchestrator.store import ResultStore

    hosts.make_network(folder)
    cluster = [Host(number, folder / f"host{number}") for number in range(1 + WORKERS)]
    key = Path(os.environ["HOME"]) / ".ssh/id_ed25519"
    for host in cluster:
        host.plug_in(key)
    for host in cluster:
        until(host.answers, f"{host.name} answers over SSH", 60)
        prepare(host)
    say(f"{len(cluster)} hosts answer over SSH")

    laptop = Laptop(folder, cluster)
    laptop.up()
    until(lambda: laptop.alive() == len(cluster), "all hosts are in the cluster", 900, 15)
    say(f"ray up: {len(cluster)} hosts in the cluster")
    for host in cluster:  # what is installed there is told from what is submitted
        (installed(host) / "origin.json").write_text(json.dumps({"git_commit": AS_INSTALLED, "git_dirty": False}))

    with laptop.tunnel():
        submit = ["submit", "two_hosts.yaml", "--yes"]
        refused = laptop.mixmo(*submit, "--results", f"{hosts.HOME}/results", code=6)
        assert f"not in reach of {WORKERS} of the cluster's {len(cluster)} hosts" in refused, refused
        say("a folder that hosts do not share is refused")

        results = folder / "shared"
        laptop.mixmo(*submit, "--results", str(results))
        sent = origin()
        store = ResultStore.open(results)

        def rows() -> list[TrialRow]:
            with contextlib.suppress(Exception):
                return list(store.trial_rows("two_hosts"))
            return []

        def running() -> list[str]:
            """The hosts of a trial that has trained a while."""
            return next(((row.hosts or "").split() for row in rows() if row.state == "RUNNING" and row.epoch > 3), [])

        until(running, "a gang trains", 300)
        at_work = running()
        assert len(at_work) == 2, at_work
        say(f"a gang of two hosts trains: {' and '.join(at_work)}")
        assert "at work already" in laptop.mixmo(*submit, "--results", str(results))

        lost = next(host for host in cluster[1:] if host.name == at_work[0])
        before = sum(row.epoch for row in rows())
        lost.kill()
        say(f"{lost.name} is killed, after {before} epochs")
        began = time.monotonic()
        until(lambda: sum(row.epoch for row in rows()) > before + 3, "training goes on", 600)
        say(f"training goes on, {time.monotonic() - began:.0f} s later")
        until(lambda: rows() and all(row.state in ("TERMINATED", "ERROR") for row in rows()), "the sweep ends", 900)

    found = rows()
    assert {row.state for row in found} == {"TERMINATED"}, [(row.state, row.error) for row in found]
    assert any(row.attempts > 1 for row in found)
    assert {row.git_commit for row in found} == {sent.git_commit}
    for rank in (0, 1):
        log = store.log(found[-1].trial_id, rank)
        assert f"code {sent}" in log, log[:500]
        assert AS_INSTALLED not in log
    assert laptop.mixmo("verify", "two_hosts", "--results", str(results)) is not None
    say("the sweep has finished, whole, with the code that was submitted")

    laptop.ray("down", "-y", str(laptop.file))
    for host in cluster:  # workers end by themselves when they have missed their head for a while
        if host is not lost:
            until(partial(without_ray, host), f"no Ray is left on {host.name}", 120)
    say("ray down: no Ray is left")


def without_ray(host: Host) -> bool:
    return not host.run("pgrep raylet || true").strip()


def prepare(host: Host) -> None:
    """An environment in which all packages are this machine's, so that installing the wheel downloads nothing."""
    packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    host.run("mkdir -p ~/mixmo && python3 -m venv --without-pip ~/mixmo/venv")
    (installed(host).parent / "packages.pth").write_text(f"{packages}\n")
    ray = host.root / "mixmo/venv/bin/ray"
    ray.write_text(f"#!{hosts.HOME}/mixmo/venv/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)


def installed(host: Host) -> Path:
    (packages,) = (host.root / "mixmo/venv/lib").glob("python*/site-packages")
    return packages / "orchestrator"


class Laptop:
    """From where the cluster is made and used. It has the project, a key and a token."""

    def __init__(self, folder: Path, cluster: Sequence[Host]) -> None:
        self.folder, self.head = folder, cluster[0]
        self.file = folder / "onprem.yaml"
        text = (ROOT / "cluster/onprem.yaml").read_text()
        edits = {
            "head_ip: 192.0.2.1 ": f"head_ip: {cluster[0].address} ",
            "worker_ips: [192.0.2.2, 192.0.2.3] ": f"worker_ips: [{', '.join(host.address for host in cluster[1:])}] ",
            "ssh_user: ubuntu ": "ssh_user: root ",
            "ssh_private_key: ~/": f"ssh_private_key: {os.environ['HOME']}/",  # ssh asks not HOME but the user's record
        }
        for before, after in edits.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        self.file.write_text(text)
        (folder / "two_hosts.yaml").write_text(SWEEP)
        self.env = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def up(self) -> None:
        self.ray("get-auth-token", "--generate")
        for tries_left in (2, 1, 0):  # on a machine that others use, too, Ray's own patience may be over
            try:
                self.ray("up", "-y", "--no-config-cache", str(self.file), timeout=900)
                return
            except AssertionError:
                if not tries_left:
                    raise

    def alive(self) -> int:
        """Hosts in the cluster, as its head says."""
        ask = (
            ". ~/mixmo/cluster/environment.sh; python -c \"import ray; ray.init('auto', log_to_driver=False, "
            "logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))\""
        )
        with contextlib.suppress(subprocess.SubprocessError, ValueError):
            return int(self.head.run(ask).split()[-1])
        return 0

    def ray(self, *words: str, timeout: float = 300) -> None:
        log = self.folder / f"ray-{words[0]}.log"
        with log.open("ab") as out:
            done = subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", *words], env=self.env, cwd=ROOT, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, timeout=timeout, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"ray {words[0]} gave {done.returncode}\n{log.read_text(errors='replace')[-4000:]}"

    def mixmo(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *words], env=self.env, cwd=self.folder, capture_output=True,
            text=True, stdin=subprocess.DEVNULL, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"mixmo {words} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def tunnel(self) -> Iterator[None]:
        """The head's dashboard, which listens on its loopback alone, at ours."""
        words = [*hosts.ssh(), "-N", "-L", "8265:127.0.0.1:8265", f"root@{self.head.address}"]
        process = subprocess.Popen(words)
        try:
            time.sleep(2)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
