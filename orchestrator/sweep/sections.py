"""What stands beside `trial` in a sweep file: search, scheduler, resources, budget and their like, and its reading."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mixmo_core.config import RECIPES, Setting, TrialConfig, digest, flatten, ineffective
from mixmo_core.metrics import BY_NAME
from orchestrator.sweep.document import Node, nearest, show
from orchestrator.sweep.fields import MISSING, Field, Given, Reader, fields_of, settings
from orchestrator.sweep.ranges import Range, read_ranges


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
    slots: int | Literal["auto"] = _key(
        "auto", "Trials of one shape that a group of one worker trains side by side. auto: on a GPU, as many as pay by "
        "a try with the sweep's largest trial; without one, 1.", at_least=1,
    )  # fmt: skip
    captured: bool = _key(
        True,
        "Whether a trial of one worker replays its step as a CUDA graph on a GPU, once it is seen to be the same.",
    )
    max_gangs: int | Literal["auto"] = _key(
        "auto", "Groups of workers at once; each trains one trial, or as many as it has slots. auto: what fits.",
        at_least=1,
    )  # fmt: skip
    form_within_s: float | Literal["auto"] = _key(
        "auto", "Seconds after which a run gives up where no group of workers forms. auto: 600, or 1800 where machines "
        "have yet to be brought.", above=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("gpus_per_worker", "cpus_per_worker"):
            count = getattr(self, name)
            if count != "auto" and count > 1 and count != int(count):
                raise ValueError(f"{name} above 1 must be a whole number, got {count:g}")
        if self.workers > 1 and self.gpus_per_worker != "auto" and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker below 1 is for trials of one worker: of {self.workers}, two would share a GPU, which "
                "NCCL refuses"
            )
        if self.workers > 1 and self.slots not in ("auto", 1):
            raise ValueError(
                f"slots above 1 are for trials of one worker: {self.workers} workers share a single trial. Leave out "
                "slots, or workers"
            )

    @property
    def slot_count(self) -> int:
        """How many trials a group of workers trains side by side, unless it finds that more pay."""
        return 1 if self.slots == "auto" else self.slots

    @property
    def finds_slots(self) -> bool:
        """Whether a group of one worker tries how many pay. Not on a share of a GPU: others would be at work there."""
        shares = self.gpus_per_worker != "auto" and self.gpus_per_worker < 1
        return self.slots == "auto" and self.workers == 1 and self.captured and not shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    every_s: float | Literal["auto"] = _key("auto", "Seconds between checkpoints.", above=0)
    keep: Literal["last", "none"] = _key("last", "What stays once a trial has finished.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    gpu_hours: float | None = _key(None, "No trial begins past this many GPU-hours, over all runs.", above=0)
    hours: float | None = _key(
        None, "No trial begins past this many hours of training, summed over the trials; also on processors.", above=0
    )
    money: float | None = _key(None, "No trial begins past this sum, reckoned by `price`.", above=0)
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
    """How often a trial begins again, by what ended its attempt. An exception of its own is final."""

    crash: int | Literal["unlimited"] = _key(2, "After a worker died or a device was lost.", at_least=0)
    oom: int | Literal["unlimited"] = _key(0, "After it ran out of memory.", at_least=0)
    preempted: int | Literal["unlimited"] = _key("unlimited", "After its machine was taken away.", at_least=0)
    store: int | Literal["unlimited"] = _key("unlimited", "After the store was away for too long.", at_least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    method: Literal["grid", "random", "optuna"] = _key("grid", "How configs are chosen.")
    num_samples: int | None = _key(None, "How many are drawn from the ranges, for each cell of the blocks.", at_least=1)
    seed: int = _key(0, "Decides the draws.", at_least=0)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drawn = {"num_samples": self.num_samples, "ranges": self.ranges}
        if self.method == "grid" and self.seed:
            raise ValueError("seed belongs to a search that draws; method is grid")
        for name, given in drawn.items():
            if self.method == "grid" and given:
                raise ValueError(f"{name} belongs to a search that draws; method is grid")
            if self.method != "grid" and not given:
                raise ValueError(f"{name} is missing, which method {self.method} needs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduler:
    method: Literal["none", "asha", "pbt", "median"] = _key(
        "none", "Which trials are stopped before their last epoch, or go on from a copy of a better one (pbt)."
    )
    metric: str = _key("top1", "What decides, for schedulers and searches.")
    mode: Literal["max", "min"] | None = _key(None, "Left out: max where higher is better, min where lower is.")
    grace_epochs: int = _key(1, "Epochs that every trial gets before it is compared.", at_least=1)
    reduction_factor: float = _key(4.0, "asha: one in so many goes on at each rung; rungs are grace_epochs * "
                                   "reduction_factor^k epochs.", above=1)  # fmt: skip
    min_trials: int = _key(3, "median: so many others must have come as far before any trial is stopped.", at_least=1)
    interval_epochs: int | None = _key(None, "pbt: epochs from one comparison of a trial to its next.", at_least=1)
    quantile_fraction: float = _key(
        0.25, "pbt: so much of the population is worst, and goes on from copies of as many that are best.",
        above=0, at_most=0.5,
    )  # fmt: skip
    resample_probability: float = _key(
        0.25, "pbt: chance that a setting of a copy is drawn anew from its whole range.", at_least=0, at_most=1
    )
    perturbation_factors: tuple[float, ...] = _key(
        (1.2, 0.8), "pbt: else it is multiplied by one of these, or, of choices, the next or the one before is taken.",
        above=0,
    )  # fmt: skip
    synchronous: bool = _key(
        False, "pbt: whether trials wait for one another at each comparison, so that all are held against equals."
    )
    seed: int = _key(0, "pbt: decides who is copied and how settings change.", at_least=0)
    within: tuple[str, ...] = ()
    """Settings: a trial is compared with those only that have the same values."""
    mutations: Mapping[str, Range] = field(default_factory=dict)
    """pbt: what may change in a copy, and within which limits."""

    def __post_init__(self) -> None:
        given = [name for name, default in self._defaults().items() if getattr(self, name) != default]
        for name in given:
            method = _OF_METHOD.get(name, "asha and median" if name == "within" else "pbt")
            if self.method not in ("none", *method.split(" and ")):
                raise ValueError(f"{name} belongs to method {method}; method is {self.method}")
        if self.method == "pbt":
            self._check_population()
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

    def _defaults(self) -> dict[str, Any]:
        """Of the keys that belong to some methods only."""
        shared = ("method", "metric", "mode", "grace_epochs")
        own = {name: each.default for name, each in fields_of(Scheduler).items() if name not in shared}
        return {**own, "within": (), "mutations": {}}

    def _check_population(self) -> None:
        for name in ("interval_epochs", "mutations"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing, which method pbt needs")
        if not self.perturbation_factors:
            raise ValueError("perturbation_factors must name at least one factor")

    def population(self, sweep: str) -> str:
        """pbt: what a trial is besides its config; else nothing. It is made with the other trials of its sweep, so the
        name of that belongs to it: no other sweep has this trial. As in any identity, what has its default is left out,
        so that a new key keeps old ids; a default that changes does not.
        """
        if self.method != "pbt":
            return ""
        spoken = {name: getattr(self, name) for name, default in self._defaults().items()
                  if name != "mutations" and getattr(self, name) != default}  # fmt: skip
        told = {"metric": self.metric, "grace_epochs": self.grace_epochs, **spoken}
        least = {spec.name: spec.default for spec in dataclasses.fields(Range)}
        mutations = {
            name: {key: value for key, value in dataclasses.asdict(each).items() if value != least[key]}
            for name, each in self.mutations.items()
        }
        return digest({"sweep": sweep, "scheduler": told, "mutations": mutations})

    def kin(self, config: TrialConfig) -> tuple[tuple[str, Any], ...]:
        """pbt: what a trial has in common with those that it may be copied from: all that a copy does not change."""
        silent = ineffective(config) | self.mutations.keys() | {"seed"}
        return tuple((name, value) for name, value in flatten(config).items() if name not in silent)

    def milestones(self, epochs: int) -> range:
        """pbt: the epochs after which a trial of so many is compared with the others; the last is none."""
        first, every = max(self.grace_epochs, self.interval_epochs or 1), self.interval_epochs or epochs
        return range(first, epochs, every)


_OF_METHOD = {"reduction_factor": "asha", "min_trials": "median"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """A row made from the stored logits of several seeds of each cell."""

    of: str
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Numbers from a paper, told beside ours."""

    label: str | None
    """What the paper calls it: of a method that no setting stands for, all that there is to say of it."""
    where: Mapping[str, Any]
    """The settings that it was trained with, by dotted name; empty for a method that cannot be trained here."""
    metrics: Mapping[str, float]
    source: str
    members: int = 1
    """Above 1: of an ensemble of so many such networks."""

    @property
    def name(self) -> str:
        return self.label or ", ".join(f"{name} {value}" for name, value in self.where.items())


