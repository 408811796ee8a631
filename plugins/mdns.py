"""Finds nodes on the local network by multicast DNS and tells them of this one.

What is announced, in full: an instance of `_edged._tcp.local.` named by the key's fingerprint, on a
host of the same name, with its addresses and port, and a TXT record `v=<protocol> fp=<fingerprint>`.
No name of the device or its owner is ever sent.

Everything heard is a hint from anybody. A record counts only when instance, host and TXT name the
same fingerprint, so two instances cannot claim one; TXT, addresses and the table are bounded; an
address that cannot lead to another node is dropped. Two hosts that claim one instance give one
sighting with the addresses of both: only the key, checked when dialling, says who is who.

It does not know which versions this node speaks: a well-formed sighting of another version is passed
on with its number. It does not know when a node vanishes without a farewell: its record lives on for
up to 75 minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice, product
from typing import Any

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from edged import Announcement, DiscovererEntry, PluginError, Sighting, hookimpl

SERVICE = "_edged._tcp.local."
PORT = 5353
CANDIDATES_MAX = 64  # nodes remembered; more than a person owns, little for a flood to fill
ADDRESSES_MAX = 8  # of one node, and of this one
TXT_BYTES_MAX = 256  # ours takes 42
ASKING_MAX = 8  # nodes asked at once for records that did not come with the first packet
ASK_MS = 3000
PAUSE_S = 2.0  # between two news of one node; what was replaced is gone a second later (RFC 6762, 10.2)
RESCAN_S = 15.0  # how often this machine's own addresses are read: Wi-Fi comes and goes

_IP_MULTICAST_ALL, _IPV6_MULTICAST_ALL = 49, 29  # Linux; Python does not name them
_FINGERPRINT = re.compile("[a-z2-7]{32}")
_VERSION = re.compile("[1-9][0-9]{0,4}")

_FAILURES = (OSError, RuntimeError, ZeroconfError)  # RuntimeError: an adapter vanished meanwhile

log = logging.getLogger(__name__)


@hookimpl
def edged_discoverers(settings: Mapping[str, Any]) -> Sequence[DiscovererEntry]:
    return [DiscovererEntry("mdns", Mdns())]


@dataclass(frozen=True, slots=True, order=True)
class Local:
    """One address of this machine."""

    is_v6: bool
    text: str
    device: str
    index: int


class Mdns:
    """Announces and browses while started. `seen` and `lost` are called on the loop, never twice for
    the same news. Opens its sockets anew when this machine's addresses change."""

    def __init__(self, service: str = SERVICE, rescan_s: float = RESCAN_S) -> None:
        self._service = service
        self._rescan_s = rescan_s
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._locals: list[Local] = []
        self._table: dict[str, Sighting] = {}
        self._tasks: dict[str, asyncio.Future[Any]] = {}  # "watch", "announce", and fingerprints asked
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def start(
        self, announcement: Announcement, seen: Callable[[Sighting], None], lost: Callable[[str], None]
    ) -> None:
        """Announce this node and report others from now on; PluginError where no socket can be had."""
        self._announcement, self._seen, self._lost = announcement, seen, lost
        try:
            await self._open(local_addresses(announcement.interfaces, ifaddr.get_adapters()))
        except _FAILURES as error:
            await self._close()
            raise PluginError(
                f"mdns expected to share UDP port {PORT}; {error} came",
                remedy="stop the program that holds the port, or use the static plugin instead",
            ) from error
        self._tasks["watch"] = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        """Say farewell and close; takes a quarter of a second."""
        watch = self._tasks.pop("watch", None)
        if watch is not None:
            watch.cancel()
            await asyncio.wait([watch])
        await self._close()
        self._table.clear()

    # --- sockets ---

    async def _open(self, addresses: list[Local]) -> None:
        self._locals = addresses
        v4 = [each.text for each in addresses if not each.is_v6]
        v6 = sorted({each.index for each in addresses if each.is_v6})
        if not v4 and not v6:
            log.warning("no address for mdns", extra={"interfaces": self._announcement.interfaces})
            return
        _check_port()
        self._zeroconf = AsyncZeroconf(interfaces=[*v4, *v6])
        await self._zeroconf.zeroconf.async_wait_for_start()
        _confine(self._zeroconf.zeroconf, {each.device for each in addresses})
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, self._service, handlers=[self._on_change]
        )
        # A fingerprint is unique already, so the probing for another owner of the name is skipped.
        sending = await self._zeroconf.async_register_service(self._info(), cooperating_responders=True)
        self._tasks["announce"] = asyncio.ensure_future(sending)

    async def _close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        ended = [task for name, task in self._tasks.items() if name != "watch"]
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.wait(ended)
        self._tasks = {name: task for name, task in self._tasks.items() if name == "watch"}
        if self._browser is not None:
            browser, self._browser = self._browser, None
            await browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_close()
            self._zeroconf = None

    async def _watch(self) -> None:
        """Begin anew whenever this machine's addresses change."""
        while True:
            await asyncio.sleep(self._rescan_s)
            addresses = local_addresses(self._announcement.interfaces, ifaddr.get_adapters())
            if addresses == self._locals:
                continue
            await self._close()
            for fingerprint in list(self._table):
                self._forget(fingerprint)
            try:
                await self._open(addresses)
            except _FAILURES as error:  # the next round tries again
                await self._close()
                self._locals = []
                log.warning("mdns sockets did not open", extra={"reason": str(error)})

    def _info(self) -> AsyncServiceInfo:
        fingerprint = self._announcement.fingerprint
        return AsyncServiceInfo(
            self._service,
            f"{fingerprint}.{self._service}",
            port=self._announcement.port,
            properties={"v": str(self._announcement.protocol), "fp": fingerprint},
            server=f"{fingerprint}.local.",
            parsed_addresses=[each.text for each in self._locals],
        )

    # --- what is heard ---

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        fingerprint = self._fingerprint_in(name)
        if fingerprint is None:
            return
        if state_change is not ServiceStateChange.Removed:
            if fingerprint not in self._timers:
                self._look(fingerprint)
            return
        was_full = not self._has_room()
        self._forget(fingerprint)
        if was_full:  # one that found no place before may have it now
            for record in islice(zeroconf.cache.async_entries_with_name(self._service), 2 * CANDIDATES_MAX):
                other = self._fingerprint_in(str(getattr(record, "alias", "")))
                if other is not None and other != fingerprint and other not in self._table:
                    self._look(other)

    def _fingerprint_in(self, name: str) -> str | None:
        """The fingerprint that an instance is named by; None where it is another name, or our own."""
        label = name.removesuffix(f".{self._service}")
        return label if _FINGERPRINT.fullmatch(label) and label != self._announcement.fingerprint else None

    def _look(self, fingerprint: str) -> None:
        """Read the records at hand; ask for what is missing."""
        self._timers.pop(fingerprint, None)
        if self._zeroconf is None or not (fingerprint in self._table or self._has_room()):
            return
        info = AsyncServiceInfo(self._service, f"{fingerprint}.{self._service}")
        if info.load_from_cache(self._zeroconf.zeroconf):
            self._take(fingerprint, info)
        elif fingerprint not in self._tasks and len(self._tasks) < ASKING_MAX + 2:
            self._tasks[fingerprint] = asyncio.ensure_future(self._ask(fingerprint, info))

    async def _ask(self, fingerprint: str, info: AsyncServiceInfo) -> None:
        assert self._zeroconf is not None
        try:
            if await info.async_request(self._zeroconf.zeroconf, ASK_MS):
                self._take(fingerprint, info)
        finally:
            self._tasks.pop(fingerprint, None)

    def _take(self, fingerprint: str, info: AsyncServiceInfo) -> None:
        with_loopback = any(ip_address(each.text).is_loopback for each in self._locals)
        sighting = sighting_of(fingerprint, info, with_loopback)
        if sighting is None or sighting == self._table.get(fingerprint):
            return
        if fingerprint not in self._table and not self._has_room():
            return
        self._table[fingerprint] = sighting
        self._later(fingerprint)
        self._seen(sighting)

    def _later(self, fingerprint: str) -> None:
        """Look again after the pause; till then, changes of this node wait."""
        if fingerprint in self._timers:
            self._timers[fingerprint].cancel()
        self._timers[fingerprint] = asyncio.get_running_loop().call_later(PAUSE_S, self._look, fingerprint)

    def _forget(self, fingerprint: str) -> None:
        if fingerprint in self._timers:
            self._timers.pop(fingerprint).cancel()
        if self._table.pop(fingerprint, None) is not None:
            self._lost(fingerprint)

    def _has_room(self) -> bool:
        return len(self._table) < CANDIDATES_MAX


