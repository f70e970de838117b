"""The published data sets from small archives in their official formats, served on 127.0.0.1 by a server that
breaks off, lies, and refuses."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import signal
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import rnas.data
from rnas.data import archives, download
from rnas.data.download import Remote, fetch
from rnas.data.official import catalogue
from rnas.errors import RnasError

# --- the official formats, in small


def cifar_records(n: int, classes: int, label_bytes: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 20, (n, label_bytes - 1), np.uint8)
    fine = (np.arange(n)[:, None] % classes).astype(np.uint8)
    return np.concatenate([coarse, fine, rng.integers(0, 256, (n, 3072), np.uint8)], 1).tobytes()


def cifar10_files() -> dict[str, bytes]:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = {f"data_batch_{k}.bin": cifar_records(10, 10, 1, k) for k in range(1, 6)}
    files |= {"test_batch.bin": cifar_records(20, 10, 1, 6), "batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    return {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}


def cifar100_files() -> dict[str, bytes]:
    fine = "".join(f"fine{k}\n" for k in range(100)).encode()
    files = {"train.bin": cifar_records(200, 100, 2, 1), "test.bin": cifar_records(100, 100, 2, 2)}
    files |= {"fine_label_names.txt": fine, "coarse_label_names.txt": b"coarse\n" * 20}
    return {f"cifar-100-binary/{name}": content for name, content in files.items()}


def svhn_file(n: int, seed: int) -> bytes:
    x = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, n), np.uint8)
    y = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    out = io.BytesIO()
    scipy.io.savemat(out, {"X": x, "y": y}, do_compression=True)
    return out.getvalue()


def jpeg(color: tuple[int, int, int] | int, size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("L" if isinstance(color, int) else "RGB", (size, size), color).save(out, "JPEG")
    return out.getvalue()


def tiny_files() -> dict[str, bytes]:
    wnids = ["n02", "n01", "n03"]  # the official list is not sorted either
    files = {"wnids.txt": "\n".join(wnids).encode() + b"\n"}
    lines = []
    for k, wnid in enumerate(sorted(wnids)):
        for i in range(4):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(50 * k if i == 3 else (50 * k, 0, 255))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        files[f"val/images/val_{k}.JPEG"] = jpeg((50 * k, 255, 0))
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    files["test/images/test_0.JPEG"] = jpeg(9)
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


def tar(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
        for info in more:
            t.addfile(info)
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return out.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


# --- the server


@dataclass
class Served:
    """What the server has, and how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    """The i-th answer breaks off after so many bytes."""
    statuses: list[int] = field(default_factory=list)
    """The i-th request is answered with this error."""
    ranges: bool = True
    length: bool = True
    """Whether it says how many bytes it will send."""
    circles: bool = False
    """Whether every request is redirected to itself."""
    shift: int = 0
    """By how much an answer to a Range request starts too early."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        served: Served = self.server.served
        asked = self.headers.get("Range")
        served.requests.append((self.path, asked))
        content = served.files.get(self.path.rsplit("/", 1)[1])
        if served.statuses or content is None:
            self.send_error(served.statuses.pop(0) if content is not None else 404)
            return
        if served.circles:
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        start = 0
        if asked and served.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-")) - served.shift
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if served.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may hang up as soon as it knows enough
            self.wfile.write(content[start : start + served.breaks.pop(0)] if served.breaks else content[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.served = Served(url=f"http://127.0.0.1:{server.server_address[1]}/mirror")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.served
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("RNAS_DATA", str(tmp_path / "cache-root"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("RNAS_MIRROR", raising=False)


def remote(name: str, content: bytes) -> Remote:
    """As a file of that content would be registered; its own address cannot be reached."""
    return Remote(f"http://127.0.0.1:9/{name}", len(content), hashlib.md5(content).hexdigest())


def publish(monkeypatch, served: Served, name: str, contents: list[bytes]) -> None:
    """Let `contents` be the official files of the data set `name`, on the server."""
    entry = catalogue.SETS[name]
    remotes = tuple(remote(r.file, content) for r, content in zip(entry.remotes, contents, strict=True))
    served.files |= {r.file: content for r, content in zip(remotes, contents, strict=True)}
    monkeypatch.setitem(catalogue.SETS, name, replace(entry, remotes=remotes))


PUBLISHED = {
    "cifar10": lambda: [tar(cifar10_files())],
    "cifar100": lambda: [tar(cifar100_files())],
    "svhn": lambda: [svhn_file(30, 0), svhn_file(20, 1)],
    "svhn-extra": lambda: [svhn_file(30, 0), svhn_file(40, 2), svhn_file(20, 1)],
    "tiny-imagenet": lambda: [zipped(tiny_files())],
}
COUNTS = {
    "cifar10": (50, 20, 10),
    "cifar100": (200, 100, 100),
    "svhn": (30, 20, 10),
    "svhn-extra": (70, 20, 10),
    "tiny-imagenet": (12, 3, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_download_unpack_load_and_do_nothing_the_second_time(tmp_path, monkeypatch, served, name):
    publish(monkeypatch, served, name, PUBLISHED[name]())
    seen: list[tuple[str, int, int]] = []
    summary = rnas.data.prepare(name, tmp_path, served.url, lambda *progress: seen.append(progress))
    assert (summary["train"], summary["test"], len(summary["classes"])) == COUNTS[name]
    assert summary["downloaded"]
    assert not summary["complete"], "these are not the official numbers, and it says so"
    for label in ("downloading", "decoding"):
        steps = [(done, total) for what, done, total in seen if what.startswith(label)]
        assert steps
        assert steps[-1][0] == steps[-1][1]
    requests = len(served.requests)
    assert requests == len(catalogue.SETS[name].remotes)
    again = rnas.data.prepare(name, tmp_path, served.url)
    assert again == summary | {"downloaded": False}
    dataset = rnas.data.load(name, root=tmp_path)
    assert len(served.requests) == requests
    assert list(dataset.classes) == summary["classes"]
    leftovers = [p.name for p in tmp_path.rglob("*") if p.name.endswith((".gz", ".zip", ".part", ".lock", ".wrong"))]
    assert leftovers == []
    assert not list(tmp_path.glob(".unpack-*"))


def test_only_the_missing_file_is_fetched_into_the_folder_itself(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "svhn-extra", PUBLISHED["svhn-extra"]())
    rnas.data.prepare("svhn-extra", tmp_path, served.url)
    (tmp_path / "svhn" / "extra_32x32.mat").unlink()
    before = len(served.requests)
    summary = rnas.data.prepare("svhn-extra", tmp_path / "svhn", served.url)
    assert summary["folder"] == str(tmp_path / "svhn")
    assert len(served.requests) == before + 1
    assert not (tmp_path / "svhn" / "svhn").exists()


def test_cifar10_pixels_and_labels(tmp_path):
    files = cifar10_files()
    dataset = rnas.data.load("cifar10", root=write(tmp_path, files))
    records = np.frombuffer(b"".join(files[f"cifar-10-batches-bin/data_batch_{k}.bin"] for k in range(1, 6)), np.uint8)
    records = records.reshape(50, 3073)
    assert np.array_equal(dataset.train.images.numpy().reshape(50, -1), records[:, 1:])
    assert dataset.train.labels.tolist() == records[:, 0].tolist()
    assert dataset.classes[3] == "cat"
    assert dataset.flip


def test_cifar100_uses_the_fine_labels(tmp_path):
    files = cifar100_files()
    dataset = rnas.data.load("cifar100", root=write(tmp_path, files))
    records = np.frombuffer(files["cifar-100-binary/test.bin"], np.uint8).reshape(100, 3074)
    assert dataset.test.labels.tolist() == list(range(100))
    assert np.array_equal(dataset.test.images.numpy().reshape(100, -1), records[:, 2:])
    assert dataset.classes[42] == "fine42"


def test_svhn_counts_ten_as_zero_and_is_not_mirrored(tmp_path):
    write(tmp_path, {"train_32x32.mat": svhn_file(30, 0), "test_32x32.mat": svhn_file(20, 1)})
    dataset = rnas.data.load("svhn", root=tmp_path)
    assert dataset.train.labels.tolist() == [(k % 10 + 1) % 10 for k in range(30)]
    x = scipy.io.loadmat(tmp_path / "train_32x32.mat")["X"]
    for image in (0, 29):
        assert np.array_equal(dataset.train.images[image].numpy(), x[..., image].transpose(2, 0, 1))
    assert not dataset.flip


def test_tiny_imagenet_sorts_its_classes_and_reads_the_annotations(tmp_path):
    dataset = rnas.data.load("tiny-imagenet", root=write(tmp_path, tiny_files()))
    assert dataset.classes == ("n01", "n02", "n03")
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.test.labels.tolist() == [2, 1, 0]  # as the annotations list them
    assert dataset.test.images[:, 0, 5, 5].tolist() == pytest.approx([100, 50, 0], abs=3)
    grey = dataset.train.images[7]
    assert torch.equal(grey[0], grey[2])
    assert rnas.data.load("tiny-imagenet", root=tmp_path, image_size=32).image_size == (32, 32)


def test_the_data_root_may_be_the_folder_itself(tmp_path):
    write(tmp_path, cifar10_files())
    assert len(rnas.data.load("cifar10", root=tmp_path / "cifar-10-batches-bin").train) == 50


def test_an_archive_that_lies_there_is_unpacked_without_the_internet(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "cifar10", [tar(cifar10_files())])
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(served.files[archive.name])
    assert len(rnas.data.load("cifar10", root=tmp_path).test) == 20
    assert served.requests == []
    assert archive.exists(), "it is the user's"


def test_a_wrong_archive_that_lies_there_is_refused_and_kept(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "cifar10", [tar(cifar10_files())])
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(served.files[archive.name][:-5])
    with pytest.raises(RnasError, match=r"is not the official file: it has .* bytes"):
        rnas.data.load("cifar10", root=tmp_path)
    assert archive.exists()


def test_mirror_by_environment_and_nonsense_mirrors(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "svhn", PUBLISHED["svhn"]())
    monkeypatch.setenv("RNAS_MIRROR", served.url + "/")
    assert len(rnas.data.load("svhn", root=tmp_path).train) == 30
    assert [path for path, _ in served.requests] == ["/mirror/train_32x32.mat", "/mirror/test_32x32.mat"]
    for mirror in ("ftp://x/y", "file:///etc", "nonsense", "http://", "http://127.0.0.1:port", "http://\udcff/"):
        with pytest.raises(RnasError, match=r"expected the http or https address|is no address"):
            rnas.data.prepare("cifar10", tmp_path, mirror)


def test_pickles_are_not_read(tmp_path):
    write(tmp_path, {"cifar-10-batches-py/data_batch_1": b"\x80\x04."})
    with pytest.raises(RnasError, match=r"rnas data cifar10 --data-root .*cifar-10-binary\.tar\.gz"):
        rnas.data.load("cifar10", root=tmp_path)
    write(tmp_path, cifar10_files())
    assert len(rnas.data.load("cifar10", root=tmp_path).train) == 50, "the binary form beside them is"


def test_prepare_knows_the_digits_and_no_others():
    summary = rnas.data.prepare("digits")
    assert (summary["train"], summary["test"], summary["complete"]) == (1437, 360, True)
    with pytest.raises(RnasError, match="did you mean svhn"):
        rnas.data.prepare("shvn")


# --- transfers that go wrong

CONTENT = np.random.default_rng(0).bytes(1_000_000)


def test_a_broken_connection_is_resumed(tmp_path, served):
    served.files["f.bin"] = CONTENT
    served.breaks = [300_000, 0, 200_000]
    path = fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert path.read_bytes() == CONTENT
    asked = [r for _, r in served.requests]
    assert asked == [None, "bytes=300000-", "bytes=300000-", "bytes=500000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_the_next_call_continues_what_the_last_one_left(tmp_path, served):
    served.files["f.bin"] = CONTENT
    served.breaks = [400_000] + [0] * download.TRIES
    with pytest.raises(RnasError, match="400,000 of 1,000,000 bytes are here and the next call continues"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert served.requests[-1] == ("/mirror/f.bin", "bytes=400000-")


def test_a_server_without_ranges_starts_again(tmp_path, served):
    served.files["f.bin"], served.ranges = CONTENT, False
    served.breaks = [300_000]
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert len(served.requests) == 2


def test_a_server_without_ranges_is_not_said_to_continue(tmp_path, served):
    served.files["f.bin"], served.ranges = CONTENT, False
    served.breaks = [300_000] * (download.TRIES + 1)
    with pytest.raises(RnasError, match="cannot continue a download, so the next call starts again") as e:
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert "the next call continues" not in str(e.value)


def test_a_server_without_ranges_that_breaks_now_early_now_late_is_given_up(tmp_path, served):
    served.files["f.bin"], served.ranges = CONTENT, False
    served.breaks = [100_000, 300_000] * 20
    with pytest.raises(RnasError, match="cannot continue a download"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert len(served.requests) == 2 + download.TRIES, "none of the later ones brought more than the second"


def test_pauses_begin_with_a_second_and_double(tmp_path, served, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 1.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    served.files["f.bin"], served.breaks = CONTENT, [0] * download.TRIES
    with pytest.raises(RnasError, match="nothing has arrived"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_foreign_beginning_is_fetched_again_in_the_same_call(tmp_path, served):
    """A hotel's login page, kept as the beginning of the archive."""
    served.files["f.bin"] = CONTENT
    (tmp_path / "f.bin.part").write_bytes(b"<html>log in</html>")
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert [asked for _, asked in served.requests] == ["bytes=19-", None]
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_a_server_that_refuses_a_range_nobody_asked_for(tmp_path, served):
    served.files["f.bin"], served.statuses = CONTENT, [416]
    with pytest.raises(RnasError, match="the server answers 416"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)


