"""What each field may hold, in words and in fact; typed values out of a document, and how a wrong one is refused."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mixmo_core.config import Setting, check_limits, leaves
from orchestrator.sweep.document import Faults, Node, nearest, show

Given = dict[str, Node]
"""Settings by dotted name: typed values, each with its place."""
MISSING: Any = object()
"""In place of a value that was refused."""
UNIONS: tuple[Any, ...] = (Union, types.UnionType)


@dataclass(frozen=True, slots=True)
class Field:
    """A setting, or a key of a section."""

    hint: Any
    setting: Setting
    default: Any = None

    @property
    def allowed(self) -> str:
        """What it may be: `'all' or a whole number of at least 1`."""
        limits = {"at least": self.setting.at_least, "above": self.setting.above, "at most": self.setting.at_most}
        told = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        return f"{_spoken(self.hint)}, {told}" if told else _spoken(self.hint)

    @property
    def is_text(self) -> bool:
        return _is_literal(self.hint)

    def refuses(self, name: str, value: Any) -> str | None:
        """Why it cannot have this value, as `must be ...`; None when it can."""
        try:
            check_limits(name, taken(self.hint, value), self.setting)
        except ValueError:
            words = _words(self.hint)
            near = nearest(value, words) if isinstance(value, str) else ""
            given = f"the text {show(value)}" if isinstance(value, str) and not words else show(value)
            return f"must be {self.allowed} (got {given}){near}"
        return None


def _is_literal(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is Literal


def _spoken(hint: Any) -> str:
    if _is_literal(hint):
        words = [show(each) for each in get_args(hint)]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if get_origin(hint) in UNIONS:
        words_first = sorted(get_args(hint), key=lambda each: not _is_literal(each))
        return " or ".join(_spoken(each) for each in words_first if each is not type(None))
    simple: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return simple.get(hint) or "a list of numbers"


def _words(hint: Any) -> list[str]:
    """The texts that a hint allows."""
    if _is_literal(hint):
        return [each for each in get_args(hint) if isinstance(each, str)]
    return [word for each in get_args(hint) for word in _words(each)]


def taken(hint: Any, value: Any) -> Any:
    """The value as its type hint has it. Nothing is guessed: text is no number, 3.0 and true are no whole numbers, but
    a whole number is a number. Raises ValueError.
    """
    if get_origin(hint) in UNIONS:
        for each in get_args(hint):
            with contextlib.suppress(ValueError):
                return taken(each, value)
    elif _is_literal(hint):
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif get_args(hint) == (float, ...):
        if isinstance(value, tuple):
            return tuple(taken(float, each) for each in value)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{value!r} is not {hint}")


@functools.cache
def settings() -> dict[str, Field]:
    """Every setting of a trial by dotted name, in order."""
    return {name: Field(spec.type, spec.metadata["setting"], spec.default) for name, spec in leaves()}


@functools.cache
def fields_of(section: Any) -> dict[str, Field]:
    """The keys of a section that stands beside `trial`."""
    hints = get_type_hints(section)
    specs = [spec for spec in dataclasses.fields(section) if "setting" in spec.metadata]
    return {spec.name: Field(hints[spec.name], spec.metadata["setting"], spec.default) for spec in specs}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What stands for each value of a setting, and where that was given."""

    values: Mapping[Any, Any]
    place: str


@dataclass(frozen=True, slots=True)
class Reader:
    """Takes a document's nodes for what they should be. What they are not becomes a fault, under the dotted `path`."""

    faults: Faults

    def mapping(self, node: Node, path: str) -> dict[str, Node]:
        if isinstance(node.value, dict):
            return node.value
        empty = "; fill it, or leave it out" if node.value is None else ""
        self.faults.add(node.place, path, f"must be a mapping (got {show(node.plain())}){empty}")
        return {}

    def elements(self, node: Node, path: str) -> list[Node]:
        if isinstance(node.value, list) and node.value:
            return node.value
        self.faults.add(
            node.place, path, f"must be a list of at least one element, each behind a `-` (got {show(node.plain())})"
        )
        return []

    def text(self, node: Node, path: str) -> str | None:
        if isinstance(node.value, str) and node.value.strip() and "\n" not in node.value.strip():
            return node.value.strip()
        self.faults.add(node.place, path, f"must be one line of text (got {show(node.plain())})")
        return None

    def entries(self, node: Node, path: str, known: Iterable[str]) -> dict[str, Node]:
        """The entries of a mapping that are known; the others are faults."""
        allowed = list(known)
        for key, child in self.mapping(node, path).items():
            if key not in allowed:
                told = f"no such key; allowed are {', '.join(allowed)}{nearest(key, allowed)}"
                self.faults.add(child.place, f"{path}.{key}" if path else key, told)
        return {key: child for key, child in self.mapping(node, path).items() if key in allowed}

    def typed(self, field: Field, node: Node, path: str) -> Any:
        """The value as the field's type has it, or MISSING."""
        value = node.plain()
        if isinstance(value, list):
            value = tuple(value)
        if reason := field.refuses(path.rpartition(".")[2], value):
            self.faults.add(node.place, path, reason)
            return MISSING
        return taken(field.hint, value)

    def named(self, node: Node, path: str, prefix: str = "") -> Iterator[tuple[str, Node]]:
        """(dotted name, node) of a mapping of settings, nested by section or dotted."""
        for key, child in self.mapping(node, path).items():
            name = prefix + key
            if name in settings():
                yield name, child
            elif any(each.startswith(f"{name}.") for each in settings()):
                yield from self.named(child, f"{path}.{key}", f"{name}.")
            else:
                sections = {each.partition(".")[0] for each in settings() if "." in each}
                self.faults.add(
                    child.place, f"{path}.{key}", f"no such setting{nearest(name, [*settings(), *sections])}"
                )

    def given(self, node: Node, path: str, exchanges: dict[str, Exchange] | None = None) -> Given:
        """Settings with one value each. `exchanges` takes those that have `{from: [...], to: [...]}` instead."""
        given: Given = {}
        places: dict[str, str] = {}
        for name, child in self.named(node, path):
            where = f"{path}.{name}"
            if name in places:
                self.faults.add(child.place, where, f"given twice; the first is at {places[name]}")
                continue
            places[name] = child.place
            if exchanges is not None and isinstance(child.value, dict):
                exchanges[name] = self.exchange(settings()[name], child, where)
            elif (value := self.typed(settings()[name], child, where)) is not MISSING:
                given[name] = Node(value, child.place)
        return given

    def exchange(self, field: Field, node: Node, path: str) -> Exchange:
        """What `{from: [2, 5], to: [1, 2]}` puts in the place of each value."""
        entries = self.entries(node, path, ("from", "to"))
        lists = [
            [self.typed(field, each, f"{path}.{key}") for each in self.elements(child, f"{path}.{key}")]
            for key in ("from", "to")
            if (child := entries.get(key))
        ]
        sizes = [len(values) for values in lists]
        if len(lists) < 2 or len(set(sizes)) > 1:
            rule = "must be {from: [...], to: [...]}, two lists of one length: a value and what stands for it"
            self.faults.add(node.place, path, f"{rule} (got {show(node.plain())})")
            return Exchange({}, node.place)
        return Exchange(dict(zip(*lists, strict=True)), node.place)
