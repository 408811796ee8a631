"""`edged check`: everything that could stop this node from working. Needs no daemon, sends nothing."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import config, identity, transport
from ..client import Client, endpoint_of
from ..config import Profile
from ..errors import EdgedError, NoDaemonError, TrustError
from ..identity import Home, default_home
from .detecting import plugin_trouble
from .options import HomeOption, JsonOption
from .output import Document, described_error, show
from .tables import sized, table

PYTHON_MIN = (3, 11)
DISK_BYTES_MIN = 1 << 30  # a small model and the job store
CLOCK_MIN = 1_735_689_600  # 2025-01-01: an earlier clock was never set, and would refuse every invite
MULTICAST_GROUP = "224.0.0.251"  # RFC 6762
GGML_LIBRARIES = ("ggml-base", "ggml-cpu", "ggml-rpc", "llama")


@dataclass(frozen=True, slots=True)
class Check:
    """One row. `ok` with a text that says what was found."""

    name: str
    ok: bool
    text: str
    remedy: str = ""


def check(home: HomeOption = None, as_json: JsonOption = False) -> int:
    """Look at everything that could stop this node from working; exit 1 where something would."""
    node = Home(home) if home is not None else default_home()
    found = list(checks(node))
    rows = [{"name": c.name, "ok": c.ok, "text": c.text, "remedy": c.remedy} for c in found]
    show({"checks": rows}, as_json, _show)
    return 0 if all(c.ok for c in found) else 1


def checks(home: Home) -> Iterator[Check]:
    yield python_version()
    yield clock(time.time())
    yield home_folder(home)
    yield _tried("keys", lambda: _keys(home))
    yield _tried("profile", lambda: _profile(home))
    yield disk(home)
    daemon = control(home)
    yield daemon
    try:
        profile = config.read(home.profile)
    except EdgedError:
        return  # said above
    for name in profile.plugins:
        yield _tried(f"plugin {name}", functools.partial(_plugin, profile, name))
    yield libraries(profile)
    yield from interfaces(profile)
    if not daemon.text.startswith("a daemon"):  # else the port is its own
        yield _tried("port", lambda: _port(profile))
    yield _tried("encryption", lambda: _encryption(profile))


# --- one function a check ---------------------------------------------------------------------------


def python_version() -> Check:
    ok = sys.version_info[:2] >= PYTHON_MIN
    needed = ".".join(map(str, PYTHON_MIN))
    return Check("python", ok, f"Python {platform.python_version()}", "" if ok else f"use {needed} or newer")


def clock(now: float) -> Check:
    ok = now >= CLOCK_MIN
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return Check("clock", ok, text, "" if ok else "set the clock: invites expire by it")


def home_folder(home: Home) -> Check:
    start = f"edged init --home {home.path}"
    try:
        mode = stat.S_IMODE(home.path.stat().st_mode)
    except OSError as error:
        return Check("home", False, f"no folder at {home.path}: {error.strerror}", start)
    if mode & 0o077:
        return Check("home", False, f"{home.path} is open to others ({mode:04o})", f"chmod 700 {home.path}")
    if not os.access(home.path, os.W_OK | os.X_OK):
        return Check("home", False, f"{home.path} cannot be written", "run edged as its owner")
    return Check("home", True, str(home.path))


def disk(home: Home) -> Check:
    folder = next(path for path in (home.path, *home.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    ok = free >= DISK_BYTES_MIN
    return Check("disk", ok, f"{sized(free)} free", "" if ok else f"free {sized(DISK_BYTES_MIN)} for models")


def control(home: Home) -> Check:
    endpoint = endpoint_of(home)
    try:
        with Client(endpoint) as client:
            status = client.call("status", silence_s=5.0)
    except NoDaemonError as error:
        if error.code == "no-daemon":
            return Check("daemon", True, f"none runs; start one: {endpoint.start}")
        return Check("daemon", False, str(error), error.remedy)
    except EdgedError as error:
        return Check("daemon", False, str(error), error.remedy)
    return Check("daemon", True, f"a daemon answers, {status.get('state')}")


def libraries(profile: Profile) -> Check:
    """llama.cpp's libraries, by name; nothing is loaded."""
    if not {"shard", "llama_cpp", "llama_rpc"} & set(profile.plugins):
        return Check("libraries", True, "not needed: no plugin of the profile uses them")
    install = "pip install 'edged[llama]'"
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return Check("libraries", False, "llama_cpp is not installed", install)
    folder = Path(spec.origin).parent / "lib"
    missing = [name for name in GGML_LIBRARIES if not list(folder.glob(f"lib{name}.*"))]
    if missing:
        return Check("libraries", False, f"missing in {folder}: {', '.join(missing)}", f"{install} again")
    return Check("libraries", True, f"llama.cpp's libraries in {folder}")


