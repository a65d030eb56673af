"""What may load what, proved in processes of their own; and that the repository says nothing of one machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIGHT = [
    "sweep",
    "plan",
    "rows",
    "store",
    "dispatcher",
    "screen",
    "analysis",
    "studies",
    "pareto",
    "figures",
    "report",
    "ensembles",
    "driver",
    "cli",
]


def loaded_by(module: str) -> set[str]:
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_loads_neither_torch_nor_ray(module: str) -> None:
    assert {"torch", "ray", "pandas", "boto3", "duckdb", "matplotlib"}.isdisjoint(loaded_by(f"orchestrator.{module}"))


@pytest.mark.parametrize("module", ["config", "metrics", "cost"])
def test_what_describes_a_trial_needs_the_standard_library_alone(module: str) -> None:
    foreign = loaded_by(f"mixmo_core.{module}") - set(sys.stdlib_module_names) - {"mixmo_core"}
    # What site-packages' .pth files load before any import of ours is none of ours.
    assert {"torch", "numpy", "ray", "pyarrow", "pydantic", "rich"}.isdisjoint(foreign)


def test_the_proxies_of_tune_are_spared_torch() -> None:
    """Each is a process: torch would cost it 500 MB and seconds."""
    assert "torch" not in loaded_by("orchestrator.tune")


def test_the_core_knows_nothing_of_the_cluster() -> None:
    assert {"ray", "pyarrow", "rich", "orchestrator"}.isdisjoint(loaded_by("mixmo_core.train"))


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: its tracked files cannot be listed")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_no_tracked_file_is_large_or_names_a_folder_of_one_machine() -> None:
    machine = re.compile(rb"(^|[^\w.])/(home/[a-z]+|root|Users/[A-Za-z]+|work)/", re.MULTILINE)
    for path in tracked():
        content = path.read_bytes()
        assert len(content) < 1 << 20, path
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""}:
            assert not machine.search(content), path
