"""Archives, unpacked without trusting what they say: no path leads outside, no links, no more bytes than allowed."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rnas.data.cache import Progress
from rnas.data.download import disk_error
from rnas.errors import RnasError
from rnas.files import NO_ROOM, RANDOM, remove_leftovers

MAX_MEMBERS = 1_000_000
BLOCK = 1 << 20


def unpack(archive: Path, into: Path, top: str, limit: int, progress: Progress | None = None) -> Path:
    """Unpack the folder `top` of the .zip or .tar.gz `archive` as `into`/`top`, whole or not at all; its path.

    Other members are left out. RnasError if any member is a link, a device, or has a path that leads outside; if
    they declare or are more than `limit` bytes together; if the archive is damaged; or if the disk is full.
    """
    target = into / top
    if target.exists():
        raise RnasError(f"{target} is in the way and incomplete: remove it and start again")
    temporary = Path(tempfile.mkdtemp(prefix=f".unpack-{top}-", dir=into))
    try:
        (_unzip if archive.suffix == ".zip" else _untar)(archive, temporary, top, limit, progress)
        if not (temporary / top).is_dir():
            raise RnasError(f"{archive} holds no folder {top}: it is another archive")
        os.replace(temporary / top, target)
    except RnasError:
        raise
    except OSError as e:
        if e.errno in NO_ROOM:
            raise RnasError(disk_error(e, target, limit)) from e
        raise RnasError(f"cannot unpack {archive}: {e.strerror or e}") from e
    except Exception as e:  # tarfile, zipfile and zlib raise a dozen types on damaged files
        raise RnasError(f"{archive} is damaged: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def remove_unpacked(into: Path, top: str) -> None:
    """Remove what calls of `unpack` that were killed left in `into`. Only for who holds the lock for `top` there."""
    remove_leftovers(into, rf"\.unpack-{re.escape(top)}-{RANDOM}")


class _Bounded:
    """A file that refuses to give more than `limit` bytes: whatever a tar declares, no more is read of it."""

    def __init__(self, f: Any, limit: int, archive: Path):
        self.file, self.left, self.archive = f, limit, archive

    def read(self, size: int = -1) -> bytes:
        block: bytes = self.file.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(block)
        if self.left < 0:
            raise _too_large(self.archive)
        return block


def _too_large(archive: Path) -> RnasError:
    return RnasError(f"{archive} unpacks to more than it should: refused")


def _untar(archive: Path, into: Path, top: str, limit: int, progress: Progress | None) -> None:
    size = archive.stat().st_size
    with open(archive, "rb") as raw, gzip.open(raw) as f:
        bounded = _Bounded(f, limit, archive)
        with tarfile.open(fileobj=bounded, mode="r|") as tar:  # type: ignore[call-overload]
            for count, member in enumerate(tar):
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                if not regular and not member.isdir():
                    raise RnasError(f"{archive} holds {member.name!r}, a link, a device or worse: refused")
                path = _filtered(member, into, archive)
                if count >= MAX_MEMBERS or member.size > limit:
                    raise _too_large(archive)
                if regular and path.parts[:1] == (top,):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    _write(content, into, path, limit, archive)
                if progress:
                    progress(f"unpacking {archive.name}", raw.tell(), size)


def _filtered(member: tarfile.TarInfo, into: Path, archive: Path) -> PurePosixPath:
    """The path of `member`. RnasError if Python's filter for data finds that it leads out of `into`, or would have to
    change it."""
    try:
        name = tarfile.data_filter(member, str(into)).name
    except tarfile.FilterError as e:
        raise RnasError(f"{archive} is refused: {e}") from e
    if name != member.name:
        raise RnasError(f"{archive} holds {member.name!r}, an absolute path: refused")
    return PurePosixPath(name)


def _unzip(archive: Path, into: Path, top: str, limit: int, progress: Progress | None) -> None:
    with zipfile.ZipFile(archive) as z:
        members = z.infolist()
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > limit:
            raise _too_large(archive)
        paths = [_inside(member.filename, archive) for member in members]
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
                raise RnasError(f"{archive} holds {member.filename!r}, a link, a device or encrypted: refused")
        for count, (member, path) in enumerate(zip(members, paths, strict=True), 1):
            if not member.is_dir() and path.parts[:1] == (top,):
                with z.open(member) as content:
                    _write(content, into, path, member.file_size, archive)
            if progress and (count % 1000 == 0 or count == len(members)):
                progress(f"unpacking {archive.name}", count, len(members))


def _inside(name: str, archive: Path) -> PurePosixPath:
    """The path `name` in a .zip. RnasError if it could lead outside the folder that it is put into, on any system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0") or not path.parts:
        raise RnasError(f"{archive} holds {name!r}, a path that leads outside: refused")
    return path


def _write(content: IO[bytes], into: Path, path: PurePosixPath, limit: int, archive: Path) -> None:
    try:
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        out = open(into / path, "xb")  # noqa: SIM115 - closed below; x: what is there already is an error
    except (FileExistsError, NotADirectoryError) as e:
        raise RnasError(f"{archive} holds '{path}' twice, or a file as a folder: refused") from e
    with out:
        while block := content.read(BLOCK):
            limit -= len(block)
            if limit < 0:
                raise _too_large(archive)
            out.write(block)
