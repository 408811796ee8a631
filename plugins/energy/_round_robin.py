"""Each node in turn, the quick ones more often: interleaved weighted round robin.

Source: SWARM parallelism (arXiv:2301.11913), stochastic wiring. Whoever was given the least work so far, by
expected time, is next, and is charged what this job should take; a new node enters at the least of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NODES = 1024  # more than any group has; past it everyone begins anew


@dataclass(slots=True)
class Turns:
    """`given`: of each node the expected time of all its jobs; `least`: of the last one chosen, till then.

    Who falls below the least was away. It is forgotten and comes back as a new one: it is not owed what it
    missed.
    """

    given: dict[str, float] = field(default_factory=dict)
    least: float = 0.0

    def choose(self, times: Mapping[str, float]) -> str:
        """One of these nodes, at least one, with the time that each would take; ties go to the first."""
        entry = min((self.given[node] for node in times if node in self.given), default=self.least)
        if len(self.given) > NODES:
            self.given = {}
        for node in times:
            self.given.setdefault(node, entry)
        chosen = min(times, key=self.given.__getitem__)
        self.least = self.given[chosen]
        self.given[chosen] += times[chosen]
        self.given = {node: given for node, given in self.given.items() if given >= self.least}
        return chosen
