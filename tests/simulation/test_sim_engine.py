from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nebula.config import Blockwise, Cluster, Codec, Federation, Model, Run, Wan, Zstd, agree
from nebula.errors import PreflightError, RankFailure
from nebula.files import System
from nebula.sim.world.disk import PowerCut, SimDisk
from nebula.sim.world.engine import Produced, SimEngine
from nebula.sim.world.rank import toy_step
from nebula.train.exchange import Exchange
from nebula.types import Held, Slice, Steps
from nebula.wan.codec.layout import flatten
from nebula.wan.digest import fragment_digest, lanes
from nebula.wan.frame import pack

TINY = Model(
    vocab=16, layers=2, dim=8, heads=1, kv_heads=1, ffn_dim=8, experts=2, top_k=1, dense_layers=1, aux_loss=0.0
)
AGREEMENT = agree(
    Run(name="world", model=TINY, wan=Wan(up=Codec(steps=(Blockwise(bits=4), Zstd())))),
    Federation(clusters={"north": Cluster(), "south": Cluster()}),
    tokenizer="",
    unigram_entropy=1.0,
)
FRAGMENTS = ("f0", "f1")
ROUNDS = 3

ROUND = ["train 0 2", "train 2 3", "pull f0", "pull f1", "push f0", "push f1", "save"]
SCRIPT = [(round, *step.split()) for round in range(ROUNDS) for step in ROUND]


