"""Image files: found, and decoded on all cores."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from rnas.data import decoding
from rnas.data.arrays import MAX_SIZE, MIN_SIZE
from rnas.data.decoding import Size
from rnas.errors import RnasError

CHUNK = 256
"""Images that are passed on at a time: 3 MiB at 64x64."""
WORTHWHILE = 8 << 20
"""Bytes of image files from which on worker processes, which take a fifth of a second to start, pay."""
IGNORED = frozenset(
    [
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),  # file managers
        "__macosx",  # archives that were packed on a Mac
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # Synology's and QNAP's storage
        *("$recycle.bin", "system volume information", "lost+found"),  # the top of a disk
    ]
)
"""Files and folders, in lower case, that systems put among images: thumbnails, notes, what was deleted."""

Answer = NDArray[np.uint8] | str
"""An image uint8 (H,W,3), or why it cannot be read."""


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that a system put there: nobody's image or class."""
    return name.startswith(".") or name.lower() in IGNORED


def image_files(root: Path, folder: str) -> list[str]:
    """The name, below `root`, of every file in `folder` at any depth, sorted; without hidden ones and those of systems.
    Links are followed, but not in circles."""
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(root / folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_foreign(name))
        below = os.path.relpath(place, root)
        found += [os.path.join(below, name) for name in files if not is_foreign(name)]
    return sorted(found)


def _unreadable(e: OSError) -> None:
    raise RnasError(f"cannot read {e.filename}: {e.strerror}") from e


def decode_all(root: Path, names: Sequence[str], size: Size | None) -> Iterator[NDArray[np.uint8]]:
    """The images in the files `names` below `root`, in order, as arrays uint8 (n,3,H,W) of a few hundred.

    Without `size` they must all be of one size. RnasError, listing the files, if some cannot be read: all are gone
    through first, so that one run names them all.
    """
    shape: tuple[int, ...] | None = None
    failed: list[str] = []
    answers = zip(names, _answers(root, names, size), strict=True)
    while chunk := list(islice(answers, CHUNK)):
        ready = []
        for name, answer in chunk:
            if isinstance(answer, str):
                failed.append(f"{name} ({answer})")
                continue
            _check_size(answer.shape, shape, name, names[0])
            shape = answer.shape
            ready.append(answer)
        if ready and not failed:
            yield np.stack(ready).transpose(0, 3, 1, 2)
    if failed:
        shown = ", ".join(failed[:10]) + (f" and {len(failed) - 10} more" if len(failed) > 10 else "")
        raise RnasError(
            f"{len(failed)} of {len(names)} images in {root} cannot be read: {shown}; repair or remove them"
        )


def _check_size(shape: tuple[int, ...], before: tuple[int, ...] | None, name: str, first: str) -> None:
    height, width, _ = shape
    if before is not None and shape != before:
        raise RnasError(
            f"the images differ in size: {first} has {before[1]}x{before[0]} pixels, {name} {width}x{height}; "
            "choose one with --image-size"
        )
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in (height, width)):
        raise RnasError(
            f"{name} has {width}x{height} pixels: expected {MIN_SIZE} to {MAX_SIZE} a side; choose an --image-size"
        )


def _answers(root: Path, names: Sequence[str], size: Size | None) -> Iterator[Answer]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1 and sys.executable and _bytes(root, names) >= WORTHWHILE:
        return _by_workers(root, names, size, cores)
    return (_answer(root / name, size) for name in names)


def _bytes(root: Path, names: Sequence[str]) -> int:
    with contextlib.suppress(OSError):  # a missing file is the decoder's to tell
        return sum(os.path.getsize(os.path.join(root, name)) for name in names)
    return 0


def _answer(path: Path, size: Size | None) -> Answer:
    try:
        return decoding.decode(path, size)
    except decoding.UnreadableError as e:
        return str(e)


def _by_workers(root: Path, names: Sequence[str], size: Size | None, count: int) -> Iterator[Answer]:
    """Image i comes from worker i modulo `count`; the pipes keep each worker a few images ahead.

    Processes, for with small images the interpreter's lock leaves threads no faster than one; and plain programs,
    for multiprocessing pickles, and runs the user's main script again.
    """
    with contextlib.ExitStack() as stack:
        pipes = [_start(stack, {"root": str(root), "size": size, "names": names[k::count]}) for k in range(count)]
        for i in range(len(names)):
            yield _read_answer(pipes[i % count])


def _start(stack: contextlib.ExitStack, task: dict[str, object]) -> IO[bytes]:
    """Start a worker with its `task`, and end it when `stack` unwinds; what it answers."""
    command = [sys.executable, "-P", "-W", "ignore", decoding.__file__]
    worker = stack.enter_context(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=1 << 20,
            start_new_session=True,  # Ctrl-C is this process's to answer
        )
    )
    stack.callback(worker.kill)
    assert worker.stdin is not None  # they are pipes
    assert worker.stdout is not None
    try:
        with worker.stdin:
            worker.stdin.write(json.dumps(task).encode())
    except BrokenPipeError as e:
        raise RnasError(_ENDED) from e
    return worker.stdout


_ENDED = "a process that decodes images ended early: is there too little memory?"


def _read_answer(pipe: IO[bytes]) -> Answer:
    header = pipe.read(decoding.HEADER.size)
    if len(header) < decoding.HEADER.size:
        raise RnasError(_ENDED)
    good, height, width, length = decoding.HEADER.unpack(header)
    content = pipe.read(length)
    if len(content) < length:
        raise RnasError(_ENDED)
    return np.frombuffer(content, np.uint8).reshape(height, width, 3) if good else content.decode()
