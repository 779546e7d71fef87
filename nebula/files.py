"""Files that are either whole or not there, and folders whose entries are on disk."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, *chunks: bytes, private: bool = False) -> None:
    """Write `path` so that readers see all of it or what was there before, whatever happens meanwhile. `private`: only
    the owner may read it, at any moment. Raises OSError with nothing left behind."""
    write_all(path, chunks, private=private)


def write_all(path: Path, chunks: Iterable[bytes], *, private: bool = False) -> None:
    """As `write`, for chunks that need not all be in memory."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def sync(folder: Path) -> None:
    """Make the names in a folder durable, as fsync does for the content of a file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; given up by the kernel if that dies. The file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
