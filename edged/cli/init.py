"""`edged init`: makes this device a node."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import config, identity
from ..errors import ConfigError
from ..identity import Home, default_home
from ..transport import new_keys
from .detecting import device_class, first_party_plugins
from .options import HomeOption, JsonOption
from .output import Document, note, show
from .toml_text import with_value

ROOT = Path("/")


def init(
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A shipped profile or a TOML file. Default: detected."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the host's name.")] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option(metavar="IF", help="Announce and listen here only; may be given again. Default: all."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the home, keys and profile. An existing home stays as it is."""
    made = Home((home if home is not None else default_home().path).absolute())
    if os.access(made.key_file, os.F_OK):
        note(f"edged: {made.path} is a node already; nothing was changed")
    has_profile = os.access(made.profile, os.F_OK)  # by an earlier init, or written by hand
    text = None if has_profile else with_interfaces(profile_text(profile), interface or ())
    show(make(made, name, text), as_json, _show)


def make(home: Home, name: str | None, text: str | None) -> Document:
    """The node of `home`, made where there is none, with the profile's text unless it has one.

    Nothing is written unless all of it is valid.
    """
    profile = config.read(home.profile) if text is None else config.parse(text, str(home.profile))
    made = identity.create(home, name, text or "", new_keys())
    if text is not None and not home.profile.exists():  # lost since
        identity.write_atomically(home.profile, text.encode())
    return {
        "node_id": made.node_id,
        "name": made.name,
        "home": str(home.path),
        "profile": profile.name,
        "profile_file": str(home.profile),
    }


def profile_text(chosen: str | None, root: Path = ROOT) -> str:
    """The text of a file or of a shipped profile; without a choice, what was detected here."""
    if chosen is None:
        return _detected(root)
    if not chosen.endswith(".toml") and os.sep not in chosen:
        return config.shipped(chosen)
    try:
        return Path(chosen).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"expected a readable profile at {chosen}; {error}", remedy="check --profile"
        ) from error


def with_interfaces(text: str, interfaces: Sequence[str]) -> str:
    """The profile's text with these interfaces, checked against this machine's."""
    if not interfaces:
        return text
    known = [name for _, name in socket.if_nameindex()]
    for interface in interfaces:
        if interface not in known and not _is_address(interface):
            raise ConfigError(
                f"no interface {interface!r}; this machine has: {', '.join(known)}",
                remedy="name one of these, or an address",
            )
    edited = with_value(text, "network", "interfaces", interfaces, "chosen by `edged init --interface`")
    if config.parse(edited, "the profile").network.interfaces != tuple(interfaces):
        raise ConfigError(
            "expected a profile with a [network] table of its own; interfaces could not be set in it",
            remedy="write network.interfaces into the profile yourself",
        )
    return edited


def _detected(root: Path) -> str:
    chosen = device_class(root, os.environ)
    plugins, troubles = first_party_plugins()
    for plugin, trouble in troubles.items():
        note(f"edged: left out plugin {plugin}: {trouble}")
    return with_value(config.shipped(chosen), "", "plugins", plugins, "installed when `edged init` looked")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _show(document: Document) -> None:
    home, profile = document["home"], document["profile"]
    print(f"node {document['name']} ({document['node_id'][:8]}) in {home}, profile {profile}")
    note(f"start it with: edged run --home {home}")
