"""What a codec costs in training: loss after equal tokens against bits that cross the WAN, side by side in one run.

    python benchmarks/training.py --out benchmarks/results/training.json

Four workers train one byte-level transformer of 0.39M parameters on Python source (the standard library), 15 inner
AdamW steps between 30 outer rounds, every worker from its own batches; each sends its delta through a codec, coded and
decoded by the real thing, with its own error feedback. What comes down is not coded, except in the rows "both ways".
All rows of one seed start from the same parameters and see the same batches. Bits: whole packets, headers included,
per parameter, round and worker.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, rms_norm, scaled_dot_product_attention

from nebula.config import Adaptive, Blockwise, Codec, LowRank, Minifloat, Nesterov, OuterSGD, TopK
from nebula.federation.outer import outer_step
from nebula.parallel.export import boxes
from nebula.types import Slice
from nebula.wan.codec import Encoder, decode, rate
from nebula.wan.codec.prior import remember
from nebula.wan.frame import pack

VOCAB, DIM, LAYERS, HEADS, LENGTH = 256, 96, 3, 4, 64
WORKERS, BATCH, PEAK, WARM_UP, CLIP = 4, 4, 2e-3, 30, 1.0
EVALUATED = 1024

Parameters = dict[str, Tensor]
Outer = Nesterov | OuterSGD


@dataclass(frozen=True)
class Row:
    """`reference`: the loss of others is told against the best of these. `patched`: what an ablation takes out."""

    name: str
    codec: Codec
    outer: Outer
    down: Codec | None = None
    reference: bool = False
    known: bool = True
    patched: Callable[[], None] | None = None


def codec(step: Any, feedback: float | None = None) -> Codec:
    return Codec(steps=(step,), feedback=feedback)


AVERAGE, DILOCO = OuterSGD(lr=1.0), Nesterov(lr=0.7, momentum=0.9)
PLAIN = Codec(steps=(), feedback=None)


def ours(bits: float, **other: Any) -> Row:
    chosen = codec(Adaptive(bits=bits), 0.95)
    mild = Nesterov(lr=1.0, momentum=min(0.5, 0.15 / math.sqrt(bits)))
    return Row(**{"name": f"Nebula {bits} b", "codec": chosen, "outer": mild, **other})


def common_steps(sample: rate.Sample, bits: float, threshold: float) -> Any:
    """Ablation: dead zones in proportion to each slice's root mean square, at the same rate; no share is kept."""
    flat = rate.Sample(sample.x_N, sample.cells_N, sample.turned_N, [len(sample.x_N)], sample.parameters)
    (step,) = STEPS(flat, bits, threshold)
    return [step] * len(sample.sizes)


STEPS = rate.steps


def without_shares() -> None:
    rate.steps = common_steps  # type: ignore[assignment]


RIVALS = [
    Row("fp32, averaging", PLAIN, AVERAGE, reference=True),
    Row("fp32, mild Nesterov", PLAIN, Nesterov(lr=1.0, momentum=0.15), reference=True),
    Row("fp32, DiLoCo's Nesterov", PLAIN, DILOCO, reference=True),
    Row("int8, block 256", codec(Blockwise(bits=8, block=256)), AVERAGE),
    Row("int4, block 64", codec(Blockwise(bits=4, block=64)), AVERAGE),
    Row("E3M0, block 64", codec(Minifloat(format="e3m0")), AVERAGE),
    Row("2 bits, block 64", codec(Blockwise(bits=2, block=64), 0.95), AVERAGE),
    Row("1 bit, block 64", codec(Blockwise(bits=1, block=64), 0.95), AVERAGE),
    Row("top 256/4096, 2 bits", codec(TopK(keep=256), 0.95), AVERAGE),
    Row("top 64/4096, 2 bits", codec(TopK(keep=64), 0.95), AVERAGE),
    Row("top 64/4096, Nesterov 0.5", codec(TopK(keep=64), 0.95), Nesterov(lr=1.0, momentum=0.5)),
    Row("PowerSGD, rank 8", codec(LowRank(rank=8), 0.95), AVERAGE),
]
RATES = [ours(bits) for bits in (0.1, 0.2, 0.37, 0.7, 1.0, 1.65, 3.0)]
BOTH = [
    ours(bits, name=f"Nebula {bits} b, both ways", down=codec(Adaptive(bits=bits), 0.95)) for bits in (0.37, 1.0, 2.0)
]
ABLATIONS = [
    ours(0.37, name="0.37 b, no feedback", codec=codec(Adaptive(bits=0.37))),
    ours(0.37, name="0.37 b, feedback 1", codec=codec(Adaptive(bits=0.37), 1.0)),
    ours(0.37, name="0.37 b, no kept share", patched=without_shares),
    ours(0.37, name="0.37 b, averaging", outer=AVERAGE),
    ours(0.37, name="0.37 b, DiLoCo's Nesterov", outer=DILOCO),
    ours(0.37, name="0.37 b, last update unused", known=False),
]
ROWS = {row.name: row for row in (*RIVALS, *RATES, *BOTH, *ABLATIONS)}


