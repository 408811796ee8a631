"""What a member of a federated job may count for: the job's bound, and the node's own where it aggregates.

In a profile:

    [plugin.personal_lora]
    weight_most = 10000  # rows that a member counts for at most where this node aggregates; 0: any
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from edged import ConfigError, PolicyViolation

log = logging.getLogger(__name__)
MOST = 1 << 40  # of a setting; as of a weight that a job's file states


def node_weight_most(settings: Mapping[str, Any]) -> int:
    """Of the plugin's settings; ConfigError where there are others, or it is no number of rows."""
    for name in settings:
        if name != "weight_most":
            raise ConfigError(
                f"no setting plugin.personal_lora.{name}; known: weight_most", remedy="remove the key"
            )
    value = settings.get("weight_most", 0)
    if type(value) is not int or not 0 <= value <= MOST:
        raise ConfigError(
            f"plugin.personal_lora.weight_most: expected rows from 0 to 2^40, got {value!r}",
            remedy="give the rows that a member may count for; 0: as many as the job allows",
        )
    return value


class Weights:
    """The bound that holds where a job is aggregated. `job`, `node`: rows; 0: none of that one's.

    PolicyViolation for a masked sum, where no weight is seen here, unless the job's own bound (`masked_most`)
    is within the node's.
    """

    def __init__(self, job: int, node: int, masked_most: int = 0) -> None:
        self._most = min((most for most in (job, node) if most), default=0)
        self._bounded: Counter[int] = Counter()
        if masked_most and node and masked_most > node:
            raise PolicyViolation(
                f"expected weight_most of at most {node} in a masked job, as this node's profile has it; "
                f"members may count for {masked_most} rows, and no weight is seen here",
                remedy=f"set weight_most = {node} in the job's file",
            )

    def counted(self, weight: int, rank: int, name: str, round: int) -> int:
        """What a member that says `weight` counts for; one that says more is named, and how often it was."""
        if not self._most or weight <= self._most:
            return weight
        self._bounded[rank] += 1
        log.warning(
            "weight bounded",
            extra={
                "round": round,
                "member": name,
                "said": min(weight, 1 << 62),
                "counted": self._most,
                "times": self._bounded[rank],
            },
        )
        return self._most
