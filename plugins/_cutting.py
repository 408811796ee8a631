"""How strategies divide whole things among ranks: the largest remainder, at least one each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from edged import ConfigError, ModelDescription, NodeView, PeerError, PlanRequest

Range = tuple[int, int]
GROUP_MAX = 8  # where nobody names the nodes: each further one adds a message a token and a way to fail


def apportion(units: int, weights: Sequence[float]) -> list[int]:
    """Whole units by weight: the largest remainder; ties go to the lower rank.

    The counts add up to `units` and each differs from its exact part by less than one.
    """
    exact = [Fraction(weight) for weight in weights]
    parts = [units * weight / sum(exact) for weight in exact]
    counts = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda rank: counts[rank] - parts[rank])
    for rank in by_remainder[: units - sum(counts)]:
        counts[rank] += 1
    return counts


def apportion_all(units: int, weights: Sequence[float]) -> list[int]:
    """As `apportion`, but every rank gets at least one; there must be a unit for each.

    Ranks that would get none get one, and what is left is divided among the others by weight.
    """
    assert len(weights) <= units
    counts = [1] * len(weights)
    sharing = list(range(len(weights)))
    while sharing:
        given = apportion(units - len(weights) + len(sharing), [weights[rank] for rank in sharing])
        if 0 not in given:
            for rank, count in zip(sharing, given, strict=True):
                counts[rank] = count
            break
        sharing = [rank for rank, count in zip(sharing, given, strict=True) if count]
    return counts


def ranges(counts: Sequence[int], unit: int, total: int) -> list[Range]:
    """Half-open ranges that cover 0 to `total`, cut at multiples of `unit`; the last may be shorter."""
    ends = [min(sum(counts[: rank + 1]) * unit, total) for rank in range(len(counts))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def weights_of(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> tuple[float, ...]:
    """Each rank's weight: the requested share, else its measured decode speed, else all equal."""
    if request.shares is not None:
        return request.shares
    speeds = [_speed(node, model.weight_type) for node in nodes]
    return tuple(speeds) if all(speeds) else (1.0,) * len(nodes)


def _speed(node: NodeView, weight_type: str) -> float:
    """The best engine's decode bytes a second for this weight type; 0 where unmeasured."""
    found = [speed.decode_bytes_s for speed in node.speeds if speed.weight_type == weight_type]
    return max((speed for speed in found if 0 < speed < math.inf), default=0.0)


def groups(strategy: str, nodes: Sequence[NodeView], request: PlanRequest) -> list[Sequence[NodeView]]:
    """The groups of nodes to propose: the requested one, or the first two and more, to GROUP_MAX.

    Shares without nodes say how many of the nodes it shall be. ConfigError on shares that are none
    or too many, PeerError where the strategy was asked for and there is one node only.
    """
    shares = request.shares
    if request.nodes is not None:
        wanted = len(nodes)
    elif shares is not None:
        wanted = min(len(shares), len(nodes))
    else:
        if request.strategy == strategy and len(nodes) < 2:
            raise PeerError(
                f"expected at least two nodes online for {strategy}; {len(nodes)} came",
                remedy="start edged on another node, or use --strategy local",
            )
        return [nodes[:size] for size in range(2, min(GROUP_MAX, len(nodes)) + 1)]
    if shares is not None:
        _check_shares(shares, wanted)
    if wanted < 2:
        raise ConfigError(
            f"expected at least two nodes for {strategy}; {wanted} came",
            remedy="name another node, or use --strategy local or remote",
        )
    return [nodes[:wanted]]


def is_asked_for(strategy: str, request: PlanRequest) -> bool:
    """Whether the request names this strategy, its nodes or its shares: then a refusal says why."""
    return request.strategy == strategy or request.nodes is not None or request.shares is not None


def _check_shares(shares: Sequence[float], nodes: int) -> None:
    text = ":".join(f"{share:g}" for share in shares)
    if len(shares) != nodes:
        raise ConfigError(
            f"expected one share for each of {nodes} nodes; {len(shares)} came: {text}",
            remedy=f"give {nodes} shares, like {':'.join('1' * nodes)}",
        )
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise ConfigError(
            f"expected shares above 0; {text} came", remedy="leave a node out instead of giving it 0"
        )
