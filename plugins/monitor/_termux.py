"""A phone's battery as Termux tells it: a command that takes up to a second, and may hang.

Source: the documentation of termux-battery-status (Termux:API). The command runs beside the daemon; a
reading is what the last one that ended said.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO

from edged import Battery, DeviceState

COMMAND = ("termux-battery-status",)
EVERY_S, LIMIT_S = 30.0, 5.0
STALE_S = 180.0  # what is older is not known any more
TEXT_BYTES_MAX = 65536
MICROAMPERES_LEAST = 10_000  # a phone that runs draws more: smaller numbers are milliamperes, by vendor
_CHARGING = {"CHARGING": True, "DISCHARGING": False, "FULL": False, "NOT_CHARGING": False}


def parse(said: str) -> DeviceState:
    """The state in the command's JSON; unknown fields and nonsense are None, never an error."""
    try:
        fields = json.loads(said)
    except ValueError:
        return DeviceState()
    if not isinstance(fields, dict) or fields.get("present") is False:
        return DeviceState()
    percent = _number(fields.get("percentage"), 0, 100)
    charging = _CHARGING.get(str(fields.get("status")))
    power_source = fields.get("plugged")
    plugged = None if not isinstance(power_source, str) else power_source != "UNPLUGGED"
    volts = _volts(fields.get("voltage"))
    amperes = _amperes(fields.get("current"))
    ampere_hours = _number(fields.get("charge_counter"), 1, 1e8)
    joules = ampere_hours * 1e-6 * volts * 3600 if ampere_hours and volts else None
    full = joules / percent * 100 if joules and percent else None
    watts = volts * amperes if volts and amperes and charging is False and not plugged else None
    battery = (
        None if percent is None and charging is None else Battery(percent, charging, plugged, joules, full)
    )
    celsius = _number(fields.get("temperature"), 1, 150)
    return DeviceState(battery=battery, power_watts=watts, battery_celsius=celsius)


def _volts(value: object) -> float | None:
    """Millivolts, and on some phones volts."""
    number = _number(value, 1, 20_000)
    return None if number is None else number / 1e3 if number > 100 else number


def _amperes(value: object) -> float | None:
    number = _number(value, -1e8, 1e8)
    if number is None:
        return None
    return abs(number) / (1e6 if abs(number) >= MICROAMPERES_LEAST else 1e3)


def _number(value: object, least: float, most: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if least <= value <= most else None


class Termux:
    """The command, run now and then; `read` answers at once."""

    def __init__(self, command: Sequence[str] = COMMAND, clock: Callable[[], float] = time.monotonic) -> None:
        self._command, self._clock = command, clock
        self._running: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._began = -EVERY_S
        self._state, self._state_at = DeviceState(), -STALE_S
        self._is_absent = False

    def read(self) -> DeviceState:
        now = self._clock()
        if self._running is not None:
            self._collect(now)
        elif not self._is_absent and now - self._began >= EVERY_S:
            self._begin(now)
        return self._state if now - self._state_at < STALE_S else DeviceState()

    def _begin(self, now: float) -> None:
        self._began = now
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the command has ended
        try:
            self._running = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.DEVNULL,
            )
        except OSError:  # not a phone, or without Termux:API: it will not come by itself
            self._is_absent = True
            self._output.close()

    def _collect(self, now: float) -> None:
        assert self._running is not None
        assert self._output is not None
        code = self._running.poll()
        if code is None and now - self._began < LIMIT_S:
            return
        if code is None:
            self._running.kill()
        self._running.wait()
        if code == 0:
            self._output.seek(0)
            said = self._output.read(TEXT_BYTES_MAX).decode("utf-8", "replace")
            self._state, self._state_at = parse(said), now
        self._output.close()
        self._running = self._output = None
