"""ZeRO-3 over the `dp_shard` axis with FSDP2, and the precision of compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

Precision = Literal["fp32", "bf16"]
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


def shard(model: nn.Module, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard every block, then what is left as the root's unit. Gradients are summed over ranks, never averaged: the
    loss is divided by the cluster's token count instead, which stays right whatever the layout."""
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    blocks = model.get_submodule("blocks")
    for block in blocks.children():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def forward_of(model: nn.Module, precision: Precision) -> Forward:
    """How to call `model`. Parameters stay fp32; under bf16 compute sees bf16 copies of all of them and gradients
    return as fp32. FSDP2 does that by itself, a whole model is called with cast parameters: the same numerics
    (autocast would choose dtypes per operator)."""
    if precision == "fp32" or isinstance(model, FSDPModule):
        return model

    def cast(tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {name: value.to(torch.bfloat16) for name, value in model.named_parameters()}
        result: tuple[Tensor, Tensor] = functional_call(model, parameters, (tokens_BT,))
        return result

    return cast


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters after a forward without a backward: the root keeps them, and the next forward would
    not see what was written into the shards since."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
