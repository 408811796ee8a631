"""Starts worker processes, talks to them, and knows when one ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import framing, wire
from .config import Network, data_ports
from .errors import EdgedError, EngineError

log = logging.getLogger(__name__)
PREPARE_S = 30.0
STOP_S = 3.0  # a worker that does not end by itself within this is killed

OnEvent = Callable[[wire.Message], None]


class WorkerHandle:
    """The daemon's end of one worker process."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: socket.socket, on_event: OnEvent) -> None:
        self._process, self._pipe, self._on_event = process, pipe, on_event
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._watching: asyncio.Task[None] | None = None
        self.on_exit: Callable[[str], None] | None = None  # called once with the reason
        self.is_stopping = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._pipe)
        self._watching = asyncio.get_running_loop().create_task(self._watch(reader))

    async def call(self, kind: str, body: Any, timeout_s: float | None) -> dict[str, Any]:
        """The worker's answer. EngineError when it ends or stays silent before it answered."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._write(wire.pack(kind, body, request=number))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise EngineError(
                f"expected the worker to {kind} within {timeout_s:g} s; it did not", code="worker-silent"
            ) from error
        finally:
            self._pending.pop(number, None)

    async def prepare(
        self, group: str, rank: int, size: int, listens_for: Sequence[int], network: Network
    ) -> wire.Offered:
        """Have it open what the other ranks will dial."""
        ports = data_ports(network.data_ports)
        body = {
            "group": group,
            "rank": rank,
            "size": size,
            "listens_for": list(listens_for),
            "interfaces": list(network.interfaces),
            "ports": [ports.start, ports.stop],
        }
        return wire.read_body(wire.Offered, await self.call("prepare", body, PREPARE_S))

    def send(self, kind: str, body: Any = None) -> None:
        self._write(wire.pack(kind, body))

    async def stop(self) -> None:
        """Ask it to end, then make it; returns when the process is gone."""
        self.is_stopping = True
        with contextlib.suppress(EdgedError):
            self.send("stop")
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._watching is not None:
            await self._watching

    def kill(self) -> None:
        self.is_stopping = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _write(self, packed: bytes) -> None:
        if self._writer is None or self._writer.is_closing():
            raise EngineError("the worker has ended", code="worker-ended")
        self._writer.write(framing.frame(packed))

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Deliver answers and events until the worker closes its end, then report how it ended."""
        try:
            while (message := await framing.read(reader)) is not None:
                self._deliver(message)
        except EdgedError as error:
            log.error("worker spoke nonsense", extra={"pid": self.pid, "reason": str(error)})
            self.kill()
        assert self._writer is not None
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        code = await self._process.wait()
        reason = "it was stopped" if self.is_stopping else _how_it_ended(code)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(EngineError(f"the worker ended: {reason}", code="worker-ended"))
        if self.on_exit is not None:
            self.on_exit(reason)

    def _deliver(self, message: wire.Message) -> None:
        if not message.answers:
            self._on_event(message)
            return
        future = self._pending.get(message.answers)
        if future is None or future.done():
            return
        if message.kind != "error":
            future.set_result(message.body)
            return
        try:
            wire.raise_error(message.body)
        except EdgedError as error:
            future.set_exception(error)


class Supervisor:
    """All worker processes of this daemon."""

    def __init__(self) -> None:
        self.workers: dict[int, WorkerHandle] = {}

    async def spawn(self, on_event: OnEvent, inherit: Sequence[int] = ()) -> WorkerHandle:
        """A new worker in the daemon's process group; `inherit`: descriptors it may use by number."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "edged.worker"),
                *("--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # a library that prints must not reach the daemon's standard output
                pass_fds=(theirs.fileno(), *inherit),
            )
        except OSError as error:
            ours.close()
            raise EngineError(f"expected to start a worker; {error}") from error
        except BaseException:
            ours.close()  # a worker that was started all the same finds its pipe closed, and ends
            raise
        finally:
            theirs.close()
        worker = WorkerHandle(process, ours, on_event)
        try:
            await worker.start()
        except BaseException:
            worker.kill()
            ours.close()
            raise
        self.workers[worker.pid] = worker
        asyncio.ensure_future(process.wait()).add_done_callback(lambda _: self.workers.pop(worker.pid, None))
        return worker

    async def run_task(
        self,
        function: str,
        params: dict[str, Any],
        *,
        timeout_s: float | None,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
        inherit: Sequence[int] = (),
    ) -> dict[str, Any]:
        """`function(params, report)` in a process of its own; its result, or its error."""
        worker = await self.spawn(lambda message: on_progress(message.body), inherit)
        try:
            return await worker.call("task", {"function": function, "params": params}, timeout_s)
        except BaseException:
            worker.kill()
            raise
        finally:
            await asyncio.shield(worker.stop())

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in list(self.workers.values())))


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed (signal 9; the kernel does this when memory runs out)"
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}  # real-time signals have no name
        return f"killed by signal {-code} ({known.get(-code, 'real-time')})"
    return f"it exited with code {code}"
