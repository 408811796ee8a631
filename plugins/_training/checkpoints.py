"""A rank's checkpoints: arrays and a few numbers in one file a step, made whole or not at all.

The last three are kept: ranks are at most one step apart, and a step that all of them have must be among
those. Nothing of them can run code: safetensors, and JSON in its head.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from edged import EngineError

KEPT = 3
NAME = re.compile(r"step-(\d{1,9})\.safetensors")


class Checkpoints:
    """In `folder`, which is this rank's of this job alone; of arrays of `library`. A file of one library's
    can be read with the other."""

    def __init__(self, folder: str, library: Literal["numpy", "torch"] = "numpy") -> None:
        self._folder, self._library = Path(folder), library

    @property
    def steps(self) -> list[int]:
        """At which a whole checkpoint is here; number of steps done."""
        if not self._folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, arrays: Mapping[str, Any], words: Mapping[str, Any]) -> None:
        """EngineError, code "disk", where it cannot be written; the earlier ones stay as they are."""
        path = self._path(step)
        making = path.with_suffix(".making")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            library = importlib.import_module(f"safetensors.{self._library}")
            copies = {name: _copy(array) for name, array in arrays.items()}
            library.save_file(copies, making, {"words": json.dumps(dict(words))})
            with open(making, "rb") as file:
                os.fsync(file.fileno())
            os.replace(making, path)
            for old in self.steps[:-KEPT]:
                self._path(old).unlink()
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                making.unlink()
            raise EngineError(
                f"expected to write the checkpoint of step {step}; {error}",
                remedy="free disk space there, then go on with --resume",
                code="disk",
            ) from error

    def load(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """EngineError where it is damaged."""
        try:
            with safe_open(self._path(step), {"numpy": "np", "torch": "pt"}[self._library]) as file:
                words = json.loads((file.metadata() or {}).get("words", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, words  # noqa: SIM118 - no dict
        except (OSError, SafetensorError, ValueError) as error:
            raise EngineError(f"expected a sound checkpoint of step {step}; {error}", code="disk") from error

    def forget_after(self, step: int) -> None:
        """Later ones are of a trajectory that is given up."""
        for later in self.steps:
            if later > step:
                self._path(later).unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}.safetensors"


def _copy(array: Any) -> Any:
    """In one piece, and of memory that no other array has: torch's writer takes nothing else."""
    if isinstance(array, np.ndarray | np.generic):
        return np.array(array, order="C")
    return array.detach().contiguous().clone()
