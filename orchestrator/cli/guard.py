"""How a command ends: its exit code, and one clear message where it went wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from orchestrator.cli.streams import say
from orchestrator.errors import ExitCode, MixmoError


class Terminated(BaseException):
    """SIGTERM, where nobody else takes it: the screen is put back in order on the way out."""


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; its end as an exit code, and one clear message where it went wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
    try:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in background
        code = int(command() or 0)
        if sys.stdout:
            sys.stdout.flush()  # here, where a full disk is still told
        return code
    except MixmoError as error:
        say("\n".join(f"mixmo: {line}" for line in str(error).splitlines() or [type(error).__name__]))
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except Terminated:
        return ExitCode.TERMINATED
    except BrokenPipeError:  # `mixmo table x | head`
        _drop_output()
        return ExitCode.OK
    except Exception as error:
        return _other(error)


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _drop_output() -> None:
    """What is still to be written goes nowhere, instead of failing again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def _other(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer, whichever click it stands on
        error.show()
        return int(error.exit_code)
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        say(f"mixmo: cannot write {error.filename or 'the output'}: {error.strerror}")
        _drop_output()
        return ExitCode.UNREACHABLE
    from orchestrator.store import without_secrets

    say(without_secrets(traceback.format_exc(), os.environ).rstrip())  # people paste it into reports
    say("mixmo: this is a bug in mixmo, not in what you did. Please report it with the lines above.")
    return ExitCode.BUG
