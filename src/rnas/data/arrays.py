"""Data sets that are arrays already: scikit-learn's digits and `.npz` files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.data.dataset import Dataset, Split, stratified
from rnas.data.decoding import Size, sides
from rnas.errors import RnasError
from rnas.files import is_text, size_text

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
MIN_SIZE, MAX_SIZE = 4, 1024
"""Pixels to a side: less leaves nothing after two reductions, more is a photograph that nobody scaled down."""
MAX_BYTES = 32 << 30
"""An `.npz` may declare no more than this: a few bytes of zip can promise terabytes."""

FIXED_SPLIT = 0
"""The seed of every train/test split that is made here. It is no setting: were it to differ between training and
evaluation, a network would be tested on images that it was trained on."""


def digits(image_size: Size | None = None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998): 8x8 images in 17 grey levels, scaled
    bilinearly to 3x16x16 or `image_size`; 1,437 to train and 360, stratified and always the same, to test. Attacked
    at 16/255, for at 8/255 they are too easy."""
    from sklearn.datasets import load_digits  # a second of start-up that other data sets need not pay

    raw, target = load_digits(return_X_y=True)
    x = torch.from_numpy(raw).float().view(-1, 1, 8, 8) / 16 * 255
    x = F.interpolate(x, sides(image_size or 16), mode="bilinear", antialias=True)
    images = x.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(target).long()
    test = stratified(labels, 360, FIXED_SPLIT)
    split = Split(images, labels, flip=False)
    return Dataset("digits", split[~test], split[test], tuple("0123456789"), eps_default=16 / 255)


def npz(path: Path, image_size: Size | None = None) -> Dataset:
    """The data set in an `.npz` file: `x_train`, `x_test` uint8 (N,H,W,3), (N,3,H,W) or grey (N,H,W);
    `y_train`, `y_test` integers (N,) that number the classes from 0; optionally `classes`, their names.

    RnasError, naming the file and the array, if anything else is in it.
    """
    found = _read_npz(path)
    missing = [name for name in ARRAYS if name not in found]
    if missing:
        raise RnasError(
            f"{path} lacks {', '.join(missing)}: it holds {', '.join(found) or 'nothing'}; "
            f"expected the arrays {', '.join(ARRAYS)}"
        )
    splits = []
    for part in ("train", "test"):
        x, y = f"x_{part}", f"y_{part}"
        images = check_images(found[x], f"{path}, {x}", image_size)
        labels = _labels(found[y], f"{path}, {y}")
        if len(images) != len(labels):
            raise RnasError(f"{path}: {x} has {len(images)} images and {y} {len(labels)} labels: expected as many")
        splits.append(Split(images, labels))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [f"{h}x{w}" for h, w in (s.images.shape[2:] for s in splits)]
        raise RnasError(f"{path}: training images are {sizes[0]} and test images {sizes[1]}: give an image size")
    names = _class_names(found["classes"], path) if "classes" in found else None
    classes = check_labels(train.labels, test.labels, names, str(path))
    return Dataset(path.resolve().stem, train, test, classes)


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if path.exists() and not path.is_file():
        raise RnasError(f"{path} is no regular file: expected an .npz file")  # to open a pipe would wait for a writer
    try:
        with zipfile.ZipFile(path) as z:
            members = z.infolist()
        sizes = {member.filename: member.file_size for member in members}
        declared = sum(member.file_size for member in members)  # of those with the same name, too
        if declared > MAX_BYTES:
            raise RnasError(f"{path} declares {declared >> 30} GiB of arrays: expected {MAX_BYTES >> 30} GiB at most")
        with np.load(path, allow_pickle=False) as z:
            if not set(ARRAYS) <= set(z.files):
                return dict.fromkeys(z.files, np.empty(0))  # their names are all that is asked for
            found = {name: z[name] for name in ("y_train", "y_test", "classes") if name in z.files}
            for part in ("train", "test"):
                _check_declared(path, sizes[f"x_{part}.npy"], f"x_{part}", found[f"y_{part}"].size)
                found[f"x_{part}"] = z[f"x_{part}"]
            return found
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror or e}") from e
    except RnasError:
        raise
    except Exception as e:  # zipfile, zlib and numpy raise a dozen types on damaged files
        if path.suffix != ".npz":
            raise RnasError(f"{path} is a file, and no .npz: expected a folder of class folders or an .npz file") from e
        raise RnasError(f"{path} is damaged or no .npz file without pickled objects: {e}") from e


