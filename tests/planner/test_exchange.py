"""Forecasts: by hand, and what must hold for any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.config import Adaptive, Codec
from nebula.planner.exchange import APPLIED, KEPT, OVERHEAD, SEGMENT, Cost, Site, forecast, step_for
from nebula.planner.speeds import measured

FREE = Cost(bits=8.0, encode=0.0, decode=0.0)
SITE = Site(rate=1e6, rtt=0.1, loss=0.0, step=0.5)

costs = st.builds(Cost, bits=st.floats(0.1, 32), encode=st.floats(0, 1e-7), decode=st.floats(0, 1e-7))
places = st.builds(
    Site,
    rate=st.floats(1e5, 1e9),
    rtt=st.floats(0, 0.5),
    loss=st.floats(0, 0.01),
    step=st.floats(0.01, 10),
    share=st.floats(0.1, 1),
    lanes=st.integers(1, 8),
)


def test_a_round_by_hand():
    """A million parameters of a byte each, over a megabyte a second and 0.1 s."""
    (one,) = forecast({"north": SITE}, 10**6, 10, FREE, FREE).values()
    merge = 10**6 * KEPT
    assert one.up_bytes == one.down_bytes == pytest.approx(10**6 * OVERHEAD)
    assert one.compute == 5.0
    assert one.up == one.down == pytest.approx(OVERHEAD + 0.05)
    assert one.wait == pytest.approx(max(merge, 0.1) + 0.1)  # a receipt and a question; a plan
    assert one.round == pytest.approx(5 + 2 * (OVERHEAD + 0.05) + one.wait + 10**6 * APPLIED)
    assert one.stall_share == pytest.approx(one.stall / one.round)


def test_coding_takes_the_time_of_the_slowest_rank_and_of_the_coordinator():
    cost = Cost(bits=8.0, encode=1e-6, decode=2e-6)
    sites = {"north": replace(SITE, share=0.25), "south": SITE}
    found = forecast(sites, 10**6, 10, cost, FREE)
    assert (found["north"].encode, found["south"].encode) == pytest.approx((0.25, 1.0))
    assert found["south"].wait == pytest.approx(10**6 * (3 * 2e-6 + KEPT) + 0.1)  # one check, and two to sum
    assert found["north"].wait == pytest.approx(found["south"].wait + 0.75)


def test_the_slowest_sets_the_pace_and_the_others_wait():
    near = replace(SITE, rtt=0.0)
    sites = {"fast": near, "slow": replace(near, step=1.0)}
    found = forecast(sites, 10**6, 10, FREE, FREE)
    assert found["fast"].round == pytest.approx(found["slow"].round)
    assert found["fast"].wait == pytest.approx(found["slow"].wait + 5.0)


def test_each_lost_segment_holds_up_its_connection_for_a_round_trip():
    lossy = replace(SITE, loss=0.01, lanes=4)
    assert lossy.carry(SEGMENT * 1000) - SITE.carry(SEGMENT * 1000) == pytest.approx(10 * OVERHEAD * 0.1 / 4)


@settings(deadline=None, max_examples=80)
@given(
    sites=st.dictionaries(st.sampled_from("abcd"), places, min_size=1),
    up=costs,
    down=costs,
    parameters=st.integers(1, 10**9),
    steps=st.integers(1, 500),
)
def test_parts_add_up_and_less_is_never_slower(sites, up, down, parameters, steps):
    found = forecast(sites, parameters, steps, up, down)
    for one in found.values():
        assert min(one.compute, one.encode, one.up, one.wait, one.down, one.decode) >= 0
        assert one.round == pytest.approx(one.compute + one.stall)
        assert 0 < one.stall_share < 1
    ends = {n: one.round - one.down - one.decode for n, one in found.items()}
    spread = max(site.rtt for site in sites.values())
    assert max(ends.values()) - min(ends.values()) <= 3 * spread + 1e-6 * max(ends.values())
    smaller = forecast(sites, parameters, steps, replace(up, bits=up.bits / 2), down)
    assert all(smaller[n].round <= one.round * (1 + 1e-9) for n, one in found.items())


@settings(deadline=None, max_examples=50)
@given(site=places, share=st.floats(0.01, 0.5), steps=st.integers(1, 500))
def test_a_step_of_the_length_it_says_stalls_for_that_share(site, share, steps):
    (one,) = forecast({"a": replace(site, step=0.0)}, 10**6, steps, FREE, FREE).values()
    (again,) = forecast({"a": replace(site, step=step_for(one, steps, share))}, 10**6, steps, FREE, FREE).values()
    assert again.stall_share == pytest.approx(share)


def test_speeds_are_of_whole_packets():
    cost = measured(Codec(steps=(Adaptive(bits=2.0),)), sample=1 << 18)
    assert cost.bits == pytest.approx(2.0, rel=0.03)
    assert 0 < cost.decode < 1e-5
    assert 0 < cost.encode < 1e-5
