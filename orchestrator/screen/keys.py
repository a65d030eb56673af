"""What a terminal sends when keys are pressed, as names of keys. Pure."""

from __future__ import annotations

import re

_NAMED = {
    "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\b": "backspace", "\x15": "clear", "\x1b": "esc",
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left",
    "\x1b[5~": "pageup", "\x1b[6~": "pagedown", "\x1b[Z": "backtab",
    "\x1b[H": "home", "\x1b[F": "end", "\x1bOH": "home", "\x1bOF": "end", "\x1b[1~": "home", "\x1b[4~": "end",
}  # fmt: skip
_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z~^$@]|O.)")
_BEGUN = re.compile(r"\x1b(?:\[[0-9;?]{0,16}|O)?")


def decode(sent: str) -> tuple[list[str], str]:
    """The keys in what was sent, and the rest that may be the beginning of one more.

    A character stands for itself. Sequences that are of no key that anybody asks for are dropped. A lone escape is the
    rest: whoever waits in vain for more takes it as the key `esc`.
    """
    keys: list[str] = []
    while sent and not _BEGUN.fullmatch(sent):
        whole = _SEQUENCE.match(sent)
        one = whole[0] if whole else sent[0]
        sent = sent[len(one) :]
        if one in _NAMED:
            keys.append(_NAMED[one])
        elif len(one) == 1 and one.isprintable():
            keys.append(one)
    return keys, sent
