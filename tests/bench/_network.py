"""Network namespaces for nodes, joined by a bridge or by the delay relay. Needs root."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SUBNET = "198.51.100"  # for documentation (RFC 5737): nobody's network
DEVICE = "edged0"
RELAY_MTU = 9000  # one frame for an all-reduce of 8 KiB: the relay pays by frame
COMMAND_S = 30.0
BUCKET = "64kb"  # of a token bucket: lets a token's sums through at once
LINE = "3kb"  # of one that is a line: a frame or two pass at once
ECHO_PORT, ECHOES = 47_000, 21
ECHO = f"""
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], {ECHO_PORT}))
    sock.settimeout(10)
    print("ready", flush=True)
    for _ in range({ECHOES}):
        sock.sendto(*sock.recvfrom(64))
"""
ASK = f"""
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.connect((sys.argv[1], {ECHO_PORT}))
    sock.settimeout(10)
    for _ in range({ECHOES}):
        started = time.perf_counter()
        sock.send(b"?")
        sock.recv(64)
        print(time.perf_counter() - started)
"""


@dataclass
class Network:
    """`namespaces` with one device each, whose addresses are `address(number)`."""

    namespaces: list[str]
    relay: subprocess.Popen[bytes] | None = None

    def prefix(self, number: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespaces[number])

    def address(self, number: int) -> str:
        return f"{SUBNET}.{number + 1}"

    def limit(self, mbit: int | None, burst: str = BUCKET) -> None:
        """Let each device send so much a second, by a token bucket; None: as much as it can."""
        for name in self.namespaces:
            rate = () if mbit is None else ("tbf", "rate", f"{mbit}mbit", "burst", burst, "latency", "400ms")
            what = ("replace", "dev", DEVICE, "root", *rate) if rate else ("del", "dev", DEVICE, "root")
            _run("tc", "-n", name, "qdisc", *what)

    def delay(self, delay_ms: float, mbit: float = 0) -> None:
        """Have the relay pass every frame on so much later."""
        assert self.relay is not None
        assert self.relay.stdin is not None
        self.relay.stdin.write(f"{delay_ms} {mbit}\n".encode())
        self.relay.stdin.flush()

    def relay_seconds(self) -> float:
        """Processor time of the relay so far."""
        if self.relay is None:
            return 0.0
        times = psutil.Process(self.relay.pid).cpu_times()
        return times.user + times.system

    def rtt_ms(self) -> float:
        """Median round trip of a small datagram between the first two namespaces."""
        server = subprocess.Popen(
            [*self.prefix(1), sys.executable, "-c", ECHO, self.address(1)], stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            asked = _run(*self.prefix(0), sys.executable, "-c", ASK, self.address(1))
        finally:
            server.kill()
            server.communicate()
        return 1000 * statistics.median(map(float, asked.split()))


@contextlib.contextmanager
def network(count: int, has_relay: bool = False) -> Iterator[Network]:
    """So many namespaces, each with one device on a common link. OSError where none can be made."""
    with contextlib.ExitStack() as stack:
        hub, *names = (
            stack.enter_context(_namespace(f"edged-{os.getpid()}-{number}")) for number in range(count + 1)
        )
        made = Network(names)
        if has_relay:
            made.relay = stack.enter_context(_relay(hub, [f"tap{number}" for number in range(count)]))
        else:
            _run("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
            _run("ip", "-n", hub, "link", "set", "hub", "up")
        for number, name in enumerate(names):
            (_join_relay if has_relay else _join_bridge)(hub, name, number)
            _run("ip", "-n", name, "address", "add", f"{made.address(number)}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield made


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[str]:
    _run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        _run("ip", "netns", "delete", name)


def _join_bridge(hub: str, name: str, number: int) -> None:
    port = f"port{number}"
    _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
    _run("ip", "-n", hub, "link", "set", port, "master", "hub")
    _run("ip", "-n", hub, "link", "set", port, "up")


def _join_relay(hub: str, name: str, number: int) -> None:
    _run("ip", "-n", hub, "link", "set", f"tap{number}", "netns", name)
    _run("ip", "-n", name, "link", "set", f"tap{number}", "name", DEVICE, "mtu", str(RELAY_MTU))


@contextlib.contextmanager
def _relay(hub: str, taps: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    program = str(Path(__file__).with_name("_relay.py"))
    process = subprocess.Popen(
        ["ip", "netns", "exec", hub, sys.executable, program, *taps],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise OSError("expected the relay to open its devices")
        yield process
    finally:
        process.stdin.close()  # its end of file is the request to end
        try:
            process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
