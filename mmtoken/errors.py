"""Errors that name the field, its value and the fix.

Every error mmtoken raises on purpose is an `MMTokenError`, so one `except` catches them all; it is a `ValueError`
because each of them says that something handed in cannot be used as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMTokenError(ValueError):
    """Base of all errors raised by mmtoken on purpose."""


class KeepError(MMTokenError):
    """`keep` is not a fraction in (0, 1] or a positive whole number."""


class InputError(MMTokenError):
    """An image, a prompt or a tensor handed in cannot be used."""


class ActionError(MMTokenError):
    """A policy answered with something that is no action.

    Attributes:
        rows: which rows of the batch did, as far as that is known; the others could go on without them.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class UnknownNameError(MMTokenError):
    """A compressor, model or backbone of this name does not exist; the message lists near names."""


class UnsupportedError(MMTokenError):
    """This backbone, cache or transformers version cannot host what was asked for; the message says why."""


class CheckpointError(MMTokenError):
    """A checkpoint folder is incomplete, corrupt or not of a form that is loaded."""


def near_names(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'? Known: a, b, c"`: the tail of a message about an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return f"{hint} Known: {', '.join(names)}"
