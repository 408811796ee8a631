"""What a plan should cost: time to the first token, time per token, bytes. Pure.

A rank's time per token is the bytes of its weights over the measured bytes/s of that weight type, the
measured time of attending to the tokens before it (where an engine measures none, the KV cache counts as
weights do), and the measured fixed cost of a token and of each layer, all of it over what the device sustains
of its benchmark (`EngineSpeed.sustained`). Ranks of a stage work at once, so the slowest counts; stages work
one after the other. An all-reduce, one or two a layer, is an exchange with every other rank of the stage; a
hop hands a row of hidden states on, and the last stage sends its candidates back to the first. Links count as
the data plane was measured, else as half a ping. Weights that pass through a window because a budget does not
hold them are read again for every token, while others compute; what that takes longer comes on top.
Sources of the form: TPI-LLM (arXiv:2410.00531); for loading ServerlessLLM (arXiv:2401.14351). The constants
are measured; see docs/log.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping, Sequence

from .sizes import (
    F32_BYTES,
    blocks_of,
    cache_bytes_of,
    held_bytes_of,
    stages_of,
    weight_bytes_of,
    weights_room,
)
from .types import (
    Candidate,
    EngineSpeed,
    LinkCost,
    LinkTraffic,
    ModelDescription,
    NodeView,
    PlanRequest,
    Predicted,
    Role,
)

DISK_BYTES_S = 100e6  # at which dropped weights are read again: nothing measures disks, so a slow one's
MAPPED_BYTES_S = 4e9  # of those, what the window itself costs computing: measured 4.6 to 9.2, docs/log.md
PROMPT_BATCH = 512  # tokens of a prompt that one reading of the weights serves
PING_BYTES_S = 12.5e6  # of a link that was only pinged: 100 Mbit/s, which is what such links mostly are
REDUCE_S = 50e-6  # of an all-reduce beside the exchange: docs/log.md, "all-reduce inside a generation"
HOP_S = 200e-6  # of a hop beside the link: packing, a graph's start, unpacking
SLEPT_FROM_S = 200e-6  # a rank sleeps through a wait that is longer than this
SLEPT_REDUCE_S, SLEPT_HOP_S = 300e-6, 600e-6  # more of each after sleeping: waking up, and slower for a while
CANDIDATES_BYTES = 512  # what sampling needs of the last stage
ELEMENT_BYTES = (4.0, 2.0, 1.0625)  # F32, F16, Q8 blocks
NARROWER_SAVES = 0.05  # of the time per token, before the engine takes a narrower codec
INFINITE = float("inf")
TOKENS_UNTIL_STEADY = 4  # the first ones begin with nothing loaded


def price(
    candidate: Candidate, model: ModelDescription, nodes: Mapping[str, NodeView], request: PlanRequest
) -> Predicted:
    """Time and bytes of a plan; None where a device or link was never measured. `nodes`: the submitter
    first."""
    stages = stages_of(candidate.roles)
    links_used = traffic_of(stages, model)
    unknown = Predicted(bytes_per_token=sum(link.bytes for link in links_used), bytes_per_link=links_used)
    decode = prefill = 0.0
    for roles in stages:
        times = [rank_times(role, model, nodes[role.node_id], request) for role in roles]
        links = [link_cost(nodes, a.node_id, b.node_id) for a, b in itertools.combinations(roles, 2)]
        if None in times or None in links:
            return unknown
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
        return unknown
    first = prefill + prompt_hops + 2 * asking.latency_s
    token_s = decode + hops
    joules = _joules(candidate.roles, model, nodes, request, token_s)
    return dataclasses.replace(
        unknown,
        ttft_ms=1000 * first,
        tpot_ms=1000 * token_s,
        joules_per_token=joules,
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
    batches = -(-request.prompt_tokens // PROMPT_BATCH)
    weights_s, beside_s = token_parts(role, model, speed, request, request.prompt_tokens)
    fixed_s = speed.token_s + (role.layers[1] - role.layers[0]) * speed.layer_s
    prompt_s = operations / speed.prefill_flops_s / speed.sustained
    waiting_s = _rereading_s(role, model, request, weights_s / speed.sustained)
    batch_waiting_s = _rereading_s(role, model, request, prompt_s / max(1, batches))
    decode_s = (weights_s + beside_s) / speed.sustained + waiting_s
    return decode_s, prompt_s + batches * (fixed_s / speed.sustained + batch_waiting_s)


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
    sound = [s for s in sound if 0 < s.sustained <= 1 and all(0 <= x < INFINITE for x in _beside(s))]
    exact = next((s for s in sound if s.weight_type == weight_type), None)
    if exact is not None:
        return exact
    return next((s for s in sound if weight_type.startswith(s.weight_type)), None)


def _beside(speed: EngineSpeed) -> tuple[float, float, float]:
    return speed.layer_s, speed.token_s, speed.attend_s


def link_cost(nodes: Mapping[str, NodeView], a: str, b: str) -> LinkCost | None:
    """Of the connection between two nodes, as either of them measured it; the worse figure of both."""
    if a == b:
        return LinkCost(0.0, INFINITE)
    seen = [link for link in nodes[a].links if link.node_id == b]
    seen += [link for link in nodes[b].links if link.node_id == a]
    measured = [
        LinkCost(link.latency_s, link.bandwidth_bytes_s, link.burst_bytes)
        for link in seen
        if link.latency_s is not None
        and link.bandwidth_bytes_s is not None
        and 0 <= link.latency_s < INFINITE
        and link.bandwidth_bytes_s > 0
        and link.burst_bytes >= 0
    ]
    if measured:
        return _worst(measured)
    pings = [link.rtt_ms for link in seen if link.rtt_ms is not None and 0 <= link.rtt_ms < INFINITE]
    return LinkCost(pings[0] / 2000, PING_BYTES_S) if pings else None


def _worst(links: Sequence[LinkCost]) -> LinkCost:
    return LinkCost(
        max(link.latency_s for link in links),
        min(link.bytes_s for link in links),
        min(link.burst_bytes for link in links),
    )


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
    link, batches = _worst(links), -(-tokens // PROMPT_BATCH)
    idle_s = compute_s / (layers * model.reductions * batches) + link.latency_s  # from one sum to the next
    times = [layers * time for time in sums_s(link, model, request, len(roles), tokens, idle_s)]
    return times[codec_of(times, compute_s)]


def sums_s(
    link: LinkCost,
    model: ModelDescription,
    request: PlanRequest,
    ranks: int,
    tokens: int,
    idle_s: float = 0.0,
) -> list[float]:
    """Seconds of one layer's all-reduces over a stage's worst link, with each codec, the widest first;
    `idle_s` from one to the next. A link without bursts may have arrays for figures."""
    batches = -(-tokens // PROMPT_BATCH)
    elements = ELEMENT_BYTES[:1] if request.numerics == "exact" else ELEMENT_BYTES
    sent = [element * model.hidden * tokens * (ranks - 1) / batches for element in elements]
    return [model.reductions * batches * reduce_s(link, size, idle_s) for size in sent]


def codec_of(times: Sequence[float], compute_s: float) -> int:
    """Which codec the engine takes, given a stage's seconds of all-reduces with each, the widest first."""
    best = 0
    for codec, time in enumerate(times):
        if compute_s + time < (compute_s + times[best]) * (1 - NARROWER_SAVES):
            best = codec
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
    size = model.hidden * F32_BYTES * tokens
    return _waking_s(link) + link.time_s(size, INFINITE) + (ranks - 1) * size / link.bytes_s


