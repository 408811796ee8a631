"""What a chain and a U-shape share: clients whose adapters become their mean, and a server that may have an
adapter for each of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._averaging import average_clients
from ._rank import Rank


class Serving(Rank):
    """`build` sets `before`, the ranks whose batches come here."""

    before: list[int]
    _hierarchy: Hierarchy | None = None

    def enter(self, client: int) -> None:
        """With an adapter for each client: take up this one's, for a step or an evaluation."""
        if self.job.schedule == "server-hierarchical" and len(self.before) > 1:
            self._hierarchy = self._hierarchy or Hierarchy(self)
            self._hierarchy.enter(client)

    def average(self, step: int) -> None:
        average_clients(self.places, self.rank, self.link, self.parameters, step)
        if self._hierarchy is not None:
            self._hierarchy.average()

    def own_state(self) -> dict[str, Tensor]:
        return self._hierarchy.state() if self._hierarchy is not None else {}

    def set_own_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._hierarchy = Hierarchy(self)
            self._hierarchy.set_state(state)


class Hierarchy:
    """The server's adapters and moments, one set for each client; `enter` swaps one in."""

    def __init__(self, rank: Serving) -> None:
        self._rank, self._now = rank, -1
        self._sets: dict[int, list[dict[str, Tensor]]] = {}
        first = self._held()
        for client in rank.before:
            self._sets[client] = [{key: value.clone() for key, value in each.items()} for each in first]

    def enter(self, client: int) -> None:
        self._keep()
        self._put(client)

    def average(self) -> None:
        """All become their mean; moments stay their own."""
        self._keep()
        for i in range(len(self._rank.parameters)):
            mean = torch.stack([held[i]["value"] for held in self._sets.values()]).mean(0)
            for held in self._sets.values():
                held[i]["value"] = mean.clone()
        self._put(self._rank.before[0])

    def state(self) -> dict[str, Tensor]:
        self._keep()
        return {
            f"{client}.{i}.{key}": value
            for client, held in self._sets.items()
            for i, each in enumerate(held)
            for key, value in each.items()
        }

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            client, i, key = name.split(".")
            self._sets[int(client)][int(i)][key] = value.clone()
        self._now = -1
        self._put(self._rank.before[0])

    def _held(self) -> list[dict[str, Tensor]]:
        optimiser = self._rank.optimiser
        assert optimiser is not None
        return [
            {
                "value": parameter.detach().clone(),
                **{k: v.clone() for k, v in optimiser.state[parameter].items()},
            }
            for parameter in self._rank.parameters
        ]

    def _keep(self) -> None:
        if self._now >= 0:
            self._sets[self._now] = self._held()

    def _put(self, client: int) -> None:
        optimiser = self._rank.optimiser
        assert optimiser is not None
        for parameter, held in zip(self._rank.parameters, self._sets[client], strict=True):
            with torch.no_grad():
                parameter.copy_(held["value"])
            optimiser.state[parameter] = {key: value.clone() for key, value in held.items() if key != "value"}
        self._now = client
