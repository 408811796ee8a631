"""The control socket: real clients at a real UNIX socket, files passed along, clients that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edged import client as clients
from edged import framing, wire
from edged.client import Client, Endpoint
from edged.control import CLIENTS_MAX, FILES_MAX, ControlServer, Emit
from edged.errors import EngineError, InstanceError, ProtocolError

PATIENCE_S = 30.0  # a hang, not a slow machine


class Handler:
    """Answers `echo`, reads files for `read`, fails for `fail`, streams for `count`, hangs for `hang`."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go = asyncio.Event()
        self.files: list[int] = []

    async def __call__(
        self, kind: str, body: dict[str, Any], files: Sequence[int], emit: Emit
    ) -> dict[str, Any]:
        self.files = list(files)
        match kind:
            case "read":
                return {"contents": [os.read(file, 100) for file in files]}
            case "fail":
                raise EngineError("no memory", remedy="free some", code="memory")
            case "mistake":
                raise KeyError("oh")
            case "count":
                for number in range(body["to"]):
                    await emit({"n": number})
            case "meet":
                await self.go.wait()
            case "go":
                self.go.set()
            case "hang":
                self.running.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
        return dict(body)


@contextlib.asynccontextmanager
async def served(path: Path, *, shared: bool = False) -> AsyncIterator[Handler]:
    handler = Handler()
    server = ControlServer(path, handler, shared=shared)
    await server.start()
    try:
        yield handler
    finally:
        await server.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await test()

    asyncio.run(bounded())


def connect(path: Path) -> Client:
    return Client(Endpoint(path, "edged run"))


def ask(path: Path, kind: str, body: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> dict[str, Any]:
    with connect(path) as client:
        events = client.stream(kind, body, fds, silence_s=PATIENCE_S)
        while True:
            try:
                next(events)
            except StopIteration as end:
                return dict(end.value)


def raw(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(os.fspath(path))
    return sock


# --- asking ---------------------------------------------------------------------------------------


def test_a_request_is_answered_with_its_document(path: Path) -> None:
    async def test() -> None:
        async with served(path):
            body = {"text": "ü", "bytes": b"\0" * 1_000_000, "n": [1, {"a": None}]}
            assert await asyncio.to_thread(ask, path, "echo", body) == body

    run(test)


def test_events_come_before_the_document_and_in_order(path: Path) -> None:
    def count() -> list[Any]:
        with connect(path) as client:
            return [event["n"] for event in client.stream("count", {"to": 100}, silence_s=PATIENCE_S)]

    async def test() -> None:
        async with served(path):
            assert await asyncio.to_thread(count) == list(range(100))

    run(test)


def test_two_clients_and_two_requests_of_one_client_are_served_at_once(path: Path) -> None:
    def both_on_one() -> list[int]:
        with raw(path) as sock:
            for number, kind in ((1, "meet"), (2, "go")):
                sock.sendall(framing.frame(wire.pack(kind, request=number)))
            return [message.answers for _ in range(2) if (message := framing.receive(sock))]

    async def test() -> None:
        async with served(path):
            waits = asyncio.create_task(asyncio.to_thread(ask, path, "meet"))
            await asyncio.to_thread(ask, path, "go")
            await waits
        async with served(path):
            assert sorted(await asyncio.to_thread(both_on_one)) == [1, 2]

    run(test)


@pytest.mark.parametrize("is_ours", [True, False], ids=["an error of ours", "a mistake"])
def test_an_error_is_an_answer_and_the_next_request_is_served(path: Path, is_ours: bool) -> None:
    def fail_then_echo() -> tuple[clients.NoDaemonError | Exception, dict[str, Any]]:
        with connect(path) as client:
            try:
                client.call("fail" if is_ours else "mistake")
            except Exception as error:
                return error, client.call("echo", {"a": 1})
        raise AssertionError("expected an error")

    async def test() -> None:
        async with served(path):
            error, document = await asyncio.to_thread(fail_then_echo)
            if is_ours:
                assert (str(error), error.code, error.remedy) == ("no memory", "memory", "free some")  # type: ignore
            else:
                assert str(error).startswith("internal error: KeyError")
            assert document == {"a": 1}

    run(test)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, FILES_MAX])
