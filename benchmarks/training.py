"""What a codec costs in training: loss after equal tokens against bits that cross the WAN, side by side in one run.

    python benchmarks/training.py --out benchmarks/results/training.json
    python benchmarks/training.py --group intervals --out benchmarks/results/training-intervals.json

Four workers train one byte-level transformer of 0.39M parameters on Python source (the standard library) for 450 AdamW
steps, every worker from its own batches, in rounds of 15 (or 30, or 50) steps; each sends its delta through a codec,
coded and decoded by the real thing, with its own error feedback. What comes down is not coded, except in the rows "both
ways". All rows of one seed start from the same parameters and see the same batches. Bits: whole packets, headers
included, per parameter, round and worker. Groups of rows: "rates" (rivals, rates, ablations), "intervals" (more steps a
round), "large" (2.0M parameters), "cross" (decay of the feedback x outer rule x rate x steps a round).
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
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from toy import LENGTH, Parameters, corpus, evaluated, loss, start

from nebula.config import Adaptive, Blockwise, Codec, LowRank, Minifloat, Nesterov, OuterSGD, TopK
from nebula.federation.outer import outer_step
from nebula.parallel.export import boxes
from nebula.types import Slice
from nebula.wan.codec import Encoder, decode, rate
from nebula.wan.codec.prior import remember
from nebula.wan.frame import pack

WORKERS, BATCH, PEAK, WARM_UP, CLIP = 4, 4, 2e-3, 30, 1.0
STEPS, OFTEN = 450, 30
"""Inner steps of a run, and about between two looks at the loss."""
EVALUATED, GLANCED = 1024, 256
"""Windows, at the end and between."""
SMALL, LARGE = (96, 3), (192, 4)
"""Width and layers."""

Outer = Nesterov | OuterSGD


@dataclass(frozen=True)
class Row:
    """`reference`: the losses of others in rounds of as many steps, of the same model, are told against the best of
    these. `patched`: what an ablation takes out. `kept`: not `codec`, but this share of values as signs."""

    name: str
    codec: Codec
    outer: Outer
    down: Codec | None = None
    reference: bool = False
    known: bool = True
    patched: Callable[[], None] | None = None
    kept: float | None = None
    inner: int = 15
    model: tuple[int, int] = SMALL


def codec(step: Any, feedback: float | None = None) -> Codec:
    return Codec(steps=(step,), feedback=feedback)


AVERAGE, DILOCO = OuterSGD(lr=1.0), Nesterov(lr=0.7, momentum=0.9)
PLAIN = Codec(steps=(), feedback=None)


def mild(bits: float) -> Outer:
    return Nesterov(lr=1.0, momentum=min(0.5, 0.15 / math.sqrt(bits)))


def ours(bits: float, **other: Any) -> Row:
    return Row(**{"name": f"Nebula {bits} b", "codec": codec(Adaptive(bits=bits), 0.95), "outer": mild(bits), **other})


def uncompressed(**other: Any) -> list[Row]:
    return [
        Row("fp32, averaging", PLAIN, AVERAGE, reference=True, **other),
        Row("fp32, mild Nesterov", PLAIN, mild(1.0), reference=True, **other),
        Row("fp32, DiLoCo's Nesterov", PLAIN, DILOCO, reference=True, **other),
    ]


def common_steps(sample: rate.Sample, bits: float, threshold: float) -> Any:
    """Ablation: dead zones in proportion to each slice's root mean square, at the same rate; no share is kept."""
    flat = rate.Sample(sample.x_N, sample.cells_N, sample.turned_N, [len(sample.x_N)], sample.parameters)
    (step,) = RATE_STEPS(flat, bits, threshold)
    return [step] * len(sample.sizes)


RATE_STEPS = rate.steps


def without_shares() -> None:
    rate.steps = common_steps  # type: ignore[assignment]


def ternary(kept: float, **other: Any) -> Row:
    return Row(f"signs of the largest {kept:.1%}", codec(TopK(), 0.95), AVERAGE, kept=kept, **other)


