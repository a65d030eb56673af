"""Identity, sentence by sentence (design.md, section 4): what decides a trial's id, and what does not."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import strategies
from hypothesis import assume, given
from hypothesis import strategies as st

from mixmo_core import config as core
from mixmo_core.config import (
    DATASETS,
    NUMERICS,
    TrialConfig,
    cell_id,
    digest,
    flatten,
    identity,
    ineffective,
    leaves,
    parts,
    trial_id,
    unflatten,
)
from orchestrator.rows import config_columns
from orchestrator.sweep import parse

SOURCE = Path(core.__file__)

GOLDEN: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "defaults": ({}, 1, "d8fcdc94d1ed", "c6ca7105c7f3"),
    "seed": ({"seed": 7}, 1, "75aeb8606fd9", "c6ca7105c7f3"),
    "vanilla": ({"model.subnetworks": 1}, 1, "4ae36ab17d4d", "2dc8d56e6c07"),
    "linear": (
        {"mixing.method": "linear", "data.repetition": 4, "model.width": 5}, 1, "092d189c5f1d", "f47459c97d80"
    ),
    "digits": (
        {"mixing.method": "sum", "data.dataset": "digits", "data.train_images": 400, "optim.lr": 0.4},
        1, "46204cfb6e30", "f9007fc809ca",
    ),
    "two workers": (
        {"optim.decay_at": (0.5, 0.75), "precision": "bf16", "evaluate.split": "validation"},
        2, "38700e524fc4", "514920b22f7f",
    ),
}  # fmt: skip
"""Settings, workers, trial id, cell id. Whoever changes one here loses the results that are stored under it."""

BIRTHS: dict[str, Any] = {
    "data.dataset": "cifar100", "data.train_images": "all", "data.batch_size": 64, "data.repetition": 1,
    "data.input_repetition": 0.0, "data.augmentation": "standard", "data.msda": "none",
    "data.msda_probability": 0.5, "data.msda_alpha": 1.0, "evaluate.robustness": "none", "model.arch": "wide_resnet",
    "model.depth": 28, "model.width": 10, "model.subnetworks": 2, "model.encoders": "all",
    "model.classifiers": "all", "model.classifier_roles": "input", "mixing.method": "cutmix",
    "mixing.probability": 0.5, "mixing.alpha": 2.0, "mixing.weight_root": 3.0, "optim.epochs": 300, "optim.lr": 0.05,
    "optim.momentum": 0.9, "optim.weight_decay": 0.0006, "optim.warmup": 1.0,
    "optim.decay_at": (0.33333, 0.66667, 0.75), "optim.decay_by": 0.1, "evaluate.split": "test", "evaluate.every": 1,
    "seed": 0, "precision": "fp32",
}  # fmt: skip
"""May be added to, never changed."""


def changed_source(*changes: tuple[str, str]) -> Any:
    """config.py as it might read one day: a module made from its text with some lines replaced."""
    text = SOURCE.read_text()
    for before, after in changes:
        assert text.count(before) == 1, f"config.py has no single {before!r} any more"
        text = text.replace(before, after)
    module = types.ModuleType("config_of_tomorrow")
    sys.modules[module.__name__] = module
    exec(compile(text, "config_of_tomorrow", "exec"), module.__dict__)
    return module


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[TrialConfig, TrialConfig]:
    """Two valid configs that differ in at most a few settings."""
    flat = draw(strategies.flats())
    names = draw(st.lists(st.sampled_from(sorted(strategies.settings())), min_size=1, max_size=2))
    other = flat | {name: draw(strategies.settings()[name]) for name in names}
    try:
        return unflatten(flat), unflatten(other)
    except ValueError:
        assume(False)
        raise


# "`trial_id` = first 12 hex digits of the SHA-256 of the canonical JSON of all that decides the numbers: the config,
#  the seed, `workers` when above 1."


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name: str) -> None:
    settings, workers, trial, cell = GOLDEN[name]
    config = unflatten(settings)
    assert (trial_id(config, workers), cell_id(config, workers)) == (trial, cell)


@given(strategies.configs(), st.integers(1, 8))
def test_the_id_is_the_hash_of_sorted_compact_json(config: TrialConfig, workers: int) -> None:
    decides = identity(config, workers)
    text = json.dumps(dict(sorted(decides.items())), separators=(",", ":"))
    assert digest(decides) == hashlib.sha256(text.encode("ascii")).hexdigest()
    assert trial_id(config, workers) == digest(decides)[:12]


@given(neighbours())
def test_two_trials_share_an_id_exactly_when_their_rows_hold_the_same_settings(
    pair: tuple[TrialConfig, TrialConfig],
) -> None:
    first, second = pair
    assert (digest(identity(first)) == digest(identity(second))) == (config_columns(first) == config_columns(second))


@given(strategies.configs(), st.integers(0, 99), st.integers(0, 99))
def test_the_seed_counts(config: TrialConfig, first: int, second: int) -> None:
    ids = {trial_id(unflatten(flatten(config) | {"seed": seed})) for seed in (first, second)}
    assert len(ids) == len({first, second})


@given(strategies.configs(), st.integers(2, 64), st.integers(2, 64))
def test_workers_count_when_above_one(config: TrialConfig, first: int, second: int) -> None:
    assert "workers" not in identity(config, 1)
    assert len({trial_id(config, workers) for workers in (1, first, second)}) == len({1, first, second})


# "Every field is coerced by type (1 = 1.0) and left out when it equals its birth default, a constant in the field's
#  metadata that never changes even if the default does; so a new field keeps old ids."


@given(strategies.flats(), st.data())
def test_a_whole_number_is_its_float(flat: dict[str, Any], data: st.DataObject) -> None:
    floats = [name for name, spec in leaves() if spec.type is float and name != "optim.momentum"]
    name, value = data.draw(st.sampled_from(floats)), 1
    assert trial_id(unflatten(flat | {name: value})) == trial_id(unflatten(flat | {name: float(value)}))


def test_zero_has_one_sign() -> None:
    assert trial_id(unflatten({"mixing.alpha": -0.0})) == trial_id(unflatten({"mixing.alpha": 0.0}))


@given(strategies.configs())
def test_what_equals_its_birth_default_is_left_out(config: TrialConfig) -> None:
    kept = identity(config)
    for name, value in flatten(config).items():
        if name != "seed":
            assert (name in kept) == (value != BIRTHS[name] and name not in ineffective(config))


def test_birth_defaults_never_change() -> None:
    now = {name: spec.metadata["setting"].birth for name, spec in leaves()}
    assert {name: now.get(name) for name in BIRTHS} == BIRTHS
    assert now.keys() == BIRTHS.keys(), "a new setting's birth default belongs into this table"


TOMORROW = changed_source(
    ("    msda: Msda = ", '    novelty: float = _setting(0.25, "New.")\n    msda: Msda = '),
    ('_setting(10, "Widening factor of the core network.", ', '_setting(4, "Widening factor.", birth=10, '),
)


@given(strategies.configs())
def test_a_new_field_and_a_new_default_keep_old_ids(config: TrialConfig) -> None:
    assert TOMORROW.ModelConfig().width == 4
    same = TOMORROW.unflatten(flatten(config))
    assert TOMORROW.trial_id(same) == trial_id(config)
    novel = TOMORROW.unflatten(flatten(config) | {"data.novelty": 0.5})
    assert TOMORROW.trial_id(novel) != trial_id(config)


def test_after_a_new_default_the_setting_left_out_means_the_new_value() -> None:
    assert TOMORROW.trial_id(TOMORROW.TrialConfig()) == trial_id(unflatten({"model.width": 4}))


# "Fields without effect under the others (`mixing.*` at M = 1, `alpha` under `sum`, `probability` under `linear`) are
#  left out too and null in the row, so one vanilla net has one id."


@given(strategies.configs())
def test_a_field_without_effect_is_left_out_and_null_in_the_row(config: TrialConfig) -> None:
    columns = config_columns(config)
    for name in flatten(config):
        silent = name in ineffective(config)
        assert (columns[name.replace(".", "_")] is None) == silent
        assert not (silent and name in identity(config))


@pytest.mark.parametrize(
    ("name", "silent_under", "heard_under"),
    [
        ("mixing.method", {"model.subnetworks": 1}, {}),
        ("mixing.weight_root", {"model.subnetworks": 1}, {}),
        ("data.input_repetition", {"model.subnetworks": 1}, {}),
        ("mixing.alpha", {"mixing.method": "sum"}, {"mixing.method": "linear"}),
        ("mixing.weight_root", {"mixing.method": "sum"}, {"mixing.method": "linear"}),
        ("mixing.probability", {"mixing.method": "linear"}, {"mixing.method": "cutmix"}),
        ("model.depth", {"model.arch": "preact_resnet"}, {}),
        ("model.classifier_roles", {}, {"model.encoders": 1}),
        ("optim.decay_by", {"optim.decay_at": ()}, {}),
        ("data.msda_alpha", {"data.msda": "none"}, {"data.msda": "cutmix"}),
        ("data.msda_alpha", {"data.msda": "resizemix"}, {"data.msda": "manifold_mixup", "model.subnetworks": 1}),
        ("data.msda_probability", {"data.msda": "none"}, {"data.msda": "resizemix"}),
        ("data.msda_probability", {"data.msda": "manifold_mixup", "model.subnetworks": 1}, {"data.msda": "mixup"}),
    ],
)
def test_where_a_field_has_no_effect(name: str, silent_under: dict[str, Any], heard_under: dict[str, Any]) -> None:
    assert name in ineffective(unflatten(silent_under))
    assert name not in ineffective(unflatten(heard_under))


@given(st.data())
def test_one_vanilla_net_has_one_id(data: st.DataObject) -> None:
    values = strategies.settings()
    mixing = {name: data.draw(values[name]) for name in values if name.startswith("mixing.")}
    assert trial_id(unflatten({"model.subnetworks": 1, **mixing})) == GOLDEN["vanilla"][2]


# "`precision` is what the file says, never resolved by the machine."


@given(strategies.configs())
def test_precision_is_what_the_file_says(config: TrialConfig) -> None:
    single, half = (unflatten(flatten(config) | {"precision": each}) for each in ("fp32", "bf16"))
    assert "precision" not in identity(single)
    assert identity(half)["precision"] == "bf16"


# "`NUMERICS` is raised for a part by every change that alters its results; an entry that a trial uses enters the hash
#  when above 1."


@given(strategies.configs(), st.sampled_from(sorted(NUMERICS)))
def test_raised_numerics_change_the_ids_of_the_trials_that_use_the_part(config: TrialConfig, part: str) -> None:
    before, raised = trial_id(config), NUMERICS[part] + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NUMERICS, part, raised)
        assert (trial_id(config) != before) == (part in parts(config))
        assert identity(config).get("numerics", {}).get(part) == (raised if part in parts(config) else None)


@given(strategies.configs())
def test_numerics_enter_the_hash_once_they_were_raised(config: TrialConfig) -> None:
    assert identity(config).get("numerics", {}) == {name: n for name, n in parts(config).items() if n > 1}


@given(strategies.configs())
def test_a_trial_uses_its_dataset_network_augmentation_and_its_mixing_if_it_mixes(config: TrialConfig) -> None:
    used = set(parts(config))
    assert {"training", config.data.dataset, config.model.arch} <= used
    assert (config.mixing.method in used) == (config.model.subnetworks > 1)


# "The commit is recorded, never hashed." And nothing else is.


@given(strategies.configs(), st.integers(1, 4))
def test_nothing_else_is_hashed(config: TrialConfig, workers: int) -> None:
    assert identity(config, workers).keys() <= {*BIRTHS, "workers", "numerics"}


# "A subset is a field (`data.train_images`, drawn by a fixed seed)."


@given(st.sampled_from(sorted(DATASETS)), st.integers(64, 1437))
def test_a_subset_is_another_trial_and_the_whole_has_one_name(dataset: str, count: int) -> None:
    whole = unflatten({"data.dataset": dataset})
    available = DATASETS[dataset].train_images
    assert trial_id(unflatten({"data.dataset": dataset, "data.train_images": available})) == trial_id(whole)
    if count < available:
        assert trial_id(unflatten({"data.dataset": dataset, "data.train_images": count})) != trial_id(whole)


# "Resources, labels and names do not count."

FILE = """\
name: {name}
trial: {{data: {{dataset: digits}}}}
blocks: [{{label: {label}, grid: {{model.width: [1, 2]}}}}]
seeds: 2
resources: {{gpus_per_worker: {gpus}, cpus_per_worker: {cpus}, spot: {spot}, max_gangs: {gangs}}}
retry: {{crash: {crash}}}
checkpoints: {{every_s: {every_s}}}
price: {{gpu_hour: {price}}}
"""


@given(
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True),
            "label": st.from_regex(r"l[a-z ]{0,8}z", fullmatch=True),
            "gpus": st.integers(0, 8),
            "cpus": st.integers(1, 8),
            "spot": st.sampled_from(["true", "false"]),
            "gangs": st.integers(1, 9),
            "crash": st.integers(0, 9),
            "every_s": st.integers(1, 999),
            "price": st.integers(0, 9),
        }
    )
)
def test_resources_labels_and_names_do_not_count(words: dict[str, Any]) -> None:
    sweep = parse(FILE.format(**words), source="x.yaml")
    expected = [
        trial_id(unflatten({"data.dataset": "digits", "model.width": width, "seed": seed}))
        for seed in (0, 1)
        for width in (1, 2)
    ]
    assert [trial.trial_id for trial in sweep.trials] == expected


# "`cell_id` is the same without the seed."


@given(neighbours(), st.integers(1, 4))
def test_a_cell_is_what_its_trials_share(pair: tuple[TrialConfig, TrialConfig], workers: int) -> None:
    without_seed = [unflatten(flatten(config) | {"seed": 0}) for config in pair]
    same_cell = cell_id(pair[0], workers) == cell_id(pair[1], workers)
    assert same_cell == (trial_id(without_seed[0], workers) == trial_id(without_seed[1], workers))


# "Same config, same id, in every sweep and on every machine."


@given(strategies.flats(), st.randoms())
def test_the_order_in_which_settings_are_given_does_not_count(flat: dict[str, Any], random: Any) -> None:
    names = list(flat)
    random.shuffle(names)
    assert trial_id(unflatten({name: flat[name] for name in names})) == trial_id(unflatten(flat))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_finds_the_same_ids(hash_seed: str, tmp_path: Path) -> None:
    code = (
        "import json, sys; from mixmo_core.config import *\n"
        "for settings, workers in json.load(sys.stdin):\n"
        "    if 'optim.decay_at' in settings: settings['optim.decay_at'] = tuple(settings['optim.decay_at'])\n"
        "    print(trial_id(unflatten(settings), workers))"
    )
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE.parent.parent), "PYTHONHASHSEED": hash_seed,
        "TZ": "Asia/Kathmandu", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip
    asked = json.dumps([(settings, workers) for settings, workers, _, _ in GOLDEN.values()])
    done = subprocess.run(
        [sys.executable, "-c", code], input=asked, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [trial for _, _, trial, _ in GOLDEN.values()], done.stderr
