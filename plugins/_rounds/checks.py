"""What an update must be before it is added. Pure.

Each refusal has a code, by which the round loop counts; the update is left out and the round goes on. No
message has a value of an update in it.

| code | an update |
|---|---|
| update-stale, update-future | of another round: an earlier one, one that has not begun |
| update-replay | of a member that gave one in this round |
| update-base | for other frozen weights |
| update-member | of nobody in this round's cohort |
| update-weight | with a weight not above 0, or above what the job's owner allows (PolicyViolation) |
| update-shape | with other modules, ranks, shapes, types or extras |
| update-nan | with what is not finite |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edged import Member, PolicyViolation, ProtocolError, Update


@dataclass(frozen=True, slots=True)
class Extra:
    """What an array must be that an aggregator asked for; None in a shape: any length."""

    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the server knows of a round's updates.

    base: the hash of the frozen weights; members: the cohort by rank; shapes: (out, in) by module; frozen:
    "A" or "B" where nobody sends that factor (what stands in its place is None, or the factor itself);
    extras: by name.
    """

    round: int
    base: str
    members: Mapping[int, Member]
    shapes: Mapping[str, tuple[int, int]]
    weight_most: float
    frozen: str = ""
    extras: Mapping[str, Extra] = field(default_factory=dict)


def check(update: Update, base: str, expected: Expected, heard: Collection[int] = ()) -> None:
    """Nothing where the update may be added; `base`: the hash that came with it; `heard`: ranks whose update
    of this round was added. ProtocolError or PolicyViolation with a code (module docstring) otherwise.
    """
    rank = update.member.rank
    if update.round != expected.round:
        code = "update-stale" if update.round < expected.round else "update-future"
        raise _refusal(code, rank, f"round {expected.round}", f"round {update.round}")
    if expected.members.get(rank) != update.member:
        raise _refusal("update-member", rank, "a member of this round, its r and scale as agreed", "another")
    if rank in heard:
        raise _refusal("update-replay", rank, "one update a round", "a second")
    if base != expected.base:
        raise _refusal("update-base", rank, f"the base {expected.base[:12]}", base[:12])
    if not 0 < update.weight <= expected.weight_most:
        raise PolicyViolation(
            f"update of rank {rank}: expected a weight above 0 and at most {expected.weight_most:g}, "
            f"got {update.weight:g}",
            code="update-weight",
        )
    _check_factors(update, expected)
    _check_extras(update, expected)


def _check_factors(update: Update, expected: Expected) -> None:
    rank, r = update.member.rank, update.member.r
    if update.factors.keys() != expected.shapes.keys():
        count = len(update.factors.keys() ^ expected.shapes.keys())
        raise _refusal(
            "update-shape", rank, f"{len(expected.shapes)} modules", f"{count} too many or missing"
        )
    for module, (out, in_) in expected.shapes.items():
        pair = update.factors[module]
        if len(pair) != 2:
            raise _refusal("update-shape", rank, f"two factors of {module}", str(len(pair)))
        for name, factor, shape in zip("AB", pair, ((r, in_), (out, r)), strict=True):
            if factor is not None or name != expected.frozen:
                _check_array(rank, f"{name} of {module}", factor, Extra(shape))


def _check_extras(update: Update, expected: Expected) -> None:
    rank = update.member.rank
    if update.extras.keys() != expected.extras.keys():
        names = ", ".join(sorted(expected.extras)) or "none"
        raise _refusal(
            "update-shape", rank, f"the extras {names}", f"{len(update.extras)} that are not these"
        )
    for name, extra in expected.extras.items():
        _check_array(rank, name, update.extras[name], extra)


def _check_array(rank: int, what: str, array: Any, extra: Extra) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != extra.dtype or not _fits(array.shape, extra.shape):
        came = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise _refusal("update-shape", rank, f"{what} {extra.shape} of {extra.dtype}", came)
    if not np.isfinite(array).all():
        raise _refusal("update-nan", rank, f"{what} finite", "NaN or infinity")


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        b is None or a == b for a, b in zip(shape, expected, strict=True)
    )


def _refusal(code: str, rank: int, expected: str, came: str) -> ProtocolError:
    return ProtocolError(f"update of rank {rank}: expected {expected}, got {came}", code=code)