def _check_declared(path: Path, size: int, name: str, labels: int) -> None:
    """RnasError, before anything is allocated, if `size` bytes are more than so many images have."""
    if size > labels * 3 * MAX_SIZE**2 + (1 << 20):
        raise RnasError(
            f"{path}: {name} has {size_text(size)} for {labels} labels: expected as many images, of {MAX_SIZE} pixels "
            "a side at most"
        )


def check_images(x: np.ndarray[Any, Any], where: str, image_size: Size | None) -> Tensor:
    """`x` as uint8 (N,3,H,W), resized if `image_size` says so. RnasError, naming `where`, if it is no such thing."""
    if x.dtype != np.uint8:
        hint = "; multiply images in [0,1] by 255 and round" if x.dtype.kind == "f" else ""
        raise RnasError(f"{where} has type {x.dtype}: expected uint8, 0 to 255{hint}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise RnasError(f"{where} has shape {x.shape}: expected (N,H,W,3), (N,3,H,W) or (N,H,W)")
    if not len(x):
        raise RnasError(f"{where} holds no images")
    if image_size is None and not all(MIN_SIZE <= side <= MAX_SIZE for side in x.shape[2:]):
        height, width = x.shape[2:]
        raise RnasError(f"{where} has images of {height}x{width}: expected {MIN_SIZE} to {MAX_SIZE} pixels a side")
    images = torch.from_numpy(np.ascontiguousarray(x))
    images = images if image_size is None else resize(images, image_size)
    return images.expand(-1, 3, -1, -1).contiguous()


def resize(images: Tensor, size: Size) -> Tensor:
    """`images` uint8 (N,C,H,W), N > 0, of another size: bilinear, smoothed where it shrinks."""
    if images.shape[2:] == sides(size) or not images.shape[2] * images.shape[3]:
        return images
    parts = (F.interpolate(x.float(), sides(size), mode="bilinear", antialias=True) for x in torch.split(images, 1024))
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


def _labels(y: np.ndarray[Any, Any], where: str) -> Tensor:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise RnasError(f"{where} has type {y.dtype} and shape {y.shape}: expected integers of shape (N,)")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < 1 << 20:
        raise RnasError(f"{where} has labels from {y.min()} to {y.max()}: expected them to count from 0")
    return torch.from_numpy(y.astype(np.int64))


def _class_names(names: np.ndarray[Any, Any], path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U":
        raise RnasError(f"{path}, classes has type {names.dtype} and shape {names.shape}: expected a list of strings")
    if not all(str(name).strip() for name in names):
        raise RnasError(f"{path}: classes has an empty name")
    if not all(is_text(str(name)) for name in names):
        raise RnasError(f"{path}: classes has a name that is not UTF-8")
    return tuple(str(name) for name in names)


def check_labels(train: Tensor, test: Tensor, names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """The class names of labels that are 0..K-1, each with a training image. RnasError, naming `where`, otherwise."""
    counts = torch.bincount(train)
    absent = (counts == 0).nonzero()[:, 0].tolist()
    if absent:
        raise RnasError(
            f"{where}: no training image has label {absent[0]}, the largest label is {len(counts) - 1}: "
            f"expected labels 0 to K-1 without gaps"
        )
    if len(counts) < 2:
        raise RnasError(f"{where}: all training images have label 0: expected two classes or more")
    if int(test.max()) >= len(counts):
        raise RnasError(
            f"{where}: a test image has label {int(test.max())}: training labels are 0 to {len(counts) - 1}"
        )
    names = names if names is not None else tuple(map(str, range(len(counts))))
    if len(names) != len(counts) or len(set(names)) < len(names):
        raise RnasError(f"{where} names {len(set(names))} different classes: its labels are 0 to {len(counts) - 1}")
    return names
