"""What every node of the group is and can do now: this one, and what each online member says of itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from . import bearing, wire
from .device import Device
from .errors import EdgedError
from .models import ModelStore
from .peers import Peers
from .probing import Probing
from .types import EngineEntry, NodeView

log = logging.getLogger(__name__)
DESCRIBE_S = 3.0
MEASURE_S = 130.0
REASON_CHARS_MAX = 200  # of another node's reason, which a person reads


class Viewer:
    def __init__(
        self,
        peers: Peers,
        device: Device,
        bears: bearing.Bearing,
        probing: Probing,
        stored_models: ModelStore,
        engines: Mapping[str, EngineEntry],
    ) -> None:
        self._peers, self._device, self._bearing = peers, device, bears
        self._probing, self._models, self._engines = probing, stored_models, engines
        self.memory_taken: Callable[[], int] = int

    def view(self) -> NodeView:
        """This node."""
        mine, state = self._peers.identity, self._device.read()
        bears = self._bearing.read(state.battery)
        return NodeView(
            mine.node_id,
            mine.name,
            device=state,
            memory_budget=self._device.memory_budget(self.memory_taken()),
            engines=tuple(name for name, entry in self._engines.items() if not entry.lacks),
            speeds=self._device.speeds(),
            links=self._peers.link_states(),
            holds=tuple(model.sha256 for model in self._models.list() if model.complete),
            refuses=self._device.saving,
            watts=self._device.watts,
            power_mode=bearing.power_mode(state.battery),
            bearable=bears.jobs,
            unfitted=bears.unfitted,
            adapters=tuple(name for name, entry in self._engines.items() if entry.adapters),
        )

    async def views(self, *, measure: bool, but: Callable[[str], bool] | None = None) -> list[NodeView]:
        """This node first, then every online member that answers; members of which `but` holds are not
        asked."""
        members = self._peers.membership.members.values()
        online = [m for m in members if self._peers.is_online(m.node_id) and not (but and but(m.node_id))]
        timeout_s = MEASURE_S if measure else DESCRIBE_S
        asked = [
            self._peers.ask(member.node_id, "describe", wire.Describe(measure), timeout_s)
            for member in online
        ]
        if measure:
            await self._try_measure()
            await self._probing.ensure()
            await self._bearing.ensure()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [self.view()]
        for member, answer in zip(online, answers, strict=True):
            try:
                if isinstance(answer, BaseException):
                    raise answer
                said = wire.read_body(wire.Described, answer)
            except EdgedError as error:
                log.warning("node not described", extra={"peer": member.node_id[:8], "reason": str(error)})
                continue
            found.append(
                NodeView(
                    member.node_id,
                    member.name,
                    member.zone,
                    True,
                    member.rights,
                    said.device,
                    said.memory_budget,
                    said.engines,
                    said.speeds,
                    said.links,
                    tuple(said.models),
                    said.profile,
                    said.refuses[:REASON_CHARS_MAX],
                    _sound_watts(said.watts),
                    bearing.power_mode(said.device.battery),
                    _sound_rate(said.bearable),
                    unfitted=said.unfitted[:REASON_CHARS_MAX],
                    adapters=said.adapters,
                )
            )
        return found

    async def _try_measure(self) -> None:
        try:
            await self._device.ensure_measured()
        except EdgedError as error:
            log.warning("device not measured", extra={"reason": str(error)})


def _sound_watts(watts: tuple[float, float] | None) -> tuple[float, float] | None:
    """As a node says; None for what no device draws."""
    return watts if watts is not None and 0 <= watts[0] <= watts[1] < float("inf") else None


def _sound_rate(rate: float | None) -> float | None:
    """As a node says; None for what no battery bears: a job takes a slot."""
    return rate if rate is not None and 0 <= rate <= 1 else None
