"""The profile: one TOML file into frozen dataclasses, each value with its origin.

Unknown keys are errors that name the nearest key. Durations and sizes are text with a unit.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .types import WATTS_MAX, CacheType

VERSION = 1
DEFAULT_CLASS = "laptop-cpu"
TYPE_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
DEFAULT_PLUGINS = (
    "mdns",
    "monitor",
    "shard",
    "llama_cpp",
    "layer_parallel",
    "tensor_parallel",
    "energy",
    "torch_blocks",
    "split_learning",
    "personal_lora",
    "zeroth_order",
)


T = TypeVar("T")


class Duration(float):
    """Seconds, written "500ms", "30s", "5m", "2h" or "7d"."""


class Size(int):
    """Bytes, written "512MiB", "4GiB", "10MB" or "4096B"."""


ORPHAN_AFTER, WORKER_IDLE, KEEP = Duration(60), Duration(300), Duration(7 * 86400)


@dataclass(frozen=True, slots=True)
class Device:
    """Facts that cannot be measured on the spot; absent where no source gives them."""

    idle_watts: float | None = None
    load_watts: float | None = None
    battery_wh: float | None = None
    thermal_limit_celsius: float | None = None

    @property
    def watts(self) -> tuple[float, float] | None:
        """Idle and at work, where the profile says both."""
        if self.idle_watts is None or self.load_watts is None:
            return None
        return self.idle_watts, self.load_watts


@dataclass(frozen=True, slots=True)
class Budget:
    """What edged may take from the device's own job."""

    memory_share: float = 0.7  # of the memory free when a role is offered
    memory: Size | None = None  # at most this much in all workers
    threads: int = 0  # per worker; 0: the physical cores that the daemon may use, within its CPU quota
    workers: int = 8  # at most this many at once
    transfer_bytes_s: Size | None = None  # model transfers; None: as fast as the link


@dataclass(frozen=True, slots=True)
class Network:
    interfaces: tuple[str, ...] = ()  # names or addresses; empty: every interface
    port: int = 0  # control port; 0: the kernel's choice, kept for the next start
    data_ports: str = "0"  # "0", or a range like "47100-47199"
    encryption: str = "required"  # "disabled" is refused off loopback


@dataclass(frozen=True, slots=True)
class Jobs:
    orphan_after: Duration = ORPHAN_AFTER  # a vanished client's job ends then
    worker_idle: Duration = WORKER_IDLE  # a worker without a job ends then
    keep: Duration = KEEP  # finished jobs, with their text
    queue: int = 64  # waiting jobs; more are refused
    allow_guest: bool = False  # may jobs use guests' nodes?
    context: int = 2048  # tokens of KV cache per sequence; more where a prompt needs more
    sequences: int = 4  # so many contexts are planned for, as far as memory goes; further jobs wait
    cache_type: CacheType = "f16"  # of the KV cache: "f32", "f16" or "q8_0"


@dataclass(frozen=True, slots=True)
class Energy:
    """When this device takes no new work, and who chooses plans."""

    reserve: float = 0.2  # part of the battery at which it takes no new work, unless it is plugged in
    resume: float = 0.3  # part of the battery above which it works again
    yield_to_owner: bool = False  # no new work while somebody is at the device
    harvest_watts: tuple[float, float] | None = None  # least and most that fill the battery, evenly between
    is_solar: bool = False  # the harvest is that of the day's best light, and follows the sun
    policy: str = (
        ""  # of jobs submitted here; "": latency, and battery-balance where it is loaded and matters
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything a node is told; what it measures is elsewhere."""

    version: int = VERSION
    name: str = DEFAULT_CLASS
    plugins: tuple[str, ...] = DEFAULT_PLUGINS
    device: Device = field(default_factory=Device)
    budget: Budget = field(default_factory=Budget)
    network: Network = field(default_factory=Network)
    jobs: Jobs = field(default_factory=Jobs)
    energy: Energy = field(default_factory=Energy)
    plugin: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value and where it came from."""

    key: str
    value: Any
    origin: str


def read(path: Path) -> Profile:
    """The profile in `path`; ConfigError says file, key, what was expected and what came."""
    return parse(_read_text(path), str(path))


def parse(text: str, origin: str) -> Profile:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"expected TOML in {origin}; {error}", remedy="mend that line") from error
    if table.get("version") != VERSION:
        raise ConfigError(
            f"expected version = {VERSION} in {origin}; {table.get('version')!r} came",
            remedy=f"write version = {VERSION}, or use the edged that wrote this file",
        )
    profile: Profile = _build(Profile, table, "", origin)
    _check(profile, origin)
    return profile


