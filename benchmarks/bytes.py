"""What crosses the WAN per parameter and round with each codec, and what the model is worth after the same rounds.

    python benchmarks/bytes.py [--rounds 8] [--inner-steps 20] [--seeds 3] [--out benchmarks/results/bytes.json]

Real runs (`nebula run --engine local`, two clusters of one rank, gRPC over mTLS on loopback) of a mixture of experts of
1.4 million parameters. Bytes are what the kernel counted on the clusters' sockets, so they include sealing, framing,
TLS, joining and planning; bits per parameter and round are those of summary.json, the mean over clusters and seeds. The
baselines are arithmetic: sending every parameter once a round as fp32 or bf16, and data parallelism that sends bf16
gradients at every inner step. "×" says how many times less than these both directions together are. Every round waits
for both clusters, or a busy machine would decide which losses come out. Losses are of the final global model on
held-out text, nats per token; each seed is another initialisation and data order, and a difference is to the fp32 run
of the same seed.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import NEBULA, TRAINER, Spread, machine, spread, table, write

from nebula.types import Json

CODECS = {
    "fp32": "[]",
    "8 bit": "[{kind: blockwise, bits: 8}, {kind: zstd}]",
    "4 bit": "[{kind: blockwise, bits: 4}, {kind: zstd}]",
}
"""`steps` of both directions; fp32, without any, is the reference for the losses."""

MODEL = ("vocab=2048", "layers=2", "dim=128", "ffn_dim=128", "experts=8", "dense_layers=0")

CLUSTERS = ("north", "south")
FEDERATION = {
    "coordinator": {"port": 0},
    "clusters": {name: {"ranks": 1, "device": "cpu"} for name in CLUSTERS},
}
"""No emulated link: it would change when bytes travel, not how many."""

BF16, FP32 = 16, 32


def overrides(steps: str, rounds: int, inner_steps: int, seed: int) -> list[str]:
    """What `nebula run` is told for one run, as --set arguments."""
    model = [f"model.{setting}" for setting in MODEL]
    wan = [f"wan.{way}.steps={steps}" for way in ("up", "down")]
    extent = [f"rounds={rounds}", f"inner_steps={inner_steps}", f"seed={seed}", "data.seq_len=128", "batch=4"]
    everyone = [f"membership.quorum={len(CLUSTERS)}"]  # or a busy machine decides who is late
    return [part for setting in (*model, *wan, *extent, *everyone) for part in ("--set", setting)]


def measure(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The summary of one run."""
    clusters = folder / "clusters.json"
    clusters.write_text(json.dumps(FEDERATION))  # JSON is YAML
    command = [*NEBULA, "run", str(TRAINER), "--clusters", str(clusters), "--engine", "local", "--out", str(folder)]
    done = subprocess.run([*command, "--json", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nebula run ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    (summary,) = folder.glob("*/summary.json")
    parsed: dict[str, Any] = json.loads(summary.read_text())
    return parsed


def figures(summaries: Sequence[Mapping[str, Any]], inner_steps: int) -> dict[str, float]:
    """Means over clusters and seeds."""
    wans = [cluster["wan"] for summary in summaries for cluster in summary["clusters"].values()]

    def mean(key: str) -> float:
        return sum(float(wan[key]) for wan in wans) / len(wans)

    up, down = mean("up_bits_per_param_per_round"), mean("down_bits_per_param_per_round")
    return {
        "up_bits": up,
        "down_bits": down,
        "less_than_fp32_per_round": 2 * FP32 / (up + down),
        "less_than_bf16_per_round": 2 * BF16 / (up + down),
        "less_than_bf16_per_step": 2 * BF16 * inner_steps / (up + down),
        "payload_share": mean("goodput_share"),
    }


def lost(summaries: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Spread:
    """Held-out loss beyond the reference's of the same seed."""
    return spread([ours["eval_loss"] - theirs["eval_loss"] for ours, theirs in zip(summaries, reference, strict=True)])


def row(name: str, f: Mapping[str, float], loss: Spread, difference: Spread) -> tuple[object, ...]:
    baselines = (f[f"less_than_{kind}"] for kind in ("fp32_per_round", "bf16_per_round", "bf16_per_step"))
    bits = (f"{f['up_bits']:.2f}", f"{f['down_bits']:.2f}")
    return name, *bits, *(f"{times:.1f}×" for times in baselines), f"{f['payload_share']:.1%}", loss, difference


HEAD = (
    "codec",
    "bits/param/round up",
    "down",
    "less than fp32 per round",
    "bf16 per round",
    "bf16 per step",
    "payload / wire",
    "held-out loss: median (min … max)",
    "minus fp32's",
)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each run.")] = 8,
    inner_steps: Annotated[int, typer.Option(help="Inner steps per round.")] = 20,
    seeds: Annotated[int, typer.Option(help="Runs per codec.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in CODECS}
    for seed in range(seeds):
        for name, steps in CODECS.items():
            with tempfile.TemporaryDirectory() as folder:
                summary = measure(Path(folder), overrides(steps, rounds, inner_steps, seed))
            summaries[name].append(summary)
    rows, result = [], {}
    for name, runs in summaries.items():
        found, loss = figures(runs, inner_steps), spread([run["eval_loss"] for run in runs])
        difference = lost(runs, summaries["fp32"])
        rows.append(row(name, found, loss, difference))
        numbers: dict[str, Json] = {key: round(value, 4) for key, value in found.items()}
        result[name] = {**numbers, "eval_loss": loss.rounded(), "eval_loss_minus_fp32": difference.rounded()}
    print(table(HEAD, rows))
    params = summaries["fp32"][0]["params"]
    settings = {
        "params": params,
        "rounds": rounds,
        "inner_steps": inner_steps,
        "seeds": seeds,
        "clusters": len(CLUSTERS),
    }
    write(out, conditions, settings, result)


if __name__ == "__main__":
    typer.run(main)
