"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class RnasError(Exception):
    """Bad input. Its message says what was wrong, where, and what would be right; the command line exits with 2."""


_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|out of memory|_ALLOC_FAILED"
    r"|could not create a (memory object|primitive)\s*$",
    re.MULTILINE,
)
"""What libraries under torch say that have no class for it: its allocator on Linux and Windows, C++, CUDA, and oneDNN,
which says as little as this when it gets no memory (a primitive *descriptor* that cannot be created is another matter).
"""


def out_of_memory(error: BaseException) -> RnasError | None:
    """What to tell a user of `error`, if it says that memory ran out. Imports no torch, whose error it may be."""
    ours = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    found = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    if not ours and not found:
        return None
    first = next(iter(str(error).splitlines()), "")
    details = f" ({first})" if first else ""
    return RnasError(f"out of memory{details}: use a smaller --batch-size; in search and training also --save-memory")


def unknown(what: str, name: str, known: Iterable[str]) -> RnasError:
    """The error for a name that is not among `known`: names the nearest ones first, then all of them."""
    known = list(known)
    folded = {k.casefold(): k for k in known}
    near = [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return RnasError(f"unknown {what} '{name}': {hint}known are {', '.join(known)}")
