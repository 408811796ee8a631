"""`edged run`: the daemon."""

from __future__ import annotations

from ..identity import Home, default_home
from .options import HomeOption, JsonOption


def run(home: HomeOption = None, as_json: JsonOption = False) -> int:
    """Run the daemon in the foreground. SIGTERM lets it finish its work, a second one stops it."""
    from ..daemon import main  # the one command that is the daemon; no other loads it

    return main(Home(home) if home is not None else default_home())
