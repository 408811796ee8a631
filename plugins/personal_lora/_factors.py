"""LoRA factors as numbers: in one row, as a stack, and what a sum of products is made of. numpy only.

Letters: A (r, in), B (out, r), s the scale, p a member's weight over the sum of weights; T = sum p s B A.
All sums are in F64, whatever the factors are in. What goes out has the dtype of the job's start: F32 in a
job; F64 shows an identity to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Factors, Member, Update

Array = np.ndarray
RANK_AT_ONCE = 256  # of products that are summed in one
BLOCK = 1 << 16  # values of many rows that are worked on at once: half a MiB in F64


def read_only(array: Array) -> Array:
    """The same values; nobody who is handed them can change the server's state."""
    view = array.view()
    view.flags.writeable = False
    return view


def first_ranks(factors: Factors, r: int) -> dict[str, tuple[Array, Array]]:
    """The first r rows of A and columns of B: what a member of smaller r begins with."""
    return {n: (read_only(A[:r]), read_only(B[:, :r])) for n, (A, B) in factors.items()}


def weight_of(update: Update) -> float:
    """ConfigError unless it is above 0 and finite."""
    weight = float(update.weight)
    if not 0 < weight < float("inf"):
        raise ConfigError(
            f"expected a weight above 0 of rank {update.member.rank}, got {weight}",
            remedy="send the rows that the member trained on",
        )
    return weight


def check_start(start: Factors) -> None:
    """ConfigError unless there are factors, of one r in all modules."""
    if not start:
        raise ConfigError("expected the factors that a job begins with, got none", remedy="name modules")
    r = len(start[min(start)][0])
    for name, (A, B) in start.items():
        if A.ndim != 2 or B.ndim != 2 or not r == len(A) == B.shape[1] or not A.size or not B.size:
            raise ConfigError(
                f"{name}: expected A ({r}, in) and B (out, {r}), got {A.shape} and {B.shape}",
                remedy="start from factors of one r in all modules",
            )


def check_update(update: Update, start: Factors, frozen: str = "") -> None:
    """ConfigError, naming the module, unless an update has the start's modules at its member's r. What
    stands in the place of a frozen factor is not looked at."""
    name, rank, r = "", update.member.rank, update.member.r
    if update.factors.keys() != start.keys():
        name = min(update.factors.keys() ^ start.keys())
        what = "which the job does not tune" if name in update.factors else "which it does not have"
        raise ConfigError(
            f"expected the job's {len(start)} modules of rank {rank}; it differs in {name}, {what}",
            remedy="start the member from the same job",
        )
    for name, (A, B) in start.items():
        came, wanted = update.factors[name], ((r, A.shape[1]), (B.shape[0], r))
        for letter, one, shape in zip("AB", came, wanted, strict=True):
            if letter != frozen and np.shape(one) != shape:
                raise ConfigError(
                    f"{name}: expected {letter} {shape} of rank {rank}, got {np.shape(one)}",
                    remedy="start the member from the same job",
                )


def check_alike(method: str, members: Sequence[Member], r: int) -> None:
    """ConfigError unless all have r and one scale: values of factors cannot be compared else."""
    for member in members:
        if member.r != r or member.scale != members[0].scale:
            raise ConfigError(
                f"{method} puts factors beside one another: expected r {r} and scale {members[0].scale:g} "
                f"of every member, got r {member.r} and scale {member.scale:g} of rank {member.rank}",
                remedy="give all members one r and alpha, or choose flora or flexlora",
            )


class Layout:
    """All values of an adapter in one row: modules by name, A before B, each by rows."""

    def __init__(self, start: Factors) -> None:
        check_start(start)
        self.names = sorted(start)
        self.shapes = {name: (start[name][0].shape, start[name][1].shape) for name in self.names}
        self.dtype = np.result_type(*(one for pair in start.values() for one in pair))
        self.size = sum(A.size + B.size for A, B in start.values())

    def flat(self, factors: Factors, dtype: Any = np.float64, out: Array | None = None) -> Array:
        """(size,), a copy; in `out` where that is given."""
        row, at = np.empty(self.size, dtype) if out is None else out, 0
        for name in self.names:
            for one in factors[name]:
                row[at : at + one.size] = one.reshape(-1)
                at += one.size
        return row

    def factors(self, row: Array) -> dict[str, tuple[Array, Array]]:
        """The factors of a row (size,), in the dtype of the start; read only."""
        row, made, at = row.astype(self.dtype), {}, 0
        for name in self.names:
            pair = []
            for rows, columns in self.shapes[name]:
                pair.append(read_only(row[at : at + rows * columns].reshape(rows, columns)))
                at += rows * columns
            made[name] = (pair[0], pair[1])
        return made

    def is_of(self, letter: str) -> Array:
        """Bool (size,): which values are of A, or of B."""
        kinds = (
            np.full(np.prod(s), which)
            for n in self.names
            for which, s in zip("AB", self.shapes[n], strict=True)
        )
        return np.concatenate(list(kinds)) == letter


