"""DCP's reader and writer on whatever place a checkpoint lies in. They know its files by their names alone."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from nebula.checkpoint.place import Digest, Place


class Reader(FileSystemReader):
    def __init__(self, place: Place, tag: int) -> None:
        super().__init__(place.name(tag))
        self.fs = Streams(place, tag)  # type: ignore[assignment]


class Writer(FileSystemWriter):
    """`written`: what this rank wrote, by file name."""

    def __init__(self, place: Place, tag: int) -> None:
        # Where there is nothing to fsync, DCP would have the whole machine write out its disks' caches.
        super().__init__(place.name(tag), sync_files=place.local)
        streams = Streams(place, tag)
        self.fs, self.written = streams, streams.written  # type: ignore[assignment]


class Streams(FileSystemBase):
    """What DCP wants of a file system. It has the size and SHA-256 of what was written through it in `written`, so that
    nothing need be read back."""

    def __init__(self, place: Place, tag: int) -> None:
        self._place = place
        self._tag = tag
        self.written: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with self._place.open(self._tag, fspath(path), mode) as file:
            if mode == "rb":
                yield file
                return
            hashed = Hashed(file)
            yield hashed  # type: ignore[misc]  # all of IOBase that DCP uses
        self.written[fspath(path)] = hashed.digest()

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        self._place.rename(self._tag, fspath(path), fspath(new_path))
        self.written[fspath(new_path)] = self.written.pop(fspath(path))

    def concat_path(self, path: str | PathLike[str], suffix: str) -> str:
        return suffix

    def init_path(self, path: str | PathLike[str]) -> str:
        return fspath(path)

    def mkdir(self, path: str | PathLike[str]) -> None:
        """`Place.begin` did."""

    def exists(self, path: str | PathLike[str]) -> bool:
        return self._place.exists(self._tag, fspath(path))

    def rm_file(self, path: str | PathLike[str]) -> None:
        raise AssertionError(f"{fspath(path)}: a checkpoint begins with nothing that DCP could want to remove")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True


class Hashed:
    """A file that is written front to back, and hashed on the way."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0

    def digest(self) -> Digest:
        return [self._size, self._sha256.hexdigest()]

    def write(self, data: bytes | memoryview) -> int:
        written = int(self._file.write(data))
        self._sha256.update(data)
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        self.flush()  # DCP asks for it to fsync, without flushing its metadata first
        return int(self._file.fileno())

    def close(self) -> None:
        self._file.close()
