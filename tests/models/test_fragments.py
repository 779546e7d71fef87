from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.models.fragments import fragments
from nebula.models.init import parameter_shapes

LAYERS = st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=25)
@given(LAYERS)
def test_every_parameter_is_in_exactly_one_fragment_in_order(sizes):
    layers, count = sizes
    cfg = config.Model(vocab=8, layers=layers, dim=8, heads=1, kv_heads=1, ffn_dim=8, dense_layers=0)
    names = list(parameter_shapes(cfg))
    parts = fragments(names, layers, count)
    assert list(parts) == [f"f{i}" for i in range(count)]
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert all(list(part) == [name for name in names if name in part] for part in parts.values())
    for name in names:
        if name.startswith("blocks."):
            assert name in parts[f"f{int(name.split('.')[1]) % count}"]


def test_the_ends_of_the_model():
    parts = fragments(["embed.weight", "blocks.0.x", "blocks.1.x", "blocks.2.x", "norm.weight", "head.weight"], 3, 2)
    assert parts == {
        "f0": ("embed.weight", "blocks.0.x", "blocks.2.x"),
        "f1": ("blocks.1.x", "norm.weight", "head.weight"),
    }
