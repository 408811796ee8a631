"""Which plan a job gets: the candidates over the nodes as they are now, and the choice."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from . import bearing, planning, pricing, sizes, wire
from .adapters import Adapter, AdapterStore
from .config import Profile
from .correcting import Corrections
from .device import Device
from .errors import ConfigError, EdgedError, EngineError, PeerError, PolicyViolation
from .groups import Asked, Member
from .lending import Lending
from .models import Model, ModelStore
from .peers import Peers
from .plugins import Host
from .requests import GenerateRequest
from .supervisor import Supervisor
from .types import (
    RIGHTS,
    AdapterFile,
    Candidate,
    Deferral,
    EngineEntry,
    ModelDescription,
    NodeView,
    Outcome,
    PlanRequest,
    Policy,
    Predicted,
    Situation,
    Strategy,
)
from .viewing import Viewer

log = logging.getLogger(__name__)
SEARCH_S = 2.0  # for the exact search, the process that runs it included
SEARCHED_NODES = 3  # with two there is nothing to search that the strategies do not propose


@dataclass(frozen=True, slots=True)
class Found:
    """Of one strategy, by its search."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """What a plan is chosen for. `searched`: by strategy, what a search found."""

    sha256: str
    nodes: Sequence[NodeView]
    request: PlanRequest
    searched: Mapping[str, Sequence[Candidate]] = field(default_factory=dict)


class Chooser:
    def __init__(
        self,
        profile: Profile,
        peers: Peers,
        host: Host,
        device: Device,
        viewer: Viewer,
        supervisor: Supervisor,
        stored_models: ModelStore,
        adapters: AdapterStore,
        lending: Lending,
        strategies: Mapping[str, Strategy],
        policies: Mapping[str, Policy],
        engines: Mapping[str, EngineEntry],
    ) -> None:
        self._profile, self._peers, self._host = profile, peers, host
        self._device, self._viewer, self._models = device, viewer, stored_models
        self._supervisor, self._adapters, self._lending = supervisor, adapters, lending
        self._corrections = Corrections(self._device.corrections())
        self._strategies, self._policies, self._engines = strategies, policies, engines

    async def plan(self, request: GenerateRequest) -> dict[str, Any]:
        """Every candidate with its price, and the choice, without running it."""
        model = self._models.find(request.model)
        adapter = await self.adapter_of(request, model)
        nodes = await self._viewer.views(measure=True)
        asked = self.asked(request, model.sha256, adapter=adapter)
        _, candidates, chosen, notes = await self.choose(model.sha256, nodes, asked.request)
        by_id = {node.node_id: node for node in nodes}
        notes += self._noted(asked.request, candidates, by_id)
        return {
            "chosen": chosen,
            "candidates": [self.row_of(candidate) for candidate in candidates],
            "explanation": planning.explain(candidates, chosen, by_id) + notes,
        }

    def check_adapter(self, request: GenerateRequest, model: Model) -> Adapter | None:
        """The adapter asked for; ConfigError where there is none such, or it is another model's."""
        if request.adapter is None:
            return None
        adapter = self._adapters.find(request.adapter)
        if adapter.kind == "seeds":
            raise ConfigError(
                f"expected a LoRA adapter of a GGUF model; {adapter.name!r} is of kind 'seeds', which is a "
                "model's start and a table",
                remedy=f"write it as a model: edged adapters write {adapter.name} --out FILE, then "
                "edged models add FILE",
                code="no-gguf-adapter",
            )
        if not adapter.path:
            what = (
                "has no file that engines read" if adapter.kind == "lora" else f"is of kind {adapter.kind!r}"
            )
            raise ConfigError(
                f"expected a LoRA adapter of a GGUF model; {adapter.name!r} {what}",
                remedy="generate without --adapter, or train one with a GGUF",
                code="no-gguf-adapter",
            )
        if adapter.base_sha256 != model.sha256:
            raise ConfigError(
                f"expected an adapter of model {model.name!r} ({model.sha256[:12]}); {adapter.name!r} was "
                f"made for {adapter.base_name!r} ({adapter.base_sha256[:12]})",
                remedy="name that model, or an adapter of this one",
            )
        return adapter

    async def adapter_of(self, request: GenerateRequest, model: Model) -> AdapterFile | None:
        """The content of the adapter asked for, as it is now; ConfigError as `check_adapter`."""
        adapter = self.check_adapter(request, model)
        return None if adapter is None else (await asyncio.to_thread(self._lending.hashed, adapter)).file

    def swaps(self, candidate: Candidate, model: ModelDescription, request: PlanRequest) -> bool:
        """May adapters come and go beside this plan's weights? Not where a window leaves them no room."""
        entry = self._engines.get(candidate.engine)
        return entry is not None and entry.swaps and not sizes.is_windowed(candidate, model, request)

    def asked(
        self,
        request: GenerateRequest,
        sha256: str,
        may_leave: bool = True,
        adapter: AdapterFile | None = None,
    ) -> Asked:
        """What is to be planned, and among whom. `may_leave`, `adapter`: as PlanRequest."""
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
            self._policy_of(request),
            may_leave,
            adapter,
        )
        return Asked(sha256, wanted, frozenset(members))

    def _policy_of(self, request: GenerateRequest) -> str:
        """The policy asked for, else the profile's; ConfigError where it is not loaded."""
        name = request.policy or self._profile.energy.policy
        if name:
            check_policy(name, self._policies)
        return name

    def _context(self, request: GenerateRequest, most: int) -> int:
        """KV cache tokens: the profile's, or more for a long prompt (a token is at least a byte)."""
        needed = -(-(request.prompt_bytes + request.n + 128) // 256) * 256
        return min(most, max(self._profile.jobs.context, needed))

    async def choose(
        self, sha256: str, nodes: Sequence[NodeView], request: PlanRequest
    ) -> tuple[PlanRequest, list[Candidate], int | None, list[str]]:
        """The candidates, the choice, and notes on how it came about; with the KV cache of a single sequence
        where more do not fit beside the whole of the weights."""
        description, policy = self._models.manifest(sha256).model, self._policy(request)
        _check_borne(policy, nodes)
        weighed = _weighed(policy, nodes)
        searched, notes = await self._searched(description, weighed, request)
        candidates, chosen = self._choose_of(_Question(sha256, nodes, request, searched))
        if chosen is not None and not sizes.is_windowed(candidates[chosen], description, request):
            return request, candidates, chosen, notes
        single = dataclasses.replace(request, cache_tokens=request.context_tokens)
        searched, notes = await self._searched(description, weighed, single)
        return single, *self._choose_of(_Question(sha256, nodes, single, searched)), notes

    async def _searched(
        self, model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
    ) -> tuple[dict[str, list[Candidate]], list[str]]:
        """What the strategies' searches find beside what they propose, in a process of its own; and a note
        where that was not to be had in time."""
        searches = {name: entry.search for name, entry in self._strategies.items() if entry.search}
        is_open = request.strategy == "auto" and request.nodes is None and request.shares is None
        if not is_open or request.private or len(nodes) < SEARCHED_NODES or not searches:
            return {}, []
        params = {
            "searches": searches,
            "model": wire.to_map(model),
            "nodes": [wire.to_map(node) for node in nodes],
            "request": wire.to_map(request),
        }
        rows: dict[str, Any] = {}
        notes: list[str] = []
        try:
            answer = await self._supervisor.run_task(
                "edged.worker:search",
                params,
                timeout_s=SEARCH_S,
                on_progress=lambda event: rows.update(event["found"]),
            )
            rows.update(answer["found"])
        except EdgedError as error:
            log.warning("plans not searched to the end", extra={"reason": str(error)})
            notes = [_cut_off([name for name, found in rows.items() if found])]
        try:
            found = {name: wire.read_body(Found, {"candidates": each}) for name, each in rows.items()}
        except EdgedError as error:
            log.error("a search found what is no plan", extra={"reason": str(error)})
            return {}, [_cut_off([])]
        return {name: list(each.candidates) for name, each in found.items()}, notes

    def _choose_of(self, question: _Question) -> tuple[list[Candidate], int | None]:
        request = question.request
        candidates, chosen = self._by(self._policy(request), question)
        if request.policy or chosen is None or planning.BALANCE not in self._policies:
            return candidates, chosen
        if len(candidates[chosen].roles) > 1 and _is_on_battery(candidates[chosen], question.nodes):
            return self._by(self._policies[planning.BALANCE], question)
        return candidates, chosen

    def _by(self, policy: Policy, question: _Question) -> tuple[list[Candidate], int | None]:
        """The candidates under a policy, and its choice; edged's own where it fails or names none of them."""
        candidates, request = self._candidates(policy, question), question.request
        answer = self._host.decide("edged_select_plan", candidates=tuple(candidates), request=request)
        if _may_run(answer, candidates):
            return candidates, answer
        by_id = {node.node_id: node for node in question.nodes}
        situation = Situation(tuple(candidates), by_id, request, random.random(), time.time())
        try:
            answer = policy.choose(situation)
        except Exception:  # a plugin's policy: the job must run all the same, and the log says why so
            log.exception("policy failed", extra={"policy": policy.name})
            return candidates, planning.choose(candidates)
        if answer is None or _may_run(answer, candidates):
            return candidates, answer
        log.error("policy named no plan that may run", extra={"policy": policy.name, "answer": answer})
        return candidates, planning.choose(candidates)

    def _candidates(self, policy: Policy, question: _Question) -> list[Candidate]:
        """Priced and checked, each with what jobs so far brought to its price."""
        sha256, nodes = question.sha256, _weighed(policy, question.nodes)
        description, engines = self._models.manifest(sha256).model, self._engines_for(sha256)
        found = planning.consider(
            self._strategies, description, nodes, question.request, engines, question.searched
        )
        found = self._corrections.corrected(sha256, found)
        found = [_with_loading(each, description, nodes, sha256) for each in found]
        return [_refused_unfitted(each, nodes) for each in found] if policy.fit else found

    def _noted(
        self, request: PlanRequest, candidates: Sequence[Candidate], nodes: Mapping[str, NodeView]
    ) -> list[str]:
        """What the policy says of its choice, for a person."""
        policy = self._policy(request)
        if policy.note is None:
            return []
        try:
            said = policy.note(Situation(candidates, nodes, request, random.random(), time.time()))
        except Exception:  # a plugin's policy: the plan stands all the same
            log.exception("policy failed", extra={"policy": policy.name})
            return []
        return [said] if said else []

    def check_deferrable(self, request: GenerateRequest) -> None:
        """ConfigError where its start may wait and its policy never lets a job wait."""
        if request.deferrable_s is None:
            return
        name = self._policy_of(request) or planning.LATENCY
        able = sorted(known for known, policy in self._policies.items() if policy.defer)
        if name not in able:
            raise ConfigError(
                f"expected --deferrable with a policy that knows better times; {name} starts a job at once",
                remedy=f"add --policy {able[0]}" if able else "drop it, or load a plugin with such a policy",
            )

    async def deferral(self, request: GenerateRequest, model: Model, start_by: float) -> Deferral | None:
        """Until when the job should wait, as its policy says now; None: it should start."""
        sha256, adapter = model.sha256, await self.adapter_of(request, model)
        asked = self.asked(request, sha256, adapter=adapter).request
        policy = self._policy(asked)
        if policy.defer is None:
            return None
        nodes = await self._viewer.views(measure=request.strategy == "auto")
        candidates = self._candidates(policy, _Question(sha256, nodes, asked))
        by_id = {node.node_id: node for node in nodes}
        now, draw = time.time(), random.random()
        situation = Situation(tuple(candidates), by_id, asked, draw, now, start_by, request.n)
        try:
            found = policy.defer(situation)
        except Exception:  # a plugin's policy: the job must run all the same
            log.exception("policy failed", extra={"policy": policy.name})
            return None
        if isinstance(found, Deferral) and now < found.until:
            return dataclasses.replace(found, until=min(found.until, start_by))
        log.info(
            "job need not wait", extra={"policy": policy.name, "notes": self._noted(asked, candidates, by_id)}
        )
        return None

    def is_steady(self, request: PlanRequest) -> bool:
        """May a loaded plan serve this request again without a new choice?"""
        return self._policy(request).is_steady

    def _policy(self, request: PlanRequest) -> Policy:
        return self._policies[request.policy or planning.LATENCY]

    def correct(self, sha256: str, candidate: Candidate, tpot_ms: float | None) -> None:
        """Hear how long a token of this plan really took: for the next prediction."""
        ratio = self._corrections.learn(sha256, candidate, tpot_ms)
        if ratio is not None:
            self._device.keep_corrections(self._corrections.factors)
            log.info("predicted", extra={"strategy": candidate.strategy, "ratio": round(ratio, 3)})

    @property
    def metrics(self) -> dict[str, float | None]:
        """How wrong predictions were lately, and of how many jobs that is known."""
        return {
            "edged_plan_tpot_error_ratio": self._corrections.error,
            "edged_plan_jobs_total": self._corrections.jobs,
        }

    def forget_corrections(self, node_id: str) -> None:
        """A node sustains another part of its benchmark than before."""
        self._corrections.forget(node_id)
        self._device.keep_corrections(self._corrections.factors)

    def learn(self, request: PlanRequest, outcome: Outcome) -> None:
        """Tell the policy that chose a job's plan how it went."""
        policy = self._policy(request)
        if policy.learn is None:
            return
        try:
            policy.learn(outcome)
        except Exception:  # a plugin's policy: the job is done all the same
            log.exception("policy failed", extra={"policy": policy.name})

    def holder_of(self, model: Model, nodes: Sequence[NodeView], candidate: Candidate) -> str:
        """Who gives the file to those of the plan's nodes that lack it: this node, or where it has a part of
        it the one that is done the soonest."""
        return _holder(candidate, self._models.manifest(model.sha256).model, nodes, model.sha256)

    def _engines_for(self, sha256: str) -> list[EngineEntry]:
        """Loaded engines that run a model: the one it is stored under, then those that take its models."""
        model = next((model for model in self._models.list() if model.sha256 == sha256), None)
        stored, name = (model.engine, model.name) if model is not None else (None, "")
        loaded = sorted(self._engines.values(), key=lambda entry: len(entry.takes))
        able = [entry for entry in loaded if entry.name == stored]
        able += [entry for entry in loaded if stored in entry.takes]
        able = [entry for entry in able if entry.models is None or name in entry.models]
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
            "broken_rule": candidate.broken_rule,
        }


