"""Updates of first-order training, projected on directions that everybody can draw.

Ferret (arXiv:2409.06277): members train as they like; of each block's change delta = w_old - w_new they send
coordinates <delta, v_s> along n of K shared directions, and the server steps by their sum back along them.
v is a normal number cut at +-1/sqrt(d), d the block's size; its variance is 1/(3 d), so the mean of
sum_s <delta, v_s> v_s is n/(3 d) delta. The factor here is therefore 3 d/n and gives delta; the authors' d/n
gives a third of it, which they leave to the server's rate.

A block is a named array; its directions begin at its position in the flat order of names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from edged import ConfigError

from ._seeds import CHUNK, Parameters, positions, sizes
from ._stream import Array, Key, key, uniforms, words

LEAST = 2  # directions of a block, however little it changed


def cut_normals(stream: Key, first: int, count: int, size: int) -> Array:
    """Normal numbers cut at +-1/sqrt(size), (count,) F32, with multiplications alone.

    Over so short a stretch the normal density is 1 - x^2/2; its inverse distribution function is taken to
    that order, right within 1/size^2. For a block of any use it is even but for the last digits.
    """
    u = uniforms(stream, first, count)
    u -= (u - u * u * u) * np.float32(1 / (6 * size))
    return u * np.float32(1 / math.sqrt(size))


def shares(norms: Mapping[str, float], seeds: int) -> dict[str, int]:
    """How many of K directions each block gets: as its change's norm to the largest; 2 to K."""
    largest = max(norms.values(), default=0.0)
    if not math.isfinite(sum(norms.values())):
        raise ConfigError("expected finite changes of blocks, got NaN or infinity")
    part = {name: norm / largest if largest else 0.0 for name, norm in norms.items()}
    return {name: min(seeds, max(LEAST, round(seeds * part[name]))) for name in norms}


def subset(seed: int, block: str, count: int, seeds: int) -> Array:
    """Which of K directions a block of `count` has, (count,) int64: chance, but the same at both ends."""
    order = np.argsort(words(key(seed, f"subset {block}"), 0, seeds), kind="stable")
    return order[:count]


def norms(delta: Parameters) -> dict[str, float]:
    return {name: math.sqrt(float(np.square(part, dtype=np.float64).sum())) for name, part in delta.items()}


def project(delta: Parameters, seed: int, seeds: int) -> dict[str, Array]:
    """Coordinates of each block's change, F32; their number says which directions they are of.

    4 bytes each travel: with 2 to K a block. `seed`: the round's own, so that no direction is left out for
    good.
    """
    at = positions(sizes(delta))
    made = {}
    for name, count in shares(norms(delta), seeds).items():
        flat = delta[name].reshape(-1)
        coordinates = []
        for index in subset(seed, name, count, seeds).tolist():
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
    coordinates: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], seed: int, seeds: int
) -> dict[str, Array]:
    """Each block's change from its coordinates, F64: 3 d/n sum_s <delta, v_s> v_s; right in the mean, and the
    more alike the more directions: the cosine is 1 / sqrt(1 + d/n).

    ConfigError where a block has more coordinates than there are directions.
    """
    at = positions({name: math.prod(shape) for name, shape in shapes.items()})
    made = {}
    for name, shape in shapes.items():
        size, values = math.prod(shape), coordinates[name]
        if not 0 < len(values) <= seeds:
            raise ConfigError(f"{name}: expected 1 to {seeds} coordinates, got {len(values)}")
        total = np.zeros(size)
        for index, value in zip(subset(seed, name, len(values), seeds).tolist(), values, strict=True):
            for begin, v in _direction(seed, index, at[name], size):
                total[begin : begin + len(v)] += np.multiply(v, value, dtype=np.float64)
        made[name] = (total * (3 * size / len(values))).reshape(shape)
    return made


def step(parameters: Parameters, change: Parameters, rate: float = 1.0, limit: float = 10.0) -> None:
    """w -= rate times the change, in place; of each block a change longer than `limit` is made so long.

    The authors clip at 10; that it is the block's norm is this code's reading.
    """
    for name, length in norms(change).items():
        scale = rate * min(1.0, limit / length) if length else rate
        parameters[name][...] = parameters[name] - scale * change[name]


def _direction(seed: int, index: int, at: int, size: int) -> Iterator[tuple[int, Array]]:
    """A block's direction in parts: where each begins in the block, and its values."""
    stream = key(seed, f"projection {index}")
    for begin in range(0, size, CHUNK):
        yield begin, cut_normals(stream, at + begin, min(CHUNK, size - begin), size)
