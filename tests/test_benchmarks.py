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
import torch
from runs import make_agreement
from tokenizers import Tokenizer, models, pre_tokenizers

from nebula.config import Agreement, Cluster, Codec, Link, Wan
from nebula.recipe import load_recipe
from nebula.runtime.engine import GroupEngine, Ranks
from nebula.runtime.local import InProcess
from nebula.wan.codec import measure

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


# --- codec --------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "int8/256": (8.06, 5e-5, 1.0e-4),
    "min-max u8": (8.00, 1.1e-4, 4.5e-4),
    "6-sigma u8": (8.01, 2.6e-4, 7.6e-3),
    "nf4/64": (4.50, 8.5e-3, 1.1e-2),
    "int4/64": (4.25, 1.16e-2, 2.0e-2),
    "E3M0/64": (4.25, 3.5e-2, 3.2e-2),
    "2 bit/64": (2.25, 0.115, 0.183),
    "1 bit/64": (1.25, 0.358, 0.492),
    "SparseLoCo": (0.227, 0.881, 0.788),
    "PowerSGD rank 8": (0.5, 0.978, 0.978),  # of a square matrix of 1024 rows, all of whose directions are alike
    "bf16": (16.0, 2.8e-6, 2.8e-6),
}
"""Bits, and NMSE on a Gaussian and a Laplace source of a million values."""


def test_the_formats_of_others_give_their_known_bits_and_errors():
    rivals, elements = load("rivals"), 1 << 20
    assert rivals.FORMATS.keys() == PUBLISHED.keys()
    sources = measure.gaussian(elements), measure.laplace(elements)
    for name, (bits, *errors) in PUBLISHED.items():
        with measure.one_thread():
            found = [measure.quality(rivals.PerTensor(rivals.FORMATS[name]), source) for source in sources]
        assert [q.bits for q in found] == pytest.approx([bits] * 2, rel=0.005), name
        assert [q.nmse for q in found] == pytest.approx(errors, rel=0.06), name


@pytest.mark.parametrize("shape", [(), (5,), (3, 50), (2, 70, 40), (5000,)])
def test_the_formats_of_others_take_tensors_of_any_shape(shape):
    rivals = load("rivals")
    for name, form in rivals.FORMATS.items():
        for x in (torch.zeros(shape), torch.randn(shape, generator=torch.Generator().manual_seed(1))):
            back = form.decode(form.encode(x), shape)
            assert back.shape == shape, name
            assert back.isfinite().all(), name
            assert (x - back).square().sum() <= x.square().sum(), name


def test_packing_to_the_bit_loses_nothing():
    rivals, generator = load("rivals"), torch.Generator().manual_seed(0)
    for bits in (1, 2, 4, 8):
        codes = torch.randint(2**bits, (7, 64), generator=generator, dtype=torch.uint8)
        packed = rivals.packed(codes, bits)
        assert packed.nbytes == codes.numel() * bits // 8
        assert torch.equal(rivals.unpacked(packed, bits), codes)
    places = torch.randint(4096, (7, 64), generator=generator)
    packed = rivals.packed_twelve(places)
    assert packed.nbytes == places.numel() * 12 // 8
    assert torch.equal(rivals.unpacked_twelve(packed), places)


def test_normal_floats_are_those_of_their_paper():
    floats = load("rivals").normal_floats().tolist()
    assert (floats[0], floats[7], floats[15]) == (-1.0, 0.0, 1.0)
    assert [floats[i] for i in (1, 6, 8, 14)] == pytest.approx([-0.69619, -0.09105, 0.07958, 0.72296], abs=1e-5)


def test_a_library_that_does_not_run_is_said_so(monkeypatch):
    libraries = load("libraries")

    def absent():
        raise ImportError("no such thing")

    monkeypatch.setattr(libraries, "LIBRARIES", {"absent": ("absent", absent)})
    monkeypatch.setattr(libraries.os, "environ", {})
    assert libraries.present() == ({}, {"absent": "not run: ImportError: no such thing"})


def test_deltas_are_those_of_consecutive_rounds(settings, tmp_path):
    deltas, agreement = load("deltas"), Agreement.parse(settings["agreement"])
    raw = Codec(steps=())
    run = agreement.run.model_copy(update={"rounds": 2, "inner_steps": 2, "wan": Wan(up=raw, down=raw)})
    members = dict.fromkeys(deltas.CLUSTERS, agreement.members["south"])
    agreement = agreement.model_copy(update={"run": run, "members": members})
    engines = {name: deltas.engine(agreement, name, settings["tokenizer"].decode(), str(tmp_path)) for name in members}
    momenta = {fragment: {} for fragment in deltas.fragment_shapes(agreement)}
    deltas.save(tmp_path, 0, first := deltas.one_round(agreement, engines, 0, momenta))
    deltas.save(tmp_path, 1, deltas.one_round(agreement, engines, 1, momenta))
    kept = deltas.load(tmp_path)
    assert len(kept) == 2
    assert kept[0].keys() == {"north", "south", "update"}
    rate, momentum = run.outer.lr, run.outer.momentum
    assert kept[0]["north"].keys() == kept[1]["update"].keys()
    for where, update in first["update"].items():
        assert torch.equal(kept[0]["update"][where], update)
        means = [(found["north"][where] + found["south"][where]) / 2 for found in kept]
        torch.testing.assert_close(update, -rate * (1 + momentum) * means[0])
        moved = momentum * means[0] + means[1]
        torch.testing.assert_close(kept[1]["update"][where], -rate * (means[1] + momentum * moved))


def test_gaps_are_beyond_the_bound_of_their_source():
    codec, bench = load("codec"), measure.Quality({"codes": 3.0, "low": 0.5, "scales": 0.5}, 2**-4, 0.5)
    found = codec.figures({"gaussian": [bench], "laplace": [bench], "deltas": [bench, bench]})
    assert found["gaussian"] == {
        "bits": 4,
        "nmse": 2**-4,
        "metadata": 0.125,
        "gap": 2,
        "support_over_entropy": 0.5,
    }
    assert found["laplace"]["gap"] == pytest.approx(2.1044, abs=1e-4)
    assert "gap" not in found["deltas"]
    row = codec.quality_row("x", found)
    assert len(row) == len(codec.QUALITY_HEAD)
    assert row[:4] == ["x", "4.000", "6.25e-02", "2.00"]
    speed = codec.speed_figures(measure.Speed([2.0, 1.0], [0.5, 0.25], [0.5, 0.5]), 10_000_000)
    assert (speed["encode_m_per_second"].high, speed["decode_m_per_second"].low) == (10, 20)
    assert (speed["encode_of_clone"].low, speed["decode_of_clone"].high) == (0.25, 2)
    row = codec.speed_row("x", speed)
    assert row[:3] == ["x", "8 (5 … 10)", "0.38 (0.25 … 0.50)"]
    assert len(row) == len(codec.SPEED_HEAD)


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
