"""The static discoverer: what the profile names, and nothing else."""

import asyncio

import pytest
from edged_plugins import static

from edged import Announcement, ConfigError, Sighting

ALICE, BOB, SELF = "a" * 32, "b" * 32, "s" * 32


def sightings(*peers, fingerprint=SELF):
    """What a node with this fingerprint hears, from start to stop."""
    [entry] = static.edged_discoverers(settings={"peers": list(peers)})
    found, gone = [], []

    async def run():
        announcement = Announcement(fingerprint, port=4000, protocol=7)
        await entry.discoverer.start(announcement, found.append, gone.append)
        await entry.discoverer.stop()

    asyncio.run(run())
    assert gone == []
    return found


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.7:47100", "192.0.2.7", 47100),
        ("laptop.home.arpa:1", "laptop.home.arpa", 1),
        ("my_phone:65535", "my_phone", 65535),
        ("[2001:db8::1]:47100", "2001:db8::1", 47100),
        ("[fe80::1%eth0]:47100", "fe80::1%eth0", 47100),
    ],
)
def test_each_named_peer_is_reported_once_with_its_address_unresolved(text, host, port):
    assert sightings(f"{text}#{ALICE}") == [Sighting(ALICE, (host,), port, 7)]


def test_no_peer_is_reported_where_none_is_named():
    assert sightings() == []
    assert static.read({}) == static.Settings()


def test_a_list_that_all_nodes_share_does_not_make_a_node_see_itself():
    peers = [f"alice:1#{ALICE}", f"bob:2#{BOB}"]
    assert [each.fingerprint for each in sightings(*peers, fingerprint=ALICE)] == [BOB]


def test_two_addresses_of_one_peer_are_one_sighting():
    assert sightings(f"lan:1#{ALICE}", f"bob:1#{BOB}", f"vpn:1#{ALICE}", f"lan:1#{ALICE}") == [
        Sighting(ALICE, ("lan", "vpn"), 1, 7),
        Sighting(BOB, ("bob",), 1, 7),
    ]


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "laptop",
        "laptop:47100",
        f"laptop#{ALICE}",
        f":47100#{ALICE}",
        f"laptop:0#{ALICE}",
        f"laptop:65536#{ALICE}",
        f"laptop:-1#{ALICE}",
        f"laptop:٣#{ALICE}",
        f"laptop:47100#{ALICE}x",
        f"laptop:47100#{ALICE[1:]}",
        f"laptop:47100#{ALICE.upper()}",
        f"2001:db8::1:47100#{ALICE}",
        f"two words:47100#{ALICE}",
        f"user@laptop:47100#{ALICE}",
        f"laptop:47100#{ALICE}\n",
        f"{'x' * 300}:47100#{ALICE}",
    ],
)
def test_an_entry_that_is_not_one_is_refused_before_anything_starts(peer):
    with pytest.raises(ConfigError, match="host:port#fingerprint") as refusal:
        static.edged_discoverers(settings={"peers": [peer]})
    assert len(str(refusal.value)) < 250
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peer": []}, "did you mean plugin.static.peers"),
        ({"colour": "red"}, "did you mean plugin.static.peers"),
        ({"peers": f"laptop:1#{ALICE}"}, "a list of texts"),
        ({"peers": [1]}, "a list of texts"),
        ({"peers": [f"laptop:1#{ALICE}"] * 65}, "at most 64"),
    ],
)
def test_settings_of_another_shape_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        static.edged_discoverers(settings=settings)
