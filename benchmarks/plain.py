"""The training of one rank written by hand, as one would without Nebula: what the engines are measured against.

Model, initial parameters and data windows are Nebula's, so that the work is the same; the loop, the optimizer, clipping
and the schedule are plain torch.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from nebula.config import AdamW, Agreement, Cluster
from nebula.data.open import open_data
from nebula.models.transformer import Transformer
from nebula.parallel.apply import initialise


class Plain:
    """Takes what nebula.train.worker.Worker takes."""

    def __init__(self, *, agreement: bytes, tokenizer: bytes, cluster: str, facts: bytes, cache: str, **_: Any) -> None:
        torch.set_num_threads(Cluster.model_validate_json(facts).threads)
        agreed = Agreement.parse(agreement)
        run = agreed.run
        assert isinstance(run.optimizer, AdamW)
        self.optimizer_cfg = run.optimizer
        self.steps = run.rounds * run.inner_steps
        self.data = open_data(agreed, cluster, tokenizer.decode(), Path(cache))
        self.model = Transformer(run.model)
        initialise(self.model, run.model, run.seed)
        self.optimizer = self._adamw(run.optimizer)

    def train(self, first: int, steps: int) -> tuple[float, float]:
        """Steps `first` … `first + steps` − 1. Returns seconds and the mean loss, which is read once."""
        begun = time.perf_counter()
        total = torch.zeros(())
        for step in range(first, first + steps):
            windows = self.data.batch(step, 0, 1)
            logits, auxiliary = self.model(windows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            (loss + auxiliary).backward()
            if self.optimizer_cfg.clip is not None:
                clip_grad_norm_(self.model.parameters(), self.optimizer_cfg.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
        mean = total.item() / steps
        return time.perf_counter() - begun, mean

    def _adamw(self, cfg: AdamW) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)

    def _rate(self, step: int) -> float:
        cfg = self.optimizer_cfg
        if step < cfg.warmup:
            return cfg.lr * (step + 1) / cfg.warmup
        done = (step - cfg.warmup) / max(1, self.steps - 1 - cfg.warmup)
        return cfg.lr * (cfg.floor + (1 - cfg.floor) * (1 + math.cos(math.pi * done)) / 2)
