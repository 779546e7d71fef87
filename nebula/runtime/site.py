"""One cluster on this machine as a unit to keep alive: its Ray head, if it has one, and its agent."""

from __future__ import annotations

from nebula.runtime.heads import Head
from nebula.runtime.supervise import Child


class Site:
    """supervise.Supervised. The agent starts once Ray is ready; when either ends, so does the other: an agent without
    its Ray can do nothing, and what an agent leaves in its Ray would be in the way of the next one."""

    def __init__(self, agent: Child, head: Head | None) -> None:
        self.name = agent.name
        self._agent = agent
        self._head = head
        self._started = False

    def start(self) -> None:
        self._started = False
        if self._head is not None:
            self._head.start()

    def poll(self) -> int | None:
        """The agent's exit code, or 1 if its Ray ended first; None while both are well."""
        if self._head is not None and self._head.poll() is not None:
            return 1
        if not self._started:
            if self._head is None or self._head.ready():
                self._agent.start()
                self._started = True
            return None
        return self._agent.poll()

    def tail(self) -> str:
        if self._head is not None and self._head.poll() is not None:
            return f"Ray ended with exit code {self._head.poll()}\n{self._head.tail()}"
        return self._agent.tail()

    def stop(self) -> None:
        self._agent.stop()
        if self._head is not None:
            self._head.stop()
