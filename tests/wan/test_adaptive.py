"""The adaptive codec: rate, error, side information, and the entropy coder under it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.errors import PacketError
from nebula.types import Packet, Slice
from nebula.wan.codec import Encoder, Pipeline, adaptive, decode, rans
from nebula.wan.codec.adaptive import SAMPLE, Adaptive
from nebula.wan.codec.groups import CHUNK, groups
from nebula.wan.codec.layout import flatten, read, unflatten, with_last
from nebula.wan.codec.prior import CELLS, guide, remember
from nebula.wan.codec.rans import TOTAL, Coder, Model, normalise
from nebula.wan.frame import pack, unpack
from tests.attacks.memory import flat

MATRIX = Slice("w", (0, 0), (512, 512))
NORM = Slice("norm", (0,), (512,))
SHAPES = {MATRIX: 1.0, Slice("v", (0, 0), (256, 512)): 0.05, NORM: 3.0}


def tensors(seed: int = 0, heavy: float = 0.0) -> dict[Slice, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {where: scale * torch.randn(where.shape, generator=generator) for where, scale in SHAPES.items()}
    return {where: x + heavy * x**3 for where, x in drawn.items()}


def coded(x: dict[Slice, torch.Tensor], bits: float, last: dict[Slice, torch.Tensor] | None = None) -> Packet:
    return Encoder(codec(bits)).encode(x, last)


def codec(bits: float, feedback: float | None = None) -> config.Codec:
    return config.Codec(steps=(config.Adaptive(bits=bits),), feedback=feedback)


def size(packet: Packet) -> float:
    """Bits per parameter of the arrays."""
    return 8 * sum(a.numel() * a.itemsize for a in packet.arrays.values()) / read(packet).elements


def error(x: dict[Slice, torch.Tensor], packet: Packet, last: dict[Slice, torch.Tensor] | None = None) -> float:
    decoded = decode(packet, max_elements=10**7, last=last.__getitem__ if last else None)
    lost = sum(float((x[where] - decoded[where]).square().sum()) for where in x)
    return lost / sum(float(values.square().sum()) for values in x.values())


# --- rate and error -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.125, 0.25, 0.5, 1.0, 2.0, 3.3, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("heavy", [0.0, 0.3], ids=["gaussian", "heavy-tailed"])
def test_it_takes_the_bits_that_it_was_given(bits, heavy):
    assert size(coded(tensors(heavy=heavy), bits)) == pytest.approx(bits, rel=0.03)


@pytest.mark.parametrize(("bits", "gap"), [(0.25, 0.13), (0.5, 0.2), (1.0, 0.28), (2.0, 0.3), (4.0, 0.3), (8.0, 0.4)])
def test_a_gaussian_comes_near_the_bound(bits, gap):
    """Rate-distortion function of a Gaussian: ½ log2(1 / NMSE)."""
    x = {where: values for where, values in tensors().items() if where == MATRIX}
    packet = coded(x, bits)
    assert size(packet) + 0.5 * math.log2(error(x, packet)) < gap


def test_every_slice_gets_its_share_whatever_its_scale():
    """Were steps common to all, the small one would be left out."""
    x = tensors()
    decoded = decode(coded(x, 0.5), max_elements=10**7)
    kept = [float((values != 0).float().mean()) for where, values in decoded.items() if where != NORM]
    assert max(kept) < 1.3 * min(kept)


def test_norms_are_kept_finer():
    x = tensors()
    decoded = decode(coded(x, 1.0), max_elements=10**7)
    lost = {w: float((x[w] - decoded[w]).square().mean() / x[w].square().mean()) for w in x}
    assert lost[NORM] < lost[MATRIX] / 50


@pytest.mark.parametrize("bits", [0.1, 0.25, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-4])
def test_values_of_one_magnitude_are_all_sent(bits, scale):
    """A first step of Adam's is a sign times its rate: no share of that can be the largest, and none must starve."""
    x = {where: scale * values.sign() for where, values in tensors().items()}
    decoded = decode(coded(x, bits), max_elements=10**7)
    assert all(bool(decoded[where].ne(0).all()) for where in x)


def test_encoding_takes_no_memory_but_the_error_the_packet_and_a_chunk():
    """The first round makes the residual; the second one needs room for the next residual, the third one has it."""
    x = {Slice("w", (0, 0), (4096, 4096)): torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))}
    last = {where: remember(values.roll(1)) for where, values in x.items()}
    encoder = Encoder(codec(1.0, feedback=0.95))
    for _ in range(2):
        encoder.encode(x, last)
        encoder.settle(True)
    chunk = 8 * CHUNK
    with flat(chunk * torch.get_num_threads() + 12 * SAMPLE + (8 << 20)):
        encoder.encode(x, last)


