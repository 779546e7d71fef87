"""How good a codec is: bits on the wire, error, speed. What `nebula bench codec` and benchmarks/codec.py share.

Bits are per parameter, and counted: the packet as `frame.pack` makes it (header, trail, arrays), sealed by a real
channel; of each sealed frame its tag, its other fields and gRPC's prefix of five bytes. Not counted: TLS, HTTP/2 and
TCP, which benchmarks/bytes.py sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import e, inf, log2, pi
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nebula import config
from nebula.security.seal import SealedChannel
from nebula.types import COORDINATOR, Slice
from nebula.wan.codec.layout import read
from nebula.wan.codec.pipeline import Encoder, decode
from nebula.wan.frame import pack, unpack

Tensors = Mapping[Slice, Tensor]
T = TypeVar("T")

CODECS: Mapping[str, config.Codec] = {
    **{f"{b:g} b": config.Codec(steps=(config.Adaptive(bits=b),)) for b in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)},
    "bf16": config.Codec(steps=(config.Minifloat(format="bf16"), config.Zstd())),
    "int8/256": config.Codec(steps=(config.Blockwise(bits=8, block=256), config.Zstd())),
    "fp8/64": config.Codec(steps=(config.Minifloat(format="fp8"), config.Zstd())),
    "int4/64": config.Codec(steps=(config.Blockwise(bits=4), config.Zstd())),
    "int4/64, no zstd": config.Codec(steps=(config.Blockwise(bits=4),)),
    "E3M0/64": config.Codec(steps=(config.Minifloat(), config.Zstd())),
    "2 bit/64": config.Codec(steps=(config.Blockwise(bits=2),)),
    "1 bit/64": config.Codec(steps=(config.Blockwise(bits=1),)),
    "low rank 8": config.Codec(steps=(config.LowRank(),)),
    "top 64/4096": config.Codec(steps=(config.TopK(),)),
    "random 64/4096": config.Codec(steps=(config.RandomK(bits=2),)),
}
"""Nebula's, by the names that tables give them."""

VALUES = {"values", "codes", "kept", "factors", "rest"}
"""Arrays that say what the values are."""

SUPPORT = {"support", "low", "high"}
"""Arrays that say where they are, in sparse formats. All else on the wire is metadata."""

GRPC_PREFIX = 5
"""Bytes before each message of a stream."""

WIDTH = 1024
"""Columns of the arrays that are made up here: formats of low rank want matrices."""


class Coder(Protocol):
    """Turns tensors into something to send, and back. `sizes`: the bytes of that, by part."""

    def encode(self, tensors: Tensors) -> Any: ...
    def decode(self, sent: Any) -> Tensors: ...
    def sizes(self, sent: Any) -> dict[str, int]: ...


class Wire:
    """A codec of Nebula's, up to the bytes that are sealed, without error feedback."""

    def __init__(self, cfg: config.Codec) -> None:
        self._encoder = Encoder(cfg.model_copy(update={"feedback": None}))

    def encode(self, tensors: Tensors) -> bytes:
        return pack(self._encoder.encode(tensors))

    def decode(self, sent: bytes) -> Tensors:
        packet = unpack(sent, max_bytes=len(sent))
        return decode(packet, max_elements=read(packet).elements)

    def sizes(self, sent: bytes) -> dict[str, int]:
        """The arrays by their names, "header" and "sealing"."""
        arrays = {name: array.nbytes for name, array in unpack(sent, max_bytes=len(sent)).arrays.items()}
        return arrays | {"header": len(sent) - sum(arrays.values()), "sealing": sealed_bytes(sent) - len(sent)}


def sealed_bytes(payload: bytes) -> int:
    """Of all messages that carry a payload."""
    digest = "sha256:" + 64 * "0"
    channel = SealedChannel(bytes(32), source="north", destination=COORDINATOR, epoch=1, agreement=digest, seals=True)
    return sum(frame.ByteSize() + GRPC_PREFIX for frame in channel.seal(payload, context=b"payload"))


