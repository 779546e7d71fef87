"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class LM:
    """Split in two so that a pipeline schedule can call `loss` on its own."""

    def inputs(self, window_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of T + 1 tokens to inputs and targets of T each, the targets one token ahead."""
        return window_BT1[:, :-1], window_BT1[:, 1:]

    def loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        """Sum of the tokens' cross-entropies, nats, fp32. The caller divides by the global token count."""
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="sum")
