"""What jobs really took against what was predicted, and by how much the next prediction is corrected. Pure.

A factor for each model, strategy and order of nodes: the mean of measured over predicted time per token, in
logarithms, newer jobs weighing more. A plan of a strategy and nodes that never ran is not corrected: what was
wrong there says little of elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .types import Candidate

WEIGHT = 0.3  # of the newest job
FACTOR_MAX = 10.0  # beyond that something else went wrong than a prediction
PLANS_MAX = 512  # the oldest are forgotten
ERRORS_MAX = 100  # of the newest jobs

Key = tuple[str, ...]


@dataclass(slots=True)
class Corrections:
    """`factors`: by `key_of`, the longest unused first. `errors`: of the newest predictions, as they were
    made: |measured - predicted| / measured. `jobs`: that were heard of."""

    factors: dict[Key, float] = field(default_factory=dict)
    errors: deque[float] = field(default_factory=lambda: deque(maxlen=ERRORS_MAX))
    jobs: int = 0

    @property
    def error(self) -> float | None:
        """The median of `errors`; None before the first job."""
        return statistics.median(self.errors) if self.errors else None

    def learn(self, model_sha256: str, candidate: Candidate, tpot_ms: float | None) -> float | None:
        """Hear of a job that took `tpot_ms`. How wrong the prediction was, measured over predicted; None
        where either is unknown."""
        predicted = candidate.predicted
        if not predicted.tpot_ms or not tpot_ms or not 0 < predicted.tpot_ms < math.inf:
            return None
        raw = predicted.tpot_ms / predicted.correction
        ratio = tpot_ms / raw
        bounded = min(max(ratio, 1 / FACTOR_MAX), FACTOR_MAX)
        key = key_of(model_sha256, candidate)
        before = self.factors.pop(key, None)
        blended = (
            bounded
            if before is None
            else math.exp((1 - WEIGHT) * math.log(before) + WEIGHT * math.log(bounded))
        )
        self.factors[key] = blended
        for oldest in list(self.factors)[: max(0, len(self.factors) - PLANS_MAX)]:
            del self.factors[oldest]
        self.jobs += 1
        self.errors.append(abs(tpot_ms - predicted.tpot_ms) / tpot_ms)
        return tpot_ms / predicted.tpot_ms

    def forget(self, node_id: str) -> None:
        """A node works at another rate, which predictions know: what its plans took before says nothing."""
        self.factors = {key: factor for key, factor in self.factors.items() if node_id not in key[2:]}

    def corrected(self, model_sha256: str, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, those that ran before with their prediction corrected."""
        return [self._corrected(model_sha256, candidate) for candidate in candidates]

    def _corrected(self, model_sha256: str, candidate: Candidate) -> Candidate:
        factor = self.factors.get(key_of(model_sha256, candidate))
        predicted = candidate.predicted
        if factor is None or predicted.tpot_ms is None:
            return candidate
        joules = predicted.joules_per_token
        changed = dataclasses.replace(
            predicted,
            tpot_ms=predicted.tpot_ms * factor,
            joules_per_token=None if joules is None else joules * factor,
            correction=factor,
        )
        return dataclasses.replace(candidate, predicted=changed)


def key_of(model_sha256: str, candidate: Candidate) -> Key:
    """What a factor is of."""
    return (model_sha256, candidate.strategy, *(role.node_id for role in candidate.roles))
