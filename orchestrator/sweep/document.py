"""A YAML 1.2 document as plain values, each with the place it stands at; and the list of all that is wrong with it."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import SweepError

_MOST_NODES = 100_000
_DEEPEST = 20
_MOST_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was given: `sweeps/width.yaml:12`, or `-S optim.epochs=3`."""

    value: Any
    """None, bool, int, float, str, a list of nodes, or a dictionary from text to nodes."""
    place: str

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


@dataclass(slots=True)
class Faults:
    """Everything wrong with a sweep, told at once: one line each, `place: field: what`."""

    lines: dict[str, int] = field(default_factory=dict)
    """Each with the line of the file that it is about."""

    def add(self, place: str, name: str, message: str) -> None:
        number = re.search(r":(\d+)", place)
        told = f"{place}: {name}: {message}" if name else f"{place}: {message}"
        self.lines[told] = int(number[1]) if number else 0

    def raise_any(self) -> None:
        if self.lines:
            lines = sorted(self.lines, key=self.lines.__getitem__)
            rest = len(lines) - _MOST_FAULTS
            raise SweepError(
                "\n".join([*lines[:_MOST_FAULTS], *([f"... and {rest} more like these"] if rest > 0 else [])])
            )


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'width'?`, or nothing when no allowed word is near."""
    words = list(allowed)
    near = difflib.get_close_matches(word, words, n=1)
    # `widht` is nearer to `model.width` by its last part than as a whole.
    near = near or [each for each in words if difflib.get_close_matches(word, [each.rpartition(".")[2]], n=1)][:1]
    return f"; did you mean '{near[0]}'?" if near else ""


def show(value: Any) -> str:
    """A value as a sweep file would have it, for a message."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(each)}" for key, each in value.items()) + "}"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else str(value)


def read(text: str, source: str, faults: Faults) -> Node | None:
    """The document in `text`, whose lines are told as `source:line`. None when it is no YAML, with the fault added."""
    return _read(text, lambda line: f"{source}:{line + 1}", faults)


def read_value(text: str, place: str, faults: Faults) -> Node | None:
    """One value written as YAML, such as the right side of `-S optim.decay_at=[0.5]`."""
    return _read(text, lambda _line: place, faults)


def _read(text: str, place: Any, faults: Faults) -> Node | None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        faults.add(place(mark.line if mark else 0), "", f"this is not YAML: {_reason(error)}")
        return None
    except YAMLError as error:
        faults.add(place(0), "", f"this is not YAML: {' '.join(str(error).split())}")
        return None
    except RecursionError:
        faults.add(place(0), "", f"lists and mappings are nested more than {_DEEPEST} deep")
        return None
    if root is None:
        return Node(None, place(0))
    return _Builder(yaml.constructor, place, faults).build(root, place(root.start_mark.line), 0)


def _reason(error: Any) -> str:
    if "\\t" in str(error.problem):
        return "a tab where only spaces may stand"
    if "another document" in str(error.problem):
        return "the file holds more than one document (a second `---`)"
    begun = f" ({error.context}, which begins in line {error.context_mark.line + 1})" if error.context_mark else ""
    return f"{error.problem or error.context}{begun}"


@dataclass(slots=True)
class _Builder:
    constructor: Any
    place: Any
    faults: Faults
    nodes: int = 0

    def build(self, node: Any, where: str, depth: int) -> Node:
        """`where` is the place of the key, which is what a reader looks for; elements of a list have their own."""
        self.nodes += 1
        if depth > _DEEPEST or self.nodes > _MOST_NODES:
            # Reached by aliases that contain themselves, or each other many times over.
            self.faults.add(where, "", f"nested more than {_DEEPEST} deep, or more than {_MOST_NODES} values")
            self.faults.raise_any()
        if node.id == "mapping":
            return Node(self._mapping(node, depth), where)
        if node.id == "sequence":
            places = (self.place(each.start_mark.line) for each in node.value)
            return Node([self.build(each, at, depth + 1) for each, at in zip(node.value, places, strict=True)], where)
        return Node(self._scalar(node, where), where)

    def _mapping(self, node: Any, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key, value in node.value:
            where = self.place(key.start_mark.line)
            if key.id != "scalar" or key.tag != "tag:yaml.org,2002:str":
                told = key.value if key.id == "scalar" else "a list" if key.id == "sequence" else "a mapping"
                advice = "; merging is not YAML 1.2, write the keys out" if key.value == "<<" else ""
                self.faults.add(where, "", f"a key must be text (got {told}){advice}")
            elif key.value in found:
                self.faults.add(where, key.value, f"given twice; the first is at {found[key.value].place}")
            else:
                found[key.value] = self.build(value, where, depth + 1)
        return found

    def _scalar(self, node: Any, where: str) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "timestamp":
            return node.value
        if kind not in ("null", "bool", "int", "float", "str"):
            tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
            self.faults.add(where, "", f"the tag {tag} is not allowed: only text, numbers, lists and mappings are")
            return None
        try:
            value = self.constructor.construct_object(node)
        except ValueError as error:
            self.faults.add(where, "", f"{node.value[:40]} is no number: {error}")
            return None
        if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
            self.faults.add(where, "", f"a whole number must fit into 64 bits (got {node.value[:40]})")
            return None
        return value
