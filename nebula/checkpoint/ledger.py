"""Content-addressed blobs: what journals and rows point at. A name is the SHA-256 of what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from nebula.checkpoint.store import Store
from nebula.errors import JournalError


class Ledger:
    """Immutable blobs in a store. Something may refer to a blob once `put` has returned."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._durable: set[str] = set()  # what this process put: a blob merely found may not have reached the disk
        self._kept: set[str] = set()  # what an earlier process put

    def put(self, data: bytes) -> str:
        """Store and return the name. Raises OSError (disk full) with nothing half-written under a name."""
        name = hashlib.sha256(data).hexdigest()
        if name not in self._durable:
            self._store.put(name, data)
            self._durable.add(name)
        return name

    def get(self, name: str) -> bytes:
        """Raises JournalError if the blob is missing or its content does not match its name."""
        try:
            data = self._store.get(name)
        except FileNotFoundError:
            raise JournalError(f"blob {name[:12]}… is missing from {self._store}") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise JournalError(f"blob {name} in {self._store} is corrupt: its content does not match its name")
        return data

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        return self._store.size(name)

    def begin(self, live: Collection[str]) -> None:
        """Delete whatever an earlier process has left that is not among `live`, whole or half-written."""
        for name in sorted(set(self._store.names()).difference(live)):
            self._store.delete(name)
        self._store.sweep()
        self._kept = set(live)

    def keep(self, live: Collection[str]) -> None:
        """Delete what is no longer among `live`, of what this process knows: a later coordinator, which has taken over
        without its knowledge, may have put more."""
        known = self._kept | self._durable
        for name in sorted(known.difference(live)):
            self._store.delete(name)
        self._durable.intersection_update(live)
        self._kept.intersection_update(live)
