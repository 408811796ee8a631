"""The plugin host: loads plugins by name and calls their hooks by the rules of each kind.

What plain pluggy leaves to its user: one raising implementation aborts the whole call, a misspelt
hook registers silently, an `async def` hook returns a coroutine nobody awaits, a class is accepted
as a plugin, one missing library stops every entry point. Here a plugin fails alone, by name.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .errors import EdgedError, PluginError, PolicyViolation
from .types import Candidate, ModelDescription, NodeView, PlanRequest, Strategy

GROUP = "edged"
log = logging.getLogger(__name__)
NEEDS = {"edged_trainings": {"aggregators": "edged_aggregators"}}  # of a hook: what other hooks brought


@dataclass(slots=True)
class Loaded:
    """One plugin with its hooks and counters."""

    name: str
    version: str
    module: ModuleType
    hooks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 0
    failures: int = 0
    seconds: float = 0.0


def guarded(strategy: Strategy) -> Strategy:
    """A plugin's strategy of which a bug refuses its own plans, and no others."""

    def propose(
        model: ModelDescription, nodes: Sequence[NodeView], request: PlanRequest
    ) -> Sequence[Candidate]:
        try:
            return list(strategy.propose(model, nodes, request))
        except EdgedError:
            raise
        except Exception as error:  # the other strategies' plans are as good as before
            log.exception("strategy failed", extra={"strategy": strategy.name})
            raise PolicyViolation(
                f"the strategy {strategy.name!r} failed: {type(error).__name__}",
                remedy="see the log, and report it to whoever wrote its plugin",
            ) from error

    return dataclasses.replace(strategy, propose=propose)


