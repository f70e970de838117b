"""Decoded data sets as one memory-mapped file: the second start reads no image."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnas.data.dataset import Dataset, Split
from rnas.data.decoding import Size
from rnas.errors import RnasError
from rnas.files import NO_ROOM, RANDOM, locked, remove_leftovers, replacing, size_text

MAGIC = b"rnas-u8\2"
"""The last eight bytes of a cache file, a version number at their end."""
MAX_TRAILER = 64 << 20
READ = 16 << 20
SUM = 4
"""Bytes of the checksum, CRC-32, of all that is before it."""
END = 8 + SUM + len(MAGIC)
"""Bytes behind the trailer: its length, the checksum and MAGIC."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Decoding:
    """A data set about to be decoded: its labels and, in the same order, training images first, its images."""

    classes: tuple[str, ...]
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    chunks: Iterator[NDArray[np.uint8]]
    """Arrays (n,3,H,W) of as many images as there are labels."""
    flip: bool = True

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.train_labels) + len(self.test_labels)


def fingerprint(root: Path, files: Iterable[str], *settings: object) -> str:
    """A digest of the names, sizes and times of `files` below `root`, and of `settings`: when each was last written,
    which anyone can set, and when it last changed in any way, which nobody can."""
    digest = blake2b(repr(settings).encode(), digest_size=16)
    try:
        for name in files:
            state = os.stat(os.path.join(root, name))  # pathlib takes seconds for a hundred thousand files
            facts = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n"
            digest.update(facts.encode(errors="surrogateescape"))
    except OSError as e:
        raise RnasError(f"cannot read {e.filename}: {e.strerror}") from e
    return digest.hexdigest()


def cache_root() -> Path:
    """The folder for what can be made again: $RNAS_DATA, else ~/.cache/rnas."""
    return Path(os.path.expanduser(os.environ.get("RNAS_DATA") or "~/.cache/rnas"))


