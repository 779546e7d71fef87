"""The state machine in a storm: clusters crash, lose their disks, are slow or silent, repeat and reorder what they say;
the coordinator crashes between any two events and replays its journal. No tensors: a delta is a name, a merge a hash.

After every event: a version commits once and stays, on no other base than the version before; whoever was told
"accepted" is part of the commit, and nobody who did not deliver; whoever holds a version holds the committed one. When
the storm is over and a quorum lives, the run ends, every round of it accounted for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import pytest

from nebula.federation import coordinator as machine
from nebula.federation.coordinator import Rules
from nebula.federation.events import (
    Alarm,
    Arrived,
    Committed,
    Joined,
    Merge,
    Planned,
    QuorumLost,
    Reported,
    RoundClosed,
    Stopping,
    Tick,
)
from nebula.federation.hub import _status
from nebula.federation.journal import JOURNALED
from nebula.proto.v1 import run_pb2 as pb
from nebula.types import ROLE, Held, RoundPlan, RoundReport

STALL = 10.0
Disk = Mapping[str, Held]


def hashed(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


@dataclass
class Coordinator:
    """What `hub.Hub` does around the machine, from the journal that the last life left. `wire` counts sessions."""

    rules: Rules
    journal: list[machine.Event]
    now: float
    merges: list[Merge] = field(default_factory=list)
    closed: dict[int, Mapping[str, RoundReport]] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    lost: bool = False

    def __post_init__(self) -> None:
        self.state = machine.initial(self.rules)
        for event in self.journal:
            self.step(event)
        if not self.journal:
            for name in self.rules.fragments:
                self.apply(Committed(fragment=name, version=0, digest=hashed(name)))
        self.state = machine.restarted(self.state, self.now)
        self.merges.clear()
        self.lost = False
        self.apply(Tick())

    def apply(self, event: machine.Event) -> None:
        if isinstance(event, JOURNALED):
            self.journal.append(event)
        self.step(event)

    def step(self, event: machine.Event) -> None:
        self.state, effects = machine.step(self.state, event, self.now)
        for effect in effects:
            assert not isinstance(effect, Alarm), effect
            if isinstance(effect, Merge):
                self.merges.append(effect)
            elif isinstance(effect, RoundClosed):
                assert effect.round == len(self.closed), "rounds close in order, each once"
                self.closed[effect.round] = effect.reports
            elif isinstance(effect, QuorumLost):
                self.lost = True


@dataclass
class Agent:
    """`federation.agent.Agent` one call at a time. `disk` survives a crash, the rest does not."""

    name: str
    disk: Disk
    held: dict[str, Held] = field(default_factory=dict)
    plan: RoundPlan | None = None
    busy: int = 0
    todo: dict[str, str] = field(default_factory=dict)
    report: RoundReport | None = None
    session: int = 0
    left: bool = False
    dead: bool = False

    def restart(self) -> None:
        self.held, self.plan, self.todo, self.report = dict(self.disk), None, {}, None
        self.session, self.busy, self.left = 0, 0, False


class World:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        members = ("east", "north", "south", "west")[: self.random.randint(2, 4)]
        self.rules = Rules(
            members=members,
            fragments=("f0", "f1")[: self.random.randint(1, 2)],
            rounds=self.random.randint(1, 4),
            inner_steps=1,
            evaluate_every=2,
            quorum=self.random.randint(1, len(members)),
            max_stall=STALL,
        )
        self.every = self.random.randint(1, 3)
        self.now, self.stop, self.over = 0.0, "", ""
        self.journal: list[machine.Event] = []
        self.committed: dict[str, list[Committed]] = {name: [] for name in self.rules.fragments}
        self.delivered: set[tuple[str, int, str]] = set()
        self.accepted: set[tuple[str, int, str]] = set()
        self.strays: list[tuple[Agent, int, machine.Event]] = []
        self.at = Coordinator(self.rules, self.journal, self.now)
        self.fresh: Disk = {name: Held(0, hashed(name)) for name in self.rules.fragments}
        self.agents = [Agent(name, self.fresh) for name in members]
        for agent in self.agents:
            agent.restart()

    # --- the coordinator's side -----------------------------------------------------------------------------------

    def crash_coordinator(self) -> None:
        self.at = Coordinator(self.rules, self.journal, self.now)
        if self.stop:
            self.at.apply(Stopping(self.stop))

    def merge(self) -> None:
        effect = self.at.merges.pop(self.random.randrange(len(self.at.merges)))
        clusters = tuple(a.cluster for a in effect.arrivals)
        before = self.at.state.fragments[effect.fragment]
        assert before.version == effect.version - 1, "merged on no other version than the one before"
        assert all(a.round == before.version for a in effect.arrivals)
        assert len(clusters) >= self.rules.quorum
        assert list(clusters) == sorted(set(clusters)), "each cluster once, in the fixed order"
        assert {(effect.fragment, before.version, c) for c in clusters} <= self.delivered
        digest = hashed(before.digest, *(a.blob for a in effect.arrivals))
        event = Committed(fragment=effect.fragment, version=effect.version, digest=digest, contributors=clusters)
        self.committed[effect.fragment].append(event)
        self.at.apply(event)

    def check(self) -> None:
        for name, fragment in self.at.state.fragments.items():
            commits = self.committed[name]
            assert [c.version for c in commits] == list(range(1, len(commits) + 1)), "a version commits once"
            assert fragment.version == len(commits), "and never disappears"
            if commits:
                assert fragment.commit == commits[-1]
            told = {c for f, round, c in self.accepted if (f, round) == (name, fragment.version - 1)}
            assert told <= set(fragment.contributors), "who was told `accepted` is part of the commit"
            for agent in self.agents:
                held = agent.held[name]
                assert held == self.fresh[name] or held.digest == commits[held.version - 1].digest

    # --- the clusters' side ---------------------------------------------------------------------------------------

    def act(self, agent: Agent, *, faults: float) -> None:
        """One call of one agent. With a fault the answer is lost; the call may then come once more, whenever."""
        if not agent.session or self.at.sessions.get(agent.name) != agent.session:
            agent.session = self.at.state.epochs.get(agent.name, 0) + 1
            self.at.apply(Joined(cluster=agent.name, epoch=agent.session))
            self.at.sessions[agent.name] = agent.session
        elif agent.plan is None:
            self._ask(agent, faults)
        elif agent.busy:
            agent.busy -= 1
        elif agent.todo:
            fragment = self.random.choice(sorted(agent.todo))
            (self._push if agent.todo[fragment] == "push" else self._pull)(agent, fragment, faults)
        else:
            self._finish(agent)

    def _ask(self, agent: Agent, faults: float) -> None:
        if agent.report is not None and not self._said_before(agent.name, agent.report.round):
            self.at.apply(Reported(cluster=agent.name, report=agent.report))
        self._say(agent, Planned(cluster=agent.name, held=dict(agent.held)), faults)
        plan = machine.plan(self.at.state, agent.name, agent.held)
        if self.random.random() < faults:
            return
        agent.report = None
        if plan.action == "train":
            agent.plan, agent.busy = plan, self.random.choice((0, 1, 1, 2, 20 if faults else 1))
            agent.todo = dict.fromkeys(plan.fragments, "push")
        elif plan.action == "catch_up":
            for fragment in plan.fragments:
                self._adopt(agent, fragment)
        else:
            assert plan.action in ("done", "stop")
            agent.left = True

    def _said_before(self, cluster: str, round: int) -> bool:
        return round < self.at.state.closed or cluster in self.at.state.reports.get(round, {})

    def _say(self, agent: Agent, event: machine.Event, faults: float) -> None:
        self.at.apply(event)
        if self.random.random() < faults:
            self.strays.append((agent, agent.session, event))

    def stray(self) -> None:
        """A call that was repeated arrives late; of an older session it is refused."""
        agent, session, event = self.strays.pop(self.random.randrange(len(self.strays)))
        if self.at.sessions.get(agent.name) != session:
            return
        if isinstance(event, Arrived):
            self._deliver(event)
        else:
            self.at.apply(event)

    def _deliver(self, event: Arrived) -> str:
        verdict = machine.receipt(self.at.state, event.cluster, event.fragment, event.round)
        known = self.at.state.fragments[event.fragment].arrived.get(event.cluster)
        if verdict == "accept" and (known is None or known.blob != event.blob):
            self.delivered.add((event.fragment, event.round, event.cluster))
            self.at.apply(event)
        return verdict

    def _push(self, agent: Agent, fragment: str, faults: float) -> None:
        assert agent.plan is not None
        event = Arrived(
            cluster=agent.name,
            fragment=fragment,
            round=agent.plan.round,
            weight=1.0,
            blob=f"{agent.name}:{agent.held[fragment].digest}:{self.random.randrange(2)}",  # a redo may differ in bits
            parts=(1,),
            seconds=self.now - self.at.state.opened if self.at.state.witnessed else None,
        )
        verdict = self._deliver(event)
        if self.random.random() < faults:
            self.strays.append((agent, agent.session, event))
        elif verdict == "accept":
            self.accepted.add((fragment, agent.plan.round, agent.name))
        if self.random.random() >= faults:
            agent.todo[fragment] = "pull"

    def _pull(self, agent: Agent, fragment: str, faults: float) -> None:
        assert agent.plan is not None
        version = agent.plan.fragments[fragment] + 1
        request = pb.PullRequest(kind=pb.PullRequest.KIND_UPDATE, role=ROLE, fragment=fragment, version=version)
        status, commit = _status(self.at.state, self.at.state.fragments[fragment], request)
        if status == pb.PullHead.STATUS_PENDING or self.random.random() < faults:
            return
        del agent.todo[fragment]
        if status == pb.PullHead.STATUS_READY:
            assert commit is not None
            assert commit.version == version == agent.held[fragment].version + 1
            agent.held[fragment] = Held(version, commit.digest)
        elif status == pb.PullHead.STATUS_GONE:
            self._adopt(agent, fragment)
        else:
            assert status == pb.PullHead.STATUS_ENDED
            agent.restart()

    def _adopt(self, agent: Agent, fragment: str) -> None:
        at = self.at.state.fragments[fragment]
        agent.held[fragment] = Held(at.version, at.digest)

    def _finish(self, agent: Agent) -> None:
        assert agent.plan is not None
        after = agent.plan.round + 1
        if agent.plan.fragments and after % self.every == 0:
            agent.disk = dict(agent.held)
        agent.report = RoundReport(round=after - 1, steps=1, tokens=1, loss=1.0, compute_s=1.0, stall_s=0.0)
        agent.plan = None

    # --- the storm ------------------------------------------------------------------------------------------------

    def weather(self) -> None:
        """One thing happens."""
        draw = self.random.random()
        agent = self.random.choice(self.agents)
        if draw < 0.02:
            self.crash_coordinator()
        elif draw < 0.04:
            agent.restart()
        elif draw < 0.045:
            agent.disk = self.fresh
            agent.restart()
        elif draw < 0.047:
            self.stop = "asked to"
            self.at.apply(Stopping(self.stop))
        elif draw < 0.10 and self.strays:
            self.stray()
        else:
            self.go_on(agent, faults=0.1)

    def go_on(self, agent: Agent, faults: float) -> None:
        if self.at.lost:  # its process ended and is started again
            self.crash_coordinator()
        elif self.at.merges and self.random.random() < 0.3:
            self.merge()
        elif not agent.left and not agent.dead:
            self.act(agent, faults=faults)
        self.now += self.random.random() * 0.2
        self.at.now = self.now
        self.at.apply(Tick())
        self.check()
        self.over = machine.ended(self.at.state, self.now) or ""
        if self.over == "stopped":
            self.resume()

    def resume(self) -> None:
        self.stop = self.over = ""
        self.crash_coordinator()
        for agent in self.agents:
            agent.restart()

    def calm(self, most: int) -> None:
        """No more faults; whoever is dead stays so. Until the run has ended, or has no quorum."""
        for _ in range(most):
            self.go_on(self.random.choice(self.agents), faults=0.0)
            living = sum(not agent.dead for agent in self.agents)
            if self.over or (self.at.lost and living < self.rules.quorum):
                return
        raise AssertionError(f"stuck: {self.at.state}")


@pytest.mark.parametrize("seed", range(250))
def test_a_storm_costs_rounds_but_neither_a_commit_nor_the_run(seed):
    world = World(seed)
    for _ in range(world.random.choice((0, 50, 200, 400))):
        if not world.over:
            world.weather()
    for agent in world.random.sample(world.agents, world.random.randint(0, len(world.agents) - 1)):
        agent.dead = True
    if world.random.random() < 0.5:
        world.crash_coordinator()
    world.calm(4000)
    if world.over:
        assert world.at.state.round == world.rules.rounds
        assert sorted(world.at.closed) == list(range(world.rules.rounds + 1)), "every round is accounted for"
        evaluated = world.at.closed[world.rules.rounds]
        last = {c for commits in world.committed.values() for c in commits[-1].contributors}
        assert {agent.name for agent in world.agents if agent.left} & last <= evaluated.keys()
