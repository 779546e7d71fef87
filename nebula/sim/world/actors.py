"""The processes of a simulated run: a coordinator and an agent per cluster, each life of which is the real program on a
simulated clock, disk and network. What ends is started again, as a supervisor would, unless it says it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from google.protobuf.message import Message

from nebula import files
from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.errors import NebulaError, RankFailure
from nebula.federation.agent import Agent
from nebula.federation.hub import Hub
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.federation.service import Service
from nebula.federation.sessions import Sessions
from nebula.proto.v1.packet_pb2 import Frame
from nebula.runtime.gateway import Gateway
from nebula.security.session import Session
from nebula.sim.world.disk import SimDisk
from nebula.sim.world.engine import SimEngine
from nebula.sim.world.link import SimLink
from nebula.sim.world.net import SimStub
from nebula.sim.world.schedule import Process
from nebula.types import COORDINATOR, Packets, PushTicket, RoundPlan

if TYPE_CHECKING:
    from nebula.sim.world.world import World

M = TypeVar("M", bound=Message)

TICK = 0.5
RUN = Path("/run")


@dataclass(eq=False)
class Machine:
    """A machine on which one program runs, again and again until it is `done`. `idle`: nothing is started until
    then."""

    world: World
    name: str
    disk: SimDisk = field(init=False)
    process: Process | None = None
    idle: float = 0.0
    lives: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.new_disk()

    def new_disk(self) -> None:
        self.disk = SimDisk(Random(f"{self.name} {self.lives} {self.world.scenario.seed}"))
        self.disk.on_crash = self._step_crashed

    def start(self) -> None:
        if self.process is not None or self.done:
            return
        if self.idle > self.world.scheduler.now:
            self.world.scheduler.at(self.idle, self.start)
            return
        self.lives += 1
        process = self.process = self.world.scheduler.process(self.name)
        process.spawn("main", lambda: self._main(process))

    def program(self, process: Process) -> str:
        """One life. Returns how it ended, or raises."""
        raise NotImplementedError

    def _main(self, process: Process) -> None:
        try:
            how = self.program(process)
        except NebulaError as error:
            how = f"{type(error).__name__}: {error}"
        self.done = how in ("done", "completed")
        self.world.say(self.name, "exit", how=how)
        # The exit ends whatever else the process has running, in a step of its own.
        self.world.scheduler.at(self.world.scheduler.now, lambda: self.end(process))

    def end(self, process: Process, *, power: bool = False, after: float = 1.0) -> None:
        """End a life, by whatever cause; the next one begins `after` seconds later."""
        if self.process is not process:
            return
        self.disk.cut()
        process.kill()
        if power:
            self.disk.crash()
        else:
            self.disk.restart()
        self.disk.crash_at = None
        self.process = None
        self.world.scheduler.at(self.world.scheduler.now + after, self.start)

    def kill(self, *, power: bool = False, after: float = 1.0) -> None:
        if self.process is not None:
            self.end(self.process, power=power, after=after)
        elif power:
            self.disk.crash()

    def _step_crashed(self) -> None:
        """The power failed in the middle of a step: of the present process, or of one that it has replaced."""
        self.world.say(self.name, "power cut", step=self.disk.steps)
        self.world.scheduler.at(self.world.scheduler.now, lambda: self.kill(power=True))


class Center(Machine):
    """The coordinator's machine. `hub` and `service`: of the present life, once it answers."""

    hub: Hub | None = None
    service: Service | None = None
    zombie: tuple[Service, Process] | None = None
    """A coordinator that was replaced and does not know it yet; whoever reaches it is out of luck."""
    _reached: Process | None = None

    def reached(self) -> Service | None:
        """What a call to the coordinator's address finds; `server` then is its process."""
        if self.zombie is not None and self.zombie[1].alive and self.world.rng.random() < 0.5:
            service, self._reached = self.zombie
            return service
        self._reached = self.process
        return self.service if self.process is not None else None

    def server(self) -> Process | None:
        return self._reached

    def program(self, process: Process) -> str:
        self.hub = self.service = None
        hub = self.open(process)
        self.hub, self.service = hub, Acquainted(hub, self.world.identities.coordinator.authority_pem)
        while (state := hub.ended()) is None:
            hub.tick()
            process.clock.sleep(TICK)
        hub.close()
        if state == "completed":
            self.world.completed(hub)
        return state

    def open(self, process: Process) -> Hub:
        world = self.world
        try:
            files.make(RUN, self.disk)
            store = Folder(RUN / "blobs", self.disk)
            path = RUN / "journal.sqlite"
            journal = SqliteJournal(path, agreement=world.agreement.digest(), vfs=self.disk.vfs("journal"))
        except OSError as error:
            raise NebulaError(f"the disk refuses: {error}") from error

        def emit(kind: str, /, **fields: Any) -> None:
            world.say(COORDINATOR, kind, **fields)

        hub = Hub(world.agreement, b"", world.identities.coordinator, journal, Ledger(store), emit, process.clock)
        hub._sessions = Watched(world, process)
        return hub

    def usurp(self) -> None:
        """A second coordinator on the same journal, in spite of its lock; the first one goes on for a while."""
        old = self.process
        if old is None or self.service is None:
            return
        self.zombie = (self.service, old)
        self.disk.locks.clear()
        self.lives += 1
        process = self.process = self.world.scheduler.process(self.name)
        process.spawn("main", lambda: self._main(process))
        self.world.scheduler.at(self.world.scheduler.now + 20.0, old.kill)


