"""Checkpoints and logs of attempts."""

import hashlib
import os
from pathlib import Path

import pytest

from orchestrator.errors import NotFoundError
from orchestrator.store import LOG_BYTES, AttemptFolder, DamagedError, ResultStore, without_secrets

ID = "0123456789ab"


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore.open(tmp_path / "results", create=True)


def checkpoint(folder: Path, epoch: int, content: bytes) -> Path:
    """A file named by its content, as training writes it."""
    path = folder / f"epoch-{epoch:05d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
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


def test_a_checkpoint_comes_back_whole_or_not_at_all(store: ResultStore, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    key = put(store.attempt(ID, 1, 1, "aa"), checkpoint(tmp_path, 3, content))
    assert store.fetch(key, tmp_path / "back" / "it.pt").read_bytes() == content
    for damage in (content[:-1], content + b"x", b""):
        store.folder.path(key).write_bytes(damage)
        with pytest.raises(DamagedError, match="is damaged"):
            store.fetch(key, tmp_path / "other.pt")
    assert {path.name for path in tmp_path.glob("*.pt")} == {Path(key).name}
    store.discard(key)
    assert store.checkpoints(ID) == []
    with pytest.raises(NotFoundError):
        store.fetch(key, tmp_path / "other.pt")


def test_files_of_an_attempt_are_never_changed(store: ResultStore, tmp_path: Path) -> None:
    attempt = store.attempt(ID, 1, 1, "aa")
    local = tmp_path / "logits.npy"
    local.write_bytes(b"one")
    key = put(attempt, local)
    assert put(attempt, local) == key == attempt.path_of("logits.npy") == f"trials/{ID}/1-1-aa/logits.npy"
    local.write_bytes(b"two")
    with pytest.raises(ValueError, match="never changed"):
        put(attempt, local)
    assert store.folder.path(key).read_bytes() == b"one"


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


def test_the_log_is_that_of_the_newest_attempt(store: ResultStore) -> None:
    with pytest.raises(NotFoundError, match="has not begun"):
        store.log(ID)
    old = store.attempt(ID, 9, 1, "aa").put_log(0, "old\n")
    os.utime(store.folder.path(old), (1, 1))
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
