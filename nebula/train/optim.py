"""The inner optimizer: a pure schedule, decay groups, clipping over the whole cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nebula.config import SGD, AdamW
from nebula.parallel.export import local


def rate(cfg: AdamW | SGD, step: float, total: int) -> float:
    """The learning rate of inner step `step` of the run's `total` (a round of more steps than planned has fractional
    ones). AdamW: linear over `warmup` steps, then half a cosine that reaches `floor · lr` at the last step. SGD:
    constant."""
    if isinstance(cfg, SGD):
        return cfg.lr
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, total - 1 - cfg.warmup))
    return cfg.lr * (cfg.floor + (1 - cfg.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer(cfg: AdamW | SGD, model: nn.Module) -> Optimizer:
    """The optimizer over `model`'s (possibly sharded) fp32 parameters. Vectors (norms, biases) do not decay."""
    parameters = list(model.parameters())
    if isinstance(cfg, SGD):
        return torch.optim.SGD(parameters, lr=cfg.lr, foreach=True)  # DTensor has no fused SGD
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    result = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    for parameter in parameters:
        # As torch would at the first step. Done now, a checkpoint has one layout whether or not a step was taken.
        result.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return result


def set_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def state_of(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as `name/key`, sharing storage. Names, not indices: they mean the same on every layout."""
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def gradients(model: nn.Module) -> list[Tensor]:
    """This rank's parts of the gradients."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def squared_norm(parts: Iterable[Tensor]) -> Tensor:
    """This rank's share of the squared norm, fp64: shares add up over ranks because shards do not overlap."""
    norm: Tensor = torch.nn.utils.get_total_norm(list(parts))
    return norm.double().square()


def clip(parts: list[Tensor], norm: float, limit: float) -> None:
    """Scale gradients whose norm over the cluster exceeds `limit` down to it, in place."""
    if norm > limit:
        torch._foreach_mul_(parts, limit / norm)
