"""A cluster's data, as its ranks read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nebula.config import Agreement
from nebula.data.corpus import find, split
from nebula.data.prepare import Prepared, prepare
from nebula.data.sampler import Batches, held_out_windows
from nebula.data.tokens import require, tokenize

__all__ = ["ClusterData", "Prepared", "open_data", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterData:
    """Of the `batch_size` sequences that each inner step takes from `batches`, `share` from `first` on are ours."""

    batches: Batches
    held_out_WT1: Tensor
    batch_size: int
    first: int
    share: int

    def batch(self, step: int, rank: int, world: int) -> Tensor:
        """This rank's contiguous share of the cluster's batch, [share / world, seq_len + 1]. The ranks' shares tile it;
        they are equal where `world` divides it."""
        begin, end = (self.share * r // world for r in (rank, rank + 1))
        return self.batches.windows(step, batch=self.batch_size, first=self.first + begin, count=end - begin)

    def eval(self, index: int, count: int, rank: int, world: int) -> Tensor:
        """This rank's part of held-out windows `index`, `index + count`, …; maybe none."""
        return self.held_out_WT1[index::count][rank::world]


def open_data(agreement: Agreement, cluster: str, tokenizer: str, cache: Path) -> ClusterData:
    """Find, tokenise (once per machine, kept in `cache`) and map the data of `cluster`. `tokenizer`: its JSON.

    In partition "batch" all clusters read one sequence, and the global batch is the members' batches end to end in
    sorted order; in "documents" each has its own. Raises UsageError where the data cannot serve this cluster."""
    run, cfg = agreement.run, agreement.run.data
    parts = split(find(cfg), cfg, sorted(agreement.members))
    tokens = tokenize(parts.train[cluster], tokenizer, cache)
    held_out = tokenize(parts.held_out, tokenizer, cache)
    require(tokens, cfg.seq_len, f"the training set of cluster {cluster}")
    require(held_out, cfg.seq_len, "the held-out set")
    batches = {name: member.batch for name, member in sorted(agreement.members.items())}
    shared = cfg.partition == "batch"
    return ClusterData(
        batches=Batches(tokens, cfg.seq_len, _seed(run.seed, "" if shared else cluster)),
        held_out_WT1=held_out_windows(held_out, cfg.seq_len, cfg.eval_windows),
        batch_size=sum(batches.values()) if shared else batches[cluster],
        first=sum(size for name, size in batches.items() if name < cluster) if shared else 0,
        share=batches[cluster],
    )


def _seed(seed: int, cluster: str) -> int:
    return int.from_bytes(hashlib.sha256(f"data {seed}/{cluster}".encode()).digest()[:8], "little")
