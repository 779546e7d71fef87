"""Everything of one run on this machine: coordinator, links, Ray heads and agents as child processes.

Each has its own session; a Ctrl-C in the terminal reaches only this process, which asks the coordinator to stop after
the round that is under way. What dies is started again and resumes exactly; see `runtime/supervise.py` for the policy.
"""

from __future__ import annotations

import json
import os
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
        self._coordinator: Child | None = None
        self._began = time.monotonic()
        self.first_step_after: float | None = None
        """Seconds from the start of this life to the first inner step that was reported."""

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
        links = {name: (c.link, (endpoint.host, port)) for name, c in self._federation.clusters.items() if c.link}
        relays = stack.enter_context(running(links, seed=self._agreement.run.seed))
        supervisor = stack.enter_context(Supervisor())
        self._coordinator = self._child(
            COORDINATOR, "coordinator", str(self._run.path), "--host", endpoint.host, "--port", port
        )
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
        return Child(name, argv, log=self._run.logs / f"{name}.log", env={**os.environ, **(env or {})})

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
        """Keep everything alive until the coordinator has ended."""
        assert self._coordinator is not None
        asked = False
        while True:
            for event in supervisor.poll():
                if event.child == COORDINATOR and event.kind in ("finished", "gave_up"):
                    self._await_agents(supervisor)
                    self._feed()
                    return None if event.kind == "finished" else failure_of(event)
                if (error := self._lost(event, supervisor)) is not None:
                    return error
            if interrupts.count > 1:
                return None
            if interrupts.count and not asked:
                asked = True
                os.kill(self._coordinator.pid, signal.SIGTERM)
            self._feed()
            self._display.tick()
            time.sleep(POLL_SECONDS)

    def _lost(self, event: Event, supervisor: Supervisor) -> NebulaError | None:
        """Tell what happened; an error if the run cannot go on."""
        if event.kind in ("failed", "gave_up"):
            self._display.note(f"{event.child} ended with exit code {event.exit_code}: {last_words(event.tail)}")
        if event.kind == "gave_up" and not any(name in supervisor.alive for name in self._federation.clusters):
            return failure_of(event)
        return None

    def _await_agents(self, supervisor: Supervisor) -> None:
        until = time.monotonic() + AGENT_ENDS_SECONDS
        while supervisor.alive and time.monotonic() < until:
            supervisor.poll()
            self._feed()
            time.sleep(POLL_SECONDS)

    def _feed(self) -> None:
        for source, tail in self._tails.items():
            for event in tail.poll():
                if event["event"] == "step" and self.first_step_after is None:
                    self.first_step_after = time.monotonic() - self._began
                self._display.feed(source, event)


def summary_of(run: RunDir) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(run.summary.read_text("utf-8"))
    return summary


def last_words(tail: str) -> str:
    """The line of a log that says why, else its last one."""
    lines = [line for line in tail.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no log")


def failure_of(event: Event) -> NebulaError:
    """A child's end as an error of our own, with its exit code."""
    lines = event.tail.splitlines()
    hint = next((line.removeprefix("hint: ") for line in reversed(lines) if line.startswith("hint: ")), "")
    kind = BY_EXIT_CODE.get(event.exit_code, NebulaError)
    return kind(f"{event.child}: {last_words(event.tail).removeprefix('error: ')}", hint=hint)
