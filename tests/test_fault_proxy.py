"""The proxy that injects faults: each of them happens as it says, and the store lives with all of them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import KINDS, FaultProxy, Kind

from orchestrator.errors import UnreachableError
from orchestrator.store import bucket as buckets
from orchestrator.store.bucket import Bucket

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(buckets, "SETTLE_S", 0.01)


@pytest.fixture
def path(bucket: str, s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def through(bucket: str, s3_server: str, path: FaultProxy) -> Bucket:
    """The bucket as it is seen through the proxy."""
    return Bucket.open(bucket.replace(s3_server, path.endpoint))


@pytest.fixture
def direct(bucket: str) -> Bucket:
    return Bucket.open(bucket)


def test_without_faults_it_changes_nothing(through: Bucket, direct: Bucket, path: FaultProxy, tmp_path: Path) -> None:
    local = tmp_path / "file"
    local.write_bytes(bytes(range(256)) * 40_000)
    assert through.create("a/b c.txt", b"one")
    assert not through.create("a/b c.txt", b"two")
    assert through.upload("a/large", local)
    assert through.names("a") == direct.names("a") == ["b c.txt", "large"]
    assert through.digest("a/large") == direct.digest("a/large")
    assert (through.read("a/none"), through.modified("a/none")) == (None, 0.0)
    assert sum(path.fired.values()) == 0
    assert path.requests > 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_lives_with_every_fault(kind: Kind, through: Bucket, direct: Bucket, path: FaultProxy) -> None:
    path.kinds, path.rate, path.stall_s = (kind,), 0.2, 0.05
    for number in range(200):
        data = b"%d" % number * 500
        assert through.create(f"new-{number}", data)
        through.put("same", data)
        found = through.read("same")
        assert found is not None
        assert found.data == data
        assert through.names("") == [*sorted(f"new-{each}" for each in range(number + 1)), "same"]
        if number >= 20 and path.fired[kind] > 5:
            break
    assert path.fired[kind] > 5
    for number in range(20):
        stored = direct.read(f"new-{number}")
        assert stored is not None
        assert stored.data == b"%d" % number * 500


def test_a_request_cut_in_half_leaves_nothing(direct: Bucket, through: Bucket, path: FaultProxy) -> None:
    path.kinds, path.rate = ("cut_request",), 1.0
    with pytest.raises(UnreachableError):
        through.put("half", b"x" * 1000)
    path.rate = 0.0
    assert direct.read("half") is None


def test_faults_are_those_of_the_seed(bucket: str, s3_server: str) -> None:
    seen = []
    for seed in ("1", "1", "2"):
        with FaultProxy(s3_server, seed=seed, rate=0.6, kinds=("slow_down", "error")) as proxy:
            through = Bucket.open(bucket.replace(s3_server, proxy.endpoint))
            for number in range(12):
                with contextlib.suppress(UnreachableError):  # all eight tries may be drawn
                    through.put(f"object-{number}", b"x")
            seen.append(proxy.history)
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) > 3


def test_a_stale_listing_hides_what_is_new_for_a_while(through: Bucket, path: FaultProxy) -> None:
    through.put("a/old", b"x")
    path.stale_s = 0.2
    time.sleep(0.3)
    through.put("a/new", b"x")
    path.stale_rate = 1.0
    assert through.names("a") == ["old"]
    assert path.fired["stale_list"] == 1
    time.sleep(0.3)
    assert through.names("a") == ["new", "old"]
    assert path.fired["stale_list"] == 1


def test_a_server_that_drops_conditions_is_found_out(bucket: str, s3_server: str, direct: Bucket) -> None:
    with FaultProxy(s3_server, drop_conditions=("testkey", "hush-hush-testsecret")) as proxy:
        through = Bucket.open(bucket.replace(s3_server, proxy.endpoint))
        with proxy_answers(proxy) as answers:
            through._client.put_object(**through._named("a"), Body=b"one", IfNoneMatch="*")
            through._client.put_object(**through._named("a"), Body=b"two", IfNoneMatch="*")
        assert answers == [200, 200]
        assert not through.create("a", b"three")
        assert proxy.fired["drop_conditions"] >= 3
    stored = direct.read("a")
    assert stored is not None
    assert stored.data == b"two"


class proxy_answers:  # noqa: N801
    """The statuses of what the proxy gets from the server."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy, self.forward = proxy, proxy._forward

    def __enter__(self) -> list[int]:
        answers: list[int] = []

        def forward(*given: Any) -> Any:
            response = self.forward(*given)
            answers.append(response.status)
            return response

        self.proxy._forward = forward  # type: ignore[method-assign, assignment]
        return answers

    def __exit__(self, *_: object) -> None:
        self.proxy._forward = self.forward  # type: ignore[method-assign]


def test_a_server_that_answers_nobody_is_waited_for(through: Bucket, path: FaultProxy) -> None:
    through.put("a", b"one")
    gone = threading.Event()

    def leave() -> None:
        with path.away("silent"):
            gone.set()
            time.sleep(0.7)

    leaving = threading.Thread(target=leave)
    leaving.start()
    gone.wait()
    through.put("a", b"two")
    leaving.join()
    found = through.read("a")
    assert found is not None
    assert found.data == b"two"


def test_a_server_that_is_gone_comes_back_at_the_same_address(through: Bucket, path: FaultProxy) -> None:
    through.put("a", b"one")
    with path.away("refused"), pytest.raises(UnreachableError, match="unharmed"):
        through.put("a", b"two")
    found = through.read("a")
    assert found is not None
    assert found.data == b"one"


@pytest.mark.parametrize(("when", "kept"), [("before", b"one"), ("after", b"two")])
def test_a_trap_springs_once_before_or_after_the_server_acts(
    when: Any, kept: bytes, through: Bucket, direct: Bucket, path: FaultProxy
) -> None:
    through.put("a/trials.parquet", b"one")
    seen: list[bytes] = []

    def look() -> None:
        stored = direct.read("a/trials.parquet")
        seen.append(stored.data if stored else b"")

    trap = path.trap("PUT", r"trials\.parquet$", when, look)
    through.put("a/other", b"x")
    assert not trap.sprung.is_set()
    through.put("a/trials.parquet", b"two")
    assert trap.sprung.is_set()
    assert seen == [kept]
    assert path.fired[f"trap {when}"] == 1
