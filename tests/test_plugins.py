"""The plugin host: what each kind of hook does with answers and exceptions, and what is not loaded."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pluggy
import pytest
from edged_plugins import echo

from edged import (
    AggregatorEntry,
    Announcement,
    Candidate,
    DeviceState,
    DiscovererEntry,
    EngineEntry,
    ModelDescription,
    NodeView,
    PlanRequest,
    Predicted,
    Role,
    SensorEntry,
    Strategy,
    Training,
    hookimpl,
    hookspecs,
    plugins,
)
from edged.errors import ConfigError, EdgedError, PluginError, PolicyViolation
from edged.planning import CORE_STRATEGIES, consider
from edged.plugins import Host, guarded

ROLE = Role(0, "n" * 52, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0)
ADMIT = {"role": ROLE, "model_sha256": "0" * 64, "coordinator": "c" * 52}
JOINED = {"node_id": "n" * 52, "name": "phone"}


def module(name: str = "stranger", **hooks: Callable[..., Any]) -> types.ModuleType:
    """A plugin: a real module with these functions as its hooks."""
    made = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(made, hook, hookimpl(function))
    return made


def host(*modules: types.ModuleType) -> Host:
    """The modules as plugins of their own names, loaded in this order."""
    made = Host()
    for plugin in modules:
        made.register(plugin.__name__, plugin)
    return made


def sensor(name: str) -> SensorEntry:
    return SensorEntry(name, DeviceState)


def raises(*arguments: Any, **values: Any) -> Any:
    raise RuntimeError("a stranger's mistake")


# --- register -------------------------------------------------------------------------------------


def test_registrations_of_all_plugins_are_found_by_name() -> None:
    found = host(
        module("a", edged_sensors=lambda settings: [sensor("battery")]),
        module("b", edged_sensors=lambda settings: (sensor("heat"), sensor("power"))),
        module("c", edged_sensors=lambda settings: None),
    ).registrations("edged_sensors")
    assert {name: entry.name for name, entry in found.items()} == {n: n for n in ("battery", "heat", "power")}


def yields_then_raises(settings: Any) -> Iterator[SensorEntry]:
    yield sensor("one")
    raise RuntimeError("a stranger's mistake")


@pytest.mark.parametrize(
    "answer", [raises, yields_then_raises, lambda settings: 5, lambda settings: ["no entry"]]
)
def test_startup_stops_by_name_at_a_register_hook_that_fails(answer: Callable[..., Any]) -> None:
    with pytest.raises(PluginError, match=r"plugin 'stranger' failed in edged_sensors"):
        host(module(edged_sensors=answer)).registrations("edged_sensors")


def test_a_plugins_own_word_on_its_settings_comes_through() -> None:
    def refuses(settings: Any) -> None:
        raise ConfigError("no setting plugin.stranger.colour")

    with pytest.raises(ConfigError, match=r"no setting plugin\.stranger\.colour"):
        host(module(edged_sensors=refuses)).registrations("edged_sensors")


def test_two_plugins_that_bring_one_name_are_both_named() -> None:
    twice = [module(name, edged_sensors=lambda settings: [sensor("heat")]) for name in ("first", "second")]
    with pytest.raises(PluginError) as caught:
        host(*twice).registrations("edged_sensors")
    assert all(word in str(caught.value) for word in ("'first'", "'second'", "'heat'"))


def test_one_plugin_that_brings_one_name_twice_is_refused() -> None:
    with pytest.raises(PluginError, match="'heat'"):
        host(module(edged_sensors=lambda settings: [sensor("heat")] * 2)).registrations("edged_sensors")


def test_each_plugin_gets_its_own_settings() -> None:
    seen = {}
    made = Host()
    for name in ("a", "b"):
        hook = module(name, edged_sensors=lambda settings, name=name: seen.__setitem__(name, settings))
        made.register(name, hook, {"of": name})
    made.registrations("edged_sensors")
    assert seen == {"a": {"of": "a"}, "b": {"of": "b"}}


# --- decide ---------------------------------------------------------------------------------------

CANDIDATES = [Candidate("local", (ROLE,), Predicted(tpot_ms=1.0)), Candidate("remote", (ROLE,))]
DECISION = {"candidates": CANDIDATES, "request": PlanRequest()}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([None, 1], 1),
        ([1, None], 1),
        ([1, 0], 0),  # the plugin loaded last is asked first
        ([1, raises], 1),
        ([raises, 0], 0),
        ([raises, raises], None),
    ],
)
def test_the_first_answer_that_is_not_none_decides_and_a_failing_plugin_is_skipped(
    answers: list[Any], expected: int | None
) -> None:
    made = host(
        *(
            module(f"p{i}", edged_select_plan=answer if callable(answer) else lambda answer=answer: answer)
            for i, answer in enumerate(answers)
        )
    )
    assert made.decide("edged_select_plan", **DECISION) == expected


def test_nobody_is_asked_after_the_answer() -> None:
    late = module("late", edged_select_plan=raises)
    made = host(late, module("first", edged_select_plan=lambda: 0))
    assert made.decide("edged_select_plan", **DECISION) == 0
    assert made.loaded["late"].calls == 0


# --- guard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "refused"),
    [
        ([], None),
        ([None, None], None),
        (["its owner sleeps", None], "its owner sleeps"),
        ([None, "its owner sleeps"], "its owner sleeps"),
        ([raises], "plugin p0 failed while checking: RuntimeError"),
        ([raises, None], "plugin p0 failed while checking: RuntimeError"),
    ],
)
def test_a_guard_needs_every_plugin_and_refuses_what_could_not_be_checked(
    answers: list[Any], refused: str | None
) -> None:
    made = host(
        *(
            module(f"p{i}", edged_admit_role=answer if callable(answer) else lambda answer=answer: answer)
            for i, answer in enumerate(answers)
        )
    )
    assert made.guard("edged_admit_role", **ADMIT) == refused


@pytest.mark.parametrize("answer", ["", False, 0])
def test_an_answer_that_is_not_none_refuses_whatever_it_is(answer: Any) -> None:
    assert host(module(edged_admit_role=lambda: answer)).guard("edged_admit_role", **ADMIT) is not None


# --- observe --------------------------------------------------------------------------------------


def test_every_plugin_is_told_though_one_fails() -> None:
    told: list[str] = []
    made = host(
        module("a", edged_peer_joined=lambda name: told.append(name)),
        module("b", edged_peer_joined=raises),
        module("c", edged_peer_joined=lambda name: told.append(name)),
    )
    made.observe("edged_peer_joined", **JOINED)
    assert told == ["phone", "phone"]


# --- what a hook takes, what is counted -----------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda: (), ()),
        (lambda request: (request,), (PlanRequest(),)),
        (lambda request, candidates: (request, candidates), (PlanRequest(), CANDIDATES)),
        (lambda candidates, mine=7: (candidates, mine), (CANDIDATES, 7)),
    ],
    ids=["none", "one", "all in another order", "one, and one of its own"],
)
def test_an_implementation_takes_the_arguments_it_names(answer: Any, expected: tuple[Any, ...]) -> None:
    assert host(module(edged_select_plan=answer)).decide("edged_select_plan", **DECISION) == expected


def test_calls_failures_and_time_are_counted_for_each_plugin() -> None:
    made = host(module("good", edged_peer_joined=lambda: None), module("bad", edged_peer_joined=raises))
    for _ in range(3):
        made.observe("edged_peer_joined", **JOINED)
    counted = {name: (plugin.calls, plugin.failures) for name, plugin in made.loaded.items()}
    assert counted == {"good": (3, 0), "bad": (3, 3)}
    assert all(plugin.seconds > 0 for plugin in made.loaded.values())


def test_every_hook_call_is_logged_where_it_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EDGED_TRACE_HOOKS", "1")

    def edged_peer_joined() -> None: ...

    made = host(module(edged_peer_joined=edged_peer_joined))
    with caplog.at_level(logging.INFO, "edged.plugins"):
        made.observe("edged_peer_joined", **JOINED)
    [record] = caplog.records
    assert record.plugin == "stranger"
    assert record.hook == "edged_peer_joined"


def test_a_failure_is_logged_with_plugin_and_hook(caplog: pytest.LogCaptureFixture) -> None:
    host(module(edged_peer_joined=raises)).observe("edged_peer_joined", **JOINED)
    assert [(r.plugin, r.hook) for r in caplog.records] == [("stranger", "edged_peer_joined")]


# --- loading --------------------------------------------------------------------------------------


async def is_async() -> None: ...


async def yields_async() -> Any:
    yield None


def wraps() -> Any:
    return (yield)


def undecorated() -> types.ModuleType:
    made = types.ModuleType("stranger")
    made.edged_peer_joined = lambda name: None
    return made


def wrapper() -> types.ModuleType:
    made = types.ModuleType("stranger")
    made.edged_admit_role = hookimpl(wrapper=True)(wraps)
    return made


class Plugin:
    """What pluggy itself would accept."""

    @hookimpl
    def edged_peer_joined(self, name: str) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        (module(edged_peer_joind=lambda name: None), "edged_peer_joind.*hooks: .*edged_peer_joined"),
        (module(edged_peer_joined=is_async), "edged_peer_joined is async"),
        (module(edged_peer_joined=yields_async), "edged_peer_joined is async"),
        (module(edged_peer_joined=lambda nane: None), "nane"),
        (undecorated(), "edged_peer_joined lacks the @hookimpl decorator"),
        (wrapper(), "edged_admit_role is a wrapper"),
        (Plugin, "is a type; expected a module"),
        (Plugin(), "is a Plugin; expected a module"),
    ],
    ids=["misspelt", "async", "asyncgen", "argument", "undecorated", "wrapper", "class", "object"],
)
def test_a_mistake_in_a_plugin_is_found_when_it_is_loaded(plugin: Any, says: str) -> None:
    made = Host()
    with pytest.raises(PluginError, match=rf"(?s)plugin 'stranger'.*{says}"):
        made.register("stranger", plugin)
    assert not made.loaded
    made.observe("edged_peer_joined", **JOINED)  # nothing of it is left behind
    made.register("stranger", module(edged_peer_joined=lambda name: None))


def test_a_plugin_is_loaded_once() -> None:
    once = module()
    made = host(once)
    for name, plugin in (("stranger", module()), ("again", once)):
        with pytest.raises(PluginError, match="loaded already, as 'stranger'"):
            made.register(name, plugin)


def test_an_unknown_name_is_answered_with_what_is_installed() -> None:
    with pytest.raises(PluginError, match=r"no plugin 'ehco'; installed: .*echo.*static"):
        Host().load(["ehco"], {})


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution with an entry point, whose module needs a library that is not there."""
    (tmp_path / "broken_plugin.py").write_text("import a_library_nobody_has\n")
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[edged]\nbroken = broken_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.installed()["broken"] == "1"
    made = Host()
    made.load(["echo"], {})  # it harms nobody who does not name it
    with pytest.raises(PluginError, match=r"plugin 'broken' cannot be imported: .*a_library_nobody_has"):
        made.load(["broken"], {})
    assert list(made.loaded) == ["echo"]


