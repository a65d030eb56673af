"""What a sweep survives: a sample of what `make chaos` does at length (tests/chaos)."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hunted
import hunted_ray
import made_ceph
import pytest
from crash_points import When
from disturbed import CannotError, away, disk_full, read_only, server_killed
from fault_proxy import FaultProxy
from hunted import Blow, Game, Tally, Terms
from made_rows import epoch, trial

from orchestrator.store import ResultStore

SEED = os.environ.get("MIXMO_TEST_SEED") or f"{time.time_ns() % 10**9}"
QUICK = Terms(seeds=4, epochs=8, epoch_s=0.05)


@pytest.fixture
def on_disk(tmp_path: Path) -> hunted.Place:
    return lambda name: (str(tmp_path / "stores" / name),) * 2


def assert_clean(tally: Tally) -> None:
    assert tally.clean, f"seed {SEED}: {tally.words}; {tally.faults[:3]}"


@pytest.mark.slow
def test_drivers_that_are_killed_lose_nothing(tmp_path: Path, on_disk: hunted.Place) -> None:
    tally = hunted.in_parallel(hunted.by_killing, tmp_path, on_disk, SEED, 20, QUICK, 4, print)
    assert tally.struck.total() == 20
    assert_clean(tally)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_named_moment_comes_and_a_driver_dies_of_it(tmp_path: Path, when: When) -> None:
    tally = Tally()
    for point in ("lease", "sweep", "checkpoint", "upload", "part", "live", "commit", "events"):
        uri = str(tmp_path / "stores" / point)
        game = Game(tmp_path / point, uri, Terms(seeds=1, epochs=2), through=uri)
        process = game.start(Blow(point=point, when=when))
        process.join(hunted.HUNG_S)
        assert process.exitcode == -9, (point, game.said())
        game.look()
        game.finish(after_kill=True)
        tally += game.tally
    assert_clean(tally)


@pytest.mark.slow
def test_stale_drivers_that_wake_are_refused_and_harm_nothing(tmp_path: Path, on_disk: hunted.Place) -> None:
    tally = hunted.in_parallel(hunted.by_freezing, tmp_path, on_disk, SEED, 6, QUICK, 3, print)
    assert tally.refused == 6
    assert_clean(tally)


@pytest.mark.slow
def test_drivers_are_killed_while_the_path_fails(tmp_path: Path, bucket: str, s3_server: str) -> None:
    with FaultProxy(s3_server, seed=SEED, rate=0.1, stale_rate=0.2) as proxy:
        place = places(bucket, s3_server, proxy)
        tally = hunted.by_killing(tmp_path, place, SEED, 3, replace(QUICK, lists_lag=True))
        assert proxy.fired.total() > 0
    assert_clean(tally)


@pytest.mark.slow
def test_a_store_without_conditions_loses_nothing_either(tmp_path: Path, bucket: str, s3_server: str) -> None:
    secrets = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    terms = Terms(seeds=4, epochs=4, epoch_s=0.3, lease_s=3.0, heartbeat_s=0.6)
    with FaultProxy(s3_server, seed=SEED, drop_conditions=secrets) as proxy:
        tally = hunted.by_freezing(tmp_path, places(bucket, s3_server, proxy), SEED, 1, terms)
        assert proxy.fired["drop_conditions"] > 0
    assert tally.refused == 1
    assert_clean(tally)


def places(bucket: str, server: str, proxy: FaultProxy) -> hunted.Place:
    def place(name: str) -> tuple[str, str]:
        uri = bucket.replace("/some/results", f"/{name}")
        return uri, uri.replace(server, proxy.endpoint)

    return place


@pytest.mark.slow
def test_trials_finish_while_the_store_is_away_and_their_rows_arrive(
    tmp_path: Path, bucket: str, s3_server: str
) -> None:
    tally = away(tmp_path / "away", bucket, s3_server, away_s=6.0)
    assert tally.struck["store away"] == 1
    assert_clean(tally)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [disk_full, read_only])
def test_a_folder_that_takes_nothing_for_a_while_costs_nothing(
    tmp_path: Path, disturb: Callable[[Path], Tally]
) -> None:
    try:
        tally = disturb(tmp_path / "disk")
    except CannotError as error:
        pytest.skip(str(error))
    assert tally.struck.total() == 1
    assert_clean(tally)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_costs_nothing(
    tmp_path: Path, ceph_server: made_ceph.Ceph, ceph_bucket: str
) -> None:
    tally = server_killed(tmp_path / "killed", ceph_bucket, ceph_server, times=1)
    assert tally.struck["server killed"] == 1
    assert_clean(tally)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_of_ten_kills_on_ray(tmp_path: Path, bucket: str, s3_server: str) -> None:
    """Five drivers at named moments, and five processes below them."""
    hunt = hunted_ray.Hunt(
        tmp_path / "ray", lambda name: bucket.replace("/some/results", f"/{name}"), s3_server, SEED
    )  # fmt: skip
    moments = [
        ("part", "after"),
        ("commit", "before"),
        ("checkpoint", "after"),
        ("upload", "before"),
        ("live", "after"),
    ]
    hunt.kill_drivers([Blow(point=point, when=when) for point, when in moments])  # type: ignore[arg-type]
    hunt.kill_processes(["worker", "worker", "controller", "raylet", "worker"])
    assert hunt.tally.struck.total() == 10
    assert_clean(hunt.tally)


# ---------------------------------------------------------------------- what counts, counts


def test_the_recount_sees_what_is_lost_doubled_and_wrong(tmp_path: Path) -> None:
    """Rows that no driver would write: else a clean table would say nothing."""
    game = Game(tmp_path / "game", str(tmp_path / "store"), Terms(seeds=2, epochs=3), through="")
    store = ResultStore.open(tmp_path / "store", create=True)
    first, second = (trial(seed).replace(trial_id=trial_id) for seed, trial_id in enumerate(game.planned))
    with store.writer(game.name, sweep_text="name: hunted\n") as writer:
        writer.put([first.replace(state="TERMINATED", epoch=3), second.replace(state="TERMINATED")])
        writer.add([epoch(first, 1), replace(epoch(first, 2), metrics={"loss": 0.5, "lr": 0.1, "top1": 0.00001})])
    hunted.recount(game)
    assert game.tally.lost == 1 + 3
    assert game.tally.wrong == 1 + 1  # the second epoch, and the row of the trial, which says nothing
    assert game.tally.doubled == 0
    assert not game.tally.clean


def test_a_trial_that_is_trained_again_without_need_is_counted(tmp_path: Path) -> None:
    game = Game(tmp_path / "game", str(tmp_path / "store"), Terms(seeds=3, epochs=3), through="")
    finished, passed, fresh = game.planned
    game._finished, game._passed = {finished}, {passed: 2}
    game._count_reruns([["0.1", "epoch", finished, "1"], ["0.2", "epoch", passed, "3"], ["0.3", "epoch", fresh, "1"]])
    assert game.tally.rerun == 1
    game._count_reruns([["0.1", "epoch", passed, "2"]])
    assert game.tally.rerun == 2
