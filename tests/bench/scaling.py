"""How time per token grows with the nodes and with the round-trip time, for tensor and layers. Needs root.

Every node is in a network namespace of its own and in a cgroup with half a processor: four nodes have two
in all. A quota is a cap over a period of some milliseconds, not a slower processor: a stage that waited for
the others may then run at full speed, so layers can do better here than on slow processors. The 1.1B shape
in Q4_0, one thread a node, decode after a short prompt.

- Nodes: 1 to 4 on a bridge of bare veth pairs.
- RTT: two nodes whose frames go through a relay process that delays them (this kernel has no netem), from
  the relay's own time to 20 ms; the plans and the delays in turns, over the same workers.

`predicted_ms` is the formula of tensor parallelism with direct exchange, T(n) = T(1)/n + 2 L (RTT/2 + h),
and for layers T(1) + n (RTT/2 + h): n - 1 hops and the candidates back to rank 0. L is the model's layers,
T(1) one node's time under the same quota in this run, h = 0.021 ms an exchange of 8 KiB in TLS 1.3 over
loopback (a bare blocking loop between two pinned processes). T(1)/n is the best there is: three nodes
divide the four groups of heads 2:1:1. RTT is what a datagram took in the run. `ratio` is the measured over
the predicted time. CPU is of a whole generation, its prompt of 16 tokens included, over the tokens it
made: of all daemons, of all workers and of the relay; the workers' has their waiting in it where they poll.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _models import model
from _network import Network, network
from _nodes import Place, cpu_seconds, generate, mean_tpot_ms, running
from _quota import quota
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

CORES = 0.5  # of each node
EXCHANGE_MS = 0.021
NODES = quick((1, 2), (1, 2, 3, 4))
RTTS_MS = quick((0, 2), (0, 0.5, 1, 2, 5, 10, 20))
PLANS = ("tensor", "layers")
ROUNDS, PROMPT = quick(2, 5), 16
TOKENS, RTT_TOKENS = quick(4, 24), quick(3, 10)


@dataclass(frozen=True)
class Case:
    """One row: a plan over so many nodes at a nominal round-trip time."""

    row: str
    plan: str
    nodes: int
    rtt_ms: float = 0.0


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("scaling", out)
    by_nodes = [Case(f"{count} nodes {plan}", plan, count) for count in NODES[1:] for plan in PLANS]
    by_nodes.insert(0, Case("1 node", "local", 1))
    by_rtt = [Case(f"relay {rtt:g} ms {plan}", plan, 2, rtt) for rtt in RTTS_MS for plan in PLANS]
    by_rtt.insert(0, Case("relay 1 node", "local", 1))
    for cases, has_relay, tokens in ((by_nodes, False, TOKENS), (by_rtt, True, RTT_TOKENS)):
        if not record.has(*(case.row for case in cases)):
            with _nodes(max(case.nodes for case in cases), has_relay) as (link, nodes):
                _measure(record, cases, link, nodes, tokens)
    return record.done()


@contextlib.contextmanager
def _nodes(count: int, has_relay: bool) -> Iterator[tuple[Network, list[Node]]]:
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(network(count, has_relay))
        places = [
            Place(
                f"node{number}",
                link.prefix(number),
                link.address(number),
                stack.enter_context(quota(str(number), CORES)),
            )
            for number in range(count)
        ]
        yield link, stack.enter_context(running(places))


def _measure(
    record: Record, cases: Sequence[Case], link: Network, nodes: Sequence[Node], tokens: int
) -> None:
    path = model("1.1b")
    name, *_ = (add_model(node, path) for node in nodes)  # each has the file: none fetches it
    for plan, count in dict.fromkeys((case.plan, case.nodes) for case in cases):
        generate(nodes[0], name, plan, nodes[:count], 3, PROMPT)
    layers = _layers(nodes[0], name)
    runs: dict[str, list[dict[str, float]]] = {case.row: [] for case in cases}
    for _ in range(ROUNDS):
        rtts: dict[float, float] = {}
        for case in cases:
            if link.relay is not None:
                link.delay(case.rtt_ms / 2)
            if case.rtt_ms not in rtts:
                rtts[case.rtt_ms] = link.rtt_ms() if len(nodes) > 1 else 0.0
            measured = _run(link, nodes, name, case, tokens)
            runs[case.row].append(measured | {"rtt_ms": rtts[case.rtt_ms]})
        for case in cases:
            _put(record, case, runs[case.row], runs[cases[0].row], layers)


def _layers(node: Node, name: str) -> int:
    (held,) = node.ask("models.ls")["models"]
    return int(held["layers"])


def _run(link: Network, nodes: Sequence[Node], name: str, case: Case, tokens: int) -> dict[str, float]:
    """One generation's time per token, and the processor time of everybody for each of its tokens."""
    processes = [psutil.Process(node.process.pid) for node in nodes]
    before, relay_before = [cpu_seconds(each) for each in processes], link.relay_seconds()
    document = generate(nodes[0], name, case.plan, nodes[: case.nodes], tokens, PROMPT)
    after, relay_after = [cpu_seconds(each) for each in processes], link.relay_seconds()
    made = len(document["tokens"])
    spent = {
        kind: 1000 * sum(b[kind] - a[kind] for a, b in zip(before, after, strict=True)) / made
        for kind in ("daemon", "workers")
    }
    return {
        "tpot_ms": mean_tpot_ms(document),
        "relay": 1000 * (relay_after - relay_before) / made,
        **spent,
    }


def _put(
    record: Record,
    case: Case,
    mine: Sequence[dict[str, float]],
    alone: Sequence[dict[str, float]],
    layers: int,
) -> None:
    times, one = ([run["tpot_ms"] for run in runs] for runs in (mine, alone))
    predicted = [_predicted(case, time, run["rtt_ms"], layers) for time, run in zip(one, mine, strict=True)]
    record.put(
        case.row,
        is_partial=len(mine) < ROUNDS,
        rounds=len(mine),
        plan=case.plan,
        nodes=case.nodes,
        nominal_rtt_ms=case.rtt_ms,
        rtt_ms=spread([run["rtt_ms"] for run in mine]),
        tpot_ms=spread(times),
        over_one_node=ratios(times, one),
        predicted_ms=spread(predicted),
        ratio=ratios(times, predicted),
        **{f"cpu_ms_{kind}": spread([run[kind] for run in mine]) for kind in ("daemon", "workers", "relay")},
    )


def _predicted(case: Case, one_ms: float, rtt_ms: float, layers: int) -> float:
    """Time per token by the formula above."""
    step = rtt_ms / 2 + EXCHANGE_MS
    if case.plan == "tensor":
        return one_ms / case.nodes + 2 * layers * step
    return one_ms + (case.nodes * step if case.nodes > 1 else 0)
