from __future__ import annotations

import pytest
import torch

from nebula import config
from nebula.models.init import count, initial, parameter_shapes

CFG = config.Model(vocab=512, layers=2, dim=64, heads=4, kv_heads=2, ffn_dim=96, experts=4, top_k=2, dense_layers=1)


GOLDEN = ["0x1.034af40000000p-3", "0x1.1953ee0000000p-2", "-0x1.01df5c0000000p-3"]


def test_values_depend_on_seed_and_name_alone():
    shapes = parameter_shapes(CFG)
    forward = {name: initial(name, shape, CFG, 7) for name, shape in shapes.items()}
    torch.manual_seed(123)
    backward = {name: initial(name, shape, CFG, 7) for name, shape in reversed(shapes.items())}
    assert all(torch.equal(forward[name], backward[name]) for name in shapes)
    q, k = "blocks.0.attention.wq.weight", "blocks.1.attention.wq.weight"
    assert not torch.equal(forward[q], forward[k])
    assert not torch.equal(forward[q], initial(q, shapes[q], CFG, 8))


def test_the_bits_are_fixed_for_ever():
    """Clusters of different releases and processors start from the same parameters, so these may not change."""
    values = initial("head.weight", (2, 64), CFG, 0)
    assert values.dtype == torch.float32
    assert [v.hex() for v in values[1, :3].tolist()] == GOLDEN


def test_scale():
    shapes = parameter_shapes(CFG)
    values = {name: initial(name, shape, CFG, 0) for name, shape in shapes.items()}
    for name, value in values.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
    for name, expected in DEVIATIONS.items():
        value = values[f"blocks.1.{name}"]
        assert float(value.std()) == pytest.approx(expected, rel=0.1), name
        assert abs(float(value.mean())) < 0.1 * expected, name


DEVIATIONS = {
    "attention.wq.weight": 64**-0.5,
    "attention.wo.weight": 64**-0.5 / 2,
    "ffn.w1_EDF": 64**-0.5,
    "ffn.w3_EDF": 64**-0.5,
    "ffn.w2_EFD": 96**-0.5 / 2,
}


def test_count_is_the_sum_of_all_parts():
    attention = 64 * 64 * 2 + 64 * 32 * 2
    dense, mixture = 3 * 64 * 192, 4 * 3 * 64 * 96 + 4 * 64
    assert count(CFG) == 2 * 512 * 64 + 5 * 64 + 2 * attention + dense + mixture
