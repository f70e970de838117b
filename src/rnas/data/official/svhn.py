"""SVHN (Netzer et al. 2011): MATLAB files with X (32,32,3,N) uint8 and y (N,1), where 10 stands for the digit 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnas.data.cache import Decoding
from rnas.data.decoding import Size
from rnas.data.official.reading import MAX_FILE, resized
from rnas.errors import RnasError

CHUNK = 1000


@dataclass(frozen=True)
class Svhn:
    """The reader of the cropped digits in `train` files and in test_32x32.mat."""

    train: tuple[str, ...]
    test: str = "test_32x32.mat"

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    def list_files(self, folder: Path) -> tuple[str, ...]:
        return self.files

    def __call__(self, folder: Path, image_size: Size | None) -> Decoding:
        train = np.concatenate([_svhn_labels(folder / file) for file in self.train])
        test = _svhn_labels(folder / self.test)
        images = (chunk for file in self.files for chunk in _svhn_images(folder / file))
        return Decoding(tuple("0123456789"), train, test, resized(images, image_size), flip=False)


def _svhn_labels(path: Path) -> NDArray[np.int64]:
    y = _mat(path, "y")
    n = _mat_shapes(path)["X"][-1]
    if y.size != n:
        raise RnasError(f"{path}: y has {y.size} labels for {n} images")
    if not (known := np.isin(y, np.arange(1, 11))).all():
        raise RnasError(f"{path}: y has a label {y[~known].flat[0]}: expected 1 to 10, where 10 is the digit 0")
    return y.reshape(-1).astype(np.int64) % 10


def _svhn_images(path: Path) -> Iterator[NDArray[np.uint8]]:
    x = _mat(path, "X")
    for start in range(0, x.shape[3], CHUNK):
        yield x[..., start : start + CHUNK].transpose(3, 2, 0, 1)


def _mat_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of X and y, read from the headers, before anything is allocated for them."""
    found = {name: (tuple(shape), kind) for name, shape, kind in _scipy("whosmat", path)}
    x, kind = found.get("X", ((), ""))
    y, _ = found.get("y", ((), ""))
    if x[:3] != (32, 32, 3) or len(x) != 4 or kind != "uint8" or y not in ((x[3], 1), (1, x[3])) or not x[3]:
        raise RnasError(f"{path} holds {found}: expected X (32,32,3,N) of type uint8 and y (N,1)")
    if x[3] * 3072 > MAX_FILE:
        raise RnasError(f"{path} declares {x[3]} images: more than any official file holds")
    return {"X": x, "y": y}


def _mat(path: Path, name: str) -> NDArray[Any]:
    expected = _mat_shapes(path)[name]
    value = _scipy("loadmat", path, variable_names=[name]).get(name)
    if not isinstance(value, np.ndarray) or value.shape != expected or value.dtype.kind not in "uif":
        raise RnasError(f"{path} is damaged: {name} is not what its header says")
    return value


def _scipy(function: str, path: Path, **options: Any) -> Any:
    import scipy.io

    try:
        return getattr(scipy.io, function)(str(path), appendmat=False, **options)
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:  # scipy raises a dozen types on damaged files
        raise RnasError(f"{path} is damaged or no MATLAB 5 file: {e}") from e
