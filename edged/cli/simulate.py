"""`edged simulate`: the policies that run for real, over simulated devices and time."""

from __future__ import annotations

import dataclasses
import importlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config, simulation
from ..errors import ConfigError
from ..planning import CORE_POLICIES
from ..plugins import Host
from ..simulation import Result, Scenario
from ..types import Policy
from .detecting import first_party_plugins
from .options import HomeOption, JsonOption
from .output import show
from .tables import facts

PLOTS = (".png", ".svg")


def simulate(
    scenario: Annotated[
        str, typer.Argument(metavar="SCENARIO", help="A TOML file, or one that edged brings.")
    ],
    policy: Annotated[str, typer.Option(metavar="P", help="Instead of the scenario's own.")] = "",
    seed: Annotated[int, typer.Option(metavar="S", help="Same seed, same result.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it there, as .png or .svg.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a scheduling policy over simulated devices. Needs no daemon."""
    if plot is not None and plot.suffix not in PLOTS:
        raise ConfigError(
            f"expected a plot file that ends in {' or '.join(PLOTS)}; {plot.name!r} came",
            remedy="name it otherwise",
        )
    read = config.read_table(_file(scenario), Scenario)
    simulation.check(read)
    chosen = _policy(policy or read.policy)
    bearable = _fitted(chosen, read)
    result = simulation.run(read, chosen, seed, bearable)
    if plot is not None:
        _draw(plot, read, result)
    show(_document(read, result, seed), as_json, facts)


def _file(name: str) -> Path:
    shipped = Path(str(resources.files("edged_profiles"))) / "scenarios" / f"{name}.toml"
    return shipped if shipped.is_file() else Path(name)


def _policy(name: str) -> Policy:
    host = Host()
    host.load(first_party_plugins()[0], {})
    known = {policy.name: policy for policy in CORE_POLICIES} | host.registrations("edged_policies")
    if name not in known:
        raise ConfigError(
            f"no policy {name!r}; loaded: {', '.join(sorted(known))}", remedy="name one of these"
        )
    found: Policy = known[name]
    if found.refused_because:
        raise ConfigError(
            f"policy {name!r} cannot be simulated: {found.refused_because}, nor does a scenario",
            remedy="name another policy",
        )
    return found


def _fitted(policy: Policy, scenario: Scenario) -> dict[str, float]:
    """What each kind of battery bears; the policy's own numerical part, in this short-lived process."""
    if not policy.fit:
        return {}
    module, _, attribute = policy.fit.partition(":")
    try:
        fit = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"policy {policy.name} cannot be fitted here: {error}",
            remedy="install edged with the extra that brings it: pip install 'edged[plan]'",
        ) from error
    found: dict[str, float] = fit([dataclasses.asdict(device) for device in scenario.devices])
    return found


def _document(scenario: Scenario, result: Result, seed: int) -> dict[str, Any]:
    deaths = [slot * scenario.slot_s for slot in result.first_dead_slots if slot is not None]
    return {
        "scenario": scenario.name,
        "policy": result.policy,
        "seed": seed,
        "runs": scenario.runs,
        "simulated_s": scenario.slots * scenario.slot_s,
        "jobs_done": result.jobs_done,
        "dropped": result.dropped,
        "moved": result.moved,
        "downtime": result.downtime,
        "mean_battery": result.mean_battery,
        "joules": result.joules,
        "first_dead_s": min(deaths, default=None),
    }


def _draw(path: Path, scenario: Scenario, result: Result) -> None:
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(
            f"expected matplotlib, which draws plots; {error}", remedy="pip install 'edged[plan]'"
        ) from error
    curves = dict(result.curves)
    hours = curves.pop("hours")
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6))
    for name in [name for name in curves if name.startswith("battery ")]:
        above.plot(hours, [100 * level for level in curves.pop(name)], label=name.removeprefix("battery "))
    for name, values in curves.items():
        below.plot(hours, values, label=name, drawstyle="steps-post")
    above.set(ylabel="battery, %", title=f"{scenario.name}: {result.policy}")
    below.set(ylabel="devices", xlabel="hours")
    for axes in (above, below):
        if axes.lines:
            axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
