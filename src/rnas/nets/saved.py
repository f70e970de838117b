"""A trained network as a folder: `model.safetensors` (the weights) and `model.json` (how to rebuild the network)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rnas import files
from rnas.errors import RnasError
from rnas.genotype import architecture_from_json
from rnas.nets import zoo
from rnas.precision import float32_by_default

WEIGHTS, META = "model.safetensors", "model.json"
MOST = {"cells": 1000, "channels": 10_000, "stem_stride": 2}
"""What a damaged model.json could ask for beyond would take the machine's memory first."""


def save_model(folder: Path, model: nn.Module, meta: dict[str, Any]) -> None:
    """Write `model` and `meta` (see `build_from_meta`) into `folder`; each file is written whole or not at all.

    model.json also gets the SHA-256 of the weights' file, as "weights".
    """
    build_from_meta(meta, "meta", device="meta")  # refuses to write what could not be read again
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = safetensors.torch.save(state)
    files.write_bytes(folder / WEIGHTS, weights)  # save_file would let only its owner read it
    files.write_json(folder / META, {**meta, "weights": hashlib.sha256(weights).hexdigest()})


def find_model(run: Path) -> Path | None:
    """Where the trained network of `run` lies: a training run itself, or the train/ of a whole pipeline's."""
    return next((folder for folder in (run, run / "train") if (folder / META).exists()), None)


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of `folder`, in eval mode on the CPU, and its model.json. Draws no random numbers.

    RnasError if a file is missing or damaged, or if the weights are not those of the network that model.json names.
    A model.json of an earlier version says nothing about the bytes of the weights: "weights" is then theirs.
    """
    if not (folder / META).is_file():
        raise RnasError(f"{folder} holds no trained network: {META} is missing (rnas train writes it)")
    meta = files.read_json(folder / META)
    model = build_from_meta(meta, str(folder / META), device="meta")
    state, digest = _read_weights(folder / WEIGHTS)
    _check_state(state, model.state_dict(), folder / WEIGHTS)
    if meta.setdefault("weights", digest) != digest:
        raise RnasError(
            f"{folder / WEIGHTS} is damaged, or of another training than {META}: its SHA-256 is {digest}, "
            f"{META} says {_short(meta['weights'])}"
        )
    model.load_state_dict(state, assign=True)
    return model.eval(), meta


def build_from_meta(meta: Any, where: str = META, device: str = "cpu") -> nn.Module:
    """The untrained network that `meta`, the content of a model.json, describes.

    Needed keys: arch (a name of the zoo or "genotype"), genotype (if arch is "genotype"), classes (names), mean, std
    (3 numbers each), image_size ([H, W]), and for cell networks cells and channels. Optional: stem_stride, auxiliary.
    RnasError, naming `where`, for anything else.
    """
    if not isinstance(meta, dict) or not isinstance(meta.get("arch"), str):
        raise RnasError(f"{where}: expected an object with the name of an architecture as 'arch'")
    for key, fits, what in (
        ("classes", _are_names, "a list of two or more class names, each once"),
        ("mean", _are_three_numbers, "three numbers"),
        ("std", _are_three_positive_numbers, "three positive numbers"),
        ("image_size", _are_two_integers, "[height, width]"),
    ):
        if not fits(meta.get(key)):
            raise RnasError(f"{where}: '{key}' is {_short(meta.get(key))}: expected {what}")
    options = {key: meta[key] for key in ("cells", "channels", "stem_stride") if meta.get(key) is not None}
    for key, value in options.items():
        if type(value) is not int or value > MOST[key]:
            raise RnasError(f"{where}: '{key}' is {_short(value)}: expected an integer, {MOST[key]} at most")
    options |= {key: tuple(meta[key]) for key in ("image_size", "mean", "std")}
    options["auxiliary"] = meta.get("auxiliary", False) is True
    try:
        with torch.device(device), float32_by_default():  # the host may have set another
            if meta["arch"] != "genotype":
                return zoo.build(meta["arch"], len(meta["classes"]), **options)
            genotype = architecture_from_json(meta.get("genotype"))
            return zoo.build_genotype(genotype, len(meta["classes"]), **options)
    except RnasError as e:
        raise RnasError(f"{where}: {e}") from e


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _are_names(value: Any) -> bool:
    return (
        _is_list(value) and len(value) >= 2 and all(isinstance(v, str) for v in value) and len({*value}) == len(value)
    )


def _are_three_numbers(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(type(v) in (int, float) for v in value)


def _are_three_positive_numbers(value: Any) -> bool:
    return _are_three_numbers(value) and all(v > 0 for v in value)


def _are_two_integers(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(type(v) is int and v <= 10_000 for v in value)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple))
