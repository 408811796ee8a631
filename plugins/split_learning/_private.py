"""PrivateLoRA (arXiv:2311.14030): the blocks are the server's, what makes them personal is the client's.

Every layer named in `target_modules` computes W x + (alpha / r) B M A x. The server holds W, A and B, all of
them frozen; the client holds M (r x r, zero at first, so that the base model is what it starts from), the
embedding, the norm and the head. M is all that is trained: no id, label or logit leaves the client, and the
server has nothing of it that lasts. A and B are functions of the job's seed and the layer's full name
(`_middle.drawn`), so that the client writes the adapter as a LoRA of A and B M without asking.

What travels of a token: its hidden state up, back, and its gradient; and for each block r values of each
target, forward and backward, up and down. Layers that share their input, such as queries, keys and values, go
in one message.

What the server can still work out: it may hold the embedding's table, too, so that hidden states sent without
noise name their tokens; and since it sees A x and M A x, a few positions give it M. PrivateLoRA keeps labels
and logits from it, and gives it nothing to keep; it does not hide the prompt.

Latency: each input of adapted layers costs a round trip forward and one backward. With attention's three
that is 2 round trips a block: a step of 30 blocks takes 60 of them, whatever they carry.

Exchanges come in the order in which a model computes, and backward in the reverse of it: autograd runs the
latest node first. Both ends count, and one that is out of turn is a ProtocolError.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edged import ProtocolError

from .._training.loss import summed, targets_of
from .._training.tensor_link import TensorLink
from ._chain import frame_of, report_eval, take_plain
from ._middle import BACKWARD, FORWARD, adapt, drawn
from ._places import shared_inputs
from ._rank import Rank, Report

EVAL = "eval inner"


class PrivateLora(Rank):
    """What both ends have."""

    def build(self) -> None:
        self.shapes: dict[str, tuple[int, int]] = self.blocks.linears(self.job.target_modules)
        self.groups = shared_inputs(self.shapes)
        self.spans = [
            self.blocks.span(part.first, part.last, embed=part.embed, head=part.head, dtype=self.job.weights)
            for part in self.places.parts(self.rank)
        ]

    def width(self, group: int) -> int:
        """Of a group's message: r values of each of its layers."""
        return self.job.r * len(self.groups[group])


class PrivateClient(PrivateLora):
    def build(self) -> None:
        super().build()
        self.middles = {
            name: nn.Parameter(torch.zeros(self.job.r, self.job.r)) for group in self.groups for name in group
        }
        self.noise = self.make_noise()

    def own_parameters(self) -> list[nn.Parameter]:
        return list(self.middles.values())

    def streams(self) -> int:
        return 1 + len(self.groups)

    def count(self) -> dict[str, Any]:
        given = sum(self.job.r * (rows + columns) for rows, columns in self.shapes.values())
        widths = [self.width(group) for group in range(len(self.groups))]
        inner = [[width, widths.count(width)] for width in sorted(set(widths))]
        return super().count() | {"adapter_values": given, "inner": inner}

    def adapter(self) -> dict[str, np.ndarray]:
        """LoRA's A and B M of every layer, by PEFT's names."""
        found = {}
        for name, middle in self.middles.items():
            down, up = drawn(self.job.seed, name, self.job.r, *self.shapes[name])
            found[f"base_model.model.{name}.lora_A.weight"] = down.numpy()
            found[f"base_model.model.{name}.lora_B.weight"] = (up @ middle.detach()).numpy()
        return found

    def step(self, step: int, report: Report) -> None:
        began = time.monotonic()
        (head, tail), (ids, labels) = self.spans, self.batch(step)
        link, targets = self.link(self.places.server), targets_of(labels)
        sent = self.noise(head(ids), step, 0)
        link.send_tensor("up", [step], sent)
        passed = [self._forward(link, [step, group], sent) for group in range(len(self.groups))]
        back, _, _ = link.receive_tensor("back", [step], list(sent.shape), is_exact=True)
        loss = summed(tail, tail(back.requires_grad_()), labels) / max(1, targets)
        self.check_loss(step, loss.item())
        loss.backward()
        assert back.grad is not None
        link.send_tensor("back gradient", [step], back.grad, self.feedback_key("back gradient"))
        for group, (inner, outer) in reversed(list(enumerate(passed))):
            self._backward(link, [step, group], inner, outer)
        self.update(step)
        said = {"loss": loss.item(), "tokens": float(ids.numel()), "targets": float(targets)}
        report("step", step, said | {"seconds": time.monotonic() - began})

    def _forward(self, link: TensorLink, place: list[int], sent: Tensor) -> tuple[Tensor, Tensor]:
        """A group's A x, a leaf, and M A x, which is sent; both (B, S, n r)."""
        shape = [*sent.shape[:2], self.width(place[-1])]
        inner, _, _ = link.receive_tensor(FORWARD, place, shape, is_exact=True)
        outer = self._middle(place[-1], inner.requires_grad_())
        link.send_tensor(f"{FORWARD} back", place, outer)
        return inner, outer

    def _backward(self, link: TensorLink, place: list[int], inner: Tensor, outer: Tensor) -> None:
        outer.backward(link.receive_gradient(BACKWARD, place, list(outer.shape)))
        assert inner.grad is not None
        key = f"{BACKWARD} back"
        link.send_tensor(key, place, inner.grad, self.feedback_key(f"{key} {place[-1]}"))

    def _middle(self, group: int, inner: Tensor) -> Tensor:
        """M of each layer on its own part."""
        parts = zip(self.groups[group], inner.split(self.job.r, -1), strict=True)
        return torch.cat([part @ self.middles[name].T for name, part in parts], -1)

    def evaluate(self, step: int, report: Report) -> None:
        (head, tail), link, sums = self.spans, self.link(self.places.server), []
        batches = self.eval_batches() if self.noise.allows(step) else []
        link.send("evals", [step], {"of": len(batches)}, [])
        with torch.no_grad():
            for index, (ids, labels) in enumerate(batches):
                hidden = self.noise.held_out(head(ids), step, index * self.job.batch_size)
                shape = {"shape": list(ids.shape)}
                link.send("eval", [step, index], shape, [frame_of(hidden)])
                for group in range(len(self.groups)):
                    place = [step, index, group]
                    inner = _take(link, EVAL, place, [*ids.shape, self.width(group)])
                    link.send(f"{EVAL} back", place, shape, [frame_of(self._middle(group, inner))])
                back = _take(link, "eval back", [step, index], list(hidden.shape))
                sums.append((summed(tail, tail(back), labels).item(), targets_of(labels)))
        report_eval(step, sums, report)


