"""How large a model's blocks and a job's messages are, and how fast nodes and links: plain numbers. Pure.

Messages are counted as they are on TCP, exactly but for how many digits a number in a header has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edged import ModelDescription, NodeView

ENGINE = "torch_blocks"
F32 = 4
WORKER_BYTES = 440 << 20  # torch, transformers and peft, without a tensor (measured: 390 MB and arenas)
BOX_BYTES = 33  # of CURVE around a frame
HASH = 64  # characters of a hash
FRAME_BYTES_MAX = 256 << 20  # of `edged.wire`, which plugins do not read: a larger one ends its connection
PIECE_BYTES = 64 << 20  # of an adapter's values in one message; four bytes make a value


def block_values(model: ModelDescription) -> int:
    """Weights of one block, gated feed-forward assumed."""
    attention = model.hidden * model.head_dim * 2 * (model.heads + model.kv_heads)
    return attention + 3 * model.hidden * model.ffn


def saved_values(model: ModelDescription) -> int:
    """Floats that autograd keeps of one position in one block whose weights are frozen."""
    return 8 * model.hidden + 3 * model.head_dim * (model.heads + model.kv_heads) + 4 * model.ffn


def flops_s(node: NodeView) -> float | None:
    """Measured by the engine's own micro-benchmark."""
    found = [s.prefill_flops_s * s.sustained for s in node.speeds if s.name == ENGINE]
    return max(found, default=None)


def link_s(nodes: Mapping[str, NodeView], a: str, b: str, size: float) -> float | None:
    """Seconds of `size` bytes one way; None where the link was never measured."""
    for one, other in ((a, b), (b, a)):
        for link in nodes[one].links:
            if link.node_id == other and link.bandwidth_bytes_s:
                return (link.latency_s or 0.0) + size / link.bandwidth_bytes_s
    return None


def values_bytes(header: Mapping[str, Any], count: int) -> int:
    """Of an adapter's values in messages of a piece each; the first has the header's words."""
    first, *others = pieces(F32 * count)
    total = message_bytes(header, [first] if first else [])
    for number, size in enumerate(others, 1):
        total += message_bytes({"k": header["k"], "at": [*header["at"], number]}, [size])
    return total


def pieces(total: int) -> list[int]:
    """Bytes of each message in which so many travel; one at least."""
    return [min(PIECE_BYTES, total - first) for first in range(0, max(1, total), PIECE_BYTES)]


def message_bytes(header: Mapping[str, Any], frames: Sequence[int] = ()) -> int:
    """Of a message with frames of these sizes, as it is on TCP."""
    return frame_bytes(packed_bytes(header)) + sum(map(frame_bytes, frames))


def frame_bytes(count: int) -> int:
    """Of a frame: CURVE puts a box around it (RFC 26), ZMTP a head before that (RFC 23)."""
    boxed = count + BOX_BYTES
    return boxed + (2 if boxed < 256 else 9)


def packed_bytes(value: Any) -> int:
    """How long msgpack makes maps, lists, texts and whole numbers from 0 (its specification, "formats")."""
    if isinstance(value, Mapping):
        return _head(len(value), 16) + sum(packed_bytes(k) + packed_bytes(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return _head(len(value), 16) + sum(map(packed_bytes, value))
    if isinstance(value, str):
        size = len(value.encode())
        return size + (1 if size < 32 else 2 if size < 1 << 8 else 3)
    return next(size for size, most in ((1, 7), (2, 8), (3, 16), (5, 32), (9, 64)) if value < 1 << most)


def _head(count: int, short: int) -> int:
    return 1 if count < short else 3