def reduce_s(link: LinkCost, size: float, idle_s: float = 0.0) -> float:
    """Seconds of an all-reduce of `size` bytes between the two ends of a link, `idle_s` after the last."""
    slept_s = SLEPT_REDUCE_S * (link.latency_s > SLEPT_FROM_S)
    return REDUCE_S + slept_s + link.time_s(size, idle_s)


def return_s(link: LinkCost) -> float:
    """Seconds of giving the last stage's candidates back to the first."""
    return _waking_s(link) + link.time_s(CANDIDATES_BYTES, INFINITE)


def _waking_s(link: LinkCost) -> float:
    """Seconds of a hop beside the link."""
    return HOP_S + (SLEPT_HOP_S if link.latency_s > SLEPT_FROM_S else 0.0)


def _rereading_s(role: Role, model: ModelDescription, request: PlanRequest, compute_s: float) -> float:
    """Seconds that one pass over a rank's weights, which computes for `compute_s`, takes longer for those
    that do not fit and are read again. A bound from above: as if nothing were read while the rank does other
    work than with weights, or waits for other ranks."""
    room = weights_room(role, model, request)
    if not room:
        return 0.0
    dropped = max(0, held_bytes_of(role, model, request) - room)
    read_s = dropped / DISK_BYTES_S
    blocks = blocks_of(role, model)
    total = sum(blocks) or 1.0
    waited_s = stalled_s([(compute_s * size / total, read_s * size / total) for size in blocks])
    return waited_s + dropped / MAPPED_BYTES_S


