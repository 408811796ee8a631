"""Training by seeds: the weights are their start and one sum of scalars for each of K directions.

FedKSeed (arXiv:2312.06353): a step draws one of K seeds and its direction z(s), measures the slope
g = (L(w + eps z) - L(w - eps z)) / (2 eps), and does w -= lr g z(s). Whoever has the start w0 and the sum
G[s] of all slopes per seed has the weights: w = w0 - lr sum_s G[s] z(s). MeZO (arXiv:2305.17333) is the same
step with a seed never used twice. Weight decay would break the sum, so there is none.

Parameters are named arrays, F32 (F64 for tests), changed in place. A value's number in z is its position in
the flat order of sorted names; whoever holds some of the arrays says where they begin (`at`), and agrees with
the others. No more of a direction than `chunk` values exists at a time.

The authors draw with torch's generator on the parameter's device, where processor and GPU give unlike
directions for one seed; here `_stream` gives one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edged import ConfigError, EngineError

from ._stream import LARGEST, Array, Key, key, normals

Parameters = Mapping[str, Array]

CHUNK = 1 << 16  # values: word, number and sum of each fit a small processor's cache


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
