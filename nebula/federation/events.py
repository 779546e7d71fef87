"""What the coordinator's state machine is told (events) and what it asks for (effects)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from nebula.types import Beat, Held, RoundReport

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A cluster opened a session; from its first frame on, those of its older epochs are refused."""

    cluster: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A delta passed every check and lies on disk. `blob`: its hash; `parts`: the sizes of its packets."""

    cluster: str
    fragment: str
    round: int
    weight: float
    blob: str
    parts: tuple[int, ...]
    seconds: float | None
    """Since the round opened; None if that was not witnessed (the coordinator restarted in between)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """Version `version` of a fragment is on disk. `contributors` in merge order. Version 0 has none. `update_bytes` and
    `state_bytes`: what it takes to send the step from the version before, or the whole fragment."""

    fragment: str
    version: int
    digest: str
    contributors: tuple[str, ...] = ()
    blobs: Mapping[str, str] = field(default_factory=dict)
    update_bytes: int = 0
    state_bytes: int = 0
    norm: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A cluster asked for its next round, stating what it holds. Not journaled: it can ask again."""

    cluster: str
    held: Mapping[str, Held]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a cluster says of its last round."""

    cluster: str
    report: RoundReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A cluster lives. Not journaled: it will say so again."""

    cluster: str
    beat: Beat | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """Finish the round that is under way, then stop. Not journaled: a resumed run goes on."""

    reason: str


Event: TypeAlias = Joined | Arrived | Committed | Planned | Reported | Heard | Tick | Stopping

# --- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merge:
    """Average these deltas in this order, step the outer optimizer with its rate times `scale`, answer with
    Committed."""

    fragment: str
    version: int
    arrivals: tuple[Arrived, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """Every fragment of `round` is committed and its contributors have reported (or will not)."""

    round: int
    reports: Mapping[str, RoundReport]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that must not happen did."""

    kind: Literal["digest_mismatch", "ahead_of_coordinator"]
    cluster: str
    detail: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A round waits, longer than is worth a word, for these clusters: what is known of each."""

    round: int
    missing: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class QuorumLost:
    """`max_stall` has passed with too few deltas; the run pauses."""

    round: int
    arrived: tuple[str, ...]


Effect: TypeAlias = Merge | RoundClosed | Alarm | Waiting | QuorumLost
