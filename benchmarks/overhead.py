"""What the stack costs per inner step: each engine against a plain torch loop. Aim: at most 1.03 times the loop.

    python benchmarks/overhead.py [--slices 40] [--steps 2] [--out benchmarks/results/overhead.json]

Five sides train the code-moe model from the same start on the same windows, each as one rank with one CPU thread in a
process of its own: the plain loop of plain.py, the plain loop again (its ratio to itself is the noise), and
types.Engine.train with the rank in this process, in a spawned process, and in a Ray actor. They take turns, a slice of
a few steps each, in an order that rotates, so that what else the machine does hits all of them. The agent calls an
engine for about a second's steps at a time; where a step takes less than half a second, slices of two are shorter, to
the engines' disadvantage. An engine's time is its caller's, so it includes the way to the rank and back; the loop's is
its own. Reported is the median, over slices, of the ratio to the plain loop of the same turn, of wall time and, as a
check that a busy machine disturbs less, of the CPU time of the rank's process. The losses of all sides must agree, or
the work was not the same and the benchmark fails.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import TRAINER, machine, ratios, spread, table, write

from nebula.cli.prepare import cache_folder
from nebula.config import Agreement, Cluster, Federation, agree
from nebula.data.prepare import prepare
from nebula.recipe import load_recipe
from nebula.runtime.engine import GroupEngine, Ranks
from nebula.runtime.heads import Head
from nebula.runtime.local import InProcess, Processes
from nebula.runtime.ray import RayGroup, connect, disconnect
from nebula.types import Json, Steps

CLUSTER = "north"
AIM = 1.03
LOSS_TOLERANCE = 1e-3
"""Nats. Different orders of fp32 sums, amplified by training; another batch or another rate is far beyond it."""

HEAD = ("side", "step, ms", f"wall time over the loop's, aim ≤ {AIM}: median (min … max)", "CPU time over the loop's")

Train = Callable[[int, int], tuple[float, float]]
"""(first step, steps) to (seconds, mean loss)."""


@dataclass(frozen=True, slots=True)
class Side:
    """`pid`: the process that computes."""

    train: Train
    pid: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds per slice."""

    wall: list[float]
    cpu: list[float]


class Hosted:
    """The in-process engine, in a process of its own like the other sides."""

    def __init__(self, *, rank: int, world: int, **settings: Any) -> None:
        self.engine = GroupEngine(lambda: InProcess(Ranks(count=world, settings=settings)))
        self.engine.start()
        self.total = total_steps(settings)

    def train(self, first: int, steps: int) -> tuple[float, float]:
        return timed(self.engine, self.total)(first, steps)


def total_steps(settings: Mapping[str, Any]) -> int:
    return Agreement.parse(settings["agreement"]).run.inner_steps


def timed(engine: GroupEngine, total: int) -> Train:
    """`total`: inner steps of round 0, which is the whole run."""

    def train(first: int, steps: int) -> tuple[float, float]:
        begun = time.perf_counter()
        report = engine.train(Steps(round=0, position=0, first=first, count=steps, total=total))
        return time.perf_counter() - begun, report.loss

    return train


def settings_for(steps: int, folder: Path) -> dict[str, Any]:
    """What a rank of a one-rank cluster is given, for one round of `steps`."""
    run = load_recipe(TRAINER, ["rounds=1", f"inner_steps={steps}"])
    federation = Federation(clusters={CLUSTER: Cluster(device="cpu", threads=1)})
    data = prepare(run.data, run.model.vocab, [CLUSTER], cache_folder())
    digest = "sha256:" + hashlib.sha256(data.tokenizer.encode()).hexdigest()
    return {
        "agreement": agree(run, federation, tokenizer=digest, unigram_entropy=data.unigram_entropy).canonical(),
        "tokenizer": data.tokenizer.encode(),
        "cluster": CLUSTER,
        "facts": federation.clusters[CLUSTER].model_dump_json().encode(),
        "checkpoints": str(folder / "checkpoints"),
        "cache": str(cache_folder()),
    }


def start(settings: Mapping[str, Any], folder: Path, stack: ExitStack) -> dict[str, Side]:
    """All sides, the reference first; they end with `stack`."""

    def hosted(worker: str) -> Side:
        group = Processes(Ranks(count=1, settings=settings, worker=worker))
        stack.callback(group.kill)
        return Side(lambda first, steps: group.call_first("train", first, steps), group.pids()[0])

    def started(group: Processes | RayGroup) -> Side:
        engine = GroupEngine(lambda: group)
        stack.callback(engine.stop)
        engine.start()
        return Side(timed(engine, total_steps(settings)), group.pids()[0])

    head = Head(CLUSTER, log=folder / "ray.log", cpus=1)
    stack.callback(head.stop)
    head.start()
    sides = {"plain loop": hosted("plain:Plain"), "plain loop, again": hosted("plain:Plain")}
    sides["engine in process"] = hosted("overhead:Hosted")
    ranks = Ranks(count=1, settings=settings)
    sides["engine, spawned rank"] = started(Processes(ranks))
    head.wait()
    connect(head.address, "benchmark", head.token)
    stack.callback(disconnect)
    sides["engine, Ray actor"] = started(RayGroup(ranks, cluster=CLUSTER))
    return sides


def take_turns(sides: Mapping[str, Side], slices: int, steps: int) -> dict[str, Taken]:
    """A first slice warms up and does not count; the order rotates by one each turn."""
    names = list(sides)
    taken = {name: Taken([], []) for name in names}
    for turn in range(slices + 1):
        losses = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before = cpu_seconds(sides[name].pid)
            seconds, losses[name] = sides[name].train(turn * steps, steps)
            if turn:
                taken[name].wall.append(seconds)
                taken[name].cpu.append(cpu_seconds(sides[name].pid) - before)
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
            raise SystemExit(f"the sides did not do the same work: losses of slice {turn} are {losses}")
    return taken


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, as Linux names its clock (clock_getcpuclockid(3)): ~pid · 8 + CPUCLOCK_SCHED."""
    return time.clock_gettime((~pid << 3) | 2)


def main(
    slices: Annotated[int, typer.Option(help="Turns that count.")] = 40,
    steps: Annotated[int, typer.Option(help="Inner steps per turn.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        settings = settings_for((slices + 1) * steps, Path(temporary))
        taken = take_turns(start(settings, Path(temporary), stack), slices, steps)
    reference, *_ = taken.values()
    rows, result = [], {}
    for name, side in taken.items():
        wall, cpu = ratios(side.wall, reference.wall), ratios(side.cpu, reference.cpu)
        step = spread([1000 * seconds / steps for seconds in side.wall])
        rows.append((name, f"{step.median:.0f}", wall, cpu))
        measured: dict[str, Json] = {"wall": wall.rounded(), "cpu": cpu.rounded(), "step_ms": step.rounded()}
        result[name] = {**measured, "slice_wall_s": rounded(side.wall), "slice_cpu_s": rounded(side.cpu)}
    print(table(HEAD, rows))
    write(out, conditions, {"trainer": TRAINER.name, "slices": slices, "steps_per_slice": steps}, result)


def rounded(seconds: list[float]) -> list[float]:
    return [round(s, 4) for s in seconds]


if __name__ == "__main__":
    typer.run(main)
