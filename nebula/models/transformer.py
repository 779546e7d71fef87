"""The model: a decoder-only transformer with pre-normalised blocks, no biases, an untied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nebula import config
from nebula.models.attention import Attention
from nebula.models.moe import FeedForward


class Block(nn.Module):
    def __init__(self, cfg: config.Model, *, dense: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.attention = Attention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.ffn = FeedForward(cfg, dense=dense)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        y_BTD, balance = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + y_BTD, balance


class Transformer(nn.Module):
    """Build it under `torch.device("meta")`: it has parameters only, no buffers, and their values come from
    `init.initial`, from a checkpoint or from the coordinator."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, dense=layer < cfg.dense_layers) for layer in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab, bias=False)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits, [B, T, V], and the blocks' auxiliary losses summed, an fp32 scalar. The latter is a mean
        over tokens: add it, times their number, to a loss that is a sum."""
        x_BTD = self.embed(tokens_BT)
        auxiliary = torch.zeros((), dtype=torch.float32, device=tokens_BT.device)
        for block in self.blocks:
            x_BTD, balance = block(x_BTD)
            auxiliary = auxiliary + balance
        return self.head(self.norm(x_BTD)), auxiliary
