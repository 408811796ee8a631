"""`edged plan, jobs, cancel`: what a job would cost, and what became of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..client import connect
from ..errors import ConfigError
from . import options, output
from .asking import ask
from .finetune import TrainingStream, egress_lines, training_summary
from .generating import ended
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
from .output import Document, note, show
from .tables import sized, table


def plan(
    model: ModelOption,
    strategy: StrategyOption = "auto",
    policy: PolicyOption = None,
    nodes: NodesOption = None,
    shares: SharesOption = None,
    adapter: AdapterOption = None,
    private: PrivateOption = False,
    allow_guest: GuestOption = False,
    explain: Annotated[bool, typer.Option("--explain", help="Candidates that were refused, too.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The plan without running it, and every candidate with its price."""
    names = options.nodes(nodes)
    asked = {
        "model": model,
        "strategy": strategy,
        "policy": policy,
        "nodes": names,
        "shares": options.shares(shares, names),
        "adapter": adapter,
        "private": private,
        "allow_guest": allow_guest,
        "explain": explain,
    }
    show(ask(home, "plan", asked), as_json, lambda document: _show_plan(document, explain))


def jobs(
    job: Annotated[str | None, typer.Argument(metavar="[ID|rm]", help="One job; `rm ID` deletes it.")] = None,
    target: Annotated[str | None, typer.Argument(metavar="[ID]", help="The job that rm deletes.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Attach to the job's stream.")] = False,
    as_lines: JsonLinesOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """The job table; one job; `jobs rm ID` deletes a job with its prompt and text."""
    options.check_form(as_json, as_lines)
    if as_lines and not follow:
        raise ConfigError("expected --jsonl with --follow; it came alone", remedy="use --json")
    if job == "rm":
        if target is None:
            raise ConfigError("expected the id of a job to delete; none came", remedy="edged jobs rm ID")
        show(ask(home, "jobs.rm", {"job": target}), as_json, lambda _: print(f"deleted {target}"))
        return 0
    if target is not None:
        raise ConfigError(f"expected one job; {job!r} and {target!r} came", remedy="edged jobs ID")
    if job is None:
        if follow:
            raise ConfigError(
                "expected the id of a job to follow; none came", remedy="edged jobs ID --follow"
            )
        show(ask(home, "jobs"), as_json, _show_jobs)
        return 0
    if not follow:
        show(ask(home, "jobs.show", {"job": job, "follow": False}), as_json, _show_jobs)
        return 0
    with connect(home) as client:
        stream = TrainingStream(client, as_json=as_json, as_lines=as_lines)
        document = stream.run("jobs.show", {"job": job, "follow": True})
        return ended(document, stream, training_summary if "loss" in document else None)


def cancel(
    job: Annotated[str, typer.Argument(metavar="ID", help="A job's id, or the start of one.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cancel a job."""
    show(ask(home, "cancel", {"job": job}), as_json, lambda _: print(f"cancelled {job}"))


# --- for a person -----------------------------------------------------------------------------------


def _show_jobs(document: Document) -> None:
    found = document["jobs"]
    rows = [
        (
            job.get("job_id"),
            job.get("kind"),
            job.get("state"),
            job.get("created_at"),
            job.get("epoch"),
            _percent(job.get("progress")),
            _because(job),
        )
        for job in found
    ]
    table(("job", "kind", "state", "created", "epoch", "progress", "because"), rows, empty="no jobs")
    for job in found:
        if text := job.get("text"):  # of one job only
            print(f"\n{output.printable(text)}")
        if sent := egress_lines(job.get("result") or {}):
            print("\n" + "\n".join(sent))


def _because(job: Document) -> str | None:
    """Why it failed, or what it waits for."""
    if error := job.get("error"):
        return str(error.get("message"))
    waits = job.get("waits")
    if not waits:
        return None
    until = f" until {waits['until']}" if waits.get("until") else ""
    return f"waits{until}: {waits.get('because')}"


def _show_plan(document: Document, explain: bool) -> None:
    candidates, chosen = document.get("candidates") or [], document.get("chosen")
    rows = []
    for index, candidate in enumerate(candidates):
        refusal = candidate.get("refused_because")
        if refusal and not explain and chosen is not None:
            continue
        price = candidate.get("predicted") or {}
        rows.append(
            (
                "*" if index == chosen else "",
                candidate.get("strategy"),
                [_role(role) for role in candidate.get("roles", ())],
                price.get("ttft_ms"),
                price.get("tpot_ms"),
                price.get("joules_per_token"),
                sized(price.get("bytes_per_token")),
                sized(sum((candidate.get("memory_bytes") or {}).values())),
                price.get("load_ms"),
                refusal,
            )
        )
    headings = (
        "",
        "strategy",
        "roles",
        "ttft ms",
        "tpot ms",
        "J/token",
        "B/token",
        "memory",
        "load ms",
        "refused because",
    )
    table(headings, rows, empty="no candidate")
    if explain:
        print("\n".join(document.get("explanation") or ()))
    elif chosen is None:
        note("no plan can run; --explain says why for each candidate")


def _role(role: dict[str, Any]) -> str:
    first, last = role.get("layers") or (None, None)
    share = role.get("share")
    part = f" {share:.0%}" if isinstance(share, float) and share < 1 else ""
    return f"{role.get('name') or str(role.get('node'))[:8]} {first}-{last}{part}"


def _percent(progress: Any) -> str | None:
    return f"{progress:.0%}" if isinstance(progress, int | float) else None
