"""Every hook of edged: when it is called, in which process, and what an answer means.

Four kinds (the kind decides what an exception does; see `edged.plugins`):

register  once, at startup; answers are named entries; a name clash or an exception stops startup
decide    per decision; the first answer that is not None wins; an exception is logged and skipped
guard     before something irreversible; None allows, text refuses; an exception refuses
observe   after something happened; answers are ignored; an exception is logged

Hooks are synchronous, answer at once, and receive values only. An implementation may take fewer
arguments than the specification names. Decorate implementations with `edged.hookimpl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pluggy

from .types import (
    AggregatorEntry,
    Candidate,
    DiscovererEntry,
    EngineEntry,
    PlanRequest,
    Policy,
    Role,
    SensorEntry,
    Strategy,
    Training,
)

PROJECT = "edged"
Kind = Literal["register", "decide", "guard", "observe"]
F = TypeVar("F", bound=Callable[..., Any])

hookimpl = pluggy.HookimplMarker(PROJECT)
_hookspec = pluggy.HookspecMarker(PROJECT)

KINDS: dict[str, Kind] = {}


def _spec(kind: Kind) -> Callable[[F], F]:
    """Declare a hook of `kind`; decide hooks stop at the first answer."""

    def mark(function: F) -> F:
        KINDS[function.__name__] = kind
        marked: F = _hookspec(firstresult=kind == "decide")(function)
        return marked

    return mark


# --- register: in the daemon and in workers -------------------------------------------------------


@_spec("register")
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:  # type: ignore[empty-body]
    """Engines this plugin brings. Called in: daemon and worker.

    :param settings: the plugin's own settings from the profile.
    """


@_spec("register")
def edged_strategies(settings: Mapping[str, Any]) -> Sequence[Strategy]:  # type: ignore[empty-body]
    """Ways to form a plan, by name. Called in: daemon."""


@_spec("register")
def edged_discoverers(settings: Mapping[str, Any]) -> Sequence[DiscovererEntry]:  # type: ignore[empty-body]
    """Services that find other nodes. Called in: daemon. Nothing is opened before `start`."""


@_spec("register")
def edged_sensors(settings: Mapping[str, Any]) -> Sequence[SensorEntry]:  # type: ignore[empty-body]
    """Readers of this device's state. Called in: daemon."""


@_spec("register")
def edged_policies(settings: Mapping[str, Any]) -> Sequence[Policy]:  # type: ignore[empty-body]
    """What chooses among priced plans, by name. Called in: daemon, and by `edged simulate`."""


@_spec("register")
def edged_aggregators(settings: Mapping[str, Any]) -> Sequence[AggregatorEntry]:  # type: ignore[empty-body]
    """Ways to aggregate client updates, by name. Called in: daemon, and by `edged config --explain`."""


@_spec("register")
def edged_trainings(  # type: ignore[empty-body]
    settings: Mapping[str, Any], aggregators: Mapping[str, AggregatorEntry]
) -> Sequence[Training]:
    """Kinds of training jobs, by name. Called in: daemon, and by `edged config --explain`.

    :param aggregators: all that plugins brought, by name.
    """


# --- decide ---------------------------------------------------------------------------------------


@_spec("decide")
def edged_select_plan(candidates: Sequence[Candidate], request: PlanRequest) -> int | None:
    """Choose among priced candidates: an index, or None for edged's own answer. Called in: daemon."""


# --- guard ----------------------------------------------------------------------------------------


@_spec("guard")
def edged_admit_role(role: Role, model_sha256: str, coordinator: str) -> str | None:
    """Before this node takes a role for `coordinator` (a node id): None allows, text refuses.

    Called in: daemon.
    """


# --- observe --------------------------------------------------------------------------------------


@_spec("observe")
def edged_peer_joined(node_id: str, name: str) -> None:
    """A node was admitted as a peer. Called in: daemon."""


@_spec("observe")
def edged_peer_left(node_id: str, name: str, reason: str) -> None:
    """A peer was forgotten or went offline. Called in: daemon."""


@_spec("observe")
def edged_job_finished(job_id: str, state: str, measured: Mapping[str, Any]) -> None:
    """A job of this coordinator ended in `state`. Called in: daemon."""
