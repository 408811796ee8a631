"""The nodes that a job's file names, and whether what they shall hold fits. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edged import NodeView, PeerError, Role


def shortage(roles: Sequence[Role], chosen: Sequence[NodeView]) -> str:
    """The numbers, where a node's memory will not do."""
    short = [
        f"{node.name} needs {role.memory_bytes >> 20} MiB for blocks {role.layers[0]} to {role.layers[1]} "
        f"and has {node.memory_budget >> 20} MiB"
        for role, node in zip(roles, chosen, strict=True)
        if node.memory_budget is not None and role.memory_bytes > node.memory_budget
    ]
    return "not enough memory: " + "; ".join(short) if short else ""


def find(nodes: Sequence[NodeView], name: str) -> NodeView:
    """By name, id or a prefix of one; "" is the submitter."""
    if not name:
        return nodes[0]
    found = [node for node in nodes if name in (node.name, node.node_id)]
    found = found or [node for node in nodes if len(name) >= 8 and node.node_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(node.name for node in nodes))
    what = f"{len(found)} nodes match {name!r}" if found else f"node {name!r} is not online"
    raise PeerError(f"{what}; online: {known}", remedy="start it, or see `edged peers`", code="not-online")
