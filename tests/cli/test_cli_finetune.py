"""`edged finetune`: what is read and refused before the daemon is asked, and what it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

JOB = 'model = "smol"\nsteps = 2\n'
DONE = {
    "job_id": "j1",
    "adapter": "a",
    "steps": 2,
    "loss": [2.0, 1.0],
    "eval_loss": [2.5, 2.0],
    "bytes_sent": 7,
}


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("model = ", (), "expected readable TOML at .*job.toml"),
        (JOB, ("--plot", "loss.pdf"), r"a plot file that ends in .png or .svg, .*'loss.pdf' came"),
        (JOB, ("--plot", "loss.png", "--detach"), "--detach came, too"),
        (JOB, ("--plot", "no/loss.png"), "expected a folder for the plot"),
        (JOB + '[[clients]]\ndata = "no.jsonl"\n', (), "expected a readable data file at .*no.jsonl"),
    ],
    ids=["no TOML", "another picture", "detached", "no folder", "no rows"],
)
def test_what_is_wrong_on_this_side_is_said_before_anything_is_asked(
    home: Any, daemon: Any, edged: Any, tmp_path: Path, monkeypatch: Any, text: str, more: Any, says: str
) -> None:
    fake = daemon({"finetune": DONE})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(text)
    result = edged("finetune", "split", "job.toml", *more, "--home", home.path)
    assert result.code == 2
    assert re.search(says, result.err), result.err
    assert fake.requests == []


def test_rows_that_a_job_names_by_path_travel_as_open_files(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    """Beside the job's file, wherever the command is run; the adapter's name is one that can be stored."""
    fake = daemon({"finetune": DONE})
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "a"}\n')
    job = tmp_path / "übung 1.toml"
    job.write_text(JOB + '[[clients]]\nnode = "pi"\ndata = "notes"\n[[clients]]\ndata = "mine.jsonl"\n')
    result = edged("finetune", "split", job, "--home", home.path, "--json")
    assert result.document == DONE
    [(kind, asked)] = fake.requests
    assert (kind, asked["kind"], asked["name"], asked["file_clients"]) == ("finetune", "split", "bung-1", [1])
    assert fake.files == [b'{"text": "a"}\n']


def test_the_data_of_a_job_on_one_node_may_be_a_path_too(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    fake = daemon({"finetune": DONE})
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n')
    job = tmp_path / "job.toml"
    job.write_text(JOB + 'data = "rows.jsonl"\n')
    assert edged("finetune", "local", job, "--home", home.path, "--json").document == DONE
    [(_, asked)] = fake.requests
    assert asked["settings"] == {"model": "smol", "steps": 2, "clients": [{"data": "rows.jsonl"}]}
    assert fake.files == [b'{"text": "a"}\n']


def test_a_person_sees_the_plan_the_evaluations_and_the_end(
    home: Any, daemon: Any, edged: Any, tmp_path: Path
) -> None:
    def train(body: Any, emit: Any) -> Any:
        role = {"name": "pi", "layers": [0, 3], "memory_bytes": 1 << 20}
        plan = {"roles": [role], "predicted": {"bytes_sent": 7, "seconds": 65.0}}
        emit({"event": "accepted", "job_id": "j1"})
        emit({"event": "planned", "plan": plan, "step": 0, "steps": 2})
        emit({"event": "eval", "step": 0, "loss": 2.5})
        step = {"event": "step", "steps": 2, "seconds": 2.0, "tokens": 64.0, "bytes_sent": 7, "joules": 3.0}
        emit(step | {"step": 0, "loss": 2.0})
        emit({"event": "interrupted", "at_step": 1, "reason": "node pi was lost"})
        emit({"event": "waiting", "until": None, "because": "it needs pi"})
        emit(step | {"step": 1, "loss": 1.0})
        return DONE

    daemon({"finetune": train})
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    told = edged("finetune", "split", job, "--home", home.path).err
    for text in (
        "pi blocks 0-3 (1 MiB), 7 B to send, about 1:05",
        "step 0: held-out loss 2.5000",
        "1/2 loss 2.0000 32 tok/s 7 B 3 J 0:02 left",
        "interrupted at step 1: node pi was lost",
        "waits: it needs pi",
        "held-out loss 2.5000 to 2.0000",
        "adapter a; 2 steps",
    ):
        assert text in told


def test_a_person_sees_what_was_sent_by_kind(home: Any, daemon: Any, edged: Any, tmp_path: Path) -> None:
    ids = {name: name[0] * 64 for name in ("pi", "xavier", "tab", "mac", "desk")}
    plan = {"roles": [{"node": node_id, "name": name} for name, node_id in ids.items()]}
    down = [
        {"from": ids["desk"], "to": ids[name], "kind": "down", "messages": 2, "bytes": 1 << 20}
        for name in ("pi", "xavier", "tab", "mac")
    ]
    up = {"from": ids["pi"], "to": ids["desk"], "kind": "up", "messages": 1, "bytes": 3 << 20}
    tls = {"from": ids["pi"], "to": ids["desk"], "kind": "tls", "messages": 0, "bytes": 900}
    back = {"from": ids["desk"], "to": ids["pi"], "kind": "tls", "messages": 0, "bytes": 100}
    done = DONE | {"plan": plan, "egress": [tls, back, *down, up]}
    daemon({"finetune": done, "jobs.show": {"jobs": [{"job_id": "j1", "result": done}]}})
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    told = edged("finetune", "federated", job, "--home", home.path).err
    lines = [line for line in told.splitlines() if line.startswith("sent ")]
    assert lines == [
        "sent down: 4 MiB in 8 messages, desk to 4 nodes",
        "sent up: 3 MiB in 1 message, pi to desk",
        "sent tls: 1000 B, among desk, pi",
    ]
    shown = edged("jobs", "j1", "--home", home.path).out
    assert all(line in shown for line in lines)
