"""`edged generate`: one generation."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import config
from ..client import connect
from ..errors import ConfigError
from . import options
from .generating import REQUEST, Stream, ended
from .options import (
    AdapterOption,
    GuestOption,
    HomeOption,
    JsonLinesOption,
    JsonOption,
    ModelOption,
    NodesOption,
    PolicyOption,
    PrivateOption,
    SharesOption,
    StrategyOption,
)

PROMPT_BYTES_MAX = 2 << 20  # a header of the control socket holds twice that


def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="P", help="The prompt; - reads it.")],
    n: Annotated[int, typer.Option("-n", metavar="N", help="At most N tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(metavar="K", help="0: of all tokens.")] = 40,
    top_p: Annotated[float, typer.Option(metavar="P", help="Of the likeliest with this mass.")] = 0.95,
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed draws the same.")] = None,
    strategy: StrategyOption = "auto",
    policy: PolicyOption = None,
    nodes: NodesOption = None,
    shares: SharesOption = None,
    adapter: AdapterOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Without the model's chat template.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to N tokens.")] = False,
    numerics: Annotated[
        str, typer.Option(metavar="fast|exact", help="exact: the same bits anywhere.")
    ] = "fast",
    recovery: Annotated[
        str, typer.Option(metavar="fast|exact", help="After a loss; exact: as it was made.")
    ] = "fast",
    private: PrivateOption = False,
    allow_guest: GuestOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Never another node or strategy; a loss ends it.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Answer with the job's id at once.")] = False,
    deferrable: Annotated[
        str | None, typer.Option(metavar="6h", help="So long its start may wait, for a policy like carbon.")
    ] = None,
    as_lines: JsonLinesOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """One generation, streamed. Ctrl-C cancels it; a second Ctrl-C leaves at once."""
    options.check_form(as_json, as_lines)
    options.check_sampling(n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    names = options.nodes(nodes)
    request = REQUEST | {
        "model": model,
        "prompt": _read(prompt),
        "n": n,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "strategy": strategy,
        "policy": policy,
        "nodes": names,
        "shares": options.shares(shares, names),
        "raw": raw,
        "ignore_eos": ignore_eos,
        "numerics": options.one_of("--numerics", numerics, ("fast", "exact")),
        "recovery": options.one_of("--recovery", recovery, ("fast", "exact")),
        "private": private,
        "allow_guest": allow_guest,
        "detach": detach,
        "strict": strict,
        "adapter": adapter,
        "deferrable_s": None if deferrable is None else float(config.duration(deferrable, "--deferrable")),
    }
    with connect(home) as client:
        stream = Stream(client, as_json=as_json, as_lines=as_lines, cancels=not detach)
        document = stream.run("generate", request)
    if detach and not (as_json or as_lines):
        print(document.get("job_id"))
        return 0
    return ended(document, stream)


def _read(prompt: str) -> str:
    """The prompt, from standard input for "-". ConfigError, which never holds the prompt."""
    try:
        text = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1).decode() if prompt == "-" else prompt
        count = len(text.encode())
    except UnicodeError as error:
        raise ConfigError("expected a prompt in UTF-8", remedy="convert it with iconv") from error
    if not 0 < count <= PROMPT_BYTES_MAX:
        raise ConfigError(
            f"expected a prompt of 1 to {PROMPT_BYTES_MAX} bytes; {count} came", remedy="shorten it"
        )
    return text
