"""Causal self-attention with grouped key/value heads (arXiv 2305.13245) and rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nebula import config


def rotation(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i/width), each fp32 [length, width], the second half repeating the first.
    Computed from shapes alone, so a model has no buffers to materialise after `meta`."""
    frequency = theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / -width)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BHTW: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """Turn each pair (i, i + W/2) by its angle, in fp32; the input's dtype comes back."""
    low, high = x_BHTW.chunk(2, dim=-1)
    return (x_BHTW * cos_TW + torch.cat((-high, low), dim=-1) * sin_TW).to(x_BHTW.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.width = cfg.dim // cfg.heads
        self.theta = cfg.rope_theta
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.kv_heads * self.width, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.kv_heads * self.width, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Heads are counted, not configured: W is the width of one.
        q, k, v = (
            projection(x_BTD).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection in (self.wq, self.wk, self.wv)
        )
        cos, sin = rotation(x_BTD.shape[1], self.width, self.theta, x_BTD.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y_BHTW = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        y_BTD: Tensor = self.wo(y_BHTW.transpose(1, 2).flatten(2))
        return y_BTD
