"""What waiting costs: the adaptive deadline against one that knows the future, and a lost cluster to the others.

    python benchmarks/quorum.py [--out benchmarks/results/quorum.json]

Three tables, all on virtual time, so the figures are the same on every machine (and take a minute to compute):

1. Every trace of churn.json (one is measured, the others are simulated; churn.py says how) is replayed through the
   coordinator's state machine (`coordinator.step`, with the beats, ticks and deltas that the real one would see) under
   its own rule and under others in its place: a fixed number of seconds after the first delta, `max_stall` only, and no
   bound. The oracle is told when every delta will come, waits for those that come within `max_stall` of the first, and
   for no others. "Time lost": seconds a rule waits after the last of these that it gets, over the rest of its run's
   seconds; the oracle never does. "Deltas lost": those that it gives up although they would still have come within
   `max_stall`, over those that the oracle merges. A rule may trade the one for the other, so both count; the last
   column (deltas merged per second, over the oracle's) shows both together.
2. The simulated world (nebula.sim.world: the real coordinator, journal, sealing and agents) runs four clusters; in the
   middle one is killed for good. The other three's tokens per second from then to the end, against the same span of the
   undisturbed run: whatever is missing, they lost beyond the share of the fourth. All are equally fast, so that nobody
   gains by the loss. The moments are drawn, but for the worst there is: when the cluster was about to deliver last.
3. The rules `global_batch` and `outer_lr` around an absence: tokens of a round and the outer rate, over nominal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import typer
from churn import CLUSTERS, ROUNDS, Life, Trace, load
from measure import machine, table, write
from replay import FRAGMENT, Deadline, Replay, Round, fixed, oracle

from nebula.config import Blockwise, Codec, Membership, Wan, Zstd
from nebula.federation.shell import POWERS
from nebula.federation.state import Rules
from nebula.sim.world.scenario import Scenario, small
from nebula.sim.world.world import World
from nebula.types import Json

MAX_STALL = 300.0
STEPS = 20
TOKENS = 1000
"""Of an inner step."""

BOUNDS = {"30 s": 30.0, "120 s": 120.0, "max_stall": MAX_STALL, "wait for all": float("inf")}


# --- 1: against the oracle ----------------------------------------------------------------------------------------


def rules(clusters: Sequence[str], rounds: int, *, hold: bool = False, power: float = 0.0) -> Rules:
    return Rules(
        members=dict.fromkeys(clusters, TOKENS),
        fragments=(FRAGMENT,),
        rounds=rounds,
        inner_steps=STEPS,
        evaluate_every=rounds + 1,
        quorum=1,
        max_stall=MAX_STALL,
        hold=hold,
        power=power,
    )


@dataclass(frozen=True, slots=True)
class Found:
    """`seconds` of all rounds, of which so many were `lost`; deltas `merged` and `dropped`."""

    seconds: float
    lost: float
    merged: int
    dropped: int

    @property
    def time_lost(self) -> float:
        return self.lost / (self.seconds - self.lost)


def found(rounds: Sequence[Round]) -> Found:
    return Found(
        rounds[-1].committed,
        sum(r.lost for r in rounds),
        sum(len(r.merge.arrivals) for r in rounds),
        sum(r.dropped for r in rounds),
    )


def replayed(trace: Trace) -> dict[str, Found]:
    """By rule."""

    def under(until: Deadline | None) -> Found:
        return found(Replay(trace, rules(list(trace.lives), ROUNDS), beats=until is None).run(until))

    knowing = Replay(trace, rules(list(trace.lives), ROUNDS), beats=False)
    best = {"oracle": found(knowing.run(oracle(knowing))), "adaptive": under(None)}
    return best | {name: under(fixed(seconds)) for name, seconds in BOUNDS.items()}


def figures(by_rule: Mapping[str, Found]) -> dict[str, dict[str, float]]:
    best = by_rule["oracle"]
    return {
        name: {
            "seconds": round(f.seconds, 1),
            "time_lost": round(f.time_lost, 5),
            "deltas_lost": round(f.dropped / best.merged, 5),
            "deltas_per_second": round(f.merged / f.seconds * best.seconds / best.merged, 5),
        }
        for name, f in by_rule.items()
    }


def against_the_oracle(traces: Mapping[str, Trace]) -> tuple[str, dict[str, Json]]:
    result = {name: figures(replayed(trace)) for name, trace in traces.items()}
    head = ("trace: time lost / deltas lost, %", "adaptive", *BOUNDS, "adaptive's deltas per s")
    rows = [
        (
            name,
            *(f"{100 * by[rule]['time_lost']:.2f} / {100 * by[rule]['deltas_lost']:.1f}" for rule in head[1:-1]),
            f"{by['adaptive']['deltas_per_second']:.2f}×",
        )
        for name, by in result.items()
    ]
    return table(head, rows), {name: {"how": traces[name].how, **dict(by.items())} for name, by in result.items()}


# --- 2: a cluster is lost -----------------------------------------------------------------------------------------

PACE = 3.0
"""Seconds per inner step, of every cluster."""

LINK = (1e5, 0.05, 0.01)
"""Bytes per second, round trip, jitter."""

WORLD_ROUNDS = 12
SEEDS = 2
DRAWN = 3
"""Moments per seed."""

NARROWLY = 0.2
"""Seconds by which a delta misses its round at the worst moment."""

Lines = Sequence[tuple[float, str, str, Mapping[str, Any]]]
"""A world's trace."""


