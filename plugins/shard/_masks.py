"""What a token may attend to, and how far away it is: the masks that attention reads.

A mask is added to the scores: 0, or with ALiBi (Press et al., 2022) minus the distance, where a
token sees a position, and minus infinity where it does not. ggml multiplies by each head's slope, as
a function of the head's index among all; a rank that holds a part of the heads would get the wrong
slopes of it, so there the mask has a plane per head, multiplied beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._model import Model
from ._place import Place


@dataclass(frozen=True, slots=True)
class Mask:
    """`window`: how many positions a token sees, itself included; 0: all before it. `slopes`: of this
    rank's heads, (heads, 1, 1) float32; None: all heads share one plane."""

    window: int
    is_alibi: bool
    slopes: np.ndarray | None

    @property
    def planes(self) -> int:
        return 1 if self.slopes is None else len(self.slopes)

    def values(self, positions: np.ndarray, kv_length: int) -> np.ndarray:
        """(planes, tokens, kv_length) float32, for tokens at `positions` over cache rows 0, 1, ..."""
        distance = positions[:, None] - np.arange(kv_length)
        seen = distance >= 0
        if self.window:
            seen &= distance < self.window
        bias = (-distance).astype(np.float32) if self.is_alibi else np.float32(0)
        if self.slopes is not None:
            bias = bias * self.slopes
        values: np.ndarray = np.where(seen, bias, np.float32(-np.inf))
        return values.reshape(self.planes, len(positions), kv_length)


def masks_of(model: Model, place: Place) -> tuple[Mask, ...]:
    """One for each window among the place's layers."""
    alibi, slopes = model.architecture.alibi, None
    if alibi and place.heads != (0, model.heads):
        mine = slice(*place.heads)
        slopes = alibi_slopes(model.heads, alibi)[mine, None, None]
    windows = sorted({model.window_of(layer) for layer in range(*place.layers)})
    return tuple(Mask(window, alibi > 0, slopes) for window in windows)


def alibi_slopes(heads: int, max_bias: float) -> np.ndarray:
    """(heads) float32: geometric for a power of two; the rest fall between (Press et al., 2022)."""
    power = 1 << (heads.bit_length() - 1)
    base, between = (np.exp2(np.float32(-b / power)) for b in (max_bias, max_bias / 2))
    first = base ** np.arange(1, power + 1, dtype=np.float32)
    rest = between ** np.arange(1, 2 * (heads - power), 2, dtype=np.float32)
    return np.concatenate([first, rest]).astype(np.float32)
