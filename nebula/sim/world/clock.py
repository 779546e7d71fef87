"""A simulated process's clock and conditions; the scheduler they wait with is in `schedule.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nebula.sim.world.schedule import Fiber, Process, Scheduler


class SimClock:
    """A process's `nebula.clock.Clock`."""

    def __init__(self, process: Process, scheduler: Scheduler, offset: int) -> None:
        self._process, self._scheduler, self._offset = process, scheduler, offset

    def now(self) -> float:
        return self._scheduler.now + self._offset

    def sleep(self, seconds: float) -> None:
        self._scheduler.park(seconds)

    def condition(self) -> SimCondition:
        return SimCondition(self._scheduler)

    def spawn(self, name: str, act: Callable[[], None]) -> None:
        self._process.spawn(name, act)


class SimCondition:
    """As threading.Condition on an RLock. Who waits for it and is killed does not hold it afterwards. The world itself
    may take and notify a condition that is free, but cannot wait for one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Fiber | None = None
        self._depth = 0
        self._entering: dict[Fiber, None] = {}
        self._waiting: dict[Fiber, None] = {}

    def __enter__(self) -> bool:
        self._claim()
        self._depth += 1
        return True

    def __exit__(self, *error: object) -> None:
        if self._held():  # else this fiber was killed while it waited
            self._depth -= 1
            self._let_in()

    def wait(self, timeout: float | None = None) -> bool:
        assert self._held(), "wait for a condition that is held"
        me = self._me()
        depth, self._depth = self._depth, 0
        self._let_in()
        self._waiting[me] = None
        try:
            self._scheduler.park(timeout)
        finally:
            notified = me not in self._waiting
            self._waiting.pop(me, None)
        self._claim()
        self._depth = depth
        return notified

    def notify_all(self) -> None:
        assert self._held(), "notify a condition that is held"
        self._wake(self._waiting)

    def _held(self) -> bool:
        return self._depth > 0 and self._owner is self._scheduler.running

    def _me(self) -> Fiber:
        assert self._scheduler.running is not None, "the world cannot wait"
        return self._scheduler.running

    def _claim(self) -> None:
        while self._depth and not self._held():
            self._entering[self._me()] = None
            self._scheduler.park()
        self._owner = self._scheduler.running

    def _let_in(self) -> None:
        if not self._depth:
            self._wake(self._entering)

    def _wake(self, fibers: dict[Fiber, None]) -> None:
        """In an order that the scheduler draws."""
        for fiber in fibers:
            self._scheduler.wake(fiber)
        fibers.clear()
