"""Content-addressed blobs: what journals and rows point at. A name is the SHA-256 of what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Lock

from nebula.checkpoint.store import Store
from nebula.errors import JournalError
from nebula.wan.chunks import CHUNK_BYTES, spans


class Ledger:
    """Immutable blobs in a store. Something may refer to a blob once `put` has returned."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._durable: set[str] = set()  # what this process put: a blob merely found may not have reached the disk
        self._kept: set[str] = set()  # what an earlier process put
        self._chunks: dict[str, tuple[bytes, ...]] = {}
        self._places: dict[str, dict[bytes, int]] = {}
        self._hashing = Lock()
        self.lent: Collection[str] = ()
        """Blobs that stay although `keep` does not name them."""

    def put(self, data: bytes) -> str:
        """Store and return the name. Raises OSError (disk full) with nothing half-written under a name."""
        name = hashlib.sha256(data).hexdigest()
        if name not in self._durable:
            self._store.put(name, data)
            self._durable.add(name)
        return name

    def get(self, name: str) -> bytes:
        """Raises JournalError if the blob is missing, unreadable or not what its name says, ConnectionError if its
        place cannot be reached."""
        with self._present(name):
            data = self._store.get(name)
        if hashlib.sha256(data).hexdigest() != name:
            raise self._corrupt(name)
        return data

    def chunks(self, name: str) -> tuple[bytes, ...]:
        """SHA-256 of every chunk, in order, of a blob that need not fit into memory. Raises as `get`."""
        with self._hashing:  # whoever asks for the same meanwhile waits for the result
            known = self._chunks.get(name)
            if known is None:
                known = self._chunks[name] = self._hashed(name)
                self._places[name] = {chunk: index for index, chunk in reversed(list(enumerate(known)))}
            return known

    def chunk(self, name: str, sha256: bytes) -> bytes:
        """One of `chunks`. Raises KeyError if there is no such one, and as `get`."""
        self.chunks(name)
        index = self._places[name][sha256]
        with self._present(name):
            data = self._store.read(name, index * CHUNK_BYTES, CHUNK_BYTES)
        if hashlib.sha256(data).digest() != sha256:
            raise self._corrupt(name)
        return data

    def size(self, name: str) -> int:
        """Bytes. Raises as `get`."""
        with self._present(name):
            return self._store.size(name)

    def begin(self, live: Collection[str]) -> None:
        """Delete whatever an earlier process has left that is not among `live`, whole or half-written."""
        for name in sorted(set(self._store.names()).difference(live)):
            self._store.delete(name)
        self._store.sweep()
        self._kept = set(live)

    def keep(self, live: Collection[str]) -> None:
        """Delete what is no longer among `live`, nor lent, of what this process knows: a later coordinator, which has
        taken over without its knowledge, may have put more."""
        live = {*live, *self.lent}
        known = self._kept | self._durable
        for name in sorted(known.difference(live)):
            self._store.delete(name)
        self._durable.intersection_update(live)
        self._kept.intersection_update(live)
        for name in self._chunks.keys() - live:
            self._chunks.pop(name, None)
            self._places.pop(name, None)

    def _hashed(self, name: str) -> tuple[bytes, ...]:
        whole, chunks = hashlib.sha256(), []
        with self._present(name):
            for at, length in spans(self._store.size(name), CHUNK_BYTES):
                data = self._store.read(name, at, length)
                whole.update(data)
                chunks.append(hashlib.sha256(data).digest())
        if whole.hexdigest() != name:
            raise self._corrupt(name)
        return tuple(chunks)

    @contextmanager
    def _present(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise JournalError(f"blob {name[:12]}… is missing from {self._store}") from None
        except ConnectionError:  # says nothing about the blob
            raise
        except OSError as error:
            raise JournalError(f"blob {name[:12]}… in {self._store} cannot be read: {error}") from error

    def _corrupt(self, name: str) -> JournalError:
        return JournalError(f"blob {name} in {self._store} is corrupt: its content does not match its name")
