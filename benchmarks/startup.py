"""How long from `nebula run` to the first inner step, and what that time is made of. Aim: at most 30 s.

    python benchmarks/startup.py [--pairs 3] [--out benchmarks/results/startup.json]

Runs the code-moe recipe on the two clusters of clusters/laptop.yaml (three ranks, Ray, emulated link), as a user does,
for one short round. Each pair is a run with an empty cache folder (the corpus is read, the tokenizer trained, the text
tokenised) and then one with what the first left there. Milestones are when the run's files appear and what the
clusters' events.jsonl say, so the stages of one cluster follow each other and add up to its total:

    preparation       start of the process until the run's folder is there: imports, data, agreement, certificates
    Ray ready         until the agent is started, which waits for its cluster's Ray head
    agent imported    until the agent says that it is joining
    joined            until it has the agreement: Ray driver, gateway actor, key exchange over the link
    ranks built       until the model, the data and the process group of all its ranks are ready
    first evaluation  until the initial model has been evaluated
    first step        until the first inner step has been reported

The total is that of the cluster which is later. Files stay in the operating system's cache between runs.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from measure import NEBULA, ROOT, TRAINER, Spread, machine, spread, table, write

from nebula.config import Federation
from nebula.metrics.events import Event, read
from nebula.recipe import load_federation
from nebula.types import Json

AIM_SECONDS = 30.0
POLL_SECONDS = 0.01
STAGES = (
    "preparation",
    "Ray ready",
    "agent imported",
    "joined",
    "ranks built",
    "first evaluation",
    "first step",
)


def milestones(events: list[Event]) -> list[float]:
    """When a cluster began to join, build, evaluate and train, and had its first step. Unix seconds."""
    phases = ("joining", "building", "evaluating", "training")
    moments = [next(e["t"] for e in events if e["event"] == "phase" and e["phase"] == phase) for phase in phases]
    return [*moments, next(e["t"] for e in events if e["event"] == "step")]


def stages(begun: float, moments: list[float]) -> dict[str, float]:
    """Seconds by stage, and their sum as "total"."""
    lengths = [after - before for before, after in pairwise([begun, *moments])]
    return {**dict(zip(STAGES, lengths, strict=True)), "total": sum(lengths)}


def measure(folder: Path, cache: Path, federation: Federation) -> dict[str, dict[str, float]]:
    """Stages by cluster of one run, from its start to its end."""
    clusters, run = folder / "clusters.json", folder / "code-moe"
    clusters.write_text(federation.model_dump_json())
    command = [*NEBULA, "run", str(TRAINER), "--clusters", str(clusters), "--out", str(folder)]
    shortened = ["--set", "rounds=1", "--set", "inner_steps=2"]
    awaited = {"": run / "run.json"} | {name: run / "logs" / f"{name}.log" for name in federation.clusters}
    begun = time.time()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *shortened], env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=log, stderr=log
        )
        seen = watch(process, awaited)
    if process.wait():
        raise SystemExit(f"nebula run ended with exit code {process.returncode}:\n{(folder / 'log').read_text()}")
    return {
        name: stages(begun, [seen[""], seen[name], *milestones(list(read(run / "clusters" / name / "events.jsonl")))])
        for name in federation.clusters
    }


def watch(process: subprocess.Popen[bytes], awaited: Mapping[str, Path]) -> dict[str, float]:
    """When each file appeared, Unix seconds; what has not by the end of the process is left out."""
    seen: dict[str, float] = {}
    while len(seen) < len(awaited) and process.poll() is None:
        for name, path in awaited.items():
            if name not in seen and path.exists():
                seen[name] = time.time()
        time.sleep(POLL_SECONDS)
    return seen


def later(run: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The stages of the cluster that trained last."""
    return max(run.values(), key=lambda measured: measured["total"])


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of a cold and a warm run.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    federation = load_federation(ROOT / "clusters" / "laptop.yaml", ["coordinator.port=0"])
    runs: dict[str, list[dict[str, float]]] = {"cold cache": [], "warm cache": []}
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as cache:
            for measured in runs.values():
                with tempfile.TemporaryDirectory() as folder:
                    measured.append(later(measure(Path(folder), Path(cache), federation)))
    spreads: dict[str, dict[str, Spread]] = {
        name: {stage: spread([run[stage] for run in measured]) for stage in (*STAGES, "total")}
        for name, measured in runs.items()
    }
    rows = [(stage, *(by_stage[stage] for by_stage in spreads.values())) for stage in (*STAGES, "total")]
    print(table((f"seconds, aim ≤ {AIM_SECONDS:.0f}: median (min … max)", *spreads), rows))
    result: dict[str, Json] = {
        name: {stage: value.rounded() for stage, value in by_stage.items()} for name, by_stage in spreads.items()
    }
    ranks = {name: cluster.ranks for name, cluster in federation.clusters.items()}
    write(out, conditions, {"trainer": TRAINER.name, "ranks": ranks, "pairs": pairs}, result)


if __name__ == "__main__":
    typer.run(main)
