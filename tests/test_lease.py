"""One driver at a time, and none that is dead."""

import json
import os
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from made_rows import DEAD, ELSEWHERE, at, begin, content, in_a_folder, trial

from orchestrator.errors import RefusedError
from orchestrator.store import (
    DamagedError,
    LeaseLostError,
    Process,
    ResultStore,
)


@in_a_folder
def test_a_second_driver_is_refused_and_told_who_holds_the_sweep(store: ResultStore) -> None:
    with begin(store, holder="ada@lab") as writer:
        with pytest.raises(
            RefusedError, match=rf"made is being run by ada@lab \(process {os.getpid()} on .*mixmo stop made"
        ):
            begin(store)
        lease = store.lease("made")
        assert lease is not None
        assert (lease.fence, lease.expired) == (writer.fence, False)
        os.utime(at(store, "sweeps/made/lease.json"), (0, 0))
        with pytest.raises(RefusedError):  # not renewed for years, but this host sees the process alive
            begin(store)
    assert store.lease("made") is None
    with begin(store) as writer:
        assert writer.fence == 2


@in_a_folder
def test_a_driver_on_another_host_is_believed_until_its_lease_is_over(store: ResultStore) -> None:
    old = begin(store, process=ELSEWHERE)
    with pytest.raises(RefusedError, match=r"run this again in (60|59) s"):
        begin(store)
    path = at(store, "sweeps/made/lease.json")
    os.utime(path, (time.time() - 59, time.time() - 59))
    with pytest.raises(RefusedError):
        begin(store)
    os.utime(path, (time.time() - 61, time.time() - 61))
    with begin(store) as new:
        assert new.fence == 2
        for act in (old.renew, lambda: old.close(done=True)):
            with pytest.raises(LeaseLostError, match="taken over"):
                act()
        assert store.snapshot("made").header.fence == 2


@pytest.mark.parametrize("gone", [DEAD, replace(Process.current(), started="1")], ids=["dead", "number used again"])
def test_a_dead_driver_of_this_host_is_replaced_at_once(store: ResultStore, gone: Process) -> None:
    begin(store, process=gone)
    lease = store.lease("made")
    assert lease is not None
    assert lease.expired
    with begin(store) as writer:
        assert writer.fence == 2


def test_a_corpse_that_nobody_collected_is_dead(store: ResultStore) -> None:
    child = subprocess.Popen(["sleep", "100"])
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    process = replace(Process.current(), pid=child.pid, started=started)
    begin(store, process=process)
    with pytest.raises(RefusedError):
        begin(store)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still listed
    assert Path(f"/proc/{child.pid}").exists()
    begin(store).close(done=False)
    child.wait()


def test_a_fence_is_never_given_twice_even_if_the_lease_is_gone(store: ResultStore) -> None:
    begin(store).close(done=False)
    begin(store).close(done=False)
    store.folder.delete("sweeps/made/lease.json")
    with begin(store) as writer:
        assert writer.fence == 3


NO_LEASES = [
    ("fence", "1"), ("process", {**asdict(DEAD), "pid": None}), ("duration_s", "60"), ("taken_at", "2026-11-21"),
    ("renewed_at", "2026-11-21"), ("surprise", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NO_LEASES)
def test_a_lease_that_is_no_lease_is_not_guessed_at(store: ResultStore, name: str, value: object) -> None:
    begin(store, process=DEAD).close()
    held = json.loads(content(store, "sweeps/made/lease.json"))
    store.folder.put("sweeps/made/lease.json", json.dumps({**held, name: value}).encode())
    with pytest.raises(DamagedError, match="delete it"):
        begin(store)


def test_of_many_drivers_at_once_one_wins(store: ResultStore) -> None:
    won, lost = [], []

    def try_it(number: int) -> None:
        try:
            won.append(begin(store, holder=str(number)))
        except RefusedError as error:
            lost.append(error)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won[0].close(done=False)


def test_a_released_lease_is_not_renewed(store: ResultStore) -> None:
    writer = begin(store)
    writer.close(done=False)
    writer.renew()
    writer.close(done=False)
    assert store.lease("made") is None


def test_an_error_on_the_way_out_writes_what_there_is_and_frees_the_sweep(store: ResultStore) -> None:
    def fail() -> None:
        with begin(store) as writer:
            writer.put([trial()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(store.trial_rows("made")) == 1
    assert store.lease("made") is None
    assert not store.snapshot("made").header.done