def size_name(size: Size | None) -> str:
    """How a cache's variant names the size that images were scaled to."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size or "native")


def cached(
    name: str,
    variant: str,
    beside: Path,
    source: str,
    parse: Callable[[], Decoding],
    progress: Progress | None = None,
) -> Dataset:
    """The data set that `parse` decodes, from its cache if that was made from the same `source` (a fingerprint).

    The cache is `.rnas/NAME-VARIANT.u8` in the folder `beside` or, if that cannot be written, in the cache root; a
    damaged or outdated one is made again. Where neither can be written the images stay in memory; where neither has
    room, RnasError.
    """
    places = _places(beside, f"{name[:40]}-{variant}.u8")  # a file name has 255 bytes at most
    for path in places:
        if (dataset := read(path, name, source)) is not None:
            return dataset
    full: _DiskFullError | None = None
    for path in places:
        if _writable(path.parent):
            try:
                return _made(path, name, source, parse, progress)
            except _DiskFullError as e:
                full = full or e
    if full is not None:
        raise full
    return _in_memory(name, parse())


class _DiskFullError(RnasError):
    """There may be room elsewhere."""


def _made(path: Path, name: str, source: str, parse: Callable[[], Decoding], progress: Progress | None) -> Dataset:
    """The data set in the cache file `path`, once it is made, by this process or by another one that was faster."""
    try:
        with locked(path.with_name(".lock")):
            if (dataset := read(path, name, source)) is None:
                remove_leftovers(path.parent, rf"\..+\.u8\.{RANDOM}\.tmp")
                write(path, parse(), source, progress, f"decoding {name}")
                if (dataset := read(path, name, source)) is None:
                    raise RnasError(f"{path} changed while it was being written: start again")
            return dataset
    except OSError as e:
        raise RnasError(f"cannot write {path}: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # it is empty where decoding failed, and there only


def _places(beside: Path, file: str) -> tuple[Path, Path]:
    where = blake2b(str(beside.resolve()).encode(errors="replace"), digest_size=8).hexdigest()
    return beside / ".rnas" / file, cache_root() / "decoded" / where / file


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def write(path: Path, decoding: Decoding, source: str, progress: Progress | None, label: str) -> None:
    """Decode into the cache file `path`: images, int64 labels, a JSON trailer, its length (8 bytes), CRC-32 (4), MAGIC.

    The images are written in sequence and not through a map, so that a full disk is an error and not a crash.
    RnasError if the disk is full.
    """
    shape: tuple[int, ...] | None = None
    done = checksum = 0
    labels = np.concatenate([decoding.train_labels, decoding.test_labels]).astype("<i8").tobytes()
    try:
        with replacing(path) as temporary, open(temporary, "wb") as out:
            for chunk in decoding.chunks:
                shape = chunk.shape[1:]
                content = np.ascontiguousarray(chunk).data
                checksum = zlib.crc32(content, checksum)
                out.write(content)
                done += len(chunk)
                if progress:
                    progress(label, done, decoding.count)
            if shape is None or done != decoding.count:
                raise RnasError(f"{label}: found {done} images and {decoding.count} labels")
            trailer = json.dumps(
                {
                    "source": source,
                    "classes": decoding.classes,
                    "train": len(decoding.train_labels),
                    "test": len(decoding.test_labels),
                    "shape": shape,
                    "flip": decoding.flip,
                }
            ).encode()
            rest = labels + trailer + len(trailer).to_bytes(8, "little")
            out.write(rest + zlib.crc32(rest, checksum).to_bytes(SUM, "little") + MAGIC)
    except OSError as e:
        needed = size_text(_bytes(decoding, shape))
        kind = _DiskFullError if e.errno in NO_ROOM else RnasError
        raise kind(f"cannot write {path}: {e.strerror}; {label} takes about {needed} there; make room") from e


def _bytes(decoding: Decoding, shape: tuple[int, ...] | None) -> int:
    return decoding.count * math.prod(shape or (3, 32, 32))


def read(path: Path, name: str, source: str | None = None) -> Dataset | None:
    """The data set in the cache file `path`, mapped into memory and not copied.

    None if there is no such file or it cannot be read, if it is damaged, or made from another source than `source`.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            trailer = _trailer(f, size)
            if trailer is None or (source is not None and trailer["source"] != source) or not _intact(f, size):
                return None
            n, m, shape = trailer["train"], trailer["test"], trailer["shape"]
            images = (n + m) * math.prod(shape)
            f.seek(images)
            y = torch.from_numpy(np.frombuffer(f.read(8 * (n + m)), "<i8").astype(np.int64))
    except OSError:
        return None
    x = _map(path, images).view(n + m, *shape)
    flip = trailer["flip"]
    return Dataset(name, Split(x[:n], y[:n], flip), Split(x[n:], y[n:], flip), tuple(trailer["classes"]))


def _trailer(f: Any, size: int) -> dict[str, Any] | None:
    """The trailer if it fits the file's `size`; whether it is undamaged only the checksum tells."""
    if size < END:
        return None
    f.seek(size - END)
    length = int.from_bytes(f.read(8), "little")
    if f.read(END - 8)[SUM:] != MAGIC or not 0 < length <= min(MAX_TRAILER, size - END):
        return None
    f.seek(size - END - length)
    try:
        trailer: dict[str, Any] = json.loads(f.read(length))
        train, test, shape = trailer["train"], trailer["test"], trailer["shape"]
        whole = (train + test) * (math.prod(shape) + 8) + length + END == size
        known = trailer.keys() >= {"source", "classes", "flip"}
        return trailer if whole and known and train >= 0 and test > 0 and len(shape) == 3 else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _intact(f: Any, size: int) -> bool:
    f.seek(0)
    checksum, left = 0, size - SUM - len(MAGIC)
    while left > 0 and (block := f.read(min(READ, left))):
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    return bool(f.read(SUM) == checksum.to_bytes(SUM, "little"))


def _map(path: Path, size: int) -> Tensor:
    # Private mapping: the file may be read-only, and nothing that is written to the tensor reaches it.
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _in_memory(name: str, decoding: Decoding) -> Dataset:
    x = torch.from_numpy(np.concatenate(list(decoding.chunks)))
    n, flip = len(decoding.train_labels), decoding.flip
    train = Split(x[:n], torch.from_numpy(decoding.train_labels), flip)
    test = Split(x[n:], torch.from_numpy(decoding.test_labels), flip)
    return Dataset(name, train, test, decoding.classes)
