"""The pictures of docs/figures.md: what the sweep on that page looks like. `python tests/made_figures.py` draws them.

The trials are those of the file; what became of them is invented, from made logits and without a training. Each picture
carries what it shows, in words and numbers, and a test holds that to what the code draws now.
"""

import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_rows import NOTHING, NOW
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mixmo_core import cost
from mixmo_core.config import TrialConfig
from mixmo_core.evaluate import summarize
from orchestrator import analysis, ensembles, figures, gallery
from orchestrator.pareto import front
from orchestrator.plan import initial_row
from orchestrator.rows import EpochRow, TrialRow, epoch_rows
from orchestrator.store import Logits, ResultStore
from orchestrator.sweep import Sweep, parse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "figures.md"
FOLDER = PAGE.parent / "figures"
SHOWN = "Description"
"""The word of a PNG under which it carries what it shows."""
IMAGES, CLASSES = 500, 10


def sweep() -> Sweep:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return parse(text, source=PAGE.name)


def margin(config: TrialConfig) -> float:
    """Invented: by how much the right class stands out. Grows with the width; wide networks gain by a subnetwork."""
    M, mixing, wide = config.model.subnetworks, config.mixing, math.log2(config.model.width)
    gain = 0.0 if M == 1 else 0.1 + 0.12 * wide - 0.12 * (M - 2) + 0.05 * math.log2(config.data.repetition)
    if M > 1 and mixing.method == "cutmix":
        gain += 0.25 * math.sin(math.pi * min(1.0, mixing.probability + 0.05)) - 0.01 * abs(mixing.weight_root - 3)
    return 1.9 + 0.15 * wide + gain


def logits(config: TrialConfig, position: int) -> Logits:
    """Of subnetworks that share many of their mistakes, as do the trials."""
    hard, chance = np.random.default_rng(0), np.random.default_rng(1 + position)
    shape, labels_N = (config.model.subnetworks, IMAGES, CLASSES), np.arange(IMAGES) * 7 % CLASSES
    logits_MNK = (
        hard.normal(size=shape[1:]) * 0.9 + chance.normal(size=shape[1:]) * 0.3 + chance.normal(size=shape) * 0.4
    )
    logits_MNK[:, np.arange(IMAGES), labels_N] += margin(config)
    return Logits.of(2.2 * logits_MNK, labels_N)


def trials(store: ResultStore, made: Sweep) -> Iterator[TrialRow]:
    for trial in made.trials:
        row, stored = initial_row(trial, made), logits(trial.config, trial.position)
        found = summarize(torch.from_numpy(stored.logits_MNK.astype(np.float32)), torch.from_numpy(stored.labels_N))
        flops = cost.trial_flops(trial.config)
        yield row.replace(
            state="TERMINATED", epoch=row.epochs, metrics={**NOTHING, **found}, train_flops=flops, wall_s=flops / 1e10,
            updated_at=NOW, split="test", logits=store.attempt(row.trial_id, 1, 1, "made").put_logits(stored),
        )  # fmt: skip


def curve(row: TrialRow) -> Iterator[EpochRow]:
    for epoch in range(1, row.epoch + 1):
        reached = (
            1 - 0.6 * math.exp(-epoch / 2.5) * (1 - epoch / row.epoch) + 0.01 * math.sin(7.7 * epoch + row.position)
        )
        yield EpochRow(
            sweep=row.sweep, trial_id=row.trial_id, epoch=epoch, attempt=1, fence=0, seq=epoch, updated_at=NOW,
            wall_s=float(epoch), gpu_seconds=0.0, images_per_s=1.0,
            metrics={**NOTHING, "top1": min(1.0, (row.metrics["top1"] or 0.0) * reached)},
        )  # fmt: skip


def drawn(folder: Path) -> dict[str, Any]:
    """The figures, by the name of their picture; the results are made in this folder."""
    store, made = ResultStore.open(folder, create=True), sweep()
    with store.writer(made.name, sweep_text=made.text, now=lambda: NOW) as writer:
        rows = [*trials(store, made)]
        writer.put(rows)
        for row in rows:
            writer.add([*curve(row)])
        writer.close(done=True)
    loaded = analysis.load(folder, made.name)
    combined = ensembles.rows(loaded, lambda line: None)
    material = figures.Material(
        rows=loaded.rows, epochs=lambda: epoch_rows(loaded.epochs()), logits=store.logits,
        samples=lambda: gallery.samples(loaded.rows), ensembles=lambda: combined,
    )  # fmt: skip
    found = front([*loaded.rows, *combined], cost="flops")
    return {**figures.draw(material).figures, "pareto": figures.draw_front(found)}


def shown(figure: Any) -> dict[str, list[Any]]:
    """What a figure shows: all its words, and where its lines and bars are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text

    figure.draw_without_rendering()
    words = [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    lines = [np.asarray(line.get_xydata(), dtype=float) for axis in figure.axes for line in axis.findobj(Line2D)]
    bars = [bar.get_bbox().extents for axis in figure.axes for bar in axis.findobj(Rectangle)]
    return {
        "words": words,
        "lines": [[len(line), *(float(f"{each:.5g}") for each in line.sum(axis=0))] for line in lines if len(line)],
        "bars": [len(bars), float(f"{np.abs(np.array(bars)).sum():.5g}")],
    }


def carried(picture: Path) -> dict[str, list[Any]]:
    """What a picture says that it shows; nothing where it does not say."""
    with Image.open(picture) as image:
        found: dict[str, list[Any]] = json.loads(image.info.get(SHOWN, "{}"))
    return found


def write(figure: Any, picture: Path) -> None:
    figures.save(figure, picture)
    info = PngInfo()
    info.add_text(SHOWN, json.dumps(shown(figure)), zip=True)
    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(128)
    few.save(picture, optimize=True, pnginfo=info)


def pictures() -> list[Path]:
    """Those of the page."""
    return [PAGE.parent / path for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text())]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made_in:
        found = drawn(Path(made_in))
    for picture in pictures():
        write(found[picture.stem], picture)
        print(picture.name, picture.stat().st_size)  # noqa: T201
