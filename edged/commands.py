"""What the control socket answers: one method per command of the contract, each giving its document."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from . import identity as ids
from . import plugins, pricing, requests, wire
from .adapters import Adapter
from .control import Emit
from .coordinator import Coordinator
from .datasets import DataSet
from .errors import ConfigError, EdgedError, PeerError, ProtocolError
from .jobs import Job, rfc3339
from .models import Model
from .parts import Parts
from .training import Trainings
from .types import LinkCost, LinkState, Sighting
from .version import PROTOCOL, VERSION

REDUCED_BYTES = 8192  # of the all-reduce in a profile: a token's row of 2048 values in F32
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """`files`: descriptors that came along, closed after the answer; `emit` sends an event."""

    body: dict[str, Any]
    files: Sequence[int]
    emit: Emit


class Life(Protocol):
    """What commands may know of the daemon itself."""

    state: str

    @property
    def uptime_s(self) -> float: ...

    async def leave(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None: ...


class Commands:
    def __init__(self, parts: Parts, life: Life) -> None:
        self._parts, self._life = parts, life
        self._by_kind: dict[str, Callable[[Request], Coroutine[Any, Any, Document]]] = {
            "status": self._status,
            "peers": self._list_peers,
            "invite": self._invite,
            "join": self._join,
            "trust": self._trust,
            "forget": self._forget,
            "drain": self._drain,
            "profile": self._show_profile,
            "plugins": self._list_plugins,
            "models.ls": self._list_models,
            "models.add": self._add_model,
            "models.rm": self._remove_model,
            "models.pull": self._pull_model,
            "data.ls": self._list_data,
            "data.add": self._add_data,
            "data.rm": self._remove_data,
            "adapters.ls": self._list_adapters,
            "adapters.add": self._add_adapter,
            "adapters.export": self._export_adapter,
            "adapters.write": self._write_adapter,
            "adapters.rm": self._remove_adapter,
            "plan": self._plan,
            "generate": self._generate,
            "finetune": self._finetune,
            "jobs": self._list_jobs,
            "jobs.show": self._show_job,
            "jobs.rm": self._remove_job,
            "cancel": self._cancel,
        }

    async def handle(self, kind: str, body: dict[str, Any], files: Sequence[int], emit: Emit) -> Document:
        command = self._by_kind.get(kind)
        if command is None:
            raise ConfigError(f"no command {kind!r}; known: {', '.join(sorted(self._by_kind))}")
        return await command(Request(body, files, emit))

    async def _status(self, request: Request) -> Document:
        state = self._parts.device.read()
        self._parts.refresh_conditions()
        return {
            "node_id": self._parts.identity.node_id,
            "fingerprint": ids.fingerprint_of(self._parts.identity.node_id),
            "name": self._parts.identity.name,
            "version": VERSION,
            "protocol": PROTOCOL,
            "state": self._life.state,
            "uptime_s": round(self._life.uptime_s, 3),
            "port": self._parts.peers.transport.port,
            "plugins": list(self._parts.host.loaded),
            "conditions": msgspec.to_builtins(self._parts.health.conditions),
            "memory": {"total": state.memory_total, "free": state.memory_free},
            "battery": msgspec.to_builtins(state.battery),
            "rss_bytes": rss_bytes(),
            "jobs_running": self._parts.coordinator.running + self._parts.trainings.running,
            "roles": self._parts.roles.count,
            "metrics": self._parts.chooser.metrics,
        }

    async def _list_peers(self, request: Request) -> Document:
        members = self._parts.peers.membership.members
        views = {view.node_id: view for view in await self._parts.viewer.views(measure=False)}
        rows = []
        for node_id, member in members.items():
            link = self._parts.peers.links.get(node_id)
            view = views.get(node_id)
            cost = self._parts.probing.cost(node_id)
            state = "joining" if member.state == "joining" else (link.state if link else "offline")
            rows.append(
                {
                    "node_id": node_id,
                    "name": member.name,
                    "fingerprint": ids.fingerprint_of(node_id),
                    "state": state,
                    "address": link.address if link and link.address else None,
                    "rtt_ms": link.rtt_ms if link else None,
                    "bandwidth_bytes_s": cost.bytes_s if cost else None,
                    "battery": msgspec.to_builtins(view.device.battery) if view else None,
                    "profile": view.profile if view else None,
                    "trusted": True,
                    "rights": list(member.rights),
                    "zone": member.zone,
                }
            )
        known = {row["fingerprint"] for row in rows}
        rows += [_seen_row(s) for f, s in self._parts.peers.sightings().items() if f not in known]
        return {"peers": rows}

    async def _invite(self, request: Request) -> Document:
        asked = requests.read(requests.Invite, request.body)
        if not 1 <= asked.ttl_s <= 7 * 86400:
            raise ConfigError("expected --ttl from 1s to 7d", remedy="mend the argument")
        token, expires_at = self._parts.peers.invite(asked.ttl_s, asked.rights, asked.zone)
        return {"token": token, "expires_at": rfc3339(expires_at)}

    async def _join(self, request: Request) -> Document:
        member = await self._parts.peers.join(str(request.body.get("token", "")))
        return {"node_id": member.node_id, "name": member.name}

    async def _trust(self, request: Request) -> Document:
        asked = requests.read(requests.Trust, request.body)
        member = self._parts.peers.trust(asked.node, asked.rights, asked.zone)
        self._parts.roles.recheck_rights()
        return {
            "node_id": member.node_id,
            "name": member.name,
            "rights": list(member.rights),
            "zone": member.zone,
        }

    async def _forget(self, request: Request) -> Document:
        return {"node_id": self._parts.peers.forget(str(request.body.get("node", "")))}

    async def _drain(self, request: Request) -> Document:
        await self._life.leave()
        return {"handed_over": []}

    async def _show_profile(self, request: Request) -> Document:
        if request.body.get("measure"):
            await request.emit({"event": "progress", "text": "measuring this device"})
            await self._parts.device.measure()
            await request.emit({"event": "progress", "text": "measuring links"})
            self._parts.probing.forget()
            await self._parts.viewer.views(measure=True)  # half of the links are the other side's to measure
        state = self._parts.device.read()
        return {
            "name": self._parts.profile.name,
            "cpu": {"name": state.cpu_name, "count": state.cpu_count, "load_1m": state.load_1m},
            "memory": {
                "total": state.memory_total,
                "free": state.memory_free,
                "budget": self._parts.device.memory_budget(self._parts.roles.memory_taken),
            },
            "battery": msgspec.to_builtins(state.battery),
            "power": {
                "watts": state.power_watts,
                "source": state.power_source,
                "idle_watts": self._parts.profile.device.idle_watts,
                "load_watts": self._parts.profile.device.load_watts,
            },
            "thermal": {
                "celsius": state.temperature_celsius,
                "is_throttled": state.is_throttled,
                "limit_celsius": self._parts.profile.device.thermal_limit_celsius,
            },
            "use": {
                "in_use": state.in_use,
                "memory_pressure": self._parts.device.memory_pressure,
                "is_wireless": state.is_wireless,
                "is_metered": state.is_metered,
            },
            "engines": msgspec.to_builtins(self._parts.device.speeds()),
            "links": [_link_row(link) for link in self._parts.peers.link_states()],
        }

    async def _list_plugins(self, request: Request) -> Document:
        rows = []
        for name, version in sorted(plugins.installed().items()):
            loaded = self._parts.host.loaded.get(name)
            rows.append(
                {
                    "name": name,
                    "version": version,
                    "state": "loaded" if loaded else "installed",
                    "hooks": list(loaded.hooks) if loaded else [],
                    "calls": loaded.calls if loaded else 0,
                    "failures": loaded.failures if loaded else 0,
                }
            )
        return {"plugins": rows}

    async def _list_models(self, request: Request) -> Document:
        return {"models": [_model_row(model) for model in self._parts.models.list()]}

    async def _add_model(self, request: Request) -> Document:
        if len(request.files) != 1:
            raise ConfigError(f"expected one open file with the request; {len(request.files)} came")
        if not self._parts.engines:
            raise ConfigError("no engine is loaded to describe a model", remedy='add "shard" to `plugins`')
        added = await self._parts.transfers.add(
            str(request.body.get("name", "")), request.files[0], self._reporter(request.emit)
        )
        row = _model_row(self._parts.models.find(added["sha256"]))
        return {"models": [row], "stored": added.get("stored")}

    async def _remove_model(self, request: Request) -> Document:
        removed = await asyncio.to_thread(self._parts.models.remove, str(request.body.get("name", "")))
        return {"models": [_model_row(removed)] if removed else []}

    async def _pull_model(self, request: Request) -> Document:
        """From the first online member that has it."""
        wanted = str(request.body.get("name", ""))
        failed: EdgedError | None = None
        for member in list(self._parts.peers.membership.members.values()):
            if not self._parts.peers.is_online(member.node_id):
                continue
            try:
                answer = await self._parts.peers.ask(member.node_id, "describe", wire.Describe(), 5.0)
                held = wire.read_body(wire.Described, answer).models
                found = [s for s, name in held.items() if wanted == name or (wanted and s.startswith(wanted))]
                if len(found) == 1:
                    model = await self._parts.transfers.fetch(
                        found[0], member.node_id, None, self._reporter(request.emit)
                    )
                    return {"models": [_model_row(model)]}
            except (PeerError, ProtocolError) as error:
                failed = error
        if failed is not None:
            raise failed
        raise ConfigError(f"no online member has model {wanted!r}", remedy="see `edged models ls` there")

    async def _list_data(self, request: Request) -> Document:
        return {"data": [_data_row(row) for row in self._parts.data.list()]}

    async def _add_data(self, request: Request) -> Document:
        if len(request.files) != 1:
            raise ConfigError(f"expected one open file with the request; {len(request.files)} came")
        row, stored = await self._parts.data.add(
            str(request.body.get("name", "")), request.files[0], self._reporter(request.emit)
        )
        return {"data": [_data_row(row)], "stored": stored}

    async def _remove_data(self, request: Request) -> Document:
        removed = await asyncio.to_thread(self._parts.data.remove, str(request.body.get("name", "")))
        return {"data": [_data_row(removed)] if removed else []}

    async def _list_adapters(self, request: Request) -> Document:
        return {"adapters": [_adapter_row(adapter) for adapter in self._parts.adapters.list()]}

    async def _add_adapter(self, request: Request) -> Document:
        model = self._parts.models.find(str(request.body.get("model", "")))
        entry = self._parts.engines.get(model.engine or "")
        if not model.complete or entry is None or not entry.adapt:
            raise ConfigError(
                f"expected a whole model of an engine that takes adapters; {model.name!r} is none",
                remedy="see `edged models ls` and `edged plugins`",
            )
        adapter = await self._parts.adapters.add(
            str(request.body.get("name", "")),
            request.files,
            (model, entry),
            self._parts.supervisor,
            self._reporter(request.emit),
        )
        return {"adapters": [_adapter_row(adapter)]}

    async def _export_adapter(self, request: Request) -> Document:
        name = str(request.body.get("name", ""))
        adapter, files = await self._parts.adapters.export(name, request.files, self._parts.supervisor)
        return {"adapters": [_adapter_row(adapter)], "files": files}

    async def _write_adapter(self, request: Request) -> Document:
        """The model that an adapter of kind "seeds" and its base make, into the open file."""
        asked = requests.read(requests.WriteAdapter, request.body)
        if len(request.files) != 1:
            raise ConfigError(f"expected one open file with the request; {len(request.files)} came")
        parts = self._parts
        adapter = parts.adapters.find(asked.name)
        base, method = parts.models.find(adapter.base_sha256), parts.adapters.method_of(adapter)
        engine = next((entry for entry in parts.engines.values() if entry.rewrite), None)
        entry = parts.aggregators.get(method)
        if not base.complete or engine is None or entry is None or not entry.whole:
            raise ConfigError(
                f"expected all of model {adapter.base_name!r}, an engine that writes models, and method "
                f"{method!r} of all weights",
                remedy='see `edged models ls`; `plugins` needs "torch_blocks" and "zeroth_order"',
            )
        written = await parts.adapters.write_model(
            adapter,
            base,
            request.files[0],
            asked.type,
            (engine.rewrite, entry.whole),
            parts.supervisor,
            self._reporter(request.emit),
        )
        return {"adapters": [_adapter_row(adapter)], "model": {"type": asked.type, **written}}

    async def _remove_adapter(self, request: Request) -> Document:
        removed = await asyncio.to_thread(self._parts.adapters.remove, str(request.body.get("name", "")))
        return {"adapters": [_adapter_row(removed)] if removed else []}

    def _reporter(self, emit: Emit) -> Callable[[dict[str, Any]], None]:
        """Progress of a task as events of its client."""

        async def report(event: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):  # a client that went away needs no progress
                await emit({"event": "progress", **event})

        return lambda event: self._life.spawn(report(event))

    async def _plan(self, request: Request) -> Document:
        asked = requests.read(requests.GenerateRequest, request.body)
        return await self._parts.chooser.plan(requests.check_generate(asked, needs_prompt=False))

    async def _generate(self, request: Request) -> Document:
        asked = requests.read(requests.GenerateRequest, request.body)
        return await self._parts.coordinator.generate(
            requests.check_generate(asked, needs_prompt=True), request.emit
        )

    async def _finetune(self, request: Request) -> Document:
        asked = requests.read(requests.FinetuneRequest, request.body)
        return await self._parts.trainings.finetune(asked, request.files, request.emit)

    async def _list_jobs(self, request: Request) -> Document:
        return {"jobs": [self._owner(job).row(job) for job in self._parts.store.all()]}

    async def _show_job(self, request: Request) -> Document:
        job = self._job(request)
        return await self._owner(job).show(job, bool(request.body.get("follow")), request.emit)

    async def _remove_job(self, request: Request) -> Document:
        job = self._job(request)
        return self._owner(job).remove(job)

    async def _cancel(self, request: Request) -> Document:
        job = self._job(request)
        return await self._owner(job).cancel(job)

    def _job(self, request: Request) -> Job:
        return self._parts.store.get(str(request.body.get("job", "")))

    def _owner(self, job: Job) -> Coordinator | Trainings:
        """Who runs jobs of its kind."""
        parts = self._parts
        return parts.trainings if parts.trainings.owns(job) else parts.coordinator


def rss_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _model_row(model: Model) -> Document:
    names = ("name", "sha256", "architecture", "parameters", "bytes", "layers", "weight_type", "complete")
    return {name: getattr(model, name) for name in names}


def _data_row(row: DataSet) -> Document:
    return {name: getattr(row, name) for name in ("name", "rows", "bytes", "sha256")}


def _adapter_row(adapter: Adapter) -> Document:
    names = ("name", "base_sha256", "base_name", "r", "alpha", "kind", "scope", "bytes", "stem", "version")
    row = {name: getattr(adapter, name) for name in names}
    return row | {"created_at": rfc3339(adapter.created_at), "provenance": dict(adapter.provenance)}


def _link_row(link: LinkState) -> Document:
    """As measured, and what one all-reduce costs there."""
    reduce_ms = None
    if link.latency_s is not None and link.bandwidth_bytes_s:
        cost = LinkCost(link.latency_s, link.bandwidth_bytes_s)
        reduce_ms = 1000 * pricing.reduce_s(cost, REDUCED_BYTES)
    return {**msgspec.to_builtins(link), "all_reduce_ms": reduce_ms}


def _seen_row(sighting: Sighting) -> Document:
    return {
        "node_id": None,
        "name": None,
        "fingerprint": sighting.fingerprint,
        "state": "seen",
        "address": sighting.addresses[0] if sighting.addresses else None,
        "rtt_ms": None,
        "bandwidth_bytes_s": None,
        "battery": None,
        "profile": None,
        "trusted": False,
        "rights": [],
        "zone": None,
    }
