"""Each command that asks a daemon: what it asks, its --json document, what a person sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edged.errors import EngineError, NoDaemonError, PeerError, TrustError
from edged.identity import fingerprint_of

FINGERPRINT = fingerprint_of("a" * 52)
STATUS = {
    "node_id": "a" * 52,
    "name": "laptop",
    "version": "0.1.0",
    "protocol": 1,
    "state": "online",
    "uptime_s": 7300.0,
    "plugins": ["mdns", "shard"],
    "conditions": [{"code": "x", "severity": "warning", "text": "it is hot", "remedy": "open a window"}],
    "memory": {"total": 8 << 30, "free": 2 << 30},
    "battery": None,
    "rss_bytes": 40 << 20,
}
SEEN = {
    "node_id": None,
    "name": None,
    "fingerprint": "f" * 32,
    "state": "seen",
    "address": "127.0.0.1",
    "rtt_ms": None,
    "bandwidth_bytes_s": None,
    "battery": None,
    "profile": None,
    "trusted": False,
    "rights": [],
    "zone": None,
}
PEER = SEEN | {
    "node_id": "b" * 52,
    "name": "phone\x1b[2J",
    "state": "online",
    "rtt_ms": 1.25,
    "trusted": True,
    "rights": ["submit", "serve"],
    "zone": "own",
}
DATA = {"name": "notes", "rows": 1200, "bytes": 3 << 20, "sha256": "ab" * 32}
ADAPTER = {
    "name": "mail",
    "base_sha256": "0" * 64,
    "base_name": "smol",
    "r": 8,
    "alpha": 16,
    "kind": "lora",
    "scope": "personal",
    "bytes": 1 << 20,
    "created_at": "2026-01-01T00:00:00Z",
    "provenance": {"steps": 100},
}
FEDERATED = ADAPTER | {
    "stem": "mail",
    "version": 3,
    "provenance": {
        "job_id": "0123456789abcdef",
        "kind": "federated",
        "steps": 4,
        "epsilon": 2.5,
        "delta": 1e-5,
        "method": "flora",
        "rounds": 4,
        "members": [{"node": "p", "name": "pi", "rounds": 4}, {"node": "t", "name": "tab", "rounds": 3}],
    },
}
MODEL = {
    "name": "smollm2-135m-instruct-q4_1",
    "sha256": "0" * 64,
    "architecture": "llama",
    "parameters": 134515008,
    "bytes": 98 << 20,
    "layers": 30,
    "weight_type": "Q4_1",
    "complete": True,
}
JOB = {
    "job_id": "j1",
    "kind": "generate",
    "state": "done",
    "created_at": "2026-01-01T00:00:00Z",
    "epoch": 1,
    "progress": 1.0,
    "error": None,
}
WAITS = {"until": "2026-01-01T14:00:00Z", "because": "it is clean then"}
ROLE = {"node": "a" * 52, "name": "laptop", "layers": [0, 30], "share": 0.5, "heads": [0, 4]}
PLAN = {
    "chosen": 0,
    "candidates": [
        {
            "strategy": "tensor",
            "roles": [ROLE],
            "predicted": {
                "ttft_ms": 12.5,
                "tpot_ms": None,
                "joules_per_token": None,
                "bytes_per_token": 4096,
            },
            "memory_bytes": {"a" * 52: 1 << 20},
            "refused_because": None,
        },
        {
            "strategy": "layers",
            "roles": [],
            "predicted": {},
            "memory_bytes": {},
            "refused_because": "too large",
        },
    ],
}
PROFILE = {
    "name": "laptop-cpu",
    "cpu": {"name": "Some CPU", "count": 8},
    "memory": {"total": 8 << 30, "free": 4 << 30, "budget": 3 << 30},
    "battery": None,
    "power": None,
    "thermal": None,
    "engines": [
        {
            "name": "shard",
            "weight_type": "Q4_1",
            "decode_bytes_s": 2e10,
            "prefill_flops_s": 1e11,
            "sustained": 0.62,
        }
    ],
    "links": [{"node_id": "b" * 52, "rtt_ms": 1.0, "bandwidth_bytes_s": 1e8, "all_reduce_ms": 0.7}],
}
PLAN_BODY = {
    "model": "m",
    "strategy": "auto",
    "policy": None,
    "nodes": None,
    "shares": None,
    "adapter": None,
    "private": False,
    "allow_guest": False,
    "explain": False,
}
ALL_RIGHTS = ["submit", "serve", "train"]

# command line, kind, body, document, words that a person sees on standard output
COMMANDS: list[tuple[list[str], str, dict[str, Any], dict[str, Any], list[str]]] = [
    (
        ["status"],
        "status",
        {},
        STATUS,
        ["laptop", "aaaaaaaa", FINGERPRINT, "2.03 h", "2 GiB free", "open a window"],
    ),
    (["peers"], "peers", {}, {"peers": [PEER, SEEN]}, ["phone", "bbbbbbbb", "seen", "1.25 ms", "ffffffff"]),
    (["peers"], "peers", {}, {"peers": []}, ["edged invite"]),
    (
        ["invite"],
        "invite",
        {"ttl_s": 600.0, "rights": ALL_RIGHTS, "zone": "own"},
        {"token": "edged1-abc", "expires_at": "2026-01-01T00:00:00Z"},
        ["edged1-abc"],
    ),
    (
        ["invite", "--ttl", "2h", "--rights", "serve,submit", "--zone", "guest"],
        "invite",
        {"ttl_s": 7200.0, "rights": ["submit", "serve"], "zone": "guest"},
        {"token": "t", "expires_at": "2026-01-01T00:00:00Z"},
        ["t"],
    ),
    (
        ["join", "edged1-abc"],
        "join",
        {"token": "edged1-abc"},
        {"node_id": "b" * 52, "name": "phone"},
        ["phone"],
    ),
    (
        ["trust", "phone", "--rights", "none", "--zone", "guest"],
        "trust",
        {"node": "phone", "rights": [], "zone": "guest"},
        {"node_id": "b" * 52, "rights": [], "zone": "guest"},
        ["rights none", "guest"],
    ),
    (
        ["trust", "phone"],
        "trust",
        {"node": "phone", "rights": None, "zone": None},
        {"node_id": "b" * 52, "rights": ["serve"], "zone": "own"},
        ["rights serve"],
    ),
    (["forget", "phone"], "forget", {"node": "phone"}, {"node_id": "b" * 52}, ["b" * 52]),
    (["drain"], "drain", {}, {"handed_over": []}, ["drained"]),
    (
        ["plugins"],
        "plugins",
        {},
        {
            "plugins": [
                {"name": "mdns", "version": "1", "state": "loaded", "hooks": ["h"], "calls": 3, "failures": 0}
            ]
        },
        ["mdns", "loaded", "3"],
    ),
    (
        ["profile"],
        "profile",
        {"measure": False},
        PROFILE,
        ["Some CPU", "4 GiB free of 8 GiB, 3 GiB for edged", "18.63 GiB/s", "62 %", "bbbbbbbb", "0.7 ms"],
    ),
    (["profile", "--measure"], "profile", {"measure": True}, PROFILE | {"engines": []}, ["--measure"]),
    (["models", "ls"], "models.ls", {}, {"models": [MODEL]}, ["smollm2", "134.5 M", "98 MiB", "yes"]),
    (["models", "ls"], "models.ls", {}, {"models": []}, ["edged models add"]),
    (["models", "rm", "m"], "models.rm", {"name": "m"}, {"models": [MODEL]}, ["smollm2"]),
    (["data", "ls"], "data.ls", {}, {"data": [DATA]}, ["notes", "1200", "3 MiB", "abababababab"]),
    (["data", "ls"], "data.ls", {}, {"data": []}, ["edged data add NAME FILE"]),
    (["data", "rm", "notes"], "data.rm", {"name": "notes"}, {"data": [DATA]}, ["notes"]),
    (["adapters", "ls"], "adapters.ls", {}, {"adapters": [ADAPTER]}, ["mail", "smol", "16", "1 MiB"]),
    (["adapters", "ls"], "adapters.ls", {}, {"adapters": []}, ["edged finetune"]),
    (
        ["adapters", "ls"],
        "adapters.ls",
        {},
        {"adapters": [FEDERATED]},
        ["flora, 4 rounds of 2 members", "2.5"],
    ),
    (
        ["adapters", "show", "mail"],
        "adapters.ls",
        {},
        {"adapters": [FEDERATED]},
        [
            "3 of mail",
            "0" * 64,
            "pi (4 rounds), tab (3 rounds)",
            "epsilon 2.5 at delta 1e-05",
            "0123456789abcdef",
        ],
    ),
    (["adapters", "show", "mail"], "adapters.ls", {}, {"adapters": [ADAPTER]}, ["1 of mail", "not counted"]),
    (["adapters", "rm", "mail"], "adapters.rm", {"name": "mail"}, {"adapters": [ADAPTER]}, ["mail"]),
    (["models", "pull", "m"], "models.pull", {"name": "m"}, {"models": [MODEL]}, ["smollm2"]),
    (["plan", "--model", "m"], "plan", PLAN_BODY, PLAN, ["tensor", "laptop 0-30 50%", "12.5", "1 MiB"]),
    (
        ["plan", "--model", "m", "--nodes", "a,b", "--shares", "2:1", "--explain", "--private"],
        "plan",
        PLAN_BODY | {"nodes": ["a", "b"], "shares": [2.0, 1.0], "explain": True, "private": True},
        PLAN,
        ["too large"],
    ),
    (["jobs"], "jobs", {}, {"jobs": [JOB]}, ["j1", "done", "100%"]),
    (
        ["jobs"],
        "jobs",
        {},
        {"jobs": [JOB | {"state": "queued", "waits": WAITS}]},
        ["queued", "14:00", "clean"],
    ),
    (["jobs", "j1"], "jobs.show", {"job": "j1", "follow": False}, {"jobs": [JOB | {"text": "Hi"}]}, ["Hi"]),
    (["jobs", "rm", "j1"], "jobs.rm", {"job": "j1"}, {"job_id": "j1"}, ["deleted j1"]),
    (["cancel", "j1"], "cancel", {"job": "j1"}, {"job_id": "j1", "state": "cancelled"}, ["cancelled j1"]),
]
IDS = [" ".join(row[0]) for row in COMMANDS]


@pytest.mark.parametrize(("line", "kind", "body", "document", "words"), COMMANDS, ids=IDS)
def test_json_is_the_daemons_document_and_nothing_else(
    line: list[str], kind: str, body: Any, document: Any, words: list[str], home: Any, daemon: Any, edged: Any
) -> None:
    fake = daemon({kind: document})
    result = edged(*line, "--home", home.path, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.document == document
    assert fake.requests == [(kind, body)]


@pytest.mark.parametrize(("line", "kind", "body", "document", "words"), COMMANDS, ids=IDS)
def test_a_person_sees_the_same_facts(
    line: list[str], kind: str, body: Any, document: Any, words: list[str], home: Any, daemon: Any, edged: Any
) -> None:
    daemon({kind: document})
    result = edged(*line, "--home", home.path)
    assert result.code == 0
    for word in words:
        assert word in result.out
    assert "\x1b" not in result.out  # no colours in a pipe, and no other node drives the terminal


@pytest.mark.parametrize(("line", "kind"), [(row[0], row[1]) for row in COMMANDS], ids=IDS)
def test_an_error_of_the_daemon_keeps_its_code_and_exit_code(
    line: list[str], kind: str, home: Any, daemon: Any, edged: Any
) -> None:
    def refuse(body: Any, emit: Any) -> Any:
        raise PeerError("expected phone to answer;\nnothing came", remedy="switch it on")

    daemon({kind: refuse})
    result = edged(*line, "--home", home.path, "--json")
    assert result.code == 6
    assert result.document == {
        "error": {
            "code": "peer-lost",
            "message": "expected phone to answer; nothing came",
            "remedy": "switch it on",
        }
    }
    assert result.err == "edged: expected phone to answer; nothing came; switch it on\n"


@pytest.mark.parametrize(("line", "kind"), [(row[0], row[1]) for row in COMMANDS], ids=IDS)
def test_without_a_daemon_the_error_says_how_to_start_one(
    line: list[str], kind: str, home: Any, edged: Any
) -> None:
    result = edged(*line, "--home", home.path, "--json")
    assert result.code == NoDaemonError.exit_code == 7
    assert result.document["error"]["code"] == "no-daemon"
    assert f"edged run --home {home.path}" in result.document["error"]["remedy"]


def test_the_class_of_an_error_decides_the_exit_code(home: Any, daemon: Any, edged: Any) -> None:
    def refuse(body: Any, emit: Any) -> Any:
        raise TrustError("expected a token that is unused")

    daemon({"join": refuse})
    assert edged("join", "t", "--home", home.path).code == 5


def test_a_token_is_read_from_standard_input(
    home: Any, daemon: Any, edged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = daemon({"join": {"node_id": "b" * 52, "name": "phone"}})
    (tmp_path / "token").write_text("edged1-abc\n")
    with (tmp_path / "token").open() as token:
        monkeypatch.setattr("sys.stdin", token)
        assert edged("join", "-", "--home", home.path).code == 0
    assert fake.requests == [("join", {"token": "edged1-abc"})]


def test_a_model_file_travels_as_an_open_file(home: Any, daemon: Any, edged: Any, tmp_path: Path) -> None:
    def add(body: Any, emit: Any) -> Any:
        emit({"event": "progress", "bytes": 1, "total": 2})
        return {"models": [MODEL]}

    fake = daemon({"models.add": add})
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF and more")
    result = edged("models", "add", file, "--home", home.path, "--json")
    assert result.document == {"models": [MODEL]}
    assert fake.requests == [("models.add", {"name": "smollm2-135m-instruct-q4_1"})]
    assert fake.files == [b"GGUF and more"]


def test_a_folder_with_a_model_travels_as_the_one_file_it_is_packed_into(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    numpy = pytest.importorskip("numpy", reason="writes the model")
    safetensors = pytest.importorskip("safetensors.numpy", reason="writes the model")
    fake = daemon({"models.add": {"models": [MODEL]}})
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    line = ("models", "add", folder, "--home", home.path, "--json")
    assert "config.json" in edged(*line).err  # says what a folder must hold
    assert fake.requests == []
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    name = "model.embed_tokens.weight"
    safetensors.save_file({name: numpy.ones((2, 2), "float32")}, folder / "model.safetensors")
    assert edged(*line).document == {"models": [MODEL]}
    assert fake.requests == [("models.add", {"name": "tiny-llama"})]
    assert name.encode() in fake.files[0]
    assert b"tokenizer" in fake.files[0]


def test_a_data_file_travels_as_an_open_file(home: Any, daemon: Any, edged: Any, tmp_path: Path) -> None:
    fake = daemon({"data.add": {"data": [DATA], "stored": "copied"}})
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}')
    result = edged("data", "add", "notes", file, "--home", home.path, "--json")
    assert result.document == {"data": [DATA], "stored": "copied"}
    assert fake.requests == [("data.add", {"name": "notes"})]
    assert fake.files == [b'{"text": "a"}']
    assert "expected a data set name" in edged("data", "add", "../x", file, "--home", home.path).err
    assert "readable data file" in edged("data", "add", "x", tmp_path / "no", "--home", home.path).err


def test_an_adapter_made_elsewhere_travels_as_two_open_files(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    fake = daemon({"adapters.add": {"adapters": [ADAPTER]}})
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    line = ("adapters", "add", "mail", tmp_path, "--model", "smol", "--home", home.path, "--json")
    assert "readable adapter file" in edged(*line).err
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    assert edged(*line).document == {"adapters": [ADAPTER]}
    assert fake.requests == [("adapters.add", {"name": "mail", "model": "smol"})]
    assert fake.files == [b"{}", b"tensors"]


@pytest.mark.parametrize("place", ["new", "empty"])
def test_an_export_becomes_the_folder_with_what_there_is(
    place: str, home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    rows = [{"name": name, "bytes": 2} for name in ("adapter_config.json", "adapter_model.safetensors")]
    daemon({"adapters.export": {"adapters": [ADAPTER], "files": rows}})
    folder = tmp_path / "out"
    if place == "empty":
        folder.mkdir()
    result = edged("adapters", "export", "mail", folder, "--home", home.path, "--json")
    assert result.document == {"adapters": [ADAPTER], "files": rows, "path": str(folder)}
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("place", ["file", "link", "full"])
def test_an_export_overwrites_nothing(place: str, home: Any, edged: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if place == "file":
        folder.write_text("mine")
    if place == "link":
        folder.symlink_to(tmp_path / "nowhere")
    if place == "full":
        folder.mkdir()
        (folder / "mine").touch()
    result = edged("adapters", "export", "mail", folder, "--home", home.path, "--json")
    assert result.document["error"]["code"] == "exists"
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_a_failed_export_leaves_no_folder(home: Any, daemon: Any, edged: Any, tmp_path: Path) -> None:
    def fail(body: Any, emit: Any) -> Any:
        raise EngineError("expected to write adapter.gguf; No space left on device")

    daemon({"adapters.export": fail})
    assert edged("adapters", "export", "mail", tmp_path / "out", "--home", home.path).code == 6
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    missing = edged("adapters", "export", "mail", tmp_path / "no" / "out", "--home", home.path)
    assert (missing.code, "No such file" in missing.err) == (2, True)


@pytest.mark.parametrize("place", ["file/out", "n" * 250, "n" * 300], ids=["in a file", "long", "too long"])
@pytest.mark.parametrize("command", ["export", "write"])
def test_a_place_that_cannot_be_written_to_is_said_as_it_is(
    command: str, place: str, home: Any, edged: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    before = sorted(os.listdir(tmp_path))
    where = (tmp_path / place,) if command == "export" else ("--out", tmp_path / place)
    result = edged("adapters", command, "mail", *where, "--home", home.path, "--json")
    assert result.document["error"]["code"] == "config"
    assert "to write to" in result.document["error"]["message"]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_model_file_is_refused_before_a_daemon_is_asked(
    kind: str, tmp_path: Path, edged: Any, home: Any
) -> None:
    path = tmp_path / "m.gguf"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    result = edged("models", "add", path, "--home", home.path, "--json")
    assert result.code == 2
    assert result.document["error"]["code"] == "config"


def test_an_adapter_that_is_not_there_is_told_with_those_that_are(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"adapters.ls": {"adapters": [ADAPTER]}})
    result = edged("adapters", "show", "male", "--home", home.path)
    assert result.code == 2
    assert "no adapter 'male'; stored: mail" in result.err


def test_of_an_adapter_from_elsewhere_no_privacy_is_claimed(home: Any, daemon: Any, edged: Any) -> None:
    daemon({"adapters.ls": {"adapters": [ADAPTER | {"provenance": {"added": True}}]}})
    result = edged("adapters", "show", "mail", "--home", home.path)
    assert "added" in result.out
    assert "privacy" not in result.out


SEEDS = ADAPTER | {"name": "whole", "kind": "seeds"}


def test_a_model_of_seeds_becomes_a_new_file(home: Any, daemon: Any, edged: Any, tmp_path: Path) -> None:
    model = {"type": "f16", "tensors": 3, "bytes": 12}
    fake = daemon({"adapters.write": {"adapters": [SEEDS], "model": model}})
    out = tmp_path / "whole.gguf"
    line = ("adapters", "write", "whole", "--out", out, "--type", "f16", "--home", home.path, "--json")
    assert edged(*line).document == {"adapters": [SEEDS], "model": model, "path": str(out)}
    assert fake.requests == [("adapters.write", {"name": "whole", "type": "f16"})]
    assert out.is_file()
    again = edged(*line)
    assert again.document["error"]["code"] == "exists"
    assert list(tmp_path.glob(".whole*")) == []


def test_a_model_that_could_not_be_written_leaves_no_file(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    def fail(body: Any, emit: Any) -> Any:
        raise EngineError("expected to write the model; No space left on device")

    daemon({"adapters.write": fail})
    out = tmp_path / "whole.gguf"
    assert edged("adapters", "write", "whole", "--out", out, "--home", home.path).code == 6
    assert [path.name for path in tmp_path.iterdir() if "whole" in path.name] == []
