"""The planner's searches: what they take, and how far what they find is from the best. Needs no network.

- Time in the process that searches, by wall clock, over seeds and kinds of nodes (alike, tight budgets, slow
  links, two rooms, strangers, mixed), for a model of 30 layers and one of 80. Exact searches for layers and
  tensor: 6 nodes in 50 ms, 10 in 1 s. With 64 nodes: the dynamic programmes (EdgeShard's recurrence, and the
  exact programme as a beam), the integer programme, and all strategies together, in 2 s. One row each for the
  whole in a worker process, from its start to its end.
- Regret of the exact searches for layers and tensor against brute force by the core's price, over 1,000
  instances of up to 6 nodes; those of up to 4 also for hybrid. It must be 0; the core's prices count whole
  bytes, so what is less than a millionth is.
- Regret of the heuristics, forced where the exact search still works: 5 % at the median, 15 % at the 95th
  percentile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _record import Record, quick, spread
from edged_plugins import _paths, _placing, _search, _staging
from edged_plugins._tables import Tables

from edged import wire
from edged.supervisor import Supervisor
from edged.types import Candidate, ModelDescription, NodeView

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))  # brute force, shared with the tests

import planning_rig as rig

SEEDS = quick(1, 5)  # of each kind of nodes
INSTANCES = quick(12, 1000)
FORCED = quick(6, 300)  # instances of each heuristic
LAYERS = (30, 80)
LAYER_BYTES = (40 << 20, 45 << 20)  # as mixed weight types take turns
SEARCHES = ("layers", "tensor", "hybrid")
ZERO = 1e-6
WORKER_S = 60.0  # a quick run may be on a busy machine
Found = list[Candidate]
SETTLED = {name: rig.settled(getattr(_search, name)) for name in SEARCHES}


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("planner", out)
    for layers in LAYERS:
        for count, target in ((6, 50), (10, 1000)):
            _put_time(record, f"{count} nodes, {layers} layers: exact", count, layers, _exact, target)
            _put_time(record, f"{count} nodes, {layers} layers: hybrid", count, layers, SETTLED["hybrid"])
        for name, search in (("dynamic programmes", _programmes), ("integer programme", _ring)):
            _put_time(record, f"64 nodes, {layers} layers: {name}", 64, layers, search)
        _put_time(record, f"64 nodes, {layers} layers: all together", 64, layers, _every, 2000)
        for count in (6, 64):
            _put_time(record, f"{count} nodes, {layers} layers: through a worker", count, layers, _in_worker)
    _put_exact(record)
    for name, (search, counts) in HEURISTICS.items():
        _put_heuristic(record, f"heuristic against exact: {name}", search, counts)
    return record.done()


# --- time -----------------------------------------------------------------------------------------


def _put_time(
    record: Record,
    row: str,
    count: int,
    layers: int,
    search: Callable[[ModelDescription, list[NodeView], Any], Any],
    target_ms: float | None = None,
) -> None:
    if record.has(row):
        return
    times = []
    for index, (model, nodes) in enumerate(_asked(count, layers)):
        if not index:
            search(model, nodes, rig.REQUEST)  # libraries load
        begun = time.perf_counter()
        search(model, nodes, rig.REQUEST)
        times.append(1000 * (time.perf_counter() - begun))
    record.put(row, runs=len(times), ms=spread(times), **({"target_ms": target_ms} if target_ms else {}))


def _asked(count: int, layers: int) -> Iterator[tuple[ModelDescription, list[NodeView]]]:
    layer_bytes = tuple(LAYER_BYTES[i % 2] for i in range(layers))
    model = dataclasses.replace(rig.MODEL, layers=layers, layer_bytes=layer_bytes)
    total_mib = (sum(layer_bytes) + model.head_bytes) / rig.MIB
    for kind in rig.KINDS[: quick(2, None)]:
        for seed in range(SEEDS):
            yield model, rig.nodes_of(seed, count, kind, total_mib)


def _exact(model: ModelDescription, nodes: list[NodeView], request: Any) -> None:
    SETTLED["layers"](model, nodes, request)
    SETTLED["tensor"](model, nodes, request)


def _programmes(model: ModelDescription, nodes: list[NodeView], request: Any) -> None:
    chain = _search.chain_of(Tables(model, nodes, request))
    _paths.by_recurrence(chain)
    _placing.fastest_near(chain, _search.WIDTH, least=2)


def _ring(model: ModelDescription, nodes: list[NodeView], request: Any) -> None:
    _search.by_ring(_search.chain_of(Tables(model, nodes, request)))


def _every(model: ModelDescription, nodes: list[NodeView], request: Any) -> None:
    for name in SEARCHES:
        SETTLED[name](model, nodes, request)


def _in_worker(model: ModelDescription, nodes: list[NodeView], request: Any) -> None:
    params = {
        "searches": {name: f"edged_plugins._search:{name}" for name in SEARCHES},
        "model": wire.to_map(model),
        "nodes": [wire.to_map(node) for node in nodes],
        "request": wire.to_map(request),
    }

    async def run() -> None:
        supervisor = Supervisor()
        try:
            await supervisor.run_task("edged.worker:search", params, timeout_s=WORKER_S)
        finally:
            await supervisor.close()

    asyncio.run(run())


# --- regret ---------------------------------------------------------------------------------------


def _put_exact(record: Record) -> None:
    rows = {name: f"exact against brute force: {name}" for name in SEARCHES}
    if record.has(*rows.values()):
        return
    lost: dict[str, list[float | None]] = {name: [] for name in SEARCHES}
    for seed in range(INSTANCES):
        count = 2 + seed % 5
        model, nodes = rig.instance(seed, count, layers=3 + seed % 3)
        for name, every in (("layers", rig.all_runs), ("tensor", rig.all_groups), ("hybrid", rig.all_stages)):
            if name != "hybrid" or count <= 4:
                found = SETTLED[name](model, nodes, rig.REQUEST)
                lost[name].append(rig.regret(found, [*every(model, nodes)], model, nodes))
    for name, row in rows.items():
        record.put(row, instances=INSTANCES, **_regrets(lost[name]), target=0)


def _regrets(lost: Sequence[float | None]) -> dict[str, Any]:
    known = [each for each in lost if each is not None]
    return {
        "asked": len(lost),
        "with_a_plan": len(known),
        "wrong": sum(abs(each) > ZERO for each in known),
        "largest": max(known, default=0.0),
    }


def _put_heuristic(
    record: Record, row: str, search: Callable[[Tables, int], Found], asked: Sequence[tuple[int, int]]
) -> None:
    """`asked`: (nodes, layers) in turn."""
    if record.has(row):
        return
    gaps: list[float] = []
    for seed in range(FORCED):
        count, layers = asked[seed // len(rig.KINDS) % len(asked)]
        model, nodes = rig.instance(seed, count, layers)
        tables = Tables(model, nodes, rig.REQUEST)
        lost = rig.regret(search(tables, 0), search(tables, count), model, nodes)
        if lost is not None:
            gaps.append(max(0.0, lost))
    gaps.sort()
    record.put(
        row,
        asked=FORCED,
        with_a_plan=len(gaps),
        nodes_and_layers=[list(each) for each in asked],
        missed=gaps.count(float("inf")),
        median=statistics.median(gaps),
        percentile_95=gaps[int(0.95 * len(gaps))],
        largest=max(gap for gap in gaps if gap < float("inf")),
        target_median=0.05,
        target_percentile_95=0.15,
    )


def _hybrid(tables: Tables, exact_nodes: int) -> Found:
    roles = _staging.best(tables, exact_nodes)
    return [] if roles is None else [Candidate("hybrid", roles)]


HEURISTICS: dict[str, tuple[Callable[[Tables, int], Found], list[tuple[int, int]]]] = {
    "layers": (_search.best_runs, [(5, 6), (6, 12), (7, 30), (12, 30)]),
    "tensor": (_search.best_group, [(7, 6), (9, 12), (12, 30)]),
    "hybrid": (_hybrid, [(5, 16), (6, 6), (7, 6), (8, 12)]),
}
