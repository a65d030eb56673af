"""A sweep file and the trials it stands for: parsed strictly, expanded, each named by the hash of its config. Pure.

The format is docs/sweep-file.md. Every fault of a file is told at once, each with its place, what was given, what is
allowed and the nearest word that would do.
"""

import functools
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import SweepError
from orchestrator.sweep.blocks import Block, Expansion, OpenCell, Trial, read_block
from orchestrator.sweep.document import Faults, Node, nearest, read, read_value, show
from orchestrator.sweep.fields import MISSING, Exchange, Given, Reader, settings
from orchestrator.sweep.ranges import Draw, Range, Space, at_random, corners
from orchestrator.sweep.rules import Rule, read_rule
from orchestrator.sweep.schema import json_schema
from orchestrator.sweep.sections import (
    IN_QUICK,
    SECTIONS,
    Budget,
    Checkpoints,
    Ensemble,
    Price,
    Published,
    Resources,
    Retry,
    Scheduler,
    Search,
    read_ensembles,
    read_published,
    read_recipe,
    read_section,
    section_keys,
)  # fmt: skip

__all__ = [
    "Budget", "Checkpoints", "Draw", "Ensemble", "OpenCell", "Price", "Published", "Range", "Resources", "Retry",
    "Scheduler", "Search",
    "Shown", "Sweep", "SweepError", "Trial", "check_runnable", "is_quick", "json_schema", "load", "not_runnable",
    "parse", "shown",
]  # fmt: skip

KEYS = ("name", "trial", "blocks", "exclude", "seeds", "baseline", *SECTIONS, "ensembles", "published", "quick")
MOST_TRIALS = 1_000_000
_QUICK = "-quick"
_RUN_WITH = "# run with: "
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    name: str
    trials: tuple[Trial, ...]
    """Of a search that draws as it goes, those that it has drawn so far (`searching.taken_up`)."""
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
    open_cells: tuple[OpenCell, ...] = ()
    """Where the search draws as it goes."""

    @property
    def text_as_run(self) -> str:
        """The file as given, under a comment that has what the command line laid over it, if anything, for `shown`."""
        words = ["--quick"] if self.quick else []
        words += [word for each in self.overrides for word in ("-S", " ".join(each.splitlines()))]
        return f"{_RUN_WITH}{shlex.join(words)}\n{self.text}" if words else self.text

    @property
    def examples(self) -> tuple[Trial, ...]:
        """The trials, and of cells that are drawn as it goes those with the greatest values."""
        *_, most = corners()
        return (*self.trials, *(trial for cell in self.open_cells for trial in cell.trials(most)))

    def likely(self) -> tuple[Trial, ...]:
        """As many trials as a search may still draw, drawn at random instead: for what is reckoned beforehand. Fewer
        where rules leave out most of what is drawn.
        """
        drawn = (
            trial
            for number in range(4 * (self.search.num_samples or 0))
            for cell in self.open_cells
            for trial in cell.trials(at_random(self.search.seed, number))
        )
        return tuple(itertools.islice(drawn, self.to_draw))

    @property
    def to_draw(self) -> int:
        """How many trials such a search may still draw."""
        return max(0, len(self.open_cells) * (self.search.num_samples or 0) * len(self.seeds) - len(self.trials))


def load(path: str | Path, *, overrides: Sequence[str] = (), quick: bool = False) -> Sweep:
    """The sweep that a file stands for. Of a path that is not there, the file of that name which comes with mixmo, such
    as `sweeps/quickstart.yaml`, where there is one.

    overrides are `setting=value` as after `-S`; quick lays the file's `quick` section over it and renames it. Raises
    SweepError, with one line for each fault.
    """
    try:
        text = _present(Path(path)).read_bytes().decode("utf-8-sig")
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


def _present(path: Path) -> Path:
    if not path.exists() and path.parts[:1] == ("sweeps",):
        for folder in ("mixmo_sweeps", "sweeps"):  # as installed, and as checked out
            ours = Path(__file__).parents[2].joinpath(folder, *path.parts[1:])
            if ours.is_file():
                return ours
    return path


def parse(text: str, *, source: str, overrides: Sequence[str] = (), quick: bool = False) -> Sweep:
    """As `load`, of a file's text; `source` is what faults call it."""
    faults = Faults()
    root = read(text, source, faults)
    faults.raise_any()
    if root is None or root.value is None:
        raise SweepError(f"{source}: the file is empty; it must at least give a name and a trial")
    if not isinstance(root.value, dict):
        raise SweepError(f"{source}:1: a sweep file is a mapping of {', '.join(KEYS)}")
    parser = _Parser(Reader(faults).entries(root, "", KEYS), source, faults, Reader(faults))
    return parser.sweep(text, tuple(overrides), quick=quick)


