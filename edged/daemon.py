"""The daemon: puts the parts together, answers the control socket, ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import config, plugins, requests, sdnotify, wire
from . import identity as ids
from .control import ControlServer, Emit
from .coordinator import Coordinator
from .device import Device
from .errors import ConfigError, EdgedError, PeerError
from .health import Health
from .identity import Home
from .jobs import JobStore, rfc3339
from .models import ModelStore
from .peers import Peers
from .planning import CORE_STRATEGIES
from .plugins import Host
from .roles import Roles
from .supervisor import Supervisor
from .transfers import Transfers
from .transport import check_keys
from .types import Announcement, Condition, DiscovererEntry
from .version import PROTOCOL, VERSION

log = logging.getLogger(__name__)
TIDY_S = 5.0
DRAIN_S = 60.0  # running jobs may take this long to end after SIGTERM

Command = Callable[[dict[str, Any], Sequence[int], Emit], Coroutine[Any, Any, dict[str, Any]]]


class Daemon:
    def __init__(self, home: Home) -> None:
        """Read everything that can be wrong before anything is opened."""
        self._home = home
        self._identity = ids.load(home)
        check_keys(self._identity)
        self._profile = config.read(home.profile)
        _check_encryption(self._profile)
        self._host = Host()
        self._host.load(self._profile.plugins, self._profile.plugin)
        self._started_at = time.monotonic()
        self._state = "starting"
        self._leaving = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._compose()

    def _compose(self) -> None:
        host, home, profile = self._host, self._home, self._profile
        engines = host.registrations("edged_engines")
        sensors = host.registrations("edged_sensors")
        strategies = {entry.name: entry for entry in CORE_STRATEGIES}
        strategies |= host.registrations("edged_strategies")
        self._discoverers: dict[str, DiscovererEntry] = host.registrations("edged_discoverers")
        self._health = Health()
        self._supervisor = Supervisor()
        self._models = ModelStore(home)
        self._device = Device(profile, home.cache, sensors, engines, self._supervisor)
        self._peers = Peers(self._identity, home, profile, host, self._health)
        self._transfers = Transfers(home, profile, self._models, self._peers, self._supervisor, engines)
        self._roles = Roles(
            profile, self._peers, host, self._device, self._supervisor, self._transfers, engines
        )
        self._store = JobStore(home.store_file)
        self._coordinator = Coordinator(
            profile, self._store, self._peers, host, self._device, self._models, strategies, engines
        )
        self._coordinator.memory_taken = lambda: self._roles.memory_taken
        self._peers.answers("describe", self._describe)
        self._engines = engines
        self._commands: dict[str, Command] = {
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
            "plan": self._plan,
            "generate": self._generate,
            "jobs": self._list_jobs,
            "jobs.show": self._show_job,
            "jobs.rm": self._remove_job,
            "cancel": self._cancel,
        }

    # --- life ---

    async def run(self) -> None:
        """Serve until told to leave."""
        path, is_system = self._control_path()
        control = ControlServer(path, self._handle, shared=is_system)
        self._catch_signals()
        try:
            port = await self._peers.start()
            await control.start()
            ids.write_atomically(self._home.path / "control.addr", os.fsencode(path))
            await self._discover(port)
            self._state = "online"
            sdnotify.notify("READY=1", f"STATUS=online, port {port}")
            log.info("ready", extra={"node": self._identity.node_id[:8], "port": port, "socket": str(path)})
            self._spawn(self._tidy())
            self._spawn(self._feed_watchdog())
            await self._leaving.wait()
        finally:
            await self._shut_down(control)

    def _control_path(self) -> tuple[Path, bool]:
        """systemd's runtime folder when it gave one, else the home's socket."""
        runtime = os.environ.get("RUNTIME_DIRECTORY")
        if runtime:
            return Path(runtime.split(":")[0]) / "control.sock", True
        return self._home.control_socket, False

    async def _discover(self, port: int) -> None:
        announcement = Announcement(
            ids.fingerprint_of(self._identity.node_id),
            port,
            PROTOCOL,
            self._profile.network.interfaces,
        )
        for entry in self._discoverers.values():
            try:
                seen = functools.partial(self._peers.seen, entry.name)
                await entry.discoverer.start(
                    announcement, seen, functools.partial(self._peers.lost, entry.name)
                )
            except Exception as error:  # a plugin's service: the node works without it, and says so
                log.exception("discovery failed", extra={"discoverer": entry.name})
                self._health.set(
                    Condition(
                        f"discovery-{entry.name}",
                        "warning",
                        f"{entry.name} finds no nodes: {error}",
                        "see the log; nodes that are already paired still connect",
                    )
                )

    async def _shut_down(self, control: ControlServer) -> None:
        """In the reverse order of use; each part ends though another one fails."""
        self._state = "stopping"
        sdnotify.notify("STOPPING=1")
        await control.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        closing = (
            self._coordinator.close,
            self._roles.close,
            self._transfers.close,
            *(entry.discoverer.stop for entry in self._discoverers.values()),
            self._peers.close,
            self._supervisor.close,
        )
        for close in closing:
            try:
                await close()
            except Exception:  # the outermost frame: the rest must still end
                log.exception("a part did not end cleanly")
        self._store.close()
        log.info("ended")

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first one drains, a second one stops."""
        if self._state == "draining":
            self._leaving.set()
        else:
            self._spawn(self._leave())

    async def _leave(self) -> None:
        self._state = "draining"
        sdnotify.notify("STATUS=draining")
        self._coordinator.is_draining = self._roles.is_draining = True
        await self._coordinator.drained(DRAIN_S)
        self._leaving.set()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            self._coordinator.tidy()
            self._refresh_conditions()
            online = sum(self._peers.is_online(node_id) for node_id in self._peers.membership.members)
            sdnotify.notify(
                f"STATUS={self._state}, {online} peers online, {self._coordinator.running} jobs, "
                f"{self._roles.count} roles"
            )

    async def _feed_watchdog(self) -> None:
        pause = sdnotify.watchdog_s()
        while pause is not None:
            sdnotify.notify("WATCHDOG=1")
            await asyncio.sleep(pause / 2)

    def _refresh_conditions(self) -> None:
        if not self._engines:
            text, remedy = "no engine is loaded: this node runs no models", 'add "shard" to `plugins`'
            self._health.set(Condition("no-engine", "warning", text, remedy))
        self._health.clear("model-damaged")
        for condition in self._models.conditions():
            self._health.set(condition)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- commands ---

    async def _handle(
        self, kind: str, body: dict[str, Any], files: Sequence[int], emit: Emit
    ) -> dict[str, Any]:
        command = self._commands.get(kind)
        if command is None:
            raise ConfigError(f"no command {kind!r}; known: {', '.join(sorted(self._commands))}")
        return await command(body, files, emit)

    async def _describe(self, node_id: str, body: wire.Describe) -> wire.Described:
        if body.measure:
            try:
                await self._device.ensure_measured()
            except EdgedError as error:
                log.warning("device not measured", extra={"reason": str(error)})
        view = self._coordinator.view()
        held = {model.sha256: model.name for model in self._models.list() if model.complete}
        return wire.Described(
            view.device,
            view.memory_budget,
            view.engines,
            view.speeds,
            view.links,
            held,
            self._profile.name,
        )

    async def _status(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        state = self._device.read()
        self._refresh_conditions()
        return {
            "node_id": self._identity.node_id,
            "name": self._identity.name,
            "version": VERSION,
            "protocol": PROTOCOL,
            "state": self._state,
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "port": self._peers.transport.port,
            "plugins": list(self._host.loaded),
            "conditions": msgspec.to_builtins(self._health.conditions),
            "memory": {"total": state.memory_total, "free": state.memory_free},
            "battery": msgspec.to_builtins(state.battery),
            "rss_bytes": rss_bytes(),
            "jobs_running": self._coordinator.running,
            "roles": self._roles.count,
        }

    async def _list_peers(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        members = self._peers.membership.members
        views = {view.node_id: view for view in await self._coordinator.views(measure=False)}
        rows = []
        for node_id, member in members.items():
            link = self._peers.links.get(node_id)
            view = views.get(node_id)
            state = "joining" if member.state == "joining" else (link.state if link else "offline")
            rows.append(
                {
                    "node_id": node_id,
                    "name": member.name,
                    "fingerprint": ids.fingerprint_of(node_id),
                    "state": state,
                    "address": link.address if link and link.address else None,
                    "rtt_ms": link.rtt_ms if link else None,
                    "bandwidth_bytes_s": None,
                    "battery": msgspec.to_builtins(view.device.battery) if view else None,
                    "profile": view.profile if view else None,
                    "trusted": True,
                    "rights": list(member.rights),
                    "zone": member.zone,
                }
            )
        known = {row["fingerprint"] for row in rows}
        rows += [_seen_row(s) for f, s in self._peers.sightings().items() if f not in known]
        return {"peers": rows}

    async def _invite(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        asked = requests.read(requests.Invite, body)
        if not 1 <= asked.ttl_s <= 7 * 86400:
            raise ConfigError("expected --ttl from 1s to 7d", remedy="mend the argument")
        token, expires_at = self._peers.invite(asked.ttl_s, asked.rights, asked.zone)
        return {"token": token, "expires_at": rfc3339(expires_at)}

    async def _join(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        member = await self._peers.join(str(body.get("token", "")))
        return {"node_id": member.node_id, "name": member.name}

    async def _trust(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        asked = requests.read(requests.Trust, body)
        member = self._peers.trust(asked.node, asked.rights, asked.zone)
        return {"node_id": member.node_id, "rights": list(member.rights), "zone": member.zone}

    async def _forget(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return {"node_id": self._peers.forget(str(body.get("node", "")))}

    async def _drain(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        await self._leave()
        return {"handed_over": []}

    async def _show_profile(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        if body.get("measure"):
            await emit({"event": "progress", "text": "measuring this device"})
            await self._device.measure()
        state = self._device.read()
        return {
            "name": self._profile.name,
            "cpu": {"name": state.cpu_name, "count": state.cpu_count, "load_1m": state.load_1m},
            "memory": {
                "total": state.memory_total,
                "free": state.memory_free,
                "budget": self._device.memory_budget(self._roles.memory_taken),
            },
            "battery": msgspec.to_builtins(state.battery),
            "power": {
                "watts": state.power_watts,
                "idle_watts": self._profile.device.idle_watts,
                "load_watts": self._profile.device.load_watts,
            },
            "thermal": {
                "celsius": state.temperature_celsius,
                "limit_celsius": self._profile.device.thermal_limit_celsius,
            },
            "engines": msgspec.to_builtins(self._device.speeds()),
            "links": msgspec.to_builtins(self._peers.link_states()),
        }

    async def _list_plugins(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        rows = []
        for name, version in sorted(plugins.installed().items()):
            loaded = self._host.loaded.get(name)
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

    async def _list_models(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return {"models": [_model_row(model) for model in self._models.list()]}

    async def _add_model(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        if len(files) != 1:
            raise ConfigError(f"expected one open file with the request; {len(files)} came")
        if not self._engines:
            raise ConfigError("no engine is loaded to describe a model", remedy='add "shard" to `plugins`')
        added = await self._transfers.add(str(body.get("name", "")), files[0], self._reporter(emit))
        row = _model_row(self._models.find(added["sha256"]))
        return {"models": [row], "stored": added.get("stored")}

    async def _remove_model(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        removed = await asyncio.to_thread(self._models.remove, str(body.get("name", "")))
        return {"models": [_model_row(removed)] if removed else []}

    async def _pull_model(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        """From the first online member that has it."""
        wanted = str(body.get("name", ""))
        for member in list(self._peers.membership.members.values()):
            if not self._peers.is_online(member.node_id):
                continue
            with contextlib.suppress(PeerError):
                answer = await self._peers.ask(member.node_id, "describe", wire.Describe(), 5.0)
                held = wire.read_body(wire.Described, answer).models
                found = [s for s, name in held.items() if wanted == name or (wanted and s.startswith(wanted))]
                if len(found) == 1:
                    model = await self._transfers.fetch(found[0], member.node_id, None, self._reporter(emit))
                    return {"models": [_model_row(model)]}
        raise ConfigError(f"no online member has model {wanted!r}", remedy="see `edged models ls` there")

    def _reporter(self, emit: Emit) -> Callable[[dict[str, Any]], None]:
        """Progress of a task as events of its client."""

        async def report(event: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):  # a client that went away needs no progress
                await emit({"event": "progress", **event})

        return lambda event: self._spawn(report(event))

    async def _plan(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        request = requests.read(requests.GenerateRequest, body)
        return await self._coordinator.plan(requests.check_generate(request, needs_prompt=False))

    async def _generate(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        request = requests.read(requests.GenerateRequest, body)
        return await self._coordinator.generate(requests.check_generate(request, needs_prompt=True), emit)

    async def _list_jobs(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return {"jobs": self._coordinator.rows()}

    async def _show_job(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return await self._coordinator.show(str(body.get("job", "")), bool(body.get("follow")), emit)

    async def _remove_job(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return self._coordinator.remove(str(body.get("job", "")))

    async def _cancel(self, body: dict[str, Any], files: Sequence[int], emit: Emit) -> dict[str, Any]:
        return await self._coordinator.cancel(str(body.get("job", "")))


def main(home: Home) -> int:
    """`edged run`: the daemon in the foreground; its exit code."""
    _log_to_stderr()
    ids.load(home)  # a home that is not one says how to make it, before a lock file is left in it
    lock = ids.lock(home)
    try:
        asyncio.run(_serve(home))
    finally:
        os.close(lock)
    return 0


async def _serve(home: Home) -> None:
    await Daemon(home).run()


def rss_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


class _Formatter(logging.Formatter):
    """Constant message, then the fields of `extra`."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in self._KNOWN}
        return super().format(record) + "".join(f" {key}={value}" for key, value in fields.items())


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    under_journal = bool(os.environ.get("JOURNAL_STREAM"))  # it adds the time by itself
    prefix = "" if under_journal else "%(asctime)s "
    handler.setFormatter(_Formatter(f"{prefix}%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=os.environ.get("EDGED_LOG", "INFO"), handlers=[handler])


def _check_encryption(profile: config.Profile) -> None:
    if profile.network.encryption == "required":
        return
    raise ConfigError(
        'expected network.encryption = "required"; running without encryption is not part of this version',
        remedy="remove the line from the profile",
    )


def _model_row(model: Any) -> dict[str, Any]:
    names = ("name", "sha256", "architecture", "parameters", "bytes", "layers", "weight_type", "complete")
    return {name: getattr(model, name) for name in names}


def _seen_row(sighting: Any) -> dict[str, Any]:
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