class Scratch:
    """F64 memory that is used again: the first touch of fresh pages costs as much as what is computed in
    them."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def take(self, what: str, rows: int, columns: int) -> Array:
        """(rows, columns), of any values; what was taken for the same purpose before is gone."""
        size = rows * columns
        if what not in self._kept or self._kept[what].size < size:
            self._kept[what] = np.empty(size)
        return self._kept[what][:size].reshape(rows, columns)


class Stack:
    """A sum of products, sum c B A, as one pair (A (R, in), B (out, R)): products side by side.

    Exact while R stays at or below min(in, out). Above it the sum is kept as the matrix itself, whose rank
    is min(in, out): still no part of it is lost, and memory ends there. `scratch`: of several stacks that
    are worked on in turn.
    """

    def __init__(self, inputs: int, outputs: int, scratch: Scratch | None = None) -> None:
        self._scratch = scratch or Scratch()
        self.limit = min(inputs, outputs)
        self.rank = 0  # of what is kept, at most
        self.shape = (outputs, inputs)
        self._parts: list[tuple[float, Array, Array]] = []
        self._total: Array | None = None  # of the parts before those

    def add(self, coefficient: float, A: Array, B: Array) -> None:
        """A (r, in), B (out, r), kept as they are until the stack is too high."""
        self._parts.append((coefficient, A, B))
        self.rank += len(A)
        if self.rank > self.limit + min(self.limit, RANK_AT_ONCE):  # not at each one: it costs in x out
            self._fold()

    def dense(self) -> Array:
        """(out, in), F64."""
        total = np.zeros(self.shape) if self._total is None else self._total.copy()
        self._add_parts(total)
        return total

    def pair(self, factor: float = 1.0) -> tuple[Array, Array]:
        """A (R, in) and B (out, R) in F64, R <= min(in, out), with B A = factor x the sum."""
        if self.rank > self.limit:
            self._fold()
        outputs, inputs = self.shape
        if self._total is None:
            A, B = np.empty((self.rank, inputs)), np.empty((outputs, self.rank))
            _side_by_side(self._parts, A, B, factor)
            return A, B
        total = factor * self._total
        return (np.eye(inputs), total) if inputs <= outputs else (total, np.eye(outputs))

    def _fold(self) -> None:
        if self._total is None:
            self._total = np.zeros(self.shape)
        self._add_parts(self._total)
        self._parts, self.rank = [], self.limit

    def _add_parts(self, total: Array) -> None:
        """So many at once that a product is worth its time, and copies in F64 are few."""
        at = 0
        while at < len(self._parts):
            end, rank = at, 0
            while end < len(self._parts) and (end == at or rank < RANK_AT_ONCE):
                rank, end = rank + len(self._parts[end][1]), end + 1
            outputs, inputs = self.shape
            A, B = self._scratch.take("A", rank, inputs), self._scratch.take("B", outputs, rank)
            _side_by_side(self._parts[at:end], A, B)
            total += np.matmul(B, A, out=self._scratch.take("BA", outputs, inputs))
            at = end


def _side_by_side(
    parts: Sequence[tuple[float, Array, Array]], A: Array, B: Array, factor: float = 1.0
) -> None:
    """All parts into A (R, in) and B (out, R), F64; coefficients, times `factor`, in A."""
    at = 0
    for coefficient, part_A, part_B in parts:
        ranks = slice(at, at + len(part_A))
        np.multiply(part_A, factor * coefficient, out=A[ranks], dtype=np.float64)
        B[:, ranks] = part_B
        at += len(part_A)


def svd_of_product(A: Array, B: Array) -> tuple[Array, Array, Array]:
    """U (out, k), S (k,) falling, Vt (k, in) of B A, k = min(R, out, in), without ever forming B A.

    B = Qb Rb and A' = Qa Ra; the SVD of the small Rb Ra' gives that of the whole: O((in + out) R^2). Signs
    are those that make the largest value of each column of U positive, so that every machine agrees.
    """
    Qb, Rb = np.linalg.qr(B)
    Qa, Ra = np.linalg.qr(A.T)
    U, S, Vt = np.linalg.svd(Rb @ Ra.T, full_matrices=False)
    U, Vt = Qb @ U, Vt @ Qa.T
    signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    signs[signs == 0] = 1.0
    return U * signs, S, Vt * signs[:, None]


def blocks(rows: int, size: int) -> Iterator[slice]:
    """Parts of so many rows (size,) that hold at most BLOCK values together: never all are copied."""
    width = max(1, BLOCK // rows)
    for at in range(0, size, width):
        yield slice(at, at + width)


def packed(prefix: str, factors: Factors) -> dict[str, Array]:
    """Copies of factors by flat names, for a state."""
    return {
        f"{prefix}.{n}.{k}": np.array(one)
        for n, pair in factors.items()
        for k, one in zip("AB", pair, strict=True)
    }


def unpacked(prefix: str, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """What `packed` made. ConfigError where a name is missing."""
    return {n: (kept(state, f"{prefix}.{n}.A"), kept(state, f"{prefix}.{n}.B")) for n in names}


def kept(state: Mapping[str, Any], name: str) -> Array:
    """A copy of an array of a state, read only. ConfigError where it is missing."""
    if name not in state:
        raise ConfigError(
            f"expected {name} in the state of an aggregator, got {len(state)} other names",
            remedy="go on with the method, modules and r that the job began with",
        )
    return read_only(np.array(state[name]))
