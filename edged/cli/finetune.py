"""`edged finetune`: training jobs. The job's file, and data that it names by path, are read here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config
from ..client import connect
from ..errors import ConfigError
from . import options, output
from .asking import open_file
from .generating import Stream, ended
from .options import HomeOption, JsonLinesOption, JsonOption
from .output import Document, note
from .tables import sized

PLOTS = (".png", ".svg")
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
NAMED_MAX = 3  # nodes in a line; more are counted


def finetune(
    kind: Annotated[str, typer.Argument(metavar="split|federated|local")],
    settings: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The job's file.")],
    resume: Annotated[str | None, typer.Option(metavar="JOB", help="Go on with an ended job.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the loss, as .png or .svg.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Answer with the job's id at once.")] = False,
    as_lines: JsonLinesOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Train an adapter together with other nodes (split, federated), or on this one (local).

    Ctrl-C cancels the job, which --resume goes on with. A job whose terminal is closed goes on.
    """
    options.check_form(as_json, as_lines)
    if plot is not None:
        _check_plot(plot, detach)
    table = config.load_table(settings)
    if kind == "local" and isinstance(table.get("data"), str):
        table["clients"] = [{"data": table.pop("data")}]
    with _open_data(table, settings.parent) as (indices, files), connect(home) as client:
        request = {
            "kind": kind,
            "name": re.sub(r"[^A-Za-z0-9_.\-]", "-", settings.stem).strip(".-") or "adapter",
            "settings": table,
            "file_clients": indices,
            "resume": resume,
            "detach": detach,
        }
        stream = TrainingStream(client, as_json=as_json, as_lines=as_lines, cancels=not detach)
        document = stream.run("finetune", request, files)
    if detach and not (as_json or as_lines):
        print(document.get("job_id"))
        return 0
    code = ended(document, stream, training_summary)
    if plot is not None and document.get("loss"):
        _draw(plot, document)
    return code


