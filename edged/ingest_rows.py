"""Puts a file of rows into the store of data sets: every row checked, hashed, copied, then named.

A task of a child process: `ingest(params, report)`. The source arrives as an open descriptor, since
the daemon may not see its path. Memory is bounded by one piece and one row, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import wire
from .datasets import ROWS, DataSet, check_data_name, read_entry, write_meta
from .errors import ConfigError, EngineError
from .ingest import Progress, staged_in
from .models import held
from .partial import check_disk, fsync_folder, write_all
from .rows import RowCheck

PIECE_BYTES = 1 << 20
DATA_BYTES_MAX = 64 << 30  # tens of millions of rows; above it somebody named the wrong file

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Ingest:
    source_fd: int
    name: str
    data: str


def ingest(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Store the file open at `source_fd` under `name`: {"stored": "copied"}, or "already" for the same
    content under the same name.

    Raises ConfigError (name, not a file, a wrong row by its number, another content has the name) or
    EngineError (disk, a file that was cut or changed). Then nothing is left in the store.
    """
    want = wire.read_body(_Ingest, params)
    name, folder = check_data_name(want.name), Path(want.data)
    source = os.fstat(want.source_fd)
    if not stat.S_ISREG(source.st_mode) or source.st_size > DATA_BYTES_MAX:
        raise ConfigError(
            f"expected a regular file of at most {DATA_BYTES_MAX} bytes as data set {name!r}; "
            f"mode {stat.filemode(source.st_mode)}, {source.st_size} bytes came",
            remedy="edged data add NAME FILE, with a JSONL file",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tick = Progress(report, "checking", source.st_size)
        if present := _present(folder / name):
            if present.bytes != source.st_size or _check(want, source, None, tick)[1] != present.sha256:
                raise _name_taken(present)
            return {"stored": "already"}
        check_disk(folder, source.st_size, f"data set {name!r}", "data")
        with staged_in(folder) as staged:
            check, sha256 = _check(want, source, staged / ROWS, tick)
            write_meta(staged, check.rows, check.test_rows, sha256)
            return {"stored": _publish(staged, folder / name, sha256)}
    except OSError as error:
        raise EngineError(
            f"expected to store data set {name!r}; {error.strerror or error}",
            remedy="check the disk that holds the home",
        ) from error


def _check(want: _Ingest, source: os.stat_result, copy: Path | None, tick: Progress) -> tuple[RowCheck, str]:
    """Read the whole file once: its rows counted, its SHA-256, and with `copy` a flushed copy."""
    with contextlib.ExitStack() as stack:
        target = None
        if copy is not None:
            target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, target)
        found = _read(want.source_fd, target, tick)
        if target is not None:
            os.fsync(target)
    after = os.fstat(want.source_fd)
    if (after.st_size, after.st_mtime_ns) != (source.st_size, source.st_mtime_ns):
        raise EngineError(
            f"expected data set {want.name!r} to stay as it is; it changed while it was read",
            remedy="add it again when nothing writes to it",
        )
    return found


def _read(fd: int, copy: int | None, tick: Progress) -> tuple[RowCheck, str]:
    check, sha256, done = RowCheck(), hashlib.sha256(), 0
    while piece := os.pread(fd, PIECE_BYTES, done):
        check.feed(piece)
        sha256.update(piece)
        if copy is not None:
            write_all(copy, [piece], done)
        done += len(piece)
        tick(done)
    check.end()
    return check, sha256.hexdigest()


def _publish(staged: Path, target: Path, sha256: str) -> str:
    """Rename into place, unless somebody else was faster."""
    with held(target.parent, wait=True):
        if present := _present(target):
            if present.sha256 != sha256:
                raise _name_taken(present)
            return "already"
        os.rename(staged, target)
        fsync_folder(target.parent)
    return "copied"


def _present(target: Path) -> DataSet | None:
    """What has the name already; ConfigError when it is damaged."""
    present, fault = read_entry(target)
    if fault:
        raise ConfigError(
            f"expected a free name for a data set; {target.name!r} is a damaged one: {fault}",
            remedy=f"first `edged data rm {target.name}`",
            code="name-taken",
        )
    return present


def _name_taken(owner: DataSet) -> ConfigError:
    return ConfigError(
        f"expected a free name for another data set; {owner.name!r} has {owner.rows} rows of other content",
        remedy=f"choose another name, or first `edged data rm {owner.name}`",
        code="name-taken",
    )
