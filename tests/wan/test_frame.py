"""Packets as bytes."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import PacketError
from nebula.proto.v1.packet_pb2 import ArraySpec, PacketHeader
from nebula.types import Packet
from nebula.wan.codec import wire
from nebula.wan.frame import MAGIC, MAX_ARRAYS, MAX_HEADER, PREAMBLE, VERSION, pack, unpack

LIMIT = 1 << 24
TRAIL = ({"kind": "layout", "align": 8, "slices": [["a.b", [0, 1], [2, 3]]]}, {"kind": "zstd", "arrays": []})

dtypes = st.sampled_from(sorted(wire.DTYPES))
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def raw(header: PacketHeader | bytes, body: bytes = b"", *, magic: bytes = MAGIC, length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else header.SerializeToString()
    return PREAMBLE.pack(magic, len(data) if length is None else length) + data + body


def header(
    *specs: tuple[str, str, list[int]], trail: bytes = b"[]", size: int | None = None, version: int = VERSION
) -> PacketHeader:
    return PacketHeader(
        version=version,
        arrays=[ArraySpec(name=n, dtype=d, shape=s) for n, d, s in specs],
        trail=zstandard.ZstdCompressor(write_content_size=True).compress(trail),
        trail_size=len(trail) if size is None else size,
    )


@settings(deadline=None, max_examples=60)
@given(specs=st.lists(st.tuples(dtypes, shapes), max_size=6), seed=st.integers(0, 999), writable=st.booleans())
def test_a_packet_survives_the_wire(specs, seed, writable):
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for index, (name, shape) in enumerate(specs):
        dtype = wire.DTYPES[name]
        count = wire.numel(shape) * dtype.itemsize
        # Every bit pattern is legal, NaN included: a packet carries bits.
        bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        arrays[f"x{index}"] = bits.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    data = pack(Packet(arrays, TRAIL))
    back = unpack(bytearray(data) if writable else data, max_bytes=LIMIT)
    assert back.trail == TRAIL
    assert back.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)
        assert bytes(wire.as_bytes(back.arrays[name])) == bytes(wire.as_bytes(array))
    assert pack(back) == data


def test_the_same_packet_gives_the_same_bytes_whatever_the_order_of_its_arrays():
    a, b = torch.arange(3.0), torch.arange(4, dtype=torch.uint8)
    assert pack(Packet({"a": a, "b": b})) == pack(Packet({"b": b, "a": a}))


def test_strided_arrays_are_packed_by_value():
    x = torch.arange(12.0).view(3, 4)
    back = unpack(pack(Packet({"x": x.t()})), max_bytes=LIMIT)
    assert torch.equal(back.arrays["x"], x.t())


def test_writable_memory_is_viewed_not_copied():
    body = torch.arange(64, dtype=torch.float32)
    for pad in range(8):  # some start of the frame puts the arrays on an aligned address
        data = bytearray(pad) + pack(Packet({"x": body, "y": body.to(torch.uint8)}))
        view = memoryview(data)[pad:]
        arrays = unpack(view, max_bytes=LIMIT).arrays
        before = arrays["x"][-1].item()
        data[-64 - 4 : -64] = b"\0\0\0\0"  # the last value of x
        if arrays["x"][-1].item() != before:
            return
    pytest.fail("unpack copied a writable, aligned buffer")


def test_arrays_are_aligned_wherever_the_data_lies():
    for pad in range(8):
        data = bytearray(pad) + pack(Packet({"x": torch.ones(5), "y": torch.ones(3).bfloat16()}))
        arrays = unpack(memoryview(data)[pad:], max_bytes=LIMIT).arrays
        assert all(array.data_ptr() % array.itemsize == 0 for array in arrays.values())


def test_read_only_memory_is_copied_without_a_warning():
    data = pack(Packet({"x": torch.ones(4)}))
    unpack(data, max_bytes=LIMIT).arrays["x"].zero_()
    assert unpack(data, max_bytes=LIMIT).arrays["x"].tolist() == [1.0] * 4


BAD = {
    "nothing": b"",
    "short": MAGIC,
    "magic": raw(header(), magic=b"PK\x03\x04"),
    "pickle": b"\x80\x04\x95" + bytes(64),
    "header longer than the data": raw(header(), length=4000),
    "header longer than allowed": raw(b"\x1a\x00" * (MAX_HEADER // 2 + 1)),
    "header not protobuf": raw(b"\xff\xff\xff\xff"),
    "trail not UTF-8": raw(header(trail=b'[{"\xff\xfe": 1}]')),
    "no trail": raw(PacketHeader(version=VERSION)),
    "trail not compressed": raw(PacketHeader(version=VERSION, trail=b"[]", trail_size=2)),
    "trail longer than stated": raw(header(trail=b"[{}]", size=2)),
    "trail longer than allowed": raw(header(trail=b" " * MAX_HEADER + b"[]")),
    "version": raw(header(version=VERSION + 1)),
    "no version": raw(header(version=0)),
    "dtype": raw(header(("x", "F64", [1])), bytes(8)),
    "object dtype": raw(header(("x", "O", [1])), bytes(8)),
    "too few bytes": raw(header(("x", "F32", [2])), bytes(7)),
    "too many bytes": raw(header(("x", "F32", [2])), bytes(9)),
    "trailing bytes without arrays": raw(header(), b"x"),
    "overflowing shape": raw(header(("x", "U8", [2**32, 2**32]))),
    "overflowing shape of no elements": raw(header(("x", "U8", [0, 2**63, 2**63]))),
    "too many dims": raw(header(("x", "U8", [1] * 9)), bytes(1)),
    "one name twice": raw(header(("x", "U8", [1]), ("x", "U8", [1])), bytes(2)),
    "misaligned": raw(header(("x", "U8", [1]), ("y", "F32", [1])), bytes(5)),
    "too many arrays": raw(header(*((f"x{i}", "U8", [0]) for i in range(MAX_ARRAYS + 1)))),
    "trail not JSON": raw(header(trail=b"[{")),
    "trail not a list": raw(header(trail=b"{}")),
    "trail not of objects": raw(header(trail=b"[[]]")),
    "trail with NaN": raw(header(trail=b'[{"a": NaN}]')),
    "trail too deep": raw(header(trail=b"[" * 100_000)),
    "trail with an endless number": raw(header(trail=b'[{"a": ' + b"9" * 10_000 + b"}]")),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_malformed_packets_are_refused(name):
    with pytest.raises(PacketError):
        unpack(BAD[name], max_bytes=2 * MAX_HEADER)


def test_data_beyond_the_callers_bound_is_refused_unread():
    data = pack(Packet({"x": torch.ones(4)}))
    with pytest.raises(PacketError, match="are not a packet of"):
        unpack(data, max_bytes=len(data) - 1)


def test_the_refusal_of_a_version_names_the_supported_one():
    with pytest.raises(PacketError, match=f"packet version 9, supported: {VERSION}"):
        unpack(raw(header(version=9)), max_bytes=LIMIT)


def test_pack_refuses_what_unpack_would_refuse():
    with pytest.raises(PacketError, match="65 arrays"):
        pack(Packet({f"x{i}": torch.ones(1) for i in range(MAX_ARRAYS + 1)}))
    with pytest.raises(PacketError, match="trail of"):
        pack(Packet({}, ({"kind": "x" * MAX_HEADER},)))
