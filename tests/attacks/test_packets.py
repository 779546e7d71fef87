"""Hostile packets: every one ends in PacketError, in a few megabytes, and in nothing else."""

from __future__ import annotations

import random
import struct

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import flat
from packets import STEPS, assemble, honest

from nebula import config
from nebula.errors import PacketError
from nebula.types import Packet, Slice
from nebula.wan.codec import decode, wire
from nebula.wan.codec.entropy import inflate
from nebula.wan.codec.pipeline import DECODERS
from nebula.wan.frame import pack, unpack

ELEMENTS = 600
LIMIT = 1 << 20
GIB = 1 << 30


def receive(data: bytes) -> dict[Slice, torch.Tensor]:
    return decode(unpack(data, max_bytes=LIMIT), max_elements=ELEMENTS)


HONEST = [
    honest(),
    *(honest(step) for step in STEPS),
    honest(config.Blockwise(), config.Zstd()),
    honest(config.TopK(), config.Zstd()),
]
TRAILS = [unpack(data, max_bytes=LIMIT).trail for data in HONEST]
PLAIN = [data for data, trail in zip(HONEST, TRAILS, strict=True) if trail[-1]["kind"] not in ("zstd", "layout")]


def layout(count: int, align: int = 1) -> dict[str, object]:
    return {"kind": "layout", "align": align, "slices": [["w", [0], [count]]]}


def refused(data: bytes) -> bool:
    """True for PacketError, False for success; anything else escapes and fails the test."""
    try:
        receive(data)
    except PacketError:
        return True
    return False


@pytest.fixture
def flat_memory():
    with flat(8 << 20):
        yield


# --- fuzz ---------------------------------------------------------------------------------------------------------


def test_the_honest_packets_are_accepted():
    assert not any(refused(data) for data in HONEST)


def test_every_decoder_is_among_what_is_attacked():
    assert {entry["kind"] for trail in TRAILS for entry in trail} == {"layout", *DECODERS}


