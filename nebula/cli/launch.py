"""Everything of one run on this machine: coordinator, links, Ray heads and agents as child processes.

Each has its own session; a Ctrl-C in the terminal reaches only this process, which asks the coordinator to stop after
the round that is under way. What dies is started again and resumes exactly; see `runtime/supervise.py` for the policy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from nebula.cli.display import Display
from nebula.cli.rundir import RunDir
from nebula.config import Cluster
from nebula.errors import AuthError, NebulaError, PreflightError, QuorumError, UnreachableError, UsageError
from nebula.metrics.events import Tail
from nebula.runtime.heads import Head, check_port, driver_environment, free_port
from nebula.runtime.site import Site
from nebula.runtime.supervise import Child, Event, Supervisor
from nebula.sim.wan import running
from nebula.types import COORDINATOR

POLL_SECONDS = 0.1
AGENT_ENDS_SECONDS = 20.0
"""How long agents may take to leave once the coordinator has ended."""
COORDINATOR_ENDS_SECONDS = 5.0
FULL_BYTES = 1 << 20
"""A disk with less free than this is as good as full."""

EngineKind = Literal["ray", "local"]

BY_EXIT_CODE: dict[int, type[NebulaError]] = {
    error.exit_code: error
    for error in (NebulaError, UsageError, PreflightError, UnreachableError, AuthError, QuorumError)
}


@dataclass(slots=True)
class Interrupts:
    """Ctrl-C: once stops gracefully, twice at once."""

    count: int = 0

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        def count(*_: object) -> None:
            self.count += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Launch:
    """One life of a run: from starting its processes until the run is done, stopped or failed."""

    def __init__(self, run: RunDir, display: Display, engine: EngineKind) -> None:
        self._run = run
        self._display = display
        self._engine = engine
        self._agreement = run.agreement()
        self._federation = run.federation()
        self._tails = {COORDINATOR: Tail(run.events)}
        self._tails |= {name: Tail(run.cluster(name) / "events.jsonl") for name in self._federation.clusters}
        self._began = time.monotonic()
        self._stepped = False

    def drive(self) -> dict[str, Any]:
        """Run to the end. Returns the summary. Raises what ended the run, KeyboardInterrupt after a Ctrl-C."""
        for source, tail in self._tails.items():
            for event in tail.poll():  # of earlier lives: known, but no news
                self._display.view.fold(source, event)
        with Interrupts().caught() as interrupts, ExitStack() as stack:
            failure = self._live(stack, interrupts)
        if failure is not None:
            raise failure
        if interrupts.count:
            raise KeyboardInterrupt
        return summary_of(self._run)

    # --- start ----------------------------------------------------------------------------------------------------

    def _live(self, stack: ExitStack, interrupts: Interrupts) -> NebulaError | None:
        endpoint = self._federation.coordinator
        port = endpoint.port or free_port()
        check_port(endpoint.host, port, "coordinator.port")
        self._coordinator = self._child(
            COORDINATOR, "coordinator", self._run.path, "--host", endpoint.host, "--port", port
        )
        links = {name: (c.link, (endpoint.host, port)) for name, c in self._federation.clusters.items() if c.link}
        relays = stack.enter_context(running(links, seed=self._agreement.run.seed))
        supervisor = stack.enter_context(Supervisor())
        supervisor.start(self._coordinator)
        for name, cluster in self._federation.clusters.items():
            address = f"{endpoint.host}:{relays[name].port if name in relays else port}"
            supervisor.start(self._site(name, cluster, address))
        return self._watch(supervisor, interrupts)

    def _site(self, name: str, cluster: Cluster, address: str) -> Site:
        if self._engine == "local":
            return Site(self._agent(name, cluster, address, None), None)
        head = Head(
            name,
            log=self._run.logs / f"ray-{name}.log",
            cpus=cluster.ranks,
            port=cluster.ray.port,
            dashboard_port=cluster.ray.dashboard_port,
        )
        return Site(self._agent(name, cluster, address, head), head)

    def _child(self, name: str, *arguments: object, env: dict[str, str] | None = None) -> Child:
        argv = [sys.executable, "-m", "nebula.cli.main", *map(str, arguments)]
        log = self._run.logs / f"{name}.log"
        # Both are made for a power cut; a coordinator that is merely asked would wait for clusters that are gone.
        return Child(name, argv, log=log, env={**os.environ, **(env or {})}, orphaned=signal.SIGKILL)

    def _agent(self, name: str, cluster: Cluster, address: str, head: Head | None) -> Child:
        arguments: list[object] = [
            *("agent", name),
            *("--clusters", self._run.path / "federation.json"),
            *("--coordinator", address),
            *("--identity", self._run.identity(name)),
            *("--agreement", self._agreement.digest()),
            *("--out", self._run.path),
            *("--max-stall", self._agreement.run.membership.max_stall),
            *("--engine", self._engine),
        ]
        env = {"OMP_NUM_THREADS": str(cluster.threads)}
        if head is not None:
            arguments += ["--ray", head.address, "--ray-token", head.token]
            env |= driver_environment(head.address, head.token)
        return self._child(name, *arguments, env=env)

    # --- watch ----------------------------------------------------------------------------------------------------

    def _watch(self, supervisor: Supervisor, interrupts: Interrupts) -> NebulaError | None:
        """Keep everything alive until the coordinator has ended, or the run cannot go on. Returns why, if it cannot."""
        asked, lost = False, 0
        while True:
            for event in supervisor.poll():
                if event.kind in ("failed", "gave_up"):
                    why = last_words(event.tail)
                    self._display.note(f"{event.child} ended with exit code {event.exit_code}: {why}")
                over = event.kind in ("finished", "gave_up") or (event.kind == "failed" and interrupts.count > 0)
                if event.child == COORDINATOR and over:
                    self._await_agents(supervisor)
                    return self._failure(event) if event.kind == "gave_up" else None
                lost += event.kind == "gave_up"
                if event.kind == "gave_up" and self._too_few(lost):
                    self._end_now()
                    return self._failure(event)
            if interrupts.count > 1:
                self._end_now()
                return None
            if interrupts.count and not asked:
                asked = self._coordinator.signal(signal.SIGINT)
            self._feed()
            self._display.tick()
            time.sleep(POLL_SECONDS)

    def _too_few(self, lost: int) -> bool:
        return len(self._federation.clusters) - lost < self._agreement.run.membership.quorum

    def _end_now(self) -> None:
        """Have the coordinator leave a summary without waiting for anyone."""
        until = time.monotonic() + COORDINATOR_ENDS_SECONDS
        self._coordinator.signal(signal.SIGTERM)
        while self._coordinator.running and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        self._feed()

    def _await_agents(self, supervisor: Supervisor) -> None:
        """Agents that take part may have a checkpoint to write; those that have not joined yet have nothing to lose."""
        until = time.monotonic() + AGENT_ENDS_SECONDS
        while time.monotonic() < until:
            supervisor.poll()
            self._feed()
            phases = {name: view.phase for name, view in self._display.view.clusters.items()}
            if not any(phases.get(name, "starting") not in ("starting", "joining") for name in supervisor.alive):
                break
            time.sleep(POLL_SECONDS)

    def _failure(self, event: Event) -> NebulaError:
        """A child's end as an error of our own, with its exit code."""
        if shutil.disk_usage(self._run.path).free < FULL_BYTES:  # then its log may be empty, too
            return PreflightError(
                f"the disk with {self._run.path} is full; what was acknowledged is on it",
                hint=f"free some space, then: nebula resume {self._run.path}",
            )
        lines = event.tail.splitlines()
        hint = next((line.removeprefix("hint: ") for line in reversed(lines) if line.startswith("hint: ")), "")
        kind = BY_EXIT_CODE.get(event.exit_code, NebulaError)
        return kind(f"{event.child}: {last_words(event.tail).removeprefix('error: ')}", hint=hint)

    def _feed(self) -> None:
        for source, tail in self._tails.items():
            for event in tail.poll():
                if event["event"] == "step" and not self._stepped:
                    self._stepped = True
                    self._display.note(f"first inner steps after {time.monotonic() - self._began:.0f} s")
                self._display.feed(source, event)


def summary_of(run: RunDir) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(run.summary.read_text("utf-8"))
    return summary


def last_words(tail: str) -> str:
    """The line of a log that says why, else its last one."""
    lines = [line for line in tail.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no log")
