"""Where to cut a model between a device that tunes its first layers and a server that tunes the rest.

After Liu and Zhao, "Resource allocation for stable LLM training in mobile edge computing" (arXiv:2409.20247),
for one device and given rates: the cost of a layer on either side, and what a deep cut does to stability.
Pure. The planner of split learning weighs its bound on stability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHNESS = 1.0  # L of the loss: only its product with the weight of instability counts


@dataclass(frozen=True, slots=True)
class Cut:
    """`layers` of the model. `device`, `server`: the weighed cost (of time and energy) of one layer there.
    `instability`: weight of the bound 2 L^2 / (samples (1 - cut / layers)) on what one sample changes."""

    layers: int
    device: float
    server: float
    samples: float = 1.0
    instability: float = 1.0

    def cost(self, cut: float) -> float:
        """Of the device tuning `cut` layers, below `layers`."""
        bound = 2 * SMOOTHNESS**2 / (self.samples * (1 - cut / self.layers))
        return self.device * cut + self.server * (self.layers - cut) + self.instability * bound

    def best(self) -> int:
        """The cut of the least cost, from 1 to layers - 1: the cost is convex, so beside its real minimum.

        At least one layer stays with the device, whose data it takes in, also where the server is cheaper.
        """
        gain = self.server - self.device
        if gain <= 0:
            return 1
        slope = 2 * SMOOTHNESS**2 * self.instability / (self.samples * self.layers * gain)
        exact = self.layers * (1 - math.sqrt(slope))
        near = {max(1, min(self.layers - 1, whole)) for whole in (math.floor(exact), math.ceil(exact))}
        return min(sorted(near), key=self.cost)


def best_frequency(time_weight: float, energy_weight: float, kappa: float, most: float) -> float:
    """The processor frequency of the least weighed cost, at most `most`, for power = kappa * frequency^3."""
    return min(most, (time_weight / (2 * kappa * energy_weight)) ** (1 / 3))
