"""The inner step and the evaluation of one rank. Both are collective: every rank of the cluster calls them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nebula.config import SGD, AdamW
from nebula.errors import NebulaError
from nebula.objectives.lm import LM
from nebula.parallel.mesh import Group
from nebula.parallel.shard import Forward, reshard
from nebula.train import optim
from nebula.types import Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """What an inner step works on. `tokens`: of the whole cluster, per step."""

    model: nn.Module
    forward: Forward
    objective: LM
    optimizer: Optimizer
    cfg: AdamW | SGD
    group: Group
    tokens: int


def inner_step(inner: Inner, windows_BT1: Tensor, rate: float, where: str) -> float:
    """Forward, backward, one optimizer step at learning rate `rate`. `windows_BT1`: this rank's share of the batch.

    Returns the sum of token losses (nats) over the cluster. Raises NebulaError, naming `where`, if the loss or the
    gradient is not finite; the parameters are then as they were.
    """
    loss = _backward(inner, windows_BT1.to(inner.group.device, non_blocking=True))
    gradients = optim.gradients(inner.model)
    norm_squared = optim.squared_norm(gradients) if inner.cfg.clip else torch.zeros_like(loss)
    # The one collective and the one wait for the device, after the whole step but the update has been queued.
    loss_sum, squared = inner.group.total(torch.stack((loss, norm_squared)))
    if not math.isfinite(loss_sum + squared):
        inner.optimizer.zero_grad()
        raise NebulaError(
            f"{where}: loss {loss_sum / inner.tokens}, gradient norm² {squared}: the step was not taken",
            hint="lower optimizer.lr, lengthen optimizer.warmup, or set optimizer.clip",
        )
    if inner.cfg.clip:
        optim.clip(gradients, math.sqrt(squared), inner.cfg.clip)
    optim.set_rate(inner.optimizer, rate)
    inner.optimizer.step()
    inner.optimizer.zero_grad()
    return loss_sum


def _backward(inner: Inner, windows_BT1: Tensor) -> Tensor:
    """Leave this rank's gradients; return its sum of token losses, fp64. Gradients are sums over ranks, so the token
    losses are divided by the cluster's tokens and the auxiliary loss, a mean over this rank's, by the ranks."""
    x_BT, target_BT = inner.objective.inputs(windows_BT1)
    logits_BTV, auxiliary = inner.forward(x_BT)
    loss = inner.objective.loss(logits_BTV, target_BT)
    (loss / inner.tokens + auxiliary / inner.group.world).backward()  # type: ignore[no-untyped-call]
    return loss.detach().double()


@torch.no_grad()
def evaluate(inner: Inner, windows_NT1: Tensor, size: int) -> Evaluation:
    """Sum the token losses of held-out windows over the cluster, `size` windows at a time. `windows_NT1`: this
    rank's, maybe none; ranks with fewer than others run along on a window that does not count."""
    inner.model.eval()
    batches: Sequence[Tensor] = torch.split(windows_NT1, size) if len(windows_NT1) else ()
    loss = torch.zeros((), dtype=torch.float64, device=inner.group.device)
    for i in range(int(inner.group.most(len(batches)))):
        if i < len(batches):
            x_BT, target_BT = inner.objective.inputs(batches[i].to(inner.group.device))
            loss += inner.objective.loss(inner.forward(x_BT)[0], target_BT)
        else:
            inner.forward(torch.zeros((1, 1), dtype=torch.int64, device=inner.group.device))
    reshard(inner.model)
    inner.model.train()
    tokens = windows_NT1[:, 1:].numel()
    loss_sum, total = inner.group.total(torch.stack((loss, torch.full_like(loss, tokens))))
    return Evaluation(loss_sum=loss_sum, tokens=int(total))
