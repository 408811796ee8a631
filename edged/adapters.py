"""Adapters of this node."""

from __future__ import annotations
import json, os, shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping
from .identity import Home


@dataclass(frozen=True)
class Adapter:
    name: str


class AdapterStore:
    def __init__(self, home: Home) -> None:
        self._folder = home.adapters

    def adopt(self, folder: Path, name: str, meta: Mapping[str, Any]) -> Adapter:
        target = self._folder / name
        n = 1
        while target.exists():
            n += 1
            target = self._folder / f"{name}-{n}"
        shutil.copytree(folder, target)
        (target / "meta.json").write_text(json.dumps(dict(meta)))
        return Adapter(target.name)
