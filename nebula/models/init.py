"""Initial parameters, and the shapes of all of them.

Each parameter is a function of (seed, name) alone: any rank makes its own slices without the rest of the model, and
every cluster starts from the same bits. NumPy draws them because torch's normals differ in the last bit between
processors.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from nebula import config
from nebula.models.transformer import Transformer


def initial(name: str, shape: tuple[int, ...], cfg: config.Model, seed: int) -> Tensor:
    """The fp32 CPU values of one parameter: ones for a norm, else normal, see `_deviation`."""
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(_deviation(name, shape, cfg))


def _deviation(name: str, shape: tuple[int, ...], cfg: config.Model) -> float:
    """1/√(inputs summed), which keeps variance from layer to layer; for the embedding 1/√dim. What writes into the
    residual stream, twice per layer, gets that over √(2 · layers), so that the stream does not grow with depth
    (GPT-2, section 2.3)."""
    inputs = shape[-2] if name.endswith(("_EDF", "_EFD")) else shape[-1]
    writes = name.endswith(("attention.wo.weight", "ffn.w2_EFD"))
    return 1 / math.sqrt(inputs * (2 * cfg.layers if writes else 1))


def parameter_shapes(cfg: config.Model) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in model order. Allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(cfg).named_parameters()}


def count(cfg: config.Model) -> int:
    """Parameters of the whole model."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())
