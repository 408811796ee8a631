"""Nodes and workers that are killed, stopped or set up wrongly: what the others say, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support import (
    GUARD_S,
    WORK,
    Node,
    Nodes,
    all_online,
    pair_all,
    wait_no_workers,
    wait_online,
    wait_until,
)

LOSS_S = 50.0  # ten times the 5 s within which a loss is noticed
NAMES = ("laptop", "jetson", "phone")
LONG = {"model": "smol", "prompt": "Hi", "n": 1500, "temperature": 0.0, "ignore_eos": True, "strict": True}


@pytest.fixture(scope="module")
def trio(shared_nodes: Nodes, smol: Path) -> list[Node]:
    nodes = shared_nodes.group(*NAMES, plugins=WORK, jobs={"worker_idle": "1s"})
    nodes[0].add(smol, "smol")
    return nodes


# --- workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "names", "victim"),
    [
        ("layers", ("laptop", "jetson", "phone"), "jetson"),
        ("layers", ("jetson", "laptop"), "jetson"),
        ("layers", ("laptop", "jetson"), "laptop"),
        ("layers", ("jetson", "laptop"), "laptop"),
        ("tensor", ("laptop", "jetson", "phone"), "phone"),
        ("tensor", ("jetson", "laptop"), "jetson"),
    ],
    ids=["follower", "rank 0", "own rank 0", "own follower", "tensor follower", "tensor rank 0"],
)
def test_a_killed_worker_ends_its_job_by_name(
    trio: list[Node], strategy: str, names: tuple[str, ...], victim: str
) -> None:
    all_online(trio)
    laptop = trio[0]
    lost = next(node for node in trio if node.name == victim)
    job = laptop.job(LONG | {"strategy": strategy, "nodes": list(names)}).until_token()
    (worker,) = lost.workers()
    worker.kill()
    error = job.error()
    assert error.exit_code == 6
    assert f"node {victim} was lost" in str(error)
    assert "\n" not in str(error)
    row = laptop.call("jobs.show", {"job": job.job_id})["jobs"][0]
    assert (row["state"], row["error"]["code"]) == ("failed", error.code)
    wait_no_workers(*trio)
    assert all(node.call("status")["roles"] == 0 for node in trio)


@pytest.mark.parametrize(
    ("what", "victim"), [("worker", "jetson"), ("worker", "laptop"), ("daemon", "jetson")]
)
def test_a_loss_while_the_model_loads_ends_the_job_by_name(trio: list[Node], what: str, victim: str) -> None:
    all_online(trio)
    laptop = trio[0]
    lost = next(node for node in trio if node.name == victim)
    job = laptop.job(LONG | {"strategy": "layers", "nodes": ["jetson", "laptop"], "n": 1400})
    wait_until("its worker to start", lambda: bool(lost.workers()))
    if what == "worker":
        lost.workers()[0].kill()
    else:
        lost.kill()
    error = job.error()
    assert error.exit_code == 6
    assert victim in str(error)
    wait_no_workers(*(node for node in trio if node.process is not None))
    all_online(trio)


# --- daemons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("laptop", "jetson"), ("jetson", "laptop")], ids=["follower", "rank 0"])
def test_a_killed_daemon_ends_its_jobs_by_name_and_takes_its_workers_along(
    trio: list[Node], names: tuple[str, ...]
) -> None:
    all_online(trio)
    laptop, jetson, phone = trio
    job = laptop.job(LONG | {"strategy": "layers", "nodes": list(names)}).until_token()
    workers = jetson.workers()
    assert workers
    jetson.kill()
    wait_until("its workers to be gone", lambda: not any(is_alive(worker) for worker in workers))
    error = job.error()
    assert error.exit_code == 6
    assert "node jetson was lost" in str(error)
    wait_until("it to be offline", lambda: not laptop.sees_online(jetson), LOSS_S)
    wait_no_workers(laptop, phone)
    all_online(trio)
    assert laptop.call("generate", LONG | {"n": 4, "strategy": "layers", "nodes": list(names)})["tokens"]


def test_a_killed_coordinator_leaves_no_worker_anywhere(trio: list[Node]) -> None:
    all_online(trio)
    laptop, jetson, phone = trio
    laptop.job(LONG | {"strategy": "layers", "nodes": ["jetson", "phone"]}).until_token()
    assert jetson.workers()
    assert phone.workers()
    laptop.kill()
    wait_no_workers(jetson, phone)
    all_online(trio)
    [job] = [row["job_id"] for row in laptop.call("jobs")["jobs"] if row["state"] in ("queued", "running")]
    laptop.call("cancel", {"job": job})  # it goes on
    wait_no_workers(*trio)


def test_a_node_that_leaves_in_order_ends_nobody_else_s_daemon(trio: list[Node]) -> None:
    """SIGTERM of a node that holds a role of another's job: that job ends and says whose fault it was."""
    all_online(trio)
    laptop, jetson, _ = trio
    job = laptop.job(LONG | {"strategy": "layers", "nodes": ["laptop", "jetson"]}).until_token()
    assert jetson.process is not None
    jetson.stop()
    error = job.error()
    assert "node jetson was lost" in str(error)
    wait_until("it to be offline", lambda: not laptop.sees_online(jetson), LOSS_S)
    all_online(trio)


