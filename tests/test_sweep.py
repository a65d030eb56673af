"""Sweep files: what they stand for, and what is refused."""

import contextlib
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mixmo_core.config import RECIPES, TrialConfig, flatten, trial_id, unflatten
from orchestrator.errors import ExitCode
from orchestrator.sweep import Sweep, SweepError, Trial, check_runnable, fields, load, parse, shown
from orchestrator.sweep import blocks as blocks_module
from orchestrator.sweep.document import Faults, Node
from orchestrator.sweep.ranges import Range
from orchestrator.sweep.sections import SECTIONS

ROOT = Path(__file__).resolve().parent.parent

DESIGN = """\
# What does a second subnetwork buy at each width?
name: cifar100_width
trial:
  recipe: cifar
  data:   {dataset: cifar100, train_images: all, batch_size: 64, repetition: 4, augmentation: standard, msda: none}
  model:  {arch: wide_resnet, depth: 28, width: 10, subnetworks: 2}
  mixing: {method: cutmix, probability: 0.5, alpha: 2, weight_root: 3}
  optim:  {epochs: 300, lr: 0.05, weight_decay: 6.0e-4}
  evaluate: {split: test, every: 1}
blocks:
  - grid: {model.width: [2, 5, 10], mixing.method: [linear, cutmix]}
  - label: vanilla
    set:  {model.subnetworks: 1, data.repetition: 1}
    grid: {model.width: [2, 5, 10]}
  - zip:  {model.width: [2, 10], optim.lr: [0.1, 0.05]}
    when: "model.subnetworks > 1"
exclude: ["model.width == 10 and model.subnetworks > 3"]
seeds: 3
baseline: vanilla
search:      {method: grid}
scheduler:   {method: none}
resources:   {workers: 1, gpus_per_worker: 1, cpus_per_worker: 1, accelerator: any, spot: true, slots: auto, max_gangs: auto}
checkpoints: {every_s: auto, keep: last}
budget:      {gpu_hours: 400, trials: 5000}
price:       {gpu_hour: 2.5, currency: USD}
retry:       {crash: 2, oom: 0, preempted: unlimited}
ensembles:   [{of: cutmix, members: [2, 3]}]
published:   [{where: {mixing.method: cutmix, model.width: 10}, top1: 0.8540, source: "Table 1"}]
quick:       {model.depth: 10, optim.epochs: 5, data.train_images: 2000}
"""  # noqa: E501

BASE = """\
name: widths
trial:
  data: {dataset: digits, batch_size: 32}
  model: {depth: 10, width: 1}
blocks:
  - label: vanilla
    set: {model.subnetworks: 1}
  - grid: {mixing.method: [sum, linear]}
seeds: 2
baseline: vanilla
"""


def read(text: str, **given: Any) -> Sweep:
    return parse(text, source="x.yaml", **given)


def small(rest: str, **given: Any) -> Sweep:
    """A sweep on digits with these lines besides."""
    return read("name: small\ntrial: {data: {dataset: digits}, model: {depth: 10}}\n" + rest, **given)


def values(sweep: Sweep, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(flatten(trial.config)[name] for name in names) for trial in sweep.trials]


# ---------------------------------------------------------------------------- what a file stands for


def test_the_file_of_the_design() -> None:
    sweep = read(DESIGN)
    grid = list(itertools.product([2, 5, 10], ["linear", "cutmix"]))
    cells = [(width, 2, method, 0.05, 4) for width, method in grid]
    cells += [(width, 1, "cutmix", 0.05, 1) for width in (2, 5, 10)]
    cells += [(2, 2, "cutmix", 0.1, 4)]  # the other pair of the zip is in the grid already
    names = ("model.width", "model.subnetworks", "mixing.method", "optim.lr", "data.repetition", "seed")
    assert values(sweep, *names) == [(*cell, seed) for seed in range(3) for cell in cells]
    assert set(values(sweep, "model.depth", "optim.epochs", "data.train_images")) == {(28, 300, "all")}
    assert [trial.label for trial in sweep.trials[:10]] == [None] * 6 + ["vanilla"] * 3 + [None]
    assert [trial.position for trial in sweep.trials] == list(range(30))
    assert (sweep.name, sweep.baseline, sweep.seeds, sweep.labels) == (
        "cifar100_width",
        "vanilla",
        (0, 1, 2),
        ("vanilla",),
    )
    assert sweep.text == DESIGN
    assert sweep.varied == ("data.repetition", "model.width", "model.subnetworks", "mixing.method", "optim.lr")
    assert (sweep.resources.gpus_per_worker, sweep.resources.slots, sweep.resources.spot) == (1.0, "auto", True)
    assert (sweep.checkpoints.every_s, sweep.checkpoints.keep) == ("auto", "last")
    assert (sweep.budget.gpu_hours, sweep.budget.trials, sweep.price.gpu_hour) == (400.0, 5000, 2.5)
    assert (sweep.retry.crash, sweep.retry.oom, sweep.retry.preempted) == (2, 0, "unlimited")
    assert [(each.of, each.members) for each in sweep.ensembles] == [("cutmix", (2, 3))]
    assert dict(sweep.published[0].metrics) == {"top1": 0.854}
    assert dict(sweep.published[0].where) == {"mixing.method": "cutmix", "model.width": 10}
    assert len(sweep.notes) == 1
    assert "excludes nothing" in sweep.notes[0]


def test_the_smallest_file() -> None:
    sweep = read("name: a\ntrial: {data: {dataset: digits}}\n")
    assert [trial.config for trial in sweep.trials] == [unflatten({"data.dataset": "digits"})]
    assert (sweep.varied, sweep.notes, sweep.baseline) == ((), (), None)


@given(strategies.flats())
def test_settings_come_through_as_written(flat: dict[str, Any]) -> None:
    """Nested by section in the file, typed in the config: every setting of every valid config."""
    import json

    sections: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[key] = value
    sweep = read(f"name: a\ntrial: {json.dumps(sections)}\n" if sections else "name: a\ntrial: {data: {}}\n")
    assert [trial.config for trial in sweep.trials] == [unflatten(flat)]


