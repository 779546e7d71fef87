"""`nebula agent`: takes part in a run as one cluster, until the run is done or stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nebula.cli.prepare import cache_folder
from nebula.config import Agreement, Cluster
from nebula.errors import UsageError
from nebula.recipe import load_federation

if TYPE_CHECKING:
    from nebula.types import Engine, Transport


def command(
    cluster: Annotated[str, typer.Argument(help="This cluster's name in the cluster file.")],
    clusters: Annotated[Path, typer.Option(help="The cluster file.")],
    coordinator: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    identity: Annotated[Path, typer.Option(help="Folder of this cluster's certificate and key.")],
    agreement: Annotated[str, typer.Option(help="Digest of the agreement (see run.json); others are refused.")],
    out: Annotated[Path, typer.Option(help="Where checkpoints and events of this cluster go.")],
    max_stall: Annotated[float, typer.Option(help="Seconds without an answer before giving up.")] = 120.0,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="Where the ranks live.")] = "ray",
    ray: Annotated[str, typer.Option(help="host:port of this cluster's Ray.")] = "",
    ray_token: Annotated[Path | None, typer.Option(help="File with the Ray cluster's token.")] = None,
) -> None:
    """Train as one cluster of a run. It dials out to the coordinator; nothing dials in. SIGTERM makes it leave the run,
    which goes on without it; started again, it takes part again from where the run is then."""
    from nebula.federation.agent import Agent
    from nebula.metrics.events import EventLog

    facts = _facts(clusters, cluster)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = {
        "identity": str(identity),
        "address": coordinator,
        "cluster": cluster,
        "agreement": agreement,
        "max_stall": max_stall,
    }
    events = EventLog(out / "clusters" / cluster / "events.jsonl")
    events.emit("phase", phase="joining")
    transport = _transport(engine, ray, ray_token, cluster, settings)
    canonical, tokenizer = transport.join()
    agreed = Agreement.parse(canonical)
    ranks_settings = {
        "agreement": canonical,
        "tokenizer": tokenizer,
        "cluster": cluster,
        "facts": facts.model_dump_json().encode(),
        "checkpoints": _checkpoints(facts, agreed, out / "checkpoints" / cluster),
        "cache": str(cache_folder()),
    }
    agent = Agent(
        cluster=cluster,
        engine=_engine(engine, cluster, facts, ranks_settings),
        transport=transport,
        emit=events.emit,
        checkpoint_every=agreed.run.checkpoint_every,
    )
    try:
        agent.run()
    except SystemExit:  # told to go: the others need not wait to find out
        agent.leave()
        raise
    finally:
        agent.engine.stop()
    transport.close()


def _checkpoints(facts: Cluster, agreed: Agreement, folder: Path) -> str:
    """Where this cluster's checkpoints go. Runs and clusters may share a bucket: each has a place of its own."""
    if facts.checkpoints is None:
        return str(folder.absolute())
    return f"{facts.checkpoints.rstrip('/')}/{agreed.run.name}-{agreed.id}/{folder.name}"


def _facts(path: Path, cluster: str) -> Cluster:
    federation = load_federation(path)
    if cluster not in federation.clusters:
        raise UsageError(f"{path} has no cluster {cluster!r}", hint=f"it has {', '.join(sorted(federation.clusters))}")
    return federation.clusters[cluster]


def _transport(kind: str, address: str, token: Path | None, cluster: str, settings: Mapping[str, Any]) -> Transport:
    if kind == "local":
        from nebula.runtime.gateway import Gateway

        return Gateway(**settings)
    from nebula.runtime.ray import RayTransport, connect

    connect(address, f"nebula-{cluster}", token)
    return RayTransport(cluster, settings)


def _engine(kind: str, cluster: str, facts: Cluster, settings: Mapping[str, Any]) -> Engine:
    from nebula.runtime.engine import GroupEngine, Ranks

    ranks = Ranks(count=facts.ranks, settings=settings, threads=facts.threads)
    if kind == "local":
        from nebula.runtime.local import launch

        return GroupEngine(lambda: launch(ranks))
    from nebula.runtime.ray import RayGroup

    return GroupEngine(lambda: RayGroup(ranks, cluster=cluster, device=facts.device))
