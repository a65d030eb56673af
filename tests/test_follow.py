"""A sweep that is followed: the same as one that is read, for three requests a look, of which most send nothing."""

import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import made_bucket
import pytest
from fault_proxy import FaultProxy, Request, Response
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import ELSEWHERE, advance, begin, finished, in_a_folder, trial

from orchestrator.errors import NotFoundError, UnreachableError
from orchestrator.store import Following, ResultStore, Snapshot


def seen(shot: Snapshot) -> tuple[Any, ...]:
    """What can be told of a snapshot; of live rows, their keys and the metric that a screen shows."""
    live = [(row.trial_id, row.epoch, row.order, row.metrics["top1"]) for row in shot.live]
    return shot.header, list(shot.rows), live, list(shot.events)


def settled(following: Following) -> Snapshot:
    """After two looks: events and lease take turns where the trials are as they were."""
    following.look()
    return following.look()


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(["advance", "event", "flush", "pause", "look"]), st.integers(0, 3)), max_size=25)
)
def test_who_follows_sees_what_who_reads_sees(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, begin(ResultStore.open(folder, create=True)) as writer:
        store = ResultStore.open(folder)
        rows = [trial(seed) for seed in range(4)]
        writer.put(rows)
        writer.flush(force=True)
        following = store.follow("made")
        for seq, (step, at) in enumerate([*steps, ("flush", 0)], 1):
            if step == "advance" and rows[at].epoch < 3:
                rows[at] = advance(writer, rows[at], rows[at].epoch + 1, seq=seq)
            elif step == "event":
                writer.event("told", f"number {seq}")
            elif step == "pause":
                writer.pause("ada" if at % 2 else None)
            elif step == "flush":
                writer.flush(force=True)
            else:
                following.look()
        assert seen(settled(following)) == seen(store.snapshot("made"))


@in_a_folder
def test_rows_that_have_not_changed_are_the_same_objects(store: ResultStore) -> None:
    with begin(store) as writer:
        rows = [trial(seed) for seed in range(5)]
        writer.put(rows)
        advance(writer, rows[0], 1, seq=1)
        writer.flush(force=True)
        following = store.follow("made")
        first = settled(following)
        assert following.look() is first
        advance(writer, rows[3], 1, seq=2)
        writer.flush(force=True)
        second = following.look()
        assert [i for i in range(5) if first.rows[i] is not second.rows[i]] == [3]
        assert second.live[0] is first.live[0] or second.live[1] is first.live[0]
        assert second.rows[3].epoch == 1


@in_a_folder
def test_a_value_that_comes_or_goes_is_a_change(store: ResultStore) -> None:
    """Null and not null, and text that differs: of every kind of column."""
    with begin(store) as writer:
        row = trial(0)
        writer.put([row, trial(1)])
        writer.flush(force=True)
        following = store.follow("made")
        following.look()
        changes: list[dict[str, Any]] = [{"error_cause": "no"}, {"hosts": "a"}, {"hosts": None}, {"wall_s": 2.0}]
        for seq, change in enumerate(changes, 1):
            row = row.replace(seq=seq, **change)
            writer.put([row])
            writer.flush(force=True)
            assert list(following.look().rows) == store.trial_rows("made")


@in_a_folder
def test_the_next_driver_is_followed_too(store: ResultStore) -> None:
    with begin(store) as writer:
        row = trial(0)
        writer.put([row, trial(1)])
        row = advance(writer, row, 1, seq=1)
    following = store.follow("made")
    settled(following)
    with begin(store) as writer:
        advance(writer, row.replace(fence=writer.fence), 2, seq=2, attempt=2)
        writer.flush(force=True)
        assert seen(settled(following)) == seen(store.snapshot("made"))


@in_a_folder
def test_what_is_not_there_is_said(store: ResultStore) -> None:
    with pytest.raises(NotFoundError, match="no sweep made"):
        store.follow("made").look()


@in_a_folder
def test_a_table_that_cannot_be_read_is_told_again_until_it_can(store: ResultStore) -> None:
    rows = finished(store)
    following = store.follow("made")
    whole = store.folder.read("sweeps/made/trials.parquet")
    assert whole is not None
    store.folder.put("sweeps/made/trials.parquet", b"no table")
    for _ in range(2):
        with pytest.raises(UnreachableError):
            following.look()
    store.folder.put("sweeps/made/trials.parquet", whole.data)
    assert len(following.look().rows) == len(rows)


@in_a_folder
def test_a_driver_of_another_machine_is_given_up_when_its_lease_has_not_moved_for_its_time(store: ResultStore) -> None:
    now = [1000.0]
    with begin(store, process=ELSEWHERE) as writer:
        writer.put([trial(0)])
        writer.flush(force=True)
        following = Following(store.folder, "made", clock=lambda: now[0])
        following.look()
        assert following.driven()
        now[0] += 59
        settled(following)
        assert following.driven()
        now[0] += 2
        assert not following.driven()
        writer.renew()
        settled(following)
        assert following.driven()
    settled(following)
    assert not following.driven()


# --------------------------------------------------------------------------------------------------------- requests


class Listening(FaultProxy):
    """Tells what was asked and how much was sent."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.heard: list[tuple[str, str, bool, int, int]] = []
        """Method, key, whether it was on a condition, status, bytes of the answer."""
        self._hearing = threading.Lock()

    def _noted(self, request: Request, response: Response) -> Response:
        condition = request.header("if-none-match") is not None
        with self._hearing:
            key = request.key.rpartition("sweeps/")[2]
            self.heard.append((request.method, key, condition, response.status, len(response.body)))
        return super()._noted(request, response)


@pytest.fixture
def listening(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Listening, ResultStore]]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made_bucket.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made_bucket.SECRET)
    with Listening(s3_server) as proxy:
        name = made_bucket.make_bucket(s3_server)
        yield (
            proxy,
            ResultStore.open(f"s3://{name}/results?endpoint_override={proxy.endpoint}&scheme=http", create=True),
        )


def test_a_look_is_three_requests_and_nothing_is_sent_where_nothing_changed(
    listening: tuple[Listening, ResultStore],
) -> None:
    proxy, store = listening
    with begin(store) as writer:
        rows = [trial(seed) for seed in range(3)]
        writer.put(rows)
        writer.event("told", "one")
        rows[0] = advance(writer, rows[0], 1, seq=1)
        writer.flush(force=True)
        following = store.follow("made")
        following.look()
        following.driven()
        settled(following)
        for _ in range(6):
            proxy.heard.clear()
            following.look()
            following.driven()
            asked = list(proxy.heard)
            assert len(asked) == 3
            assert {(method, condition, status, size) for method, _, condition, status, size in asked} == {
                ("GET", True, 304, 0)
            }
        rows[0] = advance(writer, rows[0], 2, seq=2)
        writer.flush(force=True)
        proxy.heard.clear()
        assert following.look().rows[0].epoch == 2
        asked = list(proxy.heard)
        assert len(asked) == 3
        assert all(method == "GET" and condition for method, _, condition, _, _ in asked)
        sent = [key.rpartition("/")[2] for _, key, _, status, _ in asked if status == 200]
        assert sent[0] == "trials.parquet"
        assert sent[1].startswith("live-")
