"""A cgroup with a part of one processor, version 1 or 2, whichever this machine has."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 5_000  # the kernel's default of 100 ms would stop a rank for several tokens at a time
REMOVE_S = 10.0


@contextlib.contextmanager
def quota(name: str, cores: float) -> Iterator[Path]:
    """The file that takes the members of a new cgroup with so much of the processors.

    PermissionError or OSError where this machine lets nobody make one.
    """
    group, tasks = _made(f"edged-bench-{os.getpid()}-{name}", round(cores * PERIOD_US))
    try:
        yield tasks
    finally:
        _remove(group)


def _made(name: str, quota_us: int) -> tuple[Path, Path]:
    if (ROOT / "cpu" / "cpu.cfs_quota_us").exists():
        group = ROOT / "cpu" / name
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        return group, group / "tasks"
    controllers = ROOT / "cgroup.subtree_control"
    if not controllers.exists() or "cpu" not in controllers.read_text().split():
        raise OSError(f"expected the cpu controller of cgroups below {ROOT}")
    group = ROOT / name
    group.mkdir()
    (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
    return group, group / "cgroup.procs"


def _remove(group: Path) -> None:
    """A group goes when its last process is gone, which takes the kernel a moment."""
    deadline = time.monotonic() + REMOVE_S
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # a cgroup is busy until the kernel has reaped who was in it
