"""Honest packets in every form that a recipe may name, for attacks to start from, and packets from any parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal, get_args, get_origin

import torch
import zstandard

from nebula import config
from nebula.proto.v1.packet_pb2 import ArraySpec, PacketHeader
from nebula.types import Slice
from nebula.wan.codec import Encoder
from nebula.wan.frame import MAGIC, PREAMBLE, VERSION, pack

SLICES = Slice("layers.0.attention.wq", (0, 0), (20, 25)), Slice("norm", (4,), (100,))


def honest(
    *steps: config.CodecStep, slices: Sequence[Slice] = SLICES, last: Mapping[Slice, torch.Tensor] | None = None
) -> bytes:
    generator = torch.Generator().manual_seed(0)
    tensors = {where: torch.randn(where.shape, generator=generator) for where in slices}
    return pack(Encoder(config.Codec(steps=steps)).encode(tensors, last))


def variants(kind: type[config.Config]) -> list[config.CodecStep]:
    """A step for each combination of what its literal fields may be; other fields keep their defaults."""
    literal = {
        name: get_args(field.annotation)
        for name, field in kind.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    return [kind(**dict(zip(literal, values, strict=True))) for values in product(*literal.values())]


STEPS = [step for kind in get_args(get_args(config.CodecStep)[0]) for step in variants(kind)]
"""Every kind of step that a recipe may name, in all its formats."""


def assemble(arrays: Sequence[tuple[str, str, list[int], bytes]], trail: object) -> bytes:
    """Whatever the header then says: nothing is checked but what protobuf itself refuses (ValueError, TypeError)."""
    text = json.dumps(trail).encode()
    header = PacketHeader(
        version=VERSION,
        arrays=[ArraySpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape, _ in arrays],
        trail=zstandard.ZstdCompressor(write_content_size=True).compress(text),
        trail_size=len(text),
    ).SerializeToString()
    return PREAMBLE.pack(MAGIC, len(header)) + header + b"".join(data for *_, data in arrays)
