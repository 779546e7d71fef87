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
    side = load("overhead").timed(engine)
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
    assert (found["share"].low, found["share"].high) == (0.5, 1 / 1.3)


def test_the_state_that_is_fetched_is_a_model_of_the_size_that_is_said():
    rejoin = load("rejoin")
    (shapes,) = rejoin.fragment_shapes(rejoin.agreement()).values()
    assert round(sum(prod(shape) for shape in shapes.values()) / 1e6) == 31
