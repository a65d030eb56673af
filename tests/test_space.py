"""What nothing in a store needs any more goes, and nothing else; a sweep is removed whole or not yet."""

import hashlib
import io
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_rows import DEAD, ELSEWHERE, advance, at, epoch, finished, in_a_folder, reached, some_logits, trial

from orchestrator import cli
from orchestrator.errors import NotFoundError, RefusedError, UnreachableError
from orchestrator.population import Copy, Step
from orchestrator.rows import TrialRow
from orchestrator.store import Folder, LeaseLostError, Leftovers, ResultStore
from orchestrator.store.space import AGE_S, ASLEEP_S, STARTING_S, remove

LONG_S = 2 * AGE_S


def put(store: ResultStore, trial_id: str, attempt: int, number: int, *, damaged: bool = False) -> str:
    """A checkpoint; its key."""
    content = f"{trial_id} {number}".encode() * 9
    name = f"epoch-{number:05d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    key = store.attempt(trial_id, 1, attempt, "aa").path_of(name)
    store.folder.put(key, content[:-1] if damaged else content)
    return key


def logits(store: ResultStore, trial_id: str, attempt: int) -> str:
    return store.attempt(trial_id, 1, attempt, "aa").put_logits(some_logits())


def log(store: ResultStore, trial_id: str, attempt: int) -> str:
    return store.attempt(trial_id, 1, attempt, "aa").put_log(0, f"attempt {attempt}")


def later(store: ResultStore, monkeypatch: pytest.MonkeyPatch, seconds: float = LONG_S) -> None:
    """The place's clock goes on; its objects stay as old as they are."""
    clock = store.folder.clock
    monkeypatch.setattr(store.folder, "clock", lambda key: clock(key) + seconds)


def size(store: ResultStore) -> int:
    return sum(store.folder.sizes("").values())


def kinds(found: Leftovers) -> dict[str, str]:
    return {item.key: item.kind for item in found.items}


def clean(store: ResultStore) -> Leftovers:
    """What was told is what is free then, and there is no more to find."""
    found, before = store.leftovers(), size(store)
    assert found.bytes == store.clean(found.items) == before - size(store)
    assert store.leftovers().items == ()
    return found


# ---------------------------------------------------------------------------------------------------- what is needless


