"""What a command leaves behind: one JSON document, or words for a person; one line for an error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import EdgedError

Document = dict[str, Any]


def show(document: Document, as_json: bool, person: Callable[[Document], None]) -> None:
    """The document on standard output, or what `person` makes of it."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        person(document)


def line(document: Mapping[str, Any]) -> None:
    """One JSON line, at once."""
    print(json.dumps(document), flush=True)


def note(text: str) -> None:
    """A line for the person who watches, on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def fail(error: EdgedError, as_json: bool) -> int:
    """Say what went wrong, in one line and with --json in one document; the exit code."""
    described = described_error(error)
    text = "; ".join(part for part in (described["message"], described["remedy"]) if part)
    note(f"edged: {text}")
    if as_json:
        print(json.dumps({"error": described}))
    return error.exit_code


def described_error(error: EdgedError) -> dict[str, str]:
    return {"code": error.code, "message": one_line(str(error)), "remedy": one_line(error.remedy)}


def one_line(text: str) -> str:
    return " ".join(text.split())


def printable(text: str) -> str:
    """Without control characters: a model, a file or another node must not drive this terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)
