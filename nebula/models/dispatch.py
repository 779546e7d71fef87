"""Token copies to their experts and back. Dropless: every token reaches all of its experts.

A copy is one (token, choice) pair; there are C = N·K of them. Sorting them by expert turns the experts' work into one
grouped matrix product. Both directions are permutations, so their backward passes are gathers too: no atomic adds,
the same bits on every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Order(NamedTuple):
    """`copy_C`: which copy stands at each sorted place; `place_C`: where each copy stands; `end_E`: the place after
    each expert's last one (int32, as grouped_mm wants it)."""

    copy_C: Tensor
    place_C: Tensor
    end_E: Tensor


def order(expert_NK: Tensor, experts: int) -> Order:
    """Sort the copies by expert; among those of one expert, by token."""
    sorted_C, copy_C = expert_NK.flatten().sort(stable=True)
    place_C = torch.empty_like(copy_C)
    place_C[copy_C] = torch.arange(copy_C.numel(), device=copy_C.device)
    every_E = torch.arange(experts, device=copy_C.device)
    return Order(copy_C, place_C, torch.searchsorted(sorted_C, every_E, right=True, out_int32=True))


class _Scatter(torch.autograd.Function):
    """[N, D] to [C, D]: each token once per choice, in sorted order."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, copy_C: Tensor, place_C: Tensor) -> Tensor:
        ctx.save_for_backward(place_C)
        ctx.shape = x_ND.shape
        return x_ND.index_select(0, copy_C // (copy_C.numel() // x_ND.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None]:
        (place_C,) = ctx.saved_tensors
        tokens, dim = ctx.shape
        return grad_CD.index_select(0, place_C).view(tokens, -1, dim).sum(1), None, None


class _Gather(torch.autograd.Function):
    """[C, D] in sorted order back to [C, D] in order of token and choice."""

    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, copy_C: Tensor, place_C: Tensor) -> Tensor:
        ctx.save_for_backward(copy_C)
        return y_CD.index_select(0, place_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None]:
        (copy_C,) = ctx.saved_tensors
        return grad_CD.index_select(0, copy_C), None, None


def scatter(x_ND: Tensor, order: Order) -> Tensor:
    """Copies of the tokens, [C, D], sorted by expert."""
    copies: Tensor = _Scatter.apply(x_ND, order.copy_C, order.place_C)  # type: ignore[no-untyped-call]
    return copies


def combine(y_CD: Tensor, gate_NK: Tensor, order: Order) -> Tensor:
    """The gate-weighted sum over each token's copies, [N, D]."""
    copies_CD: Tensor = _Gather.apply(y_CD, order.copy_C, order.place_C)  # type: ignore[no-untyped-call]
    copies_NKD = copies_CD.view(*gate_NK.shape, -1)
    return (copies_NKD * gate_NK.to(y_CD.dtype).unsqueeze(-1)).sum(1)
