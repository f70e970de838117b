"""Digits, `.npz` files and folders of anyone's own images: what comes out, and what each kind of bad input says."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import rnas.data
from rnas.data import cache, images
from rnas.data.decoding import decode
from rnas.data.folders import _set_apart
from rnas.errors import RnasError

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RNAS_DATA", str(tmp_path / "cache-root"))


def test_digits_are_the_same_every_time_whatever_the_seed():
    """A test image must never be a training image of another run, so the seed does not move the split."""
    first, second = rnas.data.load("digits"), rnas.data.load("digits", seed=1)
    assert first.train.images.shape == (1437, 3, 16, 16)
    assert first.test.images.shape == (360, 3, 16, 16)
    assert first.train.images.dtype == torch.uint8
    assert torch.equal(first.test.images, second.test.images)
    assert first.classes == tuple("0123456789")
    assert not first.flip
    assert first.eps_default == 16 / 255
    counts, all_counts = torch.bincount(first.test.labels), torch.bincount(first.train.labels)
    assert torch.all((counts - (counts + all_counts) * 360 / 1797).abs() < 1)  # stratified
    assert first.train.images.min() == 0
    assert first.train.images.max() == 255
    assert rnas.data.load("digits", image_size=8).image_size == (8, 8)


def test_statistics_are_those_of_numpy():
    train = rnas.data.load("digits").train
    dataset = rnas.data.Dataset("x", train, train, tuple("0123456789"))
    x = train.images.numpy() / 255
    mean, std = dataset.statistics()
    assert mean == pytest.approx(x.mean((0, 2, 3)), abs=1e-6)
    assert std == pytest.approx(x.std((0, 2, 3)), abs=1e-6)
    black = rnas.data.Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    assert rnas.data.Dataset("x", black, black, ("a", "b")).statistics()[1] == (1 / 255,) * 3


def arrays(n: int = 12, classes: int = 3, shape: tuple[int, ...] = (8, 8, 3)) -> Arrays:
    """A small valid data set."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *shape), np.uint8)
    y = np.arange(n) % classes
    return {"x_train": x, "y_train": y, "x_test": x[: n // 2], "y_test": y[: n // 2]}


def save(path: Path, content: Arrays) -> Path:
    np.savez(path, **content)
    return path


@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 8, 8), (8, 8), (1, 8, 8), (8, 8, 1)])
def test_npz_layouts(tmp_path, shape):
    content = arrays(shape=shape)
    dataset = rnas.data.load(str(save(tmp_path / "mine.npz", content)))
    x = content["x_train"]
    expected = {(8, 8, 3): x.transpose(0, 3, 1, 2) if x.ndim == 4 else None}.get(
        shape, np.broadcast_to(x.reshape(12, -1, 8, 8), (12, 3, 8, 8))
    )
    assert np.array_equal(dataset.train.images, expected)
    assert dataset.train.labels.tolist() == content["y_train"].tolist()
    assert dataset.name == "mine"
    assert dataset.classes == ("0", "1", "2")
    assert dataset.eps_default == 8 / 255


def test_npz_may_name_its_classes_and_be_resized(tmp_path):
    path = save(tmp_path / "mine.npz", arrays() | {"classes": np.array(["ant", "bee", "cat"])})
    dataset = rnas.data.load(path, image_size=12)
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.image_size == (12, 12)


def without(name: str) -> Arrays:
    return {k: v for k, v in arrays().items() if k != name}


