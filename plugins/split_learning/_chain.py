"""Label-sharing splits, pipelines, and the whole model on one node: a chain of stages, the loss at its end.

SplitLoRA (arXiv:2407.00952): the client sends the hidden states of its blocks and the labels, the server
computes the loss and sends the gradient of the hidden states back; both tune their own adapters. With
micro-batches a stage has at most as many under way as there are stages from it to the end, and after these
alternates one backward with one forward (1F1B; Narayanan et al., arXiv:1806.03377), as Confidant
(arXiv:2311.13381) does over phones. Gradients are those of the whole batch: every micro-batch's loss is
divided by the tokens of all.

Several clients (SplitFed, arXiv:2004.12088): `sequential`, the server steps once a client;
`client-batch`, once for all of them, by the mean of their gradients; `server-hierarchical`, it has an adapter
for each client. Each client's own gradient is always that of its own batch's mean loss.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edged import ProtocolError

from .._training.loss import summed, targets_of
from .._training.tensor_link import int_frame, ints
from ._cost import EVAL_DONE, divided
from ._rank import Report
from ._serving import Serving

TOKENS_MAX = 1 << 31
EVAL_WINDOW = 2  # batches of an evaluation that are under way to the next rank


class Stage(Serving):
    """One rank of the chain, or of several chains that end at the same server."""

    def build(self) -> None:
        job, (part,) = self.job, self.places.parts(self.rank)
        span = self.blocks.span(part.first, part.last, embed=part.embed, head=part.head, dtype=job.weights)
        span.checkpointing = job.gradient_checkpointing
        if part.tuned:
            span.add_lora(
                r=job.r, alpha=job.alpha, targets=job.target_modules, seed=job.seed, dropout=job.dropout
            )
        span.train()
        self.spans, self.span = [span], span
        self.noise = self.make_noise()
        chain = self.places.chain
        self.is_source, self.is_last = self.rank in self.places.clients, self.rank == self.places.server
        place = 0 if self.is_source else chain.index(self.rank)
        self.before = [] if self.is_source else self._upstream(chain[place - 1])
        self.after = None if self.is_last else (chain[1] if self.rank == 0 else self._next(place))
        self.window = self.places.window(self.rank)

    def _upstream(self, before: int) -> list[int]:
        return list(self.places.clients) if before == 0 and not self.job.stages else [before]

    def _next(self, place: int) -> int:
        return self.places.server if self.is_source else self.places.chain[place + 1]

    # --- a step ---------------------------------------------------------------------------------

    def step(self, step: int, report: Report) -> None:
        began = time.monotonic()
        if self.is_source and self.is_last:
            said = self._alone(step)
        elif self.is_source:
            self._send_batch(step)
            self.update(step)
            return
        elif not self.is_last:
            self._pass_on(step)
            self.update(step)
            return
        else:
            said = self._serve(step)
        report("step", step, said | {"seconds": time.monotonic() - began})

    def _alone(self, step: int) -> dict[str, float]:
        """The whole model is here."""
        ids, labels = self.batch(step)
        targets, total = targets_of(labels), 0.0
        for part in torch.split(torch.arange(len(ids)), divided(len(ids), self.job.micro_batches)):
            loss = summed(self.span, self.span(ids[part]), labels[part]) / max(1, targets)
            loss.backward()
            total += loss.item()
        self.check_loss(step, total)
        self.update(step)
        return {"loss": total, "tokens": float(ids.numel()), "targets": float(targets)}

    def _send_batch(self, step: int) -> None:
        """Forward micro-batches as far as the window goes, backward what comes back."""
        assert self.after is not None
        ids, labels = self.batch(step)
        targets = targets_of(labels)
        sizes = divided(len(ids), self.job.micro_batches)
        under_way: deque[tuple[int, Tensor]] = deque()
        link = self.link(self.after)
        for micro, rows in enumerate(torch.split(torch.arange(len(ids)), sizes)):
            hidden = self.noise(self.span(ids[rows]), step, int(rows[0]))
            link.send_tensor(
                "forward",
                [step, micro],
                hidden,
                "",
                [int_frame(labels[rows])],
                of=len(sizes),
                targets=targets,
            )
            under_way.append((micro, hidden))
            if len(under_way) == self.window:
                self._backward(step, under_way)
        while under_way:
            self._backward(step, under_way)

    def _backward(self, step: int, under_way: deque[tuple[int, Tensor]]) -> None:
        """The oldest one's gradient, from the rank after us, through what is here."""
        assert self.after is not None
        micro, hidden = under_way.popleft()
        link, shape = self.link(self.after), list(hidden.shape)
        hidden.backward(link.receive_gradient("backward", [step, micro], shape))

    def _take(self, before: int, step: int, micro: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A micro-batch of the rank before us: hidden states (a leaf), labels, and its header."""
        most = [self.job.batch_size, self.job.max_length, self.blocks.hidden]
        hidden, header, (frame,) = self.link(before).receive_tensor("forward", [step, micro], most, 1)
        labels = ints(frame, hidden.shape[:2], self.blocks.vocab)
        for word, low, high in (("of", micro + 1, self.job.micro_batches), ("targets", 0, TOKENS_MAX)):
            if type(header.get(word)) is not int or not low <= header[word] <= high:
                raise ProtocolError(f"expected {word} from {low} to {high} of rank {before}")
        return hidden.requires_grad_(), labels, header

    def _pass_on(self, step: int) -> None:
        """A stage between others: 1F1B in both directions."""
        assert self.after is not None
        (before,) = self.before
        link, inputs = self.link(self.after), deque[Tensor]()
        under_way: deque[tuple[int, Tensor]] = deque()
        micro, count = 0, 1
        while micro < count:
            given, labels, header = self._take(before, step, micro)
            count = header["of"]
            hidden = self.span(given)
            words = {"of": count, "targets": header["targets"]}
            link.send_tensor("forward", [step, micro], hidden, "", [int_frame(labels)], **words)
            inputs.append(given)
            under_way.append((micro, hidden))
            micro += 1
            if len(under_way) == self.window:
                self._return_one(before, step, under_way, inputs)
        while under_way:
            self._return_one(before, step, under_way, inputs)

    def _return_one(
        self, before: int, step: int, under_way: deque[tuple[int, Tensor]], inputs: deque[Tensor]
    ) -> None:
        micro = under_way[0][0]
        self._backward(step, under_way)
        self._send_gradient(before, step, micro, inputs.popleft())

    def _send_gradient(self, before: int, step: int, micro: int, given: Tensor) -> None:
        assert given.grad is not None
        key = self.feedback_key(f"backward {micro}")
        self.link(before).send_tensor("backward", [step, micro], given.grad, key)

    # --- the server's step ----------------------------------------------------------------------

    def _serve(self, step: int) -> dict[str, float]:
        """Every client's micro-batches; the optimiser steps as the schedule says."""
        together = self.job.schedule == "client-batch"
        losses, tokens, targets = [], 0, []
        if together and len(self.before) > 1:
            losses, tokens, targets = self._serve_together(step)
        else:
            for before in self.before:
                self.enter(before)
                loss, seen, wanted = self._serve_one(before, step)
                losses.append(loss)
                targets.append(wanted)
                tokens += seen
                self.update(step)
        total = sum(targets)
        loss = sum(a * b for a, b in zip(losses, targets, strict=True)) / max(1, total)
        return {"loss": loss, "tokens": float(tokens), "targets": float(total)}

    def _serve_one(self, before: int, step: int) -> tuple[float, int, int]:
        """One client: loss, positions, tokens of the loss."""
        micro, count, total, tokens, targets = 0, 1, 0.0, 0, 0
        while micro < count:
            given, labels, header = self._take(before, step, micro)
            count, targets = header["of"], header["targets"]
            loss = summed(self.span, self.span(given), labels) / max(1, targets)
            self.check_loss(step, loss.item())  # before a gradient goes back, by which others would step
            loss.backward()
            self._send_gradient(before, step, micro, given)
            total += loss.item()
            tokens += labels.numel()
            micro += 1
        return total, tokens, targets

    def _serve_together(self, step: int) -> tuple[list[float], int, list[int]]:
        """One pass over all clients' rows, shorter ones padded; its gradient is the mean of theirs."""
        taken = [self._take(before, step, 0) for before in self.before]
        length = max(given.shape[1] for given, _, _ in taken)
        padded = [nn.functional.pad(given, (0, 0, 0, length - given.shape[1])) for given, _, _ in taken]
        hidden = self.span(torch.cat(padded))
        parts = torch.split(hidden, [len(given) for given, _, _ in taken])
        losses = [
            summed(self.span, part[:, : given.shape[1]], labels) / max(1, header["targets"])
            for part, (given, labels, header) in zip(parts, taken, strict=True)
        ]
        for loss in losses:
            self.check_loss(step, loss.item())
        torch.stack(losses).sum().backward()
        for before, (given, _, _) in zip(self.before, taken, strict=True):
            self._send_gradient(before, step, 0, given)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= len(taken)
        self.update(step)
        tokens = sum(labels.numel() for _, labels, _ in taken)
        return [loss.item() for loss in losses], tokens, [header["targets"] for _, _, header in taken]

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, step: int, report: Report) -> None:
        self.span.train(False)
        with torch.no_grad():
            if self.is_source:
                self._evaluate_source(step, report)
            else:
                self._evaluate_others(step, report)
        self.span.train()

    def _evaluate_source(self, step: int, report: Report) -> None:
        batches = self.eval_batches()
        if self.after is None:
            sums = [
                (summed(self.span, self.span(ids), labels).item(), targets_of(labels))
                for ids, labels in batches
            ]
            report_eval(step, sums, report)
            return
        link, batches = self.link(self.after), batches if self.noise.allows(step) else []
        link.send("evals", [step], {"of": len(batches)}, [])
        for index, (ids, labels) in enumerate(batches):
            hidden = self.noise.held_out(self.span(ids), step, index * self.job.batch_size)
            frames = [frame_of(hidden), int_frame(labels)]
            self._send_eval(step, index, {"shape": list(ids.shape)}, frames)
        self._await_evals(step, len(batches))

    def _evaluate_others(self, step: int, report: Report) -> None:
        sums: list[tuple[float, int]] = []
        for before in self.before:
            self.enter(before)
            count = self.eval_count(self.link(before).receive("evals", [step])[0])
            if self.after is not None:
                self.link(self.after).send("evals", [step], {"of": count}, [])
            for index in range(count):
                given, labels = self._take_eval(before, step, index)
                hidden = self.span(given)
                if self.after is None:
                    sums.append((summed(self.span, hidden, labels).item(), targets_of(labels)))
                else:
                    frames = [frame_of(hidden), int_frame(labels)]
                    self._send_eval(step, index, {"shape": list(labels.shape)}, frames)
                self.link(before).send(EVAL_DONE, [step, index], {}, [])
            if self.after is not None:
                self._await_evals(step, count)
        if self.after is None:
            report_eval(step, sums, report)

    def _send_eval(self, step: int, index: int, words: Mapping[str, Any], frames: list[Any]) -> None:
        """A batch to the rank after us, when it is done with all but the last ones: what waits there is
        bounded, however long it serves others."""
        assert self.after is not None
        if index >= EVAL_WINDOW:
            self.link(self.after).receive(EVAL_DONE, [step, index - EVAL_WINDOW])
        self.link(self.after).send("eval", [step, index], words, frames)

    def _await_evals(self, step: int, count: int) -> None:
        """Take the answers to the last batches."""
        assert self.after is not None
        for index in range(max(0, count - EVAL_WINDOW), count):
            self.link(self.after).receive(EVAL_DONE, [step, index])

    def _take_eval(self, before: int, step: int, index: int) -> tuple[Tensor, Tensor]:
        header, frames = self.link(before).receive("eval", [step, index])
        given, labels = take_plain(
            header, frames, self.job.batch_size, self.job.max_length, self.blocks.hidden, 1
        )
        return given, ints(labels[0], given.shape[:2], self.blocks.vocab)