FOUR_BITS = Codec(steps=(Blockwise(), Zstd()))
"""What the kept figures were measured with."""


def world_of(seed: int) -> World:
    run = small(
        rounds=WORLD_ROUNDS,
        inner_steps=STEPS,
        fragments=1,
        wan=Wan(up=FOUR_BITS, down=FOUR_BITS),
        membership=Membership(quorum=3),
        evaluate_every=WORLD_ROUNDS,
    )
    world = World(Scenario(seed=seed, run=run, pace=dict.fromkeys(CLUSTERS, PACE), faults=()))
    for site in world.sites.values():
        site.link.rate, site.link.rtt, site.link.jitter = LINK
    return world


def without(victim: str, moment: float, seed: int) -> Lines:
    """Of a run in which a cluster is killed for good."""
    world = world_of(seed)
    world.scheduler.at(moment, partial(world.sites[victim].kill, after=1e9))
    world.run()
    return world.trace


def narrow(lines: Lines, round: int) -> tuple[str, float]:
    """The cluster that delivers last in a round, and when it is about to."""
    *_, (time, cluster) = [(t, d["cluster"]) for t, _, what, d in lines if what == "delta" and d["round"] == round]
    return cluster, time - NARROWLY


def rate(lines: Lines, since: float, victim: str) -> float:
    """Deltas per second of the others that are merged from `since` to the end; they all stand for as many tokens."""
    merged = [(time, details["contributors"]) for time, _, what, details in lines if what == "commit"]
    return sum(len({*who} - {victim}) for time, who in merged if time > since) / (merged[-1][0] - since)


def losing_one() -> tuple[str, dict[str, Json]]:
    losses: dict[str, list[float]] = {"drawn": [], "worst": []}
    for seed in range(SEEDS):
        rng, world = Random(f"loss {seed}"), world_of(seed)
        world.run()
        third = world.scheduler.now / 3
        moments = [(rng.choice(CLUSTERS), rng.uniform(third, 2 * third)) for _ in range(DRAWN)]
        for victim, moment in (*moments, narrow(world.trace, WORLD_ROUNDS // 2)):
            after = rate(without(victim, moment, seed), moment, victim)
            kind = "drawn" if (victim, moment) in moments else "worst"
            losses[kind].append(1 - after / rate(world.trace, moment, victim))
    head = ("moment of the loss", "runs", "the others' throughput lost: median (min … max)")
    rows = [(kind, len(of), f"{median(of):.1%} ({min(of):.1%} … {max(of):.1%})") for kind, of in losses.items()]
    return table(head, rows), {kind: [round(loss, 5) for loss in of] for kind, of in losses.items()}


# --- 3: around an absence -----------------------------------------------------------------------------------------

ABSENCE = (230.0, 420.0)
"""Seconds; rounds take 62."""


def absence() -> tuple[str, dict[str, Json]]:
    lives = {cluster: Life(work=(60.0,) * 12) for cluster in CLUSTERS}
    lives[CLUSTERS[-1]] = replace(lives[CLUSTERS[-1]], away=(ABSENCE,))
    result: dict[str, dict[str, list[float]]] = {}
    for batch in ("shrink", "hold"):
        runs = {
            name: Replay(Trace("", lives), rules(CLUSTERS, 10, hold=batch == "hold", power=power)).run()
            for name, power in POWERS.items()
        }
        tokens = [sum(a.weight for a in r.merge.arrivals) / (len(CLUSTERS) * STEPS * TOKENS) for r in runs["constant"]]
        rates = {name: [round(r.merge.scale, 3) for r in rounds] for name, rounds in runs.items()}
        result[batch] = {"clusters": [len(r.merge.arrivals) for r in runs["constant"]], "tokens": tokens, **rates}
    rows = [
        (f"{batch}: {what}", *(f"{value:g}" for value in values))
        for batch, by in result.items()
        for what, values in by.items()
    ]
    return table(("round", *(f"r{number}" for number in range(10))), rows), dict(result)


def main(out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None) -> None:
    conditions = machine()
    parts = {"oracle": against_the_oracle(load()), "loss": losing_one(), "absence": absence()}
    print("\n\n".join(text for text, _ in parts.values()))
    settings: dict[str, Json] = {
        "max_stall": MAX_STALL,
        "rounds": ROUNDS,
        "inner_steps": STEPS,
        "world_rounds": WORLD_ROUNDS,
    }
    write(out, conditions, settings, {name: found for name, (_, found) in parts.items()})


if __name__ == "__main__":
    typer.run(main)