# --- the model: all workers' at once, K first ---------------------------------------------------------------------


def start(seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    parameters = {"embed": draw(VOCAB, DIM, std=0.02), "place": draw(LENGTH, DIM, std=0.02)}
    deep = 1 / math.sqrt(2 * LAYERS)
    for layer in range(LAYERS):
        parameters |= {
            f"{layer}.norm1": torch.ones(DIM),
            f"{layer}.norm2": torch.ones(DIM),
            f"{layer}.qkv": draw(DIM, 3 * DIM, std=DIM**-0.5),
            f"{layer}.out": draw(DIM, DIM, std=DIM**-0.5 * deep),
            f"{layer}.up": draw(DIM, 4 * DIM, std=DIM**-0.5),
            f"{layer}.down": draw(4 * DIM, DIM, std=(4 * DIM) ** -0.5 * deep),
        }
    return parameters | {"norm": torch.ones(DIM), "head": draw(DIM, VOCAB, std=DIM**-0.5)}


def logits(p: Parameters, x_KBT: Tensor) -> Tensor:
    k, b, t = x_KBT.shape

    def normed(x_KND: Tensor, weight_KD: Tensor) -> Tensor:
        return rms_norm(x_KND, (DIM,), eps=1e-6) * weight_KD[:, None]

    h = (p["embed"][torch.arange(k)[:, None, None], x_KBT] + p["place"][:, None, :t]).view(k, b * t, DIM)
    for layer in range(LAYERS):
        qkv = torch.bmm(normed(h, p[f"{layer}.norm1"]), p[f"{layer}.qkv"])
        q, key, v = qkv.view(k * b, t, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).reshape(k, b * t, DIM)
        h = h + torch.bmm(mixed, p[f"{layer}.out"])
        wide = gelu(torch.bmm(normed(h, p[f"{layer}.norm2"]), p[f"{layer}.up"]))
        h = h + torch.bmm(wide, p[f"{layer}.down"])
    return torch.bmm(normed(h, p["norm"]), p["head"])


def loss(p: Parameters, s_KBT: Tensor) -> Tensor:
    """Mean over all tokens of all workers."""
    return cross_entropy(logits(p, s_KBT[..., :-1]).flatten(0, 1), s_KBT[..., 1:].flatten())


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last twentieth to evaluate on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


@torch.no_grad()
def evaluated(p: Parameters, held_out: Tensor) -> float:
    count = min(len(held_out) // (LENGTH + 1), EVALUATED)
    windows = held_out[: count * (LENGTH + 1)].view(1, count, LENGTH + 1)
    one = {name: value[None] for name, value in p.items()}
    return statistics.fmean(float(loss(one, part)) for part in windows.split(128, 1))


# --- rounds -------------------------------------------------------------------------------------------------------


@dataclass
class Sender:
    """One end of one direction: encodes, and tells what the other end gets."""

    encoder: Encoder
    bytes: int = 0
    last: dict[Slice, Tensor] | None = field(default=None)

    def send(self, tensors: Parameters) -> Parameters:
        packet = self.encoder.encode(boxes(tensors), self.last)
        self.bytes += len(pack(packet))
        known = None if self.last is None else self.last.__getitem__
        self.encoder.settle(True)
        return {w.name: value for w, value in decode(packet, max_elements=10**7, last=known).items()}


def train(row: Row, seed: int, rounds: int, inner: int) -> dict[str, float]:
    """Loss at the end, and bits per parameter, round and worker, up and down."""
    torch.set_num_threads(1)
    if row.patched:
        row.patched()
    held, generator = start(seed), torch.Generator().manual_seed(1000 + seed)
    text, held_out = corpus()
    local = {name: value.repeat(WORKERS, *[1] * value.dim()).requires_grad_() for name, value in held.items()}
    optimizer = torch.optim.AdamW(local.values(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    up, down = [Sender(Encoder(row.codec)) for _ in range(WORKERS)], Sender(Encoder(row.down or PLAIN))
    momentum: Parameters = {}
    for number in range(rounds):
        for step in range(inner):
            inner_step(local, optimizer, batch(text, generator), number * inner + step)
        with torch.no_grad():
            got = [sender.send({n: held[n] - local[n][k] for n in held}) for k, sender in enumerate(up)]
            mean = {name: torch.stack([delta[name] for delta in got]).mean(0) for name in held}
            update, momentum = outer_step(row.outer, mean, momentum)
            applied = down.send(update)
            for name in held:
                held[name] += applied[name]
                local[name].copy_(held[name].expand_as(local[name]))
            for sender in up if row.known else ():
                sender.last = {where: remember(value) for where, value in boxes(applied).items()}
    size = sum(value.numel() for value in held.values()) * rounds / 8
    spent = statistics.fmean(sender.bytes for sender in up) / size
    return {"loss": evaluated(held, held_out), "up": spent, "down": down.bytes / size}


def inner_step(local: Parameters, optimizer: torch.optim.Optimizer, s_KBT: Tensor, step: int) -> None:
    optimizer.zero_grad()
    (loss(local, s_KBT) * WORKERS).backward()
    gradients = [value.grad for value in local.values() if value.grad is not None]
    norm_K = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    for gradient in gradients:
        gradient.mul_((CLIP / norm_K).clamp(max=1).view(-1, *[1] * (gradient.dim() - 1)))
    for group in optimizer.param_groups:
        group["lr"] = PEAK * min(1, (step + 1) / WARM_UP)
    optimizer.step()


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    at = torch.randint(len(text) - LENGTH - 1, (WORKERS, BATCH, 1), generator=generator)
    return text[at + torch.arange(LENGTH + 1)]


# --- the table ----------------------------------------------------------------------------------------------------


def measured(job: tuple[str, int, int, int]) -> tuple[str, int, dict[str, float]]:
    name, seed, rounds, inner = job
    return name, seed, train(ROWS[name], seed, rounds, inner)


def main(
    out: Annotated[Path | None, typer.Option(help="Where to keep the figures, as JSON.")] = None,
    seeds: int = 3,
    rounds: int = 30,
    inner: int = 15,
    only: Annotated[str, typer.Option(help="Rows whose name holds this, and the references.")] = "",
    processes: int = 2,
) -> None:
    names = [name for name, row in ROWS.items() if only in name or row.reference]
    jobs = [(name, seed, rounds, inner) for seed in range(seeds) for name in names]
    before, found = time.time(), {name: [] for name in names}
    # A process per run: an ablation changes the codec for good.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        for name, seed, figures in pool.map(measured, jobs):
            found[name].append(figures)
            print(
                f"{seed} {name}: {figures['loss']:.4f} at {figures['up']:.3f} b, {time.time() - before:.0f} s",
                flush=True,
            )
    rows = list(table(found))
    print("\n".join(rows))
    if out:
        conditions = {"workers": WORKERS, "inner": inner, "rounds": rounds, "seeds": seeds, "load": os.getloadavg()}
        out.write_text(json.dumps({"conditions": conditions, "runs": found}, indent=1) + "\n")


def table(found: Mapping[str, list[dict[str, float]]]) -> Iterator[str]:
    """Medians and ranges over the seeds; losses against the best uncompressed run of the same seed."""
    best = [
        min(runs) for runs in zip(*([r["loss"] for r in found[n]] for n in found if ROWS[n].reference), strict=True)
    ]
    yield "| codec | bits up | down | loss | over the best uncompressed |"
    yield "| :--- | ---: | ---: | ---: | ---: |"
    for name, runs in found.items():
        over = [100 * (run["loss"] / reference - 1) for run, reference in zip(runs, best, strict=True)]
        bits, down, lost = (statistics.median(run[key] for run in runs) for key in ("up", "down", "loss"))
        spread = f"{statistics.median(over):+.1f} % ({min(over):+.1f} … {max(over):+.1f})"
        yield f"| {name} | {bits:.3f} | {down:.3f} | {lost:.4f} | {spread} |"


if __name__ == "__main__":
    typer.run(main)