def is_quick(name: str) -> bool:
    """Whether a sweep of this name is the quick form of its file: no other name may end so."""
    return name.endswith(_QUICK)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a sweep file asks of the tables and the screen of its results."""

    baseline: str | None = None
    ensembles: tuple[Ensemble, ...] = ()
    published: tuple[Published, ...] = ()
    price: Price = Price()
    budget: Budget = Budget()


@functools.lru_cache(maxsize=64)
def shown(text: str, source: str) -> Shown:
    """What a stored sweep file (`Sweep.text_as_run`) asks of tables, without expanding its trials; nothing where it
    cannot be read.
    """
    faults = Faults()
    root = read(text, source, faults)
    if root is None or not isinstance(root.value, dict) or faults.lines:
        return Shown()
    reader = Reader(faults)
    parser = _Parser({**root.value}, source, faults, reader)
    parser.lay_over(_overrides_in(text))
    top = parser.top
    baseline = top.get("baseline")
    ensembles = read_ensembles(top.get("ensembles"), None, reader)
    published = read_published(top.get("published"), reader)
    price, budget = (read_section(key, top.get(key), reader) for key in ("price", "budget"))
    named = str(baseline.value) if baseline and baseline.value is not None else None
    return Shown(named) if faults.lines else Shown(named, ensembles, published, price, budget)


def _overrides_in(text: str) -> list[str]:
    first, _, _ = text.partition("\n")
    if not first.startswith(_RUN_WITH):
        return []
    words = shlex.split(first.removeprefix(_RUN_WITH))
    return [value for option, value in itertools.pairwise(words) if option == "-S"]


@dataclass(slots=True)
class _Parser:
    top: dict[str, Node]
    """The file's keys; overrides replace what they name."""
    source: str
    faults: Faults
    reader: Reader
    members: dict[str, int] = field(default_factory=dict)
    """Seeds that `quick.seeds` leaves to the cells of each label or method, for the ensembles made of them."""

    def sweep(self, text: str, overrides: tuple[str, ...], *, quick: bool) -> Sweep:
        base = self._trial()
        over, exchanges = self._quick(asked=quick)
        over |= self.lay_over(overrides)
        name = self._name(quick=quick)
        blocks, excludes, seeds = self._blocks(), self._excludes(), self._seeds()
        sections = {key: read_section(key, self.top.get(key), self.reader) for key in SECTIONS}
        labels = tuple(dict.fromkeys(block.label for block in blocks if block.label))
        search: Search | None = sections["search"]
        base = self._held_out(base, sections["scheduler"], search)
        published = read_published(self.top.get("published"), self.reader)
        self._hold_limit(blocks, seeds, search)
        self.faults.raise_any()
        baseline = self._baseline(labels)
        expansion = Expansion(
            base, over, excludes, seeds, self._workers(sections["resources"]), self.faults, exchanges,
            self.members, space=Space(search.ranges, self.top["search"].place) if search and search.ranges else Space(),
            draws=[at_random(search.seed, number) for number in range(search.num_samples or 0)] if search else (),
            population=sections["scheduler"].population(name) if sections["scheduler"] else "",
        )  # fmt: skip
        is_open = search is not None and search.method == "optuna"
        open_cells = expansion.open_cells(blocks) if is_open else ()
        trials = () if is_open else expansion.trials(blocks)
        ensembles = read_ensembles(self.top.get("ensembles"), {*labels, *expansion.methods()}, self.reader)
        self._check_whole(trials, open_cells, sections["scheduler"], sections["search"], blocks)
        self.faults.raise_any()
        varied = expansion.varied() if trials else _varied_by(blocks, sections["search"])
        return Sweep(
            name=name, trials=trials, varied=varied, seeds=seeds, labels=labels, baseline=baseline,
            **sections, ensembles=ensembles, published=published, quick=quick, overrides=overrides, text=text,
            source=self.source, origins=_origins(base, over, exchanges, blocks, sections["search"]),
            notes=(*expansion.notes(blocks), *self._notes(ensembles, seeds, sections, trials or open_cells)),
            open_cells=open_cells,
        )  # fmt: skip

    def _missing(self, key: str, why: str) -> None:
        self.faults.add(f"{self.source}:1", key, f"is missing: {why}")

    # ------------------------------------------------------------------------------------------ settings and overlays

    def _trial(self) -> Given:
        if "trial" not in self.top:
            self._missing("trial", "the settings that all trials share, such as {data: {dataset: digits}}")
            return {}
        node = self.top["trial"]
        entries = dict(self.reader.mapping(node, "trial"))
        recipe = read_recipe(entries.pop("recipe", None), "trial.recipe", self.reader)
        given = self.reader.given(Node(entries, node.place), "trial")
        if "seed" in given:
            seed = given.pop("seed")
            if "seeds" in self.top:
                self.faults.add(seed.place, "trial.seed", "given beside `seeds`; give one of the two")
            self.top["seeds"] = Node([seed], seed.place)
        return recipe | given

    def _quick(self, *, asked: bool) -> tuple[Given, dict[str, Exchange]]:
        """The `quick` section, which is checked whether it is asked for or not: values, and values for values."""
        if "quick" not in self.top:
            if asked:
                self._missing("quick", "the settings that --quick lays over the sweep")
            return {}, {}
        node = self.top["quick"]
        entries = dict(self.reader.mapping(node, "quick"))
        seeds = entries.pop("seeds", None)
        if seeds:
            self._seeds_of(seeds, "quick.seeds")
        for key in IN_QUICK:
            if key in entries:
                self._quick_section(key, entries.pop(key), asked=asked)
        exchanges: dict[str, Exchange] = {}
        given = self.reader.given(Node(entries, node.place), "quick", exchanges)
        if seed := given.get("seed") or exchanges.get("seed"):
            self.faults.add(seed.place, "quick.seed", "seeds are listed under `quick.seeds`")
        if asked and seeds:
            self.top["seeds"], self.members = seeds, self._members()
        return (given, exchanges) if asked else ({}, {})

    def _quick_section(self, key: str, node: Node, *, asked: bool) -> None:
        """Keys of a section, laid over those that the file gives."""
        over = self.reader.mapping(node, f"quick.{key}")
        before = self.top.get(key, Node({}, node.place))
        laid = Node({**(before.value if isinstance(before.value, dict) else {}), **over}, node.place)
        if asked:
            self.top[key] = laid
        else:
            read_section(key, laid, self.reader)

    def lay_over(self, overrides: Sequence[str]) -> Given:
        """Have overrides replace what the file gives; those of them that are settings of all trials."""
        given: Given = {}
        for text in overrides:
            name, equals, value = (part.strip() for part in text.partition("="))
            if not name or not equals or not value:
                self.faults.add(f"-S {text}", "", "must be setting=value, such as optim.epochs=3")
            elif node := read_value(value, f"-S {text}", self.faults):
                given |= self._override(name, node)
        return given

    def _override(self, name: str, node: Node) -> Given:
        """One `-S`: a setting is laid over every trial, any other key replaces what the file gives."""
        section, _, key = name.partition(".")
        if name in ("seed", "seeds"):
            self.members = {}
        if name == "seed":
            self.top["seeds"] = Node([node], node.place)
        elif name in ("seeds", "name", "baseline"):
            self.top[name] = node
        elif name in settings():
            value = self.reader.typed(settings()[name], node, name)
            return {} if value is MISSING else {name: Node(value, node.place)}
        elif name in section_keys():
            before = self.top.get(section, Node({}, node.place))
            entries = before.value if isinstance(before.value, dict) else {}
            self.top[section] = Node({**entries, key: node}, before.place)
        else:
            known = [*settings(), "seeds", "name", "baseline", *section_keys()]
            self.faults.add(node.place, name, f"no such setting{nearest(name, known)}")
        return {}

    # ------------------------------------------------------------------------------------- name, blocks, rules, seeds

    def _name(self, *, quick: bool) -> str:
        rule = "1 to 100 of a-z, 0-9, _ and -, beginning with a letter or digit, since it names a folder"
        if "name" not in self.top:
            self._missing("name", rule)
            return ""
        node = self.top["name"]
        name = node.value if isinstance(node.value, str) else ""
        if not _NAME.fullmatch(name):
            self.faults.add(node.place, "name", f"must be {rule} (got {show(node.plain())})")
        elif is_quick(name):
            self.faults.add(node.place, "name", f"must not end with {_QUICK}, which --quick appends (got {show(name)})")
        return name + _QUICK if quick else name

    def _blocks(self) -> list[Block]:
        if "blocks" not in self.top:
            return [Block("trial", self.top["trial"].place if "trial" in self.top else self.source)]
        nodes = self.reader.elements(self.top["blocks"], "blocks")
        return [read_block(node, f"blocks[{index}]", self.reader) for index, node in enumerate(nodes, start=1)]

    def _excludes(self) -> list[Rule]:
        if "exclude" not in self.top:
            return []
        node = self.top["exclude"]
        nodes = [node] if isinstance(node.value, str) else self.reader.elements(node, "exclude")
        return [rule for each in nodes if (rule := read_rule(each, "exclude", self.reader))]

    def _seeds(self) -> tuple[int, ...]:
        return self._seeds_of(self.top["seeds"], "seeds") if "seeds" in self.top else (0,)

    def _seeds_of(self, node: Node, path: str) -> tuple[int, ...]:
        given = node.plain()
        if type(given) is int and 1 <= given <= MOST_TRIALS:
            return tuple(range(given))
        setting = settings()["seed"]
        listed = isinstance(given, list) and given and not any(setting.refuses("seed", seed) for seed in given)
        if listed and len(set(given)) == len(given):
            return tuple(given)
        rule = f"must be a count, at least 1, or a list of different seeds, each {setting.allowed}"
        self.faults.add(node.place, path, f"{rule} (got {show(given)})")
        return ()

    def _baseline(self, labels: Sequence[str]) -> str | None:
        node = self.top.get("baseline")
        name = self.reader.text(node, "baseline") if node else None
        if node and name is not None and name not in labels:
            known = f"labels are {', '.join(labels)}" if labels else "no block has a `label`"
            self.faults.add(
                node.place,
                "baseline",
                f"must be the label of a block; {known} (got {show(name)}){nearest(name, labels)}",
            )
        return name

    # ------------------------------------------------------------------------------------- the sweep taken as a whole

    def _hold_limit(self, blocks: Sequence[Block], seeds: Sequence[int], search: Search | None) -> None:
        draws = (search.num_samples if search else None) or 1
        count = sum(block.size for block in blocks) * len(seeds) * draws
        if count > MOST_TRIALS:
            place = self.top["blocks"].place if "blocks" in self.top else self.source
            self.faults.add(place, "blocks", f"{count:,} trials, of at most {MOST_TRIALS:,}; split the sweep")

    def _workers(self, resources: Resources) -> Node:
        """How many, and where the file says so."""
        given = self.top["resources"].value.get("workers") if "resources" in self.top else None
        return Node(resources.workers, given.place if given else self.source)

    def _members(self) -> dict[str, int]:
        """How many networks the largest ensemble of each label or mixing method has; faults are told elsewhere."""
        found: dict[str, int] = {}
        for each in read_ensembles(self.top.get("ensembles"), None, Reader(Faults())):
            found[each.of] = max(found.get(each.of, 0), *each.members, 0)
        return found

    def _held_out(self, base: Given, scheduler: Scheduler | None, search: Search | None) -> Given:
        """Whoever chooses among trials does it by images that are held out, unless the file says otherwise."""
        chosen = [key for key, each in (("scheduler", scheduler), ("search", search)) if _chooses(each)]
        if not chosen or "evaluate.split" in base:
            return base
        place = self.top[chosen[0]].place
        return {**base, "evaluate.split": Node("validation", f"{place} ({chosen[0]})")}

    def _check_whole(
        self, trials: Sequence[Trial], cells: Sequence[OpenCell], scheduler: Scheduler, search: Search,
        blocks: Sequence[Block],
    ) -> None:  # fmt: skip
        """What only the trials and the sections together can show."""
        if not trials and not cells and not self.faults.lines:
            self.faults.add(self.source, "", "no trial is left; see the blocks' `when`, and `exclude`")
        shortest = min((trial.config.optim.epochs for trial in trials), default=scheduler.grace_epochs)
        if scheduler.method != "none" and scheduler.grace_epochs > shortest:
            told = f"must be at most the epochs of every trial, {shortest} (got {scheduler.grace_epochs})"
            self.faults.add(self.top["scheduler"].place, "scheduler.grace_epochs", told)
        if scheduler.method != "none" and scheduler.metric.startswith("cifar_c"):
            told = f"{scheduler.metric} is measured after a trial's last epoch alone, too late for a scheduler"
            self.faults.add(self.top["scheduler"].place, "scheduler.metric", told)
        if scheduler.method == "pbt":
            self._check_population(trials, scheduler, search)
        for name in search.ranges:
            if any(name in block.varied for block in blocks):
                self.faults.add(self.top["search"].place, f"search.ranges.{name}", "the blocks vary it too; give one")

    def _check_population(self, trials: Sequence[Trial], scheduler: Scheduler, search: Search) -> None:
        place = self.top["scheduler"].place
        if search.method == "optuna":
            told = "pbt changes what optuna has drawn, which would learn nothing true from it; use search.method random"
            self.faults.add(place, "scheduler.method", told)
        longest = max((trial.config.optim.epochs for trial in trials), default=0)
        if trials and not scheduler.milestones(longest):
            told = f"no trial is ever compared: the first time is after epoch {scheduler.milestones(longest).start}"
            self.faults.add(place, "scheduler.interval_epochs", f"{told}, and the longest has {longest}")
        every = {trial.config.evaluate.every for trial in trials}
        unseen = [each for each in every if any(epoch % each for epoch in scheduler.milestones(longest))]
        if unseen:
            told = f"evaluate.every {unseen[0]} leaves out epochs after which trials are compared"
            self.faults.add(place, "scheduler.interval_epochs", f"{told}; give multiples of it, also as grace_epochs")

    def _notes(
        self,
        ensembles: Sequence[Ensemble],
        seeds: Sequence[int],
        sections: Mapping[str, Any],
        trials: Sequence[Trial | OpenCell],
    ) -> list[str]:
        notes = []
        most = max((count for each in ensembles for count in each.members), default=0)
        if most > len(seeds) and not self.members:
            told = f"{most} members need as many seeds, not {len(seeds)}"
            notes.append(f"{self.top['ensembles'].place}: ensembles: {told}")
        if (search := sections["search"]).method != "grid":
            notes.append(
                f"{self.top['search'].place}: search: each cell stands for {search.num_samples} draws of ranges"
            )
        if sections["scheduler"].method == "pbt":
            notes += self._notes_on_populations(sections["scheduler"], trials)
        for key in (key for key in ("search", "scheduler") if _chooses(sections[key])):
            if any(_split(trial) == "test" for trial in trials):
                notes.append(
                    f"{self.top[key].place}: {key}: it chooses by test images, so what it finds looks better than it "
                    f"is; evaluate.split: validation chooses by others"
                )
        return notes

    def _notes_on_populations(self, scheduler: Scheduler, trials: Sequence[Trial | OpenCell]) -> list[str]:
        kin = Counter(scheduler.kin(trial.config) for trial in trials if isinstance(trial, Trial))
        sizes = ", ".join(f"{count} of {size}" for size, count in sorted(Counter(kin.values()).items()))
        place = f"{self.top['scheduler'].place}: scheduler"
        notes = [f"{place}: populations of trials that differ in seed and mutations only: {sizes} trials"]
        if alone := sum(size == 1 for size in kin.values()):
            notes.append(f"{place}: {alone} trials have no other to be compared with; give more seeds, or more values")
        return notes


