"""What ranks tell of a training's steps: checked, and made one figure. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .types import TrainingPlan
from .wire import Trained, Used

VALUES_MAX = 128  # figures in one report: a server tells two of each of its members
KEY_CHARS_MAX = 40
UNKNOWN = "unknown"  # kind of bytes whose kind a daemon forgot when it ended
KINDS_MAX = 64  # that are told apart of what one node sent to another: far more than a training has
OTHER = "other"  # all the rest
COUNT_MAX = 2**53  # of a sum, as of a count in `wire.Sent`: the document of a job can hold it
Egress = dict[tuple[str, str, str], tuple[int, int]]  # by sender, receiver, kind: messages and bytes
OWN_WORDS = ("event", "step", "steps", "bytes_sent", "joules")  # of an event, which no report may set


def is_sound(body: Trained, plan: TrainingPlan) -> bool:
    """Is it a report that this rank has to make, with figures that can be kept?"""
    return (
        body.rank in plan.reporters
        and 0 <= body.step <= plan.steps
        and "loss" in body.values
        and len(body.values) <= VALUES_MAX
        and all(
            key.isidentifier() and len(key) <= KEY_CHARS_MAX and key not in OWN_WORDS for key in body.values
        )
        and all(math.isfinite(value) for value in body.values.values())
    )


def mean(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several ranks' figures: sums of `tokens` and `targets`, means by targets of all else.
    A report without targets says nothing of the rest."""
    if len(reports) == 1:
        return dict(reports[0])
    weights = [max(0.0, report.get("targets", 1.0)) for report in reports]
    keys = [key for key in reports[0] if all(key in report for report in reports)]
    found = {
        key: sum(w * report[key] for w, report in zip(weights, reports, strict=True) if w)
        / (sum(weights) or 1.0)
        for key in keys
    }
    sums = {key: sum(report[key] for report in reports) for key in ("tokens", "targets") if key in keys}
    return found | sums | {"seconds": max(report.get("seconds", 0.0) for report in reports)}


def with_spent(done: Mapping[str, float], surveys: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last report, with the most that any rank's survey says is "spent" of something, such as an epsilon:
    whoever collects the adapter may have nothing of it."""
    found = dict(done)
    for survey in surveys:
        spent = survey.get("spent")
        for key, value in list(spent.items())[:VALUES_MAX] if isinstance(spent, Mapping) else ():
            if isinstance(key, str) and type(value) in (int, float) and value >= 0:  # not NaN
                found[key[:KEY_CHARS_MAX]] = max(found.get(key[:KEY_CHARS_MAX], 0.0), float(value))
    return found


def egress_with(before: Egress, used: Sequence[Used | None], nodes: Sequence[str]) -> Egress:
    """What was sent in earlier epochs, and what every rank says that it sent in this one. `nodes` by rank.
    Kinds beyond KINDS_MAX are one, however many a rank makes up in how many epochs."""
    found = dict(before)
    kinds = Counter((source, to) for source, to, _ in found)
    for source, role in zip(nodes, used, strict=False):
        for each in role.sent if role is not None else ():
            if each.to >= len(nodes):
                continue
            key = (source, nodes[each.to], each.kind)
            if key not in found and kinds[key[:2]] >= KINDS_MAX:
                key = (*key[:2], OTHER)
            kinds[key[:2]] += key not in found
            messages, size = found.get(key, (0, 0))
            found[key] = min(messages + each.messages, COUNT_MAX), min(size + each.bytes, COUNT_MAX)
    return found


def egress_rows(egress: Egress) -> list[dict[str, Any]]:
    """As a job's document shows it, and `egress_of` reads it."""
    return [
        {"from": source, "to": to, "kind": kind, "messages": messages, "bytes": size}
        for (source, to, kind), (messages, size) in sorted(egress.items())
    ]


def egress_of(rows: Sequence[Mapping[str, Any]], total: int) -> Egress:
    """Of rows that were stored when a job had sent less than the `total` bytes that are known since."""
    found = {
        (str(row["from"]), str(row["to"]), str(row["kind"])): (int(row["messages"]), int(row["bytes"]))
        for row in rows
    }
    rest = total - sum(size for _, size in found.values())
    if rest > 0:
        key = ("", "", UNKNOWN)
        messages, size = found.get(key, (0, 0))
        found[key] = messages, size + rest
    return found


def made_of(
    settings: Mapping[str, Any], log: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, Any]:
    """How an adapter of a federated training came to be, beside its job and steps: method, rounds, and each
    member with the rounds in which its update counted. `log`: as `rounds_log`; `names`: of nodes. Empty of
    other kinds."""
    if not log:
        return {}
    counted: dict[str, int] = dict.fromkeys((node for row in log for node in row["bytes_down"]), 0)
    for row in log:
        for node in row["members"]:
            counted[node] += 1
    members = [
        {"node": node, "name": names.get(node, node[:8]), "rounds": rounds}
        for node, rounds in counted.items()
    ]
    told = {"method": settings.get("method"), "rounds": len(log), "members": members}
    return told | {"masked": True} if settings.get("masked") else told


def rounds_log(
    steps: Sequence[tuple[int, str, Mapping[str, float]]], nodes: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each round of a federated training, from what its server told: "down_3" and "up_3" are bytes
    to and from rank 3, whose update counted where it has an "up"; "out_3_it_is_not_charging" why it did not.
    `nodes` by rank. Empty of other kinds."""
    found = []
    for step, kind, values in steps:
        if kind != "step" or not any(key.startswith("down_") for key in values):
            continue
        sent = {
            way: {
                node: int(values[f"{way}_{rank}"])
                for rank, node in enumerate(nodes)
                if f"{way}_{rank}" in values
            }
            for way in ("up", "down")
        }
        row: dict[str, Any] = {"round": step, "loss": values["loss"], "residual": values.get("residual")}
        row |= {"bytes_up": sent["up"], "bytes_down": sent["down"], "members": list(sent["up"])}
        row["left_out"] = _left_out(values, nodes)
        row |= {key: values[key] for key in ("accuracy", "margin") if key in values}  # of preferences
        found.append(row)
    return found


def _left_out(values: Mapping[str, float], nodes: Sequence[str]) -> dict[str, str]:
    """Why a node's update did not count, of keys "out_RANK_words_of_the_reason"."""
    found = {}
    for key in values:
        word, _, rest = key.partition("_")
        rank, _, reason = rest.partition("_")
        if word == "out" and rank.isdecimal() and int(rank) < len(nodes):
            found[nodes[int(rank)]] = reason.replace("_", " ")
    return found
