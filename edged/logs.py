"""How a line of a log looks, of the daemon and of its workers alike."""

from __future__ import annotations

import logging
import sys


class Formatter(logging.Formatter):
    """Constant message, then the fields of `extra`."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in self._KNOWN}
        return super().format(record) + "".join(f" {key}={value}" for key, value in fields.items())


def to_stderr(line: str, level: int | str = logging.WARNING) -> None:
    """Of this process: every record from `level` up, as `line` says, with its fields."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(line))
    logging.basicConfig(level=level, handlers=[handler])
