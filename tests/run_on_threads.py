"""`mixmo run` with its screen, over an engine of threads: python tests/run_on_threads.py FILE RESULTS."""

import sys
from pathlib import Path

from made_engine import Pace, Threads
from rich.console import Console

from orchestrator import driver, sweep
from orchestrator.cli.steering import from_screen
from orchestrator.screen import Screen, fetching
from orchestrator.store import ResultStore


def main(file: Path, results: str) -> int:
    loaded, store = sweep.load(file), ResultStore.open(results, create=True)
    screen = Screen(
        Console(stderr=True), act=from_screen(store, loaded.name, results), fetch=fetching(store, loaded.name),
        on_quit="Ctrl-C stops the sweep",
    )  # fmt: skip
    with screen:
        engine = Threads(Pace(0.2)).engine
        code = driver.run(loaded, store, observer=screen.show, talk=screen.say, engine=engine)
        screen.ended()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
