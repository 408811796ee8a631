"""The daemon's life: starts the parts, keeps them, ends them in order."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from . import identity as ids
from . import logs, sdnotify
from .commands import Commands
from .control import ControlServer
from .errors import EdgedError
from .identity import Home
from .parts import compose
from .pressure import Pressure
from .types import Announcement, Condition
from .version import PROTOCOL

log = logging.getLogger(__name__)
TIDY_S = 5.0
DRAIN_S = 60.0  # running jobs may take this long to end after SIGTERM


class Daemon:
    def __init__(self, home: Home) -> None:
        self._parts = compose(home)
        self._started_at = time.monotonic()
        self.state = "starting"
        self._leaving = asyncio.Event()
        self._pressure = Pressure()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_at

    async def run(self) -> None:
        """Serve until told to leave."""
        path, is_system = self._control_path()
        control = ControlServer(path, Commands(self._parts, self).handle, shared=is_system)
        self._catch_signals()
        try:
            port = await self._parts.peers.start()
            await control.start()
            ids.write_atomically(self._parts.home.path / "control.addr", os.fsencode(path))
            await self._discover(port)
            self.state = "online"
            self._parts.trainings.resume_unfinished()
            self._parts.coordinator.resume_unfinished()
            sdnotify.notify("READY=1", f"STATUS=online, port {port}")
            log.info(
                "ready", extra={"node": self._parts.identity.node_id[:8], "port": port, "socket": str(path)}
            )
            self.spawn(self._tidy())
            self.spawn(self._parts.bearing.ensure())
            self.spawn(self._feed_watchdog())
            await self._leaving.wait()
        finally:
            await self._shut_down(control)

    def _control_path(self) -> tuple[Path, bool]:
        """systemd's runtime folder when it gave one, else the home's socket."""
        runtime = os.environ.get("RUNTIME_DIRECTORY")
        if runtime:
            return Path(runtime.split(":")[0]) / "control.sock", True
        return self._parts.home.control_socket, False

    async def _discover(self, port: int) -> None:
        announcement = Announcement(
            ids.fingerprint_of(self._parts.identity.node_id),
            port,
            PROTOCOL,
            self._parts.profile.network.interfaces,
        )
        for entry in self._parts.discoverers.values():
            try:
                seen = functools.partial(self._parts.peers.seen, entry.name)
                await entry.discoverer.start(
                    announcement, seen, functools.partial(self._parts.peers.lost, entry.name)
                )
            except Exception as error:  # a plugin's service: the node works without it, and says so
                log.exception("discovery failed", extra={"discoverer": entry.name})
                self._parts.health.set(
                    Condition(
                        f"discovery-{entry.name}",
                        "warning",
                        f"{entry.name} finds no nodes: {error}",
                        "see the log; nodes that are already paired still connect",
                    )
                )

    async def _shut_down(self, control: ControlServer) -> None:
        """In the reverse order of use; each part ends though another one fails."""
        self.state = "stopping"
        sdnotify.notify("STOPPING=1")
        await control.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        closing = (
            self._parts.trainings.close,
            self._parts.coordinator.close,
            self._parts.roles.close,
            self._parts.transfers.close,
            *(entry.discoverer.stop for entry in self._parts.discoverers.values()),
            self._parts.peers.close,
            self._parts.supervisor.close,
        )
        for close in closing:
            try:
                await close()
            except Exception:  # the outermost frame: the rest must still end
                log.exception("a part did not end cleanly")
        self._parts.store.close()
        log.info("ended")

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first one drains, a second one stops."""
        if self.state == "draining":
            self._leaving.set()
        else:
            self.spawn(self.leave())

    async def leave(self) -> None:
        self.state = "draining"
        sdnotify.notify("STATUS=draining")
        self._parts.coordinator.is_draining = self._parts.trainings.is_draining = True
        await self._parts.trainings.close()  # they go on with the next start
        await asyncio.gather(self._parts.coordinator.drained(DRAIN_S), self._parts.roles.drain(DRAIN_S))
        self._leaving.set()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            try:
                self._parts.coordinator.tidy()
                self._parts.trainings.tidy()
                self._parts.roles.tidy(time.time() - self._parts.profile.jobs.keep)
                self._watch_memory()
                self._watch_energy()
                self._parts.roles.tell_device()
                self._parts.refresh_conditions()
            except (EdgedError, OSError):  # a full disk, say: it may be over the next time
                log.exception("not tidied")
            online = sum(
                self._parts.peers.is_online(node_id) for node_id in self._parts.peers.membership.members
            )
            sdnotify.notify(
                f"STATUS={self.state}, {online} peers online, {self._parts.coordinator.running} jobs, "
                f"{self._parts.roles.count} roles"
            )

    def _watch_memory(self) -> None:
        state, device = self._parts.device.read(), self._parts.device
        free = None
        if state.memory_free is not None and state.memory_total:
            free = state.memory_free / state.memory_total
        if not self._pressure.update(free, device.memory_pressure):
            self._parts.health.clear("memory-short")
            return
        text = "memory is short: idle workers are ended"
        self._parts.health.set(
            Condition("memory-short", "warning", text, "close something, or lower budget.memory")
        )
        self._parts.roles.relieve()

    def _watch_energy(self) -> None:
        because = self._parts.device.watch()
        if not because:
            self._parts.health.clear("saving")
            return
        text, remedy = f"no new work is taken: {because}", "plug it in, or see [energy] in the profile"
        self._parts.health.set(Condition("saving", "info", text, remedy))
        self._parts.roles.rest()

    async def _feed_watchdog(self) -> None:
        pause = sdnotify.watchdog_s()
        while pause is not None:
            sdnotify.notify("WATCHDOG=1")
            await asyncio.sleep(pause)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def main(home: Home) -> int:
    """`edged run`: the daemon in the foreground; its exit code."""
    _log_to_stderr()
    ids.load(home)  # a home that is not one says how to make it, before a lock file is left in it
    lock = ids.lock(home)
    try:
        asyncio.run(_serve(home))
    finally:
        os.close(lock)
    return 0


async def _serve(home: Home) -> None:
    await Daemon(home).run()


def _log_to_stderr() -> None:
    under_journal = bool(os.environ.get("JOURNAL_STREAM"))  # it adds the time by itself
    prefix = "" if under_journal else "%(asctime)s "
    logs.to_stderr(f"{prefix}%(levelname)s %(name)s: %(message)s", os.environ.get("EDGED_LOG", "INFO"))
