"""How many layers each device of a ring takes, as an integer programme.

After prima.cpp's Halda (arXiv:2504.08791v2): a token goes round the ring `rounds` times, each device running
its window of layers; a device whose layers do not fit its memory reads them again in every round. Halda
guesses which devices are short and corrects the guess in a loop; here that choice is a variable of the
programme, solved by HiGHS, which also chooses the devices. The objective is the sum over devices: the case
in which nothing was read ahead.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load where they are used: half a second that few searches need

KINDS = 5  # variables of a device: layers, accelerated layers, used, short, seconds of reading again
TIME_S = 0.7  # of one programme; the best found by then counts


@dataclass(frozen=True, slots=True)
class Device:
    """Seconds for one layer on the processor, and more (or, negative, fewer) of them on the accelerator; of
    one hop; of reading a layer again. Layers that memory and accelerator hold."""

    layer_s: float
    accelerator_s: float
    hop_s: float
    reread_s: float
    holds: int
    accelerator_holds: int = 0


@dataclass(frozen=True, slots=True)
class Ring:
    """`layers`, `accelerated`: of each device in one round. `seconds`: of one token."""

    layers: tuple[int, ...]
    accelerated: tuple[int, ...]
    rounds: int
    seconds: float


def solve(
    devices: Sequence[Device],
    layers: int,
    fixed_s: float = 0.0,
    *,
    is_choosing: bool = True,
    rounds_max: int = 1,
) -> Ring | None:
    """The best ring for `layers` layers, None where there is none; `fixed_s` comes to every token.

    `is_choosing`: devices may be left out; one alone pays no hop. `rounds_max`: rings of more rounds than
    one cut the layers in equal parts, so only divisors of `layers` are tried.
    """
    found: list[Ring] = []
    for rounds in (r for r in range(1, rounds_max + 1) if layers % r == 0):
        ring = _solve(devices, layers, rounds, is_choosing)
        if ring is not None:
            found.append(ring)
    if is_choosing:
        found += [ring for index in range(len(devices)) if (ring := _alone(devices, layers, index))]
    best = min(found, key=lambda ring: ring.seconds, default=None)
    if best is None:
        return None
    return Ring(best.layers, best.accelerated, best.rounds, best.seconds + fixed_s)


def _alone(devices: Sequence[Device], layers: int, index: int) -> Ring | None:
    device = devices[index]
    seconds, fast = min(
        (_seconds_alone(device, layers, fast), fast)
        for fast in range(min(layers, device.accelerator_holds) + 1)
    )
    if not np.isfinite(seconds):
        return None
    counts = [0] * len(devices)
    accelerated = counts.copy()
    counts[index], accelerated[index] = layers, fast
    return Ring(tuple(counts), tuple(accelerated), 1, seconds)


def _seconds_alone(device: Device, layers: int, fast: int) -> float:
    slow = layers - fast
    again = device.reread_s * slow if slow > device.holds else 0.0
    return device.layer_s * layers + device.accelerator_s * fast + again


def _solve(devices: Sequence[Device], layers: int, rounds: int, is_choosing: bool) -> Ring | None:
    """One number of rounds, hops paid by every device used. Variables by device, see KINDS."""
    size, window = len(devices), layers // rounds
    layer_s, gain_s, hop_s, reread_s, holds, fast = (
        np.array([getattr(device, name) for device in devices], float)
        for name in ("layer_s", "accelerator_s", "hop_s", "reread_s", "holds", "accelerator_holds")
    )
    can_reread = np.isfinite(reread_s)
    most = np.where(can_reread, reread_s, 0) * layers
    zero, one = scipy.sparse.csr_matrix((size, size)), scipy.sparse.identity(size, format="csr")

    def rows(*blocks: object) -> scipy.sparse.csr_matrix:
        return scipy.sparse.hstack([zero if block is None else block for block in blocks], format="csr")

    def scaled(values: np.ndarray) -> scipy.sparse.spmatrix:
        return scipy.sparse.diags(values)

    limits = [
        (rows(-one, one, None, None, None), 0.0),  # accelerated <= layers
        (rows(one, None, scaled(np.full(size, -float(window))), None, None), 0.0),  # layers only where used
        (rows(-one, None, one, None, None), 0.0),  # whoever is used has a layer
        # rounds * (layers - accelerated) <= holds, unless short
        (rows(rounds * one, -rounds * one, None, scaled(np.full(size, -float(layers))), None), holds),
        (rows(None, rounds * one, None, None, None), fast),
        # reading again >= reread * rounds * (layers - accelerated) - most * (1 - short)
        (
            rows(
                scaled(np.where(can_reread, reread_s, 0) * rounds),
                scaled(-np.where(can_reread, reread_s, 0) * rounds),
                None,
                scaled(most),
                -one,
            ),
            most,
        ),
    ]
    total = scipy.sparse.csr_matrix(np.concatenate([np.ones(size), np.zeros((KINDS - 1) * size)])[None])
    constraints = [scipy.optimize.LinearConstraint(matrix, -np.inf, bound) for matrix, bound in limits]
    constraints.append(scipy.optimize.LinearConstraint(total, window, window))
    cost = np.concatenate([layer_s * rounds, gain_s * rounds, hop_s * rounds, np.zeros(size), np.ones(size)])
    lower = np.zeros(KINDS * size)
    if not is_choosing:
        lower[2 * size : 3 * size] = 1
    upper = np.concatenate([np.full(2 * size, window), np.ones(size), can_reread, np.full(size, np.inf)])
    integrality = np.concatenate([np.ones(4 * size), np.zeros(size)])
    answer = scipy.optimize.milp(
        cost,
        integrality=integrality,
        bounds=scipy.optimize.Bounds(lower, upper),
        constraints=constraints,
        options={"time_limit": TIME_S},
    )
    if answer.x is None:
        return None
    counts = answer.x.round().astype(int)
    return Ring(
        tuple(counts[:size].tolist()), tuple(counts[size : 2 * size].tolist()), rounds, float(answer.fun)
    )
