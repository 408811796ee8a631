"""The engine that spreads a model's layers over ranks by llama.cpp's RPC backend, inside the channel.

Rank 0 runs libllama: its own layers on its CPU, those of each other rank on a remote device whose
loopback port is one end of a tunnel. Every other rank runs llama.cpp's RPC server over its CPU, and
carries the bytes. On a broken or silent peer rank 0 shuts the tunnel, and ggml then aborts the
process: that is this worker's end, and the daemon's to report.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_size_t, c_void_p
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import llama_cpp

from edged import Channel, EdgedError, EngineError, EngineSpec, Step

from . import _libllama, _llama_describe
from ._libraries import open_library
from ._llama_engine import LlamaEngine
from ._llama_tunnel import LOOPBACK, Link, Tunnels, free_port, listening

log = logging.getLogger(__name__)
SERVERS_MAX = 16  # GGML_RPC_MAX_SERVERS


def load(spec: EngineSpec, channel: Channel) -> RpcDriver | RpcServer:
    """Rank 0 opens the model over all ranks; every other rank serves its memory and its cores."""
    if not 2 <= len(spec.roles) <= SERVERS_MAX:
        raise EngineError(f"llama_rpc spreads a model over 2 to {SERVERS_MAX} nodes; {len(spec.roles)} came")
    if any(a.layers[1] != b.layers[0] for a, b in pairwise(spec.roles)):
        raise EngineError("llama_rpc cuts a model between layers only, one stage a node")
    timeout_s = float(spec.settings["timeout_s"])
    return RpcServer(spec, channel, timeout_s) if spec.rank else RpcDriver(spec, channel, timeout_s)


def ranges(spec: EngineSpec) -> list[tuple[int, int]]:
    """Rank 0 reads the whole file and hands the others what they hold."""
    return [] if spec.rank else [(0, max(tensor.offset + tensor.bytes for tensor in spec.model.tensors))]


class RpcDriver:
    """Rank 0: edged's `Engine` over a model whose layers lie on several ranks."""

    def __init__(self, spec: EngineSpec, channel: Channel, timeout_s: float) -> None:
        links = [listening(role.rank) for role in spec.roles[1:]]
        self._tunnels = Tunnels(channel, links, timeout_s)
        self._error: EdgedError | None = None
        self._is_closing = threading.Event()
        self._carrier = threading.Thread(target=self._carry, name="llama-rpc", daemon=True)
        self._carrier.start()
        try:
            self._engine = LlamaEngine(spec, self._spread(spec, [link.port for link in links]))
        except BaseException:
            self._stop_carrying()
            raise

    def _spread(self, spec: EngineSpec, ports: Sequence[int]) -> int:
        """libllama's model: rank 0's layers on the CPU, the rest on the devices behind `ports`."""
        devices = (c_void_p * (len(ports) + 1))(*(_device(port) for port in ports), None)
        counts = [role.layers[1] - role.layers[0] for role in spec.roles[1:]]
        counts[-1] += 1  # the output head goes with the last layers, as the plan counts it
        split = (ctypes.c_float * llama_cpp.llama_max_devices())(*counts)
        return _libllama.open_model(
            spec.model_path,
            devices=ctypes.cast(devices, c_void_p),
            n_gpu_layers=sum(counts),
            split_mode=llama_cpp.LLAMA_SPLIT_MODE_LAYER,
            tensor_split=ctypes.cast(split, POINTER(ctypes.c_float)),
        )

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._engine.end_tokens

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        return self._engine.encode(prompt, raw)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return self._engine.decode(tokens)

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        return self._engine.open(sequence, prompt, positions)

    def lanes(self, sequences: int) -> int:
        return self._engine.lanes(sequences)

    def begin(self, steps: Sequence[Step]) -> None:
        self._engine.begin(steps)

    def finish(self) -> list[int | None]:
        if self._error is not None:
            raise self._error
        return self._engine.finish()

    def release(self, sequence: int) -> None:
        self._engine.release(sequence)

    def follow(self, timeout_s: float) -> None:
        raise EngineError("rank 0 drives")

    def close(self) -> None:
        """Give the ranks' memory back, unless one is gone: then ggml would abort, and the end of the
        process does it."""
        if self._error is None:
            self._engine.close()
        self._stop_carrying()

    def _stop_carrying(self) -> None:
        """Until the carrier has ended, whose the channel's sockets are: ZeroMQ's may not be closed under
        another thread. Each of its calls ends by a timeout; a daemon that waits less ends the process."""
        self._is_closing.set()
        self._carrier.join()

    def _carry(self) -> None:
        """The channel's thread, from here on."""
        try:
            while not self._is_closing.is_set():
                self._tunnels.turn()
        except EdgedError as error:
            self._error = error
            log.warning("llama_rpc lost a rank, and libllama ends this process", extra={"reason": str(error)})
        finally:
            self._tunnels.close()


