"""Tables and figures for a person. Colours and width are the terminal's; a pipe gets plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .output import printable

PIPE_COLUMNS = 400  # a pipe has no width; no row is cut


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], empty: str = "none") -> None:
    """Rows under headings on standard output; None is shown as a dash."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(heading, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row))
    out = console()
    out.print(made if made.row_count else Text(empty))


def facts(pairs: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in pairs.items():
        made.add_row(name, Text(cell(value)))
    console().print(made)


def console(error: bool = False) -> Console:
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items() if item is not None) or "-"
    return printable(str(value)).replace("\n", " ")


def sized(count: Any) -> str | None:
    """Bytes in the unit that a person reads."""
    if not isinstance(count, int | float):
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def lasting(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.3g} s"
    if hours < 1:
        return f"{minutes:.3g} min"
    return f"{hours:.3g} h" if days < 1 else f"{days:.3g} d"


def short(node_id: Any) -> str | None:
    """The prefix that every command accepts."""
    return node_id[:8] if isinstance(node_id, str) else None
