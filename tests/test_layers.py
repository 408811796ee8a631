"""The layers of edged, read from its imports: what may use what, and why not the rest."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edged

ROOT = Path(__file__).parent.parent
CORE, PLUGINS = ROOT / "edged", ROOT / "plugins"

LAYERS = {
    0: "types errors version",
    1: "hookspecs config wire sizes rows logs",
    2: "pricing rules correcting metering sustaining queueing scenario",
    3: "accounting figures plugins node planning simulation advising jobs identity token requests framing "
    "quarantine",
    4: "transport certificate stream meeting streams channel exchanging dataplane control client "
    "worker supervisor models partial ingest datasets ingest_rows adapters adapter_files lending transfer "
    "health sdnotify device bearing limits pressure saving patience reports",
    5: "peers probing transfers watching viewing roles groups choosing coordinator training_run training "
    "commands parts "
    "daemon",
    6: "cli testing",
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
SHARED_LAYERS = (4, 5, 6)  # sockets and processes are built of one another; values and rules are not

NEVER_IN_CORE = {
    "edged_plugins": "a plugin is a stranger to the core, ours too; it is loaded by name",
    "torch": "the daemon runs on a phone that has no torch, and starts in well under a second",
    "numpy": "the daemon never computes; arrays live in an engine's worker",
    "llama_cpp": "a library that aborts on bad input must not be in the daemon",
    "gguf": "a model file is read by a child process, never by the daemon",
    "zeroconf": "discovery is a plugin; the core hears sightings",
    "psutil": "sensors are a plugin; the core asks for readings",
    "edged_profiles": "profiles are files, read as text",
}
DOORS = {
    "pluggy": ("hookspecs plugins", "one host decides what a failing plugin does"),
    "zmq": ("transport channel dataplane", "one place each for the control plane, ranks and transfers"),
    "ssl": ("stream meeting", "who may be at the other end of a stream is decided in one place"),
    "cryptography": ("certificate", "keys are made in one way, in a worker with peers only"),
    "msgpack": ("wire channel token", "what is read from outside is bounded where it is unpacked"),
    "tomllib": ("config", "every value of a file is checked and has an origin"),
    "sqlite3": ("jobs", "what is acknowledged was committed in one way"),
    "typer": ("cli", "the daemon prints nothing"),
    "click": ("cli", "the daemon prints nothing"),
    "rich": ("cli", "the daemon prints nothing"),
    "ctypes": ("worker cli", "one call, prctl, for a child that must not outlive us; the rest is engines"),
}
PURE = (
    "types wire sizes rows pricing rules correcting accounting figures metering sustaining queueing "
    "scenario node planning patience quarantine"
)
PURE_MAY_IMPORT = {
    "__future__": "no code",
    "collections": "values",
    "dataclasses": "values",
    "typing": "no code",
    "itertools": "functions of their arguments",
    "math": "functions of their arguments",
    "statistics": "functions of their arguments",
    "hmac": "compare_digest alone: a comparison that tells no time",
    "msgspec": "checks values",
    "msgpack": "bytes to values and back",
}
PURE_NEVER_CALLS = {"open", "print", "input", "id", "hash", "__import__"}

PLUGIN_DOORS = {
    "psutil": ("monitor", "one reader of the device"),
    "zeroconf": ("mdns", "one speaker of multicast DNS"),
    "ifaddr": ("mdns", "interfaces, as zeroconf sees them"),
    "socket": (
        "mdns _llama_tunnel _cloud_stream",
        "a discoverer's, loopback where libllama knows nothing else, and an endpoint's",
    ),
    "http": ("_cloud_stream", "one client decides what of a stranger's answer is believed"),
    "ssl": ("_cloud_stream", "one client decides whom it speaks to"),
    "transformers": ("torch_blocks", "one engine builds blocks"),
    "peft": ("torch_blocks", "one engine puts LoRA on them"),
    "safetensors": (
        "torch_blocks _tensors _training split_learning",
        "weights, adapters and checkpoints that run no code",
    ),
    "tokenizers": ("torch_blocks", "one engine reads vocabularies"),
    "jinja2": ("torch_blocks", "a template is a program of the model's author"),
    "numpy": (
        "shard torch_blocks energy _grouping _paths _placing _pool _ring _search _staging _sweep _tables "
        "_sampling _llama_engine _tensors _training _rounds split_learning personal_lora zeroth_order",
        "arrays live in an engine's worker",
    ),
    "torch": (
        "torch_blocks _tensors _training split_learning personal_lora",
        "tensors with gradients live in a training's worker",
    ),
    "cryptography": ("_rounds", "masks are made in one way, in a worker"),
    "opacus": ("_tensors", "one accountant decides what a privacy budget allows"),
    "llama_cpp": (
        "shard _tokenizer _libllama _llama_describe _llama_engine _llama_rpc_engine",
        "libllama lives in an engine's worker",
    ),
    "gguf": ("shard torch_blocks _tensors _gguf _libllama", "model files are read in a worker"),
    "ctypes": (
        "shard _tokenizer _libraries _libllama _llama_engine _llama_rpc_engine split_learning",
        "ggml and libllama through their C headers; malloc_trim where blocks are let go of",
    ),
}
SHARED = {"_tensors", "_rounds"}  # by plugins' workers
HEAVY = (
    "torch numpy llama_cpp gguf transformers peft safetensors tokenizers scipy opacus".split()  # noqa: SIM905
)
NEVER_ANYWHERE = {
    "pickle": "a message must not be able to run code",
    "marshal": "a message must not be able to run code",
    "shelve": "it is pickle",
    "dill": "it is pickle",
}
NEVER_CALLED = {
    "eval": "text from outside is never code",
    "exec": "text from outside is never code",
    "system": "nothing is handed to a shell",
    "popen": "nothing is handed to a shell",
}


@dataclass(frozen=True)
class Import:
    """One imported module. `names`: what is taken from it; `is_top`: at the top of its file."""

    file: Path
    line: int
    module: str  # absolute
    names: tuple[str, ...]
    is_top: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module} {', '.join(self.names)}"


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@functools.cache
def imports(file: Path) -> tuple[Import, ...]:
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[Import]:
    tree = tree_of(file)
    top = set(tree.body)
    package = package_of(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, (), node in top)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(file, node.lineno, _absolute(node, package), names, node in top)


def package_of(file: Path) -> list[str]:
    """The dotted package that relative imports of a file start from."""
    for root, name in ((CORE, "edged"), (PLUGINS, "edged_plugins")):
        if file.is_relative_to(root):
            return [name, *file.relative_to(root).parts[:-1]]
    raise AssertionError(f"{file} is in no package")


def _absolute(node: ast.ImportFrom, package: list[str]) -> str:
    if not node.level:
        return node.module or ""
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def core_files() -> list[Path]:
    return sorted(file for file in CORE.rglob("*.py"))


def plugin_files() -> list[Path]:
    return sorted(file for file in PLUGINS.rglob("*.py"))


def module_of(file: Path) -> str:
    """The first name below its package: "wire", "cli", "shard", "_cutting"."""
    root = CORE if file.is_relative_to(CORE) else PLUGINS
    return file.relative_to(root).parts[0].removesuffix(".py")


def internal(file: Path) -> Iterator[tuple[Import, str]]:
    """Imports of edged's own modules by a file of edged: the import, and the module's name."""
    for found in imports(file):
        if found.library != "edged":
            continue
        parts = found.module.split(".")[1:]
        for module in parts[:1] or found.names or ("the whole package",):
            yield found, module


@functools.cache
def graph() -> dict[str, set[str]]:
    """module -> modules it imports, in edged."""
    found: dict[str, set[str]] = {}
    for file in core_files():
        if file.name == "__init__.py" and file.parent == CORE:
            continue
        name = module_of(file)
        found.setdefault(name, set()).update(m for _, m in internal(file) if m != name)
    return found


def ids(values: Mapping[str, object]) -> list[str]:
    return sorted(values)


# --- 1 and 2: downwards, without cycles, not through the front door -------------------------------


def test_every_module_has_a_layer() -> None:
    modules = {module_of(file) for file in core_files()} - {"__init__"}
    assert modules <= set(LAYER_OF), f"write {modules - set(LAYER_OF)} into LAYERS"


@pytest.mark.parametrize("module", sorted(graph()))
def test_imports_point_down(module: str) -> None:
    layer = LAYER_OF[module]
    for used in graph()[module]:
        below = LAYER_OF[used]
        assert below < layer or (below == layer and layer in SHARED_LAYERS), (
            f"{module} (layer {layer}) imports {used} (layer {below}): what is low must stand without it"
        )


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(graph()).prepare()  # CycleError names the circle


def test_imports_of_our_own_stand_at_the_top_of_their_file() -> None:
    """A hidden import hides a cycle. Only `edged run` loads the daemon late: no other command needs it."""
    hidden = [i for file in core_files() for i, _ in internal(file) if not i.is_top]
    hidden = [i for i in hidden if i.file != CORE / "cli" / "run.py"]
    assert not hidden, "\n".join(map(str, hidden))


def test_no_import_is_for_type_checkers_alone() -> None:
    """What a type needs, the module needs; the circle would still be there for the reader."""
    for file in [*core_files(), *plugin_files()]:
        names = {node.id for node in ast.walk(tree_of(file)) if isinstance(node, ast.Name)}
        assert "TYPE_CHECKING" not in names, file


def test_nothing_inside_imports_what_the_package_re_exports() -> None:
    """`edged/__init__.py` is the plugins' door; inside, a name has one home."""
    for file in core_files():
        for found, module in internal(file):
            if found.module == "edged":
                assert module in LAYER_OF, f"{found}: import it from its own module"


