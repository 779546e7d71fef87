"""Whom a round waits for, and until when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.federation.membership import BEAT_SECONDS, LEAST_SILENCE, Pulse, deadline, heard, latest_arrival

STEADY = {"north": (10.0,) * 4, "south": (40.0,) * 4}


def beaten(*times: float) -> Pulse:
    pulse = None
    for time in times:
        pulse = heard(pulse, time)
    assert pulse is not None
    return pulse


def until(missing, **changes) -> float | None:
    return deadline(
        missing, **{"opened": 0.0, "arrivals": [9.0], "quorum": 1, "history": STEADY, "max_stall": 60.0, **changes}
    )


def test_a_late_delta_is_late_by_the_measure_of_its_own_cluster():
    assert latest_arrival("north", STEADY) == pytest.approx(10 + 6 * 2.5)
    assert latest_arrival("south", STEADY) == pytest.approx(40 + 6 * 10)
    assert latest_arrival("south", {"south": (4.0, 8.0, 10.0, 12.0, 16.0)}) == pytest.approx(25.0)  # MAD 2 < 2.5
    assert latest_arrival("south", {"south": (10.0, 20.0, 30.0)}) == pytest.approx(20 + 6 * 10)  # MAD 10 > 5


def test_a_newcomer_is_judged_by_everyone_and_by_nobody_while_there_is_no_measure():
    assert latest_arrival("east", {"north": (10.0, 10.0, 10.0)}) == pytest.approx(25.0)
    assert latest_arrival("north", {"north": (10.0, 10.0)}) == math.inf
    assert until({"south": None}, history={}) == 69.0


def test_a_round_waits_for_the_slowest_ordinary_arrival_but_never_longer_than_max_stall():
    assert until({"north": None}) == 25.0
    assert until({"north": None, "south": None}) == 69.0  # 100 s would be ordinary for it
    assert until({"north": None, "south": None}, max_stall=200.0) == 100.0
    assert until({"north": None}, arrivals=[]) is None
    assert until({"north": None}, arrivals=[40.0]) == 40.0  # the first was late itself: no further wait
    assert until({"south": None}, quorum=2) == 69.0


def test_silence_ends_the_wait_before_the_ordinary_time_is_over():
    quick = beaten(*range(0, 31, 2))
    assert quick.patience == LEAST_SILENCE
    assert until({"south": quick}, arrivals=[9.0, 11.0]) == 30.0 + LEAST_SILENCE
    assert until({"south": quick}, arrivals=[9.0, 50.0]) == 50.0
    assert until({"south": quick}, quorum=2) == 69.0, "without a quorum the whole max_stall is granted"


def test_a_cluster_on_a_bad_link_is_given_more_time():
    halting = beaten(0, 1, 9, 10, 19, 21, 30, 32, 41)
    assert halting.patience > 20
    recovered = halting
    for beat in range(1, 40):
        recovered = heard(recovered, 41 + beat * BEAT_SECONDS)
    assert recovered.patience == LEAST_SILENCE


@settings(max_examples=100, deadline=None)
@given(
    pulses=st.dictionaries(st.sampled_from("abcd"), st.none() | st.builds(Pulse, st.floats(0, 100)), min_size=1),
    arrivals=st.lists(st.floats(0, 100), min_size=1, max_size=4),
    quorum=st.integers(1, 4),
    seconds=st.lists(st.floats(0.1, 100), max_size=8),
    max_stall=st.floats(1, 500),
)
def test_nobody_waits_longer_than_max_stall_nor_less_than_for_what_is_there(
    pulses, arrivals, quorum, seconds, max_stall
):
    history = {"a": tuple(seconds)}
    when = until(pulses, arrivals=arrivals, quorum=quorum, history=history, max_stall=max_stall)
    assert when is not None
    assert when <= min(arrivals) + max_stall
    assert when >= min(max(arrivals), min(arrivals) + max_stall)
    fewer = dict(list(pulses.items())[1:])
    sooner = until(fewer, arrivals=arrivals, quorum=quorum, history=history, max_stall=max_stall)
    assert sooner is not None
    assert sooner <= when, "one cluster less to wait for"
