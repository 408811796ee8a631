"""Two one-thread nodes against one: the 1.1B shape in Q4_0, in one interleaved run.

Real daemons, real workers, encrypted channels, over loopback. `ratio` is one node's time divided by the
plan's, round by round: above 1 the plan is faster. Decode is the median time per token, prefill the time
to the first token of a prompt of 128. Targets: tensor 1.6 in decode and 1.5 in prefill; layers gain
nothing for one sequence and shall cost little. Two nodes share this machine's memory and caches, which
two machines would not. `bytes_per_token` counts the prompt's bytes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _models import model
from _nodes import Place, generate, running
from _record import Record, quick, ratios, spread

from edged.cli.demo import add_model

PLANS = ("local", "tensor", "layers")
TARGETS = {"tensor decode": 1.6, "tensor prefill": 1.5}
ROUNDS = quick(2, 9)
TOKENS = quick(6, 48)
PHASES = {"decode": "tpot_ms", "prefill": "ttft_ms"}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("parallel", out)
    if not record.has(*(f"{plan} {phase}" for plan in PLANS for phase in PHASES)):
        _measure(record)
    return record.done()


def _measure(record: Record) -> None:
    with running([Place("first"), Place("second")]) as nodes:
        name = add_model(nodes[0], model("1.1b"))
        for plan in PLANS:  # load all, so that no round measures a start
            generate(nodes[0], name, plan, nodes, TOKENS)
        times: dict[str, list[dict[str, Any]]] = {plan: [] for plan in PLANS}
        for number in range(1, ROUNDS + 1):
            for plan in PLANS:
                times[plan].append(generate(nodes[0], name, plan, nodes, TOKENS)["measured"])
            for plan in PLANS:
                _put(record, plan, times, number)


def _put(record: Record, plan: str, times: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    for phase, key in PHASES.items():
        mine, one = ([measured[key] for measured in times[each]] for each in (plan, "local"))
        row = f"{plan} {phase}"
        record.put(
            row,
            is_partial=rounds < ROUNDS,
            nodes=1 if plan == "local" else 2,
            rounds=rounds,
            ms=spread(mine),
            ratio=ratios(one, mine),
            target=TARGETS.get(row),
            bytes_per_token=round(times[plan][-1]["bytes_sent"] / TOKENS),
        )
