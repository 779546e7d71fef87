"""The outer optimizer: what becomes of the averaged delta."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nebula.config import Nesterov, OuterSGD

Tensors = Mapping[str, Tensor]


def outer_step(
    rule: Nesterov | OuterSGD, delta: Tensors, momentum: dict[str, Tensor], scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step on the mean delta (base − local), by full parameter name, fp32.

    Returns (update, momentum) with global ← global + update. Nesterov is torch's SGD form, as in DiLoCo
    (arXiv 2311.08105, Alg. 1): m ← μ·m + δ, update = −lr·(δ + μ·m); `momentum` is empty before the first step.
    `scale`: of the rate, in a round that not all took part in."""
    rate = -rule.lr * scale
    if isinstance(rule, OuterSGD):
        return {name: d * rate for name, d in delta.items()}, {}
    moved = {name: d + rule.momentum * momentum[name] if momentum else d.clone() for name, d in delta.items()}
    update = {name: (d + rule.momentum * moved[name]) * rate for name, d in delta.items()}
    return update, moved