BAD_ARRAYS: dict[str, tuple[Arrays, str]] = {
    "no test images": (without("x_test"), "lacks x_test"),
    "no labels": (without("y_train"), "lacks y_train"),
    "floats": (arrays() | {"x_train": np.zeros((12, 8, 8, 3), np.float32)}, "float32: expected uint8"),
    "two axes": (arrays() | {"x_train": np.zeros((12, 8), np.uint8)}, r"shape \(12, 8\): expected \(N,H,W,3\)"),
    "two channels": (arrays() | {"x_train": np.zeros((12, 8, 8, 2), np.uint8)}, "shape"),
    "no images": (arrays() | {"x_test": np.zeros((0, 8, 8, 3), np.uint8)}, "x_test holds no images"),
    "tiny images": (arrays(shape=(2, 2, 3)), "2x2: expected 4"),
    "fewer labels": (arrays() | {"y_train": np.arange(5)}, "12 images and y_train 5 labels"),
    "float labels": (arrays() | {"y_train": np.zeros(12)}, "expected integers"),
    "labels of two axes": (arrays() | {"y_train": np.zeros((12, 2), int)}, "expected integers"),
    "negative labels": (arrays() | {"y_train": np.arange(12) - 1}, "from -1 to 10"),
    "labels from 1": (arrays() | {"y_train": np.arange(12) % 3 + 1}, "no training image has label 0"),
    "a gap": (arrays() | {"y_train": np.arange(12) % 3 * 2}, "no training image has label 1"),
    "one class": (arrays(classes=1), "two classes"),
    "a new label in the test": (arrays() | {"y_test": np.full(6, 3)}, "test image has label 3"),
    "other sizes": (arrays() | {"x_test": np.zeros((6, 9, 9, 3), np.uint8)}, "8x8 and test images 9x9"),
    "too few names": (arrays() | {"classes": np.array(["a", "b"])}, "names 2 different classes"),
    "numbers as names": (arrays() | {"classes": np.arange(3)}, "expected a list of strings"),
    "an empty name": (arrays() | {"classes": np.array(["a", " ", "c"])}, "classes has an empty name"),
    "a name that is no text": (arrays() | {"classes": np.array(["a", "\udce9", "c"])}, "name that is not UTF-8"),
    "pickled labels": (arrays() | {"y_train": np.array([{}] * 12, object)}, "pickled"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_npz(tmp_path, case):
    content, message = BAD_ARRAYS[case]
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **content)
    with pytest.raises(RnasError, match=message) as e:
        rnas.data.load(path)
    assert "bad.npz" in str(e.value)


def test_damaged_or_missing_npz(tmp_path):
    path = save(tmp_path / "a.npz", arrays(200))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip at all"):
        path.write_bytes(damaged)
        with pytest.raises(RnasError, match="damaged"):
            rnas.data.load(path)
    with pytest.raises(RnasError, match="No such file"):
        rnas.data.load(tmp_path / "missing.npz")


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (16, 16), color: object = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fills: dict[str, object] = {"RGB": (10, 20, 30), "L": 40, "RGBA": (0, 0, 0, 0), "I;16": 40 << 8, "1": 1, "P": 3}
    Image.new(mode, size, fills.get(mode, 0) if color is None else color).save(path, **options)
    return path


def palette(path: Path) -> Path:
    """A picture of the second of three colors, which is transparent."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([9, 9, 9, 50, 60, 70, 8, 8, 8])
    image.save(path, transparency=1)
    return path


def folder(root: Path, n: int = 3) -> Path:
    """Two classes of plain images, whose grey level tells which is which."""
    for part in ("train", "test"):
        for k, name in enumerate(("ant", "bee")):
            for i in range(n):
                picture(root / part / name / f"{i}.png", color=(k * 100 + i,) * 3)
    return root


def test_folder(tmp_path):
    dataset = rnas.data.load(folder(tmp_path / "pets"))
    assert dataset.name == "pets"
    assert dataset.classes == ("ant", "bee")
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.images[:, 1, 5, 7].tolist() == [0, 1, 2, 100, 101, 102]
    assert dataset.train.images.shape == (6, 3, 16, 16)


def test_folder_takes_any_format_mode_and_size(tmp_path):
    root = folder(tmp_path / "pets")
    cases = {
        picture(root / "train/ant/a.jpg", "L", (40, 20), quality=95): [40, 40, 40],
        picture(root / "train/ant/deeper/b.png", "RGBA"): [255, 255, 255],  # transparent: white
        picture(root / "train/ant/c.PNG", "I;16"): [40, 40, 40],
        picture(root / "train/ant/d.webp", lossless=True): [10, 20, 30],
        picture(root / "train/ant/e.tiff", "1"): [255, 255, 255],
        picture(root / "train/ant/f.bmp"): [10, 20, 30],
        picture(root / "train/ant/g.gif", "L"): [40, 40, 40],
        palette(root / "train/ant/h.png"): [255, 255, 255],
        picture(root / "train/ant/i.ppm", size=(8, 300)): [10, 20, 30],
    }
    picture(root / "train/ant/.hidden.png")
    (root / "train/ant/Thumbs.db").write_bytes(b"left by a file manager")
    dataset = rnas.data.load(root, image_size=12)
    assert len(dataset.train) == 6 + len(cases)
    names = sorted(str(p) for p in [*cases, *(root / "train/ant").glob("[0-9].png")])
    for path, expected in cases.items():
        image = dataset.train.images[names.index(str(path))]
        assert image.shape == (3, 12, 12)
        assert image[:, 6, 6].tolist() == expected, path.name


def test_a_photograph_is_turned_upright_and_cut_to_its_middle(tmp_path):
    """Red, green and blue bars; the EXIF tag says that the camera was held on its side."""
    bars = Image.new("RGB", (30, 10))
    for k, color in enumerate(("red", "lime", "blue")):
        bars.paste(color, (10 * k, 0, 10 * k + 10, 10))
    root = folder(tmp_path / "pets", n=2)
    turned, exif = bars.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # show it turned by 90 degrees clockwise
    turned.save(root / "train/ant/turned.png", exif=exif)
    image = rnas.data.load(root, image_size=10).train.images[2]
    assert image[:, 5, 5].tolist() == [0, 255, 0]
    assert image[:, 0, 0].tolist() == [0, 255, 0]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of `entries`: tag, type, count, value."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
MALFORMED_EXIF = {
    "a resolution that is text": (exif(TURNED, (0x011A, 2, 4, b"72\0\0")), True),
    "a width that is a float": (exif(TURNED, (0x0100, 11, 1, struct.pack("<f", 16.0))), True),
    "an orientation that is text": (exif((0x0112, 2, 4, b"up\0\0")), False),
    "an orientation that there is not": (exif((0x0112, 3, 1, struct.pack("<HH", 9, 0))), False),
    "no header": (b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", False),
    "a header and nothing else": (b"Exif\0\0II*\0", False),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("case", MALFORMED_EXIF)
def test_malformed_exif_costs_the_note_and_not_the_image(tmp_path, case, suffix):
    """It is turned upright where the orientation can be read, and otherwise taken as it is."""
    block, upright = MALFORMED_EXIF[case]
    Image.new("RGB", (6, 9), "red").save(tmp_path / f"x.{suffix}", exif=block)
    assert decode(tmp_path / f"x.{suffix}").shape == ((6, 9, 3) if upright else (9, 6, 3))


def test_every_orientation_is_set_upright(tmp_path):
    """As Pillow does it, which fails where other tags of the block are malformed."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 3), np.uint8)
    for orientation in range(1, 9):
        note = Image.Exif()
        note[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(pixels).save(path, exif=note)
        with Image.open(path) as image:
            assert np.array_equal(decode(path), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", ".thumbnails"])
def test_what_systems_put_among_images_is_neither_class_nor_image(tmp_path, name):
    """Network storage and archives leave such folders everywhere, with thumbnails and notes that are no images."""
    root = folder(tmp_path / "pets", n=2)
    expected = len(rnas.data.load(root).train)
    for place in (root, root / "train", root / "test", root / "train/ant"):
        (place / name).mkdir()
        Image.new("RGB", (3, 3)).save(place / name / "thumbnail.png")
        (place / name / "note").write_text("no image")
    dataset = rnas.data.load(root)
    assert (len(dataset.train), dataset.classes) == (expected, ("ant", "bee"))


def test_images_are_scaled_to_height_and_width(tmp_path):
    """What a network that was trained on oblong images is tested on."""
    root = folder(tmp_path / "pets", n=2)
    np.savez(tmp_path / "a.npz", **arrays())
    for spec in (root, tmp_path / "a.npz", "digits"):
        dataset = rnas.data.load(spec, image_size=(6, 10))
        assert dataset.image_size == (6, 10)
        assert dataset.test.images.shape[2:] == (6, 10)
    with pytest.raises(RnasError):
        rnas.data.load("digits", image_size=(2, 10))


def test_one_level_of_class_folders(tmp_path):
    root = folder(tmp_path / "pets", n=10) / "train"
    dataset = rnas.data.load(root, test_fraction=0.3)
    counts = torch.bincount(dataset.test.labels)
    assert (torch.bincount(dataset.train.labels) + counts).tolist() == [10, 10]
    assert all(0 < count < 10 for count in counts)
    again = rnas.data.load(root, test_fraction=0.3, seed=5)
    assert torch.equal(again.test.images, dataset.test.images)
    levels = torch.cat([dataset.train.images, dataset.test.images])[:, 0, 0, 0]
    assert sorted(levels.tolist()) == sorted([*range(10), *range(100, 110)])
    with pytest.raises(RnasError, match="--test-fraction"):
        rnas.data.load(root)
    with pytest.raises(RnasError, match="leave out the test fraction"):
        rnas.data.load(tmp_path / "pets", test_fraction=0.3)
    for wrong in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(RnasError, match="test fraction"):
            rnas.data.load(root, test_fraction=wrong)
    few = rnas.data.load(root, test_fraction=0.01)
    assert torch.bincount(few.test.labels).tolist() == [1, 1], "every class is tested"
    for name in range(1, 10):
        (root / f"bee/{name}.png").unlink()
    with pytest.raises(RnasError, match=r"0\.png is the only image of its class"):
        rnas.data.load(root, test_fraction=0.3)


def test_a_fraction_is_for_folders_that_are_there(tmp_path):
    with pytest.raises(RnasError, match=r"there is no .*petz"):
        rnas.data.load(tmp_path / "petz", test_fraction=0.2)
    with pytest.raises(RnasError, match=r"is a file, and no \.npz"):
        rnas.data.load(picture(tmp_path / "one.png"), test_fraction=0.2)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "Val")])
