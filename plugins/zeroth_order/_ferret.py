"""Updates of first-order training, projected on directions that everybody can draw.

Ferret (arXiv:2409.06277): members train as they like; of each block's change delta = w_old - w_new they send
coordinates <delta, v_s> along n directions, and the server steps by their sum back along them. v is a normal
number cut at +-1/sqrt(d), d the block's size; its variance is 1/(3 d), so the mean of sum_s <delta, v_s> v_s
is n/(3 d) delta. The factor here is therefore 3 d/n and gives delta; the authors' d/n gives a third of it,
which they leave to the server's rate.

A block is a named array, A or B of one layer; its directions begin at its position in the flat order of
names. Blocks share a number of coordinates that is the same in each round, so that what an update takes is
known: a block has more of them the more it changed, as in the paper. Directions are a member's own and a
round's own: errors of members are then not alike, and no direction is left out for good.

`ferret`: `Ferret` is the server's part, `Projected` a member's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors, Member, PolicyViolation, Update

from ._aggregators import Tuned, copied, parameters_of, positive, whole_number
from ._seeds import CHUNK, Parameters, positions, sizes
from ._stream import Array, Key, key, uniforms

LEAST = 2  # directions of a block, however little it changed
LIMIT = 10.0  # of a block's step, its norm


def cut_normals(stream: Key, first: int, count: int, size: int) -> Array:
    """Normal numbers cut at +-1/sqrt(size), (count,) F32, with multiplications alone.

    Over so short a stretch the normal density is 1 - x^2/2; its inverse distribution function is taken to
    that order, right within 1/size^2. For a block of any use it is even but for the last digits.
    """
    u = uniforms(stream, first, count)
    u -= (u - u * u * u) * np.float32(1 / (6 * size))
    return u * np.float32(1 / math.sqrt(size))


def shares(norms: Mapping[str, float], mean: int) -> dict[str, int]:
    """Coordinates of each block: `mean` times as many as blocks in all, at least 2 of each, and the rest by
    how much each changed; what does not divide goes to the largest remainders."""
    total = math.fsum(norms.values())
    if not math.isfinite(total):
        raise ConfigError("expected finite changes of blocks, got NaN or infinity")
    spare = (mean - LEAST) * len(norms)
    parts = {name: spare * (norm / total if total else 1 / len(norms)) for name, norm in norms.items()}
    found = {name: int(part) for name, part in parts.items()}
    by_rest = sorted(norms, key=lambda name: (found[name] - parts[name], name))
    for name in by_rest[: spare - sum(found.values())]:
        found[name] += 1
    return {name: LEAST + count for name, count in found.items()}


def norms(delta: Parameters) -> dict[str, float]:
    return {name: math.sqrt(float(np.square(part, dtype=np.float64).sum())) for name, part in delta.items()}


def round_seed(seed: int, round: int, rank: int) -> str:
    """What names a member's directions of a round; both ends know it."""
    return f"{seed}, round {round}, rank {rank}"


def project(delta: Parameters, seed: str, mean: int) -> dict[str, Array]:
    """Coordinates of each block's change, F32, `mean` a block; their number says which directions they are
    of: the first."""
    at = positions(sizes(delta))
    made = {}
    for name, count in shares(norms(delta), mean).items():
        flat = delta[name].reshape(-1)
        coordinates = []
        for index in range(count):
            parts = _direction(seed, index, at[name], len(flat))
            coordinates.append(
                math.fsum(
                    float(np.multiply(flat[begin : begin + len(v)], v, dtype=np.float64).sum())
                    for begin, v in parts
                )
            )
        made[name] = np.array(coordinates, np.float32)
    return made


def reconstruct(
    coordinates: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], seed: str
) -> dict[str, Array]:
    """Each block's change from its coordinates, F64: 3 d/n sum_s <delta, v_s> v_s; right in the mean, and the
    more alike the more directions: the cosine is 1 / sqrt(1 + d/n)."""
    at = positions({name: math.prod(shape) for name, shape in shapes.items()})
    made = {}
    for name, shape in shapes.items():
        size, values = math.prod(shape), coordinates[name]
        total = np.zeros(size)
        for index, value in enumerate(values):
            for begin, v in _direction(seed, index, at[name], size):
                total[begin : begin + len(v)] += np.multiply(v, value, dtype=np.float64)
        made[name] = (total * (3 * size / len(values))).reshape(shape)
    return made


