"""Files that a command names: opened here and handed over, since the daemon may not see them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ConfigError


def open_file(file: Path, what: str) -> int:
    """A descriptor of a regular file; the caller closes it. `what` it should be, for the error."""
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
