"""The layout-free digest: same for every layout, different after any accident."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nebula.types import Slice
from nebula.wan import digest
from nebula.wan.digest import fragment_digest, global_digest, lanes

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 2**16)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(tensor: torch.Tensor) -> tuple[int, int]:
    return lanes(tensor, Slice("w", (0,) * tensor.ndim, tuple(tensor.shape)))


def weight(lane: int, axis: int, index: int) -> int:
    """splitmix64, written a second time, from its definition."""
    state = ((((2 * axis + lane) << 48) + index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return (state ^ (state >> 31)) | 1


def test_lanes_are_the_sum_that_the_docstring_states():
    x, offset = random((3, 2, 4), 0), (5, 0, 9)
    expected = []
    for lane in (0, 1):
        total = 0
        for index in itertools.product(*map(range, x.shape)):
            term = x[index].view(torch.int32).item()
            for axis, i in enumerate(index):
                term *= weight(lane, axis, offset[axis] + i)
            total += term
        expected.append(total % 2**64)
    assert lanes(x, Slice("w", offset, (3, 2, 4))) == tuple(expected)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds, data=st.data())
def test_any_tiling_gives_the_same_digest(shape, seed, data):
    x = random(shape, seed)
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set()))) for n in shape]
    edges = [list(itertools.pairwise([0, *cut, n])) for cut, n in zip(cuts, shape, strict=True)]
    parts = []
    for box in data.draw(st.permutations(list(itertools.product(*edges)))):
        piece = x[tuple(slice(low, high) for low, high in box)]
        where = Slice("w", tuple(low for low, _ in box), tuple(piece.shape))
        parts.append({"w": lanes(piece, where)})
    assert fragment_digest(parts) == fragment_digest([{"w": whole(x)}])


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds, bit=st.integers(0, 31), data=st.data())
def test_any_flipped_bit_shows(shape, seed, bit, data):
    x = random(shape, seed)
    flipped = x.clone()
    index = data.draw(st.integers(0, x.numel() - 1))
    flipped.view(torch.int32).view(-1)[index] ^= (1 << bit) - (2**32 if bit == 31 else 0)
    first, second = whole(x), whole(flipped)
    assert first[0] != second[0]
    assert first[1] != second[1]


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds, axis=st.integers(0, 2), data=st.data())
def test_swapped_rows_and_elements_show(shape, seed, axis, data):
    assume(axis < len(shape) and shape[axis] > 1)
    x = random(shape, seed)
    order = data.draw(st.permutations(range(shape[axis])))
    assume(order != sorted(order))
    assert whole(x) != whole(x.index_select(axis, torch.tensor(order)))
    flat = x.flatten().clone()
    flat[[0, -1]] = flat[[-1, 0]]
    assert whole(x) != whole(flat.view(shape))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds, data=st.data())
def test_lost_signs_show(shape, seed, data):
    x = random(shape, seed)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.numel(), max_size=x.numel()))).view(shape)
    assume(bool(mask.any()))
    assert whole(x) != whole(torch.where(mask, -x, x))
    assert whole(x) != whole(-x)


def test_negative_zero_and_a_shifted_offset_show():
    x = random((4, 4), 0)
    assert whole(torch.zeros(2)) != whole(torch.tensor([0.0, -0.0]))
    assert lanes(x, Slice("w", (0, 4), (4, 4))) != lanes(x, Slice("w", (4, 0), (4, 4)))
    assert whole(x) != whole(x.t())


def test_scalars_empty_slices_and_strides():
    assert whole(torch.tensor(1.0)) == (0x3F800000, 0x3F800000)
    assert lanes(torch.empty(0, 3), Slice("w", (7, 0), (0, 3))) == (0, 0)
    x = random((6, 5), 3)
    assert whole(x.t()) == whole(x.t().contiguous())


@pytest.mark.parametrize("shape", [(40, 33), (1, 1300), (1300,), (1300, 1), (2, 3, 220)])
def test_chunks_bound_the_memory_and_change_nothing(shape, monkeypatch):
    x = random(shape, 1)
    expected = whole(x)
    monkeypatch.setattr(digest, "CHUNK", 64)
    sizes = [piece.numel() for piece, _ in digest._chunks(x, (0,) * x.ndim)]
    assert max(sizes) <= 64
    assert sum(sizes) == x.numel()
    assert whole(x) == expected


def test_digests_are_pinned():
    """Every cluster of a run must compute the same: a change here is a change of the protocol."""
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([1.0, -2.0])
    fragment = fragment_digest([{"a": whole(a)}, {"b": whole(b)}])
    assert fragment == fragment_digest([{"b": whole(b), "a": whole(a)}])
    assert fragment == "sha256:8d47a37514ca4f7bfdfe01017e7fa3cdf63b9abcbc38b119a0bf3a1aabb1697d"
    assert global_digest({"x": fragment, "y": "sha256:0"}) == global_digest({"y": "sha256:0", "x": fragment})
    assert global_digest({"x": fragment}) == "sha256:d9bc1cd24590bb6d98fd417841b1d92a68bcf7cc5babf7685b8a0f47d62edd97"


def test_names_count():
    a, b = whole(torch.ones(2)), whole(torch.zeros(2))
    assert fragment_digest([{"a": a, "b": b}]) != fragment_digest([{"a": b, "b": a}])
    assert global_digest({"x": "1", "y": "2"}) != global_digest({"x": "2", "y": "1"})


def test_an_agent_needs_no_torch():
    code = "import nebula.wan.digest, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
