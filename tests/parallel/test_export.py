from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, Ranks

from nebula.config import Model
from nebula.errors import PacketError
from nebula.models.init import initial, parameter_shapes
from nebula.parallel import mesh
from nebula.parallel.apply import build
from nebula.parallel.export import by_name, placed, region, slices
from nebula.types import Slice

# Sizes that neither 2 nor 3 ranks divide evenly, and one dim smaller than 3 ranks.
CFG = Model(vocab=251, layers=2, dim=32, heads=4, kv_heads=2, ffn_dim=40, experts=2, top_k=1, dense_layers=1)


def exported(rank: Rank, address: str) -> list[tuple[Slice, np.ndarray]]:
    group = mesh.join(address, rank.memory.pop("store", None), rank.rank, rank.world, torch.device("cpu"))
    model = build(CFG, 3, group, "fp32")
    parts = [(where, view.numpy().copy()) for where, view in slices(model).values()]
    for name, (_, view) in slices(model).items():
        shadow = placed(view.clone(), model.get_parameter(name), group.host)
        assert shadow.shape == model.get_parameter(name).shape
        view.fill_(5.0)
    for parameter in model.parameters():
        whole = parameter.detach() if group.mesh is None else parameter.detach().full_tensor()
        assert bool((whole == 5.0).all()), "a slice must be a view of the model's storage"
    group.leave()
    return parts


def door(rank: Rank) -> str:
    address, rank.memory["store"] = mesh.open_store()
    return address


@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_tile_every_parameter(ranks: Ranks, world: int) -> None:
    address = ranks.run(door, world=1)[0] if world > 1 else ""
    parts = by_name({w: torch.from_numpy(v) for part in ranks.run(exported, address, world=world) for w, v in part})
    shapes = parameter_shapes(CFG)
    assert parts.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert all(values.numel() for _, values in parts[name])
        whole = region(Slice(name, (0,) * len(shape), shape), parts[name])
        assert torch.equal(whole, initial(name, shape, CFG, 3)), name


boxes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None, max_examples=60)
@given(shape=boxes, cuts=boxes, low=st.tuples(st.integers(0, 5), st.integers(0, 5)), size=boxes, drop=st.booleans())
def test_region_cuts_any_box_out_of_any_tiling(shape, cuts, low, size, drop) -> None:  # type: ignore[no-untyped-def]
    whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    rows, columns = ([*range(0, n, cut), n] for n, cut in zip(shape, cuts, strict=True))
    pieces = [
        (Slice("w", (a, c), (b - a, d - c)), whole[a:b, c:d])
        for (a, b), (c, d) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns))
    ]
    offset = tuple(min(i, n - 1) for i, n in zip(low, shape, strict=True))
    extent = tuple(min(s, n - o) for s, n, o in zip(size, shape, offset, strict=True))
    wanted = Slice("w", offset, extent)
    expected = whole[offset[0] : offset[0] + extent[0], offset[1] : offset[1] + extent[1]]
    if drop:
        missing = expected.flatten()[0].item()
        holed = [(where, values) for where, values in pieces if missing not in values]
        with pytest.raises(PacketError, match="no piece covers"):
            region(wanted, holed)
        with pytest.raises(PacketError, match="overlap"):
            region(wanted, [*pieces, *pieces])
    else:
        assert torch.equal(region(wanted, pieces), expected)


def test_region_refuses_a_piece_of_another_rank() -> None:
    with pytest.raises(PacketError, match="2 dims"):
        region(Slice("w", (0, 0), (2, 2)), [(Slice("w", (0,), (4,)), torch.zeros(4))])
