"""The shared libraries inside llama-cpp-python: where they are, found without importing it."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from edged import EngineError

LLAMA_CPP_VERSION = "0.3.36"
INSTALL = f"pip install --force-reinstall llama-cpp-python=={LLAMA_CPP_VERSION}"


def library_folder() -> Path:
    """Where llama-cpp-python keeps them; EngineError where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(
            f"expected llama-cpp-python {LLAMA_CPP_VERSION}, which is not installed",
            remedy=f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}",
        )
    return Path(spec.submodule_search_locations[0]) / "lib"


def open_library(stem: str, remedy: str = INSTALL) -> ctypes.CDLL:
    """The file that libllama itself links against, so that both share one copy."""
    folder = library_folder()
    for name in (f"lib{stem}.so.0", f"lib{stem}.so", f"lib{stem}.0.dylib", f"lib{stem}.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise EngineError(f"no lib{stem} in {folder}; llama-cpp-python {LLAMA_CPP_VERSION} has it", remedy=remedy)
