"""The U-shape: the client holds both ends of the model, so that no id, label or logit leaves it.

FL-GLM (arXiv:2406.14898): hidden states of the first blocks go to the server and come back from its blocks;
the client has the last ones, the head and the loss; both gradients travel the other way: four
tensors a batch.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from edged import ProtocolError

from .._training.loss import summed, targets_of
from ._chain import frame_of, report_eval, take_plain
from ._rank import Report
from ._serving import Serving


class UShape(Serving):
    """A client, or the server."""

    def build(self) -> None:
        job = self.job
        for part in self.places.parts(self.rank):
            span = self.blocks.span(
                part.first, part.last, embed=part.embed, head=part.head, dtype=job.weights
            )
            span.checkpointing = job.gradient_checkpointing
            if part.tuned and part.last > part.first:
                span.add_lora(
                    r=job.r, alpha=job.alpha, targets=job.target_modules, seed=job.seed, dropout=job.dropout
                )
            span.train()
            self.spans.append(span)
        self.is_client = self.rank in self.places.clients
        self.before = list(self.places.clients)
        self.noise = self.make_noise()
        self.longest = job.max_length + job.prompts  # positions of a row

    def step(self, step: int, report: Report) -> None:
        if self.is_client:
            began = time.monotonic()
            report("step", step, self._client(step) | {"seconds": time.monotonic() - began})
        elif self.job.schedule == "client-batch" and len(self.before) > 1:
            self._serve_together(step)
        else:
            for client in self.before:
                self._serve(step, client)

    def lower(self, ids: Tensor) -> Tensor:
        """What a client sends of ids (B, S): hidden states (B, S, d)."""
        hidden: Tensor = self.spans[0](ids)
        return hidden

    def _client(self, step: int) -> dict[str, float]:
        tail = self.spans[1]
        ids, labels = self.batch(step)
        link, targets = self.link(self.places.server), targets_of(labels)
        sent = self.noise(self.lower(ids), step, 0)
        link.send_tensor("up", [step], sent)
        back, _, _ = link.receive_tensor("back", [step], list(sent.shape), is_exact=True)
        back.requires_grad_()
        loss = summed(tail, tail(back), labels) / max(1, targets)
        self.check_loss(step, loss.item())
        loss.backward()
        assert back.grad is not None
        link.send_tensor("back gradient", [step], back.grad, self.feedback_key("back gradient"))
        gradient = link.receive_gradient("up gradient", [step], list(sent.shape))
        if sent.requires_grad:
            sent.backward(gradient)
        self.update(step)
        return {"loss": loss.item(), "tokens": float(ids.numel()), "targets": float(targets)}

    def _take(self, step: int, client: int) -> Tensor:
        most = [self.job.batch_size, self.longest, self.blocks.hidden]
        given, _, _ = self.link(client).receive_tensor("up", [step], most)
        return given.requires_grad_()

    def _give(self, step: int, client: int, hidden: Tensor) -> None:
        self.link(client).send_tensor("back", [step], hidden)

    def _gradient(self, step: int, client: int, hidden: Tensor) -> Tensor:
        shape = list(hidden.shape)
        return self.link(client).receive_gradient("back gradient", [step], shape)

    def _return(self, step: int, client: int, given: Tensor) -> None:
        assert given.grad is not None
        self.link(client).send_tensor("up gradient", [step], given.grad, self.feedback_key("up gradient"))

    def _serve(self, step: int, client: int) -> None:
        (span,) = self.spans
        self.enter(client)
        given = self._take(step, client)
        hidden = span(given)
        self._give(step, client, hidden)
        hidden.backward(self._gradient(step, client, hidden))
        self._return(step, client, given)
        self.update(step)

    def _serve_together(self, step: int) -> None:
        """One pass over all clients' rows; its gradient is the mean of theirs."""
        (span,) = self.spans
        taken = [self._take(step, client) for client in self.before]
        length = max(given.shape[1] for given in taken)
        hidden = span(torch.cat([_padded(given, length) for given in taken]))
        parts = torch.split(hidden, [len(given) for given in taken])
        parts = [part[:, : given.shape[1]] for part, given in zip(parts, taken, strict=True)]
        for client, part in zip(self.before, parts, strict=True):
            self._give(step, client, part)
        gradients = [
            self._gradient(step, client, part) for client, part in zip(self.before, parts, strict=True)
        ]
        hidden.backward(torch.cat([_padded(gradient, length) for gradient in gradients]))
        for client, given in zip(self.before, taken, strict=True):
            self._return(step, client, given)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= len(taken)
        self.update(step)

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, step: int, report: Report) -> None:
        for span in self.spans:
            span.train(False)
        with torch.no_grad():
            if self.is_client:
                self._evaluate(step, report)
            else:
                for client in self.before:
                    self._serve_evaluation(step, client)
        for span in self.spans:
            span.train()

    def _evaluate(self, step: int, report: Report) -> None:
        tail, link, sums = self.spans[1], self.link(self.places.server), []
        batches = self.eval_batches() if self.noise.allows(step) else []
        link.send("evals", [step], {"of": len(batches)}, [])
        for index, (ids, labels) in enumerate(batches):
            hidden = self.noise.held_out(self.lower(ids), step, index * self.job.batch_size)
            shape = list(hidden.shape[:2])
            link.send("eval", [step, index], {"shape": shape}, [frame_of(hidden)])
            header, frames = link.receive("eval back", [step, index])
            back, _ = take_plain(header, frames, *hidden.shape, 0)
            if back.shape != hidden.shape:
                raise ProtocolError(f"expected {shape} hidden states back")
            sums.append((summed(tail, tail(back), labels).item(), targets_of(labels)))
        report_eval(step, sums, report)

    def _serve_evaluation(self, step: int, client: int) -> None:
        (span,), link = self.spans, self.link(client)
        self.enter(client)
        header, _ = link.receive("evals", [step])
        for index in range(self.eval_count(header)):
            header, frames = link.receive("eval", [step, index])
            rows = self.job.batch_size
            given, _ = take_plain(header, frames, rows, self.longest, self.blocks.hidden, 0)
            link.send("eval back", [step, index], {"shape": list(given.shape[:2])}, [frame_of(span(given))])


def _padded(given: Tensor, length: int) -> Tensor:
    return nn.functional.pad(given, (0, 0, 0, length - given.shape[1]))
