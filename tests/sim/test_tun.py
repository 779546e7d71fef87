"""Paths for whole packets: the arithmetic on a virtual clock, and a real one between two namespaces."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.config import Link
from nebula.sim.line import Line, Shape
from nebula.sim.tun import ENDS, LEAST_QUEUE, QUEUE_S, Way, path

SLOW = Shape(rate=1e6, rtt=0.1, loss=0.0)


def arrivals(way: Way, plan: list[tuple[float, int]]) -> list[tuple[float, bytes]]:
    """When each packet of a plan of (pause before it, size) comes out, the first two bytes of which are its number."""
    now, out = 0.0, []
    for number, (gap, size) in enumerate(plan):
        now += gap
        way.take(now, number.to_bytes(2, "big") + bytes(size))
    while (at := way.next()) is not None:
        out += [(at, packet) for packet in way.due(at)]
    return out


plans = st.lists(st.tuples(st.floats(0.0, 0.01), st.integers(0, 1498)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(plans, st.floats(0.0, 0.05))
def test_packets_come_in_order_no_faster_than_the_rate_and_the_distance(plan, jitter):
    came = arrivals(Way(Shape(1e6, 0.1, 0.0, jitter), random.Random(0)), plan)
    assert [int.from_bytes(packet[:2], "big") for _, packet in came] == list(range(len(plan)))
    assert [at for at, _ in came] == sorted(at for at, _ in came)
    sent = 0.0
    for (gap, size), (at, packet) in zip(plan, came, strict=True):
        sent += gap
        assert len(packet) == size + 2
        assert at >= sent + 0.05 + len(packet) / 1e6 - 1e-9
    carried = sum(size + 2 for _, size in plan)
    assert came[-1][0] <= sent + carried / 1e6 + 0.05 + jitter + 1e-9


def test_jitter_spreads_arrivals_up_to_its_bound():
    plan = [(1.0, 98)] * 500
    late = [
        at - n - 1 - 1e-4 - 0.05
        for n, (at, _) in enumerate(arrivals(Way(Shape(1e6, 0.1, 0, 0.04), random.Random(1)), plan))
    ]
    assert 0 <= min(late) < 0.004 < 0.036 < max(late) < 0.04


def test_losses_come_as_often_as_asked_and_the_same_for_the_same_seed():
    plan = [(0.01, 98)] * 5000
    first, again = (Way(Shape(1e6, 0.0, 0.1), random.Random(3)) for _ in range(2))
    assert arrivals(first, plan) == arrivals(again, plan)
    assert 400 < first.dropped < 600
    assert first.passed + first.dropped == 5000


def test_a_queue_that_is_full_drops_what_comes_next():
    way = Way(Shape(rate=1e6, rtt=0.0, loss=0.0), random.Random(0))
    came = arrivals(way, [(0.0, 998)] * 1000)
    assert way.limit == max(QUEUE_S, LEAST_QUEUE / 1e6)
    assert len(came) == pytest.approx(way.limit * 1e6 / 1000, abs=2)
    assert way.dropped == 1000 - len(came)


def test_packets_are_overtaken_as_often_as_asked():
    way = Way(SLOW, random.Random(0), reorder=0.1)
    numbers = [int.from_bytes(packet[:2], "big") for _, packet in arrivals(way, [(0.001, 98)] * 2000)]
    assert sorted(numbers) == list(range(2000))
    overtaken = sum(number < max(numbers[:place], default=0) for place, number in enumerate(numbers))
    assert 140 < overtaken < 260


def test_a_relays_line_has_jitter_too_and_keeps_the_order():
    line = Line(Shape(1e6, 0.1, 0.0, jitter=0.04), random.Random(0))
    late = [line.send(float(n), 100) - n - 0.05 - 1e-4 for n in range(500)]
    assert 0 <= min(late) < 0.004 < 0.036 < max(late) < 0.04


# --- a real one ---------------------------------------------------------------------------------------------------


@pytest.fixture
def places() -> Iterator[list[str]]:
    names = [f"nebula-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        subprocess.run(("ip", "netns", "add", name), check=True)
    yield names
    for name in names:
        subprocess.run(("ip", "netns", "delete", name), check=True)


HEAR = f"""
import socket
heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
heard.bind(({ENDS[1]!r}, 9000))
print("listening", flush=True)
while True:
    data, sender = heard.recvfrom(2000)
    heard.sendto(data, sender)
"""
SAY = f"""
import socket, time
said = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
said.settimeout(20)
for number in range(5):
    start = time.monotonic()
    said.sendto(b"%d" % number, ({ENDS[1]!r}, 9000))
    assert said.recv(2000) == b"%d" % number
    print(time.monotonic() - start)
"""


@pytest.mark.machine("root", "ip")
def test_what_is_sent_in_one_namespace_comes_to_the_other_and_back_no_sooner_than_a_round_trip(places):
    near, far = places
    python = ("ip", "netns", "exec", far, sys.executable, "-c", HEAR)
    with path(near, far, Link(rate_mbps=10.0, rtt_ms=40.0)), subprocess.Popen(python, stdout=subprocess.PIPE) as hearer:
        assert hearer.stdout is not None
        assert hearer.stdout.readline() == b"listening\n"
        said = subprocess.run(
            ("ip", "netns", "exec", near, sys.executable, "-c", SAY), capture_output=True, text=True, check=True
        )
        hearer.kill()
    assert all(float(seconds) >= 0.04 for seconds in said.stdout.split())
    assert len(said.stdout.split()) == 5