class Watched(Sessions):
    """Tells of every call that they let in."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__()
        self._world, self._process = world, process

    def head(
        self, peer: str | None, frames: Iterable[Frame], kind: type[M], context: bytes
    ) -> tuple[Session, M, Iterator[Frame]]:
        stream = iter(frames)
        first = list(islice(stream, 1))
        found = super().head(peer, chain(first, stream), kind, context)
        for frame in first:
            self._world.witness.took(self._process, frame.source, frame.epoch, frame.counter)
        return found


class Acquainted(Service):
    """Looks at a certificate once. They do not change here, and checking them is slow."""

    _names: ClassVar[dict[bytes, str]] = {}

    def _peer(self, context: Any) -> str:
        (pem,) = context.auth_context()["x509_pem_cert"]
        if pem not in self._names:
            self._names[pem] = super()._peer(context)
        return self._names[pem]


@dataclass(eq=False)
class Site(Machine):
    """One cluster. `agent` and `engine` are of the present life. `tried`, `reported`: the last round of which a life
    has sent a report, and has had an answer."""

    link: SimLink = field(kw_only=True)
    pace: float = field(kw_only=True)
    agent: Agent | None = None
    engine: SimEngine | None = None
    transport: Counted | None = None
    tried: int = -1
    reported: int = -1

    def program(self, process: Process) -> str:
        world, membership = self.world, self.world.scenario.run.membership
        self.agent = self.engine = None
        stub = SimStub(
            self.link,
            world.center.reached,
            process,
            world.center.server,
            world.identities.certificates[self.name],
        )
        self.transport = Counted(
            self,
            identity=str(world.identities.folder / self.name),
            address="coordinator:7443",
            cluster=self.name,
            agreement=world.agreement.digest(),
            max_stall=membership.max_stall,
            stub=stub,
            clock=process.clock,
        )
        self.transport.join()
        self.engine = Heard(
            self, world.agreement, self.name, self.disk, RUN, process.clock, self.pace, world.produced, emit=self._emit
        )
        self.agent = Agent(
            cluster=self.name,
            engine=self.engine,
            transport=self.transport,
            emit=self._emit,
            checkpoint_every=world.scenario.run.checkpoint_every,
            clock=process.clock,
        )
        return self.agent.run()

    def leave(self, seconds: float) -> None:
        """SIGTERM: say goodbye, and go."""
        process, agent = self.process, self.agent
        if process is None or agent is None:
            return
        self.idle = self.world.scheduler.now + seconds

        def goodbye() -> None:
            agent.leave()
            self.world.scheduler.at(self.world.scheduler.now, lambda: self.end(process))

        process.spawn("goodbye", goodbye)

    def wipe(self) -> None:
        """The machine is lost with all that was on it; another takes its place."""
        self.kill()
        self.new_disk()

    def fail_rank(self) -> None:
        if self.engine is not None and self.engine.memory is not None:
            self.engine.fail_next = RankFailure(0, "a rank was killed")

    def _emit(self, kind: str, /, **fields: Any) -> None:
        self.world.say(self.name, kind, **fields)


class Heard(SimEngine):
    """Tells of what it produces."""

    def __init__(self, site: Site, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._site = site

    def pull(self, fragment: str) -> Packets:
        packets = super().pull(fragment)
        self._site.world.witness.produced(b"".join(packets))
        return packets


class Counted(Gateway):
    """A gateway whose counters are compared with what it really sent. `said`: what the coordinator may know of the
    payload bytes that this life has sent."""

    def __init__(self, site: Site, **settings: Any) -> None:
        super().__init__(**settings)
        self._life = Random(f"life {site.name} {site.lives} {site.world.scenario.seed}").getrandbits(63)
        self._site, self._witness = site, site.world.witness
        self.pushed = 0
        self.said = {0}
        site.world.transports.setdefault(site.name, []).append(self)

    def push(self, ticket: PushTicket, packets: Packets) -> Any:
        verdict = super().push(ticket, packets)
        self.pushed += sum(map(len, packets))
        if verdict != "late":
            self._witness.promised(self._site.name, ticket.fragment, ticket.round)
        return verdict

    def plan(self, held: Any, report: Any) -> RoundPlan:
        """The coordinator takes in the first report of a round; it may have done so without an answer."""
        site = self._site
        if report is None or report.round <= site.reported:
            return super().plan(held, report)
        first, site.tried = report.round > site.tried, report.round
        self.said.add(self.pushed)
        answer = super().plan(held, report)
        site.reported = report.round
        if first:
            self.said = {self.pushed}
        return answer
