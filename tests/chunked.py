"""Payloads of a few bytes, in as many chunks as there are in large ones."""

from __future__ import annotations

import hashlib

import pytest

from nebula.checkpoint import ledger
from nebula.federation import hub, uploads
from nebula.runtime import gateway
from nebula.wan.chunks import spans

HOLDERS = (ledger, hub, uploads, gateway)
"""Modules in which CHUNK_BYTES is a name of their own."""

CHUNK = 4
"""Bytes, for tests that cut by hand."""


def cut_into(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, chunks have so many bytes at both ends."""
    for module in HOLDERS:
        monkeypatch.setattr(module, "CHUNK_BYTES", size)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def pieces(payload: bytes, chunk: int = CHUNK) -> list[bytes]:
    return [payload[at : at + length] for at, length in spans(len(payload), chunk)]
