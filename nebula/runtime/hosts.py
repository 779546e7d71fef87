"""What runs inside Ray's actors: a rank, and the gateway. Imports neither torch nor ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from nebula.errors import NebulaError
from nebula.runtime.engine import Ranks, attempt, make
from nebula.types import PushTicket


class RankHost:
    """The actor around a worker. Every answer is (error, value): the driver can ask for the first alone."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank
        self._worker: Any = None

    def build(self) -> tuple[NebulaError | None, Any]:
        os.environ["OMP_NUM_THREADS"] = str(self._ranks.threads)  # read when torch is imported, that is now
        error, self._worker = attempt(f"rank {self._rank}", self._rank, lambda: self._ranks.build(self._rank))
        return error, None

    def call(self, method: str, *args: Any) -> tuple[NebulaError | None, Any]:
        return attempt(f"rank {self._rank}", self._rank, lambda: getattr(self._worker, method)(*args))

    def ping(self) -> int:
        """Answers from a thread of its own, however busy the rank is. Returns the process id."""
        return os.getpid()


class GatewayHost:
    """The actor around the gateway. Several threads; no torch."""

    def __init__(self, gateway: str, settings: Mapping[str, Any]) -> None:
        self._error, self._gateway = attempt("the gateway", 0, lambda: make(gateway, settings))

    def call(self, method: str, *args: Any) -> tuple[NebulaError | None, Any]:
        return self._attempt(lambda: getattr(self._gateway, method)(*args))

    def push(self, ticket: PushTicket, *packets: bytes) -> tuple[NebulaError | None, Any]:
        return self._attempt(lambda: self._gateway.push(ticket, packets))

    def pull(self, kind: str, fragment: str, version: int) -> tuple[NebulaError | None, Any, Any]:
        error, value = self._attempt(lambda: self._gateway.pull(kind, fragment, version))
        return (error, None, None) if error else (None, *value)

    def ping(self) -> int:
        return os.getpid()

    def _attempt(self, act: Callable[[], Any]) -> tuple[NebulaError | None, Any]:
        return (self._error, None) if self._error else attempt("the gateway", 0, act)
