"""The data plane between the workers of a plan: one ZeroMQ PAIR with CURVE per pair of ranks.

Each worker makes a key pair of its own for the plan; a listening socket admits one key, that of the
rank it waits for. Everything but the ZAP answers runs on the worker's main thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import zmq

from . import wire
from .errors import PeerError, ProtocolError
from .transport import ZAP_ENDPOINT, answer_zap, bind, endpoint, new_keys, secure_client, secure_server

OPEN_S = 20.0  # for all ranks to reach each other
SEND_S = 60.0  # for one message to be taken over by ZeroMQ
QUEUE_MESSAGES = 64  # in flight per link; ranks run in lock-step, so few are
BOX_BYTES = 33  # of a CURVE MESSAGE around a frame (RFC 26)
SHORT_BYTES_MAX = 255  # of a ZMTP frame whose head takes 2 bytes; a longer one's takes 9 (RFC 23)


class ZmqChannel:
    """Connections to the other ranks. `listen`, exchange public keys, `open`, then send and receive."""

    def __init__(self, rank: int, size: int, interfaces: Sequence[str], ports: range) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = 0
        self._interfaces, self._ports = interfaces, ports
        self._context = zmq.Context()
        self._keys = new_keys()
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._timeouts: dict[int, float] = {}
        self._admitted: dict[bytes, bytes] = {}  # ZAP domain of a rank -> the one key it admits
        self._keys_known = threading.Event()
        self._zap = threading.Thread(target=self._serve_zap, name="zap", daemon=True)

    @property
    def public_key(self) -> bytes:
        return self._keys[0]

    def listen(self, ranks: Sequence[int]) -> dict[int, int]:
        """Bind a socket for each rank that will dial; rank -> port."""
        if ranks:
            self._zap.start()
        taken = {}
        for rank in ranks:
            sock = self._socket()
            secure_server(sock, self._keys[1])
            sock.zap_domain = _domain(rank)
            taken[rank] = bind(sock, self._interfaces, self._ports)
            self._links[rank] = sock
        return taken

    def open(self, group: str, ends: Mapping[int, tuple[bytes, str, int]]) -> None:
        """Connect to every rank of `ends`: rank -> (public key, address, port); port 0 where it dials.

        Returns when each link has carried a greeting both ways; PeerError names the rank otherwise.
        """
        self._admitted = {_domain(rank): key for rank, (key, _, _) in ends.items()}
        self._keys_known.set()
        for rank, (key, address, port) in ends.items():
            if rank in self._links:
                continue
            sock = self._socket()
            secure_client(sock, self._keys, key)
            sock.connect(endpoint(address, port))
            self._links[rank] = sock
        greeting = {"k": "greet", "group": group, "rank": self.rank}
        for rank in ends:
            self._links[rank].sndtimeo = round(OPEN_S * 1000)
            self.send(rank, greeting)
        for rank in ends:
            header, _ = self.receive(rank, OPEN_S)
            self._links[rank].sndtimeo = round(SEND_S * 1000)
            if header != {"k": "greet", "group": group, "rank": rank}:
                raise ProtocolError(f"expected the greeting of rank {rank}")

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        packed, sock = msgpack.packb(header), self._links[to]
        try:
            sock.send_multipart([packed, *frames])
        except zmq.Again as error:
            raise PeerError(f"rank {to} took no message for {int(sock.sndtimeo) / 1000:g} s") from error
        self.bytes_sent += sum(_on_wire(memoryview(frame).nbytes) for frame in (packed, *frames))

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        sock = self._links[source]
        if self._timeouts.get(source) != timeout_s:
            sock.rcvtimeo = max(1, round(timeout_s * 1000))
            self._timeouts[source] = timeout_s
        try:
            frames = sock.recv_multipart(copy=False)
        except zmq.Again as error:
            raise PeerError(f"rank {source} sent nothing for {timeout_s:g} s") from error
        if len(frames) > 1 + wire.FRAMES_MAX:
            raise ProtocolError(f"expected at most {wire.FRAMES_MAX} frames; {len(frames) - 1} came")
        return wire.unpack_map(frames[0].buffer), [frame.buffer for frame in frames[1:]]

    def poll(self, source: int, timeout_s: float) -> bool:
        return bool(self._links[source].poll(round(timeout_s * 1000)))

    def close(self) -> None:
        self._keys_known.set()  # whoever knocked before `open` is refused, and not waited for
        for sock in self._links.values():
            sock.close(linger=500)
        self._context.term()

    def _socket(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.PAIR)
        sock.maxmsgsize = wire.FRAME_BYTES_MAX
        sock.sndhwm = sock.rcvhwm = QUEUE_MESSAGES
        return sock

    def _serve_zap(self) -> None:
        """Answer libzmq's questions until the context ends; wait for the keys before the first answer."""
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        try:
            zap.bind(ZAP_ENDPOINT)
            while True:
                frames = zap.recv_multipart()
                self._keys_known.wait(OPEN_S)
                expected = self._admitted.get(frames[2])
                user = f"rank-{frames[2].decode(errors='replace')}"
                zap.send_multipart(
                    answer_zap(frames, lambda key: user if key == expected else None, frames[2])  # noqa: B023 - called at once
                )
        except zmq.ContextTerminated:
            pass
        finally:
            zap.close()


def _on_wire(count: int) -> int:
    """Bytes of a TCP stream that carry one frame of `count` bytes."""
    boxed = count + BOX_BYTES
    return boxed + (2 if boxed <= SHORT_BYTES_MAX else 9)


def _domain(rank: int) -> bytes:
    return f"rank:{rank}".encode()
