"""What installs edged: the Makefile, the check of prerequisites, the kept wheel, the shipped unit."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[1]
UNIT = PROJECT / "systemd" / "edged.service"
DROP_INS = sorted((PROJECT / "systemd" / "edged.service.d-examples").glob("*.conf"))
EXPOSURE_MAX = 2.0


@pytest.fixture(scope="module")
def llama_wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_wheel", PROJECT / "scripts" / "llama_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tools(folder: Path, *names: str) -> str:
    """A PATH on which only these programs are found."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return str(folder)


def prerequisites(path: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    script = str(PROJECT / "scripts" / "prerequisites.sh")
    return subprocess.run(
        ["/bin/sh", script, python], env={"PATH": path}, capture_output=True, text=True, check=False
    )


# --- prerequisites ------------------------------------------------------------------------------


def test_nothing_is_said_when_everything_is_there(tmp_path: Path) -> None:
    answer = prerequisites(tools(tmp_path / "bin", "git", "g++", "make"))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("there", "named", "line"),
    [
        (["git", "make"], "g++", "apt install g++"),
        (["g++", "make"], "git", "apt install git"),
        ([], "make", "apt install git g++ make"),
    ],
    ids=["compiler", "git", "all"],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(
    tmp_path: Path, there: list[str], named: str, line: str
) -> None:
    answer = prerequisites(tools(tmp_path / "bin", *there))
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert named in answer.stderr
    assert answer.stderr.endswith(f"{line}\n")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('case "$2" in *print*) echo 3.9;; *) exit 1;; esac', "is 3.9"),
        ('case "$2" in *print*) echo 3.12;; *ensurepip*) exit 1;; esac', "apt install python3.12-venv"),
    ],
    ids=["too old", "without venv"],
)
def test_a_python_that_will_not_do_is_named(tmp_path: Path, script: str, said: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    answer = prerequisites(tools(tmp_path / "bin", "git", "g++", "make"), str(python))
    assert answer.returncode == 2
    assert said in answer.stderr


# --- the wheel ----------------------------------------------------------------------------------


def test_the_wheel_changes_with_release_flags_and_processor(llama_wheel: ModuleType) -> None:
    keys = {
        llama_wheel.key(release, flags, cpu)
        for release in ("0.3.36", "0.3.37")
        for flags in ("-DGGML_RPC=on", "-DGGML_RPC=on -DGGML_CUDA=on")
        for cpu in ("flags: avx2", "flags: avx2 avx512f")
    }
    assert len(keys) == 8
    assert llama_wheel.key("1", "f", "c") == llama_wheel.key("1", "f", "c")


def test_a_processor_is_known_by_its_instructions_not_by_its_clock(
    llama_wheel: ModuleType, tmp_path: Path
) -> None:
    def told(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        answer = llama_wheel.processor(tmp_path / "cpuinfo")
        assert isinstance(answer, str)
        return answer

    core = "model name\t: X\nflags\t\t: sse avx2\ncpu MHz\t\t: {}\n"
    assert told(core.format(800)) == told(core.format(3200) * 2)
    assert told(core.format(800)) != told(core.replace("avx2", "avx").format(800))
    assert told("CPU part\t: 0xd0c\n") != told("CPU part\t: 0xd40\n")


def test_flags_of_the_environment_belong_to_the_key(
    llama_wheel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    plain = llama_wheel.this_key()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    assert llama_wheel.this_key() != plain


def test_the_installed_kernels_have_no_amx() -> None:
    """Compiled by a GCC before 13.2 they would end the worker."""
    folder = importlib.util.find_spec("llama_cpp")
    if folder is None or folder.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    libraries = list((Path(folder.origin).parent / "lib").glob("libggml-cpu*.so*"))
    assert libraries
    assert all(b"ggml_backend_amx_mul_mat" not in library.read_bytes() for library in libraries)


def test_a_kept_wheel_is_not_built_again(llama_wheel: ModuleType, tmp_path: Path) -> None:
    kept = tmp_path / "some-key" / "x.whl"
    kept.parent.mkdir()
    kept.touch()
    assert llama_wheel.built_wheel(tmp_path, "some-key") == kept


def test_a_failed_build_keeps_its_log_and_shows_its_end(
    llama_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho '[1/9] first'; seq 100; echo 'ggml.c:1: error: no'; exit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(llama_wheel.sys, "executable", str(pip))
    with pytest.raises(llama_wheel.BuildError) as raised:
        llama_wheel.built_wheel(tmp_path / "cache", "some-key")
    log = tmp_path / "cache" / "some-key.log"
    assert str(log) in str(raised.value)
    assert "error: no" in str(raised.value)
    assert "[1/9] first" in log.read_text()
    assert not (tmp_path / "cache" / "some-key").exists()


# --- the Makefile and the pins ------------------------------------------------------------------


def dry_run(*arguments: str) -> str:
    return subprocess.run(
        ["make", "--no-print-directory", "-n", *arguments],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def make_or_skip() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make: apt install make")


@pytest.mark.usefixtures("make_or_skip")
def test_the_demo_asks_for_no_torch() -> None:
    assert "[all]" not in dry_run("-B", "demo")
    assert "[all]" in dry_run("-B", "install")


@pytest.mark.usefixtures("make_or_skip")
@pytest.mark.parametrize("target", ["install", "demo", "test", "check", "bench"])
def test_prerequisites_are_looked_for_before_anything_is_done(target: str) -> None:
    assert dry_run("-B", target).splitlines()[0].startswith("sh scripts/prerequisites.sh")


def required() -> set[str]:
    """The names of all that edged asks for itself, extras included."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for some in lists for requirement in some}
    return {name.replace("_", "-") for name in names} - {"edged"}


def test_every_dependency_is_pinned_exactly() -> None:
    lines = [line.split("#")[0].strip() for line in (PROJECT / "constraints.txt").read_text().splitlines()]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line)
    assert required() - pins.keys() == set()


def test_the_pinned_llama_cpp_is_the_one_the_engine_is_written_against(llama_wheel: ModuleType) -> None:
    assert f"llama-cpp-python=={llama_wheel.version()}\n" in (PROJECT / "constraints.txt").read_text()


def test_the_installed_llama_cpp_has_the_rpc_backend(llama_wheel: ModuleType) -> None:
    try:
        metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        pytest.skip("the extra llama is not installed: make demo installs it")
    assert llama_wheel.has_rpc()


# --- the unit -----------------------------------------------------------------------------------


def analysed(folder: Path, drop_in: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze over the unit, which has to find an executable where it says."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt install systemd")
    command = folder / "edged"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    unit = folder / "edged.service"
    unit.write_text(UNIT.read_text().replace("/opt/edged/.venv/bin/edged", str(command)))
    if drop_in is not None:
        (folder / "edged.service.d").mkdir()
        shutil.copy(drop_in, folder / "edged.service.d")
    return subprocess.run(
        ["systemd-analyze", *arguments, "--no-pager", str(unit)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda path: path.stem if path else "as shipped")
def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path, drop_in: Path | None) -> None:
    answer = analysed(tmp_path, drop_in, "verify")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda path: path.stem if path else "as shipped")
def test_the_unit_is_little_exposed(tmp_path: Path, drop_in: Path | None) -> None:
    answer = analysed(tmp_path, drop_in, "security", "--offline=yes")
    exposure = re.search(r"Overall exposure level for edged.service: ([\d.]+)", answer.stdout)
    assert exposure is not None, answer.stderr
    assert float(exposure[1]) <= EXPOSURE_MAX


def test_every_setting_of_the_unit_has_its_reason() -> None:
    reasons = (UNIT.parent / "README.md").read_text()
    settings = {
        line.partition("=")[0] for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w+=", line)
    }
    self_evident = {"Description", "Documentation", "ExecStart", "WantedBy"}
    grouped = {  # "ProtectClock= ... ProtectKernelTunables=" is one row
        "ProtectControlGroups",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "SystemCallErrorNumber",
    }
    assert {name for name in settings if f"`{name}=" not in reasons} == self_evident | grouped
