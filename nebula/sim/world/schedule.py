"""One seed decides everything: processes of cooperating fibers on one virtual clock.

A fiber runs until it sleeps, waits, or wants a condition that another one holds; nothing else switches. What lies
between two of these is one step, and a run is a list of steps: in the order of virtual time, and in one that the seed
draws among the steps of one moment. Code under test keeps its own locks: as no switch happens inside them, they are
never contended; only a lock that is held over a wait must be a `Condition` of the clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush

from greenlet import getcurrent, greenlet

from nebula.sim.world.clock import SimClock

TICKS = 2**20
"""Per virtual second. Every moment is a whole number of ticks: events of different processes then do meet in one
moment, and adding a process's offset to the time never rounds, so that no timer fires just before its time."""

MOST_OFFSET = 10**6


class Killed(BaseException):
    """Ends the fibers of a process that is killed."""


class _Event:
    """Something due. Without an act it was called off."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act


class Fiber:
    """A thread of a process. `step`: let it run until it waits again. `due`: the event that this is, if one is."""

    __slots__ = ("_act", "due", "greenlet", "name", "process", "step")

    def __init__(self, process: Process, name: str, act: Callable[[], None], step: Callable[[Fiber], None]) -> None:
        self.process, self.name, self._act = process, name, act
        self.greenlet = greenlet(self._run)
        self.step = partial(step, self)
        self.due: _Event | None = None

    def _run(self) -> None:
        try:
            self._act()
        except Killed:
            pass
        except BaseException as error:
            self.process.failed(self, error)
        finally:
            self.process.ended(self)


class Scheduler:
    """`now`: virtual seconds since the world began. `running`: the fiber whose step this is; None: the world's own."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.running: Fiber | None = None
        self._rng = random.Random(seed)
        self._queue: list[tuple[float, float, int, _Event]] = []
        self._count = 0
        self._processes: list[Process] = []

    def process(self, name: str) -> Process:
        """A new process; one that was killed does not come back, its successor is another."""
        self._processes = [process for process in self._processes if process.alive]
        self._processes.append(Process(self, name, offset=self._rng.randrange(1, MOST_OFFSET)))
        return self._processes[-1]

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Let the world act at a virtual time, or now if that is past."""
        self.schedule(time, act)

    def run(self, until: float, after: Callable[[], None]) -> None:
        """Take every step that is due by `until`, and call `after` behind each. Ends early, at the time of the last
        step, when nothing is left to come. What an act of the world or `after` raises is raised here."""
        while self._queue:
            time, _, _, event = self._queue[0]
            if event.act is not None and time > until:
                self.now = max(self.now, math.floor(until * TICKS) / TICKS)
                return
            heappop(self._queue)
            if event.act is not None:
                self.now = time
                event.act()
                after()

    def close(self) -> None:
        """End what still runs. A world that is merely dropped would unwind whenever the collector comes to it."""
        for process in self._processes:
            process.kill()
        self.stop()

    def stop(self) -> None:
        """Take none of the steps that are due so far."""
        self._queue.clear()

    # --- what waiting is made of ----------------------------------------------------------------------------------

    def schedule(self, time: float, act: Callable[[], None]) -> _Event:
        event = _Event(act)
        due = max(self.now, math.ceil(time * TICKS) / TICKS)
        self._count += 1
        heappush(self._queue, (due, self._rng.random(), self._count, event))
        return event

    def park(self, timeout: float | None = None) -> None:
        """Let others run until somebody wakes this fiber, or `timeout` seconds have passed."""
        fiber = self.running
        assert fiber is not None, "only a fiber of a process can wait"
        if not fiber.process.alive:
            raise Killed
        if timeout is not None:
            fiber.due = self.schedule(self.now + timeout, fiber.step)
        fiber.greenlet.parent.switch()

    def wake(self, fiber: Fiber) -> None:
        """Let a parked fiber go on in this moment, by its turn."""
        if fiber.process.alive:
            self.call_off(fiber)
            fiber.due = self.schedule(self.now, fiber.step)

    def call_off(self, fiber: Fiber) -> None:
        if fiber.due is not None:
            fiber.due.act = None
            fiber.due = None

    def resume(self, fiber: Fiber) -> None:
        """The step of a fiber; taken by the world only."""
        fiber.due = None
        if fiber.process.paused:
            fiber.process.hold_back(fiber)
            return
        fiber.greenlet.parent = getcurrent()  # where it comes back to
        self.running = fiber
        fiber.greenlet.switch()
        self.running = None

    def unwind(self, fiber: Fiber) -> None:
        """End a fiber of a dead process where it waits, in the middle of the present step."""
        self.call_off(fiber)
        if fiber.greenlet:  # else it never ran
            killer, self.running = self.running, fiber
            fiber.greenlet.parent = getcurrent()
            fiber.greenlet.throw(Killed())
            self.running = killer


class Process:
    """Fibers that live and die together. `clock` is theirs. `failures`: what ended fibers of it while it was alive."""

    def __init__(self, scheduler: Scheduler, name: str, offset: int) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.failures: list[BaseException] = []
        self.clock = SimClock(self, scheduler, offset)
        self._scheduler = scheduler
        self._fibers: dict[Fiber, None] = {}
        self._held_back: dict[Fiber, None] = {}

    def spawn(self, name: str, act: Callable[[], None]) -> None:
        if not self.alive:
            raise Killed
        fiber = Fiber(self, name, act, self._scheduler.resume)
        self._fibers[fiber] = None
        self._scheduler.wake(fiber)

    def kill(self) -> None:
        """SIGKILL, except that Python's `finally` blocks run, all of them in this very step. What they write to a disk
        is written: cut the power of that first. Called by the process itself, it raises Killed."""
        own = self._scheduler.running
        others = [fiber for fiber in self._fibers if fiber is not own] if self.alive else []
        self.alive = False
        for fiber in others:
            self._scheduler.unwind(fiber)
        self._held_back.clear()
        if own in self._fibers:
            raise Killed

    def pause(self) -> None:
        """SIGSTOP: no step is taken, while time goes on and timers run out."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: every step that was due is taken now."""
        self.paused = False
        held_back, self._held_back = self._held_back, {}
        for fiber in held_back:
            self._scheduler.wake(fiber)

    # --- for the scheduler ----------------------------------------------------------------------------------------

    def hold_back(self, fiber: Fiber) -> None:
        self._held_back[fiber] = None

    def failed(self, fiber: Fiber, error: BaseException) -> None:
        if self.alive:  # what goes wrong while a dead process unwinds is of no account
            error.add_note(f"in {fiber.name!r} of process {self.name!r}, {self._scheduler.now:.6f} s into the run")
            self.failures.append(error)

    def ended(self, fiber: Fiber) -> None:
        self._fibers.pop(fiber, None)
