"""Arrays in .npz files, read without pickle and written whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.files import (
    replacing,
)

if TYPE_CHECKING:
    pass


UNBOUNDED = ("cw-l2",)
"""Attacks that ε does not bound. A union is of attacks in one ball: it leaves them out, and they stand beside it."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, or none if there is no such file. Nothing is unpickled."""
    if not path.exists():
        return {}
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as e:  # zipfile, zlib and numpy raise a dozen types on damaged files
        raise RnasError(f"{path} is damaged: {e}") from e


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write `arrays` as an .npz file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, allow_pickle=False, **arrays)


def read_masks(path: Path) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.int64] | None]:
    """For every attack which images are still right, and the labels; nothing, if there is no such file."""
    masks = read_arrays(path)
    labels = masks.pop("labels", None)
    for key, mask in masks.items():
        if mask.dtype != np.bool_ or mask.ndim != 1 or len(mask) != len(next(iter(masks.values()))):
            raise RnasError(f"{path} is damaged: {key} is no row of booleans as long as the others")
    if labels is not None and (
        labels.dtype.kind not in "iu" or labels.ndim != 1 or any(len(labels) != len(m) for m in masks.values())
    ):
        raise RnasError(f"{path} is damaged: labels are not one class number for each image")
    return masks, labels


def union(masks: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
    """Which images are right and withstand every bounded attack in `masks` (its "clean" included); None without one."""
    if all(name == "clean" or name in UNBOUNDED for name in masks):
        return None
    withstood: NDArray[np.bool_] = np.logical_and.reduce([m for name, m in masks.items() if name not in UNBOUNDED])
    return withstood
