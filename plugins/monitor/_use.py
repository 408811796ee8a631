"""Is somebody using this device? Functions over a root directory.

Sources: utmp's custom that a terminal was used when it was last read from; systemd-logind's session files;
the kernel's DRM and backlight classes.
"""

from __future__ import annotations

from pathlib import Path

from ._files import glob, number, text

RECENT_S = 300.0  # whoever typed in the last five minutes is there


def in_use(root: Path, now: float) -> bool | None:
    """Did somebody type in a terminal lately, or look at a screen that is on? None where nothing says.

    `now`: Unix time. A headless server without terminals says nothing.
    """
    said = [_typing(root, now), _watching(root)]
    known = [each for each in said if each is not None]
    return any(known) if known else None


def _typing(root: Path, now: float) -> bool | None:
    ages = []
    for terminal in glob(root, "dev/pts/[0-9]*"):
        try:
            ages.append(now - terminal.stat().st_atime)
        except OSError:
            continue
    return any(age < RECENT_S for age in ages) if ages else None


def _watching(root: Path) -> bool | None:
    """A local graphical session that is active, and a screen that is lit."""
    sessions = [text(path) or "" for path in glob(root, "run/systemd/sessions/*")]
    if not any(sessions):
        return None
    if not any(_is_active(session) for session in sessions):
        return False
    return _is_lit(root) is not False


def _is_active(session: str) -> bool:
    values = dict(line.partition("=")[::2] for line in session.splitlines())
    return (
        values.get("ACTIVE") == "1"
        and values.get("TYPE") in ("x11", "wayland", "mir")
        and values.get("CLASS", "user") == "user"
        and values.get("REMOTE", "0") == "0"
    )


def _is_lit(root: Path) -> bool | None:
    """Any connected screen that is on; None where none says."""
    screens = [
        text(connector / "dpms") == "On"
        for connector in glob(root, "sys/class/drm/card*-*")
        if text(connector / "status") == "connected"
    ]
    lights = [number(light / "bl_power") for light in glob(root, "sys/class/backlight/*")]
    lit = [light == 0 for light in lights if light is not None]
    if lit and not any(lit):  # a laptop's panel stays "On" while its light is off
        return False
    return any(screens or lit) if screens or lit else None
