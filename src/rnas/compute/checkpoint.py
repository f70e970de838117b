"""Checkpoints: tensors and plain values, written whole, read without pickle's powers."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from rnas.errors import RnasError
from rnas.files import write_bytes
from rnas.records.folder import Run, differences
from rnas.records.layout import CHECKPOINT

RUN = "run"
"""The key of the run's identity, as JSON."""


def save(run: Run, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, dicts and lists of them) as the checkpoint of `run`."""
    buffer = io.BytesIO()  # torch.save on a file turns a full disk into a RuntimeError
    torch.save({**state, RUN: json.dumps(run.identity)}, buffer)
    write_bytes(run.folder / CHECKPOINT, buffer.getvalue())


def load(run: Run) -> dict[str, Any] | None:
    """The last checkpoint of `run`, or None if there is none. RnasError if it is damaged, or another run's; those of
    earlier versions do not say whose they are.

    On the CPU: `load_state_dict` moves what belongs on a device, and leaves Adam's step counts, which the host reads.
    """
    path = run.folder / CHECKPOINT
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
        raise RnasError(f"{path} is not a checkpoint of rnas: expected a dictionary")
    _check_identity(state.pop(RUN, None), run, path)
    return state


def _check_identity(found: Any, run: Run, path: Path) -> None:
    if found is None:
        return
    try:
        changes = differences(json.loads(found), run.identity)
    except (TypeError, ValueError, AttributeError) as e:
        raise RnasError(f"{path} is damaged: it does not say which run it is of") from e
    if changes:
        raise RnasError(
            f"{path} is the checkpoint of another run ({'; '.join(changes.values())}): put this run's back, or delete "
            "it, and --resume starts from epoch 1"
        )
