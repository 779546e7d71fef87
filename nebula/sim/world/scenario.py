"""What a seed stands for: a small run, the clusters in it, and everything that goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, TypeAlias

from nebula.config import Adaptive, Blockwise, Codec, Data, Membership, Model, Nesterov, OuterSGD, Run, Wan, Zstd
from nebula.types import COORDINATOR

Kind: TypeAlias = Literal[
    "weather",
    "partition",
    "kill",
    "power",
    "cut",
    "freeze",
    "full",
    "rot",
    "rank",
    "slow",
    "wipe",
    "leave",
    "usurp",
    "stop",
]

NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel", "juniper", "larch", "maple", "oak", "pine", "rowan")

MODEL = Model(
    vocab=16, layers=2, dim=8, heads=1, kv_heads=1, ffn_dim=8, experts=2, top_k=1, dense_layers=1, aux_loss=0.0
)
"""As small as a model may be: what is on trial is everything around it."""

CODECS = (
    Codec(steps=(Blockwise(bits=4, block=32), Zstd())),
    Codec(steps=(Adaptive(bits=3.0),), feedback=0.9),
    Codec(steps=(), feedback=None),
)


MOST_FAULTS = (2, 6, 14)
"""The mood of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`target`: a cluster, or the coordinator. `seconds`: how long it lasts, where it lasts. `amount`: 0 … 1, how bad
    it is, or which of several forms it takes."""

    at: float
    kind: Kind
    target: str
    seconds: float
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`pace`: seconds per inner step by cluster. From `calm` on nothing more goes wrong, and the run has to end."""

    seed: int
    run: Run
    pace: dict[str, float]
    faults: tuple[Fault, ...]
    calm: float = field(default=0.0)

    @property
    def clusters(self) -> tuple[str, ...]:
        return tuple(sorted(self.pace))


def draw(seed: int, most: int) -> Scenario:
    """Of 2 … `most` clusters."""
    rng = Random(f"scenario {seed}")
    clusters = NAMES[: rng.randint(2, max(most, 2))]
    run = _run(rng, len(clusters))
    pace = {name: rng.uniform(0.3, 1.2) for name in clusters}
    length = run.rounds * (run.inner_steps * max(pace.values()) + 1.0)
    faults = sorted((_fault(rng, clusters, length) for _ in range(rng.randint(1, rng.choice(MOST_FAULTS)))), key=_time)
    calm = max((fault.at + fault.seconds for fault in faults), default=0.0)
    return Scenario(seed=seed, run=run, pace=pace, faults=tuple(faults), calm=calm)


def _time(fault: Fault) -> float:
    return fault.at


def _run(rng: Random, clusters: int) -> Run:
    codec = rng.choice(CODECS)
    # Half of the runs need everyone, so that none may go on without a contribution and each has one right result.
    quorum = clusters if rng.random() < 0.5 else rng.randint(1, clusters)
    return small(
        outer=rng.choice((Nesterov(), OuterSGD())),
        rounds=rng.randint(2, 4),
        inner_steps=rng.randint(1, 3),
        fragments=rng.randint(1, 2),
        wan=Wan(up=codec, down=codec),
        membership=Membership(
            quorum=quorum,
            max_stall=rng.choice((30.0, 90.0)),
            global_batch=rng.choice(("shrink", "hold")),
            outer_lr=rng.choice(("constant", "sqrt", "linear")),
        ),
        evaluate_every=2,
        checkpoint_every=rng.choice((1, 1, 2)),
    )


def small(**settings: Any) -> Run:
    """A run of a model that takes no time. `settings`: of Run."""
    return Run(name="sim", model=MODEL, data=Data(seq_len=8, eval_windows=8), batch=2, **settings)


def _fault(rng: Random, clusters: tuple[str, ...], length: float) -> Fault:
    kind, anybody = rng.choice(_KINDS)
    target = rng.choice((COORDINATOR, *clusters)) if anybody else rng.choice(clusters)
    target = COORDINATOR if kind in ("cut", "usurp", "stop") else target
    return Fault(
        at=rng.uniform(0.0, 1.5 * length),
        kind=kind,
        target=target,
        seconds=rng.choice(_DURATIONS)(rng),
        amount=rng.random(),
    )


_DURATIONS: tuple[Callable[[Random], float], ...] = (
    lambda rng: rng.uniform(0.1, 3.0),
    lambda rng: rng.uniform(3.0, 20.0),
    lambda rng: rng.uniform(20.0, 150.0),
)

_KINDS: tuple[tuple[Kind, bool], ...] = (
    ("weather", False),
    ("weather", False),
    ("partition", False),
    ("kill", True),
    ("power", True),
    ("cut", True),
    ("cut", True),
    ("freeze", True),
    ("full", True),
    ("rot", True),
    ("rank", False),
    ("slow", False),
    ("wipe", False),
    ("leave", False),
    ("usurp", True),
    ("stop", True),
)
"""Each with whether the coordinator may be hit, too."""
