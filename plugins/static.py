"""Finds the nodes that the profile names, for networks without multicast.

Each entry says where a node listens and which key it must have: `host:port#fingerprint`. `edged
status` on that node shows its fingerprint; a fixed port stands in its profile (`network.port`).

It does not know whether a node is there: it names all of them once, at the start, and the daemon
dials. It does not resolve host names either: whoever dials does, each time anew, off the loop.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from edged import Announcement, ConfigError, DiscovererEntry, Sighting, hookimpl

PEERS_MAX = 64  # as many as a group has; a longer list is a mistake
_HOST = r"\[(?P<v6>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}))"
_PEER = re.compile(rf"(?:{_HOST}):(?P<port>[0-9]{{1,5}})#(?P<fingerprint>[a-z2-7]{{32}})")


@dataclass(frozen=True, slots=True)
class Settings:
    peers: tuple[str, ...] = ()  # "host:port#fingerprint"; a v6 address in brackets


@dataclass(frozen=True, slots=True)
class Peer:
    """One entry of `peers`, read."""

    host: str
    port: int
    fingerprint: str


@hookimpl
def edged_discoverers(settings: Mapping[str, Any]) -> Sequence[DiscovererEntry]:
    return [DiscovererEntry("static", Static(read(settings)))]


class Static:
    def __init__(self, settings: Settings) -> None:
        self._peers = [parse(peer) for peer in settings.peers]

    async def start(
        self, announcement: Announcement, seen: Callable[[Sighting], None], lost: Callable[[str], None]
    ) -> None:
        """Name every peer but this node itself, so that all nodes may share one list."""
        hosts: dict[tuple[str, int], list[str]] = {}
        for peer in self._peers:
            hosts.setdefault((peer.fingerprint, peer.port), []).append(peer.host)
        for (fingerprint, port), addresses in hosts.items():
            if fingerprint != announcement.fingerprint:
                seen(Sighting(fingerprint, tuple(dict.fromkeys(addresses)), port, announcement.protocol))

    async def stop(self) -> None:
        """Nothing runs."""


def read(settings: Mapping[str, Any]) -> Settings:
    """`[plugin.static]` of a profile, or a ConfigError that says which value is wrong."""
    known = [field.name for field in fields(Settings)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1) or known
            raise ConfigError(
                f"no setting plugin.static.{key}; did you mean plugin.static.{near[0]}?",
                remedy="mend or remove the key in the profile",
            )
    peers = settings.get("peers", ())
    if not isinstance(peers, (list, tuple)) or not all(isinstance(peer, str) for peer in peers):
        raise ConfigError(
            f"expected a list of texts for plugin.static.peers; {type(peers).__name__} came",
            remedy='write peers = ["host:port#fingerprint"]',
        )
    if len(peers) > PEERS_MAX:
        raise ConfigError(
            f"expected at most {PEERS_MAX} entries in plugin.static.peers; {len(peers)} came",
            remedy="name fewer peers",
        )
    for peer in peers:
        parse(peer)
    return Settings(tuple(peers))


def parse(peer: str) -> Peer:
    """ "host:port#fingerprint" in its parts."""
    match = _PEER.fullmatch(peer)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f'expected "host:port#fingerprint" in plugin.static.peers; {peer[:120]!r} came',
            remedy="a port from 1 to 65535 and the 32 letters that `edged status` shows on that node",
        )
    return Peer(match["v6"] or match["name"], int(match["port"]), match["fingerprint"])
