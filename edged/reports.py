"""What a rank told of its steps, kept beside its checkpoints: a coordinator that was gone is told again.

state_folder/told.jsonl   [kind, step, values] a line, in order
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = "told.jsonl"
KEPT = 20_000  # reports; a coordinator that misses more has a gap in its list of losses

Report = tuple[str, int, dict[str, float]]


class Reports:
    """Of one rank of one job. A disk that is full costs the repetition, not the training."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / FILE

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([kind, step, dict(values)]) + "\n")

    def begin(self, step: int) -> list[Report]:
        """What was told of steps before `step`, where the rank goes on; what came after is given up."""
        kept = [report for report in self._read() if report[1] < step][-KEPT:]
        with contextlib.suppress(OSError):
            if self._path.exists():
                half = self._path.with_suffix(".half")
                half.write_text("".join(json.dumps(report) + "\n" for report in kept))
                os.replace(half, self._path)
        return kept

    def _read(self) -> list[Report]:
        found = []
        with contextlib.suppress(OSError), self._path.open() as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):  # the last one may be half there
                    kind, step, values = json.loads(line)
                    found.append((str(kind), int(step), dict(values)))
        return found
