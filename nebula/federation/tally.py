"""What a run adds up to: the figures of `summary.json`, folded from the same events the journal keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nebula.types import Json, RoundReport


@dataclass(slots=True)
class ClusterTally:
    """Totals over every agent process a cluster has had. Byte counters restart with the process, so the totals of
    finished processes are carried."""

    inner_steps: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    stall_s: float = 0.0
    joins: int = 0
    rounds: int = 0
    life: int = 0
    carried: dict[str, int] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)

    def joined(self) -> None:
        self.joins += 1

    def reported(self, report: RoundReport) -> None:
        self.inner_steps += report.steps
        self.tokens += report.tokens
        self.compute_s += report.compute_s
        self.stall_s += report.stall_s
        self.rounds += report.steps > 0
        now = {
            "up": report.up_bytes,
            "down": report.down_bytes,
            "payload_up": report.payload_up_bytes,
            "payload_down": report.payload_down_bytes,
            "retries": report.retries,
        }
        if report.life != self.life:  # a new process counts from zero
            self.life = report.life
            self.carried = {key: self.carried.get(key, 0) + self.latest.get(key, 0) for key in now}
        self.latest = now

    def total(self, key: str) -> int:
        return self.carried.get(key, 0) + self.latest.get(key, 0)


@dataclass(slots=True)
class Tally:
    """`loss`: [tokens trained so far by all clusters, their token-weighted mean loss] per round."""

    params: int
    clusters: dict[str, ClusterTally] = field(default_factory=dict)
    rounds: int = 0
    tokens: int = 0
    loss: list[tuple[int, float]] = field(default_factory=list)
    eval_loss: float | None = None
    rejected: dict[str, int] = field(default_factory=dict)

    def of(self, cluster: str) -> ClusterTally:
        return self.clusters.setdefault(cluster, ClusterTally())

    def round_closed(self, reports: Mapping[str, RoundReport]) -> None:
        tokens = sum(r.tokens for r in reports.values())
        if tokens:
            self.rounds += 1
            self.tokens += tokens
            self.loss.append((self.tokens, sum(r.loss * r.tokens for r in reports.values()) / tokens))
        evaluations = [r.eval for r in reports.values() if r.eval is not None]
        if evaluations:
            self.eval_loss = sum(e.loss_sum for e in evaluations) / sum(e.tokens for e in evaluations)

    def summary(self, *, run: str, state: str, global_digest: str) -> dict[str, Json]:
        return {
            "schema": 1,
            "run": run,
            "state": state,
            "params": self.params,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "loss": [list(point) for point in self.loss],
            "final_loss": self.loss[-1][1] if self.loss else None,
            "eval_loss": self.eval_loss,
            "global_digest": global_digest,
            "rejected": dict(self.rejected),
            "clusters": {name: self._cluster(tally) for name, tally in sorted(self.clusters.items())},
        }

    def _cluster(self, tally: ClusterTally) -> dict[str, Json]:
        up, down = tally.total("up"), tally.total("down")
        per_round = 8 / (self.params * tally.rounds) if tally.rounds else 0.0
        payload = tally.total("payload_up") + tally.total("payload_down")
        return {
            "inner_steps": tally.inner_steps,
            "tokens": tally.tokens,
            "compute_s": round(tally.compute_s, 3),
            "stall_s": round(tally.stall_s, 3),
            "rejoins": max(tally.joins - 1, 0),
            "wan": {
                "up_bytes": up,
                "down_bytes": down,
                "up_bits_per_param_per_round": up * per_round,
                "down_bits_per_param_per_round": down * per_round,
                "goodput_share": payload / (up + down) if up + down else 0.0,
                "retries": tally.total("retries"),
            },
        }