class Host:
    """Loaded plugins. Hooks are called with keyword arguments only."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.loaded: dict[str, Loaded] = {}
        self._trace = os.environ.get("EDGED_TRACE_HOOKS") == "1"

    # --- loading ---

    def load(self, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Import and register the named plugins, in order. PluginError names the one that fails."""
        entries = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
        for name in settings:
            if name not in names:
                log.warning("settings of a plugin that is not loaded", extra={"plugin": name})
        for name in names:
            if name not in entries:
                raise PluginError(
                    f"no plugin {name!r}; installed: {', '.join(sorted(entries))}",
                    remedy="mend `plugins` in the profile, or install it",
                )
            try:
                module = entries[name].load()
            except Exception as error:  # a stranger's import may raise anything; it must fail by name
                raise PluginError(
                    f"plugin {name!r} cannot be imported: {error}",
                    remedy="install what it needs, or remove it from `plugins` in the profile",
                ) from error
            self.register(name, module, settings.get(name, {}), _version(entries[name]))

    def register(
        self, name: str, module: ModuleType, settings: Mapping[str, Any] | None = None, version: str = ""
    ) -> None:
        """Add one module as a plugin after checking its hooks."""
        if not isinstance(module, ModuleType):
            raise PluginError(f"plugin {name!r} is a {type(module).__name__}; expected a module")
        for known in self.loaded.values():
            if known.name == name or known.module is module:
                raise PluginError(f"plugin {name!r} is loaded already, as {known.name!r}")
        hooks = tuple(sorted(_implementations(name, module)))
        try:
            self._manager.register(module, name)  # checks the arguments of each hook
            self._manager.check_pending()  # checks the names
        except pluggy.PluginValidationError as error:
            if self._manager.has_plugin(name):  # pluggy before 1.7 keeps what it registered so far
                self._manager.unregister(name=name)
            hooks_known = ", ".join(sorted(hookspecs.KINDS))
            raise PluginError(f"plugin {name!r}: {error}; hooks: {hooks_known}") from error
        self.loaded[name] = Loaded(name, version, module, hooks, settings or {})

    # --- calling ---

    def registrations(self, hook: str) -> dict[str, Any]:
        """All entries of a register hook by name; PluginError on a clash or an exception."""
        values = {name: self.registrations(other) for name, other in NEEDS.get(hook, {}).items()}
        found: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for plugin, implementation in self._implementations(hook, "register"):
            try:
                answer = self._call(plugin, implementation, {"settings": plugin.settings, **values})
                entries = [(entry.name, entry) for entry in answer or ()]
            except EdgedError:  # it says by itself what to mend: its settings, say
                raise
            except Exception as error:  # register: startup stops, whatever it was
                raise PluginError(f"plugin {plugin.name!r} failed in {hook}: {error}") from error
            for key, entry in entries:
                if key in found:
                    raise PluginError(
                        f"{hook}: plugins {owners[key]!r} and {plugin.name!r} both bring {key!r}",
                        remedy="load one of them",
                    )
                found[key], owners[key] = entry, plugin.name
        return found

    def decide(self, hook: str, **values: Any) -> Any:
        """The first answer that is not None, or None."""
        for plugin, implementation in self._implementations(hook, "decide"):
            try:
                answer = self._call(plugin, implementation, values)
            except Exception:  # decide: edged's own answer is used
                log.exception("decide hook failed", extra={"plugin": plugin.name, "hook": hook})
                continue
            if answer is not None:
                return answer
        return None

    def guard(self, hook: str, **values: Any) -> str | None:
        """Why the thing is refused, or None when every plugin allows it."""
        for plugin, implementation in self._implementations(hook, "guard"):
            try:
                answer = self._call(plugin, implementation, values)
            except Exception as error:  # guard: what cannot be checked is refused
                log.exception("guard hook failed", extra={"plugin": plugin.name, "hook": hook})
                return f"plugin {plugin.name} failed while checking: {type(error).__name__}"
            if answer is not None:
                return str(answer)
        return None

    def observe(self, hook: str, **values: Any) -> None:
        """Tell every plugin; answers are ignored."""
        for plugin, implementation in self._implementations(hook, "observe"):
            try:
                self._call(plugin, implementation, values)
            except Exception:  # observe: the others still run
                log.exception("observe hook failed", extra={"plugin": plugin.name, "hook": hook})

    def _implementations(self, hook: str, kind: hookspecs.Kind) -> Iterator[tuple[Loaded, Any]]:
        assert hookspecs.KINDS[hook] == kind, f"{hook} is a {hookspecs.KINDS[hook]} hook"
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            yield self.loaded[implementation.plugin_name], implementation

    def _call(self, plugin: Loaded, implementation: Any, values: Mapping[str, Any]) -> Any:
        plugin.calls += 1
        started = time.perf_counter()
        try:
            answer = implementation.function(**{name: values[name] for name in implementation.argnames})
        except Exception:  # counted here, judged by the kind's caller
            plugin.failures += 1
            raise
        finally:
            plugin.seconds += time.perf_counter() - started
        if self._trace:
            log.info("hook", extra={"plugin": plugin.name, "hook": implementation.function.__name__})
        return answer


def installed() -> dict[str, str]:
    """Every installed plugin and its version, imported or not."""
    return {entry.name: _version(entry) for entry in metadata.entry_points(group=GROUP)}


def _version(entry: metadata.EntryPoint) -> str:
    return entry.dist.version if entry.dist else ""


def _implementations(name: str, module: ModuleType) -> Iterator[str]:
    for attribute, value in vars(module).items():
        options = getattr(value, f"{hookspecs.PROJECT}_impl", None)
        if not options:
            if attribute.startswith("edged_") and callable(value):
                raise PluginError(f"plugin {name!r}: {attribute} lacks the @hookimpl decorator")
            continue
        if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value):
            raise PluginError(f"plugin {name!r}: {attribute} is async; hooks are synchronous")
        if options["wrapper"] or options["hookwrapper"]:
            raise PluginError(f"plugin {name!r}: {attribute} is a wrapper; a plugin answers for itself")
        yield attribute