class PrivateServer(PrivateLora):
    """It has no parameters: no optimiser, no checkpoint, and so no memory of what a codec left out."""

    def build(self) -> None:
        super().build()
        (self.span,), job = self.spans, self.job
        linears = self.span.linears(job.target_modules)
        adapt(
            linears,
            self.groups,
            self.shapes,
            r=job.r,
            alpha=job.alpha,
            seed=job.seed,
            exchange=self._exchange,
        )
        (self.client,) = self.places.clients
        self._place: list[int] = []  # of the pass under way: the step, or step and batch of an evaluation

    def _exchange(self, kind: str, group: int, tensor: Tensor) -> Tensor:
        link, place = self.link(self.client), [*self._place, group]
        if len(self._place) > 1:
            link.send(EVAL, place, {"shape": list(tensor.shape[:2])}, [frame_of(tensor)])
            return _take(link, f"{EVAL} back", place, list(tensor.shape))
        link.send_tensor(kind, place, tensor)
        if kind == BACKWARD:
            return link.receive_gradient(f"{kind} back", place, list(tensor.shape))
        return link.receive_tensor(f"{kind} back", place, list(tensor.shape), is_exact=True)[0]

    def step(self, step: int, report: Report) -> None:
        link, self._place = self.link(self.client), [step]
        most = [self.job.batch_size, self.job.max_length, self.blocks.hidden]
        given, _, _ = link.receive_tensor("up", [step], most)
        hidden = self.span(given)
        link.send_tensor("back", [step], hidden)
        hidden.backward(link.receive_gradient("back gradient", [step], list(hidden.shape)))

    def evaluate(self, step: int, report: Report) -> None:
        link, job = self.link(self.client), self.job
        header, _ = link.receive("evals", [step])
        with torch.no_grad():
            for index in range(self.eval_count(header)):
                header, frames = link.receive("eval", [step, index])
                given, _ = take_plain(header, frames, job.batch_size, job.max_length, self.blocks.hidden, 0)
                self._place = [step, index]
                shape = {"shape": list(given.shape[:2])}
                link.send("eval back", [step, index], shape, [frame_of(self.span(given))])


def _take(link: TensorLink, kind: str, place: list[int], shape: list[int]) -> Tensor:
    """A tensor of that shape that came without a codec."""
    header, frames = link.receive(kind, place)
    rows, length, width = shape
    found, _ = take_plain(header, frames, rows, length, width, 0)
    if list(found.shape) != shape:
        raise ProtocolError(f"expected {kind} of shape {shape}, got {list(found.shape)}")
    return found
