"""The device: readings merged from sensors, budgets by table, benchmarks run once and kept."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edged_plugins import echo

from edged import device
from edged.config import Budget, Profile, Size
from edged.device import Device
from edged.errors import EdgedError, EngineError
from edged.supervisor import Supervisor
from edged.types import Battery, DeviceState, EngineEntry, EngineSpeed, SensorEntry

GIB = 1 << 30
ECHO = echo.edged_engines({})[0]


def make(
    cache: Path,
    *states: DeviceState | Exception,
    budget: Budget | None = None,
    engines: dict[str, EngineEntry] | None = None,
    supervisor: Supervisor | None = None,
) -> Device:
    def reader(state: DeviceState | Exception) -> Callable[[], DeviceState]:
        def read() -> DeviceState:
            if isinstance(state, Exception):
                raise state
            return state

        return read

    sensors = {str(number): SensorEntry(str(number), reader(state)) for number, state in enumerate(states)}
    profile = Profile(budget=budget or Budget())
    return Device(profile, cache, sensors, engines or {}, supervisor or Supervisor())


def run(cache: Path, test: Callable[[Device], Awaitable[None]], engine: EngineEntry = ECHO) -> None:
    async def bounded() -> None:
        supervisor = Supervisor()
        try:
            await test(make(cache, engines={engine.name: engine}, supervisor=supervisor))
        finally:
            await supervisor.close()

    asyncio.run(bounded())


def files(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern))


# --- readings -------------------------------------------------------------------------------------


def test_sensors_fill_each_other_s_gaps_and_the_first_word_counts(tmp_path: Path) -> None:
    read = make(
        tmp_path,
        DeviceState(memory_free=1, cpu_count=2),
        DeviceState(memory_free=9, temperature_celsius=50.0),
        DeviceState(battery=Battery(percent=80.0)),
    ).read()
    assert read == DeviceState(
        memory_free=1, cpu_count=2, temperature_celsius=50.0, battery=Battery(percent=80.0)
    )


def test_a_sensor_that_fails_takes_nothing_but_its_own_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = make(tmp_path, OSError("gone"), DeviceState(memory_free=7)).read()
    assert (read.memory_free, read.memory_total) == (7, None)
    assert [record.sensor for record in caplog.records] == ["0"]


def test_a_device_without_sensors_has_its_cores_and_no_guesses(tmp_path: Path) -> None:
    assert make(tmp_path).read() == DeviceState(cpu_count=os.cpu_count())


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "share", "most", "taken", "budget"),
    [
        (10 * GIB, 0.5, None, 0, 5 * GIB),
        (10 * GIB, 0.5, None, 3 * GIB, 5 * GIB),  # what workers hold is not free any more
        (10 * GIB, 0.5, 8 * GIB, 0, 5 * GIB),
        (10 * GIB, 0.5, 4 * GIB, 0, 4 * GIB),
        (10 * GIB, 0.5, 4 * GIB, 3 * GIB, 1 * GIB),
        (10 * GIB, 0.5, 4 * GIB, 5 * GIB, 0),
        (0, 0.5, None, 0, 0),
        (None, 0.5, None, 0, None),  # unknown
        (None, 0.5, 4 * GIB, 1 * GIB, 3 * GIB),
        (None, 0.5, 4 * GIB, 5 * GIB, 0),
    ],
)
def test_a_new_worker_gets_what_is_free_and_what_is_left_of_the_profile(
    tmp_path: Path, free: int | None, share: float, most: int | None, taken: int, budget: int | None
) -> None:
    allowed = Budget(memory_share=share, memory=None if most is None else Size(most))
    states = [] if free is None else [DeviceState(memory_free=free)]
    assert make(tmp_path, *states, budget=allowed).memory_budget(taken) == budget


def test_what_is_promised_is_not_free(tmp_path: Path) -> None:
    found = make(tmp_path, DeviceState(memory_free=10 * GIB), budget=Budget(memory_share=0.5))
    found.promised = lambda: 4 * GIB
    assert found.memory_budget(0) == 3 * GIB
    found.promised = lambda: 11 * GIB
    assert found.memory_budget(0) == 0


def test_threads_are_the_profile_s_or_every_core(tmp_path: Path) -> None:
    assert make(tmp_path, budget=Budget(threads=3)).threads == 3
    assert 1 <= make(tmp_path).threads <= (os.cpu_count() or 1)


# --- benchmarks, in real processes ----------------------------------------------------------------


def test_a_device_is_measured_once_and_remembers_it(tmp_path: Path) -> None:
    async def test(measured: Device) -> None:
        assert measured.speeds() == ()
        [speed] = await measured.ensure_measured()
        assert (speed.name, speed.weight_type) == ("echo", "u8")
        assert speed.decode_bytes_s > 0
        [file] = files(tmp_path, "speed-echo-*.json")
        kept = [EngineSpeed("echo", "u8", 1.0, 2.0)]
        file.write_text(json.dumps(msgspec.to_builtins(kept)))  # nobody measures again, or it would change
        assert list(await measured.ensure_measured()) == kept
        assert list(make(tmp_path, engines={"echo": ECHO}).speeds()) == kept

    run(tmp_path, test)


@pytest.mark.parametrize("changed", ["settings", "threads", "library"])
def test_what_was_measured_under_other_conditions_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    def speeds(engine: EngineEntry = ECHO, budget: Budget | None = None) -> Any:
        return make(tmp_path, engines={"echo": engine}, budget=budget).speeds()

    before = make(tmp_path, engines={"echo": ECHO})
    before._write("speed", ECHO, msgspec.to_builtins([EngineSpeed("echo", "u8", 1.0, 2.0)]))
    assert speeds()
    if changed == "settings":
        assert not speeds(echo.edged_engines({"colour": "red"})[0])
    elif changed == "threads":
        assert not speeds(budget=Budget(threads=before.threads + 1))
    else:
        monkeypatch.setattr(device, "_library_versions", lambda: "llama-cpp-python=9")
        assert not speeds()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"name": "echo"}]', "\0"])
def test_a_damaged_measurement_counts_as_none(tmp_path: Path, content: str) -> None:
    found = make(tmp_path, engines={"echo": ECHO})
    found._file("speed", ECHO).write_text(content)
    assert found.speeds() == ()


def test_an_engine_is_checked_once(tmp_path: Path) -> None:
    async def test(checked: Device) -> None:
        await checked.check(ECHO)
        [file] = files(tmp_path, "check-echo-*.json")
        assert json.loads(file.read_text()) == {"version": "1", "max_error": 0.0}
        broken = EngineEntry("echo", "", "", "", "no.such:thing")
        await checked.check(broken)  # not asked again
        file.unlink()
        with pytest.raises(EngineError, match=r"no\.such:thing"):
            await checked.check(broken)
        assert not files(tmp_path, "check-*")

    run(tmp_path, test)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    async def test(measured: Device) -> None:
        with pytest.raises(EdgedError, match="expected to write below"):
            await measured.measure()

    run(tmp_path / "gone", test)
