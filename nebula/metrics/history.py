"""A run so far, folded from the coordinator's events: what the live display and the report both show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nebula.metrics.events import Event
from nebula.metrics.flops import data_parallel_bytes


@dataclass(slots=True)
class Share:
    """One cluster's part in one round, or in all of them. Bytes are of this span, not counters."""

    tokens: int = 0
    compute_s: float = 0.0
    stall_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0

    def add(self, other: Share) -> None:
        self.tokens += other.tokens
        self.compute_s += other.compute_s
        self.stall_s += other.stall_s
        self.up_bytes += other.up_bytes
        self.down_bytes += other.down_bytes

    @property
    def wan_bytes(self) -> int:
        return self.up_bytes + self.down_bytes

    @property
    def stall_share(self) -> float | None:
        busy = self.compute_s + self.stall_s
        return self.stall_s / busy if busy else None


@dataclass(frozen=True, slots=True)
class Round:
    """`seconds` of running and `wan_bytes` of all clusters, both since the run started; `tokens` too."""

    round: int
    seconds: float
    tokens: int
    wan_bytes: int
    loss: float | None
    digest: str
    clusters: Mapping[str, Share]


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation of the global model, placed on the same three axes."""

    round: int
    seconds: float
    tokens: int
    wan_bytes: int
    loss: float | None


@dataclass(slots=True)
class History:
    """`seconds`: time the run has been running, without the pauses between a stop and its resumption."""

    started: Event = field(default_factory=dict)
    state: str = "unfinished"
    seconds: float = 0.0
    rounds: dict[int, Round] = field(default_factory=dict)
    evals: dict[int, Point] = field(default_factory=dict)
    totals: dict[str, Share] = field(default_factory=dict)
    delta_bytes: dict[str, int] = field(default_factory=dict)
    deltas: dict[str, int] = field(default_factory=dict)
    _last: float | None = None
    _counters: dict[str, tuple[int, int]] = field(default_factory=dict)

    def fold(self, event: Event) -> None:
        """Take in one event; kinds that say nothing about progress only move the clock."""
        kind = event["event"]
        if self._last is not None and kind != "run_started":
            self.seconds += max(event["t"] - self._last, 0.0)
        self._last = event["t"]
        match kind:
            case "run_started":
                self.started, self.state = event, "unfinished"
            case "delta":
                name = event["cluster"]
                self.delta_bytes[name] = self.delta_bytes.get(name, 0) + event["bytes"]
                self.deltas[name] = self.deltas.get(name, 0) + 1
            case "round":
                self._round(event)
            case "eval":
                self._eval(event)
            case "run_ended":
                self.state = event["state"]

    def _eval(self, event: Event) -> None:
        """It is told at the end of a round, but belongs to the model at its start: where the last round ended."""
        seconds = max((r.seconds for r in self.rounds.values()), default=0.0)
        number = event["round"]
        self.evals[number] = Point(number, seconds, event["tokens_trained"], self.wan_bytes, event["loss"])

    def _round(self, event: Event) -> None:
        shares = {name: self._share(name, reported) for name, reported in event["clusters"].items()}
        for name, share in shares.items():
            self.totals.setdefault(name, Share()).add(share)
        number = event["round"]
        self.rounds[number] = Round(
            number, self.seconds, event["tokens"], self.wan_bytes, event["loss"], event["digest"], shares
        )

    def _share(self, name: str, reported: Mapping[str, Any]) -> Share:
        """Byte counters count from the agent's start; one that fell belongs to a new agent."""
        now = (int(reported["up_bytes"]), int(reported["down_bytes"]))
        before = self._counters.get(name, (0, 0))
        if now[0] < before[0] or now[1] < before[1]:
            before = (0, 0)
        self._counters[name] = now
        up, down = now[0] - before[0], now[1] - before[1]
        return Share(reported["tokens"], reported["compute_s"], reported["stall_s"], up, down)

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def wan_bytes(self) -> int:
        return sum(total.wan_bytes for total in self.totals.values())

    @property
    def tokens(self) -> int:
        return max((r.tokens for r in self.rounds.values()), default=0)

    @property
    def data_parallel_bytes(self) -> int:
        """What the rounds done so far would have sent as per-step data parallelism in bf16."""
        steps = sum(len(r.clusters) for r in self.rounds.values()) * self.started.get("inner_steps", 0)
        return data_parallel_bytes(self.started.get("params", 0), steps, 1)

    def compression(self, cluster: str) -> float | None:
        """fp32 deltas over the payload sent in their place. Every fragment goes up once a round, so that on average a
        delta stands for params / fragments values."""
        sent = self.delta_bytes.get(cluster, 0)
        if not sent or not self.started:
            return None
        params, fragments = int(self.started["params"]), int(self.started["fragments"])
        return 4 * params / fragments * self.deltas[cluster] / sent

    @property
    def stall_share(self) -> float | None:
        everyone = Share()
        for total in self.totals.values():
            everyone.add(total)
        return everyone.stall_share
