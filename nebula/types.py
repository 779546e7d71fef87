"""The values that travel between layers, and the Protocols at the seams. Imports neither torch nor ray.

Shape suffixes used in model code: B batch, T sequence, D model width, H heads, F expert width, E experts, K top-k,
N tokens (B·T flattened), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from nebula.proto.v1.packet_pb2 import Frame

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None

COORDINATOR = "coordinator"
"""Reserved: no cluster may have this name."""

ROLE = "model"
"""The role of a plain run, which has only one."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a global tensor: where one rank's part lies, whatever the layout. Elements, not bytes."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one cluster learned in one round: base − local, fp32, as slices that tile the fragment exactly."""

    cluster: str
    role: str
    round: int
    fragment: str
    base: int
    weight: float
    tensors: Mapping[Slice, Tensor]


@dataclass(frozen=True, slots=True)
class Packet:
    """A delta in codec space. `arrays` are CPU or device tensors; `trail` tells each codec how to undo its step,
    oldest first. Decoding needs nothing but the packet."""

    arrays: Mapping[str, Tensor]
    trail: tuple[Mapping[str, Json], ...] = ()


class Codec(Protocol):
    """One reversible (up to its error) step. `encode` appends one entry to the trail, `decode` removes it."""

    def encode(self, packet: Packet) -> Packet: ...
    def decode(self, packet: Packet) -> Packet: ...


class Channel(Protocol):
    """One direction of one session. `context` says what the message is; both sides must name the same."""

    def seal(self, message: bytes | memoryview, *, context: bytes) -> Iterator[Frame]: ...
    def open(self, frames: Iterable[Frame], *, context: bytes, limit: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Inner steps `first` … `first + count` − 1 of the `total` of `round`. `position`: inner steps of all rounds before
    it, which is where the round's data begins."""

    round: int
    position: int
    first: int
    count: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One cluster's inner steps: `loss` is the token mean over them (nats), `tokens` summed over its ranks."""

    steps: int
    tokens: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Sum of token losses (nats) over part of the held-out set; sums add up over ranks and clusters."""

    loss_sum: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReport:
    """What one rank holds after its start. `held`: version by fragment; `lanes`: this rank's parts of each fragment's
    digest, by parameter; `parameters`: of the whole model."""

    held: Mapping[str, int]
    lanes: Mapping[str, Mapping[str, tuple[int, int]]]
    parameters: int
    device: str


@dataclass(frozen=True, slots=True)
class Held:
    """The version of a fragment that a cluster holds, and the digest of its parameters."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What a cluster does next. `fragments` maps each fragment due to the version its delta is measured against
    (for `catch_up`: the version to reach). `position`: inner steps of all rounds before. `eval_count` 0 means no
    evaluation."""

    action: Literal["train", "catch_up", "stop", "done"]
    round: int = 0
    inner_steps: int = 0
    position: int = 0
    fragments: Mapping[str, int] = field(default_factory=dict)
    eval_index: int = 0
    eval_count: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What a cluster tells the coordinator with its next plan request. Bytes and retries count from the start of a
    gateway's process, of which there may be several in turn: `life` tells them apart. `eval` belongs to the global
    model at the start of `round`."""

    round: int
    steps: int
    tokens: int
    loss: float
    compute_s: float
    stall_s: float
    up_bytes: int = 0
    down_bytes: int = 0
    payload_up_bytes: int = 0
    payload_down_bytes: int = 0
    retries: int = 0
    rtt_s: float = 0.0
    life: int = 0
    eval: Evaluation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life: `step` of the `steps` of `round` are done. `leaving`: the cluster leaves; do not wait for it."""

    round: int = 0
    step: int = 0
    steps: int = 0
    leaving: bool = False


Packets: TypeAlias = Sequence[Any]
"""One encoded packet per rank: bytes, or references to bytes that only the receiving actor resolves."""

Payload: TypeAlias = Any
"""Bytes on their way to the ranks, or a reference to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTicket:
    """Names one delta: (role, fragment, round, cluster) is its identity, whatever session carries it."""

    role: str
    fragment: str
    round: int
    base: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """`status` "ready" comes with a payload; "ended" means the run stops before the version exists."""

    status: Literal["ready", "gone", "ended"]
    version: int = 0
    digest: str = ""
    contributors: tuple[str, ...] = ()


class Transport(Protocol):
    """The agent's view of the coordinator. Every call is idempotent and retried until `max_stall` has passed, then
    raises UnreachableError."""

    def join(self) -> tuple[bytes, bytes]:
        """Open a session. Returns (agreement JSON, tokenizer JSON). Raises AuthError, UnreachableError."""
        ...

    def plan(self, held: Mapping[str, Held], report: RoundReport | None) -> RoundPlan: ...
    def beat(self, beat: Beat) -> None:
        """Tell that this cluster lives. Tried once: the next one comes soon."""
        ...

    def push(self, ticket: PushTicket, packets: Packets) -> Literal["accepted", "duplicate", "late"]: ...
    def pull(self, kind: Literal["update", "state"], fragment: str, version: int) -> tuple[Pulled, Payload]: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """A cluster's ranks as one object. Every method raises RankFailure when a rank dies; `start` may then be called
    again."""

    def start(self) -> dict[str, Held]:
        """Build the model on every rank and restore the newest local checkpoint. Returns what the cluster holds."""
        ...

    def train(self, steps: Steps) -> Report: ...

    def pull(self, fragment: str) -> Packets:
        """Encode base − local where it lies, one packet per rank. Calling it again gives the same packets."""
        ...

    def push(self, fragment: str, kind: Literal["update", "state"], payload: Payload, *, merged: bool) -> str:
        """Apply an update to (or replace) the global parameters and reset the local ones to them. `merged`: this
        cluster's packets are part of it; if they are not at hand any more, neither is what they left out, and the
        residual begins anew. Returns the digest of the fragment."""
        ...

    def evaluate(self, index: int, count: int) -> Evaluation: ...
    def save(self, tag: int, held: Mapping[str, Held]) -> None:
        """Write everything a resumed cluster needs, atomically, under the number of the next round."""
        ...

    def stop(self) -> None: ...
