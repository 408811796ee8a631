"""The smallest plugin: an engine without weights that says the prompt back. Read it to learn the API.

What it shows, from top to bottom:

- A plugin is a module, found through the entry-point group "edged" and enabled by name in a profile
  (`plugins = ["echo"]`). A hook is a function named in `edged/hookspecs.py` and marked `@hookimpl`.
- This module is light, since the daemon imports it too. What is heavy is named, not imported: the
  engine lives in `_echo_engine.py` and only a worker resolves those dotted names.
- `settings` is the plugin's own table of the profile, `[plugin.echo]`. This plugin has no settings.
- A plugin imports `edged`, its own libraries and underscore modules beside it. Nothing else.

It is also the test double that stands in for a real engine: the same job, plan, worker and channel,
and an answer that everybody knows beforehand. Try it: write a file whose first line is
`edged-echo 1`, `edged models add` it, `edged generate --prompt hello`.

It does not know how to sample: temperature and seed change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edged import EngineEntry, hookimpl

_ENGINE = "edged_plugins._echo_engine"

finished: Counter[str] = Counter()  # ended jobs of this daemon, by the state they ended in


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    """A register hook: called once at startup, it answers with named objects."""
    return [
        EngineEntry(
            name="echo",
            load=f"{_ENGINE}:EchoEngine",
            describe=f"{_ENGINE}:describe",
            measure=f"{_ENGINE}:measure",
            check=f"{_ENGINE}:check",
            settings=settings,
        )
    ]


@hookimpl
def edged_job_finished(state: str) -> None:
    """An observe hook: it takes only those of the specification's arguments that it needs."""
    finished[state] += 1
