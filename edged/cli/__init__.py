"""The command line: one table of commands, each imported only when it is the one that was asked for.

`main` is the outermost frame: it turns every way to end into an exit code, one line on standard
error and, with --json, one document on standard output.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import ConfigError, EdgedError
from ..version import VERSION
from . import output

COMMANDS = {  # name: (module of this package, what it does)
    "init": ("init", "Make this device a node: home, keys and profile."),
    "run": ("run", "Run the daemon in the foreground."),
    "status": ("node", "This node and its health."),
    "peers": ("node", "Peers, and nodes seen on the network."),
    "invite": ("pairing", "Print a one-time token for another device."),
    "join": ("pairing", "Join the node that printed a token."),
    "trust": ("pairing", "Show or change what a peer may do here."),
    "forget": ("pairing", "Revoke a peer, everywhere and at once."),
    "drain": ("node", "Finish or hand over all roles, then leave."),
    "plugins": ("node", "Loaded and installed plugins."),
    "profile": ("node", "What this device is and can do."),
    "models": ("models", "The model store: ls, add, rm, pull."),
    "data": ("data", "Data sets offered to training jobs: ls, add, rm."),
    "plan": ("jobs", "Price the ways to run a model, without running it."),
    "recommend": ("recommend", "Model size and tuning method for this device."),
    "generate": ("generate", "One generation, streamed."),
    "chat": ("chat", "A conversation in the terminal."),
    "jobs": ("jobs", "The job table; one job; `jobs rm ID`."),
    "cancel": ("jobs", "Cancel a job."),
    "finetune": ("finetune", "Training jobs: split, federated, local."),
    "adapters": ("adapters", "LoRA adapters: ls, add, export, rm."),
    "simulate": ("simulate", "Scheduling over simulated devices and time."),
    "bench": ("bench", "Benchmarks, from a checkout."),
    "config": ("settings", "Effective settings and their origin."),
    "check": ("check", "Everything that could stop this node from working."),
    "demo": ("demo", "Several nodes on this machine, working together."),
}
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError, wherever this typer keeps it
INTERRUPTED = 130


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows "?" instead of failing
            stream.reconfigure(errors="replace")
    words = _common_options_last(arguments) or ["--help"]
    as_json = "--json" in words or "--jsonl" in words
    try:
        return _invoke(words)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except EdgedError as error:
        return output.fail(error, as_json)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:  # outermost frame: a person gets one line, whatever happened
        return output.fail(_unexpected(error), as_json)


def _invoke(words: Sequence[str]) -> int:
    app = _app(next((word for word in words if not word.startswith("-")), ""))
    try:
        command = typer.main.get_command(app)
        code = command.main(args=list(words), prog_name="edged", standalone_mode=False)
        sys.stdout.flush()
    except USAGE_ERROR as error:
        raise _usage(error) from error
    return code if isinstance(code, int) else 0


def _app(wanted: str) -> typer.Typer:
    """Every command by name and summary; only the wanted one is imported."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(edged)
    for name, (module, summary) in COMMANDS.items():
        if name != wanted:
            app.command(name, help=summary)(_not_imported)
            continue
        command = getattr(importlib.import_module(f".{module}", __name__), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edged {VERSION}")
        raise typer.Exit


def edged(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Makes the machines a person owns into one, for language-model work none could do alone.

    Every command takes --home DIR and --json. Start with `edged demo`, or with `edged init` and
    `edged run`.
    """


def _not_imported() -> None:
    raise AssertionError("the wanted command is always imported")


def _common_options_last(arguments: Sequence[str]) -> list[str]:
    """`edged --home DIR status` means `edged status --home DIR`."""
    rest, common = list(arguments), []
    while rest and (rest[0] in ("--json", "--home") or rest[0].startswith("--home=")):
        taken = 2 if rest[0] == "--home" else 1
        common += rest[:taken]
        del rest[:taken]
    return rest + common


def _usage(error: Exception) -> ConfigError:
    """A wrong command line in the form of every other error."""
    text = str(getattr(error, "format_message", error.__str__)())
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "edged"
    return ConfigError(text[:1].lower() + text[1:].rstrip("."), remedy=f"see `{path} --help`", code="usage")


def _unexpected(error: Exception) -> EdgedError:
    if os.environ.get("EDGED_DEBUG") == "1":
        traceback.print_exception(error)
    return EdgedError(
        f"unexpected {type(error).__name__}: {error}", remedy="run it again with EDGED_DEBUG=1 and report it"
    )
