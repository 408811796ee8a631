"""A process that is asked over a pipe, a JSON line each way, so that two can be measured in turns.

Run as a program it is an engine: `_peer.py ours` is edged's, as a worker loads it; `_peer.py llama` is
llama.cpp with its own settings for everything that is not named here. Both then run the same requests.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _serve import serve

from edged.worker import bound_spinning

CONTEXT = 512  # tokens of each sequence
ANSWER_S = 600.0  # loading 6 GB from a cold disk and prefilling them takes minutes, a hang does not end


class Peer:
    """The asking side. `call` raises RuntimeError with what went wrong on the other."""

    def __init__(self, *command: str, python: str = sys.executable) -> None:
        self._process = subprocess.Popen([python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # its end of file is the request to end
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def call(self, what: str, *arguments: Any) -> Any:
        self.ask(what, *arguments)
        return self.answer(what)

    def ask(self, what: str, *arguments: Any) -> None:
        """The first half of `call`, for two peers that work at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, *arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, what: str) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            raise RuntimeError(f"expected an answer to {what} within {ANSWER_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that was asked for {what} ended with {self._process.wait(30)}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]


class Turns(ABC):
    """What both engines are asked for, over `load`, `_step` and `_clear`, which are theirs. Times are
    milliseconds; tokens are random, of the model's vocabulary."""

    @abstractmethod
    def load(self, path: str, threads: int, sequences: int) -> None:
        """Load a model in place of the one before; `sequences` caches of CONTEXT tokens."""

    @abstractmethod
    def _step(self, numbers: Sequence[int], position: int, count: int) -> float:
        """Run `count` tokens of each sequence, with the logits of each one's last; the time."""

    @abstractmethod
    def _clear(self, sequences: int) -> None:
        """Forget so many sequences."""

    def prefill(self, count: int) -> float:
        """Time of a prompt of `count` tokens, to its first token, in an empty cache."""
        spent = self._step([0], 0, count)
        self._clear(1)
        return spent

    def decode(self, after: int, steps: int) -> list[float]:
        """Times of single tokens after a prompt of `after`; the first, which builds graphs, left out."""
        return self.batch(1, after, steps)

    def batch(self, sequences: int, after: int, steps: int) -> list[float]:
        """Times of steps that give one token to each of `sequences`, as `decode`."""
        numbers = range(sequences)
        for number in numbers:
            self._step([number], 0, after)
        spent = [self._step(numbers, after + position, 1) for position in range(steps + 1)]
        self._clear(sequences)
        return spent[1:]


def engine(which: str) -> Peer:
    """`ours` or `llama`, in a process of its own."""
    return Peer(str(Path(__file__)), which)


def main(arguments: Sequence[str]) -> None:
    if arguments == ["ours"]:
        bound_spinning()  # before the import, which loads OpenMP's library
        from _runner_ours import Ours

        serve(Ours())
    elif arguments == ["llama"]:
        from _runner_llama import Llama

        serve(Llama())
    else:
        sys.exit("expected ours or llama")


if __name__ == "__main__":
    main(sys.argv[1:])
