"""Conditions over settings, as `when` and `exclude` give them: `model.width == 10 and model.subnetworks > 3`.

Comparisons, arithmetic, `in`, `and`, `or`, `not` over settings by dotted name, numbers and quoted text; nothing can be
called, indexed or assigned. Python's parser reads the text, a whitelist turns its tree into functions, and eval() is
never used. Every part has a kind before anything is evaluated, so that a comparison which can never hold is refused.
"""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.sweep.document import nearest, show

Kind = Literal["number", "count", "text", "truth", "list"]
"""Of a setting or a part. A `count` is a whole number or 'all', which is more than any number."""
Values = Mapping[str, Any]

_LONGEST = 1000
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right, ast.NotIn: lambda left, right: left not in right,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_ALLOWED = "settings, numbers, quoted text, == != < <= > >=, in, + - * / // %, and, or, not, parentheses"


@dataclass(frozen=True, slots=True)
class Variable:
    """What an expression may know of a setting."""

    kind: Kind
    refuses: Callable[[Any], str | None]
    """Why the setting can never have a value; None when it can."""


@dataclass(frozen=True, slots=True)
class Condition:
    text: str
    names: frozenset[str]
    """The settings it looks at."""
    _holds: Callable[[Values], Any]

    def __call__(self, values: Values) -> bool:
        """Whether it holds for a config, given by dotted name. ValueError when it divides by zero or overflows."""
        try:
            return bool(self._holds(values))
        except ArithmeticError as error:
            raise ValueError(
                f"{error}, with {', '.join(f'{n} = {show(values[n])}' for n in sorted(self.names))}"
            ) from None


@dataclass(frozen=True, slots=True)
class _Part:
    kind: Kind
    value: Callable[[Values], Any]
    text: str
    setting: str | None = None
    constants: tuple[Any, ...] = ()
    """Of a literal, or of a list of literals."""

    def number(self) -> Callable[[Values], Any]:
        """As arithmetic and ordering take it."""
        if self.kind == "number":
            return self.value
        if self.kind != "count":
            raise ValueError(f"{self.text} is {_SAID[self.kind]}, where a number is needed")
        value = self.value
        return lambda values: math.inf if value(values) == "all" else value(values)

    def truth(self) -> Callable[[Values], Any]:
        if self.kind != "truth":
            raise ValueError(f"{self.text} is {_SAID[self.kind]}, neither true nor false; compare it with something")
        return self.value


_SAID: dict[Kind, str] = {
    "number": "a number",
    "count": "a number",
    "text": "text",
    "truth": "a condition",
    "list": "a list",
}


