"""The asked side of `_peer`: alone, since a program that it runs may have nothing of edged installed."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def serve(runner: object) -> None:
    """Answer requests until end of file. Standard output is for answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            made: dict[str, Any] = {"answer": getattr(runner, what)(*arguments)}
        except Exception as error:  # the outermost frame of this process: the asker raises it
            made = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(made) + "\n")
        answers.flush()