def load_table(path: Path) -> dict[str, Any]:
    """A TOML file that somebody else checks."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"expected readable TOML at {path}; {error}", remedy="mend the file") from error


def build_table(table: Mapping[str, Any], cls: type[T], origin: str) -> T:
    """A table read by the same rules as a profile, into a dataclass: an unknown key names the nearest one."""
    try:
        return cast(T, _build(cls, table, "", origin))
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"expected every key in {origin}; {error}", remedy="add what is missing") from error


def read_table(path: Path, cls: type[T]) -> T:
    """Another TOML file of ours, into a dataclass."""
    return build_table(load_table(path), cls, str(path))


def explain(profile: Profile, path: Path) -> list[Setting]:
    """Every setting with its value and origin: the file, or edged's default."""
    written = tomllib.loads(_read_text(path))
    found = list(_explain(profile, written, "", str(path)))
    for name, table in sorted(profile.plugin.items()):
        found += [Setting(f"plugin.{name}.{key}", value, str(path)) for key, value in sorted(table.items())]
    return found


def shipped(name: str) -> str:
    """The text of a profile that edged brings, by its class name."""
    known = shipped_names()
    if name not in known:
        raise ConfigError(
            f"no profile {name!r}; edged brings: {', '.join(known)}",
            remedy="name one of these, or a TOML file",
        )
    return resources.files("edged_profiles").joinpath(f"{name}.toml").read_text()


def shipped_names() -> list[str]:
    files = resources.files("edged_profiles").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def data_ports(spec: str) -> range:
    """ "0" -> range(0, 1) (the kernel chooses); "a-b" -> a to b, both included."""
    match = re.fullmatch(r"(\d+)-(\d+)", spec)
    if spec == "0":
        return range(1)
    if match and 1024 <= int(match[1]) <= int(match[2]) <= 65535:
        return range(int(match[1]), int(match[2]) + 1)
    raise ConfigError(
        f'expected network.data_ports "0" or a range like "47100-47199"; {spec!r} came',
        remedy="mend it in the profile",
    )


# --- reading ------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"expected a readable profile at {path}; {error}", remedy="make one with `edged init`"
        ) from error


def _build(cls: type[Any], table: Mapping[str, Any], prefix: str, origin: str) -> Any:
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise ConfigError(
                f"no setting {prefix}{key} in {origin}; "
                + (f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(hints))}"),
                remedy="mend or remove the key; `edged config --explain` lists all",
            )
    values = {key: _value(hints[key], value, prefix + key, origin) for key, value in table.items()}
    return cls(**values)