def _holder(candidate: Candidate, model: ModelDescription, nodes: Sequence[NodeView], sha256: str) -> str:
    """Who gives the file to those that lack it: the submitter, who comes first, or whoever is the soonest."""
    mine = nodes[0]
    if sha256 in mine.holds:
        return mine.node_id
    by_id = {node.node_id: node for node in nodes}
    return pricing.soonest_holder(candidate.roles, model, by_id, sha256) or mine.node_id


def _with_loading(
    candidate: Candidate, model: ModelDescription, nodes: Sequence[NodeView], sha256: str
) -> Candidate:
    """With the time until all of its nodes have their parts."""
    if candidate.refused_because:
        return candidate
    by_id = {node.node_id: node for node in nodes}
    holder = _holder(candidate, model, nodes, sha256)
    seconds = pricing.loading_s(candidate.roles, model, by_id, sha256, holder)
    if seconds is None:
        return candidate
    predicted = dataclasses.replace(candidate.predicted, load_ms=1000 * seconds)
    return dataclasses.replace(candidate, predicted=predicted)


def _cut_off(strategies: Sequence[str]) -> str:
    """What is said of a search that was not done in time. `strategies`: for which it had found something."""
    if not strategies:
        return f"The search for plans gave no answer within {SEARCH_S:g} s; plans are as proposed."
    return (
        f"The exact search was not done within {SEARCH_S:g} s; for {', '.join(strategies)} what faster "
        "methods found by then counts (the dynamic programme)."
    )


