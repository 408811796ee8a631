"""The mDNS discoverer: real zeroconf over real multicast, on loopback only.

Every test browses a service type of its own, so that runs beside it on this machine do not mix in.
"""

import asyncio
import contextlib
import os
import random
import secrets
import socket
import string
import threading

import ifaddr
import pytest
from edged_plugins import mdns
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from edged import Announcement, Discoverer, PluginError, Sighting

LETTERS = string.ascii_lowercase + "234567"
WAIT_S = 20  # for news that must come; nothing waits that long when all is well


def fingerprint():
    return "".join(random.choices(LETTERS, k=32))


@pytest.fixture
def service():
    return f"_ed{secrets.token_hex(5)}._tcp.local."


class Node:
    """One discoverer and the news it brought."""

    def __init__(self, service, name=None, rescan_s=3600.0):
        self.mdns = mdns.Mdns(service, rescan_s)
        self.fingerprint = name or fingerprint()
        self.news = asyncio.Queue()
        self.table = {}

    async def stop(self):
        await self.mdns.stop()

    async def start(self, port=4000, protocol=1, interfaces=("lo",)):
        announcement = Announcement(self.fingerprint, port, protocol, interfaces)
        await self.mdns.start(announcement, self._seen, self._lost)
        return self

    def _seen(self, sighting):
        self.table[sighting.fingerprint] = sighting
        self.news.put_nowait(sighting)

    def _lost(self, name):
        del self.table[name]
        self.news.put_nowait(name)

    async def hears(self, wanted):
        """Wait for the first news that `wanted` accepts."""
        async with asyncio.timeout(WAIT_S):
            while not wanted(news := await self.news.get()):
                pass
            return news


class Stranger:
    """Anybody on the network, who may publish whatever it likes."""

    def __init__(self, service):
        self.service = service
        self.zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
        self.sending = set()

    def info(self, label, txt, port=4000, server=None, addresses=("127.0.0.1",)):
        return AsyncServiceInfo(
            self.service,
            f"{label}.{self.service}",
            port=port,
            properties=txt,
            server=server or f"{label}.local.",
            parsed_addresses=list(addresses),
        )

    async def publish(self, *what, **more):
        info = self.info(*what, **more)
        self.sending.add(
            await self.zeroconf.async_register_service(info, cooperating_responders=True, strict=False)
        )

    async def publish_again(self, *what, **more):
        self.sending.add(await self.zeroconf.async_update_service(self.info(*what, **more)))

    async def withdraw(self):
        await self.zeroconf.async_unregister_all_services()

    async def stop(self):
        for task in self.sending:
            task.cancel()
        await asyncio.gather(*self.sending, return_exceptions=True)
        await self.zeroconf.async_close()


@contextlib.asynccontextmanager
async def running(*parties):
    """Stop them all at once, since each takes its time to say farewell."""
    try:
        yield parties
    finally:
        await asyncio.gather(*(party.stop() for party in parties))


def txt(name, version="1", *more):
    pairs = [f"v={version}", f"fp={name}", *more]
    return b"".join(bytes([len(pair)]) + pair.encode() for pair in pairs)


def test_the_hook_brings_a_discoverer_of_the_real_service_and_opens_nothing():
    before = os.listdir("/proc/self/fd")
    [entry] = mdns.edged_discoverers(settings={})
    assert entry.name == "mdns"
    assert isinstance(entry.discoverer, mdns.Mdns)
    assert entry.discoverer._service == "_edged._tcp.local."
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert {name for name in vars(Discoverer) if not name.startswith("_")} <= set(dir(entry.discoverer))


def test_nodes_on_one_machine_find_each_other_and_not_themselves(service):
    async def scenario():
        async with running(*(Node(service) for _ in range(3))) as nodes:
            for number, node in enumerate(nodes):
                await node.start(port=4000 + number, protocol=3)
            for node in nodes:
                async with asyncio.timeout(WAIT_S):
                    while len(node.table) < 2:
                        await node.news.get()
        expected = {
            node.fingerprint: Sighting(node.fingerprint, ("127.0.0.1",), 4000 + number, 3)
            for number, node in enumerate(nodes)
        }
        for node in nodes:
            assert node.table == {
                name: sighting for name, sighting in expected.items() if name != node.fingerprint
            }

    asyncio.run(scenario())