def rivals(**other: Any) -> list[Row]:
    return [
        Row("2 bits, block 64", codec(Blockwise(bits=2, block=64), 0.95), AVERAGE, **other),
        Row("1 bit, block 64", codec(Blockwise(bits=1, block=64), 0.95), AVERAGE, **other),
        Row("top 256/4096, 2 bits", codec(TopK(keep=256), 0.95), AVERAGE, **other),
        Row("top 64/4096, 2 bits", codec(TopK(keep=64), 0.95), AVERAGE, **other),
    ]


def grid() -> Iterator[Row]:
    for inner in (15, 50):
        yield from uncompressed(inner=inner)
        for bits, decay, (how, rule) in product((0.2, 0.5, 2.0), (0.9, 0.95, 1.0), OUTER.items()):
            name = f"{bits} b, feedback {decay}, {how}"
            yield Row(name, codec(Adaptive(bits=bits), decay), rule or mild(bits), inner=inner)


OUTER = {"averaging": AVERAGE, "mild": None, "momentum 0.5": Nesterov(lr=1.0, momentum=0.5), "DiLoCo's": DILOCO}

GROUPS: dict[str, list[Row]] = {
    "rates": [
        *uncompressed(),
        Row("bf16 gradients at every step", codec(Minifloat(format="bf16")), AVERAGE, inner=0),
        Row("int8, block 256", codec(Blockwise(bits=8, block=256)), AVERAGE),
        Row("int4, block 64", codec(Blockwise(bits=4, block=64)), AVERAGE),
        Row("E3M0, block 64", codec(Minifloat(format="e3m0")), AVERAGE),
        *rivals(),
        Row("top 64/4096, Nesterov 0.5", codec(TopK(keep=64), 0.95), Nesterov(lr=1.0, momentum=0.5)),
        Row("PowerSGD, rank 8", codec(LowRank(rank=8), 0.95), AVERAGE),
        *(ternary(kept) for kept in (0.2, 0.08, 1 / 64)),
        *(ours(bits) for bits in (0.1, 0.14, 0.2, 0.37, 0.5, 0.7, 1.0, 1.65, 3.0)),
        *(ours(b, name=f"Nebula {b} b, both ways", down=codec(Adaptive(bits=b), 0.95)) for b in (0.37, 1.0, 2.0)),
        ours(0.37, name="0.37 b, no feedback", codec=codec(Adaptive(bits=0.37))),
        ours(0.37, name="0.37 b, feedback 1", codec=codec(Adaptive(bits=0.37), 1.0)),
        ours(0.37, name="0.37 b, no kept share", patched=without_shares),
        ours(0.37, name="0.37 b, averaging", outer=AVERAGE),
        ours(0.37, name="0.37 b, DiLoCo's Nesterov", outer=DILOCO),
        ours(0.37, name="0.37 b, last update unused", known=False),
    ],
    "intervals": [
        row
        for inner in (30, 50)
        for row in (
            *uncompressed(inner=inner),
            *rivals(inner=inner),
            ternary(1 / 64, inner=inner),
            *(ours(bits, inner=inner) for bits in (0.1, 0.2, 0.37, 1.0, 1.65)),
        )
    ],
    "large": [
        *uncompressed(model=LARGE),
        *rivals(model=LARGE),
        ternary(1 / 64, model=LARGE),
        *(ours(bits, model=LARGE) for bits in (0.1, 0.2, 0.37, 1.0, 1.65)),
    ],
    "cross": list(grid()),
}


# --- rounds -------------------------------------------------------------------------------------------------------


@dataclass
class Sender:
    """One end of one direction: encodes, and tells what the other end gets."""

    encoder: Encoder
    bytes: float = 0
    last: dict[Slice, Tensor] | None = field(default=None)

    def send(self, tensors: Parameters) -> Parameters:
        packet = self.encoder.encode(boxes(tensors), self.last)
        self.bytes += len(pack(packet))
        known = None if self.last is None else self.last.__getitem__
        self.encoder.settle(True)
        return {w.name: value for w, value in decode(packet, max_elements=10**7, last=known).items()}