def compile_condition(text: str, variables: Mapping[str, Variable]) -> Condition:
    """The condition that `text` states. ValueError when it states none, or one that this language does not have."""
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            line = " ".join(text.split())
            tree = ast.parse(line, mode="eval").body
        reader = _Reader(variables, line)
        return Condition(text, frozenset(reader.named(tree)), reader.part(tree).truth())
    except SyntaxError as error:
        equals = ", and equality is ==" if re.search(r"[^=<>!]=[^=]", text) else ""
        raise ValueError(f"not an expression ({error.msg}); allowed are {_ALLOWED}{equals}") from None
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True, slots=True)
class _Reader:
    variables: Mapping[str, Variable]
    source: str

    def named(self, tree: ast.AST) -> Iterable[str]:
        return (name for node in ast.walk(tree) if (name := _dotted(node)) in self.variables and name)

    def part(self, node: ast.expr) -> _Part:
        text = ast.get_source_segment(self.source, node) or self.source
        readers: dict[type[ast.expr], Callable[[Any, str], _Part]] = {
            ast.Name: self._setting,
            ast.Attribute: self._setting,
            ast.Constant: self._constant,
            ast.List: self._list,
            ast.Tuple: self._list,
            ast.BoolOp: self._junction,
            ast.UnaryOp: self._unary,
            ast.BinOp: self._arithmetic,
            ast.Compare: self._comparison,
        }
        if type(node) not in readers:
            raise ValueError(f"{text}: a {type(node).__name__.lower()} is not allowed; allowed are {_ALLOWED}")
        return readers[type(node)](node, text)

    def _constant(self, node: ast.Constant, text: str) -> _Part:
        value = node.value
        if isinstance(value, str):
            return _Part("text", lambda _values: value, text, constants=(value,))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _Part("number", lambda _values: value, text, constants=(value,))
        raise ValueError(f"{text} is neither a number nor quoted text")

    def _setting(self, node: ast.expr, text: str) -> _Part:
        name = _dotted(node)
        if name is None:
            raise ValueError(f"{text} takes an attribute of something that is no setting; allowed are {_ALLOWED}")
        if name not in self.variables:
            quoted = "" if "." in name else f" (text stands in quotes: '{name}')"
            raise ValueError(f"no such setting: {name}{nearest(name, self.variables)}{quoted}")
        kind = self.variables[name].kind
        if kind == "list":
            raise ValueError(f"{name} is a list, which cannot be compared")
        return _Part(kind, lambda values: values[name], text, setting=name)

    def _list(self, node: ast.List | ast.Tuple, text: str) -> _Part:
        parts = [self.part(each) for each in node.elts]
        if not parts or not all(part.constants for part in parts):
            raise ValueError(f"{text} must be a list of numbers or of quoted text")
        constants = tuple(part.constants[0] for part in parts)
        return _Part("list", lambda _values: constants, text, constants=constants)

    def _junction(self, node: ast.BoolOp, text: str) -> _Part:
        parts = [self.part(each).truth() for each in node.values]
        every = all if isinstance(node.op, ast.And) else any
        return _Part("truth", lambda values: every(part(values) for part in parts), text)

    def _unary(self, node: ast.UnaryOp, text: str) -> _Part:
        inner = self.part(node.operand)
        if isinstance(node.op, ast.Not):
            holds = inner.truth()
            return _Part("truth", lambda values: not holds(values), text)
        if not isinstance(node.op, ast.USub | ast.UAdd):
            raise ValueError(f"{text}: allowed are {_ALLOWED}")
        number, sign = inner.number(), -1 if isinstance(node.op, ast.USub) else 1
        constants = tuple(sign * each for each in inner.constants)
        return _Part("number", lambda values: sign * number(values), text, constants=constants)

    def _arithmetic(self, node: ast.BinOp, text: str) -> _Part:
        if type(node.op) not in _ARITHMETIC:
            raise ValueError(f"{text}: no such operation; allowed are {_ALLOWED}")
        operation = _ARITHMETIC[type(node.op)]
        left, right = self.part(node.left).number(), self.part(node.right).number()
        return _Part("number", lambda values: operation(left(values), right(values)), text)

    def _comparison(self, node: ast.Compare, text: str) -> _Part:
        parts = [self.part(each) for each in (node.left, *node.comparators)]
        tests = [
            self._test(left, operation, right, text)
            for left, operation, right in zip(parts, node.ops, parts[1:], strict=False)
        ]
        return _Part("truth", lambda values: all(test(values) for test in tests), text)

    def _test(self, left: _Part, operation: ast.cmpop, right: _Part, text: str) -> Callable[[Values], bool]:
        if type(operation) not in _COMPARISONS:
            raise ValueError(f"{text}: `is` has no meaning here; write ==")
        compare = _COMPARISONS[type(operation)]
        if isinstance(operation, ast.Lt | ast.LtE | ast.Gt | ast.GtE):
            first, second = left.number(), right.number()
            return lambda values: compare(first(values), second(values))
        if isinstance(operation, ast.In | ast.NotIn) != (right.kind == "list") or left.kind == "list":
            raise ValueError(f"{text}: a list stands to the right of `in`, and nowhere else")
        if "truth" in (left.kind, right.kind):
            raise ValueError(f"{text}: join conditions by `and`, `or`, `not`")
        self._hold_possible(left, right)
        self._hold_possible(right, left)
        return lambda values: compare(left.value(values), right.value(values))

    def _hold_possible(self, setting: _Part, other: _Part) -> None:
        """Refuse to compare a setting with what it can never be: a typing error would exclude nothing, silently."""
        for constant in other.constants if setting.setting else ():
            if reason := self.variables[setting.setting or ""].refuses(constant):
                raise ValueError(f"{setting.setting} is never {show(constant)}: it {reason}")
        if {setting.kind, other.kind} == {"text", "number"}:
            raise ValueError(f"{setting.text} and {other.text} are never equal: one is text, the other a number")


def _dotted(node: ast.AST) -> str | None:
    """`model.width` of the tree that Python's parser makes of it."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := _dotted(node.value)):
        return f"{head}.{node.attr}"
    return None
