"""The scheduler: what is simulated on it depends on the seed alone, and its processes die as real ones do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.clock import Task
from nebula.sim.world.schedule import TICKS, Process, Scheduler


def nothing() -> None:
    pass


def run(scheduler: Scheduler, until: float = math.inf) -> None:
    scheduler.run(until, nothing)


def story(seed: int) -> list[tuple[float, str]]:
    """Three processes whose fibers sleep, contend and wait for one another; every step is told."""
    scheduler, trace = Scheduler(seed), []
    for name in "abc":
        process = scheduler.process(name)
        condition = process.clock.condition()

        def act(fiber: str, process: Process = process, condition=condition) -> None:
            for _ in range(3):
                with condition:
                    trace.append((scheduler.now, fiber))
                    process.clock.sleep(0.5)
                    condition.notify_all()
                    condition.wait(1.0)

        for number in range(3):
            process.spawn(f"{name}{number}", lambda fiber=f"{name}{number}", act=act: act(fiber))
    run(scheduler)
    assert len(trace) == 27
    return trace


def test_a_seed_tells_one_story_and_every_seed_another():
    assert story(7) == story(7)
    assert len({tuple(story(seed)) for seed in range(20)}) == 20


def test_fibers_that_are_due_in_one_moment_run_in_every_order():
    orders = set()
    for seed in range(60):
        scheduler, order = Scheduler(seed), []
        for name in "abc":
            scheduler.process(name).spawn(name, lambda name=name, order=order: order.append(name))
        run(scheduler)
        orders.add("".join(order))
    assert len(orders) == 6


def test_the_seed_draws_who_goes_on_after_a_notification():
    orders = set()
    for seed in range(60):
        scheduler, order = Scheduler(seed), []
        process = scheduler.process("a")
        condition = process.clock.condition()

        def wait(name: str, condition=condition, order=order) -> None:
            with condition:
                assert condition.wait()
                order.append(name)

        for name in "xyz":
            process.spawn(name, lambda name=name, wait=wait: wait(name))
        scheduler.at(1.0, lambda condition=condition: notify(condition))
        run(scheduler)
        orders.add("".join(order))
    assert len(orders) == 6


def notify(condition) -> None:
    with condition:
        condition.notify_all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=20), st.integers(0, 2**32))
def test_no_timer_fires_early_on_its_own_processs_clock(pauses, seed):
    scheduler = Scheduler(seed)
    clock = scheduler.process("a").clock

    def act() -> None:
        condition = clock.condition()
        for pause in pauses:
            until = clock.now() + pause
            with condition:
                assert not condition.wait(until - clock.now())
            assert 0 <= clock.now() - until <= 1.5 / TICKS
            assert (scheduler.now * TICKS).is_integer()

    done = []
    clock.spawn("timers", lambda: done.append(act()))
    run(scheduler)
    assert done == [None]


def test_the_clocks_of_two_processes_go_at_one_pace_but_never_agree():
    scheduler = Scheduler(3)
    first, second = scheduler.process("a"), scheduler.process("a")
    apart = first.clock.now() - second.clock.now()
    assert apart != 0
    first.spawn("sleep", lambda: first.clock.sleep(12.5))
    run(scheduler)
    assert scheduler.now == 12.5
    assert first.clock.now() - second.clock.now() == apart


def test_a_condition_is_reentrant_and_wait_lets_go_of_all_of_it():
    scheduler, told = Scheduler(0), []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def wait() -> None:
        with condition:
            with condition:
                assert condition.wait(10)
            process.clock.sleep(5)
            told.append(("left", scheduler.now))

    def enter() -> None:
        process.clock.sleep(1)
        with condition:
            condition.notify_all()
        process.clock.sleep(1)
        with condition:
            told.append(("entered", scheduler.now))

    process.spawn("wait", wait)
    process.spawn("enter", enter)
    run(scheduler)
    assert told == [("left", 6.0), ("entered", 6.0)]
    assert process.failures == []


def test_a_condition_keeps_others_out_while_its_owner_sleeps():
    scheduler, inside, most = Scheduler(5), [], []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def act() -> None:
        for _ in range(4):
            with condition:
                inside.append(1)
                most.append(len(inside))
                process.clock.sleep(1)
                inside.pop()

    for number in range(3):
        process.spawn(str(number), act)
    run(scheduler)
    assert most == [1] * 12
    assert scheduler.now == 12.0


def test_who_wanted_a_condition_gets_it_when_its_owner_waits():
    scheduler, told = Scheduler(5), []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def hold() -> None:
        with condition:
            process.clock.sleep(2)
            told.append((condition.wait(10), scheduler.now))

    def enter() -> None:
        process.clock.sleep(1)
        with condition:
            told.append(("entered", scheduler.now))

    process.spawn("hold", hold)
    process.spawn("enter", enter)
    run(scheduler)
    assert told == [("entered", 2.0), (False, 12.0)]


def test_a_condition_cannot_be_used_without_holding_it():
    scheduler = Scheduler(0)
    process = scheduler.process("a")
    condition = process.clock.condition()
    process.spawn("wait", condition.wait)
    process.spawn("notify", condition.notify_all)
    run(scheduler)
    assert [type(error) for error in process.failures] == [AssertionError] * 2


def test_tasks_hand_over_results_and_errors():
    scheduler, told = Scheduler(0), []
    process = scheduler.process("a")

    def slow() -> int:
        process.clock.sleep(3)
        return 5

    def act() -> None:
        good, bad = Task(process.clock, "good", slow), Task(process.clock, "bad", lambda: 1 // 0)
        told.append((good.result(), scheduler.now))
        with pytest.raises(ZeroDivisionError):
            bad.result()
        told.append("raised")

    process.spawn("act", act)
    run(scheduler)
    assert told == [(5, 3.0), "raised"]


def test_what_ends_a_fiber_is_kept_and_ends_no_other():
    scheduler, told = Scheduler(0), []
    process = scheduler.process("north")
    process.spawn("bad", lambda: [][1])
    process.spawn("good", lambda: (process.clock.sleep(1), told.append("good")))
    run(scheduler)
    assert told == ["good"]
    assert [str(error) for error in process.failures] == ["list index out of range"]
    assert "'bad' of process 'north'" in process.failures[0].__notes__[0]
    assert process.alive


# --- killing ------------------------------------------------------------------------------------------------------


class Victim:
    """A process with a fiber in every state. `after`: what ran after the kill, `unwound`: which fibers were unwound."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.process = scheduler.process("victim")
        self.condition = self.process.clock.condition()
        self.unwound: list[str] = []
        self.after: list[str] = []
        for act in (self.wait, self.hold, self.enter, self.sleep):
            self.process.spawn(act.__name__, lambda act=act: self.watched(act))

    def watched(self, act: Callable[[], None]) -> None:
        try:
            act()
            self.after.append(act.__name__)
        finally:
            self.unwound.append(act.__name__)
            with self.condition:  # what is left behind is never contended for long
                self.process.clock.sleep(1)
            self.after.append("finally")

    def wait(self) -> None:
        with self.condition, self.condition:
            self.condition.wait()

    def hold(self) -> None:
        self.process.clock.sleep(1)
        with self.condition:
            self.process.clock.sleep(1000)

    def enter(self) -> None:
        self.process.clock.sleep(2)
        with self.condition:
            self.after.append("entered")

    def sleep(self) -> None:
        self.process.clock.sleep(1000)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("paused", [False, True])