def step(parameters: Parameters, change: Parameters, rate: float = 1.0, limit: float = LIMIT) -> None:
    """w -= rate times the change, in place; of each block a change longer than `limit` is made so long.

    The authors clip at 10; that it is the block's norm is this code's reading.
    """
    for name, length in norms(change).items():
        scale = rate * min(1.0, limit / length) if length else rate
        parameters[name][...] = parameters[name] - scale * change[name]


def _direction(seed: str, index: int, at: int, size: int) -> Iterator[tuple[int, Array]]:
    """A block's direction in parts: where each begins in the block, and its values."""
    stream = key(0, f"projection {index} of {seed}")
    for begin in range(0, size, CHUNK):
        yield begin, cut_normals(stream, at + begin, min(CHUNK, size - begin), size)


class Ferret(Tuned):
    """Steps by the weighted mean of the changes that members' coordinates say.

    An update's extras: `counts` (blocks,) int32, coordinates of each block, blocks in the order of names, and
    `coordinates` (blocks, `coordinates`) F32, all of them one after the other. A download has A and B. Memory
    does not grow with members. Made is w - server_learning_rate sum_k p_k change_k, clipped block by block.

    ConfigError where more coordinates are asked for than there are values: that saves nothing.
    """

    def __init__(self, settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> None:
        super().__init__(start, members, "a mean of changes")
        self._seed = whole_number(settings, "seed", 0, least=0)
        self._mean = whole_number(settings, "coordinates", 512, least=LEAST)
        self._rate = positive(settings, "server_learning_rate", 1.0)
        self._shapes = {name: array.shape for name, array in self._made.items()}
        most = sum(sizes(self._made).values()) // len(self._shapes)
        if self._mean > most:
            raise ConfigError(
                f"coordinates: expected at most {most}, as A and B have in the mean, got {self._mean}",
                remedy="send fewer, or use fedavg, which sends the values themselves",
            )
        self.begin(0, members)

    def frozen(self, round: int) -> str:
        return "AB"

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._changes = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        self._weight = 0.0

    def add(self, update: Update) -> None:
        coordinates = self._blocks(update.extras)
        seed = round_seed(self._seed, update.round, update.member.rank)
        for name, change in reconstruct(coordinates, self._shapes, seed).items():
            self._changes[name] += update.weight * change
        self._weight += update.weight

    def _blocks(self, extras: Mapping[str, Any]) -> dict[str, Array]:
        """Coordinates by name; ConfigError where they are none."""
        if not {"counts", "coordinates"} <= extras.keys():
            raise ConfigError(f"expected counts and coordinates in an update, got {sorted(extras)}")
        counts, values = np.asarray(extras["counts"]), np.asarray(extras["coordinates"]).reshape(-1)
        total = self._mean * len(self._shapes)
        if counts.shape != (len(self._shapes),) or counts.dtype.kind != "i" or counts.min() < LEAST:
            raise ConfigError(f"expected {LEAST} coordinates or more of each of {len(self._shapes)} blocks")
        if int(counts.sum(dtype=np.int64)) != total or len(values) != total:
            raise ConfigError(f"expected {total} coordinates in an update, got {len(values)}")
        if not np.isfinite(values).all():
            raise ConfigError("expected finite coordinates, got NaN or infinity")
        parts = np.split(values, np.cumsum(counts)[:-1])
        return dict(zip(sorted(self._shapes), parts, strict=True))

    def finish(self) -> None:
        if not self._weight:
            raise PolicyViolation("expected an update of at least one member, got none")
        self._made = {name: array.copy() for name, array in self._made.items()}  # what was given stays
        step(self._made, {name: total / self._weight for name, total in self._changes.items()}, self._rate)
        self.begin(0, ())


class Projected:
    """ferret, a member: what its local steps by gradients changed, as coordinates."""

    after_gradients = True

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._seed, self._rank = int(settings["seed"]), rank
        self._mean, self._steps = int(settings["coordinates"]), int(settings["local_steps"])
        self._loaded: dict[str, Array] = {}

    def begin(self, download: Download) -> Factors:
        self._loaded = copied(download.factors)
        return download.factors

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Callable[[int], float]
    ) -> dict[str, Array]:
        made = parameters_of(parameters)
        delta = {name: array - made[name] for name, array in self._loaded.items()}
        seed = round_seed(self._seed, steps.start // self._steps, self._rank)
        found = project(delta, seed, self._mean)
        names = sorted(found)
        return {
            "counts": np.array([len(found[name]) for name in names], np.int32),
            "coordinates": np.concatenate([found[name] for name in names]).reshape(len(names), self._mean),
        }
