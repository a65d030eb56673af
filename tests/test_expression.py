"""Conditions: what they mean (held against Python's own evaluation), and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.expression import Condition, Variable, compile_condition


def _one_of(*words: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in words else f"must be one of {words}"


def _at_least_one(value: Any) -> str | None:
    return None if value == "all" or (not isinstance(value, str) and value >= 1) else "must be at least 1"


VARIABLES = {
    "model.width": Variable("number", _at_least_one),
    "seed": Variable("number", lambda _value: None),
    "data.images": Variable("count", _at_least_one),
    "mixing.method": Variable("text", _one_of("sum", "linear")),
    "optim.decay_at": Variable("list", lambda _value: None),
}


def condition(text: str) -> Condition:
    return compile_condition(text, VARIABLES)


class _Dotted:
    """`model.width` for Python's eval, which here is the reference."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


_NUMBERS = st.one_of(
    st.sampled_from(["model.width", "seed"]),
    st.integers(0, 9).map(str),
    st.floats(0, 9).map(lambda value: f"{value:.2f}"),
)
_SUMS = st.recursive(
    _NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=4,
)
_COMPARISONS = st.one_of(
    st.tuples(_SUMS, st.sampled_from(["<", "<=", ">", ">="]), _SUMS).map(" ".join),
    st.tuples(_SUMS, st.sampled_from(["<", ">="]), _SUMS, st.sampled_from(["<", ">="]), _SUMS).map(" ".join),
    st.tuples(st.sampled_from(["seed"]), st.sampled_from(["==", "!="]), _SUMS).map(" ".join),
    st.tuples(
        st.just("mixing.method"), st.sampled_from(["==", "!="]), st.sampled_from(['"sum"', "'linear'"])
    ).map(" ".join),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(lambda values: f"seed in {values}"),
    st.just("mixing.method not in ('sum', 'linear')"),
)  # fmt: skip
_CONDITIONS = st.recursive(
    _COMPARISONS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda text: f"not {text}"),
    ),
    max_leaves=5,
)


@given(_CONDITIONS, st.integers(1, 9), st.integers(0, 9), st.sampled_from(["sum", "linear"]))
def test_a_condition_means_what_python_means(text: str, width: int, seed: int, method: str) -> None:
    values = {"model.width": width, "seed": seed, "mixing.method": method}
    names = {"model": _Dotted(width=width), "seed": seed, "mixing": _Dotted(method=method)}
    assert condition(text)(values) is bool(eval(text, {}, names))


@given(_CONDITIONS)
def test_a_condition_looks_at_the_settings_it_names(text: str) -> None:
    assert condition(text).names == {name for name in VARIABLES if name in text}


@pytest.mark.parametrize(
    ("text", "images", "holds"),
    [
        ("data.images > 1000000", "all", True),
        ("data.images <= 2000", "all", False),
        ("data.images <= 2000", 1000, True),
        ("data.images == 'all'", "all", True),
        ("data.images == 'all'", 1000, False),
        ("data.images in ['all', 1000]", 1000, True),
        ("data.images / 2 > 100", "all", True),
    ],
)
def test_all_is_more_than_any_number(text: str, images: Any, holds: bool) -> None:
    assert condition(text)({"data.images": images}) is holds


def test_lines_are_joined() -> None:
    assert condition("model.width > 1\n  and seed == 0\n")({"model.width": 2, "seed": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "a call is not allowed"),
        ("max(seed, 3) > 2", "a call is not allowed"),
        ("model.width.__class__ == 1", "no such setting: model.width.__class__"),
        ("(1).real == 1", "takes an attribute of something that is no setting"),
        ("model.width[0] == 1", "a subscript is not allowed"),
        ("(lambda: 1) == 1", "a lambda is not allowed"),
        ("[seed for seed in (1, 2)] == 1", "a listcomp is not allowed"),
        ("(a := 1) == 1", "a namedexpr is not allowed"),
        ("mixing.method == f'{seed}'", "a joinedstr is not allowed"),
        ("1 if seed else 2", "a ifexp is not allowed"),
        ("model.width ** 9 > 1", "no such operation"),
        ("model.width << 9 > 1", "no such operation"),
        ("~seed == 1", "allowed are"),
        ("seed is 1", "write =="),
        ("seed = 1", "equality is =="),
        ("seed ==", "not an expression"),
        ("", "not an expression"),
        ("seed == 1; seed", "not an expression"),
        ("import os", "not an expression"),
        ("seed == True", "neither a number nor quoted text"),
        ("seed == b'a'", "neither a number nor quoted text"),
        ("seed == None", "neither a number nor quoted text"),
        ("model.widht == 1", "did you mean 'model.width'"),
        ("mixing.method == sum", "text stands in quotes: 'sum'"),
        ("mixing.method == 'linaer'", "mixing.method is never 'linaer'"),
        ("'linaer' == mixing.method", "mixing.method is never 'linaer'"),
        ("mixing.method in ['sum', 'linaer']", "mixing.method is never 'linaer'"),
        ("model.width == 0", "model.width is never 0"),
        ("model.width == -1", "model.width is never -1"),
        ("mixing.method == model.width", "never equal"),
        ("'a' == 1", "never equal"),
        ("mixing.method > 'sum'", "mixing.method is text, where a number is needed"),
        ("mixing.method + 1 > 2", "mixing.method is text, where a number is needed"),
        ("(seed == 1) > 0", "is a condition, where a number is needed"),
        ("(seed == 1) == (seed == 2)", "join conditions by"),
        ("seed", "neither true nor false"),
        ("seed and model.width", "neither true nor false"),
        ("not seed", "neither true nor false"),
        ("optim.decay_at == 1", "is a list, which cannot be compared"),
        ("seed == [1, 2]", "a list stands to the right of `in`"),
        ("seed in 3", "a list stands to the right of `in`"),
        ("seed in []", "must be a list of numbers or of quoted text"),
        ("seed in [model.width]", "must be a list of numbers or of quoted text"),
        ("(" * 250 + "seed" + ")" * 250 + " == 1", "not an expression"),
        ("seed == 1 or " * 90 + "seed == 2", "longer than 1000 characters"),
        ("seed == '\0'", "not an expression"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        condition(text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["1 / seed > 1", "1 // seed > 1", "1 % seed > 1", f"{10**400} / 3 > seed"])
def test_arithmetic_that_fails_says_with_which_values(text: str) -> None:
    with pytest.raises(ValueError, match="with seed = 0"):
        condition(text)({"seed": 0})


@given(st.text(alphabet="model.width seed()[]'\"=<>!+-*/%,:0123456789andornotin\\{}@~^&|", max_size=40))
def test_no_text_does_anything_but_hold_or_be_refused(text: str) -> None:
    try:
        holds = condition(text)
    except ValueError:
        return
    try:
        assert holds({"model.width": 2, "seed": 3, "mixing.method": "sum", "data.images": "all"}) in (True, False)
    except ValueError:
        return