def test_what_newer_files_have_made_needless_goes(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    done, begun = trial(0), trial(1)
    old = [put(store, done.trial_id, 1, 2), put(store, done.trial_id, 2, 2), put(store, begun.trial_id, 1, 1)]
    held = [put(store, done.trial_id, 2, 3), put(store, begun.trial_id, 2, 3), put(store, begun.trial_id, 1, 2)]
    held += [logits(store, done.trial_id, 2), logits(store, begun.trial_id, 1), log(store, begun.trial_id, 1)]
    with store.writer("made", sweep_text="") as writer:
        writer.add([epoch(row, number) for row in (done, begun) for number in (1, 2, 3)])
        writer.put([reached(done, 3, checkpoint=held[0], logits=held[3]), reached(begun, 2)])
        store.folder.put(f"trials/{done.trial_id}/notes.txt", b"somebody's own")
    assert store.leftovers().items == ()  # all is young
    later(store, monkeypatch)
    before = store.verify("made")
    assert kinds(clean(store)) == dict.fromkeys(old, "superseded")
    assert set(held) <= set(store.folder.sizes("trials"))
    assert store.verify("made") == before


def test_files_of_trials_that_belong_to_no_sweep_go_with_their_folders(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(store)
    gone = trial(7).trial_id
    keys = [put(store, gone, 1, 2), logits(store, gone, 1), log(store, gone, 1)]
    assert [fault.kind for fault in store.verify("made")] == ["unnamed"]
    later(store, monkeypatch)
    assert kinds(clean(store)) == dict.fromkeys(keys, "orphaned")
    assert store.verify("made") == []


@pytest.mark.parametrize("newest", ["damaged", "whole"])
def test_a_trial_that_is_not_finished_keeps_its_newest_two_whole_checkpoints(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, newest: str
) -> None:
    row = trial()
    keys = [put(store, row.trial_id, 1, number, damaged=number == 9 and newest == "damaged") for number in range(5, 10)]
    with store.writer("made", sweep_text="") as writer:
        writer.put([row.replace(state="ERROR", checkpoint=keys[0])])
    later(store, monkeypatch)
    clean(store)
    kept = [keys[0], *(keys[2:4] if newest == "damaged" else keys[3:])]
    assert store.checkpoints(row.trial_id) == sorted(kept, reverse=True)


def test_what_other_trials_of_a_population_may_go_on_from_stays(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, copy = trial(0), trial(1)
    keys = [put(store, best.trial_id, 1, number) for number in range(1, 7)]
    made = Copy(parent_id=best.trial_id, line="", epoch=1, checkpoint=keys[0], settings={}, before={})
    steps = Step(number=1, epoch=2, value=0.9, checkpoint=keys[1]), Step(number=2, epoch=2, value=0.1, copy=made)
    told = [json.dumps([asdict(step)]) for step in steps]
    with store.writer("made", sweep_text="") as writer:
        writer.put([best.replace(lineage=told[0]), copy.replace(lineage=told[1])])
    later(store, monkeypatch)
    clean(store)
    assert store.checkpoints(best.trial_id) == [*keys[:-3:-1], keys[1], keys[0]]


def test_nothing_of_a_sweep_that_runs_goes(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    row = trial()
    key, orphan = put(store, row.trial_id, 1, 1), put(store, trial(9).trial_id, 1, 1)
    for number in (2, 3, 4):
        put(store, row.trial_id, 1, number)
    with store.writer("made", sweep_text="") as writer:
        writer.put([row])
        writer.flush(force=True)
        store.folder.put(f"sweeps/made/epochs/part-{writer.fence}-000009.parquet", b"soon to be named")
        later(store, monkeypatch)
        assert kinds(clean(store)) == {orphan: "orphaned"}
    assert key in clean_keys(store)


def clean_keys(store: ResultStore) -> set[str]:
    return set(kinds(clean(store)))


def test_a_driver_that_has_just_begun_may_want_any_trial(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, trial().trial_id, 1, 1)
    later(store, monkeypatch, AGE_S + 1)
    with store.writer("made", sweep_text=""):
        monkeypatch.undo()
        later(store, monkeypatch, STARTING_S / 2)
        found = store.leftovers()
        assert (found.items, len(found.notes)) == ((), 1)
        assert "a driver of made has just begun; try again in 5 min" in found.notes[0]
        store.folder.delete("sweeps/made/trials.parquet")  # as before its first write
        told = " ".join(store.leftovers().notes)
        assert "its driver is about to write it" in told
        assert "mixmo rm" not in told


def test_a_driver_that_begins_between_the_look_and_the_deletion_loses_nothing(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = put(store, trial().trial_id, 1, 1)
    later(store, monkeypatch)
    found = store.leftovers()
    assert kinds(found) == {key: "orphaned"}
    with store.writer("made", sweep_text="") as writer:
        writer.put([trial()])
        writer.flush(force=True)
        assert store.clean(found.items) == 0
    assert store.clean(found.items) == 0  # its trial belongs to a sweep now
    assert store.checkpoints(trial().trial_id) == [key]


@pytest.mark.parametrize("lost", ["damaged", "missing", "lease"])
def test_where_a_table_is_damaged_all_files_of_trials_stay(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    key = put(store, trial(9).trial_id, 1, 1)
    finished(store)
    if lost == "missing":
        store.folder.delete("sweeps/made/trials.parquet")
    else:
        store.folder.put(f"sweeps/made/{'lease.json' if lost == 'lease' else 'trials.parquet'}", b"?")
    later(store, monkeypatch)
    before = size(store)
    found = store.leftovers()
    assert found.items == ()
    assert "the files of trials are left alone: " in found.notes[0]
    assert "made" in found.notes[0]
    assert (store.clean(found.items), size(store)) == (0, before)
    assert key in store.folder.sizes("trials")


def test_files_of_epochs_go_when_no_table_names_them(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store)
    needless = [f"sweeps/made/epochs/{name}.parquet" for name in ("part-1-000099", "live-0")]
    for key in needless:
        store.folder.put(key, b"a write that was cut short")
    store.folder.put("sweeps/made/epochs/notes.txt", b"somebody's own")
    assert store.leftovers().items == ()
    later(store, monkeypatch)
    assert kinds(clean(store)) == dict.fromkeys(needless, "epochs")
    assert [fault.text for fault in store.verify("made")] == ["sweeps/made/epochs/notes.txt is no file of mixmo"]


@pytest.mark.parametrize("heard_of", ["dead", "asleep", "given up"])
def test_what_a_driver_that_is_asleep_may_name_stays(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, heard_of: str
) -> None:
    """On another machine, which may be a laptop that was closed between two writes."""
    writer = store.writer("made", sweep_text="", process=DEAD if heard_of == "dead" else ELSEWHERE)
    store.folder.put(f"sweeps/made/epochs/part-{writer.fence}-000009.parquet", b"soon to be named")
    later(store, monkeypatch, ASLEEP_S + 60 if heard_of == "given up" else LONG_S)
    assert bool(store.leftovers().items) == (heard_of != "asleep")


def test_answered_commands_and_claims_of_drivers_that_are_gone_go_after_days(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(store)
    given = {
        "sweeps/made/commands/000001-0123abcd.json": {"verb": "stop", "answer": {"done": True}},
        "sweeps/made/commands/000002-0123abcd.json": {"verb": "stop", "answer": None},
        f"claims/{trial().trial_id}.json": {"sweep": "made", "fence": 1},
        f"claims/{trial(1).trial_id}.json": {"sweep": "running", "fence": 1},
    }
    for key, record in given.items():
        store.folder.put(key, json.dumps(record).encode())
    with store.writer("running", sweep_text=""):
        later(store, monkeypatch)
        assert store.leftovers().items == ()
        later(store, monkeypatch, 3 * 86400.0)
        keys = list(given)
        assert kinds(clean(store)) == {keys[0]: "commands", keys[2]: "claims"}


def test_an_empty_place_has_nothing_needless(tmp_path: Path) -> None:
    assert ResultStore.open(tmp_path / "none").leftovers() == Leftovers(())
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------- any store

_STATES = ("PENDING", "RUNNING", "TERMINATED", "TERMINATED", "TERMINATED", "ERROR", "CANCELLED")


@dataclass(frozen=True)
class File:
    seed: int
    attempt: int
    number: int
    """Of a checkpoint's epoch; 0 is a log, -1 logits."""
    damaged: bool
    young: bool


files = st.builds(
    File, seed=st.integers(0, 2), attempt=st.integers(1, 3), number=st.integers(-1, 4),
    damaged=st.sampled_from([False, False, True]), young=st.sampled_from([False, False, False, True]),
)  # fmt: skip


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    """By seed: the state of a trial, and which of its checkpoints and logits the row names, if any."""
    row = st.tuples(st.sampled_from(_STATES), st.sampled_from([None, 0, 0, 1, 2, 3]), st.booleans())
    rows = st.dictionaries(st.integers(0, 1), row, min_size=1)
    return {
        "rows": draw(rows),
        "runs": draw(st.sampled_from([False, False, True])),
        "damaged": draw(st.sampled_from([False] * 19 + [True])),
    }


def build(store: ResultStore, made: list[File], planned: list[dict[str, Any]]) -> list[Any]:
    """The store, and the writers of the sweeps that run."""
    for file in made:
        trial_id = trial(file.seed).trial_id
        if file.number > 0:
            key = put(store, trial_id, file.attempt, file.number, damaged=file.damaged)
        else:
            key = (log if file.number == 0 else logits)(store, trial_id, file.attempt)
        past = time.time() - (10 if file.young else LONG_S + file.attempt)
        os.utime(at(store, key), (past, past))
    running = []
    for place, plan in enumerate(planned):
        writer = store.writer(f"sweep{place}", sweep_text="")
        for seed, (state, named, with_logits) in plan["rows"].items():
            row = trial(seed)
            checkpoints = store.checkpoints(row.trial_id)
            held = [key for key in store.folder.sizes(f"trials/{row.trial_id}") if "logits" in key]
            number = 3 if state == "TERMINATED" else 0
            writer.add([epoch(row, each) for each in range(1, number + 1)])
            writer.put([reached(
                row, number, state=state,
                checkpoint=checkpoints[named % len(checkpoints)] if named is not None and checkpoints else None,
                logits=held[0] if with_logits and held and state == "TERMINATED" else None,
            )])  # fmt: skip
        writer.flush(force=True)
        if plan["runs"]:
            running.append(writer)
        else:
            writer.close(done=False)
        past = time.time() - LONG_S
        os.utime(at(store, f"sweeps/sweep{place}/lease.json"), (past, past))
        if plan["damaged"]:
            store.folder.put(f"sweeps/sweep{place}/trials.parquet", b"?")
    return running


@given(made=st.lists(files, min_size=8, max_size=25, unique_by=lambda file: (file.seed, file.attempt, file.number)),
       planned=st.lists(sweeps(), min_size=1, max_size=3))  # fmt: skip
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_whatever_a_store_holds_what_any_sweep_needs_stays(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    made: list[File],
    planned: list[dict[str, Any]],
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    store = ResultStore.open(tmp_path_factory.mktemp("any"), create=True)
    running = build(store, made, planned)
    rows = store.all_trial_rows()
    names = [name for name in store.sweeps() if name not in store.damaged_sweeps()]
    faults = {name: store.verify(name) for name in names}
    before = store.folder.sizes("trials")
    ids = {row.trial_id for row in rows}
    whole = {trial_id: [key for key in store.checkpoints(trial_id) if is_whole(store, key)] for trial_id in ids}
    logs = {trial_id: last_log(store, trial_id) for trial_id in ids}
    found = clean(store)
    after = store.folder.sizes("trials")
    gone = set(before) - set(after)
    assert gone == set(kinds(found))

    assert not gone & {key for row in rows for key in (row.checkpoint, row.logits)}
    assert {trial_id: last_log(store, trial_id) for trial_id in ids} == logs
    for row in rows:
        if row.state != "TERMINATED":
            assert not gone & set(whole[row.trial_id][:2])
            assert not any("logits" in key for key in gone if row.trial_id in key)
    for name in names:
        assert all(fault in faults[name] for fault in store.verify(name))
    if any(plan["damaged"] for plan in planned):
        assert not gone
        return
    busy = {trial(seed).trial_id for plan in planned if plan["runs"] for seed in plan["rows"]}
    assert not any(key.split("/")[1] in busy for key in gone)
    orphans = {file.seed for file in made if not file.young} - {seed for plan in planned for seed in plan["rows"]}
    for file in made:
        key = next((key for key in gone if trial(file.seed).trial_id in key and f"/1-{file.attempt}-" in key), "")
        assert not (file.young and f"epoch-{file.number:05d}" in key)
        if file.seed in orphans and not file.young:
            assert key
    del running


def is_whole(store: ResultStore, key: str) -> bool:
    digest = store.folder.digest(key)
    return digest is not None and f"-{digest[:16]}." in key


def last_log(store: ResultStore, trial_id: str) -> str | None:
    try:
        return store.log(trial_id)
    except NotFoundError:
        return None


# --------------------------------------------------------------------------------------------------- removing a sweep


def two_sweeps(store: ResultStore) -> tuple[list[TrialRow], list[TrialRow]]:
    """Finished; the second has taken one trial from the first."""
    rows = []
    for row in (trial(seed) for seed in range(3)):
        given_ = {"checkpoint": put(store, row.trial_id, 1, 3), "logits": logits(store, row.trial_id, 1)}
        log(store, row.trial_id, 1)
        rows.append(row.replace(**given_))
    first, second = rows[:2], [rows[1].replace(cached_from="made"), rows[2]]
    for name, held in (("made", first), ("other", second)):
        with store.writer(name, sweep_text=f"name: {name}\n") as writer:
            for row in held:
                for number in (1, 2, 3):
                    advance(writer, row, number, seq=number)
            writer.close(done=True)
    return first, second


def test_a_removed_sweep_takes_with_it_what_only_it_had(store: ResultStore) -> None:
    first, second = two_sweeps(store)
    told, before = store.belongings("made"), size(store)
    assert (told.trials, told.shared, told.notes) == (2, 1, ())
    assert {key.split("/")[1] for key in told.files} == {first[0].trial_id}
    left = before - store.remove("made") - size(store)
    assert told.bytes == before - size(store) - left
    assert store.sweeps() == ["other"]
    assert list(store.folder.sizes("sweeps/made")) == ["sweeps/made/lease.json"]
    assert -1000 < left < 1000  # the lease, which is as long as the holder's name
    assert store.verify("other") == []
    assert store.trial_rows("other")[0].checkpoint == second[0].checkpoint
    with pytest.raises(NotFoundError, match="no sweep made"):
        store.remove("made")
    assert finished(store)  # a sweep may have the name again


def test_a_sweep_that_runs_is_not_removed(store: ResultStore) -> None:
    with store.writer("made", sweep_text=""):
        for act in (store.belongings, store.remove):
            with pytest.raises(RefusedError, match="sweep made is being run by"):
                act("made")


def test_a_sweep_is_removed_though_its_table_is_damaged(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = two_sweeps(store)
    store.folder.put("sweeps/made/trials.parquet", b"?")
    assert "for `mixmo gc` to take later" in store.belongings("made").notes[0]
    store.remove("made")
    assert store.sweeps() == ["other"]
    later(store, monkeypatch)
    assert {key.split("/")[1] for key in clean_keys(store)} == {first[0].trial_id}


def test_the_files_of_trials_stay_while_another_sweep_cannot_tell_what_it_needs(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_sweeps(store)
    before = store.folder.sizes("trials")
    with store.writer("third", sweep_text="") as writer:
        assert "a driver of third has just begun" in store.belongings("made").notes[0]
        store.remove("made")
        assert store.folder.sizes("trials") == before
        writer.close(done=True)
    later(store, monkeypatch)
    clean(store)
    assert store.verify("other") == []


def test_a_driver_that_was_asleep_does_not_bring_a_removed_sweep_back(store: ResultStore) -> None:
    writer = store.writer("made", sweep_text="", process=DEAD)
    row = advance(writer, trial(), 1)
    writer.flush(force=True)
    store.remove("made")
    advance(writer, row, 2)
    with pytest.raises(LeaseLostError):
        writer.flush(force=True)
    assert store.sweeps() == []
    assert store.damaged_sweeps() == {}
    store.remove("made")  # what it wrote before it saw


class Killed(BaseException):
    """The end of the process."""


_OPERATIONS = {"read", "put", "create", "delete", "names", "sizes", "swap", "modified", "clock", "prune"}


class Mortal(Folder):
    """Whose process is killed at its n-th operation."""

    def __init__(self, root: Path, lives: int) -> None:
        super().__init__(root)
        self.lives = lives

    def __getattribute__(self, name: str) -> Any:
        if name in _OPERATIONS:
            if self.lives <= 0:
                raise Killed
            self.lives -= 1
        return super().__getattribute__(name)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    store = ResultStore.open(tmp_path / "template", create=True)
    two_sweeps(store)
    return tmp_path / "template"


@pytest.mark.slow
def test_wherever_a_removal_is_killed_no_reader_sees_half_a_sweep_and_the_same_again_finishes(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    for lives in range(1000):
        place = tmp_path / "copy"
        shutil.copytree(template, place)
        killed = True
        try:
            remove(Mortal(place, lives), "made", DEAD)
            killed = False
        except Killed:
            pass
        store = ResultStore.open(place)
        assert store.damaged_sweeps() == {}
        for name in store.sweeps():
            assert len(store.epochs(name)) == 3 * len(store.trial_rows(name))
            assert len(store.trial_rows(name)) == 2 or name == "made"
        assert [fault for fault in store.verify("other") if fault.kind != "unnamed"] == []
        if "made" in store.sweeps():
            assert [fault for fault in store.verify("made") if fault.kind != "unnamed"] == []
        if killed:
            try:
                store.remove("made")
            except NotFoundError:  # it was almost through
                assert list(store.folder.sizes("sweeps/made")) == ["sweeps/made/lease.json"]
        assert store.sweeps() == ["other"]
        later(store, monkeypatch)
        clean(store)
        assert {key.split("/")[1] for key in store.folder.sizes("trials")} == {trial(1).trial_id, trial(2).trial_id}
        assert store.verify("other") == []
        monkeypatch.undo()
        shutil.rmtree(place)
        if not killed:
            break
    assert 30 < lives < 999


def test_a_store_that_goes_away_in_the_middle_is_said_so(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    two_sweeps(store)
    delete = store.folder.delete

    def refuse(key: str) -> None:
        if not key.rpartition("/")[2].startswith("."):
            raise UnreachableError("no right to delete")
        delete(key)

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "delete", refuse)
        with pytest.raises(UnreachableError, match="no right to delete"):
            store.remove("made")
    assert store.trial_rows("made") == []
    store.remove("made")
    assert store.sweeps() == ["other"]


@in_a_folder
def test_what_a_killed_writer_left_unfinished_goes_too(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, trial(9).trial_id, 1, 1)
    torn = at(store, key).with_name(".epoch-00002.pt.0123.tmp")
    torn.write_bytes(b"half")
    os.utime(torn, (1, 1))
    later(store, monkeypatch)
    clean(store)
    assert list(at(store, "trials").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def old(tmp_path: Path) -> ResultStore:
    """Two finished sweeps, and a checkpoint of a trial that belongs to neither; all some hours old."""
    store = ResultStore.open(tmp_path / "results", create=True)
    two_sweeps(store)
    put(store, trial(9).trial_id, 1, 1)
    for key in store.folder.sizes(""):
        os.utime(at(store, key), (time.time() - LONG_S,) * 2)
    return store


def shell(store: ResultStore, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--results", store.uri])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_gc_shows_what_goes_and_deletes_it_only_when_it_may(
    old: ResultStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (item,) = old.leftovers().items
    for words, told in ((["gc"], "nothing was deleted: --yes deletes it"), (["gc", "--dry-run", "--yes"], "")):
        code, out, err = shell(old, capsys, *words)
        assert (code, told in err) == (0, True)
        assert f"{item.bytes} B       1  files of trials that belong to no sweep" in out
        assert item.key in old.folder.sizes("trials")
    told_json = json.loads(shell(old, capsys, "gc", "--json")[1])
    assert (told_json["schema"], told_json["bytes"], told_json["deleted"]) == ("mixmo.gc/1", item.bytes, False)
    code, out, err = shell(old, capsys, "gc", "--yes")
    assert (code, err) == (0, f"{item.bytes} B freed\n")
    assert shell(old, capsys, "gc") == (0, f"nothing needless in {old.uri}\n", "")
    nowhere = ResultStore.open(tmp_path / "nowhere")
    assert shell(nowhere, capsys, "gc", "--yes") == (0, f"nothing needless in {nowhere.uri}\n", "")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("answer", ["y", "n"])
def test_gc_asks_where_there_is_somebody(
    old: ResultStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    somebody(monkeypatch, answer)
    code, _, err = shell(old, capsys, "gc")
    assert code == 0
    assert "Delete 1 object" in err
    assert bool(old.leftovers().items) == (answer == "n")


def somebody(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)


def test_rm_refuses_where_nobody_can_be_asked(old: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = shell(old, capsys, "rm", "made")
    assert (code, err) == (6, "mixmo: made is not removed: nobody can be asked here. --yes removes it\n")
    assert "the files of 1 trial stay: another sweep has them too" in out
    assert shell(old, capsys, "rm", "made", "--dry-run", "--json")[0] == 0
    assert shell(old, capsys, "rm", "made", "nothing", "--yes")[0] == 5  # and removes neither
    assert old.sweeps() == ["made", "other"]


@pytest.mark.parametrize("answer", ["made", "mad"])
def test_rm_asks_for_the_name(
    old: ResultStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    somebody(monkeypatch, answer)
    code, _, err = shell(old, capsys, "rm", "made")
    assert "Type made to remove it" in err
    assert (code, old.sweeps()) == ((0, ["other"]) if answer == "made" else (4, ["made", "other"]))


def test_rm_of_several_takes_with_the_last_what_they_shared(
    old: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = shell(old, capsys, "rm", "made", "other", "--yes", "--json")
    told = json.loads(out)["sweeps"]
    assert (code, [each["shared"] for each in told]) == (0, [1, 0])
    assert all(abs(each["freed_bytes"] - each["bytes"]) == 0 for each in told)
    assert {key.split("/")[1] for key in old.folder.sizes("trials")} == {trial(9).trial_id}
