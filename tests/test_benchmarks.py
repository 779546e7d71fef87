"""The parts of the benchmarks that compute: a wrong figure would look like a result."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from math import prod
from pathlib import Path

import pytest
from runs import make_agreement
from tokenizers import Tokenizer, models, pre_tokenizers

from nebula.config import Agreement, Cluster, Link
from nebula.recipe import load_recipe
from nebula.runtime.engine import GroupEngine, Ranks
from nebula.runtime.local import InProcess

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STEPS = 6


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    return importlib.import_module(name)


def test_ratios_pair_what_was_measured_together():
    ratio = load("measure").ratios([2.0, 30.0, 5.0], [1.0, 10.0, 10.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 0.5, 3.0)


def test_table_is_aligned_markdown():
    assert load("measure").table(("a", "bcd"), [("long", 1)]) == "\n".join(
        ["| a    | bcd |", "| :--- | --: |", "| long |   1 |"]
    )


def test_result_files_name_neither_host_nor_paths(tmp_path):
    measure = load("measure")
    measure.write(tmp_path / "new" / "x.json", measure.machine(), {"steps": 2}, {"ratio": 1.0})
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written["result"] == {"ratio": 1.0}
    assert written["machine"]["cores"] >= 1
    kept = [tmp_path / "new" / "x.json", *(BENCHMARKS / "results").glob("*.json")]
    assert [file.name for file in kept if "/home" in (text := file.read_text()) or str(BENCHMARKS) in text] == []


# --- overhead -----------------------------------------------------------------------------------------------------


def test_turns_rotate_and_drop_the_first_slice():
    overhead, order = load("overhead"), []

    def side(name, seconds):
        def train(first, steps):
            order.append((name, first, steps))
            return seconds + first, 1.0

        return overhead.Side(train, os.getpid())

    taken = overhead.take_turns({"a": side("a", 10.0), "b": side("b", 20.0)}, slices=2, steps=3)
    assert {name: side.wall for name, side in taken.items()} == {"a": [13.0, 16.0], "b": [23.0, 26.0]}
    assert order == [("a", 0, 3), ("b", 0, 3), ("b", 3, 3), ("a", 3, 3), ("a", 6, 3), ("b", 6, 3)]


def test_sides_whose_losses_differ_are_not_compared():
    overhead = load("overhead")
    sides = {
        name: overhead.Side(lambda *_, loss=loss: (1.0, loss), os.getpid()) for name, loss in (("a", 3), ("b", 3.1))
    }
    with pytest.raises(SystemExit, match="not do the same work"):
        overhead.take_turns(sides, slices=1, steps=1)


def test_cpu_clock_of_a_process_is_its_own():
    before = time.process_time()
    read = load("overhead").cpu_seconds(os.getpid())
    assert before <= read <= time.process_time()


@pytest.fixture
def settings(tmp_path):
    """Of a rank that trains on a few words."""
    words = ("def", "return", "self", "=")
    (tmp_path / "data").mkdir()
    for n in range(60):
        (tmp_path / "data" / f"{n}.py").write_text(" ".join(words[(n * k + k // 3) % 4] for k in range(200)))
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "<|end|>": 1} | {w: i + 2 for i, w in enumerate(words)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    agreement = make_agreement(tokenizer.to_str())
    data = agreement.run.data.model_copy(update={"path": str(tmp_path / "data"), "seq_len": 16, "held_out": 0.1})
    run = agreement.run.model_copy(update={"data": data, "rounds": 1, "inner_steps": STEPS, "batch": 4})
    return {
        "agreement": Agreement.model_validate(
            agreement.model_copy(update={"run": run}).model_dump(by_alias=True)
        ).canonical(),
        "tokenizer": tokenizer.to_str().encode(),
        "cluster": "south",
        "facts": Cluster(device="cpu").model_dump_json().encode(),
        "checkpoints": str(tmp_path / "checkpoints"),
        "cache": str(tmp_path / "cache"),
    }


def both_ways(rank, settings):
    """Mean losses of each slice of two steps: by hand, by the engine."""
    sys.path.insert(0, str(BENCHMARKS))
    plain = load("plain").Plain(rank=rank.rank, world=rank.world, **settings)
    engine = GroupEngine(lambda: InProcess(Ranks(count=1, settings=settings)))
    engine.start()
    side = load("overhead").timed(engine, STEPS)
    return [(plain.train(first, 2)[1], side(first, 2)[1]) for first in range(0, STEPS, 2)]


def test_plain_loop_and_engine_do_the_same_work(ranks, settings):
    (losses,) = ranks.run(both_ways, settings, world=1)
    assert len(losses) == STEPS // 2
    assert losses[-1][0] < losses[0][0]
    for by_hand, by_engine in losses:
        assert by_engine == pytest.approx(by_hand, abs=1e-5)


# --- bytes --------------------------------------------------------------------------------------------------------


def test_figures_are_means_against_arithmetic_baselines():
    def cluster(up, down):
        wan = {"up_bits_per_param_per_round": up, "down_bits_per_param_per_round": down, "goodput_share": 0.9}
        return {"wan": wan}

    wire = load("bytes")
    found = wire.figures([{"clusters": {"north": cluster(3.0, 4.0), "south": cluster(5.0, 4.0)}}], inner_steps=20)
    assert (found["up_bits"], found["down_bits"]) == (4.0, 4.0)
    assert found["less_than_fp32_per_round"] == 8.0
    assert found["less_than_bf16_per_round"] == 4.0
    assert found["less_than_bf16_per_step"] == 80.0
    assert wire.lost([{"eval_loss": 3.0}], [{"eval_loss": 2.5}]).median == 0.5


def test_every_codec_is_a_run_that_validates():
    wire = load("bytes")
    steps = {
        name: load_recipe(BENCHMARKS.parent / "trainers/code_moe.py", wire.overrides(text, 2, 3, 1)[1::2]).wan.up.steps
        for name, text in wire.CODECS.items()
    }
    assert [len(chain) for chain in steps.values()] == [0, 2, 2]
    assert [steps[name][0].bits for name in ("8 bit", "4 bit")] == [8, 4]


# --- startup ------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other_and_add_up():
    startup = load("startup")
    phases = ("joining", "building", "evaluating", "training")
    events = [{"t": 10.0 + 2 * i, "event": "phase", "phase": phase} for i, phase in enumerate(phases)]
    events += [{"t": 20.0, "event": "step"}, {"t": 21.0, "event": "step"}]
    found = startup.stages(1.0, [3.0, 7.0, *startup.milestones(events)])
    assert found == dict(zip(startup.STAGES, (2.0, 4.0, 3.0, 2.0, 2.0, 2.0, 4.0), strict=True)) | {"total": 19.0}
    assert startup.later({"north": found, "south": found | {"total": 30.0}})["total"] == 30.0


# --- rejoin -------------------------------------------------------------------------------------------------------


def test_share_is_of_the_payload_alone():
    rejoin = load("rejoin")
    link = Link(rate_mbps=100.0, rtt_ms=50.0)
    assert rejoin.Transfer(payload=25_000_000, crossed=30_000_000, seconds=4.0).share(link) == 0.5
    turns = [
        {"state": rejoin.Transfer(payload=12_500_000, crossed=n, seconds=n / 1e7)} for n in (13_000_000, 20_000_000)
    ]
    (found,) = rejoin.figures(link, turns).values()
    assert (found["crossed, MB"].low, found["crossed, MB"].high) == (13.0, 20.0)
    assert (found["seconds"].low, found["seconds"].high) == (1.3, 2.0)
    assert (found["share"].low, found["share"].high) == (0.5, pytest.approx(1 / 1.3))


def test_the_state_that_is_fetched_is_a_model_of_the_size_that_is_said():
    rejoin = load("rejoin")
    (shapes,) = rejoin.fragment_shapes(rejoin.agreement()).values()
    assert round(sum(prod(shape) for shape in shapes.values()) / 1e6) == 31


# --- quorum -------------------------------------------------------------------------------------------------------


def life(work=10.0, **conditions):
    return load("churn").Life(work=(work,) * 4, **conditions)


def test_work_is_done_at_the_pace_of_the_day_and_begun_anew_after_a_death():
    throttled = life(pace=((5.0, 0.5), (15.0, 0.0), (35.0, 1.0)))
    assert throttled.finishes(0.0, 10.0) == 15.0
    assert throttled.finishes(0.0, 12.0) == 37.0
    assert [throttled.worked(0.0, now) for now in (4.0, 7.0, 20.0, 36.0)] == [4.0, 6.0, 10.0, 11.0]
    assert throttled.worked(6.0, 36.0) == 5.5
    cut_off = life(away=((4.0, 20.0),), cut=((18.0, 25.0), (34.0, 40.0)))
    assert [cut_off.reaches(time) for time in (3.0, 5.0, 34.0)] == [3.0, 25.0, 40.0]
    assert cut_off.delivers(0.0, 0) == 40.0  # back at 20, heard at 25, done at 35, through at 40
    assert [cut_off.heard(time) for time in (3.0, 10.0, 22.0, 30.0)] == [True, False, False, True]


def test_the_traces_are_those_that_their_seeds_make():
    churn = load("churn")
    kept = churn.load()
    assert churn.text(kept) == churn.FILE.read_text()
    assert churn.simulate() == {name: trace for name, trace in kept.items() if name != "laptop"}
    assert kept["laptop"].how.startswith("measured")
    assert all(len(life.work) == churn.ROUNDS for trace in kept.values() for life in trace.lives.values())


def replayed(until, *, rounds=3, **lives):
    quorum, replay = load("quorum"), load("replay")
    run = replay.Replay(load("churn").Trace("", lives), quorum.rules(sorted(lives), rounds))
    return run.run(until(run) if callable(until) else until)


def test_a_rule_pays_for_what_it_waits_in_vain_and_for_what_it_gives_up():
    quorum, replay = load("quorum"), load("replay")
    hung = {"a": life(), "b": life(), "c": life(pace=((15.0, 0.0), (1000.0, 1.0)))}  # in the second round
    slow = {"a": life(), "b": life(), "c": life(35.0)}
    best = quorum.found(replayed(replay.oracle, **hung))
    assert (best.lost, best.merged, best.dropped) == (0.0, 3 + 2 + 2, 0)
    assert best.seconds == pytest.approx(3 * (1.0 + 10.0 + 1.0), abs=1e-3)
    impatient = quorum.found(replayed(lambda _: replay.fixed(20.0), **hung))
    assert (impatient.lost, impatient.merged, impatient.dropped) == (pytest.approx(20.0, abs=1.0), 7, 0)
    assert impatient.time_lost == pytest.approx(20 / 36, abs=0.05)
    impatient = quorum.found(replayed(lambda _: replay.fixed(20.0), **slow))
    assert impatient.dropped > 0
    assert impatient.lost >= 20.0
    patient = quorum.found(replayed(lambda _: replay.fixed(30.0), **slow))
    assert (patient.lost, patient.merged, patient.dropped) == (0.0, 9, 0)


def test_the_adaptive_rule_waits_for_the_slow_and_not_for_those_that_hang_or_are_gone():
    quorum = load("quorum")
    slow = quorum.found(replayed(None, a=life(), b=life(), c=life(90.0)))
    assert (slow.lost, slow.merged, slow.dropped) == (0.0, 9, 0)
    for fate in ({"pace": ((15.0, 0.0), (1000.0, 1.0))}, {"away": ((15.0, 1000.0),)}):
        lost = quorum.found(replayed(None, a=life(), b=life(), c=life(**fate)))
        assert (lost.merged, lost.dropped) == (7, 0)
        assert lost.lost <= 4.0, "it was silent for 7 of its 8 seconds when the others had delivered"


def test_figures_are_against_the_oracle_of_the_same_trace():
    quorum = load("quorum")
    found = quorum.figures({"oracle": quorum.Found(100.0, 0.0, 40, 0), "adaptive": quorum.Found(110.0, 10.0, 33, 4)})
    assert found["adaptive"] == {"seconds": 110.0, "time_lost": 0.1, "deltas_lost": 0.1, "deltas_per_second": 0.75}


def test_throughput_after_a_loss_is_that_of_the_others():
    quorum = load("quorum")
    lines = [
        (time, "coordinator", "commit", {"contributors": who})
        for time, who in ((10.0, ["a", "b", "c"]), (20.0, ["a", "b", "c"]), (30.0, ["a", "b"]))
    ]
    assert quorum.rate(lines, 10.0, "c") == 4 / 20
    assert quorum.rate(lines, 15.0, "a") == 3 / 15
    lines.insert(0, (9.0, "coordinator", "delta", {"cluster": "b", "round": 0}))
    lines.insert(0, (8.0, "coordinator", "delta", {"cluster": "a", "round": 0}))
    assert quorum.narrow(lines, 0) == ("b", 9.0 - quorum.NARROWLY)


def test_an_absence_shows_in_tokens_or_in_the_rate():
    _, found = load("quorum").absence()
    assert found["shrink"]["clusters"] == [4, 4, 4, 3, 3, 3, 4, 4, 4, 4]
    assert found["shrink"]["tokens"] == [clusters / 4 for clusters in found["shrink"]["clusters"]]
    assert found["shrink"]["linear"] == found["shrink"]["tokens"]
    assert found["hold"]["tokens"] == [1, 1, 1, 0.75, 1.0125, 1.0125, 1.35, 1, 1, 1]  # 27 steps for 26.7, and late
    assert found["hold"]["sqrt"] == [1, 1, 1, pytest.approx(0.866), *[1] * 6]
    assert set(found["hold"]["constant"]) == {1.0}
