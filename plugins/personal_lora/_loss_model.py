"""A member's model where there are no gradients: an engine that tells losses, on a device without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import EngineError

from .._tensors.rows import IGNORED
from .._training.rows import Batch
from ._job import Job
from ._rank import Arrays


class LossModel:
    """Holds the adapter's values, F32; the engine has a copy, which every loss renews. `blocks` is what an
    engine opened that has no gradients."""

    def __init__(self, blocks: Any, job: Job, rank: int) -> None:
        self._losses = blocks.losses(
            r=job.r_of(rank), alpha=job.alpha_of(rank), targets=job.target_modules, tokens_max=job.max_length
        )
        self._values: Arrays = {}

    def set(self, factors: Arrays) -> None:
        """Copies of A and B of every layer, F32."""
        self._values = {name: (_copy(a), _copy(b)) for name, (a, b) in factors.items()}

    def factors(self) -> Arrays:
        """Copies of what stands."""
        return {name: (a.copy(), b.copy()) for name, (a, b) in self._values.items()}

    def values(self) -> Arrays:
        """A and B to be changed in place: `loss` sees it."""
        return self._values

    def merge(self, factors: Mapping[str, Any]) -> None:
        raise EngineError(
            "expected a job that moves no frozen weights: this engine's stay as they are in the file",
            remedy="use another method, or a node with PyTorch",
        )

    def loss(self, batch: Batch) -> float:
        """Summed over what `targets` counts."""
        self._losses.set(self._values)
        return float(self._losses(*batch))

    def targets(self, batch: Batch) -> int:
        """Tokens that are predicted: all but each row's first, where its label counts."""
        return int(np.count_nonzero(batch[1][:, 1:] != IGNORED))

    def take(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Give the engine's memory back."""
        self._losses.close()


def _copy(values: np.ndarray) -> np.ndarray:
    return np.array(values, np.float32, order="C")