def interfaces(profile: Profile) -> Iterator[Check]:
    """Those the profile names are there; without names, some interface has an address."""
    known = [name for _, name in socket.if_nameindex()]
    found = {name: transport.local_addresses([name]) for name in profile.network.interfaces or known}
    missing = [name for name in profile.network.interfaces if not found[name]]
    text = f"no address on {', '.join(missing)}; here: {', '.join(known)}"
    usable = [addresses[0] for addresses in found.values() if addresses]
    if missing or not usable:
        yield Check("interfaces", False, text, "mend network.interfaces in the profile")
    else:
        yield Check("interfaces", True, ", ".join(name for name, addresses in found.items() if addresses))
    if usable and "mdns" in profile.plugins:
        yield multicast(usable)


def multicast(addresses: Sequence[str]) -> Check:
    """May a socket join mDNS's group on one of them at least? It is closed at once; nothing is sent."""
    refusals = [_refusal_of_multicast(address) for address in addresses]
    if None in refusals:
        return Check("multicast", True, f"can join {MULTICAST_GROUP}")
    remedy = "allow multicast there, or name peers in [plugin.static]"
    return Check("multicast", False, f"cannot join {MULTICAST_GROUP}: {refusals[0]}", remedy)


def _refusal_of_multicast(address: str) -> str | None:
    if ":" in address:
        return None  # not tried over IPv6
    membership = struct.pack("4s4s", socket.inet_aton(MULTICAST_GROUP), socket.inet_aton(address))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError as error:
        return error.strerror
    return None


# --- checks that raise ------------------------------------------------------------------------------


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except EdgedError as error:
        described = described_error(error)
        return Check(name, False, described["message"], described["remedy"])


def _keys(home: Home) -> str:
    known = identity.load(home)
    try:
        transport.check_keys(known)
    except TrustError as error:
        error.remedy = error.remedy or "restore node.key from a backup, or make a new home and pair again"
        raise
    return f"{known.name} ({known.node_id[:8]})"


def _profile(home: Home) -> str:
    return f"{config.read(home.profile).name}, from {home.profile}"


def _plugin(profile: Profile, name: str) -> str:
    trouble = plugin_trouble(name, profile.plugin.get(name, {}))
    if trouble is not None:
        raise trouble
    return "loads"


def _port(profile: Profile) -> str:
    """Bind it as the daemon would, and let it go."""
    port = profile.network.port
    if not port:
        return "the kernel chooses"
    for address in transport.local_addresses(profile.network.interfaces):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                raise EdgedError(
                    f"expected port {port} to be free on {address}; {error.strerror}",
                    remedy="mend network.port in the profile",
                ) from error
    return f"{port} is free"


def _encryption(profile: Profile) -> str:
    if profile.network.encryption != "required":
        raise EdgedError(
            f'expected network.encryption = "required"; {profile.network.encryption!r} came',
            remedy="remove the line from the profile",
        )
    return "required"


def _show(document: Document) -> None:
    table(
        ("", "check", "found", "what to do"),
        [("ok" if c["ok"] else "!!", c["name"], c["text"], c["remedy"] or "") for c in document["checks"]],
    )
