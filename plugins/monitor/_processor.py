"""The processor's name and load, as functions over a root directory. Anything missing is None."""

from __future__ import annotations

import re
from pathlib import Path

from ._files import as_float, text


def cpu_name(root: Path) -> str | None:
    """As /proc/cpuinfo names it, else the board as the device tree does."""
    cpuinfo = text(root / "proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:[ \t]*(\S[^\n]*)$", cpuinfo, re.MULTILINE)
        if match:
            return match[1].strip()[:100]
    board = (text(root / "proc/device-tree/model") or "").rstrip("\0").strip()
    return board[:100] or None


def load_1m(root: Path) -> float | None:
    first = (text(root / "proc/loadavg") or "").partition(" ")[0]
    return as_float(first)
