"""What a recipe and a cluster file resolve to."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field

from nebula.config.base import Config, Name, Positive
from nebula.config.federation import Federation
from nebula.config.run import Run


class Member(Config):
    """What the coordinator must know of a cluster. `batch`: sequences per inner step over all its ranks."""

    ranks: Positive
    batch: Positive


class Agreement(Config):
    """A recipe resolved against a cluster file. `members` are in sorted order, the order in which sums run. `id` is
    drawn at random for each run: two runs of one recipe share no session, no journal and no place in a bucket.
    `tokenizer`: SHA-256 of the tokenizer's JSON; `unigram_entropy`: of the held-out tokens, nats."""

    schema_: Literal[1] = Field(1, alias="schema")
    id: str = ""
    run: Run
    members: dict[Name, Member]
    tokenizer: str
    unigram_entropy: float

    def canonical(self) -> bytes:
        """One byte string per meaning: sorted keys, no spaces, UTF-8."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, canonical: bytes) -> Agreement:
        return cls.model_validate_json(canonical)

    def tokens_per_step(self, cluster: str) -> int:
        """What a cluster trains in one inner step; times the steps of a round, the bound on its weight."""
        return self.members[cluster].batch * self.run.data.seq_len

    def tokens_per_round(self, cluster: str) -> int:
        """What a cluster trains in a round in which nobody is missing."""
        return self.run.inner_steps * self.tokens_per_step(cluster)


def agree(run: Run, federation: Federation, *, tokenizer: str, unigram_entropy: float, id: str = "") -> Agreement:
    """Resolve a recipe against a cluster file. Raises ValueError where they do not fit together."""
    if run.membership.quorum > len(federation.clusters):
        raise ValueError(f"membership.quorum {run.membership.quorum} exceeds the {len(federation.clusters)} clusters")
    members = {
        name: Member(ranks=c.ranks, batch=c.batch if c.batch is not None else run.batch * c.ranks)
        for name, c in sorted(federation.clusters.items())
    }
    return Agreement(schema=1, id=id, run=run, members=members, tokenizer=tokenizer, unigram_entropy=unigram_entropy)
