"""Fixtures that every test file may use, and the last word of a run: what was skipped, and why."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy or torch start their threads: two under load collapse twenty-fold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

# An example's wall time depends on who else uses the machine.
hypothesis.settings.register_profile("mixmo", deadline=None)
hypothesis.settings.load_profile("mixmo")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """`golden("loss_weights.npz")`: outputs recorded from the reference implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden vectors are not beside the project (../shared/golden)")
    return lambda name: np.load(folder / name)


@pytest.fixture(scope="session")
def golden_folder(golden: Callable[[str], Any]) -> Path:
    return SHARED / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CIFAR images, packed; `materialise.py` beside them lays them out as torchvision wants."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the real images are not beside the project (../shared/data)")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of the shell that started it."""
    for name in ("MIXMO_RESULTS", "MIXMO_DATA", "NO_COLOR", "FORCE_COLOR", "RAY_ADDRESS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a Ray cluster runs last, so that a quick fault is seen first."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("what was not tested here", sep="=")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
    if not reasons:
        terminalreporter.line("nothing was skipped")
