"""Edge or cloud by constraint-satisfaction UCB.

Source: PerLLM (arXiv:2405.14636). An arm is (class of request, place). Only arms that keep the request's
constraints are looked at; of those, one never tried comes first, then the one with the highest mean reward
plus a bonus for having been tried little.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tried:
    times: int = 0
    mean: float = 0.0


@dataclass(slots=True)
class Bandit:
    """`explore`: weight of the bonus; 0 is greedy."""

    explore: float = 0.5
    arms: dict[Hashable, Tried] = field(default_factory=dict)
    rounds: int = 0

    def choose(self, feasible: Sequence[Hashable]) -> Hashable | None:
        """One of the feasible arms; None, to wait, where there is none. Ties go to the first."""
        for arm in feasible:
            if self._tried(arm).times == 0:
                return arm
        return max(feasible, key=self.score, default=None)

    def score(self, arm: Hashable) -> float:
        tried = self._tried(arm)
        return tried.mean + self.explore * math.sqrt(math.log(max(1, self.rounds)) / tried.times)

    def learn(self, arm: Hashable, reward: float) -> None:
        tried = self.arms.setdefault(arm, Tried())
        self.rounds += 1
        tried.times += 1
        tried.mean += (reward - tried.mean) / tried.times

    def _tried(self, arm: Hashable) -> Tried:
        return self.arms.get(arm, Tried())
