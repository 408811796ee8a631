"""What the tests of the strategies share: a model, nodes, and what every cut must keep."""

from __future__ import annotations

from edged import EngineSpeed, ModelDescription, NodeView, PlanRequest


def model(**changes):
    """SmolLM2-135M's shape in q4_1: three groups of three heads, blocks of 32."""
    fields = {
        "architecture": "llama",
        "parameters": 134_515_008,
        "layers": 30,
        "hidden": 576,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "ffn": 1536,
        "vocab": 49152,
        "context_tokens": 8192,
        "weight_type": "q4_1",
        "head_unit": 3,
        "ffn_unit": 32,
        "vocab_unit": 1,
        "layer_bytes": (2_211_840,) * 30,
        "embedding_bytes": 30_081_024,
        "head_bytes": 0,
    }
    return ModelDescription(**{**fields, **changes})


def view(number, *speeds, budget=None):
    """Node `number`; `speeds` are (weight type, bytes a second), `budget` bytes."""
    measured = tuple(EngineSpeed("shard", kind, speed, 1e9) for kind, speed in speeds)
    return NodeView(f"node{number}", f"name{number}", speeds=measured, memory_budget=budget)


def views(count):
    return [view(number) for number in range(count)]


def named(nodes, **changes):
    return PlanRequest(nodes=tuple(node.node_id for node in nodes), **changes)


def assert_covers(ranges, total, unit=1):
    """Half-open, in rank order, without a gap, none empty, cut at multiples of `unit`."""
    assert [begin for begin, _ in ranges] == [0, *[end for _, end in ranges[:-1]]]
    assert ranges[-1][1] == total
    assert all(begin < end for begin, end in ranges)
    assert all(end % unit == 0 for _, end in ranges[:-1])
