"""Locks and leftovers of files, with threads that race."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from rnas.files import RANDOM, acquire, locked, remove_leftovers, size_text, write_text


def test_a_lock_is_held_by_one_at_a_time_whatever_is_removed(tmp_path):
    """Each holder removes the lock file and, as the cache does, the folder if it is empty: those who wait go on."""
    path, inside, seen = tmp_path / "deep" / ".lock", [], []

    def work() -> None:
        for _ in range(30):
            with locked(path):
                inside.append(1)
                seen.append(len(inside))
                time.sleep(1e-4)
                inside.pop()
            try:
                path.parent.rmdir()
            except OSError:
                continue

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 180


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_file_is_the_lock(tmp_path, monkeypatch, code):
    """Some network file systems have none: neither an error nor a lock that never comes nor two holders."""
    fcntl = pytest.importorskip("fcntl")

    def flock(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / ".lock"):
        assert acquire(tmp_path / ".lock", wait=False) is None
    acquire(tmp_path / ".lock", wait=False).release()


def test_a_lock_does_not_follow_links(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "other").exists()


def test_only_leftovers_of_our_names_are_removed(tmp_path):
    (tmp_path / ".a-12345678" / "deep").mkdir(parents=True)
    (tmp_path / ".a-abcdefg_").touch()
    (tmp_path / ".a-linkedto").symlink_to(tmp_path / ".b-12345678")
    (tmp_path / ".b-12345678").mkdir()
    for other in (".a-1234567", ".a-123456789", "x.a-12345678", ".a-ABCDEFGH"):
        (tmp_path / other).touch()
    remove_leftovers(tmp_path, rf"\.a-{RANDOM}")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [
        ".a-1234567", ".a-123456789", ".a-ABCDEFGH", ".a-linkedto", ".b-12345678",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 KiB"), (1, "1 KiB"), (3000, "3 KiB"), (1 << 20, "1 MiB"), ((5 << 20) + 1, "6 MiB")]
)
def test_sizes_are_never_rounded_to_nothing(size, text):
    assert size_text(size) == text


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """What the system says of it names none."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as e:
        write_text(tmp_path / "settings.json", "{}")
    assert e.value.filename == str(tmp_path / "settings.json")
    assert not list(tmp_path.iterdir())
