"""The values that a search draws: ranges and choices, with conditions; and how a random search draws them. Pure."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mixmo_core.config import Setting
from orchestrator.sweep.document import Node, show
from orchestrator.sweep.fields import MISSING, Field, Given, Reader, settings
from orchestrator.sweep.rules import Rule, read_rule

Draw = Callable[[str, "Range"], Any]
"""A value for the setting with this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The values that a search may give a setting: between two limits, both included, or one of several."""

    min: float | None = None
    max: float | None = None
    scale: Literal["linear", "log"] = "linear"
    step: float | None = None
    choices: tuple[Any, ...] = ()
    whole: bool = False
    """Whether only whole numbers will do."""
    when: Rule | None = field(default=None, compare=False)
    """Drawn only where this holds; elsewhere the setting is what it is without the search."""

    def __post_init__(self) -> None:
        if self.choices:
            return self._check_choices()
        if self.min is None or self.max is None:
            raise ValueError(f"{'min' if self.min is None else 'max'} must be given, as for every range; or choices")
        if not self.min < self.max:
            raise ValueError(f"min must be below max, got {self.min:g} and {self.max:g}")
        if self.scale == "log" and self.min <= 0:
            raise ValueError(f"min must be above 0 on a log scale, got {self.min:g}")
        if self.step is not None and self.scale == "log":
            raise ValueError(f"step goes with a linear scale only, got {self.step:g} on a log scale")
        if self.step is not None and self.step > self.max - self.min:
            raise ValueError(f"step must be at most max - min, {self.max - self.min:g}, got {self.step:g}")
        return None

    def _check_choices(self) -> None:
        given = {"min": self.min, "max": self.max, "step": self.step}
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(f"{name} goes with a range between limits, not with choices")
        if self.scale != "linear":
            raise ValueError("scale goes with a range between limits, not with choices")

    def at(self, share: float) -> Any:
        """The value that lies so far, 0 to 1 exclusive, from the first to the last: every value, or every part of the
        range on its scale, has the same share.
        """
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        assert self.min is not None
        assert self.max is not None
        if self.scale == "log":
            half = 0.5 if self.whole else 0.0  # so that the two ends get whole shares as well
            low, high = math.log(self.min - half), math.log(self.max + half)
            return self.tidy(math.exp(low + share * (high - low)))
        if self.step is None and not self.whole:
            return self.tidy(self.min + share * (self.max - self.min))
        step = self.step or 1
        return self.tidy(self.min + step * int(share * (round((self.last - self.min) / step) + 1)))

    @property
    def last(self) -> float:
        """The greatest value that there is: `max`, or the last step before it."""
        assert self.min is not None
        assert self.max is not None
        return self.min + self.step * int((self.max - self.min) / self.step + 1e-9) if self.step else self.max

    def has(self, value: float) -> bool:
        """Whether it may be drawn."""
        if self.choices:
            return value in self.choices
        if self.min is None or not self.min <= value <= self.last + 1e-12:
            return False
        steps = (value - self.min) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-8

    def nearest(self, value: float) -> Any:
        """The value of a range between limits that lies closest to this one."""
        assert self.min is not None
        step = self.step or (1 if self.whole else None)
        return self.tidy(self.min + step * round((value - self.min) / step) if step else value)

    def tidy(self, value: float) -> Any:
        """The value as a config has it: of six digits, which a person can type again, between the limits."""
        assert self.min is not None
        tidied = round(value) if self.whole else float(f"{value:.{12 if self.step else 6}g}")
        return min(max(tidied, self.min), self.last)


@dataclass(frozen=True, slots=True)
class Space:
    """All ranges of a search, in the file's order."""

    ranges: Mapping[str, Range] = field(default_factory=dict)
    place: str = ""

    def draw(self, given: Given, choose: Draw) -> Given:
        """What a draw puts over the settings of a cell. A condition sees the ranges before its own as drawn."""
        drawn: Given = {}
        for name, each in self.ranges.items():
            if each.when is None or each.when.condition(_values(each.when, given | drawn)):
                drawn[name] = Node(choose(name, each), self.place)
        return drawn


def _values(rule: Rule, given: Given) -> dict[str, Any]:
    return {name: given[name].value if name in given else settings()[name].default for name in rule.condition.names}


def at_random(seed: int, number: int) -> Draw:
    """The draw with this number. It hangs on nothing else than its range: not on the cell, not on how many draws there
    are, not on other ranges. So all cells get the same values, more draws leave the first ones as they are, and any
    concurrency gives the same trials.
    """

    def choose(name: str, each: Range) -> Any:
        digits = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
        return each.at(int.from_bytes(digits[:6], "big") / 2**48)

    return choose


def corners() -> Iterator[Draw]:
    """Draws of the least and the greatest of all values, and of each choice: what cannot be trained there is told
    before anything starts.
    """
    yield lambda _, each: each.at(0.0)
    yield lambda _, each: each.at(math.nextafter(1.0, 0.0))


# ------------------------------------------------------------------------------------------------------------- reading

KEYS = ("min", "max", "scale", "step", "choices", "when")
SCALE = Field(Literal["linear", "log"], Setting("linear", "How values lie between the limits."))
STEP = Field(float, Setting(None, "Distance between two values, counted from min.", above=0))


def read_ranges(node: Node, path: str, reader: Reader) -> Any:
    """Ranges by dotted name; MISSING when one of them was refused."""
    before = len(reader.faults.lines)
    ranges = {name: _read_range(name, child, f"{path}.{name}", reader) for name, child in reader.named(node, path)}
    return ranges if len(reader.faults.lines) == before else MISSING


def _read_range(name: str, node: Node, path: str, reader: Reader) -> Range | None:
    setting = settings()[name]
    if name == "seed":
        reader.faults.add(node.place, path, "seeds are listed under `seeds`: each draw gets all of them")
        return None
    entries = reader.entries(node, path, KEYS)
    limited = [key for key in entries if key in ("min", "max", "scale", "step")]
    if limited and setting.hint not in (int, float):
        told = f"only settings that are numbers have {limited[0]}; give this one `choices: [...]`"
        reader.faults.add(entries[limited[0]].place, f"{path}.{limited[0]}", told)
        return None
    kinds = {"min": setting, "max": setting, "scale": SCALE, "step": STEP}
    given = {key: reader.typed(kinds[key], entries[key], f"{path}.{key}") for key in limited}
    if "choices" in entries:
        given["choices"] = _read_choices(setting, entries["choices"], f"{path}.choices", reader)
    if "when" in entries:
        given["when"] = read_rule(entries["when"], f"{path}.when", reader)
    if MISSING in given.values():
        return None
    return _made(given | {"whole": setting.hint is int}, Node(entries, node.place), path, reader)


def _read_choices(setting: Field, node: Node, path: str, reader: Reader) -> Any:
    values: list[Any] = []
    for each in reader.elements(node, path):
        value = reader.typed(setting, each, path)
        if value in values:
            reader.faults.add(each.place, path, f"{show(value)} is listed twice")
        values.append(value)
    return MISSING if MISSING in values or not values else tuple(values)


def _made(given: Mapping[str, Any], node: Node, path: str, reader: Reader) -> Range | None:
    whole, step = given["whole"], given.get("step")
    try:
        if whole and step is not None and step != int(step):
            raise ValueError(f"step must be a whole number, as the setting is, got {step:g}")
        return Range(**given)
    except ValueError as error:
        name, _, reason = str(error).partition(" ")
        if name in node.value:
            reader.faults.add(node.value[name].place, f"{path}.{name}", reason)
        else:
            reader.faults.add(node.place, path, str(error))
    return None
