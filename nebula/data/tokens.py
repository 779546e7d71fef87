"""Documents as one long array of tokens, on disk, built once per machine and mapped into every rank that wants it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog
from tokenizers import Tokenizer

from nebula import files
from nebula.data.corpus import Document
from nebula.data.tokenizer import END
from nebula.errors import UsageError

Tokens: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_HEADER = struct.Struct("<8sQ")
_MAGIC = b"nebulat1"
_GROUP = 4 * 1024 * 1024

log = structlog.get_logger(__name__)


def tokenize(documents: Sequence[Document], tokenizer_json: str, cache: Path) -> Tokens:
    """A read-only map of all documents' tokens, each document followed by END; uint16, or uint32 where the
    vocabulary needs it. Kept in `cache` under a hash of tokenizer and text; a damaged file there is built again, with
    a warning."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # A document that spells END out has not ended.
    tokenizer.encode_special_tokens = True
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")
    path = cache / f"tokens-{_key(documents, tokenizer_json)}.bin"
    with files.lock(path.with_suffix(".lock")):
        if path.exists() and (tokens := _open(path, dtype)) is not None:
            return tokens
        files.write_all(path, _file(documents, tokenizer, dtype))
    tokens = _open(path, dtype)
    assert tokens is not None, "a file just written has its own header"
    return tokens


def require(tokens: Tokens, seq_len: int, what: str) -> None:
    """Raises UsageError if `tokens` are fewer than one window of `seq_len` inputs and their targets."""
    if len(tokens) <= seq_len:
        raise UsageError(
            f"{what} has {len(tokens)} tokens; one window of data.seq_len {seq_len} needs {seq_len + 1}",
            hint="add text, shorten data.seq_len, or raise data.held_out if it is the held-out set that is short",
        )


def _key(documents: Sequence[Document], tokenizer_json: str) -> str:
    key = hashlib.sha256(hashlib.sha256(tokenizer_json.encode()).digest())
    for document in documents:
        key.update(hashlib.sha256(document.read().encode()).digest())
    return key.hexdigest()[:32]


def _open(path: Path, dtype: np.dtype[Any]) -> Tokens | None:
    """The tokens, or None if the file is not what its header says."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) == _HEADER.size:
        magic, count = _HEADER.unpack(head)
        if magic == _MAGIC and path.stat().st_size == _HEADER.size + count * dtype.itemsize:
            return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size, shape=(count,))
    log.warning("token cache is damaged and is built again", file=path.name)
    return None


def _file(documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Iterator[bytes]:
    parts = [part for group in _groups(documents) for part in _encode(group, tokenizer, dtype)]
    yield _HEADER.pack(_MAGIC, sum(part.size for part in parts))
    yield from (part.tobytes() for part in parts)


def _encode(group: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    end = np.array([tokenizer.token_to_id(END)], dtype)
    for encoding in tokenizer.encode_batch_fast([document.read() for document in group]):
        yield np.array(encoding.ids, dtype)
        yield end


def _groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Enough text at a time to keep all cores busy, not all of it at once."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += document.bytes
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
