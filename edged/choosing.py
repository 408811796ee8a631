"""Which plan a job gets: what every node can do now, the candidates over them, and the choice."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from . import planning, sizes, wire
from .config import Profile
from .device import Device
from .errors import ConfigError, EdgedError, EngineError, PeerError
from .groups import Asked, Member
from .models import Model, ModelStore
from .peers import Peers
from .plugins import Host
from .requests import GenerateRequest
from .types import RIGHTS, Candidate, EngineEntry, NodeView, PlanRequest, Predicted, Strategy

log = logging.getLogger(__name__)
DESCRIBE_S = 3.0
MEASURE_S = 130.0


class Chooser:
    def __init__(
        self,
        profile: Profile,
        peers: Peers,
        host: Host,
        device: Device,
        stored_models: ModelStore,
        strategies: Mapping[str, Strategy],
        engines: Mapping[str, EngineEntry],
    ) -> None:
        self._profile, self._peers, self._host = profile, peers, host
        self._device, self._models = device, stored_models
        self._strategies, self._engines = strategies, engines
        self.memory_taken: Callable[[], int] = int

    def view(self) -> NodeView:
        """This node."""
        mine = self._peers.identity
        return NodeView(
            mine.node_id,
            mine.name,
            device=self._device.read(),
            memory_budget=self._device.memory_budget(self.memory_taken()),
            engines=tuple(self._engines),
            speeds=self._device.speeds(),
            links=self._peers.link_states(),
            holds=tuple(model.sha256 for model in self._models.list() if model.complete),
        )

    async def views(self, *, measure: bool) -> list[NodeView]:
        """This node first, then every online member that answers."""
        online = [m for m in self._peers.membership.members.values() if self._peers.is_online(m.node_id)]
        timeout_s = MEASURE_S if measure else DESCRIBE_S
        asked = [
            self._peers.ask(member.node_id, "describe", wire.Describe(measure), timeout_s)
            for member in online
        ]
        if measure:
            await self._try_measure()
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
                )
            )
        return found

    async def _try_measure(self) -> None:
        try:
            await self._device.ensure_measured()
        except EdgedError as error:
            log.warning("device not measured", extra={"reason": str(error)})

    async def plan(self, request: GenerateRequest) -> dict[str, Any]:
        """Every candidate with its price, and the choice, without running it."""
        model = self._models.find(request.model)
        nodes = await self.views(measure=True)
        asked = self.asked(request, model.sha256)
        _, candidates, chosen = self.choose(model.sha256, nodes, asked.request)
        by_id = {node.node_id: node for node in nodes}
        return {
            "chosen": chosen,
            "candidates": [self.row_of(candidate) for candidate in candidates],
            "explanation": planning.explain(candidates, chosen, by_id),
        }

    def asked(self, request: GenerateRequest, sha256: str) -> Asked:
        """What is to be planned, and among whom."""
        found = [m for m in self._peers.membership.members.values() if self._peers.is_online(m.node_id)]
        members = {Member(m.node_id, m.zone, m.rights) for m in found}
        members.add(Member(self._peers.identity.node_id, "own", RIGHTS))
        online = {member.node_id for member in members}
        chosen = tuple(self._peers.find(name) for name in request.nodes) if request.nodes else None
        for node_id in chosen or ():
            if node_id not in online:
                raise PeerError(
                    f"node {self._peers.name_of(node_id)} is offline", remedy="start it, or leave it out"
                )
        if chosen and len(set(chosen)) != len(chosen):
            raise ConfigError("expected each of --nodes once", remedy="name different nodes")
        description = self._models.manifest(sha256).model
        context = self._context(request, description.context_tokens)
        wanted = PlanRequest(
            request.strategy,
            chosen,
            tuple(request.shares) if request.shares else None,
            context,
            max(1, request.prompt_bytes // 4),
            request.numerics,
            self._profile.jobs.allow_guest or request.allow_guest,
            request.private,
            context * self._profile.jobs.sequences,
            self._profile.jobs.cache_type,
        )
        return Asked(sha256, wanted, frozenset(members))

    def _context(self, request: GenerateRequest, most: int) -> int:
        """KV cache tokens: the profile's, or more for a long prompt (a token is at least a byte)."""
        needed = -(-(request.prompt_bytes + request.n + 128) // 256) * 256
        return min(most, max(self._profile.jobs.context, needed))

    def choose(
        self, sha256: str, nodes: Sequence[NodeView], request: PlanRequest
    ) -> tuple[PlanRequest, list[Candidate], int | None]:
        """The candidates and the choice; with the KV cache of a single sequence where more do not fit
        beside the whole of the weights."""
        candidates, chosen = self._choose_of(sha256, nodes, request)
        description = self._models.manifest(sha256).model
        if chosen is not None and not sizes.is_windowed(candidates[chosen], description, request):
            return request, candidates, chosen
        single = dataclasses.replace(request, cache_tokens=request.context_tokens)
        return single, *self._choose_of(sha256, nodes, single)

    def _choose_of(
        self, sha256: str, nodes: Sequence[NodeView], request: PlanRequest
    ) -> tuple[list[Candidate], int | None]:
        description = self._models.manifest(sha256).model
        engines = self._engines_for(sha256)
        candidates = planning.consider(self._strategies, description, nodes, request, engines)
        answer = self._host.decide("edged_select_plan", candidates=candidates, request=request)
        if (
            isinstance(answer, int)
            and 0 <= answer < len(candidates)
            and not candidates[answer].refused_because
        ):
            return candidates, answer
        return candidates, planning.choose(candidates)

    def holder_of(self, model: Model, nodes: Sequence[NodeView]) -> str:
        """Who gives the file to nodes that lack it: this node, or where it has a part of it another."""
        mine = self._peers.identity.node_id
        if model.complete:
            return mine
        return next((node.node_id for node in nodes if model.sha256 in node.holds), mine)

    def _engines_for(self, sha256: str) -> list[EngineEntry]:
        """Loaded engines that run a model: the one it is stored under, then those that take its models."""
        stored = next((model.engine for model in self._models.list() if model.sha256 == sha256), None)
        loaded = sorted(self._engines.values(), key=lambda entry: len(entry.takes))
        able = [entry for entry in loaded if entry.name == stored]
        able += [entry for entry in loaded if stored in entry.takes]
        if able:
            return able
        architecture = self._models.manifest(sha256).model.architecture
        known = ", ".join(sorted(self._engines)) or "none"
        raise EngineError(
            f"expected an engine for architecture {architecture!r} ({stored}); loaded: {known}",
            remedy="load the plugin that brings it",
        )

    def row_of(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "strategy": candidate.strategy,
            "roles": [
                {
                    "node": role.node_id,
                    "name": self._peers.name_of(role.node_id),
                    "rank": role.rank,
                    "stage": role.stage,
                    "layers": list(role.layers),
                    "share": round(role.share, 3),
                    "heads": list(role.heads),
                    "memory_bytes": role.memory_bytes,
                }
                for role in candidate.roles
            ],
            "predicted": _predicted_row(candidate.predicted),
            "memory_bytes": {role.node_id: role.memory_bytes for role in candidate.roles},
            "refused_because": candidate.refused_because,
        }


def _predicted_row(predicted: Predicted) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(predicted)
    return row