class RpcServer:
    """Every other rank: llama.cpp's RPC server on loopback, and the tunnel to rank 0."""

    end_tokens: frozenset[int] = frozenset()

    def __init__(self, spec: EngineSpec, channel: Channel, timeout_s: float) -> None:
        self._port = free_port()
        self._tunnels = Tunnels(channel, [Link(0, port=self._port)], timeout_s)
        self._server = threading.Thread(target=self._serve, args=(spec.threads,), name="rpc", daemon=True)
        self._server.start()

    def follow(self, timeout_s: float) -> None:
        """Carry bytes for so long; EngineError when the server has ended."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if not self._server.is_alive():
                raise EngineError("llama.cpp's RPC server ended")
            self._tunnels.turn()

    def encode(self, prompt: str | Sequence[Mapping[str, str]], raw: bool) -> list[int]:
        raise EngineError("rank 0 encodes")

    def decode(self, tokens: Sequence[int]) -> bytes:
        raise EngineError("rank 0 decodes")

    def open(self, sequence: int, prompt: Sequence[int], positions: int) -> int | None:
        raise EngineError("rank 0 drives")

    def lanes(self, sequences: int) -> int:
        raise EngineError("rank 0 drives")

    def begin(self, steps: Sequence[Step]) -> None:
        raise EngineError("rank 0 drives")

    def finish(self) -> list[int | None]:
        raise EngineError("rank 0 drives")

    def release(self, sequence: int) -> None:
        raise EngineError("rank 0 drives")

    def close(self) -> None:
        """Shut the tunnel. The server has no end of its own; it goes with the process."""
        self._tunnels.close()

    def _serve(self, threads: int) -> None:
        lib = _libraries()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it prints a line for each connection
        devices = (c_void_p * 1)(lib.reg_dev_get(lib.cpu_reg(), 0))
        lib.start_server(f"{LOOPBACK}:{self._port}".encode(), None, threads, 1, devices)


@dataclass(frozen=True, slots=True)
class _Functions:
    """What is called of ggml's libraries, with the signatures of its headers (ggml-rpc.h, ggml-backend.h)."""

    add_server: Any  # (endpoint) -> ggml_backend_reg_t
    start_server: Any  # (endpoint, cache folder, threads, devices, ggml_backend_dev_t *); does not return
    reg_dev_get: Any  # (ggml_backend_reg_t, index) -> ggml_backend_dev_t
    cpu_reg: Any  # () -> ggml_backend_reg_t


@functools.cache
def _libraries() -> _Functions:
    """ggml's RPC library, beside the libllama that uses it. Its version was checked with libllama's."""
    rpc = open_library("ggml-rpc", "build llama-cpp-python with its RPC backend (CMAKE_ARGS=-DGGML_RPC=on)")
    base, cpu = open_library("ggml-base"), open_library("ggml-cpu")
    found = _Functions(
        rpc.ggml_backend_rpc_add_server,
        rpc.ggml_backend_rpc_start_server,
        base.ggml_backend_reg_dev_get,
        cpu.ggml_backend_cpu_reg,
    )
    found.add_server.restype, found.add_server.argtypes = c_void_p, (c_char_p,)
    of_server = (c_char_p, c_char_p, c_size_t, c_size_t, POINTER(c_void_p))
    found.start_server.restype, found.start_server.argtypes = None, of_server
    found.reg_dev_get.restype, found.reg_dev_get.argtypes = c_void_p, (c_void_p, c_size_t)
    found.cpu_reg.restype, found.cpu_reg.argtypes = c_void_p, ()
    return found


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """libllama as it should be, and its RPC library beside it."""
    answer = _llama_describe.check(settings)
    _libraries()
    return answer


def _device(port: int) -> Any:
    """The remote device behind a loopback port; ggml aborts where nobody answers."""
    lib = _libraries()
    registry = lib.add_server(f"{LOOPBACK}:{port}".encode())
    if not registry:
        raise EngineError("llama.cpp's RPC server offers no device")
    return lib.reg_dev_get(registry, 0)
