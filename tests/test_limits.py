"""Limits of the kernel, read from trees as they were found on real systems."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from edged import limits

CPU = "sys/devices/system/cpu"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup"
MIB = 1 << 20
NO_LIMIT_V1 = "9223372036854771712"  # what version 1 says where nothing is set


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def processors(pairs: Mapping[int, tuple[int, int]]) -> dict[str, str]:
    """sysfs of processors by their (package, core)."""
    found = {}
    for cpu, (package, core) in pairs.items():
        found[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = str(package)
        found[f"{CPU}/cpu{cpu}/topology/core_id"] = str(core)
    return found


LAPTOP = processors({0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1)})  # two cores of two threads each
SERVICE = {"proc/self/cgroup": "0::/system.slice/edged.service"}
UNIT = f"{V2}/system.slice/edged.service"
CONTAINER_V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/"
}


@pytest.mark.parametrize(
    ("files", "affinity", "threads"),
    [
        (LAPTOP, {0, 1, 2, 3}, 2),
        (LAPTOP, {0, 2}, 1),  # both threads of one core
        (LAPTOP, {1, 2}, 2),
        ({}, {0, 1, 2}, 3),  # no sysfs: Android, say
        (LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "max 100000"}, {0, 1, 2, 3}, 2),
        (LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "150000 100000"}, {0, 1, 2, 3}, 1),  # CPUQuota=150%
        (LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "20000 100000"}, {0, 1, 2, 3}, 1),  # never below one
        (LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "400000 100000"}, {0, 1, 2, 3}, 2),
        (
            LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "max", f"{V2}/system.slice/cpu.max": "100000 100000"},
            {0, 1},
            1,
        ),
        (LAPTOP | SERVICE | {f"{UNIT}/cpu.max": "garbled"}, {0, 1}, 2),
        (
            LAPTOP
            | CONTAINER_V1
            | {f"{V1}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "100000"}
            | {f"{V1}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"},
            {0, 1},
            1,
        ),
        (
            LAPTOP
            | CONTAINER_V1
            | {f"{V1}/cpu,cpuacct/cpu.cfs_quota_us": "-1", f"{V1}/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            {0, 1},
            2,
        ),
        (  # the container's own tree is mounted where the host's path is not to be seen
            LAPTOP
            | CONTAINER_V1
            | {f"{V1}/cpu/cpu.cfs_quota_us": "100000", f"{V1}/cpu/cpu.cfs_period_us": "100000"},
            {0, 1},
            1,
        ),
        (  # both versions: the unified tree lies beside the controllers
            LAPTOP
            | {"proc/self/cgroup": "1:cpu:/\n0::/a", f"{V2}/unified/a/cpu.max": "100000 100000"}
            | {f"{V2}/cpu/cpu.cfs_quota_us": "-1", f"{V2}/cpu/cpu.cfs_period_us": "100000"},
            {0, 1},
            1,
        ),
    ],
)
def test_threads_follow_cores_affinity_and_quota(
    tmp_path: Path, files: Mapping[str, str], affinity: set[int], threads: int
) -> None:
    assert limits.threads(tree(tmp_path, files), affinity) == threads


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        (SERVICE | {f"{UNIT}/memory.max": "max", f"{UNIT}/memory.current": "5"}, None),
        (
            SERVICE | {f"{UNIT}/memory.max": str(100 * MIB), f"{UNIT}/memory.current": str(60 * MIB)},
            (100, 40),
        ),
        (
            SERVICE
            | {f"{UNIT}/memory.max": str(100 * MIB), f"{UNIT}/memory.current": str(60 * MIB)}
            | {f"{UNIT}/memory.high": str(80 * MIB)}
            | {f"{UNIT}/memory.stat": f"anon 7\ninactive_file {5 * MIB}\nactive_file 9"},
            (80, 25),
        ),
        (  # MemoryMax= of the slice is nearer than that of the service
            SERVICE
            | {f"{UNIT}/memory.max": str(100 * MIB), f"{UNIT}/memory.current": str(10 * MIB)}
            | {f"{V2}/system.slice/memory.max": str(200 * MIB)}
            | {f"{V2}/system.slice/memory.current": str(170 * MIB)},
            (200, 30),
        ),
        (SERVICE | {f"{UNIT}/memory.max": str(10 * MIB), f"{UNIT}/memory.current": str(20 * MIB)}, (10, 0)),
        (
            CONTAINER_V1
            | {f"{V1}/memory/docker/abc/memory.limit_in_bytes": str(100 * MIB)}
            | {f"{V1}/memory/docker/abc/memory.usage_in_bytes": str(90 * MIB)}
            | {f"{V1}/memory/docker/abc/memory.stat": f"cache 1\ntotal_inactive_file {20 * MIB}"},
            (100, 30),
        ),
        (
            CONTAINER_V1
            | {f"{V1}/memory/docker/abc/memory.limit_in_bytes": NO_LIMIT_V1}
            | {f"{V1}/memory/docker/abc/memory.usage_in_bytes": "5"},
            None,
        ),
    ],
)
def test_memory_is_what_the_nearest_cgroup_leaves(
    tmp_path: Path, files: Mapping[str, str], found: tuple[int, int] | None
) -> None:
    expected = None if found is None else (found[0] * MIB, found[1] * MIB)
    assert limits.memory(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        (
            "some avg10=12.50 avg60=3.00 avg300=1.00 total=9\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=3",
            12.5,
        ),
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0", 0.0),
        ("full avg10=1.00", None),
        ("", None),
        ("some avg10=nonsense", None),
    ],
)
def test_pressure_is_the_share_of_time_that_something_waited(
    tmp_path: Path, text: str, percent: float | None
) -> None:
    assert limits.memory_pressure(tree(tmp_path, {"proc/pressure/memory": text})) == percent


def test_a_kernel_without_pressure_says_none(tmp_path: Path) -> None:
    assert limits.memory_pressure(tmp_path) is None


@pytest.mark.parametrize(
    ("statm", "pages"), [("900 300 120 1 0 70 0", 180), ("900 10 12 1 0 0 0", 0), ("900", 0), ("", 0)]
)
def test_a_process_holds_what_is_resident_beside_files(tmp_path: Path, statm: str, pages: int) -> None:
    root = tree(tmp_path, {"proc/77/statm": statm})
    assert limits.resident(root, 77) == pages * os.sysconf("SC_PAGE_SIZE")


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    assert limits.resident(tmp_path, 77) == 0
