"""What tests and benchmarks of the planner's searches share: seeded nodes and models, and brute force.

Brute force tries every plan there is and asks the core for its price and its rules, nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from edged_plugins import _search
from edged_plugins._tensor_group import Group

from edged import planning
from edged.errors import PolicyViolation
from edged.types import Candidate, EngineSpeed, LinkState, ModelDescription, NodeView, PlanRequest, Role

MODEL = ModelDescription(
    architecture="llama", parameters=10**9, layers=6, hidden=1024, heads=16, kv_heads=8, head_dim=64,
    ffn=4096, vocab=32_000, context_tokens=8192, weight_type="Q4_K", head_unit=2, ffn_unit=256,
    vocab_unit=1, layer_bytes=(80 << 20, 90 << 20) * 3, embedding_bytes=100 << 20, head_bytes=100 << 20,
)  # fmt: skip
REQUEST = PlanRequest(context_tokens=512)
KINDS = ("mixed", "alike", "tight", "far", "rooms", "strangers")
MIB = 1 << 20


def model_of(seed: int, layers: int) -> ModelDescription:
    """Layers of one kind, of two, or each of its own; cut as described or as the core assumes."""
    chance = random.Random(seed)
    kinds = chance.choice([1, 2, layers])
    sizes = [chance.randint(50 * MIB, 110 * MIB) for _ in range(kinds)]
    layer_bytes = tuple(sizes[i % kinds] * 6 // max(6, layers) for i in range(layers))
    cuts = tuple((size // 4, size - size // 4 - 65536, 65536) for size in layer_bytes)
    groups = chance.choice([2, 4, 8])
    return dataclasses.replace(
        MODEL,
        layers=layers,
        layer_bytes=layer_bytes,
        layer_cuts=chance.choice([(), cuts]),
        kv_heads=groups,
        head_unit=MODEL.heads // groups,
        reductions=chance.choice([1, 2]),
    )


def nodes_of(seed: int, count: int, kind: str = "mixed", total_mib: float = 600.0) -> list[NodeView]:
    """Nodes of any speed and budget, with links of any cost, some of them missing. `total_mib`: of the model.

    `alike`: they and their links are, so that much is as good. `tight`: no one holds much of the model.
    `far`: slow links. `rooms`: fast links within two groups, slow ones between. `strangers`: some may have
    no role, some nodes and links were never measured.
    """
    chance = random.Random(f"{seed} {count} {kind}")
    names = [f"n{i}" for i in range(count)]
    costs = {}
    for a, b in itertools.combinations(range(count), 2):
        slow = kind == "far" or (kind == "rooms" and (a < count / 2) != (b < count / 2))
        latency = 10 ** (chance.uniform(-2.5, -1.3) if slow else chance.uniform(-4.5, -2.5))
        bytes_s = 10 ** (chance.uniform(5.5, 7) if slow else chance.uniform(6.5, 9))
        if kind == "alike":
            latency, bytes_s = 2e-4, 1e8
        if chance.random() > (0 if kind in ("alike", "rooms") else 0.1):
            costs[names[a], names[b]] = (1.0, bytes_s, True, latency, chance.choice([0.0, 0.0, 3000.0]))
        if kind == "strangers" and chance.random() < 0.15:
            costs[names[a], names[b]] = (None, None, True, None)
    made = []
    for index, name in enumerate(names):
        links = tuple(
            LinkState((set(pair) - {name}).pop(), *cost) for pair, cost in costs.items() if name in pair
        )
        decode, token_s, layer_s = 10 ** chance.uniform(9, 10.5), 10 ** chance.uniform(-6, -4), 1e-4
        budget = chance.choice([None, int(chance.uniform(0.25, 1.2) * total_mib * MIB) + 96 * MIB])
        attend_s = chance.choice([0.0, 10 ** chance.uniform(-10, -8)])
        if kind == "alike":
            decode, token_s, attend_s = 5e9, 1e-4, 1e-9
        if kind in ("alike", "tight"):
            share = (chance.uniform(1.1, 3) if kind == "tight" else 2) / min(count, 16)
            budget = int(share * total_mib * MIB) + 96 * MIB
        speed = EngineSpeed("shard", "Q4_K", decode, 1e11, token_s, layer_s, attend_s=attend_s)
        node = NodeView(name, name, engines=("shard",), speeds=(speed,), links=links, memory_budget=budget)
        if kind == "strangers" and index and chance.random() < 0.4:
            strange = chance.choice(
                [{"zone": "guest"}, {"rights": ()}, {"refuses": "its battery is low"}, {"speeds": ()}]
            )
            node = dataclasses.replace(node, **strange)
        made.append(node)
    return made


def instance(seed: int, count: int, layers: int) -> tuple[ModelDescription, list[NodeView]]:
    """A model of few layers, and nodes of the kind whose turn it is."""
    model = model_of(seed, layers)
    total = (sum(model.layer_bytes) + model.head_bytes) / MIB
    return model, nodes_of(seed, count, KINDS[seed % len(KINDS)], total)


def tpot_ms(
    candidates: Sequence[Candidate], model: ModelDescription, nodes: Sequence[NodeView]
) -> float | None:
    """The least time per token of those that no rule refuses."""
    by_id = {node.node_id: node for node in nodes}
    finished = (planning.finish(each, model, by_id, REQUEST) for each in candidates)
    times = [each.predicted.tpot_ms for each in finished if each.refused_because is None]
    return min((time for time in times if time is not None), default=None)


def regret(
    found: Sequence[Candidate], every: Sequence[Candidate], model: ModelDescription, nodes: Sequence[NodeView]
) -> float | None:
    """How much longer a token takes by what was found than by the best of all, as a part of that; infinite
    where nothing was found, None where there is nothing."""
    best, mine = tpot_ms(every, model, nodes), tpot_ms(found, model, nodes)
    if best is None:
        assert mine is None, "brute force misses a plan"
        return None
    return float("inf") if mine is None else mine / best - 1


# --- brute force ----------------------------------------------------------------------------------


def all_runs(model: ModelDescription, nodes: Sequence[NodeView]) -> Iterator[Candidate]:
    """Every way to give runs of layers to at least two nodes."""
    for count in range(2, min(len(nodes), model.layers) + 1):
        for order in itertools.permutations(nodes, count):
            for edges in _edges(model, count):
                roles = tuple(
                    Role(
                        rank, node.node_id, rank, (a, b), (0, model.heads), (0, model.ffn),
                        (0, model.vocab) if b == model.layers else (0, 0), (b - a) / model.layers,
                    )
                    for rank, (node, (a, b)) in enumerate(zip(order, edges, strict=True))
                )  # fmt: skip
                yield Candidate("layers", roles)


def all_groups(model: ModelDescription, nodes: Sequence[NodeView]) -> Iterator[Candidate]:
    """Every set of at least two nodes as a tensor group, each of them its first rank once."""
    for count in range(2, len(nodes) + 1):
        for members in itertools.combinations([node for node in nodes if node.speeds], count):
            for group in _led(members):
                roles = _cut(model, group, (0, model.layers))
                if roles is not None:
                    yield Candidate("tensor", roles)


def all_stages(model: ModelDescription, nodes: Sequence[NodeView]) -> Iterator[Candidate]:
    """Every order of at least two stages, some of them a group, each of whose nodes is its first rank once,
    with every division of the layers."""
    cut: dict[tuple[tuple[str, ...], tuple[int, int]], tuple[Role, ...] | None] = {}

    def roles_of(group: Sequence[NodeView], layers: tuple[int, int]) -> tuple[Role, ...] | None:
        key = tuple(node.node_id for node in group), layers
        if key not in cut:
            cut[key] = _cut(model, group, layers)
        return cut[key]

    for stages in _stages([node for node in nodes if node.speeds]):
        if len(stages) < 2 or all(len(group) == 1 for group in stages):
            continue
        for edges in _edges(model, len(stages)):
            parts = [roles_of(group, layers) for group, layers in zip(stages, edges, strict=True)]
            roles: list[Role] = []
            for stage, part in enumerate(parts):
                roles += [
                    dataclasses.replace(role, rank=len(roles) + i, stage=stage)
                    for i, role in enumerate(part or ())
                ]
            if None not in parts:
                yield Candidate("hybrid", tuple(roles))


def _edges(model: ModelDescription, count: int) -> Iterator[list[tuple[int, int]]]:
    for cuts in itertools.combinations(range(1, model.layers), count - 1):
        yield [*itertools.pairwise([0, *cuts, model.layers])]


def _led(members: Sequence[NodeView]) -> Iterator[tuple[NodeView, ...]]:
    for leader in members:
        yield (leader, *(node for node in members if node is not leader))


def _stages(nodes: Sequence[NodeView]) -> Iterator[list[tuple[NodeView, ...]]]:
    """Ordered stages of some of the nodes, the empty list too."""
    yield []
    for count in range(1, len(nodes) + 1):
        for members in itertools.combinations(nodes, count):
            others = [node for node in nodes if node not in members]
            for group in _led(members):
                for later in _stages(others):
                    yield [group, *later]


def _cut(
    model: ModelDescription, group: Sequence[NodeView], layers: tuple[int, int]
) -> tuple[Role, ...] | None:
    """As the strategies divide a stage, by speed and within budgets."""
    weights = _search.weights_of(model, group, REQUEST)
    try:
        return Group(model, group, weights, REQUEST, layers, has_head=layers[1] == model.layers).roles()
    except PolicyViolation:
        return None


def settled(search: Callable[..., Iterable[list[Candidate]]]) -> Callable[..., list[Candidate]]:
    """What a search says at last."""
    return lambda *arguments: [*search(*arguments)][-1]