SECTIONS: dict[str, Any] = {
    "search": Search, "scheduler": Scheduler, "resources": Resources, "checkpoints": Checkpoints, "budget": Budget,
    "price": Price, "retry": Retry,
}  # fmt: skip


IN_QUICK = ("search", "scheduler")
"""The sections of which `quick` may lay keys over: how many draws and epochs there are decides what fits."""


def section_keys() -> list[str]:
    """`resources.workers` and its like, as `-S` names them."""
    return [f"{section}.{name}" for section, kind in SECTIONS.items() for name in fields_of(kind)]


# ------------------------------------------------------------------------------------------------------------- reading


def read_section(key: str, node: Node | None, reader: Reader) -> Any:
    """The section that a file gives under `key`; its defaults when the file gives none."""
    kind = SECTIONS[key]
    if node is None:
        return kind()
    fields = fields_of(kind)
    entries = reader.entries(node, key, [each.name for each in dataclasses.fields(kind)])
    given = {
        name: reader.typed(fields[name], child, f"{key}.{name}") for name, child in entries.items() if name in fields
    }
    if "ranges" in entries:
        given["ranges"] = read_ranges(entries["ranges"], f"{key}.ranges", reader)
    if "within" in entries:
        given["within"] = _read_within(entries["within"], f"{key}.within", reader)
    if "mutations" in entries:
        given["mutations"] = _read_mutations(entries["mutations"], f"{key}.mutations", reader)
    return _made(kind, given, Node(entries, node.place), key, reader)


