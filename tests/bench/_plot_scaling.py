"""Draw results/scaling.json beside itself: `python tests/bench/_plot_scaling.py [FILE]`. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

FILE = Path(__file__).parent / "results" / "scaling.json"
COLOURS = {"tensor": "tab:blue", "layers": "tab:orange"}


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else FILE
    document = json.loads(source.read_text())
    rows = {row["row"]: row for row in document["rows"]}
    figure, (by_nodes, by_rtt) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for plan in COLOURS:
        bare = [row for name, row in rows.items() if "relay" not in name and row["plan"] in (plan, "local")]
        relayed = [row for name, row in rows.items() if "relay" in name and row["plan"] == plan]
        _draw(by_nodes, bare, "nodes", plan)
        _draw(by_rtt, relayed, "rtt_ms", plan)
    by_nodes.set(title="bare veth, half a processor a node", xlabel="nodes", ylabel="ms per token", ylim=0)
    by_nodes.set_xticks(sorted({row["nodes"] for row in rows.values()}))
    by_rtt.set(title="two nodes through the delay relay", xlabel="RTT, ms", yscale="log")
    by_rtt.legend()
    figure.suptitle(f"time per token, 1.1B Q4_0, commit {document['commit']}")
    figure.savefig(source.with_suffix(".png"), dpi=120)


def _draw(axes: Axes, rows: list[dict[str, Any]], key: str, plan: str) -> None:
    """Medians with least and most, and the prediction as a dashed line."""
    x = [row[key]["median"] if key == "rtt_ms" else row[key] for row in rows]
    middle = [row["tpot_ms"]["median"] for row in rows]
    below = [m - row["tpot_ms"]["min"] for m, row in zip(middle, rows, strict=True)]
    above = [row["tpot_ms"]["max"] - m for m, row in zip(middle, rows, strict=True)]
    axes.errorbar(x, middle, [below, above], marker="o", capsize=3, color=COLOURS[plan], label=plan)
    predicted = [row["predicted_ms"]["median"] for row in rows]
    axes.plot(x, predicted, "--", color=COLOURS[plan], label=f"{plan}, predicted")


if __name__ == "__main__":
    main(sys.argv[1:])