def test_settings_of_a_plugin_that_is_not_loaded_are_remarked(caplog: pytest.LogCaptureFixture) -> None:
    Host().load([], {"echo": {"colour": "red"}})
    assert [record.plugin for record in caplog.records] == ["echo"]


def test_an_installed_plugin_has_the_version_of_its_distribution() -> None:
    made = Host()
    made.load(["echo"], {})
    assert made.loaded["echo"].version == metadata.version("edged") == plugins.installed()["echo"]


def test_plain_pluggy_still_needs_this_host() -> None:
    """What `edged.plugins` says of pluggy. Where this fails, the host can become smaller."""
    plain = pluggy.PluginManager(hookspecs.PROJECT)
    plain.add_hookspecs(hookspecs)
    plain.register(module(edged_peer_joined=raises, edged_peer_joind=lambda: None))  # misspelt: silence
    plain.register(module("late", edged_job_finished=is_async))
    plain.register(Plugin, "class")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):  # when it is too late
        plain.hook.edged_peer_joined(**JOINED)
    plain.unregister(name="class")
    with pytest.raises(RuntimeError, match="a stranger's mistake"):
        plain.hook.edged_peer_joined(**JOINED)
    [answer] = plain.hook.edged_job_finished(job_id="", state="", measured={})
    assert isinstance(answer, types.CoroutineType)
    answer.close()


