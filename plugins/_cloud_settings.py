"""What a profile says of an endpoint outside the group, and the file that holds its key."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from edged import ConfigError, duration

KEY_BYTES_MAX = 4096
TIMEOUT_S = 60.0
TIMEOUT_S_MAX = 100.0  # a job without a token is given up after 120 s, by then without this reason
ORIGIN = "the profile"


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugin.cloud]` of a profile. Durations are text with a unit."""

    endpoint: str  # the URL before /completions: https, or http on loopback
    models: Mapping[str, str]  # a stored model's name -> the endpoint's name of the same model
    ttft: str  # until its first token, as you know it; no job corrects it
    tpot: str  # of a token, as you know it, until jobs correct it
    key_file: str = ""  # holds the API key, and only its owner may read it; "": no key is sent
    joules_per_token: float | None = None  # where you know them
    timeout: str = f"{TIMEOUT_S:g}s"  # without a word of the answer for so long, it has failed


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint is. `path`: without a slash at its end."""

    is_tls: bool
    host: str
    port: int
    path: str


def read(settings: Mapping[str, Any]) -> Settings:
    """The settings, every value checked; ConfigError says which is wrong. The key is not read."""
    known = {field.name: field for field in dataclasses.fields(Settings)}
    for name in settings:
        if name not in known:
            raise _wrong(f"no setting plugin.cloud.{name}; known: {', '.join(known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in settings:
            raise _wrong(f"expected plugin.cloud.{name} beside the others; it is missing")
    chosen = Settings(**settings)
    address_of(chosen.endpoint)
    if not isinstance(chosen.models, Mapping) or not chosen.models or not all(map(_is_name, _names(chosen))):
        raise _wrong("expected plugin.cloud.models of a stored model's name = the endpoint's name for it")
    for name in ("ttft", "tpot"):
        if not seconds_of(chosen, name) > 0:
            raise _wrong(f"expected plugin.cloud.{name} above 0")
    if not 0 < seconds_of(chosen, "timeout") <= TIMEOUT_S_MAX:
        raise _wrong(f"expected plugin.cloud.timeout above 0 and at most {TIMEOUT_S_MAX:g}s")
    if not _is_energy(chosen.joules_per_token):
        raise _wrong(f"expected plugin.cloud.joules_per_token of 0 or more; {chosen.joules_per_token!r} came")
    if not isinstance(chosen.key_file, str):
        raise _wrong("expected plugin.cloud.key_file, the path of a file; something else came")
    if chosen.key_file:
        os.close(_open_key(chosen.key_file))
    return chosen


def seconds_of(settings: Settings, name: str) -> float:
    """A duration among the settings; ConfigError where it is none."""
    return float(duration(getattr(settings, name), f"plugin.cloud.{name}", ORIGIN))


def address_of(endpoint: Any) -> Address:
    """The parts of an endpoint's URL. An error says nothing of the URL itself: there may be secrets in it."""
    if not isinstance(endpoint, str) or not re.fullmatch(r"[!-~]{1,2000}", endpoint):
        raise _wrong("expected plugin.cloud.endpoint of a URL in printable ASCII; something else came")
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise _wrong("expected plugin.cloud.endpoint of a URL with a valid host and port") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise _wrong(
            "expected plugin.cloud.endpoint without user, password, ? or #; the key goes into key_file"
        )
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http") or not host:
        raise _wrong('expected plugin.cloud.endpoint like "https://api.example.org/v1"')
    if parts.scheme == "http" and not is_loopback(host):
        raise _wrong(f"expected plugin.cloud.endpoint by https; http to {host} would show the key to the way")
    is_tls = parts.scheme == "https"
    return Address(is_tls, host, port or (443 if is_tls else 80), parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Is it this machine, by name or address?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(path: str) -> str:
    """The API key in the file; ConfigError, without a byte of it, where it is none or others may read it."""
    if not path:
        return ""
    file = _open_key(path)
    try:
        held = os.read(file, KEY_BYTES_MAX + 1)
    except OSError as error:
        raise _wrong(f"expected to read plugin.cloud.key_file; {error.strerror}") from error
    finally:
        os.close(file)
    key = held.strip()
    if len(held) > KEY_BYTES_MAX or not re.fullmatch(rb"[!-~]+", key):
        raise _wrong(
            f"expected one key of printable ASCII, at most {KEY_BYTES_MAX} bytes, in plugin.cloud.key_file"
        )
    return key.decode("ascii")


def _open_key(path: str) -> int:
    """A descriptor of a file that its owner alone may read, who is this user."""
    if not os.path.isabs(os.path.expanduser(path)):
        raise _wrong("expected plugin.cloud.key_file of an absolute path, or one that begins with ~")
    try:
        # without blocking: a pipe by that name would hold the start up
        file = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        raise _wrong(f"expected to open plugin.cloud.key_file {path!r}; {reason}") from error
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
        return file
    os.close(file)
    raise ConfigError(
        f"expected plugin.cloud.key_file {path!r}, a file of this user that nobody else may read; "
        f"its mode is {stat.filemode(found.st_mode)}, its owner {found.st_uid}",
        remedy="chown it to the user that runs edged, and chmod 600",
    )


def _names(settings: Settings) -> list[Any]:
    return [*settings.models, *settings.models.values()]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()


def _is_energy(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _wrong(message: str) -> ConfigError:
    return ConfigError(message, remedy="mend [plugin.cloud] in the profile; docs/security.md has an example")
