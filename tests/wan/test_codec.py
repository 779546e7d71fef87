"""The codec: round trips, bounds, sizes, error feedback."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.errors import PacketError, UsageError
from nebula.types import Packet, Slice
from nebula.wan.codec import Encoder, Pipeline, decode
from nebula.wan.codec.entropy import Zstd
from nebula.wan.codec.grids import LARGEST, SMALLEST_SCALE
from nebula.wan.codec.layout import capacity, flatten, unflatten
from nebula.wan.codec.quantize import Blockwise
from nebula.wan.frame import pack

INT4 = config.Codec(steps=(config.Blockwise(bits=4, block=64), config.Zstd()))
INT8 = config.Codec(steps=(config.Blockwise(bits=8, block=256), config.Zstd()))
CODECS = {
    "fp32": config.Codec(steps=()),
    "zstd": config.Codec(steps=(config.Zstd(level=3),)),
    "int8": INT8,
    "int4": INT4,
    "int4-bare": config.Codec(steps=(config.Blockwise(bits=4, block=8),)),
}

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=4)


def tensors_of(shapes: list[tuple[int, ...]], seed: int = 0, scale: float = 1.0) -> dict[Slice, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        Slice(f"layer.{i}", tuple(3 * d for d in shape), shape): scale * torch.randn(shape, generator=generator)
        for i, shape in enumerate(shapes)
    }


def values_of(packet: Packet) -> torch.Tensor:
    return packet.arrays["values"]


def same(a: Packet, b: Packet) -> bool:
    return pack(a) == pack(b)


# --- layout -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(shapes=shapes, align=st.integers(1, 70))
def test_layout_returns_the_same_slices_as_views(shapes, align):
    tensors = tensors_of(shapes)
    packet = flatten(tensors, align)
    back = unflatten(packet)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[where], tensors[where]) for where in tensors)
    storage = values_of(packet).untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == storage for view in back.values())


def test_layout_pads_every_slice_with_zeros_to_whole_blocks():
    tensors = {Slice("b", (0,), (5,)): torch.ones(5), Slice("a", (2, 0), (3, 3)): torch.full((3, 3), 2.0)}
    values = values_of(flatten(tensors, 8))
    assert values.tolist() == [2.0] * 9 + [0.0] * 7 + [1.0] * 5 + [0.0] * 3


def test_layout_does_not_depend_on_the_order_of_the_mapping_or_on_strides():
    tensors = tensors_of([(4, 6), (3,), (2, 2)])
    turned = {where: tensors[where].t().contiguous().t() for where in reversed(tensors) if len(where.shape) == 2}
    assert same(flatten(tensors, 8), flatten(turned | tensors, 8))


def test_layout_refuses_to_be_mostly_padding():
    tensors = tensors_of([(1,)] * 40)
    with pytest.raises(UsageError, match="would pad 40 parameters"):
        flatten(tensors, 65536)


# --- quantisation -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([8, 10, 64]),
    blocks=st.integers(1, 5),
    exponent=st.integers(-149, 126),
    seed=st.integers(0, 2**16),
)
def test_error_is_at_most_half_a_scale_at_any_magnitude(bits, block, blocks, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(blocks * block, generator=generator) * 2 - 1) * 2.0**exponent
    packet = Blockwise(f"int{bits}", block).encode(flatten({Slice("w", (0,), tuple(x.shape)): x}, block))
    scale = packet.arrays["scales"].double().repeat_interleave(block)
    decoded = values_of(Blockwise.decode(packet))
    assert ((decoded.double() - x.double()).abs() <= scale * (0.5 + 1e-6)).all()
    limit = 2 ** (bits - 1) - 1
    assert ((decoded.double() / scale).abs() <= limit).all()
    # Rounded up to bf16 (8 significant bits) from the peak over the limit, never more.
    peak = x.double().view(-1, block).abs().amax(1)
    tight = (peak / limit * (1 + 2**-7)).clamp_min(2.0**-126)
    assert (packet.arrays["scales"].double() <= tight * (1 + 1e-6)).all()
    assert (packet.arrays["scales"].double() >= peak / limit * (1 - 1e-6)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_lost_is_left_in_place(bits):
    flat = flatten(tensors_of([(300, 7), (5,)]), 10)
    before = values_of(flat).clone()
    packet = Blockwise(f"int{bits}", 10).encode(flat)
    assert torch.equal(values_of(flat), before - values_of(Blockwise.decode(packet)))
    assert values_of(flat).any()


def test_integers_that_fit_survive_exactly_and_halves_round_to_even():
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0])
    decoded = values_of(Blockwise.decode(Blockwise("int4", 8).encode(flatten({Slice("w", (0,), (8,)): x}, 8))))
    assert decoded.tolist() == [7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 3.0]


def test_zero_blocks_decode_to_zero_from_a_normal_scale():
    tensors = {Slice("w", (0,), (128,)): torch.zeros(128)}
    assert Blockwise("int4", 64).encode(flatten(tensors, 64)).arrays["scales"].tolist() == [SMALLEST_SCALE] * 2
    assert torch.equal(
        decode(Encoder(INT4).encode(tensors), max_elements=128)[Slice("w", (0,), (128,))], torch.zeros(128)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LARGEST])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_are_not_finite_are_refused(bits, bad):
    x = torch.ones(64)
    x[17] = bad
    with pytest.raises(PacketError, match="not finite"):
        Blockwise(f"int{bits}", 64).encode(flatten({Slice("w", (0,), (64,)): x}, 64))


def test_a_nan_with_a_full_mantissa_is_refused_too():
    x = torch.ones(64)
    x.view(torch.int32)[0] = 0x7FFFFFFF
    with pytest.raises(PacketError, match="not finite"):
        Blockwise("int4", 64).encode(flatten({Slice("w", (0,), (64,)): x}, 64))


def test_decoding_does_not_depend_on_threads_or_on_chunk_size(monkeypatch):
    tensors = tensors_of([(300, 1000)])
    packet = Encoder(INT4).encode(tensors)
    threads = torch.get_num_threads()
    try:
        results = []
        for count, chunk in ((1, 1 << 16), (2, 1 << 16), (4, 1 << 20)):
            torch.set_num_threads(count)
            monkeypatch.setattr("nebula.wan.codec.quantize.CHUNK", {"cpu": chunk})
            assert same(Encoder(INT4).encode(tensors), packet)
            results.append(next(iter(decode(packet, max_elements=300_000).values())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result.view(torch.int32), results[0].view(torch.int32)) for result in results)


# --- pipelines ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(shapes=shapes, codec=st.sampled_from(sorted(CODECS)))
def test_every_codec_returns_every_slice(shapes, codec):
    tensors = tensors_of(shapes)
    cfg = CODECS[codec]
    back = decode(Encoder(cfg).encode(tensors), max_elements=sum(x.numel() for x in tensors.values()))
    assert back.keys() == tensors.keys()
    lossy = any(step.kind == "blockwise" for step in cfg.steps)
    for where, tensor in tensors.items():
        assert back[where].shape == tensor.shape
        torch.testing.assert_close(back[where], tensor, rtol=0, atol=0.35 if lossy else 0)


@pytest.mark.parametrize("codec", ["fp32", "zstd"])
def test_lossless_codecs_keep_every_bit(codec):
    x = torch.randint(-(2**31), 2**31 - 1, (1000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    where = Slice("w", (0,), (1000,))
    back = decode(Encoder(CODECS[codec]).encode({where: x.view(torch.float32)}), max_elements=1000)
    assert torch.equal(back[where].view(torch.int32), x)


def test_plain_fp32_does_not_alias_its_input():
    tensors = tensors_of([(8,)])
    packet = Encoder(CODECS["fp32"]).encode(tensors)
    next(iter(tensors.values())).zero_()
    assert values_of(packet).abs().sum() > 0


def test_sizes_in_bits_per_parameter():
    tensors = tensors_of([(512, 512)])
    bare = config.Codec(steps=(config.Blockwise(bits=4, block=64),))
    arrays = Encoder(bare).encode(tensors).arrays
    assert sum(x.nbytes for x in arrays.values()) * 8 / 512**2 == 4.25
    assert len(pack(Encoder(INT4).encode(tensors))) * 8 / 512**2 < 3.8
    assert len(pack(Encoder(INT8).encode(tensors))) * 8 / 512**2 < 7.7


def test_no_quantisation_block_mixes_two_tensors():
    tensors = {Slice("a", (0,), (3,)): torch.full((3,), 1e6), Slice("b", (0,), (3,)): torch.tensor([1e-6, 2e-6, 7e-6])}
    back = decode(Encoder(INT4).encode(tensors), max_elements=6)
    torch.testing.assert_close(back[Slice("b", (0,), (3,))], torch.tensor([1e-6, 2e-6, 7e-6]), rtol=0, atol=5.1e-7)


@pytest.mark.parametrize(
    "steps", [(config.Zstd(), config.Blockwise()), (config.Blockwise(), config.Blockwise())], ids=["late", "twice"]
)
def test_steps_that_do_not_fit_are_refused_at_construction(steps):
    with pytest.raises(UsageError, match="have a lossy one behind the first"):
        Pipeline(config.Codec(steps=steps))


def test_decoding_undoes_one_trail_entry_per_step():
    flat = flatten(tensors_of([(10, 10)]), 64)
    quantized = Blockwise("int4", 64).encode(flat)
    compressed = Zstd(1).encode(quantized)
    assert [entry["kind"] for entry in compressed.trail] == ["layout", "blockwise", "zstd"]
    assert same(Zstd.decode(compressed), quantized)
    assert Blockwise.decode(quantized).trail == flat.trail


def test_a_step_passes_arrays_that_are_not_its_own():
    flat = flatten(tensors_of([(64,)]), 64)
    support = torch.arange(64, dtype=torch.int32)
    packet = Zstd(1).encode(Blockwise("int8", 64).encode(Packet({**flat.arrays, "support": support}, flat.trail)))
    assert torch.equal(Blockwise.decode(Zstd.decode(packet)).arrays["support"], support)


def test_the_bound_on_elements_counts_parameters_not_padding():
    tensors = tensors_of([(5,), (7,)])
    packet = Encoder(INT4).encode(tensors)
    assert len(decode(packet, max_elements=12)) == 2
    with pytest.raises(PacketError, match="holds 12 parameters, at most 11"):
        decode(packet, max_elements=11)
    assert capacity(12) > values_of(flatten(tensors, 64)).numel()


# --- error feedback -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_error_feedback_telescopes(codec):
    """With decay 1, what was sent plus what is still held back is what came in."""
    encoder = Encoder(CODECS[codec])
    total_in, total_out = torch.zeros(40, 50), torch.zeros(40, 50)
    where = Slice("layer.0", (120, 150), (40, 50))
    for round in range(12):
        tensors = tensors_of([(40, 50)], seed=round)
        total_in += tensors[where]
        total_out += decode(encoder.encode(tensors), max_elements=2000)[where]
        encoder.settle(True)
    residual = encoder.residual()[where]
    assert residual.abs().max() > 1e-4
    torch.testing.assert_close(total_out + residual, total_in, rtol=0, atol=1e-5)


def test_decay_scales_the_residual():
    cfg = config.Codec(steps=(config.Blockwise(bits=4, block=8),), feedback=0.5)
    encoder, where = Encoder(cfg), Slice("w", (0,), (8,))
    x = torch.tensor([7.0, 0.4, 0, 0, 0, 0, 0, 0])
    encoder.encode({where: x})
    encoder.settle(True)
    assert encoder.residual()[where].tolist() == pytest.approx([0, 0.4, 0, 0, 0, 0, 0, 0])
    encoder.encode({where: x})
    encoder.settle(True)
    assert encoder.residual()[where][1].item() == pytest.approx(0.4 + 0.5 * 0.4 - 1.0)


def test_encoding_again_before_settling_gives_the_same_packet():
    encoder = Encoder(INT4)
    encoder.encode(tensors_of([(30, 30)], seed=1))
    encoder.settle(True)
    tensors = tensors_of([(30, 30)], seed=2)
    first = encoder.encode(tensors)
    assert same(first, encoder.encode(tensors))
    encoder.settle(True)
    assert not same(first, encoder.encode(tensors))


def test_a_round_that_did_not_happen_leaves_the_residual():
    encoder = Encoder(INT4)
    encoder.encode(tensors_of([(30, 30)], seed=1))
    encoder.settle(True)
    before = {where: x.clone() for where, x in encoder.residual().items()}
    first = encoder.encode(tensors_of([(30, 30)], seed=2))
    encoder.settle(False)
    assert all(torch.equal(encoder.residual()[where], x) for where, x in before.items())
    assert same(first, encoder.encode(tensors_of([(30, 30)], seed=2)))


def test_a_packet_that_was_merged_but_is_not_at_hand_takes_the_residual_along():
    """A cluster sent it, crashed, and was restored from before: its residual is in what was merged already."""
    encoder = Encoder(INT4)
    encoder.encode(tensors_of([(30, 30)], seed=1))
    encoder.settle(True)
    encoder.settle(True)
    assert encoder.residual() == {}
    assert same(Encoder(INT4).encode(tensors_of([(30, 30)], seed=2)), encoder.encode(tensors_of([(30, 30)], seed=2)))


def test_encode_leaves_its_input_alone():
    encoder, tensors = Encoder(INT4), tensors_of([(30, 30)])
    before = {where: x.clone() for where, x in tensors.items()}
    encoder.encode(tensors)
    encoder.settle(True)
    encoder.encode(tensors)
    assert all(torch.equal(tensors[where], x) for where, x in before.items())


def test_a_difference_is_coded_as_if_it_had_been_computed_before():
    base, local = tensors_of([(30, 30), (5,)], seed=1), tensors_of([(30, 30), (5,)], seed=2)
    local = {where: x.to(torch.bfloat16) for where, x in local.items()}
    delta = {where: base[where] - local[where] for where in base}
    assert same(Encoder(INT4).encode(base, minus=local), Encoder(INT4).encode(delta))


def test_an_encoder_that_uses_its_memory_again_has_no_memory_of_it():
    """Packets and residuals of before stay what they were, and a packet that was given up leaves nothing behind."""
    encoder, kept = Encoder(INT4), []
    for seed in range(4):
        tensors = tensors_of([(30, 30), (5,)], seed=seed)
        encoder.encode(tensors_of([(30, 30), (5,)], seed=99))
        encoder.settle(False)
        packet = encoder.encode(tensors)
        twin = Encoder(INT4)
        twin.restore({where: x.clone() for where, x in encoder.residual().items()})
        assert same(packet, twin.encode(tensors))
        kept.append((packet, pack(packet)))
        encoder.settle(True)
    assert all(pack(packet) == sent for packet, sent in kept)


def test_a_restored_encoder_continues_bit_for_bit():
    encoder, twin = Encoder(INT4), Encoder(INT4)
    encoder.encode(tensors_of([(30, 30), (4,)], seed=1))
    encoder.settle(True)
    twin.restore({where: x.clone() for where, x in encoder.residual().items()})
    tensors = tensors_of([(30, 30), (4,)], seed=2)
    assert same(encoder.encode(tensors), twin.encode(tensors))
    twin.restore({})
    assert twin.residual() == {}


def test_a_residual_of_another_layout_is_refused():
    encoder = Encoder(INT4)
    encoder.restore(tensors_of([(30, 30)]))
    with pytest.raises(UsageError, match="other slices"):
        encoder.encode(tensors_of([(15, 30)]))


@pytest.mark.parametrize(
    "codec", [CODECS["fp32"], CODECS["zstd"], config.Codec(feedback=None), config.Codec(feedback=0.0)]
)
def test_no_residual_is_held_where_it_would_do_nothing(codec):
    encoder = Encoder(codec)
    tensors = tensors_of([(30, 30)])
    assert same(encoder.encode(tensors), Encoder(codec).encode(tensors))
    encoder.settle(True)
    encoder.restore(tensors)
    assert encoder.residual() == {}


def test_a_failed_encode_leaves_nothing_in_flight():
    encoder, where = Encoder(INT4), Slice("w", (0,), (64,))
    encoder.encode({where: torch.ones(64)})
    with pytest.raises(PacketError):
        encoder.encode({where: torch.full((64,), math.nan)})
    encoder.settle(True)
    assert encoder.residual() == {}
