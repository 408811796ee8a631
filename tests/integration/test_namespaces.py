"""Two nodes, each in a network of its own, with a cable between: real multicast, real addresses, and
what happens when the cable is pulled. Needs root, for network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import GUARD_S, WORK, Document, Node, Nodes, pair, wait_no_workers, wait_online, wait_until

pytestmark = pytest.mark.network

LOSS_S = 50.0  # ten times the 5 s within which a loss is noticed
LONG = {"model": "smol", "prompt": "Hi", "n": 1500, "temperature": 0.0, "ignore_eos": True}
SUBNET = "192.0.2"  # for documentation (RFC 5737): nobody's network


@dataclass(frozen=True)
class Network:
    """A namespace and its end of the cable."""

    namespace: str
    device: str
    address: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def ip(self, *arguments: str) -> None:
        ip("-n", self.namespace, *arguments)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=GUARD_S, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespace(name: str) -> Iterator[str]:
    ip("netns", "add", name)
    try:
        yield name
    finally:
        ip("netns", "delete", name)  # its end of the cable goes with it


@pytest.fixture
def cable() -> Iterator[tuple[Network, Network]]:
    """Two namespaces joined by a veth pair, with nothing else in them."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt install iproute2")
    with contextlib.ExitStack() as stack:
        ends = []
        for number, side in enumerate("ab", start=1):
            try:
                name = stack.enter_context(namespace(f"edged-{os.getpid()}-{side}"))
            except OSError as error:
                pytest.skip(f"needs network namespaces: {error}")
            ends.append(Network(name, f"edged-{side}", f"{SUBNET}.{number}"))
        a, b = ends
        try:
            a.ip("link", "add", a.device, "type", "veth", "peer", "name", b.device, "netns", b.namespace)
        except OSError as error:
            pytest.skip(f"needs veth devices: {error}")
        for end in ends:
            end.ip("address", "add", f"{end.address}/24", "dev", end.device)
            end.ip("link", "set", "lo", "up")
            end.ip("link", "set", end.device, "up")
        yield a, b


def rows(node: Node) -> list[Document]:
    return list(node.call("peers")["peers"])


def start(nodes: Nodes, name: str, network: Network) -> Node:
    plugins = ("mdns", *WORK)
    made = nodes.make(name, plugins, interfaces=[network.device], prefix=network.inside)
    return made.start()


def test_two_nodes_find_each_other_pair_work_and_lose_each_other(
    nodes: Nodes, cable: tuple[Network, Network], smol: Path
) -> None:
    laptop, phone = (start(nodes, name, end) for name, end in zip(("laptop", "phone"), cable, strict=True))
    for node in (laptop, phone):
        node.wait_ready()

    # seen by multicast, trusted by nobody
    for node, other in ((laptop, phone), (phone, laptop)):
        fingerprint = other.call("status")["fingerprint"]
        wait_until("the other to be seen", lambda n=node: [row["state"] for row in rows(n)] == ["seen"])
        (row,) = rows(node)
        assert (row["fingerprint"], row["trusted"], row["node_id"]) == (fingerprint, False, None)

    # paired, they are one row: the member
    pair(laptop, phone)
    wait_online([laptop, phone])
    for node, end in ((laptop, cable[1]), (phone, cable[0])):
        (row,) = rows(node)
        assert (row["trusted"], row["address"]) == (True, end.address)

    # the workers talk over the cable, too
    laptop.add(smol, "smol")
    asked = LONG | {"strategy": "layers", "nodes": ["laptop", "phone"]}
    document = laptop.call("generate", asked | {"n": 8})
    assert len(document["tokens"]) == 8
    assert document["measured"]["bytes_sent"] > 0

    # the cable is pulled in the middle of a job
    job = laptop.job(asked | {"n": 300}).until_token()
    cable[1].ip("link", "set", cable[1].device, "down")
    document = job.document()  # alone
    assert len(document["tokens"]) == 300
    assert [row["lost"] for row in document["measured"]["recoveries"]] == [phone.node_id]
    wait_until("phone to be offline", lambda: laptop.peers()["phone"]["state"] == "offline", LOSS_S)
    wait_no_workers(phone)  # the laptop's stays warm
    alone = laptop.call("generate", LONG | {"n": 4, "strategy": "local"})
    assert len(alone["tokens"]) == 4

    # and put back
    cable[1].ip("link", "set", cable[1].device, "up")
    wait_online([laptop, phone])
    assert len(laptop.call("generate", asked | {"n": 8})["tokens"]) == 8
