"""What a recipe states: the model, how each cluster trains it, how they exchange what they learn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nebula.config.base import Config, Name, Positive, Share
from nebula.config.wan import Nesterov, OuterSGD, Wan, proposed_outer


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
