"""Draw results/personal.json beside itself: `python tests/bench/_plot_personal.py [FILE]`; by matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

FILE = Path(__file__).parent / "results" / "personal.json"


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else FILE
    document = json.loads(source.read_text())
    rows = [row for row in document["rows"] if "losses" in row]
    names = [row["row"] for row in rows]
    figure, (loss, rouge) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    at = range(len(rows))
    loss.bar(at, [row["held_out_loss"] for row in rows], color="tab:blue", alpha=0.4, label="all clients")
    for client in range(len(rows[0]["losses"])):
        losses = [row["losses"][client] for row in rows]
        loss.plot(at, losses, "o-", linewidth=0.6, markersize=3, color="0.35")
    loss.plot([], [], "o-", linewidth=0.6, markersize=3, color="0.35", label="one client")
    loss.set(title="held-out loss", ylim=0)
    loss.legend()
    rouge.bar(at, [row["rouge_l"] for row in rows], color="tab:orange", alpha=0.6)
    rouge.set(title="Rouge-L of greedy answers", ylim=0)
    for axes in (loss, rouge):
        axes.set_xticks(at, names, rotation=40, ha="right")
    figure.suptitle(f"ten clients of Natural Instructions, SmolLM2 135M, commit {document['commit']}")
    figure.savefig(source.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
