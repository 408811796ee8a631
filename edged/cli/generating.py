"""A generation as it is seen from the terminal: its events, its end, and what Ctrl-C does to it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

from ..client import Client
from ..errors import EdgedError, JobError, NoDaemonError
from . import output
from .asking import ProgressLine
from .output import Document, note

CANCEL_S = 10.0
REQUEST: Document = {  # the body of `generate`; a command replaces what it was told
    "model": None,
    "prompt": None,
    "messages": None,
    "n": 128,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "seed": None,
    "strategy": "auto",
    "policy": None,
    "nodes": None,
    "shares": None,
    "raw": False,
    "ignore_eos": False,
    "numerics": "fast",
    "recovery": "fast",
    "private": False,
    "allow_guest": False,
    "detach": False,
    "strict": False,
    "adapter": None,
    "deferrable_s": None,
}


class Stream:
    """Shows the events of one request while they come; Ctrl-C cancels its job when `cancels`."""

    def __init__(
        self,
        client: Client,
        *,
        as_json: bool = False,
        as_lines: bool = False,
        cancels: bool = False,
        text_to: TextIO | None = None,
    ) -> None:
        """`text_to`: where the text goes for a person; standard output by default."""
        self._client, self._text_to = client, text_to or sys.stdout
        self.as_json, self.as_lines, self._cancels = as_json, as_lines, cancels
        self._progress = ProgressLine()
        self._job: str | None = None
        self._shown, self._last = 0, ""  # tokens and the last text on the terminal
        self.interrupts = 0

    def run(self, kind: str, body: Document, fds: Sequence[int] = ()) -> Document:
        """The document at the end, or the error that the daemon answers; JobError on a second Ctrl-C."""
        with self._watching_interrupts():
            events = self._client.stream(kind, body, fds)
            try:
                while True:
                    self._show(next(events))
            except StopIteration as end:
                document: Document = end.value
                return document
            except NoDaemonError as error:
                if self._job is not None:  # it is stored
                    error.remedy += f"; the job goes on then: edged jobs {self._job} --follow"
                raise
            except KeyboardInterrupt as interrupt:
                raise cancelled() if self._cancels else interrupt from None
            finally:
                self._progress.clear()
                self._end_line()

    # --- events ---

    def _show(self, event: dict[str, Any]) -> None:
        if event.get("event") == "accepted":
            self._job = event.get("job_id")
            if self.interrupts:
                self._cancel()
        if self.as_lines:
            output.line(event)
        elif not self.as_json:
            self._show_person(event)

    def _show_person(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "progress":
            self._progress.show(event)
            return
        self._progress.clear()
        if kind == "waiting":
            note(f"[waits until {event.get('until')}: {output.printable(str(event.get('because')))}]")
        elif kind == "plan" and event.get("epoch", 1) > 1:  # the first one is told at the end
            self._end_line()
            note(f"[goes on: {plan_line(event)}]")
        elif kind == "token":
            self._show_text(event)

    def _show_text(self, event: dict[str, Any]) -> None:
        """The next text; tokens that a recovery made again are on the terminal already."""
        tokens = event.get("tokens") or ()
        end = event.get("index", self._shown) + len(tokens)
        text = output.printable(str(event.get("text", "")))
        if end > self._shown or not tokens:
            print(text, end="", file=self._text_to, flush=True)
            self._shown, self._last = max(end, self._shown), text or self._last

    def _end_line(self) -> None:
        if self._last and not self._last.endswith("\n"):
            print(file=self._text_to, flush=True)
        self._last = ""

    # --- Ctrl-C ---

    @contextlib.contextmanager
    def _watching_interrupts(self) -> Iterator[None]:
        if not self._cancels:
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first one cancels and waits for the job's end; the second one leaves at once."""
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if self._job is not None:
            self._cancel()

    def _cancel(self) -> None:
        """Over a connection of its own: this one is in the middle of a message."""
        with contextlib.suppress(EdgedError), Client(self._client.endpoint) as other:
            other.call("cancel", {"job": self._job}, silence_s=CANCEL_S)


def ended(document: Document, stream: Stream, summary: Callable[[Document], str] | None = None) -> int:
    """Show the end of a job in the form that was asked for; the exit code."""
    error = _error_of(document)
    if error is not None:
        document = document | {"error": output.described_error(error)}
        note(f"edged: {error}" + (f"; {error.remedy}" if error.remedy else ""))
    if stream.as_lines:
        output.line({"event": "finished"} | document)
    else:
        output.show(document, stream.as_json, lambda done: note((summary or summary_line)(done)))
    return error.exit_code if error is not None else 0


def cancelled() -> JobError:
    return JobError("the job was cancelled", code="cancelled")


def plan_line(plan: dict[str, Any]) -> str:
    names = [role.get("name") or str(role.get("node"))[:8] for role in plan.get("roles", ())]
    return f"{plan.get('strategy')} over {', '.join(names)}"


def summary_line(document: Document) -> str:
    """What a person wants to know after the text; only the id for a job that goes on without us."""
    if "measured" not in document:
        return f"[job {document.get('job_id')}]"
    measured = document["measured"]
    parts = [plan_line(document.get("plan") or {}), f"{len(document.get('tokens') or ())} tokens"]
    for key, unit in (("tokens_per_s", "tokens/s"), ("ttft_ms", "ms to the first"), ("joules", "J")):
        if isinstance(value := measured.get(key), int | float):
            parts.append(f"{value:.4g} {unit}")
    if recoveries := measured.get("recoveries"):
        parts.append(f"{len(recoveries)} recovered")
    return f"[{'; '.join(parts)}]"


def _error_of(document: Document) -> JobError | None:
    """A document of a job that did not reach its end by itself is an error, too."""
    if isinstance(described := document.get("error"), dict):
        return JobError(
            str(described.get("message")),
            remedy=str(described.get("remedy", "")),
            code=str(described.get("code")),
        )
    return cancelled() if document.get("finish_reason") == "cancelled" else None
