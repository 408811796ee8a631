"""Clipping and Gaussian noise on smashed data; what the noise leaves to be learnt, `privacy` says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edged import ConfigError

from .privacy import SHRINK, normal

SECRET_BYTES_LEAST = 16


def clip_rows(x: Tensor, C: float) -> Tensor:
    """x (B, ...): each of the B rows scaled to a norm of at most C, over all its values; shorter ones, and
    all where C is infinite, keep their bits. Differentiable. NaN and infinity do not pass for numbers: such
    a row has NaN."""
    if not C > 0:
        raise ConfigError(f"clip: expected a norm above 0, got {C}")
    if math.isinf(C):
        return x
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    # clamped, so that a row of zeros has a gradient
    scales = torch.where(norms > C, SHRINK * C / norms.clamp_min(C), torch.ones_like(norms))
    return x * scales.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


class Gaussian:
    """Clipping to C, then noise of standard deviation sigma C.

    The noise is a function of (secret, step, slot, the clipped row's F32 bytes), so that a resumed run, which
    sends the same row again, sends the same bits; another row in its place gets noise that is unrelated, and
    the difference of the two says no more than two releases do. SHAKE-256 makes the bits, so that nobody else
    can. `secret`: random bytes that belong to the client alone and to its
    checkpoint, never the job's seed: the server knows that one, and could take the noise away again.
    """

    def __init__(self, C: float, sigma: float, secret: bytes) -> None:
        if not 0 <= sigma < math.inf:
            raise ConfigError(f"sigma: expected a number of at least 0, got {sigma}")
        if not C > 0 or (sigma and math.isinf(C)):
            raise ConfigError(f"clip: expected a norm above 0, and a finite one for noise, got {C}")
        if len(secret) < SECRET_BYTES_LEAST:
            raise ConfigError(f"secret: expected at least {SECRET_BYTES_LEAST} bytes, got {len(secret)}")
        self.C = C
        self.sigma = sigma
        self._secret = secret

    def __call__(self, x: Tensor, step: int, slots: Sequence[int] | None = None) -> Tensor:
        """x (B, ...) of any device: clipped and noisy. `slots`: which sample of the step's batch each row
        is, 0 to B-1 by default. Gradients pass the noise as they are and
        the clipping by its own derivative."""
        clipped = clip_rows(x, self.C)
        if not self.sigma:
            return clipped
        slots = range(len(x)) if slots is None else slots
        if len(slots) != len(x) or len(set(slots)) != len(x):
            raise ConfigError(f"expected {len(x)} slots, each once, got {list(slots)}")
        rows = clipped.detach().to("cpu", torch.float32).contiguous().numpy()
        drawn = np.stack([self._normal(step, slot, row) for slot, row in zip(slots, rows, strict=True)])
        noise = torch.from_numpy(drawn).mul_(self.sigma * self.C).to(x.device, x.dtype)
        return clipped + noise.reshape(x.shape)

    def _normal(self, step: int, slot: int, row: np.ndarray) -> np.ndarray:
        """As many float64 of N(0, 1) as the row has values, by Box and Muller 1958."""
        place = step.to_bytes(8, "little") + slot.to_bytes(8, "little")
        return normal(self._secret, place + np.ascontiguousarray(row, "<f4").tobytes(), row.size)