def take_plain(
    header: Mapping[str, Any], frames: list[memoryview], rows: int, length: int, width: int, more: int
) -> tuple[Tensor, list[memoryview]]:
    """An F32 tensor (B, S, width) that came without a codec, and `more` frames; ProtocolError otherwise."""
    shape = header.get("shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
    if not is_shape or not (1 <= shape[0] <= rows and 1 <= shape[1] <= length) or len(frames) != 1 + more:
        raise ProtocolError(f"expected hidden states of at most {rows} rows of {length}")
    if frames[0].nbytes != 4 * shape[0] * shape[1] * width:
        raise ProtocolError(f"expected hidden states of width {width}")
    tensor = torch.frombuffer(bytearray(frames[0]), dtype=torch.float32)
    return tensor.reshape(shape[0], shape[1], width), list(frames[1:])


def frame_of(hidden: Tensor) -> Any:
    return hidden.detach().contiguous().numpy().astype("<f4", copy=False)


def report_eval(step: int, sums: list[tuple[float, int]], report: Report) -> None:
    """The mean loss; of nothing held out it counts nothing, and is told all the same: others wait for it."""
    targets = sum(count for _, count in sums)
    loss = sum(loss for loss, _ in sums) / targets if targets else 0.0
    report("eval", step, {"loss": loss, "targets": float(targets)})
