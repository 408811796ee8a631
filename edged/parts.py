"""The parts of a daemon and how they are put together. Nothing is opened or started here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from . import config, wire
from . import identity as ids
from .adapters import AdapterStore
from .bearing import Bearing
from .choosing import Chooser, check_policy
from .coordinator import Coordinator
from .datasets import DataStore
from .device import Device
from .errors import ConfigError, EdgedError
from .groups import Groups
from .health import Health
from .identity import Home, Identity
from .jobs import JobStore
from .lending import Lending
from .models import ModelStore
from .peers import Peers
from .planning import CORE_POLICIES, CORE_STRATEGIES
from .plugins import Host, guarded
from .probing import Probing
from .roles import Roles
from .supervisor import Supervisor
from .training import Trainings
from .transfers import Transfers
from .transport import check_keys
from .types import AggregatorEntry, Condition, DiscovererEntry, EngineEntry
from .viewing import Viewer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """One of each, wired to each other."""

    home: Home
    identity: Identity
    profile: config.Profile
    host: Host
    health: Health
    supervisor: Supervisor
    models: ModelStore
    device: Device
    bearing: Bearing
    probing: Probing
    peers: Peers
    transfers: Transfers
    roles: Roles
    store: JobStore
    viewer: Viewer
    chooser: Chooser
    coordinator: Coordinator
    trainings: Trainings
    data: DataStore
    adapters: AdapterStore
    engines: Mapping[str, EngineEntry]
    aggregators: Mapping[str, AggregatorEntry]
    discoverers: Mapping[str, DiscovererEntry]

    async def describe(self, node_id: str, body: wire.Describe) -> wire.Described:
        """What a coordinator plans with."""
        if body.measure:
            try:
                await self.device.ensure_measured()
            except EdgedError as error:
                log.warning("device not measured", extra={"reason": str(error)})
            await self.probing.ensure()
            await self.bearing.ensure()
        view, member = self.viewer.view(), self.peers.membership.member(node_id)
        refuses = view.refuses
        if member is not None and "submit" not in member.rights:
            refuses = f"{member.name} has no right to submit jobs here"
        held = {model.sha256: model.name for model in self.models.list() if model.complete}
        return wire.Described(
            view.device,
            view.memory_budget,
            view.engines,
            view.speeds,
            view.links,
            held,
            self.profile.name,
            refuses,
            view.watts,
            view.bearable,
            view.unfitted,
            view.adapters,
        )

    def refresh_conditions(self) -> None:
        """Conditions that are looked up rather than told."""
        if not self.engines:
            text, remedy = "no engine is loaded: this node runs no models", 'add "shard" to `plugins`'
            self.health.set(Condition("no-engine", "warning", text, remedy))
        self.health.clear("model-damaged")
        for condition in self.models.conditions():
            self.health.set(condition)


def compose(home: Home) -> Parts:
    """Read everything that can be wrong, then build the parts; the first error says what to mend."""
    identity = ids.load(home)
    check_keys(identity)
    profile = config.read(home.profile)
    _check_encryption(profile)
    host, health, supervisor = Host(), Health(), Supervisor()
    host.load(profile.plugins, profile.plugin)
    engines = host.registrations("edged_engines")
    strategies = {entry.name: entry for entry in CORE_STRATEGIES}
    strategies |= {name: guarded(entry) for name, entry in host.registrations("edged_strategies").items()}
    policies = {policy.name: policy for policy in CORE_POLICIES} | host.registrations("edged_policies")
    if profile.energy.policy:
        check_policy(profile.energy.policy, policies)
    models, store = ModelStore(home), JobStore(home.store_file)
    adapters = AdapterStore(home)
    device = Device(profile, home.cache, host.registrations("edged_sensors"), engines, supervisor)
    fits = sorted({policy.fit for policy in policies.values() if policy.fit})
    bearing = Bearing(profile, home.cache, device, supervisor, next(iter(fits), ""))
    peers = Peers(identity, home, profile, host, health)
    aggregators, data = host.registrations("edged_aggregators"), DataStore(home, supervisor)
    kinds = host.registrations("edged_trainings")
    lending = Lending()
    transfers = Transfers(home, profile, models, lending, peers, supervisor, engines)
    roles = Roles(
        profile,
        peers,
        host,
        device,
        supervisor,
        transfers,
        engines,
        kinds,
        aggregators,
        data,
        adapters,
        home.training,
    )
    probing = Probing(profile, peers, supervisor, device)
    viewer = Viewer(peers, device, bearing, probing, models, engines)
    viewer.memory_taken = lambda: roles.memory_taken
    chooser = Chooser(
        profile,
        peers,
        host,
        device,
        viewer,
        supervisor,
        models,
        adapters,
        lending,
        strategies,
        policies,
        engines,
    )
    groups = Groups(peers, profile.jobs.worker_idle)
    coordinator = Coordinator(profile, store, peers, host, models, viewer, chooser, groups)
    transfers.borrowers = coordinator.borrowers
    trainings = Trainings(
        store,
        peers,
        host,
        models,
        viewer,
        chooser,
        groups,
        data,
        adapters,
        kinds,
        engines,
        home.training,
    )
    parts = Parts(
        home,
        identity,
        profile,
        host,
        health,
        supervisor,
        models,
        device,
        bearing,
        probing,
        peers,
        transfers,
        roles,
        store,
        viewer,
        chooser,
        coordinator,
        trainings,
        data,
        adapters,
        engines,
        aggregators,
        host.registrations("edged_discoverers"),
    )
    peers.answers("describe", parts.describe)
    return parts


def _check_encryption(profile: config.Profile) -> None:
    if profile.network.encryption == "required":
        return
    raise ConfigError(
        'expected network.encryption = "required"; running without encryption is not part of this version',
        remedy="remove the line from the profile",
    )
