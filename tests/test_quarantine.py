"""A lost node gets no role for a while, which doubles with each loss on end."""

from __future__ import annotations

from edged.quarantine import FIRST_S, FORGOTTEN_S, MOST_S, Quarantine
from edged.types import NodeView

ONE, OTHER = NodeView("one", "one"), NodeView("other", "other", refuses="it is drained")


def test_each_loss_on_end_doubles_the_while_up_to_a_bound() -> None:
    quarantine, now, waits = Quarantine(), 100.0, []
    for _ in range(12):
        quarantine.add("one", now)
        waits.append(quarantine.left_s("one", now))
        now += 1.0
    assert waits[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert waits[-1] == MOST_S
    assert quarantine.left_s("one", now + MOST_S) == 0.0
    quarantine.add("one", now + FORGOTTEN_S + 1)
    assert quarantine.left_s("one", now + FORGOTTEN_S + 1) == FIRST_S


def test_it_is_the_reason_why_a_node_takes_no_role() -> None:
    quarantine = Quarantine()
    assert quarantine.seen([ONE, OTHER], 0.0) == [ONE, OTHER]
    for node in ("one", "other"):
        quarantine.add(node, 0.0)
    assert quarantine.any(0.0)
    assert not quarantine.any(FIRST_S)
    first, second = quarantine.seen([ONE, OTHER], 0.0)
    assert "lost while it worked" in first.refuses
    assert second is OTHER
    assert quarantine.seen([ONE, OTHER], FIRST_S) == [ONE, OTHER]
