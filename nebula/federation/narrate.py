"""The coordinator's events as the lines of `events.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nebula.federation.events import Committed
from nebula.federation.tally import Tally
from nebula.types import Json, RoundReport

Line = tuple[str, dict[str, Json]]


def round_closed(round: int, reports: Mapping[str, RoundReport], tally: Tally, digest: str) -> Iterator[Line]:
    """An `eval` line if the global model at the start of `round` was evaluated, a `round` line if steps were taken.
    `tally` has counted the round already."""
    tokens = sum(r.tokens for r in reports.values())
    if evaluations := [r.eval for r in reports.values() if r.eval is not None]:
        eval_tokens = sum(e.tokens for e in evaluations)
        yield (
            "eval",
            {
                "round": round,
                "loss": sum(e.loss_sum for e in evaluations) / eval_tokens,
                "tokens_trained": tally.tokens - tokens,
                "eval_tokens": eval_tokens,
            },
        )
    if tokens:
        yield (
            "round",
            {
                "round": round,
                "digest": digest,
                "tokens": tally.tokens,
                "loss": tally.loss[-1][1],
                "clusters": {name: _cluster(r) for name, r in sorted(reports.items()) if r.steps},
            },
        )


def _cluster(r: RoundReport) -> dict[str, Json]:
    return {
        "loss": r.loss,
        "tokens": r.tokens,
        "compute_s": r.compute_s,
        "stall_s": r.stall_s,
        "up_bytes": r.up_bytes,
        "down_bytes": r.down_bytes,
        "retries": r.retries,
        "rtt_s": r.rtt_s,
    }


def committed(commit: Committed, update_bytes: int) -> dict[str, Json]:
    return {
        "round": commit.version - 1,
        "fragment": commit.fragment,
        "version": commit.version,
        "digest": commit.digest,
        "contributors": list(commit.contributors),
        "norm": commit.norm,
        "update_bytes": update_bytes,
        "seconds": commit.seconds,
    }
