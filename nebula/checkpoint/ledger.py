"""Content-addressed blobs: what journals and rows point at. A name is the SHA-256 of what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from nebula import files
from nebula.errors import JournalError


class Ledger:
    """A folder of immutable blobs. A blob exists whole or not at all: written aside, fsynced, renamed, the folder
    fsynced; only then may something refer to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store and return the name. Raises OSError (disk full) with nothing half-written under a name."""
        name = hashlib.sha256(data).hexdigest()
        target = self._folder / name
        if not target.exists():
            files.write(target, data)
            files.sync(self._folder)
        return name

    def get(self, name: str) -> bytes:
        """Raises JournalError if the blob is missing or its content does not match its name."""
        path = self._folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise JournalError(f"blob {name[:12]}… is missing from {self._folder}") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise JournalError(f"blob {path} is corrupt: its content does not match its name")
        return data

    def size(self, name: str) -> int:
        """Bytes."""
        return (self._folder / name).stat().st_size

    def keep(self, names: Collection[str]) -> None:
        """Delete every blob that is not among `names`, and what a crash left half-written."""
        for path in self._folder.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)
