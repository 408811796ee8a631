"""What happens to nodes while they work: drawn by a seed, done for real."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

from support import Node

BETWEEN = (2, 9)  # steps between two faults


class Faults:
    """Draws what happens next, and does it."""

    def __init__(
        self,
        nodes: list[Node],
        seed: int,
        kinds: tuple[str, ...],
        between: tuple[int, int] = BETWEEN,
        within_s: float = 0.0,
    ) -> None:
        """`between`: steps from one to the next; `within_s`: it comes so long after a step's end, at most."""
        self._nodes, self._random, self._kinds = nodes, random.Random(seed), kinds
        self._between, self._within_s = between, within_s
        self.done: Counter[str] = Counter()

    def pause(self) -> int:
        return self._random.randint(*self._between)

    def strike(self) -> None:
        """It counts where there was something to strike: a node between two epochs has no worker."""
        kind, node = self._random.choice(self._kinds), self._random.choice(self._nodes)
        time.sleep(self._random.uniform(0.0, self._within_s))  # some instant of a step, not its end
        workers = [] if kind == "daemon" else node.workers()
        for worker in workers:
            worker.send_signal(signal.SIGSTOP if kind == "freeze" else signal.SIGKILL)
        if kind == "daemon":
            node.kill()
            node.start().wait_ready()
        if workers or kind == "daemon":
            self.done[f"{kind} of {node.name}"] += 1

    @property
    def count(self) -> int:
        return sum(self.done.values())
