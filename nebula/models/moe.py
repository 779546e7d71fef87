"""The feed-forward part of a block: SwiGLU experts (arXiv 2002.05202), one path for mixtures and dense blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nebula import config
from nebula.models import dispatch
from nebula.models.router import Router


class FeedForward(nn.Module):
    """A mixture of `experts` of width `ffn_dim`, or, `dense`, one expert of width `ffn_dim · top_k` and no router:
    the same cost per token."""

    def __init__(self, cfg: config.Model, *, dense: bool) -> None:
        super().__init__()
        experts, width = (1, cfg.ffn_dim * cfg.top_k) if dense else (cfg.experts, cfg.ffn_dim)
        self.router = None if dense else Router(cfg)
        self.w1_EDF = nn.Parameter(torch.empty(experts, cfg.dim, width))
        self.w3_EDF = nn.Parameter(torch.empty(experts, cfg.dim, width))
        self.w2_EFD = nn.Parameter(torch.empty(experts, width, cfg.dim))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, [B, T, D], and the scaled auxiliary loss, an fp32 scalar (0 for a dense block)."""
        x_ND = x_BTD.flatten(0, 1)
        work_ND = x_ND.to(_working_dtype(x_ND))
        if self.router is None:
            end_E = torch.full((1,), x_ND.shape[0], dtype=torch.int32, device=x_ND.device)
            y_ND, balance = self.experts(work_ND, end_E), torch.zeros((), dtype=torch.float32, device=x_ND.device)
        else:
            gate_NK, expert_NK, balance = self.router(x_ND)
            order = dispatch.order(expert_NK, self.w1_EDF.shape[0])
            y_CD = self.experts(dispatch.scatter(work_ND, order), order.end_E)
            y_ND = dispatch.combine(y_CD, gate_NK, order)
        return y_ND.view_as(x_BTD), balance

    def experts(self, x_CD: Tensor, end_E: Tensor) -> Tensor:
        """Rows `end_E[e − 1]` … `end_E[e]` − 1 go through expert e."""
        w1_EDF, w3_EDF, w2_EFD = (weight.to(x_CD.dtype) for weight in (self.w1_EDF, self.w3_EDF, self.w2_EFD))
        h_CF = F.silu(F.grouped_mm(x_CD, w1_EDF, offs=end_E)) * F.grouped_mm(x_CD, w3_EDF, offs=end_E)
        return F.grouped_mm(h_CF, w2_EFD, offs=end_E)


def _working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's, where it is on: grouped_mm is not among the operations it casts for."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
