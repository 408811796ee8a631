"""How soon the daemon is ready and how much memory it holds, with mdns, monitor and shard loaded.

From `exec` to READY=1 on the notification socket; RSS as `edged status` reports it, right after.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import Record, quick, spread

from edged.cli.init import make
from edged.client import Client, endpoint_of
from edged.identity import Home

ROUNDS = quick(2, 10)
READY_TARGET_S, RSS_TARGET_BYTES = 1.0, 60e6
PROFILE = """version = 1
plugins = ["mdns", "monitor", "shard"]
[network]
interfaces = ["lo"]
"""


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("start", out)
    if record.has("ready_s", "rss_bytes"):
        return record.done()
    ready: list[float] = []
    rss: list[float] = []
    for number in range(1, ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            seconds, held = _start_once(Path(folder))
        ready.append(seconds)
        rss.append(held)
        is_partial = number < ROUNDS
        record.put("ready_s", is_partial, target=READY_TARGET_S, rounds=number, **spread(ready))
        record.put("rss_bytes", is_partial, target=RSS_TARGET_BYTES, rounds=number, **spread(rss))
    return record.done()


def _start_once(folder: Path) -> tuple[float, int]:
    home = Home(folder / "home")
    make(home, "bench", PROFILE)
    address = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(address)
        notify.settimeout(30)
        command = [sys.executable, "-m", "edged.cli", "run", "--home", str(home.path)]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, "NOTIFY_SOCKET": address}, stderr=subprocess.DEVNULL
        )
        try:
            while b"READY=1" not in notify.recv(4096):
                pass
            seconds = time.perf_counter() - started
            with Client(endpoint_of(home)) as client:
                held = client.call("status")["rss_bytes"]
        finally:
            process.terminate()
            process.wait(30)
    return seconds, held
