"""What this device is and can do now: sensors of plugins, and the cached micro-benchmark of engines."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from . import identity as ids
from . import limits, pricing
from .config import Profile
from .errors import EdgedError, EngineError
from .metering import Meter
from .saving import COOLER_CELSIUS, Levels, Saving
from .supervisor import Supervisor
from .sustaining import Sustained
from .types import DeviceState, EngineEntry, EngineSpeed, NodeView, SensorEntry

log = logging.getLogger(__name__)
MEASURE_S = 120.0  # the benchmark takes 3 s; a busy Raspberry Pi and a cold disk take longer
CHECK_S = 300.0
ROOT = Path("/")


class Device:
    """Readings when asked; speeds measured once per processor and library version."""

    def __init__(
        self,
        profile: Profile,
        cache: Path,
        sensors: Mapping[str, SensorEntry],
        engines: Mapping[str, EngineEntry],
        supervisor: Supervisor,
        root: Path = ROOT,
    ) -> None:
        """`root`: below which the kernel's files are."""
        self._root = root
        self._profile, self._cache = profile, cache
        self._sensors, self._engines, self._supervisor = sensors, engines, supervisor
        self.promised: Callable[[], int] = int  # bytes planned for roles here that nothing holds yet
        levels = Levels(
            profile.energy.reserve,
            profile.energy.resume,
            profile.device.thermal_limit_celsius,
            profile.energy.yield_to_owner,
        )
        self._saving = Saving(levels)
        self.meter = Meter(profile.device.idle_watts)
        self._sustained: dict[str, Sustained] = {}  # by weight type; of this run alone, as heat is
        self.worked_at = time.monotonic()  # when a role last computed, as far as was looked
        self._unmeasured: set[str] = set()  # engines whose benchmark did not run, since the start
        self._lock = asyncio.Lock()  # two benchmarks at once would measure each other

    def read(self) -> DeviceState:
        """One reading; a sensor that fails leaves its fields None."""
        merged: dict[str, Any] = {}
        for name, sensor in self._sensors.items():
            try:
                state = sensor.read()
            except Exception:  # a plugin's sensor: a missing sensor is null, never a crash
                log.exception("sensor failed", extra={"sensor": name})
                continue
            for item in dataclasses.fields(state):
                value = getattr(state, item.name)
                if value is not None:
                    merged.setdefault(item.name, value)
        merged.setdefault("cpu_count", os.cpu_count())
        for name, most in zip(("memory_total", "memory_free"), limits.memory(self._root) or (), strict=False):
            if name in merged:
                merged[name] = min(merged[name], most)
        return DeviceState(**merged)

    def memory_budget(self, taken: int) -> int | None:
        """Bytes a new worker may take when workers are planned with `taken`; None where unknown.

        What is free now is not all to be had: a cache is touched as it fills, a role on its way in later.
        """
        budget, free = self._profile.budget, self.read().memory_free
        if free is None:
            return None if budget.memory is None else max(0, budget.memory - taken)
        allowed = int(max(0, free - self.promised()) * budget.memory_share)
        return allowed if budget.memory is None else max(0, min(allowed, budget.memory - taken))

    def resident(self, pid: int) -> int:
        """Bytes that a worker holds in memory already, as `memory_free` counts them."""
        return limits.resident(self._root, pid)

    @property
    def cache_folder(self) -> Path:
        """Where engines keep what they can make again."""
        return self._cache

    @property
    def may_spin(self) -> bool:
        """May workers wait busily? Not while the device lives on its battery."""
        battery = self.read().battery
        return battery is None or battery.plugged is not False

    @property
    def saving(self) -> str:
        """Why this node takes no new work now, as last watched; ""."""
        return self._saving.because

    def watch(self) -> str:
        """Hear the sensors once more about that; called every few seconds."""
        state = self.read()
        self.meter.quiet(state.power_watts, state.power_source)
        self._rest(state)
        return self._saving.update(state)

    @property
    def watts(self) -> tuple[float, float] | None:
        """Idle and at work, where the profile says both."""
        return self._profile.device.watts

    @property
    def threads(self) -> int:
        """Per worker: the profile's, else the cores and the time that this process is given."""
        return self._profile.budget.threads or limits.threads(self._root, os.sched_getaffinity(0))

    @property
    def memory_pressure(self) -> float | None:
        """Percent of the last ten seconds in which something waited for memory; None where unknown."""
        return limits.memory_pressure(self._root)

    def speeds(self) -> tuple[EngineSpeed, ...]:
        """What was measured before on this processor with these libraries, empty when never; and what of it
        the device sustains."""
        return tuple(
            dataclasses.replace(speed, sustained=self.sustained(speed.weight_type)) for speed in self._peaks()
        )

    def speed_of(self, weight_type: str) -> EngineSpeed | None:
        """The speed that plans count with for weights of a type, mixed ones included."""
        return pricing.speed_of(NodeView("", "", speeds=self.speeds()), weight_type)

    def sustained(self, weight_type: str) -> float:
        """Of the benchmark, what steady work got lately; 1 where nothing else was seen."""
        exact = self._sustained.get(weight_type)
        main = [kept for known, kept in self._sustained.items() if weight_type.startswith(known)]
        return next((kept.kept for kept in (exact, *main) if kept is not None), 1.0)

    def hear_rate(
        self, weight_type: str, now: float, busy_s: float, measured_s: float, expected_s: float
    ) -> None:
        """Tokens of steady work, as `Sustained.hear`."""
        kept = self._sustained.setdefault(weight_type, Sustained())
        if kept.hear(now, busy_s, measured_s, expected_s):
            ratio = round(kept.kept, 3)
            log.warning("sustained rate moved", extra={"weight_type": weight_type, "ratio": ratio})

    def _rest(self, state: DeviceState) -> None:
        limit, celsius = self._profile.device.thermal_limit_celsius, state.temperature_celsius
        is_warm = limit is not None and celsius is not None and celsius >= limit - COOLER_CELSIUS
        for weight_type, kept in self._sustained.items():
            if kept.rest(time.monotonic() - self.worked_at, is_warm or bool(state.is_throttled)):
                log.info("rested: as fast as its benchmark", extra={"weight_type": weight_type})

    def _peaks(self) -> tuple[EngineSpeed, ...]:
        found: list[EngineSpeed] = []
        for engine in self._engines.values():
            try:
                stored = json.loads(self._file("speed", engine).read_text())
                found += msgspec.convert(stored, list[EngineSpeed])
            except (OSError, ValueError, msgspec.ValidationError):
                continue
        return tuple(found)

    async def measure(self) -> tuple[EngineSpeed, ...]:
        """Run the benchmark of every engine now, each in a process of its own."""
        async with self._lock:
            for engine in self._engines.values():
                params = {"function": engine.measure, "settings": self._settings(engine)}
                try:
                    result = await self._supervisor.run_task("edged.worker:call", params, timeout_s=MEASURE_S)
                except EngineError as error:  # its library is not installed, say; the others are
                    log.warning("engine not measured", extra={"engine": engine.name, "reason": str(error)})
                    self._unmeasured.add(engine.name)
                    continue
                speeds = msgspec.convert(result["answer"], list[EngineSpeed])
                self._write("speed", engine, msgspec.to_builtins(speeds))
            self._sustained.clear()  # they were of the benchmark before
        return self.speeds()

    async def ensure_measured(self) -> tuple[EngineSpeed, ...]:
        """Speeds as they were measured, now or before; an engine may have none of its own."""
        wanted = [engine for engine in self._engines.values() if engine.name not in self._unmeasured]
        is_measured = all(self._file("speed", engine).exists() for engine in wanted)
        return self.speeds() if is_measured else await self.measure()

    async def check(self, engine: EngineEntry) -> None:
        """Once per processor and library version: does the engine agree with its reference here?"""
        async with self._lock:
            if self._file("check", engine).exists():
                return
            params = {"function": engine.check, "settings": self._settings(engine)}
            result = await self._supervisor.run_task("edged.worker:call", params, timeout_s=CHECK_S)
            if not isinstance(result["answer"], dict):
                raise EngineError(f"expected the self-check of {engine.name} to answer with a map")
            self._write("check", engine, result["answer"])
            log.info("engine checked", extra={"engine": engine.name, **result["answer"]})

    def corrections(self) -> dict[tuple[str, ...], float]:
        """As kept; empty where there are none, or they cannot be read."""
        try:
            rows = msgspec.convert(
                json.loads(self._corrections_file.read_text()), list[tuple[list[str], float]]
            )
        except (OSError, ValueError, msgspec.ValidationError):
            return {}
        return {tuple(key): factor for key, factor in rows if 0 < factor < float("inf")}

    def keep_corrections(self, factors: Mapping[tuple[str, ...], float]) -> None:
        rows = [[list(key), factor] for key, factor in factors.items()]
        try:
            ids.write_atomically(self._corrections_file, json.dumps(rows).encode())
        except OSError as error:
            log.warning("corrections not kept", extra={"reason": str(error)})

    @property
    def _corrections_file(self) -> Path:
        return self._cache / "corrections.json"

    def _settings(self, engine: EngineEntry) -> dict[str, Any]:
        return {"threads": self.threads, **engine.settings}

    def _write(self, what: str, engine: EngineEntry, value: Any) -> None:
        try:
            ids.write_atomically(self._file(what, engine), json.dumps(value).encode())
        except OSError as error:
            raise EdgedError(f"expected to write below {self._cache}; {error}") from error

    def _file(self, what: str, engine: EngineEntry) -> Path:
        """Named by everything the figure depends on."""
        key = f"{processor()}|{self.threads}|{_library_versions()}|{sorted(engine.settings.items())}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self._cache / f"{what}-{engine.name}-{digest}.json"


def processor() -> str:
    """The processor's name and features, as far as Linux says."""
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer", "Model")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return os.uname().machine + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _library_versions() -> str:
    found = []
    for name in ("llama-cpp-python", "edged"):
        try:
            found.append(f"{name}={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name}=none")
    return ",".join(found)
