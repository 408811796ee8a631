"""Time per token of two tensor ranks by the codec of their partial sums on the wire: f32, f16, q8, auto.

On loopback, and over a cable between two namespaces that carries 100 Mbit/s each way (a token bucket; needs
root). 1.1B in Q4_0, one thread a node. `ratio` is f32's time over the codec's, round by round: above 1 the
codec is faster. The narrow ones must win on the cable. `auto` chooses when it loads, by the link as it
measures it: `bytes_sent` tells which, and on loopback it must be f32's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from _models import model
from _network import Network, network
from _nodes import Place, generate, running
from _record import Record, quick, ratios, spread
from edged_plugins.shard import Wire

from edged.cli.demo import add_model
from edged.cli.demo_nodes import Node

WIRES = get_args(Wire)
MBIT = 100
LINKS = ("loopback", f"{MBIT} Mbit/s")
PHASES = {"decode": "tpot_ms", "prefill": "ttft_ms"}
ROUNDS, TOKENS, PROMPT = quick(2, 7), quick(6, 32), quick(8, 64)


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("codecs", out)
    for link in LINKS:
        if not record.has(*(_row(link, wire, phase) for wire in WIRES for phase in PHASES)):
            with _nodes(link) as (nodes, cable):
                _measure(record, link, nodes, cable)
    return record.done()


def _row(link: str, wire: str, phase: str) -> str:
    return f"{link} {wire} {phase}"


@contextlib.contextmanager
def _nodes(link: str) -> Iterator[tuple[list[Node], Network | None]]:
    """A node for each codec, whose profile names it and which is rank 0, and one for all of them."""
    with contextlib.ExitStack() as stack:
        cable = None if link == "loopback" else stack.enter_context(network(2))

        def place(name: str, number: int, settings: str = "") -> Place:
            if cable is None:
                return Place(name, settings=settings)
            return Place(name, cable.prefix(number), cable.address(number), settings=settings)

        places = [place(wire, 0, f'[plugin.shard]\nwire = "{wire}"') for wire in WIRES]
        yield stack.enter_context(running([*places, place("second", 1)])), cable


def _measure(record: Record, link: str, nodes: Sequence[Node], cable: Network | None) -> None:
    second, path = nodes[-1], model("1.1b")
    drivers = dict(zip(WIRES, nodes, strict=False))
    name = add_model(second, path)
    for driver in drivers.values():  # none fetches it over the cable
        add_model(driver, path)
    if cable is not None:
        cable.limit(MBIT)
    for driver in drivers.values():  # load every plan, on the link as it will be
        generate(driver, name, "tensor", [driver, second], 4, PROMPT)
    times: dict[str, list[dict[str, Any]]] = {wire: [] for wire in WIRES}
    for number in range(1, ROUNDS + 1):
        for wire, driver in drivers.items():
            document = generate(driver, name, "tensor", [driver, second], TOKENS, PROMPT)
            times[wire].append(document["measured"])
        for wire in WIRES:
            for phase, key in PHASES.items():
                mine, wide = ([each[key] for each in times[which]] for which in (wire, "f32"))
                record.put(
                    _row(link, wire, phase),
                    is_partial=number < ROUNDS,
                    rounds=number,
                    ms=spread(mine),
                    ratio=ratios(wide, mine),
                    bytes_sent=times[wire][-1]["bytes_sent"],
                )
