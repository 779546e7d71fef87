"""Runs of the simulated world, a few of the thousands that `make campaign` takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest

from nebula.cli.main import main
from nebula.sim.world import witness
from nebula.sim.world.campaign import Crashes, Seeds, points, tell
from nebula.sim.world.scenario import Kind, draw
from nebula.train.exchange import Exchange
from tests.chunked import cut_into

CLUSTERS = 4
SEEDS = range(60)


@pytest.mark.parametrize("ten", range(0, len(SEEDS), 10))
def test_nothing_is_lost(ten):
    told = [tell(Seeds(CLUSTERS), seed) for seed in SEEDS[ten : ten + 10]]
    assert [(t.number, t.violated, t.what) for t in told if t.violated] == []
    assert any(t.exact for t in told), "some have one right result, and had it"


@pytest.mark.parametrize("ten", range(60, 80, 10))
def test_nothing_is_lost_where_payloads_are_of_many_chunks(ten, monkeypatch):
    """All connections of a cluster are busy, and any of them may break while the others go on."""
    cut_into(256, monkeypatch)
    told = [tell(Seeds(CLUSTERS), seed) for seed in range(ten, ten + 10)]
    assert [(t.number, t.violated, t.what) for t in told if t.violated] == []


def test_these_seeds_try_everything():
    scenarios = [draw(seed, CLUSTERS) for seed in SEEDS]
    kinds = Counter(fault.kind for scenario in scenarios for fault in scenario.faults)
    assert kinds.keys() == set(get_args(Kind))
    assert min(kinds.values()) >= 5
    assert {len(scenario.clusters) for scenario in scenarios} == {2, 3, 4}
    assert {scenario.run.membership.global_batch for scenario in scenarios} == {"shrink", "hold"}


@pytest.mark.parametrize("part", range(4))
def test_a_power_cut_at_any_step_of_any_disk_leaves_no_trace(part):
    """Spread over the run; `nebula sim --crashes` takes every step."""
    sample = range(11 * part, len(points()), 41)
    told = [tell(Crashes(), number) for number in sample]
    assert [(t.number, t.violated, t.what) for t in told if t.violated] == []
    assert {t.digest for t in told} == {tell(Crashes(), 0).digest}


def test_a_seed_is_the_same_run_in_every_process():
    """Hashes of strings differ from process to process."""
    traces = []
    for salt in ("1", "2"):
        command = [sys.executable, "-m", "nebula.cli.main", "sim", "--trace", "13", "--clusters", "4", "--json"]
        env = {**os.environ, "PYTHONHASHSEED": salt}
        traces.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert traces[0] == traces[1]
    assert len(json.loads(traces[0])["trace"]) > 50


def test_the_command_says_what_it_checked(capsys):
    assert main(["sim", "--seeds", "4", "--clusters", "2", "--jobs", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], told["violation"]) == (4, None)
    assert told["invariants"] == witness.INVARIANTS
    assert sum(told["faults"].values()) > 4


def test_the_command_tells_the_first_run_that_fails_and_how_to_see_it_again(capsys, monkeypatch):
    apply = Exchange.apply

    def off_by_one(self, fragment, payload, *, merged):
        base = next(iter(self._base.values()))
        base.view(-1)[0] += 1.0
        return apply(self, fragment, payload, merged=merged)

    monkeypatch.setattr(Exchange, "apply", off_by_one)
    assert main(["sim", "--seeds", "4", "--clusters", "2", "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    assert "trace" in out
    assert "run 0 shows otherwise: all who hold version v hold the same digest" in " ".join(err.split())
    assert "nebula sim --clusters 2 --trace 0" in " ".join(err.split())