def test_train_and_test_are_known_in_any_case(tmp_path, names):
    root = folder(tmp_path / "pets")
    for old, new in zip(("train", "test"), names, strict=True):
        os.rename(root / old, root / new)
    assert rnas.data.load(root).classes == ("ant", "bee")
    assert len(rnas.data.load(root).test) == 6


def test_images_to_test_on_need_no_others(tmp_path):
    root = folder(tmp_path / "pets", n=10)
    whole = rnas.data.load(root)
    assert len(rnas.data.load(root, to_test=True, test_fraction=0.3).train) == 20, "it is split already"
    apart = rnas.data.load(root / "train", test_fraction=0.3)
    again = rnas.data.load(root / "train", test_fraction=0.3, to_test=True)
    assert torch.equal(apart.test.images, again.test.images), "the same are set apart as for the training"
    every = rnas.data.load(root / "train", to_test=True)
    assert (len(every.train), len(every.test)) == (0, 20)
    assert torch.equal(every.test.images, whole.train.images)
    os.rename(root / "train", tmp_path / "elsewhere")
    for _ in range(2):  # decoded, and from the cache
        alone = rnas.data.load(root, to_test=True)
        assert torch.equal(alone.test.images, whole.test.images)
        assert alone.image_size == (16, 16)
    os.rename(root / "test", root / "train")
    with pytest.raises(RnasError, match=r"none named test: give it test/CLASS/\*$"):
        rnas.data.load(root, to_test=True)


