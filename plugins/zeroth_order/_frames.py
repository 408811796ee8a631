"""A round of training by seeds in bytes: the table down, the steps up.

Little-endian. Down: the sum of each of K seeds, F32. Up: for each step its seed's index, uint32, and its
scalar, F32. With K = 4096 and 200 steps that is 4 K + 8 x 200 = 17,984 bytes, the "under 18 KB" of
FedKSeed's title. Both ends know K and the most steps there may be; a frame says neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edged import ConfigError, ProtocolError

from ._stream import Array
from ._table import checked_steps

SCALAR = np.dtype("<f4")
STEP = np.dtype([("seed", "<u4"), ("scalar", "<f4")])


def round_bytes(seeds: int, steps: int) -> int:
    """What a member receives and sends in a round."""
    return seeds * SCALAR.itemsize + steps * STEP.itemsize


def pack_table(sums: Array) -> bytes:
    """ProtocolError where a sum is not finite in F32: the training has diverged."""
    return _finite(_f32(sums)).tobytes()


def unpack_table(frame: bytes | memoryview, seeds: int) -> Array:
    """(seeds,) F32. ProtocolError for a wrong size, and for a sum that is not finite."""
    if len(frame) != seeds * SCALAR.itemsize:
        raise ProtocolError(
            f"expected a table of {seeds} seeds, {seeds * SCALAR.itemsize} bytes, got {len(frame)}"
        )
    return _finite(np.frombuffer(frame, SCALAR)).astype(np.float32)


def pack_steps(indices: Array, scalars: Array, seeds: int) -> bytes:
    """ProtocolError as `unpack_steps`: what cannot be read is not sent."""
    steps = np.empty(len(indices), STEP)
    steps["seed"], steps["scalar"] = _checked(indices, _f32(scalars), seeds)
    return steps.tobytes()


def unpack_steps(frame: bytes | memoryview, seeds: int, steps_max: int) -> tuple[Array, Array]:
    """Indices (n,) int64 and scalars (n,) F32, n at most `steps_max`.

    ProtocolError for a wrong size, an index of no seed, and a scalar that is not finite.
    """
    if len(frame) % STEP.itemsize or len(frame) > steps_max * STEP.itemsize:
        raise ProtocolError(
            f"expected up to {steps_max} steps of {STEP.itemsize} bytes, got {len(frame)} bytes"
        )
    steps = np.frombuffer(frame, STEP)
    indices, scalars = _checked(steps["seed"], steps["scalar"], seeds)
    return indices, scalars.astype(np.float32)


def _checked(indices: Any, scalars: Any, seeds: int) -> tuple[Array, Array]:
    try:
        return checked_steps(indices, scalars, seeds)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def _f32(values: Array) -> Array:
    with np.errstate(over="ignore"):  # it is then infinite, and refused
        return np.asarray(values, np.float64).astype(SCALAR)


def _finite(values: Array) -> Array:
    if not np.isfinite(values).all():
        raise ProtocolError("expected finite sums of seeds, got NaN or infinity")
    return values
