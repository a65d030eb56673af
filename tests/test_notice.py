"""A cloud's word that it takes a machine away, asked of a server on the loopback."""

import threading
from collections.abc import Iterator
from pathlib import Path

import made_metadata
import pytest

from orchestrator.errors import UsageError
from orchestrator.notice import Notice, Watch, endpoint


@pytest.fixture
def metadata() -> Iterator[made_metadata.Metadata]:
    with made_metadata.serve() as server:
        yield server


def test_a_notice_is_told_once_and_before_it_counts(metadata: made_metadata.Metadata) -> None:
    told: list[tuple[Notice, bool]] = []
    heard = threading.Event()

    def tell(notice: Notice) -> None:
        told.append((notice, watch.given))
        heard.set()

    watch = Watch(metadata.address, tell, period_s=0.02)
    while metadata.asked < 3:
        assert not watch.given
    metadata.expire()
    metadata.notice(120)
    assert heard.wait(30)
    watch.close()
    assert watch.given
    ((notice, before),) = told
    assert not before
    assert notice.action == "terminate"
    assert 0 < notice.left_s <= 120
    assert metadata.tokens == 2  # one for all questions, until it was worthless
    assert str(notice).startswith("spot notice: terminate in ")


def test_what_is_no_notice_is_none(metadata: made_metadata.Metadata) -> None:
    watch = Watch(metadata.address, lambda notice: None, period_s=3600)
    assert watch.ask() is None
    for body in ("", "[]", "{}", '{"action": "dance", "time": "2026-01-01T00:00:00Z"}', '{"action": "stop"}'):
        metadata.body = body
        with pytest.raises(ValueError, match=r"notice|isoformat|Expecting"):
            watch.ask()
    metadata.notice(-30, "stop")
    assert watch.ask() == Notice("stop", 0.0)
    watch.close()
    assert not watch.given


def test_a_machine_whose_metadata_do_not_answer_is_asked_again(metadata: made_metadata.Metadata) -> None:
    watch = Watch("http://127.0.0.1:9", lambda notice: None, period_s=0.01)
    with pytest.raises(OSError, match="refused"):
        watch.ask()
    watch.close()
    assert not watch.given


def test_only_amazons_machines_are_asked_unless_someone_says_so(tmp_path: Path) -> None:
    amazon, other = tmp_path / "amazon", tmp_path / "other"
    amazon.write_text("Amazon EC2\n")
    other.write_text("QEMU\n")
    assert endpoint({}, other) is None
    assert endpoint({}, tmp_path / "none") is None
    assert endpoint({}, amazon) == "http://169.254.169.254"
    assert (
        endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://[fd00:ec2::254]/"}, amazon) == "http://[fd00:ec2::254]"
    )
    assert endpoint({"AWS_EC2_METADATA_DISABLED": "true"}, amazon) is None
    assert endpoint({"MIXMO_SPOT_NOTICE": "off"}, amazon) is None
    assert endpoint({"MIXMO_SPOT_NOTICE": "http://127.0.0.1:1/"}, other) == "http://127.0.0.1:1"
    with pytest.raises(UsageError, match="MIXMO_SPOT_NOTICE=yes: must be auto, off, or an address"):
        endpoint({"MIXMO_SPOT_NOTICE": "yes"}, other)
