"""What the planner predicts against what happens: time per token by plan, link and model. Needs root.

Two nodes with one thread each, joined by a cable whose round-trip time and bandwidth are set: a bare veth
pair with a token bucket for the shortest, the delay relay for the others. For each link the nodes measure
themselves and the link; then every plan is priced, with the corrections that earlier jobs taught taken out
(`predicted_ms`) and with them (`corrected_ms`); only then do the plans run, in turns, a few tokens each.
`error` is |predicted - measured| / measured. `choice` rows say what the planner takes by itself (strategy
auto, policy latency, before any job ran), and its regret: the time of its pick over the least measured one,
less one; right is within 5 % of it or within the spread of the repeats. HELD_OUT links were not looked at
while the price's constants were set. Plans without shares are those that the planner proposes.
Relay rows say how much processor time the relay took for each token: it runs on the same two cores.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _models import SMALL, model
from _network import LINE, Network, network
from _nodes import Place, generate, request, running
from _record import Record, quick, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

RTTS_MS = quick((1,), (0.05, 1, 5, 20))
MBITS = quick((100,), (10, 100, 1000))
MODELS = quick((SMALL,), (SMALL, "1.1b"))
ROUNDS, TOKENS, PROMPT = quick(2, 5), quick(4, 6), 16
TOLERANCE = 0.05
HELD_OUT = {(0.05, 10), (0.05, 1000), (1, 100), (5, 10), (20, 100), (20, 1000)}  # (RTT ms, Mbit/s)
TARGET_ERROR, TARGET_RIGHT = 0.15, 0.90


@dataclass(frozen=True)
class Plan:
    strategy: str
    shares: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        shares = "" if self.shares is None else " " + ":".join(f"{share:g}" for share in self.shares)
        return self.strategy + shares


PLANS = quick(
    (Plan("local"), Plan("remote"), Plan("layers"), Plan("tensor")),
    (
        Plan("local"),
        Plan("remote"),
        Plan("layers"),
        Plan("layers", (3, 1)),
        Plan("tensor"),
        Plan("tensor", (2, 1)),
    ),
)


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("prediction", out)
    for rtt in RTTS_MS:
        for mbit in MBITS:
            rows = [_row(name, rtt, mbit, plan.name) for name in MODELS for plan in PLANS]
            if not record.has(*rows):
                with _pair(rtt, mbit) as (link, nodes):
                    for name in MODELS:
                        _measure(record, link, nodes, name, rtt, mbit)
    _summary(record)
    return record.done()


def _row(name: str, rtt: float, mbit: int, what: str) -> str:
    return f"{name} {rtt:g} ms {mbit} Mbit/s {what}"


@contextlib.contextmanager
def _pair(rtt: float, mbit: int) -> Iterator[tuple[Network, list[Node]]]:
    """Two nodes that begin anew on this link, so that nothing of another is known."""
    has_relay = rtt >= 1
    with network(2, has_relay) as link:
        if has_relay:
            link.delay(rtt / 2, mbit)
        else:
            link.limit(mbit, LINE)
        places = [Place(f"node{i}", link.prefix(i), link.address(i)) for i in range(2)]
        with running(places) as nodes:
            yield link, nodes


def _measure(record: Record, link: Network, nodes: Sequence[Node], name: str, rtt: float, mbit: int) -> None:
    path = model(name)
    stored, *_ = (add_model(node, path) for node in nodes)  # in place beforehand: nothing is fetched
    for node in nodes:
        node.ask("profile", {"measure": True})
    pick = _picked(nodes[0], stored)
    found = {plan: _price(nodes, stored, plan) for plan in PLANS}
    times: dict[Plan, list[float]] = {plan: [] for plan in PLANS}
    relay: dict[Plan, float] = {}
    for plan in PLANS:  # loads, and is not counted
        _run(nodes, stored, plan)
    for number in range(ROUNDS):
        for plan in PLANS if number % 2 else PLANS[::-1]:
            before = link.relay_seconds()
            times[plan].append(_run(nodes, stored, plan))
            relay[plan] = 1000 * (link.relay_seconds() - before) / TOKENS
    for plan in PLANS:
        measured, predicted = statistics.median(times[plan]), found[plan]["tpot_ms"]
        corrected = _price(nodes, stored, plan)
        record.put(
            _row(name, rtt, mbit, plan.name),
            model=name,
            rtt_ms=rtt,
            mbit=mbit,
            plan=plan.name,
            held_out=(rtt, mbit) in HELD_OUT,
            measured_ms=spread(times[plan]),
            predicted_ms=round(predicted, 3),
            error=round(abs(predicted - measured) / measured, 4),
            corrected_ms=round(corrected["tpot_ms"], 3),
            corrected_error=round(abs(corrected["tpot_ms"] - measured) / measured, 4),
            relay_cpu_ms=round(relay[plan], 3),
        )
    _judge(record, _row(name, rtt, mbit, "choice"), pick, times, (rtt, mbit) in HELD_OUT)


def _price(nodes: Sequence[Node], name: str, plan: Plan) -> dict[str, Any]:
    """What the planner predicts of this plan now."""
    who = nodes[1:] if plan.strategy == "remote" else nodes
    body = request(name, plan.strategy, who, TOKENS, PROMPT, plan.shares)
    document = nodes[0].ask("plan", body | {"explain": True})
    (candidate,) = document["candidates"]
    return dict(candidate["predicted"])


def _run(nodes: Sequence[Node], name: str, plan: Plan) -> float:
    who = nodes[1:] if plan.strategy == "remote" else nodes
    document = generate(nodes[0], name, plan.strategy, who, TOKENS, PROMPT, plan.shares)
    return float(document["measured"]["tpot_ms"])


def _picked(node: Node, name: str) -> Plan:
    """What the planner takes where nobody names a strategy."""
    document = node.ask("plan", request(name, "auto", (), TOKENS, PROMPT))
    return Plan(document["candidates"][document["chosen"]]["strategy"])


def _judge(record: Record, row: str, pick: Plan, times: dict[Plan, list[float]], held_out: bool) -> None:
    """Was the pick right, and what did it cost?"""
    measured = {plan: statistics.median(each) for plan, each in times.items()}
    best = min(measured, key=lambda plan: measured[plan])
    regret = measured[pick] / measured[best] - 1
    noise = (max(times[best]) - min(times[best])) / measured[best]
    record.put(
        row,
        pick=pick.name,
        best=best.name,
        regret=round(regret, 4),
        spread=round(noise, 4),
        held_out=held_out,
        is_right=regret <= max(TOLERANCE, noise),
    )


def _summary(record: Record) -> None:
    rows = [record.get(_row(n, r, m, p.name)) for n in MODELS for r in RTTS_MS for m in MBITS for p in PLANS]
    picks = [record.get(_row(n, r, m, "choice")) for n in MODELS for r in RTTS_MS for m in MBITS]
    for label, wanted in (("all", (True, False)), ("held out", (True,))):
        errors = [row["error"] for row in rows if row["held_out"] in wanted]
        right = [pick["is_right"] for pick in picks if pick["held_out"] in wanted]
        if not errors:
            continue
        record.put(
            f"summary, {label}",
            cells=len(errors),
            median_error=round(statistics.median(errors), 4),
            corrected_error=round(
                statistics.median(row["corrected_error"] for row in rows if row["held_out"] in wanted), 4
            ),
            target_error=TARGET_ERROR,
            right=round(sum(right) / len(right), 4),
            target_right=TARGET_RIGHT,
            regret=spread([pick["regret"] for pick in picks if pick["held_out"] in wanted]),
        )
