"""Asking the daemon one thing, with its progress shown to the person who waits."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..client import ANSWER_S, connect
from ..errors import ConfigError
from . import tables
from .output import Document, printable


def ask(
    home: Path | None,
    kind: str,
    body: Mapping[str, Any] | None = None,
    fds: Sequence[int] = (),
    *,
    silence_s: float | None = ANSWER_S,
) -> Document:
    """The document that answers a request."""
    with connect(home) as client:
        events = client.stream(kind, body, fds, silence_s=silence_s)
        progress = ProgressLine()
        try:
            while True:
                progress.show(next(events))
        except StopIteration as end:
            document: Document = end.value
            return document
        finally:
            progress.clear()


def open_file(file: Path, what: str) -> int:
    """A descriptor to hand over with a request; ConfigError unless it is a regular, readable file."""
    try:  # without O_NONBLOCK a pipe without a writer would hang here
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"expected a readable {what} at {file}; {error.strerror}", remedy="check the path"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"expected a {what} at {file}; it is no regular file", remedy="name a file")
    return descriptor


class ProgressLine:
    """One line on standard error that is written over; nothing where nobody watches."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "progress" and sys.stderr.isatty():
            text = printable(_progress_text(event))[:78]
            print(f"\r{text:<{self._shown}}", end="", file=sys.stderr, flush=True)
            self._shown = len(text)

    def clear(self) -> None:
        if self._shown:
            print(f"\r{'':<{self._shown}}\r", end="", file=sys.stderr, flush=True)
            self._shown = 0


def _progress_text(event: Mapping[str, Any]) -> str:
    if text := event.get("text"):
        return str(text)
    done, total = event.get("bytes"), event.get("total")
    if isinstance(done, int) and isinstance(total, int) and total:
        return f"{tables.sized(done)} of {tables.sized(total)}, {100 * done // total} %"
    return "at work"
