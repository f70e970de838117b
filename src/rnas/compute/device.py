"""Where a run computes, in which number format, and from which random numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from rnas.compute.precision import Precision
from rnas.errors import RnasError


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`. RnasError for `cuda` where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RnasError("device is cuda, but torch finds no GPU: use --device cpu or auto")
    return torch.device(name)


def hardware(device: torch.device) -> str:
    """What a run's environment.json calls it: `cpu`, or for instance `cuda (NVIDIA H200, CUDA 13.0)`."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Within, random numbers are nobody else's: torch's generators, that of `device` too, are put back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def choose_precision(name: str) -> Precision:
    """The precision called `auto`, `fp32` or `bf16`. `auto` is fp32 on every device (docs/decisions/009)."""
    return Precision(bf16=name == "bf16")


def reseed(seed: int, *stream: int) -> None:
    """Seed torch's generators for one part of a run, so that a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(mixed(seed, *stream))


def mixed(seed: int, *stream: int) -> int:
    """The seed of one part of a run."""
    for part in stream:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
