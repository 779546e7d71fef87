"""A worker and a gateway for tests of what hosts them. Importable in any process; no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading

from nebula.errors import AuthError, UsageError
from nebula.types import Pulled, RoundPlan


class FakeWorker:
    def __init__(self, *, rank: int, world: int, note: str) -> None:
        if note == "refuse":
            raise UsageError("the data is wrong", hint="correct it")
        self.rank, self.world, self.note = rank, world, note
        self.seen: list[str] = []

    def whoami(self) -> tuple[int, int, str]:
        return self.rank, self.world, self.note

    def pid(self) -> int:
        return os.getpid()

    def threads(self) -> str | None:
        return os.environ.get("OMP_NUM_THREADS")

    def remember(self, text: str) -> list[str]:
        self.seen.append(text)
        return self.seen

    def encode(self, fragment: str) -> bytes:
        return f"{fragment}/{self.rank};".encode() * 50_000

    def length(self, payload: bytes) -> int:
        return len(payload)

    def refuse(self) -> None:
        raise UsageError(f"rank {self.rank} says no", hint="ask nicely")

    def crash(self) -> None:
        raise KeyError("lost")

    def die(self, culprit: int) -> None:
        """One rank is killed, as for want of memory; the others notice at once."""
        if self.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:4711")

    def hang(self, culprit: int) -> None:
        """One rank fails for a reason of its own, the others wait for it in a collective."""
        if self.rank == culprit:
            raise UsageError("loss is not finite")
        threading.Event().wait()


class FakeGateway:
    def __init__(self, *, behaviour: str = "") -> None:
        if behaviour == "refuse":
            raise AuthError("not your certificate")
        self.behaviour = behaviour
        self.both = threading.Barrier(2)

    def join(self) -> tuple[bytes, bytes]:
        return b"agreement", b"tokenizer"

    def plan(self, held, report) -> RoundPlan:
        if self.behaviour == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return RoundPlan(action="done", reason="torch" if "torch" in sys.modules else "light")

    def push(self, ticket, packets) -> str:
        expected = [f"{ticket.fragment}/{rank};".encode() * 50_000 for rank in range(2)]
        return "accepted" if list(packets) == expected else "late"

    def pull(self, kind, fragment, version) -> tuple[Pulled, bytes]:
        if fragment == "both":
            self.both.wait(timeout=30)
        if fragment == "secret":
            raise AuthError("refused")
        return Pulled(status="ready", version=version), b"x" * 1_000_000

    def close(self) -> None:
        pass
