#!/usr/bin/env python3
"""The llama-cpp-python wheel edged runs on: built once for this processor, kept, installed.

    llama_wheel.py key        print the key of the wheel that belongs to this machine
    llama_wheel.py build      build it unless it is kept already; print its path
    llama_wheel.py install    build it if need be and install it into the Python that runs this

PyPI has llama-cpp-python as source only. pip's own wheel cache cannot keep what comes of it: it knows
neither CMAKE_ARGS, which decide what is built, nor the processor, which `-march=native` bakes in. So
the wheel is kept here, in ${XDG_CACHE_HOME:-~/.cache}/edged/wheels/KEY/, with a key over all of them.

CMAKE_ARGS from the environment are added to ours and belong to the key:
`CMAKE_ARGS=-DGGML_CUDA=on make install`. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = "llama-cpp-python"

# GGML_RPC adds libggml-rpc, which llama.cpp's own layer split needs. Everything else leaves out what
# edged does not use: multimodal, the command line tools, the HTTP server. 3 to 6 minutes, not 5 to 10.
# Without AMX: before GCC 13.2 its _tile_loadconfig claims to read 8 of the 64 bytes, so the compiler drops
# the rest of ggml's tile configuration and the first product is a segmentation fault.
FLAGS = (
    "-DCMAKE_C_FLAGS=-U__AMX_INT8__",
    "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__",
    "-DGGML_RPC=on",
    "-DLLAVA_BUILD=off",
    "-DLLAMA_BUILD_COMMON=off",
    "-DLLAMA_BUILD_TOOLS=off",
    "-DLLAMA_BUILD_TESTS=off",
    "-DLLAMA_BUILD_EXAMPLES=off",
    "-DLLAMA_BUILD_SERVER=off",
    "-DLLAMA_CURL=off",
)

# What /proc/cpuinfo says of the instruction set; x86 first, then ARM. Clock speeds and the like differ
# from second to second and are left out.
PROCESSOR_FIELDS = {
    "model name",
    "flags",
    "Features",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
}

BYTES_PER_COMPILER = 1 << 30  # one g++ over ggml's templates takes up to this much
REPORT_EVERY_S = 15.0
LAST_LINES = 15


class BuildError(Exception):
    """The wheel could not be built or installed; the message says what to look at."""


def version(pyproject: Path = PROJECT / "pyproject.toml") -> str:
    """The one release that edged is written against, as pyproject.toml pins it."""
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    for requirement in extras["llama"]:
        name, pinned, release = requirement.partition("==")
        if pinned and name.strip() == PACKAGE:
            return str(release.strip())
    raise BuildError(f"expected an exact {PACKAGE}==VERSION in the extra 'llama' of {pyproject}")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the compiler's -march=native depends on, as text; the same on every boot of one machine."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = {line for line in lines if line.partition(":")[0].strip() in PROCESSOR_FIELDS}
    return "\n".join(sorted(kept))


def cmake_args() -> str:
    return " ".join((*FLAGS, os.environ.get("CMAKE_ARGS", ""))).strip()


def key(release: str, flags: str, cpu: str) -> str:
    """Names the wheel: a readable part, then a digest of all that decides what the compiler makes."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    libc = "-".join(platform.libc_ver()) or platform.system()
    digest = hashlib.sha256("\0".join((release, flags, cpu, platform.machine(), libc, tag)).encode())
    return f"{release}-{tag}-{platform.machine()}-{digest.hexdigest()[:16]}"


def this_key() -> str:
    return key(version(), cmake_args(), processor())


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edged" / "wheels"


