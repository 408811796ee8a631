"""Training by seeds: the weights are their start and one sum of scalars for each of K directions.

FedKSeed (arXiv:2312.06353): a step draws one of K seeds and its direction z(s), measures the slope
g = (L(w + eps z) - L(w - eps z)) / (2 eps), and does w -= lr g z(s). Whoever has the start w0 and the sum
G[s] of all slopes per seed has the weights: w = w0 - lr sum_s G[s] z(s). MeZO (arXiv:2305.17333) is the same
step with a seed never used twice. Weight decay would break the sum, so there is none.

Parameters are named arrays, F32 (F64 for tests), changed in place. A value's number in z is its position in
the flat order of sorted names; whoever holds some of the arrays says where they begin (`at`), and agrees with
the others. No more of a direction than `chunk` values exists at a time.

The code draws here what the authors' draws with torch's generator on the parameter's device, where processor
and GPU give unlike directions for one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, EngineError

from ._stream import LARGEST, Array, Key, key, normals, words

Parameters = Mapping[str, Array]

CHUNK = 1 << 16  # values: word, number and sum of each fit a small processor's cache
SLOPE_MAX = 1000.0  # |g| counts at most so much for what a seed is worth


def direction(seed: int, index: int) -> Key:
    """The stream of a job's candidate `index`."""
    return key(seed, f"direction {index}")


