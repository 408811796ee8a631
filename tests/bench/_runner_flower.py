"""Flower's server, or all of its clients: `_runner_flower.py server` and `... clients`; with Flower's Python.

The server is what flwr's `start_server` is made of: its gRPC server over TLS, its client manager, and
`Server.fit_round` with its own FedAvg. Its clients are streams of one channel; each answers with the same
serialised bytes. Nothing of edged is imported here.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import resource
import socket
import sys
import threading
import time
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import grpc
import numpy as np
from _serve import serve
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

R, BLOCKS, HIDDEN, HEADS = 8, 30, 576, 192  # as in _runner_rounds
WEIGHT = 10  # rows of every client
MESSAGE_BYTES_MAX = 512 << 20
JOIN = "/flwr.proto.FlowerService/Join"
JOIN_S = 60.0
logging.getLogger("flwr").setLevel(logging.ERROR)


def arrays(value: float) -> list[np.ndarray]:
    """An adapter's: A and B of q and v in each block, F32."""
    shapes = [shape for rows in (HIDDEN, HEADS) for shape in ((R, HIDDEN), (rows, R))] * BLOCKS
    return [np.full(shape, value, np.float32) for shape in shapes]


class Server:
    def start(self, clients: int, fraction: float) -> list[Any]:
        """The port, and the certificate that clients trust."""
        from flwr.server.client_manager import SimpleClientManager
        from flwr.server.server import Server as Flower
        from flwr.server.strategy import FedAvg
        from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server

        key, certificate = credential()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self._manager = SimpleClientManager()
        self._grpc = start_grpc_server(
            self._manager, f"127.0.0.1:{port}", certificates=(certificate, certificate, key)
        )
        strategy = FedAvg(
            fraction_fit=fraction,
            fraction_evaluate=0.0,
            min_fit_clients=1,
            min_available_clients=clients,
            initial_parameters=ndarrays_to_parameters(arrays(0.0)),
        )
        self._flower = Flower(client_manager=self._manager, strategy=strategy)
        self._flower.parameters = ndarrays_to_parameters(arrays(0.0))
        return [port, certificate.decode()]

    def meet(self, clients: int) -> bool:
        return bool(self._manager.wait_for(clients, timeout=JOIN_S))

    def round(self, number: int) -> list[float]:
        """Seconds of a round, wall and processor; bytes of the most memory so far; updates."""
        began, before = time.perf_counter(), time.process_time()
        found = self._flower.fit_round(server_round=number + 1, timeout=None)
        assert found is not None
        parameters, _, (results, failures) = found
        self._flower.parameters = parameters
        spent = [time.perf_counter() - began, time.process_time() - before]
        if failures:
            raise RuntimeError(f"{len(failures)} clients failed, the first with {failures[0]!r}")
        mean = parameters_to_ndarrays(parameters)
        assert all(np.allclose(array, 0.5, rtol=1e-3) for array in mean)  # of all; it sums in F32
        return [*spent, 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, float(len(results))]

    def held(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def end(self) -> None:
        self._grpc.stop(grace=0.5)


class Clients:
    def start(self, port: int, certificate: str, clients: int) -> None:
        from flwr.proto import transport_pb2 as pb

        status = pb.Status(code=pb.Code.Value("OK"), message="")
        parameters = ndarrays_to_parameters(arrays(0.5))
        answer = pb.ClientMessage.FitRes(
            status=status,
            parameters=pb.Parameters(tensors=parameters.tensors, tensor_type=parameters.tensor_type),
            num_examples=WEIGHT,
        )
        self._answer = pb.ClientMessage(fit_res=answer).SerializeToString()
        threading.Thread(
            target=lambda: asyncio.run(self._play(port, certificate, clients)), daemon=True
        ).start()

    async def _play(self, port: int, certificate: str, clients: int) -> None:
        limits = [
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ]
        trusted = grpc.ssl_channel_credentials(certificate.encode())
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, options=limits) as channel:
            join = channel.stream_stream(JOIN)  # bytes as they are, both ways
            await asyncio.gather(*(self._one(join()) for _ in range(clients)))

    async def _one(self, call: Any) -> None:
        while await call.read() is not grpc.aio.EOF:
            await call.write(self._answer)

    def end(self) -> None:
        """Its thread ends with the process."""


def credential() -> tuple[bytes, bytes]:
    """A key and its own certificate for 127.0.0.1, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


if __name__ == "__main__":
    serve({"server": Server, "clients": Clients}[sys.argv[1]]())
