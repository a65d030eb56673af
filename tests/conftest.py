"""Fixtures that every test file may use, and the last word of a run: what was skipped, and why."""

import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before numpy or torch start their threads: two under load collapse twenty-fold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Ray reads it when it is imported, here by whichever module is collected first; `fleet` would set it too late for that.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import hypothesis
import made_bucket
import made_ceph
import numpy as np
import pytest

from orchestrator.store import ResultStore

# An example's wall time depends on who else uses the machine.
hypothesis.settings.register_profile("mixmo", deadline=None)
hypothesis.settings.load_profile("mixmo")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """`golden("loss_weights.npz")`: outputs recorded from the reference implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden vectors are not beside the project (../shared/golden)")
    return lambda name: np.load(folder / name)


@pytest.fixture(scope="session")
def golden_folder(golden: Callable[[str], Any]) -> Path:
    return SHARED / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CIFAR images, packed; `materialise.py` beside them lays them out as torchvision wants."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the real images are not beside the project (../shared/data)")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of the shell that started it."""
    for name in ("MIXMO_RESULTS", "MIXMO_DATA", "NO_COLOR", "FORCE_COLOR", "RAY_ADDRESS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nothing connects to anything but this machine
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture(autouse=True)
def loopback_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine ends the test: moto's servers hand out random addresses of the real
    Internet. Ray connects to the machine's own address, so its tests are left alone.
    """
    if request.node.get_closest_marker("ray") is not None:
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), f"to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """host:port of a server that speaks S3 and forgets everything when the tests end."""
    with made_bucket.serve() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[made_ceph.Ceph]:
    """A real one, one for each process of the tests. It takes a quarter of a minute to start: what uses it is slow."""
    with made_ceph.serve() as server:
        yield server


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a prefix in an empty bucket, with the credentials for it in the environment."""
    return address_of_new(s3_server, monkeypatch)


@pytest.fixture
def ceph_bucket(ceph_server: made_ceph.Ceph, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `bucket`, on the real server."""
    return address_of_new(ceph_server.endpoint, monkeypatch)


def address_of_new(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made_bucket.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made_bucket.SECRET)
    return f"s3://{made_bucket.make_bucket(server)}/some/results?endpoint_override={server}&scheme=http"


@pytest.fixture(params=["folder", "bucket", pytest.param("ceph_bucket", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a store: what holds for one kind holds for the others."""
    return str(tmp_path / "results") if request.param == "folder" else str(request.getfixturevalue(request.param))


@pytest.fixture
def store(place: str) -> ResultStore:
    return ResultStore.open(place, create=True)


JOINING = {"test_nodes.py", "test_faults.py"}
CONTRACTS = {
    "test_objects.py",
    "test_store.py",
    "test_attempts.py",
    "test_lease.py",
    "test_bucket.py",
    "test_commands.py",
}
"""What says what a place must do. What is built upon that is tried in a bucket by `make test`, not by `make check`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a Ray cluster runs last, so that a quick fault is seen first; and last of all what ends the head of
    one that this process has joined: Ray may end such a process a minute later.
    """
    items.sort(key=lambda item: (item.path.name in JOINING, item.get_closest_marker("ray") is not None))
    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None and case.params.get("place") == "bucket" and item.path.name not in CONTRACTS:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("what was not tested here", sep="=")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
    if not reasons:
        terminalreporter.line("nothing was skipped")
