"""An OpenAI-compatible endpoint on loopback for tests: what it answers is a script."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

KEY = "sk-test-5ecret"
Handler = http.server.BaseHTTPRequestHandler
Script = Callable[["Answer"], None]


class Answer:
    """One request, and the means to answer it."""

    def __init__(self, handler: Handler, body: dict[str, Any], over: threading.Event) -> None:
        self.handler, self.body, self.over = handler, body, over

    def head(self, status: int = 200, media: str = "text/event-stream", **headers: str) -> None:
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", media)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()

    def raw(self, data: bytes) -> None:
        self.handler.wfile.write(data)

    def text(self, text: str, reason: str | None = None) -> None:
        event = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
        self.raw(b"data: " + json.dumps(event).encode() + b"\n\n")

    def done(self) -> None:
        self.raw(b"data: [DONE]\n\n")

    def stall(self) -> None:
        """Say nothing until the test is over."""
        self.over.wait(30)


class Endpoint:
    """The server's address and what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []  # path, headers, body
        self.over = threading.Event()
        self.address = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.requests]


@contextlib.contextmanager
def serving(script: Script, wrap: Callable[[Any], Any] | None = None) -> Iterator[Endpoint]:
    """A running endpoint. `wrap`: makes a TLS socket of the listening one."""
    endpoint = Endpoint(script)

    class Asked(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.requests.append((self.path, dict(self.headers), body))
            with contextlib.suppress(OSError):  # the other side hung up
                endpoint.script(Answer(self, body, endpoint.over))

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = False  # so that the end waits for them

        def handle_error(self, *arguments: Any) -> None:
            pass  # a handshake that the other side refused

    server = Server(("127.0.0.1", 0), Asked)
    if wrap is not None:
        server.socket = wrap(server.socket)
    endpoint.address = f"{'https' if wrap else 'http'}://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def saying(*pieces: str, reason: str | None = "stop") -> Script:
    """A script that says these pieces."""

    def script(answer: Answer) -> None:
        answer.head()
        for piece in pieces:
            answer.text(piece)
        answer.text("", reason)
        answer.done()

    return script


def key_file(folder: Path, mode: int = 0o600, key: str = KEY) -> Path:
    path = folder / "cloud.key"
    path.write_text(f"{key}\n")
    path.chmod(mode)
    return path


def settings(endpoint: str, key: Path | None = None, models: Sequence[str] = ("smol",), **more: Any) -> Any:
    """`[plugin.cloud]` for an endpoint that knows each model by its upper-case name."""
    chosen = {"endpoint": endpoint, "models": {name: name.upper() for name in models}}
    return {**chosen, "key_file": str(key or ""), "ttft": "50ms", "tpot": "2ms", "timeout": "20s", **more}
