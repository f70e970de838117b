"""CIFAR-10, CIFAR-100 (Krizhevsky 2009): records of one or two label bytes, then 3x32x32 pixels channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rnas.data.cache import Decoding
from rnas.data.decoding import Size
from rnas.data.official.reading import content, lines, resized
from rnas.errors import RnasError


@dataclass(frozen=True)
class Cifar:
    """The reader of one of the two binary layouts: `label_bytes` of which the last is the (fine) label."""

    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    classes: int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)

    def list_files(self, folder: Path) -> tuple[str, ...]:
        return self.files

    def __call__(self, folder: Path, image_size: Size | None) -> Decoding:
        names = tuple(line.strip() for line in lines(folder / self.names))
        if len(names) != self.classes or len(set(names)) < len(names):
            raise RnasError(f"{folder / self.names} has {len(set(names))} different names: expected {self.classes}")
        train = np.concatenate([self._records(folder / file)[:, self.label_bytes - 1] for file in self.train])
        test = self._records(folder / self.test)[:, self.label_bytes - 1]
        chunks = (self._records(folder / file)[:, self.label_bytes :] for file in (*self.train, self.test))
        images = (chunk.reshape(-1, 3, 32, 32) for chunk in chunks)
        return Decoding(names, train.astype(np.int64), test.astype(np.int64), resized(images, image_size))

    def _records(self, path: Path) -> NDArray[np.uint8]:
        record, held = self.label_bytes + 3 * 32 * 32, np.frombuffer(content(path), np.uint8)
        if not len(held) or len(held) % record:
            raise RnasError(
                f"{path} has {len(held)} bytes, not a multiple of {record}, the size of an image with its label: "
                "it is truncated or of another format"
            )
        records = held.reshape(-1, record)
        if (largest := int(records[:, self.label_bytes - 1].max())) >= self.classes:
            raise RnasError(f"{path} has a label {largest}: expected 0 to {self.classes - 1}")
        return records
