from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from nebula.config import SGD, AdamW
from nebula.train import optim

CFG = AdamW(lr=2.0, warmup=10, floor=0.1, weight_decay=0.5)


def test_rate_warms_up_and_follows_half_a_cosine_to_the_floor() -> None:
    rates = [optim.rate(CFG, step, 111) for step in range(111)]
    assert rates[:11] == pytest.approx([0.2 * (i + 1) for i in range(10)] + [2.0])
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert optim.rate(CFG, 500, 111) == pytest.approx(0.2), "a run that goes on stays at the floor"


def test_rate_of_a_run_that_is_all_warm_up() -> None:
    assert optim.rate(CFG, 4, 5) == pytest.approx(1.0)
    assert optim.rate(AdamW(lr=2.0, warmup=0), 0, 1) == 2.0
    assert optim.rate(SGD(lr=0.3), 7, 10) == 0.3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def step(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    module(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_vectors_do_not_decay() -> None:
    module = model()
    optimizer = optim.optimizer(CFG, module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.set_rate(optimizer, 0.1)
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 1 - 0.1 * CFG.weight_decay if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_state_that_exists_from_the_start_changes_nothing() -> None:
    ours, theirs = model(), model()
    mine = optim.optimizer(CFG, ours)
    groups = [{"params": [p for p in theirs.parameters() if (p.dim() > 1) == big]} for big in (True, False)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    reference = torch.optim.AdamW(groups, lr=CFG.lr, betas=CFG.betas, weight_decay=CFG.weight_decay, fused=True)
    for _ in range(3):
        step(mine, ours)
        step(reference, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_state_by_name_is_the_optimizers_own() -> None:
    module = model()
    optimizer = optim.optimizer(CFG, module)
    names = {f"{p}/{key}" for p, _ in module.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    state = optim.state_of(optimizer, module)
    assert state.keys() == names
    twin, other = copy.deepcopy(module), model()
    step(optimizer, module)
    follower = optim.optimizer(CFG, other)
    for name, value in optim.state_of(follower, other).items():
        value.copy_(state[name])
    other.load_state_dict(module.state_dict())
    step(optimizer, module)
    step(follower, other)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert not torch.equal(twin[0].weight, other[0].weight)  # type: ignore[index]
    assert optim.state_of(optim.optimizer(SGD(), module), module) == {}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clip_is_torchs_clip(limit: float) -> None:
    ours, theirs = model(), model()
    for module in (ours, theirs):
        module(torch.ones(2, 4)).square().sum().backward()
    reference = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    gradients = optim.gradients(ours)
    norm = math.sqrt(optim.squared_norm(gradients).item())
    optim.clip(gradients, norm, limit)
    assert norm == pytest.approx(reference.item())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)
