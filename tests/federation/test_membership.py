"""Whom a round waits for, and until when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.federation.membership import (
    BEAT_SECONDS,
    LEAST_SILENCE,
    Progress,
    Pulse,
    advanced,
    deadline,
    heard,
    latest_arrival,
)
from nebula.types import Beat

STEADY = {"north": (10.0,) * 4, "south": (40.0,) * 4}


def beaten(*times: float) -> Pulse:
    pulse = None
    for time in times:
        pulse = heard(pulse, time)
    assert pulse is not None
    return pulse


def until(missing, **changes) -> float | None:
    usual = {"opened": 0.0, "arrivals": [9.0], "quorum": 1, "history": STEADY, "max_stall": 60.0, "progress": {}}
    return deadline(missing, **(usual | changes))


def training(*steps: tuple[float, int], of: int = 10, round: int = 3) -> Progress:
    """What beats at these times, each of so many steps, come to."""
    progress = None
    for time, step in steps:
        progress = advanced(progress, Beat(round=round, step=step, steps=of), time)
    assert progress is not None
    return progress


def test_a_late_delta_is_late_by_the_measure_of_its_own_cluster():
    assert latest_arrival("north", STEADY) == pytest.approx(10 + 4 * 2.5)
    assert latest_arrival("south", STEADY) == pytest.approx(40 + 4 * 10)
    assert latest_arrival("south", {"south": (4.0, 8.0, 10.0, 12.0, 16.0)}) == pytest.approx(20.0)  # MAD 2 < 2.5
    assert latest_arrival("south", {"south": (10.0, 20.0, 30.0)}) == pytest.approx(20 + 4 * 10)  # MAD 10 > 5


def test_a_newcomer_is_judged_by_everyone_and_by_nobody_while_there_is_no_measure():
    assert latest_arrival("east", {"north": (10.0, 10.0, 10.0)}) == pytest.approx(20.0)
    assert latest_arrival("north", {"north": (10.0, 10.0)}) == math.inf
    assert until({"south": None}, history={}) == 69.0


def test_a_round_waits_for_the_slowest_ordinary_arrival_but_never_longer_than_max_stall():
    assert until({"north": None}) == 20.0
    assert until({"north": None, "south": None}) == 69.0  # 80 s would be ordinary for it
    assert until({"north": None, "south": None}, max_stall=200.0) == 80.0
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
    assert halting.patience > 15
    recovered = halting
    for beat in range(1, 40):
        recovered = heard(recovered, 41 + beat * BEAT_SECONDS)
    assert recovered.patience == LEAST_SILENCE


def test_a_silence_is_waited_out_for_a_quarter_of_what_the_round_has_lasted():
    quick = beaten(*range(0, 41, 2))
    assert until({"south": quick}, arrivals=[9.0, 41.0]) == 40.0 + 10.0
    assert until({"south": quick}, arrivals=[9.0, 41.0], opened=20.0) == 40.0 + LEAST_SILENCE
    assert until({"south": quick}, arrivals=[9.0, 41.0], opened=60.0) == 40.0 + LEAST_SILENCE


def test_who_gets_on_and_can_come_in_time_is_waited_for_however_late():
    slow = training(*((4.0 * step, step) for step in range(1, 8)))
    assert slow.trained_at == pytest.approx(40.0)
    lives = {"north": beaten(*range(0, 29, 2))}
    assert until(lives) == 20.0, "as long as nothing is known but that it lives"
    assert until(lives, progress={"north": slow}) == 28.0 + LEAST_SILENCE
    assert until(lives, progress={"north": slow}, max_stall=30.0) == 9.0, "it would come a second too late"


def test_who_cannot_come_in_time_is_not_waited_for():
    hopeless = training((10.0, 1), (20.0, 2), of=20)
    assert hopeless.trained_at == pytest.approx(200.0)
    assert until({"south": None}, arrivals=[9.0, 21.0], progress={"south": hopeless}) == 21.0
    assert until({"south": None}, arrivals=[9.0, 21.0], progress={"south": training((20.0, 2), of=20)}) > 21.0


def test_who_lives_but_stands_still_is_soon_not_waited_for():
    stuck = training(
        *((float(time), time // 2) for time in range(2, 13, 2)), *((float(t), 6) for t in range(14, 60, 2))
    )
    assert stuck.pulse.last == 12.0
    lives = {"south": beaten(*range(0, 59, 2))}
    assert until(lives, arrivals=[9.0, 30.0], progress={"south": stuck}) == 30.0
    assert until(lives, arrivals=[9.0, 13.0], progress={"south": stuck}) == 12.0 + LEAST_SILENCE


def test_a_delta_that_moves_is_waited_for():
    sent = training(*((2.0 * step, step) for step in range(1, 20)), of=19)
    assert until({"north": None}, arrivals=[9.0, 39.0], progress={"north": sent}) == 38.0 + 0.25 * 38.0
    for time in range(39, 58):
        moving = advanced(sent, None, float(time))
        assert moving is not None
        sent = moving
    assert until({"north": None}, arrivals=[9.0, 39.0], progress={"north": sent}) == 69.0
    assert until({"south": None}, arrivals=[9.0, 39.0], progress={"south": training((2.0, 9), (4.0, 10))}) == 69.0


def test_beats_tell_of_progress_only_if_something_was_done():
    assert advanced(None, None, 1.0) is None
    first = training((1.0, 1))
    assert advanced(first, Beat(round=3, step=1, steps=10), 5.0) is first
    assert advanced(first, None, 5.0) is first, "frames say nothing of steps"
    anew = training((1.0, 5), (3.0, 6), (9.0, 1), (12.0, 2))
    assert (anew.begun, anew.first, anew.trained_at) == (9.0, 1, pytest.approx(36.0))
    assert training((1.0, 10)).training is False


@settings(max_examples=100, deadline=None)
@given(
    pulses=st.dictionaries(st.sampled_from("abcd"), st.none() | st.builds(Pulse, st.floats(0, 100)), min_size=1),
    arrivals=st.lists(st.floats(0, 100), min_size=1, max_size=4),
    quorum=st.integers(1, 4),
    seconds=st.lists(st.floats(0.1, 100), max_size=8),
    max_stall=st.floats(1, 500),
    beats=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10)), max_size=4),
)
def test_nobody_waits_longer_than_max_stall_nor_less_than_for_what_is_there(
    pulses, arrivals, quorum, seconds, max_stall, beats
):
    rest = {
        "arrivals": arrivals,
        "quorum": quorum,
        "history": {"a": tuple(seconds)},
        "max_stall": max_stall,
        "progress": {"a": training(*sorted(beats))} if beats else {},
    }
    when = until(pulses, **rest)
    assert when is not None
    assert when <= min(arrivals) + max_stall
    assert when >= min(max(arrivals), min(arrivals) + max_stall)
    fewer = dict(list(pulses.items())[1:])
    sooner = until(fewer, **rest)
    assert sooner is not None
    assert sooner <= when, "one cluster less to wait for"