def test_open_files_travel_and_are_closed_after_the_answer(path: Path, tmp_path: Path, count: int) -> None:
    """Files that the daemon could not open by itself: their names are gone."""
    descriptors = []
    for number in range(count):
        file = tmp_path / str(number)
        file.write_text(f"content {number}")
        descriptors.append(os.open(file, os.O_RDONLY))
        file.unlink()

    async def test() -> None:
        async with served(path) as handler:
            answer = await asyncio.to_thread(ask, path, "read", None, descriptors)
            assert answer["contents"] == [f"content {n}".encode() for n in range(count)]
            assert len(handler.files) == count
            for taken in handler.files:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(taken)

    try:
        run(test)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_more_files_than_a_request_may_carry_end_the_connection_and_are_closed(path: Path) -> None:
    def flood() -> wire.Message | None:
        with raw(path) as sock:
            half = framing.frame(wire.pack("read", request=1))[:5]
            for _ in range(FILES_MAX + 1):
                socket.send_fds(sock, [half[:1]], [0])
                half = half[1:] + b"\0"
            return framing.receive(sock)

    async def test() -> None:
        async with served(path):
            await asyncio.to_thread(ask, path, "echo")
            before = set(os.listdir("/proc/self/fd"))
            message = await asyncio.to_thread(flood)
            assert message is None or message.kind == "error"
            await asyncio.to_thread(ask, path, "echo")
            for _ in range(1000):  # the daemon's end of the last is closed in its own time
                if set(os.listdir("/proc/self/fd")) <= before:
                    return
                await asyncio.sleep(0.01)
            assert set(os.listdir("/proc/self/fd")) <= before

    run(test)


# --- clients that misbehave or go -----------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        struct.pack(">I", wire.HEADER_BYTES_MAX + 1),
        struct.pack(">I", 0),
        framing.frame(b"\xc1"),
        framing.frame(b"\x80"),
    ],
    ids=["oversized", "empty", "no msgpack", "no kind"],
)
def test_nonsense_is_answered_and_ends_that_connection_alone(path: Path, said: bytes) -> None:
    def speak() -> None:
        with raw(path) as sock:
            sock.sendall(said)
            message = framing.receive(sock)
            assert message is not None
            assert (message.kind, message.answers, message.body["code"]) == ("error", 0, ProtocolError.code)
            assert framing.receive(sock) is None

    async def test() -> None:
        async with served(path):
            await asyncio.to_thread(speak)
            assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}

    run(test)


def test_a_client_that_vanishes_cancels_its_request(path: Path) -> None:
    async def test() -> None:
        async with served(path) as handler:
            sock = raw(path)
            sock.sendall(framing.frame(wire.pack("hang", request=1)))
            await handler.running.wait()
            sock.close()
            await handler.cancelled.wait()
            assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}

    run(test)


def test_a_client_that_leaves_in_the_middle_of_a_header_harms_nobody(path: Path) -> None:
    async def test() -> None:
        async with served(path):
            whole = framing.frame(wire.pack("echo", {"a": "b" * 100}, request=1))
            for kept in (0, 2, 4, 50, len(whole)):
                with raw(path) as sock:
                    sock.sendall(whole[:kept])
            assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}

    run(test)


def test_more_clients_than_there_is_room_for_are_turned_away_and_room_comes_back(path: Path) -> None:
    def fill() -> bool:
        socks = [raw(path) for _ in range(CLIENTS_MAX)]
        try:
            for number, sock in enumerate(socks):
                sock.sendall(framing.frame(wire.pack("echo", {"n": number}, request=1)))
                answer = framing.receive(sock)
                assert answer is not None
                assert answer.body == {"n": number}
            with raw(path) as one_more:
                return framing.receive(one_more) is None
        finally:
            for sock in socks:
                sock.close()

    async def test() -> None:
        async with served(path):
            assert await asyncio.to_thread(fill)
            while True:  # the daemon sees the ends one after the other
                with contextlib.suppress(clients.NoDaemonError):
                    assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}
                    return

    run(test)


def test_requests_that_run_end_with_the_server(path: Path) -> None:
    async def test() -> None:
        async with served(path) as handler:
            sock = raw(path)
            sock.sendall(framing.frame(wire.pack("hang", request=1)))
            await handler.running.wait()
        assert handler.cancelled.is_set()
        sock.close()

    run(test)
    assert not path.exists()


# --- the socket itself ----------------------------------------------------------------------------


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_socket_is_for_its_owner_alone_whatever_the_umask(path: Path, umask: int) -> None:
    async def test() -> None:
        before = os.umask(umask)
        try:
            async with served(path):
                assert mode_of(path) == 0o600
                assert mode_of(path.parent) == 0o700
        finally:
            os.umask(before)

    run(test)


def test_a_shared_socket_is_for_its_group_where_there_is_one(path: Path) -> None:
    async def test() -> None:
        async with served(path, shared=True):
            try:
                group = grp.getgrnam("edged").gr_gid
            except KeyError:
                assert mode_of(path) == 0o600  # for the owner, rather than for everybody
            else:
                assert (mode_of(path), os.stat(path).st_gid) == (0o660, group)

    run(test)


def test_what_a_dead_daemon_left_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))

    async def test() -> None:
        async with served(path):
            assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}

    run(test)


def test_a_daemon_that_lives_is_left_alone(path: Path) -> None:
    async def test() -> None:
        async with served(path):
            with pytest.raises(InstanceError, match="a daemon does"):
                await ControlServer(path, Handler(), shared=False).start()
            assert await asyncio.to_thread(ask, path, "echo", {"a": 1}) == {"a": 1}

    run(test)
