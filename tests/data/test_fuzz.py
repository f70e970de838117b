"""Every parser of foreign bytes, fed with damaged ones: it answers, or it raises RnasError, and nothing else.

RNAS_FUZZ multiplies the number of examples, for longer hunts.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.data.test_official import (
    CONTENT,
    cifar10_files,
    cifar100_files,
    mat,
    svhn_file,
    tar,
    tiny_files,
    write,
    zipped,
)

import rnas.data
from rnas.data import archives, arrays, cache, images
from rnas.data.official import catalogue
from rnas.errors import RnasError

EXAMPLES = int(100 * float(os.environ.get("RNAS_FUZZ", "1")))

Seeds = dict[str, bytes]


def encoded(format: str, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, format, **options)
    return out.getvalue()


def npz(compressed: bool) -> bytes:
    x, out = np.zeros((4, 4, 4, 3), np.uint8), io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(
        out, x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4)
    )
    return out.getvalue()


def cache_file() -> bytes:
    labels = np.array([0, 1, 1, 0])
    decoding = cache.Decoding(("a", "b"), labels, labels[:2], iter([np.zeros((6, 3, 4, 4), np.uint8)]))
    with tempfile.TemporaryDirectory() as folder:
        cache.write(Path(folder, "c.u8"), decoding, "source", None, "decoding")
        return Path(folder, "c.u8").read_bytes()


def read_cifar(path: Path) -> None:
    files = cifar10_files() | {"cifar-10-batches-bin/data_batch_1.bin": path.read_bytes()}
    whole = catalogue.SETS["cifar10"].read(write(path.parent, files) / "cifar-10-batches-bin", None)
    assert sum(map(len, whole.chunks)) == whole.count


def read_names(path: Path) -> None:
    files = cifar100_files() | {"cifar-100-binary/fine_label_names.txt": path.read_bytes()}
    catalogue.SETS["cifar100"].read(write(path.parent, files) / "cifar-100-binary", None)


def read_svhn(path: Path) -> None:
    write(path.parent, {"train_32x32.mat": path.read_bytes(), "test_32x32.mat": svhn_file(2, 0)})
    whole = catalogue.SETS["svhn"].read(path.parent, None)
    assert sum(map(len, whole.chunks)) == whole.count


def tiny_with(file: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        files = tiny_files() | {f"tiny-imagenet-200/{file}": path.read_bytes()}
        catalogue.SETS["tiny-imagenet"].read(write(path.parent, files) / "tiny-imagenet-200", None)

    return read


def read_cache(path: Path) -> None:
    dataset = cache.read(path, "name")
    assert dataset is None or len(dataset.train) == 4


def decode_image(path: Path) -> None:
    (image,) = images.decode_all(path.parent, [path.name], 8)
    assert image.shape == (1, 3, 8, 8)


def unpack(path: Path) -> None:
    archives.unpack(path, path.parent, "top", 1 << 20)


SMALL = {"top/a": CONTENT[:300], "top/b/c": b"text"}
# name -> file name, valid files to damage, parser
PARSERS: dict[str, tuple[str, list[bytes], Callable[[Path], object]]] = {
    "npz": ("x.npz", [npz(False), npz(True)], arrays.npz),
    "cifar": ("x.bin", [cifar10_files()["cifar-10-batches-bin/data_batch_1.bin"][: 3073 * 2]], read_cifar),
    "class names": ("x.txt", [cifar100_files()["cifar-100-binary/fine_label_names.txt"]], read_names),
    "svhn": (
        "x.mat",
        [svhn_file(1, 0), mat(X=np.zeros((32, 32, 3, 1), np.uint8), y=np.ones((1, 1), np.uint8))],
        read_svhn,
    ),
    "tiny-imagenet classes": ("x.txt", [tiny_files()["tiny-imagenet-200/wnids.txt"]], tiny_with("wnids.txt")),
    "tiny-imagenet annotations": (
        "x.txt",
        [tiny_files()["tiny-imagenet-200/val/val_annotations.txt"]],
        tiny_with("val/val_annotations.txt"),
    ),
    "images": (
        "x.jpg",
        [
            encoded("JPEG"),
            encoded("JPEG", "L", progressive=True),
            encoded("PNG"),
            encoded("PNG", "P"),
            encoded("GIF"),
            encoded("TIFF"),
            encoded("TIFF", compression="tiff_lzw"),
            encoded("WEBP"),
            encoded("BMP"),
            encoded("PPM"),
            encoded("TGA"),
            encoded("ICO"),
            encoded("JPEG2000"),
        ],
        decode_image,
    ),
    "tar": ("x.tar.gz", [tar(SMALL)], unpack),
    "zip": ("x.zip", [zipped(SMALL)], unpack),
    "cache": ("x.u8", [cache_file()], read_cache),
}


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of `seeds` with bytes changed, inserted, cut out or cut off; now and then plain noise."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), 400)) | st.integers(0, len(content)))
        match draw(st.sampled_from(["change", "change", "change", "insert", "delete", "cut"])):
            case "change":
                content[at : at + 4] = draw(st.binary(min_size=1, max_size=4))
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=20))
            case "delete":
                del content[at : at + draw(st.integers(1, 20))]
            case "cut":
                del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_give_a_clear_error_or_none(name, data):
    file, seeds, parse = PARSERS[name]
    content = data.draw(damaged(seeds))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file)
        path.write_bytes(content)
        try:
            parse(path)
        except RnasError as e:
            assert str(e)  # noqa: PT017 - most examples raise, some do not


@pytest.mark.parametrize("name", PARSERS)
def test_the_undamaged_bytes_are_read(name, tmp_path):
    """Or else the fuzzing would test nothing."""
    file, seeds, parse = PARSERS[name]
    for k, content in enumerate(seeds):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / file).write_bytes(content)
        parse(folder / file)


@settings(max_examples=EXAMPLES, deadline=None)
@given(spec=st.text(max_size=30), fraction=st.none() | st.floats(), size=st.none() | st.integers(-5, 20))
def test_any_name_is_found_or_refused(spec, fraction, size):
    assume(not Path(spec).is_dir())
    try:
        rnas.data.load(spec if spec not in catalogue.SETS else "digits", test_fraction=fraction, image_size=size)
    except RnasError as e:
        assert str(e)  # noqa: PT017


def test_the_official_sets_say_where_they_come_from():
    """Every file has an address, a size and an MD5, and the limit on the unpacked size leaves room."""
    for entry in catalogue.SETS.values():
        for remote in entry.remotes:
            assert remote.url.startswith("http")
            assert len(bytes.fromhex(remote.md5)) == 16
            assert remote.size > 10**7
            assert not entry.limit or entry.limit > remote.size
        assert replace(entry) == entry