def test_a_node_that_comes_later_is_found_and_one_that_leaves_is_lost(service):
    async def scenario():
        first, second = Node(service), Node(service)
        async with running(first):
            await first.start()
            async with running(second):
                await second.start()
                await first.hears(lambda news: getattr(news, "fingerprint", None) == second.fingerprint)
                await second.hears(lambda news: getattr(news, "fingerprint", None) == first.fingerprint)
            await first.hears(lambda news: news == second.fingerprint)
            assert first.table == {}

    asyncio.run(scenario())


def test_start_and_stop_leave_no_task_thread_or_socket(service):
    async def scenario():
        node = Node(service)
        await node.stop()
        before = len(os.listdir("/proc/self/fd")), threading.enumerate(), asyncio.all_tasks()
        for _ in range(2):
            await node.start()
            assert len(os.listdir("/proc/self/fd")) > before[0]
            await node.stop()
            await node.stop()
            assert (len(os.listdir("/proc/self/fd")), threading.enumerate(), asyncio.all_tasks()) == before

    asyncio.run(scenario())


def test_only_the_fingerprint_the_port_and_the_version_are_told(service):
    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (_, stranger):
            await node.start(port=4711, protocol=12)
            observer = await Node(service).start()
            async with running(observer):
                await observer.hears(lambda news: getattr(news, "fingerprint", None) == node.fingerprint)
            cache = stranger.zeroconf.zeroconf.cache
            info = AsyncServiceInfo(service, f"{node.fingerprint}.{service}")
            assert await info.async_request(stranger.zeroconf.zeroconf, 3000)
            assert info.text == txt(node.fingerprint, "12")
            assert (info.server, info.port) == (f"{node.fingerprint}.local.", 4711)
            assert info.parsed_addresses() == ["127.0.0.1"]
            everything = repr(cache.cache)
            assert socket.gethostname() not in everything.replace(node.fingerprint, "")

    asyncio.run(scenario())


def test_on_loopback_no_socket_sends_or_listens_elsewhere(service):
    async def scenario():
        node = Node(service)
        async with running(node):
            await node.start()
            engine = node.mdns._zeroconf.zeroconf.engine
            assert [sender.sock_name[0] for sender in engine.senders] == ["127.0.0.1"]
            for reader in engine.readers:
                sock = reader.transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_IP, mdns._IP_MULTICAST_ALL) == 0
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"

    asyncio.run(scenario())


