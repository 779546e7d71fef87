from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nebula.config import SGD, AdamW, Model
from nebula.errors import NebulaError
from nebula.objectives.lm import LM
from nebula.parallel.apply import build
from nebula.parallel.mesh import Group
from nebula.train import optim
from nebula.train.loop import Inner, evaluate, inner_step

CFG = Model(vocab=256, layers=2, dim=32, heads=4, kv_heads=2, ffn_dim=32, experts=4, aux_loss=0.1)
GROUP = Group(0, 1, torch.device("cpu"))
WINDOWS = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))


def inner(cfg: AdamW | SGD) -> Inner:
    model = build(CFG, 0, GROUP, "fp32")
    return Inner(
        model=model,
        forward=model,
        objective=LM(),
        optimizer=optim.optimizer(cfg, model),
        cfg=cfg,
        group=GROUP,
        tokens=4 * 16,
    )


def parameters(of: Inner) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in of.model.parameters()]


def test_a_step_descends_the_token_mean_plus_the_auxiliary_loss() -> None:
    ours, reference = inner(SGD(lr=0.5)), build(CFG, 0, GROUP, "fp32")
    logits, auxiliary = reference(WINDOWS[:, :-1])
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten())
    (mean + auxiliary).backward()
    loss_sum = inner_step(ours, WINDOWS, 0.5, "here")
    assert loss_sum / 64 == pytest.approx(mean.item(), rel=1e-6), "what is reported has no auxiliary part"
    for stepped, start in zip(ours.model.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        torch.testing.assert_close(stepped.detach(), (start - 0.5 * start.grad).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cfg", [SGD(), AdamW()], ids=["loss", "loss-and-norm"])
def test_a_loss_that_is_not_finite_is_refused_before_the_step(cfg: AdamW | SGD) -> None:
    ours = inner(cfg)
    with torch.no_grad():
        ours.model.get_parameter("head.weight")[3, 3] = torch.inf
    before = parameters(ours)
    with pytest.raises(NebulaError, match="round 7, step 3") as caught:
        inner_step(ours, WINDOWS, 0.1, "round 7, step 3")
    assert "optimizer.lr" in caught.value.hint
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(ours), strict=True))
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_evaluation_sums_token_losses_and_changes_nothing() -> None:
    ours = inner(SGD())
    before = parameters(ours)
    pieces = [evaluate(ours, WINDOWS, size) for size in (1, 3, 4)]
    with torch.no_grad():
        logits, _ = ours.model(WINDOWS[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum")
    assert [piece.tokens for piece in pieces] == [64] * 3
    assert [piece.loss_sum for piece in pieces] == pytest.approx([expected.item()] * 3, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(ours), strict=True))
    assert ours.model.training
    nothing = evaluate(ours, WINDOWS[:0], 2)
    assert (nothing.loss_sum, nothing.tokens) == (0.0, 0)
