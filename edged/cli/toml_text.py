"""One value of a TOML text replaced, every comment kept. Reads no TOML: the caller parses the result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence


def with_value(text: str, table: str, key: str, value: Sequence[str] | int, reason: str) -> str:
    """`text` with `key = value` in `table` ("" is the root), and the reason beside it."""
    written = f"{key} = {json.dumps(value)}  # {reason}"  # JSON of texts and numbers is TOML, too
    start, end = _section(text, table)
    if start is None:
        return f"{text.rstrip()}\n\n[{table}]\n{written}\n"
    section = text[start:end]
    assigned = re.compile(rf"^[ \t]*{re.escape(key)}[ \t]*=[ \t]*(\[[^\]]*\])?[^\n]*$", re.MULTILINE)
    if assigned.search(section):
        section = assigned.sub(lambda _: written, section, count=1)
    else:
        section = f"{section.rstrip()}\n{written}\n" + ("\n" if end < len(text) else "")
    return text[:start] + section + text[end:]


def _section(text: str, table: str) -> tuple[int | None, int]:
    """Where the keys of a table stand: after its header, before the next one."""
    headers = list(re.finditer(r"^[ \t]*\[\[?([^\[\]\n]+)\]\]?[ \t]*(?:#[^\n]*)?$", text, re.MULTILINE))
    if not table:
        return 0, headers[0].start() if headers else len(text)
    for index, header in enumerate(headers):
        if header[1].strip() == table:
            return header.end(), headers[index + 1].start() if index + 1 < len(headers) else len(text)
    return None, len(text)
