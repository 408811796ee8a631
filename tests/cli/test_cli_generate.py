"""`edged generate`, `edged jobs --follow` and `edged chat`: streams, their ends, and Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_daemon import FakeDaemon, HangUp

from edged.cli.generating import REQUEST
from edged.errors import EngineError, JobError
from edged.requests import GenerateRequest, check_generate, read

DOCUMENT = {
    "job_id": "j1",
    "text": "Hello there",
    "tokens": [1, 2],
    "finish_reason": "length",
    "plan": {
        "strategy": "tensor",
        "epoch": 1,
        "roles": [{"node": "a" * 52, "name": "laptop"}],
        "predicted": {},
    },
    "measured": {"ttft_ms": 12.5, "tokens_per_s": 3.5, "joules": None, "recoveries": []},
}
TOKENS = [
    {"event": "token", "index": 0, "tokens": [1], "text": "Hello"},
    {"event": "token", "index": 1, "tokens": [2], "text": " there"},
]
ACCEPTED = {"event": "accepted", "job_id": "j1"}
PROGRESS = {"event": "progress", "text": "loading"}


def answer(body: dict[str, Any], emit: Any) -> dict[str, Any]:
    for event in (ACCEPTED, PROGRESS, *TOKENS):
        emit(event)
    return DOCUMENT


LINE = ("generate", "--model", "m", "--prompt", "Say hello")


def test_the_text_streams_to_standard_output_alone(home: Any, daemon: Any, edged: Any) -> None:
    fake = daemon({"generate": answer})
    result = edged(*LINE, "--home", home.path)
    assert (result.code, result.out) == (0, "Hello there\n")
    assert result.err == "[tensor over laptop; 2 tokens; 3.5 tokens/s; 12.5 ms to the first]\n"
    assert fake.requests == [("generate", REQUEST | {"model": "m", "prompt": "Say hello"})]


def test_json_is_the_one_document(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"generate": answer})
    result = edged(*LINE, "--home", home.path, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.document == DOCUMENT


def test_jsonl_is_every_event_and_the_document_last(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"generate": answer})
    result = edged(*LINE, "--home", home.path, "--jsonl")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert lines == [ACCEPTED, PROGRESS, *TOKENS, {"event": "finished"} | DOCUMENT]


def test_every_option_reaches_the_daemon_in_a_form_that_it_reads(home: Any, daemon: Any, edged: Any) -> None:
    fake = daemon({"generate": answer})
    options = (
        "-n 7 --temperature 0 --top-k 5 --top-p 0.5 --seed 3 --strategy layers --policy latency --nodes a,b "
        "--shares 2:1 --raw --ignore-eos --numerics exact --recovery fast --private --allow-guest --strict "
        "--deferrable 6h"
    )
    assert edged(*LINE, *options.split(), "--home", home.path, "--json").code == 0
    [(_, body)] = fake.requests
    request = check_generate(read(GenerateRequest, body), needs_prompt=True)
    assert (request.n, request.temperature, request.top_k, request.top_p, request.seed) == (7, 0, 5, 0.5, 3)
    assert (request.strategy, request.nodes, request.shares) == ("layers", ["a", "b"], [2.0, 1.0])
    assert (request.raw, request.ignore_eos, request.private, request.strict) == (True, True, True, True)
    assert (request.numerics, request.allow_guest, request.detach) == ("exact", True, False)
    assert request.deferrable_s == 21600


def test_an_adapter_is_asked_for_and_the_daemon_decides(home: Any, daemon: Any, edged: Any) -> None:
    fake = daemon({"generate": answer})
    edged(*LINE, "--adapter", "mine", "--recovery", "exact", "--home", home.path)
    [(_, body)] = fake.requests
    assert (body["adapter"], body["recovery"]) == ("mine", "exact")


def test_the_body_is_what_the_daemon_knows() -> None:
    assert set(REQUEST) == set(GenerateRequest.__dataclass_fields__) - {"explain"}


def test_a_prompt_is_read_from_standard_input(
    home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = daemon({"generate": answer})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode()), "ascii"))
    assert edged("generate", "--model", "m", "--prompt", "-", "--home", home.path).code == 0
    assert fake.requests[0][1]["prompt"] == "Grüße\n"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"x" * ((2 << 20) + 1)], ids=["binary", "empty", "long"]
)
def test_a_prompt_that_cannot_be_one_is_refused_and_not_repeated(
    content: bytes, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    result = edged("generate", "--model", "m", "--prompt", "-", "--json")
    assert result.code == 2
    assert len(result.err) < 200


def test_detach_answers_with_the_job_at_once(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"generate": {"job_id": "j1"}})
    assert edged(*LINE, "--detach", "--home", home.path).out == "j1\n"
    assert edged(*LINE, "--detach", "--home", home.path, "--json").document == {"job_id": "j1"}


def test_text_that_was_made_again_is_not_shown_twice(home: Any, daemon: Any, edged: Any) -> None:
    def recovered(body: Any, emit: Any) -> Any:
        emit(TOKENS[0])
        emit({"event": "plan", "strategy": "local", "epoch": 2, "roles": [{"node": "a" * 52, "name": "pi"}]})
        emit(TOKENS[0])
        emit(TOKENS[1])
        return DOCUMENT

    daemon({"generate": recovered})
    result = edged(*LINE, "--home", home.path)
    assert result.out == "Hello\n there\n"
    assert "goes on: local over pi" in result.err


def test_control_characters_of_a_model_do_not_reach_the_terminal(home: Any, daemon: Any, edged: Any) -> None:
    def hostile(body: Any, emit: Any) -> Any:
        emit({"event": "token", "index": 0, "tokens": [1], "text": "a\x1b]0;owned\x07\tb\n"})
        return DOCUMENT

    daemon({"generate": hostile})
    assert edged(*LINE, "--home", home.path).out == "a�]0;owned�\tb\n"


def test_a_failed_job_is_exit_6_with_its_code(home: Any, daemon: Any, edged: Any) -> None:
    def failing(body: Any, emit: Any) -> Any:
        emit(TOKENS[0])
        raise EngineError("expected 4 GiB; 1 GiB is free", remedy="use more nodes")

    daemon({"generate": failing})
    result = edged(*LINE, "--home", home.path)
    assert (result.code, result.out) == (6, "Hello\n")
    assert result.err == "edged: expected 4 GiB; 1 GiB is free; use more nodes\n"
    assert edged(*LINE, "--home", home.path, "--json").document["error"]["code"] == "engine"


def test_a_job_that_was_cancelled_elsewhere_is_exit_6_with_what_there_is(
    home: Any, daemon: Any, edged: Any
) -> None:
    daemon({"generate": DOCUMENT | {"finish_reason": "cancelled"}})
    result = edged(*LINE, "--home", home.path, "--json")
    assert result.code == 6
    assert result.document["text"] == "Hello there"
    assert result.document["error"]["code"] == "cancelled"
    assert result.err == "edged: the job was cancelled\n"


def test_a_daemon_that_dies_ends_the_stream_with_exit_7(home: Any, daemon: Any, edged: Any) -> None:
    """The job goes on when it is back, and the error says how to see it."""

    def die(body: Any, emit: Any) -> Any:
        emit({"event": "accepted", "job_id": "j1"})
        emit(TOKENS[0])
        raise HangUp

    daemon({"generate": die})
    result = edged(*LINE, "--home", home.path, "--json")
    assert result.code == 7
    assert result.document["error"]["code"] == "daemon-gone"
    assert result.document["error"]["remedy"].endswith("the job goes on then: edged jobs j1 --follow")


def test_following_a_job_ends_in_its_document(home: Any, daemon: Any, edged: Any) -> None:
    fake = daemon({"jobs.show": answer})
    assert edged("jobs", "j1", "--follow", "--home", home.path, "--json").document == DOCUMENT
    assert edged("jobs", "j1", "--follow", "--home", home.path).out == "Hello there\n"
    lines = edged("jobs", "j1", "--follow", "--jsonl", "--home", home.path).out.splitlines()
    assert json.loads(lines[-1])["event"] == "finished"
    assert fake.requests == [("jobs.show", {"job": "j1", "follow": True})] * 3


# --- Ctrl-C, in a real process ----------------------------------------------------------------------


class Job:
    """A fake daemon's job that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()
        self.answers = {"generate": self.generate, "cancel": self.cancel}

    def generate(self, body: dict[str, Any], emit: Any) -> dict[str, Any]:
        emit(ACCEPTED)
        emit(TOKENS[0])
        assert self.is_cancelled.wait(60)
        raise JobError("the job was cancelled", code="cancelled")

    def cancel(self, body: dict[str, Any], emit: Any) -> dict[str, Any]:
        self.is_cancelled.set()
        return {"job_id": body["job"], "state": "cancelled"}


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job()
    yield made
    made.is_cancelled.set()


