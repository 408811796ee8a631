"""Workers as real processes: results, errors and progress come back, and none outlives its daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged import wire
from edged.errors import ConfigError, EdgedError, EngineError, PolicyViolation
from edged.supervisor import Supervisor, WorkerHandle

PATIENCE_S = 60.0  # a hang, not a slow machine

TASKS = """
import os, sys, time
from edged.errors import ConfigError, EngineError, PolicyViolation

def double(params, report):
    print("a library that prints")
    return {"n": 2 * params["n"], "bytes": params.get("bytes")}

def progress(params, report):
    for number in range(params["n"]):
        report({"n": number})
    return {}

def fail(params, report):
    kind = {"config": ConfigError, "engine": EngineError, "policy": PolicyViolation}[params["kind"]]
    raise kind("what came", remedy="what to do", **params["more"])

def memory(params, report):
    raise MemoryError

def mistake(params, report):
    return {"n": 1 / 0}

def sleep(params, report):
    report({"pid": os.getpid()})
    time.sleep(1000)

def end(params, report):
    os._exit(params["code"])

def abort(params, report):
    os.abort()

def read(params, report):
    with os.fdopen(params["file"]) as file:
        return {"content": file.read()}

def around(params, report):
    status = open("/proc/self/status").read()
    return {
        "group": os.getpgrp(), "arguments": sys.argv, "oom": int(open("/proc/self/oom_score_adj").read()),
        "files": [os.readlink(f"/proc/self/fd/{fd}") for fd in sorted(os.listdir("/proc/self/fd"))
                  if os.path.exists(f"/proc/self/fd/{fd}")],
    }
