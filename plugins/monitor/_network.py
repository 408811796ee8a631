"""What kind of connection this device has to the world. Functions over a root directory.

Sources: the kernel's net class (uevent, wireless) and /proc/net/route.
"""

from __future__ import annotations

import re
from pathlib import Path

from ._files import text

# Modems, dial-up, a phone's tether by USB or Bluetooth: each is usually paid for by the byte.
_METERED = re.compile(r"wwan|ppp|rmnet|rndis|bnep|usb\d|cdc_ether")


def uplink(root: Path) -> str | None:
    """The interface of the default route with the least metric."""
    found = []
    for line in (text(root / "proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000" and fields[6].isdigit():
            found.append((int(fields[6]), fields[0]))
    return min(found)[1] if found else None


def is_wireless(root: Path) -> bool | None:
    """Does the way out go over the air? None without a default route."""
    name = uplink(root)
    if name is None:
        return None
    folder = root / "sys/class/net" / name
    is_marked = (folder / "wireless").exists() or (folder / "phy80211").exists()
    return is_marked or _kind(root, name) in ("wlan", "wwan")


def is_metered(root: Path) -> bool | None:
    """Is the way out likely paid for by the byte? A guess from the kind of device; None without a way."""
    name = uplink(root)
    if name is None:
        return None
    return bool(_METERED.match(name) or _METERED.match(_kind(root, name)))


def _kind(root: Path, name: str) -> str:
    """ "wlan", "wwan", "bluetooth", ...; "" for plain Ethernet."""
    match = re.search(r"^DEVTYPE=(\S+)$", text(root / "sys/class/net" / name / "uevent") or "", re.MULTILINE)
    return match[1] if match else ""
