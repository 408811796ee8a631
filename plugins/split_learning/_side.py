"""The side network of parallel adapters: it reads what frozen blocks gave, and no gradient enters them.

PAC (arXiv:2408.10746) is known here from its abstract and from its form; this is what was built. With h_0 the
embedding, h_l what block l gives, n(h) = h / rms(h) over the hidden width, and x of width `width`:

    x_0 = n(h_0) D_0
    x_l = a_l + gelu(a_l U_l) V_l        with a_l = x_{l-1} + n(h_l) D_l,   l = 1 to L
    y   = head(norm(h_L + x_L E))

n is there because states of different blocks differ in size a hundredfold; it has no weights. There are no
biases. V and E begin at zero, so that the base is reproduced; D and U begin uniform within 1 / sqrt(rows),
each a function of the seed alone. All of it is of one position at a time: a position that predicts no token
of the loss is neither computed nor kept.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

EPSILON = 1e-6  # a state of zeros stays one


class Side(nn.Module):
    """For `layers` blocks of width `hidden`. Parameters: down (L + 1, d, w), inner and outer (L, w, w),
    up (w, d)."""

    def __init__(self, layers: int, hidden: int, width: int, seed: int) -> None:
        super().__init__()
        self.down = nn.Parameter(_uniform((layers + 1, hidden, width), f"{seed} side down"))
        self.inner = nn.Parameter(_uniform((layers, width, width), f"{seed} side inner"))
        self.outer = nn.Parameter(torch.zeros(layers, width, width))
        self.up = nn.Parameter(torch.zeros(width, hidden))

    def forward(self, states: Tensor) -> Tensor:
        """What the final norm reads, (T, d), of the states (L + 1, T, d) of T positions."""
        size = torch.linalg.vector_norm(states, dim=-1, keepdim=True) / math.sqrt(states.shape[-1])
        narrow = torch.bmm(states, self.down) / (size + EPSILON)  # n(h) D, without a copy of the states
        first, *rest = narrow.unbind()
        x = first
        for read, inner, outer in zip(rest, self.inner.unbind(), self.outer.unbind(), strict=True):
            a = x + read
            x = a + nn.functional.gelu(a @ inner) @ outer
        return states[-1] + x @ self.up

    def tensors(self) -> dict[str, np.ndarray]:
        """By the names of the adapter's file."""
        return {f"side.{name}": value.detach().numpy().copy() for name, value in self.named_parameters()}


def _uniform(shape: tuple[int, ...], words: str) -> Tensor:
    digest = hashlib.sha256(words.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[-2])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
