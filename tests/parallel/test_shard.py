"""FSDP2 on two and three ranks is one process: the same losses, the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Rank, Ranks
from torch.distributed.tensor import DTensor

from nebula.config import SGD, AdamW, Model
from nebula.objectives.lm import LM
from nebula.parallel import mesh
from nebula.parallel.apply import build
from nebula.parallel.shard import forward_of
from nebula.train import optim
from nebula.train.loop import Inner, evaluate, inner_step

STEPS, BATCH, SEQ = 4, 6, 16
DENSE = Model(vocab=256, layers=2, dim=32, heads=4, kv_heads=2, ffn_dim=32, experts=4, dense_layers=2, aux_loss=0.0)
MOE = DENSE.model_copy(update={"dense_layers": 1})
ADAMW = AdamW(lr=1e-2, warmup=2, clip=0.5)
CLIPPED = SGD(lr=0.5, clip=0.5)


def windows(step: int) -> torch.Tensor:
    return torch.randint(256, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))


def trained(rank: Rank, address: str, cfg: Model, optimizer: AdamW | SGD, precision: str) -> dict:
    """Losses of a few steps on this rank's share of the same batches, and the parameters in the end."""
    group = mesh.join(address, rank.memory.pop("store", None), rank.rank, rank.world, torch.device("cpu"))
    model = build(cfg, 7, group, precision)
    inner = Inner(
        model=model,
        forward=forward_of(model, precision),
        objective=LM(),
        optimizer=optim.optimizer(optimizer, model),
        cfg=optimizer,
        group=group,
        tokens=BATCH * SEQ,
    )
    held_out = windows(99)[:5].tensor_split(rank.world)[rank.rank]  # an uneven share, so that some rank waits
    before = evaluate(inner, held_out, 2)
    share = slice(rank.rank * BATCH // rank.world, (rank.rank + 1) * BATCH // rank.world)
    losses = [inner_step(inner, windows(0)[share], optim.rate(optimizer, i, STEPS), "here") for i in range(STEPS)]
    after = evaluate(inner, held_out, 2)
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}
    group.leave()
    return {
        "losses": losses,
        "parameters": {name: value.numpy().copy() for name, value in whole.items()},
        "evaluations": [before, after],
    }


def door(rank: Rank) -> str:
    address, rank.memory["store"] = mesh.open_store()
    return address


def run(ranks: Ranks, world: int, *arguments: object) -> list[dict]:
    address = ranks.run(door, world=1)[0] if world > 1 else ""
    return ranks.run(trained, address, *arguments, world=world)


@pytest.mark.parametrize(
    ("cfg", "optimizer", "world", "tolerance"),
    [
        (DENSE, CLIPPED, 2, 1e-6),
        (MOE, CLIPPED, 2, 1e-6),
        (MOE, SGD(lr=0.5), 3, 1e-6),
        # Adam divides by |gradient|: elements whose gradient is all rounding move either way. SGD above is the judge.
        (MOE, ADAMW, 2, 2e-5),
    ],
    ids=["dense", "moe", "moe-3-unclipped", "moe-adamw"],
)
def test_sharded_equals_one_process(
    ranks: Ranks, cfg: Model, optimizer: AdamW | SGD, world: int, tolerance: float
) -> None:
    (alone,) = run(ranks, 1, cfg, optimizer, "fp32")
    together = run(ranks, world, cfg, optimizer, "fp32")
    assert alone["losses"][-1] < alone["losses"][0]
    for result in together:
        assert result["losses"] == together[0]["losses"], "every rank reports the cluster's loss"
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=1e-6)
        for name, value in result["parameters"].items():
            error = np.linalg.norm(value - alone["parameters"][name]) / np.linalg.norm(alone["parameters"][name])
            assert error < tolerance, f"{name}: {error}"


def test_evaluation_sums_over_uneven_ranks(ranks: Ranks) -> None:
    (alone,) = run(ranks, 1, MOE, ADAMW, "fp32")
    together = run(ranks, 3, MOE, ADAMW, "fp32")
    for result in together:
        for one, many in zip(alone["evaluations"], result["evaluations"], strict=True):
            assert many.tokens == one.tokens == 5 * SEQ
            assert many.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)
    before, after = alone["evaluations"]
    assert after.loss_sum != before.loss_sum, "evaluation must see what training changed"


def test_bf16_has_the_same_numerics_sharded_or_not(ranks: Ranks) -> None:
    (alone,) = run(ranks, 1, MOE, ADAMW, "bf16")
    together = run(ranks, 2, MOE, ADAMW, "bf16")
    (exact,) = run(ranks, 1, MOE, ADAMW, "fp32")
    np.testing.assert_allclose(together[0]["losses"], alone["losses"], rtol=1e-3)
    np.testing.assert_allclose(alone["losses"], exact["losses"], rtol=2e-2)
    assert alone["losses"] != exact["losses"], "bf16 must be used at all"
    assert {value.dtype for value in alone["parameters"].values()} == {np.dtype(np.float32)}
