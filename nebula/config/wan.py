"""The exchange between clusters: codecs, the rules that suit them, connections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nebula.config.base import Config, Share


class Nesterov(Config):
    """Outer optimizer of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on the averaged delta."""

    kind: Literal["nesterov"] = "nesterov"
    lr: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class OuterSGD(Config):
    """Outer SGD; lr 1 is plain averaging (LocalSGD)."""

    kind: Literal["outer_sgd"] = "outer_sgd"
    lr: Annotated[float, Field(gt=0)] = 1.0


# --- what crosses the WAN -----------------------------------------------------------------------------------------


class Adaptive(Config):
    """Any rate: as near to `bits` per parameter, everything counted, as a sample foretells. Uniform with a dead zone
    and fitted levels; entropy coded by interleaved rANS (arXiv 1311.2540), with probabilities that follow the update of
    the round before, which both ends know."""

    kind: Literal["adaptive"] = "adaptive"
    bits: Annotated[float, Field(ge=0.1, le=8)] = 1.0


class Blockwise(Config):
    """A code of `bits` per value and one bf16 scale per `block` values (arXiv 2110.02861). 8 and 4 bits: integers, the
    scale from the block's peak. 2: the four levels that are best for a Gaussian (Max 1960). 1: the sign, set where
    x > 0 as in daBNN (arXiv 1908.05858). The last two take their scale from the block's mean magnitude."""

    kind: Literal["blockwise"] = "blockwise"
    bits: Literal[1, 2, 4, 8] = 4
    block: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 64


class Minifloat(Config):
    """Short floats. "e3m0": 4 bits, a sign and an exponent (Streaming DiLoCo, arXiv 2501.18512); "fp8": e4m3 (arXiv
    2209.05433); both with one bf16 scale per `block` values. "bf16" has no scale and ignores `block`; with zstd behind
    it, which codes bytes of one significance together, it takes about 11 bits."""

    kind: Literal["minifloat"] = "minifloat"
    format: Literal["e3m0", "fp8", "bf16"] = "e3m0"
    block: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 64


class TopK(Config):
    """Of each `block` values the `keep` largest (arXiv 1809.07599), and where they are near the entropy of that. A kept
    value is fp32, or an 8-bit integer, or, with 2 bits, a sign and one of two magnitudes as in SparseLoCo (arXiv
    2508.15706)."""

    kind: Literal["topk"] = "topk"
    bits: Literal[2, 8, 32] = 2
    block: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 4096
    keep: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 64

    @model_validator(mode="after")
    def _consistent(self) -> TopK:
        if self.keep > self.block // 2:
            raise ValueError(f"keep {self.keep} exceeds half of block {self.block}: send all values instead")
        return self


class RandomK(Config):
    """As TopK, but pseudo-random values, one of each of `keep` equal parts of a block: where they are costs nothing."""

    kind: Literal["randomk"] = "randomk"
    bits: Literal[2, 8, 32] = 32
    block: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 4096
    keep: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 64

    @model_validator(mode="after")
    def _consistent(self) -> RandomK:
        if self.block % self.keep:
            raise ValueError(f"block {self.block} must be a multiple of keep {self.keep}")
        return self


class LowRank(Config):
    """Each matrix as a product of two of `rank` columns in bf16 (PowerSGD, arXiv 1905.13727); vectors, and matrices
    that this would not make smaller, as fp32. A slice of more dims is taken as the matrix that is nearest to square.
    `iterations` of the power method are done in each round from a fixed start."""

    kind: Literal["lowrank"] = "lowrank"
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    iterations: Annotated[int, Field(ge=1, le=8)] = 2


class Zstd(Config):
    """Entropy coding of whatever the codecs before it produced."""

    kind: Literal["zstd"] = "zstd"
    level: Annotated[int, Field(ge=1, le=19)] = 1


CodecStep = Annotated[Adaptive | Blockwise | Minifloat | TopK | RandomK | LowRank | Zstd, Field(discriminator="kind")]


def proposed_feedback(steps: tuple[CodecStep, ...]) -> float:
    """Decay of the residual for a codec: where much is left out, training goes better if old residuals fade
    (benchmarks/README.md, "What a codec costs in training")."""
    return 0.95 if any(_coarse(step) for step in steps) else 1.0


def _coarse(step: CodecStep) -> bool:
    if isinstance(step, Adaptive):
        return step.bits < 2
    return isinstance(step, TopK | RandomK | LowRank) or (isinstance(step, Blockwise) and step.bits <= 2)


class Codec(Config):
    """Steps applied in order; none sends fp32. `feedback` keeps what a lossy step left out and adds it, times this
    decay, to the next delta; None switches that off. Unless it is given, it is what suits the steps."""

    steps: tuple[CodecStep, ...] = (Adaptive(bits=2.0),)
    feedback: Share | None = Field(default_factory=lambda given: proposed_feedback(given["steps"]))


class Wan(Config):
    """Up: cluster to coordinator. Down: coordinator to clusters. `streams`: connections that share a large payload."""

    up: Codec = Codec()
    down: Codec = Codec()
    streams: Annotated[int, Field(ge=1, le=16)] = 4


def proposed_outer(wan: Wan) -> Nesterov | OuterSGD:
    """The outer rule for what clusters send. Below two bits, what a round leaves out comes in later rounds, and
    DiLoCo's momentum of 0.9 overshoots: the adaptive codec then goes best with a full step and a momentum that grows as
    the rate falls, other codecs with plain averaging (benchmarks/README.md, "What a codec costs in training")."""
    for step in filter(_coarse, wan.up.steps):
        if isinstance(step, Adaptive):
            return Nesterov(lr=1.0, momentum=round(min(0.5, 0.15 / step.bits**0.5), 3))
        return OuterSGD(lr=1.0)
    return Nesterov()
