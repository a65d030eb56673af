"""What can go wrong for a user, and the exit code of each.

    MixmoError
    ├── UsageError         2  a bad command line, sweep file or dataset folder
    │   └── SweepError     2  a sweep file that says something it may not
    ├── FailedError        3  a trial that failed
    ├── NotFoundError      5  no such sweep or trial
    ├── RefusedError       6  a budget, a guard, or another driver holds the sweep
    │   └── TokenError     6  a cluster that takes no request for want of its token
    └── UnreachableError   7  the store or the cluster cannot be read or written

A message says what, where, what is allowed and what to do next. Anything else that escapes is our bug (exit code 1).
"""

import os
from contextlib import suppress
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    OK = 0
    BUG = 1
    USAGE = 2
    FAULTS = 3
    """The sweep ended, but some trials failed; or `verify` found faults."""
    STOPPED = 4
    """Ended before the sweep did: drained, or out of time."""
    NOT_FOUND = 5
    REFUSED = 6
    UNREACHABLE = 7
    INTERRUPTED = 130
    TERMINATED = 143


class MixmoError(Exception):
    exit_code = ExitCode.BUG


class UsageError(MixmoError):
    exit_code = ExitCode.USAGE


class SweepError(UsageError):
    """A sweep file that cannot be taken as it is. Each line of the message is one fault."""


class FailedError(MixmoError):
    """A trial that failed by its own settings."""

    exit_code = ExitCode.FAULTS


class NotFoundError(MixmoError):
    exit_code = ExitCode.NOT_FOUND


class RefusedError(MixmoError):
    exit_code = ExitCode.REFUSED


class TokenError(RefusedError):
    """Of a Ray that asks for a token: one here where RAY_AUTH_MODE is `token`, before it asks any cluster."""

    def __init__(self, cluster: str) -> None:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            told = f"{cluster} asks for a token, and does not take a request without one: set RAY_AUTH_MODE=token, and"
        elif _has_token():
            told = f"{cluster} asks for a token, and does not take the one that is here:"
        else:
            told = "RAY_AUTH_MODE is token, and there is no token here:"
        super().__init__(
            f"{told} put the one that the cluster was started with into ~/.ray/auth_token (readable by you alone), or "
            "into RAY_AUTH_TOKEN, and give the command again"
        )


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    with suppress(OSError):
        return bool(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip())
    return False


class UnreachableError(MixmoError):
    exit_code = ExitCode.UNREACHABLE