def test_what_is_written_among_the_images_would_pass_for_images(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    monkeypatch.chdir(root)
    rnas.data.check_apart(".", Path("runs/demo"))
    rnas.data.check_apart("digits", Path("runs/demo"))
    for data, out in ((".", "train/run"), ("train", "train/run"), ("train", "train"), (".", "test/ant")):
        with pytest.raises(RnasError, match="among the class folders"):
            rnas.data.check_apart(data, Path(out))


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=24, max_size=60, unique=True),
    first=st.integers(20, 24),
    fraction=st.floats(0.05, 0.6),
)
def test_no_training_image_becomes_a_test_image_as_others_come(names: list[str], first: int, fraction: float) -> None:
    """Or a network would be tested on what it was trained on, once its user has added images."""
    before, after = (_set_apart([(name, 0) for name in part], fraction, Path()) for part in (names[:first], names))
    assert not set(before[0]) & set(after[1])
    train, test = after
    assert sorted(train + test) == sorted((name, 0) for name in names)


def test_about_that_fraction_is_set_apart() -> None:
    files = [(f"{label}/{n}.png", label) for label in range(4) for n in range(1000)]
    _, test = _set_apart(files, 0.2, Path())
    for label in range(4):
        assert 160 < sum(k == label for _, k in test) < 240


