from __future__ import annotations

import pytest
import torch

from nebula import config
from nebula.models.attention import rotate, rotation
from nebula.models.init import initial, parameter_shapes
from nebula.models.transformer import Transformer

CFG = config.Model(vocab=40, layers=3, dim=32, heads=4, kv_heads=2, ffn_dim=16, experts=4, top_k=2, dense_layers=1)


def ready(model: Transformer, seed: int = 0) -> Transformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, tuple(parameter.shape), CFG, seed) * (1 if parameter.ndim == 1 else 10))
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return ready(Transformer(CFG))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(CFG.vocab, (2, 12), generator=torch.Generator().manual_seed(3))


def test_shapes_and_types(model, tokens):
    logits, auxiliary = model(tokens)
    assert logits.shape == (2, 12, CFG.vocab)
    assert (auxiliary.shape, auxiliary.dtype) == ((), torch.float32)
    # One per mixture block, each at least 1 when scaled back, and not one for the dense block.
    assert 2 * 0.9 < auxiliary.item() / CFG.aux_loss < 2 * CFG.experts


def test_the_future_is_invisible_and_the_past_is_not(model, tokens):
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CFG.vocab
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


def test_every_parameter_learns(model, tokens):
    logits, auxiliary = model(tokens)
    found = torch.autograd.grad(logits.square().mean() + auxiliary, list(model.parameters()))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in found)


def test_from_meta_the_model_is_the_same(model, tokens):
    with torch.device("meta"):
        late = Transformer(CFG)
    assert all(parameter.is_meta for parameter in late.parameters())
    assert not list(late.buffers())
    late = ready(late.to_empty(device="cpu"))
    assert torch.equal(late(tokens)[0], model(tokens)[0])


def test_bf16_autocast_is_close(model, tokens):
    exact, exact_auxiliary = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, auxiliary = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert auxiliary.dtype == torch.float32
    assert (logits.float() - exact).norm() / exact.norm() < 0.1
    assert auxiliary.item() == pytest.approx(exact_auxiliary.item(), rel=0.1)


def test_names_and_shapes_are_in_model_order(model):
    assert list(parameter_shapes(CFG).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


def test_attention_sees_only_relative_positions():
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)
    cos, sin = rotation(32, 16, 10_000.0, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        return float((rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(k, cos[j : j + 1], sin[j : j + 1])).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert abs(score(9, 4) - score(9, 8)) > 1e-3
    assert score(6, 6) == pytest.approx(float((q * k).sum()), abs=1e-4)


def test_grouped_heads_equal_repeated_ones(model, tokens):
    """Two key/value heads for four query heads are four whose weights repeat."""
    attention = model.blocks[0].attention
    x = model.embed(tokens)
    full = type(attention)(CFG.model_copy(update={"kv_heads": CFG.heads}))
    state = dict(attention.state_dict())
    for name in ("wk.weight", "wv.weight"):
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(attention(x), full(x))
