from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from nebula.models.generate import generate

VOCAB = 6


class Successor(nn.Module):
    """After token t most likely comes t + 1, next likely t + 2; refuses to see more than four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        assert tokens_BT.shape[1] <= 4
        logits = torch.zeros(*tokens_BT.shape, VOCAB)
        logits.scatter_(-1, (tokens_BT.unsqueeze(-1) + 1) % VOCAB, 2.0)
        logits.scatter_(-1, (tokens_BT.unsqueeze(-1) + 2) % VOCAB, 1.0)
        return self.scale * logits, torch.zeros(())


def sample(**changes: object) -> list[int]:
    options = {"steps": 40, "context": 4, "temperature": 1.0, "top_k": VOCAB, "seed": 0, "stop": None} | changes
    return generate(Successor(), [0, 1], **options)


def test_greedy_follows_the_best_and_returns_new_tokens_only():
    assert sample(top_k=1, steps=7) == [2, 3, 4, 5, 0, 1, 2]


def test_stop_ends_the_text_and_is_left_out():
    assert sample(top_k=1, stop=5) == [2, 3, 4]


def test_top_k_bounds_what_is_drawn():
    text = [1, *sample(top_k=2, temperature=5.0)]
    steps = {(b - a) % VOCAB for a, b in pairwise(text)}
    assert steps == {1, 2}


def test_low_temperature_is_nearly_greedy():
    assert sample(temperature=0.01, steps=7) == sample(top_k=1, steps=7)


def test_the_seed_decides():
    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
