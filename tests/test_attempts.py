"""Checkpoints and logs of attempts."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_rows import at, content, in_a_folder, reached, some_logits, trial

from orchestrator.errors import NotFoundError
from orchestrator.rows import TrialRow
from orchestrator.store import LOG_BYTES, AttemptFolder, DamagedError, Logits, ResultStore, without_secrets

ID = "0123456789ab"


def checkpoint(folder: Path, epoch: int, content: bytes, step: int | None = None) -> Path:
    """A file named by its content, as training writes it."""
    within = "" if step is None else f"step-{step:06d}-"
    path = folder / f"epoch-{epoch:05d}-{within}{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    return path


def put(attempt: AttemptFolder, local: Path) -> str:
    return attempt.put_file(local, local.name)


def test_the_checkpoint_of_the_latest_epoch_comes_first_whichever_attempt_wrote_it(
    store: ResultStore, tmp_path: Path
) -> None:
    first, second = store.attempt(ID, 1, 1, "aa"), store.attempt(ID, 2, 2, "bb")
    old = [put(first, checkpoint(tmp_path, number, b"%d" % number)) for number in (1, 100_000, 7)]
    new = put(second, checkpoint(tmp_path, 9, b"nine"))
    put(second, tmp_path / checkpoint(tmp_path, 2, b"two").name)
    (tmp_path / "logits.npy").write_bytes(b"x")
    put(second, tmp_path / "logits.npy")
    assert store.checkpoints(ID)[:3] == [old[1], new, old[2]]
    assert first.checkpoints() == [old[1], old[2], old[0]]
    assert store.checkpoints("f" * 12) == []
    unlisted = f"trials/{ID}/9-9-0123abcd/epoch-200000-0123456789abcdef.pt"  # a server's listings may lag
    assert store.checkpoints(ID, unlisted) == [unlisted, *store.checkpoints(ID)]
    assert store.checkpoints(ID, old[1]) == store.checkpoints(ID)


@given(st.sets(st.tuples(st.integers(1, 100_001), st.none() | st.integers(1, 1_000_001)), min_size=2, max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_checkpoint_within_an_epoch_comes_before_that_of_its_end(
    tmp_path_factory: pytest.TempPathFactory, moments: set[tuple[int, int | None]]
) -> None:
    """In the order in which one training passes them, whichever attempts wrote them."""
    folder = tmp_path_factory.mktemp("any")
    store = ResultStore.open(folder / "results", create=True)
    attempts = [store.attempt(ID, 1, 1, "aa"), store.attempt(ID, 1, 2, "bb")]
    passed = sorted(moments, key=lambda moment: (moment[0], moment[1] or float("inf")))
    keys = [
        put(attempts[place % 2], checkpoint(folder, epoch, b"%d" % place, step))
        for place, (epoch, step) in enumerate(passed)
    ]
    assert store.checkpoints(ID) == keys[::-1]
    assert attempts[0].checkpoints() == keys[::2][::-1]


def test_a_checkpoint_comes_back_whole_or_not_at_all(store: ResultStore, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    key = put(store.attempt(ID, 1, 1, "aa"), checkpoint(tmp_path, 3, content))
    assert store.fetch(key, tmp_path / "back" / "it.pt").read_bytes() == content
    for damage in (content[:-1], content + b"x", b""):
        store.folder.put(key, damage)
        with pytest.raises(DamagedError, match="is damaged"):
            store.fetch(key, tmp_path / "other.pt")
    assert {path.name for path in tmp_path.glob("*.pt")} == {Path(key).name}
    store.discard(key)
    assert store.checkpoints(ID) == []
    with pytest.raises(NotFoundError):
        store.fetch(key, tmp_path / "other.pt")


# ------------------------------------------------------------------------------------------------------------- logits


def row_with(store: ResultStore, logits: Logits) -> TrialRow:
    return reached(trial(), 3, logits=store.attempt(ID, 1, 1, "aa").put_logits(logits))


@given(M=st.integers(1, 3), N=st.integers(1, 5), K=st.integers(2, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_come_back_in_half_precision(store: ResultStore, M: int, N: int, K: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits_MNK, labels_N = draw.normal(0, 9, (M, N, K)).astype(np.float32), draw.integers(0, K, N)
    row = row_with(store, Logits.of(logits_MNK, labels_N))
    held = store.logits(row)
    assert (str(held.logits_MNK.dtype), str(held.labels_N.dtype)) == ("float16", "int64")
    assert np.array_equal(held.logits_MNK, logits_MNK.astype(np.float16))
    assert np.array_equal(held.labels_N, labels_N)
    assert row_with(store, Logits.of(logits_MNK, labels_N)) == row  # the same numbers, the same name


def test_logits_beyond_half_precision_are_at_its_end(store: ResultStore) -> None:
    logits_MNK = np.array([[[1e9, -1e9, 65504.0]]], dtype=np.float32)
    held = store.logits(row_with(store, Logits.of(logits_MNK, np.array([0]))))
    assert held.logits_MNK.tolist() == [[[65504.0, -65504.0, 65504.0]]]


def test_logits_are_a_file_of_numpy(store: ResultStore) -> None:
    row = row_with(store, some_logits())
    name = str(row.logits).rpartition("/")[2]
    data = content(store, str(row.logits))
    assert name == f"logits-{hashlib.sha256(data).hexdigest()[:16]}.npz"
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        assert sorted(file) == ["labels_N", "logits_MNK"]
    assert store.checkpoints(ID) == []


def test_logits_that_are_lost_are_told_with_what_to_do(store: ResultStore) -> None:
    row = row_with(store, some_logits())
    key = str(row.logits)
    store.folder.put(key, content(store, key)[:-1])
    with pytest.raises(DamagedError, match=r"is damaged.*put the file back from a copy"):
        store.logits(row)
    store.folder.delete(key)
    with pytest.raises(NotFoundError, match="is not there: put the file back from a copy"):
        store.logits(row)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"state": "RUNNING"}, "stored when it finishes, and it is RUNNING"),
        ({"stopped_early": True}, "a scheduler stopped it"),
        ({}, "a version that kept none, or the store took none.*under new results"),
    ],
)
def test_a_trial_without_logits_says_why(store: ResultStore, columns: dict[str, Any], match: str) -> None:
    with pytest.raises(NotFoundError, match=match):
        store.logits(reached(trial(), 3, **columns))


def arrays(**given: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **given)
    return file.getvalue()


LOGITS, LABELS = some_logits().logits_MNK, some_logits().labels_N


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"weights", "no file of logits"),
        (b"", "no file of logits"),
        (arrays(logits_MNK=LOGITS), "no file of logits"),
        (arrays(logits_MNK=LOGITS, labels_N=np.array([None, 1, "x"])), "no file of logits"),  # a pickle is not opened
        (arrays(logits_MNK=LOGITS.astype(np.float32), labels_N=LABELS), "holds float32 and int64"),
        (arrays(logits_MNK=LOGITS, labels_N=LABELS[:2]), "its shapes"),
        (arrays(logits_MNK=LOGITS[0], labels_N=LABELS), "its shapes"),
    ],
)
def test_a_file_that_holds_no_logits_is_refused_whatever_its_name_says(
    store: ResultStore, content: bytes, match: str
) -> None:
    key = f"trials/{ID}/1-1-aa/logits-{hashlib.sha256(content).hexdigest()[:16]}.npz"
    store.folder.put(key, content)
    with pytest.raises(DamagedError, match=f"was not written by mixmo.*{match}"):
        store.logits(reached(trial(), 3, logits=key))


# ------------------------------------------------------------------------------------------------- files of all kinds


def test_files_of_an_attempt_are_never_changed(store: ResultStore, tmp_path: Path) -> None:
    attempt = store.attempt(ID, 1, 1, "aa")
    local = tmp_path / "logits.npy"
    local.write_bytes(b"one")
    key = put(attempt, local)
    assert put(attempt, local) == key == attempt.path_of("logits.npy") == f"trials/{ID}/1-1-aa/logits.npy"
    local.write_bytes(b"two")
    with pytest.raises(ValueError, match="never changed"):
        put(attempt, local)
    assert content(store, key) == b"one"


def test_a_file_that_is_not_what_its_name_says_is_not_stored(store: ResultStore, tmp_path: Path) -> None:
    local = checkpoint(tmp_path, 1, b"right")
    local.write_bytes(b"wrong")
    with pytest.raises(DamagedError, match="is not what the name"):
        put(store.attempt(ID, 1, 1, "aa"), local)
    assert store.checkpoints(ID) == []


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_names_stay_in_the_folder(store: ResultStore, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a file"):
        store.attempt(ID, 1, 1, "aa").path_of(name)


@pytest.mark.parametrize(("trial_id", "token"), [("../../x", "aa"), (ID, "a/b"), (ID, ""), (ID.upper(), "aa")])
def test_attempts_stay_in_theirs(store: ResultStore, trial_id: str, token: str) -> None:
    with pytest.raises(ValueError, match="no attempt"):
        store.attempt(trial_id, 1, 1, token)
    with pytest.raises(ValueError, match="not a file of an attempt"):
        store.discard("sweeps/made/trials.parquet")


@in_a_folder
def test_the_log_is_that_of_the_newest_attempt(store: ResultStore) -> None:
    with pytest.raises(NotFoundError, match="has not begun"):
        store.log(ID)
    old = store.attempt(ID, 9, 1, "aa").put_log(0, "old\n")
    os.utime(at(store, old), (1, 1))
    new = store.attempt(ID, 1, 2, "bb")  # of another sweep: fences of two sweeps do not compare
    new.put_log(0, "new\n")
    new.put_log(0, "newer\n")
    assert store.log(ID) == "newer\n"
    with pytest.raises(NotFoundError, match="rank 1"):
        store.log(ID, rank=1)


def test_a_log_keeps_its_end_without_secrets(store: ResultStore) -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "hush-hush-hush", "HOME": "/home/someone", "API_TOKEN": "short"}
    store.attempt(ID, 1, 1, "aa").put_log(0, "x" * LOG_BYTES + "key hush-hush-hush of /home/someone\n", environ)
    text = store.log(ID)
    assert text.endswith("key *** of /home/someone\n")
    assert len(text) == LOG_BYTES
    assert without_secrets("short", environ) == "short"
