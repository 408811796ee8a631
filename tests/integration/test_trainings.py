"""The life of a training job on real nodes, played with an abacus: accepted, followed, lost, gone on with."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import training_rig as rig
from support import Node, Nodes, wait_no_workers, wait_online, wait_until

PHONE, CLOUD, DESK = NAMES = ("phone", "cloud", "desk")
SLOW = {"step_s": 0.1, "steps": 300}  # ends only when a test ends it


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("abacus")


@pytest.fixture(scope="module")
def made(shared_nodes: Nodes, folder: Path, patched: pytest.MonkeyPatch) -> list[Node]:
    rig.install_abacus(folder / "plugin", patched)
    nodes = shared_nodes.group(
        *NAMES, plugins=rig.ABACUS, jobs={"worker_idle": "1s"}, budget={"memory": "2GiB"}
    )
    rig.give(nodes, folder)
    return nodes


@pytest.fixture
def trio(made: list[Node]) -> Iterator[list[Node]]:
    """All online; no test leaves a worker or a job that runs."""
    for node in made:
        if node.process is None:
            node.start().wait_ready()
    wait_online(made)
    yield made
    wait_no_workers(*(node for node in made if node.process is not None))
    for node in made:
        if node.process is not None:
            wait_until(f"{node.name} to be idle", lambda n=node: is_idle(n))


def is_idle(node: Node) -> bool:
    status = node.call("status")
    return status["jobs_running"] == status["roles"] == 0


def by_rule(folder: Path, clients: int, steps: int) -> list[int]:
    return rig.expected(folder / "abacus.jsonl", clients, steps)


def check(document: dict, node: Node, folder: Path, clients: int = 1) -> None:
    """Every step is there once, and the adapter is the one of an undisturbed run."""
    assert len(document["loss"]) == document["steps"]
    assert rig.numbers_of(node, document["adapter"]) == by_rule(folder, clients, document["steps"])


# --- what a training answers ------------------------------------------------------------------------


@pytest.mark.parametrize("submitter", NAMES, ids=["client", "server", "collector"])
@pytest.mark.parametrize("clients", [(PHONE,), (PHONE, DESK)], ids=len)
def test_the_adapter_is_the_submitters(
    trio: list[Node], folder: Path, submitter: str, clients: tuple[str, ...]
) -> None:
    node = next(node for node in trio if node.name == submitter)
    document = rig.finetune(node, rig.abacus(clients, CLOUD, eval_every=3, adapter=f"{submitter}-sums"))
    check(document, node, folder, len(clients))
    assert set(document) == {
        *(
            "job_id",
            "adapter",
            "steps",
            "loss",
            "eval_loss",
            "evals",
            "bytes_sent",
            "joules",
            "joules_source",
        ),
        *("rounds_log", "plan", "measured", "egress"),
    }
    assert document["adapter"].startswith(f"{submitter}-sums")
    assert [row["step"] for row in document["evals"]] == [0, 3, 4]
    assert [row["loss"] for row in document["evals"]] == document["eval_loss"]
    assert document["rounds_log"] == document["measured"]["recoveries"] == []
    assert document["plan"]["epoch"] == 1
    names = [role["name"] for role in document["plan"]["roles"]]
    assert names[: len(clients) + 1] == [*clients, CLOUD]
    assert sorted(names) == sorted({*clients, CLOUD, submitter})
    assert set(document["measured"]["memory_bytes"]) == {role["node"] for role in document["plan"]["roles"]}
    assert rig.row_of(node, document["job_id"])["result"] == document


def test_trainings_and_a_generation_run_beside_each_other(trio: list[Node], folder: Path) -> None:
    phone, cloud, desk = trio
    jobs = [(phone, PHONE, CLOUD), (cloud, DESK, CLOUD), (desk, PHONE, DESK)]
    ids = [
        rig.begun(node, rig.abacus([client], server, step_s=0.05, steps=10)) for node, client, server in jobs
    ]
    said = phone.call("generate", {"model": "echo", "prompt": "hello", "n": 5, "strategy": "local"})
    assert said["text"] == "hello"
    for (node, _, _), job in zip(jobs, ids, strict=True):
        check(rig.followed(node, job).end(), node, folder)


def test_a_job_is_followed_listed_and_removed_with_its_rows(trio: list[Node], folder: Path) -> None:
    phone = trio[0]
    body = rig.abacus([PHONE], CLOUD, step_s=0.1, steps=20)
    body["settings"]["clients"][0]["data"] = "./rows.jsonl"
    stream = rig.Followed(phone, "finetune", body | {"file_clients": [0]}, [folder / "abacus.jsonl"])
    job = stream.until("accepted")["job_id"]
    stream.until("step")
    stream.vanish()  # nobody waits any more, and it goes on
    row = next(row for row in phone.call("jobs")["jobs"] if row["job_id"] == job)
    assert (row["kind"], row["state"]) == ("finetune", "running")
    assert 0 < row["progress"] < 1
    assert "sums" in [row["name"] for row in phone.call("data.ls")["data"]]
    assert not [row for row in phone.call("data.ls")["data"] if job in row["name"]]  # one job's own
    assert phone.error("jobs.rm", {"job": job}).code == "running"
    again = rig.followed(phone, job)
    document = again.end()
    assert {event["event"] for event in again.seen} >= {"planned", "step", "eval"}
    check(document, phone, folder)
    assert rig.row_of(phone, job)["loss"] == document["loss"]
    assert list(phone.home.data.glob(f"job-{job}-*"))
    kept = list(phone.home.training.glob(f"*-{job}"))
    assert kept
    phone.call("jobs.rm", {"job": job})
    assert not list(phone.home.data.glob(f"job-{job}-*"))
    assert not kept[0].exists()
    assert job not in [row["job_id"] for row in phone.call("jobs")["jobs"]]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "unknown"}, "unknown"),
        ({"server": {"node": "nobody"}}, "node 'nobody' is not online"),
        ({"clients": [{"node": PHONE, "data": "other"}]}, "other"),
        ({"clients": [{"node": DESK, "data": "other"}]}, "desk.*other"),
        ({"clients": [{"node": DESK, "data": "../sums"}]}, "sums"),
        ({"clients": [{"node": DESK, "data": "job-0123456789abcdef-0"}]}, "job-"),
        ({"memory": 1 << 50}, r"1073741824 MiB by the plan's, and the budget is \d+ MiB"),
        ({"colour": "red"}, "colour"),
        ({"steps": 0}, "steps"),
        ({"fails_at": 2}, "cloud: step 2 fails"),
    ],
    ids=str,
)
def test_a_job_that_cannot_run_is_refused_in_words(trio: list[Node], changes: dict, says: str) -> None:
    phone = trio[0]
    error = rig.refusal(phone, rig.abacus([PHONE], CLOUD, **changes))
    assert re.search(says, str(error)), str(error)


def test_a_kind_that_no_plugin_brings_is_refused(trio: list[Node]) -> None:
    error = rig.refusal(trio[0], rig.abacus([PHONE], CLOUD) | {"kind": "federated"})
    assert "no training 'federated'; loaded: abacus" in str(error)


def test_a_path_names_data_on_the_submitting_node_only(trio: list[Node], folder: Path) -> None:
    body = rig.abacus([DESK], CLOUD)
    body["settings"]["clients"][0]["data"] = "./rows.jsonl"
    error = rig.refusal(trio[0], body | {"file_clients": [0]}, [folder / "abacus.jsonl"])
    assert "a path names data on this node only" in str(error)
    assert not list(trio[0].home.data.glob("job-*"))


def test_without_the_right_to_train_nothing_trains(trio: list[Node]) -> None:
    """Taken away before the job, and while it runs."""
    phone, cloud, _ = trio
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, **SLOW))
    rig.until_step(phone, job)
    cloud.call("trust", {"node": PHONE, "rights": ["submit", "serve"]})
    try:
        with pytest.raises(rig.EdgedError, match="no right to train") as caught:
            rig.followed(phone, job).end()
        assert caught.value.exit_code == 6
        error = rig.refusal(phone, rig.abacus([PHONE], CLOUD))
        assert (error.code, "cloud: phone has no right to train" in str(error)) == ("no-right", True)
    finally:
        cloud.call("trust", {"node": PHONE, "rights": ["submit", "serve", "train"]})


# --- stopped, and gone on with ----------------------------------------------------------------------


def test_an_ended_job_goes_on_to_more_steps_as_one_of_so_many_would(trio: list[Node], folder: Path) -> None:
    desk = trio[2]
    body = rig.abacus([PHONE], CLOUD, steps=5, eval_every=4, checkpoint_every=2)
    first = rig.finetune(desk, body)
    refused = rig.refusal(desk, body | {"resume": first["job_id"]})
    assert "more than the 5 steps" in str(refused)
    body["settings"]["steps"] = 9
    other = rig.refusal(
        desk, body | {"resume": first["job_id"], "settings": body["settings"] | {"server": PHONE}}
    )
    assert "server" in str(other)
    longer = rig.finetune(desk, body | {"resume": first["job_id"]})
    at_once = rig.finetune(desk, body)
    check(longer, desk, folder)
    for key in ("loss", "eval_loss", "evals", "steps"):
        assert longer[key] == at_once[key]
    assert longer["job_id"] == first["job_id"]


def test_a_cancelled_job_goes_on(trio: list[Node], folder: Path) -> None:
    phone = trio[0]
    body = rig.abacus([PHONE], CLOUD, step_s=0.1, steps=12)
    job = rig.begun(phone, body)
    stream = rig.followed(phone, job)
    stream.until("step", step=3)
    assert phone.call("cancel", {"job": job}) == {"job_id": job, "state": "cancelled"}
    with pytest.raises(rig.EdgedError, match="cancelled"):
        stream.end()
    wait_no_workers(*trio)
    going_on = rig.Followed(phone, "finetune", body | {"resume": job})
    assert going_on.until("planned")["step"] >= 4
    check(going_on.end(), phone, folder)


def test_a_job_is_cancelled_while_it_loads(trio: list[Node]) -> None:
    phone, cloud, _ = trio
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, load_s=5.0))
    wait_until("its worker to start", lambda: bool(cloud.workers()))
    assert phone.call("cancel", {"job": job})["state"] == "cancelled"


# --- losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", NAMES, ids=["client", "server", "collector"])
def test_a_killed_worker_is_loaded_again_and_no_number_changes(
    trio: list[Node], folder: Path, victim: str
) -> None:
    desk = trio[2]
    lost = next(node for node in trio if node.name == victim)
    job = rig.begun(desk, rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20))
    stream = rig.followed(desk, job)
    stream.until("step", step=5)
    lost.workers()[0].kill()
    interrupted = stream.until("interrupted")
    assert victim in interrupted["reason"]
    document = stream.end()
    check(document, desk, folder)
    assert [row["epoch"] for row in document["measured"]["recoveries"]] == [1]
    assert document["plan"]["epoch"] == 2


@pytest.mark.parametrize("victim", [CLOUD, DESK], ids=["member", "coordinator"])
def test_a_killed_daemon_comes_back_and_no_number_changes(
    trio: list[Node], folder: Path, victim: str
) -> None:
    desk = trio[2]
    lost = next(node for node in trio if node.name == victim)
    job = rig.begun(desk, rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20))
    stream = rig.followed(desk, job)
    stream.until("step", step=5)
    lost.kill()
    if victim == CLOUD:
        stream.until("waiting")
        assert "cloud" in rig.row_of(desk, job)["waits"]["because"]
    stream.vanish()
    lost.start().wait_ready()
    check(rig.followed(desk, job).end(), desk, folder)


def test_a_worker_that_is_killed_while_it_loads_is_started_again(trio: list[Node], folder: Path) -> None:
    phone, cloud, _ = trio
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, load_s=0.5))
    wait_until("its worker to start", lambda: bool(cloud.workers()))
    cloud.workers()[0].kill()
    document = rig.followed(phone, job).end()
    check(document, phone, folder)
    assert document["measured"]["recoveries"]


def test_a_coordinator_that_comes_back_alone_waits_for_the_nodes_of_its_plan(
    trio: list[Node], folder: Path
) -> None:
    phone, cloud, _ = trio
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20))
    rig.until_step(phone, job, 3)
    cloud.signal(signal.SIGSTOP)
    try:
        phone.kill()
        phone.start().wait_ready()
        stream = rig.followed(phone, job)
        assert "cloud" in stream.until("waiting")["because"]
    finally:
        cloud.signal(signal.SIGCONT)
    document = stream.end()
    check(document, phone, folder)
    assert "phone's daemon ended" in [row["reason"] for row in document["measured"]["recoveries"]]


def test_a_node_that_stays_away_ends_the_job_which_goes_on_later(trio: list[Node], folder: Path) -> None:
    phone, cloud, _ = trio
    body = rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20, patience_s=1.0)
    job = rig.begun(phone, body)
    stream = rig.followed(phone, job)
    stream.until("step", step=3)
    cloud.kill()
    with pytest.raises(rig.EdgedError, match="expected cloud back within 1 s") as caught:
        stream.end()
    assert caught.value.code == "stayed-away"
    assert f"--resume {job}" in caught.value.remedy
    cloud.start().wait_ready()
    wait_online(trio)
    check(rig.finetune(phone, body | {"resume": job}), phone, folder)


def test_a_member_that_leaves_in_order_is_waited_for(trio: list[Node], folder: Path) -> None:
    phone, cloud, _ = trio
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20))
    stream = rig.followed(phone, job)
    stream.until("step", step=3)
    cloud.call("drain")
    assert "it leaves" in stream.until("interrupted")["reason"]
    assert cloud.process is not None
    cloud.process.wait(rig.GUARD_S)
    cloud.kill()
    cloud.start().wait_ready()
    check(stream.end(), phone, folder)


def test_a_coordinator_that_leaves_in_order_goes_on_when_it_is_back(trio: list[Node], folder: Path) -> None:
    phone = trio[0]
    job = rig.begun(phone, rig.abacus([PHONE], CLOUD, step_s=0.05, steps=20))
    stream = rig.followed(phone, job)
    stream.until("step", step=3)
    phone.stop()
    with pytest.raises(rig.EdgedError):
        stream.end()
    phone.start().wait_ready()
    check(rig.followed(phone, job).end(), phone, folder)
