"""The grid of a sweep as a heat map: one setting across, the others down, a cell for its trials. Pure."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from orchestrator import progress
from orchestrator.lines import BAD, BUSY, DONE, FAINT, STRONG, Column, Section
from orchestrator.progress import Cell
from orchestrator.screen.panes import titled
from orchestrator.screen.scene import Plot, Scene

_SCALE = [(15, 54), (15, 60), (15, 24), (15, 30), (16, 36), (16, 71), (16, 113), (16, 184)]
"""Ink and ground of a cell, from the lowest to the highest mean, of the 256 colours: light or dark, each has its own
ground. The numbers say the same without colour.
"""
LONGEST_NAME = 24
GAP = 2
_FORMS: list[Callable[[Cell], str]] = [
    lambda cell: f"{100 * cell.mean:.2f}{_spread(cell, 2):>6} {_seeds(cell)}",
    lambda cell: f"{100 * cell.mean:.1f}{_spread(cell, 1):>4} {_seeds(cell)}",
    lambda cell: f"{100 * cell.mean:.1f} {_seeds(cell)}",
    lambda cell: f"{100 * cell.mean:.1f}",
]
"""What a cell says, the most first: all cells say as much as there is room for."""


def _spread(cell: Cell, digits: int) -> str:
    return "" if cell.std is None else f"±{100 * cell.std:.{digits}f}"


def _seeds(cell: Cell) -> str:
    return f"{len(cell.top1)}/{cell.planned}"


def wide_enough(scene: Scene) -> int:
    """From this width on every cell has its deviation and its number of seeds; 0 where there is no grid."""
    if not scene.plot:
        return 0
    needed = max((len(_FORMS[1](cell)) for cell in scene.cells.values() if cell.top1), default=8)
    return _name_width(scene.plot) + len(scene.plot.columns) * (GAP + max(needed, 8)) + GAP


def heat_map(scene: Scene, width: int, focused: bool = False, marked: str | None = None) -> Section | None:
    """The grid at this width; None where there is none, or no room for it."""
    grid = scene.plot
    if grid is None:
        return None
    each = (width - _name_width(grid) - GAP) // len(grid.columns) - GAP
    ended = [cell for cell in scene.cells.values() if cell.top1]
    form = next((form for form in _FORMS if all(len(form(cell)) <= each for cell in ended)), None)
    if form is None or each < 4:
        return None
    each = min(each, 18)
    low, high = min((cell.mean for cell in ended), default=0.0), max((cell.mean for cell in ended), default=0.0)
    at = grid.place(marked) if marked else (-1, -1)
    lines: list[list[str | Text]] = []
    for i, name in enumerate(grid.lines):
        line: list[str | Text] = [Text(name, style=STRONG if i == at[0] else "")]
        for j in range(len(grid.columns)):
            cell_id = grid.cells.get((i, j))
            text = _drawn(scene.cells[cell_id], form, each, low, high) if cell_id else Text(" " * each)
            if (i, j) == at:
                text.stylize("reverse bold")
            line.append(text)
        lines.append([*line, ""])
    columns = [
        Column("", _name_width(grid)),
        *(Column(_title(grid, j), each, "right") for j in range(len(grid.columns))),
    ]
    done = sum(len(cell.top1) == cell.planned for cell in ended)
    title = titled("Top-1 %", focused)
    whole = f"{title} · {done:,} of {len(scene.cells):,} cells"
    title = whole if len(whole) < _name_width(grid) + GAP + each - len(_title(grid, 0)) else title
    line_at = at[0] if marked else None
    return Section(title, f"{STRONG} {DONE}", (*columns, Column("", 0)), lines, least=5, marked=line_at,
                   lists=False)  # fmt: skip


def _name_width(grid: Plot) -> int:
    return min(LONGEST_NAME, max(map(len, grid.lines)))


def _title(grid: Plot, column: int) -> str:
    return f"{progress.symbol(grid.across)}={grid.columns[column]:g}"


def _drawn(cell: Cell, form: Callable[[Cell], str], width: int, low: float, high: float) -> Text:
    if cell.top1:
        step = int((len(_SCALE) - 1) * (cell.mean - low) / (high - low) + 0.5) if high > low else len(_SCALE) // 2
        ink, ground = _SCALE[step]
        return Text(form(cell).center(width), style=f"color({ink}) on color({ground})")
    if cell.running:
        share = f"{100 * (1 - cell.epochs_left):.0f} %"
        return Text(f"● {share}".center(width) if width >= 7 else share.replace(" ", "").center(width), style=BUSY)
    if cell.failed:
        return Text(f"✗ {cell.failed}".center(width), style=BAD)
    return Text("·".center(width), style=FAINT)
