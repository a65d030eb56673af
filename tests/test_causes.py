"""Failures by what they are of."""

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import trial

from mixmo_core import train
from mixmo_core.config import TrialConfig, unflatten
from orchestrator.causes import causes, failed_of, fingerprint
from orchestrator.rows import TrialRow

TRACE = """Traceback (most recent call last):
  File "{root}/orchestrator/gang.py", line {line}, in _pass_epochs
    for told in train.train(
  File "{root}/mixmo_core/train.py", line {line}, in _epochs
    raise DivergedError(
    ^^^^^^^^^^^^^^^^^^^^
  File "/usr/lib/python3/torch/nn/modules/conv.py", line {line}, in forward
    return F.conv2d(x)
{kind}: diverged at epoch {line}: loss nan at {root}/x.pt, tensor 0x7f{line:x}
"""


def failed(seed: int, error: str, cause: str, kind: str | None = "exception") -> TrialRow:
    return trial(seed).replace(state="ERROR", error=error, error_cause=cause, error_kind=kind)


def trace(line: int = 3, root: str = "/srv/ada/mixmo", kind: str = "mixmo_core.train.DivergedError") -> str:
    return TRACE.format(line=line, root=root, kind=kind)


def test_a_fingerprint_names_the_exception_and_our_innermost_frames() -> None:
    assert fingerprint(trace()) == "DivergedError in train._epochs < gang._pass_epochs"
    assert fingerprint("a worker of gang-0 died") is None
    assert fingerprint("") is None


@given(st.integers(1, 10**6), st.sampled_from(["/srv/ada/mixmo", "/tmp/ray/session_1/py_9/x", "C:\\src", "."]))
def test_a_fingerprint_knows_no_lines_and_no_places(line: int, root: str) -> None:
    assert fingerprint(trace(line, root)) == fingerprint(trace())


def test_the_last_of_several_tracebacks_counts() -> None:
    chained = trace(kind="ValueError") + "\nThe above exception was the direct cause of the following:\n\n" + trace()
    assert fingerprint(chained) == fingerprint(trace())
    assert fingerprint(trace(kind="ValueError")) != fingerprint(trace())


def test_a_real_exception_has_one_wherever_it_is_met() -> None:
    def raised(config: TrialConfig) -> str:
        try:
            list(train.train(config))
        except Exception:
            return traceback.format_exc()
        raise AssertionError

    first, second = (
        raised(unflatten({"data.dataset": name, "model.depth": 10, "model.width": 1}))
        for name in ("cifar10", "cifar100")
    )
    assert first != second
    assert fingerprint(first) == fingerprint(second)
    assert str(fingerprint(first)).startswith("DatasetError in data.check")


def test_trials_that_failed_of_one_thing_are_one_cause_named_by_what_they_all_say() -> None:
    rows = [
        failed(0, trace(3), "DivergedError: diverged at epoch 3 of 9"),
        failed(1, trace(7), "DivergedError: diverged at epoch 7 of 9"),
        failed(2, trace(kind="ValueError"), "ValueError: no"),
        failed(3, "a worker died; this was crash 3 of the trial", "crash", "crash"),
        failed(4, "a worker died; this was crash 3 of the trial", "crash", None),
        trial(5),
    ]
    found = causes(rows)
    assert [(cause.name, len(cause.rows), cause.kind) for cause in found] == [
        ("DivergedError: diverged at epoch … of …", 2, "exception"), ("crash", 2, "crash"),
        ("ValueError: no", 1, "exception"),
    ]  # fmt: skip
    assert found[0].fingerprint == fingerprint(trace())
    other = failed(6, trace(), "DivergedError: a weight is no number")
    assert causes([*rows, other])[0].name == fingerprint(trace())


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("valueERROR", [1]), ("epoch … of", [0, 2]), ("epoch 3", [0]), ("_epochs", [0, 1, 2]), ("exception", [0, 1, 2]),
     ("", [0, 1, 2, 3]), ("crash", [3]), ("no such", [])],
)  # fmt: skip
def test_a_cause_is_asked_for_by_any_of_its_words(text: str, seeds: list[int]) -> None:
    rows = [
        failed(0, trace(3), "DivergedError: diverged at epoch 3 of 9"),
        failed(1, trace(kind="ValueError"), "ValueError: no"),
        failed(2, trace(7), "DivergedError: diverged at epoch 7 of 9"),
        failed(3, "a worker died", "crash", "crash"),
    ]
    assert sorted(row.config["seed"] for row in failed_of(rows, text)) == seeds


@given(st.lists(st.sampled_from([trace(), trace(9), trace(kind="OSError"), "gone", ""]), max_size=8))
def test_every_failed_trial_has_exactly_one_cause(errors: list[str]) -> None:
    rows = [failed(seed, error, f"line {seed}") for seed, error in enumerate(errors)]
    found = causes(rows)
    assert sorted(row.trial_id for cause in found for row in cause.rows) == sorted(row.trial_id for row in rows)
    assert [len(cause.rows) for cause in found] == sorted((len(cause.rows) for cause in found), reverse=True)
    assert failed_of(rows, "") == [row for cause in found for row in cause.rows]
