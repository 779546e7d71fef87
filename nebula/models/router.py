"""Which experts a token goes to, and with what weight. Everything here is fp32, whatever autocast says: the softmax
decides, and rounding it would flip decisions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nebula import config


class Routing(NamedTuple):
    """`gate_NK` sums to one over K (fp32); `expert_NK` are expert numbers; `balance` is the auxiliary loss, already
    scaled by `Model.aux_loss`."""

    gate_NK: Tensor
    expert_NK: Tensor
    balance: Tensor


def balance_loss(probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of Switch Transformers (arXiv 2101.03961, eq. 4), with f_e the share of token copies sent to
    expert e and P_e the mean probability it was given. 1 when perfectly balanced, E when everything goes to one."""
    experts = probability_NE.shape[1]
    with torch.no_grad():
        sent_E = F.one_hot(expert_NK.flatten(), experts).float().mean(0)
    return experts * torch.dot(sent_E, probability_NE.mean(0))


class Router(nn.Module):
    """Softmax over all experts, the best `top_k` of it, renormalised over those chosen."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.top_k = cfg.top_k
        self.scale = cfg.aux_loss
        self.weight = nn.Parameter(torch.empty(cfg.experts, cfg.dim))

    def forward(self, x_ND: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            probability_NE = F.linear(x_ND.float(), self.weight.float()).softmax(-1)
            best_NK, expert_NK = probability_NE.topk(self.top_k, sorted=False)
            gate_NK = best_NK / best_NK.sum(-1, keepdim=True)
            return Routing(gate_NK, expert_NK, self.scale * balance_loss(probability_NE, expert_NK))