@pytest.fixture
def start(home: Any) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """`edged generate --jsonl` in a process of its own, once its first event has come."""
    started: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edged.cli", *LINE, "--home", str(home.path), "--jsonl"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_control_c_cancels_the_job_and_waits_for_its_end(daemon: Any, job: Job, start: Any) -> None:
    fake: FakeDaemon = daemon(job.answers)
    process = start()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 6
    assert fake.wait_for("cancel") == {"job": "j1"}
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "cancelled"
    assert err == "edged: the job was cancelled\n"


def test_a_second_control_c_leaves_at_once(daemon: Any, job: Job, start: Any) -> None:
    asked, release = threading.Event(), threading.Event()

    def never(body: Any, emit: Any) -> Any:
        asked.set()
        assert release.wait(60)
        return {}

    daemon(job.answers | {"cancel": never})
    process = start()
    process.send_signal(signal.SIGINT)
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=30)
    finally:
        release.set()
    assert process.returncode == 6


def test_control_c_before_acceptance_cancels_as_soon_as_there_is_a_job(
    daemon: Any, job: Job, start: Any
) -> None:
    go_on = threading.Event()

    def late(body: Any, emit: Any) -> Any:
        emit(PROGRESS)
        assert go_on.wait(60)
        return job.generate(body, emit)

    fake: FakeDaemon = daemon(job.answers | {"generate": late})
    process = start()
    process.send_signal(signal.SIGINT)
    go_on.set()
    process.communicate(timeout=60)
    assert process.returncode == 6
    assert fake.wait_for("cancel") == {"job": "j1"}


