"""The run folder: what was asked for (settings.json), on what (environment.json), what happened (log.jsonl)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rnas.errors import RnasError
from rnas.files import read_json, write_json, write_text
from rnas.settings import identity

SETTINGS, ENVIRONMENT, LOG = "settings.json", "environment.json", "log.jsonl"


class Run:
    """One run folder, open for writing."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def open(folder: Path, settings: Any, *, resume: bool, device: str, facts: dict[str, Any] | None = None) -> Run:
        """Start a run in `folder`, or with `resume` go on with the same run there.

        `facts` are what else makes the run what it is: the images, the genotype that a path led to.

        RnasError, and nothing written, if the folder holds another run, or this one and `resume` is not set, or
        cannot be written to.
        """
        wanted = {"command": type(settings).__name__.lower(), **identity(settings), **(facts or {})}
        check_free(folder, wanted, resume)
        if not (folder / SETTINGS).exists():
            write_json(folder / ENVIRONMENT, environment(device, getattr(settings, "seed", None)))
            write_json(folder / SETTINGS, {**wanted, "rnas": metadata.version("rnas")})
        return Run(folder)

    def log(self, **event: Any) -> None:
        """Append one event to log.jsonl."""
        with open(self.folder / LOG, "a", encoding="utf-8") as f:
            f.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def rewind(self, epoch: int) -> None:
        """Forget the epochs after `epoch`: they were logged, but the checkpoint of them was not written."""
        kept = [e for e in read_log(self.folder) if e.get("event") != "epoch" or e["epoch"] <= epoch]
        write_text(self.folder / LOG, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept))


def check_free(folder: Path, wanted: dict[str, Any], resume: bool) -> None:
    """RnasError unless a run with the settings `wanted` may start, or with `resume` go on, in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RnasError(f"{folder} is a file: --out names a folder")
    if not (folder / SETTINGS).exists():
        _check_writable(folder)
        left = [name for name in (LOG, "checkpoint.pt") if (folder / name).exists()]
        if left:
            raise RnasError(f"{folder} holds {left[0]} but no {SETTINGS}: choose another --out")
        return
    found = read_json(folder / SETTINGS)
    if not isinstance(found, dict):
        raise RnasError(f"{folder / SETTINGS} is damaged: expected a JSON object")
    found = {"precision": "fp32", **found}  # what there was before it could be chosen
    differing = [k for k in wanted if found.get(k) != wanted[k]]
    if differing:
        if differing == ["images"]:
            raise RnasError(
                f"{folder} holds a run on other images than {wanted['source']['data']} has now: choose another --out"
            )
        changes = "; ".join(f"{k} was {json.dumps(found.get(k))}, now {json.dumps(wanted[k])}" for k in differing)
        raise RnasError(f"{folder} holds another run ({changes}): choose another --out, or the settings it began with")
    if not resume:
        raise RnasError(f"{folder} holds this run already: --resume goes on with it, another --out starts anew")


def _check_writable(folder: Path) -> None:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RnasError(f"cannot write to {folder}: {existing} is not a folder that you may write to")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order. A line cut off by a kill at the end of the file is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never finished
        try:
            event = json.loads(line)
        except ValueError as e:
            raise RnasError(f"{path}, line {number}, is not JSON: the log is damaged") from e
        if not isinstance(event, dict):
            raise RnasError(f"{path}, line {number}, is no JSON object: the log is damaged")
        events.append(event)
    return events


def environment(device: str, seed: int | None) -> dict[str, Any]:
    """What a run depends on besides its settings: versions, device, commit, seed, command."""
    packages = ("rnas", "torch", "numpy", "scipy", "scikit-learn", "pillow")
    return {
        "command": " ".join(["rnas", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "commit": _commit(),
        "seed": seed,
    }


def _commit() -> str | None:
    """The git commit of the source tree, or None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
