"""Files that are written whole or not at all, and JSON that is read with an error a person can use."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnas.errors import RnasError

if TYPE_CHECKING:
    from filelock import BaseFileLock

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a full disk, a used-up quota and a limit on files."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""The errors of file systems without locks, besides ENOSYS, which filelock knows."""
TEMPORARY = r"\..+\.[0-9a-f]{8}\.tmp"
"""As a regular expression: the whole name of a file that `replacing` has not yet put in its place."""
RANDOM = "[a-z0-9_]{8}"
"""As a regular expression: what is between a temporary name's beginning and its end."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit flush it to the disk and rename it into place.

    On an exception the temporary file is removed and `path` stays as it was.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        try:  # created in here, not before: a signal may come at any moment
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except OSError as e:
            raise RnasError(f"cannot write {path}: {e.strerror}; choose a folder that you may write to") from e
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk names no file
        raise
    finally:
        with contextlib.suppress(OSError):  # gone already, or its folder was never there
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """RnasError unless files can be made in `folder`, or the folder itself: for whoever works for hours before that."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RnasError(f"cannot write to {folder}: {existing} is not a folder that you may write to")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`. RnasError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise RnasError(f"{path} is not JSON: {e}") from e


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting until no one else does. It is removed at the end, while it is still held."""
    lock = acquire(path)
    assert lock is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()


def acquire(path: Path, wait: bool = True) -> BaseFileLock | None:
    """The lock on the file `path`, held by this process until it releases it or dies; without `wait` None, if another
    one holds it.

    Where the file system has no locks, that a file beside `path` exists is the lock: one that a killed process of
    another machine left has to be removed by hand.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # here, because it takes a tenth of a second

    lock: BaseFileLock = FileLock(path)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(-1 if wait else 0)
            return lock
        except Timeout:
            return None
        except FileNotFoundError:  # who held the lock has removed it and the folder, which was empty
            continue
        except FileExistsError:  # or has done so while the folder was looked at
            if path.parent.exists() and not path.parent.is_dir():
                raise
            continue
        except OSError as e:
            if e.errno not in NO_LOCKS or isinstance(lock, SoftFileLock):
                raise
            lock = SoftFileLock(path.with_name(f"{path.name}.held"))


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files and folders that killed processes left in `folder`: those whose whole name matches
    the regular expression `names`. Only for who holds the lock under which everything of such a name is written.
    """
    for path in [path for path in folder.iterdir() if re.fullmatch(names, path.name)]:
        with contextlib.suppress(OSError):  # it is in no one's way
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_text(name: str) -> bool:
    """Whether a name from the file system or the command line is UTF-8: Python keeps other bytes as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def size_text(size: int) -> str:
    """`size` in bytes, for people: in MiB or, if it is less than one, in KiB, rounded up."""
    return f"{-(-size >> 20)} MiB" if size >= 1 << 20 else f"{-(-size >> 10)} KiB"