@contextlib.contextmanager
def _open_data(table: Document, folder: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Clients whose data is a path, and the open files: the daemon may not see them."""
    indices: list[int] = []
    files: list[int] = []
    clients = table.get("clients")
    try:
        for index, client in enumerate(clients if isinstance(clients, list) else ()):
            named = client.get("data") if isinstance(client, dict) else None
            if isinstance(named, str) and ("/" in named or named.endswith((".jsonl", ".json"))):
                files.append(open_file(folder / named, "data file"))
                indices.append(index)
        yield indices, files
    finally:
        for file in files:
            os.close(file)


class TrainingStream(Stream):
    """A training's events: a line that is written over on a terminal, a line now and then elsewhere."""

    def _show_person(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "step":
            self._show_step(event)
            return
        if kind not in ("planned", "eval", "interrupted") and not (
            kind == "waiting" and event.get("until") is None
        ):
            super()._show_person(event)
            return
        self._progress.clear()
        if kind == "planned":
            note(_plan_text(event))
        elif kind == "eval":
            rouge = f", Rouge-L {event['rouge_l']:.3f}" if "rouge_l" in event else ""
            note(f"step {event.get('step')}: held-out loss {event.get('loss', 0):.4f}{rouge}")
        elif kind == "waiting":
            note(f"[waits: {output.printable(str(event.get('because')))}]")
        elif kind == "interrupted":
            note(
                f"[interrupted at step {event.get('at_step')}: {output.printable(str(event.get('reason')))}]"
            )

    def _show_step(self, event: dict[str, Any]) -> None:
        step, steps = int(event.get("step", 0)) + 1, int(event.get("steps", 0))
        text = step_text(event, step, steps)
        if sys.stderr.isatty():
            self._progress.show({"event": "progress", "text": text})
        elif step == steps or step % max(1, steps // 20) == 0:
            note(text)


def step_text(event: dict[str, Any], step: int, steps: int) -> str:
    """Bar, step, loss, tokens/s, bytes, joules, time left."""
    filled = 12 * step // max(1, steps)
    seconds, tokens = float(event.get("seconds") or 0), float(event.get("tokens") or 0)
    parts = [f"[{'#' * filled}{'.' * (12 - filled)}] {step}/{steps}", f"loss {event.get('loss', 0):.4f}"]
    if seconds:
        parts.append(f"{tokens / seconds:.0f} tok/s")
    parts.append(str(sized(event.get("bytes_sent"))))
    if (joules := event.get("joules")) is not None:
        parts.append(f"{joules:.0f} J")
    if seconds:
        parts.append(f"{_clock(seconds * (steps - step))} left")
    return " ".join(parts)


def _plan_text(event: dict[str, Any]) -> str:
    plan = event.get("plan") or {}
    price = plan.get("predicted") or {}
    roles = [
        f"{role.get('name')} blocks {role['layers'][0]}-{role['layers'][1]} ({sized(role['memory_bytes'])})"
        for role in plan.get("roles", ())
    ]
    parts = [output.printable("; ".join(roles)), f"{sized(price.get('bytes_sent'))} to send"]
    if price.get("seconds"):
        parts.append(f"about {_clock(price['seconds'])}")
    start = f", from step {event['step']}" if event.get("step") else ""
    return f"[{', '.join(parts)}{start}]"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def training_summary(document: Document) -> str:
    """What a person wants to know at the end: the loss as a line of bars, and what to do with the adapter."""
    if "adapter" not in document:
        return f"[job {document.get('job_id')}]"
    losses, evals = document.get("loss") or [], document.get("eval_loss") or []
    lines = [f"loss {bars(losses)} {losses[0]:.3f} to {losses[-1]:.3f}"] if losses else []
    if evals:
        lines.append(f"held-out loss {evals[0]:.4f} to {evals[-1]:.4f}")
    parts = [f"adapter {document['adapter']}", f"{document.get('steps')} steps"]
    parts.append(f"{sized(document.get('bytes_sent'))} sent")
    if document.get("joules") is not None:
        parts.append(f"{document['joules']:.0f} J ({document.get('joules_source')})")
    return "\n".join([*lines, *egress_lines(document), f"[{'; '.join(parts)}]"])


def egress_lines(document: Document) -> list[str]:
    """What was sent, a line for each kind of message: how much, from and to whom."""
    kinds: dict[str, list[Document]] = {}
    for row in document.get("egress") or ():
        kinds.setdefault(str(row.get("kind")), []).append(row)
    names = {
        role.get("node"): str(role.get("name")) for role in (document.get("plan") or {}).get("roles", ())
    }
    lines = []
    for kind, rows in sorted(kinds.items(), key=lambda item: -sum(row["bytes"] for row in item[1])):
        ends = [_who({names.get(row[end], str(row[end])[:8]) for row in rows}) for end in ("from", "to")]
        way = f"among {ends[0]}" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        count, size = (sum(row[key] for row in rows) for key in ("messages", "bytes"))
        told = f" in {count} message{'s' if count > 1 else ''}" if count else ""
        lines.append(output.printable(f"sent {kind}: {sized(size)}{told}, {way}"))
    return lines


def _who(names: set[str]) -> str:
    return ", ".join(sorted(names)) if len(names) <= NAMED_MAX else f"{len(names)} nodes"


def bars(values: Sequence[float]) -> str:
    """A line of at most WIDTH characters, each a mean of its part of the values."""
    count = min(WIDTH, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low or 1) * (len(BARS) - 1))] for mean in means)


def _check_plot(path: Path, detach: bool) -> None:
    """Before hours of training rather than after them."""
    if path.suffix not in PLOTS or detach:
        came = "--detach came, too" if detach else f"{path.name!r} came"
        raise ConfigError(
            f"expected a plot file that ends in {' or '.join(PLOTS)}, and to wait for it; {came}",
            remedy="name it otherwise, or drop --detach",
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"expected a folder for the plot at {path.parent}", remedy="make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("expected matplotlib, which draws plots", remedy="pip install 'edged[plan]'")


def _draw(path: Path, document: Document) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.plot(range(1, len(document["loss"]) + 1), document["loss"], linewidth=1.0, label="training")
    evals = document.get("evals") or []
    axes.plot([row["step"] for row in evals], [row["loss"] for row in evals], "o-", label="held-out")
    axes.set(xlabel="step", ylabel="loss", title=f"{document['adapter']}: {document['plan']['strategy']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
