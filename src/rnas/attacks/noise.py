"""Random numbers for attacks.

With a seed every image has a stream of its own, drawn from the seed and the image itself: what is drawn for it depends
neither on the images beside it, nor on their order, nor on the device. Without one, torch's global generator is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def uniform(x: Tensor, seed: int | None, salt: str = "", shape: tuple[int, ...] | None = None) -> Tensor:
    """Numbers from [0,1) for each of the images `x` (B,...): (B, *shape), by default as large as the images.

    Draws with equal `salt` are equal.
    """
    return _draw(torch.rand, x, seed, f"uniform {salt}", shape)


def normal(x: Tensor, seed: int | None, salt: str = "", shape: tuple[int, ...] | None = None) -> Tensor:
    """Standard normal numbers for each of the images `x` (B,...): (B, *shape), by default as large as the images."""
    return _draw(torch.randn, x, seed, f"normal {salt}", shape)


def derived_seed(seed: int | None, name: str) -> int | None:
    """A seed for the part `name` of something seeded by `seed`; None stays None."""
    return None if seed is None else _hash(f"{seed} {name}".encode())


def _draw(draw: Callable[..., Tensor], x: Tensor, seed: int | None, salt: str, shape: tuple[int, ...] | None) -> Tensor:
    shape = tuple(x.shape[1:]) if shape is None else shape
    if seed is None:
        return draw((len(x), *shape), device=x.device, dtype=x.dtype)
    key = f"{seed} {salt} ".encode()
    images = x.detach().cpu().contiguous().numpy()
    streams = [Generator().manual_seed(_hash(key + image.tobytes())) for image in images]
    return torch.stack([draw(shape, generator=stream, dtype=x.dtype) for stream in streams]).to(x.device)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())
