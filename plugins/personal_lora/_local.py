"""A member's part of a method, on numbers alone: what is added to its gradients, and what it sends.

The trainer of a member knows no method. It asks `Local` at the start of a round, before each local step
where `corrects` says so, and at the end; what a method wants is read from a download's extras by name:

    mu              fedprox: mu (P - P_loaded) is added to the gradient
    control         scaffold: the members' mean gradient; control - own is added to the gradient, and the
                    change of `own` goes back as "control". Local steps are plain SGD
    ranks_sent      lora-a2: what part of a factor's values may change, in whole ranks of all modules; which
                    ones did goes back as "ranks"
    upload_density  flasc: what part of all values may change
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors

from ._factors import Array, Layout

Extras = dict[str, Array]


class Local:
    """One round of one member. `own`: what `finish` gave it to keep in its last round; it never leaves the
    member. `frozen`: the factor that this round leaves alone."""

    def __init__(self, download: Download, own: Mapping[str, Any], frozen: str = "") -> None:
        self._layout = Layout(download.factors)
        self._loaded = self._layout.flat(download.factors)
        self._extras, self._frozen = download.extras, frozen
        zero = np.zeros(self._layout.size)
        self._own = np.asarray(own.get("control", zero), np.float64) if "control" in self._extras else zero

    @property
    def corrects(self) -> bool:
        """Is there anything to add to a gradient?"""
        return "mu" in self._extras or "control" in self._extras

    @property
    def is_plain(self) -> bool:
        """Are the local steps plain SGD?"""
        return "control" in self._extras

    def correction(self, factors: Factors) -> dict[str, tuple[Array, Array]]:
        """What is added to the gradient at `factors`, by module for A and for B."""
        row = np.zeros(self._layout.size)
        if "mu" in self._extras:
            row += float(self._extras["mu"]) * (self._layout.flat(factors) - self._loaded)
        if "control" in self._extras:
            row += np.asarray(self._extras["control"], np.float64) - self._own
        return self._layout.factors(row)

    def finish(
        self, factors: Factors, steps: int, learning_rate: float
    ) -> tuple[dict[str, tuple[Array, Array]], Extras, Extras]:
        """After `steps` local steps: the factors and extras of the update, and what to keep as `own`."""
        row, extras, own = self._layout.flat(factors), {}, {}
        if "control" in self._extras:
            if steps < 1 or not learning_rate > 0:
                raise ConfigError(
                    f"scaffold: expected steps and a learning rate above 0, got {steps} and {learning_rate}",
                    remedy="send no update of a round without a step",
                )
            server = np.asarray(self._extras["control"], np.float64)
            kept = self._own - server + (self._loaded - row) / (steps * learning_rate)
            extras["control"] = (kept - self._own).astype(self._layout.dtype)
            own["control"] = self._own + extras["control"]  # what the server has been told, to the bit
        if "ranks_sent" in self._extras:
            most = most_of_ranks(self._layout, self._frozen, float(self._extras["ranks_sent"]))
            ranks = best_ranks(self._layout, self._loaded, row, self._frozen, most)
            row = np.where(of_ranks(self._layout, ranks, self._frozen), row, self._loaded)
            extras["ranks"] = ranks
        if "upload_density" in self._extras:
            mask = largest(row - self._loaded, float(self._extras["upload_density"]))
            row = np.where(mask, row, self._loaded)
        return self._layout.factors(row), extras, own


def largest(row: Array, density: float) -> Array:
    """Bool (size,): the floor(density size) values of largest size, at least one; of equals the earlier."""
    chosen = np.zeros(len(row), bool)
    chosen[np.argsort(-np.abs(row), kind="stable")[: allowed(len(row), density)]] = True
    return chosen


def allowed(size: int, density: float) -> int:
    """How many of `size` values a density lets through."""
    return max(1, int(density * size))


def best_ranks(layout: Layout, loaded: Array, trained: Array, frozen: str, most: int) -> Array:
    """Bool (modules, r), modules by name: the ranks j whose change is worth most, of all modules, as long as
    they have at most `most` values together.

    The change of B A in rank j is dB[:, j] A[j] where A is frozen, and B[:, j] dA[j] where B is: its
    Frobenius norm is the product of two lengths (LoRA-A2, 2410.22815). The paper counts ranks; of layers that
    are unlike wide that is not known in bytes before it is chosen, and values are.
    """
    before, after = layout.factors(loaded), layout.factors(trained)
    worth = []
    for name in layout.names:
        (A, B), (A2, B2) = before[name], after[name]
        dA, dB = (A, B2 - B) if frozen == "A" else (A2 - A, B)
        worth.append(np.linalg.norm(dB, axis=0) * np.linalg.norm(dA, axis=1))
    sizes = rank_sizes(layout, frozen).ravel()
    chosen = np.zeros(len(sizes), bool)
    for index in np.argsort(-np.concatenate(worth), kind="stable").tolist():
        if sizes[index] <= most:
            chosen[index] = True
            most -= int(sizes[index])
    return chosen.reshape(len(worth), -1)


def most_of_ranks(layout: Layout, frozen: str, part: float) -> int:
    """Values that may change: this part of the factor that is not frozen, one rank at least."""
    sizes = rank_sizes(layout, frozen)
    return max(allowed(int(sizes.sum()), part), int(sizes.max()))


def rank_sizes(layout: Layout, frozen: str) -> Array:
    """(modules, r) int64: values of each rank in the factor that is not frozen."""
    shapes = [layout.shapes[name] for name in layout.names]
    wide = [outputs if frozen == "A" else inputs for (_, inputs), (outputs, _) in shapes]
    return np.repeat(np.array(wide, np.int64)[:, None], shapes[0][0][0], 1)


def of_ranks(layout: Layout, ranks: Array, frozen: str) -> Array:
    """Bool (size,): the values, of the factor that is not frozen, that belong to chosen ranks."""
    parts = []
    for name, chosen in zip(layout.names, ranks, strict=True):
        (_, inputs), (outputs, _) = layout.shapes[name]
        rows = np.repeat(chosen & (frozen != "A"), inputs)
        parts += [rows, np.tile(chosen & (frozen != "B"), outputs)]
    return np.concatenate(parts)