def test_a_killed_process_is_unwound_and_takes_no_further_step(seed, paused):
    scheduler = Scheduler(seed)
    victim = Victim(scheduler)
    run(scheduler, 5.0)
    if paused:
        victim.process.pause()
        scheduler.run(6.0, nothing)
    victim.process.spawn("never started", lambda: victim.after.append("started"))
    victim.process.kill()
    assert sorted(victim.unwound) == ["enter", "hold", "sleep", "wait"]
    victim.process.resume()
    run(scheduler)
    assert scheduler.now < 1000
    assert (victim.after, victim.process.failures, victim.process.alive) == ([], [], False)
    with victim.condition:  # nobody holds it
        pass


def test_a_process_can_kill_itself_and_another():
    scheduler, after = Scheduler(2), []
    victim = Victim(scheduler)
    killer = scheduler.process("killer")

    def act() -> None:
        killer.clock.sleep(5)
        victim.process.kill()
        after.append(len(victim.unwound))
        killer.spawn("other", lambda: killer.clock.sleep(1000))
        killer.clock.sleep(1)
        killer.kill()
        after.append("survived")

    killer.spawn("kill", act)
    run(scheduler)
    assert after == [4]
    assert (scheduler.now, killer.alive, killer.failures) == (6.0, False, [])


def test_a_kill_between_notification_and_waking_leaves_the_condition_free_for_others():
    scheduler, told = Scheduler(0), []
    victim, other = scheduler.process("victim"), scheduler.process("other")
    condition = victim.clock.condition()

    def wait(name: str) -> None:
        with condition:
            condition.wait()
            told.append(name)

    victim.spawn("wait", lambda: wait("victim"))
    other.spawn("wait", lambda: wait("other"))
    scheduler.at(1.0, lambda: (notify(condition), victim.kill()))
    run(scheduler)
    assert told == ["other"]


def test_the_dead_are_not_woken():
    scheduler, steps = Scheduler(0), []
    victim, other = scheduler.process("victim"), scheduler.process("other")
    condition = other.clock.condition()

    def act(process: Process) -> None:
        with condition:
            process.clock.sleep(2)

    other.spawn("hold", lambda: act(other))
    scheduler.at(1.0, lambda: victim.spawn("enter", lambda: act(victim)))
    scheduler.at(1.5, victim.kill)
    scheduler.run(math.inf, lambda: steps.append(scheduler.now))
    assert steps == [0.0, 1.0, 1.0, 1.5, 2.0]


