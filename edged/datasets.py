"""The data sets this node's owner offers to training jobs, by name: a folder, read cheaply.

    data/<name>/rows.jsonl   as it was added, every row checked (`rows`)
                meta.json    rows, bytes, SHA-256; mtime of rows.jsonl
    data/.ingest-*           an ingest at work, or what a killed one left

A job says a name; nobody else can say a path here. What a job named by a path on the node that it was
submitted to is stored for that job alone, as `job-<job id>-<index>`, and listed to nobody.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .errors import ConfigError, EdgedError
from .identity import Home
from .ingest import STAGING
from .models import check_model_name, held, is_sha256
from .partial import fsync_folder
from .supervisor import Supervisor

log = logging.getLogger(__name__)
ROWS, META = "rows.jsonl", "meta.json"
META_BYTES_MAX = 1 << 16
HIDDEN = "job-"  # what data sets of one job begin with
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class DataSet:
    """One stored data set. `rows` counts all, `test_rows` those with `"split": "test"`."""

    name: str
    rows: int
    bytes: int
    sha256: str
    test_rows: int = 0


class _Meta(msgspec.Struct, frozen=True):
    rows: int
    bytes: int
    sha256: str
    mtime_ns: int
    test_rows: int = 0


class DataStore:
    """What one node holds. Reads are a few `stat` calls and a small file for each data set."""

    def __init__(self, home: Home, supervisor: Supervisor) -> None:
        self._folder, self._supervisor = home.data, supervisor
        self._faults: dict[str, str] = {}  # told to the log, by name

    def list(self) -> builtins.list[DataSet]:
        """Every readable data set that is offered, by name; a damaged one is a line in the log."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
        except OSError:
            return []
        found = {name: self._read(name) for name in names if not name.startswith(HIDDEN)}
        self._faults = {name: fault for name, fault in self._faults.items() if name in found}
        return [row for row in found.values() if row]

    def find(self, name: str, *, job_id: str | None = None) -> DataSet:
        """The data set of that name. One that was stored for a job is found by that job only."""
        check_data_name(name)
        is_seen = not name.startswith(HIDDEN) or (job_id and name.startswith(f"{HIDDEN}{job_id}-"))
        row = self._read(name) if is_seen else None
        if row is None:
            names = ", ".join(row.name for row in self.list()) or "none"
            raise ConfigError(
                f"no data set {name!r}; offered here: {names}",
                remedy="edged data add NAME FILE, on that node",
                code="no-data",
            )
        return row

    def path_of(self, name: str, *, job_id: str | None = None) -> Path:
        """The file of its rows."""
        return self._folder / self.find(name, job_id=job_id).name / ROWS

    async def add(
        self, name: str, file: int, on_progress: Progress = lambda event: None
    ) -> tuple[DataSet, str]:
        """Check and store an open file, in a process of its own; the row, and "copied" or "already".

        ConfigError names the row that is wrong, or says that the name is taken by another content.
        """
        check_data_name(name)
        if name.startswith(HIDDEN):
            raise ConfigError(
                f"expected a name that does not begin with {HIDDEN!r}; {name!r} came",
                remedy="choose another name: these are of jobs",
            )
        return await self._add(name, file, on_progress)

    async def add_for_job(
        self, job_id: str, index: int, file: int, on_progress: Progress = lambda event: None
    ) -> str:
        """Store an open file for one job; the name to find it by. It goes with `remove_for_job`."""
        name = check_data_name(f"{HIDDEN}{job_id}-{index}")
        await self._add(name, file, on_progress)
        return name

    async def _add(self, name: str, file: int, on_progress: Progress) -> tuple[DataSet, str]:
        params = {"source_fd": file, "name": name, "data": str(self._folder)}
        stored = await self._supervisor.run_task(
            "edged.ingest_rows:ingest", params, timeout_s=None, on_progress=on_progress, inherit=(file,)
        )
        row = self._read(name)
        if row is None:
            raise EdgedError(f"expected data set {name!r} to read back from the store; it does not")
        return row, str(stored["stored"])

    def remove(self, name: str) -> DataSet | None:
        """Delete a data set, or a damaged one (then None); a training that has it open reads on."""
        folder = self._folder / check_data_name(name)
        row = self._read(name)
        if row is None and not folder.is_dir():
            self.find(name)  # its error says what there is
        remove_entry(folder)
        self._faults.pop(name, None)
        return row

    def remove_for_job(self, job_id: str) -> None:
        """Delete what `add_for_job` stored for a job; none is no error."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                if name.startswith(f"{HIDDEN}{job_id}-"):
                    remove_entry(self._folder / name)

    def jobs(self) -> set[str]:
        """The ids of jobs that have data sets of their own here."""
        with contextlib.suppress(FileNotFoundError):
            hidden = [name for name in os.listdir(self._folder) if name.startswith(HIDDEN)]
            return {name.removeprefix(HIDDEN).rpartition("-")[0] for name in hidden}
        return set()

    def _read(self, name: str) -> DataSet | None:
        row, fault = read_entry(self._folder / name)
        if fault and self._faults.get(name) != fault:
            log.warning("data set skipped", extra={"data_set": name, "reason": fault})
        if fault:
            self._faults[name] = fault
        else:
            self._faults.pop(name, None)
        return row


def check_data_name(name: str) -> str:
    return check_model_name(name, "data set")


def read_entry(folder: Path) -> tuple[DataSet | None, str]:
    """A data set, or None and what is wrong with it; nothing is where there is no such folder."""
    if not folder.is_dir():
        return None, ""
    try:
        with open(folder / META, "rb") as file:
            meta = msgspec.json.decode(file.read(META_BYTES_MAX), type=_Meta)
        found = os.stat(folder / ROWS)
    except (OSError, ValueError) as error:
        return None, f"its files cannot be read ({type(error).__name__})"
    if not is_sha256(meta.sha256) or meta.rows < 1:
        return None, "its meta.json is none"
    if (found.st_size, found.st_mtime_ns) != (meta.bytes, meta.mtime_ns):
        return None, "its rows changed since they were added"
    return DataSet(folder.name, meta.rows, meta.bytes, meta.sha256, meta.test_rows), ""


def write_meta(folder: Path, rows: int, test_rows: int, sha256: str) -> None:
    """Beside a finished rows.jsonl, flushed."""
    found = os.stat(folder / ROWS)
    meta = {
        "rows": rows,
        "test_rows": test_rows,
        "bytes": found.st_size,
        "sha256": sha256,
        "mtime_ns": found.st_mtime_ns,
    }
    descriptor = os.open(folder / META, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def remove_entry(folder: Path) -> None:
    """Delete a folder of a store: gone at once, whatever ends this process meanwhile."""
    with held(folder.parent, wait=True):
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=STAGING))
        os.rename(folder, aside / "old")
        fsync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)  # the next ingest tries again