@given(st.data())
def test_every_cell_gets_its_first_seed_before_any_gets_its_second(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
    seeds = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    sweep = small(f"blocks: [grid: {{model.width: {widths}, model.subnetworks: {counts}}}]\nseeds: {seeds}\n")
    expected = [(width, count, seed) for seed in seeds for width in widths for count in counts]
    assert values(sweep, "model.width", "model.subnetworks", "seed") == expected


def test_the_same_trial_in_two_blocks_is_one_trial_of_the_first_label() -> None:
    sweep = small(
        "blocks:\n  - {label: one, grid: {model.width: [1, 2]}}\n  - {label: two, grid: {model.width: [2, 3]}}\n"
        "  - {label: three, set: {model.width: 3}}\nbaseline: three\n"
    )
    assert [(trial.label, trial.config.model.width) for trial in sweep.trials] == [("one", 1), ("one", 2), ("two", 3)]
    assert sweep.labels == ("one", "two", "three")
    assert sweep.notes == ("x.yaml:6: blocks[3]: gives no trial that another block does not give",)


def test_one_vanilla_net_whatever_would_be_mixed() -> None:
    sweep = small("blocks: [{set: {model.subnetworks: 1}, grid: {mixing.method: [sum, linear, cutmix]}}]\n")
    assert len(sweep.trials) == 1


@given(st.permutations(range(4)))
def test_the_order_of_blocks_changes_no_id(order: list[int]) -> None:
    lines = [f"  - grid: {{model.width: [{width}, {width + 1}]}}\n" for width in range(1, 5)]
    ids = {trial.trial_id for trial in small("blocks:\n" + "".join(lines[i] for i in order)).trials}
    assert ids == {trial.trial_id for trial in small("blocks:\n" + "".join(lines)).trials}
    assert len(ids) == 5


def test_zip_pairs_and_crosses_with_the_grid() -> None:
    sweep = small("blocks: [{grid: {model.subnetworks: [2, 3]}, zip: {model.width: [1, 2], optim.lr: [0.1, 0.2]}}]\n")
    pairs = [(1, 0.1), (2, 0.2)]
    assert values(sweep, "model.subnetworks", "model.width", "optim.lr") == [
        (M, *pair) for M in (2, 3) for pair in pairs
    ]


def test_when_and_exclude_choose_before_settings_must_agree() -> None:
    """Repetition 3 does not divide 32 and 64: those cells are left out, and so are no fault."""
    grid = "grid: {data.repetition: [1, 3], data.batch_size: [32, 33, 64]}"
    expected = [(1, 32), (1, 33), (1, 64), (3, 33)]
    for rule in (
        f"blocks: [{{{grid}, when: data.batch_size % data.repetition == 0}}]\n",
        f"blocks: [{{{grid}}}]\nexclude: data.batch_size % data.repetition != 0\n",
    ):
        assert values(small(rule), "data.repetition", "data.batch_size") == expected


def test_a_rule_sees_defaults_and_the_seed() -> None:
    sweep = small(
        "seeds: 3\nblocks: [grid: {model.width: [1, 2]}]\nexclude: ['seed == 1 and model.width > 1', 'optim.lr > 1']\n"
    )
    assert values(sweep, "model.width", "seed") == [(1, 0), (2, 0), (1, 1), (1, 2), (2, 2)]
    assert [note.split(": ")[2] for note in sweep.notes] == ["'optim.lr > 1' excludes nothing"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_expanded_before_hashing(recipe: str) -> None:
    named = read(f"name: a\ntrial: {{recipe: {recipe}, data: {{dataset: tiny_imagenet}}, optim: {{epochs: 7}}}}\n")
    expected = unflatten({**RECIPES[recipe], "data.dataset": "tiny_imagenet", "optim.epochs": 7})
    assert named.trials[0].config == expected
    assert named.trials[0].trial_id == trial_id(expected)


def test_one_seed_may_stand_in_the_trial() -> None:
    assert read("name: a\ntrial: {data: {dataset: digits}, seed: 5}\n").seeds == (5,)


def test_yaml_is_1_2() -> None:
    sweep = read("name: a\ntrial: {data: {dataset: digits}, optim: {lr: 1e-3, weight_decay: 0}}\nblocks: [label: no]\n")
    assert (sweep.trials[0].config.optim.lr, sweep.trials[0].label) == (0.001, "no")
    assert type(sweep.trials[0].config.optim.weight_decay) is float


def test_anchors_and_dotted_names_serve() -> None:
    sweep = read(
        "name: a\ntrial: {data.dataset: digits, model: {depth: 10}}\n"
        "blocks: [grid: &grid {model.width: [1, 2]}, {set: {model.subnetworks: 1}, grid: *grid}]\n"
    )
    assert values(sweep, "model.subnetworks", "model.width") == [(2, 1), (2, 2), (1, 1), (1, 2)]


def test_a_setting_without_effect_does_not_vary() -> None:
    vanilla = "set: {model.subnetworks: 1, mixing.alpha: 7}"
    sweep = small(f"blocks: [{vanilla}, set: {{mixing.method: cutmix}}, set: {{mixing.method: linear}}]\n")
    assert sweep.varied == ("model.subnetworks", "mixing.method")


def test_trials_know_their_ids() -> None:
    for trial in read(DESIGN).trials:
        alone = Trial(trial.config, None, trial.workers, 0)
        assert (trial.trial_id, trial.cell_id, trial.digest) == (alone.trial_id, alone.cell_id, alone.digest)
        assert trial.trial_id == trial.digest[:12] == trial_id(trial.config)


def test_workers_enter_every_id() -> None:
    one, two = small("resources: {workers: 1}\n"), small("resources: {workers: 2}\n")
    assert one.trials[0].trial_id == small("").trials[0].trial_id != two.trials[0].trial_id
    assert two.trials[0].workers == 2


def test_two_trials_with_one_short_id_are_refused() -> None:
    trial = small("").trials[0]
    other = Trial(trial.config, None, 1, 0)
    vars(other)["digest"] = trial.trial_id + "0" * 52
    faults = Faults()
    given = {"data.dataset": Node("digits", "x:2"), "model.depth": Node(10, "x:2")}
    expansion = blocks_module.Expansion(given, {}, [], [0], Node(1, "x"), faults, found={trial.trial_id: other})
    expansion.trials([blocks_module.Block("trial", "x:2")])
    assert list(faults.lines) == [f"x:2: trial: two trials share the id {trial.trial_id}; change a seed"]


# ---------------------------------------------------------------------------- what is laid over a file


def test_quick_lies_over_all_and_renames() -> None:
    sweep = read(DESIGN, quick=True)
    assert (sweep.name, sweep.quick) == ("cifar100_width-quick", True)
    assert set(values(sweep, "model.depth", "optim.epochs", "data.train_images")) == {(10, 5, 2000)}
    assert len(sweep.trials) == 30


def test_quick_may_have_its_own_seeds() -> None:
    text = BASE + "quick: {optim.epochs: 1, seeds: 1}\n"
    assert (read(text).seeds, read(text, quick=True).seeds) == ((0, 1), (0,))


WIDE = (
    "name: a\ntrial: {data: {dataset: digits}, model: {depth: 10, width: 4}}\n"
    "blocks: [{label: one, set: {model.subnetworks: 1}, grid: {model.width: [2, 5, 10]}}, {label: two}]\n"
)


def test_quick_may_put_a_value_in_the_place_of_each() -> None:
    text = WIDE + "quick: {model.width: {from: [2, 4, 5, 10], to: [1, 1, 2, 2]}, optim: {epochs: 2}}\n"
    assert values(read(text), "model.width") == [(2,), (5,), (10,), (4,)]
    made = read(text, quick=True)
    assert values(made, "model.width", "model.subnetworks", "optim.epochs") == [(1, 1, 2), (2, 1, 2), (1, 2, 2)]
    assert made.origins["model.width"] == "varies"
    over = read(text, quick=True, overrides=["model.width=7"])
    assert values(over, "model.width", "model.subnetworks") == [(7, 1), (7, 2)]
    nested = text.replace("model.width: {from", "model: {width: {from").replace("2]}, opt", "2]}}, opt")
    assert read(nested, quick=True).trials == made.trials


def test_an_exchange_lists_every_value() -> None:
    text = WIDE + "quick: {model.width: {from: [2, 4, 5], to: [1, 1, 2]}}\n"
    with pytest.raises(
        SweepError, match=r"x.yaml:4: quick.model.width: `from` lacks 10, which blocks\[1\] has; it must"
    ):
        read(text, quick=True)
    read(text)
    read(text, quick=True, overrides=["model.width=3"])


def test_quick_leaves_the_seeds_that_ensembles_are_made_of() -> None:
    text = WIDE + "seeds: 5\nensembles: [{of: one, members: [2, 3]}]\nquick: {seeds: [7]}\n"
    made = read(text, quick=True)
    seeds = {label: {trial.config.seed for trial in made.trials if trial.label == label} for label in ("one", "two")}
    assert seeds == {"one": {7, 0, 1}, "two": {7}}
    assert (made.seeds, made.notes) == ((7,), ())
    assert len(read(text).trials) == 20
    asked = read(text, quick=True, overrides=["seeds=1"])
    assert {trial.config.seed for trial in asked.trials} == {0}
    assert "3 members need as many seeds, not 1" in asked.notes[0]
    by_method = read(text.replace("of: one", "of: cutmix"), quick=True)
    assert [trial.config.seed for trial in by_method.trials if trial.label == "two"] == [7, 0, 1]


def test_published_settings_may_be_laid_over_each_other() -> None:
    shared = "&paper {recipe: cifar, model: {width: 10}, precision: fp32}"
    text = WIDE + (
        f"published: [{{where: [{shared}, {{model.width: 2}}], top1: 0.5, source: T}}, "
        f"{{label: DE, where: [*paper, {{model.subnetworks: 1}}], members: 2, top1: 0.6, source: T}}]\n"
    )
    first, second = read(text).published
    assert first.where == {**RECIPES["cifar"], "model.width": 2, "precision": "fp32"}
    assert second.where == {**RECIPES["cifar"], "model.width": 10, "precision": "fp32", "model.subnetworks": 1}
    assert (first.members, second.members) == (1, 2)


def test_overrides_lie_over_quick_and_over_the_blocks() -> None:
    sweep = read(DESIGN, quick=True, overrides=["optim.epochs=3", "model.width=2", "seeds=[4]", "optim.decay_at=[0.5]"])
    assert set(values(sweep, "optim.epochs", "model.width", "seed", "optim.decay_at")) == {(3, 2, 4, (0.5,))}
    assert len(sweep.trials) == 4
    assert sweep.overrides[0] == "optim.epochs=3"
    assert sweep.text == DESIGN


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("price.gpu_hour=4",),
        ("price.currency='EUR'", "budget.hours=3", "budget.gpu_hours=5", "optim.lr=0.2"),
        ("seeds=[1, 2]", "name=other", "optim.epochs=4", "baseline=vanilla"),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_reader_of_the_stored_file_sees_what_the_command_line_laid_over_it(
    overrides: tuple[str, ...], quick: bool
) -> None:
    sweep = read(DESIGN, quick=quick, overrides=overrides)
    seen = shown(sweep.text_as_run, "x.yaml")
    assert (seen.baseline, seen.price, seen.budget) == (sweep.baseline, sweep.price, sweep.budget)
    assert (seen.ensembles, seen.published) == (sweep.ensembles, sweep.published)
    assert sweep.text_as_run.endswith(DESIGN)
    assert read(sweep.text_as_run).trials == read(DESIGN).trials  # to YAML it is a comment
    assert (sweep.text_as_run == DESIGN) == (not overrides and not quick)


def test_a_baseline_that_the_command_line_names_is_that_of_the_tables() -> None:
    blocks = "blocks:\n  - {label: one, set: {model.width: 1}}\n  - {label: two  words, set: {model.width: 2}}\n"
    sweep = small(blocks + "baseline: one\n", overrides=["baseline=two  words"])
    assert shown(sweep.text_as_run, "x.yaml").baseline == sweep.baseline == "two  words"


def test_overrides_reach_every_section() -> None:
    sweep = read(DESIGN, overrides=["resources.max_gangs=3", "name=other", "checkpoints.keep=none", "seed=7"])
    assert (sweep.resources.max_gangs, sweep.resources.gpus_per_worker) == (3, 1.0)
    assert (sweep.name, sweep.checkpoints.keep, sweep.seeds) == ("other", "none", (7,))
    assert small("", overrides=["retry.crash=unlimited"]).retry.crash == "unlimited"


def test_every_setting_tells_where_it_comes_from() -> None:
    origins = read(DESIGN, quick=True, overrides=["optim.lr=0.2"]).origins
    assert origins.keys() == flatten(TrialConfig()).keys()
    assert origins["optim.momentum"] == "x.yaml:4 (recipe cifar)"
    assert origins["data.dataset"] == "x.yaml:5"
    assert origins["model.width"] == "varies"
    assert origins["optim.epochs"] == "x.yaml:29"
    assert origins["optim.lr"] == "-S optim.lr=0.2"
    assert origins["precision"] == "default"


# ---------------------------------------------------------------------------- what is refused

ALLOWED = "allowed are settings, numbers, quoted text"
NAME_RULE = "1 to 100 of a-z, 0-9, _ and -"
LIST_RULE = "must be a list of values; one value stands under `set`"
SEEDS_RULE = (
    "must be a count, at least 1, or a list of different seeds, each a whole number, at least 0 and at most 4294967295"
)


def swap(before: str, after: str) -> str:
    assert BASE.count(before) == 1, before
    return BASE.replace(before, after)


def add(line: str) -> str:
    """A line 11 after the base's ten."""
    return f"{BASE}{line}\n"


def setting(section: str) -> str:
    """Another section of the trial, in line 4."""
    return swap("  model:", f"  {section}\n  model:")


def drawn(ranges: str) -> str:
    return add(f"search: {{method: random, num_samples: 3, ranges: {{{ranges}}}}}")


def population(mutations: str, more: str = "") -> str:
    """Of PBT, compared every 4 epochs unless `more` says otherwise."""
    keys = [f"mutations: {{{mutations}}}", *([more] if more else []),
            *([] if "interval_epochs" in more else ["interval_epochs: 4"])]  # fmt: skip
    return add(f"scheduler: {{method: pbt, {', '.join(keys)}}}")


def rule(text: str) -> str:
    return add(f"exclude: ['{text}']")


BAD: dict[str, tuple[str, str]] = {
    # The file as a whole.
    "empty": ("", "x.yaml: the file is empty"),
    "blank": (" \n\n", "x.yaml: the file is empty"),
    "only a comment": ("# nothing\n", "x.yaml: the file is empty"),
    "no YAML": ("name: [a\n", "x.yaml:2: this is not YAML: expected ',' or ']'"),
    "no end of a quote": ("name: 'a\ntrial: {}\n", "x.yaml:3: this is not YAML: found unexpected end of stream"),
    "a tab": ("name: a\ntrial:\n\tseed: 1\n", "x.yaml:3: this is not YAML: a tab where only spaces may stand"),
    "two documents": (add("---\nname: b"), "x.yaml:11: this is not YAML: the file holds more than one document"),
    "a list": ("- name: a\n", "x.yaml:1: a sweep file is a mapping of name, trial"),
    "a word": ("quickstart\n", "x.yaml:1: a sweep file is a mapping of name, trial"),
    "a Python object": (swap("name: widths", "name: !!python/name:os.system x"), "x.yaml:1: the tag !!python/name:os"),
    "nested without end": ("name: " + "[" * 1000, "x.yaml:1: lists and mappings are nested more than 20 deep"),
    "an alias of itself": (add("quick: &q {model.width: *q}"), "x.yaml:11: nested more than 20 deep"),
    "aliases that multiply": (
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")),
        "or more than 100000 values",
    ),
    # Keys.
    "a number for a key": (add("3: 4"), "x.yaml:11: a key must be text (got 3)"),
    "a list for a key": (add("? [a, b]\n: 4"), "x.yaml:11: a key must be text (got a list)"),
    "a merge key": (
        swap("{depth: 10, width: 1}", "{<<: {depth: 10}}"),
        "x.yaml:4: a key must be text (got <<); merging",
    ),
    "a duplicate key": (add("seeds: 3"), "x.yaml:11: seeds: given twice; the first is at x.yaml:9"),
    "a duplicate setting": (
        swap("width: 1}", "width: 1,\n    width: 2}"),
        "x.yaml:5: width: given twice; the first is at x.yaml:4",
    ),
    "a setting nested and dotted": (
        setting("model.width: 3"),
        "x.yaml:5: trial.model.width: given twice; the first is at x.yaml:4",
    ),
    "an unknown key": (swap("seeds: 2", "sedes: 2"), "x.yaml:9: sedes: no such key; allowed are name, trial, blocks"),
    "an unknown key, its neighbour": (swap("seeds: 2", "sedes: 2"), "; did you mean 'seeds'?"),
    "an unknown setting": (
        swap("width: 1", "widht: 1"),
        "x.yaml:4: trial.model.widht: no such setting; did you mean 'model.width'?",
    ),
    "an unknown section": (
        swap("  model:", "  modle:"),
        "x.yaml:4: trial.modle: no such setting; did you mean 'model'?",
    ),
    "an unknown key of a block": (
        swap("- grid", "- gird"),
        "x.yaml:8: blocks[2].gird: no such key; allowed are label, set, grid, zip, when; did you mean 'grid'?",
    ),
    # The name.
    "no name": (swap("name: widths\n", ""), f"x.yaml:1: name: is missing: {NAME_RULE}"),
    "a name with a slash": (swap("name: widths", "name: a/b"), f"x.yaml:1: name: must be {NAME_RULE}"),
    "a name that climbs": (swap("name: widths", "name: .."), "(got '..')"),
    "a name in capitals": (swap("name: widths", "name: Widths"), "(got 'Widths')"),
    "a name like an option": (swap("name: widths", "name: --help"), "(got '--help')"),
    "a number for a name": (swap("name: widths", "name: 3"), "(got 3)"),
    "a long name": (swap("name: widths", f"name: {'a' * 101}"), f"x.yaml:1: name: must be {NAME_RULE}"),
    "an empty name": (swap("name: widths", "name:"), "(got nothing)"),
    "the name of a quick run": (swap("name: widths", "name: a-quick"), "x.yaml:1: name: must not end with -quick"),
    # The trial and its settings.
    "no trial": ("name: a\n", "x.yaml:1: trial: is missing"),
    "an empty trial": (
        "name: a\ntrial:\n",
        "x.yaml:2: trial: must be a mapping (got nothing); fill it, or leave it out",
    ),
    "a word for a trial": ("name: a\ntrial: cifar\n", "x.yaml:2: trial: must be a mapping (got 'cifar')"),
    "a word for a section": (swap("{depth: 10, width: 1}", "wide_resnet"), "x.yaml:4: trial.model: must be a mapping"),
    "text for a number": (
        swap("width: 1", "width: ten"),
        "x.yaml:4: trial.model.width: must be a whole number, at least 1 (got the text 'ten')",
    ),
    "a number in quotes": (swap("width: 1", "width: '1'"), "must be a whole number, at least 1 (got the text '1')"),
    "a fraction for a count": (swap("width: 1", "width: 1.0"), "must be a whole number, at least 1 (got 1.0)"),
    "true for a count": (swap("width: 1", "width: true"), "must be a whole number, at least 1 (got true)"),
    "nothing for a count": (swap("width: 1", "width: "), "must be a whole number, at least 1 (got nothing)"),
    "a list for a count": (swap("width: 1", "width: [1, 2]"), "must be a whole number, at least 1 (got [1, 2])"),
    "a width of 0": (
        swap("width: 1", "width: 0"),
        "x.yaml:4: trial.model.width: must be a whole number, at least 1 (got 0)",
    ),
    "no subnetwork": (
        swap("width: 1", "subnetworks: 0"),
        "trial.model.subnetworks: must be a whole number, at least 1 (got 0)",
    ),
    "a number beyond 64 bits": (swap("width: 1", f"width: {10**20}"), "x.yaml:4: a whole number must fit into 64 bits"),
    "a depth that no wide ResNet has": (
        swap("depth: 10", "depth: 11"),
        "x.yaml:4: model.depth: depth of a wide ResNet must be 6 n + 4",
    ),
    "a mask for two in a network of three": (
        "name: a\ntrial:\n  model: {subnetworks: 3}\n  mixing: {method: fmix}\n",
        "mixing.method: method fmix mixes 2 images, and subnetworks is 3: sum, linear and cutmix mix more",
    ),
    "a block larger than the maps": (
        "name: a\ntrial:\n  data: {dataset: digits}\n  model: {arch: preact_resnet}\n"
        "  mixing: {method: patchup_hard}\n",
        "mixing.method: method patchup_hard masks blocks of 7x7, and the maps of digits in a preact_resnet are 4x4",
    ),
    "hidden maps of several networks": (
        swap("dataset: digits", "dataset: digits, msda: manifold_mixup"),
        "data.msda: msda manifold_mixup mixes the hidden maps of a single network, and subnetworks is 2",
    ),
    "corruptions of no CIFAR": (
        setting("evaluate: {robustness: cifar_c}"),
        "robustness cifar_c belongs to cifar10 and cifar100, not to digits",
    ),
    "an endless rate": (setting("optim: {lr: .inf}"), "x.yaml:4: trial.optim.lr: must be a number, above 0 (got inf)"),
    "no number": (setting("optim: {lr: .nan}"), "trial.optim.lr: must be a number, above 0 (got nan)"),
    "a negative rate": (setting("optim: {lr: -0.1}"), "trial.optim.lr: must be a number, above 0 (got -0.1)"),
    "a probability of 1.5": (
        setting("mixing: {probability: 1.5}"),
        "trial.mixing.probability: must be a number, at least 0 and at most 1 (got 1.5)",
    ),
    "a date": (setting("optim: {lr: 2026-01-01}"), "must be a number, above 0 (got the text '2026-01-01')"),
    "decays that fall": (setting("optim: {decay_at: [0.6, 0.3]}"), "x.yaml:4: optim.decay_at: decay_at must rise"),
    "one decay": (setting("optim: {decay_at: 0.5}"), "trial.optim.decay_at: must be a list of numbers"),
    "a decay in words": (setting("optim: {decay_at: [half]}"), "trial.optim.decay_at: must be a list of numbers"),
    "an unknown dataset": (
        swap("dataset: digits", "dataset: digit"),
        "x.yaml:3: trial.data.dataset: must be 'digits', 'cifar10', 'cifar100', 'tiny_imagenet' or 'synthetic' "
        "(got 'digit'); did you mean 'digits'?",
    ),
    "repetition that does not divide": (
        swap("batch_size: 32", "batch_size: 32,\n    repetition: 5"),
        "x.yaml:4: data.repetition: repetition must divide batch_size",
    ),
    "more images than there are": (
        swap("batch_size: 32", "train_images: 2000"),
        "x.yaml:3: data.train_images: train_images must be 'all' or at most 1437",
    ),
    "a batch beyond an epoch": (
        swap("batch_size: 32", "batch_size: 64, train_images: 50"),
        "x.yaml:3: data.batch_size: batch_size 64 is larger",
    ),
    "three encoders for two images": (
        swap("width: 1", "width: 1, encoders: 3"),
        "x.yaml:4: model.encoders: encoders must be 'all', 1 or subnetworks (2)",
    ),
    "an unknown recipe": (
        setting("recipe: cifra"),
        "x.yaml:4: trial.recipe: must be 'cifar' or 'tiny_imagenet' (got 'cifra'); did you mean 'cifar'?",
    ),
    "a list of recipes": (
        setting("recipe: [cifar]"),
        "trial.recipe: must be 'cifar' or 'tiny_imagenet' (got ['cifar'])",
    ),
    # Blocks.
    "no block": ("name: a\ntrial: {data: {dataset: digits}}\nblocks: []\n", "x.yaml:3: blocks: must be a list"),
    "blocks as a mapping": (
        "name: a\ntrial: {data: {dataset: digits}}\nblocks: {set: {}}\n",
        "x.yaml:3: blocks: must be a list",
    ),
    "a word for a block": (
        swap("grid: {mixing.method: [sum, linear]}", "linear"),
        "x.yaml:8: blocks[2]: must be a mapping",
    ),
    "a grid over nothing": (
        swap("{mixing.method: [sum, linear]}", ""),
        "x.yaml:8: blocks[2].grid: must be a mapping (got nothing)",
    ),
    "a grid over an unknown field": (
        swap("mixing.method: [", "mixing.methods: ["),
        "x.yaml:8: blocks[2].grid.mixing.methods: no such setting; did you mean 'mixing.method'?",
    ),
    "a grid of one value": (swap("[sum, linear]", "sum"), f"x.yaml:8: blocks[2].grid.mixing.method: {LIST_RULE}"),
    "a grid of no value": (swap("[sum, linear]", "[]"), f"x.yaml:8: blocks[2].grid.mixing.method: {LIST_RULE}"),
    "a grid with a range": (
        swap("mixing.method: [sum, linear]", "optim.lr: {min: 0.1, max: 1}"),
        "a range under `search.ranges`",
    ),
    "a value twice in a grid": (
        swap("[sum, linear]", "[sum,\n    sum]"),
        "x.yaml:9: blocks[2].grid.mixing.method: 'sum' is listed twice",
    ),
    "a bad value in a grid": (
        swap("[sum, linear]", "[sum,\n    linaer]"),
        "x.yaml:9: blocks[2].grid.mixing.method: must be 'sum'",
    ),
    "a bad pair in a grid": (
        swap("{mixing.method: [sum, linear]}", "{data.repetition: [1, 2,\n    3]}"),
        "x.yaml:9: data.repetition: repetition must divide",
    ),
    "a grid over seeds": (
        swap("mixing.method: [sum, linear]", "seed: [1, 2]"),
        "x.yaml:8: blocks[2].grid.seed: seeds are listed under `seeds`",
    ),
    "one setting twice in a block": (
        swap("    set: {model.subnetworks: 1}", "    set: {model.width: 1}\n    grid: {model.width: [1, 2]}"),
        "x.yaml:8: blocks[1].grid.model.width: given under `set` too",
    ),
    "a zip of unequal lists": (
        swap("grid: {mixing.method: [sum, linear]}", "zip: {model.width: [1, 2], optim.lr: [0.1]}"),
        "x.yaml:8: blocks[2].zip: only lists of one length can be paired (model.width has 2, optim.lr has 1)",
    ),
    "a list for a label": (
        swap("label: vanilla", "label: [a]"),
        "x.yaml:6: blocks[1].label: must be one line of text (got ['a'])",
    ),
    "no trial left": (rule("model.width == 1"), "x.yaml: no trial is left"),
    # Conditions; tests/test_expression.py has the others.
    "a call": (rule("exit(1) == 1"), f"x.yaml:11: exclude: 'exit(1) == 1': exit(1): a call is not allowed; {ALLOWED}"),
    "a call in when": (
        swap("- grid", "- when: len(model) > 1\n    grid"),
        "x.yaml:8: blocks[2].when: 'len(model) > 1': len(model): a call",
    ),
    "an unknown setting in exclude": (
        rule("model.widht == 1"),
        "no such setting: model.widht; did you mean 'model.width'?",
    ),
    "a comparison that never holds": (rule('mixing.method == "cutmx"'), "mixing.method is never 'cutmx'"),
    "a division by zero": (rule("1 / (model.width - 1) > 1"), "division by zero, with model.width = 1"),
    "a mapping for exclude": (add("exclude: {model.width: 1}"), "x.yaml:11: exclude: must be a list"),
    # Seeds and baseline.
    "no seed": (swap("seeds: 2", "seeds: 0"), f"x.yaml:9: seeds: {SEEDS_RULE} (got 0)"),
    "one seed twice": (swap("seeds: 2", "seeds: [1, 1]"), f"{SEEDS_RULE} (got [1, 1])"),
    "a negative seed": (swap("seeds: 2", "seeds: [-1]"), f"{SEEDS_RULE} (got [-1])"),
    "a seed beyond 32 bits": (swap("seeds: 2", "seeds: [1, 4294967296]"), f"{SEEDS_RULE} (got [1, 4294967296])"),
    "half a seed": (swap("seeds: 2", "seeds: 2.5"), f"{SEEDS_RULE} (got 2.5)"),
    "seeds in two places": (setting("seed: 4"), "x.yaml:4: trial.seed: given beside `seeds`"),
    "more trials than can be": (
        swap("seeds: 2", "seeds: 500000"),
        "x.yaml:5: blocks: 1,500,000 trials, of at most 1,000,000",
    ),
    "an unknown baseline": (swap("baseline: vanilla", "baseline: vanila"), "(got 'vanila'); did you mean 'vanilla'?"),
    "a baseline without labels": (
        swap("  - label: vanilla\n    set:", "  - set:"),
        "x.yaml:9: baseline: must be the label of a block; no block has a `label`",
    ),
    # The sections beside the trial.
    "an unknown resource": (add("resources: {worker: 2}"), "x.yaml:11: resources.worker: no such key"),
    "workers that cannot share a batch": (
        add("resources: {workers: 3}"),
        "x.yaml:11: resources.workers: must divide data.batch_size, 32 slots (got 3)",
    ),
    "no worker": (add("resources: {workers: 0}"), "resources.workers: must be a whole number, at least 1 (got 0)"),
    "one and a half GPUs": (
        add("resources: {gpus_per_worker: 1.5}"),
        "resources.gpus_per_worker: above 1 must be a whole number",
    ),
    "yes": (add("resources: {spot: yes}"), "resources.spot: must be true or false (got the text 'yes')"),
    "an unknown search": (
        add("search: {method: grdi}"),
        "search.method: must be 'grid', 'random' or 'optuna' (got 'grdi'); did you mean",
    ),
    "a draw without ranges": (
        add("search: {method: random, num_samples: 3}"),
        "search.ranges: is missing, which method random needs",
    ),
    "samples of a grid": (add("search: {num_samples: 3}"), "search.num_samples: belongs to a search that draws"),
    "a range upside down": (drawn("optim.lr: {min: 1, max: 0.1}"), "search.ranges.optim.lr.min: must be below max"),
    "a logarithm of 0": (
        drawn("optim.warmup: {min: 0, max: 1, scale: log}"),
        "search.ranges.optim.warmup.min: must be above 0 on a log scale",
    ),
    "a range beyond the limits": (
        drawn("optim.lr: {min: -1, max: 1}"),
        "search.ranges.optim.lr.min: must be a number, above 0 (got -1)",
    ),
    "a range of words": (
        drawn("mixing.method: {min: 0, max: 1}"),
        "x.yaml:11: search.ranges.mixing.method.min: only settings that are numbers have min; give this one `choices",
    ),
    "choices between limits": (
        drawn("optim.lr: {choices: [0.1, 0.2], max: 1}"),
        "search.ranges.optim.lr.max: goes with a range between",
    ),
    "choices on a scale": (
        drawn("optim.lr: {choices: [0.1, 0.2], scale: log}"),
        "search.ranges.optim.lr.scale: goes with a range between",
    ),
    "a choice that may not be": (
        drawn("mixing.method: {choices: [sum, cutmx]}"),
        "(got 'cutmx'); did you mean 'cutmix'?",
    ),
    "a choice twice": (drawn("mixing.method: {choices: [sum, sum]}"), "'sum' is listed twice"),
    "no choice": (drawn("mixing.method: {choices: []}"), "search.ranges.mixing.method.choices: must be a list of at"),
    "a draw of seeds": (drawn("seed: {min: 0, max: 9}"), "search.ranges.seed: seeds are listed under `seeds`"),
    "steps on a log scale": (
        drawn("optim.lr: {min: 0.1, max: 1, scale: log, step: 0.1}"),
        "search.ranges.optim.lr.step: goes with a linear scale only",
    ),
    "a step beyond the range": (
        drawn("optim.lr: {min: 0.1, max: 1, step: 2}"),
        "search.ranges.optim.lr.step: must be at most max - min, 0.9",
    ),
    "half a step": (
        drawn("optim.epochs: {min: 1, max: 9, step: 0.5}"),
        "must be a whole number, as the setting is, got 0.5",
    ),
    "a condition on nothing": (
        drawn("optim.lr: {min: 0.1, max: 1, when: 'model.widht == 1'}"),
        "did you mean 'model.width'?",
    ),
    "an unknown part of a range": (
        drawn("optim.lr: {min: 0.1, max: 1, log: true}"),
        "search.ranges.optim.lr.log: no such key; allowed are min, max, scale, step, choices, when",
    ),
    "a draw that cannot be trained": (
        add(
            "search: {method: random, num_samples: 9, ranges: {data.batch_size: {choices: [31]}}}\n"
            "resources: {workers: 2}"
        ),
        "resources.workers: must divide data.batch_size, 31 slots (got 2)",
    ),
    "a seed of a grid": (add("search: {seed: 3}"), "search.seed: belongs to a search that draws; method is grid"),
    "comparing within nothing": (
        add("scheduler: {method: asha, within: [model.widht]}"),
        "x.yaml:11: scheduler.within: must be settings (got 'model.widht'); did you mean 'model.width'?",
    ),
    "a scheduler of the quick form": (
        add("quick: {scheduler: {method: ahsa}}"),
        "x.yaml:11: scheduler.method: must be 'none', 'asha', 'pbt' or",
    ),
    "rungs of another method": (
        add("scheduler: {method: median, reduction_factor: 3}"),
        "scheduler.reduction_factor: belongs to method asha; method is median",
    ),
    "a population without interval": (
        add("scheduler: {method: pbt, mutations: {optim.lr: {min: 0.1, max: 1}}}"),
        "x.yaml:11: scheduler.interval_epochs: is missing, which method pbt needs",
    ),
    "a population that changes nothing": (
        add("scheduler: {method: pbt, interval_epochs: 4}"),
        "scheduler.mutations: is missing, which method pbt needs",
    ),
    "a mutation of what a training cannot change": (
        population("model.width: {min: 1, max: 4}"),
        "x.yaml:11: scheduler.mutations.model.width: cannot change during a training; those that can are "
        "data.input_repetition, data.msda_probability, data.msda_alpha, mixing.probability, mixing.alpha, "
        "mixing.weight_root, optim.lr, optim.weight_decay",
    ),
    "a mutation under a condition": (
        population("optim.lr: {min: 0.1, max: 1, when: 'seed == 0'}"),
        "x.yaml:11: scheduler.mutations.optim.lr.when: belongs to a search",
    ),
    "a mutation beyond a setting's limits": (
        population("mixing.probability: {min: 0, max: 2}"),
        "scheduler.mutations.mixing.probability.max: must be a number, at least 0 and at most 1 (got 2)",
    ),
    "mutations of another method": (
        add("scheduler: {method: asha, mutations: {optim.lr: {min: 0.1, max: 1}}}"),
        "scheduler.mutations: belongs to method pbt; method is asha",
    ),
    "a population within a setting": (
        population("optim.lr: {min: 0.1, max: 1}", "within: [model.width]"),
        "scheduler.within: belongs to method asha and median; method is pbt",
    ),
    "a population that is never compared": (
        population("optim.lr: {min: 0.1, max: 1}", "interval_epochs: 300"),
        "scheduler.interval_epochs: no trial is ever compared: the first time is after epoch 300",
    ),
    "a population of which milestones are not measured": (
        population("optim.lr: {min: 0.1, max: 1}").replace("  model:", "  evaluate: {every: 3}\n  model:"),
        "scheduler.interval_epochs: evaluate.every 3 leaves out epochs after which trials are compared",
    ),
    "a population that is drawn as it goes": (
        population("optim.lr: {min: 0.1, max: 1}")
        + "search: {method: optuna, num_samples: 2, ranges: {optim.weight_decay: {min: 0, max: 1}}}\n",
        "scheduler.method: pbt changes what optuna has drawn, which would learn nothing true from it",
    ),
    "a range without end": (drawn("optim.lr: {min: 1}"), "search.ranges.optim.lr: max must be given"),
    "a range over what a grid varies": (drawn("model.subnetworks: {min: 1, max: 3}"), "the blocks vary it too"),
    "an unknown metric": (
        add("scheduler: {method: asha, metric: tpo1}"),
        "scheduler.metric: must be one of loss, top1",
    ),
    "a metric of the end": (
        add("scheduler: {method: asha, metric: cifar_c_top1}"),
        "scheduler.metric: cifar_c_top1 is measured after a trial's last epoch alone, too late for a scheduler",
    ),
    "the wrong direction": (
        add("scheduler: {method: asha, metric: nll, mode: max}"),
        "scheduler.mode: must be min for nll",
    ),
    "grace beyond the end": (
        add("scheduler: {method: asha, grace_epochs: 500}"),
        "scheduler.grace_epochs: must be at most the epochs of every trial, 300",
    ),
    "an unknown kind of keeping": (
        add("checkpoints: {keep: all}"),
        "checkpoints.keep: must be 'last' or 'none' (got 'all')",
    ),
    "checkpoints without pause": (
        add("checkpoints: {every_s: 0}"),
        "checkpoints.every_s: must be 'auto' or a number, above 0 (got 0)",
    ),
    "no budget": (add("budget: {gpu_hours: 0}"), "budget.gpu_hours: must be a number, above 0 (got 0)"),
    "an empty budget": (add("budget:"), "x.yaml:11: budget: must be a mapping (got nothing); fill it, or leave it out"),
    "an unknown currency": (
        add("price: {gpu_hour: 2, currency: dollars}"),
        "price.currency: must be three capital letters",
    ),
    "retries in words": (
        add("retry: {crash: never}"),
        "retry.crash: must be 'unlimited' or a whole number, at least 0 (got 'never')",
    ),
    "an ensemble of nobody": (add("ensembles: [{of: lienar, members: [2]}]"), "(got 'lienar'); did you mean 'linear'?"),
    "an ensemble of one": (
        add("ensembles: [{of: vanilla, members: [1]}]"),
        "ensembles[1].members: must be a list of whole numbers of at least 2",
    ),
    "an ensemble without members": (
        add("ensembles: [{of: vanilla}]"),
        "ensembles[1]: `of` and `members` must be given",
    ),
    "a published percentage": (
        add("published: [{where: {model.width: 1}, top1: 85.4, source: T}]"),
        "published[1].top1: must be a number, at least 0 and at most 1 (got 85.4)",
    ),
    "a published ensemble of one": (
        add("published: [{where: {model.width: 1}, members: 1, top1: 0.5, source: T}]"),
        "published[1].members: must be a whole number, at least 2 (got 1)",
    ),
    "a published recipe that is none": (
        add("published: [{where: [{recipe: cfar}], top1: 0.5, source: T}]"),
        "published[1].where.recipe: must be 'cifar' or 'tiny_imagenet' (got 'cfar'); did you mean 'cifar'?",
    ),
    "an exchange of unequal lists": (
        add("quick: {model.width: {from: [1, 2], to: [1]}}"),
        "quick.model.width: must be {from: [...], to: [...]}, two lists of one length",
    ),
    "an exchange of half": (
        add("quick: {model.width: {from: [1, 2]}}"),
        "quick.model.width: must be {from: [...], to: [...]}, two lists of one length",
    ),
    "an exchange of no setting's values": (
        add("quick: {model.width: {from: [1], to: [wide]}}"),
        "quick.model.width.to: must be a whole number, at least 1 (got the text 'wide')",
    ),
    "an exchange of seeds": (
        add("quick: {seed: {from: [1], to: [2]}}"),
        "quick.seed: seeds are listed under `quick.seeds`",
    ),
    "published numbers of nothing": (
        add("published: [{top1: 0.854, source: T}]"),
        "published[1]: `label` or `where`, `source`, and at least one",
    ),
    "an unknown published metric": (
        add("published: [{where: {model.width: 1}, top2: 0.5, source: T}]"),
        "published[1].top2: no such key",
    ),
    "a bad quick value, though not asked for": (
        add("quick: {model.width: 0}"),
        "x.yaml:11: quick.model.width: must be a whole number, at least 1 (got 0)",
    ),
    "a seed in quick": (add("quick: {seed: 1}"), "quick.seed: seeds are listed under `quick.seeds`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_a_clear_message(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    with pytest.raises(SweepError) as error:
        load("x.yaml")
    told = str(error.value)
    assert message in told
    assert error.value.exit_code == ExitCode.USAGE
    assert all(line.startswith("x.yaml:") for line in told.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_one_fault_makes_one_line() -> None:
    """What follows from a fault is not told besides."""
    several = {"three encoders for two images", "an unknown published metric"}
    for case in BAD.keys() - several:
        with pytest.raises(SweepError) as error:
            read(BAD[case][0])
        assert str(error.value).count("\n") == 0, case
    assert len(BAD) > 100


def test_all_faults_are_told_at_once_in_the_order_of_lines() -> None:
    text = (
        swap("width: 1", "widht: 1").replace("seeds: 2", "seeds: none").replace("name: widths", "name: W")
        + "price: 3\n"
    )
    with pytest.raises(SweepError) as error:
        read(text)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "4", "9", "11"]


def test_many_faults_are_told_in_part() -> None:
    with pytest.raises(SweepError) as error:
        small(f"blocks: [grid: {{data.repetition: {list(range(100, 200))}}}]\n")
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 80 more like these"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epochs", "-S optim.epochs: must be setting=value, such as optim.epochs=3"),
        ("=3", "must be setting=value"),
        ("optim.epochs=", "must be setting=value"),
        ("optim.epohcs=3", "-S optim.epohcs=3: optim.epohcs: no such setting; did you mean 'optim.epochs'?"),
        ("optim.epochs=three", "optim.epochs: must be a whole number, at least 1 (got the text 'three')"),
        ("optim.decay_at=[0.5", "-S optim.decay_at=[0.5: this is not YAML"),
        ("resources.worker=2", "did you mean 'resources.workers'?"),
        ("resources.workers=3", "-S resources.workers=3: resources.workers: must divide data.batch_size"),
        ("data.repetition=5", "-S data.repetition=5: data.repetition: repetition must divide batch_size"),
        ("seeds=0", "-S seeds=0: seeds: must be a count"),
        ("name=A/b", "-S name=A/b: name: must be"),
        ("blocks=[]", "blocks: no such setting"),
    ],
)
def test_bad_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(SweepError) as error:
        read(BASE, overrides=[override])
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def test_quick_needs_its_section() -> None:
    with pytest.raises(SweepError, match="quick: is missing"):
        read(BASE, quick=True)


@given(st.text(alphabet="name: trial{}[]-\n#&*!|>'\"%@`,?0123456789.model width\t", max_size=80))
def test_no_text_is_more_than_refused(text: str) -> None:
    with contextlib.suppress(SweepError):
        read(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(BASE)
    (tmp_path / "latin.yaml").write_bytes("# Ramé\n".encode("latin-1"))
    for name, message in {
        "quickstrat.yaml": f"there is no such file; did you mean '{tmp_path}/quickstart.yaml'?",
        ".": "this is a folder",
        "latin.yaml": "not text in UTF-8",
    }.items():
        with pytest.raises(SweepError) as error:
            load(tmp_path / name)
        assert message in str(error.value)


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(BASE.encode("utf-8-sig"))
    assert load(tmp_path / "x.yaml").name == "widths"


# ---------------------------------------------------------------------------- understood, but not yet


def test_what_a_run_cannot_honour_yet_is_refused_by_name() -> None:
    mutations = "mutations: {optim.lr: {choices: [0.1, 0.2]}}"
    sweep = small(f"scheduler: {{method: pbt, interval_epochs: 1, {mutations}}}\nresources: {{slots: 4}}\n")
    with pytest.raises(SweepError) as error:
        check_runnable(sweep)
    told = "resources.slots: 4 with scheduler.method: pbt"
    assert str(error.value) == f"x.yaml: {told}: understood, but not yet possible in a run"


def test_slots_are_for_trials_of_one_worker() -> None:
    told = "resources.slots: above 1 are for trials of one worker: 2 workers share a single trial"
    with pytest.raises(SweepError, match=told):
        small("resources: {slots: 3, workers: 2}\n")
    assert small("resources: {slots: 3}\n").resources.slot_count == 3
    assert small("resources: {slots: auto, workers: 2}\n").resources.slot_count == 1
    check_runnable(small("resources: {slots: 3}\n"))


@pytest.mark.parametrize(
    ("resources", "finds"),
    [("", True), ("slots: 2", False), ("workers: 2", False), ("captured: false", False),
     ("gpus_per_worker: 0.5", False), ("gpus_per_worker: 1", True)],
)  # fmt: skip
def test_gangs_of_one_worker_with_a_whole_gpu_find_how_many_slots_pay(resources: str, finds: bool) -> None:
    assert small(f"resources: {{{resources}}}\n").resources.finds_slots == finds


def test_ranges_are_kept() -> None:
    sweep = small("search: {method: optuna, num_samples: 2, ranges: {optim.lr: {min: 0.1, max: 1, scale: log}}}\n")
    assert sweep.notes == ("x.yaml:3: search: each cell stands for 2 draws of ranges",)
    assert dict(sweep.search.ranges) == {"optim.lr": Range(min=0.1, max=1.0, scale="log")}


def test_the_direction_of_a_metric_is_known() -> None:
    assert small("").scheduler.mode == "max"
    assert small("scheduler: {metric: nll}\n").scheduler.mode == "min"


def test_an_ensemble_of_more_members_than_seeds_is_noted() -> None:
    assert (
        "3 members need as many seeds, not 2" in small("ensembles: [{of: cutmix, members: [3]}]\nseeds: 2\n").notes[0]
    )


# ---------------------------------------------------------------------------- files and documents


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").rglob("*.yaml")), ids=lambda path: path.name)
def test_the_sweeps_that_come_with_the_project(path: Path) -> None:
    sweep = load(path)
    check_runnable(sweep)
    assert sweep.name == path.stem
    assert sweep.baseline == "vanilla" or path.parent.name == "paper"
    assert not sweep.notes


def test_the_quickstart_is_twelve_trials() -> None:
    sweep = load(ROOT / "sweeps" / "quickstart.yaml")
    assert (len(sweep.trials), len(sweep.seeds)) == (12, 3)
    assert sweep.labels == ("vanilla", "MIMO", "Linear-MixMo", "Cut-MixMo")
    assert {trial.config.data.dataset for trial in sweep.trials} == {"digits"}


HINTS = {each.hint for kind in SECTIONS.values() for each in fields.fields_of(kind).values()}
HINTS |= {each.hint for each in fields.settings().values()}
WORDS = sorted({word for hint in HINTS for word in fields._words(hint)})
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.sampled_from(WORDS)


@pytest.mark.parametrize("hint", sorted(HINTS, key=str), ids=str)
@given(value=PLAIN | st.lists(PLAIN, max_size=3).map(tuple) | st.dictionaries(st.text(), PLAIN, max_size=2))
def test_values_are_taken_as_strictly_as_pydantic_takes_them(hint: Any, value: Any) -> None:
    def outcome(take: Any) -> str:
        try:
            return repr(take(value))  # 1 is not 1.0 here, and NaN is NaN
        except ValueError:
            return "refused"

    pydantic = TypeAdapter(hint)
    assert outcome(lambda given: fields.taken(hint, given)) == outcome(
        lambda given: pydantic.validate_python(given, strict=True)
    )


def test_importing_is_cheap() -> None:
    code = (
        "import sys; import orchestrator.sweep\n"
        "print(*{'torch', 'ray', 'numpy', 'pandas', 'pyarrow', 'pydantic', 'ruamel.yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def settings_table() -> str:
    """Every setting of a trial, as docs/sweep-file.md has it."""
    lines = ["| setting | symbol | default | allowed | meaning |", "|---|---|---|---|---|"]
    for name, each in fields.settings().items():
        default = f"[{', '.join(map(str, each.default))}]" if isinstance(each.default, tuple) else each.default
        symbol = f"*{each.setting.symbol}*" if each.setting.symbol else ""
        lines.append(f"| `{name}` | {symbol} | `{default}` | {_cell(each.allowed)} | {_cell(each.setting.meaning)} |")
    return "\n".join(lines)


def sections_table() -> str:
    """Every key beside `trial`, as docs/sweep-file.md has it."""
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for section, kind in SECTIONS.items():
        for name, each in fields.fields_of(kind).items():
            default = (
                ""
                if each.default is None
                else f"`{str(each.default).lower() if each.default is True else each.default}`"
            )
            lines.append(f"| `{section}.{name}` | {default} | {_cell(each.allowed)} | {_cell(each.setting.meaning)} |")
    return "\n".join(lines)


TABLES = {"settings": settings_table, "sections": sections_table}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_reference_are_up_to_date(name: str) -> None:
    text = (ROOT / "docs" / "sweep-file.md").read_text()
    _, _, rest = text.partition(f"<!-- {name}: written by tests/test_sweep.py -->\n")
    table, _, _ = rest.partition("<!-- end -->")
    assert table.strip() == TABLES[name](), "run: python tests/test_sweep.py"


def test_every_system_of_the_paper_is_a_trial_that_can_be_run() -> None:
    text = (ROOT / "docs" / "sweep-file.md").read_text()
    _, _, section = text.partition("## Systems of the paper\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 11
    ids = set()
    for row in rows:
        block = "".join(f"{name}: {value}, " for name, value in re.findall(r"`([a-z_.]+): (\w+)`", row.split("|")[2]))
        sweep = parse(f"name: x\ntrial: {{{block}}}\n", source=row)
        check_runnable(sweep)
        ids |= {trial.trial_id for trial in sweep.trials}
    # The defaults of a sweep file are Cut-MixMo, which is a system of its own; no two rows are the same trial.
    assert len(ids) == len(rows)


def test_the_reference_tells_of_every_key_and_its_example_is_a_sweep() -> None:
    from orchestrator.sweep import KEYS

    text = (ROOT / "docs" / "sweep-file.md").read_text()
    missing = [key for key in KEYS if f"`{key}" not in text]
    assert not missing
    for example in text.split("```yaml\n")[1:]:
        parse(example.partition("```")[0], source="docs/sweep-file.md")


def _write_tables() -> None:
    path = ROOT / "docs" / "sweep-file.md"
    text = path.read_text()
    for name, table in TABLES.items():
        mark = f"<!-- {name}: written by tests/test_sweep.py -->\n"
        head, _, rest = text.partition(mark)
        text = f"{head}{mark}{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    path.write_text(text)


if __name__ == "__main__":
    _write_tables()
