"""The command line: parse, call one function, say how it ended. Data goes to stdout, talk to stderr.

What is slow to load (torch, Ray, pandas, matplotlib) is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# Before numpy is loaded: its threads cost more than they give here, and two pools under load collapse.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from orchestrator.cli import (  # noqa: I001  (in the order of the help)
    planning,  # noqa: F401
    submitting,  # noqa: F401
    steering,  # noqa: F401
    reading,  # noqa: F401
    drawing,  # noqa: F401
    pulling,  # noqa: F401
    folding,  # noqa: F401
    upkeep,  # noqa: F401
    space,  # noqa: F401
    editing,  # noqa: F401
    around,  # noqa: F401
)
from orchestrator.cli.guard import guarded
from orchestrator.cli.program import app, of_words

__all__ = ["app", "main", "script"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    sys.exit(_run(arguments))


def script() -> NoReturn:
    """The installed command. It leaves without the teardown of Arrow's and torch's threads, which can abort a process
    whose work is done and written.
    """
    try:
        code = _run(None)
    except SystemExit as ended:  # what a shell is told to complete
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    # What is imported is never garbage, and to look for some there costs a tenth of a short command's time.
    gc.set_threshold(100_000, 20, 20)
    program = of_words(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: program(args=arguments, prog_name="mixmo", standalone_mode=False))