# --- each hook, through its first-party plugin where there is one ---------------------------------


def first_party(hook: str, *names: str) -> dict[str, Any]:
    made = Host()
    made.load(names, {})
    return made.registrations(hook)


def test_edged_engines() -> None:
    found = first_party("edged_engines", "echo", "shard")
    assert set(found) == {"echo", "shard"}
    assert all(isinstance(entry, EngineEntry) for entry in found.values())


def test_edged_strategies() -> None:
    found = first_party("edged_strategies", "layer_parallel", "tensor_parallel")
    assert set(found) == {"layers", "tensor", "hybrid"}
    assert all(isinstance(entry, Strategy) for entry in found.values())


def test_edged_aggregators() -> None:
    found = first_party("edged_aggregators", "personal_lora", "zeroth_order")
    assert {"fedavg", "ffa", "flora", "flexlora", "fdlora", "fedkseed"} <= set(found)
    assert all(isinstance(entry, AggregatorEntry) for entry in found.values())


def test_edged_trainings() -> None:
    found = first_party("edged_trainings", "split_learning", "personal_lora", "zeroth_order")
    asked = {"clients": [{"node": "a", "data": "d"}], "server": {"node": "b"}}
    assert found["federated"].check(asked | {"method": "fedkseed"})["method"] == "fedkseed"
    assert set(found) == {"split", "local", "federated"}
    assert all(isinstance(training, Training) for training in found.values())


