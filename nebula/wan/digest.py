"""A digest of parameters that does not depend on how they are laid out over ranks and clusters.

For a global tensor x and lane l ∈ {0, 1}

    S_l(x) = Σ_i bits(x_i) · Π_d A_{l,d}(i_d)   mod 2⁶⁴

where bits() is the fp32 pattern as a signed integer, i_d the *global* index along axis d, and A_{l,d}(i) an odd
pseudo-random 64-bit weight. Sums over slices that tile the tensor add up to the sum over the tensor, so each rank
contributes what it holds and no rank gathers anything; integer sums do not depend on their order or on the device.
Weights depend on positions only; the names of the tensors enter when the sums are hashed.

It guards against accidents: clusters that drifted apart by a bit, a slice applied at the wrong place, rows swapped,
a sign lost, a rank left out. An odd weight makes any single changed element visible for certain. Other accidents go
unseen with a probability of about 2⁻¹²⁸, of at most about 2⁻⁵⁰ if nothing but signs differ. It is *not* a MAC: whoever
knows the weights can build two models with one digest. Integrity against an adversary is the seal's job (design.md §7).

torch is imported only where a tensor is at hand, so that an agent can combine the sums without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nebula.types import Slice

if TYPE_CHECKING:
    from torch import Tensor

Lanes: TypeAlias = tuple[int, int]
"""(S_0, S_1), each in [0, 2⁶⁴)."""

CHUNK = 1 << 16
"""Elements summed at a time; bounds the extra memory to a few MB."""

_MASK = 2**64 - 1


def lanes(tensor: Tensor, where: Slice) -> Lanes:
    """The sums over one slice of fp32 parameters, on any device. 0-dim and empty slices are fine."""
    import torch

    assert tensor.dtype is torch.float32, f"{where} is {tensor.dtype}"
    assert tensor.shape == where.shape, f"{where} comes with {tuple(tensor.shape)}"
    total_L = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for piece, offset in _chunks(tensor.detach(), where.offset):
        bits = piece.contiguous().view(torch.int32).to(torch.int64)
        total_L += _contract(bits, offset)
    first, second = total_L.tolist()
    return first & _MASK, second & _MASK


def fragment_digest(parts: Iterable[Mapping[str, Lanes]]) -> str:
    """Add up what the ranks hold (by parameter name, each element from exactly one rank) and hash the sums."""
    sums: dict[str, Lanes] = {}
    for part in parts:
        for name, (first, second) in part.items():
            known = sums.get(name, (0, 0))
            sums[name] = ((known[0] + first) & _MASK, (known[1] + second) & _MASK)
    return _sha256(sums)


def global_digest(fragments: Mapping[str, str]) -> str:
    """One digest for the model, from the digest of each fragment by name."""
    return _sha256(fragments)


def _sha256(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def _chunks(tensor: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Boxes of at most CHUNK elements with their global offsets: halves of the first axis that can be cut."""
    if tensor.numel() <= CHUNK:
        yield tensor, offset
        return
    axis = next(d for d, size in enumerate(tensor.shape) if size > 1)
    half = tensor.shape[axis] // 2
    yield from _chunks(tensor.narrow(axis, 0, half), offset)
    shifted = (*offset[:axis], offset[axis] + half, *offset[axis + 1 :])
    yield from _chunks(tensor.narrow(axis, half, tensor.shape[axis] - half), shifted)


def _contract(bits: Tensor, offset: tuple[int, ...]) -> Tensor:
    """[2] Σ bits · Π weights by lane, one axis at a time from the last; int64 wraps, which is mod 2⁶⁴."""
    import torch

    sums = bits.expand(2, *bits.shape)
    for axis in reversed(range(bits.ndim)):
        weights_LN = torch.from_numpy(_weights(axis, offset[axis], bits.shape[axis])).to(bits.device)
        sums = (sums * weights_LN.view(2, *(1,) * axis, -1)).sum(-1)
    return sums


@lru_cache(maxsize=64)
def _weights(axis: int, start: int, count: int) -> NDArray[np.int64]:
    """[2, count] A_{l,axis}(start … start + count − 1) by lane l: splitmix64 of the index in a stream of its own per
    lane and axis."""
    streams_L1 = np.array([[2 * axis], [2 * axis + 1]], np.uint64) << np.uint64(48)  # global indices stay below 2⁴⁸
    places_N = np.arange(start, start + count, dtype=np.uint64)
    state = (streams_L1 + places_N + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) | np.uint64(1)).view(np.int64)
