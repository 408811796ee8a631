"""`edged simulate`: the policies that run for real, over simulated devices and time."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config, simulation
from ..errors import ConfigError
from ..planning import CORE_POLICIES
from ..plugins import Host
from ..scenario import Scenario, check
from ..simulation import Result
from ..types import Policy
from .detecting import first_party_plugins
from .options import HomeOption, JsonOption
from .output import show
from .tables import facts

PLOTS = (".png", ".svg")
UNITS = ("battery, %", "jobs", "devices, %")
DOING = {
    "busy": "busy",  # curves, and their legends
    "saving": "down (saving power)",
    "failed": "failed",
    "in use": "in use by its owner",
}


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
    check(read)
    chosen = _policy(policy or read.policy)
    bearable = _fitted(chosen, read)
    result = simulation.run(read, chosen, seed, bearable)
    if plot is not None:
        _draw(plot, read, result)
    show(_document(read, result, seed), as_json, facts)


def _file(name: str) -> Path:
    """One that edged brings, or any other file."""
    folder = Path(str(resources.files("edged_profiles"))) / "scenarios"
    shipped, other = folder / f"{name}.toml", Path(name)
    if shipped.is_file():
        return shipped
    if not other.is_file():
        brought = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ConfigError(
            f"no scenario {name!r}; edged brings: {brought}", remedy="name one of these, or a TOML file"
        )
    return other


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
        "queue": scenario.queue,
        "jobs_done": result.jobs_done,
        "dropped": result.dropped,
        "waiting": result.waiting,
        "moved": result.moved,
        "waiting_mean_s": _seconds(simulation.mean(result.waits), scenario),
        "waiting_p95_s": _seconds(simulation.percentile(result.waits, 0.95), scenario),
        "turnaround_mean_s": _seconds(simulation.mean(result.turnarounds), scenario),
        "downtime": result.downtime,
        "mean_battery": result.mean_battery,
        "joules": result.joules,
        "first_dead_s": min(deaths, default=None),
    }


def _seconds(slots: float | None, scenario: Scenario) -> float | None:
    return None if slots is None else slots * scenario.slot_s


def _draw(path: Path, scenario: Scenario, result: Result) -> None:
    """Batteries, the queue, and what devices do: three pictures over the hours of the last run."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(
            f"expected matplotlib, which draws plots; {error}", remedy="pip install 'edged[plan]'"
        ) from error
    curves, hours = result.curves, result.curves["hours"]
    figure, several = pyplot.subplots(3, 1, sharex=True, figsize=(11, 8.6), layout="constrained")
    percent = 100 / sum(device.count for device in scenario.devices)
    for axes, unit, lines in zip(several, UNITS, _lines(scenario, curves), strict=True):
        scale = {"battery, %": 100, "devices, %": percent}.get(unit, 1)
        drawstyle = "default" if unit.startswith("battery") else "steps-post"
        for label, name in lines.items():
            values = [scale * value for value in curves[name]]
            axes.plot(hours, values, label=label, linewidth=1.2, drawstyle=drawstyle)
        top = 100 if unit.endswith("%") else max([1, *(max(curves[name]) for name in lines.values())])
        axes.set(ylabel=unit, ylim=(-0.02 * top, 1.04 * top))
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
        else:
            axes.set_title("every device is on mains", fontsize="medium")
    several[-1].set(xlabel="time, hours", xlim=(0, scenario.slots * scenario.slot_s / 3600))
    of = f"of {scenario.runs} runs, the last drawn" if scenario.runs > 1 else "of the time"
    figure.suptitle(
        f"{scenario.name}: policy {result.policy}, queue {scenario.queue}, down {result.downtime:.1%} {of}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(scenario: Scenario, curves: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """For each picture the curves by their legends."""
    batteries = {name.removeprefix("battery "): name for name in curves if name.startswith("battery ")}
    hours = curves["hours"]
    apart = f"{60 * (hours[1] - hours[0]):.3g} min" if len(hours) > 1 else "all the time"
    jobs = {} if scenario.queue == "drop" else {"waiting": "waiting"}
    doing = {label: name for name, label in DOING.items() if name in curves}
    return [batteries, jobs | {f"dropped in {apart}": "dropped"}, doing]