def test_a_stopped_daemon_is_offline_and_comes_back(trio: list[Node]) -> None:
    all_online(trio)
    laptop, jetson, phone = trio
    job = laptop.job(LONG | {"strategy": "layers", "nodes": ["laptop", "jetson"]}).until_token()
    jetson.signal(signal.SIGSTOP)
    try:
        for node in (laptop, phone):
            wait_until("it to be offline", lambda n=node: not n.sees_online(jetson), LOSS_S)
        error = job.error()
        assert "node jetson was lost" in str(error)
        offline = laptop.error("generate", LONG | {"strategy": "remote", "nodes": ["jetson"]})
        assert offline.exit_code == 6
        assert "jetson is offline" in str(offline)
        assert laptop.call("generate", LONG | {"n": 4, "strategy": "local"})["tokens"]  # alone it goes on
    finally:
        jetson.signal(signal.SIGCONT)
    wait_online(trio)
    wait_no_workers(*trio)


@pytest.mark.parametrize("sleeper", ["jetson", "laptop"], ids=["worker's", "coordinator's"])
def test_a_node_that_slept_through_its_own_loss_holds_no_role(trio: list[Node], sleeper: str) -> None:
    """A lid closed for a moment: the others let go of it, and it hears so when it wakes."""
    all_online(trio)
    laptop, jetson, _ = trio
    asleep, awake = (laptop, jetson) if sleeper == "laptop" else (jetson, laptop)
    job = laptop.job(LONG | {"strategy": "layers", "nodes": ["laptop", "jetson"]}).until_token()
    asleep.signal(signal.SIGSTOP)
    try:
        wait_until("it to be offline", lambda: not awake.sees_online(asleep), LOSS_S)
    finally:
        asleep.signal(signal.SIGCONT)
    assert "node jetson was lost" in str(job.error())
    wait_online(trio)
    wait_no_workers(*trio)
    assert all(node.call("status")["roles"] == 0 for node in trio)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- homes that are wrong ---------------------------------------------------------------------------


def run(node: Node, **environment: str) -> subprocess.CompletedProcess[str]:
    """`edged run` that is expected to end by itself."""
    command = [sys.executable, "-m", "edged.cli", "run", "--home", str(node.home.path)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
        env={**os.environ, **environment},
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Its one line of error; what came before is the log."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("edged: ")]
    assert "Traceback" not in done.stderr
    return line


def test_a_second_daemon_on_a_busy_home_is_refused(start_node: Callable[..., Node]) -> None:
    node = start_node("laptop")
    assert node.process is not None
    done = run(node)
    assert done.returncode == 4
    assert str(node.process.pid) in said(done)
    assert node.call("status")["state"] == "online"


def test_a_dead_daemon_s_lock_and_socket_stop_nobody(start_node: Callable[..., Node]) -> None:
    node = start_node("laptop")
    node.kill()
    assert node.home.control_socket.exists()
    node.start().wait_ready()


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"name": "laptop"}', '{"name": 1, "public": "00"}'])
def test_a_broken_key_file_is_refused(make_home: Callable[..., Node], text: str) -> None:
    node = make_home("laptop")
    node.home.key_file.write_text(text)
    done = run(node)
    assert done.returncode == 5
    assert str(node.home.key_file) in said(done)


def test_a_key_file_that_others_may_read_is_refused(make_home: Callable[..., Node]) -> None:
    node = make_home("laptop")
    node.home.key_file.chmod(0o644)
    done = run(node)
    assert done.returncode == 5
    assert "0600" in said(done)
    assert json.loads(node.home.key_file.read_text())["secret"] not in done.stdout + done.stderr


def test_keys_that_do_not_belong_together_are_refused(make_home: Callable[..., Node]) -> None:
    node, other = make_home("laptop"), make_home("phone")
    mine, theirs = (json.loads(each.home.key_file.read_text()) for each in (node, other))
    node.home.key_file.write_text(json.dumps(mine | {"public": theirs["public"]}))
    assert run(node).returncode == 5


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("version = 1\nplugin = 7\n", "plugin"),
        ("version = 2\n", "version"),
        ("version = 1\n[budgets]\n", "budget"),
        ("version = 1\n[budget]\nthreads = 'all'\n", "budget.threads"),
        ("version = 1\n[network\n", "TOML"),
        ('version = 1\n[network]\nencryption = "disabled"\n', "encryption"),
        ('version = 1\nplugins = []\n[network]\ninterfaces = ["192.0.2.1"]\n', "192.0.2.1"),
    ],
)
def test_a_bad_profile_is_refused(make_home: Callable[..., Node], text: str, word: str) -> None:
    node = make_home("laptop")
    node.home.profile.write_text(text)
    done = run(node)
    assert done.returncode == 2
    assert word in said(done)


def test_an_unknown_plugin_is_refused(make_home: Callable[..., Node]) -> None:
    done = run(make_home("laptop", plugins=["echoo"]))
    assert done.returncode == 3
    assert "echoo" in said(done)
    assert "echo" in said(done)


def test_a_home_that_was_never_made_says_how(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edged.cli", "run", "--home", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=False)
    assert done.returncode == 2
    assert "edged init" in said(done)
    assert not (tmp_path / "none").exists()


def test_a_long_home_gets_its_socket_in_a_short_folder(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    runtime = Path(tempfile.mkdtemp(prefix="run-"))  # tmp_path may be too long itself
    request.addfinalizer(lambda: shutil.rmtree(runtime))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    folder = tmp_path / "/".join(["a" * 40] * 4) / "laptop"
    folder.parent.mkdir(parents=True)
    long, short = nodes.make("laptop", folder=folder).start().wait_ready(), nodes.start("phone")[0]
    assert not (long.home.path / "control.sock").exists()
    assert [file.name for file in runtime.rglob("*.sock")] == ["control.sock"]
    pair_all([long, short])
    long.stop()
    assert list(runtime.rglob("*.sock")) == []
