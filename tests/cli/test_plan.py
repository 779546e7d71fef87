"""`nebula plan`, called as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nebula.cli import plan
from nebula.cli.main import main
from nebula.planner.exchange import Cost

RECIPE = """from nebula.config import Data, Model, Run


def recipe() -> Run:
    model = Model(vocab=64, layers=2, dim=16, heads=1, kv_heads=1, ffn_dim=16, experts=2, top_k=1)
    return Run(name="tiny", model=model, data=Data(path="corpus"), rounds=2, inner_steps=10, batch=2)
"""
CLUSTERS = """coordinator: {port: 0}
clusters:
  north: {ranks: 2, link: {rate_mbps: 10, rtt_ms: 40}}
  south: {link: {rate_mbps: 100, rtt_ms: 10}}
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[str, str]:
    monkeypatch.setattr("nebula.planner.speeds.measured", lambda codec: Cost(codec.steps[0].bits, 1e-8, 1e-8))
    recipe, clusters = tmp_path / "tiny.py", tmp_path / "two.yaml"
    recipe.write_text(RECIPE)
    clusters.write_text(CLUSTERS)
    return str(recipe), str(clusters)


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_slower_link_sets_the_pace_and_more_bits_or_fewer_steps_cost_more(files, capsys):
    recipe, clusters = files
    told = planned(capsys, recipe, "--clusters", clusters, "--step-seconds", "0.01")
    north, south = told["clusters"]["north"], told["clusters"]["south"]
    assert north["up"] > south["up"]
    assert south["round"] <= north["round"]
    assert told["rounds_per_day"] == pytest.approx(86400 / max(north["round"], south["round"]))
    others = told["instead"]
    assert len(others) == len(plan.RATES) * len(plan.LONGER)
    for steps in (10, 20, 40):
        stalls = [other["stall"] for other in others if other["inner_steps"] == steps]
        assert stalls == sorted(stalls)
    for bits in plan.RATES:
        shares = [other["stall_share"] for other in others if other["bits"] == bits]
        assert shares == sorted(shares, reverse=True)


def test_clusters_may_differ_in_speed(files, capsys):
    recipe, clusters = files
    steps = ["--step-seconds", "0.1", "--step-seconds", "south=3"]
    told = planned(capsys, recipe, "--clusters", clusters, *steps)
    assert (told["clusters"]["north"]["compute"], told["clusters"]["south"]["compute"]) == (1.0, 30.0)
    assert told["clusters"]["north"]["wait"] > 28


def test_without_the_time_of_a_step_it_says_how_long_one_must_be(files, capsys):
    recipe, clusters = files
    assert main(["plan", recipe, "--clusters", clusters, "--set", "rounds=3"]) == 0
    said = capsys.readouterr()
    assert "stalls if an inner step takes" in said.out
    assert "nebula run" in said.err
    assert "--set rounds=3" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step-seconds", "0"], "--step-seconds 0 is not"),
        (["--step-seconds", "soon"], "--step-seconds soon is not"),
        (["--step-seconds", "east=1"], "--step-seconds east=1 is not"),
        (["--step-seconds", "north=1"], "does not say how long a step of south"),
    ],
)
def test_steps_that_cannot_be(words, said, files, capsys):
    recipe, clusters = files
    assert main(["plan", recipe, "--clusters", clusters, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_cluster_without_a_link_cannot_be_planned_for(files, capsys):
    recipe, clusters = files
    Path(clusters).write_text("coordinator: {port: 0}\nclusters: {north: {}, south: {}}\n")
    assert main(["plan", recipe, "--clusters", clusters]) == 2
    said = capsys.readouterr().err
    assert "how fast the link of north is" in said
    assert "rate_mbps" in said
