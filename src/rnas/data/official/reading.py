"""What the readers of official data sets share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rnas.data.arrays import resize
from rnas.data.decoding import Size
from rnas.errors import RnasError

MAX_FILE = 4 << 30
"""No file of these data sets has more bytes."""


def content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise RnasError(f"{path} has {path.stat().st_size} bytes: more than any official file")
        return path.read_bytes()
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror}") from e


def lines(path: Path) -> list[str]:
    try:
        return [line for line in content(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise RnasError(f"{path} is no text: {e}") from e


def resized(chunks: Iterator[NDArray[np.uint8]], size: Size | None) -> Iterator[NDArray[np.uint8]]:
    for chunk in chunks:
        yield chunk if size is None else resize(torch.from_numpy(np.ascontiguousarray(chunk)), size).numpy()
