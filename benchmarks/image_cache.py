"""A data set's second start: the cache of decoded images against safetensors, with and without a checksum (decision
027). `python -m benchmarks.image_cache`"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnas.data import cache

IMAGES, ROUNDS = 60_000, 9


def mapped(path: Path) -> Tensor:
    """The images in a .safetensors file, mapped."""
    with safe_open(path, "pt") as f:
        images: Tensor = f.get_tensor("x")
    return images


def checked(path: Path) -> Tensor:
    """The same, once a checksum has been computed over the file."""
    checksum = 0
    with open(path, "rb") as f:
        while block := f.read(cache.READ):
            checksum = zlib.crc32(block, checksum)
    return mapped(path)


def main() -> None:
    """Print the median seconds of each, taken by turns."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    labels = draw.integers(0, 10, IMAGES)
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "a.u8"), Path(folder, "a.safetensors")
        decoding = cache.Decoding(tuple("0123456789"), labels[:50_000], labels[50_000:], iter([images]))
        cache.write(ours, decoding, "source", None, "writing")
        save_file({"x": torch.from_numpy(images), "y": torch.from_numpy(labels)}, theirs)
        ways: dict[str, Callable[[], object]] = {
            "rnas.data.cache": lambda: cache.read(ours, "name", "source"),
            "safetensors": lambda: mapped(theirs),
            "safetensors and CRC-32": lambda: checked(theirs),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    for name, taken in seconds.items():
        print(f"{name}: {1e3 * statistics.median(taken):.1f} ms for {IMAGES} images")


if __name__ == "__main__":
    main()
