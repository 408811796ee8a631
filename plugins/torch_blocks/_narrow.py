"""Frozen matrices kept as BF16 and computed with in F32: half the memory of F32 weights.

A weight is widened when it is used and the wide copy dropped at once, also between forward and
backward: autograd keeps the narrow one. All that is lost is what rounding the weight to 8 bits of mantissa
loses; activations and gradients are those of F32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class _Widened(torch.autograd.Function):
    """x @ weight.T in F32, of a weight without a gradient, (rows, columns)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.float(), None


def widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in F32, of a frozen weight of any float type."""
    found: torch.Tensor = _Widened.apply(x, weight)
    return found


class NarrowLinear(nn.Linear):
    """nn.Linear of a BF16 weight. Input and output (..., columns) and (..., rows), F32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = widened(x, self.weight)
        return found if self.bias is None else found + self.bias


class NarrowConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (in, out), with a BF16 weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return widened(x, self.weight.T) + self.bias


def narrow(module: nn.Module) -> None:
    """Have every linear layer below `module` compute from a BF16 weight."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = NarrowLinear
        elif type(child) is Conv1D:
            child.__class__ = NarrowConv1D
