"""What goes to the two streams: data to stdout, as text or as JSON, and talk to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def now() -> datetime:
    return datetime.now().astimezone()


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `guarded` knows what it means; rich would end with 1

    made = Piped(stderr=stderr, highlight=False, markup=False, soft_wrap=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 100
    return made


def width() -> int:
    """Columns of the terminal, or what COLUMNS says; 100 where neither is known. As `console`, without rich."""
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def say(text: str) -> None:
    print(text, file=sys.stderr)


def plain(record: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(record)


def flat(row: Any) -> dict[str, Any]:
    """A row as its table has it: settings and metrics are columns of their own."""
    record = plain(row)
    return {**record, **record.pop("config", {}), **record.pop("metrics")}


def print_json(command: str, payload: Mapping[str, Any]) -> None:
    print(json.dumps(_valid({"schema": f"mixmo.{command}/1", **payload}), indent=2, allow_nan=False))


def _valid(value: Any) -> Any:
    """As JSON can have it: no NaN, times in ISO 8601."""
    if isinstance(value, Mapping):
        return {str(key): _valid(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value
