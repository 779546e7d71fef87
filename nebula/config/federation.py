"""Clusters, their links, and where the coordinator is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nebula.config.base import Config, Name, Positive
from nebula.types import COORDINATOR


class Link(Config):
    """The emulated path between a cluster and the coordinator: `rate_mbps` each way, `rtt_ms` both ways together,
    `jitter_ms` the most that one way may take longer, `loss` the share of 1460-byte segments lost, each of which holds
    up the stream for one round trip."""

    rate_mbps: Annotated[float, Field(gt=0)] = 100.0
    rtt_ms: Annotated[float, Field(ge=0)] = 50.0
    jitter_ms: Annotated[float, Field(ge=0)] = 0.0
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
