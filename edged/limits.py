"""What the kernel lets this process have: processors, processor time, memory. Functions over a root folder.

A cgroup limits whatever is in it, and in those below it, so every cgroup from a process's own up to the
root counts. Version 2 has one tree; version 1 one for each controller; some systems have both. In a container
the path may be one of the host's that is not to be seen: then the mounted tree is the process's own.
Sources: the kernel's documents on cgroup-v2, cgroup-v1 (cpu bandwidth, memory) and PSI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path

UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page


def threads(root: Path, affinity: Set[int]) -> int:
    """Threads worth computing with: the physical cores among `affinity`, and no more than the time that
    the cgroups give; a thread that is throttled holds up all others."""
    most = cores(root, affinity)
    quota = cpu_quota(root)
    return max(1, most if quota is None else min(most, int(quota)))


def cores(root: Path, affinity: Set[int]) -> int:
    """Distinct (package, core) pairs of these processors; the processors where sysfs does not say."""
    found = set()
    for cpu in affinity:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        pair = _text(topology / "physical_package_id"), _text(topology / "core_id")
        if None in pair:
            return max(1, len(affinity))
        found.add(pair)
    return max(1, len(found))


def cpu_quota(root: Path) -> float | None:
    """Processors' worth of time that the cgroups allow; None where they set no bound."""
    found = []
    for folder in _cgroups(root, ""):
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        found.append(_ratio(quota, period))
    for folder in _cgroups(root, "cpu"):
        found.append(_ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")))
    return min((ratio for ratio in found if ratio is not None), default=None)


def memory(root: Path) -> tuple[int, int] | None:
    """(limit, room until it) in bytes of the cgroup with the least room, file pages that are easily dropped
    not counted as taken; None where there is no limit."""
    found = []
    for folder in _cgroups(root, ""):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        least = min((limit for limit in limits if limit is not None), default=None)
        found.append(_within(folder, least, "memory.current", "inactive_file"))
    for folder in _cgroups(root, "memory"):
        limit = _number(folder / "memory.limit_in_bytes")
        found.append(_within(folder, limit, "memory.usage_in_bytes", "total_inactive_file"))
    return min((pair for pair in found if pair is not None), key=lambda pair: pair[1], default=None)


def resident(root: Path, pid: int) -> int:
    """Bytes that a process holds in memory beside pages of files; 0 where it is gone.

    A mapped file's pages count as free memory (`MemAvailable`): the kernel drops them for others."""
    fields = (_text(root / f"proc/{pid}/statm") or "").split()
    try:
        return max(0, int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
    except (IndexError, ValueError):
        return 0


def memory_pressure(root: Path) -> float | None:
    """Percent of the last ten seconds in which something waited for memory (PSI); None where unknown."""
    line = next(iter((_text(root / "proc/pressure/memory") or "").splitlines()), "")
    fields = dict(part.partition("=")[::2] for part in line.split())
    try:
        return float(fields["avg10"]) if line.startswith("some ") else None
    except (KeyError, ValueError):
        return None


def _within(folder: Path, limit: int | None, usage: str, dropped: str) -> tuple[int, int] | None:
    used = _number(folder / usage)
    if limit is None or limit >= UNLIMITED_BYTES or used is None:
        return None
    stat = dict(line.partition(" ")[::2] for line in (_text(folder / "memory.stat") or "").splitlines())
    pages = stat.get(dropped, "")
    return limit, min(limit, max(0, limit - used + (int(pages) if pages.isdigit() else 0)))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups, its own first; `controller` of version 1, "" for version 2."""
    mounts = [root / "sys/fs/cgroup/unified", root / "sys/fs/cgroup"]
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller and controller in names.split(","):
            mounts = [root / "sys/fs/cgroup" / names, root / "sys/fs/cgroup" / controller]
        elif controller or number != "0" or names:
            continue
        mount = next((mount for mount in mounts if mount.is_dir()), None)
        if mount is None:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:length])


def _ratio(quota: str | None, period: str | None) -> float | None:
    """Processors of a quota; None for "max", -1, or what is no number."""
    try:
        return float(quota or "") / float(period or "") if float(quota or "") > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None


def _text(path: Path) -> str | None:
    """A file's text without the white space around it; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
