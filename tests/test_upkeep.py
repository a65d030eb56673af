"""`mixmo compact`: what it says, and how it ends."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_rows import ELSEWHERE, advance, begin, trial

from orchestrator import cli
from orchestrator.store import ResultStore


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def compact(results: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compact", "made", "--results", str(results), *words])
    return int(ended.value.code or 0)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A sweep of three trials, each in a part of its own."""
    store = ResultStore.open(tmp_path, create=True)
    with begin(store) as writer:
        for seed in range(3):
            row = trial(seed)
            for number in (1, 2, 3):
                row = advance(writer, row, number, seq=number)
            writer.flush(force=True)
        writer.close(done=True)
    return tmp_path


def test_it_says_what_it_did_in_words_and_as_json(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compact(results) == 0
    out = capsys.readouterr().out
    assert "9 rows of epochs" in out
    assert "3 before, 1 now" in out
    assert compact(results, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "mixmo.compact/1"
    assert (said["parts_before"], said["parts_after"], said["rows"], said["unread"]) == (1, 1, 9, [])
    assert said["bytes_after"] == (results / "sweeps/made/epochs" / _part(results)).stat().st_size


def _part(results: Path) -> str:
    (part,) = ResultStore.open(results).snapshot("made").header.parts
    return part


def test_what_it_cannot_read_is_told(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = min(ResultStore.open(results).snapshot("made").header.parts)
    (results / "sweeps/made/epochs" / lost).write_bytes(b"junk")
    assert compact(results) == 0
    assert f"{lost} cannot be read and stays as it is; `mixmo verify made`" in capsys.readouterr().err


def test_it_is_refused_while_a_driver_runs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begin(ResultStore.open(results), process=ELSEWHERE):
        assert compact(results) == 6
    assert "is being run by" in capsys.readouterr().err
    assert len(ResultStore.open(results).snapshot("made").header.parts) == 3


def test_a_sweep_that_is_not_there_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compact(tmp_path) == 5
    assert "no sweep made" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