def test_edged_discoverers() -> None:
    found = first_party("edged_discoverers", "mdns", "static")
    assert set(found) == {"mdns", "static"}
    assert all(isinstance(entry, DiscovererEntry) for entry in found.values())
    assert Announcement("f" * 32, 1, 1).interfaces == ()


def test_edged_sensors() -> None:
    found = first_party("edged_sensors", "monitor")
    assert set(found) == {"memory", "cpu", "battery", "heat", "power", "use", "network"}
    assert found["memory"].read().memory_total


def test_edged_select_plan() -> None:
    def remote(candidates: list[Candidate], request: PlanRequest) -> int | None:
        return next((i for i, c in enumerate(candidates) if c.strategy == "remote"), None)

    assert host(module(edged_select_plan=remote)).decide("edged_select_plan", **DECISION) == 1


def test_edged_admit_role() -> None:
    def only_small(role: Role, model_sha256: str, coordinator: str) -> str | None:
        return "too large" if role.memory_bytes > 100 else None

    made = host(module(edged_admit_role=only_small))
    large = Role(0, "n" * 52, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0, memory_bytes=101)
    assert made.guard("edged_admit_role", **ADMIT) is None
    assert made.guard("edged_admit_role", **(ADMIT | {"role": large})) == "too large"


def test_edged_peer_joined() -> None:
    seen: list[Any] = []
    made = host(module(edged_peer_joined=lambda node_id, name: seen.append((node_id, name))))
    made.observe("edged_peer_joined", **JOINED)
    assert seen == [("n" * 52, "phone")]


def test_edged_peer_left() -> None:
    seen: list[Any] = []
    made = host(module(edged_peer_left=lambda node_id, name, reason: seen.append((node_id, name, reason))))
    made.observe("edged_peer_left", **JOINED, reason="its connection closed")
    assert seen == [("n" * 52, "phone", "its connection closed")]


def test_edged_job_finished() -> None:
    made = Host()
    made.load(["echo"], {})
    before = echo.finished["done"]
    made.observe("edged_job_finished", job_id="1", state="done", measured={})
    assert echo.finished["done"] == before + 1


def test_every_error_of_the_host_is_one_that_ends_startup_with_its_code() -> None:
    assert issubclass(PluginError, EdgedError)
    assert PluginError.exit_code == 3


def test_a_strategy_with_a_bug_refuses_its_own_plans_and_no_others() -> None:
    model = ModelDescription(
        "llama", 4000, 2, 8, 4, 2, 2, 16, 32, 512, "Q4_K", 2, 4, 8, (1000, 1000), 256, 400
    )

    def buggy(*arguments: object) -> list[Candidate]:
        raise ZeroDivisionError

    node = NodeView("a", "A")
    strategies = {s.name: s for s in (guarded(Strategy("buggy", buggy)), CORE_STRATEGIES[0])}
    found = consider(strategies, model, [node], PlanRequest())
    assert [(c.strategy, c.broken_rule) for c in found] == [("buggy", "strategy"), ("local", None)]
    assert "'buggy' failed: ZeroDivisionError" in str(found[0].refused_because)
    with pytest.raises(PolicyViolation, match="'buggy' failed"):
        consider(strategies, model, [node], PlanRequest("buggy"))