@settings(deadline=None, max_examples=250)
@given(data=st.sampled_from(HONEST), edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
def test_mutated_packets_never_do_more_than_fail(data, edits):
    mutant = bytearray(data)
    for position, value in edits:
        mutant[min(int(position * len(mutant)), len(mutant) - 1)] = value
    refused(bytes(mutant))


@settings(deadline=None, max_examples=250)
@given(data=st.sampled_from(HONEST), position=st.integers(0, 400), bits=st.integers(1, 255))
def test_mutated_headers_never_do_more_than_fail(data, position, bits):
    mutant = bytearray(data)
    mutant[position % len(mutant)] ^= bits
    refused(bytes(mutant))


@pytest.mark.usefixtures("flat_memory")
def test_a_thousand_mutants_leave_memory_flat():
    dice = random.Random(0)
    for _ in range(1000):
        mutant = bytearray(dice.choice(HONEST))
        for _ in range(dice.randint(1, 4)):
            mutant[dice.randrange(min(len(mutant), 300))] = dice.randrange(256)
        refused(bytes(mutant))


@settings(deadline=None, max_examples=80)
@given(data=st.sampled_from(HONEST), share=st.floats(0, 1, exclude_max=True))
def test_truncated_and_extended_packets_are_refused(data, share):
    assert refused(data[: int(share * len(data))])
    assert refused(data + data[: 1 + int(share * 10)])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(sorted({"values", "w"}.union(*(unpack(data, max_bytes=LIMIT).arrays for data in HONEST))))
near = st.sampled_from([-1, 0, 1, 2, 4, 7, 8, 9, 16, 64, 600, 65536, 2**31, 2**48, 2**63, True, 1.0, "8", None])
FIELDS = [
    (key, st.sampled_from([entry[key] for trail in TRAILS for entry in trail if key in entry]))
    for key in sorted(
        {key for trail in TRAILS for entry in trail for key in entry} - {"kind", "arrays", "slices", "align"}
    )
]
"""What the entries of honest trails hold, and values seen there."""
dims = st.lists(near, max_size=3)
entries = st.one_of(
    json_values.map(lambda value: {"kind": value}),
    st.fixed_dictionaries(
        {"kind": st.just("layout"), "align": near},
        optional={"slices": st.lists(st.tuples(names | near, dims, dims), max_size=3) | json_values},
    ),
    st.fixed_dictionaries(
        {"kind": st.sampled_from(sorted(DECODERS))}, optional={key: near | fit for key, fit in FIELDS}
    ),
    st.fixed_dictionaries(
        {"kind": st.just("zstd")},
        optional={
            "arrays": st.lists(st.tuples(names | near, st.sampled_from([*wire.DTYPES, "F64", 3]), dims)) | json_values
        },
    ),
    json_values,
)
arrays = st.dictionaries(names, st.tuples(st.sampled_from(sorted(wire.DTYPES)), st.integers(0, 9)), max_size=3)


@settings(deadline=None, max_examples=400)
@given(arrays=arrays, trail=st.lists(entries, max_size=4), sound=st.booleans())
def test_invented_trails_never_do_more_than_fail(arrays, trail, sound):
    specs = [(name, dtype, [n], bytes(n * wire.DTYPES[dtype].itemsize)) for name, (dtype, n) in arrays.items()]
    specs.sort(key=lambda spec: -wire.DTYPES[spec[1]].itemsize)
    refused(assemble(specs, [layout(8), *trail] if sound else trail))


@settings(deadline=None, max_examples=400)
@given(data=st.sampled_from(PLAIN), field=st.data())
def test_another_field_in_an_honest_trail_never_does_more_than_fail(data, field):
    packet = unpack(data, max_bytes=LIMIT)
    entry = dict(packet.trail[-1])
    key = field.draw(st.sampled_from(sorted(entry)))
    entry[key] = field.draw(
        near | st.integers(-1, 70000) | st.sampled_from(sorted(DECODERS)) | dict(FIELDS).get(key, near)
    )
    refused(pack(Packet(packet.arrays, (*packet.trail[:-1], entry))))


@settings(deadline=None, max_examples=400)
@given(data=st.sampled_from(PLAIN), seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 1))
def test_other_bytes_in_an_honest_form_are_refused_or_decode_to_numbers(data, seed, share):
    packet = unpack(bytearray(data), max_bytes=LIMIT)
    generator = torch.Generator().manual_seed(seed)
    for array in packet.arrays.values():
        raw = array.view(torch.uint8)
        hit = torch.rand(raw.shape, generator=generator) < share
        raw[hit] = torch.randint(0, 256, (int(hit.sum()),), generator=generator, dtype=torch.uint8)
    try:
        decoded = decode(packet, max_elements=ELEMENTS)
    except PacketError:
        return
    assert all(x.isfinite().all() for x in decoded.values())


@settings(deadline=None, max_examples=200)
@given(data=st.sampled_from(PLAIN), pick=st.data())
def test_an_array_that_is_cut_or_missing_is_refused(data, pick):
    packet = unpack(data, max_bytes=LIMIT)
    name = pick.draw(st.sampled_from(sorted(name for name, array in packet.arrays.items() if len(array))))
    arrays = dict(packet.arrays)
    arrays[name] = arrays[name][: -pick.draw(st.integers(1, len(arrays[name])))]
    assert refused(pack(Packet(arrays, packet.trail)))
    del arrays[name]
    assert refused(pack(Packet(arrays, packet.trail)))


# --- bombs --------------------------------------------------------------------------------------------------------