def test_redirection_in_circles_is_told_in_one_line(tmp_path, served):
    served.files["f.bin"], served.circles = CONTENT, True
    with pytest.raises(RnasError, match=r"the server answers 302 and redirects in circles; use another mirror$"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)


def test_who_gave_a_mirror_is_not_told_to_give_one(tmp_path, served):
    served.files["f.bin"], served.statuses = CONTENT, [404]
    with pytest.raises(RnasError, match="the server answers 404 Not Found; use another mirror"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    served.statuses = [404]
    official_one = replace(remote("f.bin", CONTENT), url=f"{served.url}/f.bin")
    with pytest.raises(RnasError, match="the server answers 404 Not Found; give a --mirror"):
        fetch(official_one, tmp_path)
    with pytest.raises(RnasError, match=r"nothing has arrived; .*, or use another mirror"):
        fetch(official_one, tmp_path, "http://127.0.0.1:9")


def test_a_server_that_sends_another_part_is_not_believed(tmp_path, served):
    served.files["f.bin"], served.shift = CONTENT, 10
    (tmp_path / "f.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(RnasError, match="another part"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert (tmp_path / "f.bin.part").read_bytes() == CONTENT[:1000]


def test_wrong_content_is_kept_out_of_place(tmp_path, served):
    served.files["f.bin"] = bytes(len(CONTENT))
    with pytest.raises(RnasError, match=r"its MD5 is [0-9a-f]{32}, expected .*kept as f\.bin\.wrong"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin.wrong"]
    served.files["f.bin"] = CONTENT
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"], "what was wrong goes when it is of no use any more"


def test_what_is_left_of_attempts_goes_when_the_file_was_brought_by_hand(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "cifar10", [tar(cifar10_files())])
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(served.files[archive.name])
    for end in (".part", ".wrong"):
        (tmp_path / f"{archive.name}{end}").write_bytes(b"1234")
    monkeypatch.setenv("RNAS_MIRROR", "nonsense, of no importance here")
    rnas.data.load("cifar10", root=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar-10-batches-bin", archive.name]


def test_a_mirror_that_sends_too_much_spoils_nothing(tmp_path, served):
    """It does not say so before: what it sent is no beginning that a good mirror could continue."""
    served.files["f.bin"], served.length = bytes(len(CONTENT) + 1), False
    with pytest.raises(RnasError, match=r"sends more than the 1,000,000 bytes of f\.bin; use another mirror"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert list(tmp_path.iterdir()) == []
    served.files["f.bin"] = CONTENT
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused_at_once(tmp_path, served, change):
    served.files["f.bin"] = CONTENT[:change] if change < 0 else CONTENT + b"x"
    with pytest.raises(RnasError, match=f"has {len(CONTENT) + change} bytes, f.bin {len(CONTENT)}"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    assert not (tmp_path / "f.bin").exists()
    assert len(served.requests) == 1


def test_a_part_that_is_too_long_is_thrown_away(tmp_path, served):
    served.files["f.bin"] = CONTENT
    (tmp_path / "f.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT


def test_a_mirror_whose_file_ends_before_ours(tmp_path, served):
    served.files["f.bin"] = CONTENT[:500]
    (tmp_path / "f.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(RnasError, match="500 bytes"):
        fetch(remote("f.bin", CONTENT), tmp_path, served.url)


def test_busy_servers_are_asked_again_and_missing_files_are_not(tmp_path, served):
    served.files["f.bin"], served.statuses = CONTENT, [503, 429, 500]
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert len(served.requests) == 4
    with pytest.raises(RnasError, match="the server answers 404"):
        fetch(remote("other.bin", CONTENT), tmp_path, served.url)
    assert len(served.requests) == 5


def test_no_internet(tmp_path):
    with pytest.raises(RnasError, match=r"without internet, put f\.bin into .* or give a --mirror"):
        fetch(remote("f.bin", CONTENT), tmp_path)


def test_a_full_disk_keeps_what_arrived(tmp_path, served, monkeypatch):
    served.files["f.bin"] = CONTENT

    class Full(io.FileIO):
        def write(self, block: bytes) -> int:
            if self.tell() + len(block) > 600_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    def small_disk(path: Path, mode: str):
        return (
            Full(path, "w" if mode == "wb" else mode)
            if str(path).endswith(".part") and mode != "rb"
            else open(path, mode)
        )

    with monkeypatch.context() as m:
        m.setattr(download, "open", small_disk, raising=False)
        with pytest.raises(RnasError, match=r"No space left on device; 977 KiB are needed and .* are free; make room"):
            fetch(remote("f.bin", CONTENT), tmp_path, served.url)
    kept = (tmp_path / "f.bin.part").read_bytes()
    assert kept
    assert CONTENT.startswith(kept)
    assert fetch(remote("f.bin", CONTENT), tmp_path, served.url).read_bytes() == CONTENT
    assert served.requests[-1][1] == f"bytes={len(kept)}-"


def test_several_at_once_download_one_archive(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "cifar10", [tar(cifar10_files())])
    monkeypatch.setenv("RNAS_MIRROR", served.url)
    found: list[tuple[Path, bool]] = []
    cifar10 = catalogue.SETS["cifar10"]
    threads = [threading.Thread(target=lambda: found.append(catalogue.obtain(cifar10, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder for folder, _ in found] == [tmp_path / "cifar-10-batches-bin"] * 6
    assert len(served.requests) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-batches-bin"]


# --- archives that go wrong


def member(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


MALICIOUS_TARS = {
    "absolute": tar({"top/a": b"1", "/tmp/rnas-was-here": b"evil"}),
    "dots": tar({"top/a": b"1", "top/../../evil": b"evil"}),
    "backslash": tar({"top\\..\\evil": b"evil"}),
    "symbolic link": tar({"top/a": b"1"}, member("top/link", tarfile.SYMTYPE)),
    "symbolic link elsewhere": tar({"top/a": b"1"}, member("other/link", tarfile.SYMTYPE)),
    "hard link": tar({"top/a": b"1"}, member("top/link", tarfile.LNKTYPE)),
    "character device": tar({"top/a": b"1"}, member("top/null", tarfile.CHRTYPE)),
    "block device": tar({"top/a": b"1"}, member("top/disk", tarfile.BLKTYPE)),
    "pipe": tar({"top/a": b"1"}, member("top/pipe", tarfile.FIFOTYPE)),
    "twice": tar({"top/a": b"1", "./top/a": b"2"}),
    "file as a folder": tar({"top/a": b"1", "top/a/b": b"2"}),
    "bomb": tar({"top/a": bytes(3 << 20)}),
    "many small ones": tar({f"top/{k}": bytes(40_000) for k in range(40)}),
}


@pytest.mark.parametrize("case", MALICIOUS_TARS)
def test_malicious_tar(tmp_path, case):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "a.tar.gz"
    archive.write_bytes(MALICIOUS_TARS[case])
    with pytest.raises(RnasError, match=r"a\.tar\.gz"):
        archives.unpack(archive, tmp_path / "in", "top", limit=1 << 20)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["in", "in/a.tar.gz"]


@pytest.mark.parametrize("case", ["twice", "file as a folder"])
def test_members_in_each_others_way_are_said_to_be_so(tmp_path, case):
    (tmp_path / "a.tar.gz").write_bytes(MALICIOUS_TARS[case])
    name = {"twice": "top/a", "file as a folder": "top/a/b"}[case]
    with pytest.raises(RnasError, match=rf"a\.tar\.gz holds '{name}' twice, or a file as a folder: refused"):
        archives.unpack(tmp_path / "a.tar.gz", tmp_path, "top", limit=1 << 20)


def test_what_a_killed_process_had_unpacked_is_removed(tmp_path, monkeypatch, served):
    """Killed in the middle by the signal that nothing can catch; another set's folder may be in use and stays."""
    archive = tar(cifar10_files())  # one: its header has the second in which it was written
    publish(monkeypatch, served, "cifar10", [archive])
    other = tmp_path / ".unpack-cifar-100-binary-12345678"
    other.mkdir()

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(archives, "_write", killed)
    if (child := os.fork()) == 0:
        try:
            catalogue.obtain(catalogue.SETS["cifar10"], tmp_path, served.url)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".unpack-cifar-10-*"))) == 1
    publish(monkeypatch, served, "cifar10", [archive])
    catalogue.obtain(catalogue.SETS["cifar10"], tmp_path, served.url)
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


def test_a_tar_that_declares_more_than_it_may(tmp_path):
    """The header promises a terabyte and the file ends there: refused by what is declared, before anything is read."""
    info = tarfile.TarInfo("top/huge")
    info.size = 1 << 40
    archive = tmp_path / "a.tar.gz"
    import gzip

    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)))
    with pytest.raises(RnasError, match="more than it should"):
        archives.unpack(archive, tmp_path, "top", limit=1 << 20)


def zip_with(name: str, content: bytes = b"evil", mode: int = 0o100644, **changes: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("top/a", b"1")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = zipfile.ZIP_DEFLATED
        z.writestr(info, content)
        for key, value in changes.items():
            setattr(info, key, value)
    return out.getvalue()


MALICIOUS_ZIPS = {
    "absolute": zip_with("/tmp/rnas-was-here"),
    "dots": zip_with("top/../../evil"),
    "drive": zip_with("C:/evil"),
    "symbolic link": zip_with("top/link", b"/etc/passwd", mode=0o120777),
    "device": zip_with("top/null", b"", mode=0o020666),
    "encrypted": zip_with("top/b", flag_bits=1),
    "bomb": zip_with("top/b", bytes(3 << 20)),
    "lies about its size": zip_with("top/b", bytes(3 << 20), file_size=10),
    "file as a folder": zip_with("top/a/b"),
}


@pytest.mark.parametrize("case", MALICIOUS_ZIPS)
def test_malicious_zip(tmp_path, case):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "a.zip"
    archive.write_bytes(MALICIOUS_ZIPS[case])
    with pytest.raises(RnasError, match=r"a\.zip"):
        archives.unpack(archive, tmp_path / "in", "top", limit=1 << 20)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["in", "in/a.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("cut", [0, 10, 0.5, 0.98])
def test_truncated_archive(tmp_path, name, cut):
    files = {"top/a": np.random.default_rng(0).bytes(50_000)}
    whole = zipped(files) if name == "a.zip" else tar(files)
    (tmp_path / name).write_bytes(whole[: int(cut if cut >= 1 else cut * len(whole))])
    with pytest.raises(RnasError, match=name):
        archives.unpack(tmp_path / name, tmp_path, "top", limit=1 << 20)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_another_archive_and_a_folder_in_the_way(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({"other/a": b"1"}))
    with pytest.raises(RnasError, match="holds no folder top"):
        archives.unpack(archive, tmp_path, "top", limit=1 << 20)
    (tmp_path / "other").mkdir()
    with pytest.raises(RnasError, match="in the way"):
        archives.unpack(archive, tmp_path, "other", limit=1 << 20)


def test_a_disk_that_fills_while_unpacking(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({"top/a": bytes(1000)}))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(archives, "_write", full)
    with pytest.raises(RnasError, match=r"No space left on device; .* make room"):
        archives.unpack(archive, tmp_path, "top", limit=1 << 20)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


# --- official layouts that are damaged


def damage(name: str, file: str, content: bytes | None) -> dict[str, bytes]:
    sets = {"cifar10": cifar10_files, "cifar100": cifar100_files, "tiny-imagenet": tiny_files}
    files = sets[name]()
    top = next(iter(files)).partition("/")[0]
    files[f"{top}/{file}"] = files[f"{top}/{file}"][:-1] if content is None else content
    return files


DAMAGED = [
    ("cifar10", "data_batch_2.bin", None, "not a multiple of 3073"),
    ("cifar10", "test_batch.bin", b"", "0 bytes"),
    ("cifar10", "test_batch.bin", b"\x0a" + bytes(3072), "a label 10: expected 0 to 9"),
    ("cifar10", "batches.meta.txt", b"cat\ndog\n", "has 2 different names: expected 10"),
    ("cifar10", "batches.meta.txt", b"\xff\xfe", "is no text"),
    ("cifar100", "train.bin", bytes(3073), "not a multiple of 3074"),
    ("cifar100", "train.bin", b"\x00\x64" + bytes(3072), "a label 100"),
    ("tiny-imagenet", "wnids.txt", b"n01\nn02\n../n03\n", "no list of two or more"),
    ("tiny-imagenet", "wnids.txt", b"n01\nn02\nn04\n", "cannot read .*n04"),
    ("tiny-imagenet", "val/val_annotations.txt", b"", "is empty"),
    ("tiny-imagenet", "val/val_annotations.txt", b"val_0.JPEG\tn99\t0\n", "line 1: .*'n99' no class"),
    ("tiny-imagenet", "val/val_annotations.txt", b"../x.JPEG\tn01\t0\n", "line 1"),
    ("tiny-imagenet", "val/images/val_1.JPEG", b"GIF89a", r"1 of 15 images .*val_1\.JPEG"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), DAMAGED)
def test_damaged_layouts(tmp_path, name, file, content, message):
    with pytest.raises(RnasError, match=message):
        rnas.data.load(name, root=write(tmp_path, damage(name, file, content)))
    assert not list(tmp_path.rglob("*.u8"))


def mat(**variables: np.ndarray) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, variables)
    return out.getvalue()


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.ones((4, 1), np.uint8)
BAD_MATS = {
    "nothing": b"",
    "text": b"not a MATLAB file at all" * 20,
    "version 7.3": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" + bytes(500),
    "truncated": svhn_file(4, 0)[:-100],
    "no X": mat(y=Y),
    "no y": mat(X=X),
    "floats": mat(X=X.astype(float), y=Y),
    "other shape": mat(X=X[:16], y=Y),
    "other count": mat(X=X, y=Y[:3]),
    "label 11": mat(X=X, y=Y * 11),
    "label 0": mat(X=X, y=Y * 0),
    "half a label": mat(X=X, y=Y * 1.5),
    "text as labels": mat(X=X, y=np.array(["abcd"])),
    "cells": mat(X=X, y=np.array([[1], [2], [3], [4]], object)),
}


@pytest.mark.parametrize("case", BAD_MATS)
def test_damaged_svhn(tmp_path, case):
    write(tmp_path, {"train_32x32.mat": BAD_MATS[case], "test_32x32.mat": svhn_file(20, 1)})
    with pytest.raises(RnasError, match=r"train_32x32\.mat"):
        rnas.data.load("svhn", root=tmp_path)


def test_incomplete_layouts_are_not_taken_for_whole_ones(tmp_path, monkeypatch, served):
    publish(monkeypatch, served, "cifar10", [tar(cifar10_files())])
    write(tmp_path, cifar10_files())
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(RnasError, match=r"cifar-10-batches-bin lacks data_batch_3\.bin: put it there, or remove"):
        rnas.data.prepare("cifar10", tmp_path, served.url)
    assert served.requests == [], "told before 170 MB are fetched in vain"
    shutil.rmtree(tmp_path / "cifar-10-batches-bin")
    assert rnas.data.prepare("cifar10", tmp_path, served.url)["train"] == 50


def test_a_label_that_no_digit_has_is_named(tmp_path):
    bad = mat(X=np.zeros((32, 32, 3, 3), np.uint8), y=np.array([[1], [11], [3]]))
    write(tmp_path, {"train_32x32.mat": bad, "test_32x32.mat": svhn_file(20, 1)})
    with pytest.raises(RnasError, match="y has a label 11: expected 1 to 10, where 10 is the digit 0"):
        rnas.data.load("svhn", root=tmp_path)


def test_pickles_given_as_a_folder_of_images(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(RnasError, match=r"as Python pickles.*rnas data cifar10 --data-root"):
        rnas.data.load(tmp_path / "cifar-10-batches-py")
