"""`edged chat`: a loop of generations with history."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..client import Client, connect
from ..errors import ConfigError, JobError
from . import options, output
from .generating import REQUEST, Stream
from .options import AdapterOption, HomeOption, JsonOption, NodesOption, StrategyOption
from .output import Document, note

TOKENS_MAX = 512  # an answer; the conversation itself is bounded by the model's context


def chat(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", help="Default: the only one.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", help="At most N tokens an answer.")] = TOKENS_MAX,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.8,
    strategy: StrategyOption = "auto",
    adapter: AdapterOption = None,
    nodes: NodesOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """A conversation in the terminal. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    options.check_sampling(n=n, temperature=temperature)
    messages = [{"role": "system", "content": system}] if system else []
    with connect(home) as client:
        request = REQUEST | {
            "model": model if model is not None else _only_model(client),
            "n": n,
            "temperature": temperature,
            "strategy": strategy,
            "adapter": adapter,
            "nodes": options.nodes(nodes),
        }
        while (said := _said(as_json)) is not None:
            asked = [*messages, {"role": "user", "content": said}]
            answer = _answer(client, request | {"messages": asked}, as_json)
            if answer is not None:
                messages = [*asked, {"role": "assistant", "content": answer}]
    if as_json:
        output.show({"model": request["model"], "messages": messages}, True, print)


def _said(as_json: bool) -> str | None:
    """The next line that is not empty; None at the end."""
    prompt = "> " if sys.stdin.isatty() and not as_json else ""
    try:
        while not (line := input(prompt).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None
    return line


def _answer(client: Client, request: Document, as_json: bool) -> str | None:
    """The answer, or what there was of it when it was stopped; None when there was none.

    A person may go on after a failed job; a script gets its error.
    """
    try:
        document = Stream(client, as_json=as_json, cancels=True).run("generate", request)
    except JobError as error:
        if not sys.stdin.isatty():
            raise
        note(f"edged: {error}; {error.remedy}" if error.remedy else f"edged: {error}")
        return None
    return str(document.get("text") or "") or None


def _only_model(client: Client) -> str:
    names = [model["name"] for model in client.call("models.ls").get("models", ()) if model.get("complete")]
    if len(names) == 1:
        return str(names[0])
    raise ConfigError(
        f"expected --model, or one complete model in the store; stored: {', '.join(names) or 'none'}",
        remedy="name one with --model" if names else "edged models add FILE",
    )
