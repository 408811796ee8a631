"""Forward gradients: the mean of slope times direction, collected until it is sure enough to step by.

FwdLLM (arXiv:2308.13894): for a Gaussian v the slope along it times v is, in the mean, the gradient. Members
send slopes, found by central difference (`estimate`, epsilon 0.01), and the server asks for more directions
while the variance of their mean is above a threshold. Directions are candidates of the job's seed, so that a
slope and an index are all that travels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edged import ConfigError

from ._seeds import Parameters, descend, direction, dot, pieces
from ._stream import Array, normals


class ForwardGradient:
    """Slopes along candidates of `seed`, and how sure their mean is in one layer.

    watched: the layer's first position in a direction, and its size; two such arrays of F64 are kept
    threshold: of `variance`; the authors take 0.1 or 0.2 by model
    """

    def __init__(self, seed: int, watched: tuple[int, int], threshold: float) -> None:
        if not threshold > 0:
            raise ConfigError(f"expected a variance threshold above 0, got {threshold}")
        self._seed, self._watched, self._threshold = seed, watched, threshold
        self._restart()

    def _restart(self) -> None:
        self.slopes: list[tuple[int, float]] = []  # of each direction its index
        self._halves = np.zeros((2, self._watched[1]))

    def add(self, index: int, slope: float) -> None:
        """ConfigError where the slope is not finite."""
        if not math.isfinite(slope):
            raise ConfigError("expected a finite slope, got NaN or infinity")
        half = self._halves[len(self.slopes) % 2]  # in turns, so that none needs to be kept
        half += np.multiply(normals(direction(self._seed, index), *self._watched), slope, dtype=np.float64)
        self.slopes.append((index, slope))

    @property
    def variance(self) -> float:
        """Mean over the layer's values of the variance between the means of the two halves of what came;
        without bias, as of two samples. It falls as 1/n. Infinite where a half is empty."""
        count = len(self.slopes)
        if count < 2:
            return math.inf
        first, second = self._halves[0] / ((count + 1) // 2), self._halves[1] / (count // 2)
        return float(np.mean((first - second) ** 2) / 2)

    @property
    def is_sure(self) -> bool:
        return self.variance <= self._threshold

    def step(
        self, parameters: Parameters, learning_rate: float, *, at: Mapping[str, int] | None = None
    ) -> bool:
        """w -= learning_rate times the mean, and a fresh collection; False, and nothing changed, while the
        variance is above the threshold: more slopes are needed."""
        if not self.is_sure:
            return False
        self._descend(parameters, learning_rate, at)
        self._restart()
        return True

    def gradient(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """The mean so far, by name, F32; for `select` in the next round."""
        made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._descend(made, -1.0, None)
        return made

    def _descend(self, parameters: Parameters, rate: float, at: Mapping[str, int] | None) -> None:
        steps = [(direction(self._seed, index), slope) for index, slope in self.slopes]
        descend(parameters, steps, rate / max(1, len(steps)), at=at)


def select(
    seed: int,
    candidates: Sequence[int],
    former: Parameters,
    keep: int,
    *,
    at: Mapping[str, int] | None = None,
) -> tuple[list[int], list[float]]:
    """The `keep` candidates most alike to the former gradient, best first, and their cosines with it.

    The authors draw ten times as many as they keep. Directions chosen so are no longer Gaussian: the mean of
    slope times direction leans to the former gradient and is no longer without bias. The mean of the cosines
    says by how much: report it. 0 is none.
    """
    length = math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in former.values()))
    cosines = []
    for index in candidates:
        stream = direction(seed, index)
        norm = math.sqrt(
            sum(
                float(np.square(normals(stream, first, sum(map(len, views))), dtype=np.float64).sum())
                for first, views in pieces(former, at)
            )
        )
        cosines.append(dot(former, stream, at=at) / (norm * length) if norm and length else 0.0)
    best = np.argsort(-np.array(cosines), kind="stable")[:keep].tolist()  # of equals the earlier
    return [candidates[i] for i in best], [cosines[i] for i in best]
