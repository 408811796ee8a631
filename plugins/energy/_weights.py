"""How likely each node of a group is to get the next job, and how much of a shared job each one takes.

Sources: Khoshsirat, Perin, Rossi (arXiv:2408.15907), Algorithm 1 and equation 6; for shares that drain
batteries together the idea of CoLLM (doi 10.1109/ICCC62479.2024.10681712), whose abstract alone was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from edged import Battery, NodeView

WEAKEST_MODE = 1
LEAST_WEIGHT = 1e-3  # a share of nothing would be no plan


def uniform(nodes: Sequence[NodeView]) -> list[float]:
    """Everyone alike."""
    return [1 / len(nodes)] * len(nodes)


def long_term(nodes: Sequence[NodeView]) -> list[float]:
    """In proportion to the arrival rate that each node's battery bears; on mains, that is what time allows.

    A node that does not say what it harvests counts as the mean of those that do: unknown is not nothing,
    which a profile says with a harvest of [0, 0].
    """
    known = [node.bearable for node in nodes if node.bearable is not None]
    mean = sum(known) / len(known) if known else 1.0
    rates = [mean if node.bearable is None else node.bearable for node in nodes]
    total = sum(rates)
    return [rate / total for rate in rates] if total > 0 else uniform(nodes)


def adaptive(nodes: Sequence[NodeView]) -> list[float]:
    """The long-term weights, less for whoever is in its weakest power mode, and more for the others.

    Each of those keeps a part alpha / N of its weight; alpha is their number, as the source recommends.
    """
    weights = long_term(nodes)
    weak = [node.power_mode == WEAKEST_MODE for node in nodes]
    kept = sum(weak) / len(nodes)
    scaled = [weight * (kept if is_weak else 1) for weight, is_weak in zip(weights, weak, strict=True)]
    total = sum(scaled)
    return [weight / total for weight in scaled] if total > 0 else weights


def drawn(weights: Sequence[float], draw: float) -> int:
    """The index that a number in [0, 1) falls on."""
    at = draw * sum(weights)
    for index, weight in enumerate(weights):
        at -= weight
        if at < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def battery_factor(battery: Battery | None, reserve: float) -> float:
    """What part of its speed a node should give: 1 on mains, falling to 0 at its reserve (of 1)."""
    if battery is None or battery.percent is None or battery.plugged or battery.charging:
        return 1.0
    left = (battery.percent / 100 - reserve) / (1 - reserve)
    return max(LEAST_WEIGHT, left)
