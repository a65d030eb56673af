"""The blocks of a sweep file and their trials: grids crossed, lists paired, rules applied, seeds in turn."""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mixmo_core.config import TrialConfig, cell_of, flatten, identity, ineffective, unflatten
from mixmo_core.config import cell_id as cell_id_of
from mixmo_core.config import digest as digest_of
from orchestrator.sweep.document import Faults, Node, show
from orchestrator.sweep.fields import MISSING, Exchange, Given, Reader, settings
from orchestrator.sweep.ranges import Draw, Range, Space, corners
from orchestrator.sweep.rules import Rule, read_rule

_BLOCK_KEYS = ("label", "set", "grid", "zip", "when")


@dataclass(frozen=True)
class Trial:
    """One training: a config with its seed, and where the sweep placed it."""

    config: TrialConfig
    label: str | None
    """Of the first block that holds it."""
    workers: int
    position: int
    """0 is the first: every cell gets its first seed before any gets its second."""
    population: str = ""
    """Of a trial whose scheduler changes it by what others reach: the digest of that scheduler and its sweep. So it is
    no other trial, though it begins with the same settings.
    """

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(identity(self.config, self.workers, self.population))

    @property
    def trial_id(self) -> str:
        return self.digest[:12]

    @functools.cached_property
    def cell_id(self) -> str:
        return cell_id_of(self.config, self.workers, self.population)