def test_error_feedback_carries_on_exactly_what_was_lost():
    x = tensors()
    encoder = Encoder(codec(1.0, feedback=1.0))
    decoded = decode(encoder.encode(x), max_elements=10**7)
    encoder.settle(True)
    residual = encoder.residual()
    assert all(torch.equal(residual[where], x[where] - decoded[where]) for where in x)


def test_what_is_left_out_is_sent_in_later_rounds():
    """At a tenth of a bit, everything of a constant delta arrives in time: nothing starves, the residual is bounded."""
    x = tensors(heavy=0.3)
    encoder, sent = Encoder(codec(0.1, feedback=1.0)), {where: torch.zeros(where.shape) for where in x}
    for _ in range(60):
        decoded = decode(encoder.encode(x), max_elements=10**7)
        encoder.settle(True)
        for where in x:
            sent[where] += decoded[where]
    for where in x:
        assert float((sent[where] / 60 - x[where]).square().mean()) < 0.5 * float(x[where].square().mean())


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=5),
    bits=st.floats(0.1, 8),
    exponent=st.integers(-80, 80),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_slices_come_back_within_their_error(shapes, bits, exponent, known, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator) * 2.0**exponent  # noqa: E731
    x = {Slice(f"p{i}", (0,) * len(shape), shape): draw(shape) for i, shape in enumerate(shapes)}
    last = {where: remember(draw(where.shape)) for where in x} if known else None
    flat = flatten(x, 1)
    before = flat.arrays["values"].clone()
    packet = Pipeline(codec(bits)).encode(flat, last)
    back = unpack(pack(packet), max_bytes=10**7)
    decoded = decode(back, max_elements=10**6, last=None if last is None else last.__getitem__)
    lost = unflatten(Packet({"values": flat.arrays["values"]}, flat.trail))
    assert decoded.keys() == x.keys()
    for where, values in unflatten(Packet({"values": before}, flat.trail)).items():
        assert torch.equal(values - decoded[where], lost[where])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**127])
def test_what_is_not_finite_is_refused(bad):
    x = tensors()
    x[MATRIX][100, 100] = bad
    with pytest.raises(PacketError, match="not finite"):
        coded(x, 1.0)


def test_constant_and_zero_slices_survive():
    x = {MATRIX: torch.zeros(MATRIX.shape), NORM: torch.full(NORM.shape, 2.0)}
    decoded = decode(coded(x, 2.0), max_elements=10**6)
    assert not decoded[MATRIX].any()
    torch.testing.assert_close(decoded[NORM], x[NORM], rtol=0.05, atol=0)


# --- threads and devices ------------------------------------------------------------------------------------------


def test_threads_do_not_change_a_bit():
    assert read(flatten(tensors(), 1)).elements > 2 * CHUNK
    packets = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            packets.append(pack(coded(tensors(), 1.5)))
        finally:
            torch.set_num_threads(before)
    assert packets[0] == packets[1]


@pytest.mark.parametrize("bits", [0.3, 2.0, 7.0])
def test_a_device_makes_the_same_packet_and_the_same_error(bits, monkeypatch):
    """The operations for a device, done here."""
    packets, errors = [], []
    for quantise in (adaptive._quantise_here, adaptive._quantise_there):
        monkeypatch.setattr(adaptive, "_quantise_here", quantise)
        flat = flatten(tensors(heavy=0.3), 1)
        packets.append(pack(Adaptive(bits).encode(flat)))
        errors.append(flat.arrays["values"])
    assert packets[0] == packets[1]
    assert torch.equal(errors[0], errors[1])


def test_small_slices_are_fine_ones_and_chunks_hold_all():
    layout = read(flatten(tensors(), 1))
    coarse, fine = groups(layout)
    assert [layout.slices[number].name for number in fine.pieces] == ["norm"]
    covered = [(s.piece, i) for g in (coarse, fine) for c in g.chunks for s in c for i in (s.start, s.start + s.count)]
    assert len(coarse.chunks) == 3
    assert {piece for piece, _ in covered} == set(range(3))
    assert sum(s.count for g in (coarse, fine) for c in g.chunks for s in c) == layout.elements
    assert all(sum(s.count for s in chunk) == CHUNK for chunk in coarse.chunks[:-1])


# --- the update before --------------------------------------------------------------------------------------------


def related(x: dict[Slice, torch.Tensor]) -> dict[Slice, torch.Tensor]:
    """An update like the ones before a delta: half of it is the same, and rows differ in scale."""
    generator = torch.Generator().manual_seed(9)
    return {w: remember(v + v.std() * torch.randn(v.shape, generator=generator)) for w, v in x.items()}


def uneven(seed: int = 0) -> dict[Slice, torch.Tensor]:
    return {
        where: x * torch.logspace(-1, 1, where.shape[0], base=2).view(-1, *[1] * (x.dim() - 1))
        for where, x in tensors(seed).items()
    }


