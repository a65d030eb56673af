"""From where a cluster is made and used: it has the project, a key and a token."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hosts
from hosts import Host

ROOT = Path(__file__).resolve().parent.parent.parent


def main(script: str, whole: Callable[[Path], None]) -> int:
    """Run `whole` in namespaces of its own, with a folder that stays where it fails. Returns the exit code."""
    lacking = hosts.missing()
    if lacking and os.environ.get("MIXMO_TEST_INSTALL") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", *set(lacking.values())], check=False)
        lacking = hosts.missing()
    if os.geteuid() != 0 or lacking:
        said = f"apt install {' '.join(lacking.values())}" if lacking else "be root"
        print(f"NO CLUSTER WAS TESTED: it needs namespaces and SSH: {said}", file=sys.stderr)
        return 2
    code = hosts.alone([sys.executable, script])
    if code is not None:
        return code
    folder = Path(tempfile.mkdtemp(prefix="mixmo-cluster-", dir="/var/tmp"))
    try:
        hosts.make_network(folder)
        whole(folder)
    except BaseException:
        print(f"\nwhat the hosts left: {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    say("all of it held")
    print("1 passed, 0 failed")
    return 0


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def key() -> Path:
    """The laptop's own, with which the tests look into hosts."""
    return Path(os.environ["HOME"]) / ".ssh/id_ed25519"


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
    """One of the project's cluster files, edited, and what is typed with it."""

    def __init__(
        self, folder: Path, file: str, edits: Mapping[str, str], environment: Mapping[str, str] | None = None
    ) -> None:
        """`edits` is text of the file and what stands in its place: all else is tested as it ships."""
        self.folder, self.file = folder, folder / file
        text = (ROOT / "cluster" / file).read_text()
        for before, after in edits.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        self.file.write_text(text)
        self.env = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore",
            **(environment or {}),
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

    def nodes(self, head: Host) -> list[dict[str, Any]]:
        """The hosts in the cluster, as its head's Ray tells of them; none while it does not answer."""
        ask = (
            ". ~/mixmo/cluster/environment.sh; python -c \"import json, ray; ray.init('auto', log_to_driver=False, "
            "logging_level='ERROR'); print(json.dumps([node for node in ray.nodes() if node['Alive']]))\""
        )
        with contextlib.suppress(subprocess.SubprocessError, ValueError, IndexError):
            found: list[dict[str, Any]] = json.loads(head.run(ask).splitlines()[-1])
            return found
        return []

    def ray(self, *words: str, timeout: float = 300) -> None:
        log = self.folder / f"ray-{words[0]}.log"
        with log.open("ab") as out:
            done = subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", *words], env=self.env, cwd=ROOT, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, timeout=timeout, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"ray {words[0]} gave {done.returncode}\n{log.read_text(errors='replace')[-4000:]}"

    def mixmo(self, *words: str, code: int = 0) -> str:
        return self.python("-m", "orchestrator.cli", *words, code=code)

    def python(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=self.env, cwd=self.folder, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{words} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def tunnel(self, head: Host) -> Iterator[None]:
        """The head's dashboard, which listens on its loopback alone, at ours."""
        words = [*hosts.ssh(), "-N", "-L", "8265:127.0.0.1:8265", f"root@{head.address}"]
        process = subprocess.Popen(words)
        try:
            time.sleep(2)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