def positions(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each array begins in a direction, of the sizes of all arrays of the model or adapter."""
    at, end = {}, 0
    for name in sorted(sizes):
        at[name] = end
        end += sizes[name]
    return at


def sizes(parameters: Parameters) -> dict[str, int]:
    return {name: array.size for name, array in parameters.items()}


def pieces(
    parameters: Parameters, at: Mapping[str, int] | None = None, chunk: int = CHUNK
) -> Iterator[tuple[int, list[Array]]]:
    """Flat views that follow one another in a direction, at most `chunk` values at a time, with their first
    position; together every value once."""
    at = positions(sizes(parameters)) if at is None else at
    start, end, views = 0, 0, []
    for name in sorted(parameters, key=at.__getitem__):
        flat = _flat(name, parameters[name])
        done = 0
        while done < len(flat):
            if views and (at[name] + done != end or end - start == chunk):
                yield start, views
                views = []
            if not views:
                start = end = at[name] + done
            views.append(flat[done : done + chunk - (end - start)])
            done += len(views[-1])
            end += len(views[-1])
    if views:
        yield start, views


def perturb(
    parameters: Parameters,
    stream: Key,
    scale: float,
    *,
    at: Mapping[str, int] | None = None,
    chunk: int = CHUNK,
) -> None:
    """w += scale z, in place, in the arrays' own precision."""
    for first, views in pieces(parameters, at, chunk):
        z = normals(stream, first, sum(map(len, views)))
        for view, part in _parts(views, z):
            view += np.multiply(part, scale, dtype=view.dtype)


def replay(
    parameters: Parameters,
    sums: Array,
    seed: int,
    learning_rate: float,
    *,
    at: Mapping[str, int] | None = None,
    chunk: int = CHUNK,
) -> None:
    """w -= learning_rate sum_s sums[s] z(s), in place: summed in F64, in the order of seeds, rounded once.
    For sums of `SeedTable.sent` the order does not count.

    Takes time as values times seeds whose sum is not 0. After a round, give what the round added.
    """
    indices = np.flatnonzero(sums).tolist()
    steps = [(direction(seed, index), float(sums[index])) for index in indices]
    descend(parameters, steps, learning_rate, at=at, chunk=chunk)


def descend(
    parameters: Parameters,
    steps: Sequence[tuple[Key, float]],
    learning_rate: float,
    *,
    at: Mapping[str, int] | None = None,
    chunk: int = CHUNK,
) -> None:
    """w -= learning_rate times the sum of scalar z over `steps` (stream, scalar): as `replay`."""
    for first, views in pieces(parameters, at, chunk):
        count = sum(map(len, views))
        total = np.zeros(count)
        for stream, scalar in steps:
            total += np.multiply(normals(stream, first, count), scalar, dtype=np.float64)
        total *= learning_rate
        for view, part in _parts(views, total):
            view[...] = view - part


def dot(parameters: Parameters, stream: Key, *, at: Mapping[str, int] | None = None) -> float:
    """<w, z>, in F64."""
    total = 0.0
    for first, views in pieces(parameters, at):
        z = normals(stream, first, sum(map(len, views)))
        for view, part in _parts(views, z):
            total += float(np.multiply(view, part, dtype=np.float64).sum())
    return total


def estimate(loss: Callable[[], float], move: Callable[[float], None], epsilon: float) -> float:
    """The slope of the loss along a direction, by central difference: off by O(epsilon^2).

    `move(scale)` adds scale z to the weights that `loss` sees. They are moved by +1, -2 and +1 epsilon, and
    nothing of them is kept: they come back within rounding (1e-6 |w|), and to the bit after `snap`. So do
    they where `loss` raises.

    EngineError where the losses are not finite.
    """
    move(epsilon)
    moved = epsilon
    try:
        above = loss()
        move(-2 * epsilon)
        moved = -epsilon
        below = loss()
    finally:
        move(-moved)
    slope = (above - below) / (2 * epsilon)
    if not math.isfinite(slope):
        raise EngineError(
            f"expected finite losses beside the weights, got {above} and {below}",
            remedy="make learning_rate or epsilon smaller",
        )
    return slope


def step(
    loss: Callable[[], float],
    parameters: Parameters,
    stream: Key,
    learning_rate: float,
    epsilon: float,
    *,
    at: Mapping[str, int] | None = None,
) -> float:
    """One step of MeZO or FedKSeed, in place; gives the slope, which with the stream is all that it was.

    It draws the direction four times, and keeps nothing of it or of the weights: memory is that of `loss`.
    """
    slope = estimate(loss, lambda scale: perturb(parameters, stream, scale, at=at), epsilon)
    perturb(parameters, stream, -learning_rate * slope, at=at)
    return slope


def snap(parameters: Parameters, epsilon: float) -> None:
    """Rounds each F32 array, in place, so that moving it by epsilon z and back gives every bit again.

    The values become multiples of one power of two for each array, the spacing of F32 numbers at
    max |w| + 8 epsilon. z is a multiple of 1/4, so with epsilon a power of two every sum on the way is such a
    multiple and below 2^24 of them: no addition rounds. Call it after each step. It keeps nothing, and costs
    what small values of an array have of precision beyond its largest one's.

    ConfigError where epsilon is no power of two, or too small beside the weights.
    """
    if math.frexp(epsilon)[0] != 0.5:
        raise ConfigError(f"expected an epsilon that is a power of two, got {epsilon}", remedy="2^-11, say")
    for name, array in parameters.items():
        largest = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
        grid = 2.0 ** (math.frexp(largest + LARGEST * epsilon)[1] - 24)
        if grid > epsilon / 4:
            raise ConfigError(
                f"expected an epsilon of at least {4 * grid} for weights up to {largest}, got {epsilon}"
            )
        flat = _flat(name, array)
        for first in range(0, len(flat), CHUNK):
            part = flat[first : first + CHUNK]
            part[...] = np.rint(part / grid) * grid


class SeedTable:
    """The sum of slopes for each of K seeds, `sums` (K,) F64: with the start, the whole state of a job."""

    def __init__(self, seeds: int) -> None:
        self.sums = np.zeros(seeds)

    def add(self, indices: Array, scalars: Array, weight: float = 1.0) -> None:
        """Steps, in their order. ConfigError where an index or a scalar cannot be one."""
        indices, scalars = checked_steps(indices, scalars, len(self.sums))
        np.add.at(self.sums, indices, weight * scalars)

    def sent(self) -> Array:
        """What everybody builds weights from, (K,) F32: the sums as multiples of one power of two, the
        spacing of F32 numbers at the largest |sum|.

        Then sum_s G[s] z(s) is exact in F64, in any order: G is at most 2^24 spacings and z 2^5 quarters, so
        for K up to 2^16 all of it is at most 2^45 quarters of a spacing, and F64 has 2^53. All devices have
        the same weights, to the bit, and what a round changed can be added to what was.
        """
        grid = spacing(self.sums)
        return (np.rint(self.sums / grid) * grid).astype(np.float32)

    def state_dict(self) -> dict[str, Array]:
        return {"sums": self.sums.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = _like(self.sums, state["sums"])


class Rebuilt:
    """The weights of a start and the tables that come, at the price of the seeds that changed.

    Keeps F64 totals of all values beside the start. What it makes is what `replay` makes of the last table
    alone, to the bit, for tables of `SeedTable.sent`.
    """

    def __init__(self, start: Parameters, seed: int, learning_rate: float) -> None:
        self._start, self._seed, self._rate = start, seed, learning_rate
        self._restart(0)

    def _restart(self, seeds: int) -> None:
        self._totals = {name: np.zeros(array.shape) for name, array in self._start.items()}
        self._table = np.zeros(seeds, np.float32)

    def load(self, table: Array) -> dict[str, Array]:
        """Fresh F32 arrays, by name, for a table (K,) F32."""
        ratio = spacing(table) / spacing(self._table) if self._table.any() else 1.0
        if len(table) != len(self._table) or not 2.0**-8 <= ratio <= 2.0**8:
            self._restart(len(table))  # F64 has no room for the multiples of both
        replay(self._totals, table.astype(np.float64) - self._table, self._seed, -1.0)
        self._table = table.copy()
        return {
            name: (array - self._rate * self._totals[name]).astype(np.float32)
            for name, array in self._start.items()
        }


def spacing(values: Array) -> float:
    """Of F32 numbers as large as the largest of |values|, a power of two."""
    largest = max(values.max(initial=0.0), -values.min(initial=0.0))
    return 2.0 ** max(math.frexp(largest)[1] - 24, -149)


class Amplitudes:
    """What each seed was worth so far: FedKSeed-Pro's chances of being drawn.

    Source: the paper's section on Pro: p = softmax(minmax(mean |g|)), |g| cut at 1000. A seed not yet drawn
    counts 0, as in the authors' code.
    """

    def __init__(self, seeds: int) -> None:
        self.sums, self.counts = np.zeros(seeds), np.zeros(seeds)

    def add(self, indices: Array, scalars: Array) -> None:
        indices, scalars = checked_steps(indices, scalars, len(self.sums))
        np.add.at(self.sums, indices, np.minimum(np.abs(scalars), SLOPE_MAX))
        np.add.at(self.counts, indices, 1.0)

    def merge(self, others: Amplitudes) -> None:
        self.sums += others.sums
        self.counts += others.counts

    def probabilities(self) -> Array:
        """(K,) F64, sum 1. Its last bits, of exp, are a device's own: send it, or the indices drawn."""
        means = self.sums / np.maximum(self.counts, 1.0)
        low, span = means.min(), np.ptp(means)
        weights = np.exp((means - low) / span if span else np.zeros_like(means))
        return weights / weights.sum()

    def state_dict(self) -> dict[str, Array]:
        return {"sums": self.sums.copy(), "counts": self.counts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = _like(self.sums, state["sums"])
        self.counts = _like(self.counts, state["counts"])


def draw(stream: Key, count: int, probabilities: Array) -> Array:
    """Indices of `count` steps' seeds, (count,) int64, each with its probability."""
    u = (words(stream, 0, count) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    bounds = np.cumsum(probabilities)
    return np.minimum(np.searchsorted(bounds, u * bounds[-1], side="right"), len(bounds) - 1)


def checked_steps(indices: Any, scalars: Any, seeds: int) -> tuple[Array, Array]:
    """Indices as int64 and scalars as F64, alike in length. ConfigError where they cannot be steps."""
    indices, scalars = np.asarray(indices), np.asarray(scalars)
    if indices.ndim != 1 or indices.shape != scalars.shape:
        raise ConfigError(f"expected a scalar for each seed, got {indices.shape} and {scalars.shape}")
    if indices.size and not (indices.dtype.kind in "iu" and indices.min() >= 0 and indices.max() < seeds):
        raise ConfigError(f"expected seeds from 0 to {seeds - 1}, got {indices.min()} to {indices.max()}")
    scalars = scalars.astype(np.float64)
    if not np.isfinite(scalars).all():
        raise ConfigError("expected finite scalars, got NaN or infinity")
    return indices.astype(np.int64), scalars


def _flat(name: str, array: Array) -> Array:
    is_usable = array.dtype in (np.float32, np.float64) and array.flags.c_contiguous and array.flags.writeable
    assert is_usable, f"{name}: expected a writable F32 array in C order, got {array.dtype}"
    return array.reshape(-1)


def _parts(views: list[Array], values: Array) -> Iterator[tuple[Array, Array]]:
    """Each view with the values that are for it."""
    done = 0
    for view in views:
        yield view, values[done : done + len(view)]
        done += len(view)


def _like(old: Array, new: Any) -> Array:
    new = np.array(new, np.float64)
    if new.shape != old.shape:
        raise ConfigError(f"expected {old.shape} values of a job's state, got {new.shape}")
    return new
