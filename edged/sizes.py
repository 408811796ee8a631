"""What a role takes in memory, and what it gets of a node's budget. Pure.

A role has weights, perhaps those of an adapter beside them, the KV cache of all its sequences, and the
worker itself. Where the weights do not fit, an engine may compute with a window over them; an adapter's
are always in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from .types import Candidate, ModelDescription, PlanRequest, Role

WORKER_BYTES = 96 << 20  # interpreter, libraries and graph buffers of one worker (measured: 50 to 90 MiB)
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # per element; exact numerics take F32
F32_BYTES = 4
BUDGET_MARGIN = 16  # a windowed role leaves this part of a budget free, which moves with the node's memory


def stages_of(roles: Sequence[Role]) -> list[list[Role]]:
    """Roles by stage, stages in order, ranks in order within."""
    ordered = sorted(roles, key=lambda role: (role.stage, role.rank))
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda role: role.stage)]


def weight_bytes_of(role: Role, model: ModelDescription) -> int:
    """Bytes of weights a rank reads for each token, in the file's types (the embedding is one row)."""
    return round(sum(blocks_of(role, model)))


def blocks_of(role: Role, model: ModelDescription) -> list[float]:
    """Bytes of a rank's weights in the order it reads them: for each layer attention (with what is not cut)
    and feed-forward, then its part of the output head."""
    heads = (role.heads[1] - role.heads[0]) / model.heads
    ffn = (role.ffn[1] - role.ffn[0]) / model.ffn
    layers = [(a * heads + kept, f * ffn) for a, f, kept in _layer_cuts(model)[slice(*role.layers)]]
    head = model.head_bytes * (role.vocab[1] - role.vocab[0]) / model.vocab
    return [*itertools.chain(*layers), head]


def _layer_cuts(model: ModelDescription) -> Sequence[tuple[float, float, float]]:
    """As described; else as a gated feed-forward beside attention divides a layer."""
    if model.layer_cuts:
        return model.layer_cuts
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
    feed_forward = 3 * model.hidden * model.ffn
    part = attention / (attention + feed_forward)
    return [(total * part, total * (1 - part), 0.0) for total in model.layer_bytes]


def held_bytes_of(role: Role, model: ModelDescription, request: PlanRequest) -> int:
    """Bytes of a rank's weights in memory: the file's types, or F32 with exact numerics."""
    weights = weight_bytes_of(role, model)
    if request.numerics == "fast":
        return weights
    return round(weights * F32_BYTES * model.parameters / _stored_bytes(model))


def _stored_bytes(model: ModelDescription) -> int:
    """Of all tensors, one that is both embedding and output counted once."""
    if model.tensors:
        return sum(tensor.bytes for tensor in model.tensors)
    is_tied = model.head_bytes == model.embedding_bytes
    return sum(model.layer_bytes) + model.embedding_bytes + (0 if is_tied else model.head_bytes)


def memory_of(role: Role, model: ModelDescription, request: PlanRequest) -> int:
    """Weights, an adapter's, the KV cache of all sequences and the worker itself, in bytes."""
    cache = cache_bytes_of(role, model, request, max(request.context_tokens, request.cache_tokens))
    adapter = adapter_bytes_of(role, model, request)
    return round(held_bytes_of(role, model, request) + adapter + cache + WORKER_BYTES)


def adapter_bytes_of(role: Role, model: ModelDescription, request: PlanRequest) -> float:
    """Bytes of an adapter's weights in memory, by the role's layers; as if its ranks did not cut them. Exact
    numerics hold them in F32, of which the file may have halves."""
    if request.adapter is None:
        return 0.0
    part = (role.layers[1] - role.layers[0]) / model.layers
    return request.adapter.bytes * part * (2 if request.numerics == "exact" else 1)


