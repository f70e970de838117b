"""Checkpoints: tensors and plain values, written whole, read without pickle's powers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from rnas.errors import RnasError
from rnas.files import write_bytes

NAME = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, dicts and lists of them) as the checkpoint of `folder`."""
    buffer = io.BytesIO()  # torch.save on a file turns a full disk into a RuntimeError
    torch.save(state, buffer)
    write_bytes(folder / NAME, buffer.getvalue())


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of `folder`, or None if there is none. RnasError if it is damaged.

    On the CPU: `load_state_dict` moves what belongs on a device, and leaves Adam's step counts, which the host reads.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks no checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:  # zipfile, zlib and torch raise many types on damaged files
        raise RnasError(f"{path} is damaged ({type(e).__name__}): delete it, and --resume starts from epoch 1") from e
    if not isinstance(state, dict):
        raise RnasError(f"{path} is no checkpoint of rnas: expected a dictionary")
    return state
