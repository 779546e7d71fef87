"""How much of a line a large payload gets, up and down, over TCP from end to end: packets delayed and lost by a path
between two network namespaces. Aim: 97 % of the line's rate for 128 MB without losses, 85 % with 0.1 to 1 %.

    python benchmarks/link.py [--turns 3] [--out benchmarks/results/link.json]          as root, on Linux

The real coordinator (journal and blobs on disk, gRPC over mTLS) in one namespace, the real gateway in the other, sealed
chunks. Up: a delta of plain fp32, from the first call until its last chunk is there. Down: the state, from its head to
its last chunk. Share: payload over what the line could have carried in that time, headers of IP and TCP included (2.7 %
of 1500 bytes). "cubic": the same with the common congestion control instead of BBR.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import Spread, machine, spread, table, write

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.config import Agreement, Cluster, Codec, Federation, Link, Model, Run, Wan, agree
from nebula.federation.hub import Hub
from nebula.federation.journal import open_journal
from nebula.federation.merge import fragment_shapes
from nebula.federation.service import serve
from nebula.parallel.export import boxes
from nebula.runtime.gateway import Gateway
from nebula.security.pki import Identity, throwaway
from nebula.sim.tun import ENDS, path
from nebula.types import COORDINATOR, ROLE, Json, PushTicket
from nebula.wan import link as sockets
from nebula.wan.codec import Encoder
from nebula.wan.frame import pack
from nebula.wan.transport import TLS_NAME

CLUSTER, FRAGMENT = "north", "f0"
PLAIN = Codec(steps=(), feedback=None)
MODEL = Model(vocab=8192, layers=4, dim=512, heads=8, kv_heads=8, ffn_dim=1024, experts=4, top_k=2, dense_layers=2)
"""31 million parameters, 126 MB."""


@dataclass(frozen=True)
class Case:
    rate_mbps: float
    rtt_ms: float
    loss: float = 0.0
    streams: int = 4
    bbr: bool = True

    def __str__(self) -> str:
        how = f"{self.streams} connection{'s' * (self.streams > 1)}{'' if self.bbr else ', cubic'}"
        return f"{self.rate_mbps:g} Mbit/s, {self.rtt_ms:g} ms, {self.loss:.1%} lost, {how}"


CASES = (
    Case(100, 10),
    Case(100, 50),
    Case(100, 200),
    Case(400, 50),
    Case(400, 200),
    Case(100, 50, 0.001),
    Case(100, 50, 0.01),
    Case(100, 50, 0.01, streams=1),
    Case(100, 50, 0.001, bbr=False),
    Case(100, 50, 0.001, streams=1, bbr=False),
    Case(100, 50, 0.01, streams=1, bbr=False),
)


def agreement(streams: int) -> Agreement:
    wan = Wan(up=PLAIN, down=PLAIN, streams=streams)
    run = Run(name="link", model=MODEL, fragments=1, rounds=9, inner_steps=1, wan=wan)
    federation = Federation(clusters={CLUSTER: Cluster(device="cpu")})
    return agree(run, federation, tokenizer="", unigram_entropy=1.0)


# --- what runs in the namespaces ----------------------------------------------------------------------------------


def coordinate(folder: Path, streams: int) -> None:
    """Until standard input ends. Says its port."""
    agreed = agreement(streams)
    journal = open_journal(folder / "journal.sqlite", agreement=agreed.digest())
    identity, ledger = Identity.load(folder / COORDINATOR), Ledger(Folder(folder / "blobs"))
    hub = Hub(agreed, b"", identity, journal, ledger, lambda *_, **__: None)
    server, port = serve(hub, identity, "0.0.0.0", 0)
    ledger.chunks(hub.state.fragments[FRAGMENT].chain[-1].blobs["params"])  # whoever asks first does not wait for it
    print(port, flush=True)
    sys.stdin.read()
    server.stop(grace=None).wait()
    hub.close()


def transfer(folder: Path, address: str, streams: int) -> None:
    """Says how many bytes a second went up, and came down."""
    gateway = Gateway(
        identity=str(folder / CLUSTER),
        address=address,
        cluster=CLUSTER,
        agreement=agreement(streams).digest(),
        max_stall=120.0,
    )
    gateway.join()
    gateway.pull("state", FRAGMENT, 0)
    shapes = fragment_shapes(agreement(streams))[FRAGMENT]
    packet = pack(Encoder(PLAIN).encode(boxes({name: torch.randn(shape) for name, shape in shapes.items()})))
    gateway.push(PushTicket(role=ROLE, fragment=FRAGMENT, round=0, base=0, weight=1.0), [packet])
    stats = gateway._monitor.stats()
    print(json.dumps({"up": stats.goodput_up_bps, "down": stats.goodput_down_bps}), flush=True)
    gateway.close()


def end(what: str, folder: Path, streams: int, bbr: bool, address: str = "") -> None:
    if not bbr:

        def cubic(connection: socket.socket) -> None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")

        sockets.prefer_bbr = cubic
    torch.set_num_threads(1)
    if what == "coordinate":
        coordinate(folder, streams)
    else:
        transfer(folder, address, streams)


# --- around them --------------------------------------------------------------------------------------------------


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    names = [f"nebula-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        subprocess.run(("ip", "netns", "add", name), check=True)
        subprocess.run(("ip", "-n", name, "link", "set", "lo", "up"), check=True)
    try:
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "delete", name), check=True)


def turn(case: Case) -> dict[str, float]:
    """Shares of the line's rate."""
    folder = Path(tempfile.mkdtemp())
    throwaway(folder, [CLUSTER], [TLS_NAME])
    settings = (str(folder), str(case.streams), str(int(case.bbr)))

    def within(namespace: str, what: str, *more: str) -> Sequence[str]:
        return ("ip", "netns", "exec", namespace, sys.executable, __file__, "--end", what, *settings, *more)

    link = Link(rate_mbps=case.rate_mbps, rtt_ms=case.rtt_ms, loss=case.loss)
    try:
        with namespaces() as (near, far), path(near, far, link):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            coordinator = subprocess.Popen(within(far, "coordinate"), **pipes)
            assert coordinator.stdout is not None
            address = f"{ENDS[1]}:{coordinator.stdout.readline().strip()}"
            said = subprocess.run(within(near, "transfer", address), check=True, capture_output=True, text=True)
            coordinator.communicate()
    finally:
        shutil.rmtree(folder)
    found = json.loads(said.stdout)
    return {way: found[way] / (case.rate_mbps * 1e6) for way in ("up", "down")}


def figures(case: Case, turns: int) -> Mapping[str, Spread]:
    found = [turn(case) for _ in range(turns)]
    return {way: spread([one[way] for one in found]) for way in ("up", "down")}


def main(
    turns: int = 3,
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    result: dict[str, Json] = {}
    rows = []
    for case in CASES:
        if only in str(case):
            found = figures(case, turns)
            rows.append((str(case), found["up"], found["down"]))
            print(*rows[-1], sep=" | ", flush=True)
            result[str(case)] = {way: value.rounded() for way, value in found.items()}
    print("\n" + table(("share of the line's rate, median (min … max)", "up", "down"), rows))
    shapes = fragment_shapes(agreement(1))[FRAGMENT].values()
    write(out, conditions, {"turns": turns, "payload_bytes": 4 * sum(prod(shape) for shape in shapes)}, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--end"]:
        what, folder, streams, bbr, *rest = sys.argv[2:]
        end(what, Path(folder), int(streams), bool(int(bbr)), *rest)
    else:
        typer.run(main)
