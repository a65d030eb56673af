"""The wheel: built without a network, and its commands run where there is no checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300
Command = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, since setuptools leaves a folder `build` where it builds."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("NO WHEEL WAS TESTED: pip and setuptools are not installed, and nothing is downloaded for it")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for folder in ("mixmo_core", "orchestrator", "sweeps"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def mixmo(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The installed command, in a folder with nothing in it. The environment of the tests lends the dependencies."""
    site, away = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("away")
    pip("install", "--target", str(site), str(wheel))

    def run(*words: str, code: int = 0, folder: Path = away) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(site / "bin" / "mixmo"), *words], cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert str(ROOT) not in done.stdout + done.stderr
        return done

    told = "import mixmo_core, orchestrator; print(orchestrator.__file__, mixmo_core.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", told], cwd=away, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True,
        text=True, check=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert all(Path(file).is_relative_to(site) for file in where.stdout.split())
    return run


def pip(*words: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", words[0], *quiet, *words[1:]], capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_it_holds_every_module_and_every_sweep_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = {name for name in held.namelist() if ".dist-info/" not in name}
    modules = [file for folder in ("mixmo_core", "orchestrator") for file in (ROOT / folder).rglob("*.py")]
    files = {file.relative_to(ROOT).as_posix() for file in [*modules, *(ROOT / "sweeps").rglob("*.yaml")]}
    assert names == {f"mixmo_{name}" if name.startswith("sweeps/") else name for name in files}


def test_it_tells_its_version_and_its_commands(mixmo: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mixmo("--version").stdout == f"mixmo {project['version']}\n"
    assert "mixmo run sweeps/quickstart.yaml" in mixmo("--help").stdout


@pytest.mark.parametrize("words", ["sweeps/quickstart.yaml", "sweeps/paper/table1_cifar10.yaml --quick"])
def test_the_sweep_files_that_come_with_it_are_found_anywhere(mixmo: Command, words: str) -> None:
    planned = json.loads(mixmo("plan", *words.split(), "--json").stdout)
    assert planned["to_run"] == planned["trials"] > 10
    assert "there is no such file" in mixmo("plan", "sweeps/nothing.yaml", code=2).stderr


def test_a_file_of_the_same_name_that_is_there_goes_first(mixmo: Command, tmp_path: Path) -> None:
    file = tmp_path / "sweeps" / "quickstart.yaml"
    file.parent.mkdir()
    file.write_text("name: mine\ntrial: {data: {dataset: digits}}\n")
    assert json.loads(mixmo("plan", "sweeps/quickstart.yaml", "--json", folder=tmp_path).stdout)["sweep"] == "mine"


def test_it_trains_reads_and_examines_the_machine(mixmo: Command) -> None:
    short = ["-S", "optim.epochs=1", "-S", "data.train_images=64"]
    assert mixmo("train", "sweeps/quickstart.yaml", *short).stdout.startswith("epoch 1/1")
    assert json.loads(mixmo("schema").stdout)["properties"]["name"]
    assert json.loads(mixmo("doctor", "--json").stdout)["checks"]
    assert "no sweeps in" in mixmo("ls").stderr