def stalled_s(blocks: Sequence[tuple[float, float]], held: int = 2) -> float:
    """Seconds of a token for which computing waits for weights that are loaded while others compute.

    `blocks`: seconds to compute and seconds to load each, in their order, the same again for every token.
    At most `held` of them are in memory, the one that loads among them; one goes when the next begins.
    Source: TPI-LLM (arXiv:2410.00531), section on its memory scheduler. Its tight condition is that no block
    waits with two held; its loose one that none does where loading may get further ahead.
    """
    done = loaded = waited = 0.0
    left = deque([0.0] * held, held)  # when each of the last blocks was done with, the oldest first
    for _ in range(TOKENS_UNTIL_STEADY):
        waited = 0.0
        for compute_s, load_s in blocks:
            loaded = max(loaded, left[0]) + load_s
            waited += max(0.0, loaded - done)
            done = max(done, loaded) + compute_s
            left.append(done)
    return waited


def traffic_of(stages: Sequence[Sequence[Role]], model: ModelDescription) -> tuple[LinkTraffic, ...]:
    """Hidden states on data-plane sockets for one token, F32, by pair of nodes."""
    row = model.hidden * F32_BYTES
    found: dict[tuple[str, str], int] = {}
    for roles in stages:
        layers = roles[0].layers[1] - roles[0].layers[0]
        for a, b in itertools.combinations(roles, 2):
            found[a.node_id, b.node_id] = 2 * model.reductions * layers * row
    for before, after in itertools.pairwise(stages):
        for role in after:
            found[before[0].node_id, role.node_id] = row
    return tuple(LinkTraffic(nodes, size) for nodes, size in found.items())


# --- before the first token -----------------------------------------------------------------------


def loading_s(
    roles: Sequence[Role],
    model: ModelDescription,
    nodes: Mapping[str, NodeView],
    model_sha256: str,
    holder: str | None,
) -> float | None:
    """Seconds until every node has its part in memory, if none has it there: read from its disk, and before
    that fetched from `holder` by whoever lacks the file, one after another. None where nobody has the file,
    or a link was never measured."""
    fetched_s = slowest_s = 0.0
    for role in roles:
        size = weight_bytes_of(role, model) + (model.embedding_bytes if role.stage == 0 else 0)
        before_s = 0.0
        if model_sha256 not in nodes[role.node_id].holds:
            link = link_cost(nodes, holder, role.node_id) if holder is not None else None
            if link is None:
                return None
            before_s = fetched_s = tier_s(size, link.bytes_s, fetched_s)
        slowest_s = max(slowest_s, tier_s(size, DISK_BYTES_S, before_s))
    return slowest_s


def tier_s(size: float, bytes_s: float, queue_s: float = 0.0) -> float:
    """Seconds until so many bytes are read from where `queue_s` of other work come first."""
    return queue_s + size / bytes_s


def soonest_holder(
    roles: Sequence[Role], model: ModelDescription, nodes: Mapping[str, NodeView], model_sha256: str
) -> str | None:
    """Who has the whole file and gives it the soonest to those that lack it; the first of equals."""

    def time_s(holder: str) -> float:
        found = loading_s(roles, model, nodes, model_sha256, holder)
        return INFINITE if found is None else found

    holders = [node_id for node_id, node in nodes.items() if model_sha256 in node.holds]
    return min(holders, key=time_s, default=None)