def sighting_of(fingerprint: str, info: AsyncServiceInfo, with_loopback: bool) -> Sighting | None:
    """What one node's records say, or None unless they agree and are within bounds."""
    txt = read_txt(info.text)
    if txt is None or txt.get(b"fp") != fingerprint.encode() or not info.port:
        return None
    version = _VERSION.fullmatch(txt.get(b"v", b"").decode("ascii", "replace"))
    if version is None or (info.server or "").lower() != f"{fingerprint}.local.":
        return None
    heard = dict.fromkeys(islice(info.parsed_scoped_addresses(), 4 * ADDRESSES_MAX))
    usable = sorted((text for text in heard if _can_dial(text, with_loopback)), key=_order)
    if not usable:
        return None
    return Sighting(fingerprint, tuple(usable[:ADDRESSES_MAX]), info.port, int(version[0]))


def read_txt(text: bytes) -> dict[bytes, bytes] | None:
    """The pairs of a TXT record (RFC 6763, 6); None when it is too long, broken or says a key twice."""
    pairs: dict[bytes, bytes] = {}
    if len(text) > TXT_BYTES_MAX:
        return None
    while text:
        length, text = text[0], text[1:]
        if length > len(text):
            return None
        key, _, value = text[:length].partition(b"=")
        if key.lower() in pairs:
            return None
        pairs[key.lower()] = value
        text = text[length:]
    return pairs


