"""The document of a benchmark: rows that are saved as they come, and kept when a cut-off run goes on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DIRTY = "-dirty"
QUICK = bool(os.environ.get("EDGED_BENCH_QUICK"))
"""Tiny settings that show whether a benchmark runs through; its figures mean nothing."""


def quick(tiny: Any, real: Any) -> Any:
    """One setting of a benchmark, by whether this is a quick run."""
    return tiny if QUICK else real


class Record:
    """Rows by name. A file that an earlier run of the same commit left unfinished is gone on with:
    the rows it has are not measured again, but for those it was in the middle of. A tree with changes
    of its own is nobody's commit: its rows are always measured again."""

    def __init__(self, name: str, out: Path | None, is_quick: bool = QUICK) -> None:
        self._name, self._out, self._commit = name, out, _commit()
        self._is_quick = is_quick
        self._rows: dict[str, dict[str, Any]] = {row["row"]: row for row in self._earlier()}

    def has(self, *names: str) -> bool:
        """Are all these rows there, measured to their end?"""
        return all(name in self._rows and "partial" not in self._rows[name] for name in names)

    def get(self, name: str) -> dict[str, Any]:
        return self._rows[name]

    def put(self, name: str, is_partial: bool = False, **fields: Any) -> None:
        """Write a row, in place of the one of that name. `is_partial`: more rounds of it will come."""
        self._rows[name] = {"row": name, **fields, **({"partial": True} if is_partial else {})}
        self._save(is_complete=False)

    def done(self) -> dict[str, Any]:
        """The finished document."""
        return self._save(is_complete=True)

    def _earlier(self) -> list[dict[str, Any]]:
        if self._out is None or not self._out.exists():
            return []
        if self._commit is None or self._commit.endswith(DIRTY):
            return []
        found = json.loads(self._out.read_text())
        same = (found.get("name"), found.get("commit"), found.get("quick"), found.get("complete")) == (
            self._name,
            self._commit,
            self._is_quick,
            False,
        )
        return [row for row in found["rows"] if "partial" not in row] if same else []

    def _save(self, is_complete: bool) -> dict[str, Any]:
        machine = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load_1m": round(os.getloadavg()[0], 2),
        }
        made = {
            "name": self._name,
            "commit": self._commit,
            "machine": machine,
            "quick": self._is_quick,
            "complete": is_complete,
            "rows": list(self._rows.values()),
        }
        if self._out is not None:
            part = self._out.with_suffix(".part")  # a run that is cut off in the middle of a write
            part.write_text(json.dumps(made, indent=2) + "\n")
            part.replace(self._out)
        return made


def _commit() -> str | None:
    commit, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    return commit + DIRTY if commit and changed else commit or None


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of one figure over another, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
