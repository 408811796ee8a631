"""Small files of sysfs and procfs. Each may be missing, empty, unreadable or garbled: None then."""

from __future__ import annotations

import re
from pathlib import Path

TEXT_BYTES_MAX = 65536  # the longest file read is /proc/cpuinfo; its first processors are enough


def text(path: Path) -> str | None:
    """A file's text without its end of line; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(TEXT_BYTES_MAX).decode("utf-8", "replace").strip()
    except OSError:  # absent, unplugged meanwhile (ENODEV), asleep (EAGAIN), not ours to read
        return None


def number(path: Path) -> float | None:
    content = text(path)
    return None if content is None else as_float(content)


def as_float(content: str) -> float | None:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,9})?", content):
        return None
    return float(content)


def glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # Android hides parts of /sys
        return []