@pytest.mark.parametrize("bits", [0.5, 2.0])
def test_the_update_before_saves_error_at_the_same_bits(bits):
    x = uneven()
    last = related(x)
    with_it, without = coded(x, bits, last), coded(x, bits)
    assert size(with_it) == pytest.approx(bits, rel=0.03)
    assert error(x, with_it, last) < 0.85 * error(x, without)


def test_a_packet_that_needs_the_update_before_says_so():
    x = tensors()
    packet = coded(x, 1.0, related(x))
    with pytest.raises(PacketError, match="only with the update before it"):
        decode(packet, max_elements=10**7)


def test_another_update_gives_other_values_or_an_error_and_nothing_else():
    x = tensors()
    packet, other = coded(x, 1.0, related(x)), related(tensors(seed=5))
    with pytest.raises(PacketError, match="damaged"):
        decode(packet, max_elements=10**7, last=other.__getitem__)


def test_a_slice_that_the_update_lacks_is_an_error():
    with pytest.raises(PacketError, match="no update before"):
        with_last(flatten(tensors(), 1), {})


def test_a_guide_knows_rows_columns_sizes_and_signs():
    last = torch.ones(4, 8)
    last[2] *= 2
    last[:, 5] *= -1
    last[0, 0] = 0.0
    found = guide(remember(last))
    cells, negative = found.cells(np.arange(32))
    grid = cells.reshape(4, 8).astype(int)
    assert (cells < CELLS).all()
    assert negative.reshape(4, 8)[:, 5].all()
    assert negative.sum() == 4
    assert (grid[2] > grid[1]).all()
    assert grid[0, 0] % 8 < grid[0, 1] % 8
    contexts = np.zeros(20, np.uint8)
    found.contexts(7, np.arange(CELLS, dtype=np.uint8), contexts)
    assert (contexts == cells[7:27]).all()


# --- the entropy coder --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    half=st.integers(1, 90),
    contexts=st.integers(1, 6),
    shift=st.integers(0, 5),
    count=st.integers(0, 3000),
    spread=st.floats(0.1, 500),
    seed=st.integers(0, 2**16),
)
def test_whatever_is_coded_comes_back(half, contexts, shift, count, spread, seed):
    """Values that the model never saw among them: they are escaped."""
    random = np.random.default_rng(seed)
    values = np.clip(random.standard_normal(count) * spread, -32000, 32000).astype(np.int16)
    where = random.integers(0, contexts, count).astype(np.uint8)
    frequencies = normalise(random.integers(0, 5, (contexts, 2 * half + 2)).astype(np.float64))
    assert (frequencies.sum(1) == TOTAL).all()
    coder, back = Coder(Model(frequencies, shift)), np.empty(count, np.int16)
    coder.decode(memoryview(coder.encode(values, where)), where, back)
    assert (back == values).all()


def test_every_frequency_divides_exactly():
    """At the states where a reciprocal errs first: a multiple, and one below the next, up to the largest."""
    for f in range(1, TOTAL):
        model = Model(np.array([[f, TOTAL - f]], np.uint16), 0)
        _, reciprocal, rest = (int(value) for value in rans.encoding_table(model)[0, 0])
        for quotient in (0, 1, 2**19, 2**20 - 1):
            for state in (quotient * f, quotient * f + f - 1):
                product = (state + (rest >> 6 & 1)) * reciprocal
                assert product < 2**64
                assert product >> (rest & 63) == quotient


def test_it_comes_within_two_percent_of_the_entropy():
    random = np.random.default_rng(0)
    for scale in (0.3, 0.7, 2.0, 8.0):
        values = np.rint(random.standard_normal(CHUNK) * scale).astype(np.int16)
        half = int(np.abs(values).max())
        counts = np.bincount(values + half, minlength=2 * half + 2).astype(np.float64)[None]
        share = counts[counts > 0] / CHUNK
        entropy = -(share * np.log2(share)).sum() * CHUNK
        stream = Coder(Model(normalise(counts), 0)).encode(values, np.zeros(CHUNK, np.uint8))
        assert 8 * len(stream) < 1.02 * entropy


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_stream_ends_in_an_error_or_in_values(data):
    """Never out of bounds; the end state finds nearly all of it."""
    values, where = np.arange(400, dtype=np.int16) % 7 - 3, np.zeros(400, np.uint8)
    coder = Coder(Model(normalise(np.ones((1, 8))), 1))
    stream = bytearray(coder.encode(values, where))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(stream)))
    with pytest.raises(PacketError):
        coder.decode(memoryview(stream)[: cut - cut % 2 - 2], where, np.empty(400, np.int16))
    with pytest.raises(PacketError):
        coder.decode(memoryview(bytes(stream) + b"\0\0"), where, np.empty(400, np.int16))


def test_frequencies_that_do_not_add_up_are_refused():
    with pytest.raises(PacketError, match="do not add up"):
        Model(np.full((1, 4), 1000, np.uint16), 0)
