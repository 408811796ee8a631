"""One completion of an OpenAI-compatible endpoint, as it is written: POST /completions, events back.

The request is that of the OpenAI API's legacy completions, the answer Server-Sent Events (WHATWG HTML,
section 9.2). A thread reads one connection and puts what comes into a queue: text, the reason of the end, or
an EngineError. Everything from the other side is bounded and checked. Nothing that it sent stands in an
error, since it knows the key and the prompt and could repeat them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edged import EdgedError, EngineError

from ._cloud_settings import Address, is_loopback

LINE_BYTES_MAX = 1 << 18
ANSWER_BYTES_MAX, TOKEN_BYTES_MAX = 1 << 20, 1 << 12  # of an answer, and more for each token asked for
EVENTS = "text/event-stream"
MEDIA = ("application/json", "text/html", "text/plain")  # that an error may name
SAID = {
    401: ("it does not know the key", "check plugin.cloud.key_file"),
    403: ("it does not let this key do it", "check plugin.cloud.key_file and the model's name there"),
    404: (
        "there is no /completions, or no such model",
        "name an endpoint with text completions (chat alone will not do), and its name for the model",
    ),
    429: ("it has had enough for now", "try again later"),
}


@dataclass(frozen=True, slots=True)
class End:
    """The answer is over: "stop" where the model said so, "length" after as many tokens as were asked for."""

    reason: str


News = str | End | EdgedError


class _Connection(http.client.HTTPConnection):
    """Counts what it sends."""

    bytes_sent = 0

    def send(self, data: Any) -> None:
        super().send(data)
        self.bytes_sent += len(data)


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    """The same inside TLS: counted before it is encrypted."""


class Stream:
    """An answer on its way, read by a thread of its own until it is over or closed."""

    def __init__(
        self,
        address: Address,
        key: str,
        request: Mapping[str, Any],
        news: queue.SimpleQueue[tuple[Stream, News]],
        timeout_s: float,
    ) -> None:
        """`request`: the body but for "stream". `timeout_s`: of each wait for bytes."""
        self._address, self._key, self._news = address, key, news
        self._body = json.dumps({**request, "stream": True}).encode()
        self._bytes_max = ANSWER_BYTES_MAX + TOKEN_BYTES_MAX * int(request["max_tokens"])
        self._connection = _connection(address, timeout_s)
        self._closing = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="cloud-stream", daemon=True)
        self._thread.start()

    @property
    def bytes_sent(self) -> int:
        """Request and its head, before encryption."""
        return self._connection.bytes_sent

    def close(self) -> None:
        """Hang up, whatever is still to come. On any thread; a second call does nothing."""
        with self._closing:
            self._is_closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread of a closed stream; one that still connects ends with its own timeout."""
        self._thread.join(timeout_s)

    # --- the thread ---

    def _run(self) -> None:
        try:
            for item in self._answer():
                self._news.put((self, item))
        except EdgedError as error:
            self._news.put((self, error))
        except Exception as error:  # a thread's outermost frame: the engine must hear that it ended
            self._news.put((self, self._failed(_why(error))))
        finally:
            with self._closing:
                self._connection.close()
                self._is_closed, self._socket = True, None

    def _answer(self) -> Iterator[News]:
        self._connect()
        headers = {"Content-Type": "application/json", "Accept": EVENTS, "User-Agent": "edged"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._connection.request("POST", f"{self._address.path}/completions", self._body, headers)
        response = self._connection.getresponse()
        try:
            self._check(response)
            for event in self._events(response):
                if event == b"[DONE]":
                    yield End("stop")
                    return
                text, reason = self._read(event)
                if text:
                    yield text
                if reason:
                    yield End(reason)
                    return
            raise self._failed("it hung up before the answer was over")
        finally:
            response.close()

    def _connect(self) -> None:
        self._connection.connect()
        sock = self._connection.sock
        if not self._address.is_tls and not is_loopback(str(sock.getpeername()[0]).partition("%")[0]):
            raise self._failed("without TLS it must be on loopback, and its name leads elsewhere")
        with self._closing:
            self._socket = sock
            if self._is_closed:
                raise self._failed("it was not waited for")

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Is it an answer of events, by this very endpoint?"""
        status = response.status
        if 300 <= status < 400:
            raise self._failed(
                f"it answers with a redirect ({status}), and the key goes to nobody else",
                "write the address it really has into plugin.cloud.endpoint",
            )
        if status != 200:
            what, remedy = SAID.get(status, ("it could not", "try again, or see what its operator says"))
            raise self._failed(f"{what} (HTTP {status})", remedy)
        media = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if media != EVENTS:
            named = media if media in MEDIA else "something else"
            raise self._failed(f"expected an answer of type {EVENTS}; {named} came")

    def _events(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The data of each whole event."""
        data, size = list[bytes](), 0
        for line in self._lines(response):
            if not line and data:
                yield b"\n".join(data)
                data, size = [], 0
            elif line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" "))
                size += len(line)
                if size > LINE_BYTES_MAX:
                    raise self._failed(
                        f"expected events of at most {LINE_BYTES_MAX} bytes; a longer one came"
                    )

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        count = 0
        while line := response.readline(LINE_BYTES_MAX + 1):
            count += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise self._failed(f"expected lines of at most {LINE_BYTES_MAX} bytes; a longer one came")
            if count > self._bytes_max:
                raise self._failed(f"expected an answer of at most {self._bytes_max} bytes; more came")
            if not line.endswith(b"\n"):
                return  # cut short
            yield line.rstrip(b"\r\n")

    def _read(self, event: bytes) -> tuple[str, str]:
        """Text and the reason of the end, each empty where there is none."""
        try:
            found = json.loads(event)
        except (ValueError, RecursionError):
            raise self._failed("expected events of JSON; something else came") from None
        if isinstance(found, dict) and found.get("error"):
            raise self._failed("it reports an error amid its answer", "see what its operator says")
        try:
            choice = found["choices"][0] if found["choices"] else {"text": ""}
            text, reason = choice.get("text"), choice.get("finish_reason")
        except (TypeError, LookupError, AttributeError):
            raise self._failed("expected events with choices; something else came") from None
        if not isinstance(text, str) and not (text is None and reason):
            raise self._failed("expected choices with text, as of /completions; something else came")
        if reason not in (None, "", "stop", "length"):
            raise self._failed("it ended its answer for another reason than stop or length")
        # half of a surrogate pair is no text
        return (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace"), reason or ""

    def _failed(self, what: str, remedy: str = "try again, or run it elsewhere") -> EngineError:
        host = self._address.host
        port = "" if self._address.port in (80, 443) else f":{self._address.port}"
        # what to do is said with it: of a worker's error in the middle of a job only the message travels
        return EngineError(f"the endpoint {host}{port} gave no whole answer: {what}; {remedy}")


def _connection(address: Address, timeout_s: float) -> _Connection:
    if not address.is_tls:
        return _Connection(address.host, address.port, timeout=timeout_s)
    return _TlsConnection(address.host, address.port, timeout=timeout_s, context=ssl.create_default_context())


def _why(error: Exception) -> str:
    """An error's cause in words of this machine's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return "nothing came in time"
    if isinstance(error, http.client.HTTPException):
        return f"it does not speak HTTP as expected ({type(error).__name__})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
