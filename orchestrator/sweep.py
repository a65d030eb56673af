"""A sweep file and the trials it stands for: parsed strictly, expanded, each named by the hash of its config. Pure.

The format is design.md section 4 and docs/sweep-file.md. Every fault of a file is told at once, each with its place,
what was given, what is allowed and the nearest word that would do.
"""

import dataclasses
import functools
import itertools
import math
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mixmo_core.config import (
    RECIPES,
    Setting,
    TrialConfig,
    check_limits,
    flatten,
    identity,
    ineffective,
    leaves,
    not_yet,
    unflatten,
)
from mixmo_core.config import cell_id as cell_id_of
from mixmo_core.config import digest as digest_of
from mixmo_core.metrics import BY_NAME
from orchestrator.document import Faults, Node, nearest, read, read_value, show
from orchestrator.errors import SweepError
from orchestrator.expression import Condition, Kind, Variable, compile_condition

MOST_TRIALS = 1_000_000
QUICK = "-quick"

# ------------------------------------------------------------------------------------- the sections beside `trial`


def _key(default: Any, meaning: str, **limits: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(default, meaning, **limits)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one trial runs on, and how many run at once. Only `workers` enters a trial's identity."""

    workers: int = _key(1, "Processes that train one trial together, each on its share of the batch.", at_least=1)
    gpus_per_worker: float | Literal["auto"] = _key(
        "auto", "GPUs of a worker; a share such as 0.5 lets two workers use one. auto: 1 where there are GPUs, else 0.",
        at_least=0,
    )  # fmt: skip
    cpus_per_worker: float = _key(1.0, "CPU cores of a worker.", above=0)
    accelerator: str = _key("any", "Type of GPU, in Ray's words (A100, L4 ...).")
    spot: bool = _key(True, "Whether machines that may be taken away at short notice will do.")
    slots: int | Literal["auto"] = _key("auto", "Trials trained side by side on one GPU.", at_least=1)
    max_gangs: int | Literal["auto"] = _key(
        "auto", "Groups of workers, so trials, at once. auto: what fits.", at_least=1
    )

    def __post_init__(self) -> None:
        for name in ("gpus_per_worker", "cpus_per_worker"):
            count = getattr(self, name)
            if count != "auto" and count > 1 and count != int(count):
                raise ValueError(f"{name} above 1 must be a whole number, got {count:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    every_s: float | Literal["auto"] = _key("auto", "Seconds between checkpoints.", above=0)
    keep: Literal["last", "none"] = _key("last", "What stays once a trial has finished.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    gpu_hours: float | None = _key(None, "No trial begins past this many GPU-hours.", above=0)
    trials: int | None = _key(None, "A sweep of more trials is refused.", at_least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    gpu_hour: float | None = _key(None, "Price of one GPU for one hour.", at_least=0)
    currency: str = _key("USD", "In which it is told: three capital letters.")

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Z]{3}", self.currency):
            raise ValueError(f"currency must be three capital letters such as USD, got {show(self.currency)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often a trial begins again, by what ended it."""

    crash: int | Literal["unlimited"] = _key(2, "After an exception or a dead worker.", at_least=0)
    oom: int | Literal["unlimited"] = _key(0, "After it ran out of memory.", at_least=0)
    preempted: int | Literal["unlimited"] = _key("unlimited", "After its machine was taken away.", at_least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Values between two limits, for a search that draws them."""

    min: float
    max: float
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        if not self.min < self.max:
            raise ValueError(f"min must be below max, got {self.min:g} and {self.max:g}")
        if self.scale == "log" and self.min <= 0:
            raise ValueError(f"min must be above 0 on a log scale, got {self.min:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    method: Literal["grid", "random", "optuna"] = _key("grid", "How configs are chosen.")
    num_samples: int | None = _key(None, "How many are drawn from the ranges.", at_least=1)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drawn = {"num_samples": self.num_samples, "ranges": self.ranges}
        for name, given in drawn.items():
            if self.method == "grid" and given:
                raise ValueError(f"{name} belongs to a search that draws; method is grid")
            if self.method != "grid" and not given:
                raise ValueError(f"{name} is missing, which method {self.method} needs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduler:
    method: Literal["none", "asha", "pbt", "median"] = _key("none", "Which trials are stopped before their last epoch.")
    metric: str = _key("top1", "What decides, for schedulers and searches.")
    mode: Literal["max", "min"] | None = _key(None, "Left out: max where higher is better, min where lower is.")
    grace_epochs: int = _key(1, "Epochs that every trial gets.", at_least=1)

    def __post_init__(self) -> None:
        deciding = [metric.name for metric in BY_NAME.values() if metric.better]
        if self.metric not in deciding:
            raise ValueError(f"metric must be one of {', '.join(deciding)}, got {show(self.metric)}"
                             f"{nearest(self.metric, deciding)}")  # fmt: skip
        right: Literal["max", "min"] = "max" if BY_NAME[self.metric].better == "higher" else "min"
        if self.mode not in (None, right):
            raise ValueError(
                f"mode must be {right} for {self.metric}, of which {BY_NAME[self.metric].better} is better"
            )
        object.__setattr__(self, "mode", right)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """A row made from the stored logits of several seeds of each cell."""

    of: str
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A number from a paper, told beside ours."""

    where: Mapping[str, Any]
    metrics: Mapping[str, float]
    source: str


_SECTIONS: dict[str, type[Any]] = {
    "search": Search, "scheduler": Scheduler, "resources": Resources, "checkpoints": Checkpoints, "budget": Budget,
    "price": Price, "retry": Retry,
}  # fmt: skip
_KEYS = ("name", "trial", "blocks", "exclude", "seeds", "baseline", *_SECTIONS, "ensembles", "published", "quick")
_BLOCK_KEYS = ("label", "set", "grid", "zip", "when")


# --------------------------------------------------------------------------------------------- what a file stands for


@dataclass(frozen=True)
class Trial:
    """One training: a config with its seed, and where the sweep placed it."""

    config: TrialConfig
    label: str | None
    """Of the first block that holds it."""
    workers: int
    position: int
    """0 is the first: every cell gets its first seed before any gets its second."""

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(identity(self.config, self.workers))

    @property
    def trial_id(self) -> str:
        return self.digest[:12]

    @functools.cached_property
    def cell_id(self) -> str:
        return cell_id_of(self.config, self.workers)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    name: str
    trials: tuple[Trial, ...]
    varied: tuple[str, ...]
    """The settings that differ between trials in which they have an effect, the seed apart."""
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    """Of all blocks, in the file's order, also of those whose trials belong to an earlier block."""
    baseline: str | None
    search: Search
    scheduler: Scheduler
    resources: Resources
    checkpoints: Checkpoints
    budget: Budget
    price: Price
    retry: Retry
    ensembles: tuple[Ensemble, ...]
    published: tuple[Published, ...]
    quick: bool
    overrides: tuple[str, ...]
    text: str
    """The file as given, without what `quick` and `overrides` lay over it."""
    source: str
    origins: Mapping[str, str]
    """Where each setting comes from: `default`, `varies`, or a place such as `sweeps/width.yaml:4`."""
    notes: tuple[str, ...]
    """What is allowed but probably not meant, such as an `exclude` that excludes nothing."""


def load(path: str | Path, *, overrides: Sequence[str] = (), quick: bool = False) -> Sweep:
    """The sweep that a file stands for.

    overrides are `setting=value` as after `-S`; quick lays the file's `quick` section over it and renames it. Raises
    SweepError, with one line for each fault.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        folder = Path(path).parent
        there = [str(each) for each in sorted(folder.glob("*.y*ml"))] if folder.is_dir() else []
        raise SweepError(f"{path}: there is no such file{nearest(str(path), there)}") from None
    except IsADirectoryError:
        raise SweepError(f"{path}: this is a folder; name the sweep file in it") from None
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    return parse(text, source=str(path), overrides=overrides, quick=quick)


def parse(text: str, *, source: str, overrides: Sequence[str] = (), quick: bool = False) -> Sweep:
    """As `load`, of a file's text; `source` is what faults call it."""
    faults = Faults()
    root = read(text, source, faults)
    faults.raise_any()
    if root is None or not isinstance(root.value, dict):
        raise SweepError(f"{source}:1: a sweep file is a mapping of {', '.join(_KEYS)}")
    return _Parser(dict(root.value), source, faults).sweep(text, tuple(overrides), quick)


# ------------------------------------------------------------------------------------------------- values and settings

_MISSING: Any = object()
_UNIONS: tuple[Any, ...] = (Union, types.UnionType)


@dataclass(frozen=True, slots=True)
class _Field:
    """A setting, or a key of a section: what it may hold."""

    hint: Any
    setting: Setting
    default: Any = None

    @property
    def allowed(self) -> str:
        limits = [
            f"{word} {limit:g}"
            for word, limit in (("at least", self.setting.at_least), ("above", self.setting.above),
                                ("at most", self.setting.at_most))
            if limit is not None
        ]  # fmt: skip
        return ", ".join([_spoken(self.hint), *limits])


@functools.cache
def _settings() -> dict[str, _Field]:
    return {name: _Field(spec.type, spec.metadata["setting"], spec.default) for name, spec in leaves()}


def allowed(name: str) -> str:
    """What a setting may be, in words: `'all' or a whole number, at least 1`."""
    return _settings()[name].allowed


def _spoken(hint: Any) -> str:
    origin: Any = get_origin(hint)
    if origin is Literal:
        words = [show(each) for each in get_args(hint)]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if origin in _UNIONS:
        words_first = sorted(get_args(hint), key=lambda each: get_origin(each) is not Literal)
        return " or ".join(_spoken(each) for each in words_first if each is not type(None))
    simple: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return simple.get(hint) or "a list of numbers"


def _words(hint: Any) -> list[str]:
    """The texts that a hint allows."""
    if get_origin(hint) is Literal:
        return [each for each in get_args(hint) if isinstance(each, str)]
    return [word for each in get_args(hint) for word in _words(each)]


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _refusal(name: str, kind: _Field, value: Any) -> str | None:
    """Why a field cannot have this value, as `must be ...`; None when it can."""
    from pydantic import ValidationError

    try:
        _adapter(kind.hint).validate_python(value, strict=True)
        check_limits(name, value, kind.setting)
    except ValidationError:
        near = nearest(value, _words(kind.hint)) if isinstance(value, str) else ""
        written = f"the text {show(value)}" if isinstance(value, str) and not _words(kind.hint) else show(value)
        return f"must be {kind.allowed} (got {written}){near}"
    except ValueError as error:
        return str(error).removeprefix(f"{name} ")
    return None


def _typed(name: str, kind: _Field, node: Node, faults: Faults, told: str = "") -> Any:
    """The value as the field's type has it; _MISSING, and a fault under the name `told`, when it cannot have it."""
    value = node.plain()
    if isinstance(value, list):
        value = tuple(value)
    if reason := _refusal(name.rpartition(".")[2], kind, value):
        faults.add(node.place, told or name, reason)
        return _MISSING
    return _adapter(kind.hint).validate_python(value, strict=True)


def _variable(name: str) -> Variable:
    hint = _settings()[name].hint
    kind: Kind = "number" if hint in (int, float) else "text" if get_origin(hint) is Literal else "count"
    if get_origin(hint) is tuple:
        kind = "list"
    return Variable(kind, lambda value: _refusal(name.rpartition(".")[2], _settings()[name], value))


# ------------------------------------------------------------------------------------------------------------ parsing

Given = dict[str, Node]
"""Settings by dotted name, typed, each with its place."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """A condition and where it stands."""

    condition: Condition
    place: str
    told: str

    @property
    def key(self) -> str:
        return f"{self.place} {self.condition.text}"


@dataclass(frozen=True, slots=True)
class _Block:
    told: str
    place: str
    label: str | None
    fixed: Given
    axes: tuple[tuple[Given, ...], ...]
    """Crossed with each other: one for each key of `grid`, one for all of `zip`."""
    when: _Rule | None

    @property
    def size(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    def cells(self) -> Iterator[Given]:
        for chosen in itertools.product(*self.axes):
            cell = dict(self.fixed)
            for given in chosen:
                cell |= given
            yield cell


@dataclass(slots=True)
class _Parser:
    top: dict[str, Node]
    source: str
    faults: Faults

    def sweep(self, text: str, overrides: tuple[str, ...], quick: bool) -> Sweep:
        for key, node in self.top.items():
            if key not in _KEYS:
                self.faults.add(node.place, key, f"no such key; allowed are {', '.join(_KEYS)}{nearest(key, _KEYS)}")
        base = self._trial()
        over = self._quick(quick) | self._overrides(overrides)
        name = self._name(quick)
        blocks = self._blocks()
        excludes = self._excludes()
        seeds = self._seeds()
        sections = {key: self._section(key, kind) for key, kind in _SECTIONS.items()}
        self._hold_limit(blocks, seeds)
        self.faults.raise_any()
        expansion = _Expansion(base, over, excludes, seeds, self._workers(sections["resources"]), self.faults)
        trials = expansion.trials(blocks)
        if not trials:
            self.faults.add(self.source, "", "no trial is left; see `when` and `exclude`")
        self.faults.raise_any()
        labels = tuple(dict.fromkeys(block.label for block in blocks if block.label))
        sweep = Sweep(
            name=name, trials=trials, varied=expansion.varied(), seeds=seeds, labels=labels,
            baseline=self._baseline(labels), **sections, ensembles=self._ensembles({*labels, *expansion.methods()}),
            published=self._published(), quick=quick, overrides=overrides, text=text, source=self.source,
            origins=_origins(base, over, blocks), notes=expansion.notes(blocks),
        )  # fmt: skip
        self._check_whole(sweep)
        self.faults.raise_any()
        return sweep

    # ------------------------------------------------------------------------------------------------- small helpers

    def _mapping(self, node: Node, told: str) -> dict[str, Node]:
        if isinstance(node.value, dict):
            return node.value
        empty = "; leave the key out to take the defaults" if node.value is None else ""
        self.faults.add(node.place, told, f"must be a mapping (got {show(node.plain())}){empty}")
        return {}

    def _list(self, node: Node, told: str) -> list[Node]:
        if isinstance(node.value, list) and node.value:
            return node.value
        self.faults.add(node.place, told, f"must be a list of at least one element (got {show(node.plain())})")
        return []

    def _text(self, node: Node, told: str) -> str | None:
        if isinstance(node.value, str) and node.value.strip():
            return node.value
        self.faults.add(node.place, told, f"must be text (got {show(node.plain())})")
        return None

    def _keys(self, node: Node, told: str, known: Iterable[str]) -> dict[str, Node]:
        """The entries of a mapping that are known; the others are faults."""
        allowed_here = list(known)
        entries = self._mapping(node, told)
        for key in entries.keys() - set(allowed_here):
            self.faults.add(
                entries[key].place, f"{told}.{key}",
                f"no such key; allowed are {', '.join(allowed_here)}{nearest(key, allowed_here)}",
            )  # fmt: skip
        return {key: child for key, child in entries.items() if key in allowed_here}

    # ------------------------------------------------------------------------------------------------------- settings

    def _named(self, node: Node, told: str, prefix: str = "") -> Iterator[tuple[str, Node]]:
        """(dotted name, raw value) of a mapping of settings, nested by section or dotted."""
        for key, child in self._mapping(node, told).items():
            name = prefix + key
            if name in _settings():
                yield name, child
            elif any(each.startswith(f"{name}.") for each in _settings()):
                yield from self._named(child, f"{told}.{key}", f"{name}.")
            else:
                self._unknown(child.place, f"{told}.{key}", name)

    def _unknown(self, place: str, told: str, name: str) -> None:
        sections = {each.partition(".")[0] for each in _settings() if "." in each}
        self.faults.add(place, told, f"no such setting{nearest(name, [*_settings(), *sections])}")

    def _given(self, node: Node, told: str) -> Given:
        """Settings with one value each."""
        given: Given = {}
        for name, child in self._named(node, told):
            value = _typed(name, _settings()[name], child, self.faults, f"{told}.{name}")
            if name in given:
                self.faults.add(child.place, f"{told}.{name}", f"given twice; the first is at {given[name].place}")
            elif value is not _MISSING:
                given[name] = Node(value, child.place)
        return given

    def _trial(self) -> Given:
        if "trial" not in self.top:
            self.faults.add(f"{self.source}:1", "trial", "is missing: the settings that all trials share")
            return {}
        node = self.top["trial"]
        entries = dict(self._mapping(node, "trial"))
        recipe = self._recipe(entries.pop("recipe", None))
        given = self._given(Node(entries, node.place), "trial") if entries else {}
        if "seed" in given:
            seed = given.pop("seed")
            if "seeds" in self.top:
                self.faults.add(seed.place, "trial.seed", "given beside `seeds`; give one of the two")
            self.top.setdefault("seeds", Node([seed], seed.place))
        return recipe | given

    def _recipe(self, node: Node | None) -> Given:
        if node is None:
            return {}
        if not isinstance(node.value, str) or node.value not in RECIPES:
            known = " or ".join(show(each) for each in RECIPES)
            near = nearest(node.value, RECIPES) if isinstance(node.value, str) else ""
            self.faults.add(node.place, "trial.recipe", f"must be {known} (got {show(node.plain())}){near}")
            return {}
        place = f"{node.place} (recipe {node.value})"
        return {name: Node(value, place) for name, value in RECIPES[node.value].items()}

    # --------------------------------------------------------------------------------- what is laid over: quick and -S

    def _quick(self, quick: bool) -> Given:
        """The `quick` section, which is checked whether it is asked for or not."""
        if "quick" not in self.top:
            if quick:
                self.faults.add(f"{self.source}:1", "quick", "is missing, which --quick lays over the sweep")
            return {}
        node = self.top["quick"]
        entries = dict(self._mapping(node, "quick"))
        seeds = [entries.pop(key) for key in ("seeds", "seed") if key in entries]
        given = self._given(Node(entries, node.place), "quick")
        for each in seeds:
            self._seeds_of(each, "quick.seeds")
        if not quick:
            return {}
        if seeds:
            self.top["seeds"] = seeds[0]
        return given

    def _overrides(self, overrides: Sequence[str]) -> Given:
        given: Given = {}
        for text in overrides:
            place = f"-S {text}"
            name, equals, value = (part.strip() for part in text.partition("="))
            if not equals or not value:
                self.faults.add(place, "", "must be setting=value, such as optim.epochs=3")
                continue
            node = read_value(value, place, self.faults)
            if node is not None:
                given |= self._override(name, node)
        return given

    def _override(self, name: str, node: Node) -> Given:
        section, _, key = name.partition(".")
        if name == "seed":
            self.top["seeds"] = Node([node], node.place)
        elif name in ("seeds", "name", "baseline"):
            self.top[name] = node
        elif name in _settings():
            value = _typed(name, _settings()[name], node, self.faults)
            return {} if value is _MISSING else {name: Node(value, node.place)}
        elif section in _SECTIONS and key:
            before = self.top.get(section)
            entries = before.value if before and isinstance(before.value, dict) else {}
            self.top[section] = Node({**entries, key: node}, before.place if before else node.place)
        else:
            known = [*_settings(), "seeds", "name", "baseline", *_section_keys()]
            self.faults.add(node.place, name, f"no such setting{nearest(name, known)}")
        return {}

    # --------------------------------------------------------------------------------------- name, seeds, blocks, rules

    def _name(self, quick: bool) -> str:
        rule = "must be 1 to 100 of a-z, 0-9, _ and -, beginning with a letter or digit: it names a folder"
        if "name" not in self.top:
            self.faults.add(f"{self.source}:1", "name", f"is missing; it {rule}")
            return ""
        node = self.top["name"]
        name = node.value if isinstance(node.value, str) else ""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name):
            self.faults.add(node.place, "name", f"{rule} (got {show(node.plain())})")
        elif name.endswith(QUICK):
            self.faults.add(node.place, "name", f"must not end with {QUICK}, which --quick appends (got {show(name)})")
        return name + QUICK if quick else name

    def _seeds(self) -> tuple[int, ...]:
        return self._seeds_of(self.top["seeds"], "seeds") if "seeds" in self.top else (0,)

    def _seeds_of(self, node: Node, told: str) -> tuple[int, ...]:
        rule = "must be a count of at least 1, or a list of different whole numbers of at least 0"
        given = node.plain()
        if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= MOST_TRIALS:
            return tuple(range(given))
        whole = isinstance(given, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
        if not whole or not given or min(given) < 0 or len(set(given)) < len(given):
            self.faults.add(node.place, told, f"{rule} (got {show(given)})")
            return ()
        return tuple(given)

    def _blocks(self) -> list[_Block]:
        if "blocks" not in self.top:
            return [_Block("trial", f"{self.source}:1", None, {}, (), None)]
        blocks = self._list(self.top["blocks"], "blocks")
        return [self._block(node, f"blocks[{index}]") for index, node in enumerate(blocks, start=1)]

    def _block(self, node: Node, told: str) -> _Block:
        entries = self._keys(node, told, _BLOCK_KEYS)
        label = self._text(entries["label"], f"{told}.label") if "label" in entries else None
        fixed = self._given(entries["set"], f"{told}.set") if "set" in entries else {}
        grid = self._axes(entries["grid"], f"{told}.grid") if "grid" in entries else {}
        paired = self._axes(entries["zip"], f"{told}.zip") if "zip" in entries else {}
        if len({len(axis) for axis in paired.values()}) > 1:
            lengths = ", ".join(f"{name} has {len(axis)}" for name, axis in paired.items())
            self.faults.add(entries["zip"].place, f"{told}.zip", f"lists of one length are paired ({lengths})")
        self._hold_apart({"set": fixed, "grid": grid, "zip": paired}, told, node.place)
        axes = [tuple({name: value} for value in values) for name, values in grid.items()]
        if paired:
            rows = zip(*paired.values(), strict=False)
            axes.append(tuple(dict(zip(paired, row, strict=True)) for row in rows))
        when = self._rule(entries["when"], f"{told}.when") if "when" in entries else None
        return _Block(told, node.place, label, fixed, tuple(axes), when)

    def _axes(self, node: Node, told: str) -> dict[str, list[Node]]:
        """Settings with a list of values each."""
        axes: dict[str, list[Node]] = {}
        for name, child in self._named(node, told):
            field_told = f"{told}.{name}"
            if not isinstance(child.value, list) or not child.value:
                ranged = " (a range stands under search.ranges)" if isinstance(child.value, dict) else ""
                self.faults.add(
                    child.place, field_told,
                    f"must be a list of values; one value stands under `set` (got {show(child.plain())}){ranged}",
                )  # fmt: skip
                continue
            typed = [(each, _typed(name, _settings()[name], each, self.faults, field_told)) for each in child.value]
            values = [Node(value, each.place) for each, value in typed if value is not _MISSING]
            repeated = [each for i, each in enumerate(values) if each.value in [one.value for one in values[:i]]]
            for each in repeated if told.endswith(".grid") else ():
                self.faults.add(each.place, field_told, f"{show(each.value)} is listed twice")
            axes[name] = values
        return axes

    def _hold_apart(self, kinds: Mapping[str, Mapping[str, Any]], told: str, place: str) -> None:
        """A setting stands once in a block, and the seed in none."""
        for (first, one), (second, other) in itertools.combinations(kinds.items(), 2):
            for name in one.keys() & other.keys():
                self.faults.add(place, f"{told}.{second}.{name}", f"given under `{first}` too; a block gives it once")
        for kind, given in kinds.items():
            if "seed" in given:
                self.faults.add(place, f"{told}.{kind}.seed", "seeds are listed under `seeds`, for all blocks")

    def _excludes(self) -> list[_Rule]:
        if "exclude" not in self.top:
            return []
        node = self.top["exclude"]
        rules = [node] if isinstance(node.value, str) else self._list(node, "exclude")
        return [rule for each in rules if (rule := self._rule(each, "exclude"))]

    def _rule(self, node: Node, told: str) -> _Rule | None:
        text = self._text(node, told)
        if text is None:
            return None
        try:
            return _Rule(compile_condition(text, _variables()), node.place, told)
        except ValueError as error:
            self.faults.add(node.place, told, f"{show(text)}: {error}")
            return None

    def _hold_limit(self, blocks: Sequence[_Block], seeds: Sequence[int]) -> None:
        count = sum(block.size for block in blocks) * len(seeds)
        if count > MOST_TRIALS:
            self.faults.add(
                self.top["blocks"].place if "blocks" in self.top else self.source, "blocks",
                f"{count:,} trials, of at most {MOST_TRIALS:,}; split the sweep, or use `search` with num_samples",
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------- the sections beside it

    def _section(self, key: str, kind: type[Any]) -> Any:
        if key not in self.top:
            return kind()
        node = self.top[key]
        section: Any = kind
        fields = _fields(section)
        entries = self._keys(node, key, [each.name for each in dataclasses.fields(kind)])
        given = {
            name: _typed(name, fields[name], child, self.faults, f"{key}.{name}")
            for name, child in entries.items()
            if name in fields
        }
        if "ranges" in entries:
            given["ranges"] = self._ranges(entries["ranges"])
        return self._made(
            kind, {name: value for name, value in given.items() if value is not _MISSING}, entries, node, key
        )

    def _made(
        self, kind: type[Any], given: Mapping[str, Any], entries: Mapping[str, Node], node: Node, key: str
    ) -> Any:
        """A section from its values; what they say together is blamed on the field that the message begins with."""
        try:
            return kind(**given)
        except ValueError as error:
            name = str(error).partition(" ")[0]
            place = entries[name].place if name in entries else node.place
            self.faults.add(place, f"{key}.{name}", str(error).partition(" ")[2])
        except TypeError:
            required = [each.name for each in dataclasses.fields(kind) if each.default is dataclasses.MISSING]
            missing = ", ".join(name for name in required if name not in entries)
            if missing:
                self.faults.add(node.place, key, f"{missing} is missing")
        return None

    def _ranges(self, node: Node) -> dict[str, Range]:
        ranges: dict[str, Range] = {}
        for name, child in self._named(node, "search.ranges"):
            told = f"search.ranges.{name}"
            if _settings()[name].hint not in (int, float) or name == "seed":
                self.faults.add(child.place, told, "only settings that are numbers have ranges; list others in a grid")
                continue
            entries = self._keys(child, told, ("min", "max", "scale"))
            kinds = {"min": _settings()[name], "max": _settings()[name], "scale": _SCALE}
            given = {key: _typed(key, kinds[key], each, self.faults, f"{told}.{key}") for key, each in entries.items()}
            whole = {key: value for key, value in given.items() if value is not _MISSING}
            if made := self._made(Range, whole, entries, child, told):
                ranges[name] = made
        return ranges

    def _baseline(self, labels: Sequence[str]) -> str | None:
        if "baseline" not in self.top:
            return None
        node = self.top["baseline"]
        name = self._text(node, "baseline")
        if name is not None and name not in labels:
            known = ", ".join(labels) or "none: give a block a `label`"
            self.faults.add(
                node.place,
                "baseline",
                f"no block has the label {show(name)}; labels are {known}{nearest(name, labels)}",
            )
        return name

    def _ensembles(self, groups: set[str]) -> tuple[Ensemble, ...]:
        if "ensembles" not in self.top:
            return ()
        found = []
        for index, node in enumerate(self._list(self.top["ensembles"], "ensembles"), start=1):
            told = f"ensembles[{index}]"
            entries = self._keys(node, told, ("of", "members"))
            of = self._text(entries["of"], f"{told}.of") if "of" in entries else None
            if of is not None and of not in groups:
                rule = f"must be a label or a mixing method of the sweep: {', '.join(sorted(groups))}"
                self.faults.add(entries["of"].place, f"{told}.of", f"{rule} (got {show(of)}){nearest(of, groups)}")
            members = self._members(entries.get("members"), told)
            if len(entries) < 2:
                self.faults.add(node.place, told, "must give `of` and `members`")
            elif of is not None:
                found.append(Ensemble(of=of, members=members))
        return tuple(found)

    def _members(self, node: Node | None, told: str) -> tuple[int, ...]:
        counts = node.plain() if node else []
        counts = counts if isinstance(counts, list) else [counts]
        if node and not (counts and all(isinstance(n, int) and not isinstance(n, bool) and n >= 2 for n in counts)):
            rule = "must be a list of whole numbers of at least 2: how many seeds form an ensemble"
            self.faults.add(node.place, f"{told}.members", f"{rule} (got {show(node.plain())})")
            return ()
        return tuple(counts)

    def _published(self) -> tuple[Published, ...]:
        if "published" not in self.top:
            return ()
        found = []
        for index, node in enumerate(self._list(self.top["published"], "published"), start=1):
            told = f"published[{index}]"
            entries = self._keys(node, told, ("where", "source", *BY_NAME))
            where = self._given(entries["where"], f"{told}.where") if "where" in entries else {}
            source = self._text(entries["source"], f"{told}.source") if "source" in entries else None
            metrics = {
                name: _typed(name, _metric_field(name), child, self.faults, f"{told}.{name}")
                for name, child in entries.items()
                if name in BY_NAME
            }
            if not {"where", "source"} <= entries.keys() or not metrics:
                self.faults.add(node.place, told, "must give `where`, `source` and at least one metric, such as top1")
            values = {name: each.value for name, each in where.items()}
            found.append(Published(where=values, metrics=metrics, source=source or ""))
        return tuple(found)

    def _workers(self, resources: Resources) -> Node:
        given = self.top["resources"].value.get("workers") if "resources" in self.top else None
        return Node(resources.workers, given.place if given else self.source)

    def _check_whole(self, sweep: Sweep) -> None:
        """What only the trials and the sections together can show."""
        shortest = min((trial.config.optim.epochs for trial in sweep.trials), default=1)
        if sweep.scheduler.method != "none" and sweep.scheduler.grace_epochs > shortest:
            self.faults.add(
                self.top["scheduler"].place, "scheduler.grace_epochs",
                f"must be at most the epochs of a trial, {shortest} (got {sweep.scheduler.grace_epochs})",
            )  # fmt: skip
        varied = set(sweep.search.ranges) & set(sweep.varied)
        for name in sorted(varied):
            self.faults.add(self.top["search"].place, f"search.ranges.{name}", "varies over the blocks too; give one")


@functools.cache
def _variables() -> dict[str, Variable]:
    return {name: _variable(name) for name in _settings()}


@functools.cache
def _fields(kind: Any) -> dict[str, _Field]:
    hints = get_type_hints(kind)
    specs = [spec for spec in dataclasses.fields(kind) if "setting" in spec.metadata]
    return {spec.name: _Field(hints[spec.name], spec.metadata["setting"]) for spec in specs}


def _sections() -> Iterable[tuple[str, Any]]:
    return _SECTIONS.items()


def _section_keys() -> list[str]:
    return [f"{section}.{name}" for section, kind in _sections() for name in _fields(kind)]


_SCALE = _Field(Literal["linear", "log"], Setting("linear", "How values lie between the limits."))


def _metric_field(name: str) -> _Field:
    fraction = BY_NAME[name].unit == "fraction"
    return _Field(float, Setting(None, BY_NAME[name].meaning, at_least=0, at_most=1 if fraction else None))


def _origins(base: Given, over: Given, blocks: Sequence[_Block]) -> dict[str, str]:
    origins = dict.fromkeys(_settings(), "default") | {name: node.place for name, node in base.items()}
    for block in blocks:
        origins |= dict.fromkeys(block.fixed, "varies")
        origins |= {name: "varies" for axis in block.axes for given in axis for name in given}
    return origins | {name: node.place for name, node in over.items()} | {"seed": "varies"}


# ---------------------------------------------------------------------------------------------------------- expansion


@dataclass(slots=True)
class _Cell:
    """A trial but for its seed."""

    block: _Block
    given: Given
    config: TrialConfig | None = None
    """With the first seed that the cell was built for."""
    decides: dict[str, Any] = field(default_factory=dict)
    broken: bool = False

    def value(self, name: str) -> Any:
        return self.given[name].value if name in self.given else _settings()[name].default


@dataclass(slots=True)
class _Expansion:
    base: Given
    over: Given
    excludes: Sequence[_Rule]
    seeds: Sequence[int]
    workers: Node
    faults: Faults
    found: dict[str, Trial] = field(default_factory=dict)
    """By trial id, in order."""
    applied: Counter[str] = field(default_factory=Counter)
    """How many trials each rule left out and each block gave, by place."""

    def trials(self, blocks: Sequence[_Block]) -> tuple[Trial, ...]:
        """Breadth first: every cell with the first seed, then every cell with the second."""
        cells = [
            _Cell(block, self.base | block.fixed | chosen | self.over) for block in blocks for chosen in block.cells()
        ]
        for seed in self.seeds:
            for cell in cells:
                if self._kept(cell, seed) and self._build(cell, seed):
                    self._place(cell, seed)
        return tuple(self.found.values())

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

    def _holds(self, rule: _Rule, cell: _Cell, seed: int) -> bool:
        values = {name: seed if name == "seed" else cell.value(name) for name in rule.condition.names}
        try:
            return rule.condition(values)
        except ValueError as error:
            self.faults.add(rule.place, rule.told, f"{show(rule.condition.text)}: {error}")
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
        cell.decides = identity(cell.config, self.workers.value)
        return True

    def _blame(self, cell: _Cell, message: str) -> None:
        """Every message of a config begins with the setting it is about; the place is that of what the file gives."""
        cell.broken = True
        words = re.findall(r"\w+", message)
        named = [name for word in words for name in _settings() if name.rpartition(".")[2] == word]
        given = [name for name in named if name in cell.given]
        first = (given or named or ["trial"])[0]
        place = cell.given[first].place if given else cell.block.place
        self.faults.add(place, first, message)

    def _place(self, cell: _Cell, seed: int) -> None:
        assert cell.config is not None
        whole = digest_of({**cell.decides, "seed": seed})
        held = self.found.get(whole[:12])
        if held is None:
            config = cell.config if cell.config.seed == seed else dataclasses.replace(cell.config, seed=seed)
            trial = Trial(config, cell.block.label, self.workers.value, len(self.found))
            vars(trial)["digest"] = whole  # where cached_property would put it
            self.found[whole[:12]] = trial
            self.applied[cell.block.told] += 1
        elif held.digest != whole:
            self.faults.add(cell.block.place, cell.block.told, f"two trials share the id {whole[:12]}; change a seed")

    def varied(self) -> tuple[str, ...]:
        """The settings with several values among the trials in which they have an effect; the seed apart."""
        seen: dict[str, set[Any]] = {name: set() for name in _settings() if name != "seed"}
        for config in {trial.cell_id: trial.config for trial in self.found.values()}.values():
            values, silent = flatten(config), ineffective(config)
            for name in seen.keys() - silent:
                seen[name].add(values[name])
        return tuple(name for name, values in seen.items() if len(values) > 1)

    def methods(self) -> set[str]:
        """The mixing methods that the trials use."""
        configs = (trial.config for trial in self.found.values())
        return {config.mixing.method for config in configs if config.model.subnetworks > 1}

    def notes(self, blocks: Sequence[_Block]) -> tuple[str, ...]:
        notes = [
            f"{rule.place}: {rule.told}: {show(rule.condition.text)} excludes nothing"
            for rule in self.excludes
            if not self.applied[rule.key]
        ]
        notes += [
            f"{block.place}: {block.told}: gives no trial that another block does not give"
            for block in blocks
            if not self.applied[block.told]
        ]
        return tuple(notes)


# ------------------------------------------------------------------------------------------------ what can be run now


def check_runnable(sweep: Sweep) -> None:
    """Raise SweepError, with a line for each thing that the sweep asks for and that a run cannot honour yet."""
    asked = dict.fromkeys(what for trial in sweep.trials for what in not_yet(trial.config))
    lines = [f"trial: {what}" for what in asked]
    wanted = {
        f"search.method: {sweep.search.method}": sweep.search.method != "grid",
        f"scheduler.method: {sweep.scheduler.method}": sweep.scheduler.method != "none",
        "budget": sweep.budget != Budget(),
        "ensembles": bool(sweep.ensembles),
        f"resources.slots: {sweep.resources.slots}": sweep.resources.slots not in ("auto", 1),
        f"resources.accelerator: {sweep.resources.accelerator}": sweep.resources.accelerator != "any",
    }
    lines += [what for what, is_wanted in wanted.items() if is_wanted]
    if lines:
        raise SweepError(
            "\n".join(f"{sweep.source}: {line}: understood, but not yet possible in a run" for line in lines)
        )