# --- 3, 4 and 5: libraries and plugins ------------------------------------------------------------


@pytest.mark.parametrize("library", ids(NEVER_IN_CORE))
def test_the_core_never_imports(library: str) -> None:
    found = [i for file in core_files() for i in imports(file) if i.library == library]
    assert not found, f"{NEVER_IN_CORE[library]}: {', '.join(map(str, found))}"


@pytest.mark.parametrize("library", ids(DOORS))
def test_a_library_has_one_door(library: str) -> None:
    modules, reason = DOORS[library]
    users = {module_of(file) for file in core_files() for i in imports(file) if i.library == library}
    assert users <= set(modules.split()), f"{library} is used in {users}; {reason}"


@pytest.mark.parametrize("library", ids(PLUGIN_DOORS))
def test_a_library_has_one_door_among_plugins(library: str) -> None:
    modules, reason = PLUGIN_DOORS[library]
    users = {module_of(file) for file in plugin_files() for i in imports(file) if i.library == library}
    assert users <= set(modules.split()), f"{library} is used in {users}; {reason}"


@pytest.mark.parametrize("file", plugin_files(), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_a_plugin_sees_the_public_names_and_what_lies_beside_it(file: Path) -> None:
    """Then the core may change inside, and a plugin may be removed without another one noticing."""
    own = module_of(file)
    for found in imports(file):
        if found.library == "edged":
            assert found.module == "edged", f"{found}: take it from `edged`"
            missing = set(found.names) - set(edged.__all__)
            assert not missing, f"{found}: {missing} is not public"
        elif found.library == "edged_plugins":
            for module in found.module.split(".")[1:2] or found.names:
                assert module == own or module.startswith("_"), f"{found}: another plugin"


@pytest.mark.parametrize("file", plugin_files(), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_a_plugins_own_module_is_light(file: Path) -> None:
    """The daemon imports it. What is heavy is named by a dotted name and resolved in a worker."""
    if any(part.startswith("_") and part != "__init__.py" for part in file.relative_to(PLUGINS).parts):
        pytest.skip("an underscore module is imported where it is needed")
    heavy = [found for found in imports(file) if found.library in HEAVY]
    assert not heavy, ", ".join(map(str, heavy))


def test_shared_numerical_code_uses_no_plugin_and_is_loaded_by_none_directly() -> None:
    """It lives in workers: what a daemon imports of a plugin must not reach it."""
    for file in plugin_files():
        is_shared = module_of(file) in SHARED
        parts = file.relative_to(PLUGINS).with_suffix("").parts
        is_light = not any(part.startswith("_") and part != "__init__" for part in parts)
        for found in imports(file):
            if found.library == "edged_plugins":
                modules = found.module.split(".")[1:2] or found.names
                assert not is_shared or all(module.startswith("_") for module in modules), found
                assert not is_light or not SHARED & set(modules), found


def test_a_fresh_daemon_loads_nothing_heavy_and_no_plugin_that_was_not_named() -> None:
    named = [
        "mdns",
        "monitor",
        "shard",
        "llama_cpp",
        "llama_rpc",
        "torch_blocks",
        "cloud",
        "layer_parallel",
        "tensor_parallel",
    ]
    program = (
        "import sys, edged.daemon\n"
        "from edged.plugins import Host\n"
        f"Host().load({named!r}, {{}})\n"
        "print(*sys.modules)\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {*HEAVY, "cryptography"} & set(loaded)
    plugins = {name.split(".")[1] for name in loaded if name.startswith("edged_plugins.")}
    assert {plugin for plugin in plugins if not plugin.startswith("_")} == set(named)


# --- 6: what is pure ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PURE.split())
def test_a_pure_module_sees_values_only(module: str) -> None:
    """No I/O, no clock, no chance, no log: then a test needs no fake, and a plan can be explained."""
    file = CORE / f"{module}.py"
    for found in imports(file):
        assert found.library == "edged" or found.library in PURE_MAY_IMPORT, f"{found}: {module} is pure"
    for _, used in internal(file):
        assert used in (*PURE.split(), "errors"), f"{module} is pure and imports {used}"


@pytest.mark.parametrize("module", PURE.split())
def test_a_pure_module_calls_nothing_that_depends_on_more_than_its_arguments(module: str) -> None:
    assert not _calls(CORE / f"{module}.py") & PURE_NEVER_CALLS


def _calls(file: Path) -> set[str]:
    """Names of everything a file calls."""
    called = [node.func for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    return {f.id for f in called if isinstance(f, ast.Name)} | {
        f.attr for f in called if isinstance(f, ast.Attribute) and f.attr in ("system", "popen", "eval")
    }


# --- nowhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [*core_files(), *plugin_files()], ids=lambda file: str(file.relative_to(ROOT))
)
def test_nothing_is_unpickled_evaluated_or_handed_to_a_shell(file: Path) -> None:
    for found in imports(file):
        assert found.library not in NEVER_ANYWHERE, f"{found}: {NEVER_ANYWHERE[found.library]}"
    for name in _calls(file) & set(NEVER_CALLED):
        pytest.fail(f"{file.name} calls {name}: {NEVER_CALLED[name]}")
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"{file.name}:{node.value.lineno} asks for a shell")


@pytest.mark.parametrize(
    "file", [*core_files(), *plugin_files()], ids=lambda file: str(file.relative_to(ROOT))
)
def test_whoever_catches_every_exception_says_why(file: Path) -> None:
    lines = file.read_text().splitlines()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name):
            line = lines[node.lineno - 1]
            assert node.type.id != "Exception" or "#" in line, f"{file.name}:{node.lineno}: {line.strip()}"


@pytest.mark.parametrize("file", plugin_files(), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_a_plugin_configures_no_logging_and_ends_no_process(file: Path) -> None:
    """Both belong to the process it is a guest in."""
    called = [node.func for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    names = {f.attr for f in called if isinstance(f, ast.Attribute)}
    names |= {f.id for f in called if isinstance(f, ast.Name)}
    assert not names & {"basicConfig", "dictConfig", "addHandler", "exit", "_exit", "abort"}
