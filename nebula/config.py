"""Every knob a user may turn, as frozen keyword-only models. Imports neither torch nor ray.

`Run` is what a recipe returns (a program), `Federation` is what a cluster file states (facts), `Agreement` is what both
resolve to: canonical JSON with a digest, the only form that crosses a process boundary.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nebula.types import COORDINATOR

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
"""Names of runs and clusters appear in paths, certificates and metric labels, hence the narrow alphabet."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- what is trained ----------------------------------------------------------------------------------------------


class Model(Config):
    """A decoder-only transformer. Blocks `dense_layers` … `layers` − 1 are mixtures of `experts`, `top_k` per token,
    each of width `ffn_dim`; the first `dense_layers` are dense with width `ffn_dim · top_k`: same cost."""

    vocab: Positive = 2048
    layers: Positive = 4
    dim: Positive = 256
    heads: Positive = 4
    kv_heads: Positive = 4
    ffn_dim: Positive = 384
    experts: Positive = 8
    top_k: Positive = 2
    dense_layers: Annotated[int, Field(ge=0)] = 1
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    aux_loss: Annotated[float, Field(ge=0)] = 0.01

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must split into heads {self.heads} of an even width (RoPE rotates pairs)")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers {self.dense_layers} exceeds layers {self.layers}")
        if self.ffn_dim % 8 or self.dim % 8:
            raise ValueError("dim and ffn_dim must be multiples of 8 (grouped_mm wants 16-byte rows)")
        return self


class Data(Config):
    """`path`: "stdlib" (the Python standard library of this interpreter), a folder, a file, or a list of these.

    partition "documents": every cluster trains on its own documents (a document is a file, or a piece of a large one;
    files of one top-level module or folder stay together). "batch": every cluster sees all documents and takes its
    share of each global batch, as in data parallelism.
    """

    path: str | tuple[str, ...] = "stdlib"
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    partition: Literal["documents", "batch"] = "documents"
    seq_len: Positive = 256
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    eval_windows: Positive = 64


class LM(Config):
    """Next-token cross-entropy."""

    kind: Literal["lm"] = "lm"


class AdamW(Config):
    """Inner optimizer. Linear warm-up over `warmup` inner steps, then cosine to `floor · lr` at the end of the run."""

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = 20
    floor: Share = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class SGD(Config):
    """Plain inner SGD at a constant rate; with `inner_steps=1` and `OuterSGD(lr=1)` a run is data parallelism."""

    kind: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = None


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
    """Up: cluster to coordinator. Down: coordinator to clusters."""

    up: Codec = Codec()
    down: Codec = Codec()


def proposed_outer(wan: Wan) -> Nesterov | OuterSGD:
    """The outer rule for what clusters send. Below two bits, what a round leaves out comes in later rounds, and
    DiLoCo's momentum of 0.9 overshoots: the adaptive codec then goes best with a full step and a momentum that grows as
    the rate falls, other codecs with plain averaging (benchmarks/README.md, "What a codec costs in training")."""
    for step in filter(_coarse, wan.up.steps):
        if isinstance(step, Adaptive):
            return Nesterov(lr=1.0, momentum=round(min(0.5, 0.15 / step.bits**0.5), 3))
        return OuterSGD(lr=1.0)
    return Nesterov()


class Membership(Config):
    """Clusters may come, leave and fail at any time. A round commits when every cluster that takes part has delivered,
    or, with at least `quorum`, when those missing have left, fallen silent, or are later than their own measured
    arrivals explain (median + k·MAD). Below `quorum` the run waits, then pauses. `max_stall`: the longest anyone waits
    for anyone, seconds.

    While clusters are missing, the mean is over the tokens that came, whatever these rules say. global_batch "shrink":
    the others train as before, so a round has fewer tokens. "hold": they take more inner steps, so that it keeps them
    (known from the round before: the round in which a cluster is lost is short, the one in which it returns long).
    outer_lr: how the outer rate follows the share of the nominal tokens that a round has: not at all ("constant"), its
    square root, or "linear"; never above its nominal value."""

    quorum: Positive = 1
    max_stall: Annotated[float, Field(gt=0)] = 120.0
    global_batch: Literal["shrink", "hold"] = "shrink"
    outer_lr: Literal["constant", "sqrt", "linear"] = "constant"


class Run(Config):
    """One training job. `batch`: sequences per rank and inner step, unless a cluster file says otherwise. `outer`:
    unless it is given, what suits the codec."""

    name: Name
    model: Model = Model()
    data: Data = Data()
    objective: LM = LM()
    optimizer: Annotated[AdamW | SGD, Field(discriminator="kind")] = AdamW()
    wan: Wan = Wan()
    outer: Annotated[Nesterov | OuterSGD, Field(discriminator="kind")] = Field(
        default_factory=lambda given: proposed_outer(given["wan"])
    )
    rounds: Positive = 10
    inner_steps: Positive = 20
    fragments: Positive = 2
    batch: Positive = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    membership: Membership = Membership()
    evaluate_every: Positive = 4
    checkpoint_every: Positive = 1
    prompt: str = "def "

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        if self.fragments > self.model.layers:
            raise ValueError(f"fragments {self.fragments} exceeds model.layers {self.model.layers}")
        return self


# --- where it runs ------------------------------------------------------------------------------------------------


class Link(Config):
    """The emulated path between a cluster and the coordinator: `rate_mbps` each way, `rtt_ms` both ways together,
    `loss` the share of 1460-byte segments lost, each of which holds up the stream for one round trip."""

    rate_mbps: Annotated[float, Field(gt=0)] = 100.0
    rtt_ms: Annotated[float, Field(ge=0)] = 50.0
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Endpoint(Config):
    """Where the coordinator listens. Port 0 takes any free one (on one machine only)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7443


class Ray(Config):
    """The cluster's own Ray head. Ports 0 take free ones; no dashboard unless it has a port."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    dashboard_port: Annotated[int, Field(ge=0, le=65535)] | None = None


class Cluster(Config):
    """One participant. `batch`: sequences per inner step over all its ranks; default `Run.batch · ranks`.
    `checkpoints`: an fsspec URL such as s3://bucket/path, for a cluster whose ranks share no disk; default: the run's
    folder."""

    ranks: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = 1
    batch: Positive | None = None
    checkpoints: str | None = None
    ray: Ray = Ray()
    link: Link | None = None


class Federation(Config):
    """A cluster file. Strings in YAML where Python has tuples; see `clusters/`."""

    coordinator: Endpoint = Endpoint()
    clusters: Annotated[dict[Name, Cluster], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        if COORDINATOR in self.clusters:
            raise ValueError(f"a cluster may not be called {COORDINATOR!r}")
        for name, cluster in self.clusters.items():
            if cluster.batch is not None and cluster.batch % cluster.ranks:
                raise ValueError(
                    f"clusters.{name}.batch {cluster.batch} must be a multiple of its ranks {cluster.ranks}"
                )
        return self


# --- what everyone agreed to --------------------------------------------------------------------------------------


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
