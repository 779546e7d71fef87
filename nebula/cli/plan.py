"""`nebula plan`: what will a round cost, where does its time go, and what would change that?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from nebula.cli import output
from nebula.cli.prepare import resolve, run_command
from nebula.config import Adaptive, Codec, Federation, Run
from nebula.errors import UsageError
from nebula.metrics import units
from nebula.planner.exchange import Forecast, Site, forecast, step_for
from nebula.sim.line import Shape

DAY = 86400.0
LITTLE = 0.05
"""A share of stall that most would accept."""
RATES = (0.37, 1.0, 2.0, 4.0)
"""Bits per parameter, tried both ways."""
LONGER = (1, 2, 4)
"""Times as many inner steps a round."""


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as trainers/code_moe.py.")],
    clusters: Annotated[Path, typer.Option(help="A cluster file; every cluster needs a link in it.")],
    set: Annotated[list[str] | None, typer.Option(help="Change a value: --set rounds=4. May be repeated.")] = None,
    step_seconds: Annotated[
        list[str] | None, typer.Option(help="Of an inner step: 0.4 for all clusters, or north=0.4. May be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict bytes, seconds and stall of a round, from the cluster file's links and this machine's coding speed.
    Starts nothing."""
    run, federation = resolve(recipe, clusters, set or [])
    steps = parse_steps(step_seconds or [], list(federation.clusters))
    sites = sites_of(federation, run, steps)
    found, others = predict(run, sites)
    fields: dict[str, object] = {
        "clusters": {name: figures(one) for name, one in found.items()},
        "rounds_per_day": DAY / max(one.round for one in found.values()) if steps else None,
        "instead": others,
    }
    text = describe(run, found, others, bool(steps))
    output.result("plan", fields, text=text, next=run_command(recipe, clusters, set or []), as_json=json)


def parse_steps(given: list[str], names: list[str]) -> dict[str, float]:
    """Seconds of an inner step by cluster; empty if none are given. Raises UsageError."""
    steps: dict[str, float] = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < DAY or (name and name not in names):
            raise UsageError(f"--step-seconds {text} is not 0.4 or, for one of {', '.join(names)}, {names[0]}=0.4")
        steps |= {name: seconds} if name else dict.fromkeys(names, seconds)
    if steps and (missing := [name for name in names if name not in steps]):
        raise UsageError(f"--step-seconds does not say how long a step of {missing[0]} takes")
    return steps


def sites_of(federation: Federation, run: Run, steps: Mapping[str, float]) -> dict[str, Site]:
    """Raises UsageError where the cluster file does not say how fast a link is."""
    sites = {}
    for name, cluster in federation.clusters.items():
        if cluster.link is None:
            raise UsageError(
                f"the cluster file does not say how fast the link of {name} is",
                hint=f"give clusters.{name}.link a rate_mbps and an rtt_ms",
            )
        shape = Shape.of(cluster.link)
        sites[name] = Site(
            rate=shape.rate,
            rtt=shape.rtt,
            loss=shape.loss,
            step=steps.get(name, 0.0),
            share=1 / cluster.ranks,
            lanes=run.wan.streams,
        )
    return sites


def predict(run: Run, sites: Mapping[str, Site]) -> tuple[dict[str, Forecast], list[dict[str, float]]]:
    """For the run as it is, and what other rates and intervals would give."""
    from nebula.models.init import count
    from nebula.planner.speeds import measured

    parameters = count(run.model)
    up = measured(run.wan.up)
    down = up if run.wan.down.steps == run.wan.up.steps else measured(run.wan.down)
    found = forecast(sites, parameters, run.inner_steps, up, down)
    others = []
    for bits in RATES:
        cost = measured(Codec(steps=(Adaptive(bits=bits),)))
        for times in LONGER:
            slowest = max(
                forecast(sites, parameters, times * run.inner_steps, cost, cost).values(), key=attrgetter("stall")
            )
            moved = sum((slowest.up_bytes, slowest.down_bytes)) / times
            others.append({"bits": bits, "inner_steps": times * run.inner_steps, "bytes": moved, **_times(slowest)})
    return found, others


def figures(one: Forecast) -> dict[str, float]:
    return {**asdict(one), **_times(one)}


def _times(one: Forecast) -> dict[str, float]:
    return {"round": one.round, "stall": one.stall, "stall_share": one.stall_share}


def describe(run: Run, found: Mapping[str, Forecast], others: list[dict[str, float]], timed: bool) -> str:
    return "\n".join([*_clusters(run, found, timed), "", *_instead(run, others, timed)])


def _clusters(run: Run, found: Mapping[str, Forecast], timed: bool) -> Iterator[str]:
    yield f"A round of {run.inner_steps} inner steps, seconds:"
    yield f"  {'':<12} {'up':>10} {'down':>10} {'encode':>8} {'send':>8} {'wait':>8} {'receive':>8} {'decode':>8}"
    for name, one in found.items():
        times = (one.encode, one.up, one.wait, one.down, one.decode)
        sizes = f"{units.size(one.up_bytes):>10} {units.size(one.down_bytes):>10}"
        yield f"  {name:<12} {sizes} " + " ".join(f"{seconds:>8.3f}" for seconds in times)
    slowest = max(found.values(), key=attrgetter("stall"))
    if timed:
        yield (
            f"{units.share(slowest.stall_share)} of a round stalls; {DAY / slowest.round:.0f} rounds a day, "
            f"{units.size(DAY / slowest.round * (slowest.up_bytes + slowest.down_bytes))} over the busiest link"
        )
    else:
        need = step_for(slowest, run.inner_steps, LITTLE)
        yield f"less than {units.share(LITTLE)} stalls if an inner step takes {need:.2f} s or more (see --step-seconds)"


def _instead(run: Run, others: list[dict[str, float]], timed: bool) -> Iterator[str]:
    yield f"What would change it, both ways, per {run.inner_steps} inner steps of the busiest link:"
    yield f"  {'bits':>6} {'inner steps':>12} {'bytes':>10} {'exchange, s':>12}" + (f" {'stall':>6}" if timed else "")
    for other in others:
        line = f"  {other['bits']:>6g} {other['inner_steps']:>12.0f} {units.size(other['bytes']):>10}"
        stall = f" {units.share(other['stall_share']):>6}" if timed else ""
        yield f"{line} {other['stall']:>12.3f}{stall}"
