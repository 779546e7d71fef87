"""A run in a world that one seed decides: the real coordinator, journal, sealing, codec and agents on a virtual clock,
over a network and disks that fail. Only the arithmetic of training is a toy."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from nebula.config import Agreement, Cluster, Federation, agree
from nebula.errors import NebulaError, PacketError
from nebula.federation.coordinator import waiting
from nebula.federation.hub import Hub
from nebula.security.pki import CERTIFICATE, Identity, throwaway
from nebula.sim.world.actors import RUN, Center, Counted, Machine, Site
from nebula.sim.world.disk import PowerCut
from nebula.sim.world.engine import Produced
from nebula.sim.world.link import CHANCES
from nebula.sim.world.net import Network
from nebula.sim.world.reference import undisturbed
from nebula.sim.world.scenario import NAMES, Fault, Scenario, draw
from nebula.sim.world.schedule import Process, Scheduler
from nebula.sim.world.witness import Violation, Witness, check_counters
from nebula.types import COORDINATOR
from nebula.wan.transport import TLS_NAME

PATIENCE = 2000.0
"""Virtual seconds after the last fault in which every run has to end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`digest` of the final model. `exact`: everyone took part in every round and never had to catch up."""

    digest: str
    exact: bool
    seconds: float
    events: int


class World:
    """`trace`: what happened, as (virtual seconds, who, what, details)."""

    def __init__(self, scenario: Scenario) -> None:
        torch.set_num_threads(1)
        self.scenario = scenario
        self.identities = identities()
        self.agreement = _agreement(scenario)
        self.scheduler = Scheduler(scenario.seed)
        self.rng = Random(f"world {scenario.seed}")
        self.network = Network(self.scheduler, Random(f"network {scenario.seed}"))
        self.produced = Produced()
        self.witness = Witness(self.agreement, self.produced)
        self.transports: dict[str, list[Counted]] = {}
        self.trace: list[tuple[float, str, str, Mapping[str, Any]]] = []
        self.caught_up = False
        self.over: Outcome | None = None
        self.events = 0
        self.center = Center(self, COORDINATOR)
        self.sites = {
            name: Site(self, name, link=self.network.link(name), pace=scenario.pace[name]) for name in scenario.clusters
        }
        self._weather(Random(f"weather {scenario.seed}"))

    def run(self) -> Outcome:
        """Raises Violation."""
        try:
            for machine in (self.center, *self.sites.values()):
                self.scheduler.at(0.0, machine.start)
            for fault in self.scenario.faults:
                self.scheduler.at(fault.at, functools.partial(self._strike, fault))
            self.scheduler.run(self.scenario.calm + PATIENCE, self._after)
            if self.over is None:
                raise Violation("ends", self._stuck())
            return self.over
        finally:
            for machine in (self.center, *self.sites.values()):
                machine.disk.cut()
            self.scheduler.close()

    # --- what the actors tell -------------------------------------------------------------------------------------

    def say(self, who: str, what: str, **details: Any) -> None:
        self.trace.append((self.scheduler.now, who, what, details))
        if what == "phase" and details["phase"] == "catching up":
            self.caught_up = True
        if what == "alarm" and details["kind"] != "damaged_blob":
            raise Violation("same", f"{who} raised the alarm {details}")
        if what == "exit":
            self._judge(who, details["how"])

    def completed(self, hub: Hub) -> None:
        rounds = self.scenario.run.rounds
        if any(len(commits) != rounds + 1 for commits in self.witness.commits.values()):
            raise Violation("ends", f"completed at {hub.state.round} of {rounds} rounds")
        check_counters(self, {name: hub.tally.of(name).total("payload_up") for name in self.sites})
        exact = self.witness.everyone and not self.caught_up
        self.over = Outcome(hub.global_digest(), exact, self.scheduler.now, self.events)
        self.scheduler.stop()

    def _judge(self, who: str, how: str) -> None:
        """Exits that no fault explains."""
        if how.startswith(("PacketError", "AuthError")):
            raise Violation("clean", f"{who} ended: {how}")

    # --- after every event ----------------------------------------------------------------------------------------

    def _after(self) -> None:
        self.events += 1
        for machine in (self.center, *self.sites.values()):
            if machine.process is not None and machine.process.failures:
                self._fail(machine.process)
        hub = self.center.hub
        if hub is None or hub.state is self.witness._seen:
            return
        before = sum(map(len, self.witness.commits.values()))
        self.witness.look(hub.state)
        for site in self.sites.values():
            if site.agent is not None:
                for fragment, held in site.agent.held.items():
                    self.witness.holds(site.name, fragment, held.version, held.digest)
        if sum(map(len, self.witness.commits.values())) > before:
            with contextlib.suppress(OSError, PowerCut):
                self.witness.bounded(hub, len(self.center.disk.listdir(RUN / "blobs")))

    def _fail(self, process: Process) -> None:
        error = process.failures[0]
        if isinstance(error, PowerCut):
            return  # its machine goes down in a moment
        if isinstance(error, Violation):
            raise error
        kind = "repeats" if isinstance(error, AssertionError) and "repeat" in str(error) else "clean"
        raise Violation(kind, f"{process.name}: {type(error).__name__}: {error}") from error

    def _stuck(self) -> str:
        hub = self.center.hub
        state = "no coordinator" if hub is None else f"round {hub.state.round}, waiting for {waiting(hub.state, 0)}"
        alive = {name: site.process is not None for name, site in self.sites.items()}
        return f"{self.scheduler.now:.0f} s: {state}; running: {alive}"

    # --- what goes wrong ------------------------------------------------------------------------------------------

    def _weather(self, rng: Random) -> None:
        for site in self.sites.values():
            site.link.rate, site.link.rtt = 10 ** rng.uniform(3.5, 7), rng.choice((0.001, 0.05, 0.3))
            site.link.jitter = site.link.rtt * rng.random()

    def _strike(self, fault: Fault) -> None:
        self.say(
            "world", fault.kind, target=fault.target, seconds=round(fault.seconds, 3), amount=round(fault.amount, 3)
        )
        machine: Machine = self.center if fault.target == COORDINATOR else self.sites[fault.target]
        match fault.kind:
            case "kill" | "power":
                machine.kill(power=fault.kind == "power", after=min(fault.seconds, 20.0))
            case "cut":
                machine.disk.crash_at = machine.disk.steps + 1 + int(30 * fault.amount)
            case "freeze" if machine.process is not None:
                machine.process.pause()
                self._later(fault, machine.process.resume)
            case "full":
                machine.disk.full = True
                self._later(fault, lambda: setattr(machine.disk, "full", False))
            case "rot":
                self._rot(machine, fault.amount)
            case "stop" if self.center.hub is not None and self.center.process is not None:
                hub = self.center.hub
                self.center.process.spawn("stop", lambda: _stop(hub))
            case "usurp":
                self.center.usurp()
            case _ if isinstance(machine, Site):
                self._strike_site(fault, machine)

    def _strike_site(self, fault: Fault, site: Site) -> None:
        link = site.link
        match fault.kind:
            case "weather":
                link.storm({chance: fault.amount * 0.4 * self.rng.random() for chance in CHANCES})
                self._later(fault, lambda: link.storm(dict.fromkeys(CHANCES, 0.0)))
            case "partition":
                link.partition(up=fault.amount < 0.33, down=0.33 <= fault.amount < 0.66)
                self._later(fault, lambda: link.partition(up=True, down=True))
            case "rank":
                site.fail_rank()
            case "slow" if site.engine is not None:
                site.pace *= 1 + 9 * fault.amount
                self._later(fault, lambda: setattr(site, "pace", self.scenario.pace[site.name]))
            case "wipe":
                self.caught_up = True
                site.wipe()
            case "leave":
                site.leave(fault.seconds)

    def _rot(self, machine: Machine, amount: float) -> None:
        """A bit flips in a checkpoint at rest, or in a blob of the newest commit, which can be had again."""
        if isinstance(machine, Site):
            self.caught_up = True  # an older checkpoint may be one round too far behind
            folder = RUN
            with contextlib.suppress(OSError):
                names = [name for name in machine.disk.listdir(folder) if name.isdecimal()]
                if len(names) > 1:
                    machine.disk.rot(folder / max(names))
            return
        if self.center.hub is None or machine.process is None:
            return
        fragments = self.center.hub.state.fragments.values()
        blobs = sorted({b for f in fragments if f.merged and f.commit for b in f.commit.blobs.values()})
        if blobs:
            machine.kill(after=1.0)
            with contextlib.suppress(OSError):
                machine.disk.rot(RUN / "blobs" / blobs[int(amount * len(blobs))])

    def _later(self, fault: Fault, act: Any) -> None:
        self.scheduler.at(self.scheduler.now + fault.seconds, act)


def _stop(hub: Hub) -> None:
    with contextlib.suppress(NebulaError):
        hub.stop("an operator asks")


# --- seeds --------------------------------------------------------------------------------------------------------


def check(seed: int, clusters: int) -> Outcome:
    """Run what a seed stands for. Raises Violation."""
    return judge(World(draw(seed, clusters)))


def judge(world: World) -> Outcome:
    outcome = world.run()
    if outcome.exact:
        right = undisturbed(world.agreement)
        if outcome.digest != right:
            raise Violation("exact", f"the digest is {outcome.digest[:15]}, not {right[:15]}")
    return outcome


def _agreement(scenario: Scenario) -> Agreement:
    federation = Federation(clusters={name: Cluster(device="cpu") for name in scenario.clusters})
    return agree(scenario.run, federation, tokenizer="", unigram_entropy=1.0)


@dataclass(frozen=True, slots=True)
class Identities:
    folder: Path
    coordinator: Identity
    certificates: Mapping[str, bytes]


@functools.cache
def identities() -> Identities:
    """One PKI for all worlds of this process."""
    folder = Path(tempfile.mkdtemp(prefix="nebula-sim-"))
    atexit.register(shutil.rmtree, folder)
    throwaway(folder, list(NAMES), [TLS_NAME])
    certificates = {name: (folder / name / CERTIFICATE).read_bytes() for name in NAMES}
    return Identities(folder, Identity.load(folder / COORDINATOR), certificates)


__all__ = ["Outcome", "PacketError", "World", "check", "judge"]
