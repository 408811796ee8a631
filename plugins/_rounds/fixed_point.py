"""Weighted sums of F32 values as sums of integers modulo 2^64, so that masks on them cancel to the last bit.

A member with the weight w makes of each value x the integer round(clip(x) u 2^f), where u = round(w 2^g) is
its weight in whole units; u itself goes along as the last number. Integers of all members are added, and
sum / (2^f sum of u) is the weighted mean.

- g = 29 - ceil(log2(weight_most)): u has at most 29 bits and an F32 value 24, so that their product is exact
  in F64 and the one rounding is to the nearest integer. Whole weights are exact while g is not below 0.
- f = 33 - ceil(log2(members clip)): no sum leaves 62 bits, so that none wraps around.

The error of the mean of n members is at most n / 2 / (2^f sum of u), clipping apart: `FixedPoint.error`. With
20 members, a clip of 4 and weights of 100 out of 1,000 it is below 2^-52: far below F32's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edged import ConfigError, PolicyViolation, ProtocolError

WEIGHT_BITS = 29
SUM_BITS = 62
MEMBERS_MOST = 1 << 16


@dataclass(frozen=True)
class FixedPoint:
    """members: how many may be summed; clip: the largest absolute value that passes as it is, made an F32;
    weight_most: the largest weight. ConfigError where their sums do not fit 62 bits."""

    members: int
    clip: float
    weight_most: float

    def __post_init__(self) -> None:
        if not 1 <= self.members <= MEMBERS_MOST:
            raise ConfigError(f"expected 1 to {MEMBERS_MOST} members, got {self.members}")
        if not (0 < self.clip < math.inf and 0 < self.weight_most < math.inf):
            raise ConfigError(
                f"expected a clip and a largest weight above 0, got {self.clip} and {self.weight_most}"
            )
        object.__setattr__(self, "clip", float(np.float32(self.clip)))
        if not 0 < self.clip < math.inf or self.value_bits < 0:
            raise ConfigError(
                f"{self.members} members with values up to {self.clip} do not fit {SUM_BITS} bits",
                remedy="take a smaller clip",
            )

    @property
    def weight_bits(self) -> int:
        """g; below 0 where weights are counted in more than ones."""
        return WEIGHT_BITS - _ceil_log2(self.weight_most)

    @property
    def value_bits(self) -> int:
        """f."""
        return SUM_BITS - WEIGHT_BITS - _ceil_log2(self.members * self.clip)

    def units(self, weight: float) -> int:
        """u of a weight. PolicyViolation (update-weight) for one that is no number above 0, above the
        largest, or too small to be counted."""
        if not 0 < weight <= self.weight_most:
            raise PolicyViolation(
                f"expected a weight above 0 and at most {self.weight_most:g}, got {weight}",
                code="update-weight",
            )
        units = round(math.ldexp(weight, self.weight_bits))
        if not units:
            raise PolicyViolation(
                f"the weight {weight:g} is too small beside the largest, {self.weight_most:g}",
                code="update-weight",
            )
        return units

    def encode(self, values: np.ndarray, weight: float) -> tuple[np.ndarray, int]:
        """values (n,) F32 -> (n + 1,) uint64, and how many values were clipped.

        PolicyViolation (update-nan) where a value is not finite: nobody can find it in the sum.
        """
        units = self.units(weight)
        scaled = np.empty(values.size + 1, np.float64)
        x = scaled[:-1]
        x[:] = values
        largest = np.abs(x)
        if not np.isfinite(largest).all():
            raise PolicyViolation("expected finite values, got NaN or infinity", code="update-nan")
        clipped = int(np.count_nonzero(largest > self.clip))
        np.clip(x, -self.clip, self.clip, out=x)
        x *= math.ldexp(units, self.value_bits)
        np.rint(x, out=x)
        scaled[-1] = units
        return scaled.astype(np.int64).view(np.uint64), clipped

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, float]:
        """total (n + 1,) uint64, what was added modulo 2^64 -> the weighted mean (n,) F64, the sum of
        weights.

        ProtocolError (mask-sum) where no members can have made such a sum: then a mask is left in it.
        """
        signed = total.view(np.int64)
        units = int(signed[-1])
        sums = signed[:-1].astype(np.float64)
        if not 0 < units <= self.members << WEIGHT_BITS:
            raise ProtocolError("a sum of weights that no members can have: a mask is left", code="mask-sum")
        scale = math.ldexp(units, self.value_bits)
        if sums.size and np.abs(sums).max() > scale * self.clip + self.members:
            raise ProtocolError("a sum that no members can have: a mask is left", code="mask-sum")
        sums /= scale
        return sums, math.ldexp(units, -self.weight_bits)

    def error(self, weight: float) -> float:
        """How far the mean of values within the clip may be from the exact one, for a sum of weights."""
        return 0.5 * self.members / math.ldexp(weight, self.weight_bits + self.value_bits)


def _ceil_log2(x: float) -> int:
    fraction, exponent = math.frexp(x)
    return exponent - 1 if fraction == 0.5 else exponent
