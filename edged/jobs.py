"""The job store: SQLite in WAL mode. A job is stored before it is acknowledged.

Acceptance and epochs are committed with synchronous=FULL (they survive a power cut), tokens with
NORMAL (they survive the daemon's death; a power cut may lose the last ones, which are made again).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, EdgedError

SCHEMA_VERSION = 1
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset(("done", "failed", "cancelled"))

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, created_at REAL NOT NULL,
    ended_at REAL, epoch INTEGER NOT NULL DEFAULT 0, request TEXT NOT NULL, plan TEXT, result TEXT,
    error TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
    job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, position INTEGER NOT NULL,
    token INTEGER NOT NULL, text TEXT NOT NULL, PRIMARY KEY (job_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS steps (
    job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, step INTEGER NOT NULL, kind TEXT NOT NULL,
    said TEXT NOT NULL, PRIMARY KEY (job_id, step, kind)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `error` is {"code", "message", "remedy"} or None; times are seconds since the epoch."""

    job_id: str
    kind: str
    state: State
    created_at: float
    epoch: int
    request: dict[str, Any]
    plan: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, str] | None

    def row(self, progress: float | None) -> dict[str, Any]:
        """As `edged jobs` shows it."""
        return {
            "job_id": self.job_id,
            "kind": self.kind,
            "state": self.state,
            "created_at": rfc3339(self.created_at),
            "epoch": self.epoch,
            "progress": progress,
            "error": self.error,
        }


