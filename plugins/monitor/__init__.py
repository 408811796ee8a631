"""Reads this device's state: memory, processor, battery, heat, power, use, network.

Memory comes from psutil, everything else from sysfs and procfs, a function over a root directory each. A
sensor that is not there, or says nonsense, is None.

Power is, first found: a Jetson's input rail; what the batteries give while the device runs on them; the
processor packages' energy counters (RAPL), which since Linux 5.10 only root may read unless a udev rule gives
them to edged's group, and which do not see the screen, the disk or the radio. Cards that NVIDIA's library
knows come on top of the counters, where the package nvidia-ml-py is installed.

It does not know a Raspberry Pi 5's rails (`vcgencmd pmic_read_adc`), or any sensor of macOS.
It does not know the limits of a container, nor how long the system waits for memory: the daemon does.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from edged import ConfigError, DeviceState, SensorEntry, hookimpl

from . import _battery, _heat, _network, _power, _processor, _use
from ._termux import Termux


@hookimpl
def edged_sensors(settings: Mapping[str, Any]) -> Sequence[SensorEntry]:
    """One entry a sensor, so that one that fails leaves the others alone."""
    if settings:
        raise ConfigError(f"no setting plugin.monitor.{min(settings)}; it has none", remedy="remove the key")
    return Monitor(Path("/"), Termux() if "TERMUX_VERSION" in os.environ else None, _nvml()).entries()


class Monitor:
    """The sensors of the device whose files are below `root`. `termux`: None where it is no phone."""

    def __init__(self, root: Path, termux: Termux | None = None, nvml: Any = None) -> None:
        self._root, self._termux = root, termux
        self._rapl, self._nvml = _power.Rapl(root), _power.Nvml(nvml)
        self._throttling = _heat.Throttling(root)

    def entries(self) -> list[SensorEntry]:
        phone = [SensorEntry("termux", self._termux.read)] if self._termux else []
        return [
            SensorEntry("memory", self.memory),
            SensorEntry("cpu", self.cpu),
            SensorEntry("battery", self.battery),
            *phone,
            SensorEntry("heat", self.heat),
            SensorEntry("power", self.power),
            SensorEntry("use", self.use),
            SensorEntry("network", self.network),
        ]

    def memory(self) -> DeviceState:
        """`memory_free` is what can be had without swapping."""
        try:
            memory = psutil.virtual_memory()
        except (OSError, ValueError, RuntimeError):  # a sandbox without /proc/meminfo
            return DeviceState()
        return DeviceState(memory_total=memory.total, memory_free=memory.available)

    def cpu(self) -> DeviceState:
        return DeviceState(
            cpu_count=self._cores, cpu_name=self._cpu_name, load_1m=_processor.load_1m(self._root)
        )

    def battery(self) -> DeviceState:
        return DeviceState(battery=_battery.battery(self._root))

    def heat(self) -> DeviceState:
        return DeviceState(
            temperature_celsius=_heat.temperature(self._root), is_throttled=self._throttling.read()
        )

    def power(self) -> DeviceState:
        packages = self._rapl.watts()  # always read, so that the next call has something to compare with
        for source, watts in (
            ("ina3221", _power.jetson_watts(self._root)),
            ("battery", _battery.battery_watts(self._root)),
        ):
            if watts is not None:
                return DeviceState(power_watts=watts, power_source=source)
        cards = self._nvml.watts()
        known = [watts for watts in (packages, cards) if watts is not None]
        names = [name for name, watts in (("rapl", packages), ("nvml", cards)) if watts is not None]
        return DeviceState(power_watts=sum(known) if known else None, power_source="+".join(names) or None)

    def use(self) -> DeviceState:
        return DeviceState(in_use=_use.in_use(self._root, time.time()))

    def network(self) -> DeviceState:
        return DeviceState(
            is_wireless=_network.is_wireless(self._root), is_metered=_network.is_metered(self._root)
        )

    @cached_property
    def _cores(self) -> int | None:
        """Physical cores that this process may use; a second thread of a core adds nothing to ggml."""
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        return min(cores, allowed or cores) if cores else allowed

    @cached_property
    def _cpu_name(self) -> str | None:
        return _processor.cpu_name(self._root)


def _nvml() -> Any:
    """NVIDIA's bindings, where they are installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None
