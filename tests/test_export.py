"""An exported network says what the trained one says, on a machine that has never heard of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mixmo_core import augment, export, networks
from mixmo_core.config import DataConfig, ModelConfig, TrialConfig

pytestmark = pytest.mark.slow

CONFIGS = {
    "wide": TrialConfig(data=DataConfig(dataset="cifar10"), model=ModelConfig(depth=10, width=1, subnetworks=3)),
    "preact": TrialConfig(
        data=DataConfig(dataset="digits"), model=ModelConfig(arch="preact_resnet", width=1, subnetworks=2, encoders=1)
    ),
}
BATCHES = (1, 2, 7)

WITHOUT_THE_PROJECT = """
import importlib.util, sys
from pathlib import Path
sys.path[:] = [entry for entry in sys.path if not (Path(entry or ".") / "mixmo_core").exists()]
assert importlib.util.find_spec("mixmo_core") is None
import numpy as np, torch
told = {"mixmo.json": ""}
program = torch.export.load("net.pt2", extra_files=told).module()
pixels = np.load("pixels.npz")
np.savez("logits.npz", **{name: program(torch.from_numpy(pixels[name])).detach().numpy() for name in pixels})
text = told["mixmo.json"]
print(text.decode() if isinstance(text, bytes) else text)
assert not [name for name in sys.modules if name.split(".")[0] in ("mixmo_core", "orchestrator")]
"""


def trained(config: TrialConfig) -> networks.MixMoNet:
    """A network whose batch norms have seen images."""
    net, (C, S) = networks.build(config), networks.image_shape(config)
    generator, M = torch.Generator().manual_seed(3), config.model.subnetworks
    images_MBCHW = torch.randn(M, 8, C, S, S, generator=generator)
    for _ in range(3):
        net(images_MBCHW, torch.full((M, 8, 1, 1), 1 / M))
    return net


def pixels_of(config: TrialConfig) -> dict[str, npt.NDArray[np.uint8]]:
    C, S = networks.image_shape(config)
    rng = np.random.default_rng(0)
    return {f"of_{count}": rng.integers(0, 256, (count, C, S, S), dtype=np.uint8) for count in BATCHES}


def same_logits(net: networks.MixMoNet, dataset: str, pixels: npt.NDArray[np.uint8], logits: npt.NDArray[Any]) -> None:
    with torch.inference_mode():
        expected = net.eval()(augment.normalise(torch.from_numpy(pixels), dataset)).mean(dim=0)
    assert logits.dtype == np.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5 * scale)


def needs_onnx() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the optional package {package} is not installed: no ONNX export")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no ONNX file was run")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pt2_runs_without_this_project(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    net, dataset, pixels = trained(config), config.data.dataset, pixels_of(config)
    export.write(net, dataset, tmp_path / "net.pt2")
    np.savez(tmp_path / "pixels.npz", **pixels)  # type: ignore[arg-type]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PROJECT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == json.loads(json.dumps(export.description(dataset)))
    for key, logits in np.load(tmp_path / "logits.npz").items():
        same_logits(net, dataset, pixels[key], logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_onnx_file_says_the_same(name: str, tmp_path: Path) -> None:
    runtime, config = needs_onnx(), CONFIGS[name]
    net, dataset = trained(config), config.data.dataset
    export.write(net, dataset, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]  # one file, its weights inside
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map[export.METADATA])
    assert told == json.loads(json.dumps(export.description(dataset)))
    assert ([each.name for each in session.get_inputs()], session.get_inputs()[0].type) == (["pixels"], "tensor(uint8)")
    for pixels in pixels_of(config).values():
        (logits,) = session.run(["logits"], {"pixels": pixels})
        same_logits(net, dataset, pixels, logits)


def test_the_description_is_that_of_the_dataset() -> None:
    told = export.description("cifar10")
    assert told["classes"] == 10
    assert told["input"] == {"name": "pixels", "type": "uint8", "shape": ["batch", 3, 32, 32]}
    assert told["normalised_inside"] == {
        "scale": 255, "mean": augment.PREPARATION["cifar10"].mean, "std": augment.PREPARATION["cifar10"].std
    }  # fmt: skip


def test_the_trained_network_is_left_alone(tmp_path: Path) -> None:
    net = trained(CONFIGS["wide"]).double()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export.write(net, "cifar10", tmp_path / "deep" / "net.pt2")
    assert net.training
    assert all(
        torch.equal(before[name], tensor) and tensor.dtype is torch.float64
        for name, tensor in net.state_dict().items()
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["net", "net.pt", "net.ONNX", "net.pt2.zip"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    net = networks.build(CONFIGS["wide"])
    with pytest.raises(ValueError, match=r"the suffix decides what is written: \.pt2 or \.onnx"):
        export.write(net, "cifar10", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["digits", "cifar100", "tiny_imagenet"])
def test_another_dataset_is_refused(dataset: str, tmp_path: Path) -> None:
    net = networks.build(CONFIGS["wide"])
    with pytest.raises(ValueError, match="reads 3 channels and tells 10 classes apart"):
        export.write(net, dataset, tmp_path / "net.pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"net.onnx needs .*{package}.*pip install .*\[onnx\]"):
        export.write(networks.build(CONFIGS["wide"]), "cifar10", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, _content: Any) -> int:
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    (tmp_path / "net.pt2").write_bytes(b"an older one")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.write(networks.build(CONFIGS["wide"]), "cifar10", tmp_path / "net.pt2")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"net.pt2": b"an older one"}
