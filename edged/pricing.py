"""What a plan should cost: time to the first token, time per token, bytes. Pure.

A rank's time per token is the bytes of its weights over the measured bytes/s of that weight type, the
measured time of attending to the tokens before it (where an engine measures none, the KV cache counts as
weights do), and the measured fixed cost of a token and of each layer, all of it over what the device sustains
of its benchmark (`EngineSpeed.sustained`). Ranks of a stage work at once, so the slowest counts; stages work
one after the other. An all-reduce, one or two a layer, is an exchange with every other rank of the stage; a
hop hands a row of hidden states on, and the last stage sends its candidates back to the first. Links count as
the data plane was measured, else as half a ping. Weights that pass through a window because a budget does not
hold them are read again for every token, on top. Source of the form: TPI-LLM (arXiv:2410.00531). The
constants are measured; see docs/log.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from .sizes import F32_BYTES, cache_bytes_of, held_bytes_of, weight_bytes_of, weights_room
from .types import Candidate, EngineSpeed, LinkCost, ModelDescription, NodeView, PlanRequest, Predicted, Role

DISK_BYTES_S = 100e6  # at which dropped weights are read again: nothing measures disks, so a slow one's
PROMPT_BATCH = 512  # tokens of a prompt that one reading of the weights serves
PING_BYTES_S = 12.5e6  # of a link that was only pinged: 100 Mbit/s, which is what such links mostly are
REDUCE_S = 50e-6  # of an all-reduce beside the exchange: docs/log.md, "all-reduce inside a generation"
HOP_S = 200e-6  # of a hop beside the link: packing, a graph's start, unpacking
CANDIDATES_BYTES = 512  # what sampling needs of the last stage
ELEMENT_BYTES = (4.0, 2.0, 1.0625)  # F32, F16, Q8 blocks
NARROWER_SAVES = 0.05  # of the time per token, before the engine takes a narrower codec
INFINITE = float("inf")


def price(
    candidate: Candidate, model: ModelDescription, nodes: Mapping[str, NodeView], request: PlanRequest
) -> Predicted:
    """Time and bytes of a plan; None where a device or link was never measured. `nodes`: the submitter
    first."""
    stages = stages_of(candidate.roles)
    traffic = bytes_per_token(stages, model)
    decode = prefill = 0.0
    for roles in stages:
        times = [rank_times(role, model, nodes[role.node_id], request) for role in roles]
        links = [link_cost(nodes, a.node_id, b.node_id) for a, b in itertools.combinations(roles, 2)]
        if None in times or None in links:
            return Predicted(bytes_per_token=traffic)
        token_s = max(time[0] for time in times if time)
        prompt_s = max(time[1] for time in times if time)
        known = [link for link in links if link]
        decode += token_s + _sums(roles, model, request, known, token_s, 1)
        prefill += prompt_s + _sums(roles, model, request, known, prompt_s, request.prompt_tokens)
    hops = _hops(stages, model, nodes, 1)
    prompt_hops = _hops(stages, model, nodes, request.prompt_tokens)
    submitter = next(iter(nodes))
    asking = link_cost(nodes, submitter, stages[0][0].node_id)
    if hops is None or prompt_hops is None or asking is None:
        return Predicted(bytes_per_token=traffic)
    first = prefill + prompt_hops + 2 * asking.latency_s
    token_s = decode + hops
    joules = _joules(candidate.roles, model, nodes, request, token_s)
    return Predicted(
        ttft_ms=1000 * first,
        tpot_ms=1000 * token_s,
        joules_per_token=joules,
        bytes_per_token=traffic,
        joules_source=None if joules is None else "estimated",
    )


def _joules(
    roles: Sequence[Role],
    model: ModelDescription,
    nodes: Mapping[str, NodeView],
    request: PlanRequest,
    token_s: float,
) -> float | None:
    """Joules of a token over those that the nodes would draw idle; None where a node's watts are unknown.

    A rank draws its working watts while it computes; while it waits for others it draws what it does idle.
    """
    total = 0.0
    for role in roles:
        node = nodes[role.node_id]
        times = rank_times(role, model, node, request)
        if node.watts is None or times is None:
            return None
        idle, work = node.watts
        total += (work - idle) * min(times[0], token_s)
    return total


def rank_times(
    role: Role, model: ModelDescription, node: NodeView, request: PlanRequest
) -> tuple[float, float] | None:
    """Seconds for one token and for the prompt on one rank."""
    speed = speed_of(node, model.weight_type)
    if speed is None:
        return None
    weights = weight_bytes_of(role, model)
    of_model = weights / max(1, sum(model.layer_bytes) + model.head_bytes)
    operations = 2 * model.parameters * of_model * request.prompt_tokens
    rereading_s = rereading_s_of(role, model, request)
    batches = -(-request.prompt_tokens // PROMPT_BATCH)
    weights_s, beside_s = token_parts(role, model, speed, request, request.prompt_tokens)
    fixed_s = speed.token_s + (role.layers[1] - role.layers[0]) * speed.layer_s
    prompt_s = operations / speed.prefill_flops_s + batches * fixed_s
    decode_s = (weights_s + beside_s) / speed.sustained + rereading_s
    return decode_s, prompt_s / speed.sustained + batches * rereading_s


def token_parts(
    role: Role, model: ModelDescription, speed: EngineSpeed, request: PlanRequest, tokens: int
) -> tuple[float, float]:
    """Seconds, by the benchmark, of reading the weights for one token, and those beside: the fixed ones, and
    attending to so many tokens before it."""
    layers = role.layers[1] - role.layers[0]
    cache_s = cache_bytes_of(role, model, request, tokens) / speed.decode_bytes_s
    if speed.attend_s:
        cache_s = layers * (role.heads[1] - role.heads[0]) * model.head_dim * tokens * speed.attend_s
    weights_s = weight_bytes_of(role, model) / speed.decode_bytes_s
    return weights_s, speed.token_s + layers * speed.layer_s + cache_s


def speed_of(node: NodeView, weight_type: str) -> EngineSpeed | None:
    """The measured speed of a weight type; mixed types ("Q4_K_M") count as their main one ("Q4_K")."""
    sound = [s for s in node.speeds if 0 < s.decode_bytes_s < INFINITE and 0 < s.prefill_flops_s < INFINITE]
    sound = [s for s in sound if 0 < s.sustained <= 1]
    exact = next((s for s in sound if s.weight_type == weight_type), None)
    if exact is not None:
        return exact
    return next((s for s in sound if weight_type.startswith(s.weight_type)), None)


def link_cost(nodes: Mapping[str, NodeView], a: str, b: str) -> LinkCost | None:
    """Of the connection between two nodes, as either of them measured it; the worse figure of both."""
    if a == b:
        return LinkCost(0.0, INFINITE)
    seen = [link for link in nodes[a].links if link.node_id == b]
    seen += [link for link in nodes[b].links if link.node_id == a]
    measured = [
        LinkCost(link.latency_s, link.bandwidth_bytes_s)
        for link in seen
        if link.latency_s is not None and link.bandwidth_bytes_s
    ]
    if measured:
        return LinkCost(max(c.latency_s for c in measured), min(c.bytes_s for c in measured))
    pings = [link.rtt_ms for link in seen if link.rtt_ms is not None]
    return LinkCost(pings[0] / 2000, PING_BYTES_S) if pings else None


def _sums(
    roles: Sequence[Role],
    model: ModelDescription,
    request: PlanRequest,
    links: Sequence[LinkCost],
    compute_s: float,
    tokens: int,
) -> float:
    """Seconds of a stage's all-reduces for so many tokens: each rank sends all it has to each other."""
    if len(roles) == 1:
        return 0.0
    layers = roles[0].layers[1] - roles[0].layers[0]
    batches = -(-tokens // PROMPT_BATCH)
    latency = max(link.latency_s for link in links)
    bytes_s = min(link.bytes_s for link in links)
    elements = ELEMENT_BYTES[:1] if request.numerics == "exact" else ELEMENT_BYTES

    def total(element: float) -> float:
        sent = element * model.hidden * tokens * (len(roles) - 1)
        return layers * model.reductions * (batches * (latency + REDUCE_S) + sent / bytes_s)

    times = [total(element) for element in elements]
    best = times[0]
    for time in times[1:]:
        if compute_s + time < (compute_s + best) * (1 - NARROWER_SAVES):
            best = time
    return best


def _hops(
    stages: Sequence[Sequence[Role]], model: ModelDescription, nodes: Mapping[str, NodeView], tokens: int
) -> float | None:
    """Seconds of handing hidden states from stage to stage, and the candidates back."""
    if len(stages) == 1:
        return 0.0
    total = 0.0
    for before, after in itertools.pairwise(stages):
        link = link_cost(nodes, before[0].node_id, after[0].node_id)
        if link is None:
            return None
        total += hop_s(link, model, len(after), tokens)
    back = link_cost(nodes, stages[-1][0].node_id, stages[0][0].node_id)
    return None if back is None else total + return_s(back)


def hop_s(link: LinkCost, model: ModelDescription, ranks: int, tokens: int) -> float:
    """Seconds of handing the hidden states of so many tokens to a stage of so many ranks."""
    return HOP_S + link.time_s(model.hidden * F32_BYTES * tokens * ranks)


def reduce_s(link: LinkCost, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes between the two ends of a link."""
    return REDUCE_S + link.time_s(size)


def return_s(link: LinkCost) -> float:
    """Seconds of giving the last stage's candidates back to the first."""
    return HOP_S + link.time_s(CANDIDATES_BYTES)


def rereading_s_of(role: Role, model: ModelDescription, request: PlanRequest) -> float:
    """Seconds to read again what does not fit, on top of computing: an upper bound, since both overlap."""
    room = weights_room(role, model, request)
    return max(0, held_bytes_of(role, model, request) - room) / DISK_BYTES_S if room else 0.0


def stages_of(roles: Sequence[Role]) -> list[list[Role]]:
    """Roles by stage, stages in order, ranks in order within."""
    ordered = sorted(roles, key=lambda role: (role.stage, role.rank))
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda role: role.stage)]


def bytes_per_token(stages: Sequence[Sequence[Role]], model: ModelDescription) -> int:
    """Bytes of hidden states on data-plane sockets for one token, F32."""
    row = model.hidden * F32_BYTES
    total = 0
    for roles in stages:
        layers = roles[0].layers[1] - roles[0].layers[0]
        total += model.reductions * layers * len(roles) * (len(roles) - 1) * row
    for _, later in itertools.pairwise(stages):
        total += len(later) * row
    return total
