"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RnasError(Exception):
    """Bad input. Its message says what was wrong, where, and what would be right; the command line exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> RnasError:
    """The error for a name that is not among `known`: names the nearest ones first, then all of them."""
    known = list(known)
    folded = {k.casefold(): k for k in known}
    near = [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return RnasError(f"unknown {what} '{name}': {hint}known are {', '.join(known)}")
