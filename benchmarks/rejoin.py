"""How fast a cluster that comes back has the model. Aim: the state at 90 % of the line rate or more.

    python benchmarks/rejoin.py [--turns 3] [--out benchmarks/results/rejoin.json]

The real coordinator (journal and blobs on disk, gRPC over mTLS) in a process of its own, the real gateway in this one,
sealed frames through the emulated link between them. The state is one fragment of 31 million fp32 parameters. Times are
from the first call after joining until the gateway has all of it, checked against its hash; each turn has a new
coordinator, so they include that it hashes the chunks. Share: state or updates alone over what the link could have
carried in that time. Crossed: all that came through the link in that time, as the relay counts it.

    state         as a late joiner fetches it
    state, cut    the connection is lost half-way
    1 … 4 rounds  the cluster has the state of so many rounds ago and takes the updates since (4 bits and zstd), which
                  the coordinator keeps while they are half a state or less
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import Spread, machine, spread, table, write

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.config import (
    Agreement,
    Blockwise,
    Cluster,
    Codec,
    Federation,
    Link,
    Membership,
    Model,
    Run,
    Wan,
    Zstd,
    agree,
)
from nebula.federation.hub import Hub
from nebula.federation.journal import open_journal
from nebula.federation.merge import fragment_shapes
from nebula.federation.service import serve
from nebula.parallel.export import boxes
from nebula.runtime.gateway import Gateway
from nebula.security.pki import Identity, throwaway
from nebula.sim.wan import Relay, running
from nebula.types import COORDINATOR, ROLE, Beat, Json, PushTicket
from nebula.wan.chunks import CHUNK_BYTES
from nebula.wan.codec import Encoder
from nebula.wan.frame import pack
from nebula.wan.transport import TLS_NAME

AIM = 0.9
MODEL = Model(vocab=8192, layers=4, dim=512, heads=8, kv_heads=8, ffn_dim=1024, experts=4, top_k=2, dense_layers=2)
FRAGMENT = "f0"
STAYS, LATE = "stays", "late"
LINKS = (Link(rate_mbps=100.0, rtt_ms=50.0), Link(rate_mbps=200.0, rtt_ms=50.0))
MISSED = 4
"""Rounds, at the most."""
FOUR_BITS = Codec(steps=(Blockwise(), Zstd()))


@dataclass(frozen=True, slots=True)
class Transfer:
    """`payload`: bytes of state or updates; `crossed`: of everything."""

    payload: int
    crossed: int
    seconds: float

    def share(self, link: Link) -> float:
        return 8 * self.payload / self.seconds / (link.rate_mbps * 1e6)


def agreement() -> Agreement:
    membership = Membership(quorum=1, max_stall=120.0)
    wan = Wan(up=FOUR_BITS, down=FOUR_BITS)
    run = Run(name="rejoin", model=MODEL, fragments=1, rounds=MISSED + 1, inner_steps=1, membership=membership, wan=wan)
    federation = Federation(clusters=dict.fromkeys((STAYS, LATE), Cluster(device="cpu")))
    return agree(run, federation, tokenizer="", unigram_entropy=1.0)


def coordinate(folder: Path, told: Connection) -> None:
    """A coordinator, until it is told to end. Says its port."""
    identity, agreed = Identity.load(folder / COORDINATOR), agreement()
    journal = open_journal(folder / "journal.sqlite", agreement=agreed.digest())
    hub = Hub(agreed, b"", identity, journal, Ledger(Folder(folder / "blobs")), lambda *_, **__: None)
    server, port = serve(hub, identity, "127.0.0.1", 0)
    told.send(port)
    while not told.poll(0.1):
        hub.tick()
    server.stop(grace=None).wait()
    hub.close()


@contextmanager
def coordinator(folder: Path) -> Iterator[int]:
    throwaway(folder, [STAYS, LATE], [TLS_NAME])
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=coordinate, args=(folder, there))
    process.start()
    yield here.recv()
    here.send("end")
    process.join()


@dataclass(frozen=True, slots=True)
class Site:
    """The late cluster's gateway, which has joined, and its link. `port`: the coordinator's."""

    gateway: Gateway
    relay: Relay
    folder: Path
    port: int

    def transfer(self, *versions: int) -> Transfer:
        """Of the updates to these versions; of the state if there are none."""
        before, start = self.relay.traffic.down_bytes, time.perf_counter()
        if versions:
            payload = sum(len(self.gateway.pull("update", FRAGMENT, version)[1]) for version in versions)
        else:
            payload = len(self.gateway.pull("state", FRAGMENT, 0)[1])
        seconds = time.perf_counter() - start
        return Transfer(payload, self.relay.traffic.down_bytes - before, seconds)

    def cut_after(self, size: int) -> None:
        """Lose the connection once so many more bytes have come."""
        until = self.relay.traffic.down_bytes + size

        def watch() -> None:
            while self.relay.traffic.down_bytes < until:
                time.sleep(0.01)
            self.relay.cut()

        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def late(link: Link) -> Iterator[Site]:
    """Before a new coordinator, whom nobody has asked for anything yet."""
    folder = Path(tempfile.mkdtemp())
    try:
        with coordinator(folder) as port, running({LATE: (link, ("127.0.0.1", port))}) as relays:
            gateway = joined(folder, LATE, relays[LATE].port)
            yield Site(gateway, relays[LATE], folder, port)
            gateway.close()
    finally:
        shutil.rmtree(folder)


def joined(folder: Path, cluster: str, port: int) -> Gateway:
    settings: dict[str, Any] = {"agreement": agreement().digest(), "max_stall": 120.0}
    gateway = Gateway(identity=str(folder / cluster), address=f"127.0.0.1:{port}", cluster=cluster, **settings)
    gateway.join()
    return gateway


def go_on(site: Site, rounds: int) -> None:
    """The late cluster is away, and the other one trains. What it learns is noise, which compresses worst."""
    site.gateway.beat(Beat(leaving=True))
    stays, shapes = joined(site.folder, STAYS, site.port), fragment_shapes(agreement())[FRAGMENT]
    encoder, generator = Encoder(agreement().run.wan.up), torch.Generator().manual_seed(0)
    for round in range(rounds):
        delta = {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        packet = pack(encoder.encode(boxes(delta)))
        stays.push(PushTicket(role=ROLE, fragment=FRAGMENT, round=round, base=round, weight=1.0), [packet])
        assert stays.pull("update", FRAGMENT, round + 1)[0].status == "ready"
        encoder.settle(True)
    stays.close()


def state(link: Link, *, cut: bool) -> Transfer:
    shapes = fragment_shapes(agreement())[FRAGMENT].values()
    with late(link) as site:
        if cut:
            site.cut_after(sum(4 * prod(shape) for shape in shapes) // 2)
        return site.transfer()


def updates(link: Link) -> dict[str, Transfer]:
    with late(link) as site:
        go_on(site, MISSED)
        return {
            f"{missed} round{'s' * (missed > 1)}": site.transfer(*range(MISSED - missed + 1, MISSED + 1))
            for missed in range(1, MISSED + 1)
        }


def turn(link: Link) -> dict[str, Transfer]:
    return {"state": state(link, cut=False), "state, cut": state(link, cut=True), **updates(link)}


def figures(link: Link, turns: Sequence[Mapping[str, Transfer]]) -> dict[str, dict[str, Spread]]:
    """By what was transferred."""
    return {
        what: {
            "crossed, MB": spread([turn[what].crossed / 1e6 for turn in turns]),
            "seconds": spread([turn[what].seconds for turn in turns]),
            "share": spread([turn[what].share(link) for turn in turns]),
        }
        for what in turns[0]
    }


def main(
    turns: Annotated[int, typer.Option(help="Of everything, at each rate.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    result: dict[str, Json] = {}
    for link in LINKS:
        found = figures(link, [turn(link) for _ in range(turns)])
        name = f"{link.rate_mbps:g} Mbit/s"
        head = (f"{name}, aim ≥ {AIM}: median (min … max)", *found["state"])
        print(table(head, [(what, *values.values()) for what, values in found.items()]) + "\n", flush=True)
        result[name] = {what: {key: v.rounded() for key, v in values.items()} for what, values in found.items()}
    write(out, conditions, {"turns": turns, "rtt_ms": LINKS[0].rtt_ms, "chunk_bytes": CHUNK_BYTES}, result)


if __name__ == "__main__":
    typer.run(main)