def check_policy(name: str, policies: Mapping[str, Policy]) -> None:
    """ConfigError where jobs cannot be planned by it."""
    able = sorted(known for known, policy in policies.items() if not policy.refused_because)
    if name not in policies:
        raise ConfigError(
            f"no policy {name!r}; loaded: {', '.join(able)}",
            remedy="load the plugin that brings it, or name another",
        )
    if name not in able:
        raise ConfigError(
            f"policy {name!r} is refused here: {policies[name].refused_because}",
            remedy=f"write it in the profile, or name one of {', '.join(able)}",
        )


def _check_borne(policy: Policy, nodes: Sequence[NodeView]) -> None:
    """PolicyViolation where a policy that weighs batteries knows nothing of any node."""
    if not policy.fit or any(node.bearable is not None for node in nodes):
        return
    said = "; ".join(f"{node.name}: {node.unfitted or 'its profile says no harvest'}" for node in nodes)
    raise PolicyViolation(
        f"policy {policy.name!r} needs to know what a battery bears, and no node does ({said})",
        remedy="write energy.harvest_watts in the profiles, plug a node in, or name another policy",
        code="no-harvest",
    )


def _refused_unfitted(candidate: Candidate, nodes: Sequence[NodeView]) -> Candidate:
    """Refused where one of its nodes should know what its battery bears, and does not."""
    members = {role.node_id for role in candidate.roles}
    lacking = next((node for node in nodes if node.node_id in members and node.unfitted), None)
    if candidate.refused_because or lacking is None:
        return candidate
    return dataclasses.replace(
        candidate, refused_because=f"{lacking.name}: {lacking.unfitted}", broken_rule="policy"
    )


def _may_run(answer: Any, candidates: Sequence[Candidate]) -> bool:
    """Is it the index of a candidate that no rule refuses?"""
    return (
        isinstance(answer, int)
        and not isinstance(answer, bool)
        and 0 <= answer < len(candidates)
        and candidates[answer].refused_because is None
    )


def _weighed(policy: Policy, nodes: Sequence[NodeView]) -> list[NodeView]:
    """The nodes with the part of their speed that the policy lets them give."""
    if policy.weigh is None:
        return list(nodes)
    try:
        weights = policy.weigh(nodes)
        return [dataclasses.replace(node, weight=float(weights.get(node.node_id, 1.0))) for node in nodes]
    except Exception:  # a plugin's policy: plans go by speed then
        log.exception("policy failed", extra={"policy": policy.name})
        return list(nodes)


def _is_on_battery(candidate: Candidate, nodes: Sequence[NodeView]) -> bool:
    """Does any of its nodes live on its battery now?"""
    members = {role.node_id for role in candidate.roles}
    batteries = [node.device.battery for node in nodes if node.node_id in members]
    return any(battery is not None and bearing.lives_on(battery) for battery in batteries)


def _predicted_row(predicted: Predicted) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(predicted)
    return row
