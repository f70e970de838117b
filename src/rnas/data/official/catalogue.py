"""The published data sets, read from their official archives and layouts, without pickle.

CIFAR-10 and CIFAR-100: Krizhevsky 2009; SVHN: Netzer et al. 2011; Tiny-ImageNet-200: Stanford CS231n.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rnas.data.archives import remove_unpacked, unpack
from rnas.data.arrays import resize
from rnas.data.cache import Decoding, Progress, cached, fingerprint, size_name
from rnas.data.dataset import Dataset
from rnas.data.decoding import Size
from rnas.data.download import Remote, fetch
from rnas.data.images import decode_all
from rnas.errors import RnasError
from rnas.files import locked

MAX_FILE = 4 << 30
"""No file of these data sets has more bytes."""


CHUNK = 1000


Reader = Callable[[Path, Size | None], Decoding]


@dataclass(frozen=True)
class Official:
    """A published data set: where its files come from, how they lie on disk, and who reads them."""

    name: str
    remotes: tuple[Remote, ...]
    folder: str
    """The folder that the archive unpacks to, or that the files lie in, below the data root."""
    files: tuple[str, ...]
    """What must be in that folder."""
    read: Reader
    list_files: Callable[[Path], Iterable[str]]
    """Every file that the data set consists of, named from its folder."""
    counts: tuple[int, int]
    """Training and test images of the official set."""
    class_count: int
    image_size: int
    limit: int = 0
    """How many bytes the archive may unpack to; 0 for files that are no archives."""
    pickles: str | None = None
    """The folder that the Python form of the set unpacks to."""


def locate(official: Official, root: Path) -> Path | None:
    """The folder that holds the data set in its official layout: below `root`, or `root` itself; None if neither."""
    for folder in (root / official.folder, root):
        if all((folder / name).exists() for name in official.files):
            return folder
    return None


def obtain(
    official: Official, root: Path, mirror: str | None = None, progress: Progress | None = None
) -> tuple[Path, bool]:
    """The folder of the data set, and whether anything was done: what is missing below `root` is unpacked from an
    archive that lies there or is downloaded. `mirror`, or else $RNAS_MIRROR, replaces the official addresses. Two
    processes take turns. RnasError as `fetch` and `unpack`.
    """
    if (folder := locate(official, root)) is not None:
        return folder, False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{official.folder}.lock"):
            remove_unpacked(root, official.folder)
            if (folder := locate(official, root)) is None:
                _obtain(official, root, mirror or os.environ.get("RNAS_MIRROR") or None, progress)
                folder = locate(official, root)
    except OSError as e:
        raise RnasError(f"cannot write to {root}: {e.strerror or e}; choose another place with --data-root") from e
    if folder is None:
        raise RnasError(f"{root / official.folder} lacks {_missing(official, root)}: remove it and start again")
    return folder, True


def _missing(official: Official, root: Path) -> str:
    return ", ".join(name for name in official.files if not (root / official.folder / name).exists())


def _obtain(official: Official, root: Path, mirror: str | None, progress: Progress | None) -> None:
    home = root / official.folder
    if not home.exists() and any((root / name).exists() for name in official.files):
        home = root  # the folder itself was given as the root
    for remote in official.remotes:
        if not official.limit:
            if not (home / remote.file).exists():
                fetch(remote, home, mirror, progress)
            continue
        if os.path.lexists(root / official.folder):
            raise RnasError(
                f"{root / official.folder} lacks {_missing(official, root)}: put it there, or remove the folder, "
                "and the archive is unpacked anew"
            )
        ours = not (root / remote.file).exists()
        archive = fetch(remote, root, mirror, progress)
        unpack(archive, root, official.folder, official.limit, progress)
        if ours:
            archive.unlink()


def named(
    official: Official,
    root: Path,
    image_size: Size | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
    refuse_pickles: bool = True,
) -> tuple[Dataset, Path, bool]:
    """The data set below `root`, its folder, and whether it had to be downloaded or unpacked first.

    RnasError if only the Python form, pickles, is there and `refuse_pickles`; and as `obtain`.
    """
    if refuse_pickles and locate(official, root) is None and (pickles := _pickles(official, root)):
        raise _unpicklable(official, pickles, root)
    folder, new = obtain(official, root, mirror, progress)
    source = fingerprint(folder, official.list_files(folder), official.name, image_size)

    def parse() -> Decoding:
        return official.read(folder, image_size)

    return cached(official.name, size_name(image_size), folder, source, parse, progress), folder, new


def refuse_pickles_at(path: Path) -> None:
    """RnasError if `path`, given as a folder of images, is the Python form of a data set."""
    for official in SETS.values():
        if official.pickles is not None and path.name == official.pickles:
            raise _unpicklable(official, path, path.parent)


def _unpicklable(official: Official, pickles: Path, root: Path) -> RnasError:
    return RnasError(
        f"{pickles} holds {official.name} as Python pickles, which can run any code when they are read and so "
        f"never are here; get the binary form: rnas data {official.name} --data-root {root}, or put "
        f"{official.remotes[0].file} from {official.remotes[0].url} into {root}"
    )


def _pickles(official: Official, root: Path) -> Path | None:
    places = (root / official.pickles, root) if official.pickles else ()
    return next((p for p in places if p.name == official.pickles and p.is_dir()), None)


# --- CIFAR: records of one or two label bytes and 3x32x32 pixels, channel by channel


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
        names = tuple(line.strip() for line in _lines(folder / self.names))
        if len(names) != self.classes or len(set(names)) < len(names):
            raise RnasError(f"{folder / self.names} has {len(set(names))} different names: expected {self.classes}")
        train = np.concatenate([self._records(folder / file)[:, self.label_bytes - 1] for file in self.train])
        test = self._records(folder / self.test)[:, self.label_bytes - 1]
        chunks = (self._records(folder / file)[:, self.label_bytes :] for file in (*self.train, self.test))
        images = (chunk.reshape(-1, 3, 32, 32) for chunk in chunks)
        return Decoding(names, train.astype(np.int64), test.astype(np.int64), _resized(images, image_size))

    def _records(self, path: Path) -> NDArray[np.uint8]:
        record, content = self.label_bytes + 3 * 32 * 32, np.frombuffer(_content(path), np.uint8)
        if not len(content) or len(content) % record:
            raise RnasError(
                f"{path} has {len(content)} bytes, no multiple of {record}, the size of an image with its label: "
                "it is truncated or of another format"
            )
        records = content.reshape(-1, record)
        if (largest := int(records[:, self.label_bytes - 1].max())) >= self.classes:
            raise RnasError(f"{path} has a label {largest}: expected 0 to {self.classes - 1}")
        return records


# --- SVHN: MATLAB files with X (32,32,3,N) uint8 and y (N,1), where 10 stands for the digit 0


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
        return Decoding(tuple("0123456789"), train, test, _resized(images, image_size), flip=False)


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


# --- Tiny-ImageNet: train/WNID/images/*, val/images/* with val/val_annotations.txt


def _tiny_labelled(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], list[tuple[str, int]]]:
    """The classes, sorted, and the labelled files of both splits."""
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt"))
    label = {wnid: k for k, wnid in enumerate(wnids)}
    if (
        len(label) < 2
        or len(label) < len(wnids)
        or any(Path(wnid).name != wnid or not wnid.isprintable() for wnid in wnids)
    ):
        raise RnasError(f"{folder / 'wnids.txt'} is no list of two or more class folders, each named once")
    train = []
    for wnid, k in label.items():
        images = _names(folder / "train" / wnid / "images")
        if not images:
            raise RnasError(f"{folder / 'train' / wnid / 'images'} is empty: unpack the archive again")
        train += [(f"train/{wnid}/images/{name}", k) for name in images]
    return tuple(wnids), train, _tiny_annotations(folder, label)


def _tiny_annotations(folder: Path, label: Mapping[str, int]) -> list[tuple[str, int]]:
    annotations = folder / "val" / "val_annotations.txt"
    present, test = set(_names(folder / "val" / "images")), []
    for number, line in enumerate(_lines(annotations), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in label or name not in present:
            raise RnasError(
                f"{annotations}, line {number}: '{name[:80]}' is no file in val/images or '{wnid[:80]}' no class in "
                "wnids.txt; expected FILE, tab, CLASS, tab, box"
            )
        test.append((f"val/images/{name}", label[wnid]))
    if not test:
        raise RnasError(f"{annotations} is empty: unpack the archive again")
    return test


def _names(folder: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    except OSError as e:
        raise RnasError(f"cannot read {folder}: {e.strerror}") from e


def _tiny_files(folder: Path) -> list[str]:
    _, train, test = _tiny_labelled(folder)
    return ["wnids.txt", "val/val_annotations.txt", *(name for name, _ in train + test)]


def _tiny(folder: Path, image_size: Size | None) -> Decoding:
    classes, train, test = _tiny_labelled(folder)
    names = [name for name, _ in train + test]
    y_train, y_test = (np.array([k for _, k in part], np.int64) for part in (train, test))
    return Decoding(classes, y_train, y_test, decode_all(folder, names, image_size))


# --- common


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise RnasError(f"{path} has {path.stat().st_size} bytes: more than any official file")
        return path.read_bytes()
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror}") from e


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in _content(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise RnasError(f"{path} is no text: {e}") from e


def _resized(chunks: Iterator[NDArray[np.uint8]], size: Size | None) -> Iterator[NDArray[np.uint8]]:
    for chunk in chunks:
        yield chunk if size is None else resize(torch.from_numpy(np.ascontiguousarray(chunk)), size).numpy()


_CIFAR10 = Cifar(
    tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", "batches.meta.txt", label_bytes=1, classes=10
)


_CIFAR100 = Cifar(("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2, classes=100)


_SVHN, _SVHN_EXTRA = Svhn(("train_32x32.mat",)), Svhn(("train_32x32.mat", "extra_32x32.mat"))


_KRIZ, _HOUSES = "https://www.cs.toronto.edu/~kriz", "http://ufldl.stanford.edu/housenumbers"


_SVHN_TRAIN = Remote(f"{_HOUSES}/train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373")


_SVHN_MORE = Remote(f"{_HOUSES}/extra_32x32.mat", 1329278602, "a93ce644f1a588dc4d68dda5feec44a7")


_SVHN_TEST = Remote(f"{_HOUSES}/test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3")


SETS: dict[str, Official] = {
    official.name: official
    for official in (
        Official(
            name="cifar10",
            remotes=(Remote(f"{_KRIZ}/cifar-10-binary.tar.gz", 170052171, "c32a1d4ab5d03f1284b67883e8d87530"),),
            folder="cifar-10-batches-bin",
            files=_CIFAR10.files,
            read=_CIFAR10,
            list_files=_CIFAR10.list_files,
            counts=(50_000, 10_000),
            class_count=10,
            image_size=32,
            limit=256 << 20,
            pickles="cifar-10-batches-py",
        ),
        Official(
            name="cifar100",
            remotes=(Remote(f"{_KRIZ}/cifar-100-binary.tar.gz", 168513733, "03b5dce01913d631647c71ecec9e9cb8"),),
            folder="cifar-100-binary",
            files=_CIFAR100.files,
            read=_CIFAR100,
            list_files=_CIFAR100.list_files,
            counts=(50_000, 10_000),
            class_count=100,
            image_size=32,
            limit=256 << 20,
            pickles="cifar-100-python",
        ),
        Official(
            name="svhn",
            remotes=(_SVHN_TRAIN, _SVHN_TEST),
            folder="svhn",
            files=_SVHN.files,
            read=_SVHN,
            list_files=_SVHN.list_files,
            counts=(73_257, 26_032),
            class_count=10,
            image_size=32,
        ),
        Official(
            name="svhn-extra",
            remotes=(_SVHN_TRAIN, _SVHN_MORE, _SVHN_TEST),
            folder="svhn",
            files=_SVHN_EXTRA.files,
            read=_SVHN_EXTRA,
            list_files=_SVHN_EXTRA.list_files,
            counts=(73_257 + 531_131, 26_032),
            class_count=10,
            image_size=32,
        ),
        Official(
            name="tiny-imagenet",
            remotes=(
                Remote(
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de"
                ),
            ),
            folder="tiny-imagenet-200",
            files=("wnids.txt", "train", "val/val_annotations.txt", "val/images"),
            read=_tiny,
            list_files=_tiny_files,
            counts=(100_000, 10_000),
            class_count=200,
            image_size=64,
            limit=1 << 30,
        ),
    )
}