class JobStore:
    """Used from the daemon's loop only; each call is one small transaction."""

    def __init__(self, path: Path) -> None:
        """Open or make the store; EdgedError when the file is damaged or of a newer edged."""
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA secure_delete = ON")  # a deleted prompt leaves no bytes in the file
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise EdgedError(
                    f"expected a job store of version {SCHEMA_VERSION} or older; {version} came",
                    remedy="use the edged that wrote it",
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise EdgedError(
                f"expected a job store at {path}; {error}", remedy="restore it from a backup, or move it away"
            ) from error

    def close(self) -> None:
        self._db.close()

    # --- writing ---

    def accept(self, job_id: str, kind: str, request: dict[str, Any], now: float) -> None:
        with self._durably():
            self._db.execute(
                "INSERT INTO jobs (job_id, kind, state, created_at, request) VALUES (?, ?, 'queued', ?, ?)",
                (job_id, kind, now, json.dumps(request)),
            )

    def begin_epoch(self, job_id: str, epoch: int, plan: dict[str, Any]) -> None:
        """Stored before anything is sent in the new epoch."""
        with self._durably():
            self._db.execute(
                "UPDATE jobs SET state = 'running', epoch = ?, plan = ? WHERE job_id = ?",
                (epoch, json.dumps(plan), job_id),
            )

    def keep_plan(self, job_id: str, plan: dict[str, Any]) -> None:
        """The plan as it is now, whatever state the job is in; a power cut may take it."""
        with self._transaction("NORMAL"):
            self._db.execute("UPDATE jobs SET plan = ? WHERE job_id = ?", (json.dumps(plan), job_id))

    def add_tokens(self, job_id: str, first: int, tokens: Sequence[int], text: str) -> None:
        """Tokens from position `first` on; the text belongs to the last one."""
        rows = [(job_id, first + i, t, text if i == len(tokens) - 1 else "") for i, t in enumerate(tokens)]
        with self._transaction("NORMAL"):
            self._db.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?)", rows)

    def add_step(self, job_id: str, step: int, kind: str, values: Mapping[str, float]) -> None:
        """What a training told of a step, in place of what an earlier epoch told of it."""
        with self._transaction("NORMAL"):
            self._db.execute(
                "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?)",
                (job_id, step, kind, json.dumps(dict(values))),
            )

    def forget_steps(self, job_id: str, first: int) -> None:
        """A training goes on at step `first`: what was told of it and later ones will be told again."""
        with self._transaction("NORMAL"):
            self._db.execute("DELETE FROM steps WHERE job_id = ? AND step >= ?", (job_id, first))

    def reopen(self, job_id: str, request: Mapping[str, Any]) -> None:
        """An ended job goes on, with these words."""
        with self._durably():
            self._db.execute(
                "UPDATE jobs SET state = 'queued', ended_at = NULL, error = NULL, result = NULL, request = ? "
                "WHERE job_id = ?",
                (json.dumps(dict(request)), job_id),
            )

    def end(
        self,
        job_id: str,
        state: State,
        now: float,
        result: dict[str, Any] | None = None,
        error: EdgedError | None = None,
    ) -> None:
        described = None
        if error is not None:
            described = json.dumps({"code": error.code, "message": str(error), "remedy": error.remedy})
        with self._durably():
            self._db.execute(
                "UPDATE jobs SET state = ?, ended_at = ?, result = ?, error = ? WHERE job_id = ?",
                (state, now, json.dumps(result) if result else None, described, job_id),
            )

    def remove(self, job_id: str) -> None:
        with self._durably():
            self._db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
        self._forget_log()

    def expire(self, before: float) -> int:
        """Delete ended jobs, prompts and texts included, that ended before a time; how many."""
        with self._durably():
            deleted = self._db.execute("DELETE FROM jobs WHERE ended_at < ?", (before,)).rowcount
        if deleted:
            self._forget_log()
        return deleted

    def _forget_log(self) -> None:
        """Empty the write-ahead log, which still has the pages as they were."""
        with suppress(sqlite3.Error):  # the job is deleted; the next one empties the log
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- reading ---

    def get(self, text: str) -> Job:
        """A job by its id or a prefix of at least 4 characters."""
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE job_id = ? OR (length(?) >= 4 AND substr(job_id, 1, length(?)) = ?)",
            (text, text, text, text),
        ).fetchall()
        if len(rows) != 1:
            what = f"{len(rows)} jobs match {text!r}" if rows else f"no job {text!r}"
            raise ConfigError(what, remedy="see `edged jobs`")
        return _job(rows[0])

    def all(self) -> list[Job]:
        """Newest first."""
        return [_job(row) for row in self._db.execute("SELECT * FROM jobs ORDER BY created_at DESC")]

    def unfinished(self, kind: str) -> list[str]:
        """Ids of those that are not over, the oldest first."""
        rows = self._db.execute(
            "SELECT job_id FROM jobs WHERE kind = ? AND state IN ('queued', 'running') ORDER BY created_at",
            (kind,),
        )
        return [row["job_id"] for row in rows]

    def steps(self, job_id: str) -> list[tuple[int, str, dict[str, float]]]:
        """Of a training: each step and evaluation, in order, as (step, kind, values)."""
        rows = self._db.execute(
            "SELECT step, kind, said FROM steps WHERE job_id = ? ORDER BY step, kind", (job_id,)
        ).fetchall()
        return [(row["step"], row["kind"], json.loads(row["said"])) for row in rows]

    def tokens(self, job_id: str, most: int = -1) -> tuple[list[int], str]:
        """The first `most` tokens and their text; below 0 all of them."""
        rows = self._db.execute(
            "SELECT token, text FROM tokens WHERE job_id = ? ORDER BY position LIMIT ?", (job_id, most)
        ).fetchall()
        return [row["token"] for row in rows], "".join(row["text"] for row in rows)

    # --- transactions ---

    @contextmanager
    def _transaction(self, synchronous: Literal["FULL", "NORMAL"]) -> Iterator[None]:
        try:
            self._db.execute(f"PRAGMA synchronous = {synchronous}")
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error | OverflowError):
                raise
            raise EdgedError(
                f"expected to store the job; {error}", remedy="free disk space on this node", code="store"
            ) from error

    def _durably(self) -> Any:
        return self._transaction("FULL")


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _job(row: sqlite3.Row) -> Job:
    def read(column: str) -> Any:
        return json.loads(row[column]) if row[column] else None

    return Job(
        row["job_id"],
        row["kind"],
        row["state"],
        row["created_at"],
        row["epoch"],
        read("request"),
        read("plan"),
        read("result"),
        read("error"),
    )
