"""`edged config`: every effective setting and where it came from. Needs no daemon."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import config as profiles
from ..identity import Home, default_home
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import table


def config(
    explain: Annotated[bool, typer.Option("--explain", help="Where each value came from.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every effective setting of the profile; --explain says where each came from."""
    path = (Home(home) if home is not None else default_home()).profile
    found = [
        {"key": setting.key, "value": _plain(setting.value), "origin": setting.origin}
        for setting in profiles.explain(profiles.read(path), path)
    ]
    show({"settings": found}, as_json, lambda document: _show(document, explain))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(document: Document, explain: bool) -> None:
    keys = ("key", "value", "origin") if explain else ("key", "value")
    table(keys, [[setting[key] for key in keys] for setting in document["settings"]])
