"""Aggregators of members that train without gradients: sums of scalars per seed, and a mean of factors.

`fedkseed`: members send the seed and the scalar of each step; everybody has the start and one sum per seed.
`mezo`: FedMeZO (arXiv:2402.05926): members step by MeZO on their own factors, and the server averages A and B
apart. The product of means is not the mean of products, as with every average of factors: the round loop's
residual says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors, Member, PolicyViolation, Update

from . import SAMPLINGS, SEEDS_MAX
from ._seeds import replay
from ._stream import Array
from ._table import Amplitudes, Rebuilt, SeedTable


def parameters_of(factors: Factors) -> dict[str, Array]:
    """Factors as named arrays, views of them, A and B apart: the order that directions go by."""
    return {f"{module}.{kind}": pair[i] for module, pair in factors.items() for i, kind in enumerate("AB")}


def factors_of(parameters: Mapping[str, Array]) -> Factors:
    """The other way."""
    modules = sorted({name[:-2] for name in parameters})
    return {module: (parameters[f"{module}.A"], parameters[f"{module}.B"]) for module in modules}


def replayed(start: Factors, table: Array, seed: int, learning_rate: float) -> Factors:
    """The start moved by a table (K,) F32, fresh arrays: what a member makes of a download's table alone."""
    made = copied(start)
    replay(made, table, seed, learning_rate)
    return factors_of(made)


