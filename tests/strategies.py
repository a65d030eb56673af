"""Hypothesis strategies: every config that a trial may have."""

import types
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from mixmo_core.config import Setting, TrialConfig, leaves, unflatten

_DEPTHS = st.sampled_from([10, 16, 22, 28, 40])
_SMALL = 40
"""Counts are drawn up to here: enough to differ."""


def _numbers(setting: Setting, *, whole: bool) -> st.SearchStrategy[Any]:
    low = setting.at_least if setting.at_least is not None else setting.above if setting.above is not None else 0
    if whole:
        return st.integers(int(low), _SMALL)
    high = setting.at_most if setting.at_most is not None else 10.0
    return st.floats(low, high, exclude_min=setting.above is not None)


def _values(hint: Any, setting: Setting) -> st.SearchStrategy[Any]:
    origin: Any = get_origin(hint)
    if origin is Literal:
        return st.sampled_from(get_args(hint))
    if origin in (Union, types.UnionType):
        return st.one_of([_values(each, setting) for each in get_args(hint)])
    if origin is tuple:
        return st.lists(_numbers(setting, whole=False), max_size=3, unique=True).map(lambda parts: tuple(sorted(parts)))
    return _numbers(setting, whole=hint is int)


def settings() -> dict[str, st.SearchStrategy[Any]]:
    """Values for each setting by dotted name, within its own limits."""
    return {name: _values(spec.type, spec.metadata["setting"]) for name, spec in leaves()} | {"model.depth": _DEPTHS}


def settings_with_names() -> st.SearchStrategy[tuple[str, Any]]:
    """Any setting with a value."""
    return st.one_of([st.tuples(st.just(name), values) for name, values in settings().items()])


@st.composite
def flats(draw: st.DrawFn) -> dict[str, Any]:
    """Some settings by dotted name that make a valid config together."""
    flat = draw(st.fixed_dictionaries({}, optional=settings()))
    M = flat.get("model.subnetworks", 2)
    for name in ("model.encoders", "model.classifiers"):
        if name in flat:
            flat[name] = draw(st.sampled_from([1, M, "all"]))
    if M > 2 and "mixing.method" in flat:
        flat["mixing.method"] = draw(st.sampled_from(["sum", "linear", "cutmix"]))
    if flat.get("model.arch") == "preact_resnet" and flat.get("data.dataset") == "digits":
        flat["mixing.method"] = "fmix" if M == 2 else "cutmix"  # its 4x4 maps are too small for some
    if M > 1 and flat.get("data.msda") == "manifold_mixup":
        flat["data.msda"] = "mixup"
    if flat.get("data.dataset", "cifar100") not in ("cifar10", "cifar100"):
        flat.pop("evaluate.robustness", None)
    # 512 images, the fewest of any dataset, hold every batch that is drawn here.
    flat["data.train_images"] = draw(st.sampled_from(["all", 256, 300]))
    repetition = flat.get("data.repetition", 1)
    flat["data.batch_size"] = repetition * draw(st.integers(2, 6))
    return flat


def configs() -> st.SearchStrategy[TrialConfig]:
    return flats().map(unflatten)
