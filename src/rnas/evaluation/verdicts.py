"""What an evaluation knows, image by image: in memory and, so that it outlives its process, in a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnas.attacks.checks import missing_gradient
from rnas.attacks.gradient import ascent_direction
from rnas.attacks.losses import margin
from rnas.compute.freezing import Model, is_plain
from rnas.errors import RnasError
from rnas.evaluation import trust
from rnas.files import write_json
from rnas.records import codec
from rnas.records.layout import VERDICTS
from rnas.records.schema import Verdicts

Mask = NDArray[np.bool_]

STATE = VERDICTS
UNKNOWN, BROKEN, STANDING = "?", "0", "1"
NAN = "n"
"""Broken by an image that the model answers with NaN or infinity."""
PROBED = 4  # images whose answers identify a model


def begun(folder: Path) -> bool:
    """Whether `folder` keeps verdicts. RnasError if its file is damaged."""
    return (folder / STATE).exists() and bool(_read(folder / STATE).verdicts)


def _read(file: Path) -> Verdicts:
    try:
        return codec.read(Verdicts, file)
    except RnasError as e:
        raise RnasError(f"{e}; remove it to start over") from e


@dataclass
class Table:
    """For every attack and image: the verdict, or that it is not known yet, and what it cost."""

    file: Path | None
    identity: dict[str, Any]
    verdicts: dict[str, NDArray[np.str_]]
    costs: dict[str, NDArray[np.float64]]  # seconds: its batch's, shared out evenly
    n: int

    @staticmethod
    def open(folder: Path | None, identity: dict[str, Any], n: int) -> Table:
        """The table kept in `folder`; a new one, written at once, if there is none.

        RnasError if it is another evaluation's, or if `folder` cannot be written to.
        """
        file = None if folder is None else folder / STATE
        if file is None or not file.exists():
            table = Table(file, identity, {}, {}, n)
            table.save()
            return table
        kept = _read(file)
        differing = [k for k, v in identity.items() if not _same(kept.identity.get(k), v)]
        verdicts = {name: np.array(list(row)) for name, row in kept.verdicts.items()}
        try:
            costs = {name: np.array([float(c) for c in row.split()]) for name, row in kept.seconds.items()}
        except ValueError as e:
            raise RnasError(f"{file} is damaged: expected numbers of seconds; remove it to start over") from e
        if differing:
            raise RnasError(
                f"{file} belongs to another evaluation (other {', '.join(differing)}): remove it to start over"
            )
        codes = {UNKNOWN, BROKEN, STANDING, NAN}
        rows = [*verdicts.values(), *costs.values()]
        if verdicts.keys() != costs.keys() or any(len(row) != n for row in rows):
            raise RnasError(f"{file} is damaged: remove it to start over")
        if any(set(row) - codes for row in verdicts.values()):
            raise RnasError(f"{file} is damaged: remove it to start over")
        return Table(file, identity, verdicts, costs, n)

    def row(self, attack: str) -> NDArray[np.str_]:
        """The verdicts (N,) on `attack`."""
        self.costs.setdefault(attack, np.zeros(self.n))
        return self.verdicts.setdefault(attack, np.full(self.n, UNKNOWN))

    def record(self, attack: str, indices: NDArray[np.intp], verdicts: NDArray[np.str_], seconds: float) -> None:
        """Remember, on disk too, what a batch of images came to, and the `seconds` that it took."""
        self.row(attack)[indices] = verdicts
        self.costs[attack][indices] = seconds / len(indices)
        self.save()

    def save(self) -> None:
        """Write the table to its file, if it has one."""
        if self.file is not None:
            rows = {name: "".join(row) for name, row in self.verdicts.items()}
            costs = {name: " ".join(f"{c:.4g}" for c in self.costs[name]) for name in rows}
            write_json(self.file, codec.encode(Verdicts(self.identity, rows, costs)))

    def mask(self, attack: str) -> Mask:
        """Where `attack` is known to have failed."""
        return np.asarray(self.row(attack) == STANDING)

    def seconds(self, attack: str, where: Mask) -> float:
        """What `attack` took on the images `where`, whoever asked for it first."""
        return float(self.costs[attack][where].sum())

    def known(self) -> dict[str, tuple[Mask, Mask]]:
        """For every attack: which images it was tried on, and which of these still stand."""
        return {name: (np.asarray(row != UNKNOWN), self.mask(name)) for name, row in self.verdicts.items()}

    def nans(self) -> int:
        """How many images one of the attacks broke by an answer of NaN or infinity."""
        rows = [row == NAN for row in self.verdicts.values()]
        return int(np.logical_or.reduce(rows).sum()) if rows else 0


def identify(model: Model, plain: Model, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What tells the `model` (in eval mode: `plain`) from others, as JSON.

    What it is made of, if it is a module; and what it says of the first images, `x` and `y`: the logits, and the
    gradients of the margin, which tell a defence from the same defence with a stand-in for its gradient. A model that
    is randomised says nothing that would identify it.
    """
    return {"model": _made_of(model), **_says(plain, x[:PROBED], y[:PROBED])}


def digest(*tensors: Tensor) -> str:
    """A fingerprint of the tensors' contents."""
    content = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        content.update(_content(tensor))
    return content.hexdigest()


def _made_of(model: Model) -> str:
    """A fingerprint of a module's classes, plain attributes and tensors."""
    content = hashlib.blake2b(digest_size=16)
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            kind = type(module)
            plain = sorted((k, repr(v)) for k, v in vars(module).items() if is_plain(v) and k != "training")
            content.update(repr((name, kind.__module__, kind.__qualname__, plain)).encode())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            content.update(name.encode() + _content(tensor))
    return content.hexdigest()


def _says(plain: Model, x: Tensor, y: Tensor) -> dict[str, list[float] | None]:
    """The logits, and of each image's gradient its size and its sum weighted with a wave."""
    if trust.randomised(plain, x):
        return {"answers": None, "gradients": None}
    with torch.no_grad():
        logits = plain(x).flatten().tolist()
    if missing_gradient(plain, x):
        return {"answers": logits, "gradients": None}
    g = ascent_direction(plain, x, y, margin)[0].flatten(1).double().nan_to_num(0, 0, 0)
    wave = torch.arange(g.shape[1], dtype=g.dtype, device=g.device).cos()
    return {"answers": logits, "gradients": [*g.abs().sum(1).tolist(), *(g @ wave).tolist()]}


def _same(kept: Any, now: Any) -> bool:
    """Equal; lists of numbers up to what rounding may change between two processes."""
    if not (isinstance(kept, list) and isinstance(now, list)):
        return bool(kept == now)
    a, b = np.array(kept, dtype=float), np.array(now, dtype=float)
    return a.shape == b.shape and bool((np.abs(a - b) <= 1e-3 * np.abs(b).max()).all())


def _content(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
