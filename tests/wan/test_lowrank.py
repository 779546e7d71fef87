"""PowerSGD: what it finds, what it sends, and that decoding is the same sum everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.errors import PacketError
from nebula.types import Packet, Slice
from nebula.wan.codec import Encoder, decode
from nebula.wan.codec.layout import flatten
from nebula.wan.codec.lowrank import LowRank


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(x: torch.Tensor, rank: int, iterations: int = 2) -> Packet:
    return LowRank(rank, iterations).encode(flatten({Slice("w", (0,) * x.ndim, tuple(x.shape)): x}, 1))


def error(x: torch.Tensor, packet: Packet) -> float:
    values = LowRank.decode(packet).arrays["values"].view(x.shape)
    return float((x - values).square().sum() / x.square().sum())


def test_a_matrix_of_that_rank_is_found():
    assert error(randn(60, 3) @ randn(3, 50, seed=1), encoded(randn(60, 3) @ randn(3, 50, seed=1), 3)) < 1e-4


@pytest.mark.parametrize("exponent", [-100, -70, 60, 90])
def test_no_magnitude_is_too_small_or_too_large(exponent):
    x = randn(60, 3) @ randn(3, 50, seed=1)
    packet = encoded(x * 2.0**exponent, 3)
    values = LowRank.decode(packet).arrays["values"].view(60, 50) / 2.0**exponent
    assert float((x - values).square().sum() / x.square().sum()) < 1e-4


def test_two_iterations_are_near_the_best_of_that_rank_and_one_is_not():
    x = randn(200, 16) @ torch.diag(torch.logspace(1.5, 0.3, 16)) @ randn(16, 150, seed=1) + 2 * randn(200, 150, seed=2)
    singular = torch.linalg.svdvals(x).square()
    best = float(singular[8:].sum() / singular.sum())
    assert best < error(x, encoded(x, 8)) < 1.3 * best
    assert error(x, encoded(x, 8, iterations=1)) > 2 * best


@pytest.mark.parametrize(
    ("shape", "rank", "factors"),
    [
        ((60, 50), 4, 4 * 110),
        ((8, 20, 30), 4, 4 * (160 + 30)),  # rows 8·20 and columns 30, not 8 and 600
        ((2, 3, 4, 50), 4, 4 * (24 + 50)),
        ((50,), 4, 0),
        ((), 4, 0),
        ((4, 1000), 4, 0),
        ((0, 10), 1, 0),
        ((8, 8), 4, 0),
        ((9, 9), 4, 4 * 18),
    ],
)
def test_what_is_sent(shape, rank, factors):
    x = randn(*shape)
    packet = encoded(x, rank)
    assert packet.arrays["factors"].numel() == factors
    assert packet.arrays["rest"].numel() == (0 if factors else x.numel())
    assert sum(y.nbytes for y in packet.arrays.values()) == 2 * factors + (0 if factors else 4 * x.numel())


def test_vectors_arrive_exactly_among_matrices():
    tensors = {Slice("a", (0,), (5,)): randn(5), Slice("b", (0, 0), (20, 20)): randn(20, 20)}
    tensors |= {Slice("c", (0,), (7,)): randn(7, seed=1), Slice("d", (0,), (0,)): randn(0)}
    back = decode(Encoder(config.Codec(steps=(config.LowRank(rank=2),))).encode(tensors), max_elements=412)
    for where, x in tensors.items():
        assert torch.equal(back[where], x) == (where.name != "b")


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(12, 40), columns=st.integers(12, 40), rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_products_are_summed_term_by_term_in_fp32(rows, columns, rank, seed):
    """NumPy, one multiplication and one addition at a time, gives the same bits."""
    packet = encoded(randn(rows, columns, seed=seed), rank)
    p, q = packet.arrays["factors"].float().split([rows * rank, columns * rank])
    p_RK, q_CK = p.view(rows, rank).numpy(), q.view(columns, rank).numpy()
    expected = np.zeros((rows, columns), dtype=np.float32)
    for k in range(rank):
        expected = expected + p_RK[:, k : k + 1] * q_CK[:, k]
    assert np.array_equal(LowRank.decode(packet).arrays["values"].view(rows, columns).numpy(), expected)


def test_equal_tensors_give_equal_packets():
    first, second = (encoded(randn(200, 100), 4).arrays["factors"] for _ in range(2))
    assert torch.equal(first, second)


def test_zeros_are_sent_as_zeros():
    assert not LowRank.decode(encoded(torch.zeros(20, 20), 2)).arrays["values"].any()


@pytest.mark.parametrize(("p", "q"), [(float("nan"), 1.0), (1.0, float("inf")), (1e20, 1e20), (3e38, 0.7)])
def test_factors_whose_product_leaves_fp32_are_refused(p, q):
    packet = encoded(randn(20, 20), 2)
    factors = torch.tensor([p] * 40 + [q] * 40).bfloat16()
    with pytest.raises(PacketError, match=r"not finite|not a number of fp32"):
        LowRank.decode(Packet({**packet.arrays, "factors": factors}, packet.trail))


def test_other_values_that_are_not_finite_are_refused():
    packet = encoded(randn(20), 2)
    with pytest.raises(PacketError, match="not finite"):
        LowRank.decode(Packet({**packet.arrays, "rest": torch.full((20,), torch.nan)}, packet.trail))


@pytest.mark.parametrize(("factors", "rest"), [(79, 0), (81, 0), (80, 1), (0, 400)])
def test_arrays_of_another_size_are_refused(factors, rest):
    packet = encoded(randn(20, 20), 2)
    arrays = {"factors": torch.zeros(factors, dtype=torch.bfloat16), "rest": torch.zeros(rest)}
    with pytest.raises(PacketError, match="do not fit a layout of rank 2"):
        LowRank.decode(Packet(arrays, packet.trail))