def _chooses(section: Scheduler | Search | None) -> bool:
    """Whether trials are chosen by what they reach."""
    return section is not None and section.method not in ("none", "grid")


def _split(trial: Trial | OpenCell) -> str:
    """By which images a trial is measured."""
    if isinstance(trial, Trial):
        return trial.config.evaluate.split
    return next((each.config.evaluate.split for each in trial.trials(at_random(0, 0))), "")


def _varied_by(blocks: Sequence[Block], search: Search) -> tuple[str, ...]:
    """Where no trial is known yet, all that may differ."""
    names = {*search.ranges, *(name for block in blocks for name in block.varied)}
    return tuple(name for name in settings() if name in names)


def _origins(
    base: Given, over: Given, exchanges: Mapping[str, Exchange], blocks: Sequence[Block], search: Search
) -> dict[str, str]:
    varied = {name for block in blocks for name in block.varied} | {"seed", *search.ranges}
    placed = {name: node.place for name, node in base.items()} | {name: each.place for name, each in exchanges.items()}
    placed |= dict.fromkeys(varied, "varies")
    return dict.fromkeys(settings(), "default") | placed | {name: node.place for name, node in over.items()}


# ------------------------------------------------------------------------------------------------ what can be run now


def check_runnable(sweep: Sweep) -> None:
    """Raise SweepError, with a line for each thing that the sweep asks for and that a run cannot honour yet."""
    lines = not_runnable(sweep)
    if lines:
        raise SweepError("\n".join(f"{sweep.source}: {line}" for line in lines))


def not_runnable(sweep: Sweep) -> list[str]:
    """What the sweep asks for and a run cannot honour yet, a line for each."""
    wanted = {
        f"resources.slots: {sweep.resources.slots} with scheduler.method: pbt": (
            sweep.scheduler.method == "pbt" and sweep.resources.slot_count > 1
        ),
    }
    return [f"{what}: understood, but not yet possible in a run" for what, is_wanted in wanted.items() if is_wanted]