@dataclass(frozen=True, slots=True)
class Block:
    path: str
    place: str
    label: str | None = None
    fixed: Given = field(default_factory=dict)
    axes: tuple[tuple[Given, ...], ...] = ()
    """Crossed with each other: one for each key of `grid`, one for all of `zip`."""
    when: Rule | None = None

    @property
    def size(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    @property
    def varied(self) -> set[str]:
        return {*self.fixed, *(name for axis in self.axes for given in axis for name in given)}

    def cells(self) -> Iterator[Given]:
        for chosen in itertools.product(*self.axes):
            cell = dict(self.fixed)
            for given in chosen:
                cell |= given
            yield cell


# ------------------------------------------------------------------------------------------------------------- reading


def read_block(node: Node, path: str, reader: Reader) -> Block:
    entries = reader.entries(node, path, _BLOCK_KEYS)
    label = reader.text(entries["label"], f"{path}.label") if "label" in entries else None
    fixed = reader.given(entries["set"], f"{path}.set") if "set" in entries else {}
    grid = _read_axes(entries["grid"], f"{path}.grid", reader) if "grid" in entries else {}
    paired = _read_axes(entries["zip"], f"{path}.zip", reader) if "zip" in entries else {}
    _hold_apart({"set": fixed, "grid": grid, "zip": paired}, Node(entries, node.place), path, reader.faults)
    axes = [tuple({name: value} for value in values) for name, values in grid.items()]
    if len({len(values) for values in paired.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in paired.items())
        reader.faults.add(entries["zip"].place, f"{path}.zip", f"only lists of one length can be paired ({lengths})")
    elif paired:
        axes.append(tuple(dict(zip(paired, row, strict=True)) for row in zip(*paired.values(), strict=True)))
    when = read_rule(entries["when"], f"{path}.when", reader) if "when" in entries else None
    return Block(path, node.place, label, fixed, tuple(axes), when)


def _read_axes(node: Node, path: str, reader: Reader) -> dict[str, list[Node]]:
    """Settings with a list of values each."""
    axes: dict[str, list[Node]] = {}
    for name, child in reader.named(node, path):
        if not isinstance(child.value, list) or not child.value:
            rule = "must be a list of values; one value stands under `set`, a range under `search.ranges`"
            reader.faults.add(child.place, f"{path}.{name}", f"{rule} (got {show(child.plain())})")
            continue
        values: list[Node] = []
        for each in child.value:
            value = reader.typed(settings()[name], each, f"{path}.{name}")
            if path.endswith(".grid") and value in [other.value for other in values]:
                reader.faults.add(each.place, f"{path}.{name}", f"{show(value)} is listed twice")
            if value is not MISSING:
                values.append(Node(value, each.place))
        if name in axes:
            reader.faults.add(child.place, f"{path}.{name}", "given twice")
        axes[name] = values
    return axes


def _hold_apart(kinds: Mapping[str, Mapping[str, Any]], node: Node, path: str, faults: Faults) -> None:
    """A setting stands once in a block, and the seed in none."""
    for first, second in itertools.combinations(kinds, 2):
        for name in kinds[first].keys() & kinds[second].keys():
            faults.add(node.value[second].place, f"{path}.{second}.{name}", f"given under `{first}` too; give it once")
    for kind, given in kinds.items():
        if "seed" in given:
            faults.add(node.value[kind].place, f"{path}.{kind}.seed", "seeds are listed under `seeds`, for all blocks")


# ----------------------------------------------------------------------------------------------------------- expanding


@dataclass(slots=True)
class _Cell:
    """A trial but for its seed."""

    block: Block
    given: Given
    config: TrialConfig | None = None
    """With the first seed that the cell was built for."""
    decides: dict[str, Any] = field(default_factory=dict)
    """The identity of that config; another seed changes nothing else in it."""
    cell_id: str = ""
    broken: bool = False

    def value(self, name: str) -> Any:
        return self.given[name].value if name in self.given else settings()[name].default


def _nothing(name: str, each: Range) -> Any:
    raise AssertionError(f"{name} is not drawn")


@dataclass(slots=True)
class Expansion:
    base: Given
    over: Given
    excludes: Sequence[Rule]
    seeds: Sequence[int]
    workers: Node
    faults: Faults
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    """Values that others stand for; `over` goes before them."""
    members: Mapping[str, int] = field(default_factory=dict)
    """By label or mixing method: cells that need so many seeds at least, for the ensembles that are made of them."""
    space: Space = field(default_factory=Space)
    draws: Sequence[Draw] = ()
    """Each cell is built once for each of these; where the space is empty, once."""
    population: str = ""
    """Of all trials; see `Trial`."""
    found: dict[str, Trial] = field(default_factory=dict)
    """By trial id, in order."""
    applied: Counter[str] = field(default_factory=Counter)
    """How many trials each rule left out and each block gave, by place."""

    def trials(self, blocks: Sequence[Block]) -> tuple[Trial, ...]:
        """Breadth first: every cell with the first seed, then every cell with the second. Of a random search every
        cell gets its first draw before any gets its second, and all draws the first seed before any gets the second.
        """
        each = [(block, chosen) for block in blocks for chosen in block.cells()]
        draws = self.draws if self.space.ranges else (_nothing,)
        cells = [_Cell(block, self._given(block, chosen, draw)) for draw in draws for block, chosen in each]
        least = [(cell, self._least(cell)) for cell in cells]
        for number, seed in enumerate(self._seeds(max((count for _, count in least), default=1))):
            for cell, count in least:
                if number < count and self._kept(cell, seed) and self._build(cell, seed):
                    self._place(cell, seed)
        return tuple(self.found.values())

    def open_cells(self, blocks: Sequence[Block]) -> tuple["OpenCell", ...]:
        """The cells, for a search that draws as it goes. What cannot be trained at an end of the ranges is a fault."""
        cells = [
            OpenCell(replace(block, fixed=chosen, axes=()), self) for block in blocks for chosen in block.cells()
        ]  # fmt: skip
        for cell in cells:
            for draw in corners():
                self.draws = (draw,)
                self.trials([cell.block])
        self.found, self.draws = {}, ()
        return tuple(cells)

    def _given(self, block: Block, chosen: Given, draw: Draw) -> Given:
        given = self.base | block.fixed | chosen
        for name, exchange in self.exchanges.items():
            before = given[name].value if name in given else settings()[name].default
            if before in exchange.values:
                given[name] = Node(exchange.values[before], exchange.place)
            elif name not in self.over:
                told = f"`from` lacks {show(before)}, which {block.path} has; it must list every value"
                self.faults.add(exchange.place, f"quick.{name}", told)
        return given | self.space.draw(given | self.over, draw) | self.over

    def _least(self, cell: _Cell) -> int:
        """How many seeds the cell gets."""
        method = cell.value("mixing.method") if cell.value("model.subnetworks") > 1 else ""
        return max(len(self.seeds), self.members.get(cell.block.label or "", self.members.get(method, 0)))

    def _seeds(self, count: int) -> list[int]:
        """The sweep's, and then the smallest others."""
        others = (seed for seed in itertools.count() if seed not in self.seeds)
        return [*self.seeds, *itertools.islice(others, max(0, count - len(self.seeds)))]

    def _kept(self, cell: _Cell, seed: int) -> bool:
        if cell.broken:
            return False
        when = cell.block.when
        if when and not self._holds(when, cell, seed):
            self.applied[when.key] += 1
            return False
        for rule in self.excludes:
            if self._holds(rule, cell, seed):
                self.applied[rule.key] += 1
                return False
        return True

    def _holds(self, rule: Rule, cell: _Cell, seed: int) -> bool:
        values = {name: seed if name == "seed" else cell.value(name) for name in rule.condition.names}
        try:
            return rule.condition(values)
        except ValueError as error:
            self.faults.add(rule.place, rule.path, f"{show(rule.condition.text)}: {error}")
            return False

    def _build(self, cell: _Cell, seed: int) -> bool:
        """Make the cell's config, once. What its settings say together is blamed on one of them."""
        if cell.config is not None:
            return True
        try:
            cell.config = unflatten({name: node.value for name, node in cell.given.items()} | {"seed": seed})
        except ValueError as error:
            self._blame(cell, str(error))
            return False
        if cell.config.data.batch_size % self.workers.value:
            self.faults.add(
                self.workers.place, "resources.workers",
                f"must divide data.batch_size, {cell.config.data.batch_size} slots (got {self.workers.value})",
            )  # fmt: skip
            cell.broken = True
            return False
        cell.decides = identity(cell.config, self.workers.value, self.population)
        cell.cell_id = cell_of(cell.decides)
        return True

    def _blame(self, cell: _Cell, message: str) -> None:
        """Every message of a config begins with the setting it is about; the place is that of what the file gives."""
        cell.broken = True
        words = re.findall(r"\w+", message)
        named = [name for word in words for name in settings() if name.rpartition(".")[2] == word]
        given = [name for name in named if name in cell.given]
        first = (given or named or ["trial"])[0]
        place = cell.given[first].place if given else cell.block.place
        self.faults.add(place, first, message)

    def _place(self, cell: _Cell, seed: int) -> None:
        assert cell.config is not None
        whole = digest_of({**cell.decides, "seed": seed})
        held = self.found.get(whole[:12])
        if held is None:
            config = cell.config if cell.config.seed == seed else replace(cell.config, seed=seed)
            trial = Trial(config, cell.block.label, self.workers.value, len(self.found), self.population)
            # Where the cached properties would put them: hashing each trial anew doubles the time of a large sweep.
            vars(trial).update(digest=whole, cell_id=cell.cell_id)
            self.found[whole[:12]] = trial
            self.applied[cell.block.path] += 1
        elif held.digest != whole:
            self.faults.add(cell.block.place, cell.block.path, f"two trials share the id {whole[:12]}; change a seed")

    def varied(self) -> tuple[str, ...]:
        """The settings with several values among the trials in which they have an effect; the seed apart."""
        seen: dict[str, set[Any]] = {name: set() for name in settings() if name != "seed"}
        for config in {trial.cell_id: trial.config for trial in self.found.values()}.values():
            values, silent = flatten(config), ineffective(config)
            for name in seen.keys() - silent:
                seen[name].add(values[name])
        return tuple(name for name, values in seen.items() if len(values) > 1)

    def methods(self) -> set[str]:
        """The mixing methods that the trials use."""
        configs = (trial.config for trial in self.found.values())
        return {config.mixing.method for config in configs if config.model.subnetworks > 1}

    def notes(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        notes = [
            f"{rule.place}: {rule.path}: {show(rule.condition.text)} excludes nothing"
            for rule in self.excludes
            if not self.applied[rule.key]
        ]
        notes += [
            f"{block.place}: {block.path}: gives no trial that another block does not give"
            for block in blocks
            if not self.applied[block.path]
        ]
        return tuple(notes)


@dataclass(frozen=True, slots=True)
class OpenCell:
    """A cell of a search that draws as it goes, from what it has learned."""

    block: Block
    """With one value for each setting."""
    _expansion: Expansion

    def trials(self, draw: Draw) -> tuple[Trial, ...]:
        """The cell's trials with this draw, one for each seed; none where a rule leaves the draw out or the settings
        cannot be trained together. Their positions count from 0.
        """
        expansion = replace(self._expansion, draws=(draw,), found={}, applied=Counter(), faults=Faults())
        return expansion.trials([self.block])