"""


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@contextlib.asynccontextmanager
async def supervised() -> AsyncIterator[Supervisor]:
    made = Supervisor()
    try:
        yield made
    finally:
        await made.close()


def run(test: Callable[[Supervisor], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S), supervised() as supervisor:
            await test(supervisor)

    asyncio.run(bounded())


async def task(
    supervisor: Supervisor, name: str, timeout_s: float = PATIENCE_S, **params: Any
) -> dict[str, Any]:
    return await supervisor.run_task(f"tasks:{name}", params, timeout_s=timeout_s)


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_gives_its_result_and_leaves_no_process(capfd: pytest.CaptureFixture[str]) -> None:
    async def test(supervisor: Supervisor) -> None:
        assert await task(supervisor, "double", n=21, bytes=b"\0" * 100_000) == {
            "n": 42,
            "bytes": b"\0" * 100_000,
        }

    run(test)
    assert not _children()
    assert capfd.readouterr().out == ""  # what a library prints is no document of ours


def test_tasks_run_at_once_each_in_a_process_of_its_own() -> None:
    async def test(supervisor: Supervisor) -> None:
        found = await asyncio.gather(*(task(supervisor, "double", n=n) for n in range(3)))
        assert [result["n"] for result in found] == [0, 2, 4]

    run(test)


def test_progress_comes_in_order_before_the_result() -> None:
    async def test(supervisor: Supervisor) -> None:
        seen: list[int] = []
        await supervisor.run_task(
            "tasks:progress",
            {"n": 200},
            timeout_s=PATIENCE_S,
            on_progress=lambda event: seen.append(event["n"]),
        )
        assert seen == list(range(200))

    run(test)


@pytest.mark.parametrize(
    ("kind", "more", "cls", "code"),
    [
        ("config", {}, ConfigError, "config"),
        ("engine", {}, EngineError, "engine"),
        ("policy", {}, PolicyViolation, "refused"),
        ("config", {"code": "busy-model"}, ConfigError, "busy-model"),
        ("engine", {"code": "memory"}, EngineError, "memory"),
    ],
)
def test_a_task_s_error_is_the_same_class_here(
    kind: str, more: dict[str, str], cls: type[EdgedError], code: str
) -> None:
    async def test(supervisor: Supervisor) -> None:
        with pytest.raises(cls, match="what came") as caught:
            await task(supervisor, "fail", kind=kind, more=more)
        assert (caught.value.remedy, caught.value.code) == ("what to do", code)

    run(test)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("memory", {}, "ran out"),
        ("mistake", {}, "the worker ended: it exited with code 1"),
        ("end", {"code": 7}, "the worker ended: it exited with code 7"),
        ("abort", {}, r"the worker ended: killed by signal 6 \(SIGABRT\)"),
        ("nothing", {}, "expected tasks:nothing in this installation"),
    ],
)
def test_a_worker_that_dies_ends_its_task_and_nothing_else(
    name: str, params: dict[str, Any], says: str
) -> None:
    async def test(supervisor: Supervisor) -> None:
        with pytest.raises(EngineError, match=says):
            await task(supervisor, name, **params)
        assert (await task(supervisor, "double", n=1))["n"] == 2

    run(test)


def test_a_task_that_takes_too_long_is_ended() -> None:
    async def test(supervisor: Supervisor) -> None:
        with pytest.raises(EngineError, match=r"expected the worker to task within 0\.1 s"):
            await task(supervisor, "sleep", timeout_s=0.1)
        assert not _children()

    run(test)


def test_a_task_that_is_cancelled_is_ended() -> None:
    async def test(supervisor: Supervisor) -> None:
        begun = asyncio.Event()
        running = asyncio.ensure_future(
            supervisor.run_task("tasks:sleep", {}, timeout_s=None, on_progress=lambda event: begun.set())
        )
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not _children()

    run(test)


def test_a_task_reads_a_file_that_it_inherits_and_no_other_descriptor(tmp_path: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        file = os.open(tmp_path / "given", os.O_RDWR | os.O_CREAT)
        other = os.open(tmp_path / "not-given", os.O_RDWR | os.O_CREAT)
        os.write(file, b"a file without a name")
        os.lseek(file, 0, os.SEEK_SET)
        os.unlink(tmp_path / "given")
        try:
            params = {"file": file}
            read = await supervisor.run_task("tasks:read", params, timeout_s=PATIENCE_S, inherit=[file])
            assert read == {"content": "a file without a name"}
            around = await task(supervisor, "around")
            assert not [name for name in around["files"] if "given" in name]
        finally:
            os.close(file)
            os.close(other)

    run(test)


def test_a_worker_is_in_the_daemon_s_group_and_dies_before_it() -> None:
    async def test(supervisor: Supervisor) -> None:
        around = await task(supervisor, "around")
        assert around["group"] == os.getpgrp()
        mine = int(Path("/proc/self/oom_score_adj").read_text())  # noqa: ASYNC240
        assert around["oom"] >= min(1000, mine + 300)
        assert len(around["arguments"]) == 5  # two numbers and their names: no secret is an argument

    run(test)


# --- life and death -------------------------------------------------------------------------------


async def worker(supervisor: Supervisor) -> WorkerHandle:
    return await supervisor.spawn(lambda message: None)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "killed (signal 9; the kernel does this when memory runs out)"),
        (signal.SIGSEGV, "killed by signal 11 (SIGSEGV)"),
    ],
)
def test_a_call_fails_with_the_reason_when_its_worker_is_killed(number: signal.Signals, reason: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        begun = asyncio.Event()
        handle = await supervisor.spawn(lambda message: begun.set())
        handle.on_exit = ended.set_result
        calling = asyncio.ensure_future(handle.call("task", {"function": "tasks:sleep", "params": {}}, None))
        await begun.wait()
        os.kill(handle.pid, number)
        with pytest.raises(EngineError) as caught:
            await calling
        assert str(caught.value) == f"the worker ended: {reason}"
        assert await ended == reason
        with pytest.raises(EngineError, match="the worker has ended"):
            await handle.call("usage", {}, PATIENCE_S)

    run(test)


def test_usage_is_answered_while_the_worker_computes() -> None:
    async def test(supervisor: Supervisor) -> None:
        begun = asyncio.Event()
        handle = await supervisor.spawn(lambda message: begun.set())
        calling = asyncio.ensure_future(handle.call("task", {"function": "tasks:sleep", "params": {}}, None))
        await begun.wait()
        used = wire.read_body(wire.Used, await handle.call("usage", {}, PATIENCE_S))
        assert used.memory_bytes > 1_000_000
        assert used.bytes_sent == 0
        handle.kill()
        with pytest.raises(EngineError, match="it was stopped"):
            await calling

    run(test)


def test_an_idle_worker_ends_when_it_is_told() -> None:
    async def test(supervisor: Supervisor) -> None:
        handle = await worker(supervisor)
        reasons: list[str] = []
        handle.on_exit = reasons.append
        await handle.stop()
        await handle.stop()
        assert reasons == ["it was stopped"]
        assert handle._process.returncode == 0

    run(test)


def test_a_request_that_no_worker_knows_is_refused_and_the_worker_stays() -> None:
    async def test(supervisor: Supervisor) -> None:
        handle = await worker(supervisor)
        with pytest.raises(EdgedError, match="a worker has no request 'dance'"):
            await handle.call("dance", {}, PATIENCE_S)
        with pytest.raises(EdgedError, match="expected prepare before load"):
            await handle.call("load", {}, PATIENCE_S)
        await handle.call("usage", {}, PATIENCE_S)

    run(test)


DAEMON = """
import asyncio, os, sys
from edged.supervisor import Supervisor
async def main():
    supervisor = Supervisor()
    idle = await supervisor.spawn(lambda message: None)
    def begun(event):
        print(idle.pid, event["pid"], flush=True)
    await supervisor.run_task("tasks:sleep", {}, timeout_s=None, on_progress=begun)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_daemon(number: signal.Signals) -> None:
    """One that waits and one that computes; both are told by the kernel, without a word of the daemon."""
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout
        workers = [psutil.Process(int(pid)) for pid in daemon.stdout.readline().split()]
        assert len(workers) == 2
        daemon.send_signal(number)
        daemon.wait()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
        assert not alive
    finally:
        daemon.kill()
        daemon.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_daemon(number: signal.Signals) -> None:
    """Ctrl-C in a terminal, or systemd's SIGTERM: the daemon drains first."""

    async def test(supervisor: Supervisor) -> None:
        handle = await worker(supervisor)
        await handle.call("usage", {}, PATIENCE_S)  # it has bound itself to the daemon by now
        os.kill(handle.pid, number)
        await handle.call("usage", {}, PATIENCE_S)

    run(test)


def _children() -> list[str]:
    """Of ours, those that are not a test runner's own helpers."""
    found = [" ".join(process.cmdline()) for process in psutil.Process().children()]
    return [line for line in found if "multiprocessing" not in line]