GOOD = "g" * 32
OTHER = "h" * 32
HOSTILE = {
    "no TXT": {"txt": b""},
    "no fingerprint": {"txt": b"\x03v=1"},
    "no version": {"txt": b"\x23fp=" + GOOD.encode()},
    "another's fingerprint": {"txt": txt(OTHER)},
    "a fingerprint twice": {"txt": txt(GOOD, "1", f"fp={OTHER}")},
    "a version twice": {"txt": txt(GOOD, "1", "V=2")},
    "a version that is no number": {"txt": txt(GOOD, "one")},
    "a negative version": {"txt": txt(GOOD, "-1")},
    "version zero": {"txt": txt(GOOD, "0")},
    "a huge version": {"txt": txt(GOOD, "1" * 40)},
    "a version in other digits": {"txt": txt(GOOD, "٣")},
    "an oversized TXT": {"txt": txt(GOOD, "1", "x=" + "y" * 250)},
    "a TXT whose length lies": {"txt": txt(GOOD) + b"\xffx"},
    "port 0": {"port": 0},
    "another host": {"server": "router.local."},
    "no address that leads anywhere": {"addresses": ("0.0.0.0", "224.0.0.1", "240.0.0.1", "::", "ff02::1")},
    "a link-local v6 address without scope": {"addresses": ("fe80::1",)},
    "a v4 address in v6 clothes": {"addresses": ("::ffff:192.0.2.1",)},
    "an instance in capitals": {"label": GOOD.upper(), "txt": txt(GOOD)},
    "an instance of another name": {"label": "printer", "txt": txt(GOOD)},
    "an instance with a longer name": {"label": GOOD + "2", "txt": txt(GOOD)},
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_record_is_not_believed_and_the_next_honest_node_is(service, case):
    async def scenario():
        node, honest = Node(service), Node(service)
        async with running(node, honest, Stranger(service)) as (*_, stranger):
            await node.start()
            await stranger.publish(**{"label": GOOD, "txt": txt(GOOD), **case})
            await honest.start()
            await node.hears(lambda news: getattr(news, "fingerprint", None) == honest.fingerprint)
            assert list(node.table) == [honest.fingerprint]

    asyncio.run(scenario())


def test_of_many_addresses_the_first_eight_that_lead_somewhere_are_told(service):
    addresses = ["0.0.0.0", "fe80::1", "2001:db8::1", *(f"192.0.2.{n}" for n in range(10, 22)), "169.254.1.1"]

    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (*_, stranger):
            await node.start()
            await stranger.publish(GOOD, txt(GOOD, "9"), addresses=addresses)
            sighting = await node.hears(lambda news: isinstance(news, Sighting))
            assert sighting == Sighting(GOOD, tuple(f"192.0.2.{n}" for n in range(10, 18)), 4000, 9)

    asyncio.run(scenario())


def test_an_unknown_key_of_a_later_version_is_passed_over(service):
    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (*_, stranger):
            await node.start()
            await stranger.publish(GOOD, txt(GOOD, "2", "x=1", "flag"))
            assert await node.hears(bool) == Sighting(GOOD, ("127.0.0.1",), 4000, 2)

    asyncio.run(scenario())


def test_of_two_instances_that_claim_one_fingerprint_only_the_one_of_that_name_counts(service):
    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (*_, stranger):
            await node.start()
            await stranger.publish(OTHER, txt(GOOD), port=6666)
            await stranger.publish(GOOD, txt(GOOD), port=4000)
            assert await node.hears(bool) == Sighting(GOOD, ("127.0.0.1",), 4000, 1)
            assert list(node.table) == [GOOD]

    asyncio.run(scenario())


def test_a_node_is_seen_again_when_its_address_changes(service):
    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (*_, stranger):
            await node.start()
            await stranger.publish(GOOD, txt(GOOD), addresses=("192.0.2.1",))
            assert await node.hears(bool) == Sighting(GOOD, ("192.0.2.1",), 4000, 1)
            await asyncio.sleep(1.2)  # a younger record would be kept beside the new one (RFC 6762, 10.2)
            await stranger.publish_again(GOOD, txt(GOOD), addresses=("192.0.2.2",))
            assert await node.hears(lambda news: news.addresses == ("192.0.2.2",))

    asyncio.run(scenario())


def test_a_flood_fills_a_bounded_table_and_its_end_makes_room(service):
    async def scenario():
        node, honest = Node(service), Node(service)
        async with running(node, honest, Stranger(service)) as (*_, stranger):
            await node.start()
            for _ in range(mdns.CANDIDATES_MAX + 16):
                name = fingerprint()
                await stranger.publish(name, txt(name))
            async with asyncio.timeout(WAIT_S):
                while len(node.table) < mdns.CANDIDATES_MAX:
                    await node.news.get()
            await honest.start()
            await asyncio.sleep(0.5)  # the honest node's records are heard and find no room
            assert len(node.table) == mdns.CANDIDATES_MAX
            assert len(node.mdns._timers) <= mdns.CANDIDATES_MAX
            assert len(node.mdns._tasks) <= mdns.ASKING_MAX + 2
            await stranger.withdraw()
            await node.hears(lambda news: getattr(news, "fingerprint", None) == honest.fingerprint)

    asyncio.run(scenario())


def test_records_that_come_in_pieces_are_asked_for(service):
    """A host that says only that an instance is there, until it is asked for the rest."""

    async def scenario():
        node = Node(service)
        async with running(node, Stranger(service)) as (*_, stranger):
            await node.start()
            info = stranger.info(GOOD, txt(GOOD))
            zeroconf = stranger.zeroconf.zeroconf
            await zeroconf.async_wait_for_start()
            zeroconf.registry.async_add(info)
            packet = zeroconf.generate_service_broadcast(info, None)
            packet.answers[:] = packet.answers[:1]
            zeroconf.async_send(packet)
            assert await node.hears(bool) == Sighting(GOOD, ("127.0.0.1",), 4000, 1)

    asyncio.run(scenario())


# --- this machine's own addresses -----------------------------------------------------------------


def adapter(name, index, *addresses):
    ips = [ifaddr.IP((a, 0, index) if ":" in a else a, 24, name) for a in addresses]
    return ifaddr.Adapter(name, name, ips, index=index)


LO = adapter("lo", 1, "127.0.0.1", "::1")
ETH = adapter("eth0", 2, "192.0.2.2", "fe80::2", "2001:db8::2")
WLAN = adapter("wlan0", 3, "198.51.100.3")
VETH = adapter("veth1", 4, "fe80::4")
MANY = adapter("big0", 5, *(f"203.0.113.{n}" for n in range(20)))


@pytest.mark.parametrize(
    ("interfaces", "adapters", "expected"),
    [
        ((), [LO, ETH, WLAN], ["192.0.2.2", "198.51.100.3", "2001:db8::2", "fe80::2"]),
        ((), [LO], ["127.0.0.1"]),
        ((), [LO, VETH, WLAN], ["198.51.100.3"]),
        ((), [], []),
        (("::1",), [LO], []),
        (("lo",), [LO, ETH], ["127.0.0.1"]),
        (("127.0.0.1",), [LO, ETH], ["127.0.0.1"]),
        (("veth1",), [LO, ETH, VETH], ["fe80::4"]),
        (("wlan0", "2001:db8::2"), [LO, ETH, WLAN], ["198.51.100.3", "2001:db8::2"]),
        (("tun9",), [LO, ETH], []),
        ((), [MANY], [f"203.0.113.{n}" for n in (0, 1, 10, 11, 12, 13, 14, 15)]),
    ],
)
def test_the_addresses_of_the_chosen_interfaces_are_told(interfaces, adapters, expected):
    assert [each.text for each in mdns.local_addresses(interfaces, adapters)] == expected


def test_when_the_addresses_of_this_machine_change_everything_begins_anew(service, monkeypatch):
    adapters = []
    monkeypatch.setattr(mdns.ifaddr, "get_adapters", lambda: adapters)

    async def scenario():
        late, other = Node(service, rescan_s=0.05), Node(service)
        async with running(late, other):
            await late.start()  # no interface yet: it waits for one
            assert late.mdns._zeroconf is None
            adapters.append(LO)
            await other.start()
            await late.hears(lambda news: getattr(news, "fingerprint", None) == other.fingerprint)
            await other.hears(lambda news: getattr(news, "fingerprint", None) == late.fingerprint)
            adapters.clear()
            await late.hears(lambda news: news == other.fingerprint)
            await other.hears(lambda news: news == late.fingerprint)

    asyncio.run(scenario())


def test_a_port_that_cannot_be_shared_is_an_error_that_says_so(service, monkeypatch):
    async def scenario(node):
        before = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(PluginError, match="to share UDP port") as refusal:
            await node.start()
        assert "static" in refusal.value.remedy
        await node.stop()
        assert (asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))) == before

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))  # without SO_REUSEPORT, so nobody may join
        monkeypatch.setattr(mdns, "PORT", holder.getsockname()[1])
        asyncio.run(scenario(Node(service)))
