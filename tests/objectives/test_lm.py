from __future__ import annotations

import math

import pytest
import torch

from nebula.objectives.lm import LM


def test_targets_are_one_token_ahead():
    x, target = LM().inputs(torch.tensor([[5, 6, 7, 8]]))
    assert x.tolist() == [[5, 6, 7]]
    assert target.tolist() == [[6, 7, 8]]


def test_loss_is_the_sum_over_tokens_in_nats():
    target = torch.zeros(2, 3, dtype=torch.int64)
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 0] = math.log(3)
    loss = LM().loss(logits, target)
    assert loss.item() == pytest.approx(5 * math.log(4) + math.log(2))


def test_loss_is_fp32_whatever_the_logits_are():
    logits = torch.full((1, 2, 3), 1.0, dtype=torch.bfloat16)
    loss = LM().loss(logits, torch.tensor([[0, 2]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * math.log(3), rel=1e-6)
