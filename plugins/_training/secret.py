"""What noise is drawn from: random bytes that stay in a rank's own folder of a job."""

from __future__ import annotations

import os
from pathlib import Path

SECRET_BYTES = 32


def secret_of(path: Path) -> bytes:
    """Made once for a job, 0600."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_bytes()
        if len(found) == SECRET_BYTES:
            return found
        file = os.open(path, os.O_WRONLY | os.O_TRUNC)  # a power cut came before anything was released
    try:
        made = os.urandom(SECRET_BYTES)
        os.write(file, made)
        os.fsync(file)
    finally:
        os.close(file)
    return made
