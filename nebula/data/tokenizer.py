"""Byte-level BPE, trained once where a run is submitted; clusters get its JSON and check its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from nebula import files
from nebula.data.corpus import Document, digest
from nebula.errors import UsageError

END = "<|end|>"
"""Between documents; always token 0."""

SMALLEST = 257
"""Every byte, and END."""

SAMPLE = 4 * 1024 * 1024
"""Bytes of text the merges are learned from: enough for small vocabularies, and seconds instead of minutes."""


def train(documents: Sequence[Document], vocab: int) -> str:
    """JSON of a tokenizer with at most `vocab` tokens (fewer where the text has too few pairs worth merging). The
    same documents give the same bytes. Raises UsageError for a `vocab` that cannot hold every byte."""
    if vocab < SMALLEST:
        raise UsageError(
            f"model.vocab {vocab} is too small for a byte-level tokenizer", hint=f"use at least {SMALLEST}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return str(tokenizer.to_str())


def cached(documents: Sequence[Document], vocab: int, cache: Path) -> str:
    """`train`, unless it was done before for this text and vocabulary."""
    key = hashlib.sha256(f"bpe {vocab}\0".encode())
    for text in _sample(documents):
        key.update(text.encode())
    path = cache / f"tokenizer-{key.hexdigest()[:32]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, train(documents, vocab).encode())
    return path.read_text(encoding="utf-8")


def _sample(documents: Sequence[Document]) -> Iterator[str]:
    """Documents by hash of their names, until there is enough."""
    size = 0
    for document in sorted(documents, key=lambda d: digest(d, "sample")):
        if size >= SAMPLE:
            return
        size += document.bytes
        yield document.read()