def local_addresses(interfaces: Sequence[str], adapters: Iterable[ifaddr.Adapter]) -> list[Local]:
    """This machine's addresses on `interfaces` (names or addresses), best first.

    Without interfaces: all but loopback, which only counts where there is nothing else; adapters
    that have no more than a link-local v6 address (containers' ends of cables) are left out. ::1 never
    counts: multicast does not work on it, and who hears 127.0.0.1 does not need it.
    """
    found: list[Local] = []
    for adapter in adapters:
        here = [each for each in (_local(adapter, ip) for ip in adapter.ips) if each.text != "::1"]
        chosen = [each for each in here if each.device in interfaces or each.text in interfaces]
        worth = any(not (each.is_v6 and ip_address(each.text).is_link_local) for each in here)
        found += chosen if interfaces else here if worth else []
    if not interfaces:
        found = [each for each in found if not ip_address(each.text).is_loopback] or found
    return sorted(set(found), key=lambda each: (_order(each.text), each))[:ADDRESSES_MAX]


def _local(adapter: ifaddr.Adapter, address: ifaddr.IP) -> Local:
    text = address.ip if isinstance(address.ip, str) else address.ip[0]
    return Local(address.is_IPv6, text.partition("%")[0], str(adapter.name), adapter.index or 0)


def _order(text: str) -> tuple[bool, bool, str]:
    address = ip_address(text)
    return address.version == 6, address.is_link_local, text


def _can_dial(text: str, with_loopback: bool) -> bool:
    address: IPv4Address | IPv6Address = ip_address(text)
    if isinstance(address, IPv6Address) and (
        address.ipv4_mapped or (address.is_link_local and not address.scope_id)
    ):
        return False
    if address.is_loopback:
        return with_loopback
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)


def _check_port() -> None:
    """OSError where the port cannot be shared; zeroconf finds out too, but leaves a socket behind."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("", PORT))


def _confine(zeroconf: Zeroconf, devices: set[str]) -> None:
    """Hear the chosen interfaces only: Linux gives a wildcard socket every group that any process of
    the machine has joined, and every datagram that is sent to its port."""
    if sys.platform not in ("linux", "android"):
        return  # the numbers mean something else there
    options: list[tuple[int, int, Any]] = [
        (socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0),
        (socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0),
    ]
    if len(devices) == 1:
        options.append((socket.SOL_SOCKET, socket.SO_BINDTODEVICE, "".join(devices).encode() + b"\0"))
    for reader, option in product(zeroconf.engine.readers, options):
        with contextlib.suppress(OSError):  # an older kernel, or v6 options on v4: it hears more, no harm
            reader.transport.get_extra_info("socket").setsockopt(*option)