@dataclass
class Signs:
    """A rival: of each 4096 values the largest, as their signs and one magnitude; where they are is counted as its
    entropy; residuals fade by 0.95."""

    kept: float
    bytes: float = 0
    residual: dict[str, Tensor] = field(default_factory=dict)

    def send(self, tensors: Parameters) -> Parameters:
        return {name: self._one(name, value) for name, value in tensors.items()}

    def _one(self, name: str, value: Tensor) -> Tensor:
        x = value + 0.95 * self.residual[name] if name in self.residual else value
        decoded = torch.cat([self._block(block) for block in x.flatten().split(4096)]).view_as(x)
        self.residual[name] = x - decoded
        return decoded

    def _block(self, x: Tensor) -> Tensor:
        count, p = max(1, round(self.kept * len(x))), self.kept
        top = x.abs().topk(count)
        self.bytes += (len(x) * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + count + 16) / 8
        return torch.zeros_like(x).index_copy_(0, top.indices, x[top.indices].sign() * top.values.mean())


def train(row: Row, seed: int) -> dict[str, Any]:
    """Loss at the end; bits per parameter, round and worker, up and down; "curve": all bits up per parameter and
    worker so far, and the loss."""
    torch.set_num_threads(1)
    if row.patched:
        row.patched()
    held, generator = start(seed, *row.model), torch.Generator().manual_seed(1000 + seed)
    text, held_out = corpus()
    local = {name: value.repeat(WORKERS, *[1] * value.dim()).requires_grad_() for name, value in held.items()}
    optimizer = torch.optim.AdamW(local.values(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    up = [Signs(row.kept) if row.kept else Sender(Encoder(row.codec)) for _ in range(WORKERS)]
    down, rounds = Sender(Encoder(row.down or PLAIN)), STEPS // (row.inner or STEPS)
    size, curve = sum(value.numel() for value in held.values()), []
    momentum: Parameters = {}
    for number in range(rounds if row.inner else 0):
        for step in range(row.inner):
            inner_step(local, optimizer, batch(text, generator), number * row.inner + step)
        with torch.no_grad():
            got = [sender.send({n: held[n] - local[n][k] for n in held}) for k, sender in enumerate(up)]
            mean = {name: torch.stack([delta[name] for delta in got]).mean(0) for name in held}
            update, momentum = outer_step(row.outer, mean, momentum)
            applied = down.send(update)
            for name in held:
                held[name] += applied[name]
                local[name].copy_(held[name].expand_as(local[name]))
            for sender in up if row.known else ():
                if isinstance(sender, Sender):
                    sender.last = {where: remember(value) for where, value in boxes(applied).items()}
        if (number + 1) * row.inner % OFTEN < row.inner:
            spent = 8 * statistics.fmean(sender.bytes for sender in up) / size
            curve.append([spent, evaluated(held, held_out, GLANCED)])
    if not row.inner:
        curve = list(every_step(local, optimizer, text, held_out, generator))
        held = {name: value[0].detach() for name, value in local.items()}
    spent = curve[-1][0] / rounds
    final = evaluated(held, held_out, EVALUATED)
    return {"loss": final, "up": spent, "down": 8 * down.bytes / size / rounds, "curve": curve}


def every_step(
    local: Parameters, optimizer: torch.optim.Optimizer, text: Tensor, held_out: Tensor, generator: torch.Generator
) -> Iterator[list[float]]:
    """Data parallel: workers average their gradients, each rounded to bf16, at every step."""
    for step in range(STEPS):
        inner_step(local, optimizer, batch(text, generator), step, together=True)
        if (step + 1) % OFTEN == 0:
            yield [16.0 * (step + 1), evaluated({n: v[0].detach() for n, v in local.items()}, held_out, GLANCED)]


def inner_step(
    local: Parameters, optimizer: torch.optim.Optimizer, s_KBT: Tensor, step: int, together: bool = False
) -> None:
    optimizer.zero_grad()
    (loss(local, s_KBT) * WORKERS).backward()
    gradients = [value.grad for value in local.values() if value.grad is not None]
    for gradient in gradients if together else ():
        gradient.copy_(gradient.bfloat16().float().mean(0, keepdim=True).expand_as(gradient))
    norm_K = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    for gradient in gradients:
        gradient.mul_((CLIP / norm_K).clamp(max=1).view(-1, *[1] * (gradient.dim() - 1)))
    for group in optimizer.param_groups:
        group["lr"] = PEAK * min(1, (step + 1) / WARM_UP)
    optimizer.step()


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    at = torch.randint(len(text) - LENGTH - 1, (WORKERS, BATCH, 1), generator=generator)
    return text[at + torch.arange(LENGTH + 1)]


# --- the tables ---------------------------------------------------------------------------------------------------


def measured(job: tuple[str, int, int]) -> dict[str, Any]:
    group, number, seed = job
    row = GROUPS[group][number]
    return {"name": row.name, "inner": row.inner, "model": row.model, "seed": seed, **train(row, seed)}


def main(
    group: Annotated[str, typer.Option(help=", ".join(GROUPS))] = "rates",
    out: Annotated[Path | None, typer.Option(help="Where to keep the figures, as JSON.")] = None,
    seeds: int = 3,
    only: Annotated[str, typer.Option(help="Rows whose name holds this, and the references.")] = "",
    processes: int = 2,
) -> None:
    chosen = [number for number, row in enumerate(GROUPS[group]) if only in row.name or row.reference]
    jobs = [(group, number, seed) for seed in range(seeds) for number in chosen]
    before, runs = time.time(), []
    # A process per run: an ablation changes the codec for good.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for run in pool.map(measured, jobs):
            runs.append(run)
            said = f"{run['seed']} {run['inner']} {run['name']}: {run['loss']:.4f} at {run['up']:.3f} b"
            print(f"{said}, {time.time() - before:.0f} s", flush=True)
    print("\n".join(table([GROUPS[group][number] for number in chosen], runs)))
    if out:
        conditions = {"workers": WORKERS, "steps": STEPS, "seeds": seeds, "load": os.getloadavg()}
        out.write_text(json.dumps({"conditions": conditions, "runs": runs}) + "\n")


def table(rows: list[Row], runs: list[Mapping[str, Any]]) -> Iterator[str]:
    """Medians and ranges over the seeds; losses against the best uncompressed run of the same seed and interval; bits
    up, in all, per parameter and worker until the loss is within 3 % of what that ended with."""
    yield "| inner steps | codec | bits up | down | loss | over the best uncompressed | bits to within 3 % |"
    yield "| ---: | :--- | ---: | ---: | ---: | ---: | ---: |"
    references = {row.name for row in rows if row.reference}
    for row in rows:
        mine = [run for run in runs if run["name"] == row.name and run["inner"] == row.inner]
        over, needed = [], []
        for run in mine:
            same = [r for r in runs if r["seed"] == run["seed"] and r["inner"] == (row.inner or 15)]
            best = min((r for r in same if r["name"] in references), key=lambda r: float(r["loss"]))
            over.append(100 * (run["loss"] / best["loss"] - 1))
            goal = 1.03 * best["curve"][-1][1]
            needed.append(next((bits for bits, lost in run["curve"] if lost <= goal), math.inf))
        bits, down, lost = (statistics.median(run[key] for run in mine) for key in ("up", "down", "loss"))
        spread = f"{statistics.median(over):+.1f} % ({min(over):+.1f} … {max(over):+.1f})"
        yield f"| {row.inner} | {row.name} | {bits:.3f} | {down:.3f} | {lost:.4f} | {spread} | {said(needed)} |"


def said(needed: list[float]) -> str:
    middle = statistics.median(needed)
    return "not reached" if math.isinf(middle) else f"{middle:.1f}"


if __name__ == "__main__":
    typer.run(main)
