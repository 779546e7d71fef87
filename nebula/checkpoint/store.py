"""Where blobs lie: whole or not there, durable once `put` has returned."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from nebula import files


class Store(Protocol):
    """Blobs by name. A name is a plain file name that does not begin with a dot. `str(store)` says where it is.

    Every method may raise OSError; a `put` that did has left what was there before."""

    def put(self, name: str, data: bytes) -> None:
        """Store `data`, in place of what was there. Whole or not at all; durable when this returns."""
        ...

    def get(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a blob from `offset` on, which is within it; fewer where it ends. Raises
        FileNotFoundError."""
        ...

    def names(self) -> list[str]:
        """Of all blobs, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        ...

    def delete(self, name: str) -> None:
        """Does nothing if there is none. After a power failure a blob may be there again."""
        ...

    def sweep(self) -> None:
        """Remove what a crash left half-written. Only while nobody puts."""
        ...


class Folder:
    """A Store in a folder of a POSIX file system: written aside, fsynced, renamed, the folder fsynced."""

    def __init__(self, path: Path, system: files.System = os) -> None:
        self._path = path
        self._system = system
        files.make(path, system)

    def __str__(self) -> str:
        return str(self._path)

    def put(self, name: str, data: bytes) -> None:
        files.write(self._path / name, data, system=self._system)
        files.sync(self._path, self._system)

    def get(self, name: str) -> bytes:
        return files.read(self._path / name, self._system)

    def read(self, name: str, offset: int, length: int) -> bytes:
        return files.read_at(self._path / name, offset, length, self._system)

    def names(self) -> list[str]:
        return sorted(name for name in self._system.listdir(self._path) if not name.startswith("."))

    def size(self, name: str) -> int:
        return self._system.stat(self._path / name).st_size

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.unlink(self._path / name)

    def sweep(self) -> None:
        for name in self._system.listdir(self._path):
            if name.startswith("."):
                self._system.unlink(self._path / name)
