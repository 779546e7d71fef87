"""The number formats, and what holds for every lossy step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.errors import PacketError, UsageError
from nebula.types import Packet, Slice
from nebula.wan.codec import Encoder, Pipeline, decode
from nebula.wan.codec.grids import GRIDS, LARGEST, SMALLEST_SCALE, pack, sums
from nebula.wan.codec.layout import filled, flatten, unflatten
from nebula.wan.codec.pipeline import undo
from nebula.wan.codec.quantize import Blockwise
from nebula.wan.frame import pack as packed

LOSSY = {
    "int8": config.Blockwise(bits=8),
    "int4": config.Blockwise(bits=4),
    "lloyd2": config.Blockwise(bits=2),
    "sign": config.Blockwise(bits=1),
    "e3m0": config.Minifloat(format="e3m0"),
    "fp8": config.Minifloat(format="fp8"),
    "bf16": config.Minifloat(format="bf16"),
    "topk2": config.TopK(block=64, keep=8),
    "topk8": config.TopK(bits=8, block=64, keep=8),
    "topk32": config.TopK(bits=32, block=64, keep=16),
    "randomk2": config.RandomK(bits=2, block=64, keep=8),
    "randomk8": config.RandomK(bits=8, block=64, keep=8),
    "randomk32": config.RandomK(block=64, keep=8),
    "lowrank": config.LowRank(rank=2),
}
"""Every lossy step, by the number format of its values where that is one."""

shapes = st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), max_size=4)


def encoder(*steps: config.CodecStep) -> Encoder:
    return Encoder(config.Codec(steps=steps))


def tensors_of(shapes: list[tuple[int, ...]], seed: int = 0, scale: float = 1.0) -> dict[Slice, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        Slice(f"layer.{i}", (0,) * len(shape), shape): scale * torch.randn(shape, generator=generator)
        for i, shape in enumerate(shapes)
    }


def coded(x: torch.Tensor, step: config.CodecStep) -> torch.Tensor:
    """One vector, there and back."""
    where = Slice("w", (0,), tuple(x.shape))
    return decode(encoder(step).encode({where: x}), max_elements=x.numel())[where]


def bits_per_parameter(packet: Packet, count: int) -> float:
    return sum(x.nbytes for x in packet.arrays.values()) * 8 / count


def nmse(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return float(((x - decoded).double() ** 2).sum() / (x.double() ** 2).sum())


# --- every lossy step ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(shapes=shapes, name=st.sampled_from(sorted(LOSSY)), seed=st.integers(0, 99), exponent=st.integers(-120, 100))
def test_what_was_lost_is_left_in_place(shapes, name, seed, exponent):
    """Values afterwards are x − decoded in one rounding, whatever the magnitude, and of the shape of the layout."""
    pipe = Pipeline(config.Codec(steps=(LOSSY[name],)))
    flat = flatten(tensors_of(shapes, seed, 2.0**exponent), pipe.align)
    before = flat.arrays["values"].clone()
    packet = pipe.encode(flat)
    assert "values" not in packet.arrays
    decoded = undo(packet)
    assert torch.equal(flat.arrays["values"], before - decoded.arrays["values"])
    assert unflatten(decoded).keys() == tensors_of(shapes).keys()


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_zstd_behind_changes_nothing(name):
    tensors = tensors_of([(40, 30), (7,)])
    bare = decode(encoder(LOSSY[name]).encode(tensors), max_elements=2000)
    small = decode(encoder(LOSSY[name], config.Zstd()).encode(tensors), max_elements=2000)
    assert all(torch.equal(bare[where], small[where]) for where in tensors)


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_tensors_that_are_encoded_stay_as_they_are(name):
    tensors = tensors_of([(40, 30), (64,)])
    before = {where: x.clone() for where, x in tensors.items()}
    encoder(LOSSY[name]).encode(tensors)
    assert all(torch.equal(tensors[where], x) for where, x in before.items())


@pytest.mark.parametrize("name", sorted(set(LOSSY) - {"lowrank"}))
def test_packets_do_not_depend_on_threads_or_on_chunk_size(name, monkeypatch):
    tensors = tensors_of([(300, 100), (5,)])
    first = packed(encoder(LOSSY[name]).encode(tensors))
    threads = torch.get_num_threads()
    try:
        for count, chunk in ((1, 1 << 8), (2, 1 << 12), (4, 1 << 20)):
            torch.set_num_threads(count)
            monkeypatch.setattr("nebula.wan.codec.quantize.CHUNK", {"cpu": chunk})
            assert packed(encoder(LOSSY[name]).encode(tensors)) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_decoding_does_not_depend_on_threads_or_on_chunk_size(name, monkeypatch):
    packet = encoder(LOSSY[name]).encode(tensors_of([(300, 100), (5,)]))
    first = undo(packet).arrays["values"].view(torch.int32)
    threads = torch.get_num_threads()
    try:
        for count, chunk in ((1, 1 << 8), (2, 1 << 12), (4, 1 << 20)):
            torch.set_num_threads(count)
            monkeypatch.setattr("nebula.wan.codec.quantize.CHUNK", {"cpu": chunk})
            assert torch.equal(undo(packet).arrays["values"].view(torch.int32), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LARGEST])
@pytest.mark.parametrize("name", sorted(LOSSY))
def test_values_that_are_not_finite_are_refused(name, bad):
    tensors = tensors_of([(30, 30)])
    next(iter(tensors.values()))[17, 3] = bad
    with pytest.raises(PacketError, match="not finite"):
        encoder(LOSSY[name]).encode(tensors)


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_error_feedback_telescopes_and_a_restored_encoder_continues_bit_for_bit(name):
    """What was sent and what is held back is what came in; padding, which no checkpoint keeps, holds nothing back."""
    codec = config.Codec(steps=(LOSSY[name],), feedback=1.0)
    encoder = Encoder(codec)
    total_in, total_out = (
        {where: torch.zeros(where.shape) for where in tensors_of([(30, 30), (5,)])} for _ in range(2)
    )
    for round in range(8):
        tensors = tensors_of([(30, 30), (5,)], seed=round)
        twin = Encoder(codec)
        twin.restore({where: x.clone() for where, x in encoder.residual().items()})
        packet = encoder.encode(tensors)
        assert packed(twin.encode(tensors)) == packed(packet)
        encoder.settle(True)
        for where, decoded in decode(packet, max_elements=905).items():
            total_in[where] += tensors[where]
            total_out[where] += decoded
    for where, residual in encoder.residual().items():
        torch.testing.assert_close(total_out[where] + residual, total_in[where], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_only_one_lossy_step_fits_and_only_at_the_front(name):
    for steps in ((LOSSY["int8"], LOSSY[name]), (config.Zstd(), LOSSY[name])):
        with pytest.raises(UsageError, match="have a lossy one behind the first"):
            encoder(*steps)


# --- formats ------------------------------------------------------------------------------------------------------


GAUSSIAN = {"int8": 4e-5, "int4": 0.012, "lloyd2": 0.118, "sign": 0.36, "e3m0": 0.036, "fp8": 7e-4}
"""Squared error on a Gaussian, blocks of 64, over its power; 0.1175 and 1 − 2/π are the optima of 2 bits and 1."""


@pytest.mark.parametrize("name", sorted(GAUSSIAN))
def test_error_and_size_on_a_gaussian(name):
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    assert 0.8 * GAUSSIAN[name] < nmse(x, coded(x, LOSSY[name])) < GAUSSIAN[name]
    packet = encoder(LOSSY[name]).encode({Slice("w", (0,), (1 << 16,)): x})
    assert bits_per_parameter(packet, 1 << 16) == GRIDS[name].bits + 16 / 64


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_codes_lie_lowest_bits_first(bits):
    codes = torch.randint(0, 2**bits, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = [
        sum(int(code) << (bits * j) for j, code in enumerate(byte)) for byte in codes.view(-1, 8 // bits).tolist()
    ]
    assert pack(codes, bits).tolist() == expected


def test_zero_and_minus_zero_are_negative_signs():
    x = torch.tensor([3.0, -3.0, 0.0, -0.0, 2.0, -2.0, 1e-30, -1e-30])
    packet = Blockwise("sign", 8).encode(flatten({Slice("w", (0,), (8,)): x}, 8))
    assert packet.arrays["codes"].tolist() == [0b01010001]
    assert packet.arrays["scales"].tolist() == [1.25]


def test_four_levels_by_hand():
    """A mean magnitude of √(2/π), or just below, is a σ of 1: borders are at 0 and ±0.9816."""
    x = torch.tensor([-0.9875, -0.9725, -0.1, 0.0, 0.1, 0.9725, 0.9875, 0.0])
    x[-1] = 8 * 0.7975 - x.abs().sum()
    packet = Blockwise("lloyd2", 8).encode(flatten({Slice("w", (0,), (8,)): x}, 8))
    assert packet.arrays["scales"].tolist() == [1.0]
    levels = [-1.5104, -0.4528, -0.4528, -0.4528, 0.4528, 0.4528, 1.5104, 1.5104]
    assert Blockwise.decode(packet).arrays["values"].tolist() == pytest.approx(levels)


def test_a_norm_of_a_few_values_is_not_diluted_by_its_padding():
    x = torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(coded(x, config.Blockwise(bits=1, block=4096)), x, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["sign", "lloyd2"])
def test_the_longest_block_of_the_largest_values_has_a_finite_mean(name):
    x = torch.full((65536,), LARGEST * (1 - 2**-20))
    bits = GRIDS[name].bits
    assert coded(x, config.Blockwise(bits=bits, block=65536)).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(width=st.integers(1, 130), rows=st.integers(0, 5), seed=st.integers(0, 999))
def test_sums_of_any_width(width, rows, seed):
    x = torch.randint(-1000, 1000, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(sums(x.clone()), x.sum(1))


def test_sums_add_halves_in_a_fixed_tree():
    """2^24 + 1 is not a number of fp32, so each order of addition has a result of its own."""
    assert sums(torch.tensor([[2.0**24, -(2.0**24), 1.0, 1.0, 1.0]])).tolist() == [1.0]  # ((a+d) + c) + (b+e)
    assert sums(torch.tensor([[2.0**24, 1.0, 1.0, 1.0]])).tolist() == [2.0**24 + 2]


E3M0 = [0.0, *(2.0**k for k in range(-6, 1))]


@settings(deadline=None, max_examples=60)
@example(values=[0.0079, -0.009, 0.0116, 0.0118, 0.0078, -0.0077, 0.0], exponent=0)  # around 2^−7 and 1.5 · 2^−7
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=7, max_size=7), exponent=st.integers(-100, 100))
def test_e3m0_takes_the_nearest_of_its_values(values, exponent):
    x = torch.tensor([1.0, *values]) * 2.0**exponent
    decoded = coded(x, config.Minifloat(format="e3m0", block=8)) / 2.0**exponent
    ratios = x / 2.0**exponent
    levels = torch.tensor([level * sign for level in E3M0 for sign in (-1, 1)])
    assert set(decoded.abs().tolist()) <= set(E3M0)
    best = (ratios[:, None] - levels).abs().amin(1)
    assert torch.equal((ratios - decoded).abs(), best)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), exponent=st.integers(-100, 100))
def test_fp8_errs_by_at_most_a_sixteenth_of_a_value(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, generator=generator) * 2.0**exponent
    decoded = coded(x, config.Minifloat(format="fp8"))
    smallest = x.abs().amax() * (1 + 2**-7) / 448 * 2**-9
    assert ((decoded - x).abs() <= torch.maximum(x.abs() / 16, smallest / 2)).all()


def test_bf16_rounds_to_nearest_and_compresses_by_its_byte_planes():
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coded(x, LOSSY["bf16"]), x.bfloat16().float())
    packet = encoder(LOSSY["bf16"], config.Zstd()).encode({Slice("w", (0,), (1 << 20,)): x})
    assert bits_per_parameter(packet, 1 << 20) < 11.1


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0", "fp8"])
def test_zero_blocks_decode_to_zero(name):
    packet = encoder(LOSSY[name]).encode({Slice("w", (0,), (128,)): torch.zeros(128)})
    assert packet.arrays["scales"].tolist() == [SMALLEST_SCALE] * 2
    assert not undo(packet).arrays["values"].any()


def test_filled_counts_what_is_no_padding():
    tensors = tensors_of([(3, 5), (0,), (16,), (), (17,), (2, 0)])
    assert filled(flatten(tensors, 8)).tolist() == [8, 7, 8, 8, 1, 8, 8, 1]
    assert filled(flatten({}, 8)).tolist() == []
