"""`edged config`: every effective setting and where it came from. Needs no daemon."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import config as profiles
from ..identity import Home, default_home
from ..plugins import Host
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import table


def config(
    explain: Annotated[bool, typer.Option("--explain", help="Where each value came from.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every effective setting of the profile; --explain says where each came from, and lists the keys of
    training jobs' files."""
    path = (Home(home) if home is not None else default_home()).profile
    found = [
        {"key": setting.key, "value": _plain(setting.value), "origin": setting.origin}
        for setting in profiles.explain(profiles.read(path), path)
    ]
    if explain:
        found += _training_keys(profiles.read(path))
    show({"settings": found}, as_json, lambda document: _show(document, explain))


def _training_keys(profile: profiles.Profile) -> list[dict[str, Any]]:
    """Of the files that `edged finetune` takes, by kind of training: the default, and what it is."""
    host = Host()
    host.load(profile.plugins, profile.plugin)
    kinds = host.registrations("edged_trainings")
    return [
        {"key": f"finetune.{name}.{key.key}", "value": _plain(key.default), "origin": key.text}
        for name, training in sorted(kinds.items())
        for key in training.keys
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(document: Document, explain: bool) -> None:
    keys = ("key", "value", "origin") if explain else ("key", "value")
    table(keys, [[setting[key] for key in keys] for setting in document["settings"]])
