"""What a run must know of its data before it starts; done once, where it is submitted. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nebula.config import Data
from nebula.data.corpus import find, split
from nebula.data.tokenizer import cached
from nebula.data.tokens import Tokens, require, tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """`tokenizer`: its JSON. `unigram_entropy`: of the held-out tokens, nats: the loss of a model that knows token
    frequencies and nothing else. `train_tokens`: distinct ones of all members together, estimated from the bytes per
    token of the held-out set, which are exact."""

    tokenizer: str
    unigram_entropy: float
    held_out_tokens: int
    train_tokens: int


def prepare(cfg: Data, vocab: int, members: Sequence[str], cache: Path) -> Prepared:
    """Raises UsageError where the data cannot serve these members."""
    parts = split(find(cfg), cfg, members)
    train = {document for documents in parts.train.values() for document in documents}
    # Not from held-out text, which would flatter the held-out loss.
    tokenizer = cached(sorted(train, key=lambda d: (d.name, d.start)), vocab, cache)
    held_out = tokenize(parts.held_out, tokenizer, cache)
    require(held_out, cfg.seq_len, "the held-out set")
    density = len(held_out) / sum(document.bytes for document in parts.held_out)
    return Prepared(
        tokenizer=tokenizer,
        unigram_entropy=unigram_entropy(held_out),
        held_out_tokens=len(held_out),
        train_tokens=round(density * sum(document.bytes for document in train)),
    )


def unigram_entropy(tokens: Tokens) -> float:
    """−Σ p ln p over token frequencies, nats."""
    counts = np.bincount(tokens)
    share = counts[counts > 0] / len(tokens)
    return float(-(share * np.log(share)).sum())