def cache_bytes_of(role: Role, model: ModelDescription, request: PlanRequest, positions: int) -> float:
    """Bytes of a rank's keys and values at so many positions."""
    kv_heads = model.kv_heads * (role.heads[1] - role.heads[0]) / model.heads
    elements = 2 * (role.layers[1] - role.layers[0]) * positions * kv_heads * model.head_dim
    return elements * KV_BYTES["f32" if request.numerics == "exact" else request.cache_type]


def least_memory_of(role: Role, model: ModelDescription, request: PlanRequest, window_bytes: int) -> int:
    """As `memory_of`, with the smallest window over the weights that the engine has (0: it has none).

    Vectors, a few thousandths of a model, are not windowed."""
    full, weights = memory_of(role, model, request), held_bytes_of(role, model, request)
    vectors = sum(tensor.bytes for tensor in model.tensors if len(tensor.shape) == 1)
    return full if not window_bytes else full - weights + min(weights, window_bytes + vectors)


def granted(
    role: Role, model: ModelDescription, request: PlanRequest, budget: int | None, window_bytes: int
) -> int:
    """Memory to plan a role with: all that it needs, or most of a smaller budget where a window fits
    into that. Above the budget where nothing helps: then it is the least that would."""
    full = memory_of(role, model, request)
    if budget is None or full <= budget:
        return full
    return max(budget - budget // BUDGET_MARGIN, least_memory_of(role, model, request, window_bytes))


def admitted(
    role: Role, model: ModelDescription, request: PlanRequest, budget: int | None, window_bytes: int
) -> int:
    """Memory that a planned role gets where it is offered: what it was planned with, no less than works and
    no more than it needs; less, by a smaller window, where the budget has shrunk since. Above the budget
    where nothing helps: then it is the least that would."""
    full = memory_of(role, model, request)
    least = least_memory_of(role, model, request, window_bytes)
    planned = max(least, min(full, role.memory_bytes or full))
    return planned if budget is None or planned <= budget else max(budget, least)


def weights_room(role: Role, model: ModelDescription, request: PlanRequest) -> int:
    """Bytes that a planned role's memory leaves to its weights; 0: as much as they are."""
    full = memory_of(role, model, request)
    if not role.memory_bytes or role.memory_bytes >= full:
        return 0
    return max(1, role.memory_bytes - (full - held_bytes_of(role, model, request)))


def is_windowed(candidate: Candidate, model: ModelDescription, request: PlanRequest) -> bool:
    """Has some node less memory for its part's weights than they take?"""
    return any(weights_room(role, model, request) for role in candidate.roles)


def at_full_size(candidate: Candidate, model: ModelDescription, request: PlanRequest) -> Candidate:
    """The same candidate, no role of it windowed, with the memory that it takes for another request."""
    roles = (replace(role, memory_bytes=memory_of(role, model, request)) for role in candidate.roles)
    return replace(candidate, roles=tuple(roles))


def is_sound(model: ModelDescription) -> bool:
    """Are a description's figures ones that a model can have? Another node sends them, and memory is
    counted by them."""
    sizes = (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim, model.ffn, model.vocab)
    bytes_ = (
        *model.layer_bytes,
        *itertools.chain(*model.layer_cuts),
        model.embedding_bytes,
        model.head_bytes,
        *(tensor.bytes for tensor in model.tensors),
    )
    return (
        all(size > 0 for size in (*sizes, model.parameters, model.context_tokens))
        and all(count >= 0 for count in bytes_)
        and _stored_bytes(model) > 0
        and len(model.layer_bytes) == model.layers
        and len(model.layer_cuts) in (0, model.layers)
    )


def is_within(role: Role, model: ModelDescription) -> bool:
    """Are the role's figures ones that a part of this model, with sound figures, can have?"""
    limits = (
        (role.layers, model.layers),
        (role.heads, model.heads),
        (role.ffn, model.ffn),
        (role.vocab, model.vocab),
    )
    return is_sound(model) and role.memory_bytes >= 0 and all(0 <= a <= b <= size for (a, b), size in limits)
