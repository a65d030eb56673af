"""What a sweep looks like: the screen of `run` and `watch`, and the plain lines where there is no terminal.

A snapshot of the store becomes a `Scene` (what is counted, sorted, found); keys change a `State`; `drawn` makes a frame
of both. All three are pure. `Terminal` is the edge, `Screen` holds them together, and `watch` feeds it from a store.
"""

from orchestrator.screen.frame import Details, render, summary
from orchestrator.screen.plain import changes, counts
from orchestrator.screen.scene import Scene, Terms
from orchestrator.screen.show import Screen
from orchestrator.screen.state import Order, State, press
from orchestrator.screen.watching import fetching, watch

__all__ = [
    "Details", "Order", "Scene", "Screen", "State", "Terms", "changes", "counts", "fetching", "press", "render",
    "summary", "watch",
]  # fmt: skip
