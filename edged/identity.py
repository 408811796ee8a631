"""Who this node is: its home folder, key pair and stored membership."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, InstanceError, TrustError

KEY_BYTES = 32
NODE_ID_CHARS = 52
SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 108; a little room for a suffix
SYSTEM_SOCKET = Path("/run/edged/control.sock")


def node_id_of(public_key: bytes) -> str:
    """Lower-case base32 of a CURVE public key."""
    return base64.b32encode(public_key).decode().rstrip("=").lower()


def key_of(node_id: str) -> bytes:
    """The public key a node id stands for; TrustError when it is not one."""
    try:
        if len(node_id) != NODE_ID_CHARS or node_id != node_id.lower():
            raise ValueError
        key = base64.b32decode(node_id.upper() + "====")
    except ValueError as error:
        raise TrustError(f"expected a node id of {NODE_ID_CHARS} base32 characters") from error
    if node_id_of(key) != node_id:
        raise TrustError("expected a node id in its one canonical form")
    return key


def fingerprint_of(node_id: str) -> str:
    """What discovery announces of a key: 160 bits of its SHA-256, base32."""
    return base64.b32encode(hashlib.sha256(key_of(node_id)).digest()[:20]).decode().lower()


@dataclass(frozen=True, slots=True)
class Identity:
    name: str
    public_key: bytes
    secret_key: bytes

    def __repr__(self) -> str:  # a key never reaches a log line
        return f"Identity({self.name!r}, {self.node_id[:8]})"

    @property
    def node_id(self) -> str:
        return node_id_of(self.public_key)


@dataclass(frozen=True, slots=True)
class Home:
    """A node's folder. Everything of one node is below `path`, but a socket whose path were too long."""

    path: Path

    @property
    def profile(self) -> Path:
        return self.path / "profile.toml"

    @property
    def key_file(self) -> Path:
        return self.path / "node.key"

    @property
    def membership_file(self) -> Path:
        return self.path / "membership.json"

    @property
    def store_file(self) -> Path:
        return self.path / "state.db"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def plugin_state(self) -> Path:
        return self.path / "plugins"

    @property
    def is_initialised(self) -> bool:
        return self.key_file.exists()

    @property
    def control_socket(self) -> Path:
        """Where this home's daemon listens: its folder, else a short private one made from its path."""
        direct = self.path.absolute() / "control.sock"
        if len(os.fsencode(direct)) <= SOCKET_PATH_BYTES_MAX:
            return direct
        digest = hashlib.sha256(os.fsencode(self.path.absolute())).hexdigest()[:16]
        short = Path(f"edged-{os.getuid()}-{digest}") / "control.sock"
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / short
        return runtime if len(os.fsencode(runtime)) <= SOCKET_PATH_BYTES_MAX else Path("/tmp") / short


def default_home() -> Home:
    """`EDGED_HOME`, else the user's data folder."""
    if chosen := os.environ.get("EDGED_HOME"):
        return Home(Path(chosen))
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Home(Path(data) / "edged")


def check_name(name: str) -> str:
    if not re.fullmatch(r"[\w][\w .\-]{0,62}", name):
        raise ConfigError(
            f"expected a node name of 1 to 63 letters, digits, dots, dashes or spaces; {name!r} came",
            remedy="choose another --name",
        )
    return name


def create(home: Home, name: str | None, profile: str, keys: tuple[bytes, bytes]) -> Identity:
    """Make the home with a (public, secret) key pair and a profile's text. An existing home is kept."""
    if home.is_initialised:
        return load(home)
    identity = Identity(check_name(name or socket.gethostname() or "node"), *keys)
    try:
        for folder in (home.path, home.models, home.adapters, home.cache, home.plugin_state):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"expected a folder that can be made at {home.path}; {error}", remedy="choose another --home"
        ) from error
    if not home.profile.exists():
        write_atomically(home.profile, profile.encode())
    record = {
        "name": identity.name,
        "public": identity.public_key.hex(),
        "secret": identity.secret_key.hex(),
    }
    write_atomically(home.key_file, json.dumps(record).encode())
    return identity


def load(home: Home) -> Identity:
    """The identity of a home; TrustError when its key file is missing, readable by others or broken."""
    try:
        mode = stat.S_IMODE(home.key_file.stat().st_mode)
        text = home.key_file.read_text()
    except FileNotFoundError as error:
        raise ConfigError(
            f"expected an initialised home at {home.path}; it has no node.key",
            remedy=f"edged init --home {home.path}",
        ) from error
    except UnicodeDecodeError:
        text = ""  # no key pair either, whoever may read it
    except OSError as error:
        raise TrustError(f"expected a readable key at {home.key_file}; {error.strerror}") from error
    if mode & 0o077:
        raise TrustError(
            f"expected mode 0600 on {home.key_file}; it has {mode:04o}",
            remedy=f"chmod 600 {home.key_file}",
        )
    try:
        record = json.loads(text)
        identity = Identity(
            str(record["name"]), bytes.fromhex(record["public"]), bytes.fromhex(record["secret"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TrustError(
            f"expected a key pair in {home.key_file}; it cannot be read",
            remedy="restore it from a backup, or make a new home and pair again",
        ) from error
    if len(identity.public_key) != KEY_BYTES or len(identity.secret_key) != KEY_BYTES:
        raise TrustError(f"expected keys of {KEY_BYTES} bytes in {home.key_file}")
    return identity


def lock(home: Home) -> int:
    """Take the home for one daemon; the lock goes with the process. InstanceError when taken."""
    descriptor = os.open(home.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise InstanceError(
            f"expected a free home at {home.path}; a daemon runs there (process {holder or '?'})",
            remedy="stop it, or give this one another --home",
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def read_membership(home: Home) -> dict[str, Any]:
    """The stored membership as plain maps; empty for a new home."""
    try:
        stored = json.loads(home.membership_file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TrustError(
            f"expected a readable membership at {home.membership_file}; {error}",
            remedy="restore it from a backup, or remove it and pair again",
        ) from error
    if not isinstance(stored, dict):
        raise TrustError(f"expected a map in {home.membership_file}")
    return stored


def write_membership(home: Home, stored: dict[str, Any]) -> None:
    write_atomically(home.membership_file, json.dumps(stored).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write 0600 beside `path`, flush to disk, rename: a reader sees the old or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
