from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nebula import config
from nebula.models import dispatch
from nebula.models.moe import FeedForward
from nebula.models.router import balance_loss

CFG = config.Model(vocab=32, layers=2, dim=16, heads=2, kv_heads=2, ffn_dim=24, experts=5, top_k=2, aux_loss=0.5)


def module(*, dense: bool) -> FeedForward:
    generator = torch.Generator().manual_seed(1)
    ffn = FeedForward(CFG, dense=dense)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return ffn


def tokens(seed: int = 2) -> torch.Tensor:
    return torch.randn(3, 7, CFG.dim, generator=torch.Generator().manual_seed(seed))


def swiglu(ffn: FeedForward, expert: int, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ ffn.w1_EDF[expert]) * (x @ ffn.w3_EDF[expert])) @ ffn.w2_EFD[expert]


def one_token_at_a_time(ffn: FeedForward, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: no sorting, no grouping, no batching."""
    rows, probabilities, sent = [], [], torch.zeros(CFG.experts)
    for x_D in x_BTD.flatten(0, 1):
        p_E = (ffn.router.weight @ x_D).softmax(0)
        chosen = p_E.argsort(descending=True)[: CFG.top_k]
        total = p_E[chosen].sum()
        rows.append(sum(p_E[e] / total * swiglu(ffn, int(e), x_D) for e in chosen))
        probabilities.append(p_E)
        sent[chosen] += 1
    share = sent / sent.sum()
    balance = CFG.experts * (share * torch.stack(probabilities).mean(0)).sum()
    return torch.stack(rows).view_as(x_BTD), CFG.aux_loss * balance


def gradients(ffn: FeedForward, x: torch.Tensor, y: torch.Tensor, balance: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    wanted = {"x": x, **dict(ffn.named_parameters())}
    found = torch.autograd.grad((y * weight).sum() + balance, list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def test_mixture_equals_its_definition_with_gradients():
    ffn = module(dense=False)
    x = tokens().requires_grad_()
    y, balance = ffn(x)
    expected, expected_balance = one_token_at_a_time(ffn, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(balance, expected_balance)
    torch.testing.assert_close(gradients(ffn, x, y, balance), gradients(ffn, x, expected, expected_balance))


def test_dense_equals_swiglu_with_gradients():
    ffn = module(dense=True)
    assert ffn.w1_EDF.shape == (1, CFG.dim, CFG.ffn_dim * CFG.top_k)
    x = tokens().requires_grad_()
    y, balance = ffn(x)
    expected = swiglu(ffn, 0, x)
    assert balance.item() == 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(ffn, x, y, balance), gradients(ffn, x, expected, balance))


def test_nothing_is_dropped_when_everything_goes_to_the_same_experts():
    ffn = module(dense=False)
    with torch.no_grad():
        ffn.router.weight.copy_(torch.zeros_like(ffn.router.weight))
        ffn.router.weight[3], ffn.router.weight[1] = 10.0, 9.0
    x = tokens().abs().requires_grad_()
    y, balance = ffn(x)
    torch.testing.assert_close(y, one_token_at_a_time(ffn, x)[0])
    idle = gradients(ffn, x, y, balance)["w1_EDF"][[0, 2, 4]]
    assert torch.equal(idle, torch.zeros_like(idle))


def test_autocast_is_close_and_keeps_the_router_in_fp32():
    ffn = module(dense=False)
    x = tokens().requires_grad_()
    exact, exact_balance = ffn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, balance = ffn(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(balance, exact_balance, rtol=0, atol=0)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    found = gradients(ffn, x, y.float(), balance)
    assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in found.values())


@pytest.mark.parametrize(("expert", "expected"), [([[0], [1], [2], [3]], 1.0), ([[2], [2], [2], [2]], 4.0)])
def test_balance_loss_is_one_when_even_and_the_number_of_experts_at_worst(expert, expected):
    expert_NK = torch.tensor(expert)
    probability_NE = F.one_hot(expert_NK.flatten(), 4).float()
    assert balance_loss(probability_NE, expert_NK).item() == pytest.approx(expected)


def test_order_sorts_by_expert_then_token_and_inverts():
    order = dispatch.order(torch.tensor([[2, 0], [0, 2], [2, 3]]), experts=5)
    assert order.copy_C.tolist() == [1, 2, 0, 3, 4, 5]
    assert order.copy_C[order.place_C].tolist() == list(range(6))
    assert order.end_E.tolist() == [2, 2, 5, 6, 6]
    assert order.end_E.dtype == torch.int32
