"""Where time, waiting and threads come from. Coordinator, gateway and agent know no other clock, so that the simulator
can run these very parts on a virtual one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Condition(Protocol):
    """A lock with waiting, as threading.Condition (reentrant)."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def notify_all(self) -> None: ...


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds since an arbitrary moment, which is another one in every process."""
        ...

    def sleep(self, seconds: float) -> None: ...
    def condition(self) -> Condition: ...

    def spawn(self, name: str, act: Callable[[], None]) -> None:
        """Run `act` beside the caller, in a thread that the process does not wait for when it is told to end."""
        ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def condition(self) -> Condition:
        return threading.Condition()

    def spawn(self, name: str, act: Callable[[], None]) -> None:
        threading.Thread(target=act, name=name, daemon=True).start()


REAL = RealClock()


class Task(Generic[T]):
    """`act` running beside the caller."""

    def __init__(self, clock: Clock, name: str, act: Callable[[], T]) -> None:
        self._act = act
        self._over = clock.condition()
        self._outcome: Callable[[], T] | None = None
        clock.spawn(name, self._run)

    def wait(self) -> None:
        """Until it has ended, in whichever way."""
        with self._over:
            while self._outcome is None:
                self._over.wait()

    def result(self) -> T:
        """Wait for what `act` returns. Raises what it raised."""
        self.wait()
        assert self._outcome is not None
        return self._outcome()

    def _run(self) -> None:
        try:
            value = self._act()
            outcome: Callable[[], T] = lambda: value  # noqa: E731
        except Exception as error:
            raised = error
            outcome = lambda: _raise(raised)  # noqa: E731
        with self._over:
            self._outcome = outcome
            self._over.notify_all()


def _raise(error: Exception) -> T:  # type: ignore[type-var]
    raise error
