"""Reads this device's state: memory, processor, battery, temperature, power.

Memory comes from psutil, everything else from sysfs and procfs (`_sensors.py`). A sensor that is not
there, or says nonsense, is None.

Power is, first found: a Jetson's input rail; what the batteries give while the device runs on them;
the processor packages' energy counters (RAPL), which since Linux 5.10 only root may read unless a
udev rule gives them to edged's group, and which do not see the screen, the disk or the radio.

It does not know Android's batteries: Termux answers `termux-battery-status` in up to a second and
may hang, which needs a process of its own; that is left to a later change. It does not know a
Raspberry Pi 5's rails (`vcgencmd pmic_read_adc`), a JetPack 4's (iio), NVIDIA cards (NVML), or any
sensor of macOS. It does not know the limits of a container.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from edged import ConfigError, DeviceState, SensorEntry, hookimpl

from . import _sensors


@hookimpl
def edged_sensors(settings: Mapping[str, Any]) -> Sequence[SensorEntry]:
    """One entry a sensor, so that one that fails leaves the others alone."""
    if settings:
        raise ConfigError(f"no setting plugin.monitor.{min(settings)}; it has none", remedy="remove the key")
    return Monitor(Path("/")).entries()


class Monitor:
    """The sensors of the device whose files are below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rapl = _sensors.Rapl(root)

    def entries(self) -> list[SensorEntry]:
        return [
            SensorEntry("memory", self.memory),
            SensorEntry("cpu", self.cpu),
            SensorEntry("battery", self.battery),
            SensorEntry("temperature", self.temperature),
            SensorEntry("power", self.power),
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
            cpu_count=self._cores, cpu_name=self._cpu_name, load_1m=_sensors.load_1m(self._root)
        )

    def battery(self) -> DeviceState:
        return DeviceState(battery=_sensors.battery(self._root))

    def temperature(self) -> DeviceState:
        return DeviceState(temperature_celsius=_sensors.temperature(self._root))

    def power(self) -> DeviceState:
        packages = self._rapl.watts()  # always read, so that the next call has something to compare with
        for watts in (_sensors.jetson_watts(self._root), _sensors.battery_watts(self._root)):
            if watts is not None:
                return DeviceState(power_watts=watts)
        return DeviceState(power_watts=packages)

    @cached_property
    def _cores(self) -> int | None:
        """Physical cores that this process may use; a second thread of a core adds nothing to ggml."""
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        return min(cores, allowed or cores) if cores else allowed

    @cached_property
    def _cpu_name(self) -> str | None:
        return _sensors.cpu_name(self._root)
