"""Where a cluster's checkpoints lie: a folder that all its ranks see, or a place in an object store."""

from __future__ import annotations

import hashlib
import io
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeAlias

from fsspec.implementations.local import LocalFileSystem

from nebula import files
from nebula.checkpoint.bucket import connect, entries, explained, is_object_store, open_store, shown

NOTE = "state.json"

Digest: TypeAlias = list[int | str]
"""Size and SHA-256 of a file; −1 and the reason where it cannot be read."""


class Place:
    """Checkpoints by tag, each a folder of files. One with a note is whole: the note is written last and removed first,
    so that nothing that matters is ever renamed. `local`: it is on a disk, where what is written needs an fsync.

    Raises OSError where a disk fails, ConnectionError where an object store does."""

    def __init__(self, where: str | Path) -> None:
        self._where = str(where).rstrip("/")
        self._fs, self._root = connect(where)
        self.local = isinstance(self._fs, LocalFileSystem)

    def name(self, tag: int) -> str:
        """What people are told."""
        return f"{shown(self._where)}/{tag}"

    def tags(self) -> list[int]:
        """Of all checkpoints, whole or not, newest first."""
        names = entries(self._fs, self._root, shown(self._where))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def exists(self, tag: int, name: str) -> bool:
        # Not by fsspec's own exists(), which takes an error for a no.
        return name in entries(self._fs, self._path(tag), shown(self._where))

    def open(self, tag: int, name: str, mode: str) -> Any:
        """A binary file; what is written to an object store appears when it is closed."""
        return self._fs.open(self._path(tag, name), mode)

    def rename(self, tag: int, name: str, to: str) -> None:
        self._fs.mv(self._path(tag, name), self._path(tag, to))

    def note(self, tag: int) -> bytes:
        """Raises FileNotFoundError if the checkpoint is not whole."""
        with self._explained():
            return bytes(self._fs.cat_file(self._path(tag, NOTE)))

    def size(self, tag: int) -> int:
        """Bytes of all files together."""
        with self._explained():
            return int(self._fs.du(self._path(tag)))

    def digest(self, tag: int, name: str) -> Digest:
        try:
            with self._explained(), self.open(tag, name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return [file.seek(0, io.SEEK_END), digest]
        except ConnectionError:  # says nothing about the file
            raise
        except OSError as error:
            return [-1, str(error)]

    def begin(self, tag: int) -> None:
        """Make room for a checkpoint, and sweep up what crashes left of others."""
        for old in self.tags():
            if old == tag or not self.exists(old, NOTE):
                self._remove(old)
        if self.local:
            files.make(Path(self._path(tag)))
        elif not is_object_store(self._fs):
            with self._explained():
                self._fs.makedirs(self._path(tag), exist_ok=True)

    def commit(self, tag: int, note: bytes, keep: int) -> None:
        """Make a checkpoint whole and durable, then drop all but it and the newest of those before it, `keep` in all.
        Later ones, if there are any, were passed over as damaged."""
        if self.local:
            files.sync(Path(self._path(tag)))
        open_store(f"{self._where}/{tag}").put(NOTE, note)
        tags = self.tags()
        kept = [old for old in tags if old <= tag][:keep]
        for old in tags:
            if old not in kept:
                self._remove(old)

    def _remove(self, tag: int) -> None:
        for path, recursive in ((self._path(tag, NOTE), False), (self._path(tag), True)):
            with suppress(FileNotFoundError), self._explained():
                self._fs.rm(path, recursive=recursive)

    def _path(self, tag: int, *name: str) -> str:
        return "/".join((self._root, str(tag), *name))

    def _explained(self) -> AbstractContextManager[None]:
        return nullcontext() if self.local else explained(shown(self._where))
