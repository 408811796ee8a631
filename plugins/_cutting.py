"""How strategies divide whole things among ranks.

By requested shares: the largest remainder, at least one each. By measured speeds: so that the slowest
rank is done soonest, and nobody gets more than it can hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from edged import ConfigError, ModelDescription, NodeView, PeerError, PlanRequest

Range = tuple[int, int]
WEIGHT_MIN = 1e-6  # of a node that a policy gives nothing: who should have no role at all is refused one
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


def balance(
    units: int, speeds: Sequence[float], caps: Sequence[int] | None = None, least: int = 1
) -> list[int] | None:
    """Whole units by speed, `least` to `caps[rank]` each; None where the caps do not hold them all.

    No division within these bounds has a smaller `max(count / speed)`: each unit goes to the rank that
    would be done with it soonest (D'Hondt's method), ties to the slower one, which is then the one further
    below its exact part, and to the lower rank. What a capped rank cannot take, the others share by speed.
    Source of caps and overflow: Galaxy (arXiv:2405.17245).
    """
    exact = [Fraction(speed) for speed in speeds]
    bounds = [units] * len(exact) if caps is None else [min(cap, units) for cap in caps]
    if sum(bounds) < units or min(bounds) < least or least * len(exact) > units:
        return None
    counts = _lower_quota(units, exact, bounds, least)
    for _ in range(units - sum(counts)):
        able = [rank for rank, count in enumerate(counts) if count < bounds[rank]]
        counts[min(able, key=lambda rank: ((counts[rank] + 1) / exact[rank], exact[rank]))] += 1
    return counts


def _lower_quota(units: int, speeds: Sequence[Fraction], caps: Sequence[int], least: int) -> list[int]:
    """Counts that D'Hondt's method surely reaches, a few units from the end: a vocabulary has 10^5."""
    counts = list(caps)
    sharing = list(range(len(speeds)))
    while sharing:
        spare = units - sum(caps) + sum(caps[rank] for rank in sharing) - least * len(sharing)
        total = sum(speeds[rank] for rank in sharing)
        quota = {rank: math.floor(spare * speeds[rank] / total) for rank in sharing}
        if all(quota[rank] < caps[rank] for rank in sharing):
            for rank in sharing:
                counts[rank] = max(least, quota[rank])
            break
        sharing = [rank for rank in sharing if quota[rank] < caps[rank]]
    return counts


def ranges(counts: Sequence[int], unit: int, total: int) -> list[Range]:
    """Half-open ranges that cover 0 to `total`, cut at multiples of `unit`; the last may be shorter."""
    ends = [min(sum(counts[: rank + 1]) * unit, total) for rank in range(len(counts))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def weights_of(model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest) -> tuple[float, ...]:
    """Each rank's weight: the requested share, else its measured decode speed (else all equal) as far as
    the policy lets it give that."""
    if request.shares is not None:
        return request.shares
    speeds = [_speed(node, model.weight_type) for node in nodes]
    known = speeds if all(speeds) else [1.0] * len(nodes)
    return tuple(speed * max(node.weight, WEIGHT_MIN) for speed, node in zip(known, nodes, strict=True))


def _speed(node: NodeView, weight_type: str) -> float:
    """The best engine's decode bytes a second, as the device sustains them; 0 where unmeasured.

    A mixed type ("Q4_K_M") that was not measured itself counts as its main one ("Q4_K").
    """
    sound = [s for s in node.speeds if 0 < s.decode_bytes_s < math.inf and 0 < s.sustained <= 1]
    same = [speed for speed in sound if speed.weight_type == weight_type]
    main = [speed for speed in sound if weight_type.startswith(speed.weight_type)]
    return max((speed.decode_bytes_s * speed.sustained for speed in same or main), default=0.0)


def groups(
    strategy: str, nodes: Sequence[NodeView], request: PlanRequest, least: int = 2
) -> list[Sequence[NodeView]]:
    """The groups of nodes to propose: the requested one, or the first `least` and more, to GROUP_MAX.

    Shares without nodes say how many of the nodes it shall be. ConfigError on shares that are none
    or too many, PeerError where the strategy was asked for and there are too few nodes.
    """
    several = ("two", "three", "four")[least - 2]
    shares = request.shares
    if request.nodes is not None:
        wanted = len(nodes)
    elif shares is not None:
        wanted = min(len(shares), len(nodes))
    else:
        if request.strategy == strategy and len(nodes) < least:
            raise PeerError(
                f"expected at least {several} nodes online for {strategy}; {len(nodes)} came",
                remedy="start edged on another node, or use another strategy",
            )
        return [nodes[:size] for size in range(least, min(GROUP_MAX, len(nodes)) + 1)]
    if shares is not None:
        _check_shares(shares, wanted)
    if wanted < least:
        raise ConfigError(
            f"expected at least {several} nodes for {strategy}; {wanted} came",
            remedy="name another node, or use another strategy",
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
