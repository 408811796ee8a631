"""`edged invite, join, trust, forget`: who belongs to this node's group."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .. import config
from ..errors import ConfigError
from ..types import RIGHTS
from . import options
from .asking import ask
from .options import HomeOption, JsonOption, RightsOption, ZoneOption
from .output import Document, note, show

TOKEN_CHARS_MAX = 4096

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="A name, an id, or 8 characters of one.")]


def invite(
    ttl: Annotated[str, typer.Option(metavar="10m", help="How long the token is good.")] = "10m",
    rights: RightsOption = None,
    zone: ZoneOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a one-time token. On the other device: `edged join TOKEN`."""
    ttl_s = float(config.duration(ttl, "--ttl"))
    if ttl_s <= 0:
        raise ConfigError(f"expected --ttl above 0; {ttl!r} came", remedy="write --ttl 10m")
    asked = {
        "ttl_s": ttl_s,
        "rights": options.rights(rights) if rights is not None else list(RIGHTS),
        "zone": options.zone(zone) or "own",
    }
    show(ask(home, "invite", asked), as_json, _show_invite)


def join(
    token: Annotated[str, typer.Argument(metavar="TOKEN|-", help="What `edged invite` printed; - reads it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join the node that printed TOKEN; returns when both are online to each other."""
    text = sys.stdin.read(TOKEN_CHARS_MAX) if token == "-" else token
    if not text.strip():
        raise ConfigError("expected a token; nothing came", remedy="make one with `edged invite`")
    show(
        ask(home, "join", {"token": text.strip()}),
        as_json,
        lambda joined: print(f"joined {_named(joined)}; it is online"),
    )


def trust(
    node: NodeArgument,
    rights: RightsOption = None,
    zone: ZoneOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show or change what a peer may do here. --rights none takes every right away."""
    asked = {"node": node, "rights": options.rights(rights), "zone": options.zone(zone)}
    show(ask(home, "trust", asked), as_json, _show_trust)


def forget(node: NodeArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Revoke a peer at once, running work included; only a new invite brings it back."""
    show(
        ask(home, "forget", {"node": node}),
        as_json,
        lambda document: print(f"forgot {document.get('node_id')}"),
    )


def _show_invite(invited: Document) -> None:
    """The token alone on standard output, so that it can be piped into `edged join -`."""
    print(invited.get("token"))
    note(f"good once, until {invited.get('expires_at')}; on the other device: edged join TOKEN")


def _show_trust(trusted: Document) -> None:
    rights = ", ".join(trusted.get("rights") or ()) or "none"
    print(f"{_named(trusted)}: rights {rights}; zone {trusted.get('zone')}")


def _named(document: dict[str, Any]) -> str:
    name, node_id = document.get("name"), str(document.get("node_id"))
    return f"{name} ({node_id[:8]})" if name else node_id
