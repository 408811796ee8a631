"""Rounds without a model: members that move their factors at random, as each method lets them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from edged_plugins.personal_lora import AGGREGATORS
from edged_plugins.personal_lora._local import Local

from edged import Aggregator, AggregatorEntry, Download, Factors, Member, Update

ENTRIES = {entry.name: entry for entry in AGGREGATORS}
SHAPES = {"model.layers.1.q_proj": (20, 24), "model.layers.0.v_proj": (20, 12)}  # in, out


def start_of(
    r: int = 4, seed: int = 0, shapes: Mapping[str, tuple[int, int]] = SHAPES, dtype: Any = "f4"
) -> Factors:
    """A at random, B zero: what a job begins with."""
    drawn = np.random.default_rng(seed)
    return {
        n: (drawn.standard_normal((r, i)).astype(dtype), np.zeros((o, r), dtype))
        for n, (i, o) in shapes.items()
    }


def members_of(count: int, r: int | Sequence[int] = 4, scale: float | Sequence[float] = 2.0) -> list[Member]:
    rs = [r] * count if isinstance(r, int) else list(r)
    scales = [scale] * count if isinstance(scale, float) else list(scale)
    return [Member(k, rs[k], scales[k]) for k in range(count)]


def made(name: str, start: Factors, members: Sequence[Member], **settings: Any) -> Aggregator:
    """The aggregator as a server would load it."""
    return loader(ENTRIES[name])(settings, start, members)


def loader(entry: AggregatorEntry) -> Callable[..., Aggregator]:
    module, attribute = entry.load.split(":")
    return getattr(importlib.import_module(module), attribute)


def moved(factors: Factors, drawn: np.random.Generator, frozen: str = "", size: float = 1.0) -> Factors:
    """Factors after local steps: every value has moved but the frozen factor's."""

    def step(letter: str, one: np.ndarray) -> np.ndarray:
        return one if letter == frozen else (one + size * drawn.standard_normal(one.shape)).astype(one.dtype)

    return {n: (step("A", A), step("B", B)) for n, (A, B) in factors.items()}


@dataclass
class Run:
    """A server with its members: each keeps what its method gives it to keep."""

    server: Aggregator
    members: Sequence[Member]
    seed: int = 0
    own: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def update(self, member: Member, round: int) -> Update:
        drawn = np.random.default_rng([self.seed, round, member.rank])
        frozen, download = self.server.frozen(round), self.server.download(member)
        local = Local(download, self.own.get(member.rank, {}), frozen)
        factors, extras, own = local.finish(moved(download.factors, drawn, frozen), 3, 0.1)
        self.own[member.rank] = own
        return Update(member, round, 1.0 + member.rank, factors, extras)

    def updates(self, round: int) -> list[Update]:
        return [self.update(member, round) for member in self.members]

    def round(self, round: int, updates: Sequence[Update] | None = None) -> list[Update]:
        """One whole round; the updates that it was made of."""
        updates = self.updates(round) if updates is None else updates
        self.server.begin(round, self.members)
        for update in updates:
            self.server.add(update)
        self.server.finish()
        return list(updates)

    def downloads(self) -> list[tuple[Member, Download]]:
        return [(member, self.server.download(member)) for member in self.members]


def updates_of(
    members: Sequence[Member],
    seed: int = 0,
    weights: Sequence[float] = (),
    dtype: Any = "f8",
    r0: int = 0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> list[Update]:
    """Updates of factors drawn afresh."""
    drawn = np.random.default_rng(seed)
    return [
        Update(
            m,
            r0,
            weights[k] if weights else 1.0 + k,
            {
                n: (
                    drawn.standard_normal((m.r, i)).astype(dtype),
                    drawn.standard_normal((o, m.r)).astype(dtype),
                )
                for n, (i, o) in shapes.items()
            },
        )
        for k, m in enumerate(members)
    ]


def product(factors: Factors, name: str, scale: float = 1.0) -> np.ndarray:
    A, B = factors[name]
    return scale * (np.asarray(B, "f8") @ np.asarray(A, "f8"))


def mean_product(updates: Sequence[Update], name: str) -> np.ndarray:
    """sum p s B A, the one-liner."""
    total = sum(u.weight for u in updates)
    return sum(u.weight / total * product(u.factors, name, u.member.scale) for u in updates)


def loaded(member: Member, download: Download, name: str) -> np.ndarray:
    """What a member's layer adds after a download."""
    merged = product(download.merged, name) if name in download.merged else 0.0
    return merged + product(download.factors, name, member.scale)


def of_adapter(server: Aggregator, name: str) -> np.ndarray:
    A, B, scale = server.adapter()[name]
    return scale * (np.asarray(B, "f8") @ np.asarray(A, "f8"))


def dense_residual(updates: Sequence[Update], downloads: Sequence[tuple[Member, Download]]) -> float:
    """The definition, with every matrix written out."""
    worst = 0.0
    for name in updates[0].factors:
        target = mean_product(updates, name)
        for member, download in downloads:
            off = np.linalg.norm(loaded(member, download, name) - target)
            worst = max(worst, off / np.linalg.norm(target))
    return worst


def reweighted(updates: Sequence[Update], factor: float) -> list[Update]:
    return [replace(update, weight=factor * update.weight) for update in updates]


def same_bits(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        np.asarray(a[k]).dtype == np.asarray(b[k]).dtype
        and np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes()
        for k in a
    )


def bits(download: Download) -> dict[str, np.ndarray]:
    """All arrays of a download by flat names."""
    found = {f"extras.{n}": np.asarray(v) for n, v in download.extras.items()}
    for kind, factors in (("factors", download.factors), ("merged", download.merged)):
        for name, (A, B) in factors.items():
            found[f"{kind}.{name}.A"], found[f"{kind}.{name}.B"] = np.asarray(A), np.asarray(B)
    return found
