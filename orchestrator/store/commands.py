"""What people ask of a running sweep: one small object for each command, in which the driver writes its answer.

    sweeps/<name>/commands/<number>-<8 hex>.json

Whoever gives a command makes its object, once; from then on only the driver writes it. The number is one above the
highest that is there: who has seen a command gives a later one, and no clock has a say. Two that are given at the same
moment have no order that anybody could know.

A command is for one driver, whose fence it names. A later driver answers that it was not carried out: last week's
`stop` ends no sweep of today.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from orchestrator.errors import UnreachableError
from orchestrator.store.objects import Objects

NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}\.json")
KEPT = 50
"""So many commands stay to be read; a new driver deletes those before them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a driver made of a command."""

    done: bool
    """False: it was refused, or given to an earlier driver."""
    text: str
    fence: int
    at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    id: str
    verb: str
    """stop, stop_now, pause, resume, cancel, retry; and share, by which the driver of another sweep tells that it wants
    the same trials. A driver refuses what it does not know."""
    fence: int
    """Of the driver that it is for."""
    given_by: str
    given_at: datetime
    """By the clock of whoever gave it: for people, nothing is decided by it."""
    trials: tuple[str, ...] | None = None
    """Their ids; None stands for all."""
    sweep: str | None = None
    """The one whose driver gives a `share`."""
    answer: Answer | None = None

    def encode(self) -> bytes:
        record = asdict(self)
        del record["id"]
        return json.dumps(record, indent=1, default=datetime.isoformat).encode() + b"\n"

    @classmethod
    def decode(cls, name: str, data: bytes) -> Self:
        """Raises ValueError, KeyError, TypeError or AttributeError if this is no command."""
        record: dict[str, Any] = json.loads(data)
        known = {name: record[name] for name in ("verb", "fence", "given_by")}
        trials, answer = record.get("trials"), record.get("answer")
        words = (known["verb"], known["given_by"], record.get("sweep") or "")
        if not isinstance(known["fence"], int) or not all(isinstance(word, str) for word in words):
            raise TypeError("the fence is no number, or a word is none")
        return cls(
            id=name, **known, given_at=datetime.fromisoformat(record["given_at"]), sweep=record.get("sweep"),
            trials=None if trials is None else tuple(map(str, trials)),
            answer=answer and Answer(**{**answer, "at": datetime.fromisoformat(answer["at"])}),
        )  # fmt: skip


class Commands:
    """The commands to one sweep. Methods raise UnreachableError."""

    def __init__(self, folder: Objects, sweep: str) -> None:
        self._folder, self._key = folder, f"sweeps/{sweep}/commands"

    def give(
        self, verb: str, *, fence: int, given_by: str, trials: Sequence[str] | None = None, sweep: str | None = None
    ) -> Command:
        """Put a command before the driver with this fence."""
        number = 1 + max((int(match[1]) for match in map(NAME.fullmatch, self.names()) if match), default=0)
        command = Command(
            id=f"{number:06d}-{secrets.token_hex(4)}", verb=verb, fence=fence, given_by=given_by,
            given_at=datetime.now(UTC), trials=None if trials is None else tuple(trials), sweep=sweep,
        )  # fmt: skip
        self._folder.create(f"{self._key}/{command.id}.json", command.encode())
        return command

    def get(self, name: str) -> Command | None:
        """A command by its id, as it stands; None where there is none, or something else."""
        stored = self._folder.read(f"{self._key}/{name}.json")
        try:
            return None if stored is None else Command.decode(name, stored.data)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def answer(self, command: Command, answer: Answer) -> None:
        """For the driver alone."""
        self._folder.put(f"{self._key}/{command.id}.json", replace(command, answer=answer).encode())

    def names(self) -> list[str]:
        """In the order in which they were given."""
        found = [name for name in self._folder.names(self._key) if NAME.fullmatch(name)]
        return sorted(found, key=lambda name: (int(name.partition("-")[0]), name))

    def delete(self, name: str) -> None:
        self._folder.delete(f"{self._key}/{name}")


class Inbox:
    """The commands to a sweep as its driver takes them: each once."""

    def __init__(self, commands: Commands, fence: int) -> None:
        self._commands, self._fence = commands, fence
        self._seen: set[str] = set()
        self._begun = False
        self._unsent: dict[str, tuple[Command, Answer]] = {}

    def new(self) -> list[Command]:
        """Those that have come since the last call, in their order; it costs one listing, and a read for each.

        Those to earlier drivers are answered here. One that could not be read, since the store is away, comes again.
        """
        self._send()
        names = self._commands.names()
        if not self._begun:
            for name in names[:-KEPT]:
                self._commands.delete(name)
            names, self._begun = names[-KEPT:], True
        fresh: list[Command] = []
        for name in [name for name in names if name not in self._seen]:
            try:
                command = self._commands.get(name.removesuffix(".json"))
            except UnreachableError:
                break  # with those after it, in their order
            if command is not None and self._is_mine(command):
                fresh.append(command)
            self._seen.add(name)
        return fresh

    def answer(self, command: Command, text: str, *, done: bool = True) -> None:
        """Say what became of it: if the store is away, when commands are next looked for."""
        given = Answer(done=done, text=text, fence=self._fence, at=datetime.now(UTC))
        self._unsent[command.id] = command, given
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(UnreachableError):
            for name, (command, answer) in list(self._unsent.items()):
                self._commands.answer(command, answer)
                del self._unsent[name]

    def _is_mine(self, command: Command) -> bool:
        if command.answer is None and command.fence < self._fence:
            self.answer(command, "the driver that it was given to ended before it took it; give it again", done=False)
        return command.answer is None and command.fence == self._fence
