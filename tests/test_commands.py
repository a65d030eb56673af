"""Commands as objects: their order, who takes them, and what is not one."""

import threading

import pytest
from made_rows import begin, in_a_folder

from orchestrator.errors import UnreachableError
from orchestrator.store import Answer, Command, Inbox, ResultStore
from orchestrator.store.objects import Stored


def answered(store: ResultStore, command: Command) -> Answer | None:
    found = store.commands("made").get(command.id)
    assert found is not None
    return found.answer


def test_a_command_is_taken_once_in_its_order_and_answered_in_place(store: ResultStore) -> None:
    commands = store.commands("made")
    given = [commands.give(verb, fence=3, given_by="ada@lab", trials=ids) for verb, ids in (
        ("pause", None), ("resume", None), ("cancel", ["0123456789ab"]),
    )]  # fmt: skip
    inbox = Inbox(store.commands("made"), fence=3)
    assert inbox.new() == given
    assert inbox.new() == []
    late = commands.give("stop", fence=3, given_by="bob@lab")
    assert inbox.new() == [late]
    inbox.answer(given[2], "1 trial cancelled")
    inbox.answer(late, "no", done=False)
    answer = answered(store, given[2])
    assert answer is not None
    assert (answer.done, answer.text, answer.fence) == (True, "1 trial cancelled", 3)
    refusal = answered(store, late)
    assert refusal is not None
    assert not refusal.done
    assert answered(store, given[0]) is None
    assert (given[2].trials, given[0].trials) == (("0123456789ab",), None)
    assert inbox.new() == []
    assert Inbox(commands, fence=3).new() == given[:2]  # what has its answer is over


@in_a_folder
def test_a_store_that_goes_away_between_two_commands_loses_neither(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = store.commands("made")
    first, second = (commands.give(verb, fence=1, given_by="ada@lab") for verb in ("pause", "stop"))
    inbox, read = Inbox(commands, fence=1), store.folder.read

    def away(key: str) -> Stored | None:
        if second.id in key:
            raise UnreachableError("the store is away")
        return read(key)

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "read", away)
        assert inbox.new() == [first]
        assert inbox.new() == []
    assert inbox.new() == [second]


@in_a_folder
def test_an_answer_that_the_store_did_not_take_is_given_when_it_is_back(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = store.commands("made").give("stop", fence=1, given_by="ada@lab")
    inbox = Inbox(store.commands("made"), fence=1)
    inbox.new()

    def away(key: str, data: bytes) -> None:
        raise UnreachableError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "put", away)
        inbox.answer(command, "stopping")
    assert answered(store, command) is None
    assert inbox.new() == []
    answer = answered(store, command)
    assert answer is not None
    assert (answer.done, answer.text) == (True, "stopping")


def test_a_driver_takes_no_command_that_was_given_to_another(store: ResultStore) -> None:
    commands = store.commands("made")
    old, mine, later = (commands.give("stop", fence=fence, given_by="ada@lab") for fence in (1, 2, 3))
    assert Inbox(commands, fence=2).new() == [mine]
    assert answered(store, later) is None
    told = answered(store, old)
    assert told is not None
    assert (told.done, told.fence) == (False, 2)


def test_commands_that_are_given_at_once_are_all_there(store: ResultStore) -> None:
    threads = [
        threading.Thread(
            target=lambda: ResultStore.open(store.uri).commands("made").give("stop", fence=1, given_by="a")
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Inbox(store.commands("made"), fence=1).new()) == 8


def test_the_hundredth_command_comes_after_the_ninth_and_the_oldest_go(store: ResultStore) -> None:
    commands = store.commands("made")
    for _ in range(53):
        commands.give("pause", fence=1, given_by="ada@lab")
    assert [int(name.partition("-")[0]) for name in commands.names()] == list(range(1, 54))
    inbox = Inbox(commands, fence=2)
    assert inbox.new() == []
    assert [int(name.partition("-")[0]) for name in commands.names()] == list(range(4, 54))
    assert int(commands.give("stop", fence=2, given_by="ada@lab").id.partition("-")[0]) == 54


def test_what_is_no_command_is_passed_over(store: ResultStore) -> None:
    for name, data in {
        "000001-01234567.json": b"", "000002-01234567.json": b"[]", "000003-01234567.json": b'{"verb": "stop"}',
        "000004-01234567.json": b'{"verb": "stop", "fence": "1", "given_by": "a", "given_at": "2026-01-01T00:00:00"}',
        "000005-01234567.json": b'{"verb": ["stop"], "fence": 1, "given_by": "a", "given_at": "2026-01-01T00:00:00"}',
        "000006-01234567.json": b'{"verb": "stop", "fence": 1, "given_by": {}, "given_at": "2026-01-01T00:00:00"}',
        "000007-01234567.json": (
            b'{"verb": "share", "fence": 1, "given_by": "a", "given_at": "2026-01-01T00:00:00", "sweep": 1}'
        ),
        "notes.txt": b"not mine",
    }.items():  # fmt: skip
        store.folder.put(f"sweeps/made/commands/{name}", data)
    command = store.commands("made").give("stop", fence=1, given_by="ada@lab")
    assert command.id.startswith("000008-")
    assert Inbox(store.commands("made"), fence=1).new() == [command]
    assert store.folder.read("sweeps/made/commands/notes.txt") is not None


def test_commands_disturb_no_reader(store: ResultStore) -> None:
    with begin(store):
        store.commands("made").give("stop", fence=1, given_by="ada@lab")
    assert store.sweeps() == ["made"]
    assert store.trial_rows("made") == []
    assert store.verify("made") == []
