"""Clusters that come back to a run that has moved on, over slow links in bad weather, while coordinators die."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from nebula.checkpoint.ledger import Ledger
from nebula.config import Blockwise, Codec, Membership, Wan, Zstd
from nebula.federation import pulls
from nebula.federation.events import Committed
from nebula.federation.state import State
from nebula.proto.v1.run_pb2 import PullHead, PullRequest
from nebula.sim.world.scenario import NAMES, Fault, Scenario, small
from nebula.sim.world.world import World, judge
from nebula.types import COORDINATOR
from tests.chunked import cut_into

CHUNK = 256
LANES = 4
LATE = NAMES[0]


def returning(seed: int, *, hard: bool) -> Scenario:
    """One of three clusters loses its disk and is away for some of the rounds, in which the other two go on without it,
    further than the updates reach that are kept. `hard`: while it fetches the state, its link is cut for some rounds
    and the coordinator is replaced, who has lent nothing; then the weather is bad."""
    rng = Random(f"returning {seed}")
    codec = Codec(steps=(Blockwise(bits=4, block=32), Zstd()))
    run = small(
        rounds=16,
        inner_steps=2,
        fragments=1,
        wan=Wan(up=codec, down=codec, streams=LANES),
        membership=Membership(quorum=1, max_stall=30.0),
    )
    back = rng.uniform(12.0, 16.0)
    faults = [
        Fault(at=3.0, kind="leave", target=LATE, seconds=back - 3.0, amount=0.0),
        Fault(at=4.0, kind="wipe", target=LATE, seconds=0.0, amount=0.0),
    ]
    if hard:
        faults += [
            Fault(at=back + 4.5, kind="partition", target=LATE, seconds=10.0, amount=1.0),
            Fault(at=back + 5.5, kind="power", target=COORDINATOR, seconds=1.0, amount=0.0),
            Fault(at=back + 14.5, kind="weather", target=LATE, seconds=6.0, amount=0.3),
        ]
    return Scenario(seed=seed, run=run, pace=dict.fromkeys(NAMES[:3], 1.0), faults=tuple(faults), calm=back + 40.0)


@dataclass
class Asked:
    """Which chunks of states coordinators are asked for, and what they answer."""

    answers: Counter = field(default_factory=Counter)
    newest: int = 0
    older: int = 0
    """Chunks that were sent of states that were no longer the newest."""
    read: list[tuple[str, int, bytes]] = field(default_factory=list)

    def find(self, state: State, lent: tuple[Committed, ...], request: PullRequest) -> pulls.Found:
        status, commit = FIND(state, lent, request)
        self.newest = max(self.newest, state.fragments[request.fragment].version)
        if request.kind == PullRequest.KIND_STATE and request.chunks:
            self.answers[status] += 1
        return status, commit

    def take(self, ledger: Ledger, commit: Committed, request: PullRequest, sha256: bytes) -> bytes:
        if request.kind == PullRequest.KIND_STATE:
            self.older += commit.version < self.newest
            self.read.append((commit.fragment, commit.version, sha256))
        return CHUNK_OF(ledger, commit, request, sha256)


FIND, CHUNK_OF = pulls.find, pulls.chunk


@pytest.fixture
def asked(monkeypatch) -> Asked:
    asked = Asked()
    cut_into(CHUNK, monkeypatch)
    monkeypatch.setattr(pulls, "find", asked.find)
    monkeypatch.setattr(pulls, "chunk", asked.take)
    return asked


def run(scenario: Scenario) -> World:
    """Raises Violation; above all, whoever adopts a state has to hold the digest that was committed."""
    world = World(scenario)
    for name, site in world.sites.items():
        site.link.rate, site.link.rtt, site.link.jitter = 2500.0 if name == LATE else 1e6, 0.05, 0.0
    judge(world)
    return world


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_fetches_a_state_over_several_rounds_and_takes_part_again(seed, asked):
    world = run(returning(seed, hard=False))
    assert len(asked.read) == len(set(asked.read)) > 2 * LANES, "none twice"
    assert asked.answers.keys() == {PullHead.STATUS_READY}
    assert asked.older > 0
    assert LATE in world.witness.commits["f0"][-1].contributors


@pytest.mark.parametrize("seed", range(4))
def test_a_transfer_survives_a_cut_a_new_coordinator_and_bad_weather(seed, asked):
    run(returning(seed, hard=True))
    assert asked.answers[PullHead.STATUS_GONE] == LANES, "each lane hears once that the state is gone"
    assert len({version for _, version, _ in asked.read}) > 1, "and goes on with the newest"
