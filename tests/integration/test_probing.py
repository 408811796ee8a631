"""Links are measured over the data plane, before any plan needs them."""

from __future__ import annotations

from support import Nodes


def test_both_ends_know_what_their_link_costs_before_any_job(nodes: Nodes) -> None:
    group = nodes.group("laptop", "jetson", "phone", plugins=("monitor", "echo"))
    for node in group:
        assert all(link["latency_s"] is None for link in node.call("profile", {})["links"])
        assert all(link["all_reduce_ms"] is None for link in node.call("profile", {})["links"])
    group[1].call("profile", {"measure": True})
    for node in group:
        links = node.call("profile", {})["links"]
        assert len(links) == 2
        for link in links:
            assert 0 < link["latency_s"] < 1
            assert link["bandwidth_bytes_s"] > 1e6
            assert link["all_reduce_ms"] / 1000 > link["latency_s"] + 8192 / link["bandwidth_bytes_s"]
    assert all(speed["sustained"] == 1.0 for speed in group[1].call("profile", {})["engines"])
    rows = group[0].call("peers", {})["peers"]
    assert all(row["bandwidth_bytes_s"] > 1e6 for row in rows)
    assert all(not node.workers() for node in group)


def test_a_node_without_the_right_to_submit_measures_nothing_here(nodes: Nodes) -> None:
    one, other = nodes.group("laptop", "jetson", plugins=("monitor", "echo"))
    for here, there in ((one, other), (other, one)):
        here.call("trust", {"node": there.name, "rights": ["serve"]})
    one.call("profile", {"measure": True})
    for node in (one, other):
        assert all(link["latency_s"] is None for link in node.call("profile", {})["links"])
