"""Loads one rank's weights, alone in its process, and says as JSON what that took: bytes before, at the
peak, and of the weights. Arguments: the model's file, ranks that share it equally, which of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from edged_plugins.shard import _ggml
from edged_plugins.shard._describe import describe
from edged_plugins.shard._model import read_model
from edged_plugins.shard._place import find_place
from edged_plugins.shard._weights import Weights
from edged_plugins.tensor_parallel import NAME, propose

from edged import ModelDescription, NodeView, PlanRequest, Role

RESET_PEAK = "5"  # to clear_refs: VmHWM begins anew (proc(5))


def main(path: str, ranks: int, rank: int) -> dict[str, int]:
    roles = _roles(msgspec.convert(describe(path), ModelDescription), ranks)
    lib, model = _ggml.load(), read_model(path)
    place = find_place(model, roles, rank)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _bytes("VmRSS")
    weights = Weights(lib, model, place, exact=False)
    found = {"before": before, "peak": _bytes("VmHWM"), "weights": weights.bytes}
    weights.close()
    return found


def _roles(model: ModelDescription, ranks: int) -> tuple[Role, ...]:
    if ranks == 1:
        whole = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
        return (Role(0, "node0", 0, *whole, share=1.0),)
    names = tuple(f"node{rank}" for rank in range(ranks))
    request = PlanRequest(NAME, names, (1.0,) * ranks)
    (candidate,) = propose(model, [NodeView(name, name) for name in names], request)
    return candidate.roles


def _bytes(field: str) -> int:
    fields: dict[str, Any] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return int(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
