from __future__ import annotations

import math

import pytest

from nebula.config import Blockwise, Codec, LowRank, Minifloat, Model, RandomK, TopK, Zstd
from nebula.metrics import units
from nebula.metrics.flops import active_parameters, bits_per_parameter, data_parallel_bytes, flops_per_token
from nebula.models.init import parameter_shapes


@pytest.mark.parametrize(
    "model",
    [Model(experts=2, top_k=2, dense_layers=0), Model(dense_layers=4, kv_heads=2), Model(experts=2, top_k=2, dim=64)],
)
def test_where_every_expert_is_used_every_matrix_but_the_embedding_is_active(model):
    shapes = parameter_shapes(model)
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name != "embed.weight")
    assert active_parameters(model) == matrices


def test_more_experts_cost_only_their_router():
    few, many = Model(experts=4), Model(experts=8)
    assert active_parameters(many) - active_parameters(few) == 3 * 256 * 4


def test_flops_grow_with_the_context_by_attention_alone():
    model = Model()
    assert flops_per_token(model, 0) == 6 * active_parameters(model)
    assert flops_per_token(model, 512) - flops_per_token(model, 256) == 6 * 4 * 256 * 256


def test_wan_figures():
    assert data_parallel_bytes(1000, 20, 2) == 2 * 1000 * 2 * 20 * 2


@pytest.mark.parametrize(
    ("steps", "bits"),
    [
        ((), 32),
        ((Zstd(),), 32),
        ((Blockwise(bits=4, block=64), Zstd()), 4.25),
        ((Minifloat(format="fp8", block=32),), 8.5),
        ((Minifloat(format="bf16"), Zstd()), 16),
        ((RandomK(bits=8, block=4096, keep=64),), (64 * 8 + 16) / 4096),
        ((TopK(bits=2, block=16, keep=8),), (8 * 2 + 32 + math.log2(math.comb(16, 8))) / 16),
        ((LowRank(rank=4),), 16 * 4 * (256 + 256) / 256**2),
        ((LowRank(rank=1024),), 32),
    ],
)
def test_bits_per_parameter(steps, bits):
    assert bits_per_parameter(Codec(steps=steps), Model(dim=256)) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(999.9), "1.00 kB"),
        (units.size(1_234_567), "1.23 MB"),
        (units.size(99_960_000), "100 MB"),
        (units.amount(81_920), "81.9 k"),
        (units.amount(12), "12"),
        (units.duration(3.14), "3.1 s"),
        (units.duration(59.7), "1 min 00 s"),
        (units.duration(125), "2 min 05 s"),
        (units.duration(3725), "1 h 02 min"),
        (units.share(0.0412), "4 %"),
        (units.times(7.61), "7.6×"),
        (units.loss(1.23456), "1.235"),
    ],
)
def test_units(text, told):
    assert text == told


@pytest.mark.parametrize("show", [units.size, units.amount, units.duration, units.share, units.times, units.loss])
def test_what_is_not_known_is_a_dash(show):
    assert {show(None), show(math.nan), show(math.inf)} == {units.NOTHING}