def test_sixteen_bits_of_a_pgm_become_eight(tmp_path):
    root = folder(tmp_path / "pets", n=1)
    for name, most in (("a", 65535), ("b", 1000)):
        pixels = np.full(256, most // 2, ">u2").tobytes()
        (root / f"train/ant/{name}.pgm").write_bytes(f"P5 16 16 {most}\n".encode() + pixels)
    assert rnas.data.load(root).train.images[1:3, 1, 3, 3].tolist() == [127, 128]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = folder(tmp_path / "pets", n=2)
    elsewhere = folder(tmp_path / "others", n=3)
    (root / "train/ant/more").symlink_to(elsewhere / "train/ant")
    (root / "train/ant/circle").symlink_to(root / "train/ant")
    assert torch.bincount(rnas.data.load(root).train.labels).tolist() == [5, 2]


def test_images_beside_the_class_folders_are_named(tmp_path):
    root = folder(tmp_path / "pets", n=2)
    picture(root / "train/lost.PNG")
    (root / "train/notes.txt").write_text("not an image")
    with pytest.raises(RnasError, match=r"train holds lost\.PNG beside its class folders"):
        rnas.data.load(root)
    os.rename(root / "train/lost.PNG", root / "train/lost.jfif")
    with pytest.raises(RnasError, match=r"train holds lost\.jfif beside its class folders"):
        rnas.data.load(root)


def test_a_class_name_that_is_no_text_is_refused_at_the_start(tmp_path):
    root = folder(tmp_path / "pets", n=2)
    for part in ("train", "test"):
        os.rename(os.fsencode(root / part / "bee"), os.fsencode(root / part) + b"/b\xe9e")
    with pytest.raises(RnasError, match="not UTF-8: rename it"):
        rnas.data.load(root)


def test_mixed_sizes_need_an_image_size(tmp_path):
    root = folder(tmp_path / "pets")
    picture(root / "train/bee/large.png", size=(20, 16))
    with pytest.raises(RnasError, match=r"0\.png has 16x16 pixels, .*large\.png 20x16; choose one with --image-size"):
        rnas.data.load(root)
    assert rnas.data.load(root, image_size=8).image_size == (8, 8)


def test_photographs_need_an_image_size(tmp_path):
    root = tmp_path / "pets"
    for part in ("train/a", "train/b", "test/a", "test/b"):
        picture(root / part / "0.png", size=(1200, 900))
    with pytest.raises(RnasError, match="1200x900 pixels: expected 4 to 1024"):
        rnas.data.load(root)


def test_every_unreadable_file_is_named(tmp_path):
    root = folder(tmp_path / "pets")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(root / "train/ant/cut.jpg")
    (root / "train/ant/cut.jpg").write_bytes((root / "train/ant/cut.jpg").read_bytes()[:-100])
    (root / "test/bee/note.txt").write_text("not an image")
    (root / "test/bee/empty.png").touch()
    Image.new("F", (16, 16)).save(root / "test/bee/float.tiff")
    with pytest.raises(RnasError, match="4 of 16 images") as e:
        rnas.data.load(root)
    for name in ("train/ant/cut.jpg (image file is truncated", "note.txt (no image", "empty.png (", "float.tiff ("):
        assert name in str(e.value)
    assert not list(root.rglob("*.u8")), "nothing is written"


def test_pipes_sockets_and_devices_are_named_and_not_opened(tmp_path):
    """To open a pipe waits for ever, and /dev/zero never ends."""
    root = folder(tmp_path / "pets")
    os.mkfifo(root / "train/ant/pipe.png")
    os.symlink("/dev/zero", root / "train/bee/device.png")
    with socket.socket(socket.AF_UNIX) as s, contextlib.chdir(root / "test/bee"):
        s.bind("socket.png")
    with pytest.raises(RnasError, match="3 of 15 images") as e:
        rnas.data.load(root)
    for name in ("train/ant/pipe.png", "train/bee/device.png", "test/bee/socket.png"):
        assert f"{name} (no regular file)" in str(e.value)
    assert not (root / ".rnas").exists(), "no empty folder is left in the user's"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_an_npz_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(RnasError, match="no regular file"):
        rnas.data.load(tmp_path / "x.npz")


def test_a_decompression_bomb_is_refused(tmp_path):
    root = folder(tmp_path / "pets")
    Image.new("1", (30_000, 30_000)).save(root / "train/ant/bomb.png")  # 110 KB, 2.7 GB as RGB
    with pytest.raises(RnasError, match=r"bomb\.png"):
        rnas.data.load(root, image_size=8)


def test_postscript_is_not_handed_to_another_program(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "train/ant/a.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(RnasError, match=r"a\.eps \(no image"):
        rnas.data.load(root)


def break_folder(root: Path, case: str) -> Path:
    match case:
        case "empty class":
            (root / "train/cat").mkdir()
        case "no test":
            os.rename(root / "test", root / "tested")
        case "class only in training":
            picture(root / "train/cat/0.png")
        case "class only in the test":
            picture(root / "test/cat/0.png")
        case "one class":
            for part in ("train", "test"):
                os.rename(root / part / "bee", root / f"{part}-bee")
        case "no folders":
            root = root / "train/ant"
        case "nothing":
            root = root / "missing"
    return root


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty class", "train/cat is empty"),
        ("no test", "none named test: give it test/CLASS.*--test-fraction"),
        ("class only in training", "train has the class cat, which test lacks"),
        ("class only in the test", "test has the class cat, which train lacks"),
        ("one class", "train holds 1 class folder: expected two"),
        ("no folders", "holds no folders: expected train/CLASS"),
        ("nothing", "there is no .*missing"),
    ],
)
def test_bad_folder(tmp_path, case, message):
    with pytest.raises(RnasError, match=message):
        rnas.data.load(break_folder(folder(tmp_path / "pets"), case))


def test_bad_names_and_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RnasError, match="did you mean cifar100"):
        rnas.data.load("cifar-100")
    with pytest.raises(RnasError, match="image size is 2: expected 4"):
        rnas.data.load("digits", image_size=2)
    with pytest.raises(RnasError, match="limit per class is 0"):
        rnas.data.load("digits", limit_per_class=0)
    with pytest.raises(RnasError, match="test split of its own"):
        rnas.data.load("digits", test_fraction=0.1)
    (tmp_path / "text.npz").write_text("x")
    with pytest.raises(RnasError, match="damaged"):
        rnas.data.load("text.npz")