def kept_wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def built_wheel(cache: Path, name: str) -> Path:
    """The wheel `name` of the cache, built now if nobody has; two builders at once make one."""
    folder = cache / name
    if wheel := kept_wheel(folder):
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with only_builder(cache / f"{name}.lock"):
        if wheel := kept_wheel(folder):
            return wheel
        log = cache / f"{name}.log"
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
            build(Path(temporary), log)
            shutil.rmtree(folder, ignore_errors=True)  # a folder without a wheel: somebody's leftovers
            made = Path(temporary) / "wheel"
            os.replace(made, folder)
        log.unlink(missing_ok=True)
    wheel = kept_wheel(folder)
    assert wheel is not None
    return wheel


@contextmanager
def only_builder(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building this wheel; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(folder: Path, log: Path) -> None:
    """Build into `folder`/wheel. Raises BuildError with the log's path and last lines."""
    say(f"compiling {PACKAGE} {version()} for this processor: 3 to 6 minutes on two cores, once")
    arguments = ["wheel", "--verbose", "--no-cache-dir", "--no-deps", f"--no-binary={PACKAGE}"]
    command = [sys.executable, "-m", "pip", *arguments, "--wheel-dir", str(folder / "wheel")]
    command.append(f"{PACKAGE}=={version()}")
    settings = {"CMAKE_ARGS": cmake_args(), "CMAKE_BUILD_PARALLEL_LEVEL": str(compilers())}
    started = time.monotonic()
    with log.open("w", errors="replace") as written:
        last, code = follow(command, os.environ | settings, written)
    if code or kept_wheel(folder / "wheel") is None:
        raise BuildError("the build failed; its last lines:\n" + "".join(last) + f"the whole log: {log}")
    say(f"compiled in {(time.monotonic() - started) / 60:.1f} minutes")


def compilers() -> int:
    """How many compilers to run at once: one a core, but no more than memory holds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return cores
    return cores if available is None else max(1, min(cores, int(available[1]) * 1024 // BYTES_PER_COMPILER))


def follow(command: list[str], environment: dict[str, str], log: IO[str]) -> tuple[list[str], int]:
    """Run the build, every line into the log, the steps shown; the last lines and the exit code."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    progress = Progress()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                last.append(line)
                progress.see(line)
        except BaseException:
            process.terminate()
            raise
        finally:
            progress.end()
        code = process.wait()
    return list(last), code


class Progress:
    """Ninja's `[n/m]` and make's `[ n%]` as one line that changes; without a terminal, now and then."""

    STEP = re.compile(r"\[\s*(\d+/\d+|\d+%)\]")

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.shown_at = self.started_at = time.monotonic()

    def see(self, line: str) -> None:
        step = self.STEP.search(line)
        now = time.monotonic()
        if step is None or not (self.on_terminal or now - self.shown_at >= REPORT_EVERY_S):
            return
        self.shown_at = now
        text = f"  compiling {step[1]} after {now - self.started_at:.0f} s"
        print(f"\r{text:<60}" if self.on_terminal else text, end="", file=sys.stderr, flush=True)
        if not self.on_terminal:
            print(file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.on_terminal:
            print("\r" + " " * 60, end="\r", file=sys.stderr, flush=True)


def install(wheel: Path) -> None:
    """Install the wheel into the Python that runs this, and look whether all of it arrived."""
    # Its dependencies come with edged's own, under constraints.txt.
    arguments = ["install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        raise BuildError(f"pip could not install {wheel}")
    if not has_rpc():
        raise BuildError(
            f"expected libggml-rpc in the installed {PACKAGE}, it has none; "
            f"delete {wheel.parent} and run this again"
        )


def has_rpc() -> bool:
    files = metadata.files(PACKAGE) or []
    return any(file.name.startswith(("libggml-rpc", "ggml-rpc")) for file in files)


def say(text: str) -> None:
    print(f"edged: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if arguments not in (["key"], ["build"], ["install"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if arguments == ["key"]:
            print(this_key())
            return 0
        wheel = built_wheel(cache_folder(), this_key())
        if arguments == ["install"]:
            install(wheel)
        print(wheel)
    except BuildError as problem:
        say(str(problem))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