def deflate(size: int, *, declared: bool = True) -> bytes:
    """`size` zeros, in pieces, so that building a bomb does not itself move the peak."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=declared)
    stream = compressor.compressobj(size=size) if declared else compressor.compressobj()
    piece = bytes(1 << 20)
    parts = [stream.compress(piece[: min(len(piece), size - at)]) for at in range(0, size, len(piece))]
    return b"".join([*parts, stream.flush()])


def compressed(frame: bytes, shape: list[int], *, slices: int = 8) -> bytes:
    trail = [layout(slices), {"kind": "zstd", "arrays": [["values", "F32", shape]]}]
    return assemble([("values", "U8", [len(frame)], frame)], trail)


BOMB = deflate(GIB // 4)
SILENT_BOMB = deflate(GIB // 4, declared=False)


def lying(size: int) -> bytes:
    """A frame of 256 MiB of zeros whose header declares `size` bytes."""
    assert zstandard.get_frame_parameters(BOMB).content_size == GIB // 4
    at = BOMB.index(struct.pack("<I", GIB // 4))
    frame = BOMB[:at] + struct.pack("<I", size) + BOMB[at + 4 :]
    assert zstandard.get_frame_parameters(frame).content_size == size
    return frame


@pytest.mark.usefixtures("flat_memory")
@pytest.mark.parametrize("shape", [[8], [GIB // 16]], ids=["honest trail", "trail in on it"])
@pytest.mark.parametrize(
    ("frame", "reason"),
    [(BOMB, "declares 268435456 bytes|more than its layout"), (SILENT_BOMB, "declares no size|more than")],
)
def test_a_zstd_bomb_is_refused(frame, reason, shape):
    data = compressed(frame, shape)
    assert len(data) < 64 * 1024
    with pytest.raises(PacketError, match=reason):
        receive(data)


@pytest.mark.usefixtures("flat_memory")
@pytest.mark.parametrize("size", [32, 1 << 20])
def test_a_zstd_frame_that_holds_more_than_it_declares_stops_at_the_cap(size):
    with pytest.raises(PacketError):
        inflate(memoryview(lying(size)), size)


@pytest.mark.usefixtures("flat_memory")
def test_a_layout_that_vouches_for_a_bomb_is_refused():
    with pytest.raises(PacketError, match="at most 600 are expected"):
        receive(compressed(BOMB, [GIB // 16], slices=GIB // 16))


@pytest.mark.usefixtures("flat_memory")
def test_many_arrays_cannot_share_one_budget():
    frame = deflate(8 * 4)
    names = [f"x{i:02}" for i in range(60)]
    trail = [layout(8), {"kind": "zstd", "arrays": [[name, "F32", [8]] for name in names]}]
    with pytest.raises(PacketError, match="more than its layout"):
        receive(assemble([(name, "U8", [len(frame)], frame) for name in names], trail))


@pytest.mark.usefixtures("flat_memory")
def test_padding_is_no_way_around_the_bound():
    slices = [[f"w{i}", [0], [1]] for i in range(600)]
    trail = [{"kind": "layout", "align": 65536, "slices": slices}]
    with pytest.raises(PacketError, match="pads 600 parameters to 39321600"):
        receive(assemble([], trail))


@pytest.mark.parametrize(
    "tail",
    [b"x", deflate(32), deflate(0), struct.pack("<II", 0x184D2A50, 1) + b"x"],
    ids=["junk", "second frame", "empty second frame", "skippable frame"],
)
def test_nothing_may_follow_a_zstd_frame(tail):
    assert not refused(compressed(deflate(32), [8]))
    with pytest.raises(PacketError, match="unused data"):
        receive(compressed(deflate(32) + tail, [8]))


def test_truncated_zstd_frames_are_refused():
    generator = torch.Generator().manual_seed(0)
    raw = bytes(torch.randint(0, 9, (3000,), generator=generator, dtype=torch.uint8).numpy())
    frame = zstandard.ZstdCompressor(level=3).compress(raw)
    assert inflate(memoryview(frame), 3000) == raw
    for cut in range(len(frame)):
        with pytest.raises(PacketError):
            inflate(memoryview(frame[:cut]), 3000)


def test_a_huge_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    head = stream.compress(b"x") + stream.flush()
    assert zstandard.get_frame_parameters(head).window_size == 1 << 27
    # The same window with a declared size of 1: descriptor with a 4-byte size, window byte, size, then the blocks.
    frame = head[:4] + bytes([0x80]) + head[5:6] + struct.pack("<I", 1) + head[6:]
    assert zstandard.get_frame_parameters(frame).content_size == 1
    with pytest.raises(PacketError, match="wants a window of 134217728"):
        inflate(memoryview(frame), 1)


# --- lies ---------------------------------------------------------------------------------------------------------


def test_an_unknown_codec_is_refused_by_naming_the_known():
    data = assemble([("values", "F32", [8], bytes(32))], [layout(8), {"kind": "pickle"}])
    with pytest.raises(PacketError, match=f"unknown codec 'pickle', supported: {', '.join(DECODERS)}"):
        receive(data)


def test_a_trail_without_end_is_refused():
    with pytest.raises(PacketError, match="a packet of 41 steps"):
        receive(assemble([], [layout(8)] + [{"kind": "zstd", "arrays": []}] * 40))


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 3e38])
def test_a_scale_that_would_decode_to_infinity_is_refused(scale):
    scales = bytes(wire.as_bytes(torch.tensor([scale]).bfloat16()))
    trail = [layout(8, align=8), {"kind": "blockwise", "format": "int8", "block": 8}]
    data = assemble([("scales", "BF16", [1], scales), ("codes", "U8", [8], bytes([128] * 8))], trail)
    with pytest.raises(PacketError, match="not finite"):
        receive(data)


@pytest.mark.parametrize(("format", "block"), [("int4", 8), ("int8", 16), ("int8", 9), ("sign", 8), ("lloyd2", 32)])
def test_codes_that_do_not_fit_their_scales_are_refused(format, block):
    trail = [layout(8, align=8), {"kind": "blockwise", "format": format, "block": block}]
    with pytest.raises(PacketError, match="do not fit blocks"):
        receive(assemble([("scales", "BF16", [1], b"\x80\x3f"), ("codes", "U8", [8], bytes(8))], trail))


def test_codes_beyond_the_layout_are_refused_before_they_are_decoded():
    trail = [layout(8, align=8), {"kind": "blockwise", "format": "int8", "block": 8}]
    data = assemble([("scales", "BF16", [9], b"\x80\x3f" * 9), ("codes", "U8", [72], bytes(72))], trail)
    with pytest.raises(PacketError, match="do not fit"):
        receive(data)


LAYOUTS = {
    "one slice twice": [["w", [0], [4]], ["w", [0], [4]]],
    "offset of another rank": [["w", [0, 0], [8]]],
    "negative shape": [["w", [0], [-8]]],
    "boolean": [["w", [0], [True]]],
    "nameless": [[None, [0], [8]]],
    "overflow": [["w", [0, 0], [2**40, 2**40]]],
    "overflow of nothing": [["w", [0, 0], [0, 2**60]]],
    "too short": [["w", [0], [7]]],
    "too long": [["w", [0], [9]]],
    "not rows": ["abc"],
    "not a list": {"w": 8},
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_impossible_layouts_are_refused(name):
    trail = [{"kind": "layout", "align": 1, "slices": LAYOUTS[name]}]
    assert refused(assemble([("values", "F32", [8], bytes(32))], trail))


@pytest.mark.parametrize(
    "trail", [[], [{"kind": "zstd", "arrays": []}], [layout(8), layout(8)]], ids=["none", "late", "twice"]
)
def test_the_trail_begins_with_one_layout(trail):
    assert refused(assemble([("values", "F32", [8], bytes(32))], trail))


def test_extra_arrays_are_refused():
    assert refused(assemble([("values", "F32", [8], bytes(32)), ("more", "U8", [1], b"x")], [layout(8)]))


def test_a_packet_that_never_crossed_the_wire_is_checked_too():
    with pytest.raises(PacketError, match="does not begin with a layout"):
        decode(Packet({}), max_elements=8)
