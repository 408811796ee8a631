"""What is here before there is a profile: the class of the device, and the plugins that load.

Sources: /proc/device-tree/model is the board's own name (Devicetree specification, "model");
/etc/nv_tegra_release is written by JetPack; Termux sets PREFIX and TERMUX_VERSION.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import DEFAULT_CLASS, DEFAULT_PLUGINS
from ..errors import PluginError
from ..hookspecs import KINDS
from ..plugins import GROUP, Host

DISTRIBUTION = "edged"
TERMUX_PREFIX = "/data/data/com.termux/"


def device_class(root: Path, environ: Mapping[str, str]) -> str:
    """The name of the shipped profile for this device; the default for what is not recognised."""
    if "TERMUX_VERSION" in environ or environ.get("PREFIX", "").startswith(TERMUX_PREFIX):
        return "phone-termux"
    model = _read(root / "proc/device-tree/model").lower()
    if "jetson" in model or (root / "etc/nv_tegra_release").exists():
        return "jetson-orin-nano"
    return "raspberrypi-5" if "raspberry pi 5" in model else DEFAULT_CLASS


def first_party_plugins() -> tuple[list[str], dict[str, PluginError]]:
    """Installed plugins of edged itself that load, in a steady order, and why the others do not."""
    entries = metadata.entry_points(group=GROUP)
    names = {entry.name for entry in entries if entry.dist and entry.dist.name == DISTRIBUTION}
    order = [name for name in DEFAULT_PLUGINS if name in names]
    order += sorted(names.difference(order))
    troubles = {name: trouble for name in order if (trouble := plugin_trouble(name, {}))}
    return [name for name in order if name not in troubles], troubles


def plugin_trouble(name: str, settings: Mapping[str, Any]) -> PluginError | None:
    """Why a plugin does not load or register with these settings; None when it does."""
    host = Host()
    try:
        host.load([name], {name: settings})
        for hook, kind in KINDS.items():
            if kind == "register":
                host.registrations(hook)
    except PluginError as error:
        return error
    return None


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[:256].rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""
