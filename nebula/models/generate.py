"""Text from a trained model, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    steps: int,
    context: int,
    temperature: float,
    top_k: int,
    seed: int,
    stop: int | None,
) -> list[int]:
    """Sample up to `steps` tokens after the prompt `tokens` (not empty) and return the new ones only.

    The model sees the last `context` tokens. `temperature` > 0 divides the logits; only the `top_k` best are drawn
    from, so 1 is greedy. `stop` ends the text and is not returned. The draws are made on the CPU: the same seed gives
    the same text on any device whose logits agree."""
    assert len(tokens) > 0
    assert temperature > 0
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    text = list(tokens)
    for _ in range(steps):
        logits_1TV, _ = model(torch.tensor([text[-context:]], device=device))
        token = _draw(logits_1TV[0, -1].float().cpu(), temperature, top_k, generator)
        if token == stop:
            break
        text.append(token)
    return text[len(tokens) :]


def _draw(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    best, token = logits_V.topk(min(top_k, logits_V.numel()))
    choice = torch.multinomial((best / temperature).softmax(0), 1, generator=generator)
    return int(token[choice].item())
