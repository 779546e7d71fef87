"""Top-k and random-k: which values are kept, what their places cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nebula import config
from nebula.errors import PacketError
from nebula.types import Packet, Slice
from nebula.wan.codec import Pipeline
from nebula.wan.codec.layout import flatten
from nebula.wan.codec.sparsify import RandomK, TopK, drawn, largest
from nebula.wan.codec.support import MAX_RICE, pack, unpack


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def flat_of(x: torch.Tensor, block: int) -> Packet:
    return flatten({Slice("w", (0,), tuple(x.shape)): x}, block)


def decoded(step: TopK | RandomK, x: torch.Tensor) -> torch.Tensor:
    return type(step).decode(step.encode(flat_of(x, step.align))).arrays["values"][: x.numel()]


def supports(block: int, keep: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Ascending positions, `keep` of each block."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.sort(rng.choice(block, keep, replace=False)) + i * block for i in range(blocks)])


def log2_binomial(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


# --- which values -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 4),
    width=st.sampled_from([16, 24, 64]),
    keep=st.sampled_from([8, 16]),
    levels=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_the_largest_are_kept_and_of_equal_ones_the_first(rows, width, keep, levels, seed):
    x = torch.randint(-levels, levels + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    order = [sorted(range(width), key=lambda i, row=row: (-abs(row[i]), i))[:keep] for row in x.tolist()]
    assert largest(x, keep).tolist() == [sorted(first) for first in order]


def test_signs_of_zero_are_no_difference_between_magnitudes():
    assert largest(torch.tensor([[0.0, -0.0] * 8]), 8).tolist() == [list(range(8))]


def test_topk_in_fp32_keeps_the_largest_bits_and_nothing_else():
    x = gaussian(4096)
    result = decoded(TopK(32, 4096, 64), x)
    kept = x.abs().topk(64).indices
    assert torch.equal(result[kept], x[kept])
    assert int((result != 0).sum()) == 64


def test_randomk_keeps_one_of_each_part_and_all_parts_alike():
    positions = drawn(7, range(3, 5), 64, 8, torch.device("cpu"))
    assert (positions // 8).tolist() == [list(range(8))] * 2
    many = drawn(7, range(4096), 64, 8, torch.device("cpu")).flatten().bincount(minlength=64)
    assert many.min() > 400  # 512 expected, with a deviation of 21
    assert many.max() < 624


def test_randomk_draws_the_same_for_a_range_of_rows_as_for_all():
    all_rows = drawn(9, range(10), 64, 8, torch.device("cpu"))
    assert torch.equal(drawn(9, range(4, 7), 64, 8, torch.device("cpu")), all_rows[4:7])


def test_randomk_draws_by_a_hash_that_is_written_down():
    """The finalizer of MurmurHash3, from its reference: of 0 it is 0, of 1 0x514e28b7."""
    place = drawn(0, range(1), 2**16, 2, torch.device("cpu"))[0, 1].item()
    hashed = 0x514E28B7
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed = (hashed ^ hashed >> shift) * factor % 2**32
    assert place == hashed % 2**15 + 2**15


def test_randomk_keeps_other_values_in_the_next_round():
    step, x = RandomK(32, 64, 8), gaussian(64)
    flat = flat_of(x, 64)
    first = RandomK.decode(step.encode(flat)).arrays["values"]
    second = RandomK.decode(step.encode(flat)).arrays["values"]
    assert ((first != 0) != (second != 0)).any()


# --- kept values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [TopK, RandomK])
def test_eight_bits_err_by_at_most_half_a_scale(step):
    x = gaussian(8192)
    result = decoded(step(8, 4096, 64), x)
    kept = result != 0
    peaks = x.where(kept, torch.zeros(())).view(2, 4096).abs().amax(1).repeat_interleave(4096)
    assert ((result - x).abs() <= peaks / 127 * 0.51)[kept].all()


def test_two_bits_are_a_sign_and_one_of_two_magnitudes_of_the_block():
    x = torch.tensor([9.0, -9.0, 9.0, 3.0, -3.0, 3.0, 3.0, -3.0, *[0.5] * 8])
    assert decoded(TopK(2, 16, 8), x).tolist() == [9, -9, 9, 3, -3, 3, 3, -3] + [0] * 8


def test_two_magnitudes_are_near_the_best_two():
    x = gaussian(64 * 4096)
    result = decoded(TopK(2, 4096, 64), x)
    kept = x.abs()[result != 0].view(64, 64).double()

    def least(row: torch.Tensor) -> float:
        ordered = row.sort().values
        return min(float(a.var(correction=0) * len(a) + b.var(correction=0) * len(b)) for a, b in splits(ordered))

    best = sum(map(least, kept))
    assert float(((x - result)[result != 0].double() ** 2).sum()) < 1.1 * best


def splits(row: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(row[:at], row[at:]) for at in range(1, len(row))]


@pytest.mark.parametrize(("bits", "overhead"), [(2, 32), (8, 16), (32, 0)])
def test_sizes_on_the_wire(bits, overhead):
    flat = flat_of(gaussian(1 << 18), 4096)
    arrays = RandomK(bits, 4096, 64).encode(flat).arrays
    assert sum(x.nbytes for x in arrays.values()) * 8 == 64 * (64 * bits + overhead)
    arrays = TopK(bits, 4096, 64).encode(flat).arrays
    support = sum(arrays[name].nbytes for name in ("low", "high")) * 8
    assert sum(x.nbytes for x in arrays.values()) * 8 - support == 64 * (64 * bits + overhead)
    assert support < 1.05 * 64 * log2_binomial(4096, 64)


@pytest.mark.parametrize("fields", [{"keep": 4096}, {"keep": 12}, {"block": 64, "keep": 40}, {"bits": 4}])
def test_a_topk_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        config.TopK(**fields)


def test_a_randomk_of_unequal_parts_is_refused():
    with pytest.raises(ValidationError, match="must be a multiple of keep"):
        config.RandomK(block=4096, keep=24)


# --- the support --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(positions=st.sets(st.integers(0, 2000), max_size=300), stride=st.sampled_from([1, 7, 300_000]))
def test_any_support_comes_back(positions, stride):
    ascending = np.array(sorted(positions), dtype=np.int64) * stride
    total = 2000 * stride + 1
    rice, low, high = pack(ascending)
    assert 0 <= rice <= MAX_RICE
    assert unpack(rice, low, high, len(ascending), total).tolist() == ascending.tolist()


def test_a_support_of_several_pieces_comes_back(monkeypatch):
    positions = supports(256, 32, 50)
    whole = pack(positions)
    monkeypatch.setattr("nebula.wan.codec.support.PIECE", 64)
    pieces = pack(positions)
    assert [x.tolist() for x in whole[1:]] == [x.tolist() for x in pieces[1:]]
    assert unpack(*pieces, 1600, 50 * 256).tolist() == positions.tolist()


@pytest.mark.parametrize(
    ("block", "keep"),
    [(4096, k) for k in (16, 24, 32, 48, 64, 96, 128, 256, 384, 512, 1024, 2048)] + [(65536, 64), (65536, 4096)],
)
def test_a_support_costs_at_most_a_twentieth_more_than_its_entropy(block, keep):
    _, low, high = pack(supports(block, keep, 40))
    assert (len(low) + len(high)) * 8 < 1.05 * 40 * log2_binomial(block, keep)


@settings(deadline=None, max_examples=150)
@given(
    rice=st.integers(0, MAX_RICE),
    low=st.binary(max_size=12),
    high=st.binary(max_size=12),
    count=st.integers(0, 40),
    total=st.integers(0, 3000),
)
def test_invented_supports_are_sound_or_refused(rice, low, high, count, total):
    streams = (np.frombuffer(data, dtype=np.uint8) for data in (low, high))
    try:
        positions = unpack(rice, *streams, count, total)
    except PacketError:
        return
    assert len(positions) == count
    assert (np.diff(positions, prepend=-1) > 0).all()
    assert count == 0 or positions[-1] < total


@pytest.mark.parametrize(
    ("rice", "low", "high", "reason"),
    [
        (0, [], [32], "ends at 5, beyond its 5 values"),
        (3, [5], [1], "ends at 5, beyond"),
        (0, [], [8, 0], "are not 1 gaps"),
        (0, [], [0], "has 0 positions"),
        (0, [], [3], "has 2 positions"),
        (3, [], [1], "are not 1 gaps"),
        (3, [5, 0], [1], "are not 1 gaps"),
    ],
)
def test_one_position_below_five_that_is_not_is_refused(rice, low, high, reason):
    with pytest.raises(PacketError, match=reason):
        unpack(rice, np.array(low, dtype=np.uint8), np.array(high, dtype=np.uint8), 1, 5)


def test_bytes_behind_the_last_gap_are_refused():
    with pytest.raises(PacketError, match="positions"):
        unpack(0, np.zeros(0, np.uint8), np.array([1, 0], np.uint8), 1, 100)


def test_a_support_that_keeps_more_in_one_block_than_in_another_is_refused():
    packet = TopK(32, 16, 8).encode(flat_of(gaussian(32), 16))
    rice, low, high = pack(np.array([*range(9), *range(20, 27)]))
    arrays = {**packet.arrays, "low": torch.from_numpy(low), "high": torch.from_numpy(high)}
    with pytest.raises(PacketError, match="does not keep 8 of each 16"):
        TopK.decode(Packet(arrays, (*packet.trail[:-1], {**packet.trail[-1], "rice": rice})))


def test_pipelines_know_both():
    for step in (config.TopK(block=64, keep=8), config.RandomK(block=64, keep=8)):
        assert Pipeline(config.Codec(steps=(step,))).align == 64
