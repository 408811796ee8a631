"""The server's half of PrivateLoRA: linear layers that hand A x to the client and add B of what comes back.

W x becomes W x + (alpha / r) B M A x (arXiv:2311.14030). A and B are frozen and drawn from the job's seed and
the layer's full name; M is the client's. What a layer computes here is a node of autograd's graph, so that
its backward pass hands over the gradient of M A x and takes that of A x, whatever stands around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edged import EngineError

from .._tensors.streams import stream

Exchange = Callable[[str, int, Tensor], Tensor]  # kind of message, number of the group, (B, S, n r) both ways
FORWARD, BACKWARD = "inner", "outer gradient"


def drawn(seed: int, name: str, r: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A (r, columns) and B (rows, r) of a layer that gives `rows` values and takes `columns`.

    A as LoRA's: uniform within 1 / sqrt(columns). B normal with deviation 1 / sqrt(r), so that the values of
    B z are as large as those of z.
    """
    bound = 1 / math.sqrt(columns)
    down = torch.empty(r, columns).uniform_(-bound, bound, generator=stream(seed, f"{name} A"))
    return down, torch.randn(rows, r, generator=stream(seed, f"{name} B")) / math.sqrt(r)


class _Exchanged(torch.autograd.Function):
    """M A x of A x, (B, S, n r), by way of the client."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, anchor: Tensor, exchange: Exchange, number: int) -> Tensor:
        ctx.exchange, ctx.number = exchange, number
        return exchange(FORWARD, number, inner).to(inner.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.exchange(BACKWARD, ctx.number, gradient).to(gradient.device), None, None, None


class Group:
    """Layers of one block that take the same x: their A's one below the other, and one exchange for all."""

    def __init__(self, number: int, downs: Sequence[Tensor], exchange: Exchange) -> None:
        self._number, self._exchange = number, exchange
        self._down, self._count = torch.cat(list(downs)), len(downs)  # (n r, columns)
        self._anchor = torch.zeros((), requires_grad=True)  # x of the first block needs no gradient, M does
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, x: Tensor, index: int) -> Tensor:
        """M A x, (B, S, r), of the layer `index` of the group; the first one that asks sends for all."""
        if not self._parts:
            found = _Exchanged.apply(
                x @ self._down.T.to(x.device), self._anchor, self._exchange, self._number
            )
            self._x, self._parts = x, dict(enumerate(found.chunk(self._count, -1)))
        if x is not self._x or index not in self._parts:
            raise EngineError("expected layers that take one input; this model's take several")
        part = self._parts.pop(index)
        if not self._parts:
            self._x = None
        return part


class Adapted(nn.Module):
    """A frozen linear layer with B M A x beside it."""

    def __init__(self, base: nn.Module, up: Tensor, scale: float, group: Group, index: int) -> None:
        super().__init__()
        self.base = base
        self._up, self._group, self._index = up * scale, group, index  # (rows, r)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self._group.part(x, self._index) @ self._up.T.to(x.device)
        return found


def adapt(
    linears: dict[str, tuple[nn.Module, str]],
    groups: Sequence[Sequence[str]],
    shapes: dict[str, tuple[int, int]],
    *,
    r: int,
    alpha: float,
    seed: int,
    exchange: Exchange,
) -> None:
    """Put B M A beside each layer of `linears` (name -> (module that has it, attribute)), by `groups` of
    names that share an input. `shapes`: values that a layer gives and takes."""
    for number, names in enumerate(groups):
        both = [drawn(seed, name, r, *shapes[name]) for name in names]
        group = Group(number, [down for down, _ in both], exchange)
        for index, (name, (_, up)) in enumerate(zip(names, both, strict=True)):
            parent, attribute = linears[name]
            setattr(parent, attribute, Adapted(getattr(parent, attribute), up, alpha / r, group, index))