def test_the_cache_is_used_and_made_again_when_the_source_changes(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    first = rnas.data.load(root)
    (cache,) = root.rglob("*.u8")
    assert cache == root / ".rnas/pets-native.u8"

    def no_decoding(*_: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as m:
        m.setattr("rnas.data.folders.decode_all", no_decoding)
        second = rnas.data.load(root)
        assert torch.equal(second.train.images, first.train.images)
        assert torch.equal(second.test.labels, first.test.labels)
        assert second.classes == first.classes

    picture(root / "train/ant/0.png", color=(7, 7, 7))
    os.utime(root / "train/ant/0.png", ns=(1, 1))  # whatever the clock's resolution
    assert rnas.data.load(root).train.images[0, 0, 0, 0] == 7
    picture(root / "train/ant/more.png")
    assert len(rnas.data.load(root).train) == 7


@pytest.mark.parametrize("way", ["overwritten", "replaced"])
def test_an_image_of_equal_size_and_time_is_another_all_the_same(tmp_path, way):
    """As programs leave them that copy times too."""
    root = folder(tmp_path / "pets")
    for number, place in enumerate((root / "train/ant/0.bmp", tmp_path / "other.bmp")):
        picture(place, color=(7 + number,) * 3)
        os.utime(place, ns=(1, 1))
    (root / "train/ant/0.png").unlink()
    assert rnas.data.load(root).train.images[0, 0, 0, 0] == 7
    if way == "overwritten":
        (root / "train/ant/0.bmp").write_bytes((tmp_path / "other.bmp").read_bytes())
        os.utime(root / "train/ant/0.bmp", ns=(1, 1))
    else:
        os.replace(tmp_path / "other.bmp", root / "train/ant/0.bmp")
    assert rnas.data.load(root).train.images[0, 0, 0, 0] == 8


@pytest.mark.parametrize("where", ["image", "label", "end", "truncated", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path, where):
    root = folder(tmp_path / "pets")
    first = rnas.data.load(root)
    expected = first.train.images.clone()
    (cache,) = root.rglob("*.u8")
    content = bytearray(cache.read_bytes())
    images = 12 * 3 * 16 * 16
    match where:
        case "image":
            content[100] ^= 1
        case "label":
            content[images] ^= 1
        case "end":
            content[-1] ^= 1
        case "truncated":
            del content[-5000:]
        case "empty":
            content.clear()
    cache.unlink()
    cache.write_bytes(content)
    again = rnas.data.load(root)
    assert torch.equal(again.train.images, expected)
    assert again.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_any_damage_behind_the_images_makes_the_cache_again(tmp_path):
    """Found as class names that were silently wrong, and as a KeyError: no checksum was over the trailer."""
    root = folder(tmp_path / "pets", n=1)
    first = rnas.data.load(root)
    (cache,) = root.rglob("*.u8")
    whole = cache.read_bytes()
    images = 4 * 3 * 16 * 16
    for at in range(images, len(whole)):
        for flipped in (1, 0x80):
            damaged = bytearray(whole)
            damaged[at] ^= flipped
            cache.unlink()  # what is mapped must not be written to
            cache.write_bytes(damaged)
            again = rnas.data.load(root)
            assert cache.read_bytes() == whole, at
            assert (again.classes, again.flip) == (first.classes, first.flip)
            assert again.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("trailer", ["[]", "{}", "[" * 10_000, '{"train":1e400}', '{"train":"1","test":1,"shape":[1]}'])
def test_a_trailer_of_another_kind_is_no_trailer(tmp_path, trailer):
    path = tmp_path / "c.u8"
    content = trailer.encode() + len(trailer).to_bytes(8, "little")
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little") + rnas.data.cache.MAGIC)
    assert rnas.data.cache.read(path, "c", "source") is None


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path):
    """Whatever the image size they worked at; and nothing that is not ours."""
    root = folder(tmp_path / "pets")
    code = (
        "import os, signal, sys, rnas.data\n"
        "rnas.data.load(sys.argv[1], image_size=8, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    subprocess.run([sys.executable, "-c", code, root], timeout=120, check=False)
    assert sorted(p.suffix for p in (root / ".rnas").iterdir()) == ["", ".tmp"], "the lock and the temporary file"
    (root / ".rnas" / "notes.tmp").touch()
    rnas.data.load(root)
    assert sorted(p.name for p in (root / ".rnas").iterdir()) == ["notes.tmp", "pets-native.u8"]


def test_what_another_process_is_writing_is_waited_for(tmp_path, monkeypatch):
    root, begun, decoded = folder(tmp_path / "pets"), threading.Event(), []
    decode_all = images.decode_all

    def slowly(*task: object) -> Iterator[np.ndarray]:
        decoded.append(task)
        begun.set()
        time.sleep(0.2)
        return decode_all(*task)

    monkeypatch.setattr("rnas.data.folders.decode_all", slowly)
    first = threading.Thread(target=rnas.data.load, args=(root,))
    first.start()
    begun.wait()
    assert len(rnas.data.load(root).train) == 6
    first.join()
    assert len(decoded) == 1


def test_a_data_folder_that_cannot_be_written(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    (root / ".rnas").touch()  # no folder can be made here, not even by the administrator
    first = rnas.data.load(root)
    (cache,) = tmp_path.rglob("*.u8")
    assert tmp_path / "cache-root" in cache.parents
    monkeypatch.setattr("rnas.data.folders.decode_all", None)
    assert torch.equal(rnas.data.load(root).train.images, first.train.images)


def test_nothing_can_be_written(tmp_path):
    expected = rnas.data.load(folder(tmp_path / "other"))
    root = folder(tmp_path / "pets")
    (root / ".rnas").touch()
    (tmp_path / "cache-root").touch()
    dataset = rnas.data.load(root)
    assert torch.equal(dataset.train.images, expected.train.images)
    assert torch.equal(dataset.test.labels, expected.test.labels)


def test_a_full_disk(tmp_path):
    """The cache does not fit: a clear error and no half a file. The limit is the operating system's own."""
    root = folder(tmp_path / "pets")
    code = (
        "import resource, sys, rnas.data\n"
        "from rnas.errors import RnasError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: rnas.data.load(sys.argv[1])\n"
        "except RnasError as e: print('told:', e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, timeout=120, check=False)
    assert "told: cannot write" in done.stdout, done.stderr
    assert "takes about 9 KiB there; make room" in done.stdout
    assert not (root / ".rnas").exists()
    assert not [p for p in root.rglob("*") if ".u8" in p.name]


def test_where_the_data_has_no_room_the_cache_root_may(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    real = cache.replacing

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        with real(path) as temporary:
            if root in path.parents or everywhere:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary

    monkeypatch.setattr(cache, "replacing", full)
    everywhere = False
    assert len(rnas.data.load(root).train) == 6
    (file,) = tmp_path.rglob("*.u8")
    assert tmp_path / "cache-root" in file.parents
    everywhere = True
    file.unlink()
    with pytest.raises(RnasError, match=r"cannot write .*pets/\.rnas/.*No space left.*make room"):
        rnas.data.load(root)


def test_accents_may_be_encoded_in_two_ways(tmp_path):
    """As one system writes names, and as another unpacks them."""
    root = folder(tmp_path / "pets")
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (root / part / "ant").rename(root / part / unicodedata.normalize(form, "äffin"))
    assert rnas.data.load(root).classes == ("bee", "äffin")
    (root / "train" / unicodedata.normalize("NFD", "äffin")).mkdir()
    with pytest.raises(RnasError, match="differ only in how accents are encoded"):
        rnas.data.load(root)


def test_what_pillow_only_warns_of_is_told_once_and_by_us(tmp_path):
    """Warnings are errors in these tests."""
    root = folder(tmp_path / "pets")
    Image.new("1", (9500, 9500)).save(root / "train/ant/large.png")
    with pytest.raises(RnasError, match=r"large\.png \(9500x9500 pixels are more than"):
        rnas.data.load(root, image_size=8)


def test_an_npz_that_unpacks_to_more_than_its_labels_need_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, **(arrays() | {"x_train": np.zeros((12, 2048, 2048), np.uint8), "y_train": np.arange(2)}))
    with pytest.raises(RnasError, match="x_train has 49 MiB for 2 labels"):
        rnas.data.load(path)


def test_no_name_at_all():
    with pytest.raises(RnasError, match="the name of the data is empty"):
        rnas.data.load("")


def test_the_images_are_mapped_and_may_be_changed_in_memory(tmp_path):
    root = folder(tmp_path / "pets")
    dataset = rnas.data.load(root)
    (cache,) = root.rglob("*.u8")
    cache.chmod(0o444)
    before = cache.read_bytes()
    dataset.train.images.zero_()
    assert cache.read_bytes() == before
    assert rnas.data.load(root).train.images.any()


def test_limit_per_class_draws_training_images_and_keeps_the_test():
    full, limited = rnas.data.load("digits"), rnas.data.load("digits", limit_per_class=5)
    assert torch.bincount(limited.train.labels).tolist() == [5] * 10
    assert torch.equal(limited.test.images, full.test.images)
    again, other = (rnas.data.load("digits", limit_per_class=5, seed=s) for s in (0, 1))
    assert torch.equal(limited.train.images, again.train.images)
    assert not torch.equal(limited.train.images, other.train.images)
    originals = {image.numpy().tobytes() for image in full.train.images}
    assert all(image.numpy().tobytes() in originals for image in limited.train.images)


def test_worker_processes_decode_the_same(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets", n=20)
    (root / "train/bee/wrong\udcff.png").write_bytes(b"no image; and its name is no text")
    names = images.image_files(root, "train")
    with pytest.raises(RnasError, match="1 of 41 images") as alone:
        list(images.decode_all(root, names, 8))
    monkeypatch.setattr(images, "WORTHWHILE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    with pytest.raises(RnasError) as together:
        list(images.decode_all(root, names, 8))
    assert str(together.value) == str(alone.value)
    good = [name for name in names if "wrong" not in name]
    (chunk,) = images.decode_all(root, good, 8)
    assert chunk[:, 0, 0, 0].tolist() == [int(Path(name).stem) + 100 * ("bee" in name) for name in good]


def test_a_worker_that_dies_is_an_error_and_none_is_left_behind(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets", n=20)
    names = images.image_files(root, "train")
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "import sys; sys.stdin.read()"], **options)
            started.append(self)
            if hasattr(os, "getsid"):
                assert os.getsid(self.pid) != os.getsid(0), "Ctrl-C is not for the workers to answer, by a traceback"

    monkeypatch.setattr(images, "WORTHWHILE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with monkeypatch.context() as m:
        m.setattr(subprocess, "Popen", Recorded)
        with pytest.raises(RnasError, match="ended early"):
            list(images.decode_all(root, names, None))
    assert [worker.returncode is not None for worker in started] == [True, True]
