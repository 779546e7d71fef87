"""What the coordinator's state machine knows: the rules of a run, its fragments, and who takes part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nebula.federation.events import Arrived, Committed, Merge
from nebula.federation.membership import Progress, Pulse
from nebula.types import RoundReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change during a run. `members` are sorted, which is the order of sums, and map to the tokens of one
    of their inner steps. `hold` and `power`: config.Membership's global_batch, and outer_lr as the exponent of the
    share of tokens."""

    members: Mapping[str, int]
    fragments: tuple[str, ...]
    rounds: int
    inner_steps: int
    evaluate_every: int
    quorum: int
    max_stall: float
    hold: bool = False
    power: float = 0.0

    def steps(self, clusters: Iterable[str]) -> int:
        """Inner steps of a round in which these clusters are known to take part: if the global batch is held, as many
        as it takes them to train the tokens that all members would."""
        present = sum(self.members[c] for c in clusters)
        if not self.hold or not present:
            return self.inner_steps
        return round(self.inner_steps * sum(self.members.values()) / present)

    def scale(self, tokens: float) -> float:
        """The factor of the outer rate in a round with so many tokens."""
        nominal = self.inner_steps * sum(self.members.values())
        return math.pow(min(tokens / nominal, 1.0), self.power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    chain: tuple[Committed, ...] = ()
    """The newest commit, last, and those before it whose updates are kept for clusters that are behind."""
    merged: Merge | None = None
    """What the newest commit was made of: with the state before it, a second way to have it."""
    arrived: Mapping[str, Arrived] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    """Monotonic times of `arrived`."""
    merging: bool = False

    @property
    def commit(self) -> Committed | None:
        return self.chain[-1] if self.chain else None

    @property
    def version(self) -> int:
        return self.commit.version if self.commit else -1

    @property
    def digest(self) -> str:
        return self.commit.digest if self.commit else ""

    @property
    def contributors(self) -> tuple[str, ...]:
        return self.commit.contributors if self.commit else ()


@dataclass(frozen=True, slots=True)
class Span:
    """The inner steps of a round: how many rounds before it took, and how many it takes."""

    position: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    rules: Rules
    fragments: Mapping[str, Fragment]
    epochs: Mapping[str, int] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    """Clusters that asked for a plan of the current round."""
    contributed: frozenset[str] = frozenset()
    """Clusters that are part of the previous round."""
    left: frozenset[str] = frozenset()
    """Clusters that said they leave."""
    spans: tuple[Span, Span]
    """Of the previous round and of the current one."""
    opened: float = 0.0
    witnessed: bool = False
    """Whether this process saw the current round open."""
    ticked: float | None = None
    """When time was last seen to pass."""
    pulses: Mapping[str, Pulse] = field(default_factory=dict)
    progress: Mapping[str, Progress] = field(default_factory=dict)
    """How each cluster gets on, as its beats tell."""
    said: frozenset[str] = frozenset()
    """For whom the current round was last said to wait."""
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Opening → arrival by cluster, seconds, recent rounds."""
    reports: Mapping[int, Mapping[str, RoundReport]] = field(default_factory=dict)
    reported: Mapping[str, int] = field(default_factory=dict)
    """The last round that each cluster has reported."""
    closed: int = 0
    """Rounds below this one have been closed."""
    stop_at: int | None = None
    stop_reason: str = ""
    gone: frozenset[str] = frozenset()
    """Clusters that were told to stop, or that the run is done."""
    leaving_since: float | None = None
    """When the first of them was told, or could have been in an earlier process."""

    @property
    def round(self) -> int:
        return min(fragment.version for fragment in self.fragments.values())

    @property
    def finished(self) -> bool:
        return self.round >= self.rules.rounds

    def expected(self) -> frozenset[str]:
        """Whom the current round waits for: whoever takes part in it or took part in the last one; at first, all. Not
        for those that have left."""
        return (self.present | (self.contributed if self.round > 0 else frozenset(self.rules.members))) - self.left

    def span(self, round: int) -> Span:
        """Of the current round or the one before."""
        return self.spans[1 if round >= self.round else 0]


def initial(rules: Rules) -> State:
    first = Span(0, rules.inner_steps)
    return State(rules=rules, fragments={name: Fragment() for name in rules.fragments}, spans=(first, first))
