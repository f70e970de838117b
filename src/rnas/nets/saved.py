"""A trained network as a folder: `model.safetensors` (the weights) and `model.json` (how to rebuild the network)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rnas import files
from rnas.compute.precision import float32_by_default
from rnas.errors import RnasError
from rnas.nets import zoo
from rnas.nets.own import build_own, is_own
from rnas.records import codec
from rnas.records.layout import META, WEIGHTS
from rnas.records.schema import Description


def save_model(folder: Path | str, model: nn.Module, meta: Description) -> None:
    """Write `model` and `meta` into `folder`; each file is written whole or not at all.

    model.json also gets the SHA-256 of the weights' file, as "weights". RnasError, and nothing written, if nothing can
    be built by `meta`.
    """
    build_from_meta(meta, device="meta")  # refuses to write what could not be read again
    folder = Path(folder)
    # Copies, for tensors that share memory, as tied weights do, are refused.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    weights = safetensors.torch.save(state)
    files.write_bytes(folder / WEIGHTS, weights)  # save_file would let only its owner read it
    files.write_json(folder / META, codec.encode(replace(meta, weights=hashlib.sha256(weights).hexdigest())))


def find_model(run: Path | str) -> Path | None:
    """Where the trained network of `run` lies: a training run itself, or the train/ of a whole pipeline's."""
    return next((folder for folder in (Path(run), Path(run, "train")) if (folder / META).exists()), None)


def load_model(folder: Path | str) -> tuple[nn.Module, Description]:
    """The network of `folder`, in eval mode on the CPU, and its model.json. Draws no random numbers.

    RnasError if a file is missing or damaged, or if the weights are not those of the network that model.json names.
    A model.json of an earlier version says nothing about the bytes of the weights: `weights` is then theirs.
    """
    folder = Path(folder)
    if not (folder / META).is_file():
        raise RnasError(f"{folder} holds no trained network: {META} is missing (rnas train writes it)")
    meta = codec.read(Description, folder / META)
    model = build_from_meta(meta, str(folder / META), device="meta")
    state, digest = _read_weights(folder / WEIGHTS)
    _check_state(state, model.state_dict(), folder / WEIGHTS)
    if meta.weights not in (None, digest):
        raise RnasError(
            f"{folder / WEIGHTS} is damaged, or of another training than {META}: its SHA-256 is {digest}, "
            f"{META} says {meta.weights}"
        )
    model.load_state_dict(state, assign=not is_own(meta.arch))  # tied weights stay tied
    return model.eval(), replace(meta, weights=digest)


def build_from_meta(meta: Description, where: str = META, device: str = "cpu") -> nn.Module:
    """The untrained network that `meta`, the content of a model.json, describes.

    A network of the zoo needs mean and std, a cell network cells and channels, and one whose arch is "genotype" a
    genotype. What a function builds (`package.module:function`) is on the CPU, whatever the `device`, for it may
    compute with its tensors. RnasError, naming `where`, if nothing can be built, or if a file could not say `meta`.
    """
    codec.decode(Description, codec.encode(meta), where)
    try:
        return build_own(meta.arch) if is_own(meta.arch) else _of_the_zoo(meta, device)
    except RnasError as e:
        raise RnasError(f"{where}: {e}") from e


def _of_the_zoo(meta: Description, device: str) -> nn.Module:
    if meta.mean is None or meta.std is None:
        raise RnasError("mean or std is missing: expected three numbers each")
    options: dict[str, Any] = {"image_size": meta.image_size, "mean": meta.mean, "std": meta.std}
    sizes = {"cells": meta.cells, "channels": meta.channels, "stem_stride": meta.stem_stride}
    options |= {key: value for key, value in sizes.items() if value is not None}
    options["auxiliary"] = meta.auxiliary is True
    with torch.device(device), float32_by_default():  # the host may have set another
        if meta.arch != "genotype":
            return zoo.build(meta.arch, len(meta.classes), **options)
        if meta.genotype is None:
            raise RnasError("genotype is missing: expected the cells of the network")
        return zoo.build_genotype(meta.genotype, len(meta.classes), **options)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and its SHA-256."""
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        return safetensors.torch.load_file(path), digest
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror or e}") from e
    except SafetensorError as e:
        raise RnasError(f"{path} is damaged or no safetensors file: {e}") from e


def _check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name in expected.keys() ^ state.keys():
        what = "lacks" if name in expected else "has a foreign"
        raise RnasError(f"{path} {what} tensor '{name}': it belongs to another network than {META} names")
    for name, value in expected.items():
        given = state[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise RnasError(
                f"{path}: tensor '{name}' is {_kind(given)}: the network that {META} names expects {_kind(value)}"
            )


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