def _made(kind: Any, given: Mapping[str, Any], node: Node, path: str, reader: Reader) -> Any:
    """A section from its values. What they say together is blamed on the field that the message begins with."""
    required = [each.name for each in dataclasses.fields(kind) if _has_no_default(each)]
    missing = [name for name in required if name not in node.value]
    if missing:
        reader.faults.add(node.place, path, f"{' and '.join(missing)} must be given")
    if missing or MISSING in given.values():
        return None
    try:
        return kind(**given)
    except ValueError as error:
        name, _, reason = str(error).partition(" ")
        place = node.value[name].place if name in node.value else node.place
        reader.faults.add(place, f"{path}.{name}", reason)
    return None


def _has_no_default(spec: "dataclasses.Field[Any]") -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _read_within(node: Node, path: str, reader: Reader) -> Any:
    before, names = len(reader.faults.lines), []
    for each in reader.elements(node, path):
        name = reader.text(each, path)
        if name is not None and name not in settings():
            reader.faults.add(each.place, path, f"must be settings (got {show(name)}){nearest(name, settings())}")
        names.append(name)
    return tuple(names) if len(reader.faults.lines) == before else MISSING


def _read_mutations(node: Node, path: str, reader: Reader) -> Any:
    """Ranges, as a search has them, of settings that may change while a network is trained."""
    before = len(reader.faults.lines)
    changeable = [name for name, each in settings().items() if each.setting.changeable]
    for name, child in reader.named(node, path):
        if name not in changeable:
            told = f"cannot change during a training; those that can are {', '.join(changeable)}"
            reader.faults.add(child.place, f"{path}.{name}", told)
        elif isinstance(child.value, dict) and "when" in child.value:
            told = "belongs to a search: a trial keeps the settings that its condition would look at"
            reader.faults.add(child.value["when"].place, f"{path}.{name}.when", told)
    return read_ranges(node, path, reader) if len(reader.faults.lines) == before else MISSING


