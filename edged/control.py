"""The control socket: the command line's way in, protected by file permissions.

A UNIX stream socket with the framing of `edged.framing`. A request may carry open files
(SCM_RIGHTS), so that the daemon can store a file that it could not open by itself.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import grp
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import framing, wire
from .errors import EdgedError, InstanceError, ProtocolError

log = logging.getLogger(__name__)
CLIENTS_MAX = 64
ACCEPT_PAUSE_S = 1.0
FILES_MAX = 4  # open files one request may carry
GROUP = "edged"

Emit = Callable[[dict[str, Any]], Awaitable[None]]


class Handle(Protocol):
    """Answers one request; cancelled when its client goes away."""

    def __call__(
        self, kind: str, body: dict[str, Any], files: Sequence[int], emit: Emit
    ) -> Awaitable[dict[str, Any]]: ...


class ControlServer:
    def __init__(self, path: Path, handle: Handle, *, shared: bool) -> None:
        """`shared`: members of group `edged` may connect (0660), else only the owner (0600)."""
        self._path, self._handle, self._shared = path, handle, shared
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """InstanceError when another daemon listens there; a dead one's socket is replaced."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_dead(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(self._path))
        finally:
            os.umask(before)
        if self._shared:
            self._share()
        listener.listen(CLIENTS_MAX)
        listener.setblocking(False)
        self._listener = listener
        self._spawn(self._accept(listener))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def _share(self) -> None:
        try:
            os.chown(self._path, -1, grp.getgrnam(GROUP).gr_gid)
            os.chmod(self._path, 0o660)
        except (KeyError, OSError) as error:
            log.warning("control socket is for its owner only", extra={"reason": str(error)})

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:  # out of descriptors, say: others may be closed soon
                log.warning("control client not accepted", extra={"reason": str(error)})
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            client.setblocking(False)
            if len(self._tasks) > CLIENTS_MAX:
                client.close()
                continue
            self._spawn(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        """All requests of one client, at once; ends with the connection."""
        connection = _Connection(client)
        requests: set[asyncio.Task[None]] = set()
        try:
            while (received := await connection.receive()) is not None:
                task = asyncio.get_running_loop().create_task(self._answer(connection, *received))
                requests.add(task)
                task.add_done_callback(requests.discard)
        except ProtocolError as error:
            log.warning("control client refused", extra={"reason": str(error)})
            with contextlib.suppress(OSError):
                await connection.send(wire.pack_error(error, answers=0))
        finally:
            for task in requests:
                task.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            connection.close()

    async def _answer(self, connection: _Connection, message: wire.Message, files: list[int]) -> None:
        async def emit(event: dict[str, Any]) -> None:
            await connection.send(wire.pack("event", event, answers=message.request))

        try:
            document = await self._handle(message.kind, message.body, files, emit)
            packed = wire.pack("ok", document, answers=message.request)
        except EdgedError as error:
            packed = wire.pack_error(error, answers=message.request)
        except Exception as error:  # outermost frame of a connection: one request must not end the daemon
            log.exception("control request failed", extra={"kind": message.kind})
            failure = EdgedError(f"internal error: {type(error).__name__}: {error}")
            packed = wire.pack_error(failure, answers=message.request)
        finally:
            for file in files:
                os.close(file)
        with contextlib.suppress(OSError):
            await connection.send(packed)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection:
    """One client; descriptors that came with a header's first bytes belong to that header."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._files: list[int] = []
        self._sending = asyncio.Lock()

    async def receive(self) -> tuple[wire.Message, list[int]] | None:
        prefix = await self._exactly(4)
        if prefix is None:
            return None
        packed = await self._exactly(framing.length_of(prefix))
        if packed is None:
            return None
        files, self._files = self._files, []
        return wire.unpack(packed), files

    async def send(self, packed: bytes) -> None:
        async with self._sending:
            await asyncio.get_running_loop().sock_sendall(self._sock, framing.frame(packed))

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._sock.close()

    async def _exactly(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            part = await self._some()
            if not part:
                return None
            self._buffer += part
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def _some(self) -> bytes:
        while True:
            try:
                part, ancillary, _, _ = self._sock.recvmsg(
                    65536, socket.CMSG_SPACE(FILES_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._readable()
                continue
            except ConnectionError:
                return b""
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._keep(content)
            return part

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        loop.add_reader(self._sock, event.set)
        try:
            await event.wait()
        finally:
            loop.remove_reader(self._sock)

    def _keep(self, content: bytes) -> None:
        files = array.array("i")
        files.frombytes(content[: len(content) - len(content) % files.itemsize])
        self._files += files
        if len(self._files) > FILES_MAX:
            raise ProtocolError(f"expected at most {FILES_MAX} open files")


def _remove_dead(path: Path) -> None:
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise InstanceError(f"expected nobody to listen at {path}; a daemon does", remedy="stop it first")
