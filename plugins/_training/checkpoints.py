"""A rank's checkpoints: tensors and a few numbers in one file a step, made whole or not at all.

The last three are kept: ranks are at most one step apart, and a step that all of them have must be among
those. Nothing of them can run code: safetensors, and JSON in its head.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edged import EngineError

KEPT = 3
NAME = re.compile(r"step-(\d{1,9})\.safetensors")


class Checkpoints:
    """In `folder`, which is this rank's of this job alone."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @property
    def steps(self) -> list[int]:
        """At which a whole checkpoint is here; number of steps done."""
        if not self._folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """EngineError, code "disk", where it cannot be written; the earlier ones stay as they are."""
        path = self._path(step)
        making = path.with_suffix(".making")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file(
                {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
                making,
                {"words": json.dumps(dict(words))},
            )
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

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """EngineError where it is damaged."""
        try:
            with safe_open(self._path(step), "pt") as file:
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
