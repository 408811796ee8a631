"""A client of a federated job: it loads what the server made, trains on its own rows, and sends factors.

No row, label, logit or gradient leaves it; what leaves is in `_messages`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edged import EngineError, ProtocolError

from .._training.loss import summed, targets_of
from .._training.rows import Rows, seed_of
from . import _messages
from ._rank import Rank, Report

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's own
STACK_MOST = 1 << 16  # rank of what a server may have merged in one round
PREFIX = "base_model.model."


class Member(Rank):
    def build(self) -> None:
        job = self.job
        share = max(1, job.eval_rows // len(job.clients)) if job.eval_rows else 0
        self.rows = Rows.read(self.spec.data_path, self.blocks.tokenizer, job, share)
        self.r = job.r_of(self.rank)
        self.span = self.blocks.span(0, self.blocks.layers, embed=True, head=True, dtype=job.weights)
        self.span.add_lora(
            r=self.r,
            alpha=job.alpha_of(self.rank),
            targets=job.target_modules,
            seed=job.seed,
            dropout=job.dropout,
        )
        self.span.checkpointing = job.gradient_checkpointing
        self._start = self.start(self.r)
        self._merged: list[tuple[int, np.ndarray]] = []  # rank and values of every stack, in order
        self._sent = 0  # bytes of the last update

    def count(self) -> dict[str, Any]:
        return {"weight": self.rows.count, "dropped": self.rows.dropped}

    # --- a round ------------------------------------------------------------------------------------

    def round(self, number: int, report: Report) -> None:
        frozen = self._load(number)
        with self.computing():
            evaluated = self._evaluate() if self._is_due(number) else (0.0, 0.0)
            trained = self._train(number, frozen)
        sides = "".join(side for side in "AB" if side != frozen)
        values = self.flat(self._factors(), sides)
        words = _messages.up(number, self.rows.count, values.size)
        link, before = self.link(self.server), self._bytes()
        link.send_values("up", [number], _own(words), values)
        self._tell(number, [*trained, *evaluated, float(self._bytes() - before)])

    def finish(self, report: Report) -> None:
        """What the last round made: loaded and evaluated."""
        number = self.job.rounds
        self._load(number)
        with self.computing():
            evaluated = self._evaluate()
        self._tell(number, [0.0, 0.0, 0.0, 0.0, *evaluated, 0.0])

    def _bytes(self) -> int:
        return int(getattr(self.channel, "bytes_sent", 0))

    def _tell(self, number: int, figures: list[float]) -> None:
        self.link(self.server).send("told", [number], {}, [np.array(figures, "<f8").tobytes()])

    def _is_due(self, number: int) -> bool:
        every = self.job.eval_every
        return number == 0 or bool(every and number % every == 0)

    def _load(self, number: int) -> str:
        """Take a round's download; the factor that is not to be trained. ProtocolError where it is none."""
        said: dict[str, Any] = {}

        def count_of(header: Mapping[str, Any]) -> int:
            start, frozen, stack = (header.get(word) for word in ("start", "frozen", "stack"))
            if start not in ("", "A", "B", "AB") or frozen not in ("", "A", "B"):
                raise ProtocolError(f"expected sides of an adapter from {self.name(self.server)}")
            if type(stack) is not int or not 0 <= stack <= STACK_MOST:
                raise ProtocolError(f"expected a rank to merge up to {STACK_MOST}; {str(stack)[:20]} came")
            said.update(start=start, frozen=frozen, stack=stack)
            come = "".join(side for side in "AB" if side not in start)
            count = _messages.values_of("AB", stack, self.shapes)
            count += _messages.values_of(come, self.r, self.shapes)
            if header.get("of") != count:
                raise ProtocolError(
                    f"expected {count} values of an adapter; {str(header.get('of'))[:20]} came"
                )
            return count

        link = self.link(self.server)
        _, values = link.receive_values("down", [number], count_of, self.name(self.server))
        stacked = _messages.values_of("AB", said["stack"], self.shapes)
        if stacked:
            self._merge(said["stack"], values[:stacked])
        come = "".join(side for side in "AB" if side not in said["start"])
        given = self.unflat(values[stacked:], come, self.r)
        factors = {
            name: tuple(given[name].get(letter, self._start[name][side]) for side, letter in enumerate("AB"))
            for name in self.layers
        }
        self.span.set_lora(
            {
                f"{PREFIX}{name}.lora_{letter}.weight": torch.from_numpy(np.ascontiguousarray(pair[side]))
                for name, pair in factors.items()
                for side, letter in enumerate("AB")
            }
        )
        return str(said["frozen"])

    def _merge(self, stack: int, values: np.ndarray) -> None:
        self._merged.append((stack, values.copy()))
        found = self.unflat(values, "AB", stack)
        self.span.merge(
            {
                name: (torch.from_numpy(pair["A"].copy()), torch.from_numpy(pair["B"].copy()))
                for name, pair in found.items()
            }
        )

    def _factors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = self.span.lora()
        return {
            name: (
                found[f"{PREFIX}{name}.lora_A.weight"].numpy(),
                found[f"{PREFIX}{name}.lora_B.weight"].numpy(),
            )
            for name in self.layers
        }

    def _train(self, number: int, frozen: str) -> tuple[float, float, float, float]:
        """The round's local steps: loss by targets summed, targets, tokens, and seconds."""
        job, began = self.job, time.monotonic()
        tuned = []
        for name, parameter in self.span.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.requires_grad_(not frozen or f".lora_{frozen}." not in name)
                tuned += [parameter] if parameter.requires_grad else []
        optimiser = torch.optim.AdamW(
            tuned, lr=job.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=job.weight_decay
        )
        losses, targets, tokens = 0.0, 0, 0
        for step in range(number * job.local_steps, (number + 1) * job.local_steps):
            self.look()
            torch.manual_seed(seed_of(job.seed, step, self.rank))
            ids, labels = self.rows.batch(step)
            count = targets_of(labels)
            loss = summed(self.span, self.span(ids), labels) / max(1, count)
            if not math.isfinite(loss.item()):
                raise EngineError(
                    f"round {number}, step {step}: the loss is {loss.item()}; nothing of this round is kept",
                    remedy="lower learning_rate, or look at the rows of this step",
                    code="nan-loss",
                )
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses, targets, tokens = losses + loss.item() * count, targets + count, tokens + ids.numel()
        return losses, float(targets), float(tokens), time.monotonic() - began

    def _evaluate(self) -> tuple[float, float]:
        """The loss of what is held out, summed, and its targets."""
        losses, targets = 0.0, 0
        with torch.no_grad():
            for ids, labels in self.rows.eval_batches():
                self.look()
                losses += summed(self.span, self.span(ids), labels).item()
                targets += targets_of(labels)
        return losses, float(targets)

    # --- checkpoints --------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """What was merged into the frozen weights; the adapter itself comes down again."""
        found = {f"merged.{i}.{r}": torch.from_numpy(values) for i, (r, values) in enumerate(self._merged)}
        return found | {"round": torch.zeros(1)}

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        stacks = [key.split(".") for key in state if key.startswith("merged.")]
        for _, number, r in sorted(stacks, key=lambda parts: int(parts[1])):
            self._merge(int(r), state[f"merged.{number}.{r}"].numpy())


def _own(words: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a link says itself."""
    return {key: value for key, value in words.items() if key not in ("k", "at")}