# --- chat -------------------------------------------------------------------------------------------

MODELS = {"models": [{"name": "only", "complete": True}, {"name": "half", "complete": False}]}


def chat(edged: Any, monkeypatch: pytest.MonkeyPatch, said: str, *more: object) -> Any:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return edged("chat", *more)


def test_a_chat_sends_its_history(
    home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = daemon({"generate": answer, "models.ls": MODELS})
    result = chat(edged, monkeypatch, "Hi\n\nAnd now?\n", "--system", "Be brief.", "--home", home.path)
    assert (result.code, result.out) == (0, "Hello there\nHello there\n")
    _, first, second = (body for _, body in fake.requests)
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert first["messages"] == [system, hi]
    assert first["model"] == "only"
    hello = {"role": "assistant", "content": "Hello there"}
    assert second["messages"] == [system, hi, hello, {"role": "user", "content": "And now?"}]
    check_generate(read(GenerateRequest, second), needs_prompt=True)


def test_a_chat_is_one_document_with_json(
    home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon({"generate": answer})
    result = chat(edged, monkeypatch, "Hi\n", "--model", "m", "--home", home.path, "--json")
    assert [message["role"] for message in result.document["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("models", [[], [{"name": "a", "complete": True}, {"name": "b", "complete": True}]])
def test_a_chat_asks_which_model_where_there_is_not_one(
    models: Any, home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon({"models.ls": {"models": models}})
    assert chat(edged, monkeypatch, "Hi\n", "--home", home.path).code == 2


def test_a_chat_in_a_script_ends_with_a_failed_job(
    home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(body: Any, emit: Any) -> Any:
        raise EngineError("expected memory")

    daemon({"generate": failing})
    assert chat(edged, monkeypatch, "Hi\nHo\n", "--model", "m", "--home", home.path).code == 6
