"""Forward gradients: the mean of slope times direction, collected until it is sure enough to step by.

FwdLLM (arXiv:2308.13894): for a Gaussian v the slope along it times v is, in the mean, the gradient. Members
send slopes, found by central difference, and the server asks for more directions while the variance of their
mean is above a threshold. Directions are candidates of the job's seed, so that a slope and an index are all
that travels.

`fwdllm`: `FwdLLM` is the server's part, `Measured` a member's. A round asks each of its members for
`local_steps` directions; while the mean is not sure, rounds add directions to those that there are, and
nobody's weights change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, EngineError, Factors, Member, PolicyViolation, Update

from ._aggregators import Tuned, factors_of, parameters_of, positive, whole_number
from ._seeds import Parameters, descend, direction, estimate, perturb, pieces, positions, sizes
from ._stream import Array, Key, normals

log = logging.getLogger(__name__)
DIRECTIONS_MOST = 1 << 20  # of one step: a mean that is not sure after a million will not be


class ForwardGradient:
    """Slopes along candidates of `seed`, and how sure their mean is in one layer.

    watched: the layer's first position in a direction, and its size; two such arrays of F64 are kept
    threshold: of `variance`; the authors take 0.1 or 0.2 by model
    """

    def __init__(self, seed: int, watched: tuple[int, int], threshold: float) -> None:
        if not threshold > 0:
            raise ConfigError(f"expected a variance threshold above 0, got {threshold}")
        self._seed, self._watched, self._threshold = seed, watched, threshold
        self.restart()

    def restart(self) -> None:
        """An empty collection."""
        self.slopes: list[tuple[int, float, float]] = []  # of each direction: index, slope, weight
        self._halves, self._weights = np.zeros((2, self._watched[1])), [0.0, 0.0]

    def add(self, index: int, slope: float, weight: float = 1.0) -> None:
        """ConfigError where the slope is not finite."""
        if not math.isfinite(slope):
            raise ConfigError("expected a finite slope, got NaN or infinity")
        half = len(self.slopes) % 2  # in turns, so that none needs to be kept
        z = normals(direction(self._seed, index), *self._watched)
        self._halves[half] += np.multiply(z, weight * slope, dtype=np.float64)
        self._weights[half] += weight
        self.slopes.append((index, slope, weight))

    @property
    def variance(self) -> float:
        """Mean over the layer's values of the variance between the means of the two halves of what came;
        without bias, as of two samples. It falls as 1/n. Infinite where a half is empty."""
        if len(self.slopes) < 2:
            return math.inf
        first, second = (half / weight for half, weight in zip(self._halves, self._weights, strict=True))
        return float(np.mean((first - second) ** 2) / 2)

    @property
    def is_sure(self) -> bool:
        return self.variance <= self._threshold

    def step(self, parameters: Parameters, learning_rate: float) -> dict[str, Array] | None:
        """w -= learning_rate times the mean, which it gives, and a fresh collection; None, and nothing
        changed, while the variance is above the threshold: more slopes are needed."""
        if not self.is_sure:
            return None
        mean = self.gradient({name: array.shape for name, array in parameters.items()})
        for name, array in parameters.items():
            array[...] = array - learning_rate * mean[name]
        self.restart()
        return mean

    def gradient(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """The weighted mean so far, by name, F32; for `select` in the next round."""
        made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        steps = [(direction(self._seed, index), weight * slope) for index, slope, weight in self.slopes]
        if steps:
            descend(made, steps, -1.0 / sum(self._weights))
        return made


def select(
    seed: int, candidates: Sequence[int], former: Parameters, keep: int
) -> tuple[list[int], list[float]]:
    """The `keep` candidates most alike to the former gradient, best first, and their cosines with it.

    The authors draw ten times as many as they keep. Directions chosen so are no longer Gaussian: the mean of
    slope times direction leans to the former gradient and is no longer without bias. The mean of the cosines
    says by how much: report it. 0 is none.
    """
    length = math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in former.values()))
    if not length:
        return list(candidates[:keep]), [0.0] * min(keep, len(candidates))
    cosines = [_cosine(former, length, direction(seed, index)) for index in candidates]
    best = np.argsort(-np.array(cosines), kind="stable")[:keep].tolist()  # of equals the earlier
    return [candidates[i] for i in best], [cosines[i] for i in best]


def _cosine(former: Parameters, length: float, stream: Key) -> float:
    product = squares = 0.0
    for first, views in pieces(former):
        z = normals(stream, first, sum(map(len, views))).astype(np.float64)
        product += float(np.concatenate(views) @ z)
        squares += float(z @ z)
    return product / (math.sqrt(squares) * length) if squares else 0.0


class FwdLLM(Tuned):
    """Asks members for slopes, and steps by their mean where its variance allows.

    A download's extras: `directions` (local_steps,) int64, the candidates along which that member measures.
    An update's extras: `slopes` (local_steps,), in their order; a slope counts by its member's weight. Of
    `candidates` times as many directions those most alike to the last step's gradient are asked for, where
    there was one; the log says how alike they are. State: A and B, what was collected, and that gradient.
    The variance is that of the last layer's B.
    """

    def __init__(self, settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> None:
        super().__init__(start, members, "a mean of slopes")
        self._seed = whole_number(settings, "seed", 0, least=0)
        self._steps = whole_number(settings, "local_steps", 4)
        self._candidates = whole_number(settings, "candidates", 10)
        self._rate = positive(settings, "learning_rate", 1e-2)
        self._ranks = {member.rank: number for number, member in enumerate(members)}
        of = sizes(self._made)
        watched = f"{list(start)[-1]}.B"
        place = (positions(of)[watched], of[watched])
        self._collected = ForwardGradient(self._seed, place, positive(settings, "variance_most", 0.1))
        self._former: dict[str, Array] = {name: np.zeros_like(array) for name, array in self._made.items()}
        self._asked: dict[int, list[int]] = {}
        self._came: list[tuple[int, float, float]] = []

    def frozen(self, round: int) -> str:
        return "AB"

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._came = []
        self._asked, cosines = {}, []
        for member in members:
            place = round * len(self._ranks) + self._ranks[member.rank]
            count = self._steps * self._candidates
            drawn = range(place * count, (place + 1) * count)
            self._asked[member.rank], found = select(self._seed, drawn, self._former, self._steps)
            cosines += found
        if any(cosines):
            said = {"round": round, "cosine": round_to(float(np.mean(cosines)))}
            log.info("directions lean to the last gradient", extra=said)

    def add(self, update: Update) -> None:
        asked, slopes = self._asked.get(update.member.rank), update.extras.get("slopes")
        if asked is None or slopes is None:
            raise ConfigError(
                f"expected slopes of a member that was asked for some, got {sorted(update.extras)}"
            )
        slopes = np.asarray(slopes)
        if slopes.shape != (len(asked),):
            raise ConfigError(f"expected {len(asked)} slopes in an update, got {slopes.shape}")
        if not np.isfinite(slopes).all():
            raise ConfigError("expected finite slopes, got NaN or infinity")
        self._came += [(i, float(s), update.weight) for i, s in zip(asked, slopes, strict=True)]

    def finish(self) -> None:
        """EngineError where no number of directions makes the mean sure."""
        if not self._came:
            raise PolicyViolation("expected an update of at least one member, got none")
        for index, slope, weight in self._came:
            self._collected.add(index, slope, weight)
        self._came = []
        count, variance = len(self._collected.slopes), self._collected.variance
        mean = self._collected.step(self._made, self._rate)
        said = {"directions": count, "variance": round_to(variance), "stepped": mean is not None}
        log.info("slopes collected", extra=said)
        if mean is not None:
            self._former = mean
        elif count > DIRECTIONS_MOST:
            raise EngineError(
                f"expected a variance of the mean slope below the job's after {count} directions, got "
                f"{variance:.3g}",
                remedy="set variance_most above that",
            )

    def download(self, member: Member) -> Download:
        asked = self._asked.get(member.rank, range(self._steps))
        return Download(factors_of(self._made), extras={"directions": np.array(asked, np.int64)})

    def state_dict(self) -> Mapping[str, Any]:
        slopes = np.array(self._collected.slopes, np.float64).reshape(-1, 3)
        state = {"collected": slopes}
        for kind, arrays in (("made", self._made), ("former", self._former)):
            state |= {f"{kind}.{name}": array.copy() for name, array in arrays.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._made, self._former = (
            {name: np.array(state[f"{kind}.{name}"], np.float32) for name in self._made}
            for kind in ("made", "former")
        )
        self._collected.restart()
        for index, slope, weight in np.asarray(state["collected"]).tolist():
            self._collected.add(int(index), slope, weight)
        self._came, self._asked = [], {}


class Measured:
    """fwdllm, a member: the slopes along the directions that it is asked for, each of one step's rows. Its
    weights do not move, but by what rounds off while they are moved and put back."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._seed, self._apart = int(settings["seed"]), float(settings["perturbation"])
        self._asked: list[int] = []

    def begin(self, download: Download) -> Factors:
        self._asked = np.asarray(download.extras["directions"]).tolist()
        return download.factors

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Callable[[int], float]
    ) -> dict[str, Array]:
        """ConfigError where it was asked for more or fewer directions than it has steps."""
        if len(self._asked) != len(steps):
            raise ConfigError(f"expected {len(steps)} directions of the server, got {len(self._asked)}")
        named, slopes = parameters_of(parameters), []
        for number, index in zip(steps, self._asked, strict=True):
            slopes.append(_slope(named, direction(self._seed, index), loss, number, self._apart))
        return {"slopes": np.array(slopes, np.float32)}


def _slope(named: Parameters, stream: Key, loss: Callable[[int], float], number: int, apart: float) -> float:
    return estimate(lambda: loss(number), lambda scale: perturb(named, stream, scale), apart)


def round_to(value: float) -> float:
    """Three significant digits, for a log."""
    return float(f"{value:.3g}")