class FedKSeed:
    """Sums G[s] over rounds of sum_k p_k acc_k[s]; made is start - learning_rate sum_s G[s] z(s).

    An update's extras: `seeds` (n,) and `scalars` (n,), its steps in their order; or `sums` (K,), the sum per
    seed of a member that masks. A download's extras: `table`, G as (K,) F32, and where seeds are drawn by
    amplitude `probabilities`. It has no factors: who has the start needs the table only. F64 sums stay here;
    the table is what everybody, this server too, builds from.
    """

    def __init__(self, settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> None:
        self._seeds = whole_number(settings, "seeds", 4096, most=SEEDS_MAX)
        rate = positive(settings, "learning_rate", 3e-7)
        seed = whole_number(settings, "seed", 0, least=0)
        sampling = settings.get("seed_sampling", "uniform")
        if sampling not in SAMPLINGS:
            raise ConfigError(f'seed_sampling: expected {" or ".join(SAMPLINGS)}, got "{sampling}"')
        self._scale = scale_of_all(members, "seeds")
        self._steps = int(settings.get("local_steps", self._seeds))
        self._rebuilt = Rebuilt(copied(start), seed, rate)
        self._table = SeedTable(self._seeds)
        self._amplitudes = Amplitudes(self._seeds) if sampling == "amplitude" else None
        self._settle()

    def frozen(self, round: int) -> str:
        return ""

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._round, self._weight = SeedTable(self._seeds), 0.0
        self._tried = Amplitudes(self._seeds)

    def add(self, update: Update) -> None:
        extras = update.extras
        if "sums" in extras and self._amplitudes is None:
            indices, scalars = np.arange(self._seeds), extras["sums"]
        elif {"seeds", "scalars"} <= extras.keys():
            indices, scalars = extras["seeds"], extras["scalars"]
            if len(indices) > self._steps:
                raise ConfigError(f"expected {self._steps} steps at most in an update, got {len(indices)}")
        else:
            raise ConfigError(f"expected seeds and scalars in an update, got {sorted(extras)}")
        self._round.add(indices, scalars, update.weight)
        self._weight += update.weight
        if self._amplitudes is not None:
            self._tried.add(indices, scalars)

    def finish(self) -> None:
        if not self._weight:
            raise PolicyViolation("expected an update of at least one member, got none")
        self._table.sums = self._table.sums + self._round.sums / self._weight
        if self._amplitudes is not None:
            self._amplitudes.merge(self._tried)
        self._settle()

    def download(self, member: Member) -> Download:
        extras = {"table": self._sent}
        if self._amplitudes is not None:
            extras["probabilities"] = self._amplitudes.probabilities().astype(np.float32)
        return Download({}, extras=extras)

    def adapter(self) -> Mapping[str, tuple[Any, Any, float]]:
        return {module: (a, b, self._scale) for module, (a, b) in self._made().items()}

    def state_dict(self) -> Mapping[str, Any]:
        state = self._table.state_dict()
        if self._amplitudes is not None:
            state |= {f"amplitudes.{name}": array for name, array in self._amplitudes.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._table.load_state_dict(state)
        if self._amplitudes is not None:
            self._amplitudes.load_state_dict(
                {name: state[f"amplitudes.{name}"] for name in self._amplitudes.state_dict()}
            )
        self._settle()

    def _settle(self) -> None:
        self.begin(0, ())
        self._sent, self._factors = self._table.sent(), None

    def _made(self) -> Factors:
        """Built when it is first asked for: it takes as long as values times seeds that changed."""
        if self._factors is None:
            self._factors = factors_of(self._rebuilt.load(self._sent))
        return self._factors


class Tuned:
    """What aggregators share whose state is A and B, F32: `what` they are, of members of one r and scale."""

    def __init__(self, start: Factors, members: Sequence[Member], what: str) -> None:
        self._scale, self._made = scale_of_all(members, what), copied(start)

    def begin(self, round: int, members: Sequence[Member]) -> None:
        raise NotImplementedError

    def download(self, member: Member) -> Download:
        return Download(factors_of(self._made))

    def adapter(self) -> Mapping[str, tuple[Any, Any, float]]:
        return {module: (a, b, self._scale) for module, (a, b) in factors_of(self._made).items()}

    def state_dict(self) -> Mapping[str, Any]:
        return {name: array.copy() for name, array in self._made.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._made = {name: np.array(state[name], np.float32) for name in self._made}
        self.begin(0, ())


class Mezo(Tuned):
    """Means of A and of B over the members' weights, summed in F64; all of one r."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> None:
        super().__init__(start, members, "a mean of factors")
        self.begin(0, members)

    def frozen(self, round: int) -> str:
        return ""

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._sums = {name: np.zeros(array.shape) for name, array in self._made.items()}
        self._weight = 0.0

    def add(self, update: Update) -> None:
        given = parameters_of(update.factors)
        shapes = {name: np.shape(array) for name, array in given.items()}
        expected = {name: array.shape for name, array in self._made.items()}
        if shapes != expected:
            name = min(set(shapes.items()) ^ set(expected.items()))[0]
            raise ConfigError(f"{name}: expected {expected.get(name)}, got {shapes.get(name)}")
        for name, array in given.items():
            self._sums[name] += np.multiply(array, update.weight, dtype=np.float64)
        self._weight += update.weight

    def finish(self) -> None:
        if not self._weight:
            raise PolicyViolation("expected an update of at least one member, got none")
        self._made = {name: (total / self._weight).astype(np.float32) for name, total in self._sums.items()}
        self.begin(0, ())


def scale_of_all(members: Sequence[Member], what: str) -> float:
    """The scale of them all. ConfigError for unlike ranks or scales: a direction is of one shape."""
    kinds = sorted({(member.r, member.scale) for member in members})
    if len(kinds) > 1:
        raise ConfigError(
            f"{what}: expected members of one r and scale, got r {', '.join(str(r) for r, _ in kinds)}",
            remedy="give all of them one r and alpha, or use flexlora or flora",
        )
    return kinds[0][1] if kinds else 1.0


def copied(factors: Factors) -> dict[str, Array]:
    return {name: np.array(array, np.float32, order="C") for name, array in parameters_of(factors).items()}


def whole_number(
    settings: Mapping[str, Any], name: str, default: int, least: int = 1, most: int = 1 << 63
) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name}: expected a whole number from {least} to {most}, got {value!r}")
    return value


def positive(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)
