"""Conditions of a sweep file: what they may name, and where they stand."""

import functools
from dataclasses import dataclass
from typing import get_origin

from orchestrator.sweep.document import Node, show
from orchestrator.sweep.expression import Condition, Kind, Variable, compile_condition
from orchestrator.sweep.fields import Field, Reader, settings


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition and where it stands."""

    condition: Condition
    place: str
    path: str

    @property
    def key(self) -> str:
        return f"{self.place} {self.condition.text}"


def read_rule(node: Node, path: str, reader: Reader) -> Rule | None:
    text = reader.text(node, path)
    if text is None:
        return None
    try:
        return Rule(compile_condition(text, _variables()), node.place, path)
    except ValueError as error:
        reader.faults.add(node.place, path, f"{show(text)}: {error}")
        return None


@functools.cache
def _variables() -> dict[str, Variable]:
    return {name: _variable(name, each) for name, each in settings().items()}


def _variable(name: str, setting: Field) -> Variable:
    if setting.hint in (int, float):
        kind: Kind = "number"
    elif get_origin(setting.hint) is tuple:
        kind = "list"
    else:
        kind = "text" if setting.is_text else "count"
    return Variable(kind, functools.partial(setting.refuses, name.rpartition(".")[2]))