def test_closing_a_world_unwinds_everything():
    scheduler = Scheduler(0)
    victim = Victim(scheduler)
    run(scheduler, 5.0)
    scheduler.close()
    assert len(victim.unwound) == 4
    run(scheduler)
    assert scheduler.now == 5.0


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_a_stopped_process_takes_no_step_while_its_timers_run_out():
    scheduler, told = Scheduler(0), []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def sleep() -> None:
        process.clock.sleep(3)
        told.append(("slept", scheduler.now))
        process.clock.sleep(3)
        told.append(("slept", scheduler.now))

    def wait() -> None:
        with condition:
            told.append((condition.wait(4), scheduler.now))
            told.append((condition.wait(20), scheduler.now))

    process.spawn("sleep", sleep)
    process.spawn("wait", wait)
    scheduler.at(2.0, process.pause)
    scheduler.at(6.0, process.resume)
    scheduler.at(7.0, process.pause)
    scheduler.at(8.0, lambda: notify(condition))
    scheduler.at(50.0, process.resume)
    run(scheduler)
    assert sorted(told[:2], key=str) == [("slept", 6.0), (False, 6.0)]
    assert sorted(told[2:], key=str) == [("slept", 50.0), (True, 50.0)]


def test_a_stopped_process_that_is_notified_after_its_timer_ran_out_runs_once():
    scheduler, told = Scheduler(0), []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def wait() -> None:
        with condition:
            told.append(condition.wait(1))

    process.spawn("wait", wait)
    scheduler.at(0.5, process.pause)
    scheduler.at(2.0, lambda: notify(condition))
    scheduler.at(3.0, process.resume)
    run(scheduler)
    assert told == [True]


# --- the run ------------------------------------------------------------------------------------------------------


def test_a_run_stops_at_its_time_and_goes_on_from_there():
    scheduler, told = Scheduler(0), []
    for time in (4.0, 1.0, 2.5):
        scheduler.at(time, lambda time=time: told.append((time, scheduler.now)))
    run(scheduler, 2.5)
    assert told == [(1.0, 1.0), (2.5, 2.5)]
    run(scheduler, 3.25)
    assert scheduler.now == 3.25
    scheduler.at(1.0, lambda: told.append(("past", scheduler.now)))
    run(scheduler, 10.0)
    assert told[2:] == [("past", 3.25), (4.0, 4.0)]
    assert scheduler.now == 4.0, "nothing was left at 4 s"


def test_every_step_is_followed_by_the_check_and_its_error_ends_the_run():
    scheduler, steps = Scheduler(0), []
    process = scheduler.process("a")
    process.spawn("steps", lambda: [process.clock.sleep(1) for _ in range(10)])

    def check() -> None:
        steps.append(scheduler.now)
        assert scheduler.now < 4, "invariant"

    with pytest.raises(AssertionError, match="invariant"):
        scheduler.run(math.inf, check)
    assert steps == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_timers_that_were_called_off_are_no_steps_and_take_no_time():
    scheduler, steps = Scheduler(0), []
    process = scheduler.process("a")
    condition = process.clock.condition()

    def wait() -> None:
        with condition:
            assert condition.wait(1000)

    process.spawn("wait", wait)
    scheduler.at(1.0, lambda: notify(condition))
    scheduler.run(math.inf, lambda: steps.append(scheduler.now))
    assert steps == [0.0, 1.0, 1.0]
    assert process.failures == []


def test_a_long_history_with_kills_and_stops_is_the_same_twice():
    def history(seed: int) -> list[object]:
        scheduler, trace, rng = Scheduler(seed), [], random.Random(seed)
        processes: list[Process] = []

        def begin(name: str) -> None:
            process = scheduler.process(name)
            condition = process.clock.condition()

            def act(number: int) -> None:
                while True:
                    with condition:
                        trace.append((scheduler.now, name, number))
                        condition.wait(0.1 * number)
                        condition.notify_all()
                    process.clock.sleep(0.1 * number)

            for number in range(1, 4):
                process.spawn(str(number), lambda number=number: act(number))
            processes.append(process)

        def disturb() -> None:
            process = rng.choice(processes)
            rng.choice([process.kill, process.pause, process.resume])()
            if not process.alive:
                processes.remove(process)
                begin(process.name)

        for name in "ab":
            begin(name)
        for step in range(40):
            scheduler.at(step * 0.37, disturb)
        run(scheduler, 15.0)
        scheduler.close()
        return trace

    assert len(history(1)) > 100
    assert history(1) == history(1) != history(2)