# --- what it is measured on ---------------------------------------------------------------------------------------


def gaussian(elements: int, seed: int = 0) -> dict[Slice, Tensor]:
    """Of unit variance, in one matrix; `elements` is rounded up to whole rows."""
    shape = (-(-elements // WIDTH), WIDTH)
    return {Slice("w", (0, 0), shape): torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def laplace(elements: int, seed: int = 0) -> dict[Slice, Tensor]:
    """As `gaussian`, its values moved quantile by quantile: P(|X| > t) = exp(−√2·t), so |x| = −log(P(|Z| > |z|)) / √2.
    Kurtosis 6, where a Gaussian has 3."""
    return {
        where: (z.double().abs().mul_(0.5**0.5).erfc_().log_() * -(0.5**0.5)).float().copysign(z)
        for where, z in gaussian(elements, seed).items()
    }


# --- bits and error -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quality:
    """`parts`: bits per parameter, by part. `nmse`: |x − x̂|² / |x|². `kept`: share of values that are not zero."""

    parts: Mapping[str, float]
    nmse: float
    kept: float

    @property
    def bits(self) -> float:
        return sum(self.parts.values())

    def gap(self, deficit: float = 0.0) -> float:
        """Bits beyond what a source of independent values needs at this error; at least, if it has a `deficit`."""
        return self.bits - shannon(self.nmse, deficit)

    @property
    def metadata(self) -> float:
        """Share of the bits that carry neither values nor support: scales, tables, headers, tags."""
        return 1 - sum(bits for part, bits in self.parts.items() if part in VALUES | SUPPORT) / self.bits

    @property
    def support(self) -> float | None:
        """Bits of the support over its entropy, in formats that send one."""
        sent = [bits for part, bits in self.parts.items() if part in SUPPORT]
        return sum(sent) / support_entropy(self.kept) if sent else None


def quality(coder: Coder, tensors: Tensors) -> Quality:
    sent = coder.encode(tensors)
    decoded = coder.decode(sent)
    count = sum(x.numel() for x in tensors.values())
    lost = sum(float((x - decoded[where]).double().square().sum()) for where, x in tensors.items())
    power = sum(float(x.double().square().sum()) for x in tensors.values())
    kept = sum(int(x.count_nonzero()) for x in decoded.values()) / count
    return Quality({part: 8 * size / count for part, size in coder.sizes(sent).items()}, lost / power, kept)


LAPLACE_DEFICIT = 0.5 * log2(pi / e)
"""By how much the differential entropy of a Laplace source is below that of a Gaussian one, bits."""


def shannon(nmse: float, deficit: float = 0.0) -> float:
    """Shannon's lower bound, ½·log2(1 / D) − `deficit`, bits; a Gaussian source, which has none, attains it."""
    return max(0.0, -0.5 * log2(nmse) - deficit) if nmse else inf


def support_entropy(kept: float) -> float:
    """Bits per parameter that saying which share is kept needs, if all places are equally likely."""
    return -sum(share * log2(share) for share in (kept, 1 - kept) if share)


# --- speed --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds, one per turn. `clone`: torch.clone of the same tensors, just before."""

    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    clone: list[float] = field(default_factory=list)


def speeds(coders: Mapping[str, Coder], tensors: Tensors, turns: int) -> dict[str, Speed]:
    """On one thread. A first turn warms up and does not count; the order rotates by one each turn, so that what else
    the machine does hits all of them."""
    names = list(coders)
    taken = {name: Speed() for name in names}
    with one_thread():
        for turn in range(turns + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                clone, _ = timed(partial(clones, tensors))
                encode, sent = timed(partial(coders[name].encode, tensors))
                decode, _ = timed(partial(coders[name].decode, sent))
                if turn:
                    taken[name].clone.append(clone)
                    taken[name].encode.append(encode)
                    taken[name].decode.append(decode)
    return taken


def clones(tensors: Tensors) -> list[Tensor]:
    return [x.clone() for x in tensors.values()]


def timed(act: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = act()
    return time.perf_counter() - begun, result


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