def _value(hint: Any, value: Any, key: str, origin: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise _wrong("a table", value, key, origin)
        return _build(hint, value, f"{key}.", origin)
    if hint is Duration:
        return duration(value, key, origin)
    if hint is Size:
        return size(value, key, origin)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _wrong(" or ".join(f'"{word}"' for word in get_args(hint)), value, key, origin)
        return value
    if get_origin(hint) is tuple and get_args(hint) != (str, ...):
        return _tuple(get_args(hint), value, key, origin)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _wrong("a list of texts", value, key, origin)
        return tuple(value)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise _wrong("a table for each plugin", value, key, origin)
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _wrong(TYPE_WORDS[hint], value, key, origin)
    return value


def _tuple(hints: tuple[Any, ...], value: Any, key: str, origin: str) -> tuple[Any, ...]:
    """A list: of any length where the hint ends in an ellipsis, else one value for each hint."""
    if hints[-1] is Ellipsis and isinstance(value, list):
        hints = hints[:1] * len(value)
    if not isinstance(value, list) or len(value) != len(hints):
        raise _wrong(f"a list of {len(hints)}" if hints[-1] is not Ellipsis else "a list", value, key, origin)
    named = enumerate(zip(hints, value, strict=True), 1)
    return tuple(_value(hint, item, f"{key}[{number}]", origin) for number, (hint, item) in named)


def duration(value: Any, key: str = "duration", origin: str = "the arguments") -> Duration:
    """ "30s" -> 30.0"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if not match:
        raise _wrong('a duration like "30s" (ms, s, m, h, d)', value, key, origin)
    return Duration(float(match[1]) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


def size(value: Any, key: str = "size", origin: str = "the arguments") -> Size:
    """ "512MiB" -> 536870912"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?)?B", value) if isinstance(value, str) else None
    if not match:
        raise _wrong('a size like "512MiB" (B, KB, KiB, MB, MiB, GB, GiB, TB, TiB)', value, key, origin)
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return Size(float(match[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))


def _wrong(expected: str, value: Any, key: str, origin: str) -> ConfigError:
    return ConfigError(f"expected {expected} for {key} in {origin}; {value!r} came", remedy="mend the value")


def _check(profile: Profile, origin: str) -> None:
    """Rules that one value's type does not say."""
    device, energy = profile.device, profile.energy
    rules = (
        (0 < profile.budget.memory_share <= 1, "budget.memory_share above 0 and at most 1"),
        (profile.budget.threads >= 0, "budget.threads of 0 (every core) or more"),
        (1 <= profile.budget.workers <= 64, "budget.workers from 1 to 64"),
        (0 <= profile.network.port <= 65535, "network.port from 0 to 65535"),
        (
            profile.network.encryption in ("required", "disabled"),
            'network.encryption "required" or "disabled"',
        ),
        (profile.jobs.queue >= 1, "jobs.queue of 1 or more"),
        (profile.jobs.context >= 64, "jobs.context of 64 or more"),
        (1 <= profile.jobs.sequences <= 32, "jobs.sequences from 1 to 32"),
        (0 <= energy.reserve < energy.resume <= 1, "energy.reserve below energy.resume, both from 0 to 1"),
        (_is_within(device.idle_watts, 0, WATTS_MAX), f"device.idle_watts from 0 to {WATTS_MAX:g}"),
        (
            _is_within(device.load_watts, device.idle_watts or 0, WATTS_MAX),
            "device.load_watts of idle_watts or more",
        ),
        (_is_within(device.battery_wh, 0.1, 1e5), "device.battery_wh from 0.1 to 100000"),
        (_is_within(device.thermal_limit_celsius, 30, 150), "device.thermal_limit_celsius from 30 to 150"),
        (
            energy.harvest_watts is None
            or 0 <= energy.harvest_watts[0] <= energy.harvest_watts[1] <= WATTS_MAX,
            f"energy.harvest_watts as least and most, from 0 to {WATTS_MAX:g}",
        ),
        (
            energy.harvest_watts is None or device.watts is not None,
            "device.idle_watts and device.load_watts beside energy.harvest_watts",
        ),
        (
            energy.harvest_watts is not None or not energy.is_solar,
            "energy.harvest_watts with energy.is_solar",
        ),
        (len(set(profile.plugins)) == len(profile.plugins), "each plugin once"),
    )
    for holds, expected in rules:
        if not holds:
            raise ConfigError(f"expected {expected} in {origin}", remedy="mend the value in the profile")
    data_ports(profile.network.data_ports)


def _is_within(value: float | None, least: float, most: float) -> bool:
    return value is None or least <= value <= most


def _explain(part: Any, written: Mapping[str, Any], prefix: str, path: str) -> Any:
    for item in dataclasses.fields(part):
        value, key = getattr(part, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from _explain(value, written.get(item.name, {}), f"{key}.", path)
        elif item.name != "plugin":
            yield Setting(key, value, path if item.name in written else "default")
