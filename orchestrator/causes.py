"""Which failed trials failed of one thing. Pure.

A message has numbers and paths in it that differ from trial to trial; where in our own code an exception came from does
not. So failures are grouped by a fingerprint: the type of the exception and the innermost of our frames.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.rows import TrialRow

FRAMES = 3
_FRAME = re.compile(r'^ *File "([^"]*)", line \d+, in (\S+)', re.MULTILINE)
_OWN = re.compile(r"(?:^|[/\\])(?:mixmo_core|orchestrator)[/\\](?:.*[/\\])?([\w.]+)\.py$")
_RAISED = re.compile(r"^([A-Za-z_][\w.]*)(?::|$)", re.MULTILINE)
_VARYING = re.compile(r"0x[0-9a-fA-F]+|(?:/[\w.+-]+){2,}/?|\b[0-9a-f]{12,}\b|[-+]?\d[\d.,]*(?:e[-+]?\d+)?")
UNKNOWN = "no cause was recorded"


@dataclass(frozen=True, slots=True)
class Cause:
    """What several trials failed of."""

    key: str
    """What tells it from other causes. It stays as it is when more trials fail of this one; the name may not."""
    name: str
    """A line for people: what they all say, with … where they differ."""
    kind: str | None
    """`exception`, `crash`, `oom`, `preempted` or `store`; None in rows of earlier versions."""
    fingerprint: str | None
    rows: tuple[TrialRow, ...]


def fingerprint(traceback: str) -> str | None:
    """`DivergedError in step.check < train.train`: without numbers, paths and addresses, so that the same fault has the
    same one in every trial, process and checkout. None of a text that is no traceback.
    """
    last = traceback.rpartition("Traceback (most recent call last):")[2]
    frames = list(_FRAME.finditer(last))
    raised = frames and _RAISED.search(last, frames[-1].end() + 1)
    if not raised:
        return None
    own = [f"{found[1]}.{frame[2]}" for frame in frames if (found := _OWN.search(frame[1]))]
    innermost = " < ".join(reversed(own[-FRAMES:]))
    kind = raised[1].rpartition(".")[2]
    return f"{kind} in {innermost}" if innermost else kind


def causes(rows: Iterable[TrialRow]) -> list[Cause]:
    """The failed trials among these by what they failed of, the most frequent first."""
    groups: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        if row.state == "ERROR":
            groups[_key(row)].append(row)
    found = [
        Cause(key, _name(group), group[0].error_kind, _fingerprint(group[0]), tuple(group))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda cause: (-len(cause.rows), cause.name))


def failed_of(rows: Sequence[TrialRow], text: str) -> list[TrialRow]:
    """The failed trials with this in their cause, whatever the case: in the line of the trial or of its group, in the
    fingerprint, or in the kind.
    """
    wanted = text.lower()

    def says(row: TrialRow, cause: Cause) -> bool:
        said = (row.error_cause, cause.name, cause.fingerprint, cause.kind)
        return any(wanted in each.lower() for each in said if each)

    return [row for cause in causes(rows) for row in cause.rows if says(row, cause)]


def _fingerprint(row: TrialRow) -> str | None:
    return row.error_fingerprint or fingerprint(row.error or "")


def _key(row: TrialRow) -> str:
    return _fingerprint(row) or _blank(row.error_cause or UNKNOWN)


def _name(group: list[TrialRow]) -> str:
    lines = {row.error_cause or UNKNOWN for row in group}
    for shown in (lines, {_blank(line) for line in lines}):
        if len(shown) == 1:
            return next(iter(shown))
    return _fingerprint(group[0]) or next(iter(sorted(lines)))


def _blank(line: str) -> str:
    return _VARYING.sub("…", line)
