"""The JSON Schema of a sweep file, from its settings and sections: what editors complete and check while one types.

It says less than `parse`: nothing of what settings say together, of labels, or of doubles. What it refuses is wrong.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from mixmo_core.config import RECIPES
from mixmo_core.metrics import METRICS
from orchestrator.sweep.fields import UNIONS, Field, fields_of, settings
from orchestrator.sweep.ranges import SCALE, STEP
from orchestrator.sweep.sections import IN_QUICK, MEMBERS, SECTIONS, metric_field

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_SEEDS: Schema = {
    "description": "How many seeds, counted from 0, or a list of them.",
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True},
    ],
}
_RECIPE: dict[str, Schema] = {
    "recipe": {"enum": [*RECIPES], "description": "The paper's optimiser settings, under what is given here."}
}


def json_schema() -> Schema:
    """Draft 7, which editors' YAML servers know best."""
    block = {
        "label": {**_TEXT, "description": "The name of its trials in tables."},
        "set": _given({}, "Settings with one value each."),
        "grid": _given({}, "Settings with a list of values each, all crossed.", many=True),
        "zip": _given({}, "Settings with lists of one length, taken side by side.", many=True),
        "when": {**_TEXT, "description": "A condition on settings: trials for which it does not hold are left out."},
    }
    rules: Schema = {"anyOf": [_TEXT, _list(_TEXT)]}
    properties = {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,99}$", "not": {"pattern": "-quick$"},
                 "description": "Names the folder of the results."},
        "trial": _given(_RECIPE, "The settings that all trials share.", seed=True),
        "blocks": {**_list(_object(block)), "description": "A union of grids."},
        "exclude": {**rules, "description": "Conditions: trials for which one holds are left out."},
        "seeds": _SEEDS,
        "baseline": {**_TEXT, "description": "The label that tables compare with."},
        **{key: _section(key, kind) for key, kind in SECTIONS.items()},
        "ensembles": {**_list(_object(_ENSEMBLE, required=("of", "members"))), "description": "Of finished seeds."},
        "published": {**_list(_published()), "description": "Numbers from a paper, told beside ours."},
        "quick": _given(
            {"seeds": _SEEDS, **{key: _section(key, SECTIONS[key]) for key in IN_QUICK}},
            "Laid over all of it by --quick.", exchanged=True,
        ),
    }  # fmt: skip
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A sweep of MixMo trainings"}
    definitions = {name: of_field(field) for name, field in settings().items()}
    return head | _object(properties, required=("name", "trial")) | {"definitions": definitions}


_ENSEMBLE: Schema = {
    "of": {**_TEXT, "description": "A label or a mixing method."},
    "members": {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 1,
                "description": "How many seeds form one."},
}  # fmt: skip


def _published() -> Schema:
    metrics = {metric.name: of_field(metric_field(metric.name)) for metric in METRICS}
    settings_of = _given(_RECIPE, "The settings that the number is for.")
    where: Schema = {"anyOf": [settings_of, _list(settings_of)]}
    known = {"label": _TEXT, "where": where, "members": of_field(MEMBERS), "source": _TEXT, **metrics}
    return _object(known, required=("source",)) | {"anyOf": [{"required": ["label"]}, {"required": ["where"]}]}


def _section(key: str, kind: Any) -> Schema:
    properties = {name: of_field(field) for name, field in fields_of(kind).items()}
    own = {spec.name for spec in dataclasses.fields(kind)}
    if "ranges" in own:
        when = {"when": {**_TEXT, "description": "A condition: drawn only where it holds."}}
        properties["ranges"] = _ranges("Settings to be drawn: limits, or choices.", when)
    if "mutations" in own:
        properties["mutations"] = _ranges("pbt: settings that may change in a copy: limits, or choices.", {})
    if "within" in own:
        properties["within"] = {**_list({"enum": [*settings()]}),
                                "description": "Settings: only trials of the same values are compared."}  # fmt: skip
    return _object(properties) | {"description": f"The section {key}."}


def _ranges(description: str, more: Mapping[str, Schema]) -> Schema:
    ends = {"min": {"type": "number"}, "max": {"type": "number"}, "scale": of_field(SCALE), "step": of_field(STEP),
            "choices": {"type": "array", "minItems": 1, "description": "Values to choose from, instead of limits."},
            **more}  # fmt: skip
    return {"type": "object", "description": description,
            "additionalProperties": {"anyOf": [_object(ends), {"type": "object"}]}}  # fmt: skip


def _given(
    more: Mapping[str, Schema], description: str, *, many: bool = False, seed: bool = False, exchanged: bool = False
) -> Schema:
    """Settings by name: nested by section, or dotted. `many`: a list of values for each. `exchanged`: a value, or what
    stands for each of several.
    """
    properties: dict[str, Schema] = dict(more)
    for name in settings():
        if name == "seed" and not seed:
            continue
        value: Schema = {"$ref": f"#/definitions/{name}"}
        if many:
            value = _list(value)
        elif exchanged:
            value = {"anyOf": [value, _object({"from": _list(value), "to": _list(value)}, required=("from", "to"))]}
        section, _, rest = name.rpartition(".")
        properties[name] = value
        if section:
            properties.setdefault(section, _object({}))["properties"][rest] = value
    return _object(properties) | {"description": description}


def of_field(field: Field) -> Schema:
    """What a field may hold."""
    limits = {"minimum": field.setting.at_least, "exclusiveMinimum": field.setting.above,
              "maximum": field.setting.at_most}  # fmt: skip
    made = _of_hint(field.hint, {name: limit for name, limit in limits.items() if limit is not None})
    return made | {"description": field.setting.meaning} | ({} if field.default is None else {"default": field.default})


def _of_hint(hint: Any, limits: Mapping[str, float]) -> Schema:
    if get_origin(hint) in UNIONS:
        return {"anyOf": [_of_hint(each, limits) for each in get_args(hint)]}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _of_hint(float, limits)}
    if hint in (int, float):
        return {"type": "integer" if hint is int else "number", **limits}
    return {"type": {str: "string", bool: "boolean", type(None): "null"}[hint]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _object(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    needed = {"required": [*required]} if required else {}
    return {"type": "object", "properties": dict(properties), "additionalProperties": False, **needed}
