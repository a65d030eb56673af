"""A trained network as one file that runs without this project: pixels in, logits out.

The network is folded (`networks.fold`), so the file holds a plain single network, with the dataset's normalisation
before it. Both kinds of file hold its `description` besides.

Axes: M subnetworks · B batch · C channels · H, W height and width · K classes.
"""

import json
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmo_core import augment, networks
from mixmo_core.config import DATASETS

METADATA = "mixmo"
"""Under which name a file holds the description, as JSON: `mixmo.json` in a .pt2, the property `mixmo` in an .onnx."""
INPUT, OUTPUT = "pixels", "logits"


class _Deployed(nn.Module):
    """uint8 pixels (B, C, H, W), as the dataset's files have them -> logits (B, K) in fp32."""

    def __init__(self, net: networks.MixMoNet, dataset: str) -> None:
        super().__init__()
        # Whole, plainly strided weights are what the .pt2 writer takes for whole.
        self.net = networks.fold(net).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
        self._dataset = dataset

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits_MBK: Tensor = self.net(augment.normalise(pixels_BCHW, self._dataset))
        return logits_MBK[0]


def write(net: networks.MixMoNet, dataset: str, path: Path) -> None:
    """Writes the folded `net` to `path`, all of it or nothing. It takes batches of any size.

    The suffix decides: `.pt2` for `torch.export.load`, `.onnx` for ONNX runtimes. In either, `pixels` (B, C, H, W) are
    uint8 and `logits` (B, K) are fp32; the averaged logits of `net` in evaluation mode. It runs on the CPU.

    Raises ValueError for another suffix or a dataset that is not the one of `net`, ModuleNotFoundError where the
    packages for ONNX are missing, OSError where `path` cannot be written.
    """
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: the suffix decides what is written: {' or '.join(_WRITERS)}, got {path.suffix!r}")
    shape = DATASETS[dataset]
    if (net.encoders.shape[2], net.classifiers.shape[1]) != (shape.channels, shape.classes):
        raise ValueError(
            f"the network reads {net.encoders.shape[2]} channels and tells {net.classifiers.shape[1]} classes apart, "
            f"{dataset} has {shape.channels} and {shape.classes}: name the dataset that it was trained on"
        )
    # Two images: torch.export takes a dimension of one for a constant.
    example_BCHW = torch.zeros(2, shape.channels, shape.size, shape.size, dtype=torch.uint8)
    deployed = _Deployed(net, dataset).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        unfinished = Path(folder) / path.name
        _WRITERS[path.suffix](deployed, example_BCHW, json.dumps(description(dataset)), unfinished)
        os.replace(unfinished, path)


def description(dataset: str) -> dict[str, object]:
    """What a user of the file must know: the images that it takes, how they are normalised inside, the classes."""
    shape, spec = DATASETS[dataset], augment.PREPARATION[dataset]
    return {
        "dataset": dataset,
        "input": {"name": INPUT, "type": "uint8", "shape": ["batch", shape.channels, shape.size, shape.size]},
        "normalised_inside": {"scale": 255, "mean": spec.mean, "std": spec.std},
        "output": {"name": OUTPUT, "type": "float32", "shape": ["batch", shape.classes]},
        "classes": shape.classes,
    }


def _write_pt2(deployed: _Deployed, example_BCHW: Tensor, text: str, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(deployed, (example_BCHW,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={f"{METADATA}.json": text})


def _write_onnx(deployed: _Deployed, example_BCHW: Tensor, text: str, path: Path) -> None:
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{path.name} needs {' and '.join(missing)}, which the extra `onnx` installs: in the project's folder run "
            f"pip install --constraint constraints.txt '.[onnx]'. A .pt2 needs nothing more",
            name=missing[0],
        )
    with torch.no_grad():
        program = torch.onnx.export(
            deployed,
            (example_BCHW,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[METADATA] = text
    program.save(path, external_data=False)


_WRITERS: dict[str, Callable[[_Deployed, Tensor, str, Path], None]] = {".pt2": _write_pt2, ".onnx": _write_onnx}
