"""One cluster on this machine as a unit to keep alive: its Ray head, if it has one, and its agent."""

from __future__ import annotations

import time
from collections.abc import Callable

from nebula.runtime.heads import Head
from nebula.runtime.supervise import Child

READY_SECONDS = 120.0
"""Ray takes three seconds on an idle machine; this is for a very busy one."""


class Site:
    """supervise.Supervised. The agent starts once Ray is ready; when either ends, so does the other: an agent without
    its Ray can do nothing, and what an agent leaves in its Ray would be in the way of the next one."""

    def __init__(self, agent: Child, head: Head | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = agent.name
        self._agent = agent
        self._head = head
        self._clock = clock
        self._started = False
        self._since = 0.0

    def start(self) -> None:
        self._started = False
        self._since = self._clock()
        if self._head is not None:
            self._head.start()

    def poll(self) -> int | None:
        """The agent's exit code, or 1 if its Ray ended first or never came up; None while all is well."""
        if self._head is not None and self._head.poll() is not None:
            return 1
        if not self._started:
            if self._head is None or self._head.ready():
                self._agent.start()
                self._started = True
            elif self._clock() - self._since > READY_SECONDS:
                return 1
            return None
        return self._agent.poll()

    def tail(self) -> str:
        if self._head is not None and self._head.poll() is not None:
            return f"Ray ended with exit code {self._head.poll()}\n{self._head.tail()}"
        if self._head is not None and not self._started:
            return f"Ray was not ready after {READY_SECONDS:g} s\n{self._head.tail()}"
        return self._agent.tail()

    def stop(self) -> None:
        self._agent.stop()
        if self._head is not None:
            self._head.stop()