class Clock:
    """Only what an engine needs of one. `asleep` runs while it sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.asleep = lambda: None

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.asleep()


class World:
    """One cluster through all its lives. An update is what the cluster itself has sent, the first time round."""

    def __init__(self, folder: Path, disk: System = os) -> None:
        self.folder = folder
        self.disk = disk
        self.clock = Clock()
        self.produced = Produced()
        self.packets: dict[tuple[int, str], bytes] = {}
        self.warnings: list[str] = []

    def engine(self, cluster: str = "north") -> SimEngine:
        return SimEngine(
            AGREEMENT,
            cluster,
            self.disk,
            self.folder / cluster,
            self.clock,
            0.5,
            self.produced,
            emit=lambda kind, path, **_: self.warnings.append(f"{kind} {Path(path).name}"),
        )

    def play(self, engine: SimEngine, script) -> None:
        for round, verb, *rest in script:
            match verb, rest:
                case "train", [first, count]:
                    engine.train(steps(round, int(first), int(count)))
                case "pull", [fragment]:
                    (packet,) = engine.pull(fragment)
                    assert self.packets.setdefault((round, fragment), packet) == packet
                case "push", [fragment]:
                    engine.push(fragment, "update", self.packets[round, fragment], merged=True)
                case "save", []:
                    engine.save(round + 1, {fragment: Held(round + 1, "") for fragment in FRAGMENTS})


def steps(round: int, first: int = 0, count: int = 5) -> Steps:
    return Steps(round=round, position=5 * round, first=first, count=count, total=5)


def everything(engine: SimEngine) -> bytes:
    return engine.memory.pack({})


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> SimpleNamespace:
    world = World(tmp_path_factory.mktemp("reference"))
    engine = world.engine()
    engine.start()
    world.play(engine, SCRIPT)
    return SimpleNamespace(packets=world.packets, end=everything(engine), digests=dict(engine.memory.digests))


# --- what an engine does ----------------------------------------------------------------------------------------------


def test_a_fresh_engine_holds_version_0_of_the_seed_and_all_clusters_the_same(world):
    north, south = world.engine("north").start(), world.engine("south").start()
    assert north == south
    assert {fragment: held.version for fragment, held in north.items()} == {"f0": 0, "f1": 0}
    assert north["f0"].digest != north["f1"].digest


def test_training_takes_virtual_time_and_reports_it(world):
    engine = world.engine()
    engine.start()
    report = engine.train(steps(0, 1, 3))
    assert (world.clock.time, report.seconds, report.steps) == (1.5, 1.5, 3)
    assert report.tokens == 3 * AGREEMENT.members["north"].batch * AGREEMENT.run.data.seq_len


def test_how_steps_are_cut_into_calls_makes_no_difference(world):
    one, many = world.engine(), world.engine()
    one.start(), many.start()
    one.train(steps(0))
    for i in range(5):
        many.train(steps(0, i, 1))
    assert everything(one) == everything(many)


def test_packets_belong_to_a_cluster_and_to_step_numbers(world):
    packets = set()
    for cluster, position in [("north", 0), ("south", 0), ("north", 1)]:
        engine = world.engine(cluster)
        engine.start()
        engine.train(Steps(round=0, position=position, first=0, count=1, total=1))
        packets.add(engine.pull("f0")[0])
    assert len(packets) == 3


def test_evaluations_share_out_all_held_out_windows(world):
    engine = world.engine()
    engine.start()
    parts = [engine.evaluate(index, 3) for index in range(3)]
    assert sum(part.tokens for part in parts) == AGREEMENT.run.data.eval_windows * AGREEMENT.run.data.seq_len
    assert len({part.loss_sum / part.tokens for part in parts}) == 1


def test_a_state_replaces_the_global_parameters_and_the_residual_begins_anew(world):
    engine = world.engine()
    engine.start()
    world.play(engine, SCRIPT[: len(ROUND)])
    state = engine.memory.exchange.state()
    names = engine.memory.exchange.fragments["f0"]
    assert any(state[f"residual/{name}"].any() for name in names)
    values = {name: torch.full_like(state[f"base/{name}"], 0.5) for name in names}
    whole = {Slice(name, (0,) * value.dim(), tuple(value.shape)): value for name, value in values.items()}
    digest = engine.push("f0", "state", pack(flatten(whole, 1)), merged=False)
    assert digest == fragment_digest([{where.name: lanes(value, where) for where, value in whole.items()}])
    assert (engine.memory.parameters["f0"] == 0.5).all()
    assert not any(engine.memory.exchange.state()[f"residual/{name}"].any() for name in names)


@settings(deadline=None, derandomize=True)
@given(element=st.integers(0, 63), bit=st.integers(0, 29), momentum=st.booleans())
def test_one_wrong_bit_changes_the_whole_gradient(element, bit, momentum):
    state = [np.linspace(-1, 1, 64, dtype=np.float32), np.linspace(0.5, 2, 64, dtype=np.float32)]
    _, right = toy_step("north/f0/7", *state)
    state[momentum] = state[momentum].copy()
    state[momentum].view(np.uint32)[element] ^= np.uint32(1 << bit)
    _, wrong = toy_step("north/f0/7", *state)
    assert (right != wrong).sum() > 60


def test_the_toy_stays_bounded():
    parameters, momentum = np.ones(64, np.float32), np.zeros(64, np.float32)
    for step in range(3000):
        parameters, momentum = toy_step(str(step), parameters, momentum)
    assert np.abs(parameters).max() < 2
    assert parameters.std() > 0.05


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", range(1, len(SCRIPT) + 1))
@pytest.mark.parametrize("how", ["process killed", "rank failed"])
def test_a_round_done_again_after_a_crash_at_any_point_is_the_same_to_the_byte(world, reference, point, how):
    world.packets = dict(reference.packets)
    engine = world.engine()
    engine.start()
    world.play(engine, SCRIPT[:point])
    if how == "process killed":
        engine = world.engine()
    else:
        engine.fail_next = RankFailure(0, "planted")
        with pytest.raises(RankFailure):
            engine.evaluate(0, 1)
    done = point // len(ROUND)
    assert {held.version for held in engine.start().values()} == {done}
    world.play(engine, SCRIPT[done * len(ROUND) :])
    assert everything(engine) == reference.end
    assert engine.memory.digests == reference.digests
    assert world.packets == reference.packets
    assert world.warnings == []


def lose_residual(exchange, state, restore):
    pass


def bend_base(exchange, state, restore):
    restore(exchange, state)
    value = state["base/head.weight"][0, 0]
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))


@pytest.mark.parametrize("plant", [lose_residual, bend_base])
def test_a_restore_that_gets_the_exchange_wrong_is_noticed(world, monkeypatch, plant):
    first = world.engine()
    first.start()
    world.play(first, SCRIPT[: len(ROUND) + 4])
    world.packets.clear()  # leave it to Produced
    restore = Exchange.restore
    monkeypatch.setattr(Exchange, "restore", lambda exchange, state: plant(exchange, state, restore))
    again = world.engine()
    again.start()
    with pytest.raises(AssertionError, match="does not repeat its round to the byte: north, round 1"):
        world.play(again, SCRIPT[len(ROUND) : len(ROUND) + 4])


@pytest.mark.parametrize("part", ["momentum", "parameters"])
def test_inner_state_that_is_one_bit_off_is_noticed(world, part):
    first = world.engine()
    first.start()
    world.play(first, SCRIPT[: len(ROUND) + 4])
    again = world.engine()
    again.start()
    getattr(again.memory, part)["f1"].view(torch.int32)[-1] ^= 1
    again.train(steps(1))
    again.pull("f0")
    with pytest.raises(AssertionError, match="round 1, f1"):
        again.pull("f1")


def test_without_its_packet_a_merged_cluster_begins_its_residual_anew(world):
    first = world.engine()
    first.start()
    world.play(first, SCRIPT[: 2 * len(ROUND) - 1])  # round 1 is applied but not saved
    again = world.engine()
    again.start()
    again.train(steps(1))
    again.push("f0", "update", world.packets[1, "f0"], merged=True)
    state = again.memory.exchange.state()
    names = again.memory.exchange.fragments
    assert not any(state[f"residual/{name}"].any() for name in names["f0"])
    assert any(state[f"residual/{name}"].any() for name in names["f1"])
    assert again.memory.digests["f0"] == first.memory.digests["f0"]
    again.train(steps(2)), first.train(steps(2))
    assert again.pull("f0") != first.pull("f0")  # another past, so no complaint


def test_produced_knows_every_packet_and_no_other(world):
    engine = world.engine()
    base = engine.start()["f0"].digest
    engine.train(steps(0))
    sent = hashlib.sha256(engine.pull("f0")[0]).hexdigest()
    engine.memory = None
    assert world.produced.knows("north", 0, "f0", base, sent)
    wrong = [("south", 0, "f0", base, sent), ("north", 1, "f0", base, sent), ("north", 0, "f1", base, sent)]
    wrong += [("north", 0, "f0", "sha256:", sent), ("north", 0, "f0", base, "")]
    assert not any(world.produced.knows(*key) for key in wrong)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_planted_while_it_trains_ends_that_call_and_the_memory(world):
    engine = world.engine()
    engine.start()
    failure = RankFailure(0, "planted")
    world.clock.asleep = lambda: setattr(engine, "fail_next", failure)
    with pytest.raises(RankFailure) as raised:
        engine.train(steps(0))
    assert raised.value is failure
    assert engine.memory is None
    assert engine.fail_next is None
    with pytest.raises(AssertionError, match="start"):
        engine.pull("f0")


def test_a_start_can_fail_too(world):
    engine = world.engine()
    engine.fail_next = RankFailure(0, "planted")
    with pytest.raises(RankFailure):
        engine.start()
    assert engine.start()["f0"].version == 0


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(world: World) -> list[Path]:
    engine = world.engine()
    engine.start()
    world.play(engine, SCRIPT)
    return sorted((world.folder / "north").iterdir())


def test_the_newest_two_stay(world):
    assert [path.name for path in saved(world)] == ["00000002", "00000003"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(world, share):
    *_, newest = saved(world)
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * share)])
    check_fallback(world)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.004, 0.5, 0.9999])
def test_a_rotten_checkpoint_is_passed_over_with_a_warning(world, share):
    *_, newest = saved(world)
    data = bytearray(newest.read_bytes())
    data[int(len(data) * share)] ^= 4
    newest.write_bytes(data)
    check_fallback(world)


def check_fallback(world: World) -> None:
    """Round 2 is done again from the checkpoint before it, which heals the damaged one."""
    engine = world.engine()
    assert {held.version for held in engine.start().values()} == {2}
    assert world.warnings == ["checkpoint.damaged 00000003"]
    world.play(engine, SCRIPT[2 * len(ROUND) :])
    assert {held.version for held in world.engine().start().values()} == {3}
    assert len(world.warnings) == 1


def test_with_all_checkpoints_damaged_it_begins_anew(world):
    for path in saved(world):
        path.write_bytes(b"")
    assert {held.version for held in world.engine().start().values()} == {0}
    assert world.warnings == ["checkpoint.damaged 00000003", "checkpoint.damaged 00000002"]


def test_unless_told_otherwise_it_warns_as_real_ranks_do(world):
    *_, newest = saved(world)
    newest.write_bytes(b"")
    engine = SimEngine(AGREEMENT, "north", os, world.folder / "north", world.clock, 0.5, world.produced)
    with capture_logs() as logs:
        engine.start()
    assert [(line["event"], line["log_level"]) for line in logs] == [("checkpoint.damaged", "warning")]


class Full:
    """A disk that takes names but no more bytes."""

    def __getattr__(self, name: str):
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_to_the_user_and_the_old_checkpoints_stay(world):
    before = {path: path.read_bytes() for path in saved(world)}
    world.disk = Full()
    engine = world.engine()
    engine.start()
    with pytest.raises(PreflightError, match="No space left"):
        engine.save(4, {})
    assert {path: path.read_bytes() for path in before} == before
    world.disk = os
    assert {held.version for held in world.engine().start().values()} == {ROUNDS}


def test_what_a_crash_left_half_written_is_swept(world):
    folder = saved(world)[0].parent
    (folder / ".00000004.0").write_bytes(b"half")
    world.engine().start()
    assert not (folder / ".00000004.0").exists()


@pytest.mark.parametrize("seed", range(3))
def test_when_power_fails_at_any_step_of_a_save_nothing_is_lost(reference, seed):
    failed_at, outcomes = 0, set()
    while True:
        disk = SimDisk(random.Random(seed * 1000 + failed_at))
        world = World(Path("/checkpoints"), disk)
        engine = world.engine()
        engine.start()
        world.play(engine, SCRIPT[:-1])
        disk.crash_at = disk.steps + failed_at + 1
        try:
            world.play(engine, SCRIPT[-1:])
            break
        except PowerCut:
            failed_at += 1
        disk.crash_at = None
        disk.crash()
        again = world.engine()
        (version,) = {held.version for held in again.start().values()}
        world.play(again, SCRIPT[version * len(ROUND) :])
        assert everything(again) == reference.end
        assert world.warnings == []
        outcomes.add(version)
    assert failed_at >= 6  # open, write, fsync, rename, fsync of the folder, unlink of the oldest
    assert outcomes == {ROUNDS - 1, ROUNDS}


def test_a_bit_that_rots_on_the_simulated_disk_is_found(reference):
    disk = SimDisk(random.Random(1))
    world = World(Path("/checkpoints"), disk)
    engine = world.engine()
    engine.start()
    world.play(engine, SCRIPT)
    disk.rot(Path("/checkpoints/north/00000003"))
    again = world.engine()
    assert {held.version for held in again.start().values()} == {2}
    assert world.warnings == ["checkpoint.damaged 00000003"]
    world.play(again, SCRIPT[2 * len(ROUND) :])
    assert everything(again) == reference.end
