"""The JSON Schema of sweep files: it takes what the parser takes, and what it refuses the parser refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_sweep import ROOT

from orchestrator.errors import SweepError
from orchestrator.sweep import KEYS, json_schema, parse
from orchestrator.sweep.fields import Field, fields_of, settings
from orchestrator.sweep.schema import of_field
from orchestrator.sweep.sections import SECTIONS

jsonschema = pytest.importorskip("jsonschema")  # Ray brings it
PAGE = ROOT / "docs" / "sweep-file.schema.json"
SWEEPS = sorted((ROOT / "sweeps").rglob("*.yaml"))
FIELDS = {**settings(), **{f"{key}.{name}": each for key, kind in SECTIONS.items() for name, each in
                           fields_of(kind).items()}}  # fmt: skip
VALUES: tuple[Any, ...] = (
    -1, 0, 0.05, 0.5, 1, 2, 10, 65, 1.5, 1e-9, True, False, "all", "auto", "cutmix", "3", "", [], [0.3], ["a"], [2],
)  # fmt: skip
"""No whole numbers written as 3.0: JSON Schema does not tell them from 3, the parser does."""


def valid(document: Any, schema: dict[str, Any] | None = None) -> bool:
    return bool(jsonschema.Draft7Validator(schema or json_schema()).is_valid(document))


def plain(text: str) -> Any:
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(text)))


def test_it_is_a_schema_and_the_page_is_it() -> None:
    jsonschema.Draft7Validator.check_schema(json_schema())
    text = json.dumps(json_schema(), indent=1) + "\n"
    if os.environ.get("MIXMO_RECORD"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, f"{PAGE.name} is out of date: MIXMO_RECORD=1 writes it anew"


def test_it_knows_every_key() -> None:
    assert set(json_schema()["properties"]) == set(KEYS)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_ours_is_valid_and_names_it(path: Path) -> None:
    assert valid(plain(path.read_text()))
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == PAGE


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_what_the_parser_takes(name: str) -> None:
    field: Field = FIELDS[name]
    for value in VALUES:
        refused = field.refuses(name, tuple(value) if isinstance(value, list) else value)
        assert valid(value, of_field(field)) == (refused is None), f"{value!r}: {refused}"


GOOD = "name: x\ntrial: {data: {dataset: digits}, model.width: 1}\n"


@pytest.mark.parametrize(
    "more",
    [
        "blocks: [{label: a, set: {model: {width: 2}}, grid: {mixing.method: [sum]}, when: 'model.width > 1'}]\n",
        "seeds: [3, 5]\n",
        "exclude: 'model.width == 10'\n",
        "price: {gpu_hour: 2.5, currency: EUR}\n",
        "search: {method: random, num_samples: 3, ranges: {optim.lr: {min: 0.01, max: 1, scale: log}}}\n",
        "ensembles: [{of: cutmix, members: [2, 3]}]\nseeds: 3\n",
        "published: [{label: b, top1: 0.9, source: paper}]\n",
        "quick: {optim: {epochs: 1}, seeds: 1}\n",
        "quick: {model.width: {from: [1], to: [2]}}\n",
        "published: [{where: [{recipe: cifar}, {model.width: 1}], top1: 0.9, source: paper}]\n",
        "published: [{label: x, where: {recipe: cifar}, members: 2, top1: 0.9, source: paper}]\n",
    ],
)
def test_what_the_parser_takes_is_valid(more: str) -> None:
    parse(GOOD + more, source="x.yaml")
    assert valid(plain(GOOD + more))


@pytest.mark.parametrize(
    "text",
    [
        "name: x\n",
        GOOD.replace("name: x", "name: X"),
        GOOD.replace("name: x", "name: x-quick"),
        GOOD.replace("width: 1", "width: wide"),
        GOOD.replace("model.width", "model.widht"),
        GOOD.replace("dataset", "datset"),
        GOOD + "sedes: 3\n",
        GOOD + "seeds: 0\n",
        GOOD + "seeds: [1, 1]\n",
        GOOD + "blocks: [{grid: {model.width: 2}}]\n",
        GOOD + "blocks: [{set: {seed: 2}}]\n",
        GOOD + "blocks: []\n",
        GOOD + "ensembles: [{of: cutmix, members: [1]}]\n",
        GOOD + "ensembles: [{of: cutmix}]\n",
        GOOD + "published: [{top1: 0.9, source: paper}]\n",
        GOOD + "published: [{label: b, top1: 90, source: paper}]\n",
        GOOD + "resources: {workers: 0}\n",
    ],
)
def test_what_it_refuses_the_parser_refuses(text: str) -> None:
    assert not valid(plain(text))
    with pytest.raises(SweepError):
        parse(text, source="x.yaml")
