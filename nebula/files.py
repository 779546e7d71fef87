"""Files that are either whole or not there, and folders whose entries are on disk."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol


class System(Protocol):
    """The part of module `os` through which state that must survive a crash reaches the disk, and nothing else of it
    does: the simulator passes a disk of its own that loses power."""

    def open(self, path: Path, flags: int, mode: int = 0o777, /) -> int: ...
    def read(self, descriptor: int, length: int, /) -> bytes: ...
    def pread(self, descriptor: int, length: int, offset: int, /) -> bytes: ...
    def write(self, descriptor: int, data: bytes | memoryview, /) -> int: ...
    def fsync(self, descriptor: int, /) -> None: ...
    def close(self, descriptor: int, /) -> None: ...
    def replace(self, source: Path, target: Path, /) -> None: ...
    def unlink(self, path: Path, /) -> None: ...
    def mkdir(self, path: Path, mode: int = 0o777, /) -> None: ...
    def listdir(self, path: Path, /) -> list[str]: ...
    def stat(self, path: Path, /) -> os.stat_result: ...


def read(path: Path, system: System = os) -> bytes:
    """All of a file. Raises OSError."""
    descriptor = system.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = system.stat(path).st_size + 1  # a file mostly comes in one piece
        return b"".join(iter(lambda: system.read(descriptor, length), b""))
    finally:
        system.close(descriptor)


def read_at(path: Path, offset: int, length: int, system: System = os) -> bytes:
    """`length` bytes from `offset` on, fewer where the file ends. Raises OSError."""
    descriptor = system.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return system.pread(descriptor, length, offset)
    finally:
        system.close(descriptor)


def write(path: Path, *chunks: bytes, private: bool = False, system: System = os) -> None:
    """Write `path` so that readers see all of it or what was there before, whatever happens meanwhile; `sync` its
    folder to make that durable. `private`: only the owner may read it, at any moment. Raises OSError with nothing left
    behind."""
    write_all(path, chunks, private=private, system=system)


def write_all(path: Path, chunks: Iterable[bytes], *, private: bool = False, system: System = os) -> None:
    """As `write`, for chunks that need not all be in memory."""
    descriptor, aside = _open_aside(path, 0o600 if private else 0o644, system)
    try:
        try:
            for chunk in chunks:
                _pour(descriptor, chunk, system)
            system.fsync(descriptor)
        finally:
            system.close(descriptor)
        system.replace(aside, path)
    except BaseException:
        system.unlink(aside)
        raise


def sync(folder: Path, system: System = os) -> None:
    """Make the names in a folder durable, as fsync does for the content of a file."""
    descriptor = system.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        system.fsync(descriptor)
    finally:
        system.close(descriptor)


def make(folder: Path, system: System = os) -> None:
    """Make a folder and those above it where they are missing, with durable names. One that is there already may be
    what a killed process left without its name on disk, hence the fsync all the same; those above it are durable."""
    try:
        system.stat(folder)
    except FileNotFoundError:
        make(folder.parent, system)
        with suppress(FileExistsError):  # another process was faster
            system.mkdir(folder)
    sync(folder.parent, system)


def _open_aside(path: Path, mode: int, system: System) -> tuple[int, Path]:
    """A new file beside `path`, under a name that nobody else has, however many write the same path at once."""
    for number in itertools.count():
        aside = path.with_name(f".{path.name}.{number}")
        try:
            return system.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), aside
        except FileExistsError:
            continue
    raise AssertionError("the count has no end")


def _pour(descriptor: int, data: bytes, system: System) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[system.write(descriptor, rest) :]


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; given up by the kernel if that dies. The file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
