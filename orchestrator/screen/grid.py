"""The grid of a sweep as a heat map: one setting across, the others down, a cell for its trials. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from orchestrator import progress
from orchestrator.lines import BAD, BUSY, DONE, FAINT, STRONG, Column, Lazy, Section
from orchestrator.progress import Cell
from orchestrator.screen.panes import titled
from orchestrator.screen.scene import Plot, Scene

_SCALE = [(15, 54), (15, 60), (15, 24), (15, 30), (16, 36), (16, 71), (16, 113), (16, 184)]
"""Ink and ground of a cell, from the lowest to the highest mean, of the 256 colours: light or dark, each has its own
ground. The numbers say the same without colour.
"""
LONGEST_NAME = 24
GAP = 2


@dataclass(frozen=True, slots=True)
class _Form:
    """How much a cell says."""

    digits: int
    gap: str = " "
    spread: bool = True
    seeds: bool = True

    def width(self, longest_seeds: int) -> int:
        whole = 3 + self.digits
        return whole + (self._room if self.spread else 0) + (1 + longest_seeds if self.seeds else 0)

    @property
    def _room(self) -> int:
        return len(self.gap) + 3 + self.digits

    def told(self, cell: Cell, longest_seeds: int) -> str:
        text = f"{100 * cell.mean:.{self.digits}f}"
        if self.spread:
            text += f"{self.gap}±{100 * cell.std:.{self.digits}f}" if cell.std is not None else " " * self._room
        return text + (f" {_seeds(cell):>{longest_seeds}}" if self.seeds else "")


_FORMS = [_Form(2), _Form(1), _Form(1, ""), _Form(1, spread=False), _Form(1, spread=False, seeds=False)]
"""The most first: all cells say as much as there is room for."""


def _seeds(cell: Cell) -> str:
    return f"{len(cell.top1)}/{cell.planned}"


def _longest_seeds(scene: Scene) -> int:
    return 1 + 2 * len(str(max((cell.planned for cell in scene.cells.values()), default=1)))


def wide_enough(scene: Scene) -> int:
    """From this width on every cell has its deviation and its number of seeds; 0 where there is no grid."""
    if not scene.plot:
        return 0
    return _name_width(scene.plot) + len(scene.plot.columns) * (GAP + _FORMS[2].width(_longest_seeds(scene))) + GAP


def heat_map(scene: Scene, width: int, focused: bool = False, marked: str | None = None) -> Section | None:
    """The grid at this width; None where there is none, or no room for it."""
    grid = scene.plot
    if grid is None:
        return None
    each, seeds = (width - _name_width(grid) - GAP) // len(grid.columns) - GAP, _longest_seeds(scene)
    form = next((form for form in _FORMS if form.width(seeds) <= each), None)
    if form is None:
        return None
    each = min(each, form.width(seeds) + 2)
    best_first = scene.results
    ends = (best_first[-1].mean, best_first[0].mean) if best_first else (0.0, 0.0)
    at = grid.place(marked) if marked else (-1, -1)

    def line(i: int) -> list[str | Text]:
        drawn: list[str | Text] = [Text(grid.lines[i], style=STRONG if i == at[0] else "")]
        for j in range(len(grid.columns)):
            cell_id = grid.cells.get((i, j))
            text = _drawn(scene.cells[cell_id], form, each, seeds, ends) if cell_id else Text(" " * each)
            if (i, j) == at:
                text.stylize("reverse bold")
            drawn.append(text)
        return [*drawn, ""]

    columns = [
        Column("", _name_width(grid)),
        *(Column(_title(grid, j), each, "right") for j in range(len(grid.columns))),
    ]
    done = sum(len(cell.top1) == cell.planned for cell in scene.results)
    title = titled("Top-1 %", focused)
    whole = f"{title} · {done:,} of {len(scene.cells):,} cells complete"
    return Section(
        whole if len(whole) < _name_width(grid) + GAP + each - len(_title(grid, 0)) else title,
        f"{STRONG} {DONE}", (*columns, Column("", 0)), Lazy(len(grid.lines), line), least=5,
        marked=at[0] if marked else None, lists=False,
    )  # fmt: skip


def _name_width(grid: Plot) -> int:
    return min(LONGEST_NAME, max(map(len, grid.lines)))


def _title(grid: Plot, column: int) -> str:
    return f"{progress.symbol(grid.across)}={grid.columns[column]:g}"


def _drawn(cell: Cell, form: _Form, width: int, seeds: int, ends: tuple[float, float]) -> Text:
    if cell.top1:
        low, high = ends
        step = round((len(_SCALE) - 1) * (cell.mean - low) / (high - low)) if high > low else len(_SCALE) // 2
        ink, ground = _SCALE[step]
        told = form.told(cell, seeds)
        told = told if len(told) <= width else _FORMS[-1].told(cell, seeds)  # a deviation above ten per cent
        return Text(told.center(width), style=f"color({ink}) on color({ground})")
    if cell.running:
        share = f"{100 * (1 - cell.epochs_left):.0f} %"
        return Text(f"● {share}".center(width) if width >= 7 else share.replace(" ", "").center(width), style=BUSY)
    if cell.failed:
        return Text(f"✗ {cell.failed}".center(width), style=BAD)
    return Text("·".center(width), style=FAINT)
