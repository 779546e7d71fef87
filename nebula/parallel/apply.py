"""From a config to a model in its place. This one function owns the order, and the order is the architecture."""

from __future__ import annotations

import torch
from torch import nn

from nebula.config import Model
from nebula.models.init import initial
from nebula.models.transformer import Transformer
from nebula.parallel.export import slices
from nebula.parallel.mesh import Group
from nebula.parallel.shard import Precision, shard


def build(cfg: Model, seed: int, group: Group, precision: Precision) -> nn.Module:
    """meta → shard → allocate → initialise. No rank ever holds the whole model, and the initial parameters depend on
    (cfg, seed) alone: the same on every layout and every cluster."""
    with torch.device("meta"):
        model: nn.Module = Transformer(cfg)
    if group.mesh is not None:
        shard(model, group.mesh, precision)
    model.to_empty(device=group.device)
    initialise(model, cfg, seed)
    return model


def initialise(model: nn.Module, cfg: Model, seed: int) -> None:
    """Write version 0, one parameter at a time: the extra memory is the largest single parameter, on the host."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, (where, view) in slices(model).items():
        whole = initial(name, shapes[name], cfg, seed)
        part = tuple(slice(start, start + size) for start, size in zip(where.offset, where.shape, strict=True))
        view.copy_(whole[part])
