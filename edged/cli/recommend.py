"""`edged recommend`: which model this device should run, in which weights, and how to tune it."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from .. import advising, config
from ..config import Profile
from ..device import Device
from ..errors import ConfigError, EngineError
from ..identity import Home, default_home
from ..models import ModelStore
from ..plugins import Host
from ..supervisor import Supervisor
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import table


def recommend(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="M", help="A stored model; else the largest that should run."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Model size, quantisation and tuning method for this device, with reasons. Needs no daemon."""
    node = Home(home) if home is not None else default_home()
    profile = config.read(node.profile) if node.profile.exists() else Profile()
    host = Host()
    host.load(profile.plugins, profile.plugin)
    device = Device(
        profile,
        node.cache,
        host.registrations("edged_sensors"),
        host.registrations("edged_engines"),
        Supervisor(),
    )
    room = device.memory_budget(0)
    if room is None:
        raise EngineError(
            "expected to know this device's memory; no sensor says it", remedy='add "monitor" to `plugins`'
        )
    parameters = ModelStore(node).find(model).parameters if model is not None else None
    speeds: dict[str, float] = {}
    for speed in device.speeds():
        speeds[speed.weight_type] = max(speed.decode_bytes_s, speeds.get(speed.weight_type, 0.0))
    if parameters is not None and parameters <= 0:
        raise ConfigError(f"expected a model with parameters; {model} has {parameters}")
    found = advising.advise(room, speeds, parameters, _like(device))
    show({"recommendations": advising.rows(found)}, as_json, _show)


def _like(device: Device) -> advising.Hardware | None:
    """The known device that this one is likest to; None where a sensor is missing."""
    state = device.read()
    if not state.memory_total or not state.cpu_count:
        return None
    return advising.nearest(advising.KNOWN, platform.machine(), state.cpu_count, state.memory_total)


def _show(document: Document) -> None:
    keys = ("what", "choice", "reason", "source")
    table(keys, [[row[key] for key in keys] for row in document["recommendations"]])
