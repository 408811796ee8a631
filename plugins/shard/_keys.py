"""The keys of a model file that tell its architecture's sizes, read with their types checked."""

from __future__ import annotations

import math
from typing import Any

from edged import EngineError

from .._gguf import Head


class Keys:
    """Typed access to a file's keys; a missing or misfit one is an EngineError that names it."""

    def __init__(self, head: Head, architecture: str) -> None:
        self.head, self.prefix = head, architecture + "."

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self._misfit(name, value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._misfit(name, value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._misfit(name, value)
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._misfit(name, value)
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.head.keys.get(self.prefix + name, default)
        if value is None:
            raise EngineError(f"{self.head.path} lacks the key {self.prefix + name}")
        return value

    def _misfit(self, name: str, value: Any) -> EngineError:
        return EngineError(
            f"{self.head.path}: {self.prefix + name} is {value!r}, which this engine cannot use"
        )
