"""A call ends when nothing moves on it, and not because it takes long."""

from __future__ import annotations

import threading
import time

from nebula.proto.v1.packet_pb2 import Frame
from nebula.wan.transport import Movement


class Call:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


def watched(patience: float) -> tuple[Movement, Call, threading.Thread]:
    movement, call = Movement(patience), Call()
    thread = threading.Thread(target=movement.watch, args=(call,))
    thread.start()
    return movement, call, thread


def test_a_silent_call_is_cancelled():
    _, call, thread = watched(0.05)
    assert call.cancelled.wait(10)
    thread.join()


def test_a_call_that_moves_may_take_many_times_its_patience():
    movement, call, thread = watched(2.0)
    began = time.monotonic()
    movement._last = began - 1e6  # as if the watcher looked long after the last frame …
    passed = list(movement.noted([Frame(index=0)]))  # … but one has just come
    assert [frame.index for frame in passed] == [0]
    assert movement._last >= began
    movement.stop()
    thread.join()
    assert not call.cancelled.is_set()


def test_a_call_that_is_over_is_left_alone():
    movement, call, thread = watched(3600.0)
    movement.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert not call.cancelled.is_set()