def read_ensembles(node: Node | None, groups: Collection[str] | None, reader: Reader) -> tuple[Ensemble, ...]:
    """`groups` are what `of` may name: labels of blocks and mixing methods. None allows any name."""
    found = []
    for index, each in enumerate(reader.elements(node, "ensembles") if node else (), start=1):
        path = f"ensembles[{index}]"
        entries = reader.entries(each, path, ("of", "members"))
        if len(entries) < 2:
            reader.faults.add(each.place, path, "`of` and `members` must be given")
            continue
        of = reader.text(entries["of"], f"{path}.of")
        if of is not None and groups is not None and of not in groups:
            rule = f"must be a label or a mixing method of the sweep: {', '.join(sorted(groups)) or 'it has none'}"
            reader.faults.add(entries["of"].place, f"{path}.of", f"{rule} (got {show(of)}){nearest(of, groups)}")
        found.append(Ensemble(of=of or "", members=_read_members(entries["members"], f"{path}.members", reader)))
    return tuple(found)


def _read_members(node: Node, path: str, reader: Reader) -> tuple[int, ...]:
    counts = node.plain()
    if isinstance(counts, list) and counts and all(type(count) is int and count >= 2 for count in counts):
        return tuple(counts)
    rule = "must be a list of whole numbers of at least 2: how many seeds form an ensemble"
    reader.faults.add(node.place, path, f"{rule} (got {show(counts)})")
    return ()


def read_published(node: Node | None, reader: Reader) -> tuple[Published, ...]:
    found = []
    for index, each in enumerate(reader.elements(node, "published") if node else (), start=1):
        path = f"published[{index}]"
        entries = reader.entries(each, path, ("label", "where", "members", "source", *BY_NAME))
        given = {key: child for key, child in entries.items() if key in BY_NAME}
        if not {"label", "where"} & entries.keys() or "source" not in entries or not given:
            told = "`label` or `where`, `source`, and at least one metric, such as top1, must be given"
            reader.faults.add(each.place, path, told)
            continue
        where = _read_where(entries["where"], f"{path}.where", reader) if "where" in entries else {}
        label = reader.text(entries["label"], f"{path}.label") if "label" in entries else None
        metrics = {name: reader.typed(metric_field(name), child, f"{path}.{name}") for name, child in given.items()}
        source = reader.text(entries["source"], f"{path}.source")
        values = {name: setting.value for name, setting in where.items()}
        members = reader.typed(MEMBERS, entries["members"], f"{path}.members") if "members" in entries else 1
        found.append(Published(label=label, where=values, metrics=metrics, source=source or "", members=members))
    return tuple(found)


MEMBERS = Field(int, Setting(1, "How many networks predict together.", at_least=2))


def _read_where(node: Node, path: str, reader: Reader) -> Given:
    """Settings, or a list of them laid one over another, so that an anchor can hold what many entries share."""
    given: Given = {}
    for layer in node.value if isinstance(node.value, list) else [node]:
        entries = dict(reader.mapping(layer, path))
        given |= read_recipe(entries.pop("recipe", None), f"{path}.recipe", reader)
        given |= reader.given(Node(entries, layer.place), path)
    return given


def read_recipe(node: Node | None, path: str, reader: Reader) -> Given:
    """The settings that a recipe stands for, each placed where the recipe is named."""
    if node is None:
        return {}
    recipe = node.plain()
    if not isinstance(recipe, str) or recipe not in RECIPES:
        near = nearest(recipe, RECIPES) if isinstance(recipe, str) else ""
        known = " or ".join(show(each) for each in RECIPES)
        reader.faults.add(node.place, path, f"must be {known} (got {show(recipe)}){near}")
        return {}
    return {name: Node(value, f"{node.place} (recipe {recipe})") for name, value in RECIPES[recipe].items()}


def metric_field(name: str) -> Field:
    metric = BY_NAME[name]
    return Field(float, Setting(None, metric.meaning, at_least=0, at_most=1 if metric.unit == "fraction" else None))
